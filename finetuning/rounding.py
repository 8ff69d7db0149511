"""Learn quantized weights, biases and lambdas without labels, layer by layer, by least squares.

    learn_rounding(qnet, net, loader, device, samples)     # changes qnet, the quantized copy of net

Each layer reads X, what the network quantized so far sends on calibration images, and aims at Y, the float network's
output of the same layer. Its weights are those of least ||Y - W X||^2 near the float weights, rounded with error
feedback (`conversion.least_squares`; with X of the quantized and Y of the float network as in Li et al., GPTAQ, ICML
2025). The bias then corrects the mean of every output channel (Nagel et al., Data-Free Quantization, ICCV 2019).

Where an op has activation levels, its lambdas are chosen again for the values that now reach it.
"""

import copy

import torch

from conversion.lambdas import larger_of_pairs, merged_pairs, spike_targets
from conversion.least_squares import (
    HELD_OUT,
    can_fit,
    fitted_integers,
    positions,
    positions_of,
    sample_inputs,
    sample_outputs,
)
from conversion.statistics import use_learnt_scales
from conversion.units import Units
from options import FLOAT_BITS
from quantization import quantize_layers, round_layer
from runtime.batches import first_inputs, loader_for, reusable
from spike_layers import CURRENT, SPIKES, SpikeAdd, SpikeReLU
from spike_simulator import count_readers, forget_read, run_op

MOST_BYTES = 2**29  # of the largest layer's activations, over all images; fewer images are used above it
AT_A_TIME = 16  # images that an op computes: 96 channels of 112x112 pixels then take 77 MB
MOST_POSITIONS = 4096  # sampled positions of a layer
SHARES = torch.linspace(0.5, 1.5, 21).tolist()  # lambdas tried, relative to the one of before
MOST_FOR_LAMBDA = 2**20  # activations on which they are tried
BISECTIONS = 16  # of the shift of a bias, to 2^-16 of the largest error


@torch.no_grad()
def learn_rounding(qnet, net, loader, device, samples, per_channel=False):
    """Learn weights, biases and lambdas of `qnet` in place, for outputs like those of `net`; returns `qnet`.

    qnet: the result of `quantize_finetune` with 0 epochs, with or without activation levels. net: its float network,
    with the same ops. loader: images; the first `samples` are used, and fewer if the largest layer is too large
    (`MOST_BYTES`). Labels are not read. per_channel: each output channel has its own weight scale.

    Integers stay within their bit width, and `W_q / s_w` quantizes to itself. Frozen parameters keep their values;
    weights of 1 bit and float weights stay as they are. Raises ValueError if there are no images.
    """
    net.to(device).eval()
    qnet.eval()
    inputs = calibration_images(net, reusable(loader_for(net, loader), samples), device, samples)
    Learner(net, qnet, inputs, per_channel).run()
    quantize_layers(qnet)
    return qnet


def calibration_images(net, loader, device, samples):
    """The first `samples` images of a loader, a tuple of [N, ...], fewer if the largest layer is too large."""
    fits = MOST_BYTES // (4 * net.largest_sample(first_inputs(loader, device, 1)))  # float32
    inputs = first_inputs(loader, device, min(samples, max(1, fits)))
    return tuple(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)


def is_plain_sum(op):
    """Whether an op adds its two inputs as they are."""
    return isinstance(op, SpikeAdd) and op.signs == (1, 1)


class Learner:
    """Runs the float and the quantized network side by side and learns every op of the latter on the way.

    wanted, found: node -> value in the float and in the quantized network, [B, ...].
    """

    def __init__(self, net, qnet, inputs, per_channel):
        self.net, self.qnet = net, qnet
        self.wanted = dict(zip(net.inputs_nodes, inputs))
        self.found = dict(self.wanted)
        self.grid = None if qnet.scales_of_conversion is None else Grid(qnet, per_channel)
        self.generator = torch.Generator().manual_seed(0)

    def run(self):
        """Learn all ops, in order."""
        readers = [count_readers(self.net.ops.values(), self.net.outputs_nodes) for _ in range(2)]
        for name, entry in self.net.ops.items():
            self.wanted[entry.out] = run_in_parts(entry, [self.wanted[node] for node in entry.inputs])
            forget_read(self.wanted, entry, readers[0])
            self.found[entry.out] = self.learn_op(self.qnet.ops[name])
            forget_read(self.found, entry, readers[1])

    def learn_op(self, entry):
        """Learn what an op has to learn; returns its output, [B, ...]."""
        inputs = [self.found[node] for node in entry.inputs]
        if entry.op.is_trained:
            return self.learn_layer(entry, inputs[0])
        if entry.op.levels is not None:
            self.learn_lambda(entry, inputs)
        return run_in_parts(entry, inputs)

    def learn_layer(self, entry, x):
        """Learn the weights and the bias of a layer that reads `x`; returns its output."""
        op = entry.op
        if self.grid is not None:
            self.grid.set_scale(entry)
        target = self.target_of(entry)
        shadow = op.weight.weight_back
        if op.weight_bits == FLOAT_BITS or not can_fit(op):
            op.weight.copy_(round_layer(op, shadow, op.weight_scale, op.weight_bits) / op.weight_scale)
        else:
            integers = self.learn_integers(op, x, target, shadow)
            op.weight.copy_(integers / op.weight_scale)
            shadow.copy_(op.weight)
        output = run_in_parts(entry, [x])
        if op.bias is None or "bias" in op.frozen:
            return output
        before = op.bias.clone()
        (images, places), wanted = sample_outputs(target, len(before), MOST_POSITIONS, self.generator)
        op.bias += mean_shift(positions_of(output)[images, :, places], wanted, *self.range_behind(entry))
        if self.grid is not None:
            self.grid.snap_bias(entry)
        return output.add_(op.output_view(op.bias - before))

    def learn_integers(self, op, x, target, shadow):
        """W_q of a layer, in the shape of its weight."""
        drawn, outputs = sample_outputs(target, op.output_channels, positions(op, MOST_POSITIONS), self.generator)
        held_out = drawn[0] % HELD_OUT == 0
        return fitted_integers(op, shadow, sample_inputs(op, x, drawn), outputs, held_out)[0]

    def range_behind(self, entry):
        """The values that pass the activation behind a layer, `least, largest`; all of them if it has none."""
        name = self.qnet.only_reader(entry.out)
        op = None if name is None else self.qnet.ops[name].op
        if not isinstance(op, SpikeReLU):
            return -float("inf"), float("inf")
        return 0.0, op.ceiling or float("inf")

    def target_of(self, entry):
        """The output that a layer aims at, [B, ...].

        If an add alone reads it, the layer also makes up for the error of the other summand.
        """
        target, name = self.wanted[entry.out], self.qnet.only_reader(entry.out)
        reader = None if name is None else self.qnet.ops[name]
        if reader is None or not is_plain_sum(reader.op):
            return target
        (other,) = [node for node in reader.inputs if node != entry.out]
        if self.found.get(other) is None or self.wanted[other].shape != target.shape:
            return target
        return target + self.wanted[other] - self.found[other]

    def learn_lambda(self, entry, inputs):
        """Choose the lambda of an op with levels again, one or one per channel: that of least squared error."""
        op, wanted = entry.op, self.wanted[entry.out]
        stride = max(1, wanted.numel() // MOST_FOR_LAMBDA)
        value = op.activation(*[x[::stride] for x in inputs])
        scale = least_error_lambda(value, wanted[::stride], op.levels, op.ceiling)
        op.levels.scale.copy_(scale if self.grid is None else self.grid.set_lambda(entry, scale))


def run_in_parts(entry, inputs):
    """The output of an op as an ANN, [N, ...], `AT_A_TIME` images at a time, which bounds the memory that it needs."""
    output, images = None, len(inputs[0])
    for first in range(0, images, AT_A_TIME):
        part = run_op(entry, [x[first : first + AT_A_TIME] for x in inputs], None, None, None)
        if output is None:
            shape = images, *part.shape[1:]
            last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
            memory_format = torch.channels_last if last else torch.contiguous_format
            output = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=memory_format)
        output[first : first + AT_A_TIME] = part
    return output


# ---------------------------------------------------------------------------------------------------------------------
# The grid of the conversion


class Grid:
    """The integer steps that the conversion gives weights, biases and lambdas of a network with activation levels."""

    def __init__(self, qnet, per_channel):
        scales = qnet.scales_of_conversion
        self.qnet, self.plan, self.shapes = qnet, scales.plan, scales.shapes
        self.statistics = copy.deepcopy(scales.statistics)
        self.merged = merged_pairs(qnet, self.plan)
        floats = copy.deepcopy(qnet).cpu()
        for layer in floats.weighted_layers().values():
            layer.weight.copy_(layer.weight.weight_back)
        use_learnt_scales(floats, self.statistics)
        self.floats = floats
        self.units = Units(floats, self.plan, self.statistics, self.shapes, scales.levels, per_channel)

    def set_scale(self, entry):
        """Set s_w of a layer that reads spikes and feeds neurons."""
        if self.weighs_spikes(entry) and entry.op.weight_bits != FLOAT_BITS:
            unit = self.units.unit_of(entry.out)
            scale = self.units.scale_in_unit(self.floats.ops[entry.name].op, entry.inputs[0], unit)
            entry.op.set_weight_scale(scale.to(entry.op.weight.device))

    def snap_bias(self, entry):
        """Round the bias of a layer to whole units, as the conversion will."""
        op = entry.op
        if self.weighs_spikes(entry) and op.weight_bits != FLOAT_BITS:
            unit = self.units.unit_of(entry.out).flatten().to(op.bias.device)
            op.bias.copy_((op.bias / unit).round() * unit)

    def weighs_spikes(self, entry):
        """Whether a layer weighs spikes into the current of neurons."""
        return self.plan.kinds[entry.inputs[0]] == SPIKES and self.plan.kinds[entry.out] == CURRENT

    def set_lambda(self, entry, scale):
        """Let later layers read spikes of this lambda; returns it as the conversion will round it, a whole Vthr."""
        device, node, levels = scale.device, entry.inputs[0], self.floats.ops[entry.name].op.levels
        scale = larger_of_pairs(scale.cpu()) if entry.out in self.merged else scale.cpu()
        if self.plan.kinds[node] == CURRENT and self.is_whole(node):
            unit = self.units.unit_of(node)
            unit = unit.repeat_interleave(2, 0) if entry.op.splits_signs and unit.dim() else unit
            if unit.numel() in (1, scale.numel()):
                unit = unit.view(scale.shape) if unit.numel() == scale.numel() else unit
                is_cut_off = scale >= (entry.op.ceiling or float("inf"))
                scale = torch.where(is_cut_off, (scale / unit).floor(), (scale / unit).round()).clamp_min(1) * unit
        levels.scale.copy_(scale)
        use_learnt_scales(self.floats, self.statistics)
        known = self.floats, self.plan, self.statistics, self.shapes, self.units.timesteps
        targets = spike_targets(*known, self.units.mixed)
        self.units.targets = {each: target / self.units.peaks[each] for each, target in targets.items()}
        return scale.to(device)

    def is_whole(self, node):
        """Whether the current of a node is an integer: it has weights, none of them float, and no image in it."""
        layers, others = self.units.branches_of(node) if node in self.units.components else ([], [])
        return bool(layers) and not others and not self.units.is_float


# ---------------------------------------------------------------------------------------------------------------------
# Biases and lambdas


def mean_shift(values, wanted, least, largest):
    """The shift per channel, [C], under which the mean of the values behind the activation is the wanted one.

    values, wanted: [N, C] before the activation, which clips them to `least` and `largest`. Behind a ReLU only what
    passes it counts: the error of values far below 0 would otherwise move the bias. The mean grows with the shift, so
    bisection finds it. Channels whose means already agree keep their bias.
    """
    if least == -float("inf"):
        return (wanted - values).mean(0)
    aim = wanted.clamp(least, largest).mean(0)
    reach = (wanted - values).abs().amax(0)
    low, high = -reach, reach
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_less = (values + middle).clamp(least, largest).mean(0) < aim
        low, high = torch.where(is_less, middle, low), torch.where(is_less, high, middle)
    agrees = values.clamp(least, largest).mean(0) == aim
    return torch.where(agrees, 0.0, (low + high) / 2)


def least_error_lambda(values, wanted, levels, ceiling):
    """The lambda, in the shape of that of `levels`, of least squared error to the wanted activations.

    values, wanted: [B, ...] before the levels, and in the float network.
    """
    least, best = None, levels.scale
    over = [d for d in range(values.dim()) if d != 1]
    for share in SHARES:
        scale = (levels.scale * share).clamp_max(ceiling or float("inf"))
        rounded = ((values / scale).clamp_(0, 1).mul_(levels.levels) + 0.5).floor_().mul_(scale / levels.levels)
        error = (rounded - wanted).square_()
        error = (error.mean(over) if scale.numel() > 1 else error.mean()).view(scale.shape)
        best = scale if least is None else torch.where(error < least, scale, best)
        least = error if least is None else torch.minimum(error, least)
    return best
