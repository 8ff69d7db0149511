"""The unit of every current: the activation that one unit of membrane potential stands for.

A layer with integer weights W_q = W * s_w that reads spikes of scale lambda_in has currents in the unit
lambda_in / s_w. All currents into one neuron share one unit. Where several branches meet, the unit minimizes the sum of
their rounding errors.
"""

import torch

from conversion.lambdas import Groups, largest_spikes, mixed_channels, spike_targets
from conversion.plan import first_measured
from options import FLOAT_BITS
from quantization import largest_integer, quantize_layer, round_layer
from spike_layers import ANALOG, CURRENT, SPIKES

LARGEST_INTEGER = 2**20  # largest threshold, bias or branch weight: sums of them stay exact in float32
LEAST_RATIO = 0.75  # smallest value / unit of a branch: its integer weight 1 is then a third too large
SAME_UNIT = 1 + 1e-5  # per-channel units within this factor count as one
CANDIDATES = 9  # units tried between the coarsest and the finest, by equal factors: more of them gained nothing
# The coarsest unit keeps the integers of its branch. It stays unless another unit reduces the error by more than 0.1 %
# of it plus 1e-9 of the current's power.
KEEPS_INTEGERS, LAST_BITS = 0.999, 1e-9
SMALLEST_MOST = 7  # largest weight of a sum of spikes at few bits: with a largest weight of 1, inputs could not differ
SAME_LAMBDA = 1.02  # per-channel lambdas within this factor count as one, so that integer weights stay as they are


class Units:
    """The units of currents and the lambdas of spikes in a planned graph, as far as they are known.

    scales: node of spikes -> lambda. units: node of currents -> unit. Both are scalar tensors or broadcastable to a
    sample ([C, 1, 1]). All tensors, and the network, are on the CPU.
    targets: node of spikes -> the lambda that its neuron aims at, before Vthr is rounded. peaks: node of spikes -> its
    largest value in one step: 1, or the window's size behind a folded pooling. `scales` and `targets` belong to a value
    of 1. keep_integers: the weights were finetuned with the scales that the conversion gives them (`weight_scales`).
    """

    def __init__(self, dag, plan, statistics, shapes, timesteps, per_channel, keep_integers=False):
        self.dag, self.plan, self.statistics, self.shapes = dag, plan, statistics, shapes
        self.timesteps, self.per_channel, self.keep_integers = timesteps, per_channel, keep_integers
        self.bits = max(layer.weight_bits for layer in dag.weighted_layers().values())  # for branches without weights
        self.is_float = self.bits == FLOAT_BITS
        self.most = 1 if self.is_float else largest_integer(self.bits)
        self.peaks = largest_spikes(dag, plan)
        self.mixed = mixed_channels(dag, plan, shapes)
        targets = spike_targets(dag, plan, statistics, shapes, timesteps, self.mixed)
        self.targets = {node: target / self.peaks[node] for node, target in targets.items()}
        self.components = current_components(dag, plan)
        self.scales, self.units = {}, {}

    def value_of(self, node):
        """The activation that one spike per step, or one unit of current, stands for: lambda or unit."""
        return self.scales[node] if self.plan.kinds[node] == SPIKES else self.units[node]

    def expected_value(self, node):
        """As `value_of`. For a later op: the lambda that its spikes aim at, or None for its currents."""
        if node in self.scales or node in self.units:
            return self.value_of(node)
        return self.targets.get(node)

    def added_value(self, op, node):
        """The `expected_value` of a node that `op` adds, per channel of the sum, or None."""
        value = self.expected_value(node)
        return None if value is None else op.value_added(value)

    def input_scales(self, node, op):
        """The lambda of the spikes that a layer reads: a scalar, or [C_in] if channels differ.

        The lambda of a later op is not known yet; the lambda that it aims at takes its place.
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
        """The unit of a current: activation per unit of membrane potential, a scalar or [C, 1, 1] ([N]).

        All branches into a neuron share it. Which unit depends on the branches:
        - One branch with weights W: its natural unit lambda_in / s_w, in which the integers fill their bit width.
        - Several branches: the unit of least error (`least_error_unit`). Spikes, and currents with another unit, that
          are added without weights get integer weights.
        - Only spikes without weights: the strongest gets the largest integer (`spike_sum_unit`).
        - Only the image: the unit is T, because the current per step is input / T and Vthr = lambda_out / T.
        Channels that are mixed later (`mixed_channels`) have one unit. The unit is never so fine that a threshold, bias
        or weight exceeds `LARGEST_INTEGER`.
        """
        if node in self.units:
            return self.units[node]
        layers, others = self.branches_of(node)
        if layers:
            natural = [self.natural_unit(*layer) for layer in layers]
            natural = natural if self.mixed.isdisjoint(self.components[node]) else [unit.max() for unit in natural]
            natural = torch.stack(torch.broadcast_tensors(*natural))
            unit = natural.amax(0)
            if len(layers) + len(others) > 1 and not self.is_float:
                unit = least_error_unit(self, natural, layers, others)
        elif others:
            values = [self.added_value(op, n) for op, n in others]
            unit = self.spike_sum_unit([value for value in values if value is not None])
        else:
            unit = torch.tensor(float(self.timesteps))
        if layers and not self.is_float:
            unit = torch.maximum(unit, self.largest_value(node, layers, others) / LARGEST_INTEGER)
        self.units.update(dict.fromkeys(self.components[node], unit))
        return unit

    def branches_of(self, node):
        """`layers, others`: the branches of a current. layers: (layer, node of spikes that it weighs) pairs.

        others: (op, node that it adds without weights) pairs.
        """
        layers, others, members = [], [], self.components[node]
        for entry in self.dag.ops.values():
            op, in_nodes = entry.op, entry.inputs
            if entry.out not in members:
                continue
            if op.adds:
                others += [(op, n) for n in in_nodes if n not in members and self.plan.kinds[n] != ANALOG]
            elif self.plan.kinds[in_nodes[0]] == SPIKES:
                layers.append((op, in_nodes[0]))
        return layers, others

    def natural_unit(self, op, node):
        """The unit in which the integers of a layer fill their bit width, a scalar or one per output channel.

        If the lambdas of the input channels differ, the integers are chosen again for W * lambda_in. Integers that were
        finetuned for these lambdas stay unchanged (`keep_integers`).
        """
        lambda_in = self.input_scales(node, op)
        if lambda_in.dim() and not self.keep_integers:
            weight = op.weight.detach() * op.input_view(lambda_in)
            return op.output_view(1 / op.per_output(quantize_layer(op, weight, op.weight_bits, self.per_channel)[1]))
        _, s_w = self.integers(op)
        per_weight = op.input_view(lambda_in) / s_w  # activation per integer step of each weight
        if not per_weight.dim():
            return per_weight
        unit = op.rows(per_weight.expand_as(op.weight)).mean(1)  # [C_out]
        return op.output_view(unit if unit.max() > SAME_UNIT * unit.min() else unit.mean())

    def largest_value(self, node, layers, others):
        """The largest lambda, |bias| or branch value at a current's neuron, as an activation."""
        members = self.components[node]
        values = [value.max() for op, n in others if (value := self.added_value(op, n)) is not None]
        for entry in self.dag.ops.values():
            out, op = entry.out, entry.op
            if out in self.targets and not members.isdisjoint(entry.inputs):
                values.append(self.targets[out].max())
            if out in members and getattr(op, "bias", None) is not None:
                values.append(op.bias.detach().abs().max())
        return torch.stack([value.float() for value in values] or [torch.zeros(())]).max()

    def spike_sum_unit(self, scales):
        """The unit of a sum of spikes without weights, from the lambdas of its inputs.

        The strongest input gets the largest integer of the bit width, at least `SMALLEST_MOST`. The unit is finer if
        the weakest input would get less than 1.
        """
        scales = torch.cat([scale.flatten() for scale in scales])
        if self.is_float:
            return scales.max() / self.most
        unit = scales.max() / max(self.most, SMALLEST_MOST)
        weakest = torch.where(scales > 0, scales, scales.max()).min()
        return torch.minimum(unit, weakest.clamp_min(scales.max() / LARGEST_INTEGER))

    def finest_unit(self, value):
        """The finest unit: `value` is `LARGEST_INTEGER` units."""
        return value / LARGEST_INTEGER

    def shares_unit(self, node, out):
        """Whether the plan gives the currents of two nodes one unit."""
        return node in self.components[out]

    def mean_square(self, node):
        """The mean square of the activations of a node, as a float."""
        return self.statistics[first_measured(self.dag, self.dag.writer(node))].square_o

    def integers(self, op):
        """`W_q, s_w` of a layer: those of the quantization if its weights still fit them, else quantized now.

        They do not fit after a change of the bit width, or if the layer was not quantized.
        """
        weight = op.weight.detach()
        if op.weight_scale is not None:
            weight_q = round_layer(op, weight, op.weight_scale, op.weight_bits)
            if torch.allclose(weight_q / op.weight_scale, weight, rtol=1e-5, atol=0):  # equal up to float rounding
                return weight_q, op.weight_scale
        return quantize_layer(op, weight, op.weight_bits, self.per_channel)

    def scale_in_unit(self, op, node, unit):
        """s_w of a layer that reads the spikes of a node, for currents in `unit`: lambda_in / unit, shaped for W."""
        per_input = op.input_view(self.input_scales(node, op))
        return per_input / op.weight_view(unit.flatten() if unit.dim() else unit)

    def weight_scales(self):
        """Op name -> s_w that the conversion will give the layer, for all layers with weights that read spikes."""
        return {
            name: self.scale_in_unit(entry.op, entry.inputs[0], self.unit_of(entry.out))
            for name, entry in self.dag.ops.items()
            if entry.op.is_trained
            and self.plan.kinds[entry.inputs[0]] == SPIKES
            and self.plan.kinds[entry.out] == CURRENT
        }


def current_components(dag, plan):
    """Node of currents -> the set of nodes that share its unit, because adds join them."""
    groups = Groups()
    for entry in dag.ops.values():
        if plan.kinds[entry.out] == CURRENT and takes_any_unit(entry.op):
            groups.join(entry.out, *(node for node in entry.inputs if entry.op.adds and is_free(dag, plan, node)))
    return {node: set(members) for members in groups.members() for node in members}


def takes_any_unit(op):
    """Whether the currents of an op can take any unit: true for layers with trained weights and for adds."""
    return op.is_trained or op.adds


def is_free(dag, plan, node):
    """Whether the currents of a node can take any unit."""
    name = dag.writer(node)
    return name is not None and plan.kinds[node] == CURRENT and takes_any_unit(dag.ops[name].op)


def least_error_unit(units, natural, layers, others):
    """The unit that minimizes the squared error of a neuron's current, from the coarsest to the finest natural unit.

    In the coarsest unit the integers of the finer branches are small, so their weights are rounded more coarsely. In a
    finer unit the largest weights of the coarser branches are clipped. The squared error of each weight is multiplied
    by the mean square of its input. `others`, spikes without weights, count with the error of their integer weight.
    natural: natural units of the branches, [branches, ...]. The result has the shape of one of them.
    """
    coarsest, finest = natural.amax(0), natural.amin(0)
    values = [(value, node) for op, node in others if (value := units.added_value(op, node)) is not None]
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
    """The coarsest unit, at most `unit`, in which every value is at least 1, so that `branch_weight` refuses none.

    A value of 0 belongs to a channel that no image excites and sets no limit.
    """
    for value in values:
        value = torch.where(value > 0, value, torch.inf)
        if unit.dim() == value.dim():
            unit = torch.minimum(unit, value.amin((1, 2), keepdim=True) if value.dim() == 3 else value)
        else:
            unit = unit.clamp_max(value.min())
    return unit


def unit_error(units, unit, layers, values):
    """Squared error of the current in a unit, for every output channel: [C_out].

    values: (value, node) pairs of the branches without weights.
    """
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
        gain_error = torch.where(ratio > 0, gain_error, 0.0)  # a channel that no image excites
        gain_error = gain_error.amax((1, 2)) if gain_error.dim() == 3 else gain_error
        total = total + gain_error
    return total
