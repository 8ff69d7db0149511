"""Gates, as of squeeze-and-excitation: traced exactly, and replaced by the means of their factors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import errors_of, python
from onnx_models import model, node, saved, values
from torch import nn
from tracing import Call, largest_difference

from ann_parser import parse_ann_model
from dag_rewrites import prepare_conversion, replace_activations
from finetuning.saved import OF_NETWORK, WITH_LEVELS, read_qnet
from networks.onnx_import import load_onnx
from pipeline import convert_network
from rewrites.gates import gates_in_words, replace_gates
from runtime.files import write_torch
from spike_layers import FunctionOp, GateOp, SpikeReLU


class Gated(nn.Module):
    """Squeeze-and-excitation of [B, C, ...] with a product of its own. constant: the gate to use instead, [C]."""

    def __init__(self, channels, product=lambda x, gate: x * gate, last=torch.sigmoid):
        super().__init__()
        self.down, self.up = nn.Linear(channels, 3), nn.Linear(3, channels)
        self.product, self.last, self.constant, self.seen = product, last, None, []

    def forward(self, x):
        places = tuple(range(2, x.dim()))
        gate = self.last(self.up(F.relu(self.down(x.mean(places))))).view(-1, x.shape[1], *[1] * len(places))
        self.seen = gate.detach().flatten(1)
        if self.constant is not None:
            gate = self.constant.view(1, -1, *[1] * len(places)).expand_as(gate)
        return self.product(x, gate)


def in_turn(x, gate):
    x = x * 1.5
    x *= gate
    return x


PRODUCTS = {
    "x * gate": lambda x, gate: x * gate,
    "gate * x": lambda x, gate: gate * x,
    "torch.mul": torch.mul,
    "in place": in_turn,
    "expanded": lambda x, gate: x * gate.expand_as(x),
    "repeated": lambda x, gate: gate.repeat(1, 1, *x.shape[2:]) * x,
}


def network(gated, size=6):
    """The gate stands behind a BatchNorm, before a ReLU, in a residual block."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.gated = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), gated

        def forward(self, x):
            return F.relu(self.gated(self.norm(self.conv(x))) + x)

    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), Residual(), nn.Flatten(), nn.Linear(4 * size**2, 3))
    net[2].norm.running_mean.uniform_(-1, 1)
    net[2].norm.weight.data.uniform_(0.5, 2)
    return net.eval()


def with_mean(net, gated, images):
    """The network in plain PyTorch with the mean of its gate over the images."""
    net(images)
    mean = gated.seen.mean(0)
    other = copy.deepcopy(net)
    next(m for m in other.modules() if isinstance(m, Gated)).constant = mean
    return other, gated.seen


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_gate_is_traced_and_replaced_by_its_mean(name):
    torch.manual_seed(0)
    gated = Gated(4, PRODUCTS[name])
    net, images = network(gated), torch.randn(70, 2, 6, 6)
    dag = parse_ann_model(net, (images[:1],), takes_gates=True)
    with torch.no_grad():
        assert largest_difference(dag(images), net(images)) < 1e-5
        expected, factors = with_mean(net, gated, images)
        replaced, spreads, _ = replace_gates(dag, [(images, None)], 100)
        assert largest_difference(replaced(images), expected(images)) < 1e-5
        assert largest_difference(replaced(images), net(images)) > 1e-3  # another network
        assert largest_difference(dag(images), net(images)) < 1e-5  # the graph that was given stays
    kinds = [type(entry.op).__name__ for entry in replaced.ops.values()]
    assert "GateOp" not in kinds and kinds.count("SpikeLinear") == 1  # what only computes the gate is gone
    share = (factors.std(0, correction=0).mean() / factors.mean()).item()
    assert list(spreads.values()) == pytest.approx([share], rel=1e-3)


LAYERS = {
    "before a convolution": lambda gated: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), gated, nn.Conv2d(4, 3, 1)),
    "between two gates": lambda gated: nn.Sequential(
        nn.Conv2d(2, 4, 3), gated, nn.ReLU(), Gated(4), nn.Conv2d(4, 3, 1)
    ),
    "of one pixel": lambda gated: nn.Sequential(nn.Conv2d(2, 4, 6), nn.ReLU(), gated, nn.Conv2d(4, 3, 1)),
    "of lines": lambda gated: nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 4, 3), nn.ReLU(), gated, nn.Conv1d(4, 3, 1)),
    "twice": lambda gated: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), Gated(4, lambda x, gate: x * gate * gate), gated, nn.Conv2d(4, 3, 1)
    ),
    "in the branch of a gate": lambda gated: nn.Sequential(
        nn.Conv2d(2, 4, 3), Gated(4, last=lambda x: torch.sigmoid(gated(x[:, :, None, None]).flatten(1))), nn.ReLU()
    ),
    "clipped": lambda gated: nn.Sequential(nn.Conv2d(2, 4, 3), Gated(4, last=F.hardsigmoid), gated, nn.ReLU()),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gates_stand_anywhere(name):
    torch.manual_seed(1)
    net, images = LAYERS[name](Gated(4)).eval(), torch.rand(9, 2, 6, 6)
    dag = parse_ann_model(net, (images[:1],), takes_gates=True)
    gates = [m for m in net.modules() if isinstance(m, Gated)]
    with torch.no_grad():
        assert largest_difference(dag(images), net(images)) < 1e-5
        means = [each.seen.mean(0) for each in gates]
        for gated, mean in zip(gates, means):
            gated.constant = mean
        replaced, spreads, count = replace_gates(dag, [(images, None)], 100)
        assert count == 9 and len(spreads) == {"between two gates": 2, "twice": 3, "clipped": 2}.get(name, 1)
        assert largest_difference(replaced(images), net(images)) < 1e-5


def test_activations_of_a_gate_count_as_they_are():
    """A SiLU in the branch of a gate is measured, not replaced by a ReLU first."""
    torch.manual_seed(2)
    gated = Gated(4, last=lambda x: torch.sigmoid(F.silu(x)))
    net, images = network(gated), torch.rand(20, 2, 6, 6)
    dag = parse_ann_model(net, (images[:1],), takes_gates=True)
    assert sum(isinstance(entry.op, FunctionOp) for entry in dag.ops.values()) == 2
    replaced, *_ = replace_gates(dag, [(images, None)], 100)
    replaced, counted = replace_activations(replaced)
    assert not counted
    with torch.no_grad():
        assert largest_difference(replaced(images), with_mean(net, gated, images)[0](images)) < 1e-5


def test_the_words_name_how_far_gates_differ():
    assert gates_in_words({}, 5) == ""
    words = "replaced 1 gate by its mean over 5 images, from which the factors of an image differ by 25%"
    assert gates_in_words({"gate1": 0.25}, 5) == words
    assert gates_in_words({"gate1": 0.1, "gate2": 0.3}, 9).startswith("replaced 2 gates by their means over 9 images, ")


REFUSED = {
    "a square": lambda x: x * x,
    "swish": lambda x: x * torch.sigmoid(x),
    "two gates": lambda x: x.mean((2, 3), keepdim=True) * x.amax((2, 3), keepdim=True),
    "more channels": lambda x: x[:, :1] * x.mean((2, 3), keepdim=True),
    "features": lambda x: x.mean((2, 3)) * x.amax((2, 3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_products_are_refused(name):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), Call(REFUSED[name]))
    with pytest.raises(NotImplementedError, match="only a gate, one factor for each channel of maps, can"):
        parse_ann_model(net, (torch.rand(2, 2, 6, 6),), takes_gates=True)


def test_a_gate_that_differs_from_place_to_place_on_other_images_is_refused():
    net = nn.Sequential(nn.Conv2d(2, 4, 1), Call(lambda x: x.relu() * (x - 2).relu()))
    net[0].weight.data.fill_(1), net[0].bias.data.zero_()
    dag = parse_ann_model(net, (torch.rand(1, 2, 6, 6),), takes_gates=True)  # the second factor is 0 here
    with pytest.raises(
        ValueError, match=r"relu2 \(1\) is no gate: for some images its factors differ within a channel"
    ):
        replace_gates(dag, [(3 * torch.rand(2, 2, 6, 6), None)], 2)
    with pytest.raises(ValueError, match="no images to calibrate on, the data loader is empty"):
        replace_gates(dag, [], 2)


def test_an_input_can_be_a_gate():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

        def forward(self, x, scale):
            return F.relu(self.conv(x) * scale)

    net, images, scales = Scaled(), torch.rand(7, 2, 6, 6), torch.rand(7, 4, 1, 1)
    dag = parse_ann_model(net, (images[:2], scales[:2]), takes_gates=True)
    replaced, *_ = replace_gates(dag, [((images, scales), None)], 7)
    with torch.no_grad():
        assert largest_difference(replaced(images, scales), net(images, scales.mean(0))) < 1e-6


def test_only_as_many_images_count_as_are_asked_for():
    torch.manual_seed(4)
    gated = Gated(4)
    net, images = network(gated), torch.rand(90, 2, 6, 6)
    dag = parse_ann_model(net, (images[:1],), takes_gates=True)
    replaced, _, count = replace_gates(dag, [(part, None) for part in images.split(40)], 50)
    assert count == 50
    with torch.no_grad():
        assert largest_difference(replaced(images), with_mean(net, gated, images[:50])[0](images)) < 1e-5


def test_gates_are_refused_without_the_flag():
    net = network(Gated(4))
    with pytest.raises(NotImplementedError, match=r"use a network without gates .*--replace_gates mean"):
        parse_ann_model(net, (torch.rand(2, 2, 6, 6),))
    dag = parse_ann_model(net, (torch.rand(2, 2, 6, 6),), takes_gates=True)
    assert any(isinstance(entry.op, GateOp) for entry in dag.ops.values())


def test_a_quantized_network_of_before_the_flag_is_read(tmp_path):
    qnet = parse_ann_model(nn.Linear(2, 2), (torch.rand(2, 2),))
    qnet.quantized_by = dict.fromkeys({*OF_NETWORK, *WITH_LEVELS, "per_channel"} - {"replace_gates"})
    write_torch(tmp_path / "qnet.pth", qnet)
    assert read_qnet(tmp_path / "qnet.pth").quantized_by == {**qnet.quantized_by, "replace_gates": None}


def test_one_call_converts_a_network_with_gates():
    torch.manual_seed(3)
    gated = Gated(4)
    net, images = network(gated), torch.rand(60, 2, 6, 6)
    loader = [(images, torch.zeros(60, dtype=torch.long))]
    made = convert_network(
        net, loader, replace_gates="mean", weight_bitwidth=32, timesteps=512, finetune_epochs=0, threshold="max"
    )
    expected, _ = with_mean(net, gated, images)
    with torch.no_grad():
        assert largest_difference(made.ann(images), expected(images)) < 1e-5
        assert largest_difference(made.snn(images), expected(images)) < 0.02
    assert sum(isinstance(entry.op, SpikeReLU) for entry in made.snn.ops.values()) == 2


def test_a_product_in_an_onnx_file_is_a_gate(tmp_path):
    nodes = (
        *(node("Conv", "x w", "c"), node("Relu", "c", "r"), node("GlobalAveragePool", "r", "m")),
        *(node("Conv", "m v", "n"), node("Sigmoid", "n", "g"), node("Mul", "g r", "y")),
    )
    net = load_onnx(saved(model(*nodes, w=values(4, 3, 3, 3), v=values(4, 4, 1, 1)), tmp_path))
    images = torch.rand(5, 3, 8, 8)
    with pytest.raises(NotImplementedError, match=r"in the_Mul cannot be converted: .*--replace_gates mean"):
        parse_ann_model(net, (images,))
    dag = parse_ann_model(net, (images,), takes_gates=True)
    replaced, spreads, _ = replace_gates(dag, [(images, None)], 100)
    assert len(spreads) == 1 and [type(entry.op).__name__ for entry in prepare_conversion(replaced).ops.values()] == [
        "SpikeConv2d",
        "SpikeReLU",
        "SpikeAffine",
    ]


NET = """
import torch
from torch import nn


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3))))[:, :, None, None]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), Gate(), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
"""


def test_the_command_line_says_what_it_replaces(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    command = [
        "ann2snn.py",
        f"{tmp_path / 'net.py'}:net",
        "-e",
        "0",
        "--timesteps",
        "2",
        "--save_file",
        tmp_path / "s.pth",
    ]
    refused = python(*command)
    assert refused.returncode == 2 and "--replace_gates mean" in errors_of(refused.stderr)[-1]
    made = python(*command, "--replace_gates", "mean", "--calibration_samples", "100")
    assert made.returncode == 0, made.stderr
    assert "replaced 1 gate by its mean over 100 images, from which the factors of an image differ by " in made.stderr
    assert "another network, whose accuracy needs finetuning" in made.stderr
    without = python("ann2snn.py", "example_net", "-e", "0", "--replace_gates", "mean")
    assert without.returncode == 2
    assert errors_of(without.stderr)[-1] == "error: --replace_gates: the network has no gates, leave it out"
