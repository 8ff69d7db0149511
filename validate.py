"""One accuracy loop for ANN and SNN: every sample weighs the same, whatever the batch sizes."""

import torch
from tqdm import tqdm

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

    Returns a dict: top1 and (from five classes on) top5 in percent, loss, samples; for a spiking network also
    firing_rate, spikes per neuron and step by layer, and with `every_step` top1_by_timestep, percent after step
    1, 2, ... `timesteps`, all from the same simulation. Raises ValueError where the loader is empty.
    """
    were_training = {module: module.training for module in net.modules()}
    net.to(device).eval()
    totals, samples = {}, 0
    try:
        for inputs, targets in tqdm(loader, "validate", leave=False, delay=1):
            inputs, targets = inputs.to(device), targets.to(device)
            batch_means = measure_batch(net, inputs, targets, criterion, timesteps, every_step)
            for key, mean in batch_means.items():
                totals[key] = totals.get(key, 0) + torch.as_tensor(mean, dtype=torch.float64) * len(targets)
            samples += len(targets)
    finally:
        for module, was_training in were_training.items():
            module.training = was_training
    if not samples:
        raise ValueError("no samples to validate on, the data loader is empty")
    means = {key: (total / samples).tolist() for key, total in totals.items()}
    result = {"samples": samples, **means}
    if timesteps is not None:
        result["firing_rate"] = dict(zip(net.spiking_layers(), result["firing_rate"], strict=True))
    return result


def measure_batch(net, inputs, targets, criterion, timesteps, every_step):
    """Means over one batch, on the CPU."""
    if timesteps is None:
        outputs, means = net(inputs)[None], {}  # [1, B, classes]
    else:
        with record_firing_ratios():
            outputs = net(inputs, timesteps=timesteps, every_step=every_step)
            means = {"firing_rate": list(firing_ratios)}
        outputs = outputs if every_step else outputs[None]  # [T, B, classes]
    hits = 100.0 * (outputs.argmax(-1) == targets).double().mean(1).cpu()  # [T]
    means |= {"top1": hits[-1], "loss": criterion(outputs[-1], targets).item()}
    if every_step:
        means["top1_by_timestep"] = hits
    if outputs.shape[-1] >= 5:
        best = outputs[-1].topk(5).indices
        means["top5"] = 100.0 * (best == targets[:, None]).any(1).double().mean().cpu()
    return means
