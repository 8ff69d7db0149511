"""What several test files share: small networks, their conversion, and what is asserted of every spike."""

import copy
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import simulate
from torch import nn

import spike_simulator
from ann_parser import parse_ann_model
from conversion.statistics import pool_activations
from dag_rewrites import prepare_conversion
from kernels.memory_order import order
from snn_transformer import SNNTransformer
from snn_weight_setter import trans_ann2snn_weight
from spike_tensor import Current

ROOT = Path(__file__).parents[1]


def slow(*values):
    """One set of values of `parametrize` that runs with the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


def python(*arguments):
    """A Python process in the repository's root, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def errors_of(stderr):
    """The lines of stderr but for progress bars, warnings, and what the run says of its images."""
    lines = [re.sub(r"\x1b\[\w", "", line).split("\r")[-1].strip() for line in stderr.split("\n")]
    said = re.compile(r"%\||warning|^images |^report: ", re.IGNORECASE)
    return [line for line in lines if line and not said.search(line)]


def count_reached(layer, shape):
    """How many outputs each input position reaches: set it alone to one, under positive weights, and count."""
    size = int(np.prod(shape))
    with torch.no_grad():
        impulses = torch.eye(size, dtype=torch.float64).view(size, *shape)
        outputs = layer.operate(impulses, torch.rand_like(layer.weight, dtype=torch.float64) + 0.5, None)
    return (outputs > 0).flatten(1).sum(1).view(shape)


def neuron_inputs(shape, timesteps, seed, kind):
    """Random integer currents of T steps (or a real-valued constant one), potentials, and spikes that flow in too."""
    generator = torch.Generator().manual_seed(seed)
    potentials = torch.randint(-5, 9, shape, generator=generator).float()
    membrane = torch.empty_like(potentials, memory_format=order(potentials)).copy_(potentials)
    steps = torch.randint(-10, 15, (timesteps * shape[0], *shape[1:]), generator=generator).float()
    constant = 5 * torch.randn(shape, generator=generator)
    spikes = torch.randint(0, 2, steps.shape, generator=generator, dtype=torch.uint8)
    weight = torch.randint(1, 9, (shape[1], *[1] * (len(shape) - 2)), generator=generator)
    if kind == "constant":
        return None, constant, None, membrane
    return steps, None, (spikes, weight) if kind == "extra" else None, membrane


def thresholds(shape, granularity, seed):
    """Vthr per layer, per channel or per neuron."""
    extents = {"layer": (), "channel": (shape[1], *[1] * (len(shape) - 2)), "neuron": shape[1:]}
    return torch.randint(1, 20, extents[granularity], generator=torch.Generator().manual_seed(seed))


def learning_inputs(shape, granularity, seed):
    """Integer currents [T, B, ...], at even seeds with channels last in memory, Vthr, u[0], and a gradient."""
    torch.manual_seed(seed)
    sample = shape[1:]
    steps, Vthr = torch.randint(-10, 15, shape).float(), thresholds(sample, granularity, seed).float() + 3
    if len(sample) == 4 and seed % 2 == 0:
        steps = steps.movedim(2, -1).contiguous().movedim(-1, 2)
    return steps, Vthr, (Vthr / 2).round(), torch.randn(shape)


def assert_learn_alike(found, expected):
    """Potentials and spikes bit for bit, the gradients to the last digits of float32."""
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert torch.allclose(found[2], expected[2], rtol=1e-4, atol=1e-6)


def learn(forward, backward, steps, Vthr, start, gradient, listen, subtract):
    """Potentials, spikes, and the gradient of the currents."""
    potentials, spikes = forward(steps, Vthr, start, listen, subtract)
    return potentials, spikes, backward(gradient, potentials, Vthr, listen, subtract)


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


class Constants(nn.Module):
    """Arithmetic with constants: a normalised image, a BatchNorm behind a ReLU, differences, factors, bounds, maps."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.a, self.b, self.c = (nn.Conv2d(size, 4, 3, padding=1) for size in (4, 4, 8))
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("mean", torch.tensor([0.5, 0.4]).view(2, 1, 1))
        self.register_buffer("places", torch.rand(4, 7, 7) - 0.5)
        self.weight = nn.Parameter(torch.randn(4 * 49, 3) / 14)

    def forward(self, x):  # [B, 2, 7, 7]
        x = self.norm(F.relu(self.first((x - self.mean) / 0.25)))
        y, z = F.relu(self.a(x) + self.places), self.b(x).clamp(-0.5, 1)
        x = F.relu(y - 0.5 * z)
        x = torch.cat([x, 0.7 * y], 1)
        x = torch.minimum(F.relu(0.25 - self.c(x) * self.gamma), self.gamma)
        return x.flatten(1) @ self.weight + 1


MODELS = {
    "dense": Dense,
    "bottlenecks": Bottlenecks,
    "shortcuts": Shortcuts,
    "upwards": Upwards,
    "preactivated": Preactivated,
    "constants": Constants,
}


def small_model(name):
    torch.manual_seed(1)
    return with_statistics(MODELS[name](), seed=1), torch.rand(8, 2, 7, 7)


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


def reading(function, **layers):
    """A network whose first layer sends spikes of 4 channels, [B, 4, 8, 8], to `function`; then a linear layer."""

    def forward(self, x):
        return self.fc(function(self, F.relu(self.first(x))).flatten(1))

    net = Function(forward, first=conv(1, 4), **layers)
    with torch.no_grad():
        net.fc = nn.Identity()
        net.fc = nn.Linear(net(torch.zeros(1, 1, 8, 8)).shape[1], 3)
    return net


def saved_bytes(value, **options):
    """What torch.save writes for a value."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


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


def with_random_norms(net):
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


CHOICES = dict(maxpool="gate", signed="pair")


def prepared(net, images):
    """The ANN as the conversion sees it."""
    return prepare_conversion(parse_ann_model(net, (images[:2],)), "gate", "pair")


def convert(net, images, timesteps=16, bits=4, **options):
    """The spiking network of a plain one, calibrated on `images`, where these are."""
    dag = parse_ann_model(net, (images[:2],))
    return trans_ann2snn_weight(dag, [(images,)], images.device, timesteps, bits, **options)


@torch.no_grad()
def spikes_and_first_currents(snn, images, timesteps, chunk=None):
    """What the simulator computes: op name -> uint8 [T, B, ...] spikes, and float32 currents caused by the image.

    All images at a time, and all timesteps or `chunk` of them. images: a tuple for a network with several inputs.
    """
    trains, currents = {}, {}

    def watch(name, current, value):
        if snn.ops[name].op.neuron is not None:
            steps = value.data.unflatten(0, (value.timesteps, -1)).to(torch.uint8).cpu().numpy()
            trains[name] = np.concatenate([trains[name], steps]) if name in trains else steps
        elif isinstance(value, Current) and value.constant:
            currents[name] = value.data.cpu().numpy()

    with mock.patch.object(spike_simulator, "cut", lambda dag, inputs, *_: (len(inputs[0]), chunk or timesteps)):
        inputs = images if isinstance(images, tuple) else (images,)
        spike_simulator.simulate(snn, inputs, timesteps, watch=watch)
    return trains, currents


def assert_every_spike_is_reproduced(snn, images, timesteps):
    trains, currents = spikes_and_first_currents(snn, images, timesteps, chunk=max(1, timesteps - 3))
    expected = simulate(copy.deepcopy(snn).cpu(), currents, timesteps)
    assert list(trains) == list(expected) == snn.spiking_layers()
    for name, spikes in trains.items():
        assert np.array_equal(spikes, expected[name]), name
    assert timesteps < 15 or sum(spikes.sum() for spikes in trains.values()) > 0  # few steps may pass in silence


@torch.no_grad()
def activations_of(dag, name, images):
    """The outputs of one op of an ANN, [N]."""
    return pool_activations(dag, [(images, None)], "cpu", len(images), [name])[0][name].values()


def sequential(*layers):
    return parse_ann_model(nn.Sequential(*layers), (torch.zeros(1, 1, 6, 6),))
