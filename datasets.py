"""Data sets, and the four loaders of the pipeline.

`get_dataset(args)` returns `test_loader, val_loader, train_loader, train_val_loader`:

    test       the test images, in order: every accuracy is measured here
    val        a fixed stratified share of the training images (none by default), for choices during training
    train      the other training images, shuffled, and augmented as the data set defines
    train_val  all training images, never augmented, in a fixed shuffled order: for calibration

To add a data set, write one function `(root, image_size) -> Images` and name it in `DATASETS`.
"""

import os
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from inputs.image_files import FolderPixels, centre_crop, channels_and_size, list_image_folder, resize_bytes, sides
from inputs.preprocessing import IMAGENET_RESIZE, Preprocessing, choose_size, choose_statistics, fit_channels
from inputs.user_data import user_loaders
from runtime.batches import check_some_train, four_loaders
from runtime.cli import did_you_mean
from runtime.user_code import names_code

# Bytes of uint8 pixels of an image folder; a larger one is decoded batch by batch. 4 GiB are 28,000 images of 224x224
# pixels, and leave room for a network on a machine with 8 GB of memory.
LARGEST_SET_IN_MEMORY = 4 * 2**30
TRAIN_FOLDERS, TEST_FOLDERS = ("train", "training"), ("test", "val", "valid", "validation")
TEST_SHARE = 0.2  # of the images of a folder that has no split


@dataclass
class Images:
    """The result of a data set function: pixels and labels of both splits, normalisation and augmentation.

    train_images, test_images: uint8 [N, C, H, W], or an object that returns such a tensor for a list of indices.
    train_labels, test_labels: int64 [N]. mean, std: per channel, for pixels scaled to [0, 1].
    crop: pixels of zero padding for a random crop during training; flip: mirror half of the training images.
    resize: pixels of the shorter side before the centre was cropped, None if it was not done.
    """

    train_images: object
    train_labels: torch.Tensor
    test_images: object
    test_labels: torch.Tensor
    classes: tuple
    mean: tuple
    std: tuple
    crop: int = 0
    flip: bool = False
    resize: int = None


class ImageDataset(Dataset):
    """Normalised images and labels; it fetches, augments and normalises a whole batch at once.

    `dataset[i]` is `(image [C, H, W], label)`. `channels`, `num_classes` and `classes` describe the set.
    """

    def __init__(self, pixels, labels, images, augment=False):
        self.pixels, self.labels = pixels, labels
        self.classes, self.num_classes, self.channels = images.classes, len(images.classes), len(images.mean)
        self.mean = torch.tensor(images.mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(images.std).view(-1, 1, 1) * 255
        self.crop, self.flip = (images.crop, images.flip) if augment else (0, False)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image, label = self.__getitems__([index])
        return image[0], label[0]

    def __getitems__(self, indices):
        batch = self.pixels[indices]  # [B, C, H, W] uint8
        if self.crop:
            batch = random_crop(batch, self.crop)
        if self.flip:
            batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(-1), batch)
        return (batch - self.mean) / self.std, self.labels[indices]


def random_crop(batch, padding):
    """Shift each image of a batch by a random offset of at most `padding` pixels in each direction; zeros fill up."""
    B, _, H, W = batch.shape
    padded = torch.nn.functional.pad(batch, [padding] * 4)
    rows = torch.randint(2 * padding + 1, (B, 1)) + torch.arange(H)  # [B, H]
    columns = torch.randint(2 * padding + 1, (B, 1)) + torch.arange(W)  # [B, W]
    picked = padded[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return picked.permute(0, 3, 1, 2).contiguous()


def digits(root, image_size):
    """Handwritten digits, 1,797 images of 8x8 pixels in 17 grey levels, shipped with scikit-learn (UCI, 1998)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None]  # [N, 1, 8, 8]
    labels = torch.from_numpy(data.target).long()
    train, test = stratified_split(labels, 0.2)
    pixels = resize_bytes(pixels, image_size)
    names = tuple(str(name) for name in data.target_names)
    # mean and standard deviation of the training pixels, resized to 32x32
    return Images(pixels[train], labels[train], pixels[test], labels[test], names, (0.3062,), (0.3240,), crop=2)


def mnist(root, image_size):
    """MNIST (LeCun et al., 1998): 60,000 and 10,000 images, resized from 28x28."""
    train, test = torchvision_splits("MNIST", root, "MNIST/raw/train-images-idx3-ubyte and its three companions")
    pixels = [resize_bytes(split.data[:, None], image_size) for split in (train, test)]
    # mean and standard deviation of the training pixels, as in the PyTorch MNIST example
    return Images(pixels[0], train.targets, pixels[1], test.targets, tuple(train.classes), (0.1307,), (0.3081,), crop=2)


def cifar(name, files, mean, std):
    """The data set function of CIFAR-10 or CIFAR-100 (Krizhevsky, 2009)."""

    def load(root, image_size):
        train, test = torchvision_splits(name, root, files)
        pixels = [resize_bytes(torch.from_numpy(s.data).permute(0, 3, 1, 2), image_size) for s in (train, test)]
        labels = [torch.tensor(split.targets) for split in (train, test)]
        classes = tuple(train.classes)
        return Images(pixels[0], labels[0], pixels[1], labels[1], classes, mean, std, crop=4, flip=True)

    return load


def folder(root, image_size=None, channels=None, resize=None, preprocess="dataset"):
    """An image folder: `root/train/<class>/*` and `root/test/<class>/*`, or `root/<class>/*`, a fifth of it to test.

    `val` may stand for `test`. Images have the channels of the files (1 if all are grey, else 3) and are brought to
    `image_size` by `inputs.image_files.read_image`. preprocess "imagenet": files of other sizes get a shorter side of
    256/224 of it before the crop, as ImageNet's. Raises ValueError for files of several sizes without `image_size`.
    """
    (train_files, train_labels), (test_files, test_labels), classes = folder_splits(root)
    channels_found, size_found = channels_and_size(train_files)
    if image_size is None and size_found is None:
        raise ValueError(
            f"the images of {root} have several sizes, choose one: --input_shape {channels_found},H,W or --crop PIXELS"
        )
    size = image_size or size_found
    if resize is None and preprocess == "imagenet" and size_found != sides(size):
        resize = round(min(sides(size)) * IMAGENET_RESIZE)
    how = {"size": size, "channels": channels or channels_found, "resize": resize}
    train_pixels, test_pixels = FolderPixels(train_files, how), FolderPixels(test_files, how)
    if train_pixels.nbytes() + test_pixels.nbytes() <= LARGEST_SET_IN_MEMORY:
        train_pixels, test_pixels = train_pixels.decode_all(), test_pixels.decode_all()
    mean, std = channel_statistics(train_pixels)
    crop = min(sides(size)) // 8  # the share of CIFAR's crop, 4 of 32 pixels
    splits = train_pixels, train_labels, test_pixels, test_labels
    return Images(*splits, classes, mean, std, crop, flip=True, resize=resize)


def folder_splits(root):
    """`(files, labels), (files, labels), classes` of the training and test images of an image folder."""
    train, test = (find_folder(root, names) for names in (TRAIN_FOLDERS, TEST_FOLDERS))
    if train is not None and test is not None:
        (files, labels, classes), (test_files, test_labels, names) = list_image_folder(train), list_image_folder(test)
        if names != classes:
            different = sorted(set(names) ^ set(classes))
            raise ValueError(
                f"{train} and {test} hold different classes ({', '.join(different[:5])}), give both the same folders"
            )
        return (files, torch.tensor(labels)), (test_files, torch.tensor(test_labels)), classes
    if train is None and test is not None:
        train = os.path.join(root, TRAIN_FOLDERS[0])  # its absence is reported
    files, labels, classes = list_image_folder(root if train is None else train)
    labels = torch.tensor(labels)
    parts = stratified_split(labels, TEST_SHARE)
    if not len(parts[1]):
        raise ValueError(f"{train or root} has too few images of a class to keep one in five for the test, add test/")
    print(f"{train or root} has no test images, one in five of each class is kept for the test", file=sys.stderr)
    return *(([files[i] for i in part], labels[part]) for part in parts), classes


def find_folder(root, names):
    """The path of the first folder of these names in `root`, or None."""
    paths = (os.path.join(root, name) for name in names)
    return next((path for path in paths if os.path.isdir(path)), None)


def debug_columns(root, image_size):
    """debug0: binary 1x6x6 images, two classes: only the left two or only the right two columns contain pixels."""

    def draw(rng, label):
        image = rng.integers(0, 2, (1, 6, 6))
        image[:, :, 4:] *= label
        image[:, :, :2] *= 1 - label
        image[0, 2, 5 * label] = 1  # at least one pixel in the class's own columns
        return image

    return draw_debug_images(draw)


def debug_channels(root, image_size):
    """debug1: binary 2x4x4 images, two classes: the first or the second channel is full."""

    def draw(rng, label):
        image = rng.integers(0, 4, (2, 4, 4)) == 0
        image[label] = 1
        return image

    return draw_debug_images(draw)


def debug_stripes(root, image_size):
    """debug2: binary 1x6x6 images, two classes: vertical or horizontal stripes."""

    def draw(rng, label):
        stripes = np.zeros((6, 6), int)
        stripes[:, rng.permutation([0, 1, 3, 5])[:3]] = 1
        return (stripes.T if label else stripes)[None]

    return draw_debug_images(draw)


def draw_debug_images(draw):
    """64 training and 32 test images by `draw(rng, label)`, with pixels 0 or 255: the network reads 0.0 or 1.0."""
    rng = np.random.default_rng(0)
    labels = [np.arange(n) % 2 for n in (64, 32)]
    pixels = [torch.from_numpy(np.stack([draw(rng, y) for y in split])).to(torch.uint8) * 255 for split in labels]
    channels = pixels[0].shape[1]
    train, test = (torch.from_numpy(split).long() for split in labels)
    return Images(pixels[0], train, pixels[1], test, ("0", "1"), (0.0,) * channels, (1.0,) * channels)


# mean and standard deviation per channel over all training pixels
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

DATASETS = {
    "digits": digits,
    "MNIST": mnist,
    "CIFAR10": cifar("CIFAR10", "cifar-10-batches-py", CIFAR10_MEAN, CIFAR10_STD),
    "CIFAR100": cifar("CIFAR100", "cifar-100-python", CIFAR100_MEAN, CIFAR100_STD),
    "folder": folder,
    "debug0": debug_columns,
    "debug1": debug_channels,
    "debug2": debug_stripes,
}
DETECTION_DATASETS = ("COCO",)  # boxes instead of labels: `coco.coco_loaders`


def get_dataset(args):
    """`test_loader, val_loader, train_loader, train_val_loader` of `args.dataset`.

    args: `dataset` is a name in DATASETS or DETECTION_DATASETS, the path of an image folder, or code of the user
    (`inputs.user_data`). Optional, with defaults: dataset_root "./data", image_size 32 (pixels, a side or (H, W); None
    is the size of the data), channels None, preprocess and augment "dataset", mean, std, resize and crop None,
    batch_size 128, test_batch_size 100, num_workers 0, val_share 0, seed 0. Every `loader.dataset` has `channels`,
    `classes`, `num_classes` and `preprocessing`. Raises ValueError for an unknown name, and OSError or ValueError where
    files are missing or unusable.
    """
    name, root = args.dataset, getattr(args, "dataset_root", "./data")
    if name not in (*DATASETS, *DETECTION_DATASETS) and os.path.isdir(name):
        name, root = "folder", name
    check_dataset_name(name)
    if name in DETECTION_DATASETS:
        from detection.coco import coco_loaders

        return coco_loaders(root, args)
    if names_code(name):
        return user_loaders(args)
    images, preprocessing = prepared_images(name, root, args)
    train, val = stratified_split(images.train_labels, getattr(args, "val_share", 0.0))
    check_some_train(len(train), args)
    generator = torch.Generator().manual_seed(getattr(args, "seed", 0))
    shuffled = torch.randperm(len(images.train_labels), generator=generator)
    everything = images.train_images, images.train_labels
    loaders = four_loaders(
        ImageDataset(images.test_images, images.test_labels, images),
        ImageDataset(*take(*everything, val), images),
        ImageDataset(*take(*everything, train), images, augment=True),
        ImageDataset(*take(*everything, shuffled), images),
        args,
    )
    for loader in loaders:
        loader.dataset.preprocessing = preprocessing
    loaders[3].dataset.order = shuffled  # [N]: which of the training images each is
    return loaders


def prepared_images(name, root, args):
    """`images, preprocessing` of a data set, in the size, channels and normalisation that `args` ask for.

    Raises ValueError for a mean or std with another number of channels than the images.
    """
    size, channels = getattr(args, "image_size", 32), getattr(args, "channels", None)
    size, resize = choose_size(size, args)
    if name == "folder":
        images = folder(root, size, channels, resize, getattr(args, "preprocess", "dataset"))
    elif resize is None:
        images = fit_channels(DATASETS[name](root, size), channels)
    else:
        images = DATASETS[name](root, None)
        crops = [centre_crop(pixels, sides(size), resize) for pixels in (images.train_images, images.test_images)]
        images = replace(images, train_images=crops[0], test_images=crops[1], resize=resize)
        images = fit_channels(images, channels)
    shape = tuple(images.test_images[[0]].shape[1:])
    mean, std = choose_statistics(args, images)
    images = replace(images, mean=mean, std=std)
    if getattr(args, "augment", "dataset") == "none":
        images = replace(images, crop=0, flip=False)
    return images, Preprocessing(shape, mean, std, images.resize, images.classes)


def check_dataset_name(name):
    """Raise ValueError unless `name` is a data set or the path of an image folder."""
    known = (*DATASETS, *DETECTION_DATASETS)
    if name not in known and not os.path.isdir(name) and not names_code(name):
        raise ValueError(
            f"unknown data set '{name}', choose one of {', '.join(known)}, or give the path of an image "
            f"folder, or path/to/file.py:callable{did_you_mean(name, known)}"
        )


def take(pixels, labels, indices):
    """The images and labels at `indices`; images on disk are chosen by their file names."""
    return pixels.subset(indices) if isinstance(pixels, FolderPixels) else pixels[indices], labels[indices]


def stratified_split(labels, share):
    """Indices of two parts, the second with `share` of every class; the same labels always give the same parts."""
    generator = torch.Generator().manual_seed(0)
    first, second = [], []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(share * len(members))
        first.append(members[cut:])
        second.append(members[:cut])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def torchvision_splits(name, root, files):
    """Training and test split of a torchvision data set, which is downloaded if it is missing."""
    from torchvision import datasets as torchvision_datasets

    dataset = getattr(torchvision_datasets, name)
    try:
        return [dataset(root, train=train, download=False) for train in (True, False)]
    except (RuntimeError, ValueError, AssertionError):  # torchvision's errors for missing and for damaged files
        pass
    before = existing_folders(os.path.join(root, name, "raw"))
    try:
        return [dataset(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        remove_empty_folders(os.path.join(root, name, "raw"), but=before)
        raise OSError(
            f"{name} is not in {os.path.abspath(root)}, or damaged, and cannot be downloaded ({type(error).__name__}), "
            f"put {files} there, or name their folder with --dataset_root"
        ) from error


def existing_folders(path):
    """Those of `path` and its parent folders that exist."""
    path, found = os.path.abspath(path), set()
    while path not in found and os.path.dirname(path) != path:
        if os.path.isdir(path):
            found.add(path)
        path = os.path.dirname(path)
    return found


def remove_empty_folders(path, but):
    """Remove `path` and its parent folders where a failed download created them and left them empty."""
    for folder in sorted(existing_folders(path) - but, key=len, reverse=True):
        if not os.listdir(folder):
            os.rmdir(folder)


def channel_statistics(pixels, most=10_000):
    """Mean and standard deviation per channel for pixels in [0, 1], to 4 decimals, from `most` evenly spaced images.

    A constant channel gets a deviation of 1e-4 instead of 0, because normalising divides by it.
    """
    sample = pixels[list(range(0, len(pixels), -(-len(pixels) // most)))].double() / 255
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-4)
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in std.tolist())
