"""Arithmetic with constants: a factor and a constant per channel, a constant per element, maps on the image."""

import torch
from torch import nn

from layers.activations import ScaledCurrent, SpikeBatchNorm
from layers.base import ANALOG, SPIKES, SpikeLayer
from runtime.rules import CHANNELS, several
from spike_tensor import SpikeTensor

SHAPE = several(CHANNELS, 1, 8)


class SpikeAffine(SpikeBatchNorm):
    """`weight * x + bias` per channel, written as arithmetic with constants: (x - mean) / std, 0.5 * x, 1 - x.

    `dag_rewrites.fold_batch_norms` folds it like a BatchNorm. On the image it stays ANN. Spikes that it only scales, by
    positive factors, pass unchanged and stand for scaled activations: lambda is multiplied. Anything else converts as
    a BatchNorm does.
    """

    passes_sums = rescales = True

    @property
    def passes_spikes(self):
        """It has integers, and sends currents, unless it only scales spikes."""
        return not hasattr(self, "weight_q")

    @property
    def carries_bias(self):
        """A mere factor of spikes has no bias."""
        return not self.passes_spikes

    def factors(self, dim):
        """The factors, broadcastable to a sample of `dim` dimensions; a scalar if all are equal."""
        weight = self.weight.detach()
        return weight[0] if (weight == weight[0]).all() else weight.view(-1, *[1] * (dim - 1))

    def current(self, x):
        if isinstance(x, SpikeTensor) and self.passes_spikes:
            return SpikeTensor.like(x.data, x.timesteps, x.scale_factor * self.factors(x.data.dim() - 1))
        return super().current(x)

    def largest_sum(self, largest_read):
        return largest_read[0] if self.passes_spikes else super().largest_sum(largest_read)

    def plan(self, place):
        """SPIKES for spikes that it only scales; else as a BatchNorm."""
        if place.reads[0] == SPIKES and place.before_neuron and self.only_scales():
            return SPIKES
        return super().plan(place)

    def convert(self, setter, entry):
        if setter.plan.kinds[entry.out] != SPIKES:
            super().convert(setter, entry)
            return
        node = entry.inputs[0]
        setter.scales[entry.out] = setter.scales[node] * self.factors(len(setter.shapes[node]))

    def targets(self, values, shapes, out_shape):
        return values[0] * self.factors(len(out_shape))

    def misfit(self, reads):
        if self.passes_spikes and set(reads) == {SPIKES} and self.only_scales():
            return SpikeLayer.misfit(self, reads)
        return super().misfit(reads)

    def held(self, inputs, output):
        if self.passes_spikes:
            return [("weight", self.weight.view(-1, *[1] * (output.dim() - 2)), output.shape[1:])]
        return super().held(inputs, output)

    def spike_operations(self, spikes):
        return 0.0 if self.passes_spikes else super().spike_operations(spikes)


class SpikeBiasMap(ScaledCurrent):
    """A constant for every element of a sample, `x + bias`; bias: [C, H, W] or [N].

    It holds what a zero padding makes different at the border, where a BatchNorm behind a ReLU is folded into a padded
    convolution. Converted, bias_q is added at every step, in the unit of the neuron behind it; weight_q is 1, or the
    integer weight of what it reads, if that has another unit.
    """

    fields = {"shape": SHAPE}  # noqa: RUF012
    is_linear = hands_on = adds = True

    def __init__(self, shape):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(tuple(shape)))

    @property
    def shape(self):
        """The shape of a sample."""
        return tuple(self.bias.shape)

    @property
    def may_turn_negative(self):
        return bool((self.bias < 0).any())

    @property
    def branch_weights(self):
        """The weight of its input, None for a current in its own unit."""
        return (None if (self.weight_q == 1).all() else self.weight_q,)

    @classmethod
    def parameters_of(cls, integers):
        return {name: values for name, values in integers.items() if name == "bias"}

    def activation(self, x):
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"a constant for every element of {list(self.shape)} is added to {list(x.shape[1:])}: give images of "
                "the size that the network was traced with"
            )
        return x + self.bias

    def refusal(self, place):
        return (
            f"{place.where} adds a constant for every element and has no ReLU behind it: add one, or put it directly "
            "behind a convolution or linear layer"
        )

    def convert(self, setter, entry):
        """Set an integer weight of 1, or more for what it reads in another unit, and the bias in integers."""
        node, unit = entry.inputs[0], setter.unit_of(entry.out)
        weight = torch.ones(()) if setter.is_float else torch.ones((), dtype=torch.int32)
        if not setter.shares_unit(node, entry.out):
            weight = setter.branch_weight(entry.name, node, unit)
        bias_q = (self.bias.detach() / unit).contiguous()
        is_image = setter.largest_read(entry) is None
        self.set_integers(weight, bias_q if is_image else setter.rounded(entry.name, bias_q))
        setter.largest[entry.out] = setter.largest_of(entry)

    def misfit(self, reads):
        has_integers = getattr(self, "weight_q", None) is not None and self.bias_q is not None
        return super().misfit(reads) if has_integers else "it has no weight_q or no bias_q"

    def held(self, inputs, output):
        return [(key, getattr(self, key), output.shape[1:]) for key in ("weight_q", "bias_q")]

    def ann_operations(self, shape, outputs):
        return 0.0, float(outputs)

    def spike_operations(self, spikes):
        return spikes.double().sum().item()  # one synapse per spike


class ImageAffine(SpikeLayer):
    """`weight * x + bias` with a factor for every element of the image, [C, H, W]. It stays ANN."""

    fields = {"shape": SHAPE}  # noqa: RUF012

    def __init__(self, shape):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(tuple(shape))), nn.Parameter(torch.zeros(tuple(shape)))

    @property
    def shape(self):
        """The shape of an image."""
        return tuple(self.weight.shape)

    def activation(self, x):
        if x.shape[1:] != self.shape:
            raise ValueError(f"the image is multiplied by {list(self.shape)} factors and is {list(x.shape[1:])}")
        return x * self.weight + self.bias

    def plan(self, place):
        if place.reads[0] != ANALOG:
            raise ValueError(f"{place.where} has a factor for every element, which only the image can have")
        return ANALOG

    def misfit(self, reads):
        return "it stays ANN"

    def ann_operations(self, shape, outputs):
        return float(outputs), 0.0
