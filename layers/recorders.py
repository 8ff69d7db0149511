"""How functions that rearrange values are traced: each becomes slices, chosen places, permutations and views.

A recorder is called with the trace, the function and the function's own arguments, as all in
`ann_parser.RECORDING_FUNCTIONS`.
"""

from numbers import Integral
from operator import index as as_number

import torch

from layers.joining import ViewOp
from layers.rearranging import WHOLE, IndexOp, PermuteOp, SliceOp

BATCH_FIRST = "the first dimension must stay the batch"


def record_steps(trace, input, steps, output):
    """Record ops one after the other; the last one computes `output`. steps: (op type, op) pairs, or none."""
    value = input
    for number, (op_type, op) in enumerate(steps, 1):
        value = trace.record(op_type, op, [value], output if number == len(steps) else op.activation(value))
    if not steps:
        trace.alias(output, input)
    return output


def sample_dim(trace, function, input, dim):
    """A dimension of the input, counted from 0. Raises NotImplementedError for the batch, and for no dimension."""
    if not isinstance(dim, int) or dim % input.dim() == 0:
        trace.refuse(function, BATCH_FIRST)
    return dim % input.dim()


def refuse_empty(trace, function, output):
    """Raise NotImplementedError for an output without values."""
    if not output.numel():
        trace.refuse(function, f"its result of shape [B, {str(list(output.shape[1:]))[1:]} holds no values")


# ---------------------------------------------------------------------------------------------------------------------
# Slices


def slice_of(dim, extent, start=None, stop=None, step=None):
    """The slice of a dimension for a SliceOp.

    Bounds up to one step from the edges mean the same at every extent. Others may have been computed from the extent of
    the example, so they belong to it. The number of channels is the same in any case.
    """
    start, stop, step = (None if bound is None else as_number(bound) for bound in (start, stop, step))
    step = 1 if step is None else step
    if slice(start, stop, step).indices(extent) == (0, extent, 1):
        start = stop = None
    is_at_edge = (start is None or 0 <= start <= step) and (stop is None or -step <= stop < 0)
    return start, stop, step, None if dim == 1 or is_at_edge else extent


def slice_steps(slices):
    """The op of these slices, one for each of the first dimensions of a sample; no op if all are whole."""
    while slices and slices[-1] == WHOLE:
        slices = slices[:-1]
    return [("slice", SliceOp(slices))] if slices else []


def part_steps(input, dim, start, stop):
    """The op that takes start to stop along one dimension."""
    return slice_steps([WHOLE] * (dim - 1) + [slice_of(dim, input.shape[dim], start, stop)])


def record_getitem(trace, function, input, index):
    """x[:, ...] with slices, numbers and None, and a list or tensor of constant places for one dimension."""
    if trace.is_traced(index):
        trace.refuse(function, "a network's path must not depend on the values of its activations")
    output = function(input, index)
    items = [plain(item) for item in (index if isinstance(index, tuple) else (index,))]
    for at, _ in [(i, item) for i, item in enumerate(items) if item is Ellipsis]:
        named = sum(item is not None for item in items) - 1
        items[at : at + 1] = [slice(None)] * (input.dim() - named)
    first = items.pop(0) if items else slice(None)
    if not isinstance(first, slice) or first.indices(len(input)) != (0, len(input), 1):
        trace.refuse(function, f"{BATCH_FIRST}, as in x[:, 1:]")
    refuse_empty(trace, function, output)
    steps = index_steps(trace, function, input, items)
    if any(item is None or isinstance(item, int) for item in items):
        steps.append(("view", ViewOp(output.shape[1:])))
    return record_steps(trace, input, steps, output)


def plain(item):
    """A number in an index, whatever holds it, as an int; other items unchanged."""
    is_number = isinstance(item, Integral) or (isinstance(item, torch.Tensor) and not item.dim())
    return as_number(item) if is_number and not is_mask(item) else item


def is_mask(item):
    """Whether an item of an index holds True and False."""
    return isinstance(item, bool) or (isinstance(item, torch.Tensor) and item.dtype == torch.bool)


def index_steps(trace, function, input, items):
    """The ops for the items of an index, one for each dimension of a sample, None left out."""
    slices, chosen = [], []
    for dim, item in enumerate([item for item in items if item is not None], 1):
        if isinstance(item, slice):
            slices.append(slice_of(dim, input.shape[dim], item.start, item.stop, item.step))
        elif isinstance(item, int) and not is_mask(item):
            slices.append(slice_of(dim, input.shape[dim], item, item + 1 or None))
        else:
            slices.append(WHOLE)
            chosen.append(("select", index_op(trace, function, input, dim, item)))
    if len(chosen) > 1:
        trace.refuse(function, "a list of places is supported for one dimension only")
    return slice_steps(slices) + chosen


def index_op(trace, function, input, dim, places):
    """The IndexOp of constant places along a dimension: numbers, or one True or False for each."""
    if trace.is_traced(places):
        trace.refuse(function, "a network's path must not depend on the values of its activations")
    places, size = torch.as_tensor(places), input.shape[dim]
    places = places.nonzero().flatten() if is_mask(places) else places
    if places.dim() != 1 or not len(places):
        trace.refuse(function, "the places along a dimension must be a list of numbers")
    return IndexOp(dim, size, (places % size).tolist())


def record_narrow(trace, function, input, dim, start, length):
    """x.narrow(dim, start, length)."""
    output, dim = function(input, dim, start, length), sample_dim(trace, function, input, dim)
    refuse_empty(trace, function, output)
    start = as_number(start) % input.shape[dim]
    return record_steps(trace, input, part_steps(input, dim, start, start + length), output)


def record_select(trace, function, input, dim, index):
    """x.select(dim, index): a slice of one place, without its dimension."""
    output, dim = function(input, dim, index), sample_dim(trace, function, input, dim)
    steps = part_steps(input, dim, index, index + 1 or None)
    return record_steps(trace, input, [*steps, ("view", ViewOp(output.shape[1:]))], output)


def record_parts(trace, function, input, *sections, **names):
    """chunk, split, tensor_split: one slice for each part, in a tuple."""
    outputs = function(input, *sections, **names)
    dim = sample_dim(trace, function, input, names.get("dim", sections[1] if len(sections) > 1 else 0))
    ends = torch.tensor([output.shape[dim] for output in outputs]).cumsum(0).tolist()
    if ends[-1] != input.shape[dim]:
        trace.refuse(function, "the parts must lie side by side and hold every value once")
    for output, start, end in zip(outputs, [0, *ends], ends):
        refuse_empty(trace, function, output)
        record_steps(trace, input, part_steps(input, dim, start, end), output)
    return tuple(outputs)


def record_unbind(trace, function, input, dim=0):
    """x.unbind(dim): one slice for each place, without its dimension, in a tuple."""
    outputs, dim = function(input, dim), sample_dim(trace, function, input, dim)
    for place, output in enumerate(outputs):
        steps = part_steps(input, dim, place, place + 1)
        record_steps(trace, input, [*steps, ("view", ViewOp(output.shape[1:]))], output)
    return tuple(outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Chosen places and copies


def record_index_select(trace, function, input, dim, index):
    """x.index_select(dim, index) with a constant index."""
    op = index_op(trace, function, input, sample_dim(trace, function, input, dim), index)
    return record_steps(trace, input, [("select", op)], function(input, dim, index))


def record_flip(trace, function, input, *dims, **names):
    """x.flip(dims): slices of step -1."""
    output, dims = function(input, *dims, **names), names.get("dims", dims)
    dims = [d for each in dims for d in ([each] if isinstance(each, int) else each)]
    reverse = {sample_dim(trace, function, input, dim) for dim in dims}
    whole = [(None, None, -1, None) if dim in reverse else WHOLE for dim in range(1, input.dim())]
    return record_steps(trace, input, slice_steps(whole), output)


def record_fliplr(trace, function, input):
    """torch.fliplr(x): the first dimension behind the batch."""
    return record_flip(trace, torch.flip, input, (1,))


def record_roll(trace, function, input, shifts, dims=None):
    """x.roll(shifts, dims), one place after the other."""
    output = function(input, shifts, dims)
    shifts, dims = ([x] if isinstance(x, int) else list(x or [0]) for x in (shifts, dims))
    steps = []
    for shift, dim in zip(shifts, dims):
        dim = sample_dim(trace, function, input, dim)
        steps.append(("select", IndexOp(dim, input.shape[dim], torch.arange(input.shape[dim]).roll(shift).tolist())))
    return record_steps(trace, input, steps, output)


def record_copies(trace, function, input, *sizes, **names):
    """repeat, tile, expand, expand_as, broadcast_to: places that return again and again."""
    output = function(input, *sizes, **names)
    if output.dim() != input.dim() or len(output) != len(input):
        trace.refuse(function, f"{BATCH_FIRST}, and no dimension may be added: use unsqueeze")
    refuse_empty(trace, function, output)
    steps = []
    for dim, (size, extent) in enumerate(zip(input.shape, output.shape)):
        if extent != size:
            steps.append(("select", IndexOp(dim, size, list(range(size)) * (extent // size))))
    return record_steps(trace, input, steps, output)


def record_repeat_interleave(trace, function, input, repeats, dim=None, **names):
    """x.repeat_interleave(repeats, dim) with constant numbers."""
    output, dim = function(input, repeats, dim, **names), sample_dim(trace, function, input, dim)
    index = torch.arange(input.shape[dim]).repeat_interleave(torch.as_tensor(repeats))
    return record_steps(trace, input, [("select", index_op(trace, function, input, dim, index))], output)


# ---------------------------------------------------------------------------------------------------------------------
# Permutations


def record_permutation(trace, function, input, *args, **names):
    """permute, transpose, movedim and their other names: the order that they give an example of other extents."""
    output = function(input, *args, **names)
    example = torch.empty(list(range(2, input.dim() + 2)), device="meta")  # every extent once
    dims = [extent - 2 for extent in function(example, *args, **names).shape]
    if dims[0] != 0:
        trace.refuse(function, BATCH_FIRST)
    is_same = dims == list(range(len(dims)))
    return record_steps(trace, input, [] if is_same else [("permute", PermuteOp(dims[1:]))], output)


def record_channel_shuffle(trace, function, input, groups):
    """F.channel_shuffle: (groups, C / groups) channels become (C / groups, groups)."""
    output, places = function(input, groups), input.dim() - 2
    split = [(groups, None), *[(None,)] * places]
    op = PermuteOp([2, 1, *range(3, places + 3)], split, [2, *[1] * places])
    return record_steps(trace, input, [("permute", op)], output)


def record_pixel_shuffle(trace, function, input, factor):
    """F.pixel_shuffle: [B, C * r * r, H, W] -> [B, C, H * r, W * r]."""
    output = function(input, factor)
    refuse_unless_image(trace, function, input)
    op = PermuteOp([1, 4, 2, 5, 3], [(None, factor, factor), (None,), (None,)], [1, 2, 2])
    return record_steps(trace, input, [("permute", op)], output)


def record_pixel_unshuffle(trace, function, input, factor):
    """F.pixel_unshuffle: [B, C, H * r, W * r] -> [B, C * r * r, H, W]."""
    output = function(input, factor)
    refuse_unless_image(trace, function, input)
    op = PermuteOp([1, 3, 5, 2, 4], [(None,), (None, factor), (None, factor)], [3, 1, 1])
    return record_steps(trace, input, [("permute", op)], output)


def refuse_unless_image(trace, function, input):
    """Raise NotImplementedError unless the input is [B, C, H, W]."""
    if input.dim() != 4:
        trace.refuse(function, f"the input must be [B, C, H, W], not {list(input.shape)}")


def make_constant(trace, function, input, *args, **names):
    """zeros_like, new_zeros: a constant, whatever values the input has."""
    return function(input, *args, **names)
