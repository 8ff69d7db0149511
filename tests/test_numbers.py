"""Numbers at the edge: channels without weights, thresholds out of range, units that branches share, ties."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ann_parser import parse_ann_model
from finetuning.levels import quantize_activations
from finetuning.on_spikes import finetune_spikes
from options import FIELDS, check_option
from quantization import quantize_finetune, quantize_layers
from runtime.ranges import Whole
from snn_weight_setter import trans_ann2snn_weight
from spike_layers import SpikeConv2d

IMAGES = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 3
LOADER = [(IMAGES, LABELS)]
RANGES = {name: each.metadata["span"] for name, each in FIELDS.items() if "span" in each.metadata}


def flags(**changes):
    options = {"finetune_lr": 0.05, "finetune_epochs": 0, "finetune_wd": 1e-4, "finetune_momentum": 0.9}
    return SimpleNamespace(**options | {"weight_bitwidth": 8} | changes)


def body(*middle):
    torch.manual_seed(0)
    convs = nn.Conv2d(1, 4, 3), nn.ReLU(), *middle, nn.Conv2d(4, 4, 3)
    return nn.Sequential(*convs, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def tuned(net, **changes):
    return quantize_finetune(net, LOADER, nn.CrossEntropyLoss(), "cpu", flags(**changes))


@pytest.mark.parametrize("epochs", [0, 4])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_a_pruned_channel_sends_its_bias_alone_at_1_bit(granularity, epochs):
    """A BatchNorm of weight 0, folded: before, the channel was the loudest, of |W| = 1 beside 0.08."""
    net = body()
    net[3].weight.data[1] = 0
    qnet = tuned(net, weight_bitwidth=1, weight_granularity=granularity, finetune_epochs=epochs)
    weight = qnet.ops["conv2"]["op"].weight
    assert weight[1].abs().max() <= 1.5 * weight[[0, 2, 3]].abs().max()
    if not epochs:
        assert not weight[1].any()
        snn = trans_ann2snn_weight(qnet, LOADER, "cpu", 16, 1, per_channel=granularity == "channel")
        assert not snn.ops["conv2"]["op"].weight_q[1].any()


@pytest.mark.parametrize("bits", [1, 4])
def test_one_output_channel_with_a_bias_and_a_scale_of_its_own(bits):
    """Its unit is [1, 1, 1] and its bias [1], not [1, 1, 1]."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1), nn.ReLU(),
        nn.Linear(1, 3),
    ).eval()  # fmt: skip
    qnet = tuned(net, weight_bitwidth=bits, weight_granularity="channel")
    snn = trans_ann2snn_weight(qnet, LOADER, "cpu", 16, bits, per_channel=True, granularity="channel")
    assert [tuple(snn.ops[name]["op"].bias_q.shape) for name in ("conv2", "linear1")] == [(1,), (1,)]
    reference = trans_ann2snn_weight(qnet, LOADER, "cpu", 16, bits, per_channel=True, granularity="channel")
    reference.set_engine("reference")
    assert torch.equal(snn(IMAGES), reference(IMAGES))


class Branches(nn.Module):
    """relu(conv(a) + a) where the skip is `share` as large as the convolution beside it."""

    def __init__(self, share):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.stem.weight.data *= share
        self.stem.bias.data *= share
        self.conv.weight.data /= share
        self.fc = nn.Linear(256, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.fc((self.conv(x) + x).relu().flatten(1))


@pytest.mark.parametrize("share", [1, 0.3, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_unit_that_branches_share_is_never_one_that_is_refused(share, bits, per_channel):
    qnet = tuned(Branches(share).eval(), weight_bitwidth=bits)
    snn = trans_ann2snn_weight(qnet, LOADER, "cpu", 16, bits, per_channel=per_channel)
    assert (snn.ops["add1"]["op"].branch_weight1 >= 1).all()
    assert snn(IMAGES).isfinite().all()


def test_a_batch_norm_of_spikes_with_next_to_no_weight_keeps_its_threshold_in_range():
    """Weight 2e-4 beside a bias of 30: Vthr was -2147483648; the channel now sends what its bias alone does."""
    net = body(nn.BatchNorm2d(4), nn.ReLU())
    net[0].weight.data *= 1e-5
    net[0].bias.data *= 1e-5
    net[2].weight.data[2], net[2].bias.data[:] = 2e-4, 30.0
    dag = parse_ann_model(net, (IMAGES[:1],))
    snn = trans_ann2snn_weight(dag, LOADER, "cpu", 16, 8, correction="none")
    neuron = snn.neurons()["relu2"]
    assert neuron.Vthr.min() >= 1 and neuron.Vthr.max() <= 2**30
    assert neuron.scale_factor.flatten().tolist() == pytest.approx([30.0] * neuron.scale_factor.numel(), rel=1e-3)
    with torch.no_grad():
        assert (snn(IMAGES) - dag(IMAGES)).abs().max() < 0.1 * dag(IMAGES).abs().max()


@pytest.mark.parametrize("value", [-1.7e37, 3e38])
@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_weight_that_is_far_too_large_is_refused_by_layer_or_in_range(value, bits):
    """It gave Vthr -2.1e9 and a lambda of minus infinity, saved with status 0."""
    net = body()
    net[2].weight.data[0, 0, 0, 0] = value
    try:
        snn = trans_ann2snn_weight(tuned(net, weight_bitwidth=bits), LOADER, "cpu", 16, bits)
    except ValueError as refusal:
        assert re.search(r"\(\d\) (needs a threshold or a bias of|has NaN or infinite)", str(refusal))
        return
    for neuron in snn.neurons().values():  # where it is not refused, everything is in range
        assert neuron.Vthr.isfinite().all() and (neuron.Vthr > 0).all() and neuron.scale_factor.isfinite().all()


def test_a_converted_network_is_not_quantized_or_converted_again():
    qnet = tuned(body())
    snn = trans_ann2snn_weight(qnet, LOADER, "cpu", 8, 8)
    for work in (
        lambda: tuned(snn, weight_bitwidth=4),
        lambda: trans_ann2snn_weight(snn, LOADER, "cpu", 8, 8),
        lambda: quantize_activations(snn, LOADER, "cpu", 8),
    ):
        with pytest.raises(ValueError, match="the network is a spiking one already"):
            work()
    with pytest.raises(ValueError, match="has no spikes to finetune on"):
        finetune_spikes(qnet, LOADER, "cpu", 1, criterion=nn.CrossEntropyLoss())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_parameters_are_quantized_but_not_trained(optimizer):
    """By finetuning and by finetuning on spikes, also where a frozen BatchNorm was folded into a frozen layer."""
    net = body()
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    net[3].requires_grad_(False)
    changes = {"finetune_optimizer": optimizer, "finetune_lr": 0.01}
    before, after = tuned(net, **changes), tuned(net, **changes, finetune_epochs=3)
    snn = trans_ann2snn_weight(after, LOADER, "cpu", 8, 8, correction="none")
    spiking = finetune_spikes(snn, LOADER, "cpu", 2, criterion=nn.CrossEntropyLoss(), qnet=after)
    for name in ("conv1", "conv2"):
        assert torch.equal(before.ops[name]["op"].weight, after.ops[name]["op"].weight)
        assert torch.equal(before.ops[name]["op"].bias, after.ops[name]["op"].bias)
        assert torch.equal(snn.ops[name]["op"].weight_q, spiking.ops[name]["op"].weight_q)
    assert not torch.equal(before.ops["linear1"]["op"].weight, after.ops["linear1"]["op"].weight)


def test_what_is_frozen_does_not_hold_back_what_is_trained():
    """Its gradients were never cleared, and counted when all were cut to one length."""
    nets = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    images, labels = IMAGES * 20, LABELS  # gradients that have to be cut
    features = nets[0][:3](images).detach()
    nets[0][0].requires_grad_(False)
    options = flags(finetune_epochs=3, weight_bitwidth=32)
    with_frozen = quantize_finetune(nets[0], [(images, labels)], nn.CrossEntropyLoss(), "cpu", options)
    head = nn.Sequential(nn.Linear(144, 3))
    head.load_state_dict({"0.weight": nets[1][3].weight, "0.bias": nets[1][3].bias})
    alone = quantize_finetune(head, [(features, labels)], nn.CrossEntropyLoss(), "cpu", options)
    assert torch.allclose(with_frozen.ops["linear1"]["op"].weight, alone.ops["linear1"]["op"].weight, atol=1e-5)
    assert not torch.allclose(alone.ops["linear1"]["op"].weight, nets[1][3].weight, atol=1e-4)


@pytest.mark.parametrize("bits", [np.array(4), torch.tensor(4), np.array([4, 4, 4])])
def test_bit_widths_and_epochs_may_be_of_any_type(bits):
    assert {layer.weight_bits for layer in tuned(body(), weight_bitwidth=bits).weighted_layers().values()} == {4}
    assert tuned(body(), finetune_epochs=2.0).ops["conv1"]["op"].weight_bits == 8


def test_a_network_that_is_frozen_whole_says_so():
    net = body().requires_grad_(False)
    assert tuned(net).ops["conv1"]["op"].weight_bits == 8
    with pytest.raises(ValueError, match="every parameter of the network is frozen"):
        tuned(net, finetune_epochs=1)


@pytest.mark.parametrize(
    "name, value",
    [
        ("finetune_epochs", -1),
        ("finetune_epochs", 1.5),
        ("finetune_distill", 7),
        ("finetune_lr", math.nan),
        ("finetune_lr", -0.1),
        ("finetune_lr", "0.1"),
        ("finetune_momentum", 2),
        ("finetune_wd", math.inf),
        ("finetune_damping", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} {value!r}: use a "):
        tuned(body(), **{"finetune_epochs": 1, name: value})


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "8", True, -1, 2**31])
def test_no_range_takes_what_is_no_number_of_its_kind(name, value):
    if value == 2**31 and not isinstance(RANGES[name], Whole) and RANGES[name].most == math.inf:
        assert check_option(name, value) == 2**31  # a learning rate may be as large
        return
    if value is None and FIELDS[name].default is None:
        assert check_option(name, value) is None  # chosen by other options
        return
    with pytest.raises(ValueError, match=f"{name} .*: use a "):
        check_option(name, value)


@pytest.mark.parametrize("number", [8.0, np.int64(8), np.float32(8), np.uint8(8)])
def test_whole_numbers_of_every_type_count(number):
    snn = trans_ann2snn_weight(tuned(body(), weight_bitwidth=np.int64(4)), LOADER, "cpu", number, np.int32(4))
    assert type(snn.timesteps) is int and snn.timesteps == 8
    assert torch.equal(snn(IMAGES, timesteps=number), snn(IMAGES))
    assert {type(layer.weight_bits) for layer in snn.weighted_layers().values()} == {int}


def test_currents_of_very_many_inputs_are_exact():
    """132,105 weights of 127 sum up to more than float32 counts to."""
    layer = SpikeConv2d(140_000, 1, 1, bias=False)
    weight_q = torch.full((1, 140_000, 1, 1), 127, dtype=torch.int8)
    weight_q[0, 0] = 126
    layer.set_integers(weight_q, None, torch.tensor(1.0))
    assert layer.largest_current() > 2**24
    current = layer.current_of(torch.ones(1, 140_000, 1, 1, dtype=torch.uint8))
    assert current.dtype == torch.float64 and current.item() == 127 * 140_000 - 1


@pytest.mark.parametrize("seed", range(4))
def test_with_reset_to_zero_no_threshold_is_an_activation(seed):
    """Lambda is an activation of the calibration: the last bit of its float sum decided whether it fires."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)).eval()
    qnet = tuned(net)
    for threshold in ("max", "quantile"):
        options = {"reset_mode": "zero", "threshold": threshold, "correction": "none"}
        snn = trans_ann2snn_weight(qnet, LOADER, "cpu", 8, 8, **options)
        with torch.no_grad():
            current = qnet.ops["conv1"]["op"](IMAGES) / snn.ops["conv1"]["op"].unit
        away = (current / snn.neurons()["relu1"].Vthr - 1).abs().min().item()
        assert away > 1e-6  # ten last bits of a float32


def test_quantized_weights_keep_the_largest_input_as_a_number():
    """`quantize_layers` works on what `quantize_finetune` returns."""
    qnet = tuned(body())
    before = qnet.ops["conv2"]["op"].weight.clone()
    quantize_layers(qnet)
    assert torch.equal(before, qnet.ops["conv2"]["op"].weight)
