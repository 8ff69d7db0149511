"""Every layer type: the graph against PyTorch, before and after folding, and every spike against the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spikes import assert_every_spike_is_reproduced, convert, spikes_and_first_currents
from torch import nn

from ann_parser import as_tuple, parse_ann_model
from build_network import NETWORKS, get_net_by_name
from conversion import correction as spike_correction
from conversion.correction import calibration_images
from conversion.plan import plan_conversion
from dag_rewrites import prepare_conversion
from quantization import init_quantize_net, quantize_finetune
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import load_dag
from spike_layers import SpikeAdd, SpikeBatchNorm, SpikeConvBN, SpikeMaxPool2d
from spike_tensor import SpikeTensor
from transformer.saved import load_saved_snn, replay, write_saved_snn


def with_statistics(net, seed=0):
    """The network in eval mode, its BatchNorms with random statistics and weights, some of them negative."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size, least, most):
        return torch.rand(size, generator=generator) * (most - least) + least

    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            size = module.num_features
            module.running_mean.copy_(draw(size, -0.2, 0.2))
            module.running_var.copy_(draw(size, 0.3, 1.5))
            module.weight.data.copy_(draw(size, -0.5, 1.5))
            module.bias.data.copy_(draw(size, -0.3, 0.5))
    return net.eval()


def trained_names():
    return [name for name in NETWORKS if not name.startswith("debug")]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", [*trained_names(), "torchvision:resnet18", "torchvision:mobilenet_v2"])
def test_graph_equals_the_network_before_and_after_folding(name, fold):
    torch.manual_seed(0)
    net = with_statistics(get_net_by_name(name, 3, 10))
    images = torch.rand(3, 3, 64 if ":" in name else 32, 64 if ":" in name else 32)
    dag = parse_ann_model(net, (images[:1],), fold)
    with torch.no_grad():
        for ours, expected in zip(as_tuple(dag(images)), as_tuple(net(images)), strict=True):
            assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1)
    norms = [entry["op"] for entry in dag.ops.values() if isinstance(entry["op"], SpikeBatchNorm)]
    assert len(norms) == (0 if fold else sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()))


class Dense(nn.Module):
    """What DenseNet does: convolutions without a ReLU are concatenated, with spikes too, and normalised before it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm0 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 1)
        self.norm3, self.down = nn.BatchNorm2d(10), nn.Conv2d(10, 6, 1, bias=False)
        self.norm4, self.fc = nn.BatchNorm2d(6), nn.Linear(6 * 9, 3)

    def forward(self, x):  # [B, 2, 7, 7]
        x = F.max_pool2d(F.relu(self.norm0(self.first(x))), 3, 1, 1)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        x = F.avg_pool2d(self.down(F.relu(self.norm3(x))), 2)  # [B, 6, 3, 3]
        return self.fc(F.relu(self.norm4(x)).flatten(1))


class Bottlenecks(nn.Module):
    """What MobileNetV2 does: depthwise convolutions, ReLU6, narrow layers without a ReLU that are added."""

    def __init__(self):
        super().__init__()
        self.first, self.norm0 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.wide = nn.ModuleList(nn.Conv2d(4, 8, 1) for _ in range(2))
        self.depth = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))
        self.last, self.fc = nn.Conv2d(4, 6, 1), nn.Linear(6, 3)

    def forward(self, x):  # [B, 2, 7, 7]
        x = self.norm0(self.first(x))
        for wide, depth, narrow in zip(self.wide, self.depth, self.narrow):
            x = x + narrow(F.relu6(depth(F.relu6(wide(x)))))
        return self.fc(F.relu(self.last(x)).mean([2, 3]))


class Shortcuts(nn.Module):
    """Adds of an identity, of a 1x1 convolution, of three branches, of a tensor with itself; a BatchNorm behind one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
        self.a, self.b, self.c = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(3))
        self.down, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc1, self.norm1d, self.fc2 = nn.Linear(4 * 49, 9, bias=False), nn.BatchNorm1d(9), nn.Linear(9, 3)

    def forward(self, x):  # [B, 2, 7, 7]
        x = self.first(x)
        x = F.relu(self.a(x) + x)
        x = F.relu(sum([self.b(x), self.down(x), x]))
        x = x + x
        y = self.c(x)
        x = F.relu(self.norm(y + y + x))
        return self.fc2(F.relu(self.norm1d(self.fc1(x.flatten(1)))))


class Upwards(nn.Module):
    """Transposed convolutions, zero paddings that differ by side, a skip, a pooling that follows its convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.merge, self.fc = nn.Conv2d(10, 4, (3, 1), dilation=(1, 2)), nn.Linear(4 * 3 * 3, 3)

    def forward(self, x):  # [B, 2, 7, 7]
        x = F.relu6(self.first(x))  # [B, 4, 3, 3]
        y = F.relu(self.norm(self.up(x)))  # [B, 6, 6, 6]
        x = torch.cat([F.pad(x, (2, 1, 0, 3)), y], 1)  # [B, 10, 6, 6]
        x = F.relu(F.max_pool2d(self.merge(x), 2, 2, ceil_mode=True))  # [B, 4, 2, 3]
        return self.fc(F.pad(x, (0, 0, 1, 0)).flatten(1))


class Preactivated(nn.Module):
    """What pre-activation ResNets do: the image's own current flows along the skip, past every BatchNorm and ReLU."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 49, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4))

    def forward(self, x):  # [B, 2, 7, 7]
        x = self.first(x)
        for i in (0, 2):
            y = self.convs[i](F.relu(self.norms[i](x)))
            x = x + self.convs[i + 1](F.relu(self.norms[i + 1](y)))
        return self.fc(F.relu(self.last(x)).flatten(1))


class Twice(nn.Module):
    """The output of a layer, read by two others and concatenated."""

    def __init__(self, layer, first, second):
        super().__init__()
        self.layer, self.first, self.second = layer, first, second

    def forward(self, x):
        x = self.layer(x)
        return torch.cat([self.first(x), self.second(x)], 1)


MODELS = {
    "dense": Dense,
    "bottlenecks": Bottlenecks,
    "shortcuts": Shortcuts,
    "upwards": Upwards,
    "preactivated": Preactivated,
}


def small_model(name):
    torch.manual_seed(1)
    return with_statistics(MODELS[name](), seed=1), torch.rand(8, 2, 7, 7)


@pytest.mark.parametrize("maxpool", ["gate", "or"])
@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", MODELS)
def test_every_spike_of_every_layer(name, reset_mode, maxpool):
    net, images = small_model(name)
    for bits, per_channel in ((1, False), (4, True), (8, False)):
        options = dict(reset_mode=reset_mode, maxpool=maxpool, signed="pair", per_channel=per_channel)
        snn = convert(net, images, 16, bits, **options)
        for timesteps in (1, 15, 16):
            assert_every_spike_is_reproduced(snn, images[:3], timesteps)


@pytest.mark.parametrize("name", MODELS)
def test_float_weights_at_many_timesteps_are_the_ann(name):
    net, images = small_model(name)
    snn = convert(net, images, 1024, 32, maxpool="gate", signed="pair", threshold="max")
    expected = net(images)
    assert (snn(images) - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_follow_the_ann(name):
    net, images = small_model(name)
    snn = convert(net, images, 256, 8, maxpool="gate", signed="pair", threshold="max", per_channel=True)
    with torch.no_grad():
        assert torch.corrcoef(torch.stack([snn(images).flatten(), net(images).flatten()]))[0, 1] >= 0.99


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_spike_of_random_layers(data):
    """Layer type, kernel 1 to 7, stride, padding, groups, bias, bits, reset, T and odd sizes drawn at random."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    size = (draw(st.integers(9, 13)), draw(st.integers(9, 13)))
    kernel = draw(st.sampled_from([1, 2, 3, (1, 3), (5, 2), 7]))
    common = dict(bias=draw(st.booleans()), groups=draw(st.sampled_from([1, 2, 4])))
    stride, padding = draw(st.sampled_from([1, 2, (2, 1)])), draw(st.sampled_from([0, (0, 1)]))
    kind = draw(st.sampled_from(["conv_bn", "transposed", "max_pool", "avg_pool", "pad", "norm_first"]))
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()]
    if kind == "transposed":
        layers += [nn.ConvTranspose2d(4, 8, kernel, stride, padding, **common)]
    elif kind == "norm_first":
        layers += [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, kernel, stride, padding, **common)]
    else:
        if kind == "max_pool":
            layers += [nn.MaxPool2d(draw(st.sampled_from([2, 3, (3, 2)])), stride, ceil_mode=draw(st.booleans()))]
        elif kind == "avg_pool":
            layers += [nn.AvgPool2d(3, stride, padding)]
        elif kind == "pad":
            layers += [nn.ZeroPad2d(draw(st.tuples(*[st.integers(0, 3)] * 4)))]
        layers += [nn.ZeroPad2d(6), nn.Conv2d(4, 8, kernel, stride, padding, **common), nn.BatchNorm2d(8)]
    layers += [draw(st.sampled_from([nn.ReLU(), nn.ReLU6()])), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    net = with_statistics(nn.Sequential(*layers), seed=draw(st.integers(0, 1000)))
    images = torch.rand(draw(st.integers(1, 3)), 1, *size)
    options = dict(
        bits=draw(st.integers(1, 8)),
        per_channel=draw(st.booleans()),
        reset_mode=draw(st.sampled_from(["zero", "subtraction"])),
        maxpool=draw(st.sampled_from(["gate", "or"])),
        correction=draw(st.sampled_from(["potential", "bias", "none"])),
    )
    assert_every_spike_is_reproduced(
        convert(net, images, **options), images, draw(st.sampled_from([1, 2, 15, 16, 100]))
    )


def test_folding_is_exact_where_it_can_be():
    net = with_statistics(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU()))
    dag = parse_ann_model(net, (torch.rand(1, 2, 7, 7),))
    assert [type(entry["op"]).__name__ for entry in dag.ops.values()] == ["SpikeConvBN", "SpikeReLU"]
    norm, conv = net[2], net[1]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    before = net[0].weight / (net[0].running_var + net[0].eps).sqrt()  # channel c feeds outputs 2c and 2c + 1
    expected = conv.weight * factor.view(-1, 1, 1, 1) * before.repeat_interleave(2).view(-1, 1, 1, 1)
    assert torch.allclose(dag.ops["conv1"]["op"].weight, expected, rtol=1e-5)


def test_finetuning_works_on_folded_weights():
    from types import SimpleNamespace

    torch.manual_seed(0)
    images = torch.randn(64, 2, 7, 7)
    labels = (images[:, 0].mean((1, 2)) > 0).long()
    net, _ = small_model("shortcuts")
    args = SimpleNamespace(
        finetune_lr=0.05, finetune_epochs=12, finetune_wd=0.0, finetune_momentum=0.9, weight_bitwidth=8
    )
    dag = parse_ann_model(net, (images[:1],))
    assert sum(isinstance(entry["op"], SpikeConvBN) for entry in dag.ops.values()) == 3
    criterion = nn.CrossEntropyLoss()
    loader = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]
    qnet = quantize_finetune(dag, loader, criterion, "cpu", args)
    with torch.no_grad():
        assert criterion(qnet(images), labels) < 0.7 * criterion(net(images), labels)
    layer = qnet.ops["conv2"]["op"]
    integers = layer.weight * layer.weight_scale
    assert torch.allclose(integers, integers.round(), atol=1e-3) and integers.abs().max() <= 127.01


def test_transposed_convolution_quantizes_per_output_channel():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU())
    dag = parse_ann_model(net, (torch.rand(1, 1, 7, 7),))
    layer = dag.ops["conv_transpose1"]["op"]
    with torch.no_grad():
        layer.weight[:2, 1] *= 100  # output channel 1
    init_quantize_net(dag, 8, per_channel=True)
    scales = layer.per_output(layer.weight_scale)
    assert len(scales) == 6 and torch.equal(layer.weight_view(scales), layer.weight_scale)
    assert scales[1] < scales[[0, 2, 3, 4, 5]].min() / 20
    assert torch.equal(layer.rows(layer.weight)[1], layer.weight[:2, 1].flatten())


def spikes(*steps):
    """SpikeTensor of one channel from lists [H, W] per step."""
    return SpikeTensor(torch.tensor(steps, dtype=torch.float32)[:, None], len(steps), 1.0)


def test_max_pooling_by_hand():
    """Three inputs in one window, T = 4: counts 1 1 1 1, 0 1 2 2, 0 0 0 1."""
    train = spikes([[1, 0, 0]], [[0, 1, 0]], [[0, 1, 0]], [[0, 0, 1]])
    for mode, expected in (("gate", [1, 0, 1, 0]), ("or", [1, 1, 1, 1])):
        pool = SpikeMaxPool2d((1, 3), (1, 3), mode=mode)
        assert pool(train).data.flatten().tolist() == expected


def test_relu6_stops_at_its_ceiling():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU6(), nn.Flatten(), nn.Linear(2, 2))
    net[0].weight.data.fill_(10.0)
    images = torch.tensor([[[[0.3, 1.0]]]])
    snn = convert(net, images, 64, 32, threshold="max", correction="none")
    assert snn.neurons()["relu1"].scale_factor.item() == 6
    assert (snn(images) - net(images)).abs().max() < 0.05


def test_max_pool_needs_a_choice():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), nn.ReLU())
    dag = parse_ann_model(net, (torch.rand(1, 1, 8, 8),))
    message = r"max_pool1 \(2\): choose .* --maxpool gate .* --maxpool or .* average pooling"
    with pytest.raises(ValueError, match=message):
        plan_conversion(dag)
    assert plan_conversion(prepare_conversion(dag, "or")).firing == ["relu1", "relu2"]
    with pytest.raises(ValueError, match="unknown max pooling 'top', use one of gate, or"):
        prepare_conversion(dag, "top")
    with pytest.raises(ValueError, match="unknown choice 'both' for signed values"):
        prepare_conversion(dag, signed="both")


def test_max_pool_and_relu_change_places():
    net, images = small_model("upwards")
    dag = prepare_conversion(parse_ann_model(net, (images,)), "gate")
    dag.lint()
    names = list(dag.ops)
    assert names.index("relu3") < names.index("max_pool1")
    with torch.no_grad():
        assert torch.allclose(dag(images), net(images), atol=1e-5)


REFUSED = {
    "max pool of signed values": (
        [nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3), nn.ReLU()],
        r"conv1 \(0\) has no ReLU behind it",
    ),
    "max pool beside a relu": (
        [Twice(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(1)), nn.Conv2d(4, 2, 3), nn.ReLU()],
        r"max_pool1 \(0.second\) pools values that may be negative, put a ReLU before it, or next behind",
    ),
    "norm between relu and padded conv": (
        [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()],
        r"batch_norm1 \(2\): this BatchNorm cannot be folded .* put it behind one, or before a ReLU",
    ),
    "conv reads conv": (
        [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.ReLU()],
        r"conv2 \(2\) has no ReLU behind it: add one .*--signed pair.*--ann_layers",
    ),
    "softmax inside": (
        [nn.Conv2d(1, 2, 3), nn.Softmax(1), nn.Conv2d(2, 2, 3), nn.ReLU()],
        r"conv1 \(0\) has no ReLU behind it",
    ),
}


@pytest.mark.parametrize("layers, message", REFUSED.values(), ids=REFUSED)
def test_refusals_name_op_path_and_advice(layers, message):
    dag = parse_ann_model(with_statistics(nn.Sequential(*layers)), (torch.rand(1, 1, 9, 9),))
    with pytest.raises(ValueError, match=message):
        plan_conversion(dag)


def test_add_of_a_branch_that_has_its_own_unit():
    """A concatenation of currents meets a convolution in an add: it gets an integer weight."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
            self.fc = nn.Linear(4 * 25, 2)

        def forward(self, x):
            x = F.relu(self.a(x))
            x = torch.cat([self.b(x), x], 1) + self.c(x)
            return self.fc(F.relu(x).flatten(1))

    torch.manual_seed(0)
    net, images = Net(), torch.rand(4, 1, 7, 7)
    snn = convert(net, images, bits=8)
    add = next(entry["op"] for entry in snn.ops.values() if isinstance(entry["op"], SpikeAdd))
    assert add.branch_weight0 is not None and add.branch_weight0.numel() == 4 and add.branch_weight1 is None
    assert_every_spike_is_reproduced(snn, images, 16)


@pytest.mark.parametrize("ann_layers", [("0",), ("3",), ("3", "4"), ("0", "1"), ("conv2",)])
def test_named_layers_stay_ann(ann_layers):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 9, 3)).eval()
    images = torch.rand(6, 1, 9, 9)
    snn = convert(net, images, 512, 8, ann_layers=ann_layers, threshold="max", per_channel=True)
    ann = {"0": "conv1", "1": "relu1", "3": "conv2", "4": "relu2", "conv2": "conv2"}
    for name in ann_layers:
        assert not snn.ops[ann[name]]["op"].spiking
    assert snn.ops["conv3"]["op"].spiking
    with torch.no_grad():
        expected = net(images)
        assert (snn(images) - expected).abs().max() <= 0.05 * expected.abs().max()
        curve = snn(images, every_step=True)
        assert curve.shape == (512, 6, 3) and torch.allclose(curve[-1], snn(images), atol=1e-5)


def test_unknown_ann_layer_is_an_error():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(98, 2))
    with pytest.raises(ValueError, match="no layer head to leave as ANN, the network has 0, 1, 2, 3"):
        convert(net, torch.rand(2, 1, 9, 9), ann_layers=("head",))


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


def test_converted_layers_of_every_type_can_be_saved(tmp_path):
    for name in MODELS:
        net, images = small_model(name)
        snn = convert(net, images, maxpool="gate", signed="pair")
        torch.save(snn, tmp_path / "snn.pth")
        assert torch.equal(load_dag(tmp_path / "snn.pth")(images), snn(images))


@pytest.mark.parametrize("name", MODELS)
def test_converted_layers_of_every_type_replay(name, tmp_path):
    net, images = small_model(name)
    snn = convert(net, images, maxpool="gate", signed="pair")
    write_saved_snn(tmp_path / "saved", snn, (images,), {})
    assert replay(tmp_path / "saved").startswith("identical: ")
    assert torch.equal(load_saved_snn(tmp_path / "saved")(images), snn(images))


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_stay_ann_between_spikes_replay(bias, tmp_path):
    torch.manual_seed(0)
    convolutions = [nn.Sequential(nn.Conv2d(c, 4, 3, padding=1, bias=bias), nn.ReLU()) for c in (1, 4, 4, 4)]
    net, images = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(144, 5)), torch.rand(6, 1, 6, 6)
    snn = convert(net, images, 8, 6, ann_layers=("1",))
    write_saved_snn(tmp_path / "saved", snn, (images,), {})
    assert replay(tmp_path / "saved").startswith("identical: ")


def test_prepared_networks_convert_after_quantization():
    net, images = small_model("bottlenecks")
    dag = parse_ann_model(net, (images,))
    init_quantize_net(dag, 4, per_channel=True)
    snn = trans_ann2snn_weight(dag, [(images,)], "cpu", 16, 4, signed="pair", per_channel=True)
    assert_every_spike_is_reproduced(snn, images, 16)


# ---------------------------------------------------------------------------------------------------------------------
# networks with extreme or unusual numbers


class Function(nn.Module):
    """`function(self, x)` on named layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(in_channels, out_channels, kernel_size=3, **options):
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, **options)


def relative_error(net, images, timesteps=512, **options):
    """Of the SNN's outputs, against the ANN's, both centred per class."""
    snn = convert(net, images, timesteps, **options)
    with torch.no_grad():
        expected, actual = (y - y.mean(0) for y in (net.eval()(images), snn(images)))
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_branches_of_next_to_nothing_stay_exact():
    """Weights that are tiny beside a bias or a residual would need thresholds beyond the exact integers."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8)
    residual = Function(
        lambda s, x: s.fc(F.relu((h := F.relu(s.c1(x))) + s.c2(h)).flatten(1)),
        c1=conv(3, 8),
        c2=conv(8, 8),
        fc=nn.Linear(512, 10),
    )
    for factor in (1e-4, 1e-9):
        for parameter in residual.c2.parameters():
            parameter.mul_(factor)
        assert relative_error(residual, images, bits=8, threshold="max", correction="none") < 0.05
    chain = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    chain[2].weight[3] *= 1e-9
    chain[2].bias[3] = 0.3
    assert relative_error(chain, images, bits=8, threshold="max", correction="none", per_channel=True) < 0.05
    chain[2].weight *= 1e-7
    snn = convert(chain, images, 16, 8)
    assert all((neuron.Vthr > 0).all() for neuron in snn.neurons().values())
    assert_every_spike_is_reproduced(snn, images[:2], 16)


def test_an_identity_beside_coarse_weights_has_a_whole_weight():
    """At 4 bits the unit moves so that the skip is a whole number of it: its gain is exact."""
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu((h := F.relu(s.c1(x))) + s.c2(h)).flatten(1)),
        c1=conv(3, 8),
        c2=conv(8, 8, groups=8),
        fc=nn.Linear(512, 10),
    )
    net.c2.weight.data *= 1.7
    images = torch.randn(16, 3, 8, 8)
    snn = convert(net, images, 64, 4)
    unit, scale = snn.ops["conv2"]["op"].unit, snn.ops["relu1"]["op"].neuron.scale_factor
    weight = snn.ops["add1"]["op"].branch_weight0
    assert 1 < weight.item() < 20 and weight.item() * unit.item() == pytest.approx(scale.item(), rel=1e-5)


def test_values_finer_than_the_weights_beside_them_are_refused():
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu(s.a(h := F.relu(s.c1(x))) + F.avg_pool2d(s.b(h), 2)).flatten(1)),
        c1=conv(3, 8),
        a=conv(8, 8, stride=2),
        b=conv(8, 8),
        fc=nn.Linear(128, 10),
    )
    with pytest.raises(ValueError, match="add1 adds values that are finer than a step of the 4-bit weights"):
        convert(net, torch.randn(4, 3, 8, 8), bits=4)


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("reader", ["add", "convolution"])
def test_a_shortcut_joined_with_itself_has_a_scale_for_every_channel(reader, bits):
    torch.manual_seed(0)
    net = Function(
        lambda s, x: (
            s.fc(F.relu(s.b(h := F.relu(s.a(x))) + torch.cat([h, h], 1)).flatten(1))
            if reader == "add"
            else s.fc(F.relu(s.c(torch.cat([h := F.relu(s.a(x)), h], 1))).flatten(1))
        ),
        a=conv(3, 4),
        b=conv(4, 8),
        c=conv(8, 8),
        fc=nn.Linear(512, 10),
    )
    net.a.weight.data *= torch.tensor([1.0, 2, 4, 8]).view(4, 1, 1, 1)
    images = torch.randn(4, 3, 8, 8)
    snn = convert(net, images, 32, bits, granularity="channel")
    assert snn.ops["relu1"]["op"].neuron.scale_factor.numel() == 4
    if bits != 32:
        assert_every_spike_is_reproduced(snn, images, 32)
    assert relative_error(net, images, bits=32, granularity="channel", threshold="max") < 0.02


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_sums_of_spikes_alone_convert_at_few_bits(bits, granularity):
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu((y := (h := F.relu(s.a(x))) + F.relu(s.b(h))) + F.relu(s.d(y))).flatten(1)),
        a=conv(1, 6),
        b=conv(6, 6),
        d=conv(6, 6, 1),
        fc=nn.Linear(384, 10),
    )
    net.b.weight.data *= torch.logspace(-2, 0, 6).view(6, 1, 1, 1)
    images = torch.rand(4, 1, 8, 8)
    assert_every_spike_is_reproduced(convert(net, images, 8, bits, granularity=granularity), images, 8)


def test_spikes_of_different_scales_do_not_share_a_channel():
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu(s.c2(torch.cat([F.relu6(s.a(x)), F.relu(s.b(x))], s.dim))).flatten(1)),
        a=conv(3, 8),
        b=conv(3, 8),
        c2=conv(8, 4),
        fc=nn.Linear(4 * 16 * 8, 10),
    )
    net.a.weight.data *= 10
    net.b.weight.data *= 100
    net.dim, images = 2, torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"concat1 puts spikes of different scales into one channel.*dim=1"):
        convert(net, images, bits=8)
    net.dim, net.c2 = 1, conv(16, 8)
    assert relative_error(net, images, bits=8, threshold="max", correction="none") < 0.05


def test_a_skip_with_a_scale_per_channel_at_a_scalar_threshold():
    """48 channels do not divide the chunks in which the compiled neurons work."""
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(
            F.relu(s.c2(h := F.relu(s.c1(x))) + torch.cat([F.relu6(s.a(h)), F.relu(s.b(h))], 1)).flatten(1)
        ),
        c1=conv(3, 8),
        a=conv(8, 24),
        b=conv(8, 24),
        c2=conv(8, 48),
        fc=nn.Linear(48 * 64, 10),
    )
    for layer, factor in ((net.a, 10), (net.b, 100), (net.c2, 30)):
        layer.weight.data *= factor
    images = torch.randn(4, 3, 8, 8)
    snn = convert(net, images, 16, 8, threshold="max")
    assert snn.ops["add1"]["op"].branch_weight1.numel() == 48 and snn.ops["relu4"]["op"].neuron.Vthr.numel() == 1
    assert_every_spike_is_reproduced(snn, images, 16)


def test_one_bit_weights_are_never_zero():
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3))
    snn = convert(net, torch.rand(8, 2, 7, 7), 16, 1)
    assert set(snn.ops["conv2"]["op"].weight_q.unique().tolist()) == {-1, 1}


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


def test_a_layer_that_is_seldom_active_keeps_its_scale():
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3))
    net[0].bias.data -= 0.5
    images = torch.rand(8, 2, 7, 7)
    active = F.relu(net[0](images)).flatten()
    assert active.kthvalue(len(active) // 2).values == 0 < active.max()
    snn = convert(net, images, 16, 32, quantile=0.5)
    assert 0 < snn.ops["relu1"]["op"].neuron.scale_factor <= active.max()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [4, 8])
def test_a_ceiling_holds_after_rounding(seed, bits):
    torch.manual_seed(seed)
    layers = [conv(2, 4), nn.ReLU6(), conv(4, 4), nn.ReLU6(), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 49, 3)]
    net = nn.Sequential(*layers)
    net[2].weight.data *= 40
    snn = convert(net, torch.rand(8, 2, 7, 7), 16, bits)
    assert snn.ops["relu2"]["op"].neuron.scale_factor <= 6


def test_large_maps_are_pooled_in_both_modes():
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10)
    )
    images = torch.randn(2, 3, 32, 32)
    for mode in ("gate", "or"):
        assert_every_spike_is_reproduced(convert(net, images, 8, 8, maxpool=mode), images, 8)


def test_two_poolings_before_a_relu_change_places():
    net = nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 4), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.ReLU())
    dag = prepare_conversion(parse_ann_model(net, (torch.rand(2, 2, 8, 8),)), "gate")
    assert list(dag.ops)[-3:] == ["relu2", "max_pool1", "max_pool2"]
    images = torch.rand(2, 2, 8, 8)
    assert torch.equal(dag(images), net(images))


def test_two_heads_are_both_last_layers():
    net = Function(
        lambda s, x: (s.a(h := F.relu(s.c1(x))).mean([2, 3]), s.b(h).mean([2, 3])),
        c1=conv(3, 8),
        a=conv(8, 5),
        b=conv(8, 4),
    )
    snn = convert(net, torch.randn(4, 3, 8, 8), 16, 8)
    assert [tuple(y.shape) for y in snn(torch.randn(4, 3, 8, 8))] == [(4, 5), (4, 4)]


def test_weights_that_are_loaded_reach_the_simulation():
    """Integers packed for one network are not used for another."""
    images = torch.rand(4, 2, 7, 7)
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layers = [conv(2, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3)]
        nets.append(convert(nn.Sequential(*layers), images, 16, 8))
    first, second = nets
    assert not torch.equal(first(images), second(images))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(images), second(images))


def test_an_empty_batch_is_refused():
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match="the batch is empty"):
        convert(net, images, 16, 8)(images[:0])


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


def test_a_branch_may_come_later_than_the_layer_it_joins():
    """relu(a(x) + x + c(relu(b(x)))): the spikes that c reads are of a later op than a, whose unit they share."""
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu(s.a(h := F.relu(s.i(x))) + h + s.c(F.relu(s.b(h)))).flatten(1)),
        i=conv(3, 4),
        a=conv(4, 4),
        b=conv(4, 4),
        c=conv(4, 4),
        fc=nn.Linear(256, 5),
    )
    images = torch.randn(4, 3, 8, 8)
    for bits in (4, 8):
        assert_every_spike_is_reproduced(convert(net, images, 8, bits), images, 8)
    assert relative_error(net, images, bits=8, threshold="max", correction="none") < 0.05


def test_biases_of_pairs_of_signs_are_left_alone():
    torch.manual_seed(0)
    layers = [conv(2, 4), nn.ReLU(), conv(4, 4), conv(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3)]
    images = torch.rand(4, 2, 7, 7)
    snn = convert(nn.Sequential(*layers), images, 8, 8, signed="pair", correction="bias")
    assert_every_spike_is_reproduced(snn, images, 8)
