"""One validation loop for ANN and SNN, classifiers and detectors.

    result = evaluate(net, loader, device, criterion)              # top-1 accuracy and loss of a classifier
    result = validate(net, loader, device, metric, timesteps)      # the loop, with a metric such as `Top1`

Every sample has the same weight, whatever the batch sizes. `detection.boxes.MeanAveragePrecision` is the other metric.
"""

import math
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from runtime.batches import fit_labels, labelled_batch, loader_for, loss_of, main_output, split_batch, type_of
from runtime.device import in_eval_mode
from runtime.processes import exchange, numbered, own_batches
from spike_dag import SpikeDAGModule, one_or_all
from spike_tensor import firing_ratios, record_firing_ratios

ANN_BYTES = 2**28  # of the largest layer of an ANN: that of 100 images of 32x32 pixels takes 26 MB in a VGG
AT_A_TIME = 16  # images whose classes are looked up in one pass: few enough for 224x224 pixels


def validate_ann(net, loader, device, criterion):
    """`top1, loss` of a network: top-1 accuracy in percent and the mean loss per sample."""
    result = evaluate(net, loader, device, criterion)
    return result["top1"], result["loss"]


def validate_snn(snn, loader, device, criterion, timesteps):
    """`top1, loss` of a spiking network after `timesteps` steps: in percent and the mean loss per sample."""
    result = evaluate(snn, loader, device, criterion, timesteps)
    return result["top1"], result["loss"]


def evaluate(net, loader, device, criterion, timesteps=None, every_step=False, keep_answers=False):
    """Top-1 accuracy of a network on all samples of `loader`; `timesteps` is given for a spiking one.

    loader: batches as `batches.split_batch` takes them; labels are classes [B] or [B, 1], or a row of shares [B, C].
    Of several outputs the first that fits the labels counts. A single score per sample, [B] or [B, 1], decides between
    two classes (`hits_of`).

    Returns a dict: top1 and (for five classes or more) top5 in percent, loss, samples; for a spiking network also
    firing_rate, spikes per neuron and step by layer, and with `every_step` top1_by_timestep, percent after step
    1, 2, ... `timesteps`, all from the same simulation. With `keep_answers` there is also answers, a dict of every
    image's `classes` and `targets`, int64 [N], and `right`, bool [T, N] (T = 1 without every_step), on the CPU.
    Afterwards the network is back on its device and in its mode.
    Raises ValueError where the loader is empty, labels do not fit the outputs, or the loss is not a number.
    """
    return validate(net, loader, device, Top1(criterion, every_step, keep_answers), timesteps)


@torch.no_grad()
def validate(net, loader, device, metric, timesteps=None):
    """Run a network on all samples of `loader`, and return what `metric` measures, as a dict.

    metric: `metric.every_step` says whether it wants the outputs of a spiking network after every timestep;
    `metric.measure_batch(inputs, outputs, targets)` returns name -> mean over the batch, "loss" among them, where
    outputs is a tuple of [T, B, ...] with every_step, else of [1, B, ...]; `metric.summary()` returns the figures that
    are no means over samples.

    Returns samples, the summary, the means per sample and, where `timesteps` is given, firing_rate, spikes per neuron
    and step by layer. Raises ValueError where the loader is empty or the loss is not finite.
    """
    measured, loader = [], own_batches(loader_for(net, loader))
    with measured_on(net, device):
        for number, batch in numbered(tqdm(loader, "validate", leave=False, delay=1)):
            if not len(split_batch(batch)[0][0]):  # a filter may leave a batch without samples
                continue
            inputs, targets = labelled_batch(batch, device, type_of(net))
            outputs, means = run_batch(net, inputs, timesteps, metric.every_step)
            means |= metric.measure_batch(inputs, outputs, targets)
            measured.append((number, len(inputs[0]), means))
    means, samples = mean_of(measured)
    if timesteps is not None:
        means["firing_rate"] = dict(zip(net.spiking_layers(), means["firing_rate"], strict=True))
    return {"samples": samples, **metric.summary(), **means}


@torch.no_grad()
def classes_of(net, inputs, device, timesteps=None):
    """The index of the largest score of every image, [N], on the CPU; of several outputs the first counts.

    inputs: a tuple of [N, ...]. timesteps: as in `validate`.
    """
    found, known = [], {} if timesteps is None else {"timesteps": timesteps}
    with measured_on(net, device):
        for part in zip(*(x.to(device).split(AT_A_TIME) for x in inputs)):
            scores = net(*part, **known)
            scores = scores[0] if isinstance(scores, (tuple, list)) else scores
            found.append(scores.flatten(1).argmax(1).cpu())
    return torch.cat(found)


@contextmanager
def measured_on(net, device):
    """Within it a network is in eval mode on `device`; afterwards every module has its own mode and device again."""
    homes = [tensor.device for tensor in (*net.parameters(), *net.buffers())]
    moves = any(home != torch.device(device) for home in homes)
    with in_eval_mode(net.to(device) if moves else net):
        try:
            yield
        finally:
            if moves:
                net.to(homes[0])


def run_batch(net, inputs, timesteps, every_step):
    """`outputs, means` of one batch: a tuple of [T, B, ...] (T = 1 without every_step), and an SNN's firing rates."""
    if timesteps is None:
        returned, means, every_step = run_ann(net, inputs), {}, False
    else:
        with record_firing_ratios():
            returned = net(*inputs, timesteps=timesteps, every_step=every_step)
            means = {"firing_rate": list(firing_ratios)}
    returned = returned if isinstance(returned, (tuple, list)) else (returned,)
    return tuple(x if every_step else x[None] for x in returned), means


def run_ann(net, inputs):
    """The outputs of an ANN on a batch, a graph in parts whose largest layer takes at most `ANN_BYTES`."""
    if not isinstance(net, SpikeDAGModule):
        return net(*inputs)
    images = max(1, ANN_BYTES // (inputs[0].element_size() * net.largest_sample(inputs)))
    parts = [net(*part) for part in zip(*(x.split(images) for x in inputs))]
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else tuple(map(torch.cat, zip(*parts)))


def mean_of(measured):
    """`means, samples`: the means per sample over the batches of all processes, and their number of samples.

    measured: `(number, samples, means)` of this process's batches. Sums of floats depend on their order, so the batches
    are added by their numbers, as one process would. Raises ValueError without samples, or if the loss is not finite.
    """
    totals, samples = {}, 0
    for _, size, means in sorted((row for rows in exchange(measured) for row in rows), key=lambda row: row[0]):
        for key, mean in means.items():
            totals[key] = totals.get(key, 0) + torch.as_tensor(mean, dtype=torch.float64) * size
        samples += size
    if not samples:
        raise ValueError("no samples to validate on, the data loader is empty")
    means = {key: (total / samples).tolist() for key, total in totals.items()}
    if not math.isfinite(means["loss"]):
        raise ValueError(
            f"the loss is {means['loss']}: the network's outputs, or the images, are NaN or infinite, look at both"
        )
    return means, samples


class Top1:
    """The metric of classifiers (see `validate`): top-1 accuracy, and top-5 for five classes or more, in percent."""

    def __init__(self, criterion, every_step=False, keep_answers=False):
        self.criterion, self.every_step = criterion, every_step
        self.kept = {"classes": [], "targets": [], "right": []} if keep_answers else None

    def measure_batch(self, inputs, outputs, targets):
        last = tuple(x[-1] for x in outputs)  # [B, ...] of every output
        scores = outputs[main_output([x.shape for x in last], targets)]  # [T, B, C]
        targets = fit_labels(scores[-1], targets)
        right = hits_of(scores, targets, self.criterion)  # [T, B]
        if self.kept is not None:
            self.keep(scores[-1], targets, right)
        hits = 100.0 * right.double().mean(1).cpu()  # [T]
        means = {"top1": hits[-1], "loss": loss_of(self.criterion, one_or_all(last), targets).item()}
        if self.every_step:
            means["top1_by_timestep"] = hits
        if scores.dim() == 3 and scores.shape[-1] >= 5:
            best = scores[-1].topk(5).indices
            means["top5"] = 100.0 * (best == as_classes(targets)[:, None]).any(1).double().mean().cpu()
        return means

    def keep(self, scores, targets, right):
        """Append the answers of one batch. scores: after the last step, [B, C], or [B] or [B, 1] of two classes."""
        if is_single(scores, targets):
            classes, targets = scores.flatten() > border_of(self.criterion), targets.flatten() > 0.5
        else:
            classes, targets = scores.argmax(-1), as_classes(targets)
        for store, values in zip(self.kept.values(), (classes.long(), targets.long(), right)):
            store.append(values.cpu())

    def summary(self):
        return {} if self.kept is None else {"answers": {key: torch.cat(x, -1) for key, x in self.kept.items()}}


def is_single(scores, targets):
    """Whether scores are one number for each image, which decides between two classes."""
    return scores.shape == targets.shape and (targets.dim() == 1 or targets.shape[1] == 1)


def border_of(criterion):
    """The single score above which an image is of class 1."""
    of_probabilities = isinstance(criterion, nn.BCELoss) or criterion is nn.functional.binary_cross_entropy
    return 0.5 if of_probabilities else 0.0


def hits_of(outputs, targets, criterion):
    """Which of the outputs [T, B, C] are right, bool [T, B]; targets as `fit_labels` returns them.

    A single score means class 1 if it is above 0, or above 0.5 if the criterion treats it as a probability.
    """
    if is_single(outputs[-1], targets):
        return ((outputs > border_of(criterion)) == (targets > 0.5)).flatten(1)
    return outputs.argmax(-1) == as_classes(targets)


def as_classes(targets):
    """Classes [B] of labels [B], or of shares [B, C]. Raises ValueError where a sample has several classes."""
    if targets.dim() == 1:
        return targets
    if ((targets == targets.amax(1, keepdim=True)).sum(1) > 1).any():
        raise ValueError("a label names several classes at once, which top-1 accuracy cannot measure")
    return targets.argmax(1)
