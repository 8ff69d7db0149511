"""Statistics of every layer on calibration images: pooled activations, and the lambdas chosen from them."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from kernels.rounding_errors import can_sum, sum_errors
from quantization import sampling_stride
from runtime.batches import batches_of, on_device, split_batch
from runtime.ranges import LEAST_ERROR

MOST_BYTES = 2**27  # of the largest layer's float32 activations in one pass; larger batches pass in parts
MOST_SAMPLES = 1_000_000  # pooled activations per layer
ERROR_SAMPLES = 200_000  # of them, on which the error of a lambda is measured
LEAST_SHARE = 1 / 16  # smallest lambda of a channel, relative to its layer's: below, integer weights become too coarse


@dataclass
class LayerStatistics:
    """Statistics of one layer's pooled activations.

    max_o: lambda of the whole layer. scales: lambda per channel, [C, 1, 1] ([N] behind a linear layer), or a scalar,
    that of the layer. square_o: mean square of the activations.
    """

    max_o: float
    scales: torch.Tensor
    square_o: float


def calibrate(dag, plan, loader, device, samples, threshold, timesteps, per_channel=False):
    """`statistics, shapes` of an ANN on the first `samples` images of `loader`.

    statistics: op name -> LayerStatistics, for the ops whose statistics a conversion by `plan` reads (`Plan.measured`),
    with scales that `threshold` chooses for T timesteps (`choose_lambdas`), one a layer or one a channel. shapes: node
    -> shape of one sample. Raises ValueError for no images, and for NaN in any layer.
    """
    wanted, statistics = plan.measured(dag), {}
    pools, shapes = pool_activations(dag, loader, device, samples, wanted, per_channel, threshold == "max")
    for name, pool in pools.items():
        if not pool.is_finite:
            raise ValueError(f"{dag.where(name)} has NaN or infinite activations, train the network again")
    steps = even_steps(dag, plan, timesteps) if threshold == "spikes" else dict.fromkeys(wanted, timesteps)
    for name in wanted:
        pool = pools.pop(name)
        max_o, scales = lambdas_of(pool, threshold, steps[name], per_channel)
        square_o = pool.values().double().square().mean().item()
        statistics[name] = LayerStatistics(max_o.item(), scales.cpu(), square_o)
    return statistics, shapes


def even_steps(dag, plan, timesteps):
    """Op name -> the number of steps of even spikes whose error is that of T steps of the network's uneven spikes.

    A layer's spikes do not arrive evenly, so each of the N spiking layers behind it, counted along the longest path,
    fires too early or too late by about as much as rounding costs. The squared rounding error thus counts 1 + N times,
    as with sqrt(1 + N) times fewer steps. (What it gains on a ResNet-20: docs/accuracy.md.)
    """
    behind, found = defaultdict(int), {}  # behind: node -> N
    for name, entry in reversed(dag.ops.items()):
        found[name] = max(1.0, timesteps / (1 + behind[entry.out]) ** 0.5)
        for node in entry.inputs:
            behind[node] = max(behind[node], behind[entry.out] + (name in plan.firing))
    return found


def lambdas_of(pool, threshold, timesteps, per_channel, samples=ERROR_SAMPLES):
    """`max_o, scales` of a Pool, as in LayerStatistics: the lambda of the layer, and those per channel if asked for.

    samples: number of activations on which errors are measured. Arguments and methods: `choose_lambdas`.
    """
    outputs, largest = pool.values(), pool.largest
    channels = torch.zeros_like(outputs, dtype=torch.long)
    most = None if largest is None else largest.max().reshape(1)
    max_o = choose_lambdas(outputs, channels, 1, most, threshold, timesteps, samples).squeeze()
    if not per_channel:
        return max_o, max_o
    scales = choose_lambdas(outputs, pool.channels(), pool.count, largest, threshold, timesteps, samples)
    scales = torch.where(scales > 0, scales, max_o).clamp_min(LEAST_SHARE * max_o)
    return max_o, scales.view(-1, *[1] * (pool.dim - 2))


def choose_lambdas(values, channels, count, largest, threshold, timesteps, samples):
    """The lambda of every channel, [C]: the "max" of its activations, a quantile, or that of least error.

    threshold: "max" for the largest activation, a number for that quantile of the activations, "mse" or "spikes" for
    the least mean squared error after T timesteps of even spikes. values, channels: sampled activations and their
    channels, [N]. count: C. largest: largest activation of each channel, [C], over all elements, not only the sampled
    ones; read for "max" alone.
    """
    if threshold in LEAST_ERROR:
        return least_error_scales(values, channels, count, timesteps, samples)
    return largest if threshold == "max" else positive_tops(values, channels, count, threshold)


@torch.no_grad()
def pool_activations(dag, loader, device, samples, wanted, with_channels=False, with_largest=False):
    """`pools, shapes` for the first `samples` images: op name -> Pool of its activations; node -> shape of a sample.

    wanted: the ops whose samples are kept; of the others it is only known whether they are finite. with_channels,
    with_largest: as in Pool. Raises ValueError if there are no images.
    """
    pools, shapes, done = {}, {}, 0

    def watch(name, current, activation):
        entry = dag.ops[name]
        shapes[entry.out] = tuple(activation.shape[1:])
        if entry.op.is_measured:
            if name not in pools:
                pools[name] = Pool(MOST_SAMPLES, samples, name in wanted, with_channels, with_largest)
            pools[name].add(activation)

    for batch in batches_of(tqdm(loader, "calibrate", leave=False, delay=1)):
        inputs = on_device(split_batch(batch)[0], device, samples - done)
        images = max(1, MOST_BYTES // (4 * dag.largest_sample(inputs)))
        for part in zip(*(x.split(images) for x in inputs)):
            dag.forward_ann(part, watch)
        done += len(inputs[0])
        if done >= samples:
            break
    if not done:
        raise ValueError("no images to calibrate on, the data loader is empty")
    shapes.update((node, tuple(x.shape[1:])) for node, x in zip(dag.inputs_nodes, inputs))
    return pools, shapes


def use_learnt_scales(snn, statistics):
    """Replace lambdas by those learnt in finetuning, for all ops with activation levels. Return whether there are any.

    Each op keeps its own lambda, also if a concatenation joins it with others. `statistics` is changed in place. An op
    that stays ANN has none there, and goes on rounding.
    """
    levels = {name: snn.ops[name].op.levels for name in statistics if snn.ops[name].op.levels is not None}
    for name, each in levels.items():
        learnt = each.scale.detach().abs().cpu()
        statistics[name].max_o = learnt.max().item()
        statistics[name].scales = learnt if learnt.dim() else learnt.reshape(1)
    return bool(levels)


class Pool:
    """A sample of evenly spaced elements, at most `most`, from the activations of `samples` images.

    is_kept: keep the sample; without it, only `is_finite` is known: whether no element of the sample is NaN or
    infinite. with_channels: also note where the elements stood, for `channels`. count, dim: number of channels and of
    dimensions of the activations. largest: with `with_largest`, the largest activation of each channel, [C], over all
    elements.
    """

    def __init__(self, most, samples, is_kept=True, with_channels=False, with_largest=False):
        self.most, self.samples, self.is_kept, self.is_finite = most, samples, is_kept, True
        self.with_channels, self.with_largest = with_channels, with_largest
        self.parts, self.seen, self.stride = [], 0, None
        self.places, self.count, self.dim, self.largest = [], 1, 0, None

    def add(self, values):
        """Take every `stride`-th element of one more batch [B, C, ...], counted over all batches."""
        size = values[0].numel()
        self.stride = self.stride or sampling_stride(size * self.samples, self.most, size)
        first, self.count, self.dim = -self.seen % self.stride, values.shape[1], values.dim()
        part = as_in_memory(values)[first :: self.stride].clone()
        self.seen += values.numel()
        self.is_finite = self.is_finite and bool(torch.isfinite(part).all())
        if not self.is_kept:
            return
        self.parts.append(part)
        if self.with_largest:
            largest = values.amax([d for d in range(values.dim()) if d != 1])  # [C]
            self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if self.with_channels:
            # number of adjacent elements of one channel in memory
            run = 1 if has_channels_last(values) else values[0, 0].numel()
            self.places.append((range(first, values.numel(), self.stride), run))

    def values(self):
        """The sample, [N]."""
        return torch.cat(self.parts)

    def channels(self):
        """The channel of every element of the sample, [N]."""
        device = self.parts[0].device
        parts = [
            torch.arange(kept.start, kept.stop, kept.step, device=device) // run % self.count
            for kept, run in self.places
        ]
        return torch.cat(parts)


def has_channels_last(values):
    """Whether a tensor is 4D and its channels are adjacent in memory (channels_last)."""
    return values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)


def as_in_memory(values):
    """The elements of a tensor in memory order, [N]; without a copy if the memory has no gaps."""
    return (values.permute(0, 2, 3, 1) if has_channels_last(values) else values).reshape(-1)


def top(values, quantile):
    """A quantile of values [N], as a float."""
    rank = min(len(values), max(1, round(quantile * len(values))))
    if values.device.type != "cpu":
        return values.kthvalue(rank).values.item()
    return np.partition(values.numpy(), rank - 1)[rank - 1].item()  # several times as fast as kthvalue


def positive_top(values, quantile):
    """A quantile of values [N]; of the positive values only, if it would be 0 because the layer is seldom active."""
    highest = top(values, quantile)
    is_seldom_active = highest <= 0 and (values > 0).any()
    return top(values[values > 0], quantile) if is_seldom_active else highest


def positive_tops(values, channels, count, quantile):
    """`positive_top` of each channel, [C], from values and channels [N]; 0 for a channel without values."""
    sizes = channels.bincount(minlength=count).tolist()
    parts = values[channels.argsort(stable=True)].split(sizes) if count > 1 else (values,)
    return torch.tensor([positive_top(part, quantile) if len(part) else 0.0 for part in parts], device=values.device)


SHARES = torch.logspace(-1.5, 0, 64).tolist()  # candidates relative to the maximum: 3 % to 100 %, in steps of 6 %


def least_error_scales(values, channels, count, timesteps, most=ERROR_SAMPLES):
    """The lambda of every channel, [C], with the least mean squared error after T timesteps.

    The error is the difference between an activation a and clip(round(a T / lambda), 0, T) lambda / T. The latter is
    the decoded output of a neuron with constant input and initial potential Vthr / 2. `SHARES` of the channel's maximum
    are tried on the first `most` values. values, channels: activations and their channels, [N].
    """
    values, channels = values[:most].clamp_min(0), channels[:most]
    largest = values.new_zeros(count).scatter_reduce_(0, channels, values, "amax")
    tried = torch.stack([share * largest for share in SHARES], 1)  # [C, shares]
    steps = (tried / timesteps).clamp_min(1e-30)  # no division by 0 in a silent channel
    errors = (sum_errors if can_sum(values) else sums_of_errors)(values, channels, steps, timesteps)
    return tried.gather(1, errors.argmin(1, keepdim=True)).squeeze(1)  # the first of equal errors wins


def sums_of_errors(values, channels, steps, timesteps):
    """As `kernels.rounding_errors.sum_errors`, in plain PyTorch, for any device."""
    errors = torch.zeros_like(steps)
    for step, error in zip(steps.T, errors.T):
        step = step[channels]
        decoded = (values / step).round_().clamp_max_(timesteps).mul_(step)
        error.index_add_(0, channels, decoded.sub_(values).square_())
    return errors
