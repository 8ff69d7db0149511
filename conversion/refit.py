"""Weights fitted to the spikes that reach a layer, by least squares: a part of `--correction weights`.

    shift = fit_weights(layer, parts)

Premature and late spikes give the inputs of a layer errors, and its weights pass them on. Other weights do better on
such inputs: they rely less on neurons that are often wrong, and more on others that say the same. `fit_weights` finds
the weights whose currents come nearest to those of the ANN. It is a ridge regression (Hoerl and Kennard, Technometrics
1970), one per layer, without gradients or epochs. (Li et al., A Free Lunch From ANN, ICML 2021, train the weights of
each layer for the same purpose.)
"""

import torch
import torch.nn.functional as F

from options import FLOAT_BITS
from quantization import round_layer
from spike_layers import SpikeConv2d, SpikeLinear

# How much weights change, relative to their RMS: 0.07 to 0.6 in a ResNet-20 at T = 8. The less the images say about a
# weight, the nearer it stays to what it was. (0.5 and 1 were worse for a VGG, and no better for the ResNet.)
CHANGE = 0.2

LEAST_RIDGE = 1e-6  # relative to the mean square of an input: sums of float32 products are wrong by about 1e-7


def can_fit(layer):
    """Whether a layer's weights can be fitted: those of a convolution or linear layer, if they are not frozen."""
    is_convolution = isinstance(layer, SpikeConv2d) and not isinstance(layer.padding, str)
    return (is_convolution or isinstance(layer, SpikeLinear)) and "weight" not in layer.frozen


@torch.no_grad()
def fit_weights(layer, parts):
    """Set a converted layer's integer weights to those of least squared error, and return the shift of its output.

    parts: an iterator over the `Sums` of parts of the images. The shift, [C_out], is the constant that belongs to the
    new weights, in units of activation; the layer's bias stays as it is. Where there is no error, nothing changes.
    """
    gram, products, squares, rows = 0.0, 0.0, 0.0, 0
    for part in parts:
        gram, products = gram + part.gram, products + part.products
        squares, rows = squares + part.squares, rows + part.rows
    shift = layer.weight.new_zeros(layer.output_channels)
    scale, bits = layer.weight_scale, layer.weight_bits
    weight = layer.weight_q / scale
    spread = (CHANGE**2 * weight.double().square().mean()).item()
    if not squares or not spread:
        return shift
    least = LEAST_RIDGE * gram.diagonal(dim1=1, dim2=2).mean().item()
    ridge = gram.new_full(gram.shape[-1:], max(squares / rows / spread, least))
    ridge[-1] = 0.0  # the shift may have any size
    change = torch.linalg.solve(gram + ridge.diag(), products).transpose(1, 2).flatten(0, 1)  # [C_out, K + 1]
    weight = weight + change[:, :-1].view_as(weight).to(weight.dtype)
    weight_q = weight * scale if bits == FLOAT_BITS else round_layer(layer, weight, scale, bits)
    layer.weight.copy_(weight_q / scale)
    layer.set_integers(weight_q.to(layer.weight_q.dtype), layer.bias_q, layer.unit)
    return change[:, -1].to(shift.dtype)


class Sums:
    """The sums of a regression over a part of the images, in float64.

    layer: the layer whose weights are fitted. inputs: what its spikes decode to, [B, C_in, ...]. error: the ANN's
    output minus the decoded current, [B, C_out, ...]. places: function that leaves out some places of a map.
    gram, products: for each group of channels, the sums of inputs times inputs, [groups, K + 1, K + 1], and of inputs
    times errors, [groups, K + 1, C_out / groups]. The last of the K + 1 inputs is 1. squares: the sum of squared
    errors. rows: the number of errors.
    """

    def __init__(self, layer, inputs, error, places):
        groups = getattr(layer, "groups", 1)
        inputs, error = rows_of(patches(layer, inputs, error, places), groups), rows_of(places(error), groups)
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)  # [groups, rows, K + 1]
        self.gram = (inputs.transpose(1, 2) @ inputs).double()
        self.products = (inputs.transpose(1, 2) @ error).double()
        self.squares, self.rows = error.double().square().sum().item(), error.numel()


def patches(layer, inputs, output, places):
    """What each output reads: [B, K, H', W'] of a convolution, [B, N] of a linear layer."""
    if not layer.spatial:
        return inputs
    unfolded = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [B, K, H' * W']
    return places(unfolded.unflatten(2, output.shape[2:]))


def rows_of(values, groups):
    """[B, groups * N, ...] as a table for each group, [groups, B * ..., N]."""
    table = values.flatten(2).transpose(1, 2).flatten(0, 1) if values.dim() > 2 else values
    return table.unflatten(1, (groups, -1)).transpose(0, 1)
