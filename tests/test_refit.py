"""Weights fitted to the spikes that reach a layer (`--correction weights`)."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import MODELS, assert_every_spike_is_reproduced, convert, small_model
from sklearn.datasets import load_digits
from torch import nn

from ann2snn import parse_args
from ann_parser import parse_ann_model
from conversion.correction import bias_carrier, bias_carriers, held_back
from conversion.refit import CHANGE, Sums, can_fit, fit_weights
from dag_rewrites import prepare_conversion
from options import FLOAT_BITS, ConversionOptions
from spike_layers import SpikeConv2d, SpikeConvTranspose2d, SpikeLinear

CONVOLUTIONS = {
    "plain": dict(kernel_size=3, padding=1),
    "stride": dict(kernel_size=(3, 2), stride=(2, 1), padding=(0, 1)),
    "dilation": dict(kernel_size=3, dilation=2, padding=2),
    "groups": dict(kernel_size=3, groups=2),
    "depthwise": dict(kernel_size=3, groups=4, padding=1),
}


def everywhere(values):
    return values


def converted(layer, bits=FLOAT_BITS, scale=1.0):
    """The layer with integers of its weights; at 32 bits these are the weights."""
    layer.weight_bits, layer.weight_scale = bits, torch.tensor(scale)
    weight = layer.weight.detach() * scale
    layer.set_integers(weight.clone() if bits == FLOAT_BITS else weight.round().to(torch.int8), None, torch.tensor(1.0))
    return layer


def ridge_regression(tables, errors, weight):
    """Change and shift of one group, by NumPy's least squares on more rows: ridge * change^2 is one more error each.

    tables: [rows, K] of the group's inputs. errors: [rows, C_out / groups].
    """
    ridge = (errors[1] / (CHANGE**2 * np.square(weight).mean())) ** 0.5
    table, error = tables, errors[0]
    penalty = np.hstack([ridge * np.eye(table.shape[1]), np.zeros((table.shape[1], 1))])
    left = np.vstack([np.hstack([table, np.ones((len(table), 1))]), penalty])
    right = np.vstack([error, np.zeros((table.shape[1], error.shape[1]))])
    return np.linalg.lstsq(left, right, rcond=None)[0]  # [K + 1, C_out / groups]


def windows(layer, x):
    """What each output of a convolution reads, [B * H' * W', C_in, kh, kw], place by place."""
    (top, left), (kh, kw), (down, right) = layer.padding, layer.kernel_size, layer.stride
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (top, top), (left, left)))
    rows, columns = layer.dilation[0] * np.arange(kh), layer.dilation[1] * np.arange(kw)
    height, width = layer(x).shape[2:]
    places = [(b, i, j) for b in range(len(x)) for i in range(height) for j in range(width)]
    return np.stack([padded[b][:, rows[:, None] + down * i, columns + right * j] for b, i, j in places])


@pytest.mark.parametrize("config", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_the_weights_of_a_convolution_are_those_of_a_ridge_regression(config):
    torch.manual_seed(0)
    layer = converted(SpikeConv2d(4, 8, bias=False, **config))
    x = torch.rand(6, 4, 7, 8)
    error = 0.3 * torch.randn_like(layer(x)) + 0.1
    before, groups = layer.weight.detach().clone(), layer.groups
    shift = fit_weights(
        layer, iter([Sums(layer, part, of, everywhere) for part, of in zip(x.split(4), error.split(4))])
    )
    table = windows(layer, x).reshape(-1, groups, layer.weight[0].numel())
    errors = error.permute(0, 2, 3, 1).reshape(-1, groups, 8 // groups).double().numpy()
    for group in range(groups):
        rows = slice(group * 8 // groups, (group + 1) * 8 // groups)
        of_group = errors[:, group], error.double().square().mean().item()
        wanted = ridge_regression(table[:, group].astype(float), of_group, before.double().numpy())
        change = (layer.weight - before)[rows].flatten(1).T
        assert np.allclose(change.detach().numpy(), wanted[:-1], atol=1e-5)
        assert np.allclose(shift[rows].numpy(), wanted[-1], atol=1e-5)
    assert torch.equal(layer.weight_q, layer.weight)


def test_a_linear_layer_learns_what_its_inputs_tell_and_rounds_it():
    """With many images the ridge hardly counts: the error that was made of the inputs is gone, up to rounding."""
    torch.manual_seed(0)
    layer = converted(SpikeLinear(5, 3), bits=8, scale=100.0)
    x, change, shift = torch.rand(100_000, 5), 0.2 * torch.randn(3, 5), torch.tensor([0.5, 0.0, -1.0])
    wanted = layer.weight_q / 100 + change
    found = fit_weights(layer, iter([Sums(layer, x, x @ change.T + shift, everywhere)]))
    assert layer.weight_q.dtype == torch.int8 and torch.equal(layer.weight_q / 100, layer.weight)
    assert (layer.weight - wanted).abs().max() < 0.02 and (found - shift).abs().max() < 0.02


def test_few_images_change_little():
    torch.manual_seed(0)
    few, many = (converted(SpikeLinear(64, 8)) for _ in range(2))
    many.load_state_dict(few.state_dict())
    start = few.weight.detach().clone()
    x, error = torch.rand(4096, 64), 0.3 * torch.randn(4096, 8)
    changes = []
    for layer, images in ((few, 16), (many, 4096)):
        fit_weights(layer, iter([Sums(layer, x[:images], error[:images], everywhere)]))
        changes.append(((layer.weight - start).norm() / start.norm()).item())
    assert changes[0] < CHANGE and changes[1] < CHANGE  # the error is noise: there is nothing to learn


def test_weights_without_an_error_and_silent_weights_stay():
    layer = converted(SpikeLinear(4, 2))
    before, x = layer.weight.detach().clone(), torch.rand(6, 4)
    assert not fit_weights(layer, iter([Sums(layer, x, torch.zeros(6, 2), everywhere)])).any()
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        layer.weight.zero_()
    layer = converted(layer)
    assert not fit_weights(layer, iter([Sums(layer, x, torch.ones(6, 2), everywhere)])).any()
    assert not layer.weight.any()


def test_inputs_that_say_the_same_share_a_tiny_change():
    """Without a ridge nothing would tell them apart, and rounding errors of the sums would decide."""
    torch.manual_seed(0)
    layer = converted(SpikeLinear(8, 2))
    before, one = layer.weight.detach().clone(), torch.rand(2000, 1)
    x = one.expand(-1, 8) * torch.tensor([1.0] * 7 + [0.0])  # seven are equal, one never spikes
    fit_weights(layer, iter([Sums(layer, x, 1e-6 * one.expand(-1, 2), everywhere)]))
    change = layer.weight.detach() - before
    assert change.abs().max() < 1e-6 and not change[:, 7].any()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bits", [8, 2, 32])
def test_a_fitted_network_is_exact(model, bits):
    net, images = small_model(model)
    how = {"signed": "pair"} if model == "bottlenecks" else {}
    snn = convert(net, images, 7, bits, correction="weights", per_channel="both", threshold="mse", **how)
    if bits < FLOAT_BITS:
        assert_every_spike_is_reproduced(snn, images, 7)


@pytest.mark.parametrize("bits", [8, 32])
def test_the_weights_behind_spikes_change(bits):
    net, images = small_model("shortcuts")
    snn, plain = (convert(net, images, 7, bits, correction=how) for how in ("weights", "potential"))
    layers = {name: layer for name, layer in snn.weighted_layers().items() if layer.spiking}
    changed = [not torch.equal(layer.weight_q, plain.ops[name].op.weight_q) for name, layer in layers.items()]
    assert not changed[0] and any(changed[1:])  # the first reads the image, which has no errors


def digits():
    """A network of three convolutions, trained on scikit-learn's digits, and images to learn from and to test."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    widths = (1, 16, 16, 16)
    layers = [m for a, b in pairwise(widths) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.005)
    for _ in range(60):
        rows = torch.randint(0, 1200, (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net.eval(), x[:1000], x[1200:]


@torch.no_grad()
@pytest.mark.parametrize("timesteps", [4, 8])
def test_fitted_weights_bring_the_outputs_nearer_to_the_ann_s_on_other_images(timesteps):
    with torch.enable_grad():
        net, images, others = digits()
    how = dict(per_channel="both", threshold="mse", hold_back="auto")
    errors = {}
    for correction in ("potential", "weights"):
        snn = convert(net, images, timesteps, 8, correction=correction, **how)
        errors[correction] = (snn(others) - net(others)).square().mean().item()
    assert errors["weights"] < 0.9 * errors["potential"]


def test_what_is_held_back_does_not_undo_the_fit():
    """A share below one integer per step is rounded together with the bias's own error, not with the fitted part."""
    net, images = small_model("shortcuts")
    ann = prepare_conversion(parse_ann_model(net, (images,)))
    snn = convert(net, images, 7, 2, correction="none")
    name, node = "relu2", snn.ops["relu2"].inputs[0]
    moved = torch.arange(-4, 4)[: snn.ops[bias_carriers(snn, node)[0]].op.output_channels].float()
    shifted = copy.deepcopy(snn)
    carrier = bias_carrier(shifted, node)
    carrier.bias_q = carrier.bias_q + moved.to(torch.int32)
    wanted = held_back(snn, ann, name, 0.25)
    found = held_back(shifted, ann, name, 0.25, carrier.output_view(moved))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_frozen_weights_and_other_layers_are_not_fitted():
    assert can_fit(SpikeConv2d(2, 2, 3)) and can_fit(SpikeLinear(2, 2))
    assert not can_fit(SpikeConv2d(2, 2, 3, padding="same")) and not can_fit(SpikeConvTranspose2d(2, 2, 3))
    net, images = small_model("shortcuts")
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    snn, plain = (convert(net, images, 7, 8, correction=how) for how in ("weights", "potential"))
    for name, layer in plain.weighted_layers().items():
        if layer.spiking:
            assert torch.equal(layer.weight_q, snn.ops[name].op.weight_q)


@pytest.mark.parametrize("listen", [7, "auto"])
def test_where_every_spike_is_heard_there_is_nothing_to_fit(listen):
    net, images = small_model("shortcuts")
    snn, plain = (convert(net, images, 7, 8, correction=how, listen=listen) for how in ("weights", "potential"))
    assert torch.equal(snn(images), plain(images))


def test_the_option():
    assert ConversionOptions(correction="weights").correction == "weights"
    assert parse_args(["example_net"]).correction == "potential"
    with pytest.raises(ValueError, match=r"correction 'all'.*potential, bias, weights"):
        ConversionOptions(correction="all")
