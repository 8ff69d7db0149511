"""Weights in the forms that the importers of NIR understand: square kernels without groups, channels mixed by a matrix.

All arrays are NumPy's.
"""

import numpy as np


class Unwritable(Exception):
    """What NIR has no node for, in words."""


def dense(weight, groups):
    """The kernel [C_out, C_in, kh, kw] of a grouped convolution, [C_out, C_in / groups, kh, kw], with zeros."""
    if groups == 1:
        return weight
    rows, columns = len(weight) // groups, weight.shape[1]
    whole = np.zeros((len(weight), columns * groups, *weight.shape[2:]), weight.dtype)
    for group in range(groups):
        of_group = slice(group * rows, (group + 1) * rows)
        whole[of_group, group * columns : (group + 1) * columns] = weight[of_group]
    return whole


def square(weight, sides, stride, dilation, size):
    """`weight, padding`: the same convolution by a square kernel and a padding that is the same on opposite sides.

    weight: [C_out, C_in, kh, kw]. sides: ((top, bottom), (left, right)) padding. size: (H, W) of the input. Zeros are
    put around the kernel; nir 1.0.8 takes the height of a kernel for its width. Raises Unwritable if the output would
    have another size.
    """
    extent = max(weight.shape[2:])
    for k in range(extent, extent + 2 * max(abs(side) for pair in sides for side in pair) + 2):
        fits = [fitted(*each, k) for each in zip(weight.shape[2:], sides, stride, dilation, size)]
        if None not in fits:
            (top, left), padding = zip(*fits)
            whole = np.zeros((*weight.shape[:2], k, k), weight.dtype)
            whole[..., top : top + weight.shape[2], left : left + weight.shape[3]] = weight
            return whole, padding
    raise Unwritable("a kernel of {} x {} with this padding and stride".format(*weight.shape[2:]))


def fitted(kernel, sides, stride, dilation, size, k):
    """`before, padding` of one side: zeros before a kernel that becomes one of extent k, and the padding. None if none
    gives an output of the same size.
    """
    outputs = (size + sum(sides) - dilation * (kernel - 1) - 1) // stride + 1
    for before in range(k - kernel + 1):
        padding = sides[0] + before * dilation
        if padding >= 0 and (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1 == outputs:
            return before, padding
    return None


def per_channel(values, channels):
    """One value per channel, [C], of values that are broadcastable to a sample [C, ...].

    Raises Unwritable if they differ within a channel.
    """
    rows = np.asarray(values).reshape(-1)
    if rows.size in (1, channels):
        return np.broadcast_to(rows, channels)
    rows = rows.reshape(channels, -1) if rows.size % channels == 0 else rows.reshape(1, -1)
    if (rows != rows[:, :1]).any():
        raise Unwritable("weights that differ within a channel")
    return np.broadcast_to(rows[:, 0], channels)


def embedding(channels, start, total):
    """The matrix [total, channels] that puts channels where those of a concatenation start."""
    return np.eye(total)[:, start : start + channels]


def signed_pairs(heard):
    """The matrix [2 C, C] that makes x and -x of each channel; heard: [C], 0 where -x has no current."""
    matrix = np.zeros((2 * len(heard), len(heard)))
    matrix[0::2], matrix[1::2] = np.eye(len(heard)), -np.diag(heard)
    return matrix


def pairs_to_values(weight, signs, block):
    """The matrix [C / 2, C] of first + sign * second for every pair of blocks; weight: [C], signs: one per pair."""
    matrix = np.zeros((len(weight) // 2, len(weight)))
    for pair, start in enumerate(range(0, len(weight), 2 * block)):
        for i in range(block):
            first, second = start + i, start + block + i
            matrix[pair * block + i, first] = weight[first]
            matrix[pair * block + i, second] = weight[second] * signs[pair % len(signs)]
    return matrix
