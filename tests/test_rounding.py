"""Learnt rounding: the closed forms against brute force and lstsq, and what it may and may not change."""

import copy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import CHOICES, MODELS, prepared, slow, small_model
from torch import nn

from ann2snn import parse_args
from command_line import without_effect
from conversion.least_squares import (
    from_rows,
    least_error_integers,
    least_squares,
    output_error,
    pulled,
    round_with_feedback,
    sample_inputs,
    sample_outputs,
    second_moments,
)
from finetuning.levels import quantize_activations
from finetuning.rounding import learn_rounding
from pipeline import check_command_line, convert_network
from quantization import largest_integer, quantize_finetune, quantize_layers, round_layer
from snn_weight_setter import trans_ann2snn_weight
from spike_layers import SpikeConv2d, SpikeConvTranspose2d, SpikeLinear
from spike_simulator import simulate
from spike_tensor import SpikeTensor


def correlated(groups, samples, inputs, seed):
    """Inputs [G, N, K] that depend on each other, as the pixels of a window do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randn(groups, samples, inputs, generator=generator, dtype=torch.float64) @ mix


@pytest.mark.parametrize("seed", range(10))
def test_rounding_lies_between_the_best_integers_and_the_nearest(seed):
    """All 5^4 integers of up to 2 are tried."""
    inputs = correlated(1, 50, 4, seed)
    moments = second_moments(inputs, inputs[..., :1])[0]
    weights = torch.rand(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    steps = torch.ones_like(weights)
    found = least_error_integers(weights, steps, moments, 2)
    every = torch.tensor(list(product(range(-2, 3), repeat=4)), dtype=torch.float64)[:, None]  # [625, 1, 4]
    best = output_error(every - weights, moments.expand(625, 4, 4)).amin(0)
    error, nearest = (output_error(q - weights, moments)[0] for q in (found, weights.round()))
    assert ((best <= error + 1e-12) & (error <= nearest)).all()
    assert found.abs().max() <= 2 and torch.equal(found, found.round())


def test_feedback_beats_the_nearest_integers():
    """40 inputs of one layer in blocks: a fraction of the error of the nearest."""
    inputs = correlated(2, 400, 80, 0)
    moments = second_moments(inputs, inputs[..., :1])[0]
    weights = torch.randn(2, 16, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    steps = torch.full_like(weights, 0.7)
    found = round_with_feedback(weights, steps, moments, 127)
    nearest = (weights / steps).round()
    errors = [output_error(q * steps - weights, moments).mean() for q in (found, nearest)]
    assert errors[0] < 0.5 * errors[1], errors


def test_least_squares_without_a_pull_is_that_of_torch():
    inputs = correlated(3, 60, 5, 2)
    outputs = torch.randn(3, 60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = pulled(torch.zeros(3, 2, 5, dtype=torch.float64), *second_moments(inputs, outputs), 1e-13)
    centred = [x - x.mean(1, keepdim=True) for x in (inputs, outputs)]
    assert torch.allclose(found, torch.linalg.lstsq(*centred).solution.mT, rtol=1e-6, atol=1e-8)


def test_least_squares_finds_the_weights_that_made_the_outputs():
    """Exact outputs of other weights are fitted; pure noise leaves the weights nearly as they are."""
    inputs, held_out = correlated(2, 200, 6, 4), torch.arange(200) % 4 == 0
    generator = torch.Generator().manual_seed(5)
    old, new = torch.randn(2, 2, 3, 6, dtype=torch.float64, generator=generator)
    found, moments = least_squares(inputs, inputs @ new.mT + 7, old, held_out)
    assert (output_error(found - new, moments) < 1e-3 * output_error(old - new, moments)).all()
    torch.testing.assert_close(moments, second_moments(inputs, inputs)[0], rtol=1e-12, atol=1e-14)
    noise = 100 * torch.randn(2, 200, 3, dtype=torch.float64, generator=generator)
    kept = least_squares(inputs, inputs @ old.mT + noise, old, held_out)[0]
    assert output_error(kept - old, moments).max() < 100**2 * 0.05  # unpulled it would be 6 / 150 of the noise
    nothing_to_fit = torch.ones(200, dtype=torch.bool)
    assert torch.equal(least_squares(inputs, inputs @ new.mT, old, nothing_to_fit)[0], old)


LAYERS = {
    "plain": SpikeConv2d(4, 6, 3, padding=1),
    "strided": SpikeConv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "grouped": SpikeConv2d(4, 8, 3, padding=1, groups=2),
    "depthwise": SpikeConv2d(4, 4, 5, padding=2, groups=4),
    "same": SpikeConv2d(4, 6, (2, 4), padding="same"),
    "pointwise": SpikeConv2d(4, 6, 1, stride=2),
    "transposed": SpikeConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    "wide steps": SpikeConvTranspose2d(4, 6, (3, 2), stride=(1, 3), padding=0, dilation=(2, 1)),
    "linear": SpikeLinear(4, 6),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_sampled_inputs_and_weights_give_the_outputs(name):
    op, generator = LAYERS[name], torch.Generator().manual_seed(0)
    x = torch.randn((5, 4) if name == "linear" else (5, 4, 7, 6), generator=generator)
    drawn, outputs = sample_outputs(op(x), 6, 40, generator)
    inputs = sample_inputs(op, x, drawn)  # [G, N, K]
    rows = op.rows(op.weight).unflatten(0, (len(inputs), -1))
    found = (inputs @ rows.mT).transpose(0, 1).flatten(1) + op.bias
    assert torch.allclose(found, outputs, atol=1e-5)
    assert torch.equal(from_rows(op, op.rows(op.weight)), op.weight)
    assert len(outputs) == (5 if name == "linear" else 40)


def quantized(name, bits, levels=None, per_channel="both", change=lambda net: None):
    """`net, qnet, images`: a small network, float and quantized without finetuning."""
    net, images = small_model(name)
    change(net)
    net = prepared(net, images)
    leveled = net
    if levels is not None:
        leveled = quantize_activations(net, [(images,)], "cpu", levels, per_channel=per_channel == "both")
    flags = SimpleNamespace(weight_bitwidth=bits, finetune_epochs=0, per_channel=per_channel)
    return net, quantize_finetune(leveled, [(images,)], None, "cpu", flags), images


@pytest.mark.parametrize("levels", [None, 8])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_outputs_come_nearer_to_those_of_the_float_network(name, levels):
    net, qnet, images = quantized(name, 4, levels)
    before = (qnet(images) - net(images)).square().mean()
    learn_rounding(qnet, net, [(images,)], "cpu", 100, True)
    assert (qnet(images) - net(images)).square().mean() < 0.7 * before
    again = copy.deepcopy(qnet)
    quantize_layers(again)
    for layer, same in zip(qnet.weighted_layers().values(), again.weighted_layers().values()):
        integers = layer.weight * layer.weight_scale
        assert integers.abs().max() <= largest_integer(4) + 1e-4
        assert torch.allclose(integers, integers.round(), atol=1e-4) and torch.equal(layer.weight, same.weight)


def spike_counts(snn, images, timesteps):
    """Op name -> the number of spikes of each neuron, [B, ...]."""
    counts = {}

    def count(name, current, value):
        if isinstance(value, SpikeTensor) and snn.ops[name].op.neuron is not None:
            counts[name] = value.data.double().unflatten(0, (timesteps, -1)).sum(0)

    simulate(snn, (images,), timesteps, watch=count)
    return counts


@pytest.mark.parametrize("per_channel", ["none", "both"])
@pytest.mark.parametrize("name", ["upwards", slow("bottlenecks")])
@torch.no_grad()
def test_the_network_that_listens_is_the_learnt_one(name, per_channel):
    """The conversion keeps every integer, bias and lambda; each layer, on the spikes it reads, counts as many.

    Lambdas a little larger and smaller leave room for sums that floats put above or below half way between two levels.
    """
    T = 8
    net, qnet, images = quantized(name, 8, T, per_channel)
    learn_rounding(qnet, net, [(images,)], "cpu", 100, per_channel == "both")
    options = {"listen": T, "correction": "none", "per_channel": per_channel}
    snn = trans_ann2snn_weight(qnet, [(images,)], "cpu", T, 8, **options, **CHOICES)
    for op_name, layer in snn.weighted_layers().items():
        before = qnet.ops[op_name].op
        integers = round_layer(before, before.weight, before.weight_scale, 8)
        if layer.spiking:
            assert torch.equal(layer.weight_q.float(), integers.float()), op_name
    for op_name, neuron in snn.neurons().items():
        if qnet.ops[op_name].op.levels is not None:
            assert torch.allclose(neuron.scale_factor, qnet.ops[op_name].op.levels.scale, rtol=1e-3), op_name
    counts = spike_counts(snn, images, T)
    least, most = (levels_of_layers(qnet, images, snn, counts, T, factor) for factor in (1 + 1e-5, 1 - 1e-5))
    assert len(counts) >= 3
    for op_name in least:
        assert ((least[op_name] <= counts[op_name]) & (counts[op_name] <= most[op_name])).all(), op_name
        assert (least[op_name] != most[op_name]).double().mean() < 0.1, op_name  # sums half way between two levels


def levels_of_layers(qnet, images, snn, counts, T, factor):
    """Op name -> the levels, 0 to T, of its activations in float64, with lambdas times `factor`.

    Each layer reads what the spikes of `counts`, op name -> spike counts of `snn`, stand for.
    """
    found, qnet = {}, copy.deepcopy(qnet).double()

    def note(op_name, current, value):
        levels = qnet.ops[op_name].op.levels
        if levels is not None:
            found[op_name] = (value / levels.scale * T).round()
            return counts[op_name] / T * snn.ops[op_name].op.neuron.scale_factor.double()

    for entry in qnet.ops.values():
        if entry.op.levels is not None:
            entry.op.levels.scale *= factor
    qnet.forward_ann((images.double(),), note)
    return found


@torch.no_grad()
def test_frozen_parameters_stay():
    def freeze(net):
        net.a[0].weight.requires_grad_(False)
        net.a[1].requires_grad_(False)
        net.fc2.bias.requires_grad_(False)

    net, qnet, images = quantized("shortcuts", 4, change=freeze)
    before = copy.deepcopy(qnet)
    learn_rounding(qnet, net, [(images,)], "cpu", 100, True)
    frozen = [name for name, layer in qnet.weighted_layers().items() if "weight" in layer.frozen]
    changed = [
        name
        for name, layer in qnet.weighted_layers().items()
        if not torch.equal(layer.weight, before.ops[name].op.weight)
    ]
    assert len(frozen) == 1 and frozen[0] not in changed and len(changed) >= 3
    last = list(qnet.weighted_layers())[-1]
    assert torch.equal(qnet.ops[last].op.bias, before.ops[last].op.bias)


@pytest.mark.parametrize("bits", [1, 32])
@torch.no_grad()
def test_binary_and_float_weights_stay_and_biases_are_corrected(bits):
    net, qnet, images = quantized("shortcuts", bits)
    before = copy.deepcopy(qnet)
    learn_rounding(qnet, net, [(images,)], "cpu", 100, True)
    for name, layer in qnet.weighted_layers().items():
        assert torch.equal(layer.weight, before.ops[name].op.weight)
    assert torch.allclose(qnet(images).mean(0), net(images).mean(0), atol=1e-5)


@torch.no_grad()
def test_a_silent_input_leaves_the_nearest_integers():
    """No image excites the ReLU, so nothing is known of the inputs of the last layer."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(75, 4))
    net[0].bias.data.fill_(-100.0)
    images = torch.rand(8, 2, 7, 7)
    net = prepared(net, images)
    flags = SimpleNamespace(weight_bitwidth=4, finetune_epochs=0)
    qnet = quantize_finetune(net, [(images,)], None, "cpu", flags)
    nearest = list(qnet.weighted_layers().values())[-1].weight.clone()
    learn_rounding(qnet, net, [(images,)], "cpu", 100)
    assert torch.equal(list(qnet.weighted_layers().values())[-1].weight, nearest)
    assert torch.allclose(qnet(images), net(images), atol=1e-5)


def test_one_call_and_its_default():
    net, images = small_model("bottlenecks")
    loader = [(images, torch.arange(8) % 3)]
    options = {"finetune_epochs": 0, "signed": "pair", "per_channel": "both", "device": "cpu", "timesteps": 8}
    options |= {"weight_bitwidth": 8, "listen": 8, "correction": "none"}
    learnt = convert_network(net, loader, loader, rounding="learnt", activation_levels=8, **options)
    nearest = convert_network(net, loader, loader, **options)
    same = convert_network(net, loader, loader, rounding="nearest", **options)
    with torch.no_grad():
        wanted = nearest.ann(images)
        errors = [(each.snn(images) - wanted).square().mean() for each in (learnt, nearest)]
        assert errors[0] < 0.5 * errors[1]
        assert torch.equal(nearest.snn(images), same.snn(images))
    with pytest.raises(ValueError, match="unknown rounding 'best', use one of nearest, learnt"):
        convert_network(net, loader, rounding="best", **options)


def test_no_images_are_refused():
    net, qnet, _ = quantized("shortcuts", 4)
    with pytest.raises(ValueError, match="no images to calibrate on, the data loader is empty"):
        learn_rounding(qnet, net, [], "cpu", 100)


def test_command_line():
    args = parse_args(["example_net", "-e", "0", "--activation_levels", "4"])
    with pytest.raises(ValueError, match="give it --finetune_epochs or --rounding learnt, or leave it out"):
        check_command_line(args)
    check_command_line(parse_args(["example_net", "-e", "0", "--activation_levels", "4", "--rounding", "learnt"]))
    args = parse_args(["example_net", "--rounding", "learnt"])
    assert ("rounding", "it needs --finetune_epochs 0") in without_effect(args, {"rounding"})
