"""Data sets in the COCO format: images, boxes and categories for detection.

`coco_loaders(root, args)` returns `test_loader, val_loader, train_loader, train_val_loader`, as `datasets.get_dataset`
does, from files in COCO's own layout:

    root/annotations/instances_train2017.json, instances_val2017.json
    root/train2017/*.jpg, root/val2017/*.jpg         (the validation images are the test set)

A batch is `images [B, 3, S, S], targets [B, M, 5]`: images are letterboxed to squares; a target is the class and the
box (left, top, right, bottom) in pixels of the square, with class -1 where an image has fewer boxes than another.
"""

import contextlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime.batches import check_some_train, four_loaders
from runtime.files import check_regular
from runtime.packages import check_packages

SPLITS = {"train": "train2017", "test": "val2017"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's detectors use them
GREY = 114  # of the bars beside a letterboxed image: ImageNet's mean, 0.449 of 255
# Bytes of uint8 pixels of one split; a larger one is decoded batch by batch. 1 GiB holds 38,000 images of 96x96 pixels,
# so a part of COCO's 118,287 training images, but not all.
LARGEST_SPLIT_IN_MEMORY = 2**30
NO_OBJECT = -1
LARGEST_NUMBER = 1e18  # of a box or an area: its square is a finite float32 (up to 3.4e38)


@dataclass(frozen=True)
class Letterbox:
    """Fits an image of `width` x `height` pixels into a square with side `size`: scaled, then centred."""

    width: int
    height: int
    size: int

    @property
    def inner(self):
        """Width and height of the scaled image, at least one pixel each."""
        scale = self.size / max(self.width, self.height)
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))

    @property
    def offset(self):
        """Pixels of the bars on the left and on top."""
        width, height = self.inner
        return (self.size - width) // 2, (self.size - height) // 2

    def scale_and_shift(self):
        """`scale, shift`, [4] each: boxes in the square are `boxes * scale + shift`."""
        (width, height), (left, top) = self.inner, self.offset
        scale = torch.tensor([width / self.width, height / self.height] * 2)
        return scale, torch.tensor([left, top] * 2, dtype=torch.float32)

    def to_square(self, boxes):
        """Boxes [N, 4] (left, top, right, bottom) in pixels of the image, converted to pixels of the square."""
        scale, shift = self.scale_and_shift()
        return boxes * scale + shift

    def to_image(self, boxes):
        """The inverse, with boxes clipped to the image."""
        scale, shift = self.scale_and_shift()
        edges = torch.tensor([self.width, self.height] * 2, dtype=torch.float32)
        return ((boxes - shift) / scale).clamp_min(0).minimum(edges)

    def draw(self, image):
        """A PIL image as uint8 [3, size, size]."""
        from PIL import Image

        square = Image.new("RGB", (self.size, self.size), (GREY,) * 3)
        square.paste(image.convert("RGB").resize(self.inner, Image.Resampling.BILINEAR), self.offset)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


class CocoSplit:
    """The images of one split.

    coco: the annotations, of pycocotools. ids: of the images, sorted. categories: COCO's category ids, sorted; class k
    of the network is `categories[k]`, since COCO numbers its 80 categories from 1 to 90. classes: their names.
    """

    def __init__(self, root, split, image_size):
        self.folder = os.path.join(root, SPLITS[split])
        self.file = os.path.join(root, "annotations", f"instances_{SPLITS[split]}.json")
        self.image_size = image_size
        self.coco = open_split(self.folder, self.file)
        self.ids = sorted(self.coco.imgs)
        self.categories = sorted(self.coco.getCatIds())
        self.classes = tuple(category["name"] for category in self.coco.loadCats(self.categories))
        if not self.ids or not self.categories:
            raise ValueError(f"{self.file} lists no {'images' if not self.ids else 'categories'}, use another file")
        self.targets = [self.read_targets(image_id) for image_id in self.ids]
        self.pixels = None

    def __len__(self):
        return len(self.ids)

    def letterbox(self, index):
        """The letterbox of image `index`."""
        image = self.coco.imgs[self.ids[index]]
        return Letterbox(image["width"], image["height"], self.image_size)

    def read_targets(self, image_id):
        """float32 [N, 5]: class, left, top, right, bottom in pixels of the image, without crowds and empty boxes."""
        entries = self.coco.loadAnns(self.coco.getAnnIds(image_id, iscrowd=False))
        rows = [[self.categories.index(entry["category_id"]), *entry["bbox"]] for entry in entries]
        targets = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
        targets = targets[(targets[:, 3:] > 0).all(1)]
        targets[:, 3:] += targets[:, 1:3]  # COCO gives left, top, width, height
        return targets

    def decode_all(self):
        """Keep the pixels of all images in memory, within `LARGEST_SPLIT_IN_MEMORY`."""
        if len(self) * 3 * self.image_size**2 <= LARGEST_SPLIT_IN_MEMORY:
            with ThreadPoolExecutor() as pool:
                self.pixels = torch.stack(list(pool.map(self.read_pixels, range(len(self)))))
        return self

    def read_pixels(self, index):
        """uint8 [3, S, S] of one image."""
        from PIL import Image

        file = os.path.join(self.folder, self.coco.imgs[self.ids[index]]["file_name"])
        try:
            check_regular(file)
            with Image.open(file) as image:
                return self.letterbox(index).draw(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
            raise OSError(
                f"cannot read the image {file} ({type(error).__name__}), it is missing or damaged, copy it again"
            ) from error


def open_split(folder, file):
    """The annotations of a split, a COCO of pycocotools. Raises OSError or ValueError for missing or damaged files."""
    check_packages("--dataset COCO", "pycocotools")
    from pycocotools.coco import COCO

    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"no annotations {file}, put COCO's train2017/, val2017/ and annotations/ below --dataset_root"
        )
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no image folder {folder}, put COCO's images there, or name another --dataset_root")
    coco = COCO()
    try:
        with open(file, encoding="utf-8") as text:
            coco.dataset = checked_entries(json.load(text))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"the annotations {file} are damaged, or not a COCO file ({type(error).__name__}: {error}), copy them again"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on stdout
        coco.createIndex()
    return coco


def checked_entries(data):
    """The images, categories and annotations of a file, after checks; annotations get the ids 1, 2, ...

    New ids are needed because pycocotools merges annotations with the same id and ignores the id 0. Raises ValueError
    or LookupError that names an entry without a needed field.
    """
    images = {entry["id"] for entry in each_checked(data["images"], "image", check_image)}
    categories = {entry["id"] for entry in each_checked(data["categories"], "category", check_category)}

    def check(entry):
        check_annotation(entry, images, categories)

    annotations = [
        {**entry, "id": number}
        for number, entry in enumerate(each_checked(data["annotations"], "annotation", check), 1)
    ]
    return {"images": data["images"], "categories": data["categories"], "annotations": annotations}


def each_checked(entries, kind, check):
    """The entries, each after its check; an error gives the entry's position in the file."""
    for number, entry in enumerate(entries, 1):
        try:
            check(entry)
        except (LookupError, TypeError) as error:
            raise ValueError(f"{kind} number {number} of the file: {type(error).__name__}: {error}") from error
        yield entry


def check_image(entry):
    """Raise an error unless an image has an id, a file name and a size."""
    check_id(entry["id"], "image")
    has_name = isinstance(entry["file_name"], str) and entry["file_name"]
    if not (has_name and is_size(entry["width"]) and is_size(entry["height"])):
        raise ValueError(f"image {entry['id']} has no file name or no size")


def check_category(entry):
    """Raise an error unless a category has an id and a name."""
    check_id(entry["id"], "category")
    if not isinstance(entry["name"], str):
        raise ValueError(f"the name of category {entry['id']} is {entry['name']!r}, not text")


def check_annotation(entry, images, categories):
    """Raise an error unless an annotation has a box, a category and an image that are known."""
    known = is_id(entry["category_id"]) and entry["category_id"] in categories
    known = known and is_id(entry["image_id"]) and entry["image_id"] in images
    if not known or len(entry["bbox"]) != 4 or not all(map(is_number, entry["bbox"])):
        raise ValueError(f"annotation {entry['id']} has no box of 4 numbers, no known category or no known image")
    if not {"iscrowd", "area"} <= set(entry):
        raise ValueError(f"annotation {entry['id']} has no iscrowd or no area")
    if entry["iscrowd"] not in (0, 1) or not is_number(entry["area"]):
        raise ValueError(f"annotation {entry['id']} has an iscrowd that is not 0 or 1, or an area that is not a number")


def check_id(value, kind):
    """Raise ValueError unless an id of an image or a category is a whole number."""
    if not is_id(value):
        raise ValueError(f"the {kind} id {value!r} is not a whole number")


def is_id(value):
    """Whether a value is a whole number, without true and false, which Python counts as 1 and 0."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63  # as NumPy's int64


def is_number(value):
    """Whether a value is a finite number that can be a length or area in pixels."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


def is_size(value):
    """Whether a value is a number of pixels."""
    return is_number(value) and value > 0


class CocoImages(Dataset):
    """Normalised images of a split at `indices`, and their boxes; it fetches a whole batch at once.

    `dataset[i]` is `(image [3, S, S], targets [M, 5])`. augment: mirror half of the images, and shift all of them by up
    to an eighth of their side.
    """

    def __init__(self, split, indices, augment=False):
        self.split, self.indices, self.augment = split, list(indices), augment
        self.classes, self.num_classes, self.channels = split.classes, len(split.classes), 3
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (MEAN, STD))

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        images, targets = self.__getitems__([index])
        return images[0], targets[0]

    def __getitems__(self, indices):
        chosen = [self.indices[i] for i in indices]
        split = self.split
        pixels = [split.read_pixels(i) if split.pixels is None else split.pixels[i] for i in chosen]
        targets = [in_square(split.letterbox(i), split.targets[i]) for i in chosen]
        if self.augment:
            pixels, targets = zip(*map(mirror_and_shift, pixels, targets))
        return (torch.stack(list(pixels)) - self.mean) / self.std, pad_targets(targets)


def in_square(letterbox, targets):
    """Targets [N, 5] of an image, in pixels of the square."""
    return torch.cat([targets[:, :1], letterbox.to_square(targets[:, 1:])], 1)


def pad_targets(targets):
    """A list of targets [N_i, 5] as one [B, M, 5] with M >= 1; rows without an object have class -1."""
    most = max(1, *map(len, targets))
    padded = torch.full((len(targets), most, 5), float(NO_OBJECT))
    for row, boxes in zip(padded, targets):
        row[: len(boxes)] = boxes
    return padded


def mirror_and_shift(pixels, targets):
    """An image uint8 [3, S, S] and its targets [N, 5], mirrored with probability 1/2 and shifted by up to S / 8."""
    size = pixels.shape[-1]
    if torch.rand(()) < 0.5:
        pixels, targets = pixels.flip(-1), targets.clone()
        targets[:, [1, 3]] = size - targets[:, [3, 1]]
    return shift(pixels, targets, *torch.randint(-(size // 8), size // 8 + 1, (2,)).tolist())


def shift(pixels, targets, right, down):
    """An image and its boxes, moved; grey fills up, and a box with half of its area outside or more is dropped."""
    size = pixels.shape[-1]
    canvas = torch.full_like(pixels, GREY)
    to = [slice(max(n, 0), size + min(n, 0)) for n in (down, right)]
    of = [slice(max(-n, 0), size - max(n, 0)) for n in (down, right)]
    canvas[:, to[0], to[1]] = pixels[:, of[0], of[1]]
    moved = targets[:, 1:] + torch.tensor([right, down] * 2)
    cut = moved.clamp(0, size)
    stays = area(cut) > 0.5 * area(moved)
    return canvas, torch.cat([targets[:, :1], cut], 1)[stays]


def area(boxes):
    """The area [N] of boxes [N, 4], in pixels."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


DEFAULT_SIZE = 96  # pixels: the side of yolo_tiny's images


def coco_loaders(root, args):
    """`test_loader, val_loader, train_loader, train_val_loader` of the COCO files below `root`.

    Optional in `args`, with defaults: image_size 96 (the side in pixels), batch_size 128, test_batch_size 100,
    num_workers 0, val_share 0, seed 0. Raises OSError or ValueError where files are missing or damaged, or the
    splits have different categories.
    """
    size = getattr(args, "image_size", None) or DEFAULT_SIZE
    if not isinstance(size, int):
        raise ValueError(f"--dataset COCO makes square images, not {size[0]}x{size[1]}: give --input_shape 3,S,S")
    train, test = (CocoSplit(root, split, size) for split in ("train", "test"))
    if train.categories != test.categories:
        raise ValueError(f"{train.file} and {test.file} list different categories, use files of the same release")
    train, test = train.decode_all(), test.decode_all()
    # the split into train and val is the same for every seed
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    cut = round(getattr(args, "val_share", 0.0) * len(train))
    check_some_train(len(train) - cut, args)
    generator = torch.Generator().manual_seed(getattr(args, "seed", 0))
    shuffled = torch.randperm(len(train), generator=generator).tolist()
    return four_loaders(
        CocoImages(test, range(len(test))),
        CocoImages(train, sorted(order[:cut])),
        CocoImages(train, sorted(order[cut:]), augment=True),
        CocoImages(train, shuffled),
        args,
    )
