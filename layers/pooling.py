"""Pooling layers: average pooling as a convolution with fixed weights, max pooling of spikes."""

import math

import torch
import torch.nn.functional as F

from layers.base import CURRENT, SPIKES, SpikeLayer, as_pair
from layers.joining import SpikePad, ViewOp
from layers.resampling import EXTENT, MOST_COPIED, MOST_COPIES, check_size, copies_of, record_copies, step_between
from layers.weighted import WINDOW, SpikeConv2d
from runtime.rules import BOOL, CHANNELS, NONE, PADDING, POSITIVE, SIZE, either, one_of, several
from spike_tensor import Current, Memory, SpikeTensor


class SpikeAvgPool2d(SpikeConv2d):
    """Average pooling as a depthwise convolution with fixed weights 1/(kernel_size**2); the integer weights are ones.

    If it reads spikes, it has a neuron of its own; currents it only sums. folded: it has no neuron and hands on the
    number of spikes in each window, and the layers behind it weigh that number. Before the conversion this is a wish:
    `conversion.plan.folded_poolings` decides where folding is possible.
    input_size: (height, width) that the windows were chosen for, where they depend on it, as in an adaptive pooling;
    the threshold depends on the windows, so that an input of another size is refused. None for any size.
    divisor: what the sum of a window is divided by; None for its size, which makes the average. 1 makes the sum.
    """

    fields = {  # noqa: RUF012
        "channels": CHANNELS,
        "kernel_size": SIZE,
        "stride": SIZE,
        "padding": PADDING,
        "folded": BOOL,
        "input_size": either(NONE, several(EXTENT, 2, 2)),
        "divisor": either(NONE, POSITIVE),
    }
    is_trained = carries_bias = may_turn_negative = False
    is_linear = hands_on = passes_scale = fires = channelwise = True

    def __init__(self, channels, kernel_size, stride, padding=0, folded=False, input_size=None, divisor=None):
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)
        self.divisor = divisor
        self.weight.requires_grad_(False).fill_(1 / self.shared_by)
        self.folded = folded
        self.input_size = None if input_size is None else tuple(input_size)

    @property
    def channels(self):
        """Number of channels, C."""
        return self.in_channels

    @property
    def window(self):
        """Number of inputs of one output."""
        return self.weight[0].numel()

    @property
    def shared_by(self):
        """The divisor: the number of integer weights of one that make up a weight of one."""
        return self.window if self.divisor is None else self.divisor

    @property
    def passes_shift(self):
        """A constant per channel passes an average without zero padding."""
        return not any(self.padding) and self.shared_by == self.window

    @classmethod
    def traced(
        cls,
        trace,
        function,
        input,
        kernel_size,
        stride=None,
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    ):
        check_maps(trace, function, input)
        kernel, step, padding = as_pair(kernel_size), as_pair(stride or kernel_size), as_pair(padding)

        def pooled(x, padding=padding):
            return function(x, kernel, step, padding, ceil_mode, count_include_pad, divisor_override)

        output = pooled(input)
        # ceil_mode makes no difference if the last windows are whole at the traced size
        is_whole = function(input, kernel, step, padding).shape == output.shape
        if divisor_override is not None and (divisor_override < 0 or not is_whole):
            trace.refuse(function, "divisor_override has to be positive, and needs ceil_mode=False")
        if not is_whole or not (count_include_pad or padding == (0, 0) or divisor_override is not None):
            return record_parts(trace, function, input, pooled, padding if count_include_pad else (0, 0))
        divisor = None if divisor_override == kernel[0] * kernel[1] else divisor_override
        size = tuple(input.shape[-2:]) if ceil_mode else None
        return trace.record(
            "avg_pool", cls(input.shape[1], kernel, step, padding, False, size, divisor), [input], output
        )

    @classmethod
    def traced_adaptive(cls, trace, function, input, output_size):
        check_maps(trace, function, input)
        window, sizes = tuple(input.shape[-2:]), adaptive_sizes(input, output_size)
        if sizes == window:  # a view refuses images of another size, which would have to be pooled
            return trace.record("view", ViewOp(input.shape[1:]), [input], function(input, sizes))
        if any(extent % size for size, extent in zip(sizes, window)):
            return record_average(trace, function, input, lambda x: function(x, sizes))
        kernel = tuple(extent // size for size, extent in zip(sizes, window))
        op = cls(input.shape[1], kernel, kernel, input_size=window)
        return trace.record("avg_pool", op, [input], function(input, sizes))

    @classmethod
    def contradiction(cls, config):
        return window_contradiction(config)

    def activation(self, x):
        check_size("an average pooling", self.input_size, x.shape[-2:])
        return self.operate(x, self.weight, None)

    def current(self, x):
        check_size("an average pooling", self.input_size, x.data.shape[-2:])
        if isinstance(x, Current):
            total = x.total()
            return x.like(self.operate(total, self.weight_q.to(total.dtype), None))
        sums = self.current_of(x.data)  # [T*B, C, H', W']
        if not self.folded:
            return Current(sums, x.timesteps)
        return SpikeTensor.like(sums.to(x.data.dtype), x.timesteps, x.scale_factor / self.shared_by)

    def operate(self, input, weight, bias):
        sums = F.avg_pool2d(input, self.kernel_size, self.stride, self.padding, divisor_override=1)
        return sums * weight[:, 0, :1, :1]  # the same as a depthwise convolution, but faster

    def largest_sum(self, largest_read):
        return largest_read[0] * self.window

    def plan(self, place):
        return place.passes_on()  # not as a layer with trained weights

    def on_pairs(self, merges):
        config = self.config()
        return type(self)(**{**config, "channels": 2 * self.channels}), merges[0].copied()

    def convert(self, setter, entry):
        """Set integer weights of one, s_w = divisor. For spikes set a neuron; currents are only summed.

        A folded pooling sums spikes without a neuron: one spike in its output has the lambda of its input / divisor.
        """
        node, out = entry.inputs[0], entry.out
        unit = setter.value_of(node) / self.shared_by
        self.set_integers(torch.ones_like(self.weight, dtype=torch.int8), None, unit)
        if self.folded:
            setter.scales[out] = unit
        elif setter.plan.kinds[node] == SPIKES:
            setter.set_neuron(entry, unit, setter.largest_of(entry))
        else:
            setter.units[out] = unit
            setter.largest[out] = setter.largest_of(entry)

    def misfit(self, reads):
        if not hasattr(self, "weight_q"):
            return "it has no weight_q"
        has_none = self.folded or SPIKES not in reads
        return "it is folded, or reads currents, and has neurons" if self.neuron is not None and has_none else None

    def ann_operations(self, shape, outputs):
        return 0.0, self.synapses(shape)  # additions only

    def spike_operations(self, spikes):
        return 0.0 if self.folded else super().spike_operations(spikes)

    def extra_repr(self):
        return super().extra_repr() + ", folded" * self.folded


# Recorders of averages and sums.


def record_parts(trace, function, input, pooled, zeros):
    """Record a pooling whose windows at the border are parts, with a divisor of their own.

    pooled: the pooling, a function of the input and its padding. zeros: the padding that counts as pixels.
    """
    rows, columns = pooled(input).shape[-2:]
    if zeros == (0, 0):
        return record_average(trace, function, input, pooled)
    op = SpikePad((zeros[1], zeros[1], zeros[0], zeros[0]))
    padded = trace.record("pad", op, [input], op.activation(input))
    return record_average(trace, function, padded, lambda x: pooled(x, 0)[..., :rows, :columns])


def record_interpolate(trace, function, input, size=None, scale_factor=None, mode="nearest", *args, **options):
    check_maps(trace, function, input)

    def resized(x):
        return function(x, size, scale_factor, mode, *args, **options)

    return record_average(trace, function, input, resized, any_size=scale_factor is not None)


def record_average(trace, function, input, average, any_size=False):
    """Record `average` (`copies_of`): copies of pixels, and a pooling of the copies if there are several.

    any_size: copies by whole factors hold for any input size.
    """
    output, size = average(input), tuple(input.shape[-2:])
    sides = copies_of(average, size)
    if any(side is None for side in sides):
        trace.refuse(
            function,
            f"some of its weights are negative, or no multiples of one over {MOST_COPIES} or less along a side: "
            "use sizes of which one divides the other, or mode='nearest'",
        )
    copied = sides[0].numel() * sides[1].numel()
    if copied > MOST_COPIED * max(math.prod(size), math.prod(output.shape[-2:])):
        trace.refuse(
            function,
            f"its weights are so uneven that it needs {copied} copies of pixels: use sizes of which one divides "
            "the other, and align_corners=False or mode='nearest'",
        )
    copies, steps = [side.shape[1] for side in sides], [step_between(side) for side in sides]
    if copies == [1, 1]:
        return record_copies(trace, input, [side.flatten() for side in sides], any_size)
    op = None if None in steps else SpikeAvgPool2d(input.shape[1], copies, steps, input_size=size)
    if op is None or op.activation(input).shape != output.shape:
        input = record_copies(trace, input, [side.flatten() for side in sides])
        op = SpikeAvgPool2d(input.shape[1], copies, copies)
    return trace.record("avg_pool", op, [input], output)


def record_mean(trace, function, input, dim=None, keepdim=False, *, dtype=None, divisor=None, **names):
    dims = sorted(d % input.dim() for d in dims_of(names.get("axis", dim)))
    if input.dim() != 4 or not dims or dims[0] < 2 or dtype is not None:
        trace.refuse(function, "only over height and width, as in x.mean([2, 3]), in the input's own type")
    output, size = function(input, dims, True), tuple(input.shape[-2:])
    kernel = tuple(extent if d in dims else 1 for d, extent in enumerate(size, start=2))
    op = SpikeAvgPool2d(input.shape[1], kernel, kernel, input_size=size, divisor=divisor if kernel != (1, 1) else None)
    if kernel == (1, 1):
        op = ViewOp(input.shape[1:])
    pooled = trace.record("view" if kernel == (1, 1) else "avg_pool", op, [input], output)
    if keepdim:
        return pooled
    return ViewOp.traced(trace, torch.Tensor.squeeze, pooled, dims)


def record_sum_of_pixels(trace, function, input, dim=None, keepdim=False, **names):
    return record_mean(trace, function, input, dim, keepdim, divisor=1, **names)


def window_contradiction(config):
    """A contradiction between the window fields of a pooling's `config`, in words, or None."""
    defaults = {"kernel_size": 1, "dilation": 1, "padding": 0}
    sizes = [as_pair(config.get(name, default)) for name, default in defaults.items()]
    if any(2 * pad > step * (size - 1) + 1 for size, step, pad in zip(*sizes)):
        return f"padding {config['padding']}: use at most half of kernel_size"
    return None


def check_maps(trace, function, input):
    """Raise NotImplementedError unless the input is [B, C, H, W]."""
    if input.dim() != 4:
        trace.refuse(function, f"the input must be [B, C, H, W], not {list(input.shape)}")


def adaptive_sizes(input, output_size):
    """The (height, width) of an adaptive pooling's output; None in `output_size` keeps that of the input."""
    return tuple(extent if size is None else size for size, extent in zip(as_pair(output_size), input.shape[-2:]))


def dims_of(dim):
    """The dimensions that a reduction is called with, as a tuple; empty for all of them."""
    return () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def adaptive_windows(extent, outputs):
    """The inputs of every window along one side of an adaptive pooling, [outputs, n]; short ones repeat their last."""
    starts = [i * extent // outputs for i in range(outputs)]
    ends = [-(-(i + 1) * extent // outputs) for i in range(outputs)]
    longest = max(end - start for start, end in zip(starts, ends))
    return torch.tensor([[min(start + k, end - 1) for k in range(longest)] for start, end in zip(starts, ends)])


class SpikeMaxPool2d(SpikeLayer):
    """Max pooling, [B, C, H, W] -> [B, C, H', W']; converted, it pools spikes.

    mode "gate": a spike passes if it raises the largest spike count in its window. The output's count is then the
    largest count at every step. The gate of Rueckauer et al., Frontiers in Neuroscience 2017, passes the input with the
    most spikes; it sends additional spikes when another input takes the lead, this one does not.
    mode "or": the output is the maximum of the spikes of each step. None: not chosen yet.
    pairs: the channels are pairs of relu(x) and relu(-x) (`layers.signs`). The largest x of a window has the largest
    relu(x) and the smallest relu(-x), so every second channel passes the smallest count ("gate"), or a spike that all
    inputs of the window send ("or"). Padding counts for neither.
    input_size: (height, width) that the windows of an adaptive pooling were chosen for, None for any size.
    """

    modes = ("gate", "or")
    size = either(NONE, several(EXTENT, 2, 2))
    fields = WINDOW | {"ceil_mode": BOOL, "mode": either(NONE, one_of(*modes)), "input_size": size, "pairs": BOOL}
    passes_spikes = hands_on = selects = channelwise = reads_windows = True

    def __init__(
        self,
        kernel_size,
        stride,
        padding=(0, 0),
        dilation=(1, 1),
        ceil_mode=False,
        mode=None,
        input_size=None,
        pairs=False,
    ):
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.ceil_mode, self.mode, self.pairs = ceil_mode, mode, pairs
        self.input_size = None if input_size is None else tuple(input_size)

    @classmethod
    def traced(
        cls,
        trace,
        function,
        input,
        kernel_size,
        stride=None,
        padding=0,
        dilation=1,
        ceil_mode=False,
        return_indices=False,  # True calls another torch function, which is refused
    ):
        sizes = as_pair(kernel_size), as_pair(stride or kernel_size), as_pair(padding), as_pair(dilation)
        op = cls(*sizes, ceil_mode)
        return trace.record("max_pool", op, [input], op.activation(input))

    @classmethod
    def traced_adaptive(cls, trace, function, input, output_size, return_indices=False):
        check_maps(trace, function, input)
        size, sizes = tuple(input.shape[-2:]), adaptive_sizes(input, output_size)
        if sizes == size:
            return trace.record("view", ViewOp(input.shape[1:]), [input], function(input, sizes))
        windows = [adaptive_windows(extent, outputs) for extent, outputs in zip(size, sizes)]
        if any(extent % outputs for extent, outputs in zip(size, sizes)):
            input, size = record_copies(trace, input, [each.flatten() for each in windows]), None
        kernel = tuple(each.shape[1] for each in windows)
        if kernel == (1, 1):
            return input
        op = cls(kernel, kernel, input_size=size)
        return trace.record("max_pool", op, [input], op.activation(input))

    @classmethod
    def traced_amax(cls, trace, function, input, dim=(), keepdim=False, **names):
        dims = sorted(d % input.dim() for d in dims_of(names.get("axis", dim)))
        if input.dim() != 4 or not dims or dims[0] < 2:
            trace.refuse(function, "only over height and width, as in x.amax([2, 3])")
        size = tuple(1 if d in dims else extent for d, extent in enumerate(input.shape[-2:], start=2))
        pooled = cls.traced_adaptive(trace, function, input, size)
        return pooled if keepdim else ViewOp.traced(trace, torch.Tensor.squeeze, pooled, dims)

    @classmethod
    def contradiction(cls, config):
        return window_contradiction(config)

    def activation(self, x):
        check_size("a max pooling", self.input_size, x.shape[-2:])
        if self.pairs:
            return second_negated(self.pool(second_negated(x)))  # the smallest value is that of the largest -x
        return self.pool(x)

    def pool(self, x):
        """The largest value of every window."""
        return F.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def on_pairs(self, merges):
        """Pairs pass unless a slope is negative: the largest value then need not be that of the largest x."""
        if (merges[0].signs > 0).any():
            return None
        return type(self)(**{**self.config(), "pairs": True}), merges[0].copied()

    def current(self, x):
        return x

    def send(self, spikes, memory=None):
        """The spikes that pass, [T*B, C, H', W']. `memory` keeps the spike counts for the next chunk of steps."""
        counts_only = memory is not None and memory.counting is not None  # spikes without gaps: both modes agree
        if self.mode == "or" or counts_only:
            largest = self.activation(spikes.data.to(torch.float32))  # PyTorch cannot pool large integer maps
            return SpikeTensor.like(largest.to(spikes.data.dtype), spikes.timesteps, spikes.scale_factor)
        memory = Memory(spikes.timesteps) if memory is None else memory
        steps = spikes.data.unflatten(0, (spikes.timesteps, -1))  # [T, B, C, H, W]
        counts, sent = memory.by_layer.get(self, (torch.zeros_like(steps[0], dtype=torch.float32), 0))
        passed = []
        for step in steps:
            counts = counts + step
            largest = self.activation(counts)  # [B, C, H', W']
            passed.append((largest - sent).to(step.dtype))
            sent = largest
        memory.by_layer[self] = counts, sent
        return SpikeTensor.like(torch.cat(passed), spikes.timesteps, spikes.scale_factor)

    def plan(self, place):
        """SPIKES or ANALOG, as its input. Raises ValueError for currents, and for spikes without a chosen mode."""
        if place.reads[0] == CURRENT:
            split = "" if place.splits_signs() else ", or split them by sign (--signed pair)"
            raise ValueError(
                f"{place.where} pools values that may be negative, put a ReLU before it, or next behind{split}"
            )
        kind = place.passes_on()
        if kind == SPIKES and self.mode is None:
            raise ValueError(
                f"{place.where}: choose how spikes are max pooled, --maxpool gate (the largest count passes) or "
                "--maxpool or (any spike passes), or use average pooling in the network"
            )
        return kind

    def misfit(self, reads):
        if self.mode is None or SPIKES not in reads:
            return "it reads no spikes, or has no mode"
        return super().misfit(reads)


def second_negated(x):
    """Pairs of channels, [B, 2C, H, W], with a minus sign for the second of each pair."""
    signs = torch.tensor([1.0, -1.0], dtype=x.dtype, device=x.device)
    return (x.unflatten(1, (-1, 2)) * signs.view(2, 1, 1)).flatten(1, 2)
