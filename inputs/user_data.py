"""Data of the user's own code: `--dataset path/to/file.py:callable` or `package.module:callable`.

The callable returns the training and the test data, in this order, as a tuple or under the keys "train" and "test":
each a torch Dataset of (image, label), or a DataLoader, whose batches are used as they are. One Dataset alone is split.
Calibration reads the training data, or what is under "calibration".
"""

from collections.abc import Mapping

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate, random_split

from inputs.preprocessing import Preprocessing
from runtime.batches import batches_of, has_length, in_words, split_batch
from runtime.user_code import in_one_line, load_code, modules_of

TEST_SHARE = 0.2  # of one Dataset that is given alone
LABELS_LOOKED_AT = 10_000  # samples whose labels tell the number of classes, where the data do not say it
IMAGES_KEPT = 1024  # of a stream of batches, for what examines single images
LABEL_NAMES = ("targets", "labels", "y")  # where Datasets keep the labels of all samples
FORMS = "(train, test), {'train': ..., 'test': ...} or one Dataset; each a torch Dataset or DataLoader"


class UserImages(Dataset):
    """Single images of the user's data, with what the pipeline asks of a data set.

    `images[i]` is `(image [C, H, W], label)`. source: a Dataset with a length, or a list of samples.
    """

    def __init__(self, source, like=None):
        self.source = source
        first = self[0][0]
        self.classes = tuple(map(str, getattr(source, "classes", None) or ())) or (like.classes if like else ())
        self.channels, self.preprocessing = first.shape[0], Preprocessing(tuple(first.shape), classes=self.classes)
        self.num_classes = like.num_classes if like else None

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        inputs, labels = split_batch(default_collate([self.source[index]]))
        return inputs[0][0], None if labels is None else labels[0]


def user_loaders(args):
    """`test_loader, val_loader, train_loader, train_val_loader` of the user's code `args.dataset`.

    Raises ValueError, with the user's file and line, if the code fails or returns something else.
    """
    code = load_code(args.dataset)
    if not callable(code.target):
        raise ValueError(f"{args.dataset} is a {type(code.target).__name__}, name a function that returns {FORMS}")
    train, test, calibration = three_parts(code.call({}, how="give it a default"), args.dataset)
    with in_one_line(args.dataset, code.folder), modules_of(code.folder):
        train_images = user_images(train, args.dataset)
        train_images.num_classes = count_classes(train_images, test)
        val, train = hold_out(train, args)
        return (
            as_loader(test, args, train_images),
            as_loader(val, args, train_images),
            as_loader(train, args, train_images, shuffle=True),
            as_loader(calibration, args, train_images, shuffle=True),
        )


def three_parts(found, spec):
    """`train, test, calibration` of what the user's code returned. Raises ValueError for another form."""
    if isinstance(found, Mapping) and {"train", "test"} <= set(found):
        parts = found["train"], found["test"], found.get("calibration", found["train"])
    elif isinstance(found, (tuple, list)) and len(found) == 2:
        parts = found[0], found[1], found[0]
    elif isinstance(found, Dataset) and has_length(found):
        counts = [1 - TEST_SHARE, TEST_SHARE]
        train, test = random_split(found, counts, torch.Generator().manual_seed(0))
        parts = train, test, train
    else:
        raise ValueError(f"{spec} returns {in_words(found)}, it has to return {FORMS}")
    for part in parts:
        if not isinstance(part, Dataset) and not hasattr(part, "__iter__"):
            raise ValueError(f"{spec} returns {in_words(part)} among its data, it has to return {FORMS}")
        if isinstance(part, (list, tuple)) and part and not is_batch(part[0]):
            raise ValueError(f"{spec} returns a list of single samples, make a torch Dataset of it")
    return parts


def is_batch(item):
    """Whether an item of a list is a batch: its labels, or its images alone, have the batch as first dimension."""
    inputs, labels = split_batch(item)
    return isinstance(labels, torch.Tensor) and labels.dim() > 0 if labels is not None else inputs[0].dim() > 3


def user_images(part, spec):
    """The UserImages of a part; a stream of batches is read up to `IMAGES_KEPT` images. ValueError if it is empty."""
    source = part if isinstance(part, Dataset) else getattr(part, "dataset", None)
    if not isinstance(source, Dataset) or isinstance(source, IterableDataset) or not has_length(source):
        source = first_samples(DataLoader(part, 1) if isinstance(part, Dataset) else part)
    if not len(source):
        raise ValueError(f"{spec} returns data without any sample")
    return UserImages(source)


def first_samples(loader):
    """The first `IMAGES_KEPT` samples, (image, label), of a stream of batches."""
    samples = []
    for batch in batches_of(loader):
        inputs, labels = split_batch(batch)
        samples += list(zip(inputs[0], labels if labels is not None else [-1] * len(inputs[0])))
        if len(samples) >= IMAGES_KEPT:
            break
    return samples[:IMAGES_KEPT]


def count_classes(images, test):
    """The number of classes: named by the data, or one more than the largest label that is found."""
    named = [images.source, getattr(images.source, "dataset", None), test, getattr(test, "dataset", None)]
    for source in named:
        if getattr(source, "classes", None):
            return len(source.classes)
        if isinstance(getattr(source, "num_classes", None), int):
            return source.num_classes
    for source in named:
        labels = next((getattr(source, name) for name in LABEL_NAMES if hasattr(source, name)), None)
        tensors = getattr(source, "tensors", None)
        labels = tensors[1] if labels is None and tensors is not None and len(tensors) > 1 else labels
        if labels is not None and not isinstance(source, Subset):
            return int(torch.as_tensor(labels).max()) + 1
    some = range(0, len(images), -(-len(images) // LABELS_LOOKED_AT))
    return 1 + max(int(images[index][1]) for index in some)


def hold_out(train, args):
    """`val, train`: the share --val_share of a Dataset, at random. Raises ValueError for it with a DataLoader."""
    share = getattr(args, "val_share", 0.0)
    if not share:
        return [], train
    if not isinstance(train, Dataset) or not has_length(train):
        raise ValueError(f"--val_share {share} needs a torch Dataset, {args.dataset} returns a stream of batches")
    generator = torch.Generator().manual_seed(getattr(args, "seed", 0))
    train, val = random_split(train, [1 - share, share], generator)
    return val, train


class UserLoader:
    """The user's own DataLoader, with a `dataset` that the pipeline can ask for single images."""

    def __init__(self, loader, dataset):
        self.loader, self.dataset = loader, dataset

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)  # TypeError for a stream without a length, as `has_length` expects


def as_loader(part, args, train_images, shuffle=False):
    """A loader for a part of the user's data; for a Dataset it is made by --batch_size and --num_workers."""
    if isinstance(part, list) and not part:
        return DataLoader(NoImages(train_images), 1)
    if not isinstance(part, Dataset):
        images = train_images if shuffle else user_images(part, args.dataset)
        images.num_classes, images.classes = train_images.num_classes, images.classes or train_images.classes
        return UserLoader(part, images)
    size = getattr(args, "batch_size" if shuffle else "test_batch_size", 100)
    generator = torch.Generator().manual_seed(getattr(args, "seed", 0))
    workers = getattr(args, "num_workers", 0)
    shuffle = shuffle and has_length(part) and not isinstance(part, IterableDataset)
    loader = DataLoader(part, size, shuffle, num_workers=workers, generator=generator)
    return UserLoader(loader, UserImages(part, train_images) if has_length(part) else train_images)


class NoImages(Dataset):
    """An empty data set, for validation images that nobody asked for."""

    def __init__(self, like):
        self.channels, self.classes, self.num_classes = like.channels, like.classes, like.num_classes
        self.preprocessing = like.preprocessing

    def __len__(self):
        return 0
