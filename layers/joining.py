"""Layers that join or rearrange values: addition, concatenation, padding, view."""

import math

import torch
import torch.nn.functional as F

from layers.base import ANALOG, CURRENT, SPIKES, SpikeLayer, widened
from runtime.rules import CHANNELS, DIM, NONE, POTENTIALS, either, several, whole
from spike_tensor import Current, SpikeTensor


class SpikeAdd(SpikeLayer):
    """The sum of two inputs of the same shape.

    Converted, each input of spikes is multiplied by an integer weight (`branch_weights`) and becomes a current, so that
    all inputs of the neuron share one unit. An input that is already a current in this unit has the weight None.
    """

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

    @classmethod
    def traced(cls, trace, function, input, other, *, alpha=1):
        if isinstance(other, (int, float)) and other == 0:  # Python's sum(...) starts with 0
            return trace.record_nothing(torch.Tensor.clone, input)
        check_add(trace, function, input, other, alpha)
        return trace.record("add", cls(), [input, other], torch.add(input, other))

    @classmethod
    def traced_in_place(cls, trace, function, input, other, *, alpha=1):
        check_add(trace, function, input, other, alpha)
        return trace.record_in_place("add", cls(), [input, other], input.add_(other))

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
            return Current(x.data, x.timesteps, spikes=(y.data, weight_y))
        x, y = self.to_current(x, weight_x), self.to_current(y, weight_y)
        if x.constant and y.constant:
            return x.like(x.total() + y.total())
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
        for node in entry.inputs:
            kind, weight = setter.plan.kinds[node], None
            if kind == ANALOG:
                weight = 1 / unit
            elif kind == SPIKES or not setter.shares_unit(node, entry.out):
                weight = setter.branch_weight(entry.name, node, unit)
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


def check_add(trace, function, input, other, alpha):
    """Raise NotImplementedError unless this is a plain sum of two activations of the same shape."""
    trace.refuse_constants(function, input, other)
    if alpha != 1:
        trace.refuse(function, "only alpha=1 is supported, move the factor into the weights before it")
    if input.shape != other.shape:
        trace.refuse(function, f"the shapes {list(input.shape)} and {list(other.shape)} differ")


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
        return trace.record("concat", cls(dim), list(tensors), torch.cat(tensors, dim))

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
        if self.dim != 1:
            setter.check_same_scale(entry.name, torch.stack([value.max() for value in values]))
        joined = concat_scales(values, [setter.shapes[node] for node in entry.inputs], self.dim - 1)
        if self.dim != 1 and joined is not values[0]:
            joined = joined.mean()  # they are nearly equal: check_same_scale has passed
        if setter.plan.kinds[entry.out] == SPIKES:
            setter.scales[entry.out] = joined
        else:
            setter.units[entry.out] = joined
            setter.largest[entry.out] = setter.largest_of(entry)

    def targets(self, values, shapes, out_shape):
        return concat_scales(values, shapes, 0) if self.dim == 1 else torch.stack(values).amax(0)


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


class SpikePad(SpikeLayer):
    """Zero padding of height and width. pads: (left, right, top, bottom) as in F.pad; negative values crop."""

    fields = {"pads": several(whole(-4096, 4096), 4, 4)}  # noqa: RUF012
    is_linear = hands_on = passes_spikes = passes_sums = True

    def __init__(self, pads):
        super().__init__()
        self.pads = tuple(pads)

    @classmethod
    def traced(cls, trace, function, input, pad, mode="constant", value=None):
        if mode != "constant" or value not in (None, 0):
            trace.refuse(function, "only zeros are supported, mode='constant' with value 0")
        pads = [*pad, 0, 0, 0, 0]
        if input.dim() != 4 or any(pads[4:]):
            trace.refuse(
                function,
                "only height and width of [B, C, H, W] can be padded; a 1x1 convolution with rows of zeros adds "
                "channels",
            )
        return trace.record("pad", cls(pads[:4]), [input], function(input, pad))

    def activation(self, x):
        return F.pad(x, self.pads)

    def current(self, x):
        data = F.pad(x.total() if isinstance(x, Current) else x.data, self.pads)
        return x.like(data) if isinstance(x, Current) else SpikeTensor.like(data, x.timesteps, x.scale_factor)


class ViewOp(SpikeLayer):
    """A new shape for every sample: [B, ...] -> [B, *shape]."""

    fields = {"shape": several(CHANNELS, 0, 8)}  # noqa: RUF012
    is_linear = hands_on = passes_spikes = passes_sums = passes_scale = any_shape = True
    is_measured = False

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

    def activation(self, x):
        if math.prod(x.shape[1:]) != math.prod(self.shape):
            raise ValueError(
                f"a view to {list(self.shape)} gets {list(x.shape[1:])}: give images of the size that the network was "
                "traced with"
            )
        return x.reshape(len(x), *self.shape)

    def current(self, x):
        data = self.activation(x.total() if isinstance(x, Current) else x.data)
        if isinstance(x, Current):
            return x.like(data)
        scale = x.scale_factor
        if scale.numel() > 1:
            scale = scale.expand(x.data.shape[1:]).reshape(self.shape)
        return SpikeTensor.like(data, x.timesteps, scale)

    def convert(self, setter, entry):
        """Give the lambdas or units the new shape. Raises ValueError if one channel would hold different lambdas."""
        node, value = entry.inputs[0], setter.value_of(entry.inputs[0])
        if value.dim():
            value = value.expand(setter.shapes[node]).reshape(setter.shapes[entry.out])
            if value.dim() == 3:
                relative = value.flatten(1) / value.flatten(1).mean(1, keepdim=True)
                setter.check_same_scale(entry.name, relative.flatten())
                value = value.mean((1, 2), keepdim=True)
        setter.pass_on(node, entry.out, value)

    def targets(self, values, shapes, out_shape):
        spread = values[0].expand(shapes[0]).reshape(out_shape)
        return spread.amax((1, 2), keepdim=True) if spread.dim() == 3 else spread
