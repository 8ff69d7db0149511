"""The unit of every current: the activation that one unit of membrane potential stands for.

A layer with integer weights W_q = W * s_w reads spikes of scale lambda_in in the unit lambda_in / s_w. All that flows
into one neuron shares one unit, chosen where several branches meet to minimize their rounding errors together.
"""

import torch

from conversion.lambdas import Groups, largest_spikes, spike_targets
from quantization import FLOAT_BITS, largest_integer, quantize_layer, round_layer
from spike_layers import ANALOG, CURRENT, SPIKES

LARGEST_INTEGER = 2**20  # of thresholds, biases and weights of branches: sums of them stay exact in float32
LEAST_RATIO = 0.75  # of a branch's value and the unit beside it: below, its integer weight 1 is a third too large
SAME_UNIT = 1 + 1e-5  # per-channel units within this factor are one
CANDIDATES = 9  # units tried between the coarsest and the finest, by equal factors: finer ones gained nothing more
KEEPS_INTEGERS, LAST_BITS = 0.999, 1e-9  # of the error, of the current's power: integers stay unless more is gained
SMALLEST_MOST = 7  # the largest weight of a sum of spikes at few bits: so that 1 bit can tell one input from another
SAME_LAMBDA = 1.02  # per-channel lambdas within this factor count as one, so that integer weights stay as they are


class Units:
    """The units of a planned graph's currents, and the scales of its spikes, as far as they are known.

    scales: node of spikes -> lambda. units: node of currents -> unit. Both are scalar tensors or broadcastable to a
    sample ([C, 1, 1]). All of them, and the network, are on the CPU.
    targets: node of spikes -> the lambda its neuron aims at, before Vthr is rounded. peaks: node of spikes -> the most
    that it holds at a step: 1, or behind a folded pooling the size of its window; `scales` and `targets` are of one.
    keep_integers: the weights were finetuned on the scales that they will have (`weight_scales`).
    """

    def __init__(self, dag, plan, statistics, shapes, timesteps, per_channel, keep_integers=False):
        self.dag, self.plan, self.statistics, self.shapes = dag, plan, statistics, shapes
        self.timesteps, self.per_channel, self.keep_integers = timesteps, per_channel, keep_integers
        self.bits = max(layer.weight_bits for layer in dag.weighted_layers().values())  # where no layer gives them
        self.is_float = self.bits == FLOAT_BITS
        self.most = 1 if self.is_float else largest_integer(self.bits)
        self.peaks = largest_spikes(dag, plan)
        targets = spike_targets(dag, plan, statistics, shapes)
        self.targets = {node: target / self.peaks[node] for node, target in targets.items()}
        self.components = current_components(dag, plan)
        self.scales, self.units = {}, {}

    def value_of(self, node):
        """The activation that a spike, or a unit of current, stands for."""
        return self.scales[node] if self.plan.kinds[node] == SPIKES else self.units[node]

    def expected_value(self, node):
        """As `value_of`; for spikes of a later op the lambda that it aims at, for its currents None."""
        if node in self.scales or node in self.units:
            return self.value_of(node)
        return self.targets.get(node)

    def input_scales(self, node, op):
        """lambda of the spikes that a layer reads: one number, or one per input channel where they differ.

        What a later op sends is not known yet; it counts as the lambda that it aims at.
        """
        scale = self.expected_value(node).float()
        if scale.numel() == 1:
            return scale.squeeze()
        if not self.is_float and scale.max() <= SAME_LAMBDA * scale.min():
            return scale.mean()
        full = scale.expand(self.shapes[node])
        if op.spatial and scale.numel() > len(full):  # several lambdas within a channel
            return scale.mean()
        return (full if not op.spatial else full[:, 0, 0]).contiguous()

    def unit_of(self, node):
        """Activation per unit of membrane for a current; the branches of a neuron share it.

        A branch with weights W and input scale lambda_in has the natural unit lambda_in / s_w, in which its integers
        fill their bit width; of several branches `least_error_unit` chooses. Spikes, and currents with a unit of their
        own, that are added without weights get integer weights; alone, one in which the strongest gets the largest
        integer. A current that comes only from the image has the unit T: input / T per step, Vthr = lambda_out / T. No
        unit is so fine that a threshold, bias or weight leaves the exact integers.
        """
        if node in self.units:
            return self.units[node]
        layers, others = self.branches_of(node)
        if layers:
            natural = torch.stack(torch.broadcast_tensors(*[self.natural_unit(*layer) for layer in layers]))
            unit = natural.amax(0)
            if len(layers) + len(others) > 1 and not self.is_float:
                unit = least_error_unit(self, natural, layers, others)
        elif others:
            unit = self.spike_sum_unit([self.expected_value(n) for n in others])
        else:
            unit = torch.tensor(float(self.timesteps))
        if layers and not self.is_float:
            unit = torch.maximum(unit, self.largest_value(node, layers, others) / LARGEST_INTEGER)
        self.units.update(dict.fromkeys(self.components[node], unit))
        return unit

    def branches_of(self, node):
        """What flows into a current: (layer, the spikes it reads) of weighted layers, and nodes without weights."""
        layers, others, members = [], [], self.components[node]
        for entry in self.dag.ops.values():
            op, in_nodes = entry.op, entry.inputs
            if entry.out not in members:
                continue
            if op.adds:
                others += [n for n in in_nodes if n not in members and self.plan.kinds[n] != ANALOG]
            elif self.plan.kinds[in_nodes[0]] == SPIKES:
                layers.append((op, in_nodes[0]))
        return layers, others

    def natural_unit(self, op, node):
        """The unit in which the integers of a layer fill their bit width.

        Where the spikes of its input channels differ, the integers weigh them too, and are chosen anew; but those that
        were finetuned for these spikes stay as they are.
        """
        lambda_in = self.input_scales(node, op)
        if lambda_in.dim() and not self.keep_integers:
            weight = op.weight.detach() * op.input_view(lambda_in)
            return op.output_view(1 / op.per_output(quantize_layer(op, weight, op.weight_bits, self.per_channel)[1]))
        _, s_w = self.integers(op)
        per_weight = op.input_view(lambda_in) / s_w  # what an integer of each weight stands for
        if not per_weight.dim():
            return per_weight
        unit = op.rows(per_weight.expand_as(op.weight)).mean(1)  # [C_out]
        return op.output_view(unit if unit.max() > SAME_UNIT * unit.min() else unit.mean())

    def largest_value(self, node, layers, others):
        """The largest threshold, bias or branch at a current's neuron, in units of activation."""
        members = self.components[node]
        values = [value.max() for value in map(self.expected_value, others) if value is not None]
        for entry in self.dag.ops.values():
            out, op = entry.out, entry.op
            if out in self.targets and not members.isdisjoint(entry.inputs):
                values.append(self.targets[out].max())
            if out in members and getattr(op, "bias", None) is not None:
                values.append(op.bias.detach().abs().max())
        return torch.stack([value.float() for value in values] or [torch.zeros(())]).max()

    def spike_sum_unit(self, scales):
        """The unit of a sum of spikes alone: the strongest gets the largest integer, at few bits 7, the weakest 1."""
        scales = torch.cat([scale.flatten() for scale in scales])
        if self.is_float:
            return scales.max() / self.most
        unit = scales.max() / max(self.most, SMALLEST_MOST)
        weakest = torch.where(scales > 0, scales, scales.max()).min()
        return torch.minimum(unit, weakest.clamp_min(scales.max() / LARGEST_INTEGER))

    def finest_unit(self, value):
        """The unit in which `value` is still an exact integer."""
        return value / LARGEST_INTEGER

    def shares_unit(self, node, out):
        """Whether the currents of two nodes share one unit by the plan."""
        return node in self.components[out]

    def mean_square(self, node):
        """The mean square of the activations of a node."""
        name = self.dag.writer(node)
        while name not in self.statistics:  # what a concatenation, a view holds: of its first input
            name = self.dag.writer(self.dag.ops[name].inputs[0])
        return self.statistics[name].square_o

    def integers(self, op):
        """`W_q, s_w` of a layer: as it was quantized, else (other bit width, not quantized yet) quantized now."""
        weight = op.weight.detach()
        if op.weight_scale is not None:
            weight_q = round_layer(op, weight, op.weight_scale, op.weight_bits)
            if torch.allclose(weight_q / op.weight_scale, weight, rtol=1e-5, atol=0):
                return weight_q, op.weight_scale
        return quantize_layer(op, weight, op.weight_bits, self.per_channel)

    def scale_in_unit(self, op, node, unit):
        """s_w of a layer that reads the spikes of a node: a spike's value over that of one integer step."""
        per_input = op.input_view(self.input_scales(node, op))
        return per_input / op.weight_view(unit.flatten() if unit.dim() else unit)

    def weight_scales(self):
        """Op name -> s_w that the conversion will give the layers that read spikes."""
        return {
            name: self.scale_in_unit(entry.op, entry.inputs[0], self.unit_of(entry.out))
            for name, entry in self.dag.ops.items()
            if entry.op.is_trained
            and self.plan.kinds[entry.inputs[0]] == SPIKES
            and self.plan.kinds[entry.out] == CURRENT
        }


def current_components(dag, plan):
    """Node of currents -> all nodes of currents that adds join, and that so share a unit."""
    groups = Groups()
    for entry in dag.ops.values():
        if plan.kinds[entry.out] == CURRENT and takes_any_unit(entry.op):
            groups.join(entry.out, *(node for node in entry.inputs if entry.op.adds and is_free(dag, plan, node)))
    return {node: set(members) for members in groups.members() for node in members}


def takes_any_unit(op):
    """Whether the currents of an op can take any unit: those of a layer with weights, or of an add, can."""
    return op.is_trained or op.adds


def is_free(dag, plan, node):
    """Whether the currents of a node can take any unit."""
    name = dag.writer(node)
    return name is not None and plan.kinds[node] == CURRENT and takes_any_unit(dag.ops[name].op)


def least_error_unit(units, natural, layers, others):
    """The unit with the least squared error of a neuron's current, between the coarsest and the finest natural one.

    In the coarsest the integers of the finer branches are small, so their weights are rounded again; in a finer one
    the largest weights of the coarser branches are cut off. The error of a weight counts as much as the mean square
    of what it reads; so does that of the whole weight which each of `others`, spikes without weights, gets.
    """
    coarsest, finest = natural.amax(0), natural.amin(0)
    values = [(value, node) for node in others if (value := units.expected_value(node)) is not None]
    shares = torch.logspace(0, (finest / coarsest).min().log2().item(), CANDIDATES, base=2.0).tolist()
    candidates = [coarsest * share for share in shares]
    for value, _ in values[:1]:
        wholes = (value.max() / coarsest.max()).floor().clamp_min(1)
        candidates += [coarsest * (value.max() / (wholes + k) / coarsest.max()) for k in (0, 1)]
    if values:
        candidates.append(unit_within(coarsest, [value for value, _ in values]))
    errors = torch.stack([unit_error(units, unit, layers, values) for unit in candidates])  # [candidates, C_out]
    power = sum(op.weight.detach().square().mean() * units.mean_square(node) for op, node in layers)
    errors[0] = KEEPS_INTEGERS * errors[0] - LAST_BITS * power
    if not coarsest.dim():
        errors = errors.sum(1, keepdim=True)
    best = torch.stack([unit.flatten() for unit in candidates]).gather(0, errors.argmin(0, keepdim=True))
    return best.view(coarsest.shape)


def unit_within(unit, values):
    """The coarsest unit up to `unit` of which every value is at least one whole, so that none has to be refused.

    A value of 0, of a channel that no image excites, can have any.
    """
    for value in values:
        value = torch.where(value > 0, value, torch.inf)
        if unit.dim() == value.dim():
            unit = torch.minimum(unit, value.amin((1, 2), keepdim=True) if value.dim() == 3 else value)
        else:
            unit = unit.clamp_max(value.min())
    return unit


def unit_error(units, unit, layers, values):
    """Mean squared error of the current in a unit, for every output channel: [C_out]."""
    total = 0.0
    for op, node in layers:
        weight = op.weight.detach()
        per_weight = op.weight_view(unit.flatten() if unit.dim() else unit)
        per_weight = per_weight / op.input_view(units.input_scales(node, op))
        rounded = round_layer(op, weight / per_weight, 1.0, op.weight_bits) * per_weight
        total = total + op.rows((rounded - weight).square()).sum(1) * units.mean_square(node)
    for value, node in values:
        ratio = value / unit
        gain_error = (ratio.round().clamp_min(1) / ratio - 1).square()
        gain_error = gain_error * units.mean_square(node)
        gain_error = torch.where(ratio < LEAST_RATIO, torch.inf, gain_error)  # `branch_weight` refuses it
        gain_error = torch.where(ratio > 0, gain_error, 0.0)  # of what no image excites
        gain_error = gain_error.amax((1, 2)) if gain_error.dim() == 3 else gain_error
        total = total + gain_error
    return total
