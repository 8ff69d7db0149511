"""How each type of layer becomes statements of a C program.

`write_layer(program, entry, inputs)` writes one op and its neurons and returns the Value that it sends. Layers read
spikes (u8), currents (cur), or real values (f32): these in the layers before the first spikes and behind the last ones.
"""

import numpy as np
import torch

from export.c_program import canonical_order
from layers.base import as_pair
from spike_layers import OP_TYPES

LARGEST_FLOAT = "3.402823466e+38f"
LARGEST_INTEGER = 2**31 - 1


def write_layer(program, entry, inputs):
    """Write an op and its neurons; returns the Value that it sends. Raises ValueError for what C code cannot hold."""
    op, name = entry.op, type(entry.op).__name__
    if name not in WRITERS:
        raise ValueError(f"{entry.where}: {name} cannot be written as C, leave it to the program around the C code")
    if op.levels is not None and not op.spiking:
        raise ValueError(
            f"{entry.where} rounds its activations to levels, which C code cannot: take it out of --ann_layers"
        )
    if len({x.kind == "f32" for x in inputs}) > 1:
        raise ValueError(
            f"{entry.where} adds the image's real-valued current to spikes, which C code in integers cannot: put a "
            "ReLU behind the layer that reads the image"
        )
    inputs = program.aligned(inputs)
    size = " -> ".join(f"{list(shape)}" for shape in (inputs[0].shape, program.shapes[entry.out]))
    program.say(f"{entry.where}: {name} {size}{weights_in_words(op)}")
    y = WRITERS[name](program, entry, inputs)
    return y if op.neuron is None else write_neurons(program, entry, y)


def weights_in_words(op):
    """How many weights a layer has, for a comment."""
    if not op.is_trained:
        return ""
    bits = f" of {op.weight_bits} bits" if op.spiking and op.weight_bits else ""
    return f", {op.weight.numel()} weights{bits}"


def write_neurons(program, entry, current):
    """Integrate-and-fire neurons: membrane potentials, Vthr, and the spikes that they send."""
    neuron, T = entry.op.neuron, program.timesteps
    check_potentials(entry, T)
    listen, name = min(neuron.listen, T), entry.name
    kind = "f32" if current.kind == "f32" else "i32"  # potentials are wider than the currents of a step
    if kind == "f32":
        program.firsts[name] = current
    Vthr, period = program.per_element(f"{name}_Vthr", neuron.Vthr, current, kind)
    first, every = program.per_element(f"{name}_start", neuron.initial_potential, current, kind)
    u = program.buffer(f"{name}_u", kind, current.size)
    before, program.part = program.part, "reset"
    program.call(f"fill_{kind}", u, current.size, first, every)
    program.part = "step"
    start = current.start + listen
    spikes = program.value(f"{name}_spikes", "u8", current.shape, current.order, start)
    window, end = neuron.most_spikes(T), current.start + T
    timed = program.listens or window < T
    hears = f"t < {end}" if timed else 1
    may_fire = f"t >= {start} && t < {start + window}" if timed else 1
    function = f"fire_{neuron.reset_mode}_{current.kind}"
    program.call(function, current, current.size, Vthr, period, hears, may_fire, u, spikes, start=current.start)
    program.zero(spikes.name)
    program.end, program.part = max(program.end, start + T), before
    return spikes


def check_potentials(entry, timesteps):
    """Raise ValueError if a membrane potential of integers may leave 32 bits."""
    neuron = entry.op.neuron
    if neuron.largest_current is None:
        return
    largest = (
        neuron.largest_current * timesteps + neuron.Vthr.max().item() + neuron.initial_potential.abs().max().item()
    )
    if largest > LARGEST_INTEGER:
        raise ValueError(
            f"{entry.where}: its potentials may reach {largest:.3g}, more than 32 bits hold: take fewer steps"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Layers with weights


def start_sum(program, entry, x, bias, order=None):
    """The Value of a sum of products, with its bias, [C_out] or None, in it."""
    shape = program.shapes[entry.out]
    kind = "f32" if x.kind == "f32" else "cur"
    y = program.value(f"{entry.name}_{'value' if kind == 'f32' else 'current'}", kind, shape, order, x.start)
    bias = torch.zeros(1) if bias is None else bias
    bias = bias.view(-1, *[1] * (len(shape) - 1))
    array, period = program.per_element(f"{entry.name}_bias", bias, y)
    program.call(f"fill_{kind}", y, y.size, array, period, start=x.start)
    return y


def integers_of(entry, x):
    """`weight, bias`: integers for spikes, floats for real values. Raises ValueError for spikes on float weights."""
    op = entry.op
    if x.kind == "f32":
        return op.weight.detach(), op.bias
    if op.weight_q.is_floating_point():
        raise ValueError(f"{entry.where} has float weights, convert it with 1 to 8 bits (--weight_bitwidth)")
    if x.kind != "u8":
        raise ValueError(f"{entry.where} reads currents, which C code cannot: put a ReLU before it")
    return op.weight_q, op.bias_q


def in_unit(program, entry, y):
    """The current of real values, in the unit of the neurons behind."""
    if y.kind == "f32" and entry.op.spiking:
        unit, period = program.per_element(f"{entry.name}_unit", entry.op.unit, y)
        program.call("divide_f32", y, y.size, unit, period)
    return y


def write_convolution(program, entry, inputs):
    op, (x,) = entry.op, inputs
    x, (weight, bias) = program.settled(x), integers_of(entry, x)
    y, groups = start_sum(program, entry, x, bias), op.groups
    is_transposed = type(op).__name__ == "SpikeConvTranspose2d"
    weight = weight.permute(0, 2, 3, 1) if is_transposed else inputs_first(weight, groups)
    sizes = {"kernel": op.kernel_size, "stride": op.stride, "dilation": op.dilation, "groups": groups}
    window = f"&{program.window(entry.name, x, y.shape, pad=padding_of(op), **sizes)}"
    if x.kind == "f32":
        if is_transposed:
            raise ValueError(
                f"{entry.where}: a transposed convolution of real values cannot be written as C, take a convolution"
            )
        array = program.constant(f"{entry.name}_weights", weight.numpy(), "f32")
        program.call("convolve_f32", x, window, array, y)
        return in_unit(program, entry, y)
    program.row = max(program.row, int(np.prod(op.kernel_size)) * weight.shape[-1])
    packed, _ = program.packed(entry.name, weight if is_transposed else weight.flip(-2))
    function = "convolve_transposed" if is_transposed else "convolve"
    if not is_transposed:
        program.places = max(program.places, x.shape[1] * x.shape[2])
    program.call(function, x, window, f"&{packed}", y, start=x.start)
    return y


def inputs_first(weight, groups):
    """The weights of a convolution, [C_out, C_group, kh, kw], as [groups, C_group, kh, kw, C_out / groups]."""
    return weight.unflatten(0, (groups, -1)).permute(0, 2, 3, 4, 1)


def padding_of(op):
    """(top, left) zeros of a convolution."""
    if op.padding == "valid":
        return 0, 0
    if op.padding == "same":  # with an even kernel the larger part is on the other side
        return tuple(step * (size - 1) // 2 for step, size in zip(op.dilation, op.kernel_size))
    return as_pair(op.padding)


def write_linear(program, entry, inputs):
    (x,) = inputs
    weight, bias = integers_of(entry, x)
    codes = quantized(entry.op) if x.kind == "f32" and not entry.op.spiking else None
    if codes is not None:
        return write_quantized_linear(program, entry, x, codes)
    y = start_sum(program, entry, x, bias)
    weight = weight[:, x.order].T  # [inputs as they lie in memory, outputs]
    if x.kind == "f32":
        array = program.constant(f"{entry.name}_weights", weight.numpy(), "f32")
        program.call("connect_f32", x, x.size, y.size, array, y)
        return in_unit(program, entry, y)
    program.row = max(program.row, y.size)
    packed, _ = program.packed(entry.name, weight)
    program.call("connect", x, x.size, y.size, f"&{packed}", y, start=x.start)
    return y


def quantized(op):
    """The integers of a quantized layer that stays ANN, W_q = W s_w, or None if its weights are no such multiples."""
    if op.weight_scale is None:
        return None
    codes = (op.weight.detach() * op.weight_scale).round()
    is_exact = torch.allclose(codes / op.weight_scale, op.weight, rtol=1e-6, atol=0)
    return codes.to(torch.int8) if is_exact and codes.abs().max() <= 127 else None


def write_quantized_linear(program, entry, x, codes):
    """The last layer: real values times integer weights, divided by s_w, and its bias."""
    op, name = entry.op, entry.name
    y = start_sum(program, entry, x, None)
    packed, _ = program.packed(name, codes[:, x.order].T)
    program.row = max(program.row, y.size)
    program.call("connect_packed_f32", x, x.size, y.size, f"&{packed}", y)
    scale, period = program.per_element(f"{name}_scale", op.per_output(op.weight_scale), y)
    program.call("divide_f32", y, y.size, scale, period)
    if op.bias is not None:
        bias, one = program.constant(f"{name}_bias", op.bias.detach().numpy(), "f32"), program.constant("", [1], "f32")
        program.call("add_f32_f32", bias, y.size, one, 1, y)
    return y


def write_average(program, entry, inputs):
    op, x = entry.op, program.settled(inputs[0])
    shape = program.shapes[entry.out]
    window = program.window(entry.name, x, shape, kernel=op.kernel_size, stride=op.stride, pad=as_pair(op.padding))
    kind = "cur" if x.kind == "u8" and not op.folded else x.kind
    y = program.value(f"{entry.name}_sums", kind, shape, start=x.start)
    program.call(f"sum_windows_{x.kind}_{kind}", x, f"&{window}", y, start=x.start)
    if x.kind != "f32" or op.spiking:  # the integer weights are ones
        return y
    share = torch.full((1,) * len(shape), 1 / op.shared_by)
    return weighed(program, entry, [y], [share], torch.zeros(1))


def write_maximum(program, entry, inputs):
    op, x = entry.op, program.settled(inputs[0])
    shape, pairs = program.shapes[entry.out], int(op.pairs)
    sizes = {"kernel": op.kernel_size, "stride": op.stride, "pad": op.padding, "dilation": op.dilation}
    window = f"&{program.window(entry.name, x, shape, **{name: as_pair(size) for name, size in sizes.items()})}"
    y = program.value(f"{entry.name}_passed", x.kind, shape, start=x.start)
    if x.kind == "f32" or op.mode == "or":
        program.call(f"largest_{x.kind}", x, window, pairs, y, start=x.start)
        return y
    state = [program.buffer(f"{entry.name}_{name}", "i32", n) for name, n in (("counts", x.size), ("now", y.size))]
    sent = program.buffer(f"{entry.name}_sent", "i32", y.size)
    program.call("gate", x, window, pairs, *state, sent, y, start=x.start)
    program.zero(state[0])
    program.zero(sent)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Sums


def weighed(program, entry, inputs, weights, bias):
    """The sum of weight * x over inputs, and a bias; weights and bias broadcastable to a sample."""
    kind, shape = "f32" if inputs[0].kind == "f32" else "cur", program.shapes[entry.out]
    inputs = [inputs[0], *(program.in_order_of(x, inputs[0]) for x in inputs[1:])]
    if kind == "cur" and not torch.as_tensor(bias).any():
        for x, weight in zip(inputs, weights):
            if x.kind == "cur" and x.read_once and (weight == 1).all():
                rest = [(y, w) for y, w in zip(inputs, weights) if y is not x]
                return add_to(program, entry, x, rest)
    y = program.value(f"{entry.name}_sum", kind, shape, inputs[0].order, inputs[0].start)
    array, period = program.per_element(f"{entry.name}_bias", bias, y)
    program.call(f"fill_{kind}", y, y.size, array, period, start=y.start)
    return add_to(program, entry, y, zip(inputs, weights))


def add_to(program, entry, y, terms):
    """Add weight * x to y, for all terms (x, weight)."""
    for x, weight in terms:
        array, period = program.per_element(f"{entry.name}_weight", weight, y)
        program.call(f"add_{x.kind}_{y.kind}", x, y.size, array, period, y, start=y.start)
    return y


def write_sum(program, entry, inputs):
    op = entry.op
    weights = op.branch_weights if op.spiking else op.signs
    weights = [torch.ones(1) if weight is None else torch.as_tensor(weight) for weight in weights]
    return weighed(program, entry, inputs, weights, torch.zeros(1))


def write_affine(program, entry, inputs):
    op, (x,) = entry.op, inputs
    if op.spiking and getattr(op, "weight_q", None) is None:
        return x  # it only scales what the spikes stand for
    names = ("weight_q", "bias_q") if op.spiking else ("weight", "bias")
    weight, bias = (getattr(op, name, None) for name in names)
    weight = torch.ones(1) if weight is None else weight  # a SpikeBiasMap adds, and has no weight
    return weighed(program, entry, inputs, [shaped(weight, x)], shaped(bias, x))


def shaped(values, x):
    """Numbers per channel, [C], made broadcastable to a sample."""
    return values.view(-1, *[1] * (len(x.shape) - 1)) if values.dim() == 1 and len(values) > 1 else values


def write_relu(program, entry, inputs):
    op, (x,) = entry.op, inputs
    if op.spiking:
        return x
    y = program.value(f"{entry.name}_value", "f32", x.shape, x.order)
    ceiling = LARGEST_FLOAT if op.ceiling is None else f"{float(op.ceiling)!r}f"
    program.call("relu_f32", x, x.size, ceiling, y)
    return y


def write_split(program, entry, inputs):
    op, (x,) = entry.op, inputs
    if not op.spiking:
        raise ValueError(
            f"{entry.where} splits real values by sign, which C code cannot: let it spike, convert without --ann_layers"
        )
    shape = program.shapes[entry.out]
    elements = torch.arange(2 * x.size).view(shape)
    order = torch.stack([elements[0::2].flatten()[x.order], elements[1::2].flatten()[x.order]], 1).flatten()
    slope = torch.ones(1) if op.slope is None else shaped(op.slope, x)
    hears, period = program.per_element(f"{entry.name}_hears", slope != 0, x, "i8")
    y = program.value(f"{entry.name}_current", x.kind, shape, order, x.start)
    program.call(f"split_signs_{x.kind}", x, x.size, hears, period, y, start=x.start)
    return y


def write_merge(program, entry, inputs):
    op, (x,) = entry.op, inputs
    shape, kind = program.shapes[entry.out], "f32" if x.kind == "f32" else "cur"
    first, second = (half.flatten() for half in op.halves(torch.arange(x.size).view(x.shape), 0))  # [n] elements
    places, order = x.places, torch.arange(len(first))
    if (places[first] % 2 == 0).all() and torch.equal(places[second], places[first] + 1):
        order = places[first].argsort()
    else:
        pairs = torch.stack([first, second], 1).flatten()
        x = program.moved(x, places[pairs], x.shape, pairs)
    weight = (op.branch_weight0 if op.spiking else torch.ones(1)).expand(x.shape).flatten()
    signs = shaped(op.signs_of_features(), x).expand(shape).flatten()
    both = torch.stack([weight[first], weight[second] * signs], 1)[order].flatten()
    array, period = program.periodic(f"{entry.name}_weights", both, (1, shape[0]), kind, 2)
    y = program.value(f"{entry.name}_current", kind, shape, order, x.start)
    program.call(f"merge_signs_{x.kind}_{kind}", x, y.size, array, period, y, start=x.start)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Rearrangements


def write_rearrangement(program, entry, inputs):
    """A rearrangement: nothing at all where every value stays, only under another index."""
    (x,), shape = inputs, program.shapes[entry.out]
    numbered = torch.arange(1, x.size + 1, dtype=torch.float64).view(1, *x.shape)
    read = entry.op.rearranged(numbered).flatten().long() - 1  # element of x in every element of the output, -1: zero
    if len(read) == x.size and torch.equal(read.sort().values, torch.arange(x.size)):
        back = torch.empty_like(read)
        back[read] = torch.arange(len(read))
        return type(x)(x.name, x.kind, tuple(shape), back[x.order], x.start, x.read_once)
    table = torch.where(read >= 0, x.places[read.clamp_min(0)], -1)
    return program.moved(x, table[canonical_order(shape)], shape)


def write_concatenation(program, entry, inputs):
    shape, dim = program.shapes[entry.out], entry.op.dim - 1
    kind = inputs[0].kind if len({x.kind for x in inputs}) == 1 else "cur"
    if dim == 0 and len(shape) == 3:
        inputs, order, rows = [program.settled(x) for x in inputs], None, shape[1] * shape[2]
    else:
        starts = np.cumsum([0, *(x.size for x in inputs)])
        numbered = [torch.arange(x.size).view(x.shape) + int(s) for x, s in zip(inputs, starts)]
        read = torch.cat(numbered, dim).flatten()
        back = torch.empty_like(read)
        back[read] = torch.arange(len(read))
        order, rows = back[torch.cat([x.order + int(s) for x, s in zip(inputs, starts)])], 1
    y, done = program.value(f"{entry.name}_joined", kind, shape, order, inputs[0].start), 0
    for x in inputs:
        n = x.size // rows
        program.call(f"join_{x.kind}_{kind}", x, rows, n, f"{y.name} + {done}", y.size // rows, start=x.start)
        done += n
    if y.name in program.currents:
        program.currents[y.name][2] = len(program.parts["step"])
    return y


WRITERS = {
    **dict.fromkeys(("SpikeConv2d", "SpikeConvBN", "SpikeConvTranspose2d"), write_convolution),
    "SpikeLinear": write_linear,
    "SpikeAvgPool2d": write_average,
    "SpikeMaxPool2d": write_maximum,
    **dict.fromkeys(("SpikeAdd", "SpikeSubtract"), write_sum),
    **dict.fromkeys(("SpikeBatchNorm", "SpikeAffine", "SpikeBiasMap", "ImageAffine"), write_affine),
    "SpikeReLU": write_relu,
    "SignedReLU": write_split,
    "MergeSigns": write_merge,
    "ConcatOp": write_concatenation,
    **{name: write_rearrangement for name, layer in OP_TYPES.items() if layer.rearranges},
}
