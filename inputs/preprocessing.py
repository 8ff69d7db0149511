"""What is done to an image before a network reads it: size, channels, normalisation. It is stored with the network.

preprocessing = Preprocessing((3, 224, 224), mean, std, resize=256)
x = preprocessing.read(file)                 # [1, 3, 224, 224], as the network takes it
"""

from dataclasses import dataclass, replace

import torch

from inputs.image_files import read_image, sides

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training pixels
IMAGENET_RESIZE = 256 / 224  # shorter side over crop, in torchvision's recipes for ImageNet


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs of a network.

    shape: (C, H, W) of an input. mean, std: per channel, for pixels in [0, 1]; None if the user's own code normalises.
    resize: length in pixels of the shorter side before the centre of H x W is cropped; None crops to the shape of H x W
    first. classes: names, or () if there are none.
    """

    shape: tuple
    mean: tuple = None
    std: tuple = None
    resize: int = None
    classes: tuple = ()

    def read(self, file):
        """An image file as an input [1, C, H, W]. Raises OSError for an unreadable file.

        Raises ValueError if the preprocessing is not known.
        """
        if self.mean is None:
            raise ValueError("the network's preprocessing is the user's own code, use --mean and --std for its images")
        pixels = read_image(file, self.shape[1:], self.shape[0], self.resize)
        return self.normalise(pixels[None])

    def normalise(self, pixels):
        """Images uint8 [B, C, H, W] as inputs."""
        mean, std = (torch.tensor(x).view(-1, 1, 1) * 255 for x in (self.mean, self.std))
        return (pixels - mean) / std

    def in_words(self):
        """One line for the user."""
        shape = "x".join(map(str, self.shape))
        if self.mean is None:
            return f"images: {shape}, prepared by the user's own code"
        resized = f"shorter side {self.resize}, centre crop" if self.resize else "cropped to the centre and resized"
        return f"images: {shape}, {resized}; mean {rounded(self.mean)}, std {rounded(self.std)}"

    def to_dict(self):
        """Plain data, for files."""
        return {
            "input_shape": list(self.shape),
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
            "resize": self.resize,
            "classes": list(self.classes),
        }

    @classmethod
    def from_dict(cls, data):
        """The preprocessing from plain data that `dag_checks` has accepted."""
        mean, std = (None if data[key] is None else tuple(data[key]) for key in ("mean", "std"))
        return cls(tuple(data["input_shape"]), mean, std, data["resize"], tuple(data["classes"]))


def rounded(values):
    """Numbers as short text, "(0.485, 0.456, 0.406)"; one number if all are equal."""
    texts = [f"{value:.4g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else f"({', '.join(texts)})"


# ---------------------------------------------------------------------------------------------------------------------
# Choosing it by the flags


def choose_size(size, args):
    """`size, resize` by --resize and --crop. size: what the network takes, None if it does not say.

    Raises ValueError if --crop contradicts the network's size, or --resize is below it.
    """
    resize, crop = getattr(args, "resize", None), getattr(args, "crop", None)
    if crop is not None:
        if size is not None and sides(size) != sides(crop):
            raise ValueError(f"--crop {crop}: the network takes images of {sides(size)}, leave one of them out")
        size = crop
    if resize is not None and size is None:
        size = resize
    if resize is not None and resize < max(sides(size)):
        raise ValueError(f"--resize {resize} is below the image's {max(sides(size))} pixels, use at least that")
    return size, resize


def choose_statistics(args, images):
    """`mean, std` per channel by --mean, --std and --preprocess.

    Raises ValueError for another number of values than channels.
    """
    channels, preprocess = len(images.mean), getattr(args, "preprocess", "dataset")
    chosen = {"dataset": (images.mean, images.std), "none": ((0.0,), (1.0,)), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}
    found = []
    for flag, value in zip(("mean", "std"), chosen[preprocess], strict=True):
        given = getattr(args, flag, None)
        value, source = (value, f"--preprocess {preprocess}") if given is None else (given, f"--{flag}")
        if len(value) not in (1, channels):
            raise ValueError(f"{source} has {len(value)} values and the images {channels} channels, give one for each")
        found.append(tuple(value) * (channels // len(value)))
    return tuple(found)


def fit_channels(images, channels):
    """Data-set images in 1 or 3 channels: grey ones repeated, coloured ones as luminance. None keeps theirs.

    Raises ValueError for other numbers of channels.
    """
    have = len(images.mean)
    if channels in (None, have):
        return images
    if {channels, have} != {1, 3}:
        raise ValueError(f"the images have {have} channels and the network takes {channels}, use another --dataset")
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    def fit(pixels):
        return pixels.expand(-1, 3, -1, -1) if channels == 3 else rgb_to_grayscale(pixels)

    statistics = [x * 3 if channels == 3 else (sum(x) / 3,) for x in (images.mean, images.std)]
    pixels = {"train_images": fit(images.train_images), "test_images": fit(images.test_images)}
    return replace(images, **pixels, mean=statistics[0], std=statistics[1])
