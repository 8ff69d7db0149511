"""Networks exported by torch.onnx and imported again: the same outputs, and the same spikes."""

import copy
import warnings

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_every_spike_is_reproduced, convert, slow, spikes_and_first_currents, with_random_norms
from onnx import helper, numpy_helper
from onnx_models import assert_same, model, node, saved, values, whole
from torch import nn

from ann_parser import parse_ann_model
from build_network import get_net_by_name
from networks.onnx_import import load_onnx
from quantization import quantize_finetune

NETS = ("example_net", "vgg9_bn", "resnet20", "mobilenet_small", "inception_small", "unet_small")
# exporter -> arguments of torch.onnx.export; None is the default one, which uses onnxscript
EXPORTERS = {"default": {}, "unoptimized": {"optimize": False}, "old": {"dynamo": False, "opset_version": 17}}
KEEPS_NORMS = {"dynamo": False, "training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}


def network(name):
    torch.manual_seed(0)
    return with_random_norms(get_net_by_name(name, 3, 10))


def exported(net, path, size=(3, 32, 32), batch=2, **options):
    """The path of the network's ONNX file."""
    if options.get("dynamo", True):
        pytest.importorskip("onnxscript")
        options["verbose"] = False
    path = str(path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.14 says that dynamo=False will go
        torch.onnx.export(net, (torch.zeros(batch, *size),), path, **options)
    return path


@torch.no_grad()
def assert_computes_the_same(net, path, size=(3, 32, 32), batch=3):
    images = torch.randn(batch, *size)
    imported, expected = load_onnx(path), net(images)
    assert torch.allclose(imported(images), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))
    return imported


def same_spikes(net, other, images, **options):
    """Whether both convert into networks with the same spikes everywhere; there are some."""
    trains = [
        list(spikes_and_first_currents(convert(n, images, 8, **options), images, 8)[0].values()) for n in (net, other)
    ]
    assert all(train.any() for train in trains[0])
    return all(np.array_equal(a, b) for a, b in zip(*trains, strict=True))


@pytest.mark.parametrize("exporter", [slow("old"), "default", slow("unoptimized")])
@pytest.mark.parametrize("name", NETS)
def test_exported_networks(name, exporter, tmp_path):
    net = network(name)
    path = exported(net, tmp_path, **EXPORTERS[exporter])
    imported = assert_computes_the_same(net, path)
    assert imported.input_shape == (3, 32, 32) and imported.num_outputs == 10 and not imported.training
    assert_same(onnx.load(path), tmp_path)
    images = torch.randn(2, 3, 32, 32)
    traced, expected = parse_ann_model(imported, (images,)), parse_ann_model(net, (images,))
    assert list(traced.ops) == list(expected.ops)
    assert [entry.inputs for entry in traced.ops.values()] == [entry.inputs for entry in expected.ops.values()]


@pytest.mark.parametrize("opset", range(9, 21))
def test_all_opsets_of_the_old_exporter(opset, tmp_path):
    net = network("resnet20")
    assert_computes_the_same(net, exported(net, tmp_path, dynamo=False, opset_version=opset))


SIZES = {"resnet20": 8, "mobilenet_small": 8, "inception_small": 8}  # networks that take small images, too


@pytest.mark.parametrize("name", [*SIZES, *(slow(name) for name in sorted(set(NETS) - set(SIZES)))])
def test_a_file_with_batch_norms_gives_the_spikes_of_the_network(name, tmp_path):
    side = SIZES.get(name, 32)
    net, images = network(name), torch.randn(4, 3, side, side)
    imported = load_onnx(exported(net, tmp_path, (3, side, side), opset_version=17, **KEEPS_NORMS))
    assert torch.equal(net(images), imported(images))
    assert same_spikes(net, imported, images)


@pytest.mark.parametrize("options", [{}, *({"dynamo": False, "opset_version": opset} for opset in (11, 15, 20))])
@pytest.mark.parametrize("bias", [slow(False), True])
def test_a_file_with_folded_batch_norms_gives_the_spikes_of_the_network(bias, options, tmp_path):
    """The tracer rounds as the exporters do when they fold a BatchNorm, so all weights are the same, and all spikes."""
    net, images = network("resnet20"), torch.randn(4, 3, 8, 8)
    if bias:
        for conv in [module for module in net.modules() if isinstance(module, nn.Conv2d)]:
            conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    imported = load_onnx(exported(net, tmp_path, (3, 8, 8), **options))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in imported.modules())
    assert same_spikes(net, imported, images)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_network_without_batch_norms_keeps_every_spike(exporter, tmp_path):
    net, images = network("example_net"), torch.randn(8, 3, 32, 32)
    imported = load_onnx(exported(net, tmp_path, **EXPORTERS[exporter]))
    assert same_spikes(net, imported, images)
    assert_every_spike_is_reproduced(convert(imported, images), images, 16)


class OptionA(nn.Module):
    """A ResNet block whose shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):  # [B, 3, H, W]
        x = F.relu(self.norm(self.first(x)))
        y = self.conv2(F.relu(self.conv1(x)))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        x = F.avg_pool2d(x, x.size(3))
        return self.fc(x.view(x.size(0), -1))


class Many(nn.Module):
    """Operators beside those of the known networks."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3, padding="same"), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1)
        self.prelu, self.pool = nn.PReLU(4), nn.AvgPool2d(3, 2, 1, count_include_pad=False, ceil_mode=True)
        self.fc1, self.fc2 = nn.Linear(8 * 36, 7, bias=False), nn.Linear(7, 5)

    def forward(self, x):  # [B, 3, 8, 8]
        x = self.prelu(self.conv(x / 2 - 0.1))
        a, b = torch.chunk(F.leaky_relu(self.up(x), 0.1), 2, 1)
        x = torch.cat([F.interpolate(a, scale_factor=2), F.interpolate(b, size=(32, 32))], 1)  # [B, 4, 32, 32]
        x = torch.cat([self.pool(F.max_pool2d(x, 3, 3, 1)), F.avg_pool2d(F.pad(x, (1, 3, 3, 1)), 6, 6)[:, :, :6]], 1)
        x = F.hardtanh(x, 0, 3).permute(0, 1, 3, 2).unsqueeze(1).squeeze(1)
        return torch.softmax(self.fc2(F.relu(self.fc1(x.flatten(1)))), 1)


# torch.onnx exports no slices with steps in opset 9
CHOICES = [(OptionA, 11), (Many, 9), *((net, exporter) for net in (OptionA, Many) for exporter in (*EXPORTERS, 13, 20))]


@pytest.mark.parametrize("net, exporter", CHOICES)
def test_networks_with_slices_and_resizes(net, exporter, tmp_path):
    net, size = with_random_norms(net()), (3, 8, 8)
    options = EXPORTERS.get(exporter, {"dynamo": False, "opset_version": exporter})
    assert_computes_the_same(net, exported(net, tmp_path, size, **options), size)


@pytest.mark.parametrize("net, opset", [(OptionA, 11), (OptionA, 17), (Many, 11), (Many, 17)])
def test_a_dynamic_batch(net, opset, tmp_path):
    net, size = with_random_norms(net()), (3, 8, 8)
    axes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    path = exported(net, tmp_path, size, dynamo=False, opset_version=opset, **axes)
    assert_computes_the_same(net, path, size, batch=5)


def test_open_image_sizes(tmp_path):
    net = network("resnet20")
    axes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch", 2: "height", 3: "width"}}}
    path = exported(net, tmp_path, dynamo=False, opset_version=17, **axes)
    imported = assert_computes_the_same(net, path, (3, 40, 24))
    assert imported.input_shape == (3, None, None) and imported.num_outputs == 10


def test_a_batch_of_one_becomes_any(tmp_path):
    net = network("example_net")
    assert_computes_the_same(net, exported(net, tmp_path, batch=1), batch=7)


def test_layers_have_the_names_and_kinds_of_the_network(tmp_path):
    net = network("resnet20")
    for options in (EXPORTERS["old"], EXPORTERS["default"], {"opset_version": 17, **KEEPS_NORMS}):
        imported = load_onnx(exported(net, tmp_path, (3, 8, 8), **options))
        for kind in (nn.Conv2d, nn.Linear, nn.ReLU):
            expected = {path for path, module in net.named_modules() if isinstance(module, kind)}
            assert {path for path, module in imported.named_modules() if isinstance(module, kind)} == expected
    # with the BatchNorms kept, also the parameters and statistics have their names
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    assert {name: value.shape for name, value in imported.state_dict().items()} == shapes


def test_weights_are_parameters_and_statistics_are_not(tmp_path):
    net = network("resnet20")
    imported = load_onnx(exported(net, tmp_path, opset_version=17, **KEEPS_NORMS))
    assert {name for name, _ in imported.named_parameters()} == {name for name, _ in net.named_parameters()}
    assert all(p.requires_grad for p in imported.parameters())


def test_an_imported_network_is_finetuned_like_any(tmp_path):
    net, images = network("example_net"), torch.randn(8, 3, 32, 32)
    imported = load_onnx(exported(net, tmp_path, **EXPORTERS["old"]))
    args = type("Args", (), dict(finetune_lr=0.01, finetune_epochs=1, finetune_wd=0, finetune_momentum=0.9))
    args.weight_bitwidth = 4
    results = []
    for each in (net, imported):
        torch.manual_seed(3)
        loader = [(images, torch.arange(8))]
        results.append(quantize_finetune(each, loader, nn.CrossEntropyLoss(), torch.device("cpu"), args).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


def test_a_copy_computes_the_same_with_its_own_weights(tmp_path):
    imported = load_onnx(exported(network("resnet20"), tmp_path, **EXPORTERS["old"]))
    images, twin = torch.randn(2, 3, 32, 32), copy.deepcopy(imported)
    expected = imported(images)
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert torch.equal(imported(images), expected) and not torch.equal(twin(images), expected)


def test_numbers_are_those_of_the_network(tmp_path):
    """A file holds 0.7 as float32, which is 0.699999988 in Python."""
    nodes = [
        node("BatchNormalization", "x s s s s", "a", epsilon=1e-5),
        node("Clip", "a lo hi", "b"),
        node("LeakyRelu", "b", "c", alpha=0.1),
        node("Div", "c d"),
    ]
    net = load_onnx(
        saved(model(*nodes, s=abs(values(3)), lo=np.float32(0), hi=np.float32(0.7), d=np.float32(0.3)), tmp_path)
    )
    assert (net.the_BatchNormalization.eps, net.the_Clip.max_val, net.the_LeakyRelu.negative_slope) == (1e-5, 0.7, 0.1)
    assert net.the_Div.value == 0.3


def test_loading_draws_no_random_numbers(tmp_path):
    path = exported(network("resnet20"), tmp_path, **EXPORTERS["old"])
    torch.manual_seed(5)
    load_onnx(path)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_half_precision_becomes_float32(tmp_path):
    weights = dict(w=values(4, 3, 3, 3, dtype=np.float16), b=values(4, dtype=np.float16))
    path = saved(model(node("Conv", "x w b"), kind=onnx.TensorProto.FLOAT16, **weights), tmp_path)
    net, images = load_onnx(path), torch.randn(2, 3, 8, 8)
    weight, bias = (torch.from_numpy(each).float() for each in weights.values())
    assert torch.equal(net(images), F.conv2d(images, weight, bias))


def test_weights_that_stand_among_the_inputs(tmp_path):
    """IR versions below 4 demand it."""
    proto = model(node("Conv", "x w"), opset=8, w=values(4, 3, 3, 3))
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, (4, 3, 3, 3)))
    assert_same(proto, tmp_path)


def test_a_shape_without_a_declaration(tmp_path):
    proto = model(node("Conv", "x w", "z"), node("GlobalAveragePool", "z"), shape=None, w=values(4, 3, 3, 3))
    net = load_onnx(saved(proto, tmp_path))
    assert net.input_shape is None and net.num_outputs is None
    assert net(torch.zeros(2, 3, 9, 7)).shape == (2, 4, 1, 1)


CHAIN = (
    node("Shape", "x", "s"),
    node("Gather", "s zero", "b", axis=0, name="gather"),
    node("Unsqueeze", "b", "b1", axes=[0], name="unsqueeze"),
    node("Concat", "b1 rest", "to", axis=0, name="concat"),
    node("Reshape", "x to", name="reshape"),
)


@pytest.mark.parametrize("batch", [2, "b"])
def test_a_reshape_to_a_computed_shape(batch, tmp_path):
    proto = model(*CHAIN, shape=(batch, 3, 8, 8), opset=11, zero=np.int64(0), rest=whole(-1))
    net = assert_same(proto, tmp_path)
    assert net(torch.zeros(5, 3, 8, 8)).shape == (5, 192)
    assert list(parse_ann_model(net, (torch.zeros(2, 3, 8, 8),)).ops)  # the tracer follows it


def test_weights_that_constants_make(tmp_path):
    nodes = (
        node("Transpose", "w", "wt", perm=[1, 0, 2, 3]),
        node("Mul", "wt g", "scaled"),
        node("Constant", "", "eps", value=numpy_helper.from_array(np.float32(0.5))),
        node("Add", "scaled eps", "shifted", name="add"),
        node("Conv", "x shifted"),
    )
    net = assert_same(model(*nodes, w=values(3, 4, 3, 3), g=values(4, 1, 1, 1)), tmp_path)
    assert [name for name, _ in net.named_parameters()] == ["the_Conv.weight"]


def test_a_constant_behind_a_layer_joins_its_bias(tmp_path):
    nodes = (
        node("Conv", "x w", "a"),
        node("Add", "a c", "b", name="bias"),
        node("Relu", "b", "r"),
        node("Add", "b r", "y", name="residual"),
    )
    net = assert_same(model(*nodes, w=values(4, 3, 3, 3), c=values(1, 4, 1, 1)), tmp_path)
    assert [name for name, _ in net.named_parameters()] == ["the_Conv.weight", "the_Conv.bias"]
    # not if another node reads the layer's own output
    nodes = (node("Conv", "x w", "a"), node("Add", "a c", "b", name="bias"), node("Add", "a b", "y", name="residual"))
    net = assert_same(model(*nodes, w=values(4, 3, 3, 3), c=values(1, 4, 1, 1)), tmp_path)
    assert [name for name, _ in net.named_parameters()] == ["the_Conv.weight"]


def test_several_outputs(tmp_path):
    net = assert_same(model(node("Relu", "x", "r"), node("Flatten", "r", "f"), outputs="f r"), tmp_path)
    assert net.num_outputs == 192
    assert len(parse_ann_model(net, (torch.zeros(2, 3, 8, 8),)).outputs_nodes) == 2


def test_strange_names_become_module_paths(tmp_path):
    """Names of attributes, of containers, twice the same, and of no letters."""
    names = ("weight", "forward", "a/b", "a", "a", "", "ä.ö/..//", "steps")
    chain = [node("Relu", f"v{i}" if i else "x", f"v{i + 1}", name=name) for i, name in enumerate(names)]
    net = load_onnx(saved(model(*chain, outputs=f"v{len(names)}"), tmp_path))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(net(x), x.relu())
    assert sum(isinstance(module, nn.ReLU) for module in net.modules()) == len(names)
