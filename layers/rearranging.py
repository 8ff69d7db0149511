"""Layers that only rearrange values: slices, chosen places, permutations of dimensions."""

import math

import torch

from layers.base import SpikeLayer
from runtime.rules import CHANNELS, DIM, NONE, either, several, whole
from spike_tensor import Current, SpikeTensor


class Rearrangement(SpikeLayer, abstract=True):
    """A layer whose every output is one of its inputs, or 0.

    Spikes, sums of spikes and currents pass. Their lambdas and units are rearranged in the same way (`carried`).
    """

    is_linear = hands_on = passes_spikes = passes_sums = rearranges = True
    is_measured = False

    def rearranged(self, x):
        """The values [B, ...] in their new places. Raises ValueError for a size that does not fit."""
        raise NotImplementedError

    def carry(self, values, shape):
        """As `carried`, for several values with as many dimensions as a sample."""
        return self.rearranged(values.expand(shape)[None])[0]

    def carried(self, values, shape):
        """Values of an input sample, as those of an output sample; both are scalars or broadcastable to a sample.

        shape: of an input sample.
        """
        if values.numel() == 1:
            return values.reshape(())
        return self.carry(values.view(*[1] * (len(shape) - values.dim()), *values.shape), shape)

    def activation(self, x):
        return self.rearranged(x)

    def current(self, x):
        if isinstance(x, Current):
            return x.like(self.rearranged(x.total()))
        scale = self.carried(x.scale_factor, x.data.shape[1:])
        return SpikeTensor.like(self.rearranged(x.data), x.timesteps, scale)

    def convert(self, setter, entry):
        """Give each lambda or unit its new place."""
        node = entry.inputs[0]
        setter.pass_on(node, entry.out, self.carried(setter.value_of(node), setter.shapes[node]))

    def targets(self, values, shapes, out_shape):
        return self.carried(values[0], shapes[0])


def check_extent(extent, size, what):
    """Raise ValueError if a dimension does not have the extent `size` that the places were chosen for."""
    if size is not None and extent != size:
        raise ValueError(
            f"{what} were chosen for an extent of {size} and get {extent}: give images of the size that the network "
            "was traced with, or trace and convert it for the other"
        )


def is_channels_last(x):
    """Whether a tensor is [B, C, H, W] with adjacent channels in memory."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


WHOLE = (None, None, 1, None)  # the slice of a dimension that stays as it is
BOUND = either(NONE, whole(-(2**31), 2**31))


class SliceOp(Rearrangement):
    """A slice of every sample, x[:, start:stop:step, ...]; the step -1 reverses a dimension.

    slices: (start, stop, step, size) for the first dimensions of a sample. size: the extent that start and stop were
    chosen for; None if they fit any.
    """

    fields = {"slices": several(several(BOUND, 4, 4), 1, 8)}  # noqa: RUF012

    def __init__(self, slices):
        super().__init__()
        self.slices = tuple(tuple(each) for each in slices)

    @classmethod
    def contradiction(cls, config):
        for start, stop, step, size in config.get("slices", ()):
            reverses = step == -1 and start is None and stop is None
            if not reverses and (step is None or step < 1):
                return f"slices with the step {step}: use 1 or more, or -1 without start and stop"
            if size is not None and size < 1:
                return f"slices for an extent of {size}"
        return None

    def rearranged(self, x):
        for extent, (_, _, _, size) in zip(x.shape[1:], self.slices):
            check_extent(extent, size, "slices")
        y = self.cut(x, self.slices)
        if not y[0].numel():
            raise ValueError(f"a slice of {list(x.shape[1:])} holds no values")
        return y

    def carry(self, values, shape):
        kept = [WHOLE if extent == 1 else each for extent, each in zip(values.shape, self.slices)]
        return self.cut(values[None], kept)[0]

    @staticmethod
    def cut(x, slices):
        """The slices of x, [B, ...]; they are views of its memory unless one reverses a dimension."""
        cut = x[(slice(None), *(slice(start, stop, max(step, 1)) for start, stop, step, _ in slices))]
        reverse = [dim for dim, (_, _, step, _) in enumerate(slices, 1) if step < 0]
        return cut.flip(reverse) if reverse else cut

    def extra_repr(self):
        return ", ".join([":", *(in_words(*each) for each in self.slices)])


def in_words(start, stop, step, size):
    """A slice as Python writes it."""
    bounds = ":".join("" if bound is None else str(bound) for bound in (start, stop))
    return bounds if step == 1 else f"{bounds}:{step}"


class IndexOp(Rearrangement):
    """Chosen places along a dimension, in any order and number, as x.index_select(dim, index).

    size: the extent of the dimension, whose places are 0 to size - 1.
    """

    fields = {"dim": DIM, "size": CHANNELS, "index": several(whole(0, 2**31), 1, 2**16)}  # noqa: RUF012

    def __init__(self, dim, size, index):
        super().__init__()
        self.dim, self.size, self.index = dim, size, tuple(index)

    @classmethod
    def contradiction(cls, config):
        size, index = config.get("size", 2**31), config.get("index", ())
        return f"index {max(index)}: the size is {size}" if index and max(index) >= size else None

    def rearranged(self, x):
        check_extent(x.shape[self.dim], self.size, "places")
        index = torch.tensor(self.index, device=x.device)
        if is_channels_last(x):  # index_select would not keep that order
            dim = (0, 3, 1, 2)[self.dim]
            return x.permute(0, 2, 3, 1).index_select(dim, index).permute(0, 3, 1, 2)
        return x.index_select(self.dim, index)

    def carry(self, values, shape):
        return values if values.shape[self.dim - 1] == 1 else self.rearranged(values[None])[0]

    def extra_repr(self):
        places = ", ".join(map(str, self.index[:4])) + (", ..." if len(self.index) > 4 else "")
        return f"dim={self.dim}, index=[{places}], places={len(self.index)}"


FACTORS = several(either(NONE, whole(1, 65536)), 1, 8)


class PermuteOp(Rearrangement):
    """The dimensions of a sample in another order, x.permute(0, *dims).

    split: for each dimension of the input the factors into which it is split before; None stands for what is left.
    merge: how many adjacent dimensions become one afterwards, for each dimension of the output. None for neither.
    """

    fields = {  # noqa: RUF012
        "dims": several(DIM, 1, 8),
        "split": either(NONE, several(FACTORS, 1, 8)),
        "merge": either(NONE, several(whole(1, 8), 1, 8)),
    }

    def __init__(self, dims, split=None, merge=None):
        super().__init__()
        self.dims = tuple(dims)
        self.split = None if split is None else tuple(tuple(factors) for factors in split)
        self.merge = None if merge is None else tuple(merge)

    @classmethod
    def contradiction(cls, config):
        dims, split, merge = (config.get(name) for name in cls.fields)
        if dims is not None and sorted(dims) != list(range(1, len(dims) + 1)):
            return f"dims {dims}: use each of 1 to {len(dims)} once"
        parts = None if split is None else sum(map(len, split))
        if dims and any(count not in (None, len(dims)) for count in (parts, merge and sum(merge))):
            return f"split and merge do not have {len(dims)} dimensions"
        if split is not None and any(sum(factor is None for factor in factors) > 1 for factors in split):
            return "split leaves more than one factor open"
        return None

    def sizes(self, shape):
        """The extents of a sample of this shape after the split."""
        sizes = []
        for extent, factors in zip(shape, self.split or [(None,)] * len(self.dims), strict=True):
            known = math.prod(factor or 1 for factor in factors)
            sizes += [extent // known if factor is None else factor for factor in factors]
        return sizes

    def groups(self):
        """For each dimension of the output, the permuted dimensions that it merges."""
        merge, first, groups = self.merge or [1] * len(self.dims), 1, []
        for count in merge:
            groups.append(list(range(first, first + count)))
            first += count
        return groups

    def rearranged(self, x):
        y = x.reshape(len(x), *self.sizes(x.shape[1:])).permute(0, *self.dims)
        if self.merge is None:
            return y
        groups = self.groups()
        if is_channels_last(x) and len(groups) == 3:  # so it stays
            groups = [groups[1], groups[2], groups[0]]
            y = y.permute(0, *(dim for group in groups for dim in group))
            return merged(y, groups).permute(0, 3, 1, 2)
        return merged(y, groups)

    def carry(self, values, shape):
        places = [dim - 1 for dim in self.dims]
        full = self.sizes(shape)
        parts = [len(factors) for factors in self.split or [(None,)] * len(self.dims)]
        is_one = [extent == 1 for extent, count in zip(values.shape, parts) for _ in range(count)]
        y = values.reshape([1 if one else size for one, size in zip(is_one, full)]).permute(places)
        full, groups = [full[place] for place in places], self.groups()
        # a dimension along which all values are equal stays one value
        for group in groups:
            if any(y.shape[dim - 1] > 1 for dim in group):
                y = y.expand([full[i] if i + 1 in group else extent for i, extent in enumerate(y.shape)])
        return merged(y[None], groups)[0]

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.config().items() if value is not None)


def merged(y, groups):
    """y, [B, ...], with adjacent dimensions merged. groups: their numbers in the merged y, in any order."""
    extents, sizes = iter(y.shape[1:]), []
    for group in groups:
        sizes.append(math.prod(next(extents) for _ in group))
    return y.reshape(len(y), *sizes)
