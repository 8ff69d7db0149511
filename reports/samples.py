"""The images of an analysis: test images, whose results are reported, and validation images, which choose."""

from dataclasses import dataclass

import torch
from torch.utils.data import RandomSampler

from runtime.batches import count_batches

FEWEST = 50  # validation images; a share of fewer ones is known to 14 points at best


@dataclass
class Sample:
    """images [N, ...], labels [N], the float ANN's class scores [N, classes], and which images these are, in words."""

    images: torch.Tensor
    targets: torch.Tensor
    expected: torch.Tensor = None
    words: str = "test images"

    def __len__(self):
        return len(self.images)

    def facts(self):
        return {"images": len(self), "words": self.words}


def choose_images(dataset, most, seed, device, among=None):
    """At most `most` images [B, ...] of a data set and their labels [B]. among: indices to choose from, or None.

    They are chosen at random, because the first images of a data set may all have the same class.
    """
    order = random_order(range(len(dataset)) if among is None else among, seed)
    return take(dataset, sorted(order[:most]), device)


def random_order(indices, seed):
    """The indices as a list, in an order that depends on the seed alone."""
    indices = list(indices)
    return [indices[i] for i in torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()]


def take(dataset, indices, device):
    """The images [B, ...] and labels [B] of a data set at `indices`."""
    images, targets = zip(*[dataset[i] for i in indices])
    return torch.stack(images).to(device), torch.tensor([int(target) for target in targets], device=device)


def reported_sample(loaders, most, seed, device):
    """The Sample of test images on which layers and other flags are reported."""
    return Sample(*choose_images(loaders[0].dataset, most, seed, device))


def validation_sample(loaders, most, args, device):
    """The Sample on which flags and layers are chosen; none of its images is among the reported ones if possible.

    loaders: (test, validation, training, calibration) as `datasets.get_dataset` returns them. In this order: images of
    --val_share, training images that calibrated nothing, test images that `reported_sample` left, calibration images.
    With --try_presets, test images come before training images: presets that train would be right on those by heart.
    """
    test, val, _, calibration = loaders
    trained = bool(args.finetune_epochs or args.spike_epochs or args.try_presets)
    enough = min(most, FEWEST)
    held_out = behind_calibration(calibration, args.calibration_samples)
    left = random_order(range(len(test.dataset)), args.seed)[most:]
    if val is not None and count_batches(val) and len(val.dataset) >= enough:
        return Sample(*choose_images(val.dataset, most, args.seed, device), words="validation images (--val_share)")
    if len(held_out) >= enough and not (args.try_presets and len(left) >= enough):
        words = "training images that calibrated nothing" + (", though finetuning has seen them" if trained else "")
        return Sample(*choose_images(calibration.dataset, most, args.seed, device, held_out), words=words)
    if len(left) >= enough:
        return Sample(*take(test.dataset, sorted(left[:most]), device), words="test images apart from the others")
    return Sample(*choose_images(calibration.dataset, most, args.seed, device), words="calibration images")


def behind_calibration(loader, samples):
    """Indices of the calibration loader's data set behind the first `samples`; none if the loader shuffles."""
    count = len(loader.dataset)
    return range(count if shuffles(loader) else min(samples, count), count)


def shuffles(loader):
    """Whether a loader gives its images in another order at each pass."""
    return isinstance(getattr(loader, "sampler", None), RandomSampler)
