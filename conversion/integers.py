"""Integer weights, thresholds and scales: `SpikeSetter` turns the layers of a planned graph into spiking ones."""

from collections import defaultdict

import torch

from conversion.plan import ANALOG, CURRENT, SPIKES
from dag_rewrites import is_trained, writer
from quantization import FLOAT_BITS, largest_integer, quantize_layer, round_layer
from spike_layers import (
    ConcatOp,
    SignedReLU,
    SpikeAdd,
    SpikeAvgPool2d,
    SpikeBatchNorm,
    SpikeMaxPool2d,
    SpikePad,
    SpikeReLU,
    ViewOp,
    concat_scales,
)
from spike_neurons import IFNeuron

LARGEST_INTEGER = 2**20  # of thresholds, biases and weights of branches: sums of them stay exact in float32

LARGEST_INT32 = 2**30  # of any integer of a converted network, so that the sum of two does not overflow

LEAST_RATIO = 0.75  # of a branch's value and the unit beside it: below, its integer weight 1 is a third too large

BELOW_A_TIE = 1 - 2**-12  # some 2,000 last bits of a float32

SAME_UNIT = 1 + 1e-5  # per-channel units within this factor are one

SAME_LAMBDA = 1.02  # per-channel lambdas within this factor count as one, so that integer weights stay as they are


class SpikeSetter:
    """Turns the layers of a planned graph into spiking ones, in one walk along the graph.

    scales: node of spikes -> lambda. units: node of currents -> unit. Both are scalar tensors or broadcastable to a
    sample ([C, 1, 1]). largest: node of currents -> bound of |current| per step, None where currents are not integers.
    All of them, and the network, are on the CPU.
    targets: node of spikes -> the lambda its neuron aims at, before Vthr is rounded. peaks: node of spikes -> the most
    that it holds at a step: 1, or behind a folded pooling the size of its window; `scales` and `targets` are of one.
    keep_integers: the weights were finetuned on the scales that they will have (`weight_scales`).
    """

    def __init__(
        self,
        dag,
        plan,
        statistics,
        shapes,
        timesteps,
        per_channel,
        reset_mode="subtraction",
        initial_potential=0.5,
        keep_integers=False,
    ):
        self.dag, self.plan, self.statistics, self.shapes = dag, plan, statistics, shapes
        self.timesteps, self.per_channel = timesteps, per_channel
        self.reset_mode, self.initial_potential, self.keep_integers = reset_mode, initial_potential, keep_integers
        self.bits = max(layer.weight_bits for layer in dag.weighted_layers().values())  # where no layer gives them
        self.is_float = self.bits == FLOAT_BITS
        self.most = 1 if self.is_float else largest_integer(self.bits)
        self.peaks = self.largest_spikes()
        self.targets = {node: target / self.peaks[node] for node, target in self.spike_targets().items()}
        self.components = self.current_components()
        self.scales, self.units, self.largest = {}, {}, {}

    def convert(self):
        """Walk the graph once, in order."""
        setters = {
            SpikeReLU: self.set_relu,
            SignedReLU: self.set_relu,
            SpikeAvgPool2d: self.set_avg_pool,
            SpikeMaxPool2d: self.set_same,
            SpikeBatchNorm: self.set_batch_norm,
            SpikeAdd: self.set_add,
            ConcatOp: self.set_concat,
            SpikePad: self.set_same,
            ViewOp: self.set_view,
        }
        for name, entry in self.dag.ops.items():
            op, (out,) = entry["op"], entry["out_nodes"]
            if isinstance(op, SpikeAvgPool2d):
                op.folded = name in self.plan.folded
            if self.plan.kinds[out] not in (CURRENT, SPIKES):
                continue
            op.spiking = True
            setter = setters.get(type(op), self.set_weight)
            setter(name, op, entry["in_nodes"], out)

    # lambda_out

    def largest_spikes(self):
        """Node of spikes -> the most that one sample holds there at a step (`peaks`)."""
        peaks = {}
        for name, entry in self.dag.ops.items():
            (out,), op = entry["out_nodes"], entry["op"]
            if self.plan.kinds[out] != SPIKES:
                continue
            passed = 1 if name in self.plan.firing else max(peaks[node] for node in entry["in_nodes"])
            peaks[out] = op.window if name in self.plan.folded else passed
        return peaks

    def spike_targets(self):
        """Node of spikes -> the lambda to aim at, a tensor; spikes that a concatenation joins share the largest.

        Where channels have lambdas of their own they keep them. A ReLU with a ceiling never aims above it, for its
        neuron has to stop there.
        """
        if any(self.statistics[name].scales.dim() for name in self.plan.firing):
            return self.channel_targets()
        targets, groups, ceilings = {}, Groups(), {}
        for name, entry in self.dag.ops.items():
            (out,) = entry["out_nodes"]
            if self.plan.kinds[out] != SPIKES:
                continue
            if name in self.plan.firing:
                targets[out] = torch.tensor(self.statistics[name].max_o)
            else:
                groups.join(out, *entry["in_nodes"])
            ceilings[out] = getattr(entry["op"], "ceiling", None) or float("inf")
        for members in groups.members():
            shared = torch.stack([targets[node] for node in members if node in targets] or [torch.zeros(())]).max()
            targets.update(dict.fromkeys(members, shared))
        return {node: target.clamp_max(ceilings[node]) for node, target in targets.items()}

    def channel_targets(self):
        """Node of spikes -> the lambdas to aim at, by channel, in the shape of a sample: [C, 1, 1] or [N]."""
        targets = {}
        for name, entry in self.dag.ops.items():
            (out,), op, inputs = entry["out_nodes"], entry["op"], [targets.get(node) for node in entry["in_nodes"]]
            if self.plan.kinds[out] != SPIKES:
                continue
            if name in self.plan.firing:
                targets[out] = self.statistics[name].scales.clamp_max(getattr(op, "ceiling", None) or float("inf"))
            elif isinstance(op, ConcatOp):
                shapes = [self.shapes[node] for node in entry["in_nodes"]]
                targets[out] = concat_scales(inputs, shapes, 0) if op.dim == 1 else torch.stack(inputs).amax(0)
            elif isinstance(op, ViewOp):
                spread = inputs[0].expand(self.shapes[entry["in_nodes"][0]]).reshape(self.shapes[out])
                targets[out] = spread.amax((1, 2), keepdim=True) if spread.dim() == 3 else spread
            else:
                targets[out] = inputs[0]
        return targets

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

    # unit

    def current_components(self):
        """Node of currents -> all nodes of currents that adds join, and that so share a unit."""
        groups = Groups()
        for entry in self.dag.ops.values():
            (out,), op = entry["out_nodes"], entry["op"]
            if self.plan.kinds[out] == CURRENT and (is_trained(op) or isinstance(op, SpikeAdd)):
                groups.join(out, *(n for n in entry["in_nodes"] if isinstance(op, SpikeAdd) and self.shares_unit(n)))
        return {node: set(members) for members in groups.members() for node in members}

    def shares_unit(self, node):
        """Whether the currents of a node can take any unit: those of a layer with weights, or of an add, can."""
        name = writer(self.dag, node)
        if name is None or self.plan.kinds[node] != CURRENT:
            return False
        op = self.dag.ops[name]["op"]
        return is_trained(op) or isinstance(op, SpikeAdd)

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
                unit = self.least_error_unit(natural, layers, others)
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
            op, in_nodes = entry["op"], entry["in_nodes"]
            if entry["out_nodes"][0] not in members:
                continue
            if isinstance(op, SpikeAdd):
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

    def least_error_unit(self, natural, layers, others):
        """The unit with the least squared error of a neuron's current, between the coarsest and the finest natural one.

        In the coarsest the integers of the finer branches are small, so their weights are rounded again; in a finer one
        the largest weights of the coarser branches are cut off. The error of a weight counts as much as the mean square
        of what it reads; so does that of the whole weight which each of `others`, spikes without weights, gets.
        """
        coarsest, finest = natural.amax(0), natural.amin(0)
        values = [(value, node) for node in others if (value := self.expected_value(node)) is not None]
        shares = torch.logspace(0, (finest / coarsest).min().log2().item(), 9, base=2.0).tolist()
        candidates = [coarsest * share for share in shares]
        for value, _ in values[:1]:
            wholes = (value.max() / coarsest.max()).floor().clamp_min(1)
            candidates += [coarsest * (value.max() / (wholes + k) / coarsest.max()) for k in (0, 1)]
        if values:
            candidates.append(self.unit_within(coarsest, [value for value, _ in values]))
        errors = torch.stack([self.unit_error(unit, layers, values) for unit in candidates])  # [candidates, C_out]
        power = sum(op.weight.detach().square().mean() * self.mean_square(node) for op, node in layers)
        errors[0] = 0.999 * errors[0] - 1e-9 * power  # integers stay where nothing but float32's last bits is gained
        if not coarsest.dim():
            errors = errors.sum(1, keepdim=True)
        best = torch.stack([unit.flatten() for unit in candidates]).gather(0, errors.argmin(0, keepdim=True))
        return best.view(coarsest.shape)

    @staticmethod
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

    def unit_error(self, unit, layers, values):
        """Mean squared error of the current in a unit, for every output channel: [C_out]."""
        total = 0.0
        for op, node in layers:
            weight = op.weight.detach()
            per_weight = op.weight_view(unit.flatten() if unit.dim() else unit)
            per_weight = per_weight / op.input_view(self.input_scales(node, op))
            rounded = round_layer(op, weight / per_weight, 1.0, op.weight_bits) * per_weight
            total = total + op.rows((rounded - weight).square()).sum(1) * self.mean_square(node)
        for value, node in values:
            ratio = value / unit
            gain_error = (ratio.round().clamp_min(1) / ratio - 1).square()
            gain_error = gain_error * self.mean_square(node)
            gain_error = torch.where(ratio < LEAST_RATIO, torch.inf, gain_error)  # `branch_weight` refuses it
            gain_error = torch.where(ratio > 0, gain_error, 0.0)  # of what no image excites
            gain_error = gain_error.amax((1, 2)) if gain_error.dim() == 3 else gain_error
            total = total + gain_error
        return total

    def mean_square(self, node):
        """The mean square of the activations of a node."""
        name = writer(self.dag, node)
        while name not in self.statistics:  # what a concatenation, a view holds: of its first input
            name = writer(self.dag, self.dag.ops[name]["in_nodes"][0])
        return self.statistics[name].square_o

    def largest_value(self, node, layers, others):
        """The largest threshold, bias or branch at a current's neuron, in units of activation."""
        members = self.components[node]
        values = [value.max() for value in map(self.expected_value, others) if value is not None]
        for entry in self.dag.ops.values():
            (out,), op = entry["out_nodes"], entry["op"]
            if out in self.targets and not members.isdisjoint(entry["in_nodes"]):
                values.append(self.targets[out].max())
            if out in members and getattr(op, "bias", None) is not None:
                values.append(op.bias.detach().abs().max())
        return torch.stack([value.float() for value in values] or [torch.zeros(())]).max()

    def expected_value(self, node):
        """As `value_of`; for spikes of a later op the lambda that it aims at, for its currents None."""
        if node in self.scales or node in self.units:
            return self.value_of(node)
        return self.targets.get(node)

    def value_of(self, node):
        """The activation that a spike, or a unit of current, stands for."""
        return self.scales[node] if self.plan.kinds[node] == SPIKES else self.units[node]

    def integers(self, op):
        """`W_q, s_w` of a layer: as it was quantized, else (other bit width, not quantized yet) quantized now."""
        weight = op.weight.detach()
        if op.weight_scale is not None:
            weight_q = round_layer(op, weight, op.weight_scale, op.weight_bits)
            if torch.allclose(weight_q / op.weight_scale, weight, rtol=1e-5, atol=0):
                return weight_q, op.weight_scale
        return quantize_layer(op, weight, op.weight_bits, self.per_channel)

    def rounded(self, name, value, least=None):
        """An integer, but for float weights. Raises ValueError where it is out of range (`check_range`)."""
        self.check_range(name, value)
        if self.is_float:
            return value
        value = value.round().to(torch.int32)
        return value if least is None else value.clamp_min(least)

    def check_range(self, name, value):
        """Raise ValueError for a bias, a threshold or a scale of op `name` that is not finite, or is too large."""
        largest = value.abs().max().item()
        if not largest <= (torch.finfo(torch.float32).max if self.is_float else LARGEST_INT32):  # NaN is not either
            raise ValueError(
                f"{self.dag.where(name)} needs a threshold or a bias of {largest:.3g}, beyond the integers of a chip: "
                "its weights or biases are of very different sizes, or not finite, train the network again"
            )

    def largest_of(self, op, in_nodes):
        """The bound of |current| per step that an op sends, None where real numbers flow."""
        largest = self.largest_read(in_nodes)
        return None if largest is None else op.largest_sum(largest)

    def largest_read(self, in_nodes):
        """The bounds of what an op reads at a step, 1 for spikes; None where it reads real numbers."""
        largest = [None if self.plan.kinds[node] == ANALOG else self.largest.get(node, 1) for node in in_nodes]
        return None if self.is_float or None in largest else largest

    # layers

    def set_weight(self, name, op, in_nodes, out):
        """Integer weights and biases of a convolution or linear layer, in the unit of its neuron."""
        unit = self.unit_of(out)
        if not torch.isfinite(op.weight).all():
            raise ValueError(f"{self.dag.where(name)} has NaN or infinite weights, train the network again")
        unit_per_output = unit.flatten() if unit.dim() else unit  # [C_out] or a scalar
        from_image = self.plan.kinds[in_nodes[0]] == ANALOG
        if from_image:
            weight_q, scale = self.integers(op)
            op.weight.data = weight_q / scale  # the image's current is computed with these
        else:
            scale = self.scale_in_unit(op, in_nodes[0], unit)
            weight_q = round_layer(op, op.weight.detach() * scale, 1.0, op.weight_bits)
        op.set_weight_scale(scale)
        bias_q = None if op.bias is None else op.bias.detach() / unit_per_output
        if not self.is_float:
            weight_q = weight_q.to(torch.int8)
            bias_q = None if bias_q is None or from_image else self.rounded(name, bias_q)
        op.set_integers(weight_q, bias_q, op.output_view(unit_per_output))
        op.largest_input = self.peaks.get(in_nodes[0], 1)
        self.largest[out] = self.largest_of(op, in_nodes)

    def scale_in_unit(self, op, node, unit):
        """s_w of a layer that reads the spikes of a node: a spike's value over that of one integer step."""
        per_input = op.input_view(self.input_scales(node, op))
        return per_input / op.weight_view(unit.flatten() if unit.dim() else unit)

    def weight_scales(self):
        """Op name -> s_w that the conversion will give the layers that read spikes."""
        return {
            name: self.scale_in_unit(entry["op"], entry["in_nodes"][0], self.unit_of(entry["out_nodes"][0]))
            for name, entry in self.dag.ops.items()
            if is_trained(entry["op"])
            and self.plan.kinds[entry["in_nodes"][0]] == SPIKES
            and self.plan.kinds[entry["out_nodes"][0]] == CURRENT
        }

    def set_avg_pool(self, name, op, in_nodes, out):
        """Average pooling: ones, s_w = k*k. Spikes get a neuron with a threshold of its own, currents are summed.

        Folded, it sums spikes for the layers behind it, whose weights then weigh units of lambda / (k*k).
        """
        (node,) = in_nodes
        unit = self.value_of(node) / op.window
        op.set_integers(torch.ones_like(op.weight, dtype=torch.int8), None, unit)
        if op.folded:
            self.scales[out] = unit
        elif self.plan.kinds[node] == SPIKES:
            self.set_neuron(name, op, out, unit, self.largest_of(op, in_nodes))
        else:
            self.units[out] = unit
            self.largest[out] = self.largest_of(op, in_nodes)

    def set_relu(self, name, op, in_nodes, out):
        """A neuron where a current flows into a ReLU; spikes pass."""
        (node,) = in_nodes
        if name not in self.plan.firing:
            if getattr(op, "ceiling", None) is not None and self.scales[node].max() * self.peaks[node] > op.ceiling:
                raise ValueError(
                    f"{self.dag.where(name)} cuts off spikes of another neuron, put it behind a convolution"
                )
            self.scales[out] = self.scales[node]
            return
        unit = self.units[node]
        if isinstance(op, SignedReLU) and unit.dim():
            unit = unit.repeat_interleave(2, 0)
        self.set_neuron(name, op, out, unit, self.largest[node])

    def set_batch_norm(self, name, op, in_nodes, out):
        """BatchNorm of currents: its size goes into the unit, its sign becomes the weight, the shift a bias.

        Spikes get an integer weight as large as the threshold behind it needs, up to that of the bit width. A channel
        with next to no weight only has its bias.
        """
        (node,), spatial = in_nodes, [1] * (len(self.shapes[out]) - 1)
        weight, bias = op.weight.detach().view(-1, *spatial), op.bias.detach().view(-1, *spatial)
        size = weight.abs()
        silent = size <= 1e-4 * size.max()
        size = torch.where(silent, size.max().clamp_min(1e-30), size)
        reference = max(self.statistics[name].max_o, 1e-30)
        unit = self.value_of(node) * size
        largest_read = self.largest_read(in_nodes)
        if largest_read is not None:
            # a channel that stays far below one threshold even with all that can flow in sends what its bias alone does
            finest = max(reference, bias.abs().max().item()) / LARGEST_INTEGER
            silent = silent | (unit * largest_read[0] < finest)
            unit = torch.where(silent, unit.clamp_min(finest), unit)
        wanted = (self.most * unit / reference).ceil().clamp(1, self.most)
        integer = torch.ones_like(wanted) if self.is_float else wanted
        unit = unit / integer
        weight_q = torch.where(silent, 0.0, weight.sign()) * integer
        bias_q = bias / unit if largest_read is None else self.rounded(name, bias / unit)
        op.set_integers(weight_q if self.is_float else weight_q.to(torch.int32), bias_q)
        self.units[out] = unit
        self.largest[out] = self.largest_of(op, in_nodes)

    def set_add(self, name, op, in_nodes, out):
        """Integer weights for the inputs that have another unit; a neuron where no ReLU follows."""
        fires = name in self.plan.firing
        unit = self.spike_sum_unit([self.scales[n] for n in in_nodes]) if fires else self.unit_of(out)
        weights = []
        for node in in_nodes:
            weight = None
            if self.plan.kinds[node] == ANALOG:
                weight = 1 / unit
            elif self.plan.kinds[node] == SPIKES or node not in self.components[out]:
                weight = self.branch_weight(name, node, unit)
            weights.append(weight)
        op.set_branch_weights(weights)
        largest = self.largest_of(op, in_nodes)
        if fires:
            self.set_neuron(name, op, out, unit, largest)
        else:
            self.largest[out] = largest

    def branch_weight(self, name, node, unit):
        """The weight of spikes, or of a current with a unit of its own, at a neuron's add."""
        ratio = self.value_of(node) / unit
        if not self.is_float and ratio.min() < LEAST_RATIO:
            raise ValueError(
                f"{self.dag.where(name)} adds values that are finer than a step of the {self.bits}-bit weights "
                "beside them: use more bits, or put a ReLU behind what it adds"
            )
        return self.rounded(name, ratio, least=1)

    def spike_sum_unit(self, scales):
        """The unit of a sum of spikes alone: the strongest gets the largest integer, at few bits 7, the weakest 1."""
        scales = torch.cat([scale.flatten() for scale in scales])
        if self.is_float:
            return scales.max() / self.most
        unit = scales.max() / max(self.most, 7)  # so that 1 bit can tell one input from another
        weakest = torch.where(scales > 0, scales, scales.max()).min()
        return torch.minimum(unit, weakest.clamp_min(scales.max() / LARGEST_INTEGER))

    def set_concat(self, name, op, in_nodes, out):
        """What is joined keeps its lambda or its unit."""
        values = [self.value_of(node).float() for node in in_nodes]
        if op.dim != 1:
            self.check_same_scale(name, torch.stack([value.max() for value in values]))
        joined = concat_scales(values, [self.shapes[node] for node in in_nodes], op.dim - 1)
        if op.dim != 1 and joined is not values[0]:
            joined = joined.mean()  # of next to equal ones
        if self.plan.kinds[out] == SPIKES:
            self.scales[out] = joined
            return
        self.units[out] = joined
        self.largest[out] = self.largest_of(op, in_nodes)

    def set_view(self, name, op, in_nodes, out):
        """The same values in another shape."""
        (node,) = in_nodes
        value = self.value_of(node)
        if value.dim():
            value = value.expand(self.shapes[node]).reshape(self.shapes[out])
            if value.dim() == 3:
                self.check_same_scale(name, (value.flatten(1) / value.flatten(1).mean(1, keepdim=True)).flatten())
                value = value.mean((1, 2), keepdim=True)
        self.pass_on(node, out, value)

    def check_same_scale(self, name, values):
        """Raise ValueError where one channel would hold spikes that stand for different activations."""
        if values.max() > SAME_LAMBDA * values.min():
            raise ValueError(
                f"{self.dag.where(name)} puts spikes of different scales into one channel, join them as channels "
                "(torch.cat along dim=1), or keep the channels of a view"
            )

    def set_same(self, name, op, in_nodes, out):
        """Spikes or currents of the same value: a padding, a max pooling."""
        self.pass_on(in_nodes[0], out, self.value_of(in_nodes[0]))

    def pass_on(self, node, out, value):
        """`value`, the lambda or unit of `node`, is that of `out` too."""
        if self.plan.kinds[out] == SPIKES:
            self.scales[out] = value
        else:
            self.units[out], self.largest[out] = value, self.largest[node]

    def set_neuron(self, name, op, out, unit, largest):
        """Vthr = lambda_out / unit, as an integer of at least 1, and the lambda_out that the rounded one stands for."""
        target = self.targets[out]
        target = target.squeeze() if target.numel() == 1 else target
        if not target.max() > 0:  # no calibration image excites this layer: aim at the scale of its input
            target = (unit.max() * max(largest or 1, 1)).minimum(unit * LARGEST_INT32)
        if largest is None and (self.reset_mode == "zero" or self.initial_potential in (0, 1)):
            # lambda is an activation that some neuron has: its current would meet the threshold, and the last bit of a
            # float sum decide whether a spike comes now or a step later
            target = target * BELOW_A_TIE
        Vthr = target / unit
        self.check_range(name, Vthr)
        if largest is not None:
            is_cut_off = target >= (getattr(op, "ceiling", None) or float("inf"))
            Vthr = torch.where(is_cut_off, Vthr.floor(), Vthr.round()).clamp_min(1).to(torch.int32)
        initial = Vthr * self.initial_potential
        if largest is not None:
            initial = initial.floor().to(torch.int32)
        op.neuron = IFNeuron(Vthr, Vthr * unit, initial, self.reset_mode, None if largest is None else int(largest))
        self.scales[out] = Vthr * unit


class Groups:
    """Disjoint sets that grow together (union-find)."""

    def __init__(self):
        self.parent = {}

    def find(self, item):
        self.parent.setdefault(item, item)
        while self.parent[item] != item:
            item = self.parent[item]
        return item

    def join(self, first, *others):
        for other in others:
            self.parent[self.find(other)] = self.find(first)
        self.find(first)

    def members(self):
        """The sets, as lists."""
        sets = defaultdict(list)
        for item in self.parent:
            sets[self.find(item)].append(item)
        return list(sets.values())
