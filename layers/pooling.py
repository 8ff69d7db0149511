"""Pooling layers: average pooling as a convolution with fixed weights, max pooling of spikes."""

import torch
import torch.nn.functional as F

from layers.base import CURRENT, SPIKES, SpikeLayer, as_pair
from layers.joining import ViewOp
from layers.weighted import WINDOW, SpikeConv2d
from runtime.rules import BOOL, CHANNELS, NONE, PADDING, SIZE, either, one_of, several, whole
from spike_tensor import Current, Memory, SpikeTensor


class SpikeAvgPool2d(SpikeConv2d):
    """Average pooling as a depthwise convolution with fixed weights 1/(kernel_size**2); the integer weights are ones.

    If it reads spikes, it has a neuron of its own; currents it only sums. folded: it has no neuron and hands on the
    number of spikes in each window, and the layers behind it weigh that number. Before the conversion this is a wish:
    `conversion.plan.folded_poolings` decides where folding is possible.
    input_size: (height, width) that the windows were chosen for, where they depend on it, as in an adaptive pooling;
    the threshold depends on the windows, so that an input of another size is refused. None for any size.
    """

    fields = {  # noqa: RUF012
        "channels": CHANNELS,
        "kernel_size": SIZE,
        "stride": SIZE,
        "padding": PADDING,
        "folded": BOOL,
        "input_size": either(NONE, several(whole(1, 65536), 2, 2)),
    }
    is_trained = carries_bias = may_turn_negative = False
    is_linear = hands_on = passes_scale = fires = channelwise = True

    def __init__(self, channels, kernel_size, stride, padding=0, folded=False, input_size=None):
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)
        self.weight.requires_grad_(False).fill_(1 / self.weight[0].numel())
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
    def passes_shift(self):
        """A constant per channel passes if there is no zero padding."""
        return not any(self.padding)

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
        output = function(input, kernel_size, stride, padding)
        kernel, padding = as_pair(kernel_size), as_pair(padding)
        # ceil_mode makes no difference if the last windows are whole at the traced size
        has_part_windows = ceil_mode and function(input, kernel, stride, padding, True).shape != output.shape
        has_other_divisor = divisor_override not in (None, kernel[0] * kernel[1])
        if has_part_windows or has_other_divisor or (not count_include_pad and padding != (0, 0)):
            trace.refuse(
                function,
                "only ceil_mode=False, count_include_pad=True, divisor_override=None are supported, or what is the "
                "same: choose a size that whole windows fill",
            )
        input_size = tuple(input.shape[-2:]) if ceil_mode else None
        op = cls(input.shape[1], kernel, as_pair(stride or kernel_size), padding, input_size=input_size)
        return trace.record("avg_pool", op, [input], output)

    @classmethod
    def traced_adaptive(cls, trace, function, input, output_size):
        window = tuple(input.shape[-2:])
        sizes = tuple(extent if size is None else size for size, extent in zip(as_pair(output_size), window))
        refuse_uneven_windows(trace, function, sizes, window)
        output = function(input, output_size)
        kernel = tuple(extent // size for size, extent in zip(sizes, window))
        if kernel == (1, 1):  # a view refuses images of another size, which would have to be pooled
            return trace.record("view", ViewOp(output.shape[1:]), [input], output)
        op = cls(input.shape[1], kernel, kernel, input_size=window)
        return trace.record("avg_pool", op, [input], output)

    @classmethod
    def traced_mean(cls, trace, function, input, dim=None, keepdim=False, *, dtype=None):
        dims = sorted(d % input.dim() for d in ([dim] if isinstance(dim, int) else dim or []))
        if dims != [2, 3] or input.dim() != 4 or dtype is not None:
            trace.refuse(function, "only the mean over height and width, x.mean([2, 3]), is supported")
        pooled = cls.traced_adaptive(trace, F.adaptive_avg_pool2d, input, 1)
        return pooled if keepdim else ViewOp.traced(trace, torch.Tensor.view, pooled, input.shape[:2])

    @classmethod
    def contradiction(cls, config):
        return window_contradiction(config)

    def check_size(self, size):
        """Raise ValueError if the input's (height, width) is not the `input_size` of the windows."""
        if self.input_size is not None and tuple(size) != self.input_size:
            raise ValueError(
                f"an average pooling has windows for an input of {list(self.input_size)} and gets {list(size)}: give "
                "images of the size that the network was traced with, or trace and convert it for the other"
            )

    def activation(self, x):
        self.check_size(x.shape[-2:])
        return self.operate(x, self.weight, None)

    def current(self, x):
        self.check_size(x.data.shape[-2:])
        if isinstance(x, Current):
            total = x.total()
            return x.like(self.operate(total, self.weight_q.to(total.dtype), None))
        sums = self.current_of(x.data)  # [T*B, C, H', W']
        if not self.folded:
            return Current(sums, x.timesteps)
        return SpikeTensor.like(sums.to(x.data.dtype), x.timesteps, x.scale_factor / self.window)

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
        """Set integer weights of one, s_w = k*k. For spikes set a neuron; currents are only summed.

        A folded pooling sums spikes without a neuron: one spike in its output has the lambda of its input / (k*k).
        """
        node, out = entry.inputs[0], entry.out
        unit = setter.value_of(node) / self.window
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


def window_contradiction(config):
    """A contradiction between the window fields of a pooling's `config`, in words, or None."""
    defaults = {"kernel_size": 1, "dilation": 1, "padding": 0}
    sizes = [as_pair(config.get(name, default)) for name, default in defaults.items()]
    if any(2 * pad > step * (size - 1) + 1 for size, step, pad in zip(*sizes)):
        return f"padding {config['padding']}: use at most half of kernel_size"
    return None


def refuse_uneven_windows(trace, function, sizes, window):
    """Raise NotImplementedError if an adaptive pooling of `window` to `sizes` has overlapping or unequal windows."""
    if any(size > extent for size, extent in zip(sizes, window)):
        trace.refuse(
            function,
            f"its output {list(sizes)} is larger than its input {list(window)}, of which it holds copies: use larger "
            "images, or leave it out and let the layer behind it have the sum of its weights for each value's copies",
        )
    if any(extent % size for size, extent in zip(sizes, window)):
        trace.refuse(
            function,
            f"its output {list(sizes)} does not divide its input {list(window)}: use avg_pool2d with a kernel size",
        )


class SpikeMaxPool2d(SpikeLayer):
    """Max pooling, [B, C, H, W] -> [B, C, H', W']; converted, it pools spikes.

    mode "gate": a spike passes if it raises the largest spike count in its window. The output's count is then the
    largest count at every step. The gate of Rueckauer et al., Frontiers in Neuroscience 2017, passes the input with the
    most spikes; it sends additional spikes when another input takes the lead, this one does not.
    mode "or": the output is the maximum of the spikes of each step. None: not chosen yet.
    pairs: the channels are pairs of relu(x) and relu(-x) (`layers.signs`). The largest x of a window has the largest
    relu(x) and the smallest relu(-x), so every second channel passes the smallest count ("gate"), or a spike that all
    inputs of the window send ("or"). Padding counts for neither.
    """

    modes = ("gate", "or")
    fields = WINDOW | {"ceil_mode": BOOL, "mode": either(NONE, one_of(*modes)), "pairs": BOOL}
    passes_spikes = hands_on = selects = channelwise = reads_windows = True

    def __init__(self, kernel_size, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False, mode=None, pairs=False):
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.ceil_mode, self.mode, self.pairs = ceil_mode, mode, pairs

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
    def contradiction(cls, config):
        return window_contradiction(config)

    def activation(self, x):
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
        if self.mode == "or":
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
