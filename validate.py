"""One accuracy loop for ANN and SNN: every sample weighs the same, whatever the batch sizes."""

import math
from contextlib import contextmanager

import torch
from torch import nn
from tqdm import tqdm

from runtime.batches import batches_of, fit_labels, labelled_batch, loss_of, type_of
from spike_dag import one_or_all
from spike_tensor import firing_ratios, record_firing_ratios


def validate_ann(net, loader, device, criterion):
    """`top1, loss` of a network: top-1 accuracy in percent and the mean loss per sample."""
    result = evaluate(net, loader, device, criterion)
    return result["top1"], result["loss"]


def validate_snn(snn, loader, device, criterion, timesteps):
    """`top1, loss` of a spiking network after `timesteps` steps: in percent and the mean loss per sample."""
    result = evaluate(snn, loader, device, criterion, timesteps)
    return result["top1"], result["loss"]


@torch.no_grad()
def evaluate(net, loader, device, criterion, timesteps=None, every_step=False):
    """Measure a network on all samples of `loader`; a spiking one where `timesteps` is given.

    loader: batches as `batches.split_batch` takes them; labels are classes [B] or [B, 1], or a row of shares [B, C].
    Of several outputs the first is measured. One score a sample, [B] or [B, 1], stands for two classes (`hits_of`).

    Returns a dict: top1 and (from five classes on) top5 in percent, loss, samples; for a spiking network also
    firing_rate, spikes per neuron and step by layer, and with `every_step` top1_by_timestep, percent after step
    1, 2, ... `timesteps`, all from the same simulation. The network is back in its mode and on its device afterwards.
    Raises ValueError where the loader is empty, labels do not fit the outputs, or the loss is not a number.
    """
    totals, samples = {}, 0
    with measured_on(net, device):
        for batch in batches_of(tqdm(loader, "validate", leave=False, delay=1)):
            inputs, targets = labelled_batch(batch, device, type_of(net))
            batch_means = measure_batch(net, inputs, targets, criterion, timesteps, every_step)
            for key, mean in batch_means.items():
                totals[key] = totals.get(key, 0) + torch.as_tensor(mean, dtype=torch.float64) * len(inputs[0])
            samples += len(inputs[0])
    result = {"samples": samples, **mean_of(totals, samples)}
    if timesteps is not None:
        result["firing_rate"] = dict(zip(net.spiking_layers(), result["firing_rate"], strict=True))
    return result


@contextmanager
def measured_on(net, device):
    """Within it a network is in eval mode on a device; afterwards in its modes, and where it was."""
    were_training = {module: module.training for module in net.modules()}
    home = next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device(device))
    net.to(device).eval()
    try:
        yield
    finally:
        net.to(home)
        for module, was_training in were_training.items():
            module.training = was_training


def mean_of(totals, samples):
    """The means per sample. Raises ValueError where there are none, or the loss is not finite."""
    if not samples:
        raise ValueError("no samples to validate on, the data loader is empty")
    means = {key: (total / samples).tolist() for key, total in totals.items()}
    if not math.isfinite(means["loss"]):
        raise ValueError(
            f"the loss is {means['loss']}: the network's outputs, or the images, are NaN or infinite, look at both"
        )
    return means


def measure_batch(net, inputs, targets, criterion, timesteps, every_step):
    """Means over one batch, on the CPU."""
    if timesteps is None:
        returned, means = net(*inputs), {}
    else:
        with record_firing_ratios():
            returned = net(*inputs, timesteps=timesteps, every_step=every_step)
            means = {"firing_rate": list(firing_ratios)}
    returned = returned if isinstance(returned, (tuple, list)) else (returned,)
    curves = tuple(x if every_step and timesteps is not None else x[None] for x in returned)
    outputs, last = curves[0], tuple(x[-1] for x in curves)  # [T, B, classes] of the first, [B, ...] of all
    targets = fit_labels(outputs[-1], targets)
    hits = 100.0 * hits_of(outputs, targets, criterion).double().mean(1).cpu()  # [T]
    means |= {"top1": hits[-1], "loss": loss_of(criterion, one_or_all(last), targets).item()}
    if every_step:
        means["top1_by_timestep"] = hits
    if outputs.dim() == 3 and outputs.shape[-1] >= 5:
        best = outputs[-1].topk(5).indices
        means["top5"] = 100.0 * (best == as_classes(targets)[:, None]).any(1).double().mean().cpu()
    return means


def hits_of(outputs, targets, criterion):
    """Whether each of the outputs [T, B, C] is right, [T, B]; targets as `fit_labels` returns them.

    One score is class 1 above 0, or above one half where the criterion takes it for a probability.
    """
    if outputs.shape[1:] == targets.shape and (targets.dim() == 1 or targets.shape[1] == 1):
        of_probabilities = isinstance(criterion, nn.BCELoss) or criterion is nn.functional.binary_cross_entropy
        border = 0.5 if of_probabilities else 0.0
        return ((outputs > border) == (targets > 0.5)).flatten(1)
    return outputs.argmax(-1) == as_classes(targets)


def as_classes(targets):
    """Classes [B] of labels that are classes, or shares [B, C]. Raises ValueError for several classes a sample."""
    if targets.dim() == 1:
        return targets
    if ((targets == targets.amax(1, keepdim=True)).sum(1) > 1).any():
        raise ValueError("a label names several classes at once, which top-1 accuracy cannot measure")
    return targets.argmax(1)
