"""The tracer: equal outputs, names, training, and that the traced network and torch stay as they were."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import resolve_name
from tracing import (
    Call,
    SmallNet,
    SmallResNet,
    after_conv,
    assert_unchanged,
    iadd,
    image,
    largest_difference,
    snapshot,
    trace_and_compare,
)

from ann_parser import parse_ann_model, wrapped_functions


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


def refused_last(x, dim):
    return torch.cumsum(x.relu_(), dim)


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
        parse_ann_model(after_conv(lambda x: torch.cumsum(F.relu(x), 1)), (image(),))
    now = (F.relu, torch.relu, torch.Tensor.relu_, torch.Tensor.__add__, torch.cat, F.conv2d)
    assert all(a is b for a, b in zip(now, originals))
    assert torch.cumsum(F.relu(torch.tensor([-1.0, 1.0])), 0).tolist() == [0, 1]
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
