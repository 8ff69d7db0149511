"""The fast ways to simulate, each against a slow one: the same spikes, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_every_spike_is_reproduced,
    assert_learn_alike,
    convert,
    learn,
    learning_inputs,
    neuron_inputs,
    small_model,
    thresholds,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import layers.weighted
import spike_neurons
from kernels import neurons, neurons_cpu
from kernels.currents import Int8Weights, exact_type, in_type, int8_is_exact
from spike_layers import WeightedLayer
from spike_neurons import IFNeuron
from spike_tensor import Current

ROOT = Path(__file__).parents[1]
needs_numba = pytest.mark.skipif(neurons_cpu.njit is None, reason="numba is missing, or does not compile")


@needs_numba
@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(3, 5, 7, 6), (2, 1, 3, 3), (4, 33), (1, 2000)]),
    timesteps=st.sampled_from([1, 2, 15, 16, 100]),
    granularity=st.sampled_from(["layer", "channel", "neuron"]),
    reset_mode=st.sampled_from(["zero", "subtraction"]),
    kind=st.sampled_from(["steps", "constant", "extra"]),
    seed=st.integers(0, 1000),
)
def test_compiled_neurons_fire_as_the_plain_ones(shape, timesteps, granularity, reset_mode, kind, seed):
    steps, constant, extra, membrane = neuron_inputs(shape, timesteps, seed, kind)
    neuron = IFNeuron(thresholds(shape, granularity, seed), 1.0, 0, reset_mode, largest_current=30)
    current = Current(constant if steps is None else steps, timesteps, steps is None, extra)
    plain, potentials, _ = neuron.run(current, membrane.clone())
    spikes, _, fired = neuron.run_compiled(current, membrane)
    assert torch.equal(spikes, plain) and torch.equal(membrane, potentials)
    assert fired == plain.count_nonzero()


@needs_numba
@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1, 3, 5, 7, 6), (4, 2, 1, 3, 3), (16, 4, 33), (5, 1, 2000)]),
    granularity=st.sampled_from(["layer", "channel", "neuron"]),
    listen=st.integers(0, 5),
    subtract=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_compiled_neurons_learn_as_the_plain_ones(shape, granularity, listen, subtract, seed):
    given, listen = learning_inputs(shape, granularity, seed), min(listen, shape[0])
    found = learn(neurons.learning_steps, neurons.learning_steps_back, *given, listen, subtract)
    plain = learn(
        spike_neurons.learning_steps_in_turn, spike_neurons.learning_steps_back_in_turn, *given, listen, subtract
    )
    assert_learn_alike(found, plain)


GPU_NEURONS = """
import torch
from kernels.memory_order import order
from kernels.neurons_cpu import if_steps_on_cpu
from kernels.neurons_gpu import if_steps_on_gpu
from helpers import neuron_inputs, thresholds

checked = 0
for shape in [(3, 5, 7, 6), (4, 33), (1, 700)]:
    for granularity in ("layer", "channel", "neuron"):
        for subtract in (True, False):
            for kind in ("steps", "half", "constant", "extra"):
                steps, constant, extra, membrane = neuron_inputs(shape, 5, checked, kind)
                given = steps.half() if kind == "half" else steps
                Vthr, potentials = thresholds(shape, granularity, checked), membrane.clone()
                expected = torch.empty((5 * shape[0], *shape[1:]), dtype=torch.uint8, memory_format=order(membrane))
                spikes = expected.clone()
                if_steps_on_cpu(steps, constant, extra, Vthr, membrane, expected, subtract, 5)
                if_steps_on_gpu(given, constant, extra, Vthr, potentials, spikes, subtract, 5)
                assert torch.equal(spikes, expected) and torch.equal(potentials, membrane), (shape, granularity, kind)
                checked += 1
print(checked)
"""

GPU_LEARNING = """
import torch
from kernels import neurons, neurons_cpu, neurons_gpu
from spike_neurons import learning_steps_back_in_turn, learning_steps_in_turn
from helpers import assert_learn_alike, learn, learning_inputs

neurons_cpu.learning_steps_on_cpu = neurons_gpu.learning_steps_on_gpu
neurons_cpu.learning_steps_back_on_cpu = neurons_gpu.learning_steps_back_on_gpu
checked = 0
for shape in [(1, 3, 5, 7, 6), (4, 2, 1, 3, 3), (5, 4, 33)]:
    for granularity in ("layer", "channel", "neuron"):
        for listen in {0, 1, shape[0]}:
            for subtract in (True, False):
                given = *learning_inputs(shape, granularity, checked), listen, subtract
                found = learn(neurons.learning_steps, neurons.learning_steps_back, *given)
                assert_learn_alike(found, learn(learning_steps_in_turn, learning_steps_back_in_turn, *given))
                checked += 1
print(checked)
"""


GPU_CONVOLUTIONS = """
import torch
from torch.nn.functional import conv2d
from kernels.currents_gpu import GpuWeights

generator, checked = torch.Generator().manual_seed(0), 0
for inputs, outputs, groups in [(16, 16, 1), (3, 40, 1), (70, 130, 1), (20, 20, 20), (1, 1, 1)]:
    for kernel, *conv in [((3, 3), 1, 1, 1), ((5, 2), (2, 1), (0, 1), (1, 2)), ((1, 1), 2, 0, 1)]:
        conv = *[(x, x) if isinstance(x, int) else x for x in conv], groups
        for largest, bias in [(1, None), (127, torch.randint(-999, 999, (outputs,), generator=generator).int())]:
            weight = torch.randint(-127, 128, (outputs, inputs // groups, *kernel), generator=generator).to(torch.int8)
            spikes = torch.randint(0, largest + 1, (2, inputs, 7, 6), generator=generator).to(torch.uint8)
            expected = conv2d(spikes.double(), weight.double(), None if bias is None else bias.double(), *conv)
            bound = expected.abs().max().item()
            found = GpuWeights(weight, bias, conv, bound)(spikes)
            assert torch.equal(found.double(), expected) and found.is_contiguous(memory_format=torch.channels_last)
            assert found.dtype == (torch.int16 if bound < 2**15 else torch.int32)
            checked += 1
print(checked)
"""


@pytest.mark.slow
@needs_numba
def test_the_gpu_kernels_compute_as_the_cpu():
    """In Triton's interpreter, which runs a kernel without a GPU; all in one process, that imports Triton once."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    scripts = GPU_NEURONS + GPU_LEARNING + GPU_CONVOLUTIONS
    run = subprocess.run([sys.executable, "-c", scripts], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, ["72", "48", "30"]), run.stderr


@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_which_layers_a_gpu_convolves_in_integers(monkeypatch, capability):
    """Plain and depthwise convolutions and poolings, where the GPU has int8 products; no others."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2)]
    layers += [nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3), nn.ReLU()]
    snn = convert(nn.Sequential(*layers, nn.Linear(3, 2)), torch.rand(8, 2, 7, 7), 8, 8)
    spiking = {n: e["op"] for n, e in snn.ops.items() if isinstance(e["op"], WeightedLayer) and e["op"].spiking}
    chosen = {name for name, layer in spiking.items() if layer.convolves_on_gpu(torch.device("cuda", 0))}
    wanted = {"conv2", "avg_pool1", "conv4"} if capability >= (8, 0) else set()
    assert chosen - {"conv1"} == wanted and {"conv3", "linear1"} <= set(spiking)  # conv1 reads the image


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    kernel=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 8]),
    size=st.integers(13, 17),
    images=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_int8_convolutions_are_exact(bits, kernel, stride, dilation, groups, size, images, seed):
    if not int8_is_exact():
        return  # the float32 path runs here, and every other test goes through it
    generator = torch.Generator().manual_seed(seed)
    most = max(1, 2 ** (bits - 1) - 1)
    weight = torch.randint(-most, most + 1, (16, 8 // groups, kernel, kernel), generator=generator, dtype=torch.int8)
    bias = torch.randint(-999, 999, (16,), generator=generator, dtype=torch.int32)
    spikes = torch.randint(0, 2, (images, 8, size, size), generator=generator, dtype=torch.uint8)
    conv = [stride] * 2, [1, 0], [dilation] * 2, groups
    expected = nn.functional.conv2d(spikes.double(), weight.double(), bias.double(), *conv)
    assert torch.equal(Int8Weights(weight, bias, conv)(spikes).double(), expected)


@pytest.mark.parametrize("without", ["numba", "int8", "both"])
def test_every_spike_without_the_fast_kernels(monkeypatch, without):
    """As on a machine that lacks them: the fallbacks are as exact."""
    if without != "int8":
        monkeypatch.setattr(neurons_cpu, "njit", None)
    if without != "numba":
        monkeypatch.setattr(layers.weighted, "int8_is_exact", lambda largest=1: False)
    for name in ("shortcuts", "upwards"):
        net, images = small_model(name)
        for reset_mode in ("zero", "subtraction"):
            snn = convert(net, images, 16, 5, maxpool="gate", reset_mode=reset_mode)
            assert_every_spike_is_reproduced(snn, images[:3], 16)


def test_exact_type_takes_the_narrowest_that_the_device_computes_exactly():
    weight = torch.full((2, 3, 3, 3), 60.0)

    def conv(spikes):
        return nn.functional.conv2d(spikes, weight.to(spikes.dtype), padding=1)

    def rounding(spikes):  # as an algorithm does that transforms its inputs
        return conv(spikes) + (0.25 if spikes.dtype == torch.float16 else 0)

    shape = (2, 3, 6, 6)
    assert exact_type(conv, 27 * 60, shape, "cpu") == torch.float16
    assert exact_type(conv, 27 * 127, shape, "cpu") == torch.float32
    assert exact_type(conv, 2**25, shape, "cpu") == torch.float64
    assert exact_type(rounding, 27 * 60, shape, "cpu") == torch.float32


@pytest.mark.parametrize("name", ["shortcuts", "dense", "upwards"])
@pytest.mark.parametrize("bits", [2, 8])
def test_types_of_a_gpu_are_exact(monkeypatch, name, bits):
    """The layers compute in the type that `exact_type` finds, here on the CPU: float16 where it is wide enough."""
    net, images = small_model(name)
    snn = convert(net, images, 16, bits, maxpool="or")
    types = set()

    def current_of(layer, spikes):
        dtype = exact_type(
            lambda tried: in_type(layer, tried, tried.dtype), layer.largest_current(), spikes.shape, "cpu"
        )
        types.add(dtype)
        return in_type(layer, spikes, dtype)

    monkeypatch.setattr(WeightedLayer, "current_of", current_of)
    monkeypatch.setattr(neurons_cpu, "njit", None)  # numba has no float16
    assert_every_spike_is_reproduced(snn, images[:3], 16)
    assert types >= {torch.float16}
