"""Two timesteps in one float32: what fits, how steps come apart again, and networks in which some layers do not fit."""

import numpy as np
import onnx
import pytest
import torch
from export_helpers import assert_same_in_onnx, loop_of, pooling_net
from helpers import MODELS, convert, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import export.onnx_pairs
from export.onnx_file import write_onnx
from export.onnx_pairs import MOST, MOST_IN_SUM, PLACE, bounds_of, layers_that_fit
from layers.weighted import SpikeConv2d, SpikeLinear
from spike_simulator import simulate

pytest.importorskip("onnxruntime")

CURRENTS = st.integers(-MOST, MOST)


@given(st.lists(st.tuples(CURRENTS, CURRENTS), min_size=1, max_size=50))
def test_steps_come_apart_again(steps):
    first, second = np.array(steps, np.float32).T
    together = second + first / np.float32(PLACE)
    assert together.dtype == np.float32 and np.array_equal(np.round(together), second)
    assert np.array_equal((together - np.round(together)) * np.float32(PLACE), first)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_sums_on_the_way_are_exact(seed, inputs):
    """In float32, one product after the other, as large as they may be: nothing is rounded."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(-MOST_IN_SUM // inputs, MOST_IN_SUM // inputs, inputs)
    spikes = rng.integers(0, 2, (2, inputs))
    total = np.float32(0)
    for weight, first, second in zip(weights, *spikes):
        total = total + np.float32(weight) * (np.float32(second) + np.float32(first) / np.float32(PLACE))
    assert total == spikes[1] @ weights + spikes[0] @ weights / PLACE


@pytest.mark.parametrize("name", MODELS)
def test_currents_stay_within_their_bounds(name):
    net, images = small_model(name)
    snn = convert(net, images, timesteps=6, correction="none", signed="pair", maxpool="or")
    bounds, seen = {}, []

    def watch(op_name, current, value):
        entry = snn.ops[op_name]
        read = [bounds.get(node) for node in entry.inputs]
        if op_name in fitting and None not in read:
            least, most, largest = bounds_of(entry.op, read)
            assert least >= -MOST and most <= MOST and largest <= MOST_IN_SUM
            values = current.total() if hasattr(current, "total") else current.data
            assert least <= values.min() and values.max() <= most
            seen.append(op_name)
            bounds[entry.out] = least, most, largest
        if entry.op.neuron is not None or entry.op.selects:
            bounds[entry.out] = 0, 1, 1

    fitting = layers_that_fit(snn)
    with torch.no_grad():
        simulate(snn, (images,), 6, watch=watch)
    assert seen and fitting


def test_what_reads_the_image_or_floats_does_not_fit():
    net, images = small_model("shortcuts")
    snn = convert(net, images, timesteps=4)
    first = next(iter(snn.ops))
    assert first not in layers_that_fit(snn) and len(layers_that_fit(snn)) > 5
    floats = convert(net, images, timesteps=4, bits=32)
    assert layers_that_fit(floats).isdisjoint(floats.weighted_layers())


@pytest.mark.parametrize(
    "weights, fits", [([7] * 292 + [3], True), ([7] * 292 + [4], False), ([7, -7] * 292, True), ([7, -7] * 293, False)]
)
def test_the_limits_of_a_layer(weights, fits):
    """2047 is the largest current, 4094 the largest sum of |products|."""
    op = SpikeLinear(len(weights), 1, bias=False)
    op.spiking, op.weight_q, op.bias_q = True, torch.tensor([weights], dtype=torch.int8), None
    least, most, largest = bounds_of(op, [(0, 1, 1)])
    assert (least, most) == (sum(w for w in weights if w < 0), sum(w for w in weights if w > 0))
    assert (max(-least, most) <= MOST and largest <= MOST_IN_SUM) == fits


@pytest.mark.parametrize("most", [0, 20])
@pytest.mark.parametrize("name", ["dense", "shortcuts", "constants"])
def test_layers_that_do_not_fit_take_their_steps_apart(monkeypatch, name, most, tmp_path):
    """Limits far lower than those of float32: layers of both kinds alternate."""
    monkeypatch.setattr(export.onnx_pairs, "MOST", most)
    net, images = small_model(name)
    snn = convert(net, images, timesteps=5, correction="none", signed="pair", maxpool="gate")
    assert_same_in_onnx(snn, images[:3], str(tmp_path / "snn.onnx"), reference=False)


@pytest.mark.parametrize("maxpool", ["gate", "or"])
def test_one_step_at_a_time(maxpool, tmp_path):
    """pairs=False: spikes are 0 and 1, for runtimes that multiply with fewer than 13 bits."""
    images, path = torch.rand(4, 2, 8, 8), str(tmp_path / "snn.onnx")
    snn = convert(pooling_net(), images, timesteps=5, maxpool=maxpool, correction="none")

    def write(*args):
        return write_onnx(*args, pairs=False)

    assert_same_in_onnx(snn, images, path, write=write)
    assert "Round" not in {node.op_type for node in loop_of(path).node}
    write_onnx(snn, path, images)
    assert "Round" in {node.op_type for node in loop_of(path).node}


def test_the_body_holds_its_own_weights_as_constants(tmp_path):
    """onnxruntime has faster convolutions for weights that are constants of the same graph."""
    net, images = small_model("shortcuts")
    write_onnx(convert(net, images, timesteps=4), str(tmp_path / "snn.onnx"), images)
    body = loop_of(str(tmp_path / "snn.onnx"))
    own = {each.name: each.data_type for each in body.initializer}
    casts = {node.output[0]: node.input[0] for node in body.node if node.op_type == "Cast"}
    convolutions = [node for node in body.node if node.op_type == "Conv"]
    assert len(convolutions) == sum(isinstance(entry.op, SpikeConv2d) for entry in convolved(net, images))
    for node in convolutions:
        assert own.get(casts.get(node.input[1], node.input[1])) in (onnx.TensorProto.INT4, onnx.TensorProto.FLOAT)
        assert all(name in own for name in node.input[2:])


def convolved(net, images):
    """The entries of a converted network that read spikes."""
    snn = convert(net, images, timesteps=4)
    return [entry for entry in snn.ops.values() if not set(entry.inputs) & set(snn.inputs_nodes)]
