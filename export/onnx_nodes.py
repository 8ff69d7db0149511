"""The nodes of every layer: what it computes of activations, of the image's current, or of spikes and currents.

`emit` writes the nodes of one op. Neurons, max pooling of spikes and time are in `export.onnx_time`. Sums of spikes are
float32, in which they are exact. Linear layers are Gemm with transB=1: onnxruntime computes DequantizeLinear + MatMul
with 8-bit activations.
"""

import numpy as np
import torch

from layers.base import as_pair

FUNCTIONS = {  # FunctionOp -> operator of ONNX, without settings
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "erf": "Erf",
    "softplus": "Softplus",
    "softsign": "Softsign",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
    "sign": "Sign",
    "sin": "Sin",
    "cos": "Cos",
}
LEAST = float(np.finfo(np.float32).min)  # pads windows of a maximum
LAST = 2**63 - 1  # the end of a slice that runs to the end


def emit(builder, entry, values):
    """Write the nodes of one op on `values` and return the name of its output, for a spiking op its current.

    Raises ValueError, with the op's name, for an op that has no nodes here.
    """
    recipe = RECIPES.get(type(entry.op).__name__)
    if recipe is None:
        raise ValueError(f"{entry.where}: ONNX files cannot hold a {type(entry.op).__name__}")
    try:
        return recipe(builder, entry.op, *values)
    except ValueError as error:
        raise ValueError(f"{entry.where}: {error}") from error


def of_channels(values, dim):
    """Values per channel, [C], broadcastable to [B, C, ...] with samples of `dim` dimensions; a scalar unchanged."""
    return values.reshape(-1, *[1] * (dim - 1)) if values.dim() else values


# ---------------------------------------------------------------------------------------------------------------------
# Layers with weights


def weighted(weigh):
    """The recipe of a layer with weights. weigh(builder, op, x, weight, bias): its nodes, for names of values."""

    def recipe(b, op, x):
        if op.spiking and not x.constant:
            bias = None if op.bias_q is None else b.constant(op.bias_q.flatten().double() * b.steps)
            return weigh(b, op, x.name, b.whole(op.weight_q), bias)
        bias = None if op.bias is None else b.constant(op.bias)
        y = weigh(b, op, x.name, float_weight(b, op), bias)
        return b.node("Div", y, b.constant(op.unit)) if op.spiking else y

    return recipe


def float_weight(b, op):
    """The float weight of a layer: W_q / s_w if these integers give its very bits, else float32 values."""
    if op.weight_scale is None:
        return b.constant(op.weight)
    integers = (op.weight.detach() * op.weight_scale).round()
    if integers.abs().max() > 127 or not torch.equal(integers / op.weight_scale, op.weight.detach()):
        return b.constant(op.weight)
    return b.node("Div", b.whole(integers.to(torch.int8)), b.constant(op.weight_scale))


def windows(op):
    """Attributes of the windows of a layer, pads apart."""
    names = {"kernel_shape": "kernel_size", "strides": "stride", "dilations": "dilation"}
    return {name: list(as_pair(getattr(op, own))) for name, own in names.items()}


def pads_of(op):
    """Zeros around the input: top, left, bottom, right."""
    if op.padding == "valid":
        return [0, 0, 0, 0]
    if op.padding == "same":  # the larger half comes last, as in PyTorch
        totals = [step * (size - 1) for size, step in zip(op.kernel_size, op.dilation)]
        return [total // 2 for total in totals] + [total - total // 2 for total in totals]
    return [*op.padding, *op.padding]


def convolve(b, op, x, weight, bias):
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return b.node("Conv", *inputs, pads=pads_of(op), group=op.groups, **windows(op))


def convolve_transposed(b, op, x, weight, bias):
    inputs = [x, weight] if bias is None else [x, weight, bias]
    added = list(op.output_padding)
    return b.node("ConvTranspose", *inputs, pads=pads_of(op), group=op.groups, output_padding=added, **windows(op))


def multiply(b, op, x, weight, bias):
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return b.node("Gemm", *inputs, transB=1)


def pool_averages(b, op, x):
    """The sum of each window as a grouped convolution; its mean in a part that stays ANN."""
    sums = convolve(b, op, x.name, b.ones(op.weight.shape), None)
    return sums if op.spiking else b.node("Mul", sums, b.constant(1 / op.shared_by))


# ---------------------------------------------------------------------------------------------------------------------
# Maxima


def pool_maxima(b, op, x):
    """The largest value of every window; of pairs, the smallest of every second channel."""
    if not op.pairs:
        return in_windows(b, op, x.name, x.shape)
    signs = b.constant(np.tile([1.0, -1.0], x.shape[0] // 2).reshape(-1, 1, 1))
    largest = in_windows(b, op, b.node("Mul", x.name, signs), x.shape)
    return b.node("Mul", largest, signs)


def in_windows(b, op, x, shape):
    """The largest value of every window of a map.

    The pads give PyTorch's number of windows, with ceil_mode too, so that no runtime has to round.
    """
    before, after = zip(*(sides_of(*each) for each in window_sides(op, shape)))
    pads = [*before, *after]
    if any(pad >= size for pad, size in zip(pads, as_pair(op.kernel_size) * 2)):  # refused by runtimes
        x = padded(b, x, [(0, 0), *zip(before, after)], LEAST)
        pads = [0, 0, 0, 0]
    return b.node("MaxPool", x, pads=pads, **windows(op))


def window_sides(op, shape):
    """(extent, kernel, stride, padding, dilation, ceil_mode) of height and width."""
    sizes = (as_pair(getattr(op, name)) for name in ("kernel_size", "stride", "padding", "dilation"))
    return zip(shape[-2:], *sizes, (op.ceil_mode, op.ceil_mode))


def sides_of(extent, kernel, stride, padding, dilation, ceil_mode):
    """Pads before and behind one side of a map, so that whole windows are those of PyTorch's pooling."""
    if not ceil_mode:
        return padding, padding
    reach = dilation * (kernel - 1) + 1
    count = -(-(extent + 2 * padding - reach) // stride) + 1
    count -= (count - 1) * stride >= extent + padding  # a window starts inside of the map or its left padding
    return padding, max((count - 1) * stride + reach - extent - padding, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Values one by one


def rectify(b, op, x):
    """ReLU and its ceiling; a current passes to the neurons, and spikes pass."""
    if op.spiking:
        return x.name
    y = b.node("Relu", x.name)
    return y if op.ceiling is None else b.node("Min", y, b.constant(float(op.ceiling)))


def scale(b, op, x):
    """weight * x + bias for each channel or element, in integers where it has them. Spikes pass a mere factor."""
    if not op.spiking:
        dim = len(x.shape)
        return affine(b, x.name, of_channels(op.weight, dim), of_channels(op.bias, dim))
    if not hasattr(op, "weight_q"):
        return x.name
    return affine(b, x.name, op.weight_q, op.bias_q)


def shift(b, op, x):
    """x + bias for each element, in integers if it spikes."""
    if op.spiking:
        return affine(b, x.name, op.weight_q, op.bias_q)
    return b.node("Add", x.name, b.constant(op.bias))


def scale_elements(b, op, x):
    return affine(b, x.name, op.weight, op.bias)


def affine(b, x, weight, bias):
    y = x if bool((weight == 1).all()) else b.node("Mul", x, b.constant(weight))
    return y if bool((bias == 0).all()) else b.node("Add", y, b.bias(bias.detach()))


def add(b, op, x, y):
    """The sum of two inputs, each times its branch weight."""
    if not op.spiking:
        return b.node("Sub" if op.signs[1] < 0 else "Add", x.name, y.name)
    terms = []
    for value, weight in zip((x, y), op.branch_weights):
        terms.append(value.name if weight is None else b.node("Mul", value.name, b.constant(weight)))
    return b.node("Add", *terms)


def leak(b, op, x):
    slope = b.constant(of_channels(op.slope, len(x.shape)))
    is_positive = b.node("Greater", x.name, b.constant(0.0))
    return b.node("Where", is_positive, x.name, b.node("Mul", x.name, slope))


def softmax(b, op, x):
    return b.node("LogSoftmax" if op.log else "Softmax", x.name, axis=op.dim)


def function(b, op, x):
    if op.name not in FUNCTIONS or op.args or any(value is not None for value in op.settings.values()):
        raise ValueError(f"its function {op.name} has no operator in ONNX files here, apply it outside of the network")
    return b.node(FUNCTIONS[op.name], x.name)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of signs


def split_signs(b, op, x):
    """x and -x, or the ReLUs of both, in alternate channels."""
    channels, dim = x.shape[0], len(x.shape)
    slope = torch.ones(channels) if op.slope is None else op.slope
    factor = -((slope != 0).float() if op.spiking else slope.abs())
    second = b.node("Mul", x.name, b.constant(of_channels(factor, dim)))
    alone = [channels, 1, *x.shape[1:]]
    both = b.node("Concat", b.reshape(x.name, *alone), b.reshape(second, *alone), axis=2)
    both = b.reshape(both, 2 * channels, *x.shape[1:])
    return both if op.spiking else b.node("Relu", both)


def merge_signs(b, op, x):
    """first + sign * second of every pair of channels, or of blocks of features."""
    weighed = b.node("Mul", x.name, b.constant(op.branch_weight0)) if op.spiking else x.name
    features, rest = x.shape[0] // 2, x.shape[1:]
    pairs = b.reshape(weighed, features // op.block, 2, op.block, *rest)
    first, second = (
        b.reshape(b.node("Gather", pairs, b.constant(half, np.int64), axis=2), features, *rest) for half in (0, 1)
    )
    signs = of_channels(op.signs_of_features(), len(x.shape))
    return b.node("Add", first, b.node("Mul", second, b.constant(signs)))


# ---------------------------------------------------------------------------------------------------------------------
# Values in other places


def concatenate(b, op, *values):
    return b.node("Concat", *(value.name for value in values), axis=op.dim)


def padded(b, x, sides, value):
    """`x` with `value` around it. sides: (before, behind) of each dimension of a sample; negative ones crop."""
    crops = [(axis, -before, behind) for axis, (before, behind) in enumerate(sides, 1) if min(before, behind) < 0]
    if crops:
        axes, starts, ends = zip(*((axis, max(start, 0), end if end < 0 else LAST) for axis, start, end in crops))
        x = b.node("Slice", x, b.indices(*starts), b.indices(*ends), b.indices(*axes))
    before, behind = zip(*((max(first, 0), max(last, 0)) for first, last in sides))
    if not any((*before, *behind)):
        return x
    return b.node("Pad", x, b.indices(0, *before, 0, *behind), b.constant(value))


def pad(b, op, x):
    sides = [(0, 0)] * (len(x.shape) - len(op.pads) // 2)
    return padded(b, x.name, [*sides, *reversed([*zip(op.pads[::2], op.pads[1::2])])], 0.0)


def view(b, op, x):
    return x.name if x.shape == op.shape else b.reshape(x.name, *op.shape)


def cut(b, op, x):
    axes, starts, ends, steps = [], [], [], []
    for axis, (start, stop, step, _) in enumerate(op.slices, 1):
        if (start, stop, step) == (None, None, 1):
            continue
        if step < 0:  # reversed as a whole
            start, stop = -1, -LAST
        axes, steps = [*axes, axis], [*steps, step]
        starts, ends = [*starts, start or 0], [*ends, LAST if stop is None else stop]
    if not axes:
        return x.name
    return b.node("Slice", x.name, *(b.indices(*each) for each in (starts, ends, axes, steps)))


def choose(b, op, x):
    return b.node("Gather", x.name, b.indices(*op.index), axis=op.dim)


def permute(b, op, x):
    y = x.name if op.split is None else b.reshape(x.name, *op.sizes(x.shape))
    y, sizes = b.node("Transpose", y, perm=[0, *op.dims]), op.sizes(x.shape)
    if op.merge is None:
        return y
    merged = [int(np.prod([sizes[op.dims[dim - 1] - 1] for dim in group])) for group in op.groups()]
    return b.reshape(y, *merged)


def repeat(b, op, x):
    places = [np.repeat(np.arange(extent), factor) for extent, factor in zip(x.shape[-2:], op.factors)]
    return choose_pixels(b, x, *places)


def gather(b, op, x):
    return choose_pixels(b, x, op.rows, op.columns)


def choose_pixels(b, x, rows, columns):
    """The values of chosen rows and columns."""
    y = x.name
    for axis, places in ((2, rows), (3, columns)):
        if [*places] != [*range(x.shape[axis - 1])]:
            y = b.node("Gather", y, b.indices(*places), axis=axis)
    return y


RECIPES = {
    "SpikeConv2d": weighted(convolve),
    "SpikeConvBN": weighted(convolve),
    "SpikeConvTranspose2d": weighted(convolve_transposed),
    "SpikeLinear": weighted(multiply),
    "SpikeAvgPool2d": pool_averages,
    "SpikeMaxPool2d": pool_maxima,
    "SpikeReLU": rectify,
    "SpikeBatchNorm": scale,
    "SpikeAffine": scale,
    "SpikeBiasMap": shift,
    "ImageAffine": scale_elements,
    "SpikeAdd": add,
    "SpikeSubtract": add,
    "LeakyReLUOp": leak,
    "SoftmaxOp": softmax,
    "FunctionOp": function,
    "SignedReLU": split_signs,
    "MergeSigns": merge_signs,
    "ConcatOp": concatenate,
    "SpikePad": pad,
    "ViewOp": view,
    "SliceOp": cut,
    "IndexOp": choose,
    "PermuteOp": permute,
    "SpikeRepeat": repeat,
    "SpikeGather": gather,
}
