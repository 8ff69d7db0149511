"""Image files: which a folder holds, their sizes and channels, and their pixels."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from runtime.files import check_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
DECODED_AT_ONCE = 500  # images of a folder per task of a thread: enough to feed all threads, 75 MB at 224x224 pixels
MOST_LOOKED_AT = 200  # files whose header decides the channels and size of a folder: 0.1 s on a slow disk
GREY_MODES = ("1", "L", "LA", "I", "F")  # Pillow's modes of one channel; those of 16 bits begin with "I;16"
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode


def is_image_file(entry):
    """Whether an entry of a folder is a file with the name of an image; reading a pipe would wait for ever.

    A broken link counts too: reading it then reports the missing image.
    """
    is_file = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    return is_file and entry.name.lower().endswith(IMAGE_SUFFIXES)


def list_image_folder(path):
    """Files, labels and class names of `path/<class>/*`, in alphabetical order."""
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        raise FileNotFoundError(f"no image folder {path}, expected train/<class>/ and test/<class>/ in {parent}")
    classes = tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir()))
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(entry.name for entry in os.scandir(os.path.join(path, name)) if is_image_file(entry))
        if not found:
            raise ValueError(
                f"no images in {os.path.join(path, name)}, remove that class or add {IMAGE_SUFFIXES} files"
            )
        files += [os.path.join(path, name, f) for f in found]
        labels += [label] * len(found)
    if not files:
        raise ValueError(
            f"the image folder {path} is empty, expected folders of images in it: train/<class>/ and test/<class>/, or "
            "<class>/"
        )
    return files, labels, classes


def channels_and_size(files):
    """`channels, size` of image files: 1 if all are grey, else 3; (H, W) if all have the same size, else None.

    `MOST_LOOKED_AT` evenly spaced files are looked at.
    """
    from PIL import Image

    modes, sizes = set(), set()
    for file in files[:: -(-len(files) // MOST_LOOKED_AT)]:
        with reading(file), Image.open(file) as image:
            modes.add(image.mode)
            sizes.add(image.size[::-1])
    is_grey = all(mode in GREY_MODES or mode.startswith("I;16") for mode in modes)
    return 1 if is_grey else 3, sizes.pop() if len(sizes) == 1 else None


@contextlib.contextmanager
def reading(file):
    """A context in which a file that is no readable image ends in an OSError with its name."""
    from PIL import Image

    try:
        check_regular(file)
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise OSError(f"cannot read the image {file} ({error}), repair or remove it") from error


def read_image(file, size, channels=3, resize=None):
    """An image file as uint8 [channels, H, W].

    size: (H, W), or one side. By default the image is cropped at its centre to the shape of H x W, then resized. With
    `resize`, its shorter side is resized to that many pixels and the centre of H x W cropped, as torchvision's Resize
    and CenterCrop do. Raises OSError for an unreadable file.
    """
    from PIL import Image, ImageOps

    height, width = sides(size)
    with reading(file), Image.open(file) as image:
        if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white; 65535 / 257 = 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        image = image.convert(MODES[channels])
        if resize is not None:
            image = centre_crop(image, (height, width), resize)
        elif image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


def centre_crop(image, size, resize):
    """The centre of (H, W) of an image, a Pillow image or a uint8 tensor, whose shorter side is `resize` pixels."""
    from torchvision.transforms.v2 import functional

    if isinstance(image, torch.Tensor):
        shape = image.shape[-2:]
        image = resize_bytes(image, tuple(resize * side // min(shape) for side in shape))
    else:
        image = functional.resize(image, [resize])
    return functional.center_crop(image, list(size))


def resize_bytes(pixels, size):
    """Images uint8 [N, C, H, W] as uint8 [N, C, *size]. size: one side, (H, W), or None for the images' own.

    PyTorch computes on bytes, alike on every processor. torchvision does so only where there is AVX2, and elsewhere
    on floats, which round some pixels to a neighbouring value.
    """
    if size is None or pixels.shape[-2:] == sides(size):
        return pixels
    return torch.nn.functional.interpolate(pixels, sides(size), mode="bilinear", antialias=True)


def sides(size):
    """(height, width) of a size: one side of a square, or already a pair."""
    return (size, size) if isinstance(size, int) else tuple(size)


class FolderPixels:
    """The images of a folder; indexing with a list decodes those images to uint8 [B, C, H, W].

    how: `size`, `channels` and `resize` of `read_image`.
    """

    def __init__(self, files, how):
        self.files, self.how = files, how

    def __len__(self):
        return len(self.files)

    def __getitem__(self, indices):
        return torch.stack([read_image(self.files[i], **self.how) for i in indices])

    def subset(self, indices):
        return FolderPixels([self.files[i] for i in indices], self.how)

    def nbytes(self):
        """Bytes of all images decoded."""
        height, width = sides(self.how["size"])
        return len(self) * self.how["channels"] * height * width

    def decode_all(self):
        """All images as one uint8 tensor [N, C, H, W]."""
        pixels = torch.empty(len(self), self.how["channels"], *sides(self.how["size"]), dtype=torch.uint8)
        starts = range(0, len(self), DECODED_AT_ONCE)
        blocks = [list(range(start, min(start + DECODED_AT_ONCE, len(self)))) for start in starts]
        with ThreadPoolExecutor() as pool, tqdm(desc="images", total=len(self), leave=False, delay=1) as bar:
            for block, decoded in zip(blocks, pool.map(self.__getitem__, blocks), strict=True):
                pixels[block] = decoded
                bar.update(len(block))
        return pixels
