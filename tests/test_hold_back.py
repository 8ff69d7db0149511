"""--hold_back: neurons start lower, and a bias makes up for it over the T steps."""

import copy
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from test_layers import Function, conv, small_model
from test_spikes import assert_every_spike_is_reproduced, convert
from torch import nn
from torch.nn import functional as F

from ann2snn import parse_args
from ann_parser import parse_ann_model
from build_network import build_trained_net
from conversion.correction import bias_beyond, bias_carrier, bias_carriers, hold_back_neuron
from dag_rewrites import prepare_conversion
from reports.analysis import look_into_layers

ROOT = Path(__file__).parents[1]


def ann_of(net, images):
    """What `convert` converts."""
    return prepare_conversion(parse_ann_model(net, (images,)))


def held(snn, ann, name, share):
    """What is added to the bias at a step, and to u before the first step, of the neuron of op `name` of a copy."""
    snn = copy.deepcopy(snn)
    neuron, carrier = snn.ops[name]["op"].neuron, bias_carrier(snn, snn.ops[name]["in_nodes"][0])
    bias, potential = carrier.bias_q.clone(), neuron.initial_potential.clone()
    hold_back_neuron(snn, ann, name, share)
    return carrier.bias_q - bias, neuron.initial_potential - potential, neuron


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("timesteps", [4, 7])
def test_what_a_neuron_lacks_at_first_it_gets_over_the_steps(timesteps, granularity):
    """A T-th of the share at every step, in integers, and T times that less before the first."""
    net, images = small_model("shortcuts")
    snn, ann = convert(net, images, timesteps, 8, granularity=granularity, correction="none"), ann_of(net, images)
    for name in ("relu2", "relu3"):
        added, potential, neuron = held(snn, ann, name, 0.25)
        assert added.dtype == torch.int32 and potential.dtype == torch.int32 and added.min() > 0
        assert torch.equal(added, (neuron.Vthr * 0.25 / timesteps).round().int().flatten().expand_as(added))
        assert torch.equal((added * timesteps + potential.flatten()).unique(), torch.zeros(1, dtype=torch.int32))


def test_what_is_added_to_the_image_s_current_stays_a_real_number():
    """The BatchNorms along the skip of a pre-activation ResNet add to float currents: nothing there is rounded."""
    net, images = small_model("preactivated")
    snn, ann = convert(net, images, 8, 4, correction="none"), ann_of(net, images)
    norm = snn.ops["batch_norm1"]["op"]
    assert norm.bias_q.dtype == torch.float32 and norm.bias_q.frac().any()
    added, potential, neuron = held(snn, ann, "relu1", 0.25)
    assert torch.allclose(added, (neuron.Vthr * 0.25 / 8).expand_as(added), atol=1e-5)
    assert torch.allclose(potential, -8 * added, atol=1e-5)
    shifted = convert(net, images, 8, 4, correction="bias", hold_back=0).ops["batch_norm1"]["op"].bias_q
    assert shifted.dtype == torch.float32 and (shifted - norm.bias_q).abs().max() < neuron.Vthr.max()


def test_where_nothing_comes_too_early_nothing_is_held_back():
    """With reset to zero, and with as many steps of listening as of firing; with half as many, half of it."""
    net, images = small_model("shortcuts")
    ann = ann_of(net, images)
    for options in ({"reset_mode": "zero"}, {"listen": 8}):
        snn = convert(net, images, 8, 8, correction="none", **options)
        added, potential, _ = held(snn, ann, "relu2", 0.25)
        assert not added.any() and not potential.any()
        assert torch.equal(
            convert(net, images, 8, 8, **options)(images), convert(net, images, 8, 8, hold_back=0, **options)(images)
        )
    half = held(convert(net, images, 8, 8, correction="none", listen=4), ann, "relu2", 0.5)[0]
    assert torch.equal(half, held(convert(net, images, 8, 8, correction="none"), ann, "relu2", 0.25)[0])


@pytest.mark.parametrize("name", ["shortcuts", "upwards"])
def test_where_biases_are_coarse_what_is_held_back_is_rounded_with_them(name):
    """At 2 bits and 16 steps a bias is off by up to 8, of a Vthr below 64: the start has what rounding took."""
    net, images = small_model(name)
    snn, ann, T = convert(net, images, 16, 2, correction="none"), ann_of(net, images), 16
    checked = 0
    for op, neuron in snn.neurons().items():
        if not bias_carriers(snn, snn.ops[op]["in_nodes"][0]):
            continue
        added, potential = (each.flatten() for each in held(snn, ann, op, 0.25)[:2])
        wanted, rounded = (0.25 * neuron.Vthr / T).flatten().expand_as(added), -bias_beyond(snn, ann, op).flatten()
        coarse = wanted < 1
        assert torch.equal(added[coarse], (wanted + rounded).round().int()[coarse])
        late = (added - rounded)[coarse] * T
        if not coarse.any():
            continue
        assert (potential[coarse] + late).abs().max() <= 0.5 + 1e-3
        assert (late - T * wanted[coarse]).abs().max() <= T / 2 + 1e-3  # as near as a whole bias allows
        checked += coarse.sum().item()
    assert checked > 4


@pytest.mark.parametrize("join", [lambda a, h: a(h) + h, lambda a, h: h + a(h)])
def test_either_branch_of_an_add_can_carry_the_bias(join):
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu(join(s.a, F.relu(s.i(x)))).flatten(1)),
        i=conv(3, 4),
        a=conv(4, 4),
        fc=nn.Linear(256, 5),
    )
    images = torch.randn(4, 3, 8, 8)
    snn = convert(net, images, 8, 8)
    assert bias_carrier(snn, snn.ops["relu2"]["in_nodes"][0]) is snn.ops["conv2"]["op"]
    assert bias_carrier(snn, snn.ops["relu1"]["in_nodes"][0]) is None  # what the image causes is no integer
    assert not torch.equal(
        snn.ops["conv2"]["op"].bias_q, convert(net, images, 8, 8, hold_back=0).ops["conv2"]["op"].bias_q
    )
    assert_every_spike_is_reproduced(snn, images, 8)


def test_a_deep_network_comes_nearer_to_its_ann():
    """The trained resnet20 on real digits, as large and as colourful as its own images."""
    net = build_trained_net("resnet20", 3, 10, ROOT / "checkpoint" / "resnet20_cifar10_ann.pth").eval()
    digits = torch.from_numpy(load_digits().images[:48]).float()[:, None] / 16  # [B, 1, 8, 8]
    images = F.interpolate(digits, size=32, mode="bilinear").expand(-1, 3, -1, -1) * 4 - 2  # [B, 3, 32, 32]
    with torch.no_grad():
        expected = net(images)
    errors = {}
    for share in (0.0, 0.25):
        snn = convert(net, images, 8, 8, threshold="mse", granularity="channel", hold_back=share)
        errors[share] = ((snn(images) - expected).square().mean() / expected.var(0).mean()).item()
    assert errors[0.25] < 0.8 * errors[0.0]


def test_what_is_held_back_is_no_part_of_an_error():
    """Float weights leave nothing to "integers": what flows in is what the ANN's layer gives on the same spikes."""
    net, images = small_model("shortcuts")
    ann = ann_of(net, images)
    for share in (0.25, 0.0):
        snn = convert(net, images, 8, 32, hold_back=share)
        beyond = max(bias_beyond(snn, ann, name).abs().max() / snn.neurons()[name].Vthr.max() for name in snn.neurons())
        assert beyond == pytest.approx(share / 8, abs=1e-5)
        errors = look_into_layers(ann, ann, snn, images, 0.5).errors
        assert max(abs(each.summary()["parts_of_squared_error"]["integers"]) for each in errors.values()) < 1e-4


def test_a_share_out_of_range_is_refused(capsys):
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match="hold_back 2: use a number from 0 to 1, a share of Vthr"):
        convert(net, images, 8, 8, hold_back=2)
    with pytest.raises(SystemExit) as stopped:
        parse_args(["example_net", "--hold_back", "-1"])
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")
