"""The spiking layers: each computes its ANN function on plain tensors and its spiking function on spikes.

Weighted layers turn spikes into integer currents, neurons turn currents into spikes:

    spikes 0/1 --SpikeConv2d, SpikeLinear: integer weights--> Current --SpikeAdd--> Current --IFNeuron--> spikes

A neuron stands where a ReLU stands (inside SpikeReLU), and behind an average pooling or an add of spikes. A folded
average pooling has none: what it hands on is how many spikes each of its windows holds, 0 to its size.
The first layer's input is a constant current, the real-valued image; its own current is computed once, in float.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from kernels.currents import Int8Weights, exact_type, int8_is_exact
from kernels.currents_gpu import GpuWeights, convolves_on_gpu
from kernels.memory_order import order
from spike_neurons import EXACT_IN_FLOAT32, IntegerState
from spike_tensor import Current, Memory, SpikeTensor

MOST_PREPARED = 64  # shapes that a layer remembers the type for


class SpikeLayer(nn.Module):
    """What every op of a SpikeDAGModule has.

    spiking: the op works on spikes or currents, not on activations; set by the conversion.
    neuron: the IFNeuron that fires behind this op, or None.
    levels: the ClipFloorShift that quantizes what this op, which is to fire, returns in the ANN, or None.
    frozen: names of the parameters that the traced network does not train (`frozen_names`).
    """

    frozen = frozenset()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spiking = False
        self.neuron = None
        self.levels = None

    def trained_parameters(self):
        """The parameters that finetuning moves: those that are not frozen."""
        named = self.named_parameters()
        return [p for name, p in named if p.requires_grad and name not in self.frozen]

    def in_levels(self, activation):
        """The activation, in levels where they are set."""
        return activation if self.levels is None else self.levels(activation)

    def fire(self, current, memory=None):
        """The neuron's spikes, or the current itself where no neuron stands here."""
        return current if self.neuron is None else self.neuron(current, memory)

    def keeps_memory(self):
        """Whether `forward` takes a `memory`: what the layer keeps from step to step."""
        return self.neuron is not None

    def largest_sum(self, largest_read):
        """The bound of |current| per step that leaves this op for a neuron, from those of what it reads."""
        return max(largest_read)

    def config(self):
        """The constructor's arguments, as plain data."""
        return {}


class WeightedLayer(SpikeLayer):
    """A layer with weights: `operate(input, weight, bias)` is its function.

    Converted, it also holds weight_q (integers), bias_q (integers, added every step) and unit: the activation that
    one unit of membrane potential stands for, a scalar or one per output channel, broadcastable to the output.

    weight_scale: s_w of a quantized layer, W = W_q / s_w; a scalar or broadcastable to W, None before quantization.
    weight_bits: bit width of the integers, None before quantization.
    largest_input: of the integers that the layer reads at a step: 1 for spikes, the window's size behind a folded
    pooling.
    learns: autograd follows the currents to weights and biases (`finetuning.on_spikes.learning`).
    """

    spatial = 0  # dimensions of a sample behind the channels

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("weight_scale", None)
        self.weight_bits = None
        self.largest_input = 1
        self.learns = False

    def set_weight_scale(self, weight_scale):
        """Store s_w, what one over the value of one integer step is."""
        self.weight_scale = weight_scale

    @property
    def output_channels(self):
        """C_out."""
        return len(self.weight)

    def rows(self, weight):
        """The weights of each output channel: [C_out, N]."""
        return weight.flatten(1)

    def weight_view(self, values):
        """A value per output channel, [C_out], broadcastable to the weight; a scalar as it is."""
        return values.reshape(-1, *[1] * (self.weight.dim() - 1)) if values.dim() else values

    def per_output(self, values):
        """The inverse of `weight_view`."""
        return values.flatten() if values.dim() else values

    def per_output_unit(self):
        """The unit as [C_out], or a scalar."""
        return self.unit.flatten() if self.unit.dim() else self.unit  # [1] of one channel, which a bias needs

    def input_view(self, values):
        """A value per input channel, [C_in], broadcastable to the weight; a scalar as it is."""
        groups, rows = getattr(self, "groups", 1), len(self.weight)
        if not values.dim():
            return values
        per_output = values.view(groups, -1).repeat_interleave(rows // groups, 0)  # [C_out, C_in / groups]
        return per_output.view(*per_output.shape, *[1] * self.spatial)

    def output_view(self, values):
        """A value per output channel, [C_out], broadcastable to an output sample; a scalar as it is."""
        return values.reshape(-1, *[1] * self.spatial) if values.dim() else values

    def set_integers(self, weight_q, bias_q, unit):
        """Store what the spiking function needs."""
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("bias_q", bias_q)
        self.register_buffer("unit", torch.as_tensor(unit))
        self.memory_of_prepared = {}

    def forward(self, x, memory=None):
        if isinstance(x, SpikeTensor):
            return self.fire(Current(self.current_of(x.data), x.timesteps), memory)
        if isinstance(x, Current):  # the real-valued image
            return self.fire(x.like(self.operate(x.data, self.weight, self.bias) / self.unit), memory)
        return self.in_levels(self.operate(x, self.weight, self.bias))

    def current_of(self, spikes):
        """What spikes [T*B, ...] cause: integers, exact in the type they come in."""
        if self.learns:
            bias_q = None if self.bias_q is None else self.whole(self.bias / self.per_output_unit())
            return self.operate(spikes, self.whole(self.weight * self.weight_scale), bias_q)
        if spikes.dtype != torch.uint8 or self.weight_q.dtype != torch.int8:
            return self.operate_in_type(spikes.to(torch.promote_types(spikes.dtype, torch.float32)))
        if spikes.device.type != "cpu":
            spikes = spikes.contiguous(memory_format=order(spikes))  # as `exact_type` tries them
            weights = self.gpu_weights(spikes.device)
            if weights is not None:
                return weights(spikes)
            return self.operate_in_type(spikes.to(self.gpu_type(spikes)))
        if self.fits_float32() and self.packs_int8():
            return self.packed_weights()(spikes)
        return self.operate_in_type(spikes.to(self.cpu_type(spikes)))

    def whole(self, values):
        """The integers that `values` nearly are, with their gradient; float weights as they are."""
        return values if self.weight_q.is_floating_point() else values + (values.round() - values).detach()

    def fits_float32(self):
        """Whether float32 holds all currents: not those of over 132,104 inputs with weights of 8 bits, say."""
        return self.prepared("fits", lambda: self.largest_current() <= EXACT_IN_FLOAT32)

    def operate_in_type(self, spikes):
        """The currents of floating-point spikes, in their type."""
        bias = None if self.bias_q is None else self.bias_q.to(spikes.dtype)
        return self.operate(spikes, self.weight_q.to(spikes.dtype), bias)

    def gpu_type(self, spikes):
        """The type in which currents of spikes of this shape are exact on their device; tried out once a shape."""
        shape, device = spikes.shape, spikes.device
        return self.prepared(
            (shape, device),
            lambda: exact_type(self.operate_in_type, self.largest_current(), shape, device, self.largest_input),
        )

    def cpu_type(self, spikes):
        """As `gpu_type`: float32 or float64, tried on two samples, for a CPU chooses no algorithm by the batch."""
        shape, device = (2, *spikes.shape[1:]), spikes.device
        types = {torch.float32: EXACT_IN_FLOAT32}
        return self.prepared(
            (shape, device),
            lambda: exact_type(self.operate_in_type, self.largest_current(), shape, device, self.largest_input, types),
        )

    def largest_current(self):
        """The bound of |current| per step."""
        reach = self.rows(self.weight_q.double()).abs().sum(1) * self.largest_input  # [C_out]
        return (reach + (0 if self.bias_q is None else self.bias_q.double().abs())).max().item()

    def largest_sum(self, largest_read):
        return self.largest_current()

    def packs_int8(self):
        """Whether this layer and this machine compute in 8-bit integers."""
        return int8_is_exact(self.largest_input)

    def convolves_on_gpu(self, device):
        """Whether a GPU has a kernel in integers for this layer."""
        return False

    def gpu_weights(self, device):
        """The weights as that kernel takes them, or None where it has none; prepared once."""

        def prepare():
            if not self.convolves_on_gpu(device):
                return None
            return GpuWeights(self.weight_q, self.bias_q, self.int8_arguments(), self.largest_current())

        return self.prepared(("gpu", device), prepare)

    def packed_weights(self):
        """The weights as oneDNN takes them, packed once."""
        return self.prepared("int8", lambda: Int8Weights(self.weight_q, self.bias_q, self.int8_arguments()))

    def prepared(self, key, prepare):
        """What `prepare()` makes of the integers, remembered under `key` until they change."""
        state = IntegerState(self.weight_q, self.bias_q)
        memory = self.memory_of_prepared
        if memory.get("state") != state or len(memory) > MOST_PREPARED:
            memory = self.memory_of_prepared = {"state": state}
        if key not in memory:
            memory[key] = prepare()
        return memory[key]

    def int8_arguments(self):
        """(stride, padding, dilation, groups) of a convolution, None for a linear layer."""
        return None

    @torch.no_grad()
    def scale_output(self, factor, shift=None):
        """Make the layer compute `factor * its output + shift`, [C_out] each."""
        self.weight.mul_(self.weight_view(factor))
        if self.bias is not None:
            self.bias.mul_(factor)
        if shift is not None:
            self.bias = nn.Parameter(shift.detach().clone() if self.bias is None else self.bias + shift)


class SpikeConv2d(WeightedLayer, nn.Conv2d):
    """Convolution, [B, C_in, H, W] -> [B, C_out, H', W']; arguments of torch.nn.Conv2d."""

    spatial = 2

    def operate(self, input, weight, bias):
        if self.skips_pixels() and torch.is_grad_enabled() and weight.requires_grad:
            # the same from the pixels that are read: torch 2.14.1's own weight gradient may end the process on a CPU
            rows, columns = self.stride
            return F.conv2d(input[:, :, ::rows, ::columns], weight, bias, groups=self.groups)
        return self._conv_forward(input, weight, bias)

    def skips_pixels(self):
        """Whether it is a 1x1 convolution that reads only some of the pixels, as in the shortcuts of ResNets."""
        return self.kernel_size == (1, 1) and self.stride != (1, 1) and self.padding in ((0, 0), "valid")

    def packs_int8(self):
        return not isinstance(self.padding, str) and super().packs_int8()

    def convolves_on_gpu(self, device):
        each_alone = self.groups == self.in_channels == self.out_channels
        has_kernel = (each_alone or self.groups == 1) and not isinstance(self.padding, str)
        return has_kernel and convolves_on_gpu(self.largest_input, device)

    def int8_arguments(self):
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def config(self):
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "bias": self.bias is not None,
        }


class SpikeConvBN(SpikeConv2d):
    """A convolution with the BatchNorm behind it folded into its weights and bias (`fold_batch_norms`)."""


class SpikeAvgPool2d(SpikeConv2d):
    """Average pooling as a depthwise convolution of fixed weights 1/(kernel_size**2); in integers, ones.

    Spikes get a neuron of its own; of what flows into a neuron behind it, it is the sum. folded: part of the layers
    behind it, which then weigh every spike of a window: it has no neuron and hands on sums of spikes, in their type.
    Before the conversion, whether it shall be folded where it can (`folded_poolings`).
    input_size: (height, width) that the windows were chosen for, where they depend on it, as in an adaptive pooling;
    the threshold depends on the windows, so that an input of another size is refused. None for any size.
    """

    def __init__(self, channels, kernel_size, stride, padding=0, folded=False, input_size=None):
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels, bias=False)
        self.weight.requires_grad_(False).fill_(1 / self.weight[0].numel())
        self.folded = folded
        self.input_size = None if input_size is None else tuple(input_size)

    def check_size(self, size):
        """Raise ValueError for an input of another (height, width) than the windows were chosen for."""
        if self.input_size is not None and tuple(size) != self.input_size:
            raise ValueError(
                f"an average pooling has windows for an input of {list(self.input_size)} and gets {list(size)}: give "
                "images of the size that the network was traced with, or trace and convert it for the other"
            )

    def forward(self, x, memory=None):
        self.check_size(x.data.shape[-2:])
        if isinstance(x, Current):
            total = x.total()
            return x.like(self.operate(total, self.weight_q.to(total.dtype), None))
        if self.folded and isinstance(x, SpikeTensor):
            sums = self.current_of(x.data).to(x.data.dtype)  # [T*B, C, H', W']
            return SpikeTensor.like(sums, x.timesteps, x.scale_factor / self.window)
        return super().forward(x, memory)

    def operate(self, input, weight, bias):
        sums = F.avg_pool2d(input, self.kernel_size, self.stride, self.padding, divisor_override=1)
        return sums * weight[:, 0, :1, :1]  # a convolution for each channel, but faster

    @property
    def window(self):
        """Inputs of one output."""
        return self.weight[0].numel()

    def largest_sum(self, largest_read):
        return largest_read[0] * self.window

    def extra_repr(self):
        return super().extra_repr() + ", folded" * self.folded

    def config(self):
        return {
            "channels": self.in_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "folded": self.folded,
            "input_size": self.input_size,
        }


class SpikeConvTranspose2d(WeightedLayer, nn.ConvTranspose2d):
    """Transposed convolution, [B, C_in, H, W] -> [B, C_out, H', W']; arguments of torch.nn.ConvTranspose2d."""

    spatial = 2

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

    def config(self):
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "output_padding": self.output_padding,
            "groups": self.groups,
            "bias": self.bias is not None,
            "dilation": self.dilation,
        }


class SpikeLinear(WeightedLayer, nn.Linear):
    """Linear layer, [B, in_features] -> [B, out_features]; arguments of torch.nn.Linear."""

    def operate(self, input, weight, bias):
        return F.linear(input, weight, bias)

    def config(self):
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}


class SpikeMaxPool2d(SpikeLayer):
    """Max pooling; converted, of spikes.

    mode "gate": a spike passes when it raises the largest spike count of its window, so that the output's count is the
    largest count at every step (the gate of Rueckauer et al., Frontiers in Neuroscience 2017, which lets the input
    with the most spikes pass, without the spikes it lets through when the leader changes). mode "or": the maximum of
    the spikes of each step. None: not chosen.
    """

    modes = ("gate", "or")

    def __init__(self, kernel_size, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False, mode=None):
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.ceil_mode, self.mode = ceil_mode, mode

    def config(self):
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "mode")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.config().items())

    def pool(self, x):
        """The maximum of every window."""
        return F.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    def keeps_memory(self):
        return self.mode == "gate"

    def forward(self, x, memory=None):
        if isinstance(x, torch.Tensor):
            return self.pool(x)
        if self.mode == "or":
            largest = self.pool(x.data.to(torch.float32))  # PyTorch pools no large maps of integers
            return SpikeTensor.like(largest.to(x.data.dtype), x.timesteps, x.scale_factor)
        memory = Memory(x.timesteps) if memory is None else memory
        steps = x.data.unflatten(0, (x.timesteps, -1))  # [T, B, C, H, W]
        counts, sent = memory.by_layer.get(self, (torch.zeros_like(steps[0], dtype=torch.float32), 0))
        spikes = []
        for step in steps:
            counts = counts + step
            largest = self.pool(counts)  # [B, C, H', W']
            spikes.append((largest - sent).to(step.dtype))
            sent = largest
        memory.by_layer[self] = counts, sent
        return SpikeTensor.like(torch.cat(spikes), x.timesteps, x.scale_factor)


class SpikeReLU(SpikeLayer):
    """ReLU, cut off at `ceiling` if given (6 for ReLU6).

    Converted, the neurons that turn the current before it into spikes; their scale is at most the ceiling, which a
    spike at every step reaches. Spikes pass: they are not negative.
    """

    def __init__(self, ceiling=None):
        super().__init__()
        self.ceiling = ceiling

    def config(self):
        return {"ceiling": self.ceiling}

    def extra_repr(self):
        return "" if self.ceiling is None else f"ceiling={self.ceiling:g}"

    def forward(self, x, memory=None):
        if isinstance(x, Current):
            return self.fire(x, memory)
        if isinstance(x, SpikeTensor):
            return x
        return self.in_levels(F.relu(x) if self.ceiling is None else x.clamp(0, self.ceiling))


class SignedReLU(SpikeLayer):
    """Two ReLUs for a value that may be negative: channel 2c holds relu(x_c), channel 2c + 1 relu(-x_c).

    [B, C, ...] -> [B, 2C, ...]. The layer behind it has its weights twice, the second time negated.
    """

    def forward(self, x, memory=None):
        if isinstance(x, Current):
            return self.fire(x.like(self.both_signs(x.total())), memory)
        return self.in_levels(F.relu(self.both_signs(x)))

    @staticmethod
    def both_signs(x):
        """x and -x, channels interleaved."""
        return torch.stack([x, -x], 2).flatten(1, 2)


class SpikeBatchNorm(SpikeLayer):
    """BatchNorm in eval mode where it could not be folded: `weight * x + bias` per channel.

    It stands before a ReLU, as in networks that normalise first (DenseNet), and reads what flows into neurons.
    Converted, the weight's size is in the unit of its output, and so in Vthr; what is left is its sign, times a small
    integer where spikes come in, so that the threshold behind it is fine enough.
    """

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def config(self):
        return {"channels": len(self.weight)}

    def set_integers(self, weight_q, bias_q):
        """What a spike, or a unit of current, weighs, and what is added every step; broadcastable to a sample."""
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("bias_q", bias_q)

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            shape = [-1, *[1] * (x.dim() - 2)]
            return x * self.weight.view(shape) + self.bias.view(shape)
        data = x.total() if isinstance(x, Current) else x.data
        data = data.to(torch.float32) if data.dtype == torch.uint8 else data
        current = data * self.weight_q.to(data.dtype) + self.bias_q.to(data.dtype)
        return Current(current, x.timesteps, isinstance(x, Current) and x.constant)

    def largest_sum(self, largest_read):
        return (largest_read[0] * self.weight_q.abs() + self.bias_q.abs()).max().item()


class SpikePad(SpikeLayer):
    """Zeros around height and width: `pads` is (left, right, top, bottom), as in F.pad; negative values crop."""

    def __init__(self, pads):
        super().__init__()
        self.pads = tuple(pads)

    def config(self):
        return {"pads": self.pads}

    def extra_repr(self):
        return f"pads={self.pads}"

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            return F.pad(x, self.pads)
        data = F.pad(x.total() if isinstance(x, Current) else x.data, self.pads)
        return x.like(data) if isinstance(x, Current) else SpikeTensor.like(data, x.timesteps, x.scale_factor)


class SpikeAdd(SpikeLayer):
    """The sum of two inputs.

    Converted, inputs that are spikes become currents by an integer weight each (`branch_weights`, with None for an
    input that is a current already), so that all inputs of the neuron share one unit.
    """

    def __init__(self, branch_weights=(None, None)):
        super().__init__()
        self.set_branch_weights(branch_weights)

    def set_branch_weights(self, branch_weights):
        """One entry per input: None, or the weight, a scalar tensor or broadcastable to an input's data[0]."""
        for i, weight in enumerate(branch_weights):
            self.register_buffer(f"branch_weight{i}", weight)

    def config(self):
        return {"branch_weights": (self.branch_weight0, self.branch_weight1)}

    def forward(self, x, y, memory=None):
        if isinstance(x, torch.Tensor):
            return self.in_levels(x + y)
        if isinstance(x, SpikeTensor) and isinstance(y, Current):
            return self.fire(self.join(y, self.branch_weight1, x, self.branch_weight0), memory)
        return self.fire(self.join(x, self.branch_weight0, y, self.branch_weight1), memory)

    def join(self, x, weight_x, y, weight_y):
        """The sum; spikes that come to a current are added where the neuron reads them."""
        is_plain = isinstance(x, Current) and weight_x is None and not x.constant and x.spikes is None
        if is_plain and isinstance(y, SpikeTensor):
            return Current(x.data, x.timesteps, spikes=(y.data, weight_y))
        x, y = self.to_current(x, weight_x), self.to_current(y, weight_y)
        if x.constant and y.constant:
            return x.like(x.total() + y.total())
        return Current((x.per_step() + y.per_step()).flatten(0, 1), x.timesteps)

    @staticmethod
    def to_current(x, weight):
        """Spikes, or currents of another unit, times their weight; other currents as they are."""
        if weight is None:
            return x
        data = x.total() if isinstance(x, Current) else x.data
        data = data.to(torch.float32) if data.dtype == torch.uint8 else data
        return Current(data * weight.to(data.dtype), x.timesteps, isinstance(x, Current) and x.constant)

    def largest_sum(self, largest_read):
        weights = (self.branch_weight0, self.branch_weight1)
        return sum(b * (1 if w is None else w.abs().max().item()) for b, w in zip(largest_read, weights))


class ConcatOp(SpikeLayer):
    """Concatenation of any number of inputs along dimension `dim` (not the batch)."""

    def __init__(self, dim=1):
        super().__init__()
        self.dim = dim

    def config(self):
        return {"dim": self.dim}

    def forward(self, *inputs):
        if isinstance(inputs[0], torch.Tensor):
            return torch.cat(inputs, self.dim)
        if any(isinstance(x, Current) for x in inputs):
            return self.join_currents(inputs)
        data = torch.cat([x.data for x in inputs], self.dim)
        scales = [x.scale_factor for x in inputs]
        scale = concat_scales(scales, [x.data.shape[1:] for x in inputs], self.dim - 1)
        return SpikeTensor.like(data, inputs[0].timesteps, scale)

    def join_currents(self, inputs):
        """Currents, and spikes as currents of 0 or 1, side by side; each has its unit."""
        constant = all(isinstance(x, Current) and x.constant for x in inputs)
        if constant:
            return inputs[0].like(torch.cat([x.total() for x in inputs], self.dim))
        steps = [x.per_step().flatten(0, 1) if isinstance(x, Current) else x.data for x in inputs]
        return Current(torch.cat(steps, self.dim), inputs[0].timesteps)


def concat_scales(scales, shapes, dim):
    """One scale for concatenated spikes: every input's own scale, repeated along `dim` over its channels.

    One that all inputs have stays as it is, but along the channels, `dim` 0, where each brings its own.
    """
    if (dim or scales[0].numel() == 1) and all(torch.equal(scale, scales[0]) for scale in scales):
        return scales[0]
    rank = len(shapes[0])
    extents = [max([1] + [s.shape[i - rank] for s in scales if s.dim() >= rank - i]) for i in range(rank)]
    full = [s.expand([n if i == dim else extents[i] for i, n in enumerate(shape)]) for s, shape in zip(scales, shapes)]
    return torch.cat(full, dim)


class ViewOp(SpikeLayer):
    """A new shape for every sample: [B, ...] -> [B, *shape]; the batch size is not part of it."""

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)

    def config(self):
        return {"shape": self.shape}

    def extra_repr(self):
        return f"shape={self.shape}"

    def reshape(self, x):
        """Every sample in the new shape. Raises ValueError where it has more or fewer values."""
        if math.prod(x.shape[1:]) != math.prod(self.shape):
            raise ValueError(
                f"a view to {list(self.shape)} gets {list(x.shape[1:])}: give images of the size that the network was "
                "traced with"
            )
        return x.reshape(len(x), *self.shape)

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            return self.reshape(x)
        data = self.reshape(x.total() if isinstance(x, Current) else x.data)
        if isinstance(x, Current):
            return x.like(data)
        scale = x.scale_factor
        if scale.numel() > 1:
            scale = scale.expand(x.data.shape[1:]).reshape(self.shape)
        return SpikeTensor.like(data, x.timesteps, scale)


class SoftmaxOp(SpikeLayer):
    """Softmax over dimension `dim`, or its logarithm; stands behind the last layer and is not converted."""

    def __init__(self, dim=-1, log=False):
        super().__init__()
        self.dim, self.log = dim, log

    def config(self):
        return {"dim": self.dim, "log": self.log}

    def forward(self, x):
        return F.log_softmax(x, self.dim) if self.log else F.softmax(x, self.dim)


OP_TYPES = {
    cls.__name__: cls
    for cls in (
        SpikeConv2d,
        SpikeConvBN,
        SpikeConvTranspose2d,
        SpikeAvgPool2d,
        SpikeMaxPool2d,
        SpikeLinear,
        SpikeBatchNorm,
        SpikeReLU,
        SignedReLU,
        SpikeAdd,
        ConcatOp,
        SpikePad,
        ViewOp,
        SoftmaxOp,
    )
}
