"""What the tests of several exports share: each format's spikes are compared with those of the simulator.

onnx, onnxruntime and paibox are optional, and imported where they are used; the marks `needs_...` skip without them.
"""

import importlib.util
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_reference_agrees, conv, spikes_and_first_currents
from torch import nn

from ann_parser import parse_ann_model
from export.c import write_c
from export.onnx_file import write_onnx, write_onnx_step
from export.paicore_layers import rows_in_bits
from snn_weight_setter import trans_ann2snn_weight
from spike_neurons import if_step
from spike_simulator import simulate
from tools.check_importer import differences
from transformer.saved import make_vectors


def needs(*packages):
    """The mark of a test that is skipped unless all packages are installed."""
    is_missing = any(importlib.util.find_spec(package) is None for package in packages)
    return pytest.mark.skipif(is_missing, reason=f"needs {' and '.join(packages)}")


COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
needs_nir, needs_paibox, needs_onnxruntime = needs("nir", "nirtorch"), needs("paibox"), needs("onnx", "onnxruntime")
CLOSE = 2e-5  # the logits are sums of floats, in another order
NEAR = 2e-6  # relative, of a float potential and its threshold: about 16 roundings of float32


# ---------------------------------------------------------------------------------------------------------------------
# C


def compiled(folder, *flags):
    """The program of snn.c, or its object file with -c, without a warning."""
    target = folder / ("snn.o" if "-c" in flags else "snn")
    done = subprocess.run(
        [COMPILER, *FLAGS, *flags, "-o", target, folder / "snn.c"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return target


def replayed(folder, *flags):
    """What the compiled program says of its test vectors."""
    program = compiled(folder, *(flags or ("-O0",)))  # compiles in a third of the time of -O2
    return subprocess.run([program, folder / "vectors.bin"], capture_output=True, text=True, check=False)


def assert_same_in_c(snn, images, folder, *flags):
    """The C code of a network has the spike counts of the simulator and of the NumPy reference, layer for layer."""
    images = images if isinstance(images, tuple) else (images,)
    vectors = make_vectors(snn, images)
    if not any(getattr(entry.op, "padding", 0) == "same" for entry in snn.ops.values()):  # the reference has numbers
        assert_reference_agrees(snn, vectors)
    write_c(snn, folder, images)
    done = replayed(folder, *flags)
    assert done.returncode == 0, done.stderr
    spikes = sum(int(train.sum()) for train in vectors["spikes"].values())
    expected = f"identical: {spikes} spikes of {len(snn.neurons())} layers ({len(images[0])} images, T={snn.timesteps})"
    assert done.stdout.startswith(expected), done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# NIR


def assert_same_in_nir(snn, images, path):
    """Every spike count of every layer, and the network's outputs, in nirtorch by the lines of docs/export.md."""
    wrong, counts = differences("nirtorch", snn, images, str(path))
    assert wrong == dict.fromkeys(snn.spiking_layers(), 0)
    assert all(count.any() for count in counts.values())


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


def runtimes(path, reference=True):
    """The file in onnxruntime, and in onnx's reference evaluator.

    A quantized ANN is run with and without the setting that lets onnxruntime compute its layers in 8 bits.
    """
    import onnx
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    is_quantized = any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)
    for disabled in ("1", "0") if is_quantized else ("0",):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3  # no warning that T may be given
        options.add_session_config_entry("session.disable_quant_qdq", disabled)
        yield onnxruntime.InferenceSession(path, options)
    if reference:
        yield ReferenceEvaluator(path)


def counts_of(snn, images, timesteps):
    """Spike counts of every layer, op name -> [B, ...]."""
    trains, _ = spikes_and_first_currents(snn, images, timesteps)
    return {name: train.sum(0, dtype=np.int64) for name, train in trains.items()}


def clear_images(snn, images, timesteps):
    """The images that no rounding of floats can change the spikes of.

    The image's current is a sum of floats in another order in every runtime. A potential that meets its threshold to
    the last digits, as those that the threshold was measured on, may fire a step earlier or later.
    """
    is_clear = torch.ones(len(images), dtype=torch.bool)

    def watch(name, current, value):
        neuron = snn.ops[name].op.neuron
        if neuron is None or neuron.largest_current is not None:
            return
        steps, Vthr = current.per_step().double().expand(timesteps, *current.per_step().shape[1:]), neuron.Vthr.double()
        u = neuron.initial_potential.double() + steps[: neuron.listen].sum(0)
        for t in range(timesteps):
            if t + neuron.listen < timesteps:
                u = u + steps[t + neuron.listen]
            is_clear.logical_and_(((u - Vthr).abs() > NEAR * Vthr).flatten(1).all(1))
            u = if_step(u, 0.0, Vthr, neuron.reset_mode)[0]

    with torch.no_grad():
        simulate(snn, (images,), timesteps, watch=watch)
    assert is_clear.sum() >= len(images) / 2
    return images[is_clear]


def assert_counts(counts, found):
    assert {name: int((found[name] != expected).sum()) for name, expected in counts.items()} == dict.fromkeys(counts, 0)


def assert_same_in_onnx(snn, images, path, timesteps=None, reference=True, write=write_onnx):
    """Every runtime counts the spikes of the simulator in every layer, and has its outputs."""
    import onnx

    write(snn, path, images)
    onnx.checker.check_model(path, full_check=True)
    images = clear_images(snn, images, timesteps or snn.timesteps)
    counts = counts_of(snn, images, timesteps or snn.timesteps)
    assert sum(count.sum() for count in counts.values()) > 0
    with torch.no_grad():
        logits = snn.eval()(images, timesteps=timesteps).numpy()
    names, feeds = ["logits", *(f"count_{name}" for name in counts)], {"image": images.numpy()}
    if timesteps is not None:
        feeds["T"] = np.asarray(timesteps, np.int64)
    for runtime in runtimes(path, reference):
        given, *found = runtime.run(names, feeds)
        assert_counts(counts, dict(zip(counts, found)))
        assert np.abs(given - logits).max() < CLOSE


def assert_same_step_in_onnx(snn, images, path, reference=True):
    """The file of one step, called T times, has the spike counts and outputs of the simulator."""
    import onnx

    write_onnx_step(snn, path, images)
    images = clear_images(snn, images, snn.timesteps)
    counts = counts_of(snn, images, snn.timesteps)
    with torch.no_grad():
        logits = snn.eval()(images).numpy()
    model = onnx.load(path)
    kinds = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT32: np.int32}
    tensors = {each.name: each.type.tensor_type for each in model.graph.input if each.name.endswith("_in")}
    names = [each.name for each in model.graph.output]
    for runtime in runtimes(path, reference):
        state = {}
        for name, tensor in tensors.items():  # the values at step 0 do not count
            shape = [len(images), *(each.dim_value for each in tensor.shape.dim[1:])]
            state[name] = np.full(shape, 7, kinds[tensor.elem_type])
        for step in range(snn.timesteps):
            feeds = {"image": images.numpy(), "step": np.asarray(step, np.int64), **state}
            values = dict(zip(names, runtime.run(names, feeds)))
            state = {name: values[f"{name.removesuffix('_in')}_out"] for name in tensors}
        assert_counts(counts, {name: values[f"n_{name}_out"] for name in counts})
        assert np.abs(values["logits"] - logits).max() < CLOSE


def loop_of(path):
    """The body of the one Loop in a file."""
    import onnx

    (loop,) = (node for node in onnx.load(path).graph.node if node.op_type == "Loop")
    return loop.attribute[0].g


# ---------------------------------------------------------------------------------------------------------------------
# PAICORE


def simulate_cores(layers, trains, timesteps):
    """Layer name -> spikes [T, B, ...], by the chip's rules: every layer one step after the layers that it reads."""
    trains = {name: train.astype(np.int64) for name, train in trains.items()}
    for layer in layers:
        images = trains[layer.synapses[0].source].shape[1]
        u = np.broadcast_to(
            rows_in_bits(layer.initial_potential, layer.bits).sum(0, dtype=np.int64), (images, layer.neurons)
        )
        sent = []
        for t in range(timesteps):
            u = u + layer.bias + sum(current_of(synapse, trains[synapse.source][t]) for synapse in layer.synapses)
            spikes = u >= layer.Vthr
            u = u - layer.Vthr * spikes if layer.subtracts else u * ~spikes
            sent.append(spikes.astype(np.int64))
        trains[layer.name] = np.stack(sent).reshape(timesteps, images, *layer.shape)
    return trains


def current_of(synapse, spikes):
    """The current of spikes [B, ...] at one step, [B, neurons]."""
    if synapse.kind == "full":
        return spikes.reshape(len(spikes), -1) @ synapse.weight.astype(np.int64)
    weight = torch.from_numpy(synapse.weight.astype(np.float64))
    x = torch.from_numpy(spikes.astype(np.float64))
    current = F.conv2d(x, weight, None, synapse.stride, synapse.padding, 1, synapse.groups)
    return current.flatten(1).numpy().astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class TwoInputs(nn.Module):
    """A convolution of an image and a linear layer of a code; scores, and a map."""

    def __init__(self):
        super().__init__()
        self.of_image, self.of_code = conv(1, 4), nn.Linear(5, 8)
        self.scores, self.map = nn.Linear(72, 3), nn.Conv2d(4, 2, 1)

    def forward(self, image, code):
        maps, codes = self.of_image(image).relu(), self.of_code(code).relu()
        return self.scores(torch.cat([maps.flatten(1), codes], 1)), self.map(maps)


def with_two_inputs():
    """A converted network and its inputs."""
    torch.manual_seed(6)
    inputs = torch.rand(4, 1, 4, 4), torch.rand(4, 5)
    dag = parse_ann_model(TwoInputs().eval(), inputs)
    return trans_ann2snn_weight(dag, [(inputs, None)], torch.device("cpu"), 6, 4), inputs


def pooling_net(signed=False):
    """Max pooling over the edge, folded and spiking average poolings, linear layers; with signed: pairs of signs."""
    activations = [nn.LeakyReLU(0.1), nn.PReLU(6)] if signed else [nn.ReLU(), nn.ReLU()]
    return nn.Sequential(
        *(conv(2, 4), activations[0], nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
        *(conv(4, 4), nn.ReLU(), nn.AvgPool2d(2), conv(4, 6), activations[1], nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
    )
