"""The tracer: equal outputs, names, refusals, and that the traced network and torch stay as they were."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import resolve_name

from ann_parser import parse_ann_model, wrapped_functions
from snn_weight_setter import trans_ann2snn_weight

TRACED_BATCH, OTHER_BATCHES = 2, (1, 3, 5)


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class FunctionalConv(nn.Module):
    """A convolution written with F.conv2d."""

    def __init__(self, in_channels, out_channels, kernel_size, groups=1, bias=True, **options):
        super().__init__()
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, *kernel) / 3)
        self.bias = nn.Parameter(torch.randn(out_channels)) if bias else None
        self.options = {"groups": groups, **options}

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, **self.options)


class FunctionalLinear(nn.Module):
    """A linear layer written with F.linear."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / 3)
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class BasicBlock(nn.Module):
    """A residual block with in-place operations, as in ResNet."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        out = self.relu(self.conv1(x))
        out = self.conv2(out)
        out += x
        return self.relu(out)


class SmallResNet(nn.Module):
    """Changes its own input in place, and ends in a dropout."""

    def __init__(self, last=F.log_softmax):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(BasicBlock(4), BasicBlock(4))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 5)
        self.last = last

    def forward(self, x):
        x = self.conv1(x.relu_())
        x = F.relu(x, inplace=True)
        x = self.layer1(x)
        x = self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return self.last(self.fc(x), dim=1)


def after_conv(function):
    """A convolution [B, 3, 8, 8] -> [B, 4, 8, 8], and a function of its output."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Call(function))


def in_a_block(module):
    """A network whose module `block.inner` is the given one."""
    net = nn.Sequential()
    net.add_module("first", nn.Conv2d(3, 4, 1))
    net.add_module("block", nn.Sequential())
    net.block.add_module("inner", module)
    return net


def image(batch=TRACED_BATCH, channels=3, size=8):
    return torch.randn(batch, channels, size, size)


def largest_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def trace_and_compare(net, sample_shape=(3, 8, 8)):
    """The graph of the network, which computes the same at batch sizes other than the traced one."""
    dag = parse_ann_model(net, (torch.randn(TRACED_BATCH, *sample_shape),))
    net.eval()
    with torch.no_grad():
        for batch in OTHER_BATCHES:
            x = torch.randn(batch, *sample_shape)
            expected = net(x.clone())
            assert largest_difference(dag(x), expected) <= 1e-5 * max(1.0, expected.abs().max().item())
    return dag


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Equal outputs


CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "bias": False},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (1, 0)},
    {"kernel_size": 3, "dilation": 2},
    {"kernel_size": 3, "groups": 2, "bias": False},
    {"kernel_size": 3, "groups": 4, "padding": 1},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 2, "padding": "valid"},
]


@pytest.mark.parametrize("convolution", [nn.Conv2d, FunctionalConv])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution(convolution, options):
    net = convolution(4, 8, **options)
    dag = trace_and_compare(net, (4, 9, 7))
    assert list(dag.ops) == ["conv1"]
    assert torch.equal(dag.conv1.weight, net.weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("linear", [nn.Linear, FunctionalLinear])
def test_linear(linear, bias):
    dag = trace_and_compare(linear(7, 5, bias=bias), (7,))
    assert list(dag.ops) == ["linear1"]
    assert (dag.linear1.bias is not None) == bias


RELUS = {
    "F.relu(x)": F.relu,
    "F.relu(x, inplace=True)": lambda x: F.relu(x, inplace=True),
    "F.relu(x, True)": lambda x: F.relu(x, True),
    "nn.ReLU()": nn.ReLU(),
    "nn.ReLU(inplace=True)": nn.ReLU(inplace=True),
    "torch.relu(x)": lambda x: torch.relu(x),
    "torch.relu_(x)": lambda x: torch.relu_(x),
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "F.relu_(x)": lambda x: F.relu_(x),
    "x.clip(0)": lambda x: x.clip(0),
    "x.clip(min=0)": lambda x: x.clip(min=0),
    "torch.clip(x, 0)": lambda x: torch.clip(x, 0),
    "x.clip_(0)": lambda x: x.clip_(0),
    "x.clamp(min=0)": lambda x: x.clamp(min=0),
    "x.clamp(0)": lambda x: x.clamp(0),
    "torch.clamp(x, min=0)": lambda x: torch.clamp(x, min=0),
    "x.clamp_min(0)": lambda x: x.clamp_min(0),
    "torch.clamp_min(x, 0)": lambda x: torch.clamp_min(x, 0),
}


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_relu_in_every_spelling(relu):
    dag = trace_and_compare(after_conv(relu))
    assert list(dag.ops) == ["conv1", "relu1"]
    assert dag(image()).min() == 0


# what follows a convolution -> the ops that it leaves
FUNCTIONS = {
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), ["avg_pool1"]),
    "avg_pool2d, stride": (lambda x: F.avg_pool2d(x, 3, stride=2), ["avg_pool1"]),
    "avg_pool2d, padding": (lambda x: F.avg_pool2d(x, 3, stride=2, padding=1), ["avg_pool1"]),
    "avg_pool2d, pairs": (lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0)), ["avg_pool1"]),
    "avg_pool2d, whole windows": (lambda x: F.avg_pool2d(x, 2, ceil_mode=True), ["avg_pool1"]),
    "avg_pool2d, no padding": (lambda x: F.avg_pool2d(x, 3, count_include_pad=False), ["avg_pool1"]),
    "avg_pool2d, usual divisor": (lambda x: F.avg_pool2d(x, (2, 1), divisor_override=2), ["avg_pool1"]),
    "AvgPool2d": (nn.AvgPool2d(2, stride=3), ["avg_pool1"]),
    "AvgPool2d, padding": (nn.AvgPool2d(3, stride=1, padding=1), ["avg_pool1"]),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), ["avg_pool1"]),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((1, 1)), ["avg_pool1"]),
    "x.mean([2, 3])": (lambda x: x.mean([2, 3]), ["avg_pool1", "view1"]),
    "x.mean((-1, -2), keepdim=True)": (lambda x: x.mean((-1, -2), keepdim=True), ["avg_pool1"]),
    "torch.mean": (lambda x: torch.mean(x, dim=(2, 3)), ["avg_pool1", "view1"]),
    "F.dropout": (lambda x: F.dropout(x, 0.5, training=False), []),
    "Dropout": (nn.Dropout(0.5), []),
    "Dropout2d": (nn.Dropout2d(0.5), []),
    "Dropout, in place": (nn.Dropout(0.5, inplace=True), []),
    "Identity": (nn.Identity(), []),
    "x.contiguous()": (lambda x: x.contiguous(), []),
    "view, size": (lambda x: x.view(x.size(0), -1), ["view1"]),
    "view, shape": (lambda x: x.view(x.shape[0], 4, 64), ["view1"]),
    "view, -1": (lambda x: x.view(-1, 4 * 8 * 8), ["view1"]),
    "reshape": (lambda x: x.reshape((x.size(0), -1)), ["view1"]),
    "reshape, -1": (lambda x: x.reshape(-1, 2, 128), ["view1"]),
    "torch.reshape": (lambda x: torch.reshape(x, (-1, 256)), ["view1"]),
    "x.flatten(1)": (lambda x: x.flatten(1), ["view1"]),
    "torch.flatten": (lambda x: torch.flatten(x, start_dim=1), ["view1"]),
    "Flatten": (nn.Flatten(), ["view1"]),
    "Unflatten": (nn.Unflatten(1, (2, 2)), ["view1"]),
    "x.unflatten": (lambda x: x.unflatten(-1, (2, 4)), ["view1"]),
    "torch.unflatten": (lambda x: torch.unflatten(x, 2, (-1, 2)), ["view1"]),
    "view, changed in place": (lambda x: F.relu(x.flatten(1), inplace=True), ["view1", "relu1"]),
    "+": (lambda x: F.relu(x) + x, ["relu1", "add1"]),
    "torch.add": (lambda x: torch.add(F.relu(x), x), ["relu1", "add1"]),
    "x + x": (lambda x: x + x, ["add1"]),
    "x.add_(x)": (lambda x: x.add_(x), ["add1"]),
    "x.add_": (lambda x: x.add_(F.relu(x)), ["relu1", "add1"]),
    "cat of 2": (lambda x: torch.cat([x, F.relu(x)], 1), ["relu1", "concat1"]),
    "cat of 3": (lambda x: torch.cat((x, F.relu(x), x), dim=1), ["relu1", "concat1"]),
    "cat, last dimension": (lambda x: torch.cat([x, F.relu(x)], dim=-1), ["relu1", "concat1"]),
    "torch.softmax": (lambda x: torch.softmax(x.flatten(1), 1), ["view1", "softmax1"]),
    "x.softmax": (lambda x: x.flatten(1).softmax(dim=-1), ["view1", "softmax1"]),
    "F.log_softmax": (lambda x: F.log_softmax(x.flatten(1), 1), ["view1", "softmax1"]),
    "Softmax": (nn.Softmax(1), ["softmax1"]),
    "LogSoftmax": (nn.LogSoftmax(1), ["softmax1"]),
}


@pytest.mark.parametrize("function, ops", FUNCTIONS.values(), ids=FUNCTIONS)
def test_function_behind_a_convolution(function, ops):
    dag = trace_and_compare(after_conv(function))
    assert list(dag.ops) == ["conv1", *ops]


def iadd(x):
    y = F.relu(x)
    x += y
    return x + y


def relu_of_a_second_name(x):
    y = x
    x.relu_()
    return y


def changed_after_use(x):
    y = F.avg_pool2d(x, 1)
    x.relu_()
    return y + x


def changed_twice(x):
    y = x
    x += F.relu(x)
    y.relu_()
    return torch.cat([x, y], 1)


def contiguous_is_the_same_tensor(x):
    y = x.contiguous()
    x.relu_()
    return x + y


def clone_is_another_tensor(x):
    y = x.clone()
    x.relu_()
    return x + y


def dropout_is_the_same_tensor(x):
    y = F.dropout(x, training=False)
    y.relu_()
    return x


IN_PLACE = [
    iadd,
    relu_of_a_second_name,
    changed_after_use,
    changed_twice,
    contiguous_is_the_same_tensor,
    clone_is_another_tensor,
    dropout_is_the_same_tensor,
]


@pytest.mark.parametrize("function", IN_PLACE)
def test_in_place_operation_rebinds_every_name(function):
    trace_and_compare(after_conv(function))


def relu_of_a_view(x):
    x.view(x.size(0), -1).relu_()
    return x


def relu_of_a_detached(x):
    x.detach().relu_()
    return x


@pytest.mark.parametrize("function", [relu_of_a_view, relu_of_a_detached])
@pytest.mark.parametrize("shows", [True, False], ids=["example shows it", "example does not"])
def test_in_place_change_of_a_view_is_refused(function, shows):
    net = after_conv(function)
    net[0].weight.data.abs_()
    net[0].bias.data.zero_()
    x = image() if shows else image().abs()
    with pytest.raises((NotImplementedError, ValueError)):
        parse_ann_model(net, (x,))


@pytest.mark.parametrize("last", [F.softmax, F.log_softmax])
def test_residual_network(last):
    dag = trace_and_compare(SmallResNet(last))
    assert [name for name in dag.ops if name.startswith("add")] == ["add1", "add2"]


def test_double_precision_network_with_pooling():
    net = after_conv(lambda x: F.avg_pool2d(F.relu(x), 2)).double()
    x = image().double()
    dag = parse_ann_model(net, (x,))
    assert largest_difference(dag(x), net(x)) <= 1e-12


def test_module_used_twice_becomes_two_ops():
    conv = nn.Conv2d(3, 3, 1)
    dag = trace_and_compare(nn.Sequential(conv, nn.ReLU(), conv))
    assert list(dag.ops) == ["conv1", "relu1", "conv2"]
    assert torch.equal(dag.conv1.weight, dag.conv2.weight)
    assert dag.conv1.weight.data_ptr() != dag.conv2.weight.data_ptr()
    assert dag.conv1.bias.data_ptr() != dag.conv2.bias.data_ptr()


def test_several_inputs_and_outputs():
    net = Call(lambda x, y: (x + F.relu(y), torch.cat([y, x], 1), y)).eval()
    dag = parse_ann_model(net, (image(), image()))
    assert dag.inputs_nodes == ("input1_out1", "input2_out1")
    assert dag.outputs_nodes == ("add1_out1", "concat1_out1", "input2_out1")
    x, y = image(5), image(5)
    assert [largest_difference(a, b) for a, b in zip(dag(x, y), net(x, y), strict=True)] == [0, 0, 0]


def test_single_tensor_as_example():
    dag = parse_ann_model(nn.ReLU(), image())
    assert dag.inputs_nodes == ("input1_out1",)


MODULES = {
    "conv 3x3": lambda x: nn.Conv2d(x.shape[1], 3, 3, padding=1),
    "conv 1x1": lambda x: nn.Conv2d(x.shape[1], 5, 1, bias=False),
    "conv, stride": lambda x: nn.Conv2d(x.shape[1], 2, 3, stride=2, padding=1),
    "conv, groups": lambda x: nn.Conv2d(x.shape[1], 2 * x.shape[1], 3, padding="same", groups=x.shape[1]),
    "relu": lambda x: nn.ReLU(),
    "relu in place": lambda x: nn.ReLU(inplace=True),
    "clamp": lambda x: Call(lambda x: x.clamp(min=0)),
    "pool": lambda x: nn.AvgPool2d(3, stride=2, padding=1),
    "dropout": lambda x: nn.Dropout(0.5),
    "x + x": lambda x: Call(lambda x: x + x),
    "iadd": lambda x: Call(iadd),
    "cat": lambda x: Call(lambda x: torch.cat([x, F.relu(x)], 1)),
}
HEADS = {
    "none": lambda x: nn.Identity(),
    "linear": lambda x: nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4)),
    "mean": lambda x: Call(lambda x: x.mean([2, 3])),
    "softmax": lambda x: nn.Sequential(nn.Flatten(), nn.Softmax(1)),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(list(MODULES)), max_size=6), st.sampled_from(list(HEADS)))
def test_random_chain(names, head):
    net, x = nn.Sequential(), torch.zeros(1, 3, 8, 8)
    for build in [*(MODULES[name] for name in names), HEADS[head]]:
        net.append(build(x))
        x = net[-1](x)
    trace_and_compare(net)


# Names


def test_names_of_a_small_network():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(4, 2)
    )
    dag = parse_ann_model(net, (image(),))
    assert [(name, entry["in_nodes"], entry["out_nodes"], entry["path"]) for name, entry in dag.ops.items()] == [
        ("conv1", ("input1_out1",), ("conv1_out1",), "0"),
        ("relu1", ("conv1_out1",), ("relu1_out1",), "1"),
        ("conv2", ("relu1_out1",), ("conv2_out1",), "2"),
        ("relu2", ("conv2_out1",), ("relu2_out1",), "3"),
        ("avg_pool1", ("relu2_out1",), ("avg_pool1_out1",), "4"),
        ("view1", ("avg_pool1_out1",), ("view1_out1",), "5"),
        ("linear1", ("view1_out1",), ("linear1_out1",), "6"),
    ]
    assert list(dag.nodes) == ["input1_out1"] + [f"{name}_out1" for name in dag.ops]
    assert (dag.inputs_nodes, dag.outputs_nodes) == (("input1_out1",), ("linear1_out1",))


def test_paths_and_branches_of_a_residual_network():
    dag = parse_ann_model(SmallResNet(), (image(),))
    paths = {name: entry["path"] for name, entry in dag.ops.items()}
    assert paths["relu1"] == "" and paths["conv1"] == "conv1" and paths["linear1"] == "fc"
    assert (paths["conv2"], paths["relu3"], paths["conv5"]) == ("layer1.0.conv1", "layer1.0.relu", "layer1.1.conv2")
    assert paths["add1"] == "layer1.0"
    assert dag.ops["add1"]["in_nodes"] == ("conv3_out1", "relu2_out1")
    assert dag.ops["add2"]["in_nodes"] == ("conv5_out1", "relu4_out1")
    assert all(entry["op"] is getattr(dag, name) for name, entry in dag.ops.items())


def test_tensor_added_to_itself_is_read_twice():
    dag = parse_ann_model(Call(lambda x: x + x), (image(),))
    assert dag.ops["add1"]["in_nodes"] == ("input1_out1", "input1_out1")


# The network and torch stay as they were


def snapshot(net):
    """Weights, and training flags by module."""
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return weights, {path: module.training for path, module in net.named_modules()}


def assert_unchanged(net, before):
    weights, training = snapshot(net)
    assert training == before[1]
    assert list(weights) == list(before[0])
    assert all(torch.equal(weights[name], before[0][name]) for name in weights)


def refused_last(x, dim):
    return F.leaky_relu(x, inplace=True)


@pytest.mark.parametrize("last", [F.softmax, refused_last])
def test_network_and_example_stay_as_they_were(last):
    net, x = SmallResNet(last).train(), image()
    net.layer1[0].eval()
    before, x_before = snapshot(net), x.clone()
    try:
        parse_ann_model(net, (x,))
    except NotImplementedError:
        assert last is refused_last
    assert_unchanged(net, before)
    assert torch.equal(x, x_before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_graph_has_its_own_weights():
    net = SmallResNet()
    dag, before = parse_ann_model(net, (image(),)), snapshot(net)
    with torch.no_grad():
        for p in dag.parameters():
            p.add_(1)
    assert_unchanged(net, before)


class CountsItsCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return F.relu(x)


def test_buffer_that_the_network_changes_stays_as_it_was():
    net = CountsItsCalls()
    parse_ann_model(net, (image(),))
    assert net.calls == 0


def test_torch_is_as_before_after_a_refusal():
    originals = (F.relu, torch.relu, torch.Tensor.relu_, torch.Tensor.__add__, torch.cat, F.conv2d)
    with pytest.raises(NotImplementedError):
        parse_ann_model(after_conv(lambda x: torch.sigmoid(F.relu(x))), (image(),))
    now = (F.relu, torch.relu, torch.Tensor.relu_, torch.Tensor.__add__, torch.cat, F.conv2d)
    assert all(a is b for a, b in zip(now, originals))
    assert torch.sigmoid(F.relu(torch.tensor([-1.0]))).item() == 0.5
    trace_and_compare(SmallResNet())


def test_another_error_in_forward_passes_and_the_next_trace_works():
    def fail(x):
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        parse_ann_model(after_conv(fail), (image(),))
    trace_and_compare(SmallResNet())


def test_wrapped_functions_are_pairs_of_callables():
    for name, (function, recorder) in wrapped_functions.items():
        assert callable(function) and callable(recorder) and function is not recorder
        assert resolve_name(function) == name
    for name in ("relu", "conv2d", "linear", "avg_pool2d"):
        assert wrapped_functions[f"torch.nn.functional.{name}"][0] is getattr(F, name)


# Refusals


REFUSED = {
    "indices of MaxPool2d": (nn.MaxPool2d(2, return_indices=True), "max_pool2d", "indices of the maxima"),
    "BatchNorm2d without statistics": (
        nn.BatchNorm2d(4, track_running_stats=False),
        "batch_norm",
        "track_running_stats=True",
    ),
    "GroupNorm": (nn.GroupNorm(2, 4), "group_norm", "use BatchNorm"),
    "Upsample": (nn.Upsample(scale_factor=2), "interpolate", "use conv_transpose2d with a relu behind it"),
    "ReflectionPad2d": (nn.ReflectionPad2d(1), "pad", "only zeros"),
    "pad with ones": (lambda x: F.pad(x, (1, 1), value=1.0), "pad", "only zeros"),
    "pad channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), "pad", "height and width"),
    "LeakyReLU": (nn.LeakyReLU(), "leaky_relu", "use relu"),
    "torch.sigmoid": (lambda x: torch.sigmoid(x), "sigmoid", "apply it outside"),
    "Sigmoid": (nn.Sigmoid(), "sigmoid", "apply it outside"),
    "Hardsigmoid": (nn.Hardsigmoid(), "hardsigmoid", "apply it outside"),
    "x.tanh()": (lambda x: x.tanh(), "tanh", "apply it outside"),
    "GELU": (nn.GELU(), "gelu", "use relu"),
    "x * 2": (lambda x: x * 2, "mul", "put the factor into the weights"),
    "2 * x": (lambda x: 2 * x, "mul", "put the factor into the weights"),
    "x / 2": (lambda x: x / 2, "div", "put the factor into the weights"),
    "x * x": (lambda x: x * x, "mul", "no product or quotient of two activations"),
    "x - x": (lambda x: x - x, "sub", "the layer whose output is subtracted"),
    "x - 1": (lambda x: x - 1, "sub", "put the constant into the bias"),
    "1 - x": (lambda x: 1 - x, "__rsub__", "put the constant into the bias"),
    "-x": (lambda x: -x, "neg", "put the minus sign into the weights"),
    "x @ weight": (lambda x: x.flatten(1) @ torch.ones(256, 2), "matmul", "F.linear(x, weight.t())"),
    "einsum": (lambda x: torch.einsum("bchw,cd->bdhw", x, torch.ones(4, 2)), "einsum", "is a linear layer"),
    "x.permute": (lambda x: x.permute(0, 2, 3, 1), "permute", "permute the weights of the layer behind it"),
    "x.transpose": (lambda x: x.transpose(1, 2), "transpose", "permute the weights of the layer behind it"),
    "x.mT": (lambda x: x.mT, "mT", "permute the weights of the layer behind it"),
    "every second pixel": (lambda x: x[:, :, ::2, ::2], "__getitem__", "with stride 2 every second pixel"),
    "x.chunk": (lambda x: x.chunk(2, 1)[0], "chunk", "a 1x1 convolution takes some of the channels"),
    "x.half()": (lambda x: x.half(), "half", "traced in one type"),
    "x + 1": (lambda x: x + 1, "add", "into the bias"),
    "1 + x": (lambda x: 1 + x, "add", "into the bias"),
    "x.add_(1)": (lambda x: x.add_(1), "add_", "into the bias"),
    "x + constant": (lambda x: x + torch.ones(8), "add", "into the bias"),
    "alpha": (lambda x: torch.add(x, x, alpha=2), "add", "alpha=1"),
    "broadcast": (lambda x: x + x.mean([2, 3], keepdim=True), "add", "[2, 4, 8, 8] and [2, 4, 1, 1]"),
    "x.sum()": (lambda x: x.sum(), "sum", "use x.mean([2, 3])"),
    "if x.sum() > 0": (lambda x: x if x.sum() > 0 else -x, "sum", "use x.mean([2, 3])"),
    "if x > 0": (lambda x: x if x > 0 else -x, "gt", "must not depend on the values"),
    "x ** 2": (lambda x: x**2, "pow", "write it with conv2d"),
    "if x": (lambda x: x if x else -x, "__bool__", "must not depend on the values"),
    "x.item()": (lambda x: x.item(), "item", "must not depend on the values"),
    "x.numpy()": (lambda x: torch.from_numpy(x.numpy()), "numpy", "keep the computation in torch"),
    "x.clamp(1, 6)": (lambda x: x.clamp(1, 6), "clamp", "lower bound of 0"),
    "Hardtanh": (nn.Hardtanh(), "hardtanh", "lower bound of 0"),
    "x.clamp(max=0)": (lambda x: x.clamp(max=0), "clamp", "lower bound of 0"),
    "view(-1)": (lambda x: x.view(-1), "view", "the batch"),
    "view(-1, 64)": (lambda x: x.view(-1, 64), "view", "the batch"),
    "x.flatten()": (lambda x: x.flatten(), "flatten", "the batch"),
    "unsqueeze(0)": (lambda x: x.unsqueeze(0), "unsqueeze", "the batch"),
    "cat, batch": (lambda x: torch.cat([x, x]), "cat", "use dim=1"),
    "cat with a constant": (lambda x: torch.cat([x, torch.zeros(2, 4, 8, 8)], 1), "block.inner", "constant"),
    "mean of all": (lambda x: x.mean(), "mean", "x.mean([2, 3])"),
    "adaptive to 3": (nn.AdaptiveAvgPool2d(3), "adaptive_avg_pool2d", "[3, 3] does not divide its input [8, 8]"),
    "adaptive to 16": (nn.AdaptiveAvgPool2d(16), "adaptive_avg_pool2d", "[16, 16] is larger than its input [8, 8]"),
    "ceil_mode": (nn.AvgPool2d(3, ceil_mode=True), "avg_pool2d", "ceil_mode=False"),
    "another divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "avg_pool2d", "divisor_override=None"),
    "padding not counted": (
        nn.AvgPool2d(3, padding=1, count_include_pad=False),
        "avg_pool2d",
        "count_include_pad=True",
    ),
    "dropout always on": (lambda x: F.dropout(x, 0.5), "dropout", "training=self.training"),
    "linear on channels": (nn.Linear(8, 2), "linear", "flatten it before"),
    "another type": (lambda x: x.to(torch.float64), "to", "the type must stay torch.float32"),
    "product with a weight": (lambda x: F.conv2d(x, x), "conv2d", "must not be computed from the input"),
}


@pytest.mark.parametrize("inner, function, advice", REFUSED.values(), ids=REFUSED)
def test_refusal_names_function_path_and_advice(inner, function, advice):
    net = in_a_block(inner if isinstance(inner, nn.Module) else Call(inner))
    with pytest.raises(NotImplementedError) as caught:
        parse_ann_model(net, (image(),))
    assert [part for part in (function, "block.inner", advice) if part not in str(caught.value)] == []


def test_slice_is_refused_as_a_slice():
    with pytest.raises(NotImplementedError, match="__getitem__") as caught:
        parse_ann_model(in_a_block(Call(lambda x: x[:, :2])), (image(),))
    assert "must not depend on the values" not in str(caught.value)  # that is the advice for x.item()


NORMALISATIONS = {
    "x - mean": lambda x: x - 0.5,
    "x.sub_(mean)": lambda x: x.sub_(torch.ones(3, 1, 1)),
    "mean - x": lambda x: 0.5 - x,
    "x / std": lambda x: x / torch.ones(3, 1, 1),
    "x * 2": lambda x: 2 * x,
    "x + constant": lambda x: x + 1.0,
}


@pytest.mark.parametrize("function", NORMALISATIONS.values(), ids=NORMALISATIONS)
def test_advice_for_the_image_is_not_about_a_layer_before_it(function):
    with pytest.raises(NotImplementedError, match="normalise the images in the data set") as caught:
        parse_ann_model(nn.Sequential(Call(function), nn.Conv2d(3, 4, 1)), (image(),))
    assert "the layer before" not in str(caught.value)


def test_the_advice_for_upsampling_and_slices_converts():
    ones = nn.ConvTranspose2d(4, 4, 2, 2, groups=4, bias=False)
    half = nn.Conv2d(4, 6, 1, stride=2, bias=False)
    with torch.no_grad():
        ones.weight.fill_(1.0)
        half.weight.zero_()
        half.weight[1:5] = torch.eye(4).view(4, 4, 1, 1)
    x = image(channels=4).relu()
    assert torch.equal(ones(x), F.interpolate(x, scale_factor=2))
    assert torch.equal(half(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))
    trace_and_compare(nn.Sequential(nn.ReLU(), ones, nn.ReLU(), half, nn.ReLU()), (4, 8, 8))


def test_exported_programs_are_refused_as_such():
    program = torch.export.export(SmallNet().eval(), (image(),))
    for exported in (program, program.module()):
        with pytest.raises(NotImplementedError, match=r"exported program .* pass the Python module"):
            parse_ann_model(exported, (image(),))


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"the network is a function, give a torch\.nn\.Module"):
        parse_ann_model(iadd, (image(),))


def test_dimension_before_the_batch_is_refused_also_for_a_batch_of_one():
    with pytest.raises(NotImplementedError, match="the batch"):
        parse_ann_model(after_conv(lambda x: x.unsqueeze(0)), (image(1),))


def test_view_without_any_dimension_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 1, 8), Call(lambda x: x.reshape(())))
    with pytest.raises((NotImplementedError, ValueError)):
        parse_ann_model(net, (image(1),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_module_is_refused_by_its_path():
    with pytest.raises(NotImplementedError, match=r"block\.inner .*torch\.jit.* pass the Python module"):
        parse_ann_model(in_a_block(torch.jit.script(nn.ReLU())), (image(),))


OUTPUTS = {
    "constant": lambda x: torch.ones(2),
    "list": lambda x: [x],
    "dict": lambda x: {"out": x},
    "None": lambda x: None,
}


@pytest.mark.parametrize("function", OUTPUTS.values(), ids=OUTPUTS)
def test_output_that_is_no_traced_tensor_is_refused(function):
    with pytest.raises(NotImplementedError, match="return a tensor or a tuple of tensors"):
        parse_ann_model(after_conv(function), (image(),))


SHAPE_QUESTIONS = {
    "shape": lambda x: x.shape[1:] == (4, 8, 8),
    "size": lambda x: x.size(1) == 4 and tuple(x.size())[2:] == (8, 8),
    "dtype": lambda x: x.dtype == torch.float32 and x.is_floating_point(),
    "dim": lambda x: x.dim() == 4 and x.ndim == 4,
    "device": lambda x: x.device.type == "cpu" and not x.is_cuda,
    "numel": lambda x: x.numel() == len(x) * 256,
    "stride": lambda x: x.stride()[-1] == 1 and x.is_contiguous(),
}


@pytest.mark.parametrize("question", SHAPE_QUESTIONS.values(), ids=SHAPE_QUESTIONS)
def test_shape_question_passes(question):
    dag = trace_and_compare(after_conv(lambda x: F.relu(x) if question(x) else x + x))
    assert list(dag.ops) == ["conv1", "relu1"]


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (2, 3, 2, 2)])
def test_input_of_a_wrong_shape_names_the_layer(shape):
    net = nn.Sequential()
    net.add_module("block", nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=r"block\.1 cannot run on an input of \[B, \d, \d, \d\]"):
        parse_ann_model(net, (torch.randn(shape),))


def test_linear_layer_of_a_wrong_size_is_named():
    with pytest.raises(ValueError, match=r"^2 cannot run on an input of \[B, 3, 8, 8\]"):
        parse_ann_model(nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(100, 2)), (image(),))


@pytest.mark.parametrize("examples", [0, 2])
def test_wrong_number_of_inputs_is_a_value_error(examples):
    with pytest.raises(ValueError):
        parse_ann_model(SmallResNet(), tuple(image() for _ in range(examples)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["layer1.1.conv2.weight", "fc.bias"])
def test_weight_that_is_not_finite_is_named(tensor, value):
    net = SmallResNet()
    net.get_parameter(tensor).data.view(-1)[0] = value
    with pytest.raises(ValueError, match=tensor.replace(".", r"\.")):
        parse_ann_model(net, (image(),))


class RandomWeights(nn.Module):
    """A convolution with other weights at every call."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return F.relu(F.conv2d(x, self.size * torch.rand(2, 3, 3, 3)))


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-12, 1e-30])
def test_random_weights_are_refused_however_small_the_outputs(size):
    with pytest.raises(ValueError, match="draw random numbers"):
        parse_ann_model(RandomWeights(size), (image().abs(),))


@pytest.mark.parametrize("size", [1e-30, 1e-5, 1.0, 1e5, 1e20])
def test_outputs_of_every_size_are_accepted(size):
    net = SmallNet()
    net.fc.weight.data *= size
    net.fc.bias.data *= size
    parse_ann_model(net, (image(),))


def test_outputs_of_zero_are_accepted():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net[1].bias.data.fill_(-100.0)
    dag = parse_ann_model(net, (image(),))
    assert not dag(image()).any()


def test_small_differences_of_large_values_are_accepted():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        net[0].bias += 1e4
        net[1].running_mean += 1e4  # of outputs of size 1, of which rounding has taken four digits
        net[1].running_var *= 100
        net[3].running_mean.copy_(net[:3](image(64)).mean((0, 2, 3)))
    dag = parse_ann_model(net, (image(),))
    x = image()
    assert largest_difference(dag(x), net(x)) > 1e-4 * net(x).abs().max()  # it is rounding, on both sides


def test_infinite_activations_are_no_in_place_operations():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    net[0].weight.data *= 1e38
    net[2].weight.data *= 1e38
    with pytest.raises(ValueError, match="NaN or infinite values") as caught:
        parse_ann_model(net, (image(),))
    assert "in place" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_is_named(value):
    x = image()
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="the example input has NaN or infinite values"):
        parse_ann_model(SmallNet(), (x,))


@pytest.mark.parametrize("inputs", [(), torch.zeros(0, 3, 8, 8), (torch.tensor(1.0),), (3,)], ids=str)
def test_an_example_without_an_image_is_refused(inputs):
    with pytest.raises(ValueError, match="no example input"):
        parse_ann_model(SmallNet(), inputs)


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("example", [*HALF, torch.float32])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_networks_are_traced_in_float32(dtype, example):
    net = SmallResNet().to(dtype).eval()
    net.fc.bfloat16()  # of mixed types
    before = snapshot(net)
    dag = parse_ann_model(net, (image().to(example),))
    assert_unchanged(net, before)
    assert {p.dtype for p in dag.parameters()} == {torch.float32} and net.conv1.weight.dtype == dtype
    assert torch.equal(dag.conv1.weight, net.conv1.weight.float())
    assert dag(image()).dtype == torch.float32


class UnderAutocast(nn.Module):
    """A network that runs in bfloat16, as its own forward asks for."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@pytest.mark.parametrize("inside", [True, False], ids=["in the forward", "around the call"])
def test_autocast_is_off_while_a_network_is_traced(inside):
    net, x = SmallNet().eval(), image()
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        dag = parse_ann_model(UnderAutocast(net) if inside else net, (x,))
    assert {p.dtype for p in dag.parameters()} == {torch.float32}
    assert largest_difference(dag(x), net(x)) <= 1e-5


# BatchNorms between a ReLU and the layer that they fold into


BEHIND_NORM = {
    "linear": ([nn.Flatten(), nn.Linear(256, 5)], ["view1", "linear1"]),
    "pooling and linear": ([nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 5)], ["avg_pool1", "view1", "linear1"]),
    "global pooling": ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)], ["avg_pool1", "view1", "linear1"]),
    "pooling and convolution": ([nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, groups=2)], ["avg_pool1", "conv2"]),
    "convolution": ([nn.Conv2d(4, 6, 3)], ["conv2"]),
}
BORDERS = {
    "padded pooling": ([nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 6, 3)], ["batch_norm1", "avg_pool1", "conv2"]),
    "padded convolution": ([nn.Conv2d(4, 6, 3, padding=1)], ["batch_norm1", "conv2"]),
    "another view": ([nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(256, 5)], None),
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


# Refusals of the conversion, whose advice has to lead on


def converted(net, x, **options):
    """The outputs of the spiking network with float weights after many steps, and the network's."""
    dag = parse_ann_model(net.eval(), (x[:1],))
    snn = trans_ann2snn_weight(dag, [(x, torch.zeros(len(x)))], "cpu", 256, 32, quantile=1.0, **options)
    with torch.no_grad():
        return snn(x), net(x)


def refusal_of(net, x, **options):
    with pytest.raises(ValueError) as caught:
        converted(net, x, **options)
    return str(caught.value)


@pytest.mark.parametrize("signed", [None, "pair"])
@pytest.mark.parametrize("between", [[], [nn.AvgPool2d(1), nn.ZeroPad2d(1)]], ids=["directly", "behind a padding"])
def test_a_pooling_of_signed_values_is_named(signed, between):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), *between, nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU())
    refusal = refusal_of(net, image(8), signed=signed, maxpool="gate")
    assert "conv1 (0) has no ReLU behind it, and max_pool1 " in refusal and "--signed pair" not in refusal
    net.insert(1, nn.ReLU())
    actual, expected = converted(net, image(8), signed=signed, maxpool="gate")
    assert largest_difference(actual, expected) < 0.05 * expected.abs().max()


def test_pairs_are_advised_where_they_help_and_not_where_they_are():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU())
    assert "--signed pair" in refusal_of(net, image(8))
    actual, expected = converted(net, image(8), signed="pair")
    assert largest_difference(actual, expected) < 0.05 * expected.abs().max()


@pytest.mark.parametrize("view", [nn.Flatten(), nn.AdaptiveAvgPool2d(3), nn.Unflatten(1, (2, 2))], ids=str)
def test_a_relu_behind_a_view_of_a_pooling_goes_before_both(view):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), view, nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    actual, expected = converted(net, image(8), maxpool="gate")
    assert largest_difference(actual, expected) < 0.05 * expected.abs().max()


class JoinsTheImage(nn.Module):
    """Features beside the image, which comes as it is or through `first`."""

    def __init__(self, first):
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 4, 3, padding=1), first
        self.last = nn.Sequential(nn.Conv2d(7, 4, 1), nn.ReLU())

    def forward(self, x):
        return self.last(torch.cat([F.relu(self.conv(x)), self.first(x)], 1))


def test_an_image_beside_features_needs_a_layer_of_its_own():
    x = image(8).abs()
    refusal = refusal_of(JoinsTheImage(nn.Identity()), x)
    assert "joins the image and spikes" in refusal and "every layer" not in refusal
    actual, expected = converted(JoinsTheImage(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), x)
    assert largest_difference(actual, expected) < 0.05 * expected.abs().max()


# Images of another size than the traced one


def adaptive(pooling):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), pooling, nn.Conv2d(4, 5, 1)).eval()


SIZES = {
    "adaptive to 1": nn.AdaptiveAvgPool2d(1),
    "adaptive to 2": nn.AdaptiveAvgPool2d(2),
    "adaptive to the size": nn.AdaptiveAvgPool2d(8),
    "adaptive to the width": nn.AdaptiveAvgPool2d((1, None)),
    "mean": Call(lambda x: x.mean([2, 3], keepdim=True)),
    "ceil_mode": nn.AvgPool2d(2, ceil_mode=True),
}


@pytest.mark.parametrize("pooling", SIZES.values(), ids=SIZES)
def test_an_image_of_another_size_is_refused_by_both_sizes(pooling):
    net = adaptive(pooling)
    dag = parse_ann_model(net, (image(),))
    for graph in (dag, copy.deepcopy(dag)):
        x = image()
        assert largest_difference(graph(x), net(x)) <= 1e-5
        for size in (4, 9, 16):
            with pytest.raises(ValueError, match=rf"8\D+8.* gets .*{size}\D+{size}"):
                graph(image(size=size))


def test_windows_of_one_size_take_every_image():
    dag = parse_ann_model(adaptive(nn.AvgPool2d(2)), (image(),))
    assert dag(image(size=16)).shape == (2, 5, 8, 8)


def test_a_view_names_both_sizes():
    dag = parse_ann_model(SmallNet(), (image(),))
    with pytest.raises(ValueError, match=r"a view to \[64\] gets \[4, 8, 8\]"):
        dag(image(size=16))


def test_network_that_computes_something_else_at_every_call_is_refused():
    functions = itertools.cycle([F.relu, lambda x: x + x])
    with pytest.raises(ValueError, match="differs from the network"):
        parse_ann_model(Call(lambda x: next(functions)(x)), (image(),))


# Training


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x):
        r = F.relu(self.conv1(x), inplace=True)
        x = self.conv2(r)
        x += r
        x = F.avg_pool2d(F.relu_(x), 2)
        return self.fc(torch.flatten(x, 1))


def test_gradients_equal_those_of_the_network():
    net = SmallNet()
    dag, x, labels = parse_ann_model(net, (image(),)), image(6), torch.tensor([0, 1, 2, 3, 4, 0])
    for module in (net, dag):
        F.cross_entropy(module(x), labels).backward()
    pairs = {"conv1": "conv1", "conv2": "conv2", "linear1": "fc"}
    for op, path in pairs.items():
        ours, theirs = getattr(dag, op), getattr(net, path)
        assert theirs.weight.grad.abs().max() > 1e-3
        assert largest_difference(ours.weight.grad, theirs.weight.grad) <= 1e-5
        assert largest_difference(ours.bias.grad, theirs.bias.grad) <= 1e-5


def test_gradient_steps_lower_the_loss():
    dag, x, labels = parse_ann_model(SmallNet(), (image(),)), image(10), torch.arange(10) % 5
    optimizer = torch.optim.SGD([p for p in dag.parameters() if p.requires_grad], lr=0.2)
    pooling, losses = dag.avg_pool1.weight.clone(), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(dag(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(dag.avg_pool1.weight, pooling)


def test_a_network_that_cannot_be_copied_says_why():
    net = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(1, 2, 3)), nn.ReLU())
    net(torch.zeros(1, 1, 5, 5))  # its weight is now a tensor with a history
    with pytest.raises(ValueError, match="remove its weight_norm"):
        parse_ann_model(net, (torch.zeros(1, 1, 5, 5),))
