"""Integer weights, thresholds and scales: `SpikeSetter` turns the layers of a planned graph into spiking ones."""

import torch

from conversion.units import LEAST_RATIO, SAME_LAMBDA, Units
from quantization import round_layer
from spike_layers import ANALOG, SPIKES
from spike_neurons import IFNeuron

LARGEST_INT32 = 2**30  # largest integer of a converted network: the sum of two still fits into int32
BELOW_A_TIE = 1 - 2**-12  # about 2,000 float32 roundings: more than the rounding error of a float sum of currents


class SpikeSetter(Units):
    """Walks along the graph once and lets each spiking layer choose its integers (`SpikeLayer.convert`).

    largest: node of currents -> bound of |current| per step, or None for float currents.
    """

    def __init__(self, dag, plan, statistics, shapes, options, keep_integers=False):
        super().__init__(dag, plan, statistics, shapes, options.timesteps, options.weights_per_channel, keep_integers)
        self.reset_mode, self.initial_potential = options.reset_mode, options.start
        self.largest = {}

    def convert(self):
        """Convert every spiking op in place, in order. Raises ValueError for what cannot be converted (`check_range`).

        The bounds and units of a layer come from the layers before it, so the order matters.
        """
        for name, entry in self.dag.ops.items():
            if entry.op.folded:
                entry.op.folded = name in self.plan.folded
            if self.plan.kinds[entry.out] != ANALOG:
                entry.op.spiking = True
                if entry.op.reads_windows:
                    self.check_channels(entry)
                entry.op.convert(self, entry)

    def rounded(self, name, value, least=None):
        """`value` as int32, at least `least`; unchanged for float weights. Raises ValueError if it is out of range."""
        self.check_range(name, value)
        if self.is_float:
            return value
        value = value.round().to(torch.int32)
        return value if least is None else value.clamp_min(least)

    def check_range(self, name, value):
        """Raise ValueError if a bias or threshold of op `name` is not finite, or beyond `LARGEST_INT32`."""
        largest = value.abs().max().item()
        if not largest <= (torch.finfo(torch.float32).max if self.is_float else LARGEST_INT32):  # also for NaN
            raise ValueError(
                f"{self.dag.where(name)} needs a threshold or a bias of {largest:.3g}, beyond the integers of a chip: "
                "its weights or biases are of very different sizes, or not finite, train the network again"
            )

    def largest_of(self, entry):
        """The bound of |current| per step that an op sends, or None if its currents are floats."""
        largest = self.largest_read(entry)
        return None if largest is None else entry.op.largest_sum(largest)

    def largest_read(self, entry):
        """The bound per step of each input of an op, 1 for spikes. None if any input holds floats."""
        largest = [None if self.plan.kinds[node] == ANALOG else self.largest.get(node, 1) for node in entry.inputs]
        return None if self.is_float or None in largest else largest

    def set_weight(self, op, entry):
        """Set integer weights and biases of a convolution or linear layer, in the unit of its neuron.

        A layer that reads the image keeps its quantized weights and a float bias: its current is computed in float.
        Raises ValueError for weights that are not finite, and for biases out of range.
        """
        node, unit = entry.inputs[0], self.unit_of(entry.out)
        if not torch.isfinite(op.weight).all():
            raise ValueError(f"{entry.where} has NaN or infinite weights, train the network again")
        unit_per_output = unit.flatten() if unit.dim() else unit  # [C_out] or a scalar
        from_image = self.plan.kinds[node] == ANALOG
        if from_image:
            weight_q, scale = self.integers(op)
            op.weight.data = weight_q / scale  # these weights compute the image's current
        else:
            scale = self.scale_in_unit(op, node, unit)
            weight_q = round_layer(op, op.weight.detach() * scale, 1.0, op.weight_bits)
        op.set_weight_scale(scale)
        bias_q = None if op.bias is None else op.bias.detach() / unit_per_output
        if not self.is_float:
            weight_q = weight_q.to(torch.int8)
            bias_q = None if bias_q is None or from_image else self.rounded(entry.name, bias_q)
        op.set_integers(weight_q, bias_q, op.output_view(unit_per_output))
        op.largest_input = self.peaks.get(node, 1)
        self.largest[entry.out] = self.largest_of(entry)

    def branch_weight(self, name, node, unit):
        """The weight of an unweighted branch (spikes, or a current with another unit) at a neuron's add.

        It is the branch's value divided by `unit`, rounded to an integer of at least 1. Raises ValueError where the
        ratio is below `LEAST_RATIO`, where rounding would be too coarse.
        """
        ratio = self.value_of(node) / unit
        if not self.is_float and ratio.min() < LEAST_RATIO:
            raise ValueError(
                f"{self.dag.where(name)} adds values that are finer than a step of the {self.bits}-bit weights "
                "beside them: use more bits, or put a ReLU behind what it adds"
            )
        return self.rounded(name, ratio, least=1)

    def pass_on(self, node, out, value):
        """Give `out` the lambda or unit `value` of `node`."""
        if self.plan.kinds[out] == SPIKES:
            self.scales[out] = value
        else:
            self.units[out], self.largest[out] = value, self.largest[node]

    def check_same_scale(self, name, values):
        """Raise ValueError if one channel would hold spikes of different lambdas (factor above `SAME_LAMBDA`)."""
        if values.max() > SAME_LAMBDA * values.min():
            raise ValueError(
                f"{self.dag.where(name)} puts spikes of different scales into one channel, join them as channels "
                "(torch.cat along dim=1), or keep the channels of a view"
            )

    def check_channels(self, entry):
        """Raise ValueError if an op reads channels in which the lambda or unit differs from place to place."""
        node = entry.inputs[0]
        if self.plan.kinds[node] == ANALOG:
            return
        value, places = self.value_of(node), len(self.shapes[node]) - 1
        if value.numel() > 1 and any(extent > 1 for extent in value.shape[value.dim() - places :]):
            raise ValueError(
                f"{entry.where} reads channels that hold values of different scales, because a permutation has mixed "
                "the channels before it: use one scale per layer (--per_channel none), and give channels no factors "
                "of their own before it"
            )

    def set_neuron(self, entry, unit, largest):
        """Create the neuron of an op: Vthr = lambda_out / unit, and the lambda that this Vthr stands for.

        Vthr is rounded to an integer of at least 1 unless currents are floats. Then lambda = Vthr * unit. unit, Vthr
        and lambda are scalars or [C, 1, 1] ([N] behind a linear layer). largest: bound of |current| per step, None for
        float currents. Raises ValueError if Vthr is out of range.
        """
        op, target = entry.op, self.targets[entry.out]
        target = target.squeeze() if target.numel() == 1 else target
        if not target.max() > 0:  # no calibration image excites this layer: use the scale of its input
            target = (unit.max() * max(largest or 1, 1)).minimum(unit * LARGEST_INT32)
        if largest is None and (self.reset_mode == "zero" or self.initial_potential in (0, 1)):
            # lambda is an activation that some neuron has. Its current would equal Vthr, and the last bit of a float
            # sum would decide whether it fires now or a step later.
            target = target * BELOW_A_TIE
        Vthr = target / unit
        self.check_range(entry.name, Vthr)
        if largest is not None:
            is_cut_off = target >= self.plan.largest_lambda(entry, self.timesteps)
            Vthr = torch.where(is_cut_off, Vthr.floor(), Vthr.round()).clamp_min(1).to(torch.int32)
        initial = Vthr * self.initial_potential
        if largest is not None:
            initial = initial.floor().to(torch.int32)
        op.neuron = IFNeuron(Vthr, Vthr * unit, initial, self.reset_mode, None if largest is None else int(largest))
        self.scales[entry.out] = Vthr * unit
