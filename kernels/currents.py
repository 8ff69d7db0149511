"""Exact currents of convolutions and linear layers with integer weights, computed in the fastest way of the machine.

Int8Weights    on a CPU: integer products by oneDNN
GpuWeights     on a GPU: integer products by Triton (`kernels.currents_gpu`)
exact_type     otherwise: the narrowest floating-point type whose currents are exact on a device, found by trial
"""

import functools

import torch

from kernels.currents_gpu import GpuWeights
from kernels.firing_convolution import FiringConvolution, PendingConvolution, plan_tiles
from kernels.integer_state import IntegerState
from kernels.memory_order import order

EXACT_IN_FLOAT32 = 2**24  # float32 has 24 significant bits, so integers up to here are exact in it
LARGEST_EXACT = {torch.float16: 2**11, torch.float32: EXACT_IN_FLOAT32}
MOST_SHAPES = 64  # choices that a layer remembers, one per shape of spikes; beyond it, it starts anew


class SpikeCurrents:
    """Called with a layer and its spikes [T*B, ...]; returns the currents [T*B, ...], exact in the type that they have.

    The method is chosen once per shape and device, and again when the layer's integers change. A copy of a layer makes
    its own choices.
    """

    def __init__(self):
        self.state = None

    def __deepcopy__(self, memo):
        return SpikeCurrents()

    def __call__(self, layer, spikes):
        if spikes.dtype == torch.int8 and packs_counts(layer):
            return self.packed(layer)(spikes.view(torch.uint8))
        if not is_whole(layer, spikes):
            return in_type(layer, spikes, torch.promote_types(spikes.dtype, torch.float32))
        made = self.made_for(layer)
        # on a CPU the algorithm does not depend on the batch size
        key = (spikes.device, spikes.shape if spikes.device.type != "cpu" else spikes.shape[1:])
        run = made.get(key)
        if run is None:
            run = made[key] = choose(layer, spikes, made)
        return run(spikes)

    def made_for(self, layer):
        """The choices for the layer's integers as they are: a dict, empty after a change."""
        state = self.state  # read once, because each simulating thread may set it
        if state is None or not state.holds(layer.weight_q, layer.bias_q) or len(state.made) > MOST_SHAPES:
            state = self.state = IntegerState({}, layer.weight_q, layer.bias_q)
        return state.made

    def packed(self, layer):
        """The layer's Int8Weights."""
        made = self.made_for(layer)
        if "int8" not in made:
            made["int8"] = Int8Weights(layer.weight_q, layer.bias_q, layer.int8_arguments())
        return made["int8"]

    def pending(self, layer, spikes):
        """A PendingConvolution that the neurons behind the layer may compute, or None where no kernel suits it."""
        if spikes.device.type != "cpu" or not is_whole(layer, spikes):
            return None
        made, key = self.made_for(layer), ("fires", spikes.shape[1:])
        if key not in made:
            made[key] = firing_convolution(layer, tuple(spikes.shape[1:]))
        kernel = made[key]
        return None if kernel is None else PendingConvolution(kernel, spikes, lambda: self(layer, spikes))


def packs_counts(layer):
    """Whether spike counts of at most 127 can be multiplied in integers; the neurons behind bound the currents."""
    return layer.weight_q.dtype == torch.int8 and layer.packs_int8() and int8_is_exact(127)


def is_whole(layer, spikes):
    """Whether spikes and weights are integers: not those of the reference engine, nor float weights."""
    return spikes.dtype == torch.uint8 and layer.weight_q.dtype == torch.int8


def firing_convolution(layer, sample):
    """The FiringConvolution of a layer for input of the shape `sample`, or None if it has none."""
    plan = plan_tiles(layer.weight_q, layer.int8_arguments(), sample, layer.largest_input)
    return None if plan is None else FiringConvolution(layer.weight_q, layer.bias_q, plan)


def choose(layer, spikes, made):
    """A function from spikes of this shape to their currents.

    made: earlier choices, to which packed weights are added, because these suit every shape.
    """
    device, largest, geometry = spikes.device, layer.largest_current(), layer.int8_arguments()
    if device.type == "cpu" and layer.packs_int8() and largest <= EXACT_IN_FLOAT32:
        if "int8" not in made:
            made["int8"] = Int8Weights(layer.weight_q, layer.bias_q, geometry)
        return made["int8"]
    if device.type != "cpu" and layer.convolves_on_gpu(device):
        if device not in made:
            made[device] = GpuWeights(layer.weight_q, layer.bias_q, geometry, largest)
        return made[device]
    dtype = type_for(layer, spikes.shape, device)
    return lambda spikes: in_type(layer, spikes, dtype)


def in_type(layer, spikes, dtype):
    """The currents [T*B, ...] of spikes [T*B, ...], computed in a floating-point type."""
    if spikes.device.type != "cpu":
        spikes = spikes.contiguous(memory_format=order(spikes))  # the order that `exact_type` tried
    spikes = spikes.to(dtype)
    return layer.operate(spikes, layer.weight_q.to(dtype), None if layer.bias_q is None else layer.bias_q.to(dtype))


def type_for(layer, shape, device):
    """The narrowest floating-point type in which the currents of spikes of this shape are exact on a device.

    On a CPU two samples are enough for the trial, and float16 is left out because it is slow there.
    """
    on_cpu = torch.device(device).type == "cpu"
    shape = (2, *shape[1:]) if on_cpu else shape
    types = {torch.float32: EXACT_IN_FLOAT32} if on_cpu else LARGEST_EXACT

    def operate(spikes):
        return in_type(layer, spikes, spikes.dtype)

    return exact_type(operate, layer.largest_current(), shape, device, layer.largest_input, types)


class Int8Weights:
    """Integer weights of a convolution or linear layer, packed for oneDNN: from uint8 spikes to exact float32 currents.

    weight_q: int8 [C_out, ...]. bias_q: [C_out] or None.
    """

    def __init__(self, weight_q, bias_q, conv=None):
        channels = len(weight_q)
        self.conv = conv  # (stride, padding, dilation, groups), None for a linear layer
        self.scale, self.zero = torch.ones(channels), torch.zeros(channels, dtype=torch.int64)
        self.bias = None if bias_q is None else bias_q.to(torch.float32)
        onednn = torch.ops.onednn
        if conv is None:
            self.packed = onednn.qlinear_prepack(weight_q.contiguous(), None)
        else:
            self.packed = onednn.qconv_prepack(weight_q.contiguous(), self.scale, 1.0, 0, *conv)

    def __call__(self, spikes):
        """The currents, float32 [N, C_out, ...], of uint8 spikes [N, C_in, ...]."""
        weights = (self.packed, self.scale, self.zero, self.bias)
        tail = (1.0, 0, torch.float32, "none", [], "")  # output scale, zero point and type; nothing after the sum
        if self.conv is None:
            return torch.ops.onednn.qlinear_pointwise(spikes, 1.0, 0, *weights, *tail)
        spikes = spikes.contiguous(memory_format=torch.channels_last)
        return torch.ops.onednn.qconv2d_pointwise(spikes, 1.0, 0, *weights, *self.conv, *tail)


@functools.cache
def int8_is_exact(largest=1):
    """Whether the int8 operators of this machine exist and are exact for inputs from 0 to `largest`; tried once.

    A processor without VNNI may add pairs of products in 16 bits, which overflow for the largest inputs and weights.
    The trial therefore uses these as well as random values.
    """
    generator = torch.Generator().manual_seed(0)
    spikes = torch.randint(0, largest + 1, (3, 32, 9, 9), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (16, 32, 3, 3), generator=generator, dtype=torch.int8)
    extremes = torch.full_like(spikes, largest), torch.full_like(weight, 127)
    return all(int8_gives_exact(*tried) for tried in ((spikes, weight), extremes))


def int8_gives_exact(spikes, weight):
    """Whether int8 operators exist and give the float64 result for a convolution and a linear layer.

    spikes: uint8 [N, C_in, H, W]. weight: int8 [C_out, C_in, 3, 3].
    """
    bias = torch.arange(16, dtype=torch.int32)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    try:
        current = Int8Weights(weight, bias, conv)(spikes)
        linear = Int8Weights(weight.flatten(1), bias)(spikes[:, :, :3, :3].flatten(1))
    except (AttributeError, RuntimeError):  # no such operator in this build of torch, or on this processor
        return False
    expected = torch.nn.functional.conv2d(spikes.double(), weight.double(), bias.double(), padding=1)
    rows = spikes[:, :, :3, :3].flatten(1).double() @ weight.flatten(1).double().T + bias
    return torch.equal(current.double(), expected) and torch.equal(linear.double(), rows)


def exact_type(operate, largest, shape, device, largest_input=1, types=LARGEST_EXACT):
    """The narrowest of float16, float32 and float64 in which `operate(spikes)` returns exact currents on a device.

    operate: function from spikes to currents of the same type. largest: bound of |current|. shape: shape of the spikes.
    largest_input: 1 for spikes, up to 255 for sums of spikes. types: type to try -> the largest integer exact in it.

    Integers up to 2^11 are exact in float16, and up to 2^24 in float32. TF32 does not change this: it rounds factors,
    which are at most 255, but not sums. Algorithms that transform their inputs, such as Winograd's, do round, and
    libraries choose the algorithm by the shape. So each type is tried on random spikes of this shape, and with the
    largest input everywhere.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, largest_input + 1, shape, generator=generator, dtype=torch.uint8).to(device)
    tried = random, torch.full_like(random, largest_input)
    for dtype, most in types.items():
        if largest <= most and all(is_exact(operate, spikes, dtype) for spikes in tried):
            return dtype
    return torch.float64


def is_exact(operate, spikes, dtype):
    """Whether an operator returns the same values in `dtype` as in float64."""
    spikes = spikes.contiguous(memory_format=order(spikes))
    return torch.equal(operate(spikes.to(dtype)).double(), operate(spikes.double()))
