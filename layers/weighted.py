"""Layers with trained weights: convolutions, transposed convolutions, linear layers."""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.currents import SpikeCurrents, int8_is_exact
from kernels.currents_gpu import convolves_on_gpu
from layers.base import ANALOG, CURRENT, SpikeLayer, as_pair, frozen_names
from runtime.rules import BOOL, CHANNELS, PADDING, SIZE, either, one_of
from spike_tensor import Current, SpikeTensor

WINDOW = {"kernel_size": SIZE, "stride": SIZE, "padding": PADDING, "dilation": SIZE}
CONVOLUTION = {"in_channels": CHANNELS, "out_channels": CHANNELS, **WINDOW, "groups": CHANNELS, "bias": BOOL}


def convolution_contradiction(config):
    """A contradiction between the fields of a convolution's `config`, in words, or None."""
    groups, channels = config.get("groups", 1), (config.get("in_channels", 0), config.get("out_channels", 0))
    if channels[0] % groups or channels[1] % groups:
        return f"groups {groups} do not divide the {channels[0]} and {channels[1]} channels"
    if config.get("padding") == "same" and max(as_pair(config.get("stride", 1))) > 1:
        return f"stride {config['stride']}: padding 'same' takes stride 1"
    return None


class WeightedLayer(SpikeLayer, abstract=True):
    """A layer with weights. `operate(input, weight, bias)` computes it.

    Converted, it also holds weight_q (int8, or float for float weights), bias_q (int32, or float for float weights and
    behind the image; added at every step) and unit: activation per unit of membrane potential, a scalar or
    broadcastable to an output sample.

    weight_scale: s_w of a quantized layer, W = W_q / s_w; a scalar or broadcastable to W, None before quantization.
    weight_bits: bit width of the integer weights, None before quantization.
    largest_input: largest input in one step: 1 for spikes, the window's size behind a folded pooling.
    learns: autograd follows the currents to weights and biases (`finetuning.on_spikes.learning`).
    """

    has_weights = is_trained = carries_bias = may_turn_negative = True
    spatial = 0  # number of dimensions of a sample behind the channels
    currents = None  # a SpikeCurrents, which computes currents from spikes; created with the first spikes

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("weight_scale", None)
        self.weight_bits = None
        self.largest_input = 1
        self.learns = False

    # views: values per channel, shaped for weights, inputs or outputs

    @property
    def output_channels(self):
        """Number of output channels, C_out."""
        return len(self.weight)

    def rows(self, weight):
        """The weights of each output channel: [C_out, N]."""
        return weight.flatten(1)

    def weight_view(self, values):
        """Values per output channel, [C_out], made broadcastable to the weight; a scalar is returned unchanged."""
        return values.reshape(-1, *[1] * (self.weight.dim() - 1)) if values.dim() else values

    def per_output(self, values):
        """The inverse of `weight_view`: [C_out], or a scalar."""
        return values.flatten() if values.dim() else values

    def per_output_unit(self):
        """The unit as [C_out], or a scalar."""
        return self.unit.flatten() if self.unit.dim() else self.unit  # [1] for one channel, as the bias

    def input_view(self, values):
        """Values per input channel, [C_in], made broadcastable to the weight; a scalar is returned unchanged."""
        groups, rows = getattr(self, "groups", 1), len(self.weight)
        if not values.dim():
            return values
        per_output = values.view(groups, -1).repeat_interleave(rows // groups, 0)  # [C_out, C_in / groups]
        return per_output.view(*per_output.shape, *[1] * self.spatial)

    def output_view(self, values):
        """Values per output channel, [C_out], made broadcastable to an output sample; a scalar stays a scalar."""
        return values.reshape(-1, *[1] * self.spatial) if values.dim() else values

    # what it computes

    def activation(self, x):
        return self.operate(x, self.weight, self.bias)

    def current(self, x):
        if isinstance(x, SpikeTensor):
            pending = None if self.learns else self.spike_currents().pending(self, x.data)
            return Current(self.current_of(x.data) if pending is None else None, x.timesteps, pending=pending)
        return x.like(self.operate(x.data, self.weight, self.bias) / self.unit)  # the real-valued image

    def current_of(self, spikes):
        """The current of spikes [T*B, ...]: integers, represented exactly, unless weights are floats."""
        if self.learns:
            bias_q = None if self.bias_q is None else self.whole(self.bias / self.per_output_unit())
            return self.operate(spikes, self.whole(self.weight * self.weight_scale), bias_q)
        return self.spike_currents()(self, spikes)

    def spike_currents(self):
        """The SpikeCurrents of this layer."""
        if self.currents is None:
            self.currents = SpikeCurrents()
        return self.currents

    def whole(self, values):
        """`values` rounded, with the gradient of `values`; unchanged for float weights."""
        return values if self.weight_q.is_floating_point() else values + (values.round() - values).detach()

    def largest_current(self):
        """The bound of |current| per step."""
        reach = self.rows(self.weight_q.double()).abs().sum(1) * self.largest_input  # [C_out]
        return (reach + (0 if self.bias_q is None else self.bias_q.double().abs())).max().item()

    def largest_sum(self, largest_read):
        return self.largest_current()

    # how it is computed (`kernels.currents`)

    def int8_arguments(self):
        """(stride, padding, dilation, groups) of a convolution; None for a linear layer and for padding by name."""
        return None

    def packs_int8(self):
        """Whether this layer's currents can be computed in 8-bit integers on this machine."""
        return int8_is_exact(self.largest_input)

    def convolves_on_gpu(self, device):
        """Whether the GPU `device` has an integer kernel for this layer."""
        return False

    # how it converts

    def set_weight_scale(self, weight_scale):
        """Store s_w, the number of integer steps per unit of weight."""
        self.weight_scale = weight_scale.contiguous()  # an expanded one would not load from a file

    def set_integers(self, weight_q, bias_q, unit):
        """Store the integer weights, the bias per step (or None) and the unit."""
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("bias_q", bias_q)
        self.register_buffer("unit", torch.as_tensor(unit))

    @torch.no_grad()
    def scale_output(self, factor, shift=None):
        """Change weights and bias so that the output becomes factor * output + shift; factor, shift: [C_out]."""
        self.weight.mul_(self.weight_view(factor))
        if self.bias is not None:
            self.bias.mul_(factor)
        if shift is not None:
            self.bias = nn.Parameter(shift.detach().clone() if self.bias is None else self.bias + shift)

    def plan(self, place):
        """CURRENT before a neuron; ANALOG for the last layer. Raises ValueError if a ReLU is missing."""
        if place.reads[0] == CURRENT:
            split = "" if place.splits_signs() else ", or split what it reads by sign (--signed pair)"
            raise ValueError(f"{place.where} has no ReLU before it: add one{split}")
        if place.feeds_neuron:
            return CURRENT
        if not place.before_neuron and not (place.has_weights_behind() and self.weight.dim() == 4):
            return ANALOG
        pool = place.max_pool_behind()
        if pool is not None:
            split = "" if place.splits_signs() else ", or split its values by sign (--signed pair)"
            raise ValueError(
                f"{place.where} has no ReLU behind it, and {pool} pools its values, which may be negative: put a "
                f"ReLU before the pooling, or next behind it{split}"
            )
        split = "" if place.splits_signs() else " split its output by sign (--signed pair),"
        raise ValueError(
            f"{place.where} has no ReLU behind it: add one (only the network's last layer goes without),{split} or "
            "leave it ANN (--ann_layers)"
        )

    def convert(self, setter, entry):
        setter.set_weight(self, entry)

    def misfit(self, reads):
        return None if hasattr(self, "weight_q") else "it has no weight_q"

    def held(self, inputs, output):
        return [("unit", self.unit, output.shape[1:])]  # weight_q has the shape of the weight, which fits

    # what it costs

    def fan_out(self, shape):
        """Number of synapses that leave every input position: float64, in `shape`, that of one sample.

        It is the gradient of the sum of all outputs by each input, with all weights set to one. This is exact for every
        linear layer: strided, dilated, grouped or transposed, and at the borders.
        """
        ones = torch.ones_like(self.weight, dtype=torch.float64)
        input = torch.zeros(1, *shape, dtype=torch.float64, device=ones.device, requires_grad=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.operate(input, ones, None).sum(), input)
        return gradient[0]

    def synapses(self, shape):
        """Number of synapses, without those that read padding: the MACs per sample in an ANN."""
        return self.fan_out(shape).sum().item()

    def ann_operations(self, shape, outputs):
        return self.synapses(shape), float(outputs) if self.bias is not None else 0.0

    def spike_operations(self, spikes):
        return (spikes.double() * self.fan_out(spikes.shape)).sum().item()

    # what a file holds

    def config(self):
        return {name: getattr(self, name) if name != "bias" else self.bias is not None for name in self.fields}

    # how it is traced

    def take(self, weight, bias):
        """Take clones of a traced layer's weight and bias as parameters."""
        self.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone())
        self.frozen = frozen_names(weight, bias)


class SpikeConv2d(WeightedLayer, nn.Conv2d):
    """Convolution, [B, C_in, H, W] -> [B, C_out, H', W']; arguments of torch.nn.Conv2d."""

    fields = CONVOLUTION | {"padding": either(PADDING, one_of("same", "valid"))}
    reads_windows = True
    spatial = 2

    @classmethod
    def traced(cls, trace, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        trace.refuse_traced_weights(function, weight, bias)
        if input.dim() != 4:
            trace.refuse(function, f"the input must be [B, C, H, W], not {list(input.shape)}")
        C_out, C_in, *kernel_size = weight.shape
        op = cls(C_in * groups, C_out, kernel_size, stride, padding, dilation, groups, bias is not None)
        op.take(weight, bias)
        output = function(input, weight, bias, stride, padding, dilation, groups)
        return trace.record("conv", op, [input], output)

    @classmethod
    def contradiction(cls, config):
        return convolution_contradiction(config)

    def operate(self, input, weight, bias):
        if self.skips_pixels() and torch.is_grad_enabled() and weight.requires_grad:
            # The same result from only the pixels that are read: with stride, the weight gradient of torch 2.14.1 can
            # crash the process on a CPU.
            rows, columns = self.stride
            return F.conv2d(input[:, :, ::rows, ::columns], weight, bias, groups=self.groups)
        return self._conv_forward(input, weight, bias)

    def skips_pixels(self):
        """Whether this is a 1x1 convolution with a stride, as in the shortcuts of ResNets."""
        return self.kernel_size == (1, 1) and self.stride != (1, 1) and self.padding in ((0, 0), "valid")

    def packs_int8(self):
        return not isinstance(self.padding, str) and super().packs_int8()

    def convolves_on_gpu(self, device):
        each_alone = self.groups == self.in_channels == self.out_channels
        has_kernel = (each_alone or self.groups == 1) and not isinstance(self.padding, str)
        return has_kernel and convolves_on_gpu(self.largest_input, device)

    def int8_arguments(self):
        if isinstance(self.padding, str):
            return None
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def extra_repr(self):
        return nn.Conv2d.extra_repr(self)


class SpikeConvBN(SpikeConv2d):
    """A convolution with the following BatchNorm folded into its weights and bias (`fold_batch_norms`)."""


class SpikeConvTranspose2d(WeightedLayer, nn.ConvTranspose2d):
    """Transposed convolution, [B, C_in, H, W] -> [B, C_out, H', W']; arguments of torch.nn.ConvTranspose2d."""

    fields = CONVOLUTION | {"output_padding": PADDING}
    reads_windows = True
    spatial = 2

    @classmethod
    def traced(
        cls, trace, function, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ):
        trace.refuse_traced_weights(function, weight, bias)
        C_in, C_out, *kernel_size = weight.shape
        op = cls(C_in, C_out * groups, kernel_size, stride, padding, output_padding, groups, bias is not None, dilation)
        op.take(weight, bias)
        output = function(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return trace.record("conv_transpose", op, [input], output)

    @classmethod
    def contradiction(cls, config):
        defaults = {"output_padding": 0, "stride": 1, "dilation": 1}
        sizes = [as_pair(config.get(name, default)) for name, default in defaults.items()]
        if any(pad >= max(steps) for pad, *steps in zip(*sizes)):
            return f"output_padding {config['output_padding']}: use less than stride or dilation"
        return convolution_contradiction(config)

    def packs_int8(self):
        return False  # oneDNN's operators have no transposed form

    def operate(self, input, weight, bias):
        return F.conv_transpose2d(
            input, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    @property
    def output_channels(self):
        return self.out_channels

    def rows(self, weight):
        grouped = weight.unflatten(0, (self.groups, -1))  # [groups, C_in / groups, C_out / groups, kh, kw]
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def weight_view(self, values):
        if not values.dim():
            return values
        repeated = values.view(self.groups, 1, -1).expand(-1, self.in_channels // self.groups, -1)
        return repeated.reshape(self.in_channels, -1, 1, 1)

    def input_view(self, values):
        return values.view(-1, 1, 1, 1) if values.dim() else values

    def per_output(self, values):
        return values[:: self.in_channels // self.groups].flatten() if values.dim() else values

    def extra_repr(self):
        return nn.ConvTranspose2d.extra_repr(self)


class SpikeLinear(WeightedLayer, nn.Linear):
    """Linear layer, [B, in_features] -> [B, out_features]; arguments of torch.nn.Linear."""

    fields = {"in_features": CHANNELS, "out_features": CHANNELS, "bias": BOOL}  # noqa: RUF012

    @classmethod
    def traced(cls, trace, function, input, weight, bias=None):
        trace.refuse_traced_weights(function, weight, bias)
        if input.dim() != 2:
            trace.refuse(function, f"the input must be [B, N], not {list(input.shape)}: flatten it before")
        op = cls(weight.shape[1], weight.shape[0], bias is not None)
        op.take(weight, bias)
        return trace.record("linear", op, [input], function(input, weight, bias))

    def operate(self, input, weight, bias):
        return F.linear(input, weight, bias)

    def extra_repr(self):
        return nn.Linear.extra_repr(self)
