"""A stretch of a network: cut out by the names of its layers, converted, while the rest runs as it is."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DETECTOR_STRETCH,
    Detector,
    assert_reference_agrees,
    inputs_of_detector,
    with_random_norms,
    with_status,
)
from torch import nn

from snn_transformer import SNNTransformer
from transformer.saved import make_vectors

STRETCHES = {
    "beginning": ["0", "1", "2", "3"],
    "one block": ["4"],
    "block that shrinks": ["6"],
    "middle": ["5", "6", "7"],
    "end": ["11", "12", "13", "14"],
    "half a block": ["3.conv1", "3.relu1"],
    "across blocks": ["3.conv2", "3.relu2", "4.conv1", "4.relu1"],
}


def watch_modules(net, paths):
    """path -> (inputs, output) of modules, filled when `net` runs."""
    seen = {}
    for path in paths:
        net.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, path=path: seen.update({path: (inputs, output)})
        )
    return seen


@pytest.mark.parametrize("name", STRETCHES)
def test_every_spike_of_a_stretch_of_resnet20(resnet, name):
    net, images = resnet
    transformer = with_status(net, STRETCHES[name], images, reset_mode="zero" if name == "middle" else "subtraction")
    ann_snn = transformer.generate_ann_snn()
    assert_reference_agrees(transformer.snn, make_vectors(transformer.snn, transformer.stretch_inputs()[0]))
    with torch.no_grad():
        output = ann_snn(images)
    assert output.shape == (3, 10) and not torch.equal(output, net(images))


def test_many_steps_of_float_weights_are_the_network(resnet):
    net, images = resnet
    options = {"weight_bitwidth": 32, "threshold": "max", "correction": "none"}
    errors = []
    with torch.no_grad():
        for timesteps in (2, 256):
            transformer = with_status(net, ["5", "6"], images, timesteps=timesteps, listen=timesteps, **options)
            errors.append((transformer.generate_ann_snn()(images) - net(images)).abs().max().item())
    assert errors[1] < 0.01 * net(images).abs().max() < errors[0]


def test_what_stands_before_and_behind_is_bit_identical(resnet):
    net, images = copy.deepcopy(resnet[0]), resnet[1]
    ann_snn = with_status(net, ["5", "6"], images).generate_ann_snn()
    expected, actual = watch_modules(net, ["4", "7"]), watch_modules(ann_snn.net, ["4", "7"])
    with torch.no_grad():
        net(images)
        behind = expected["7"][1]
        output = ann_snn(images)
        assert torch.equal(actual["4"][1], expected["4"][1])
        assert torch.equal(actual["7"][0][0], ann_snn.part(actual["4"][1]))
        assert torch.equal(output, net[7:](actual["7"][0][0]))
    assert not torch.equal(actual["7"][1], behind)


def test_modules_and_names_mean_the_same(resnet):
    net, images = resnet
    outputs = []
    for layers in (["5", "6"], [net[5], net[6]], (net[5], "6")):
        torch.manual_seed(0)
        outputs.append(with_status(net, layers, images).generate_ann_snn()(images))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "layers, message",
    [
        (["3", "5"], "the layers 3, 5 are not a contiguous stretch: 4 lies between them, name it too"),
        (
            ["0", "3", "6"],
            "the layers 0, 3, 6 are not a contiguous stretch: 1, 2, 4, 5 lie between them, name them too",
        ),
        (["3.conv1", "3.conv2"], "3.relu1 lies between them"),
        (["3.conv1.0", "3.relu1"], "3.conv1.1 lies between them"),
        (["layer9"], "the network has no layer layer9, it has 0, 1, 2, 3"),
        ([], "the list of layers to transfer is empty"),
        ([nn.ReLU()], "the layer ReLU is not a module of the network"),
        (["3.conv1"], "nothing can spike"),
        (["4.shortcut"], "4.shortcut computes nothing that can be converted"),
    ],
)
def test_what_is_no_stretch_is_refused_by_name(resnet, layers, message):
    net, images = resnet
    with pytest.raises(ValueError, match=re.escape(message)):
        SNNTransformer(net, layers, example_inputs=images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class Odd(nn.Module):
    """One forward after the other that a stretch cannot be cut out of."""

    def __init__(self, path):
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(3))
        self.inplace = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.ReLU())
        self.path = path

    def forward(self, x):
        return getattr(self, self.path)(x)

    def towers(self, x):
        return self.a(x) + self.b(x * 2)

    def early(self, x):
        a = self.a(x)
        square = a.square()
        return self.c(a + self.b(torch.tanh(x))), square

    def changed(self, x):
        y = x * 2
        return self.inplace(y) + y

    def sinus(self, x):
        return self.a(torch.sin(self.b(x)))


@pytest.mark.parametrize(
    "path, layers, message",
    [
        ("towers", ["a", "b"], "a.0 and b.0 are not connected"),
        ("towers", ["a", "c"], "the layer c does not run in the network's forward"),
        ("early", ["a", "b", "c"], "torch.Tensor.square in the forward of the network reads the output of a.1 before"),
        ("changed", ["inplace"], "relu in inplace.0 changes the stretch's input in place"),
        ("sinus", ["a", "b"], "sin1: spikes cannot compute sin inside of a network"),
    ],
)
def test_what_cannot_be_cut_out_is_refused(path, layers, message):
    with pytest.raises((ValueError, NotImplementedError), match=re.escape(message)):
        SNNTransformer(Odd(path), layers, example_inputs=torch.randn(2, 3, 4, 4))


def test_parts_that_cannot_be_traced():
    net = with_random_norms(Detector())
    arguments = inputs_of_detector()
    transformer = with_status(net, DETECTOR_STRETCH, *arguments)
    assert [type(entry["op"]).__name__ for entry in transformer.dag.ops.values()] == [
        *("SpikeConvBN", "SpikeReLU", "SpikeConv2d", "SpikeReLU", "ConcatOp", "SpikeConv2d", "SpikeReLU")
    ]
    ann_snn = transformer.generate_ann_snn()
    mask = torch.zeros(4, 8, 8, 8)
    mask[:, :, :4] = 1
    with torch.no_grad():
        result, options = ann_snn(*arguments, mask=mask)
        x = net.stem(arguments[0]["pixels"])
        maps = ann_snn.part(x)
    assert options is arguments[1] and set(result) == {"logits", "maps", "best"}
    a, c = maps  # in the order in which they are computed
    assert torch.equal(result["maps"][0], c * mask) and torch.equal(result["maps"][1], a.flatten(2))
    features = torch.sigmoid(c * mask).mean([2, 3]) * net.scale
    assert torch.equal(result["logits"], net.head(features))
    assert_reference_agrees(transformer.snn, make_vectors(transformer.snn, (x,)))


def test_an_output_before_the_last_input():
    """The stretch sends `a` before the input of `c` is known; it is read only afterwards."""

    class Late(Odd):
        def late(self, x):
            a, y = self.a(x), torch.tanh(x)
            return [self.c(a + self.b(y)), a]

    torch.manual_seed(0)
    net, x = Late("late"), torch.randn(2, 3, 4, 4)
    transformer = with_status(net, ["a", "b", "c"], x, weight_bitwidth=32)
    assert (transformer.stretch.num_inputs, transformer.stretch.num_outputs) == (2, 2)
    outputs = transformer.inference_get_status(x)
    assert all(torch.allclose(actual, expected, atol=1e-6) for actual, expected in zip(outputs, net(x)))
    sum(y.sum() for y in outputs).backward()
    sum(y.sum() for y in net(x)).backward()
    grads = [entry["op"].weight.grad for entry in transformer.dag.ops.values() if hasattr(entry["op"], "weight")]
    for actual, expected in zip(grads, (net.a[0], net.b[0], net.c[0]), strict=True):
        assert torch.allclose(actual, expected.weight.grad, atol=1e-5)


class Beside(nn.Module):
    """Two layers, and a function of what the first sends beside them."""

    def __init__(self, function):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.function = function

    def forward(self, x):
        y = self.first(x)
        beside = self.function(y)
        return self.second(y), beside


BESIDE = {
    "1 - y": lambda y: 1 - y,
    "2 ** y": lambda y: 2**y,
    "1 / y": lambda y: 1 / (y + 1),
    "y // 1": lambda y: y // 1,
    "1 // y": lambda y: 1 // (y + 1),
    "y % 1": lambda y: y % 1,
    "y @ y": lambda y: y @ y,
    "-y": lambda y: -y,
    "abs(y)": abs,
    "y ** 2": lambda y: y**2,
    "y[:, :1]": lambda y: y[:, :1],
    "y[y > 0]": lambda y: y[y > 0],
    "y > 0": lambda y: (y > 0).float(),
    "y == y": lambda y: (y == y).float(),
    "~(y > 0)": lambda y: (~(y > 0)).float(),
    "(y > 0) & (y < 1)": lambda y: ((y > 0) & (y < 1)).float(),
    "iteration": lambda y: torch.stack(list(y)),
    "float(y)": lambda y: torch.tensor(float(y.sum())),
    "int(y)": lambda y: torch.tensor(int(y.sum())),
    "len(y)": lambda y: torch.tensor(len(y)),
    "y in a list": lambda y: torch.tensor(0.5 in y),
    "y.T": lambda y: y.mT,
    "a copy changed": lambda y: y.clone().add_(1),
    "another index set": lambda y: (y * 1).index_fill_(0, torch.tensor([0]), 2.0),
}


@pytest.mark.parametrize("function", BESIDE.values(), ids=BESIDE)
def test_what_only_reads_may_stand_beside_a_stretch(function):
    torch.manual_seed(0)
    net, x = Beside(function).eval(), torch.rand(3, 1, 4, 4)
    transformer = SNNTransformer(net, ["first", "second"], weight_bitwidth=32, example_inputs=x)
    with torch.no_grad():
        for actual, expected in zip(transformer.inference_get_status(x), net(x), strict=True):
            assert torch.allclose(actual, expected, atol=1e-6)


def set_item(y):
    y[0] = 1.0
    return y


def add_in_place(y):
    y += 1
    return y


CHANGES = {
    "y **= 2": lambda y: y.__ipow__(2),
    "y[0] = 1": set_item,
    "y.mul_(y)": lambda y: y.mul_(y),
    "F.dropout(y, inplace=True)": lambda y: F.dropout(y, 0.5, True, True),
}


@pytest.mark.parametrize("function", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_value_inside_a_stretch_belongs_to_it(function):
    with pytest.raises((ValueError, NotImplementedError)):
        SNNTransformer(Beside(function), ["first", "second"], example_inputs=torch.rand(3, 1, 4, 4))


CONSTANTS = {
    "y += 1": add_in_place,
    "y *= 2": lambda y: y.__imul__(2),
    "y -= 1": lambda y: y.__isub__(1),
    "y /= 2": lambda y: y.__itruediv__(2),
    "y.add_(1)": lambda y: y.add_(1),
}


@pytest.mark.parametrize("function", CONSTANTS.values(), ids=CONSTANTS)
def test_constants_inside_a_stretch_belong_to_it(function):
    torch.manual_seed(0)
    net, x = Beside(function).eval(), torch.rand(3, 1, 4, 4)
    before = Beside(lambda y: y).eval()
    before.load_state_dict(net.state_dict())
    transformer = SNNTransformer(net, ["first", "second"], weight_bitwidth=32, example_inputs=x)
    with torch.no_grad():
        for actual, expected in zip(transformer.inference_get_status(x.clone()), net(x.clone()), strict=True):
            assert torch.allclose(actual, expected, atol=1e-6)
        assert not torch.allclose(net(x.clone())[0], before(x.clone())[0], atol=1e-3)  # the second layer reads the sum


class UnderAutocast(nn.Module):
    """A backbone and what stands around it, in bfloat16."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.backbone = nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        )
        self.head = nn.Linear(512, 10)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.stem(x)
            assert x.dtype == torch.bfloat16
            return self.head(self.backbone(x).flatten(1)).float()


def test_a_stretch_runs_in_float32_under_autocast():
    torch.manual_seed(0)
    net, x = with_random_norms(UnderAutocast()), torch.rand(6, 1, 8, 8)
    labels = torch.arange(6)
    transformer = SNNTransformer(net, ["backbone"], timesteps=64, weight_bitwidth=32, threshold="max")
    for _ in range(2):
        F.cross_entropy(transformer.inference_get_status(x), labels).backward()
        transformer.optimizer.step()
    assert {p.dtype for p in transformer.dag.parameters()} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for p in transformer.dag.parameters())
    assert transformer.stretch_inputs()[0][0].dtype == torch.float32
    transformer = with_status(net, ["backbone"], x, timesteps=256, weight_bitwidth=32, threshold="max")
    with torch.no_grad():
        assert (transformer.generate_ann_snn()(x) - net(x)).abs().max() < 0.05 * net(x).abs().max()


def test_the_conversion_of_a_stretch_ignores_the_users_autocast(tmp_path):
    torch.manual_seed(0)
    net, x = Beside(lambda y: y), torch.rand(6, 1, 4, 4)
    transformer = with_status(net, ["first", "second"], x, weight_bitwidth=4)
    expected = transformer.generate_ann_snn()(x)
    with torch.autocast("cpu", torch.bfloat16):
        again = with_status(net, ["first", "second"], x, weight_bitwidth=4)
        again.save_snn(tmp_path / "saved")
        outputs = again.generate_ann_snn()(x)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))


class RandomLayer(nn.Module):
    """A convolution with other weights at every call."""

    def forward(self, x):
        return F.conv2d(x, 1e-6 * torch.rand(4, 1, 3, 3))


def test_a_stretch_that_draws_random_weights_is_refused():
    net = nn.Sequential(RandomLayer(), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="draw random numbers"):
        SNNTransformer(net, ["0", "1"], example_inputs=torch.rand(3, 1, 4, 4))


def test_what_is_not_finite_before_a_stretch_is_named():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="0 to 1 reads NaN or infinite values"):
        SNNTransformer(net, ["0", "1"], example_inputs=torch.full((3, 1, 4, 4), torch.nan))


def test_another_path_than_when_it_was_traced_is_refused():
    class Switch(Odd):
        def switch(self, x):
            y = self.a[0](x)
            return self.a[1](y) if self.first else torch.sin(y)

    net = Switch("switch")
    net.first = True
    transformer = with_status(net, ["a"], torch.randn(2, 3, 4, 4))
    transformer.net.first = False
    with pytest.raises(ValueError, match="sin in the forward of the network reads a value from inside of a"):
        transformer.inference_get_status(torch.randn(2, 3, 4, 4))
    transformer.net.path = "towers"
    transformer.net.a = nn.Identity()
    with pytest.raises(ValueError, match="the network did not run a, which it ran when it was traced"):
        transformer.inference_get_status(torch.randn(2, 3, 4, 4))
    assert torch.overrides._len_torch_function_stack() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_stretches_of_other_types_than_float32_are_refused(dtype):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()).to(dtype)
    message = f"0.weight is {dtype}, only float32 stretches can be converted: convert it with .float() first"
    for layers in (["0", "1"], [net]):
        with pytest.raises(ValueError, match=re.escape(message)):
            SNNTransformer(net, layers, example_inputs=torch.rand(2, 1, 2, 2, dtype=dtype))
