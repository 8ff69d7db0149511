"""Values of either sign as pairs of spikes: a pair of ReLUs, LeakyReLU, and the sum of a pair.

Spikes are not negative, so a value x of either sign is sent as a pair, relu(x) and slope * relu(-x):

    x = relu(x) - relu(-x)                        # slope 1: a layer without a ReLU
    leaky(x) = relu(x) - slope * relu(-x)         # LeakyReLU, PReLU

The slope is part of the neuron's threshold: the neuron of slope * relu(-x) has a threshold of Vthr / slope. So the
layer behind has each weight twice, W and -W, in the same integers at any bit width. (A slope in the weights would be
rounded to 0 at few bits: 0.1 of a 4-bit weight.)

The two values of a pair are adjacent channels: 2c for relu(x_c), 2c + 1 for slope_c * relu(-x_c). Behind a view that
flattens a sample, they are adjacent blocks of features.
"""

import torch
import torch.nn.functional as F

from layers.base import ANALOG, CURRENT, SPIKES, SpikeLayer, widened
from runtime.rules import CHANNELS, NONE, POTENTIALS, WEIGHTS, either
from spike_tensor import Current

# A smaller |slope| counts as 0: at 65,536 timesteps, the most there are, lambda would not cause one spike.
LEAST_SLOPE = 2**-17


def per_channel(values, dim):
    """Values per channel, [C], made broadcastable to [B, C, ...] with `dim` dimensions; a scalar is unchanged."""
    return values.view(-1, *[1] * (dim - 2)) if values.dim() else values


def interleaved(first, second, dim):
    """Two tensors of one shape as one with twice the extent along `dim`, their slices in turn."""
    return torch.stack([first, second], dim + 1).flatten(dim, dim + 1)


def in_words(slope):
    """Slopes for a table: one number, or their range."""
    if slope.device.type == "meta":
        return ""
    return f"slope={slope.min():g}" if slope.min() == slope.max() else f"slope={slope.min():g}..{slope.max():g}"


class SignedReLU(SpikeLayer):
    """Two ReLUs for a value of either sign, [B, C, ...] -> [B, 2C, ...].

    Channel 2c is relu(x_c), channel 2c + 1 is |slope_c| * relu(-x_c). slope: [C], or None for 1. The layer behind it
    has each weight twice: W for relu(x), and -W (W where the slope is negative) for the other.
    """

    fields = {"slope": either(NONE, WEIGHTS)}  # noqa: RUF012
    rectifies = splits_signs = True

    def __init__(self, slope=None):
        super().__init__()
        self.register_buffer("slope", slope)

    @property
    def passes_scale(self):
        """A positive factor passes the ReLUs of a LeakyReLU. A layer without any ReLU keeps its weights."""
        return self.slope is not None

    def activation(self, x):
        second = x if self.slope is None else x * per_channel(self.slope.abs(), x.dim())
        return F.relu(interleaved(x, -second, 1))

    def current(self, x):
        first = x.total()
        second = first if self.slope is None else first * per_channel(self.slope != 0, first.dim())
        return x.like(interleaved(first, -second, 1))

    def plan(self, place):
        return SPIKES if place.reads[0] == CURRENT else place.reads[0]

    def convert(self, setter, entry):
        """Set one neuron per sign. The slope divides the threshold of the second."""
        node = entry.inputs[0]
        unit, largest = setter.units[node], setter.largest[node]
        if self.slope is None:
            setter.set_neuron(entry, unit.repeat_interleave(2, 0) if unit.dim() else unit, largest)
            return
        slope = torch.where(self.slope == 0, 1.0, self.slope.abs())  # a slope of 0 has no current
        second = unit * slope.view(-1, *[1] * (len(setter.shapes[node]) - 1))
        first = unit.expand_as(second)
        if largest is not None:
            setter.targets[entry.out] = self.alike(setter.targets[entry.out], first)
        setter.set_neuron(entry, interleaved(first, second, 0), largest)

    @staticmethod
    def alike(target, unit):
        """The lambdas of the pair, equal where they were to be equal before the first Vthr was rounded.

        The larger Vthr of the second neuron then fits the lambda of the first, whose Vthr may be a small integer.
        """
        first, second = (target, target) if target.numel() == 1 else (target[0::2], target[1::2])
        whole = (first / unit).round().clamp_min(1) * unit
        return interleaved(whole, torch.where((first == second) & (first > 0), whole, second), 0)

    def misfit(self, reads):
        return None if self.neuron is not None and SPIKES not in reads else "it reads spikes, or has no neurons"

    def held(self, inputs, output):
        slope = None if self.slope is None else per_channel(self.slope, inputs[0].dim())
        return [("slope", slope, inputs[0].shape[1:])]

    def extra_repr(self):
        return "" if self.slope is None else in_words(self.slope)


class LeakyReLUOp(SpikeLayer):
    """LeakyReLU, PReLU, RReLU in eval mode, and the absolute value: x for x > 0, else slope * x. slope: [C].

    It has no spiking form of its own. `dag_rewrites.split_leaky_relus` puts a SignedReLU and a MergeSigns in its place.
    """

    fields = {"slope": WEIGHTS}  # noqa: RUF012
    passes_scale = stays_behind = any_shape = True

    def __init__(self, slope):
        super().__init__()
        self.register_buffer("slope", slope)

    @property
    def passes_maximum(self):
        """The maximum of several values passes a function that never falls."""
        return bool((self.slope >= 0).all())

    @classmethod
    def record(cls, trace, function, input, slope, inplace=False):
        """Record the function of `slope`, a tensor with one value or one per channel."""
        slope = slope.detach().to(input.dtype).reshape(-1).expand(input.shape[1]).clone()
        op = cls(slope)
        output = op(input)
        if inplace:
            return trace.record_in_place("leaky_relu", op, [input], input.copy_(output))
        return trace.record("leaky_relu", op, [input], output)

    @classmethod
    def traced(cls, trace, function, input, negative_slope=0.01, inplace=False):
        slope = torch.tensor(float(negative_slope), device=input.device)
        return cls.record(trace, function, input, slope, inplace)

    @classmethod
    def traced_in_place(cls, trace, function, input, negative_slope=0.01):
        return cls.traced(trace, function, input, negative_slope, inplace=True)

    @classmethod
    def traced_prelu(cls, trace, function, input, weight):
        trace.refuse_traced_weights(function, weight, None)
        return cls.record(trace, function, input, weight)

    @classmethod
    def traced_rrelu(cls, trace, function, input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
        if training:
            trace.refuse(function, "its slopes must be fixed in eval mode, pass training=self.training")
        return cls.traced(trace, function, input, (lower + upper) / 2, inplace)

    @classmethod
    def traced_rrelu_in_place(cls, trace, function, input, lower=1 / 8, upper=1 / 3, training=False):
        return cls.traced_rrelu(trace, function, input, lower, upper, training, inplace=True)

    @classmethod
    def traced_abs(cls, trace, function, input):
        return cls.traced(trace, function, input, -1.0)

    @classmethod
    def traced_abs_in_place(cls, trace, function, input):
        return cls.traced(trace, function, input, -1.0, inplace=True)

    def activation(self, x):
        return torch.where(x > 0, x, x * per_channel(self.slope, x.dim()))

    def plan(self, place):
        """ANALOG of the image, and behind the last layer with weights. Raises ValueError elsewhere."""
        if place.is_image() or not (CURRENT in place.reads or place.has_weights_behind()):
            return ANALOG
        raise ValueError(
            f"{place.where}: a LeakyReLU or PReLU sends values of either sign, which takes pairs of spikes: give "
            "--signed pair, which converts it exactly"
        )

    def misfit(self, reads):
        return "it has no place for neurons"

    def extra_repr(self):
        return in_words(self.slope)


class MergeSigns(SpikeLayer):
    """The value that a pair stands for, [B, 2C, ...] -> [B, C, ...]: first + sign * second.

    signs: -1, or 1 where a slope is negative, 0 where it is 0; [C], or a scalar for all channels. block: number of
    adjacent features that belong to one channel, 1 unless a view has flattened the sample. Converted, it makes a
    current of the spikes: `branch_weight` is the integer weight of each.
    """

    fields = {"signs": WEIGHTS, "block": CHANNELS, "branch_weight": either(NONE, POTENTIALS)}  # noqa: RUF012
    is_linear = adds = joins_signs = True

    def __init__(self, signs, block=1, branch_weight=None):
        super().__init__()
        self.register_buffer("signs", signs)
        self.register_buffer("branch_weight0", branch_weight)
        self.block = block

    @property
    def branch_weight(self):
        """The integer weight of the spikes, None before the conversion; broadcastable to a sample of the pair."""
        return self.branch_weight0

    @property
    def branch_weights(self):
        """The weight of each input (`SpikeAdd.branch_weights`)."""
        return (self.branch_weight0,)

    def signs_of_features(self):
        """The signs as one per feature, [C * block], or a scalar."""
        return self.signs.repeat_interleave(self.block) if self.signs.dim() else self.signs

    def halves(self, x, dim):
        """The first and the second values of all pairs, along dimension `dim`."""
        parts = x.unflatten(dim, (-1, 2, self.block))
        return [parts.select(dim + 1, i).flatten(dim, dim + 1) for i in (0, 1)]

    def on_both(self, values):
        """Values per feature of the output, [C, 1, 1] or [N], for both values of each pair; a scalar is unchanged."""
        if not values.dim():
            return values
        parts = values.unflatten(0, (-1, 1, self.block))
        return parts.expand(-1, 2, *parts.shape[2:]).flatten(0, 2)

    def activation(self, x):
        first, second = self.halves(x, 1)
        return first + second * per_channel(self.signs_of_features(), x.dim())

    def current(self, x):
        data = widened(x.data)
        return Current(self.activation(data * self.branch_weight0.to(data.dtype)), x.timesteps)

    def largest_sum(self, largest_read):
        bounds = self.branch_weight0.abs().double() * largest_read[0]
        if not bounds.dim():
            return bounds.item() * (2 if (self.signs > 0).any() else 1)
        first, second = self.halves(bounds, 0)
        return torch.maximum(first, second).max().item() if (self.signs <= 0).all() else (first + second).max().item()

    def copied(self):
        """The same sum, for pairs behind another layer."""
        return MergeSigns(self.signs.clone(), self.block)

    def value_added(self, value):
        if value.numel() == 1:
            return value
        return torch.maximum(*self.halves(value, 0))

    def plan(self, place):
        """CURRENT before a neuron; ANALOG of activations, and behind the last neuron. Raises ValueError elsewhere."""
        if place.reads[0] == SPIKES and place.feeds_neuron:
            return CURRENT
        if place.reads[0] == SPIKES and place.before_neuron:
            raise ValueError(
                f"{place.where} sends values of either sign to an op that reads no currents, put a ReLU in its place"
            )
        return ANALOG

    def convert(self, setter, entry):
        """Set the integer weight of the spikes in the unit of the neuron, which the currents beside it share."""
        unit = self.on_both(setter.unit_of(entry.out))
        self.branch_weight0 = setter.branch_weight(entry.name, entry.inputs[0], unit)
        setter.largest[entry.out] = setter.largest_of(entry)

    def misfit(self, reads):
        if CURRENT in reads or self.branch_weight0 is None:
            return "it reads currents, or the spikes that it adds have no weight"
        return super().misfit(reads)

    def held(self, inputs, output):
        signs = per_channel(self.signs_of_features(), output.dim())
        return [("branch_weight0", self.branch_weight0, inputs[0].shape[1:]), ("signs", signs, output.shape[1:])]

    def spike_operations(self, spikes):
        return spikes.double().sum().item()  # one synapse per spike

    def extra_repr(self):
        return f"block={self.block}" if self.block > 1 else ""
