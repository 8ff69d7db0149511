"""LeakyReLU, PReLU and max poolings of values of either sign, as pairs of spikes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CHOICES,
    assert_every_spike_is_reproduced,
    conv,
    convert,
    prepared,
    slow,
    spikes_and_first_currents,
    with_statistics,
    with_status,
)
from reference import quantized_ann, simulate
from torch import nn
from tracing import after_conv, image, largest_difference, trace_and_compare

from ann_parser import parse_ann_model
from dag_rewrites import equalize_channels, prepare_conversion
from finetuning.levels import quantize_activations
from finetuning.on_spikes import finetune_spikes
from quantization import init_quantize_net, quantize_finetune
from reports.energy import count_operations
from reports.observe import observe
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import from_dict, load_dag
from spike_layers import LeakyReLUOp, MergeSigns, SignedReLU, SpikeMaxPool2d, SpikeReLU
from spike_simulator import node_shapes
from spike_tensor import SpikeTensor
from transformer.saved import load_saved_snn, replay, write_saved_snn

SLOPES = [0.0, 0.01, 0.1, 0.25, 1.0, -0.3, 2.0, 1e-9]


def prelu(channels, least=-0.3, most=0.6):
    """A PReLU with a slope of its own for every channel, some negative, one 0."""
    layer = nn.PReLU(channels)
    layer.weight.data = torch.linspace(least, most, channels).round(decimals=1)
    return layer


class Darknet(nn.Module):
    """What Darknet-53 does: x + leaky(conv(leaky(conv(x))))."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(conv(2, 6, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(0.1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 3, 1), nn.LeakyReLU(0.1), conv(3, 6), nn.BatchNorm2d(6), nn.LeakyReLU(0.1))
            for _ in range(2)
        )
        self.down = nn.Sequential(nn.Conv2d(6, 4, 3, 2, 1), nn.LeakyReLU(0.1))
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):  # [B, 2, 8, 8]
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.down(x))


class YoloTiny(nn.Module):
    """Max poolings of leaky values, one of stride 1 with a padding, a concatenation, two heads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(2, 4), conv(4, 4), conv(4, 4)
        self.up, self.d = nn.ConvTranspose2d(4, 3, 2, 2), conv(7, 4)
        self.large, self.small = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):  # [B, 2, 8, 8]
        route = F.leaky_relu(self.b(F.max_pool2d(F.leaky_relu(self.a(x), 0.1), 2)), 0.1)
        y = F.max_pool2d(F.pad(F.leaky_relu(self.c(F.max_pool2d(route, 2)), 0.1), (1, 0, 0, 1)), 2, 1)
        y = F.max_pool2d(y, 3, 1, 1)
        z = torch.cat([F.leaky_relu(self.up(y), 0.2), route], 1)
        return self.large(y).flatten(1), self.small(F.leaky_relu(self.d(z), 0.1))


class PReLUBlock(nn.Module):
    """A residual block whose values of either sign go on past its convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(conv(2, 6), prelu(6))
        self.conv1, self.norm1, self.act1 = conv(6, 6), nn.BatchNorm2d(6), prelu(6, 0.0, 0.5)
        self.conv2, self.norm2, self.act2 = conv(6, 6), nn.BatchNorm2d(6), prelu(6, -0.2, 1.3)
        self.fc = nn.Linear(6 * 16, 3)

    def forward(self, x):  # [B, 2, 8, 8]
        x = self.first(x)
        x = self.act2(self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))) + x)
        return self.fc(F.avg_pool2d(x, 2).flatten(1))


class Mixed(nn.Module):
    """Signed values beside spikes, max poolings without a ReLU, an image's LeakyReLU, grouped and linear readers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(2, 4), conv(4, 4, groups=2), conv(8, 4, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2, groups=2)
        self.fc1, self.fc2, self.act = nn.Linear(4 * 16, 8), nn.Linear(8, 3), prelu(8)
        self.steep, self.last = prelu(4), nn.LeakyReLU(0.5)

    def forward(self, x):  # [B, 2, 8, 8]
        x = F.max_pool2d(self.a(F.leaky_relu(x)), 2)
        x = torch.cat([F.relu(self.b(x)), F.leaky_relu(x, 0.3)], 1)
        x = F.max_pool2d(self.steep(self.up(self.c(x))), 2)  # a negative slope: not monotone
        return self.last(self.fc2(self.act(self.fc1(x.flatten(1)))))


NETWORKS = {"darknet": Darknet, "yolo": YoloTiny, "prelu block": PReLUBlock, "mixed": Mixed}


def network(name):
    torch.manual_seed(1)
    return with_statistics(NETWORKS[name](), seed=1), torch.randn(8, 2, 8, 8)


def outputs_of(net, images):
    """All outputs of a network side by side, [B, N]."""
    with torch.no_grad():
        outputs = net(images)
    return torch.cat([x.flatten(1) for x in (outputs if isinstance(outputs, tuple) else (outputs,))], 1)


# ---------------------------------------------------------------------------------------------------------------------
# The ANN function

SPELLINGS = {
    "LeakyReLU": nn.LeakyReLU(0.3),
    "LeakyReLU in place": nn.LeakyReLU(0.3, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x),
    "leaky_relu, negative": lambda x: F.leaky_relu(x, negative_slope=-0.5),
    "leaky_relu_": lambda x: F.leaky_relu_(x, 0.2),
    "PReLU": nn.PReLU(init=0.7),
    "PReLU, per channel": prelu(4),
    "torch.prelu": lambda x: torch.prelu(x, torch.tensor([0.1, -1.0, 0.0, 2.0])),
    "x.prelu": lambda x: x.prelu(torch.tensor([0.4])),
    "RReLU": nn.RReLU(0.1, 0.5),
    "RReLU in place": nn.RReLU(0.1, 0.5, inplace=True),
    "rrelu_": lambda x: F.rrelu_(x, 0.2, 0.3),
    "abs": lambda x: x.abs(),
    "abs()": lambda x: abs(x),
    "abs_": lambda x: x.abs_(),
}


@pytest.mark.parametrize("function", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_traced(function):
    module = function if isinstance(function, nn.Module) else None
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), module) if module else after_conv(function)
    assert isinstance(trace_and_compare(net).ops["leaky_relu1"].op, LeakyReLUOp)


@pytest.mark.parametrize("function", [F.rrelu, lambda x, training: F.rrelu_(x, training=training)])
def test_random_slopes_are_refused(function):
    with pytest.raises(NotImplementedError, match=r"pass training=self\.training"):
        parse_ann_model(after_conv(lambda x: function(x, training=True)), (image(),))


def test_slopes_from_the_image_are_refused():
    with pytest.raises(NotImplementedError, match=r"prelu .* must not be computed from the input"):
        parse_ann_model(after_conv(lambda x: F.prelu(x, x)), (image(),))


@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_compute_the_same(name):
    net, images = network(name)
    dag = prepared(net, images)
    dag.lint()
    expected = outputs_of(net, images)
    assert (outputs_of(dag, images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    left = [entry.op for entry in dag.ops.values() if isinstance(entry.op, LeakyReLUOp)]
    assert len(left) == (name == "mixed")  # that of the image


def test_sums_of_pairs_stand_where_they_are_needed_only():
    merges = {
        name: [e.inputs for e in prepared(*network(name)).ops.values() if isinstance(e.op, MergeSigns)]
        for name in NETWORKS
    }
    assert [len(merges[name]) for name in NETWORKS] == [3, 0, 1, 5]


def test_a_leaky_relu_of_values_that_are_not_negative_is_gone():
    net = nn.Sequential(conv(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.LeakyReLU(0.1), conv(4, 4), nn.ReLU())
    assert [type(entry.op) for entry in prepared(net, torch.rand(2, 2, 8, 8)).ops.values()].count(SignedReLU) == 0


def test_max_poolings_go_behind_a_monotone_leaky_relu():
    for act, first in ((nn.LeakyReLU(0.1), "leaky_relu1"), (prelu(4), "max_pool1")):
        net = nn.Sequential(conv(2, 4), nn.MaxPool2d(2), act, conv(4, 4), nn.ReLU())
        dag = prepare_conversion(parse_ann_model(net, (torch.rand(2, 2, 8, 8),)), "gate")
        assert list(dag.ops)[1] == first


# ---------------------------------------------------------------------------------------------------------------------
# Spikes


@pytest.mark.parametrize("maxpool", ["gate", slow("or")])
@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_spike_of_pairs(name, reset_mode, maxpool):
    net, images = network(name)
    for bits, more in ((1, {}), (4, dict(per_channel="both")), (8, dict(avgpool="fold"))):
        snn = convert(net, images, 16, bits, reset_mode=reset_mode, maxpool=maxpool, signed="pair", **more)
        for timesteps in (1, 15, 16):
            assert_every_spike_is_reproduced(snn, images[:3], timesteps)


@pytest.mark.parametrize("name", NETWORKS)
def test_listening_to_everything_is_the_quantized_ann(name):
    net, images = network(name)
    snn = convert(net, images, 7, 4, listen=7, **CHOICES)
    trains, currents = spikes_and_first_currents(snn, images, 7)
    from_image = {name for name, neuron in snn.neurons().items() if neuron.largest_current is None}
    counts = quantized_ann(snn, {name: trains[name] for name in from_image}, 7)
    expected = simulate(snn, currents, 7)
    assert set(counts) == set(trains) and len(counts) > len(from_image)
    for layer, train in trains.items():
        assert np.array_equal(train, expected[layer]), layer
        assert np.array_equal(train.astype(np.int64).sum(0), counts[layer]), layer


@pytest.mark.parametrize("per_channel", [slow("none"), "both"])
@pytest.mark.parametrize("name", NETWORKS)
def test_float_weights_and_eight_bits_follow_the_ann(name, per_channel):
    net, images = network(name)
    expected = outputs_of(net, images)
    options = dict(**CHOICES, threshold="max", per_channel=per_channel)
    exact = outputs_of(convert(net, images, 1024, 32, **options), images)
    assert (exact - expected).abs().max() <= 0.03 * expected.abs().max()
    close = outputs_of(convert(net, images, 256, 8, **options), images)
    assert torch.corrcoef(torch.stack([close.flatten(), expected.flatten()]))[0, 1] >= 0.99


@pytest.mark.parametrize("slope", SLOPES)
def test_every_slope_converts(slope):
    torch.manual_seed(0)
    layers = [conv(2, 4), nn.LeakyReLU(slope), conv(4, 4), nn.LeakyReLU(slope), nn.Flatten(), nn.Linear(256, 3)]
    net = nn.Sequential(*layers)
    images = torch.randn(8, 2, 8, 8)
    snn = convert(net, images, 1024, 8, **CHOICES, threshold="max")
    expected = outputs_of(net, images)
    assert (outputs_of(snn, images) - expected).abs().max() <= 0.03 * expected.abs().max()
    assert_every_spike_is_reproduced(snn, images[:3], 16)


def test_the_slope_stands_in_the_threshold_and_the_integers_stay():
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 4), nn.LeakyReLU(0.25), conv(4, 4), nn.ReLU())
    images = torch.rand(8, 2, 8, 8)
    dag = parse_ann_model(net, (images[:2],))
    init_quantize_net(dag, 4)
    before = (dag.ops["conv3"].op.weight * dag.ops["conv3"].op.weight_scale).round()
    snn = trans_ann2snn_weight(dag, [(images,)], "cpu", 16, 4, signed="pair")
    weight_q, neuron = snn.ops["conv3"].op.weight_q, snn.ops["leaky_relu1"].op.neuron
    assert torch.equal(weight_q[:, 0::2], before) and torch.equal(weight_q[:, 1::2], -before)
    assert (neuron.Vthr[1::2] == 4 * neuron.Vthr[0::2]).all() and not neuron.Vthr.is_floating_point()
    assert neuron.scale_factor.max() == neuron.scale_factor.min()


def test_max_pooling_of_pairs_by_hand():
    """A window of three pairs, T = 4. Largest counts of relu(x): 1 1 2 2. Smallest of relu(-x): 0 1 1 2."""
    first = [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]
    second = [[0, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 1]]
    train = SpikeTensor(torch.tensor([[[a], [b]] for a, b in zip(first, second)], dtype=torch.float32), 4, 1.0)
    for mode, largest, smallest in (("gate", [1, 0, 1, 0], [0, 1, 0, 1]), ("or", [1, 1, 1, 1], [0, 0, 0, 1])):
        sent = SpikeMaxPool2d((1, 3), (1, 3), mode=mode, pairs=True)(train).data
        assert sent[:, 0].flatten().tolist() == largest and sent[:, 1].flatten().tolist() == smallest


def test_padding_counts_for_neither_sign():
    x = torch.full((1, 2, 3, 3), 2.0)
    pool = SpikeMaxPool2d((3, 3), (1, 1), (1, 1), pairs=True)
    assert torch.equal(pool.activation(x), x)


# ---------------------------------------------------------------------------------------------------------------------
# Advice


@pytest.mark.parametrize("act", [nn.LeakyReLU(), nn.PReLU(), nn.PReLU(4), nn.RReLU()], ids=str)
def test_without_pairs_the_advice_is_to_give_them(act):
    net = nn.Sequential(conv(2, 4), act, conv(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"leaky_relu1 \(1\): .* give --signed pair"):
        convert(net.eval(), torch.rand(4, 2, 8, 8))


def test_at_the_end_and_at_the_image_it_may_stay_ann():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LeakyReLU(), conv(2, 4), nn.ReLU(), conv(4, 4), nn.LeakyReLU())
    images = torch.randn(8, 2, 8, 8)
    snn = convert(net, images, 512, 32, threshold="max")
    assert largest_difference(snn(images), net(images)) < 0.02


def test_named_layers_stay_ann():
    net, images = network("darknet")
    snn = convert(net, images, 256, 8, **CHOICES, threshold="max", ann_layers=("first", "blocks.0"))
    expected = outputs_of(net, images)
    assert (outputs_of(snn, images) - expected).abs().max() <= 0.1 * expected.abs().max()
    assert not snn.ops["leaky_relu1"].op.spiking and snn.ops["leaky_relu6"].op.spiking


# ---------------------------------------------------------------------------------------------------------------------
# All that works on a network


@pytest.mark.parametrize("name", NETWORKS)
def test_files_hold_every_bit(name, tmp_path):
    net, images = network(name)
    snn = convert(net, images, **CHOICES, per_channel="both")
    for each in (parse_ann_model(net, (images[:2],)), snn):
        torch.save(each, tmp_path / "net.pth")
        assert torch.equal(outputs_of(load_dag(tmp_path / "net.pth"), images), outputs_of(each, images))
    write_saved_snn(tmp_path / "saved", snn, (images,), {})
    assert replay(tmp_path / "saved").startswith("identical: ")
    assert torch.equal(outputs_of(load_saved_snn(tmp_path / "saved"), images), outputs_of(snn, images))


@pytest.mark.parametrize("change", [dict(slope=torch.ones(3)), dict(signs=torch.ones(5)), dict(block=7)])
def test_damaged_files_are_refused(change):
    net, images = network("darknet")
    data = convert(net, images, **CHOICES).to_dict()
    (key,) = change
    for entry in data["ops"]:
        if key in entry["config"]:
            entry["config"][key] = change[key]
            if key in entry["tensors"]:
                entry["tensors"][key] = change[key]
    with pytest.raises(ValueError):
        from_dict(data)(images)


@pytest.mark.parametrize("name", ["darknet", "prelu block"])
def test_equalised_channels_compute_the_same(name):
    net, images = network(name)
    dag = prepared(net, images)
    equal = equalize_channels(dag)
    expected = outputs_of(net, images)
    assert (outputs_of(equal, images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert any(not torch.equal(a, b) for a, b in zip(dag.state_dict().values(), equal.state_dict().values()))


@pytest.mark.parametrize("per_channel", [False, True])
def test_levels_then_finetuning_then_conversion(per_channel):
    torch.manual_seed(0)
    net, _ = network("prelu block")
    images = torch.randn(64, 2, 8, 8)
    labels = (images[:, 0].mean((1, 2)) > 0).long()
    loader = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]
    dag, criterion = prepared(net, images), nn.CrossEntropyLoss()
    leveled = quantize_activations(dag, loader, "cpu", 8, per_channel=per_channel)
    args = SimpleNamespace(
        finetune_lr=0.05, finetune_epochs=8, finetune_wd=0.0, finetune_momentum=0.9, weight_bitwidth=8
    )
    qnet = quantize_finetune(leveled, loader, criterion, "cpu", args)
    spikes = "spikes" if per_channel else "none"
    snn = trans_ann2snn_weight(qnet, loader, "cpu", 8, 8, per_channel=spikes)
    with torch.no_grad():
        assert criterion(qnet(images), labels) < 0.8 * criterion(net(images), labels)
        assert (snn(images).argmax(1) == qnet(images).argmax(1)).float().mean() > 0.8
    assert_every_spike_is_reproduced(snn, images[:3], 8)


@pytest.mark.parametrize("gradient", ["time", "tandem"])
def test_finetuning_on_spikes_lowers_the_error(gradient):
    net, images = network("yolo" if gradient == "tandem" else "darknet")
    dag = prepared(net, images)
    init_quantize_net(dag, 4)
    snn = trans_ann2snn_weight(dag, [(images,)], "cpu", 4, 4)
    tuned = finetune_spikes(snn, [(images,)], "cpu", 15, teacher=prepared(net, images), qnet=dag, gradient=gradient)
    expected = outputs_of(net, images)
    errors = [(outputs_of(each, images) - expected).square().mean() for each in (snn, tuned)]
    assert errors[1] < errors[0]
    assert_every_spike_is_reproduced(tuned, images[:3], 4)


def test_operations_of_pairs_count_the_ann_once():
    net, images = network("yolo")
    snn, plain = convert(net, images, **CHOICES), parse_ann_model(net, (images[:2],))
    counts = observe(snn, images[:2]).counts
    spikes, shapes = {node: count.mean(0) for node, count in counts.items()}, node_shapes(snn, images[:1])
    rows = count_operations(snn, shapes, spikes, 16)
    ann = count_operations(plain, node_shapes(plain, images[:1]), {}, 16)
    for name in plain.weighted_layers():
        assert rows[name]["ann_mac"] == ann[name]["ann_mac"] and rows[name]["ann_ac"] == ann[name]["ann_ac"]
        assert name == "conv1" or rows[name]["synops"] > 0 or not snn.ops[name].op.spiking


def test_an_average_pooling_of_pairs_counts_the_ann_once():
    net, images = network("prelu block")
    snn, plain = convert(net, images, **CHOICES), parse_ann_model(net, (images[:2],))
    rows = count_operations(snn, node_shapes(snn, images[:1]), {}, 16)
    ann = count_operations(plain, node_shapes(plain, images[:1]), {}, 16)
    assert rows["avg_pool1"]["ann_ac"] == ann["avg_pool1"]["ann_ac"] > 0


def test_a_stretch_of_leaky_layers_converts():
    net, images = network("darknet")
    layers = ["first", "blocks.0", "blocks.1", "down"]
    transformer = with_status(net, layers, images, signed="pair", timesteps=64, threshold="max")
    with pytest.raises(ValueError, match="--signed pair"):
        with_status(net, layers, images)
    ann_snn = transformer.generate_ann_snn()
    expected = outputs_of(net, images)
    assert torch.corrcoef(torch.stack([outputs_of(ann_snn, images).flatten(), expected.flatten()]))[0, 1] >= 0.95


def test_a_relu_behind_a_leaky_relu_is_a_relu():
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(2, 4), nn.LeakyReLU(0.1), nn.ReLU(), conv(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
    )
    images = torch.randn(8, 2, 8, 8)
    dag = prepared(net, images)
    assert [type(entry.op) for entry in dag.ops.values()].count(SpikeReLU) == 2
    assert_every_spike_is_reproduced(convert(net, images, **CHOICES), images, 16)
