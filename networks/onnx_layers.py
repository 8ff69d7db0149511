"""Weighted layers, poolings and activations of an ONNX graph as PyTorch modules.

LAYERS: operator -> function of the node that returns its module, or a list of modules that run one behind the other.
A module gets the activations among the node's inputs.
"""

import operator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from networks.onnx_node import as_written


class Call(nn.Module):
    """A torch function with fixed options."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *inputs):
        return self.function(*inputs, **self.options)

    def extra_repr(self):
        return ", ".join([self.function.__name__, *(f"{name}={value}" for name, value in self.options.items())])


def tensor(array):
    """A tensor with its own copy of the values."""
    return torch.from_numpy(np.array(array, order="C"))


def set_weights(layer, weight, bias):
    """Give a layer that was built on the meta device its weight and bias (or None), as parameters."""
    layer.weight = nn.Parameter(tensor(weight))
    layer.bias = None if bias is None else nn.Parameter(tensor(bias))
    return layer


# Padding


class SamePad(nn.Module):
    """The padding of auto_pad SAME_UPPER or SAME_LOWER: the output has ceil(size / stride) positions.

    spans: distance from the first to the last input of a window, plus 1. value: what is padded.
    """

    def __init__(self, spans, strides, is_lower, value=0.0):
        super().__init__()
        self.spans, self.strides, self.is_lower, self.value = spans, strides, is_lower, value

    def forward(self, x):
        begins, ends = [], []
        for size, span, stride in zip(x.shape[2:], self.spans, self.strides):
            total = max((-(-size // stride) - 1) * stride + span - size, 0)
            less, more = total // 2, total - total // 2
            begins.append(more if self.is_lower else less)
            ends.append(less if self.is_lower else more)
        return F.pad(x, torch_pads(begins, ends), value=self.value) if any(begins + ends) else x


class CeilPad(nn.Module):
    """The padding of a pooling with ceil_mode, so that its last windows are whole.

    A window that starts in the padding at the end is left out, as ONNX and PyTorch define it.
    """

    def __init__(self, begins, ends, spans, strides, value):
        super().__init__()
        self.begins, self.ends, self.spans, self.strides, self.value = begins, ends, spans, strides, value

    def forward(self, x):
        ends = []
        for size, begin, end, span, stride in zip(x.shape[2:], self.begins, self.ends, self.spans, self.strides):
            last = -(-(size + begin + end - span) // stride) * stride  # the start of the last window
            last -= stride if last >= size + begin else 0
            ends.append(last + span - size - begin)
        return F.pad(x, torch_pads(self.begins, ends), value=self.value)


def torch_pads(begins, ends):
    """Paddings by dimension in the order of F.pad: the last dimension first."""
    return [pad for pair in zip(reversed(begins), reversed(ends)) for pad in pair]


def padding_of(node, kernel, strides, dilations, value=0.0):
    """`(padding, modules)`: the symmetric padding of a window operator, and a module for any other one before it."""
    rank, mode = len(kernel), node.attribute("auto_pad", "NOTSET")
    spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilations)]
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        if any(stride != 1 for stride in strides):
            return (0,) * rank, [SamePad(spans, strides, mode == "SAME_LOWER", value)]
        less, more = [(span - 1) // 2 for span in spans], [span // 2 for span in spans]
        begins, ends = (less, more) if mode == "SAME_UPPER" else (more, less)
    else:
        pads = (0,) * (2 * rank) if mode == "VALID" else node.sizes("pads", 2 * rank, default=0, least=0)
        begins, ends = list(pads[:rank]), list(pads[rank:])
    is_pooling = node.op in ("MaxPool", "AveragePool")  # PyTorch's poolings take no padding above half of a window
    if begins == ends and not (is_pooling and any(2 * pad > size for pad, size in zip(begins, kernel))):
        return tuple(begins), []
    if node.attribute("ceil_mode", 0):
        return (0,) * rank, [CeilPad(begins, ends, spans, strides, value)]
    return (0,) * rank, [Call(F.pad, pad=torch_pads(begins, ends), value=value)]


# Weighted layers


def window_of(node, kernel):
    """`(strides, dilations)` of a window operator. Raises NotImplementedError unless it has 1 or 2 dimensions."""
    if len(kernel) not in (1, 2):
        node.refuse(f"it has {len(kernel)} dimensions, 1 or 2 are supported")
    if "kernel_shape" in node.attributes and list(node.attribute("kernel_shape")) != list(kernel):
        node.damaged(f"kernel_shape is {node.attribute('kernel_shape')}, its weights are {list(kernel)}")
    return node.sizes("strides", len(kernel)), node.sizes("dilations", len(kernel))


def convolution(node):
    node.check_activations(0)
    weight, bias, groups = node.weight(1), node.constant(2), node.attribute("group", 1)
    kernel = weight.shape[2:]
    strides, dilations = window_of(node, kernel)
    padding, before = padding_of(node, kernel, strides, dilations)
    options = dict(bias=bias is not None, device="meta")
    channels = weight.shape[1] * groups, weight.shape[0]
    layer = (nn.Conv1d, nn.Conv2d)[len(kernel) - 1](*channels, kernel, strides, padding, dilations, groups, **options)
    check_bias(node, bias, weight.shape[0])
    return [*before, set_weights(layer, weight, bias)]


def check_bias(node, bias, channels):
    """Raise ValueError unless a bias is left out or has one value per channel."""
    if bias is not None and bias.shape != (channels,):
        node.damaged(f"its bias has the shape {list(bias.shape)} for {channels} channels")


class ConvTransposeTo(nn.ConvTranspose2d):
    """A transposed convolution whose padding makes its output `size` (height, width)."""

    size, is_lower = (0, 0), True

    def forward(self, x):
        begins, ends = [], []
        for i, size in enumerate(self.size):
            span = (self.kernel_size[i] - 1) * self.dilation[i] + 1
            total = self.stride[i] * (x.shape[2 + i] - 1) + self.output_padding[i] + span - size
            less, more = total // 2, total - total // 2
            begins.append(more if self.is_lower else less)
            ends.append(less if self.is_lower else more)
        return F.pad(super().forward(x), [-pad for pad in torch_pads(begins, ends)])


def transposed_convolution(node):
    node.check_activations(0)
    weight, bias, groups = node.weight(1), node.constant(2), node.attribute("group", 1)
    kernel = weight.shape[2:]
    strides, dilations = window_of(node, kernel)
    padding, more, crop = transposed_padding(node, kernel, strides, dilations)
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d)
    kind, sizes = kinds[len(kernel) - 1], node.attribute("output_shape")
    if sizes:
        if len(kernel) == 1 or len(sizes) != 2:
            node.refuse("output_shape is supported for height and width, write pads instead")
        kind = ConvTransposeTo
    channels = weight.shape[0], weight.shape[1] * groups
    options = dict(bias=bias is not None, device="meta", dilation=dilations)
    layer = kind(*channels, kernel, strides, padding, more, groups, **options)
    check_bias(node, bias, channels[1])
    if sizes:
        layer.size = node.sizes("output_shape", 2)
        layer.is_lower = node.attribute("auto_pad") != "SAME_UPPER"
    return [set_weights(layer, weight, bias), *crop]


def transposed_padding(node, kernel, strides, dilations):
    """`(padding, output padding, modules)` of a transposed convolution; a module behind it crops if they differ."""
    rank, mode = len(kernel), node.attribute("auto_pad", "NOTSET")
    more = node.sizes("output_padding", rank, default=0, least=0)
    if node.attribute("output_shape"):
        return (0,) * rank, more, []
    if mode in ("SAME_UPPER", "SAME_LOWER"):  # the output has size * stride positions
        totals = [
            (size - 1) * step + 1 + extra - stride
            for size, step, extra, stride in zip(kernel, dilations, more, strides)
        ]
        less, most = [total // 2 for total in totals], [total - total // 2 for total in totals]
        begins, ends = (less, most) if mode == "SAME_UPPER" else (most, less)
    else:
        pads = (0,) * (2 * rank) if mode == "VALID" else node.sizes("pads", 2 * rank, default=0, least=0)
        begins, ends = list(pads[:rank]), list(pads[rank:])
    moved = [extra + begin - end for extra, begin, end in zip(more, begins, ends)]
    fits = all(0 <= extra < max(pair) for extra, *pair in zip(moved, strides, dilations))
    if fits and min(begins) >= 0:  # a padding that is smaller at the end is an output padding
        return tuple(begins), tuple(moved), []
    return (0,) * rank, more, [Call(F.pad, pad=[-pad for pad in torch_pads(begins, ends)])]


def linear(weight, bias):
    """A linear layer. weight: [N, K]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return set_weights(layer, weight, bias)


def gemm(node):
    node.check_activations(0)
    if node.attribute("transA", 0):
        node.refuse("transA mixes the images of a batch")
    weight, bias = node.weight(1), node.constant(2)
    if weight.ndim != 2:
        node.damaged(f"its weight has the shape {list(weight.shape)}")
    weight = weight if node.attribute("transB", 0) else weight.T
    if node.attribute("alpha", 1.0) != 1:
        weight = weight * np.float32(node.attribute("alpha"))
    if bias is not None:
        if bias.size != 1 and bias.size != len(weight) * (bias.shape[-1] == len(weight)):
            node.refuse(f"its bias has the shape {list(bias.shape)}, one value per output is supported")
        bias = np.broadcast_to(bias.ravel() * np.float32(node.attribute("beta", 1.0)), len(weight))
    return linear(weight, bias)


def matmul(node):
    if node.is_constant(0) or not node.is_constant(1):
        node.refuse(
            "the product of an activation with a constant behind it is supported: spikes compute no product "
            "of two activations"
        )
    weight = node.weight(1)
    if weight.ndim != 2:
        node.refuse(f"its weight has the shape {list(weight.shape)}, [inputs, outputs] is supported")
    return linear(weight.T, None)


class AnyBatchNorm(nn.BatchNorm2d):
    """BatchNorm over inputs [B, C, ...] of any number of dimensions."""

    def _check_input_dim(self, input):
        pass


def batch_norm(node):
    node.check_activations(0)
    if node.attribute("training_mode", 0):
        node.refuse("it is in training mode, export the network in eval mode (training=TrainingMode.EVAL)")
    if not node.attribute("spatial", 1):
        node.refuse("it has statistics for each pixel (spatial=0), use statistics per channel")
    weight, bias, mean, variance = (node.weight(i) for i in range(1, 5))
    if not weight.shape == bias.shape == mean.shape == variance.shape == (weight.size,):
        node.damaged("its weights and statistics differ in size")
    layer = AnyBatchNorm(weight.size, eps=node.attribute("epsilon", 1e-5), device="meta")
    layer.running_mean, layer.running_var = tensor(mean), tensor(variance)
    layer.num_batches_tracked = torch.tensor(0)
    return set_weights(layer, weight, bias)


# Activations


def clip(node):
    node.check_activations(0)
    bounds = []
    for i, name in enumerate(("min", "max"), start=1):
        bound = node.attribute(name) if name in node.attributes else node.constant(i)
        bound = None if bound is None else as_written(np.ravel(bound)[0])
        # exporters write the largest float for "no bound"
        bounds.append(None if bound is not None and abs(bound) >= np.finfo(np.float32).max else bound)
    if bounds == [0, None]:
        return nn.ReLU()
    if bounds == [0, 6]:
        return nn.ReLU6()
    if bounds[0] == 0 and bounds[1] > 0:
        return nn.Hardtanh(0.0, bounds[1])
    return nn.Identity() if bounds == [None, None] else Call(torch.clamp, min=bounds[0], max=bounds[1])


class PReLU(nn.PReLU):
    """As nn.PReLU, for inputs of a known number of dimensions. rank: that number, or None for any."""

    rank = None

    def forward(self, x):
        if self.rank not in (None, x.dim()):
            raise ValueError(f"a PRelu has slopes for an input of {self.rank} dimensions and gets {x.dim()}")
        return super().forward(x)


def prelu(node):
    node.check_activations(0)
    slope = node.weight(1)
    if slope.size != max(slope.shape, default=1):
        node.refuse(f"its slopes have the shape {list(slope.shape)}, one per channel is supported")
    layer = PReLU(slope.size, device="meta")
    layer.weight = nn.Parameter(tensor(slope.ravel()))
    # the channels of [B, C, H, W] stand in front of as many dimensions as in the slopes
    layer.rank = None if slope.size == 1 else slope.ndim - slope.shape.index(slope.size) + 1
    return layer


def activation(make):
    """A builder of a module without weights. make: function of the node."""

    def build(node):
        node.check_activations(0)
        return make(node)

    return build


def softmax(kind):
    """A builder of nn.Softmax or nn.LogSoftmax. Before opset 13 all axes from `axis` on are one."""

    def build(node):
        node.check_activations(0)
        if node.opset >= 13:
            return kind(node.attribute("axis", -1))
        return LastAxis(kind(-1), node.attribute("axis", 1), node.label)

    return build


class LastAxis(nn.Module):
    """A softmax that is only right if `axis` is the last one. label: the node in messages."""

    def __init__(self, softmax, axis, label):
        super().__init__()
        self.softmax, self.axis, self.label = softmax, axis, label

    def forward(self, x):
        if self.axis % x.dim() != x.dim() - 1:
            raise NotImplementedError(
                f"{self.label} cannot be imported: only a softmax over the last axis is supported"
            )
        return self.softmax(x)


# Poolings


def max_pool(node):
    node.check_activations(0)
    kernel = node.sizes("kernel_shape", len(node.attribute("kernel_shape", ())))
    strides, dilations = window_of(node, kernel)
    # zeros never win against values that are not negative, and a zero padding can be converted
    padding, before = padding_of(node, kernel, strides, dilations, 0.0 if node.is_nonnegative else float("-inf"))
    kind = (nn.MaxPool1d, nn.MaxPool2d)[len(kernel) - 1]
    ceil = bool(node.attribute("ceil_mode", 0)) and not before
    return [*before, kind(kernel, strides, padding, dilations, ceil_mode=ceil)]


class PartialMean(nn.Module):
    """An average pooling whose windows at a padded border average only the values inside of the image."""

    def __init__(self, pad, pool):
        super().__init__()
        self.pad, self.pool = pad, pool

    def forward(self, x):
        share = self.pool(self.pad(torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)))
        return self.pool(self.pad(x)) / share


def average_pool(node):
    node.check_activations(0)
    kernel = node.sizes("kernel_shape", len(node.attribute("kernel_shape", ())))
    strides, dilations = window_of(node, kernel)
    if any(step != 1 for step in dilations):
        node.refuse("dilations are not supported")
    padding, before = padding_of(node, kernel, strides, dilations)
    counts_padding, ceil = (bool(node.attribute(name, 0)) for name in ("count_include_pad", "ceil_mode"))
    if before and ceil and counts_padding:
        node.refuse("ceil_mode is not supported with count_include_pad and pads that differ by side")
    kind = (nn.AvgPool1d, nn.AvgPool2d)[len(kernel) - 1]
    pool = kind(kernel, strides, padding, ceil and not before, counts_padding or not any(padding))
    if before and not counts_padding:
        return PartialMean(before[0], pool)
    return [*before, pool]


class GlobalPool(nn.Module):
    """The mean or maximum over height and width (or length), [B, C, H, W] -> [B, C, 1, 1]."""

    def __init__(self, is_max):
        super().__init__()
        self.is_max = is_max

    def forward(self, x):
        if x.dim() == 4:
            return F.max_pool2d(x, tuple(x.shape[2:])) if self.is_max else F.adaptive_avg_pool2d(x, 1)
        dims = list(range(2, x.dim()))
        return x.amax(dims, keepdim=True) if self.is_max else x.mean(dims, keepdim=True)


def mean(node):
    node.check_activations(0)
    axes = node.numbers("axes", 1)
    if not axes and node.attribute("noop_with_empty_axes", 0):
        return nn.Identity()
    if not axes or 0 in axes:
        node.refuse("it averages over the images of a batch, use the axes of height and width")
    return Call(torch.mean, dim=list(axes), keepdim=bool(node.attribute("keepdims", 1)))


# Arithmetic


class WithConstant(nn.Module):
    """`function(x, constant)`, or `function(constant, x)` if the constant is first."""

    def __init__(self, function, constant, is_first):
        super().__init__()
        self.function, self.is_first = function, is_first
        self.value = as_written(constant.item()) if constant.size == 1 else None
        self.register_buffer("constant", tensor(constant) if constant.size > 1 else None)

    def forward(self, x):
        constant = self.value if self.constant is None else self.constant
        return self.function(constant, x) if self.is_first else self.function(x, constant)


def arithmetic(function, takes_two=False):
    """A builder of a sum, difference, product or quotient. takes_two: also of two activations."""

    def build(node):
        for i in (0, 1):
            if node.is_constant(i):
                node.check_activations(1 - i)
                return WithConstant(function, node.weight(i), i == 0)
        if not takes_two:
            node.refuse("spikes compute no product or quotient of two activations")
        return Call(function)

    return build


def joined(node):
    """A builder of a concatenation."""
    node.check_activations(*range(len(node.inputs)))
    return Concat(node.attribute("axis"))


class Concat(nn.Module):
    """Concatenation along `dim`."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, *inputs):
        return torch.cat(inputs, self.dim)


LAYERS = {
    **{"Conv": convolution, "ConvTranspose": transposed_convolution, "Gemm": gemm, "MatMul": matmul},
    **{"BatchNormalization": batch_norm, "Clip": clip, "PRelu": prelu},
    "Relu": activation(lambda node: nn.ReLU()),
    "LeakyRelu": activation(lambda node: nn.LeakyReLU(node.attribute("alpha", 0.01))),
    "Sigmoid": activation(lambda node: nn.Sigmoid()),
    **{"Floor": activation(lambda node: Call(torch.floor)), "Round": activation(lambda node: Call(torch.round))},
    **{"Softmax": softmax(nn.Softmax), "LogSoftmax": softmax(nn.LogSoftmax)},
    **{"MaxPool": max_pool, "AveragePool": average_pool, "ReduceMean": mean},
    "GlobalAveragePool": activation(lambda node: GlobalPool(False)),
    "GlobalMaxPool": activation(lambda node: GlobalPool(True)),
    **{"Add": arithmetic(operator.add, True), "Sub": arithmetic(operator.sub, True)},
    **{"Mul": arithmetic(operator.mul, takes_two=True), "Div": arithmetic(operator.truediv), "Concat": joined},
}
