"""Arithmetic with constants in a network: traced, folded, converted exactly."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_every_spike_is_reproduced, conv, convert, spikes_and_first_currents
from reference import simulate
from torch import nn
from tracing import Call, after_conv, trace_and_compare

from ann_parser import parse_ann_model
from spike_dag import from_dict
from spike_layers import SpikeAffine, SpikeSubtract

A, B = torch.tensor([0.5, 2.0, -1.5, 0.7]).view(4, 1, 1), torch.tensor([0.3, 0.9, 0.4, 1.2]).view(1, 4, 1, 1)
MAP = torch.linspace(-1, 1, 4 * 64).view(4, 8, 8)

IN_A_LAYER = {  # function of the output of a convolution -> the ops behind it
    "x * 0.5": (lambda x: x * 0.5, []),
    "a * x": (lambda x: A * x, []),
    "x / b": (lambda x: x / B, []),
    "x + 1": (lambda x: x + 1, []),
    "1 - x": (lambda x: 1 - x, []),
    "rsub": (lambda x: torch.rsub(x, A, alpha=2), []),
    "a - x": (lambda x: A - x, []),
    "x.sub(alpha)": (lambda x: x.sub(A, alpha=0.5), []),
    "-x": (lambda x: -x, []),
    "in place": (lambda x: x.mul_(2).sub_(A).div_(B).neg_(), []),
    "x -= 1": (lambda x: x.__isub__(1), []),
    "x * 1": (lambda x: x * 1, []),
    "new constants": (lambda x: x + torch.full_like(x, 0.5) - x.new_ones(4, 1, 1), []),
    "x + map": (lambda x: x + MAP, ["bias_map1"]),
    "(x + map) * a": (lambda x: (x + MAP) * A, ["bias_map1"]),
    "clip": (lambda x: x.clip(min=0, max=6), ["relu1"]),
    "learnt ceiling": (lambda x: torch.clamp(x, torch.tensor(0.0), torch.tensor(0.4)), ["relu1"]),
    "maximum": (lambda x: torch.maximum(x, torch.zeros_like(x)), ["relu1"]),
    "max": (lambda x: torch.max(torch.tensor(0.0), x), ["relu1"]),
    "minimum of a relu": (lambda x: torch.minimum(x.relu(), torch.tensor(0.4)), ["relu2"]),
    "threshold": (lambda x: F.threshold(x, 0, 0), ["relu1"]),
    "clamp_max_ of a relu": (lambda x: x.relu_().clamp_max_(0.4), ["relu2"]),
}
BOUNDS = {
    "a ceiling per channel": lambda x: x.clamp(torch.tensor(0.0), B),
    "minimum per channel": lambda x: torch.minimum(x.relu(), B),
    "hardtanh": F.hardtanh,
    "hardtanh in place": lambda x: F.hardtanh(x, -0.5, 0.3, inplace=True),
    "clamp(0.1, 0.6)": lambda x: x.clamp(0.1, 0.6),
    "clamp(min)": lambda x: x.clamp(min=-0.2),
    "clamp(max)": lambda x: x.clip(max=0.2),
    "bounds per channel": lambda x: x.clamp_(-B, 2 * B),
}


@pytest.mark.parametrize("function, ops", IN_A_LAYER.values(), ids=IN_A_LAYER)
def test_constants_fold_into_the_layer_before(function, ops):
    assert list(trace_and_compare(after_conv(function)).ops) == ["conv1", *ops]


@pytest.mark.parametrize("function", BOUNDS.values(), ids=BOUNDS)
def test_bounds_become_one_relu_and_what_folds(function):
    dag = trace_and_compare(nn.Sequential(*after_conv(function), conv(4, 5)))
    names = [name for name in dag.ops if not name.startswith("bias_map")]
    assert [name.rstrip("1234") for name in names] == ["conv", "relu", "conv"]


class Joined(nn.Module):
    """Two convolutions with a ReLU each, a function of both, and a convolution that reads it."""

    def __init__(self, function, relu=False, channels=4):
        super().__init__()
        self.a, self.b, self.c, self.d = conv(2, 4), conv(2, 4), conv(channels, 4), conv(4, 4)
        self.norm, self.fc, self.function, self.relu = nn.BatchNorm2d(4), nn.Linear(144, 3), function, relu
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.5, 0.5)

    def forward(self, x):
        y = self.function(self, F.relu(self.a(x)), F.relu(self.b(x)))
        return self.fc(F.relu(self.c(F.relu(y) if self.relu else y)).flatten(1))


JOINED = {
    "a - b": (lambda s, a, b: a - b, dict(relu=True)),
    "in place": (lambda s, a, b: a.sub_(b, alpha=0.5), dict(relu=True)),
    "a - b, signed": (lambda s, a, b: a - b, {}),
    "conv - b": (lambda s, a, b: s.d(a) - b, dict(relu=True)),
    "a - conv": (lambda s, a, b: a - s.d(b), dict(relu=True)),
    "a + 0.5 b": (lambda s, a, b: a + 0.5 * b, {}),
    "alpha": (lambda s, a, b: torch.add(a, s.d(b), alpha=0.2), dict(relu=True)),
    "a BatchNorm behind a ReLU and a skip": (lambda s, a, b: s.norm(a) + b, {}),
    "a BatchNorm, its own skip": (lambda s, a, b: s.norm(a) + s.d(a), dict(relu=True)),
    "a concatenated BatchNorm": (lambda s, a, b: torch.cat([s.norm(a), 0.5 * b], 1), dict(channels=8)),
    "a factor before max pooling": (lambda s, a, b: F.max_pool2d(0.3 * a + 0.2, 3, 1, 1), {}),
    "1 - a": (lambda s, a, b: 1 - a, {}),
    "1 - a, relu": (lambda s, a, b: 0.2 - a, dict(relu=True)),
    "factors of both signs": (lambda s, a, b: a * A.to(a) + b, dict(relu=True)),
    "a map of spikes": (lambda s, a, b: a + MAP[:, :6, :6], dict(relu=True)),
    "relu(y) and relu(-y)": (lambda s, a, b: F.relu(y := s.d(a)) + F.relu(-y), {}),
}


@pytest.mark.parametrize("function, options", JOINED.values(), ids=JOINED)
def test_constants_between_spikes_are_exact(function, options):
    torch.manual_seed(0)
    net, images = Joined(function, **options).eval(), torch.rand(8, 2, 6, 6)
    choices = dict(maxpool="gate", signed="pair")
    for bits, per_channel, reset_mode in ((4, False, "zero"), (8, True, "subtraction"), (8, False, "subtraction")):
        snn = convert(net, images, 16, bits, per_channel=per_channel, reset_mode=reset_mode, **choices)
        assert_every_spike_is_reproduced(snn, images[:3], 16)
        again = from_dict(copy.deepcopy(snn).to_dict())
        assert torch.equal(again(images), snn(images))
    listening = convert(net, images, 8, 8, listen=3, **choices)
    trains, currents = spikes_and_first_currents(listening, images[:3], 8)
    expected = simulate(listening, currents, 8)
    assert all(np.array_equal(trains[name], expected[name]) for name in listening.spiking_layers())
    close, expected = convert(net, images, 512, 32, threshold="max", **choices), net(images)
    assert (close(images) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_difference_is_one_op_with_a_negative_weight():
    torch.manual_seed(0)
    net, images = Joined(lambda s, a, b: b - a, relu=True).eval(), torch.rand(8, 2, 6, 6)
    snn = convert(net, images, 16, 8)
    (op,) = [entry.op for entry in snn.ops.values() if isinstance(entry.op, SpikeSubtract)]
    assert op.branch_weights[0] > 0 > op.branch_weights[1]


def test_a_factor_of_spikes_only_scales_what_they_stand_for():
    torch.manual_seed(0)
    net, images = Joined(lambda s, a, b: a + 0.5 * b).eval(), torch.rand(8, 2, 6, 6)
    snn = convert(net, images, 16, 8)
    (op,) = [entry.op for entry in snn.ops.values() if isinstance(entry.op, SpikeAffine)]
    assert op.neuron is None and not hasattr(op, "weight_q") and op.weight.tolist() == [0.5] * 4


IMAGES = {
    "(x - mean) / std": lambda x: (x - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.full((3, 1, 1), 0.25),
    "x / 255": lambda x: x / 255,
    "x * 2 - 1": lambda x: x * 2 - 1,
    "in place": lambda x: x.sub_(0.5).div_(0.2),
    "x - the mean image": lambda x: x - MAP[:3],
    "a factor for every pixel": lambda x: (x - MAP[:3]) * MAP[1:] + 1,
}


@pytest.mark.parametrize("function", IMAGES.values(), ids=IMAGES)
def test_arithmetic_on_the_image_stays_ann_and_is_not_trained(function):
    torch.manual_seed(0)
    head = [conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)]
    dag = trace_and_compare(nn.Sequential(Call(function), *head))
    on_image = [entry.op for name, entry in dag.ops.items() if name.startswith("affine")]
    assert on_image and all(op.trained_parameters() == [] for op in on_image)
    images = torch.rand(4, 3, 8, 8)
    snn = convert(nn.Sequential(Call(function), *head), images, 8, 8)
    assert not any(entry.op.spiking for name, entry in snn.ops.items() if name.startswith("affine"))
    assert_every_spike_is_reproduced(snn, images, 8)


def test_whole_numbers_of_an_image_become_floats():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    for function in (lambda x: x.float() / 255, lambda x: x.to(torch.float32).div_(255), lambda x: x / 255):
        net = nn.Sequential(Call(function), nn.Conv2d(3, 4, 1), nn.ReLU())
        dag = parse_ann_model(net, (images,))
        assert torch.allclose(dag(images), net(images), atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"whole numbers overflow, make floats of the image first"):
        parse_ann_model(nn.Sequential(Call(lambda x: x * 2), nn.Conv2d(3, 4, 1)), (images,))


class Scaled(nn.Module):
    """A learnt factor, or a frozen BatchNorm's buffers, behind a convolution."""

    def __init__(self, learnt):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1).requires_grad_(False)
        scale = torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1)
        self.scale = nn.Parameter(scale) if learnt else None
        self.register_buffer("running", None if learnt else scale)

    def forward(self, x):
        return self.conv(x) * (self.running.rsqrt() if self.scale is None else self.scale)


@pytest.mark.parametrize("learnt", [False, True])
def test_a_learnt_factor_is_trained_and_a_computed_one_of_buffers_is_not(learnt):
    layer = trace_and_compare(Scaled(learnt)).ops["conv1"].op
    assert layer.frozen == (frozenset({"bias"}) if learnt else frozenset({"weight", "bias"}))


W, BIAS, KERNEL = torch.randn(256, 5) / 16, torch.randn(5), torch.randn(3, 4)
PRODUCTS = {
    "x @ w": lambda x: x @ W,
    "matmul, w.t()": lambda x: torch.matmul(x, W.t().contiguous().t()),
    "mm + bias": lambda x: torch.mm(x, W) + BIAS,
    "addmm": lambda x: torch.addmm(BIAS, x, W, beta=0.5, alpha=2),
    "einsum": lambda x: torch.einsum("bn,nm->bm", x, W),
    "einsum, weight first": lambda x: torch.einsum("mn, bn -> bm", W.t(), x),
}


@pytest.mark.parametrize("function", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_with_a_constant_matrix_is_a_linear_layer(function):
    dag = trace_and_compare(nn.Sequential(*after_conv(F.relu), nn.Flatten(), Call(function)))
    assert list(dag.ops) == ["conv1", "relu1", "view1", "linear1"]


def test_a_product_over_the_channels_is_a_convolution():
    dag = trace_and_compare(Call(lambda x: F.relu(torch.einsum("bchw,cd->bdhw", x, KERNEL) * 2)))
    assert list(dag.ops) == ["conv1", "relu1"]
