"""Elementwise layers: ReLUs, which get neurons, a BatchNorm that could not be folded, softmax."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import resolve_name

from layers.base import ANALOG, CURRENT, SPIKES, SpikeLayer, frozen_names, widened
from runtime.rules import BOOL, CHANNELS, DIM, NONE, POSITIVE, either, whole
from spike_tensor import Current

NEXT_TO_NOTHING = 1e-4  # relative to the largest weight of a BatchNorm: a channel below sends only its bias


class SpikeReLU(SpikeLayer):
    """ReLU, clipped at `ceiling` if given (6 for ReLU6).

    Converted, it holds the neurons that turn currents into spikes. Their lambda is at most the ceiling, the activation
    of a spike at every step. Spikes pass unchanged, because they are not negative.
    """

    fields = {"ceiling": either(NONE, POSITIVE)}  # noqa: RUF012
    rectifies = passes_spikes = passes_sums = any_shape = True

    def __init__(self, ceiling=None):
        super().__init__()
        self.ceiling = ceiling

    @property
    def passes_scale(self):
        """A positive factor passes a ReLU without a ceiling."""
        return self.ceiling is None

    @classmethod
    def traced(cls, trace, function, input, inplace=False, ceiling=None):
        if inplace:
            return cls.traced_in_place(trace, function, input, ceiling)
        return trace.record("relu", cls(ceiling), [input], input.clamp(0, ceiling))

    @classmethod
    def traced_in_place(cls, trace, function, input, ceiling=None):
        # the name `input` now means the result
        return trace.record_in_place("relu", cls(ceiling), [input], input.clamp_(0, ceiling))

    @classmethod
    def traced_relu6(cls, trace, function, input, inplace=False):
        return cls.traced(trace, function, input, inplace, 6.0)

    def activation(self, x):
        return F.relu(x) if self.ceiling is None else x.clamp(0, self.ceiling)

    def unclipped(self, x):
        return x if self.ceiling is None else self.activation(x)

    def current(self, x):
        return x

    def plan(self, place):
        return SPIKES if place.reads[0] == CURRENT else place.reads[0]

    def convert(self, setter, entry):
        """Set a neuron for a current; spikes pass. Raises ValueError if passing spikes would exceed the ceiling."""
        node = entry.inputs[0]
        if entry.name in setter.plan.firing:
            setter.set_neuron(entry, setter.units[node], setter.largest[node])
            return
        if self.ceiling is not None and setter.scales[node].max() * setter.peaks[node] > self.ceiling:
            raise ValueError(
                f"{setter.dag.where(entry.name)} cuts off spikes of another neuron, put it behind a convolution"
            )
        setter.scales[entry.out] = setter.scales[node]

    def misfit(self, reads):
        has_neurons = self.neuron is not None
        return None if has_neurons != (SPIKES in reads) else "it takes neurons for currents and none for spikes"

    def extra_repr(self):
        return "" if self.ceiling is None else f"ceiling={self.ceiling:g}"


class ScaledCurrent(SpikeLayer, abstract=True):
    """A layer that sends the current weight_q * x + bias_q, integers for every channel or element."""

    def set_integers(self, weight_q, bias_q):
        """Store the integer weight and the bias per step, both broadcastable to a sample."""
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("bias_q", bias_q)

    def current(self, x):
        data = widened(x.total() if isinstance(x, Current) else x.data)
        current = data * self.weight_q.to(data.dtype) + self.bias_q.to(data.dtype)
        return Current(current, x.timesteps, isinstance(x, Current) and x.constant)

    def largest_sum(self, largest_read):
        return (largest_read[0] * self.weight_q.abs() + self.bias_q.abs()).max().item()

    def plan(self, place):
        """CURRENT before a neuron, ANALOG in a part that stays ANN. Raises ValueError elsewhere."""
        if place.reads[0] == ANALOG or (place.reads[0] == SPIKES and not place.before_neuron):
            return ANALOG
        if place.feeds_neuron:
            return CURRENT
        raise ValueError(self.refusal(place))

    def refusal(self, place):
        """The message for a place behind which no neuron takes the current."""
        raise NotImplementedError


class SpikeBatchNorm(ScaledCurrent):
    """A BatchNorm in eval mode that could not be folded: `weight * x + bias` per channel.

    It stands before a ReLU, as in DenseNet, which normalises before its convolutions, and reads spikes or currents.
    Converted, |weight| goes into the unit of the output, and so into Vthr. The integer weight is the sign, times a
    small integer if the input is spikes, so that the Vthr behind it is fine enough.
    """

    fields = {"channels": CHANNELS}  # noqa: RUF012
    is_linear = hands_on = carries_bias = any_shape = True
    mean = beta = None  # [C], of the network: bias = beta - mean * weight

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    @property
    def channels(self):
        """Number of channels, C."""
        return len(self.weight)

    def folded_bias(self, bias):
        """The bias of a layer that takes this over, [C]; bias: its own, [C], or None.

        It is rounded as torch.onnx and PyTorch's own folding round it, so that a network and its exported file have the
        same integers, and so the same spikes.
        """
        if bias is None:
            return self.bias.detach().clone()
        if self.mean is None or not torch.equal(self.bias, self.beta - self.mean * self.weight):
            return bias * self.weight + self.bias  # arithmetic before it went into its constant
        return (bias - self.mean) * self.weight + self.beta

    @classmethod
    def traced(
        cls,
        trace,
        function,
        input,
        running_mean,
        running_var,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
    ):
        if training or running_mean is None:
            trace.refuse(function, "it needs running statistics, track_running_stats=True")
        if input.dim() not in (2, 4):
            trace.refuse(function, f"the input must be [B, C, H, W] or [B, N], not {list(input.shape)}")
        op = cls(len(running_mean))
        mean, deviation = running_mean.detach(), (running_var.detach() + eps).sqrt()
        factor = (torch.ones_like(mean) if weight is None else weight.detach()) / deviation
        beta = torch.zeros_like(mean) if bias is None else bias.detach()
        op.mean, op.beta = mean.to(input.dtype), beta.to(input.dtype)
        op.weight = nn.Parameter(factor.to(input.dtype))
        op.bias = nn.Parameter(op.beta - op.mean * op.weight.detach())
        op.frozen = frozen_names(weight, bias)
        output = function(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return trace.record("batch_norm", op, [input], output)

    @property
    def may_turn_negative(self):
        """Whether it may make values below 0 of values that are not."""
        return bool((self.weight < 0).any() or (self.bias < 0).any())

    def only_scales(self):
        """Whether it multiplies every channel by a positive factor, and adds nothing."""
        return bool((self.weight > 0).all() and (self.bias == 0).all())

    @property
    def output_channels(self):
        """Number of output channels, C."""
        return len(self.weight)

    @property
    def spatial(self):
        """Number of dimensions of a sample behind the channels."""
        return self.bias_q.dim() - 1

    @classmethod
    def parameters_of(cls, integers):
        return {name: values.flatten() for name, values in integers.items()}

    def activation(self, x):
        shape = [-1, *[1] * (x.dim() - 2)]
        return x * self.weight.view(shape) + self.bias.view(shape)

    def refusal(self, place):
        split = "" if place.splits_signs() else ", or split the values behind it by sign (--signed pair)"
        return (
            f"{place.where} adds constants to spikes or turns their signs, and the layers behind it cannot take that "
            f"over: put it behind a convolution or linear layer, or before a ReLU{split}"
        )

    def convert(self, setter, entry):
        """Put |weight| into the unit; the sign becomes the integer weight, the shift becomes bias_q.

        The integer weight of spikes is as large as the resolution of Vthr needs, at most the largest of the bit width.
        A channel with a weight next to 0 (`NEXT_TO_NOTHING`) keeps only its bias. Channels that are mixed later share
        the unit of the largest. 1e-30 prevents divisions by 0.
        """
        node, spatial = entry.inputs[0], [1] * (len(setter.shapes[entry.out]) - 1)
        weight, bias = self.weight.detach().view(-1, *spatial), self.bias.detach().view(-1, *spatial)
        size = weight.abs()
        silent = size <= NEXT_TO_NOTHING * size.max()
        size = torch.where(silent, size.max().clamp_min(1e-30), size)
        reference = max(setter.statistics[entry.name].max_o, 1e-30)
        unit = setter.value_of(node) * size
        largest_read = setter.largest_read(entry)
        if largest_read is not None:
            # a channel whose largest current is far below Vthr sends the spikes of its bias alone
            finest = setter.finest_unit(max(reference, bias.abs().max().item()))
            silent = silent | (unit * largest_read[0] < finest)
            unit = torch.where(silent, unit.clamp_min(finest), unit)
        wanted = (setter.most * unit / reference).ceil().clamp(1, setter.most)
        integer = torch.ones_like(wanted) if setter.is_float else wanted
        if entry.out in setter.mixed:  # one unit for all channels
            integer = unit / unit.max() * setter.most
            integer = integer if setter.is_float else integer.round()
            unit = unit.max() / setter.most
        else:
            unit = unit / integer
        weight_q = torch.where(silent, 0.0, weight.sign()) * integer
        bias_q = bias / unit if largest_read is None else setter.rounded(entry.name, bias / unit)
        self.set_integers(weight_q if setter.is_float else weight_q.to(torch.int32), bias_q)
        setter.units[entry.out] = unit
        setter.largest[entry.out] = setter.largest_of(entry)

    def misfit(self, reads):
        if not hasattr(self, "weight_q"):
            return "it has no weight_q"
        return super().misfit(reads) or ("it has no bias_q" if self.bias_q is None else None)

    def held(self, inputs, output):
        return [(key, getattr(self, key), output.shape[1:]) for key in ("weight_q", "bias_q")]

    def ann_operations(self, shape, outputs):
        return float(outputs), 0.0

    def spike_operations(self, spikes):
        return spikes.double().sum().item()  # one synapse per spike


class SoftmaxOp(SpikeLayer):
    """Softmax over dimension `dim`, or its logarithm. It stands behind the last layer and stays ANN."""

    fields = {"dim": either(DIM, whole(-8, -1)), "log": BOOL}  # noqa: RUF012
    is_measured = False

    def __init__(self, dim=-1, log=False):
        super().__init__()
        self.dim, self.log = dim, log

    @classmethod
    def traced(cls, trace, function, input, dim=None, _stacklevel=3, dtype=None):
        dim = (1 if dim is None else dim) % input.dim()
        if dim == 0 or dtype is not None:
            trace.refuse(function, "only softmax over the classes, dim=1, in the input's own type is supported")
        op = cls(dim, log="log_softmax" in resolve_name(function))
        return trace.record("softmax", op, [input], op(input))

    def activation(self, x):
        return F.log_softmax(x, self.dim) if self.log else F.softmax(x, self.dim)

    def plan(self, place):
        """ANALOG behind the last layer. Raises ValueError elsewhere."""
        if place.before_neuron or CURRENT in place.reads:
            raise ValueError(f"{place.where}: softmax is supported behind the last layer only")
        return ANALOG

    def misfit(self, reads):
        return "it has no place for neurons"
