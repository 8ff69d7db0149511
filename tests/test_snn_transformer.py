"""SNNTransformer: the four steps on networks with and without parts that cannot be traced, and what it writes."""

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import simulate
from torch import nn

import snn_transformer
from build_network import get_net_by_name
from runtime.cli import run_script
from snn_transformer import SNNTransformer
from spike_dag import SpikeDAGModule
from transformer import saved as saved_snn
from transformer import status as status_module
from transformer.saved import load_saved_snn, make_vectors, read_manifest

ROOT = Path(__file__).parents[1]
STRETCHES = {
    "beginning": ["0", "1", "2", "3"],
    "one block": ["4"],
    "block that shrinks": ["6"],
    "middle": ["5", "6", "7"],
    "end": ["11", "12", "13", "14"],
    "half a block": ["3.conv1", "3.relu1"],
    "across blocks": ["3.conv2", "3.relu2", "4.conv1", "4.relu1"],
}


class Detector(nn.Module):
    """A backbone inside of what no tracer follows: dicts, a mask, a path that depends on values and on the mode."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, options, *, mask=None):
        x = self.stem(images["pixels"])  # [B, 8, H, W]
        if self.training:
            x = x + 0.0 * x.sum()  # another number of calls of the same function in the parent's forward
        a = F.relu(self.norm1(self.conv1(x)))
        b = F.relu(self.conv2(a))
        c = F.relu(self.conv3(torch.cat([a, b], 1)))
        if mask is not None:
            c = c * mask
        features = torch.sigmoid(c).mean([2, 3]) * self.scale
        best = features.max().item()
        result = {"logits": self.head(features), "maps": [c, a.flatten(2)], "best": best if best > 0.5 else None}
        return (result, options) if options.get("both") else result


DETECTOR_STRETCH = ["conv1", "norm1", "conv2", "conv3"]


def inputs_of_detector(samples=4):
    pixels = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"pixels": pixels}, {"both": True}


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return with_statistics(get_net_by_name("resnet20", 3, 10)), torch.randn(3, 3, 8, 8)


def with_statistics(net):
    """BatchNorms whose statistics and weights are no identity."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.3)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def with_status(net, layers, *args, **options):
    """A transformer that has seen one batch, without training on it."""
    transformer = SNNTransformer(net, layers, **{"timesteps": 4, **options})
    with torch.no_grad():
        transformer.inference_get_status(*args)
    return transformer


def watch(net, paths):
    """path -> (inputs, output) of modules, filled when `net` runs."""
    seen = {}
    for path in paths:
        net.get_submodule(path).register_forward_hook(
            lambda module, inputs, output, path=path: seen.update({path: (inputs, output)})
        )
    return seen


def assert_reference_agrees(snn, vectors):
    """The NumPy reference computes every spike of the vectors from their constants."""
    out = {name: entry["out_nodes"][0] for name, entry in snn.ops.items()}
    constants = vectors["constants"]
    spiking = {name for name, entry in snn.ops.items() if entry["op"].spiking and out[name] in constants}
    analog = {node: value for node, value in constants.items() if node not in {out[name] for name in spiking}}
    trains = simulate(snn, {name: constants[out[name]] for name in spiking}, snn.timesteps, analog)
    assert list(trains) == snn.spiking_layers() and {out[name] for name in trains} == set(vectors["spikes"])
    for name, train in trains.items():
        assert np.array_equal(train, vectors["spikes"][out[name]]), name
    assert all(train.any() for train in trains.values())


# ---------------------------------------------------------------------------------------------------------------------
# Stretches


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
    expected, actual = watch(net, ["4", "7"]), watch(ann_snn.net, ["4", "7"])
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
        ("sinus", ["a", "b"], "torch.sin in the network's forward cannot be converted"),
    ],
)
def test_what_cannot_be_cut_out_is_refused(path, layers, message):
    with pytest.raises((ValueError, NotImplementedError), match=re.escape(message)):
        SNNTransformer(Odd(path), layers, example_inputs=torch.randn(2, 3, 4, 4))


def test_parts_that_cannot_be_traced():
    net = with_statistics(Detector())
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
    "y += 1": add_in_place,
    "y *= 2": lambda y: y.__imul__(2),
    "y -= 1": lambda y: y.__isub__(1),
    "y /= 2": lambda y: y.__itruediv__(2),
    "y[0] = 1": set_item,
    "y.add_(1)": lambda y: y.add_(1),
    "F.dropout(y, inplace=True)": lambda y: F.dropout(y, 0.5, True, True),
}


@pytest.mark.parametrize("function", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_value_inside_a_stretch_belongs_to_it(function):
    with pytest.raises((ValueError, NotImplementedError)):
        SNNTransformer(Beside(function), ["first", "second"], example_inputs=torch.rand(3, 1, 4, 4))


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
    net, x = with_statistics(UnderAutocast()), torch.rand(6, 1, 8, 8)
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


# ---------------------------------------------------------------------------------------------------------------------
# Training


def snapshot(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_training_quantizes_the_stretch_and_leaves_the_network():
    torch.manual_seed(0)
    net = with_statistics(Detector())
    before, modes = snapshot(net), [module.training for module in net.modules()]
    transformer = SNNTransformer(net, DETECTOR_STRETCH, weight_bitwidth=3, lr=0.1, momentum=0.0)
    first = None
    for step in range(4):
        result, _ = transformer.inference_get_status(*inputs_of_detector())
        loss = result["logits"].square().mean()
        loss.backward()
        transformer.optimizer.step()
        first = loss.item() if step == 0 else first
        for layer in transformer.dag.weighted_layers().values():
            integers = layer.weight * layer.weight_scale
            assert torch.allclose(integers, integers.round(), atol=1e-4) and integers.abs().max() <= 3.001
            assert not torch.equal(layer.weight, layer.weight.weight_back)
    assert loss < 0.9 * first
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    trained = transformer.net.state_dict()
    assert not torch.equal(trained["head.weight"], before["head.weight"])
    assert not torch.equal(trained["stem.0.weight"], before["stem.0.weight"])
    assert torch.equal(trained["conv1.weight"], before["conv1.weight"])  # in `dag` now
    assert trained["stem.1.num_batches_tracked"] == 4 and trained["norm1.num_batches_tracked"] == 0


def test_the_first_step_is_plain_sgd_on_the_shadow_weights():
    torch.optim.SGD([torch.zeros(1)], 0.1)  # makes torch call the hooks of step() in super().step() as well
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)),
        torch.rand(3, 1, 2, 2),
    )
    options = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "damping": 0.0}
    transformer = SNNTransformer(net, ["0", "1"], example_inputs=x, weight_bitwidth=2, **options)
    quantized = copy.deepcopy(net)
    quantized[0].weight.data = transformer.dag.conv1.weight.detach().clone()
    assert quantized[0].weight.unique().numel() <= 3
    for each in (transformer.inference_get_status(x), quantized(x)):
        each.square().mean().backward()
    transformer.optimizer.step()
    shadow = transformer.dag.conv1.weight.weight_back
    assert torch.allclose(shadow, net[0].weight - 0.5 * quantized[0].weight.grad)
    assert torch.allclose(transformer.net[3].weight, net[3].weight - 0.5 * quantized[3].weight.grad)


def test_one_steep_batch_moves_no_weight_far():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)), torch.rand(3, 1, 2, 2)
    transformer = SNNTransformer(net, ["0", "1"], example_inputs=x, lr=0.1, weight_decay=0.0, damping=0.0)
    before = [p.detach().clone() for p in transformer.net[3].parameters()]
    (1e6 * transformer.inference_get_status(x)).square().sum().backward()
    transformer.optimizer.step()
    moved = [(p - old).norm() for p, old in zip(transformer.net[3].parameters(), before, strict=True)]
    assert 0 < torch.stack(moved).norm() <= 0.1 * 1.001  # lr times the longest gradient


def trained_network():
    """Convolutions with BatchNorms, trained on noisy patterns, and images and labels to go on with."""

    def block(C_in, C_out):
        return [nn.Conv2d(C_in, C_out, 3, padding=1), nn.BatchNorm2d(C_out), nn.ReLU()]

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(*block(1, 4), nn.AvgPool2d(2)),
        nn.Sequential(*block(4, 12), *block(12, 12), *block(12, 12)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )
    labels = torch.arange(600) % 5
    images = torch.randn(5, 1, 8, 8)[labels] + 0.7 * torch.randn(600, 1, 8, 8)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for batch in range(36):
        part = slice(batch % 12 * 32, batch % 12 * 32 + 32)
        optimizer.zero_grad()
        F.cross_entropy(net(images[part]), labels[part]).backward()
        optimizer.step()
    return net, images, labels


def test_default_steps_leave_a_trained_network_as_good_as_it_is():
    net, images, labels = trained_network()

    def accuracy(net):
        with torch.no_grad():
            return (net.eval()(images[384:]).argmax(1) == labels[384:]).float().mean().item()

    transformer = SNNTransformer(net, ["1"], example_inputs=images[:2])
    with torch.no_grad():
        transformer.inference_get_status(images[:384])
    reached = {0: accuracy(transformer.generate_ann_snn())}
    assert accuracy(net) > 0.9 and reached[0] > 0.85
    for step in range(1, 51):
        part = slice(step % 12 * 32, step % 12 * 32 + 32)
        F.cross_entropy(transformer.inference_get_status(images[part]), labels[part]).backward()
        transformer.optimizer.step()
        if step in (5, 50):
            reached[step] = accuracy(transformer.generate_ann_snn())
    assert reached[5] > reached[0] - 0.03 and reached[50] > reached[0] - 0.01, reached


def test_gradients_are_cleared_after_a_step_and_add_up_without():
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)), torch.rand(3, 1, 2, 2)
    transformer = SNNTransformer(net, ["0", "1"], example_inputs=x, lr=0.0)
    grads = []
    for stepping in (False, False, True, False):
        transformer.inference_get_status(x).sum().backward()
        grads.append(transformer.net[3].weight.grad.clone())
        if stepping:
            transformer.optimizer.step()
    assert torch.allclose(grads[1], 2 * grads[0]) and torch.allclose(grads[2], 3 * grads[0])
    assert torch.allclose(grads[3], grads[0])
    transformer.optimizer.zero_grad()
    assert transformer.net[3].weight.grad is None


def test_modules_that_alone_are_in_eval_mode_stay_frozen():
    net = Detector().train()
    net.stem.eval()
    transformer = SNNTransformer(net, DETECTOR_STRETCH)
    transformer.inference_get_status(*inputs_of_detector())
    assert transformer.net.training and not transformer.net.stem[1].training
    assert transformer.net.state_dict()["stem.1.num_batches_tracked"] == 0


@pytest.mark.parametrize("frozen", ["conv and norm", "conv", "norm", "all"])
def test_frozen_parameters_of_the_stretch_stay_as_they_are(frozen):
    torch.manual_seed(0)
    net = with_statistics(
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU())
    )
    modules = {"conv and norm": net[:2], "conv": net[3], "norm": net[1], "all": net}
    modules[frozen].requires_grad_(False)
    x = torch.rand(3, 1, 2, 2)
    transformer = SNNTransformer(net, ["0", "1", "2", "3", "4"], example_inputs=x, lr=0.5)
    layers = list(transformer.dag.weighted_layers().values())
    before = [(layer.weight.weight_back.clone(), layer.bias.detach().clone()) for layer in layers]
    for _ in range(2):
        transformer.inference_get_status(x).square().sum().backward()
        transformer.optimizer.step()
    stays = [
        torch.equal(layer.weight.weight_back, weight) and torch.equal(layer.bias, bias)
        for layer, (weight, bias) in zip(layers, before, strict=True)
    ]
    # a layer with a BatchNorm folded into it is frozen where both were
    assert (
        stays
        == {"conv and norm": [True, False], "conv": [False, True], "norm": [False, False], "all": [True, True]}[frozen]
    )
    transformer.generate_ann_snn()


def test_calibration_sees_the_newest_inputs_in_eval_mode():
    net = Detector()
    transformer = SNNTransformer(net, DETECTOR_STRETCH, calibration_samples=5)
    for scale in (1.0, 2.0, 3.0):
        images, options = inputs_of_detector()
        transformer.inference_get_status({"pixels": images["pixels"] * scale}, options)
        images["pixels"].zero_()  # the user's buffer, used again
    kept = transformer.stretch_inputs()
    with torch.no_grad():
        expected = copy.deepcopy(transformer.net).eval().stem(inputs_of_detector()[0]["pixels"] * 3.0)
    assert len(kept) == 2 and torch.allclose(kept[1][0], expected, atol=1e-6)
    assert transformer.net.stem.training


def test_memory_of_the_status_is_bounded(monkeypatch):
    monkeypatch.setattr(status_module, "MOST_STATUS_BYTES", 3000)
    status = status_module.Status(1000)
    for value in range(5):
        status.keep((torch.full((2, 100), float(value)),), {})  # 800 bytes
    assert [args[0][0, 0].item() for args, _ in status.calls] == [2.0, 3.0, 4.0]


def test_a_generated_network_does_not_follow_later_training():
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)), torch.rand(3, 1, 2, 2)
    transformer = with_status(net, ["0", "1"], x, lr=1.0)
    ann_snn = transformer.generate_ann_snn()
    with torch.no_grad():
        first = ann_snn(x)
    transformer.inference_get_status(x).sum().backward()
    transformer.optimizer.step()
    with torch.no_grad():
        assert torch.equal(ann_snn(x), first) and torch.equal(copy.deepcopy(ann_snn)(x), first)
        assert not torch.equal(transformer.generate_ann_snn()(x), first)
    assert isinstance(ann_snn, nn.Module) and not ann_snn.training


def test_options_reach_the_conversion():
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)), torch.rand(3, 1, 2, 2)
    transformer = with_status(net, ["0", "1"], x, timesteps=6, listen=2, reset_mode="zero", initial_potential=0.25)
    transformer.generate_ann_snn()
    (neuron,) = transformer.snn.neurons().values()
    assert (neuron.listen, neuron.reset_mode, transformer.snn.timesteps) == (2, "zero", 6)
    with pytest.raises(TypeError, match="has no option bits"):
        SNNTransformer(net, ["0", "1"], bits=3)
    with pytest.raises(ValueError, match="weight bit width 9"):
        SNNTransformer(net, ["0", "1"], weight_bitwidth=9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timesteps": 0}, "timesteps 0: use a whole number, 1 to 65536"),
        ({"timesteps": 4.5}, "timesteps 4.5: use a whole number"),
        ({"timesteps": 4, "listen": 9}, "listen 9: use 0 to 4, the timesteps"),
        ({"reset_mode": "none"}, "unknown reset mode 'none'"),
        ({"threshold": "x"}, "unknown threshold 'x'"),
        ({"quantile": 2}, "quantile 2: use a number above 0 to 1"),
        ({"quantile": "x"}, "quantile 'x': use a number above 0 to 1"),
        ({"hold_back": "x"}, "hold_back 'x': use a number from 0 to 1"),
        ({"hold_back": -0.5}, "hold_back -0.5: use a number from 0 to 1"),
        ({"initial_potential": 7}, "initial_potential 7: use a number from 0 to 1"),
        ({"initial_potential": "x"}, "initial_potential 'x': use a number from 0 to 1"),
        ({"granularity": "x"}, "unknown granularity 'x'"),
        ({"correction": "x"}, "unknown correction 'x'"),
        ({"calibration_samples": 0}, "calibration_samples 0: use a whole number, 1 or more"),
        ({"damping": -1}, "damping -1: use 0 or more"),
        ({"weight_bitwidth": 4.0}, "weight bit width 4.0: use 1 to 8"),
        ({"weight_bitwidth": None}, "weight bit width None: use 1 to 8"),
        ({"weight_bitwidth": "4"}, "weight bit width '4': use 1 to 8"),
        ({"weight_bitwidth": True}, "weight bit width True: use 1 to 8"),
        ({"weight_bitwidth": [4, "2"]}, "weight bit width '2': use 1 to 8"),
    ],
)
def test_options_are_checked_before_any_training(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SNNTransformer(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), ["0", "1"], **options)


def test_numbers_may_be_those_of_numpy(tmp_path):
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.rand(3, 1, 2, 2)
    for bits in (np.int64(3), np.array([3])):
        transformer = with_status(net, ["0", "1"], x, timesteps=np.int64(4), weight_bitwidth=bits)
        transformer.save_snn(tmp_path / "saved")
    assert read_manifest(tmp_path / "saved")["weight_bitwidth"] == [3]


def test_steps_in_the_wrong_order_say_what_to_do(tmp_path):
    transformer = SNNTransformer(Detector(), DETECTOR_STRETCH)
    with pytest.raises(ValueError, match="call inference_get_status first"):
        _ = transformer.optimizer
    for step in (transformer.generate_ann_snn, lambda: transformer.save_snn(tmp_path / "saved")):
        with pytest.raises(ValueError, match="nothing to calibrate on, call inference_get_status"):
            step()


# ---------------------------------------------------------------------------------------------------------------------
# What is saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder written by save_snn, of a stretch with two inputs, one of which is added as it is."""
    torch.manual_seed(0)
    net = with_statistics(get_net_by_name("resnet20", 3, 10))[:6]
    transformer = with_status(net, ["3.conv2", "3.relu2", "4"], torch.randn(5, 3, 8, 8), timesteps=5)
    folder = tmp_path_factory.mktemp("saved") / "stretch"
    transformer.save_snn(folder, samples=3)
    return folder, transformer


def replay(folder):
    """Exit status of the replay in this process."""
    with pytest.raises(SystemExit) as end:
        run_script(snn_transformer.main, snn_transformer.parse_args(["replay", str(folder)]))
    return end.value.code


def copy_of_folder(folder, tmp_path):
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


def change_manifest(folder, change):
    """Apply `change(manifest)`, and make the sha256 fit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = saved_snn.hash_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_fresh_process_replays_every_bit(saved):
    command = [sys.executable, "snn_transformer.py", "replay", str(saved[0])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch(r"identical: \d+ spikes of 3 layers, 3072 output values \(3 inputs, T=5\)\n", run.stdout)


def test_the_reference_replays_the_files(saved):
    folder, transformer = saved
    manifest = read_manifest(folder)
    snn = load_saved_snn(folder, manifest)
    assert isinstance(snn, SpikeDAGModule)
    assert_reference_agrees(snn, saved_snn.read_vectors(folder, manifest))
    inputs = tuple(x[:3] for x in transformer.stretch_inputs()[0])
    with torch.no_grad():
        assert torch.equal(snn(*inputs), transformer.snn(*inputs))


def test_the_manifest_holds_what_a_chip_needs(saved):
    folder, transformer = saved
    manifest = read_manifest(folder)
    assert (manifest["timesteps"], manifest["weight_bitwidth"], manifest["reset_mode"]) == (5, 4, "subtraction")
    assert [entry["shape"] for entry in manifest["inputs"]] == [[16, 8, 8]] * 2
    ops = {op["name"]: op for op in manifest["ops"]}
    assert list(ops) == list(transformer.snn.ops) and ops["conv2"]["path"] == "4.conv1.0"
    weight = np.load(folder / ops["conv2"]["tensors"]["weight_q"]["file"])
    assert weight.dtype == np.int8 and np.array_equal(weight, transformer.snn.conv2.weight_q.numpy())
    assert set(ops["conv2"]["tensors"]) == {
        "weight_q",
        "bias_q",
        "unit",
    }  # integers; floats only where the input is real
    assert {"weight", "weight_q"} <= set(ops["conv1"]["tensors"])
    Vthr = ops["relu2"]["neuron"]["Vthr"]
    assert Vthr == {"dtype": "int32", "value": transformer.snn.relu2.neuron.Vthr.item()}
    assert ops["relu2"]["out_shape"] == [16, 8, 8]


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rename(manifest, kind, node):
    """A node of the vectors gets a name that no op has."""
    manifest["vectors"][kind]["x"] = manifest["vectors"][kind].pop(node)


def change_array(folder, kind, change, **more):
    """Write the first array of a kind of vectors anew, and make both sha256 fit."""

    def change_entry(manifest):
        entry = next(iter(manifest["vectors"][kind].values()))
        path = folder / entry["file"]
        np.save(path, change(np.load(path)), allow_pickle=True)
        entry.update(sha256=saved_snn.file_hash(path), **more)

    change_manifest(folder, change_entry)


def declare_larger(folder):
    """The header of a .npy file says that it holds 2**40 numbers."""

    def change_entry(manifest):
        entry = next(iter(manifest["vectors"]["outputs"].values()))
        path, shape = folder / entry["file"], [2**20, 16, 2**16, 1]
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)})
            file.write(bytes(64))
        entry.update(sha256=saved_snn.file_hash(path), shape=shape)

    change_manifest(folder, change_entry)


DAMAGES = {
    "weight": (lambda f: flip_last_bit(f / "weights/conv2.weight_q.npy"), "weight_q.npy is damaged, its"),
    "vector": (lambda f: flip_last_bit(f / "vectors/relu1_out1.npy"), "relu1_out1.npy is damaged, its sha256"),
    "missing file": (lambda f: (f / "vectors/relu1_out1.npy").unlink(), "relu1_out1.npy is missing"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json, name a folder that"),
    "truncated": (lambda f: (f / "manifest.json").write_text('{"format": '), "manifest.json is damaged"),
    "another number": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('steps": 5', 'steps": 6')),
        "manifest.json is damaged, its sha256 is another",
    ),
    "other format": (lambda f: change_manifest(f, lambda m: m.update(format="x")), "is not a manifest of format"),
    "lacks": (lambda f: change_manifest(f, lambda m: m.pop("ops")), "is damaged (KeyError: 'ops')"),
    "timesteps x": (lambda f: change_manifest(f, lambda m: m.update(timesteps="x")), "is damaged ("),
    "timesteps 0": (lambda f: change_manifest(f, lambda m: m.update(timesteps=0)), "is damaged ("),
    "timesteps null": (lambda f: change_manifest(f, lambda m: m.update(timesteps=None)), "is damaged ("),
    "unknown node": (lambda f: change_manifest(f, lambda m: rename(m, "spikes", "relu1_out1")), "vectors hold"),
    "no spikes": (lambda f: change_manifest(f, lambda m: m["vectors"]["spikes"].clear()), "hold spikes of []"),
    "no outputs": (lambda f: change_manifest(f, lambda m: m["vectors"]["outputs"].clear()), "the vectors hold outputs"),
    "one more": (
        lambda f: change_manifest(f, lambda m: m["vectors"]["constants"].update(m["vectors"]["outputs"])),
        "the vectors hold constants of",
    ),
    "no inputs": (lambda f: change_manifest(f, lambda m: rename(m, "constants", "input1_out1")), "vectors hold"),
    "no weight": (lambda f: change_manifest(f, lambda m: m["ops"][0]["tensors"].clear()), "is damaged ("),
    "wrong op": (lambda f: change_manifest(f, lambda m: m["ops"][0].update(type="x")), "damaged (unknown op type x"),
    "stride 0": (
        lambda f: change_manifest(f, lambda m: m["ops"][0]["config"].update(stride=[0, 0])),
        "manifest.json is damaged (conv1 stride (0, 0): use a whole number, 1 to 65536",
    ),
    "channels": (
        lambda f: change_manifest(f, lambda m: m["ops"][0]["config"].update(out_channels=2**30)),
        "manifest.json is damaged (conv1 weight [16, 16, 3, 3]: the op has [1073741824, 16, 3, 3]",
    ),
    "timesteps 1e9": (
        lambda f: change_manifest(f, lambda m: m.update(timesteps=10**9)),
        "manifest.json is damaged (the network timesteps 1000000000: use None or a whole number, 1 to 65536",
    ),
    "few inputs": (
        lambda f: change_array(f, "constants", lambda x: x[:2], shape=[2, 16, 8, 8]),
        "are [3, 16, 8, 8], in the network [2, 16, 8, 8]",
    ),
    "large inputs": (
        lambda f: change_array(f, "constants", lambda x: x.repeat(2, 3), shape=[3, 16, 8, 16]),
        "is damaged (Misfit: add",
    ),
    "other steps": (lambda f: change_manifest(f, lambda m: m.update(timesteps=4)), "in the network [4, 3, 16, 8, 8]"),
    "larger than its file": (declare_larger, "it holds no array of numbers"),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
    "dtype": (lambda f: change_array(f, "constants", lambda x: x.astype(np.float64)), "input1_out1.npy is damaged: it"),
    "both dtypes": (
        lambda f: change_array(f, "constants", lambda x: x.astype(np.float64), dtype="float64"),
        "the constants of input1_out1 are float64",
    ),
    "shape": (lambda f: change_array(f, "outputs", lambda x: x[:, :2]), "is damaged: it holds float32"),
    "objects": (lambda f: change_array(f, "outputs", lambda x: x.astype(object)), "it holds no array of numbers"),
    "few bits": (lambda f: change_array(f, "spikes", lambda x: x[:-1]), "has the wrong size for spikes"),
    "many bits": (lambda f: change_array(f, "spikes", lambda x: np.append(x, x[:1])), "has the wrong size for spikes"),
    "no samples": (
        lambda f: change_array(f, "outputs", lambda x: x[:0], shape=[0, 16, 8, 8]),
        "are float32 [0, 16, 8, 8]",
    ),
    "outside": (
        lambda f: change_manifest(f, lambda m: m["vectors"]["outputs"]["relu3_out1"].update(file="../../x.npy")),
        "names the file ../../x.npy outside of the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_and_status_2(saved, tmp_path, capsys, name):
    damage, message = DAMAGES[name]
    folder = copy_of_folder(saved[0], tmp_path)
    damage(folder)
    assert replay(folder) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert "allow_pickle" not in err


def fields_of(data):
    """`holder, key` of every field of nested dicts and lists."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from fields_of(value)


def test_an_edited_field_of_the_manifest_is_one_line(saved, tmp_path):
    """Whatever it is, also in NumPy and PyTorch; what no replay reads may be anything."""
    folder, rng = copy_of_folder(saved[0], tmp_path), random.Random(0)
    whole = (folder / "manifest.json").read_text()
    places, statuses = len(list(fields_of(json.loads(whole)))), []
    for _ in range(100):
        manifest = json.loads(whole)
        holder, key = list(fields_of(manifest))[rng.randrange(places)]
        holder[key] = rng.choice([None, True, -1, 0, 1, 3, 10**9, 2**70, -0.5, "", "x", "conv1", [], [0, 0], [1], {}])
        (folder / "manifest.json").write_text(json.dumps(manifest))
        change_manifest(folder, lambda manifest: None)
        try:
            saved_snn.replay(folder)
        except (saved_snn.Mismatch, saved_snn.Damaged, OSError) as error:
            statuses.append(type(error))
            assert str(error).count("\n") == 0
    assert statuses.count(saved_snn.Damaged) > 20


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda ops: ops["relu2"]["neuron"]["Vthr"].update(value=1), "relu2_out1: "),
        (lambda ops: ops["relu3"]["neuron"].update(reset_mode="zero"), "relu3_out1: "),
        (lambda ops: ops["conv1"]["tensors"]["unit"].update(value=1e-3), "conv1_out1: the inputs cause currents"),
    ],
)
def test_other_spikes_are_one_line_and_status_1(saved, tmp_path, capsys, change, message):
    folder = copy_of_folder(saved[0], tmp_path)
    change_manifest(folder, lambda manifest: change({op["name"]: op for op in manifest["ops"]}))
    assert replay(folder) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_an_earlier_result_is_replaced_and_nothing_else(saved, tmp_path, monkeypatch):
    transformer = saved[1]
    target = tmp_path / "stretch"
    transformer.save_snn(target, samples=1)
    (target / "weights" / "old.npy").write_bytes(b"old")
    transformer.save_snn(target, samples=2)
    assert not (target / "weights" / "old.npy").exists() and "2 inputs" in saved_snn.replay(target)
    with monkeypatch.context() as patch:
        patch.setattr(saved_snn, "hash_of", lambda manifest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transformer.save_snn(target, samples=3)
    assert "2 inputs" in saved_snn.replay(target) and [path.name for path in tmp_path.iterdir()] == ["stretch"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("thesis", "holds other files"),
        ("file", "it is a file"),
        ("nowhere/saved", "there is no folder"),
    ):
        with pytest.raises(OSError, match=message):
            transformer.save_snn(tmp_path / name)
    monkeypatch.chdir(tmp_path / "thesis")
    with pytest.raises(OSError, match="cannot write to an empty folder name, name a folder"):
        transformer.save_snn("")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.txt"]


@pytest.mark.parametrize("format", ["x", saved_snn.FORMAT])
def test_a_folder_with_another_manifest_is_left_alone(saved, tmp_path, format):
    target = tmp_path / "extension"
    (target / "weights").mkdir(parents=True)
    (target / "manifest.json").write_text(json.dumps({"format": format}))
    if format == saved_snn.FORMAT:
        (target / "weights" / "notes.txt").write_text("years of work")
    before = sorted(target.rglob("*"))
    with pytest.raises(OSError, match="the folder holds other files"):
        saved[1].save_snn(target)
    assert sorted(target.rglob("*")) == before


def test_a_link_to_a_folder_stays_a_link(saved, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    saved[1].save_snn(tmp_path / "link", samples=1)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_vectors_are_of_several_calls_where_one_has_too_few(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    transformer, calls = SNNTransformer(net, ["0", "1"], timesteps=4), torch.rand(3, 2, 1, 4, 4)
    with torch.no_grad():
        for x in (calls[0], torch.rand(2, 1, 6, 6), *calls[1:]):
            transformer.inference_get_status(x)
    for samples, kept in ((1, 1), (3, 3), (100, 6)):
        transformer.save_snn(tmp_path / "saved", samples=samples)
        assert f"({kept} inputs, T=4)" in saved_snn.replay(tmp_path / "saved")
        vectors = saved_snn.read_vectors(tmp_path / "saved", read_manifest(tmp_path / "saved"))
        assert np.array_equal(vectors["constants"]["input1_out1"], calls.flatten(0, 1)[:kept].numpy())
    for samples, message in (
        (0, "samples 0: use a whole number, 1 or more"),
        (1.5, "samples 1.5: use a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer.save_snn(tmp_path / "saved", samples=samples)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_stretches_of_other_types_than_float32_are_refused(dtype):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()).to(dtype)
    message = f"0.weight is {dtype}, only float32 stretches can be converted: convert it with .float() first"
    for layers in (["0", "1"], [net]):
        with pytest.raises(ValueError, match=re.escape(message)):
            SNNTransformer(net, layers, example_inputs=torch.rand(2, 1, 2, 2, dtype=dtype))


def test_everything_with_a_neuron_can_be_saved(tmp_path):
    """Poolings, transposed and grouped layers, max pooling, concatenations, linear layers: back from their files."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.ReLU6()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)),
    )
    x = torch.randn(6, 2, 8, 8)
    transformer = with_status(net, ["0", "1", "2", "3"], x, maxpool="gate", per_channel=True)
    transformer.save_snn(tmp_path / "saved")
    assert "4 inputs" in saved_snn.replay(tmp_path / "saved")
    snn = load_saved_snn(tmp_path / "saved")
    assert_reference_agrees(snn, make_vectors(snn, (x,)))
    with torch.no_grad():
        assert torch.equal(snn(x), transformer.snn(x))


def test_help_loads_no_torch():
    code = "import snn_transformer, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## SNNTransformer") :]
    (code,) = re.findall(r"```python3\n(import torch\n.*?)```", section, re.DOTALL)
    assert sum(1 for line in code.splitlines() if line.strip()) <= 50
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    found = re.search(r"ANN ([\d.]+) %, with a spiking backbone ([\d.]+) %", capsys.readouterr().out)
    ann, spiking = map(float, found.groups())
    assert ann > 90 and spiking > ann - 3
    assert "identical" in saved_snn.replay(tmp_path / "saved")
