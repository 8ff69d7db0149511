"""Operators of an ONNX graph that rearrange activations, as PyTorch modules.

SHAPES: operator -> function of the node that returns its module. A module gets the activation, and behind it those of
its other inputs that depend on a shape, as NumPy arrays.
"""

import math
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from networks.onnx_file import FLOATS
from networks.onnx_layers import torch_pads
from networks.onnx_node import MAX_SIZE, as_written
from networks.onnx_numbers import slices

CHECKED_PIXELS = 3  # input pixels after which the pattern of nearest neighbours repeats, with one at each border


class Rearranged(nn.Module):
    """`change(node, x, *others)` for one activation x.

    others: the node's further inputs, arrays or None for one that is left out. The constant ones are `fixed`; those
    that depend on a shape come with each call.
    """

    def __init__(self, node, change):
        super().__init__()
        node.check_activations(0)
        self.node, self.change = node.alone(), change
        self.fixed = [node.constants.get(name) for name in node.inputs[1:]]
        self.is_given = [node.has(i) and not node.is_constant(i) for i in range(1, len(node.inputs))]

    def forward(self, x, *numbers):
        numbers = iter(numbers)
        return self.change(self.node, x, *(next(numbers) if g else f for g, f in zip(self.is_given, self.fixed)))

    def extra_repr(self):
        return self.change.__name__


def rearranged(change):
    """A builder of `Rearranged`."""
    return lambda node: Rearranged(node, change)


def reshape(node, x, shape):
    """A view. A file that declares its batch size has that size in its shapes: it becomes the real one."""
    sizes = [int(n) for n in shape]
    if node.is_constant(1) and sizes and sizes[0] == node.batch:
        sizes[0] = x.shape[0]
    if 0 in sizes and node.attribute("allowzero", 0):
        node.refuse("a shape with zeros holds no values")
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(sizes)])


def flatten(node, x):
    axis = node.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return torch.flatten(x, 1) if axis == 1 else x.reshape(math.prod(x.shape[:axis]), -1)


def squeeze(node, x, axes=None):
    axes = node.attribute("axes") if axes is None else axes.ravel().tolist()
    if axes is None:
        axes = [i for i, size in enumerate(x.shape) if size == 1 and i > 0]  # never the batch
    axes = {axis % x.dim() for axis in axes}
    if any(x.shape[axis] != 1 for axis in axes):
        node.damaged(f"it squeezes axes {sorted(axes)} of {list(x.shape)}")
    return x.reshape([size for i, size in enumerate(x.shape) if i not in axes])


def unsqueeze(node, x, axes=None):
    axes = node.attribute("axes") if axes is None else axes.ravel().tolist()
    rank = x.dim() + len(axes)
    axes, sizes = {axis % rank for axis in axes}, iter(x.shape)
    if len(axes) != rank - x.dim():
        node.damaged("it has an axis twice")
    return x.reshape([1 if i in axes else next(sizes) for i in range(rank)])


def transpose(node, x):
    order = node.attribute("perm") or list(reversed(range(x.dim())))
    return x if list(order) == list(range(x.dim())) else x.permute(order)


def take_slice(node, x, *bounds):
    index = slices(node, x.dim(), *bounds)
    if any(part.step is not None and part.step < 1 for part in index):
        node.refuse("it runs backwards, slices with positive steps are supported")
    kept = [range(size)[part] for size, part in zip(x.shape, index)]
    return x if all(len(part) == size for part, size in zip(kept, x.shape)) else x[index]


def split(node, x, sizes=None):
    sizes = node.attribute("split") if sizes is None else sizes.ravel().tolist()
    axis = node.attribute("axis", 0)
    parts = len(node.outputs)
    return torch.split(x, sizes or -(-x.shape[axis] // parts), axis)


def split_to_sequence(node, x, sizes=None):
    """The parts as one value, which only SequenceAt reads."""
    if sizes is None and not node.attribute("keepdims", 1):
        node.refuse("keepdims=0 is not supported, use Split")
    sizes = 1 if sizes is None else sizes.tolist()  # one size for all parts, or a list
    return [torch.split(x, sizes, node.attribute("axis", 0))]


def part_of_sequence(node, parts, position):
    return parts[int(position)]


PADDINGS = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}  # ONNX -> PyTorch


def pad(node, x, pads=None, value=None, axes=None):
    """Zero padding, or with another constant, or with copies of pixels."""
    mode = PADDINGS.get(node.attribute("mode", "constant"))
    if mode is None:
        node.refuse(f"it pads with mode {node.attribute('mode')}, use one of {', '.join(PADDINGS)}")
    pads = node.attribute("pads") if pads is None else pads.ravel().tolist()
    value = node.attribute("value", 0.0) if value is None else as_written(value.ravel()[0])
    axes = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes.ravel().tolist()]
    begins, ends = [0] * x.dim(), [0] * x.dim()
    for axis, begin, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        if max(abs(begin), abs(end)) > MAX_SIZE:
            node.damaged(f"it pads by {begin} and {end}")
        begins[axis], ends[axis] = begin, end
    if begins[0] or ends[0]:
        node.refuse("it pads the images of a batch, only channels, height and width can be padded")
    first = next((i for i in range(1, x.dim()) if begins[i] or ends[i]), None)
    if first is None:
        return x
    if mode != "constant":
        if first == 1:
            node.refuse(f"it pads channels with mode {node.attribute('mode')}, only height and width can be padded so")
        return F.pad(x, torch_pads(begins[2:], ends[2:]), mode)
    first = min(first, max(1, x.dim() - 2))  # height and width, together
    return F.pad(x, torch_pads(begins[first:], ends[first:]), value=value)


# Resize


def resize(node, x, *others):
    """Nearest neighbours by whole factors: each value becomes a block of equal ones."""
    factors = factors_of(node, x, *others)
    if any(factor != int(factor) or not 1 <= factor <= MAX_SIZE for factor in factors) or factors[:2] != [1, 1]:
        shown = [float(factor) for factor in factors]
        node.refuse(f"it resizes by {shown}, whole factors of height and width are supported")
    factors = [int(factor) for factor in factors[2:]]
    if all(factor == 1 for factor in factors):
        return x
    check_nearest(node, factors)
    return F.interpolate(x, scale_factor=[float(factor) for factor in factors], mode="nearest")


def factors_of(node, x, *others):
    """The factors by dimension, from the inputs or attributes of Upsample and Resize."""
    others = [None if array is None or array.size == 0 else array.ravel().tolist() for array in others]
    if node.op == "Upsample" or node.opset < 11:
        scales, sizes = node.attribute("scales") or others[0], None
    else:
        _, scales, sizes = [*others, None, None, None][:3]
    axes = [axis % x.dim() for axis in node.attribute("axes", range(x.dim()))]
    factors = [Fraction(1)] * x.dim()
    for i, axis in enumerate(axes):
        if sizes is None:
            factors[axis] = Fraction(scales[i])
        elif axis > 0:  # the batch of the file is not that of the call
            factors[axis] = Fraction(sizes[i], x.shape[axis])
    if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        node.refuse("keep_aspect_ratio_policy must be stretch")
    return factors


def check_nearest(node, factors):
    """Raise NotImplementedError unless every output pixel takes the value of the pixel that it lies in."""
    mode = node.attribute("mode", "nearest")
    if mode != "nearest":
        node.refuse(f"mode {mode} is not supported, use nearest, or ConvTranspose")
    old = node.op == "Upsample" or node.opset < 11
    place = "asymmetric" if old else node.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else node.attribute("nearest_mode", "round_prefer_floor")
    places = {
        "asymmetric": lambda i, factor: Fraction(i, factor),
        "half_pixel": lambda i, factor: Fraction(2 * i + 1, 2 * factor) - Fraction(1, 2),
        "pytorch_half_pixel": lambda i, factor: Fraction(2 * i + 1, 2 * factor) - Fraction(1, 2),
        "tf_half_pixel_for_nn": lambda i, factor: Fraction(2 * i + 1, 2 * factor),
    }
    roundings = {
        "floor": math.floor,
        "ceil": math.ceil,
        "round_prefer_floor": lambda value: math.ceil(value - Fraction(1, 2)),
        "round_prefer_ceil": lambda value: math.floor(value + Fraction(1, 2)),
    }
    if place in places and rounding in roundings:
        last = CHECKED_PIXELS - 1
        taken = (
            (i // factor, min(max(roundings[rounding](places[place](i, factor)), 0), last))
            for factor in factors
            for i in range(CHECKED_PIXELS * factor)
        )
        if all(expected == found for expected, found in taken):
            return
    node.refuse(
        f"nearest neighbours with coordinate_transformation_mode {place} and nearest_mode {rounding} are not blocks "
        "of equal values, use asymmetric with floor"
    )


# Types


def cast(node):
    node.check_activations(0)
    if node.attribute("to") not in FLOATS:
        node.refuse("it makes whole numbers or bools of activations, a network is computed in floating point")
    return nn.Identity()


def dropout(node):
    node.check_activations(0)
    if node.is_constant(2) and node.constant(2).any():
        node.refuse("it is in training mode, export the network in eval mode (training=TrainingMode.EVAL)")
    return nn.Identity()


def like(node):
    node.check_activations(0)
    if node.is_constant(1) and node.constant(1).dtype != np.float32:
        node.refuse("it makes whole numbers of activations, a network is computed in floating point")
    return nn.Identity()


SHAPES = {
    **{"Reshape": rearranged(reshape), "Flatten": rearranged(flatten), "Transpose": rearranged(transpose)},
    **{"Squeeze": rearranged(squeeze), "Unsqueeze": rearranged(unsqueeze), "Slice": rearranged(take_slice)},
    **{"Split": rearranged(split), "Pad": rearranged(pad)},
    **{"SplitToSequence": rearranged(split_to_sequence), "SequenceAt": rearranged(part_of_sequence)},
    **{"Resize": rearranged(resize), "Upsample": rearranged(resize)},
    **{"Cast": cast, "CastLike": like, "Dropout": dropout},
    "Identity": lambda node: nn.Identity(),
}
