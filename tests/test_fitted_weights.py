"""Weights fitted to the spikes that reach a layer (`--correction weights`)."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers import MODELS, assert_every_spike_is_reproduced, convert, small_model
from sklearn.datasets import load_digits
from torch import nn

from ann2snn import parse_args
from ann_parser import parse_ann_model
from conversion.correction import bias_carrier, bias_carriers, held_back
from conversion.least_squares import (
    MOST_ELEMENTS,
    can_fit,
    fitted_integers,
    positions,
    pulled,
    second_moments,
)
from dag_rewrites import prepare_conversion
from options import FLOAT_BITS, ConversionOptions
from spike_layers import SpikeLinear


def layer_of(bits, scale=100.0):
    """A linear layer 5 -> 3 with integers of `bits` bits."""
    torch.manual_seed(0)
    layer = SpikeLinear(5, 3)
    layer.weight_bits, layer.weight_scale = bits, torch.tensor(scale)
    return layer, layer.weight.detach().clone()


@pytest.mark.parametrize("bits", [8, FLOAT_BITS])
def test_a_layer_learns_what_its_inputs_tell(bits):
    layer, weight = layer_of(bits)
    x, change, constant = torch.rand(1, 4096, 5), 0.2 * torch.randn(3, 5), torch.tensor([0.5, 0.0, -1.0])
    wanted = x[0] @ (weight + change).T + constant
    weight_q, shift = fitted_integers(layer, weight, x, wanted, torch.arange(4096) % 4 == 0)
    assert torch.equal(weight_q, weight_q.round()) == (bits == 8)
    assert (weight_q / 100 - weight - change).abs().max() < 0.02
    assert torch.allclose(shift, (wanted - x[0] @ (weight_q / 100).T).mean(0), atol=1e-5)
    assert (shift - constant).abs().max() < 0.02


def test_noise_teaches_nothing():
    """The images held out tell that the few others only have errors by chance: the weights stay, up to rounding."""
    layer, weight = layer_of(8)
    x = torch.rand(1, 40, 5)
    wanted = x[0] @ weight.T + 3 * torch.randn(40, 3)
    weight_q, _ = fitted_integers(layer, weight, x, wanted, torch.arange(40) % 4 == 0)
    without_control = pulled(weight[None].double(), *second_moments(x, wanted[None]), 1e-3)[0]
    assert (weight_q / 100 - weight).norm() < 0.1 * (without_control - weight).norm()


def test_sampled_positions_are_few_enough():
    layer, _ = layer_of(8)
    assert positions(layer, 100) == 100
    assert positions(layer, 2**30) == MOST_ELEMENTS // 5


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


def test_frozen_weights_and_single_bits_are_not_fitted():
    assert can_fit(layer_of(8)[0]) and not can_fit(layer_of(1)[0])
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
