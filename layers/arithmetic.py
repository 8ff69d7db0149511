"""Recorders of arithmetic: sums, differences, products with constants, bounds, products with a constant matrix.

A constant is a number or a tensor that is not computed from the network's input. Arithmetic with constants becomes a
factor and a constant per channel (`SpikeAffine`), which the graph folds into the layers around it. A clamp becomes a
ReLU between two of them: clamp(x, a, b) = clamp(x - a, 0, b - a) + a.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import resolve_name

from layers.activations import SpikeReLU
from layers.affine import ImageAffine, SpikeAffine, SpikeBiasMap
from layers.base import frozen_names
from layers.gates import GateOp, is_gate
from layers.joining import SpikeAdd
from layers.weighted import SpikeConv2d, SpikeLinear

# ---------------------------------------------------------------------------------------------------------------------
# Constants


def in_place(function):
    """Whether a torch function changes its first argument: x.add_(1), x += 1."""
    name = resolve_name(function).split(".")[-1]
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")


def of_sample(trace, function, input, constant):
    """A constant as values for every element of one sample of `input`, float64.

    Raises NotImplementedError for values that are not finite, differ between images, or do not fit the sample.
    """
    values = torch.as_tensor(constant, dtype=torch.float64, device=input.device).detach()
    if not torch.isfinite(values).all():
        trace.refuse(function, "the constant is NaN or infinite")
    if values.dim() == input.dim() and len(values) in (1, len(input)):
        if (values != values[:1]).any():
            trace.refuse(function, "the constant has other values for every image of a batch")
        values = values[0]
    sample = input.shape[1:]
    pairs = zip(reversed(values.shape), reversed(sample))
    if not sample or values.dim() > len(sample) or any(a not in (1, b) for a, b in pairs):
        trace.refuse(function, f"a constant of {list(values.shape)} does not fit samples of {list(sample)}")
    return values.expand(sample)


def is_per_channel(values):
    """Whether the values of a sample, [C, ...], are equal within every channel."""
    rows = values.flatten(1) if values.dim() > 1 else values.view(-1, 1)
    return bool((rows == rows[:, :1]).all())


def per_channel(values):
    """One value per channel, [C]."""
    return values.flatten(1)[:, 0] if values.dim() > 1 else values


def is_trained(trace, constant):
    """Whether training changes a constant: a Parameter, or a tensor computed in a module that has Parameters."""
    if not isinstance(constant, torch.Tensor):
        return False
    memory = constant.untyped_storage().data_ptr()
    for parameter in trace.model.parameters():
        if parameter.untyped_storage().data_ptr() == memory:
            return parameter.requires_grad
    if any(buffer.untyped_storage().data_ptr() == memory for buffer in trace.model.buffers()):
        return False
    own = trace.model.get_submodule(trace.paths[-1]).parameters(recurse=False)
    return any(parameter.requires_grad for parameter in own)


# ---------------------------------------------------------------------------------------------------------------------
# weight * x + bias


def record_affine(trace, function, input, output, factor=1.0, shift=0.0, trained=()):
    """Record `output` = factor * input + shift, and return `output`.

    factor, shift: numbers or constants. trained: those of "weight" and "bias" that finetuning may change. Raises
    NotImplementedError for a factor that differs within a channel, except on the image.
    """
    check_type(trace, function, input, output)
    weight, bias = (of_sample(trace, function, input, value) for value in (factor, shift))
    if (weight == 1).all() and (bias == 0).all() and output.dtype == input.dtype:
        return trace.alias(output, input)
    if trace.on_image(input):
        trained = ()
    frozen = frozenset({"weight", "bias"} - set(trained))
    if is_per_channel(weight) and is_per_channel(bias):
        op = SpikeAffine(len(weight))
        op.weight, op.bias = parameter_of(per_channel(weight)), parameter_of(per_channel(bias))
    elif trace.on_image(input):
        op = ImageAffine(weight.shape)
        op.weight, op.bias = parameter_of(weight), parameter_of(bias)
    elif (weight == 1).all():
        op = SpikeBiasMap(bias.shape)
        op.bias, frozen = parameter_of(bias), frozen & {"bias"}
    else:
        trace.refuse(
            function,
            "its factor differs within a channel, a layer has one for each channel: only the image can have more",
        )
    op.frozen = frozen
    record = trace.record_in_place if in_place(function) else trace.record
    return record("bias_map" if isinstance(op, SpikeBiasMap) else "affine", op, [input], output)


def parameter_of(values):
    return nn.Parameter(values.float().contiguous())


def check_type(trace, function, input, output):
    """Refuse arithmetic that changes the type, except of integers, such as those of an image, to floats."""
    if output.dtype != input.dtype and (input.is_floating_point() or not output.is_floating_point()):
        trace.refuse(function, f"the type must stay {input.dtype}")
    if not output.is_floating_point():
        trace.refuse(function, "whole numbers overflow, make floats of the image first, x.float()")
    if output.shape != input.shape:
        trace.refuse(function, f"the shapes {list(input.shape)} and {list(output.shape)} differ")


def step(trace, input, factor=1.0, shift=0.0, trained=()):
    """The traced value of factor * input + shift, as a step of another function."""
    weight, bias = (of_sample(trace, torch.mul, input, value).to(input.dtype) for value in (factor, shift))
    return record_affine(trace, torch.mul, input, input * weight + bias, factor, shift, trained)


def record_sum(trace, function, input, other, *, alpha=1):
    """input + alpha * other."""
    if isinstance(other, (int, float)) and other == 0 and not in_place(function):  # Python's sum(...) starts with 0
        return trace.record_nothing(torch.Tensor.clone, input)
    return combine(trace, function, (input, 1), (other, alpha), (input, other), {"alpha": alpha})


def record_difference(trace, function, input, other, *, alpha=1):
    """input - alpha * other."""
    return combine(trace, function, (input, 1), (other, -alpha), (input, other), {"alpha": alpha})


def record_reverse_difference(trace, function, input, other, alpha=1):
    """other - alpha * input."""
    return combine(trace, function, (input, -alpha), (other, 1), (input, other), {})


def combine(trace, function, first, second, args, kwargs):
    """Record the sum of two values, each with a factor; one may be a constant."""
    (x, factor), (y, other_factor) = first, second
    kwargs = {name: value for name, value in kwargs.items() if value != 1}
    if trace.is_traced(x) and trace.is_traced(y):
        if x.shape != y.shape:
            trace.refuse(function, f"the shapes {list(x.shape)} and {list(y.shape)} differ")
        parts = [value if each == 1 else step(trace, value, each) for value, each in (first, second)]
        record = trace.record_in_place if in_place(function) else trace.record
        return record("add", SpikeAdd(), parts, function(*args, **kwargs))
    if trace.is_traced(y):
        refuse_in_place(trace, function)
        x, y, factor, other_factor = y, x, other_factor, factor
    trained = {"bias"} if is_trained(trace, y) else ()
    shift = other_factor * of_sample(trace, function, x, y)
    return record_affine(trace, function, x, function(*args, **kwargs), factor, shift, trained)


def refuse_in_place(trace, function):
    """Refuse a constant that becomes an activation."""
    if in_place(function):
        trace.refuse(function, "a constant that is changed in place cannot be followed, write it without")


def record_product(trace, function, input, other):
    """input * other, where one of them is a constant, or a gate."""
    if trace.is_traced(input) and trace.is_traced(other):
        return record_gate(trace, function, input, other)
    x, constant = (input, other) if trace.is_traced(input) else (other, input)
    if x is other:
        refuse_in_place(trace, function)
    factor = of_sample(trace, function, x, constant)
    trained = {"weight"} if is_trained(trace, constant) else ()
    return record_affine(trace, function, x, function(input, other), factor, trained=trained)


def record_gate(trace, function, input, other):
    """input * other, where one of them is a gate (`GateOp`), if the trace takes gates."""
    if not trace.takes_gates:
        trace.refuse(function)
    shape = torch.broadcast_shapes(input.shape, other.shape)
    pairs = [(x, gate) for x, gate in ((input, other), (other, input)) if is_gate(gate) and x.shape == shape]
    if len(pairs) == 2:  # maps of one pixel: the gate is computed from x
        pairs = [(x, gate) for x, gate in pairs if trace.is_computed_from(gate, x)]
    if len(pairs) != 1:
        trace.refuse(
            function,
            "only a gate, one factor for each channel of maps, can be replaced by its mean; write x * sigmoid(x) as "
            "F.silu(x)",
        )
    record = trace.record_in_place if in_place(function) else trace.record
    return record("gate", GateOp(), pairs[0], function(input, other))


def record_quotient(trace, function, input, other, *, rounding_mode=None):
    """input / other, where `other` is a constant."""
    if trace.is_traced(other):
        trace.refuse(function)
    if rounding_mode is not None:
        trace.refuse(function, "only rounding_mode=None is supported, spikes round nothing")
    divisor = of_sample(trace, function, input, other)
    if (divisor == 0).any():
        trace.refuse(function, "it divides by 0")
    trained = {"weight"} if is_trained(trace, other) else ()
    return record_affine(trace, function, input, function(input, other), 1 / divisor, trained=trained)


def record_negative(trace, function, input):
    return record_affine(trace, function, input, function(input), -1.0)


def record_cast(trace, function, input, *args, **kwargs):
    """Record nothing if the type stays; an image of whole numbers that becomes float32 is multiplied by 1."""
    output = function(input, *args, **kwargs)
    if not trace.is_traced(input):  # constant.to(x)
        return output
    if output.dtype == torch.float32 and trace.on_image(input) and not input.is_floating_point():
        return record_affine(trace, function, input, output)
    if output.dtype != input.dtype:
        trace.refuse(function, f"the type must stay {input.dtype}")
    return trace.alias(output, input)


def make_constant(trace, function, *args, **kwargs):
    """Record nothing: zeros_like(x) and the like do not depend on the values of x."""
    return function(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds


def record_clamp(trace, function, input, min=None, max=None):
    """clamp(input, min, max), with constant bounds: one number each, or one for each channel."""
    least, most = (bound_of(trace, function, input, bound) for bound in (min, max))
    trained = any(is_trained(trace, bound) for bound in (min, max))
    if least is None and most is not None and trace.is_rectified(input):
        least = torch.zeros_like(most)
    if least is not None and most is not None and (most <= least).any():
        trace.refuse(function, "its upper bound must be above the lower one")
    if least is None and most is None:
        return record_affine(trace, function, input, function(input, min, max))
    if least is not None and not least.any() and (most is None or (most == most[0]).all()):
        ceiling = None if most is None else most[0].item()
        output = function(input, min, max)
        record = trace.record_in_place if in_place(function) else trace.record
        return record("relu", SpikeReLU(ceiling), [input], output)
    return shifted_relu(trace, function, input, least, most, trained, lambda: function(input, min, max))


def record_clamp_min(trace, function, input, min):
    return record_clamp(trace, like_clamp(function), input, min)


def record_clamp_max(trace, function, input, max):
    return record_clamp(trace, like_clamp(function), input, None, max)


def like_clamp(function):
    """The clamp that changes its input in place if `function` does."""
    return torch.Tensor.clamp_ if in_place(function) else torch.clamp


def shifted_relu(trace, function, input, least, most, trained, run):
    """Record a clamp as a ReLU between two affine steps. least, most: [C] or None. run() -> the function's result."""
    trained = {"weight", "bias"} if trained else ()
    shaped = [None if bound is None else bound.view(-1, *[1] * (input.dim() - 2)) for bound in (least, most)]
    least, most = shaped
    if least is None:  # min(x, b) = b - relu(b - x)
        factor, shift, ceiling = torch.tensor(-1.0, dtype=torch.float64), most, None
    elif most is None or (most - least == (most - least).flatten()[0]).all():
        factor, shift = torch.tensor(1.0, dtype=torch.float64), -least
        ceiling = None if most is None else (most - least).flatten()[0].item()
    else:
        factor, ceiling = 1 / (most - least), 1.0
        shift = -least * factor
    x = step(trace, input, factor, shift, trained)
    x = trace.record("relu", SpikeReLU(ceiling), [x], x.clamp(0, ceiling))
    if not in_place(function):
        return record_affine(trace, function, x, run(), 1 / factor, -shift / factor, trained)
    x = step(trace, x, 1 / factor, -shift / factor, trained)
    output, node = run(), trace.stored_node(x)
    trace.overwrite(output, node)
    return output


def bound_of(trace, function, input, bound):
    """A bound as one number for each channel, [C] float64, or None for one that bounds nothing."""
    if bound is None or (isinstance(bound, (int, float)) and math.isinf(bound)):
        return None
    if trace.is_traced(bound):
        trace.refuse(function, "its bounds must not be computed from the input")
    values = of_sample(trace, function, input, bound)
    if not is_per_channel(values):
        trace.refuse(function, "a bound differs within a channel, the neurons of a channel have one threshold")
    return per_channel(values)


def record_hardtanh(trace, function, input, min_val=-1.0, max_val=1.0, inplace=False):
    if inplace:
        return record_clamp(trace, torch.Tensor.clamp_, input, min_val, max_val)
    return record_clamp(trace, function, input, min_val, max_val)


def record_maximum(trace, function, input, other=None, *args, **kwargs):
    """The larger of an activation and a constant, a clamp from below."""
    return record_extremum(trace, function, input, other, "min", args, kwargs)


def record_minimum(trace, function, input, other=None, *args, **kwargs):
    """The smaller of an activation and a constant, a clamp from above."""
    return record_extremum(trace, function, input, other, "max", args, kwargs)


def record_extremum(trace, function, input, other, bound, args, kwargs):
    is_pair = isinstance(input, torch.Tensor) and isinstance(other, torch.Tensor) and not args and not kwargs
    if not is_pair:
        trace.refuse(function, "over dimensions only max_pool2d and adaptive pooling are supported")
    if trace.is_traced(input) and trace.is_traced(other):
        trace.refuse(function, "one of the two must be a constant, the larger of a and b is b + relu(a - b)")
    x, constant = (input, other) if trace.is_traced(input) else (other, input)
    return record_clamp(trace, torch.clamp, x, **{bound: constant})


def record_threshold(trace, function, input, threshold, value, inplace=False):
    if threshold != 0 or value != 0:
        trace.refuse(function, "only threshold 0 and value 0, a relu, are supported: any other jumps")
    return SpikeReLU.traced(trace, function, input, inplace)


# ---------------------------------------------------------------------------------------------------------------------
# Products with a constant matrix


def record_matmul(trace, function, input, other):
    """input @ other, a linear layer of the weight `other`, [N, M]."""
    if not trace.is_traced(input) or trace.is_traced(other):
        trace.refuse(function, None if trace.is_traced(input) else "the weight must stand on the right, x @ weight")
    if input.dim() != 2 or other.dim() != 2:
        trace.refuse(
            function,
            f"the input must be [B, N] and the weight [N, M], not {list(input.shape)} and {list(other.shape)}: it is a "
            "linear layer, of flattened values; over the channels of a map it is a 1x1 convolution",
        )
    return record_linear(trace, input, other.t(), other, function(input, other))


def record_linear(trace, input, weight, source, output):
    """Record a linear layer of a weight [M, N] that is, or is made from, the tensor `source`."""
    op = SpikeLinear(weight.shape[1], weight.shape[0], bias=False)
    op.take(weight.contiguous(), None)  # products of another memory order round differently
    op.frozen = frozen_names(source, None)
    return trace.record("linear", op, [input], output)


def record_addmm(trace, function, input, mat1, mat2, *, beta=1, alpha=1):
    """beta * input + alpha * mat1 @ mat2, a linear layer with a bias."""
    if in_place(function):
        trace.refuse(function, "write it without in-place operations")
    product = record_matmul(trace, torch.mm, mat1, mat2)
    if alpha != 1:
        product = step(trace, product, alpha)
    if trace.is_traced(input):
        trace.refuse(function, "what is added must be a constant, or write a sum of its own")
    return record_sum(trace, torch.add, product, input, alpha=beta)


def record_einsum(trace, function, equation, *operands):
    """A product of [B, N] or, over its channels, of [B, C, H, W], with a constant matrix."""
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    terms, _, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if len(operands) == 2 and trace.is_traced(operands[1]):
        operands, names = operands[::-1], names[::-1]
    if len(operands) != 2 or trace.is_traced(operands[1]) or len(names) != 2:
        trace.refuse(function)
    x, matrix, (read, both) = operands[0], operands[1], names
    into = both.replace(read[1:2], "", 1)
    is_product = len(both) == 2 and read[1:2] in both and into not in read
    if not is_product or x.dim() not in (2, 4) or "." in read or result != read[0] + into + read[2:]:
        trace.refuse(
            function, "only products with a matrix, bn,nm->bm, a linear layer, and bchw,cd->bdhw, a 1x1 convolution"
        )
    weight = matrix if both[0] == into else matrix.t()  # [M, N]
    if x.dim() == 2:
        return record_linear(trace, x, weight, matrix, F.linear(x, weight))
    kernel = weight.contiguous()[:, :, None, None]
    op = SpikeConv2d(kernel.shape[1], kernel.shape[0], 1, bias=False)
    op.take(kernel, None)
    op.frozen = frozen_names(matrix, None)
    return trace.record("conv", op, [x], F.conv2d(x, kernel))
