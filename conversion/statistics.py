"""What calibration images tell of every layer: pooled activations, and the scales chosen from them."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from quantization import sampling_stride
from runtime.batches import batches_of, on_device, split_batch
from spike_layers import ConcatOp, SoftmaxOp, ViewOp

MOST_SAMPLES = 1_000_000  # pooled elements a layer

LEAST_SHARE = 1 / 16  # of its layer's lambda that a channel's can be, so that integers beside it stay meaningful


@dataclass
class LayerStatistics:
    """Of one layer's pooled activations: `max_i`, the largest of its inputs, and `max_o`, the scale of its outputs.

    scales: max_o of every channel, [C, 1, 1] ([N] behind a linear layer), or of the layer, a scalar. square_o: the mean
    square of its outputs.
    """

    max_i: float
    max_o: float
    scales: torch.Tensor
    square_o: float


def calibrate(dag, loader, device, samples, choose_scales, granularity="layer"):
    """Op name -> LayerStatistics, from the first `samples` images of `loader`.

    choose_scales(values [N], channels [N], C, largest [C]) gives the scale of every channel, [C]; largest: of all
    activations, of which the values are a sample.
    """
    with pool_activations(dag, samples, granularity == "channel") as (input_pool, output_pool):
        run_samples(dag, loader, device, samples)
        statistics = {}
        for name, pool in output_pool.items():
            outputs = pool.values()
            if not torch.isfinite(outputs).all():
                raise ValueError(f"{dag.where(name)} has NaN or infinite activations, train the network again")
            channels, largest = torch.zeros_like(outputs, dtype=torch.long), pool.largest
            max_o = choose_scales(outputs, channels, 1, largest.max().reshape(1)).squeeze()
            scales = max_o
            if granularity == "channel":
                scales = choose_scales(outputs, pool.channels(), pool.count, largest)
                scales = torch.where(scales > 0, scales, max_o).clamp_min(LEAST_SHARE * max_o)
                scales = scales.view(-1, *[1] * (pool.dim - 2))
            square_o = outputs.double().square().mean().item()
            statistics[name] = LayerStatistics(input_pool[name].largest, max_o.item(), scales.cpu(), square_o)
        return statistics


def use_learnt_scales(snn, statistics):
    """Where activations were quantized in finetuning, lambda_out is what was learnt; returns whether any were.

    Each op keeps its own, also where a concatenation joins them.
    """
    levels = {name: entry["op"].levels for name, entry in snn.ops.items() if entry["op"].levels is not None}
    for name, each in levels.items():
        learnt = each.scale.detach().abs().cpu()
        statistics[name].max_o = learnt.max().item()
        statistics[name].scales = learnt if learnt.dim() else learnt.reshape(1)
    return bool(levels)


@torch.no_grad()
def node_shapes(dag, *inputs):
    """Node -> the shape of one sample, without the batch."""
    values = dict(zip(dag.inputs_nodes, inputs))
    for entry in dag.ops.values():
        values[entry["out_nodes"][0]] = entry["op"](*[values[node] for node in entry["in_nodes"]])
    return {node: tuple(value.shape[1:]) for node, value in values.items()}


@torch.no_grad()
def run_samples(dag, loader, device, samples):
    """Forward the first `samples` images. Raises ValueError where there are none."""
    done = 0
    for batch in batches_of(tqdm(loader, "calibrate", leave=False, delay=1)):
        inputs = on_device(split_batch(batch)[0], device, samples - done)
        dag(*inputs)
        done += len(inputs[0])
        if done >= samples:
            break
    if not done:
        raise ValueError("no images to calibrate on, the data loader is empty")


class Pool:
    """Evenly spaced elements, at most `most`, of the activations of `samples` images.

    with_channels: whether the channel of each is known, too. count, dim: channels, and dimensions, of the tensors that
    they are taken from. largest: the largest of every channel, [C], of all elements.
    """

    def __init__(self, most, samples, with_channels=False):
        self.most, self.samples, self.with_channels = most, samples, with_channels
        self.parts, self.seen, self.stride = [], 0, None
        self.channel_parts, self.count, self.dim, self.largest = [], 1, 0, None

    def add(self, values):
        """Take every `stride`-th element of one more batch [B, C, ...], counted over all batches."""
        size = values[0].numel()
        self.stride = self.stride or sampling_stride(size * self.samples, self.most, size)
        first, self.count, self.dim = -self.seen % self.stride, values.shape[1], values.dim()
        largest = values.amax([d for d in range(values.dim()) if d != 1])  # [C]
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.parts.append(in_memory_order(values)[first :: self.stride].clone())
        self.seen += values.numel()
        if self.with_channels:
            place = torch.arange(first, values.numel(), self.stride)
            run = 1 if is_channels_last(values) else values[0, 0].numel()  # elements of a channel that lie side by side
            self.channel_parts.append((place // run % self.count).to(torch.int32))

    def values(self):
        """The sample, [N]."""
        return torch.cat(self.parts)

    def channels(self):
        """The channel of every element of the sample, [N]."""
        return torch.cat(self.channel_parts).to(self.parts[0].device, torch.long)


class Largest:
    """The largest value of all that was added: one number, where a sample of it would be as large as the outputs'."""

    def __init__(self):
        self.largest = float("-inf")

    def add(self, values):
        """One more batch [B, ...]."""
        self.largest = max(self.largest, values.max().item())


def is_channels_last(values):
    """Whether the channels of a pixel lie side by side in memory."""
    return values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)


def in_memory_order(values):
    """A tensor as [N], without a copy where it lies in memory without gaps."""
    return (values.permute(0, 2, 3, 1) if is_channels_last(values) else values).reshape(-1)


@contextmanager
def pool_activations(dag, samples, with_channels=False):
    """`input_pool, output_pool`: op name -> Largest, and Pool, filled by the forward passes in the `with`."""
    input_pool, output_pool = ({}, {})
    layers = {n: e["op"] for n, e in dag.ops.items() if not isinstance(e["op"], (ViewOp, ConcatOp, SoftmaxOp))}
    try:
        for name, layer in layers.items():
            input_pool[name] = Largest()
            output_pool[name] = Pool(MOST_SAMPLES, samples, with_channels)
            warp_spike_layer(layer, input_pool[name], output_pool[name])
        yield input_pool, output_pool
    finally:
        for layer in layers.values():
            unwarp_spike_layer(layer)


def warp_spike_layer(layer, input_pool, output_pool):
    """Make `layer.forward` pool its first input and its output; the original is kept as `layer.old_forward`."""
    layer.old_forward = layer.forward

    def forward(*inputs):
        output = layer.old_forward(*inputs)
        input_pool.add(inputs[0])
        output_pool.add(output)
        return output

    layer.forward = forward


def unwarp_spike_layer(layer):
    """Undo `warp_spike_layer`."""
    if "old_forward" in vars(layer):
        del layer.forward, layer.old_forward


def top(values, quantile):
    """A quantile of values [N]."""
    rank = min(len(values), max(1, round(quantile * len(values))))
    return values.kthvalue(rank).values.item()


def positive_top(values, quantile):
    """The same, of the positive values alone where it would be 0: a layer that is seldom active."""
    highest = top(values, quantile)
    is_seldom_active = highest <= 0 and (values > 0).any()
    return top(values[values > 0], quantile) if is_seldom_active else highest


def positive_tops(values, channels, count, quantile):
    """`positive_top` of the values [N] of every channel: [C]; 0 for a channel without values."""
    sizes = channels.bincount(minlength=count).tolist()
    parts = values[channels.argsort(stable=True)].split(sizes) if count > 1 else (values,)
    return torch.tensor([positive_top(part, quantile) if len(part) else 0.0 for part in parts], device=values.device)


def least_error_scales(values, channels, count, timesteps, most=200_000):
    """The lambda of every channel, [C], for which T spikes say best what its activations are.

    values, channels: [N]. Least mean squared error between the activations and clip(round(a T / lambda), 0, T)
    lambda / T, what a neuron with the initial potential Vthr / 2 sends on even input; among 64 shares of the channel's
    maximum, on the first `most` values.
    """
    values, channels = values[:most].clamp_min(0), channels[:most]
    largest = values.new_zeros(count).scatter_reduce_(0, channels, values, "amax")
    least, best = torch.full_like(largest, torch.inf), largest
    for share in torch.logspace(-1.5, 0, 64).tolist():
        steps = (share * largest / timesteps).clamp_min(1e-30)
        step = steps[channels]
        decoded = (values / step).round_().clamp_max_(timesteps).mul_(step)
        error = torch.zeros_like(largest).index_add_(0, channels, decoded.sub_(values).square_())
        best = torch.where(error < least, share * largest, best)
        least = torch.minimum(error, least)
    return best
