"""Rewrites of a traced network: folded BatchNorms, poolings behind ReLUs, equalised channels."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_every_spike_is_reproduced, conv, small_model, with_statistics
from torch import nn
from tracing import Call, trace_and_compare

from ann_parser import as_tuple, parse_ann_model
from build_network import NETWORKS, get_net_by_name
from conversion.plan import plan_conversion
from dag_rewrites import equalize_channels, prepare_conversion
from quantization import init_quantize_net
from snn_weight_setter import trans_ann2snn_weight
from spike_layers import SpikeBatchNorm

# BatchNorms between a ReLU and the layer that they fold into


BEHIND_NORM = {
    "linear": ([nn.Flatten(), nn.Linear(256, 5)], ["view1", "linear1"]),
    "pooling and linear": ([nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)], ["avg_pool1", "view1", "linear1"]),
    "global pooling": ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)], ["avg_pool1", "view1", "linear1"]),
    "pooling and convolution": ([nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, groups=2)], ["avg_pool1", "conv2"]),
    "convolution": ([nn.Conv2d(4, 6, 3)], ["conv2"]),
}
BORDERS = {
    "padded pooling": ([nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 6, 3)], ["avg_pool1", "conv2", "bias_map1"]),
    "padded convolution": ([nn.Conv2d(4, 6, 3, padding=1)], ["conv2", "bias_map1"]),
    "padding of its own": ([nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(4, 6, 3)], ["pad1", "conv2", "bias_map1"]),
    "same padding": ([nn.Conv2d(4, 6, 3, padding="same", dilation=2)], ["conv2", "bias_map1"]),
    "transposed": ([nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2)], ["conv_transpose1", "bias_map1"]),
    "padding of a 1x1 convolution": ([nn.Conv2d(4, 6, 1, padding=(0, 1))], ["conv2", "bias_map1"]),
    "a BatchNorm behind": ([nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)], ["conv2", "bias_map1"]),
    "another view": ([nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(256, 5)], ["view1", "view2", "linear1"]),
    "channels that a view mixes": ([nn.Unflatten(1, (2, 2)), nn.Flatten(2, 3), nn.Conv2d(2, 4, 1)], None),
    "read by several": (
        [Call(lambda x: torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1)), nn.Conv2d(8, 6, 1)],
        ["avg_pool1", "concat1", "conv2", "bias_map1"],
    ),
    "max pooling": ([nn.MaxPool2d(2), nn.Conv2d(4, 6, 1)], ["batch_norm1", "max_pool1", "conv2"]),  # a factor < 0
    "read twice": ([Call(lambda x: x + F.avg_pool2d(x, 1)), nn.Conv2d(4, 6, 1)], None),
}


@pytest.mark.parametrize("modules, ops", [*BEHIND_NORM.values(), *BORDERS.values()], ids=[*BEHIND_NORM, *BORDERS])
def test_batch_norm_folds_into_what_reads_it_where_that_is_exact(modules, ops):
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            values.uniform_(0.5, 1.5)
        norm.weight[0] *= -1
    dag = trace_and_compare(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), norm, *modules))
    assert ops is None or list(dag.ops) == ["conv1", "relu1", *ops]
    assert ops is not None or "batch_norm1" in dag.ops


def test_a_batch_norm_before_a_max_pooling_folds_behind_it_where_its_factors_are_positive():
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.bias, -1, 1)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), norm, nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 6, 3, padding=1)
    )
    assert list(trace_and_compare(net).ops) == ["conv1", "relu1", "max_pool1", "conv2", "bias_map1"]


def test_a_border_is_the_same_constant_at_every_size_and_zero_inside():
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.bias, -1, 1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), norm, nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    dag = trace_and_compare(net)
    border = dag.ops["bias_map1"].op.bias
    assert not border[:, 1:-1, 1:-1].any() and border[:, 0].all() and border.shape == (6, 8, 8)
    assert dag.ops["bias_map1"].op.trained_parameters() == []  # finetuning leaves it
    with pytest.raises(ValueError, match=r"of \[6, 8, 8\] is added to \[6, 9, 9\]: give images of the size"):
        dag(torch.rand(1, 3, 9, 9))


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


def test_folding_is_exact_where_it_can_be():
    net = with_statistics(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU()))
    dag = parse_ann_model(net, (torch.rand(1, 2, 7, 7),))
    assert [type(entry["op"]).__name__ for entry in dag.ops.values()] == ["SpikeConvBN", "SpikeReLU"]
    norm, conv = net[2], net[1]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    before = net[0].weight / (net[0].running_var + net[0].eps).sqrt()  # channel c feeds outputs 2c and 2c + 1
    expected = conv.weight * factor.view(-1, 1, 1, 1) * before.repeat_interleave(2).view(-1, 1, 1, 1)
    assert torch.allclose(dag.ops["conv1"]["op"].weight, expected, rtol=1e-5)


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


def test_prepared_networks_convert_after_quantization():
    net, images = small_model("bottlenecks")
    dag = parse_ann_model(net, (images,))
    init_quantize_net(dag, 4, per_channel=True)
    snn = trans_ann2snn_weight(dag, [(images,)], "cpu", 16, 4, signed="pair", per_channel=True)
    assert_every_spike_is_reproduced(snn, images, 16)


def test_two_poolings_before_a_relu_change_places():
    net = nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 4), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.ReLU())
    dag = prepare_conversion(parse_ann_model(net, (torch.rand(2, 2, 8, 8),)), "gate")
    assert list(dag.ops)[-3:] == ["relu2", "max_pool1", "max_pool2"]
    images = torch.rand(2, 2, 8, 8)
    assert torch.equal(dag(images), net(images))


def test_features_that_a_view_gathers_into_channels_are_not_equalised():
    torch.manual_seed(0)

    class Gathers(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.conv, self.fc = nn.Linear(36, 32), nn.Conv2d(8, 6, 1), nn.Linear(24, 10)

        def forward(self, x):
            maps = torch.relu(self.features(x)).view(-1, 8, 2, 2)
            return self.fc(torch.relu(self.conv(maps)).flatten(1))

    dag = parse_ann_model(Gathers(), (torch.rand(1, 36),))
    inputs, equal = torch.rand(4, 36), equalize_channels(dag)
    assert torch.equal(equal.ops["linear1"]["op"].weight, dag.ops["linear1"]["op"].weight)
    assert torch.allclose(equal(inputs), dag(inputs), atol=1e-5)
    assert not torch.equal(equal.ops["conv1"]["op"].weight, dag.ops["conv1"]["op"].weight)


def test_equalised_channels_compute_the_same(digits_images):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 5), nn.ReLU(), nn.AvgPool2d(4), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(150, 5)
    )
    with torch.no_grad():
        net[0].weight.mul_(torch.tensor([0.0, 0.1, 1, 10]).view(-1, 1, 1, 1))
    dag = parse_ann_model(net, (digits_images[:2],))
    equal = equalize_channels(dag)
    assert torch.allclose(equal(digits_images), dag(digits_images), atol=1e-4, rtol=1e-4)
    for name in ("conv1", "conv2"):
        largest = equal.ops[name]["op"].weight.flatten(1).abs().amax(1)
        assert torch.allclose(largest[largest > 0], largest.max(), rtol=1e-4)
    assert torch.equal(dag.ops["conv1"]["op"].weight, net[0].weight)


def test_layers_that_are_read_twice_are_not_equalised():
    images = torch.rand(4, 2, 4, 4)
    dag = parse_ann_model(get_net_by_name("debug_net2", 2, 2), (images,))
    equal = equalize_channels(dag)
    assert all(torch.equal(a, b) for a, b in zip(dag.state_dict().values(), equal.state_dict().values()))
