"""The weights of a layer under which its outputs come nearest to given ones, in integers, by least squares.

    weight_q, shift = fitted_integers(layer, weight, inputs, wanted, held_out)

The weights are those of least ||Y - W X||^2 with a pull towards the weights of before, whose strength is chosen on
samples held out. They are rounded one input after the other: the rounding error of one moves the weights of the inputs
that are still to come, so that the output changes least (optimal brain surgeon; Frantar and Alistarh, Optimal Brain
Compression, NeurIPS 2022; Frantar et al., GPTQ, ICLR 2023).
"""

import torch
import torch.nn.functional as F

from options import FLOAT_BITS
from quantization import largest_integer
from spike_layers import SpikeConvTranspose2d, SpikeLinear

MOST_ELEMENTS = 2**25  # sampled inputs of a layer, which bound the positions of wide layers
HELD_OUT = 4  # every fourth image chooses the strength of the pull towards the float weights
# Strengths of the pull, relative to the mean square of an input. Weak ones suit the 9 weights of a depthwise channel,
# strong ones a classifier that sees one vector per image.
PULLS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e3)
DAMPING = 0.01  # of the second moments in the rounding, relative to the mean square of an input (as in GPTQ)
BLOCK = 64  # inputs that are rounded before their errors reach the weights of the later blocks
CHUNK = 8192  # samples whose products are added in the type of the inputs; the sums of chunks are in float64
LEAST_POWER = 1e-12  # mean square of the inputs of a layer that reads nothing active


def can_fit(layer):
    """Whether a layer has weights to fit: neither frozen, nor of 1 bit, whose scale is all that could change."""
    return layer.is_trained and layer.weight_bits != 1 and "weight" not in layer.frozen


def fitted_integers(layer, weight, inputs, wanted, held_out):
    """`W_q, shift`: W * s_w in the shape of `weight`, integers unless the layer's weights are floats, and a constant.

    weight: W to stay near to. inputs: what the layer reads, [G, N, K] (`sample_inputs`). wanted: what it should send
    without its bias, [N, C_out]. held_out: [N], true for the samples that choose how near. shift: the mean of `wanted`
    minus that of what the layer then sends, [C_out].
    """
    groups = len(inputs)
    outputs = wanted.unflatten(1, (groups, -1)).transpose(0, 1)  # [G, N, O]
    rows = layer.rows(weight).unflatten(0, (groups, -1)).double()  # [G, O, K]
    steps = layer.rows((1 / layer.weight_scale).expand_as(weight)).view_as(rows).double()
    fitted, moments = least_squares(inputs, outputs, rows, held_out)
    weight_q = fitted / steps
    if layer.weight_bits != FLOAT_BITS:
        weight_q = least_error_integers(fitted, steps, moments, largest_integer(layer.weight_bits))
    weight_q = weight_q.flatten(0, 1)  # [C_out, K]
    shift = (wanted.double() - sent(mean(inputs), weight_q * steps.flatten(0, 1))).mean(0)
    return from_rows(layer, weight_q).to(weight.dtype), shift.to(weight.dtype)


def sent(inputs, rows):
    """The outputs [N, C_out] of the weights `rows`, [C_out, K], for inputs [G, N, K], without a bias."""
    return (inputs @ rows.unflatten(0, (len(inputs), -1)).mT).transpose(0, 1).flatten(1)


def positions(layer, most):
    """Number of positions to sample for a layer, at most `most`."""
    groups = getattr(layer, "groups", 1)
    return max(1, min(most, MOST_ELEMENTS // (groups * layer.rows(layer.weight).shape[1])))


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
    centres = mean(inputs).to(inputs.dtype), mean(outputs).to(outputs.dtype)
    moments = mixed = 0.0
    for x, y in zip(inputs.split(CHUNK, 1), outputs.split(CHUNK, 1)):
        x, y = x - centres[0], y - centres[1]
        moments, mixed = moments + (x.mT @ x).double(), mixed + (x.mT @ y).double()
    return moments / inputs.shape[1], mixed / inputs.shape[1]


def mean(values):
    """The mean over samples [G, N, K], in float64: [G, 1, K]."""
    return values.mean(1, keepdim=True, dtype=torch.float64)


def least_squares(inputs, outputs, weights, held_out):
    """`W, H`: the weights [G, O, K] of least squared error of the outputs, and the second moments of the inputs.

    inputs: [G, N, K]. outputs: [G, N, O]. weights: those to stay near to. held_out: [N], true for the samples that
    choose how near; the others fit them. Without samples of either kind the weights stay.
    """
    if held_out.all() or not held_out.any():
        return weights, second_moments(inputs, outputs)[0]
    parts = [(inputs[:, chosen], outputs[:, chosen]) for chosen in (~held_out, held_out)]
    fitting, control = (second_moments(*part) for part in parts)
    # those of all samples: the two parts, and the distance of their means
    share = held_out.double().mean()
    apart = [mean(fit) - mean(other) for fit, other in zip(*parts)]
    moments, mixed = (
        (1 - share) * fit + share * other + share * (1 - share) * apart[0].mT @ distance
        for fit, other, distance in zip(fitting, control, apart)
    )
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
