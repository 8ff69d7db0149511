"""The correction of a converted network: rates nearer to the ANN, and neurons that are held back (`--hold_back`)."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import (
    MODELS,
    Function,
    activations_of,
    assert_every_spike_is_reproduced,
    conv,
    convert,
    small_model,
    spikes_and_first_currents,
)
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from ann2snn import parse_args
from ann_parser import parse_ann_model
from build_network import build_trained_net, get_net_by_name
from conversion import correction as spike_correction
from conversion.correction import (
    PackedSpikes,
    bias_beyond,
    bias_carrier,
    bias_carriers,
    calibration_images,
    hold_back_neuron,
)
from dag_rewrites import prepare_conversion
from finetuning.on_spikes import ann_forward, decoded_rates
from networks.checkpoint import load_weights
from reports.analysis import look_into_layers
from snn_weight_setter import trans_ann2snn_weight
from spike_tensor import SpikeTensor

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


@pytest.mark.parametrize("correction", ["potential", "bias"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_auto_holds_back_the_share_of_least_error_in_each_channel(granularity, correction):
    """In the first layer that spikes reach, where the error of a channel depends on its own share alone."""
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 6), nn.ReLU(), conv(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5))
    images = torch.rand(8, 2, 7, 7)
    known = ann_forward(ann_of(net, images), (images,))[1]

    def errors(hold_back):
        snn = convert(net, images, 8, 8, granularity=granularity, correction=correction, hold_back=hold_back)
        assert_every_spike_is_reproduced(snn, images[:2], 8)
        return (decoded_rates(snn, (images,))["relu2"] - known["relu2"]).square().mean([0, 2, 3])  # [8]

    of_shares = torch.stack([errors(share) for share in spike_correction.SHARES])
    chosen = errors("auto")
    assert (chosen <= 1.1 * of_shares.amin(0)).all()  # the trials have fewer rounds, so a near share may win
    assert chosen.sum() < of_shares.sum(1).min()  # no single share suits all channels


def test_auto_holds_nothing_back_where_nothing_can_be():
    """With reset to zero, and with as many steps of listening as of firing."""
    net, images = small_model("shortcuts")
    for options in ({"reset_mode": "zero"}, {"listen": 8}):
        snn, without = (convert(net, images, 8, 8, hold_back=share, **options) for share in ("auto", 0))
        assert torch.equal(snn(images), without(images))


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


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="hold_back 2: use a number from 0 to 1 or auto, a share of Vthr"):
        convert(net, images, 8, 8, hold_back=2)
    with pytest.raises(SystemExit) as stopped:
        parse_args(["example_net", "--hold_back", "-1"])
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_bias_correction_brings_rates_to_the_ann():
    """With reset to zero every neuron loses charge; the bias makes up for it, step by step."""
    net, images = small_model("shortcuts")
    errors = {}
    for correction in ("none", "bias"):
        snn = convert(net, images, 16, 8, reset_mode="zero", correction=correction)
        errors[correction] = (snn(images) - net(images)).abs().mean().item()
    assert errors["bias"] < 0.7 * errors["none"]
    assert snn.ops["linear1"]["op"].bias_q.dtype == torch.int32


def test_bias_correction_measures_the_residual_too():
    """What another branch adds is part of the rate that is corrected."""
    net, images = small_model("shortcuts")
    rates = {}
    for correction in ("none", "bias"):
        snn = convert(net, images, 16, 8, correction=correction)
        trains, _ = spikes_and_first_currents(snn, images, 16)
        neuron = snn.ops["relu2"]["op"].neuron
        rates[correction] = torch.from_numpy(trains["relu2"]).float().mean((0, 1, 3, 4)) * neuron.scale_factor.flatten()
    dag = parse_ann_model(net, (images,))
    dag.outputs_nodes = ("relu2_out1",)
    with torch.no_grad():
        expected = dag(images).mean((0, 2, 3))
    error = {name: (rate - expected).abs().sum().item() for name, rate in rates.items()}
    assert error["bias"] < 0.3 * error["none"]


def test_bias_is_not_corrected_where_the_image_flows_in():
    """The current of the image has its bias in float; the neuron behind it is corrected by its potential."""
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu(s.c2(x) + F.relu(s.c1(x))).flatten(1)),
        c1=conv(3, 8),
        c2=conv(3, 8),
        fc=nn.Linear(512, 10),
    )
    snn = convert(net, torch.randn(8, 3, 8, 8), 16, 8, correction="bias")
    assert snn.ops["conv2"]["op"].bias_q is None or snn.ops["conv1"]["op"].bias_q is None
    assert_every_spike_is_reproduced(snn, torch.randn(2, 3, 8, 8), 16)


# ---------------------------------------------------------------------------------------------------------------------
# correction on the spikes


@pytest.mark.parametrize("correction", ["potential", "bias"])
@pytest.mark.parametrize("name", MODELS)
def test_correction_brings_every_layer_nearer_to_the_ann(name, correction):
    net, images = small_model(name)
    dag = prepare_conversion(parse_ann_model(net, (images,)), "gate", "pair")
    errors = {}
    for kind in ("none", correction):
        snn = trans_ann2snn_weight(dag, [(images,)], "cpu", 8, 8, correction=kind)
        trains, _ = spikes_and_first_currents(snn, images, 8)
        errors[kind] = 0.0
        for layer, train in trains.items():
            dag.outputs_nodes = (f"{layer}_out1",)
            with torch.no_grad():
                activations = dag(images)
            decoded = torch.from_numpy(train).float().mean(0) * snn.ops[layer]["op"].neuron.scale_factor
            difference = (decoded - activations).flatten(2).mean(2) if decoded.dim() == 4 else decoded - activations
            errors[kind] += (difference.mean(0).abs().mean() / activations.mean()).item()
    assert errors[correction] < 0.7 * errors["none"]


def test_correction_sees_the_samples_that_it_is_given_and_no_more():
    net, images = small_model("shortcuts")
    dag = parse_ann_model(net, (images,))
    seen = []

    def loader():
        for i in range(4):
            seen.append(i)
            yield images[2 * i : 2 * i + 2], None

    chunks = calibration_images(loader(), "cpu", 3, dag, 16)
    assert seen == [0, 1] and torch.equal(torch.cat([chunk for (chunk,) in chunks]), images[:3])
    chunks = calibration_images([(images, None)], "cpu", 100, dag, 16)
    assert sum(len(chunk) for (chunk,) in chunks) == len(images)
    potentials = [
        trans_ann2snn_weight(dag, [(images[:2], None), (other, None)], "cpu", 16, 8, calibration_samples=2)
        .neurons()["relu2"]
        .initial_potential
        for other in (images[2:4], images[4:6])
    ]
    assert torch.equal(*potentials)


def test_correction_does_not_depend_on_how_the_images_are_cut(monkeypatch):
    net, images = small_model("shortcuts")
    potentials = []
    for size in (2**25, 1):
        monkeypatch.setattr(spike_correction, "CHUNK_BYTES", size)
        snn = convert(net, images, 16, 8)
        potentials.append(torch.cat([neuron.initial_potential.flatten() for neuron in snn.neurons().values()]))
    assert (potentials[0] - potentials[1]).abs().max() <= 1  # sums in another order, then rounded


@pytest.mark.parametrize("listen", [0, 8])
def test_means_of_large_maps_are_those_of_some_places(listen, monkeypatch):
    """A transposed convolution of stride 2, whose outputs are of four kinds, makes maps of 80x80 places."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 3, 2, stride=2)
    net = nn.Sequential(conv(2, 4), nn.ReLU(), up, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 80 * 80, 5))
    images = torch.rand(8, 2, 40, 40)
    known = ann_forward(ann_of(net, images), (images,))[1]["relu2"].mean([0, 2, 3])  # [3]

    def differences(**options):
        snn = convert(net, images, 8, 8, listen=listen, initial_potential=0, hold_back=0, per_channel="both", **options)
        return (decoded_rates(snn, (images,))["relu2"].mean([0, 2, 3]) - known).abs(), snn

    before, snn = differences(correction="none")
    some, _ = differences()
    monkeypatch.setattr(spike_correction, "MOST_PLACES", 80 * 80)
    everywhere, _ = differences()
    step = snn.neurons()["relu2"].scale_factor.flatten() / 8  # activation of one spike
    assert (before > 0.2 * step).any()  # neurons start half a threshold too low
    assert (everywhere < 0.07 * step).all() and (some < 0.07 * step).all()


@pytest.mark.parametrize(
    "shape, left", [((32, 32), 32 * 32), ((33, 33), 11 * 11), ((8, 200), 3 * 67), ((112, 112), 23**2)]
)
def test_places_that_are_left_meet_both_phases_of_a_stride_of_2(shape, left):
    places = torch.arange(shape[0] * shape[1]).view(1, 1, *shape)
    some = spike_correction.some_places(places)
    assert some.numel() == left
    phases = (some // shape[1] % 2).unique(), (some % shape[1] % 2).unique()
    assert all(len(each) == 2 for each in phases)
    assert spike_correction.some_places(torch.zeros(5, 2000)).numel() == 10_000  # no maps


def test_biases_of_pairs_of_signs_are_left_alone():
    torch.manual_seed(0)
    layers = [conv(2, 4), nn.ReLU(), conv(4, 4), conv(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3)]
    images = torch.rand(4, 2, 7, 7)
    snn = convert(nn.Sequential(*layers), images, 8, 8, signed="pair", correction="bias")
    assert_every_spike_is_reproduced(snn, images, 8)


def test_correction_brings_rates_to_the_ann(digits_images):
    """The mean decoded activation of every corrected layer is nearer to the ANN's."""
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    errors = {}
    for correction in ("none", "potential"):
        dag = parse_ann_model(net, (digits_images[:1],))
        snn = convert(net, digits_images, bits=8, timesteps=8, correction=correction)
        trains, _ = spikes_and_first_currents(snn, digits_images, 8)
        scales = {name: neuron.scale_factor for name, neuron in snn.neurons().items()}
        errors[correction] = [
            abs(trains[name].mean() * scales[name].item() - activations_of(dag, name, digits_images).mean().item())
            for name in trains
        ]
    assert sum(errors["potential"]) < 0.5 * sum(errors["none"])


@pytest.mark.parametrize("shape", [(12, 5), (12, 3, 5, 7), (12, 0, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_packed_spikes_are_the_same_in_the_same_order_of_memory(shape, dtype):
    data = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3).to(dtype)
    for each in (data, data.to(memory_format=torch.channels_last)) if len(shape) == 4 else (data,):
        packed = PackedSpikes(SpikeTensor.like(each, 4, torch.tensor(2.0)))
        spikes = packed.unpack()
        assert (
            torch.equal(spikes.data, each)
            and spikes.data.dtype == dtype
            and packed.bits.nbytes == -(-each.numel() // 8)
        )
        assert spikes.data.is_contiguous(memory_format=torch.channels_last) or each.is_contiguous()
        assert (spikes.timesteps, spikes.scale_factor.item()) == (4, 2.0)
