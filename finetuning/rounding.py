"""Learn quantized weights, biases and lambdas without labels, layer by layer, by least squares.

    learn_rounding(qnet, net, loader, device, samples)     # changes qnet, the quantized copy of net

Each layer reads X, what the network quantized so far sends on calibration images, and aims at Y, the float network's
output of the same layer. Its weights are those of least ||Y - W X||^2 with a pull towards the float weights, whose
strength is chosen on images held out. They are rounded one input after the other: the rounding error of one moves the
weights of the inputs that are still to come, so that the output changes least (optimal brain surgeon; Frantar and
Alistarh, Optimal Brain Compression, NeurIPS 2022; Frantar et al., GPTQ, ICLR 2023; with X of the quantized and Y of the
float network as in Li et al., GPTAQ, ICML 2025). The bias then corrects the mean of every output channel (Nagel et al.,
Data-Free Quantization, ICCV 2019).

Where an op has activation levels, its lambdas are chosen again for the values that now reach it.
"""

import copy

import torch
import torch.nn.functional as F

from conversion.lambdas import larger_of_pairs, merged_pairs, spike_targets
from conversion.statistics import use_learnt_scales
from conversion.units import Units
from options import FLOAT_BITS
from quantization import largest_integer, quantize_layers, round_layer
from runtime.batches import first_inputs, loader_for, reusable
from spike_layers import CURRENT, SPIKES, SpikeAdd, SpikeConvTranspose2d, SpikeLinear, SpikeReLU
from spike_simulator import count_readers, forget_read, run_op

MOST_BYTES = 2**29  # of the largest layer's activations, over all images; fewer images are used above it
AT_A_TIME = 16  # images that an op computes: 96 channels of 112x112 pixels then take 77 MB
MOST_POSITIONS = 4096  # sampled positions of a layer
MOST_ELEMENTS = 2**25  # sampled inputs of a layer, which bound the positions of wide layers
HELD_OUT = 4  # every fourth image chooses the strength of the pull towards the float weights
# Strengths of the pull, relative to the mean square of an input. Weak ones suit the 9 weights of a depthwise channel,
# strong ones a classifier that sees one vector per image.
PULLS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3)
DAMPING = 0.01  # of the second moments in the rounding, relative to the mean square of an input (as in GPTQ)
BLOCK = 64  # inputs that are rounded before their errors reach the weights of the later blocks
SHARES = torch.linspace(0.5, 1.5, 21).tolist()  # lambdas tried, relative to the one of before
MOST_FOR_LAMBDA = 2**20  # activations on which they are tried
BISECTIONS = 16  # of the shift of a bias, to 2^-16 of the largest error
LEAST_POWER = 1e-12  # mean square of the inputs of a layer that reads nothing active


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
        if op.weight_bits in (1, FLOAT_BITS) or "weight" in op.frozen:
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
        images, outputs = sample_outputs(target, op.output_channels, self.positions(op), self.generator)
        inputs = sample_inputs(op, x, images)  # [G, N, K]
        groups = len(inputs)
        outputs = outputs.unflatten(1, (groups, -1)).transpose(0, 1)  # [G, N, O]
        rows = op.rows(shadow).unflatten(0, (groups, -1)).double()  # [G, O, K]
        steps = op.rows((1 / op.weight_scale).expand_as(shadow)).view_as(rows).double()
        held_out = images[0] % HELD_OUT == 0
        weights, moments = least_squares(inputs, outputs, rows, held_out)
        integers = least_error_integers(weights, steps, moments, largest_integer(op.weight_bits))
        return from_rows(op, integers.flatten(0, 1)).to(op.weight.dtype)

    def range_behind(self, entry):
        """The values that pass the activation behind a layer, `least, largest`; all of them if it has none."""
        name = self.qnet.only_reader(entry.out)
        op = None if name is None else self.qnet.ops[name].op
        if not isinstance(op, SpikeReLU):
            return -float("inf"), float("inf")
        return 0.0, op.ceiling or float("inf")

    @staticmethod
    def positions(op):
        """Number of positions to sample for a layer."""
        groups = getattr(op, "groups", 1)
        return max(1, min(MOST_POSITIONS, MOST_ELEMENTS // (groups * op.rows(op.weight).shape[1])))

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
# Samples


def sample_outputs(target, channels, most, generator):
    """`(images, places), outputs` of evenly drawn positions: indices [N] each, outputs [N, C_out]."""
    flat = positions_of(target)
    size = flat.shape[2]
    drawn = torch.randperm(len(flat) * size, generator=generator)[:most].to(target.device)
    images, places = drawn // size, drawn % size
    return (images, places), flat[images, :, places]


def positions_of(output):
    """An output [B, C, ...] as [B, C, L]."""
    return output.flatten(2) if output.dim() > 2 else output[..., None]


def sample_inputs(op, x, drawn):
    """What a layer reads for the drawn output positions: [G, N, K], K in the order of `rows`."""
    images, places = drawn
    groups = getattr(op, "groups", 1)
    if isinstance(op, SpikeLinear):
        return x[images][None]
    x, stride, taps = as_convolved(op, x)
    (height, width), dilation = op.kernel_size, op.dilation
    columns = (x.shape[3] - dilation[1] * (width - 1) - 1) // stride[1] + 1
    top, left = places // columns * stride[0], places % columns * stride[1]
    read = [x[images, :, top + i * dilation[0], left + j * dilation[1]] for i in range(height) for j in range(width)]
    inputs = torch.stack([read[tap] for tap in taps], 2)  # [N, C_in, kh * kw]
    return inputs.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)


def as_convolved(op, x):
    """`x, stride, taps`: the padded input and the stride of a convolution, and the order of its kernel's taps.

    A transposed convolution is one of stride 1, with a turned kernel, of the input with zeros between its elements.
    """
    size = op.kernel_size[0] * op.kernel_size[1]
    if not isinstance(op, SpikeConvTranspose2d):
        return F.pad(x, op._reversed_padding_repeated_twice), op.stride, range(size)
    spread = x.new_zeros(*x.shape[:2], *[(n - 1) * step + 1 for n, step in zip(x.shape[2:], op.stride)])
    spread[:, :, :: op.stride[0], :: op.stride[1]] = x
    around = [d * (k - 1) - p for d, k, p in zip(op.dilation, op.kernel_size, op.padding)]
    pads = around[1], around[1] + op.output_padding[1], around[0], around[0] + op.output_padding[0]
    return F.pad(spread, pads), (1, 1), range(size)[::-1]


def from_rows(op, rows):
    """The inverse of `op.rows`: a weight from [C_out, N]."""
    if not isinstance(op, SpikeConvTranspose2d):
        return rows.view_as(op.weight)
    inputs = op.in_channels // op.groups
    return rows.view(op.groups, -1, inputs, *op.kernel_size).transpose(1, 2).reshape(op.weight.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Least squares


def second_moments(inputs, outputs):
    """Covariances of the inputs, [G, K, K], and of inputs with outputs, [G, K, O], in float64."""
    inputs, outputs = inputs.double(), outputs.double()
    inputs, outputs = inputs - inputs.mean(1, keepdim=True), outputs - outputs.mean(1, keepdim=True)
    return inputs.mT @ inputs / inputs.shape[1], inputs.mT @ outputs / inputs.shape[1]


def least_squares(inputs, outputs, weights, held_out):
    """`W, H`: the weights [G, O, K] of least squared error of the outputs, and the second moments of the inputs.

    inputs: [G, N, K]. outputs: [G, N, O]. weights: those to stay near to. held_out: [N], true for the samples that
    choose how near; the others fit them. Without samples of either kind the weights stay.
    """
    moments, mixed = second_moments(inputs, outputs)
    if held_out.all() or not held_out.any():
        return weights, moments
    fitting = second_moments(inputs[:, ~held_out], outputs[:, ~held_out])
    control = second_moments(inputs[:, held_out], outputs[:, held_out])
    errors = [explained_error(pulled(weights, *fitting, pull), *control) for pull in PULLS]
    errors.append(explained_error(weights, *control))  # no change at all
    best = torch.stack(errors).argmin(0)  # [G]
    learnt = weights.clone()
    for index, pull in enumerate(PULLS):
        chosen = best == index
        if chosen.any():
            learnt[chosen] = pulled(weights[chosen], moments[chosen], mixed[chosen], pull)
    return learnt, moments


def pulled(weights, moments, mixed, pull):
    """The weights [G, O, K] of least squared error with a pull towards `weights`."""
    residual = mixed - moments @ weights.mT  # [G, K, O]
    return weights + torch.cholesky_solve(residual, torch.linalg.cholesky(damped(moments, pull))).mT


def explained_error(weights, moments, mixed):
    """The mean squared error of outputs by the weights, up to a constant of the data: [G]."""
    return ((weights @ moments - 2 * mixed.mT) * weights).sum((1, 2))


def damped(moments, share):
    """`moments` with `share` of their mean diagonal added to the diagonal."""
    power = moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(LEAST_POWER)  # [G]
    return moments + share * power[:, None, None] * torch.eye(moments.shape[-1], device=moments.device)


def least_error_integers(weights, steps, moments, largest):
    """W_q of each output: rounded with feedback, or to nearest where that costs the output less; float64 [G, O, K]."""
    candidates = (
        round_with_feedback(weights, steps, moments, largest),
        (weights / steps).round().clamp(-largest, largest),
    )
    errors = [output_error(integers * steps - weights, moments) for integers in candidates]
    return torch.where((errors[0] <= errors[1])[..., None], *candidates)


def output_error(change, moments):
    """The mean squared change of each output by a change of the weights, [G, O, K]: [G, O]."""
    return ((change @ moments) * change).sum(2)


def round_with_feedback(weights, steps, moments, largest):
    """W_q for the least error of the outputs, up to `largest`: float64 [G, O, K].

    weights: [G, O, K]. steps: the weight that the integer 1 stands for, in the same shape. moments: [G, K, K] of the
    inputs. The rounding error e of input k moves each later weight j by -e * U[k, j] / U[k, k], with the inverse of the
    damped moments = U^T U. Inputs of most power come first, because later ones can make up for less.
    """
    moments = damped(moments, DAMPING)
    order = moments.diagonal(dim1=1, dim2=2).argsort(1, descending=True)  # [G, K]
    across = order[:, None].expand_as(weights)
    left, steps = weights.gather(2, across), steps.gather(2, across)
    moments = moments.gather(1, order[:, :, None].expand_as(moments)).gather(2, order[:, None].expand_as(moments))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse, upper=True)
    integers = torch.empty_like(left)
    for start in range(0, left.shape[2], BLOCK):
        end = min(start + BLOCK, left.shape[2])
        integers[:, :, start:end], errors = round_block(
            left[:, :, start:end], steps[:, :, start:end], upper, start, largest
        )
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return torch.empty_like(integers).scatter_(2, across, integers)


def round_block(left, steps, upper, start, largest):
    """`W_q, errors / U[k, k]` of some inputs from `start` on, [G, O, BLOCK]; `left` is changed in place."""
    integers, errors = torch.empty_like(left), torch.empty_like(left)
    for k in range(left.shape[2]):
        row = upper[:, start + k, start + k : start + left.shape[2]]  # [G, BLOCK - k]
        integers[:, :, k] = (left[:, :, k] / steps[:, :, k]).round().clamp(-largest, largest)
        errors[:, :, k] = (left[:, :, k] - integers[:, :, k] * steps[:, :, k]) / row[:, :1]
        left[:, :, k:] -= errors[:, :, k, None] * row[:, None]
    return integers, errors


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
