"""Layers that copy pixels: every output is one of the inputs, so that spikes and currents pass as they are.

An average with weights that are not all equal is one of copies: 3/4 a + 1/4 b is the mean of a, a, a, b. So an uneven
pooling is a `SpikeGather`, which copies each pixel as often as it counts, and an average pooling behind it
(`copies_along`).
"""

import torch
import torch.nn.functional as F

from layers.rearranging import Rearrangement
from runtime.rules import NONE, either, several, whole

EXTENT = whole(1, 65536)
MOST_COPIES = 64  # of the pixels of one output along one side
MOST_COPIED = 64  # pixels of the map of copies, for each pixel of the larger map: its spikes are held in memory
AT_A_TIME = 16  # impulses
PADDINGS = ("reflect", "replicate", "circular")  # modes of F.pad whose new pixels are copies
SAME_WEIGHT = 1e-5  # largest rounding error of a weight, times the number of copies


class CopyingLayer(Rearrangement, abstract=True):
    """A layer whose outputs are copies of pixels, in the channels of the input."""

    passes_scale = passes_shift = channelwise = True

    def carry(self, values, shape):
        """As `Rearrangement.carry`; values per channel stay as they are."""
        return values if values.shape[-2:] == (1, 1) else super().carry(values, shape)

    def on_pairs(self, merges):
        return self, merges[0].copied()


class SpikeRepeat(CopyingLayer):
    """Nearest upsampling by whole factors, [B, C, H, W] -> [B, C, rows*H, columns*W].

    factors: (rows, columns). input_size: (height, width) that they were chosen for, None for any size.
    """

    fields = {"factors": several(EXTENT, 2, 2), "input_size": either(NONE, several(EXTENT, 2, 2))}  # noqa: RUF012

    def __init__(self, factors, input_size=None):
        super().__init__()
        self.factors, self.input_size = tuple(factors), None if input_size is None else tuple(input_size)

    def rearranged(self, x):
        check_size("an upsampling", self.input_size, x.shape[-2:])
        for dim, factor in zip((2, 3), self.factors):
            x = x.repeat_interleave(factor, dim) if factor > 1 else x
        return x


class SpikeGather(CopyingLayer):
    """Chosen rows and columns: output[i, j] = input[rows[i], columns[j]], for an input of size `input_size` alone."""

    fields = {  # noqa: RUF012
        "rows": several(whole(0, 65535), 1, 65536),
        "columns": several(whole(0, 65535), 1, 65536),
        "input_size": several(EXTENT, 2, 2),
    }

    def __init__(self, rows, columns, input_size):
        super().__init__()
        self.rows, self.columns, self.input_size = tuple(rows), tuple(columns), tuple(input_size)

    @classmethod
    def contradiction(cls, config):
        for name, extent in zip(("rows", "columns"), config.get("input_size", ())):
            last = max(config.get(name, (0,)))
            if last >= extent:
                return f"{name} up to {last}: the input has {extent}"
        return None

    def rearranged(self, x):
        check_size("a choice of pixels", self.input_size, x.shape[-2:])
        for dim, places in zip((2, 3), (self.rows, self.columns)):
            if places != tuple(range(x.shape[dim])):
                x = x.index_select(dim, torch.tensor(places, device=x.device))
        return x

    def extra_repr(self):
        return f"{list(self.input_size)} -> {[len(self.rows), len(self.columns)]}"


def check_size(name, expected, size):
    """Raise ValueError if an input's (height, width) is not the one that a layer was traced with. None: any size."""
    if expected is not None and tuple(size) != expected:
        raise ValueError(
            f"{name} was made for an input of {list(expected)} and gets {list(size)}: give images of the size that the "
            "network was traced with, or trace and convert it for the other"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The copies that an average consists of


def copies_of(average, size):
    """`rows, columns`: for each side of an average, the pixels whose mean every output is, [outputs, copies].

    average: a function of [B, 1, H, W] whose weights are products of one weight a row and one a column. size: (H, W).
    A side is None if some weight is negative, or no share of `MOST_COPIES` copies or fewer.
    """
    views = ([-1, 1, size[0], 1], [-1, 1, 1, size[1]])
    sides = []
    for side, view in enumerate(views):
        impulses = torch.eye(size[side], dtype=torch.float64).split(AT_A_TIME)
        answers = [average(part.view(view).expand(-1, -1, *size).contiguous())[:, 0] for part in impulses]
        weights = torch.cat(answers).select(2 - side, 0)  # [inputs, outputs]
        sides.append(copies_along(weights.T))
    return sides


def copies_along(weights):
    """The inputs whose mean every output is, [outputs, copies], for weights [outputs, inputs]; None if there are none.

    The number of copies is the least for which every weight is a whole number of them.
    """
    for copies in range(1, MOST_COPIES + 1):
        counts = (weights * copies).round()
        if (weights * copies - counts).abs().max() <= SAME_WEIGHT and (counts >= 0).all():
            if not (counts.sum(1) == copies).all():
                return None
            inputs = torch.arange(weights.shape[1])
            return torch.stack([inputs.repeat_interleave(row.long()) for row in counts])
    return None


def step_between(windows):
    """The step between windows [outputs, copies] that hold adjacent inputs, from 0 on; None for any other windows."""
    outputs, copies = windows.shape
    step = (windows[1, 0] - windows[0, 0]).item() if outputs > 1 else copies
    regular = step * torch.arange(outputs)[:, None] + torch.arange(copies)
    return step if step > 0 and torch.equal(windows, regular) else None


def factor_of(places, extent):
    """The whole factor by which inputs 0 to `extent` - 1 are repeated to give `places`, or None."""
    factor = len(places) // extent
    repeated = torch.arange(extent).repeat_interleave(factor)
    return factor if torch.equal(places, repeated) else None


def record_copies(trace, input, places, any_size=False):
    """Record the layer that copies `places`, (rows, columns), of an input [B, C, H, W]; its output.

    any_size: whole factors hold for inputs of another size, too.
    """
    size = tuple(input.shape[-2:])
    factors = [factor_of(each, extent) for each, extent in zip(places, size)]
    if None in factors:
        name, op = "gather", SpikeGather(*[each.tolist() for each in places], size)
    else:
        name, op = "upsample", SpikeRepeat(factors, None if any_size else size)
    return trace.record(name, op, [input], op.activation(input))


def record_padding(trace, function, input, pads, mode):
    """Record a padding of [B, C, H, W] whose new pixels are copies, with the pads and mode of F.pad."""
    if input.dim() != 4 or len(pads) != 4:
        trace.refuse(function, f"mode='{mode}' pads height and width alone, with two or four numbers")
    if not any(pads):
        return trace.alias(function(input, pads, mode), input)
    sides = zip(input.shape[-2:], (pads[2:], pads[:2]))
    places = [F.pad(torch.arange(float(extent))[None], tuple(each), mode)[0].long() for extent, each in sides]
    return record_copies(trace, input, places)
