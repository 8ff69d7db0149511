"""Operators on constants and on shapes, in NumPy: the importer computes them itself, so that no layer is left of them.

Exporters write `x.view(x.size(0), -1)` as Shape, Gather, Unsqueeze, Concat and Reshape. What depends on constants
alone is computed once; what depends on a shape is computed at every call, from the real shape.

FOLDS: operator -> function of the node and its input arrays (None for one that is left out) -> the output array.
"""

import math

import numpy as np
import onnx

from networks.onnx_file import FLOATS, INTEGERS
from networks.onnx_node import Damaged

MAX_VALUES = 2**24  # of one computed constant: 64 MB; a few declared sizes could ask for any amount of memory
UNBOUNDED = 2**31  # ends of slices from here on mean "to the end"


def check_values(node, count):
    """Raise ValueError if a computed constant would have more than `MAX_VALUES` values."""
    if count > MAX_VALUES:
        node.damaged(f"it computes a constant of {count} values")


def elementwise(function):
    """A fold of one or more inputs of shapes that fit each other. The inputs' type stays, but for comparisons."""

    def fold(node, *arrays):
        check_values(node, math.prod(np.broadcast_shapes(*[array.shape for array in arrays])))
        with np.errstate(all="ignore"):  # NaN and infinite weights are refused later, by name
            return function(*arrays)

    return fold


def quotient(x, y):
    """The quotient; of whole numbers it is rounded towards zero."""
    if x.dtype.kind == "f":
        return x / y
    return (np.sign(x) * np.sign(y) * (abs(x) // abs(np.where(y == 0, 1, y)))).astype(x.dtype)


def axes_of(node, given, rank):
    """The axes of an operator as numbers from 0 to rank - 1. given: input 2, or None."""
    axes = node.attribute("axes") if given is None else given.ravel()
    return None if axes is None else tuple(int(axis) % rank for axis in axes)


def gather(node, data, indices):
    axis = node.attribute("axis", 0) % data.ndim
    check_values(node, indices.size * data.size // max(1, data.shape[axis]))
    return np.take(data, indices, axis)


def concat(node, *arrays):
    check_values(node, sum(array.size for array in arrays))
    return np.concatenate(arrays, node.attribute("axis"))


def unsqueeze(node, data, axes=None):
    axes = [] if axes is None else axes.ravel()
    axes = node.attribute("axes") or [int(axis) for axis in axes]
    return np.expand_dims(data, tuple(axes))


def squeeze(node, data, axes=None):
    return np.squeeze(data, axes_of(node, axes, max(1, data.ndim)))


def reshape(node, data, shape):
    keep = not node.attribute("allowzero", 0)
    return data.reshape([data.shape[i] if n == 0 and keep else n for i, n in enumerate(shape.tolist())])


def transpose(node, data):
    return np.transpose(data, node.attribute("perm"))


def slices(node, rank, starts=None, ends=None, axes=None, steps=None):
    """The index of a Slice, one slice per axis."""
    starts, ends = (
        node.attribute(name) if given is None else given.ravel().tolist()
        for name, given in (("starts", starts), ("ends", ends))
    )
    axes = node.attribute("axes") if axes is None else axes.ravel().tolist()
    steps = [1] * len(starts) if steps is None else steps.ravel().tolist()
    index = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes or range(len(starts)), steps, strict=True):
        end = None if end >= UNBOUNDED or (step < 0 and end <= -UNBOUNDED) else end
        index[axis] = slice(start, end, step)
    return tuple(index)


def take_slice(node, data, *bounds):
    return data[slices(node, data.ndim, *bounds)]


def shape_of(node, data):
    return np.array(data.shape, np.int64)[node.attribute("start", 0) : node.attribute("end")]


def constant(node):
    kinds = ("value", "value_float", "value_floats", "value_int", "value_ints")
    value = next((node.attributes[name] for name in kinds if name in node.attributes), None)
    if value is None:
        node.refuse("it holds no number and no tensor")
    is_float = np.ndim(value) and len(np.ravel(value)) and isinstance(np.ravel(value)[0].item(), float)
    if isinstance(value, np.ndarray):
        return value
    return np.array(value, np.float32 if is_float or isinstance(value, float) else np.int64)


def constant_of_shape(node, shape):
    check_values(node, math.prod(shape.tolist()))
    value = node.attribute("value", np.zeros(1, np.float32))
    return np.full(shape.tolist(), value.ravel()[0])


def expand(node, data, shape):
    shape = np.broadcast_shapes(data.shape, tuple(shape.tolist()))
    check_values(node, math.prod(shape))
    return np.array(np.broadcast_to(data, shape))


def numpy_type(node):
    """The NumPy type that a Cast makes: float32 for all floating-point types."""
    if node.attribute("to") not in FLOATS | INTEGERS:
        node.refuse("it makes a type that no network computes in")
    return np.float32 if node.attribute("to") in FLOATS else onnx.helper.tensor_dtype_to_np_dtype(node.attribute("to"))


def cast(node, data):
    with np.errstate(all="ignore"):
        return data.astype(numpy_type(node))


def split(node, data, sizes=None):
    sizes = node.attribute("split") if sizes is None else sizes.tolist()
    axis = node.attribute("axis", 0)
    if sizes is None:
        parts = len(node.outputs)
        longest = -(-data.shape[axis] // parts)
        sizes = [max(0, min(longest, data.shape[axis] - i * longest)) for i in range(parts)]
    return np.split(data, np.cumsum(sizes)[:-1], axis)


def reduction(function):
    """A fold over the axes of an operator, all of them if it has none."""

    def fold(node, data, axes=None):
        axes = axes_of(node, axes, max(1, data.ndim))
        return np.asarray(function(data, axis=axes, keepdims=bool(node.attribute("keepdims", 1))), data.dtype)

    return fold


def number_range(node, start, limit, step):
    if not step or not np.isfinite([start, limit, step]).all():
        node.damaged("its step is 0, or its bounds are infinite")
    check_values(node, abs((float(limit) - float(start)) / float(step)))
    return np.arange(start, limit, step, start.dtype)


FOLDS = {
    **{"Shape": shape_of, "Constant": constant, "ConstantOfShape": constant_of_shape, "Expand": expand},
    **{"Gather": gather, "Concat": concat, "Unsqueeze": unsqueeze, "Squeeze": squeeze, "Reshape": reshape},
    **{"Transpose": transpose, "Slice": take_slice, "Split": split, "Cast": cast, "Range": number_range},
    "Size": lambda node, data: np.array(math.prod(data.shape), np.int64),
    "Identity": lambda node, data: data,
    "Dropout": lambda node, data, *options: data,
    "CastLike": lambda node, data, other: data.astype(other.dtype),
    **{"ReduceProd": reduction(np.prod), "ReduceSum": reduction(np.sum)},
    **{"ReduceMin": reduction(np.min), "ReduceMax": reduction(np.max), "ReduceMean": reduction(np.mean)},
    **{"Add": elementwise(np.add), "Sub": elementwise(np.subtract), "Mul": elementwise(np.multiply)},
    **{"Div": elementwise(quotient), "Min": elementwise(lambda *xs: np.min(np.broadcast_arrays(*xs), 0))},
    **{"Max": elementwise(lambda *xs: np.max(np.broadcast_arrays(*xs), 0)), "Mod": elementwise(np.mod)},
    **{"Neg": elementwise(np.negative), "Abs": elementwise(np.abs), "Sqrt": elementwise(np.sqrt)},
    **{"Floor": elementwise(np.floor), "Ceil": elementwise(np.ceil), "Round": elementwise(np.round)},
    **{
        "Reciprocal": elementwise(np.reciprocal),
        "Pow": elementwise(lambda x, y: np.power(x, y).astype(x.dtype)),
        "Equal": elementwise(np.equal),
    },
    **{"Less": elementwise(np.less), "Greater": elementwise(np.greater), "Not": elementwise(np.logical_not)},
    "Where": elementwise(np.where),
}


class Numbers:
    """A fold that runs at every call, because it depends on the shape of an activation."""

    def __init__(self, node):
        self.node = node.alone()

    def __call__(self, *given):
        """The output array, from the inputs that are no constants: arrays, or the activation of a Shape."""
        given = iter(given)
        inputs = [
            self.node.constants[name] if name in self.node.constants else next(given) if name else None
            for name in self.node.inputs
        ]
        return fold(self.node, inputs)


def fold(node, inputs):
    """The output array, or arrays of a Split. Raises Damaged for inputs that do not fit."""
    try:
        value = FOLDS[node.op](node, *inputs)
    except (Damaged, NotImplementedError):
        raise
    except Exception as error:  # a damaged file can hold any combination of shapes, types and attributes
        node.damaged(f"it does not fit its inputs ({' '.join(str(error).split())[:100]})")
    return [np.asarray(part) for part in value] if isinstance(value, list) else np.asarray(value)
