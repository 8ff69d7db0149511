"""Average poolings folded into the layers behind them: every spike, the currents, and what the chip needs for it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_every_spike_is_reproduced, convert, count_reached, spikes_and_first_currents
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import quantized_ann, simulate
from torch import nn

import ann2snn
import layers.weighted
from ann_parser import parse_ann_model
from benchmarks.accuracy import conversion_args
from build_network import get_net_by_name
from conversion.plan import plan_conversion
from dag_rewrites import prepare_conversion
from finetuning.levels import quantize_activations
from finetuning.on_spikes import finetune_spikes, shadow_weights, tandem_forward
from hw_constraints import HARDWARE, hardware_layers, hardware_table, largest_bitwidths
from kernels.currents import Int8Weights, exact_type, int8_is_exact
from networks.checkpoint import load_weights
from reports.energy import count_operations
from reports.observe import observe
from snn_transformer import SNNTransformer
from spike_dag import from_dict, load_dag
from spike_layers import SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from spike_simulator import bound_currents, node_shapes, run_ops
from spike_tensor import Memory, SpikeTensor
from transformer.saved import replay


class Poolings(nn.Module):
    """Poolings read by a convolution, through a padding by two, by a linear layer, and by what cannot weigh sums."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.left, self.right = nn.Conv2d(6, 5, 3, dilation=2), nn.ConvTranspose2d(6, 5, 2)
        self.third, self.fc1, self.fc2 = nn.Conv2d(5, 5, 1), nn.Linear(5 * 2 * 2, 7), nn.Linear(7, 3)

    def forward(self, x):  # [B, 2, 16, 16]
        x = F.avg_pool2d(F.relu(self.first(x)), 2)  # folded into `second`
        x = F.relu(self.second(x))  # [B, 6, 8, 8]
        x = F.pad(F.avg_pool2d(x, 2), (1, 0, 0, 1))  # [B, 6, 5, 5], folded into `left` and `right`
        left, right = F.relu(self.left(x)), F.relu(self.right(x))  # [B, 5, 1, 1], [B, 5, 6, 6]
        x = F.avg_pool2d(right, 3) + F.avg_pool2d(right, 3, 3)  # [B, 5, 2, 2], an add reads them
        x = F.relu(self.third(x) + F.pad(left, (0, 1, 0, 1)))
        x = F.avg_pool2d(F.relu6(x), 2, 1, 1)  # [B, 5, 3, 3], windows that overlap
        x = F.avg_pool2d(x, 2, 1)  # read as the one before, by a pooling or a linear layer; overlaps too
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


FOLDED = ["avg_pool1", "avg_pool2"]
FIRING = ["avg_pool3", "avg_pool4", "avg_pool5", "avg_pool6"]


def poolings():
    torch.manual_seed(3)
    return Poolings(), torch.rand(8, 2, 16, 16)


def chain(*layers, size=8):
    """A traced chain of layers behind a convolution of an image, with its poolings marked."""
    dag = parse_ann_model(nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), *layers), (torch.rand(1, 1, size, size),))
    return prepare_conversion(dag, "gate", avgpool="fold")


def folded_names(dag):
    return [name for name, e in dag.ops.items() if isinstance(e["op"], SpikeAvgPool2d) and e["op"].folded]


@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_every_spike(reset_mode, engine, granularity):
    net, images = poolings()
    for bits, correction in ((1, "none"), (4, "bias"), (8, "potential")):
        options = dict(reset_mode=reset_mode, granularity=granularity, correction=correction)
        snn = convert(net, images, 16, bits, avgpool="fold", **options)
        snn.set_engine(engine)
        assert folded_names(snn) == FOLDED and not set(FOLDED) & set(snn.spiking_layers())
        assert set(FIRING) < set(snn.spiking_layers())
        assert_every_spike_is_reproduced(snn, images[:3], 15)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_every_spike_of_random_poolings(data):
    """Window, stride, padding, what reads it, groups, bias, bits, scales per channel, reset and T drawn at random."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    kernel = draw(st.sampled_from([2, 3, (1, 3), 4]))
    stride = draw(st.sampled_from([None, None, 4, 1]))
    pool = nn.AvgPool2d(kernel, stride, draw(st.sampled_from([0, 0, (0, 1)])))
    common = dict(bias=draw(st.booleans()), groups=draw(st.sampled_from([1, 2])))
    conv = nn.Conv2d(4, 6, draw(st.sampled_from([1, 2])), padding=draw(st.sampled_from([0, 2])), **common)
    kind = draw(st.sampled_from(["conv", "pad", "transposed"]))
    between = {"conv": [], "pad": [nn.ZeroPad2d((1, 2, 0, 1))], "transposed": []}[kind]
    reader = nn.ConvTranspose2d(4, 6, 3, 2, **common) if kind == "transposed" else conv
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), pool, *between, reader, nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    layers += [nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    images = torch.rand(draw(st.integers(1, 3)), 2, 12, draw(st.integers(12, 14)))
    options = dict(bits=draw(st.integers(1, 8)), per_channel=draw(st.booleans()))
    options |= dict(reset_mode=draw(st.sampled_from(["zero", "subtraction"])), avgpool="fold")
    snn = convert(nn.Sequential(*layers), images, **options)
    fits = snn.ops["avg_pool2"]["op"].window <= 255
    assert folded_names(snn) == ["avg_pool1"] * (stride != 1) + ["avg_pool2"] * fits
    assert_every_spike_is_reproduced(snn, images, draw(st.sampled_from([1, 2, 15, 16, 100])))


@torch.no_grad()
def values_of(snn, images):
    """Node -> value of every op, all timesteps at a time."""
    values = {snn.inputs_nodes[0]: images}
    run_ops(snn.ops.values(), values, snn.timesteps, Memory(snn.timesteps))
    return values


def spread(weight, window, dilation):
    """The kernel that a convolution's kernel [C_out, C_in, k, k] and an average pooling of window x window make."""
    side = (weight.shape[2] - 1) * dilation * window + window
    kernel = torch.zeros(*weight.shape[:2], side, side, dtype=weight.dtype)
    for i, j in np.ndindex(*weight.shape[2:]):
        at = slice(i * dilation * window, i * dilation * window + window)
        across = slice(j * dilation * window, j * dilation * window + window)
        kernel[:, :, at, across] = weight[:, :, i, j][..., None, None]
    return kernel


@pytest.mark.parametrize("window, dilation, stride", [(2, 1, 1), (2, 2, 1), (3, 1, 2)])
def test_the_current_is_that_of_one_large_kernel(window, dilation, stride):
    torch.manual_seed(0)
    net = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(window)]
    net += [nn.Conv2d(4, 5, 3, stride, dilation=dilation), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)]
    net, images = nn.Sequential(*net), torch.rand(4, 1, 18, 18)
    net(images)
    snn = convert(net, images, 8, 4, avgpool="fold")
    layer, neuron = snn.ops["conv2"]["op"], snn.ops["relu2"]["op"].neuron
    values = values_of(snn, images)
    spikes, current = values["relu1_out1"], values["conv2_out1"]
    kernel = spread(layer.weight_q.double(), window, dilation)
    assert kernel.shape[2:] == ((2 * dilation + 1) * window,) * 2
    expected = F.conv2d(spikes.data.double(), kernel, layer.bias_q.double(), stride * window)
    assert torch.equal(current.total().double(), expected) and expected.abs().max() > 0
    assert values["avg_pool1_out1"].data.dtype == torch.uint8
    assert 1 < values["avg_pool1_out1"].data.max() <= window**2 == layer.largest_input
    # units: lambda / (window^2 s_w) of activation a unit of current
    lambda_in = snn.neurons()["relu1"].scale_factor
    _, s_w = quantized_scale(net[3].weight.detach(), 4)
    assert layer.unit.item() == pytest.approx((lambda_in / (window**2 * s_w)).item(), rel=1e-6)
    assert neuron.scale_factor.item() == pytest.approx(neuron.Vthr.item() * layer.unit.item(), rel=1e-6)
    assert neuron.largest_current >= expected.abs().max()
    reach = layer.weight_q.double().flatten(1).abs().sum(1) * window**2 + layer.bias_q.abs()
    assert neuron.largest_current == reach.max() == layer.largest_current()


def quantized_scale(weight, bits):
    from quantization import quantize_layer

    layer = SpikeConv2d(weight.shape[1], weight.shape[0], weight.shape[2])
    return quantize_layer(layer, weight, bits)


def test_sums_decode_to_the_average():
    net, images = poolings()
    values = values_of(convert(net, images, 8, 4, avgpool="fold"), images)
    averages = F.avg_pool2d(values["relu1_out1"].to_float(), 2)
    assert torch.allclose(values["avg_pool1_out1"].to_float(), averages, rtol=1e-6) and averages.max() > 0


@pytest.mark.parametrize(
    "layers, folded",
    [
        ([nn.AvgPool2d(2), nn.Conv2d(4, 2, 1), nn.ReLU()], ["avg_pool1"]),
        ([nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2), nn.ReLU()], ["avg_pool1"]),
        ([nn.AvgPool2d(2, 3), nn.ZeroPad2d(1), nn.Conv2d(4, 2, 1), nn.ReLU()], ["avg_pool1"]),
        ([nn.AvgPool2d(2), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1), nn.ReLU()], ["avg_pool2"]),
        ([nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1), nn.ReLU()], []),
        ([nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU()], []),
        ([nn.AvgPool2d(3, 2), nn.Conv2d(4, 2, 1), nn.ReLU()], []),  # windows that overlap
        ([nn.Conv2d(4, 4, 1), nn.AvgPool2d(2), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.ReLU()], []),  # of currents
        ([nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 2)], []),  # stays ANN
    ],
)
def test_which_poolings_fold(layers, folded):
    dag = chain(*layers)
    plan = plan_conversion(dag)
    assert plan.folded == folded and not set(folded) & set(plan.firing)
    assert plan_conversion(prepare_conversion(dag)).folded == []


@pytest.mark.parametrize("side, folded", [(15, ["avg_pool1"]), (16, [])])
def test_a_sum_fits_into_uint8(side, folded):
    dag = chain(nn.AvgPool2d(side), nn.Conv2d(4, 2, 1), nn.ReLU(), size=side)
    assert plan_conversion(dag).folded == folded  # windows of 225 and 256


def test_layers_that_stay_ann_fold_nothing():
    dag = chain(nn.AvgPool2d(2), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU())
    assert plan_conversion(dag, ["conv2", "relu2"]).folded == []
    assert plan_conversion(dag, ["conv3"]).folded == ["avg_pool1"]


def test_a_window_of_225_is_exact(monkeypatch):
    """All inputs fire at every step, through the largest weights: what pairs of 16 bits cannot hold."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 32, 1), nn.ReLU(), nn.AvgPool2d(15), nn.Conv2d(32, 4, 1), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(4, 2))
    nn.init.constant_(net[0].weight, 1.0), nn.init.zeros_(net[0].bias)
    nn.init.constant_(net[3].weight, 1.0)
    images = torch.ones(3, 1, 15, 15)
    for has_int8 in (True, False):
        if not has_int8:
            monkeypatch.setattr(layers.weighted, "int8_is_exact", lambda largest=1: False)
        snn = convert(net, images, 8, 8, avgpool="fold", correction="none")
        current = values_of(snn, images)["conv2_out1"].total()
        bias = snn.ops["conv2"]["op"].bias_q.view(-1, 1, 1)
        assert torch.equal(current, (32 * 127 * 225 + bias).expand_as(current).float())
        assert_every_spike_is_reproduced(snn, images, 8)


def test_int8_operators_are_tried_with_the_largest_sums():
    """Where they claim to be exact, they are, on layers of other shapes too; 1 is what plain spikes need."""
    assert int8_is_exact() in (True, False)
    for largest in (4, 49, 255):
        if not int8_is_exact(largest):
            continue
        for weight in (torch.full((16, 64, 1, 1), 127), torch.full((16, 64, 5, 3), -127)):
            weight, sums = weight.to(torch.int8), torch.full((2, 64, 7, 7), largest, dtype=torch.uint8)
            expected = F.conv2d(sums.double(), weight.double())
            assert torch.equal(Int8Weights(weight, None, ([1, 1], [0, 0], [1, 1], 1))(sums).double(), expected)


def test_currents_beyond_float32_are_exact():
    layer = SpikeLinear(3000, 1, bias=False)
    layer.largest_input = 64
    weights = torch.full((1, 3000), 127, dtype=torch.int8)
    weights[0, 0] = 126
    layer.set_integers(weights, None, torch.tensor(1.0))
    assert layer.largest_current() == 64 * (127 * 3000 - 1) > 2**24
    sums = torch.full((1, 3000), 64, dtype=torch.uint8)
    sums[0, 1] = 63
    assert layer.current_of(sums).item() == 64 * (127 * 3000 - 1) - 127


def test_types_of_a_gpu_are_tried_with_sums():
    weight = torch.full((2, 3, 3, 3), 5.0)

    def operate(spikes):
        return F.conv2d(spikes, weight.to(spikes.dtype), padding=1)

    def seen(spikes):
        largest.append(int(spikes.max()))
        return operate(spikes)

    largest = []
    assert exact_type(seen, 27 * 5 * 9, (2, 3, 6, 6), "cpu", 9) == torch.float16
    assert set(largest) == {9}
    assert exact_type(operate, 27 * 5 * 64, (2, 3, 6, 6), "cpu", 64) == torch.float32


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_save_and_load(tmp_path, granularity):
    net, images = poolings()
    snn = convert(net, images, 8, 4, avgpool="fold", granularity=granularity)
    torch.save(snn, tmp_path / "snn.pth")
    loaded = load_dag(tmp_path / "snn.pth")
    assert folded_names(loaded) == FOLDED and torch.equal(loaded(images), snn(images))
    sizes = {name: op.largest_input for name, op in loaded.weighted_layers().items()}
    expected = dict(conv1=1, conv2=4, conv3=4, conv_transpose1=4, conv4=1, linear1=1, linear2=1)
    assert sizes == expected == {name: op.largest_input for name, op in snn.weighted_layers().items()}


def test_files_from_before_there_was_a_choice_load():
    net, images = poolings()
    snn = convert(net, images, 8, 4)
    older = copy.deepcopy(snn.to_dict())
    for op in older["ops"]:
        del op["largest_input"]
        op["config"].pop("folded", None)
    assert torch.equal(from_dict(older)(images), snn(images))


@pytest.mark.parametrize("timesteps", [1, 7])
@pytest.mark.parametrize("bits", [2, 8])
def test_listening_to_everything_is_the_quantized_ann(bits, timesteps):
    net, images = poolings()
    snn = convert(net, images, timesteps, bits, listen=timesteps, avgpool="fold")
    trains, currents = spikes_and_first_currents(snn, images, timesteps)
    assert all(np.array_equal(trains[name], train) for name, train in simulate(snn, currents, timesteps).items())
    counts = quantized_ann(snn, {"relu1": trains["relu1"]}, timesteps)
    assert set(counts) == set(trains)
    for layer, train in trains.items():
        assert np.array_equal(train.astype(np.int64).sum(0), counts[layer]), layer
    assert snn.duration()["interval"] == 2 * timesteps


def test_at_many_timesteps_it_is_the_ann():
    net, images = poolings()
    snn = convert(net, images, 1024, 32, threshold="max", avgpool="fold")
    assert (snn(images) - net(images)).abs().max() <= 0.03 * net(images).abs().max()
    folded, spiking = (convert(net, images, 8, 8, threshold="max", avgpool=choice) for choice in ("fold", "spike"))
    assert len(spiking.spiking_layers()) == len(folded.spiking_layers()) + 2


@pytest.mark.parametrize("listen", [0, 8])
def test_finetuning_on_spikes(listen):
    """The forward pass is the simulation, the bounds are those of sums, and every spike holds afterwards."""
    net, images = poolings()
    snn = convert(net, images, 8, 8, listen=listen, avgpool="fold")
    expected, layers = snn(images), shadow_weights(copy.deepcopy(snn))
    outputs, activations = tandem_forward(copy.deepcopy(snn), (images,))
    assert torch.allclose(outputs, expected, rtol=1e-5, atol=1e-5) and len(layers) == 7
    assert [name for name, _ in activations if name.startswith("avg")] == FIRING
    bounds = {name: neuron.largest_current for name, neuron in snn.neurons().items()}
    bound_currents(snn)
    assert bounds == {name: neuron.largest_current for name, neuron in snn.neurons().items()}
    ann = parse_ann_model(net, (images[:1],))
    trained = finetune_spikes(snn, [(images, torch.zeros(8))], "cpu", 2, teacher=ann)
    assert not torch.equal(trained(images), expected)
    trains, currents = spikes_and_first_currents(trained, images[:3], 8)
    assert all(np.array_equal(trains[name], train) for name, train in simulate(trained, currents, 8).items())


def test_activation_levels_pass_folded_poolings_by():
    net, images = poolings()
    dag = prepare_conversion(parse_ann_model(net, (images[:1],)), avgpool="fold")
    leveled = quantize_activations(dag, [(images,)], "cpu", 8)
    levels = [name for name, entry in leveled.ops.items() if entry["op"].levels is not None]
    assert not set(levels) & set(FOLDED) and set(FIRING) < set(levels)


def test_a_folded_network_replays(tmp_path):
    net, images = poolings()
    transformer = SNNTransformer(net, [net], timesteps=8, example_inputs=(images[:1],), avgpool="fold")
    with torch.no_grad():
        transformer.inference_get_status(images)
    transformer.save_snn(tmp_path / "saved")
    assert replay(tmp_path / "saved").startswith("identical: ")
    assert folded_names(transformer.snn) == FOLDED


def test_unknown_choices_are_refused(capsys):
    net, images = poolings()
    message = "unknown average pooling 'sum', use one of spike, fold"
    with pytest.raises(ValueError, match=message):
        convert(net, images, avgpool="sum")
    with pytest.raises(ValueError, match=message):
        SNNTransformer(net, ["first"], avgpool="sum")
    with pytest.raises(SystemExit) as end:
        ann2snn.parse_args(["example_net", "--avgpool", "sum"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: argument --avgpool: invalid choice: 'sum'")
    assert ann2snn.parse_args(["example_net"]).avgpool == "spike"
    assert conversion_args("example_net:x.pth", 8, "--avgpool fold", 4, 0, "digits").avgpool == "fold"


# ---------------------------------------------------------------------------------------------------------------------
# what the chip needs


def test_fan_in_of_the_folded_kernel():
    """(k - 1) * dilation * stride + window on a side, times the channels of a group."""
    net, images = poolings()
    dag = prepare_conversion(parse_ann_model(net, (images[:1],)), avgpool="fold")
    layers = {layer.name: (layer.kernel_size, layer.in_channels, layer.fan_in) for layer in hardware_layers(dag)}
    assert not set(FOLDED) & set(layers) and set(FIRING) < set(layers)
    assert layers["conv1"] == ((3, 3), 2, 18)
    assert layers["conv2"] == ((6, 6), 2, 72)  # 3x3 behind 2x2, two groups of two channels
    assert layers["conv3"] == ((10, 10), 6, 600)  # dilation 2
    assert layers["conv_transpose1"] == ((4, 4), 6, 96)
    assert layers["linear1"] == ((1, 1), 20, 20) and layers["conv4"] == ((1, 1), 5, 5)
    plain = {layer.name: layer.fan_in for layer in hardware_layers(prepare_conversion(dag))}
    assert (plain["avg_pool1"], plain["conv2"], plain["conv3"]) == (4, 18, 54)


def test_bits_that_fit_the_folded_kernel():
    pooled = [nn.AvgPool2d(3, 4), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 9)]
    layers = hardware_layers(chain(*pooled, nn.ReLU(), size=17))
    assert [(x.kernel_size, x.fan_in, x.role) for x in layers] == [
        ((1, 1), 1, "first"),
        ((11, 11), 484, "hidden"),  # (3 - 1) * 4 + 3 on a side
        ((2, 2), 16, "hidden"),  # a linear layer weighs every spike of a window
    ]
    assert largest_bitwidths(layers, HARDWARE["v1.0"]) == [8, 2, 8]
    assert hardware_table(layers, 4, HARDWARE["v1.0"])[2][-1] == "1936 fan-in bits, over 1024"


def test_operations_are_counted_spike_by_spike():
    """Against brute force: which outputs of pooling and layer together each spike reaches, set alone to one."""
    net, images = poolings()
    snn = convert(net, images, 6, 4, avgpool="fold")
    counts = observe(snn, images[:2]).counts
    spikes, shapes = {node: count.mean(0) for node, count in counts.items()}, node_shapes(snn, images[:1])
    rows = count_operations(snn, shapes, spikes, 6)
    readers = {"avg_pool1": ["conv2"], "avg_pool2": ["conv3", "conv_transpose1"]}
    for pool, names in readers.items():
        assert (rows[pool]["synops"], rows[pool]["snn_ac"], rows[pool]["snn_mac"]) == (0, 0, 0)
        (node,) = snn.ops[pool]["in_nodes"]
        reached = {name: count_reached(Both(snn, pool, name), shapes[node]) for name in names}
        for name in names:
            expected = (spikes[node] * reached[name]).sum().item()
            assert rows[name]["synops"] == pytest.approx(expected, rel=1e-12) and expected > 0
    assert rows["avg_pool3"]["synops"] > 0


class Both:
    """A pooling, the padding behind it if any, and a layer as one linear function of the pooling's input."""

    def __init__(self, snn, pool, name):
        self.pool, self.layer = snn.ops[pool]["op"], snn.ops[name]["op"]
        self.weight = self.layer.weight
        self.pads = snn.ops["pad1"]["op"].pads if snn.ops[name]["in_nodes"] == ("pad1_out1",) else (0, 0, 0, 0)

    def operate(self, input, weight, bias):
        pooled = self.pool.operate(input, torch.ones_like(self.pool.weight, dtype=input.dtype), None)
        return self.layer.operate(F.pad(pooled, self.pads), weight, bias)


def test_example_net_folds_both_poolings(digits_images):
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    snn = convert(net, digits_images, 8, 4, avgpool="fold")
    assert snn.spiking_layers() == ["relu1", "relu2", "relu3"] and isinstance(snn(digits_images[:2]), torch.Tensor)
    assert_every_spike_is_reproduced(snn, digits_images[:10], 8)
    layers = hardware_layers(prepare_conversion(parse_ann_model(net, (digits_images[:1],)), avgpool="fold"))
    assert [layer.name for layer in layers] == ["conv1", "conv2", "conv3", "linear1"]
    assert isinstance(values_of(snn, digits_images[:1])["avg_pool2_out1"], SpikeTensor)
