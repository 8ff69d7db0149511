"""The images of a search: the first training images calibrate, those behind them are held out to compare conversions.

No test image is read. Both parts come from one pass over the loader that ann2snn.py calibrates with, so a conversion
that calibrates on the first images is the same in both. Training with labels leaves the images held out away.
"""

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Subset

from runtime.batches import batches_of, labelled_batch

MIN_REST = 4  # at most one in four training images is held out
LARGEST_SET = 2**30  # bytes of images that are held out: 1,783 images of 3x224x224 pixels


@dataclass
class SearchImages:
    """calibration: batches of images to calibrate with. images [N, C, H, W], labels [N]: those held out.

    train: a loader of the other training images, with their augmentation, or None where it is not known which images
    are held out, as with data of the user's own code.
    """

    calibration: list
    images: torch.Tensor
    labels: torch.Tensor
    train: object = None

    @property
    def samples(self):
        """The number of calibration images."""
        return sum(len(images) for images, _ in self.calibration)

    def keep(self, most):
        """Keep the first `most` of the images held out."""
        self.images, self.labels = self.images[:most], self.labels[:most]


def split_images(loaders, wanted, held_out, seed):
    """The SearchImages of a network's training images.

    loaders: (training images, calibration images). wanted: images to calibrate with; held_out: images to hold out. Both
    are fewer if there are not as many. Raises ValueError for images without labels, and for too few.
    """
    train_loader, calibration_loader = loaders
    images, labels, held_out = read_images(calibration_loader, wanted, held_out)
    if len(labels) < wanted + held_out:
        held_out = min(held_out, len(labels) // MIN_REST)
    if not held_out:
        raise ValueError(f"{len(labels)} training images are too few to hold some out, {MIN_REST} are the least")
    samples = min(wanted, len(labels) - held_out)
    ends = samples, samples + held_out
    size = getattr(train_loader, "batch_size", None) or len(labels)
    calibration = list(zip(images[: ends[0]].split(size), labels[: ends[0]].split(size)))
    order = getattr(calibration_loader.dataset, "order", None)
    knows = order is not None and len(train_loader.dataset) == len(order)
    train = without(train_loader, order[ends[0] : ends[1]], seed) if knows else None
    return SearchImages(calibration, images[ends[0] : ends[1]], labels[ends[0] : ends[1]], train)


def read_images(loader, wanted, held_out):
    """`images, labels, held_out`: the first of a loader, [N, C, H, W] and [N], and how many memory allows to hold out.

    Whole batches are read until there are `wanted + held_out` images, or all are read.
    """
    parts, read = [], 0
    for batch in batches_of(loader):
        (images,), labels = labelled_batch(batch, "cpu")
        parts.append((images, labels.flatten()))
        read += len(images)
        held_out = min(held_out, max(1, LARGEST_SET // (images[0].numel() * images.element_size())))
        if read >= wanted + held_out:
            break
    if not parts:
        raise ValueError("the data loader is empty, give it at least one batch")
    images, labels = (torch.cat(each) for each in zip(*parts))
    return images, labels, held_out


def without(loader, indices, seed):
    """A loader over the same training images without some. indices: [N], in the order of its data set."""
    kept = torch.ones(len(loader.dataset), dtype=torch.bool)
    kept[indices] = False
    return DataLoader(
        Subset(loader.dataset, kept.nonzero().flatten().tolist()),
        loader.batch_size,
        shuffle=True,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(seed),
    )
