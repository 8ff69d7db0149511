"""Layers that join or rearrange values: addition, concatenation, padding, view."""

import math

import torch
import torch.nn.functional as F

from layers.base import ANALOG, CURRENT, SPIKES, SpikeLayer, widened
from layers.rearranging import Rearrangement
from layers.signs import MergeSigns
from runtime.rules import BOOL, CHANNELS, DIM, NONE, POTENTIALS, either, several, whole
from spike_tensor import Current, SpikeTensor


class SpikeAdd(SpikeLayer):
    """The sum of two inputs of the same shape.

    Converted, each input of spikes is multiplied by an integer weight (`branch_weights`) and becomes a current, so that
    all inputs of the neuron share one unit. An input that is already a current in this unit has the weight None.
    signs: of each input in the sum; the branch weights contain them.
    """

    signs = (1, 1)

    fields = {"branch_weights": several(either(NONE, POTENTIALS), 2, 2)}  # noqa: RUF012
    arity = (2, 2)
    is_linear = hands_on = adds = fires = any_shape = True

    def __init__(self, branch_weights=(None, None)):
        super().__init__()
        self.set_branch_weights(branch_weights)

    def set_branch_weights(self, branch_weights):
        """Store one weight per input: None, a scalar tensor, or one broadcastable to a sample of that input."""
        for i, weight in enumerate(branch_weights):
            self.register_buffer(f"branch_weight{i}", weight)

    @property
    def branch_weights(self):
        """The weight of each input, None for a current in the add's own unit."""
        return self.branch_weight0, self.branch_weight1

    def activation(self, x, y):
        return x + y

    def current(self, x, y):
        if isinstance(x, SpikeTensor) and isinstance(y, Current):
            return self.join(y, self.branch_weight1, x, self.branch_weight0)
        return self.join(x, self.branch_weight0, y, self.branch_weight1)

    def join(self, x, weight_x, y, weight_y):
        """The sum as a Current. Spikes beside a current are only attached to it; the neuron adds them."""
        is_plain = isinstance(x, Current) and weight_x is None and not x.constant and x.spikes is None
        if is_plain and isinstance(y, SpikeTensor):
            return x.with_spikes(y.data, weight_y)
        x, y = self.to_current(x, weight_x), self.to_current(y, weight_y)
        if x.constant and y.constant:
            return x.like(x.total() + y.total())
        if x.pending is None or (y.pending is not None and y.pending.work > x.pending.work):
            x, y = y, x
        if x.pending is not None and not y.constant:  # the smaller convolution is computed, the larger one can wait
            return Current(None, x.timesteps, spikes=x.spikes, pending=x.pending.plus(y.total()))
        return Current((x.per_step() + y.per_step()).flatten(0, 1), x.timesteps)

    @staticmethod
    def to_current(x, weight):
        """Spikes or a current times their weight, as a Current; without a weight, `x` itself."""
        if weight is None:
            return x
        data = widened(x.total() if isinstance(x, Current) else x.data)
        return Current(data * weight.to(data.dtype), x.timesteps, isinstance(x, Current) and x.constant)

    def extra_repr(self):
        return ""

    def largest_sum(self, largest_read):
        weights = zip(largest_read, self.branch_weights)
        return sum(bound * (1 if weight is None else weight.abs().max().item()) for bound, weight in weights)

    def plan(self, place):
        """CURRENT before a neuron; SPIKES, with a neuron of its own, for spikes that stay spikes; ANALOG in ANN parts.

        Raises ValueError where activations meet spikes or currents that cannot be decoded there.
        """
        if set(place.reads) == {SPIKES} and (place.needs_spikes or not place.feeds_neuron):
            return place.passes_on()
        if CURRENT in place.reads or (SPIKES in place.reads and place.feeds_neuron):
            return CURRENT
        place.check_analog()
        return ANALOG

    def convert(self, setter, entry):
        """Set an integer weight for every input in another unit, and a neuron if no ReLU follows.

        Raises ValueError if an integer weight is too coarse (`SpikeSetter.branch_weight`).
        """
        fires = entry.name in setter.plan.firing
        unit = setter.spike_sum_unit([setter.scales[n] for n in entry.inputs]) if fires else setter.unit_of(entry.out)
        weights = []
        for node, sign in zip(entry.inputs, self.signs):
            kind, weight = setter.plan.kinds[node], None
            if kind == ANALOG:
                weight = sign / unit
            elif kind == SPIKES or not setter.shares_unit(node, entry.out):
                weight = sign * setter.branch_weight(entry.name, node, unit)
            elif sign < 0:
                is_float = setter.largest_read(entry) is None
                weight = torch.tensor(-1, dtype=torch.float32 if is_float else torch.int32)
            weights.append(weight)
        self.set_branch_weights(weights)
        largest = setter.largest_of(entry)
        if fires:
            setter.set_neuron(entry, unit, largest)
        else:
            setter.largest[entry.out] = largest

    def misfit(self, reads):
        lacks = any(kind == SPIKES and weight is None for kind, weight in zip(reads, self.branch_weights))
        return "spikes that it adds have no weight" if lacks else None

    def held(self, inputs, output):
        weights = zip(self.branch_weights, inputs)
        return [(f"branch_weight{i}", weight, x.shape[1:]) for i, (weight, x) in enumerate(weights)]

    def ann_operations(self, shape, outputs):
        return 0.0, float(outputs)

    def spike_operations(self, spikes):
        return spikes.double().sum().item()  # one synapse per spike


class SpikeSubtract(SpikeAdd):
    """The difference x - y of two inputs of the same shape. Converted, y has negative branch weights."""

    signs = (1, -1)
    fires = False
    may_turn_negative = True

    def activation(self, x, y):
        return x - y

    def plan(self, place):
        """CURRENT before a neuron, ANALOG in ANN parts. Raises ValueError for spikes without a ReLU behind it."""
        if set(place.reads) != {SPIKES}:
            return super().plan(place)
        if place.feeds_neuron:
            return CURRENT
        if place.before_neuron:
            split = "" if place.splits_signs() else ", or split the values behind it by sign (--signed pair)"
            raise ValueError(f"{place.where} subtracts, its values may be negative: put a ReLU behind it{split}")
        return ANALOG


class ConcatOp(SpikeLayer):
    """Concatenation of any number of inputs along dimension `dim`, which is never the batch."""

    fields = {"dim": DIM}  # noqa: RUF012
    arity = (1, 2**31)
    is_linear = hands_on = passes_spikes = True
    is_measured = False

    def __init__(self, dim=1):
        super().__init__()
        self.dim = dim

    @property
    def any_shape(self):
        """Channels are concatenated alike in all shapes."""
        return self.dim == 1

    @classmethod
    def traced(cls, trace, function, tensors, dim=0, **names):
        dim = names.get("axis", dim) % tensors[0].dim()
        if dim == 0:
            trace.refuse(function, "the batch dimension cannot be concatenated, use dim=1")
        output = torch.cat(tensors, dim)
        parts = padded_parts(trace, tensors, dim)
        return parts[0] if len(parts) == 1 else trace.record("concat", cls(dim), parts, output)

    @classmethod
    def traced_stack(cls, trace, function, tensors, dim=0):
        dim %= tensors[0].dim() + 1
        if dim == 0:
            trace.refuse(function, "the first dimension must stay the batch, use dim=1")
        parts = [ViewOp.traced(trace, torch.unsqueeze, x, dim) for x in tensors]
        return cls.traced(trace, function, parts, dim)

    def activation(self, *inputs):
        return torch.cat(inputs, self.dim)

    def current(self, *inputs):
        if any(isinstance(x, Current) for x in inputs):
            return self.join_currents(inputs)
        data = torch.cat([x.data for x in inputs], self.dim)
        scales = [x.scale_factor for x in inputs]
        scale = concat_scales(scales, [x.data.shape[1:] for x in inputs], self.dim - 1)
        return SpikeTensor.like(data, inputs[0].timesteps, scale)

    def join_currents(self, inputs):
        """Concatenate currents. Spikes count as currents of 0 or 1. Each input keeps its own unit."""
        if all(isinstance(x, Current) and x.constant for x in inputs):
            return inputs[0].like(torch.cat([x.total() for x in inputs], self.dim))
        steps = [x.per_step().flatten(0, 1) if isinstance(x, Current) else x.data for x in inputs]
        return Current(torch.cat(steps, self.dim), inputs[0].timesteps)

    def plan(self, place):
        """SPIKES for spikes, CURRENT for currents or a mix of both, ANALOG in ANN parts. ValueError for other mixes."""
        if set(place.reads) == {SPIKES}:
            return place.passes_on()
        if CURRENT in place.reads and ANALOG not in place.reads and place.feeds_neuron:
            return CURRENT
        place.check_analog()
        return ANALOG

    def convert(self, setter, entry):
        """Keep the lambda or unit of every input. Raises ValueError if one channel would hold different lambdas."""
        values = [setter.value_of(node).float() for node in entry.inputs]
        joined = concat_scales(values, [setter.shapes[node] for node in entry.inputs], self.dim - 1)
        if self.dim != 1 and joined is not values[0] and len(setter.shapes[entry.out]) < 4:
            joined = self.same_for_all(setter, entry, values, joined)
        if setter.plan.kinds[entry.out] == SPIKES:
            setter.scales[entry.out] = joined
        else:
            setter.units[entry.out] = joined
            setter.largest[entry.out] = setter.largest_of(entry)

    def on_pairs(self, merges):
        if self.dim != 1 or not all(merge.block == 1 and merge.signs.dim() for merge in merges):
            return None
        return self, MergeSigns(torch.cat([merge.signs for merge in merges]))

    @staticmethod
    def same_for_all(setter, entry, values, joined):
        """The mean of lambdas or units that are nearly equal in all inputs. Raises ValueError if they are not."""
        each = torch.stack(torch.broadcast_tensors(*values))
        setter.check_same_scale(entry.name, (each / each.amin(0)).flatten())
        return joined.mean() if each[0].numel() == 1 else each.mean(0)

    def targets(self, values, shapes, out_shape):
        if self.dim == 1 or len(out_shape) > 3:
            return concat_scales(values, shapes, self.dim - 1)
        return torch.stack(torch.broadcast_tensors(*values)).amax(0)


def concat_scales(scales, shapes, dim):
    """The scale of concatenated values: the scale of each input, expanded to its shape along `dim`.

    scales: one per input, a scalar or broadcastable to a sample. shapes: of a sample of each input. dim: of a sample, 0
    for the channels. If all inputs have equal scales, the result is that scale itself, except for per-channel scales
    along the channels.
    """
    if (dim or scales[0].numel() == 1) and all(torch.equal(scale, scales[0]) for scale in scales):
        return scales[0]
    rank = len(shapes[0])
    extents = [max([1] + [s.shape[i - rank] for s in scales if s.dim() >= rank - i]) for i in range(rank)]
    full = [s.expand([n if i == dim else extents[i] for i, n in enumerate(shape)]) for s, shape in zip(scales, shapes)]
    return torch.cat(full, dim)


def padded_parts(trace, tensors, dim):
    """The tensors of a concatenation, with every constant of zeros as a padding of the tensor beside it."""
    parts, before = [], 0
    for x in tensors:
        if trace.is_traced(x) or x.any():
            parts.append([x, before, 0])
            before = 0
        elif parts:
            parts[-1][2] += x.shape[dim]
        else:
            before += x.shape[dim]
    return [
        SpikePad.traced(trace, F.pad, x, [0, 0] * (x.dim() - 1 - dim) + [*pads]) if any(pads) else x
        for x, *pads in parts
    ]


MOST_PADDED = 2**27  # largest product of the extents that a padding adds: the zeros alone would fill the memory


class SpikePad(Rearrangement):
    """Zero padding of every dimension but the batch. pads: (left, right, top, bottom, front, back) as in F.pad.

    Negative values crop. The zeros of new channels get the lambda of the channel beside them. of_channels: whether
    channels are added or cropped.
    """

    fields = {"pads": several(whole(-4096, 4096), 2, 16), "of_channels": BOOL}  # noqa: RUF012
    is_measured = True

    def __init__(self, pads, of_channels=False):
        super().__init__()
        self.pads, self.of_channels = tuple(pads), of_channels

    @classmethod
    def traced(cls, trace, function, input, pad, mode="constant", value=None):
        if mode != "constant" or value not in (None, 0):
            trace.refuse(
                function,
                "only zeros and copies of pixels are supported: value=0, mode='reflect', 'replicate' or 'circular'",
            )
        pads, places = [*pad], 2 * (input.dim() - 1)
        if any(pads[places:]):
            trace.refuse(function, "the batch cannot be padded")
        pads = pads[:places] + [0] * (min(4, places) - len(pads))
        while len(pads) > min(4, places) and not any(pads[-2:]):
            pads = pads[:-2]
        of_channels = any(pads[places - 2 : places])
        return trace.record("pad", cls(pads, of_channels), [input], function(input, pad))

    @classmethod
    def contradiction(cls, config):
        pads = config.get("pads", ())
        if len(pads) % 2:
            return f"pads {pads}: use two for each dimension"
        added = [abs(before) + abs(after) + 1 for before, after in zip(pads[::2], pads[1::2])]
        return f"pads {pads}: use fewer, the zeros would fill the memory" if math.prod(added) > MOST_PADDED else None

    def rearranged(self, x):
        return F.pad(x, self.pads)

    def extra_repr(self):
        return f"pads={self.pads}"

    def on_pairs(self, merges):
        """Pairs pass a padding of height and width."""
        return None if self.of_channels else (self, merges[0].copied())

    def carry(self, values, shape):
        for back, (before, after) in enumerate(zip(self.pads[::2], self.pads[1::2]), 1):
            extent = values.shape[-back]
            if extent > 1:  # what is new gets the value beside it
                places = torch.arange(-before, extent + after, device=values.device).clamp(0, extent - 1)
                values = values.index_select(values.dim() - back, places)
        return values


class ViewOp(Rearrangement):
    """A new shape for every sample: [B, ...] -> [B, *shape]."""

    fields = {"shape": several(CHANNELS, 0, 8)}  # noqa: RUF012
    passes_scale = any_shape = True

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)

    @property
    def passes_shift(self):
        """A constant per channel passes a view that flattens a sample into one row of features."""
        return len(self.shape) == 1

    @classmethod
    def traced(cls, trace, function, input, *shape, **names):
        output = function(input, *shape, **names)
        if output.dtype != input.dtype or output.shape[:1] != input.shape[:1]:
            trace.refuse(
                function, f"the first dimension must stay the batch, as in x.view(x.size(0), -1), not {list(shape)}"
            )
        return trace.record("view", cls(output.shape[1:]), [input], output)

    def rearranged(self, x):
        if math.prod(x.shape[1:]) != math.prod(self.shape):
            raise ValueError(
                f"a view to {list(self.shape)} gets {list(x.shape[1:])}: give images of the size that the network was "
                "traced with"
            )
        if x.dim() > 4 and len(self.shape) == 3 and x.shape[-2:] == self.shape[-2:] and x.stride(-1) > 1:
            channels = x.movedim((-2, -1), (1, 2)).reshape(len(x), *self.shape[1:], self.shape[0])
            return channels.permute(0, 3, 1, 2)  # merged channels stay last in memory
        return x.reshape(len(x), *self.shape)

    def carried(self, values, shape):
        return self.carry(values, shape) if values.numel() > 1 else values.reshape(())

    def carry(self, values, shape):
        """As `Rearrangement.carry`. One value per channel stays one if the channels stay.

        Behind a view to more dimensions, the last ones keep one value if it left them.
        """
        values, same = values.view(*[1] * (len(shape) - values.dim()), *values.shape), 0
        if values.numel() == len(values) == self.shape[0]:
            return values.reshape(-1, *[1] * (len(self.shape) - 1))
        if len(self.shape) > 3:
            unchanged = [a == b and c == 1 for a, b, c in zip(shape[::-1], self.shape[::-1], values.shape[::-1])]
            same = [*unchanged, False].index(False)
        spread = values.expand(*shape[: len(shape) - same], *[1] * same)
        return spread.reshape(*self.shape[: len(self.shape) - same], *[1] * same)

    def on_pairs(self, merges):
        """Pairs pass a view that keeps the channels, or flattens a sample: each channel is then a block of features."""
        (merge,) = merges
        if not merge.signs.dim():
            return None
        keeps_channels = self.shape[0] == len(merge.signs) and merge.block == 1
        if len(self.shape) != 1 and not keeps_channels:
            return None
        block = self.shape[0] // len(merge.signs)
        return ViewOp((2 * self.shape[0], *self.shape[1:])), MergeSigns(merge.signs.clone(), block)

    def convert(self, setter, entry):
        """Give the lambdas or units the new shape. Raises ValueError if one channel would hold different lambdas."""
        node, value = entry.inputs[0], setter.value_of(entry.inputs[0])
        if value.dim():
            value = self.carry(value, setter.shapes[node])
            if value.dim() == 3:
                relative = value.flatten(1) / value.flatten(1).mean(1, keepdim=True)
                setter.check_same_scale(entry.name, relative.flatten())
                value = value.mean((1, 2), keepdim=True)
        setter.pass_on(node, entry.out, value)

    def targets(self, values, shapes, out_shape):
        spread = self.carry(values[0], shapes[0])
        return spread.amax((1, 2), keepdim=True) if spread.dim() == 3 else spread
