"""Networks as files of NIR: every spike count in nirtorch, what the file holds, refusals, weights in other forms.

Without nir and nirtorch only the weights and the message of the missing package are tested.
"""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_helpers import assert_same_in_nir, needs_nir, with_two_inputs
from helpers import conv, convert, reading, slow, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import export.nir_graph
import tools.check_importer
from build_network import get_net_by_name
from export.nir_graph import averages_exactly, write_nir
from export.nir_weights import Unwritable, dense, pairs_to_values, per_channel, signed_pairs, square
from networks.checkpoint import load_weights
from spike_dag import load_dag
from tools.check_importer import ROOT, imported_counts


@pytest.fixture(scope="module")
def digits_net():
    return load_weights(get_net_by_name("example_net"), str(ROOT / "checkpoint/example_net_ann.pth"))


# ---------------------------------------------------------------------------------------------------------------------
# Spikes


@needs_nir
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        slow({"bits": 8}),
        slow({"bits": 4, "reset_mode": "zero"}),
        {"bits": 8, "reset_mode": "zero", "avgpool": "fold"},
        {"bits": 4, "avgpool": "fold", "per_channel": "both"},
    ],
    ids=str,
)
def test_example_net_sends_the_same_spikes_in_nirtorch(digits_net, digits_images, tmp_path, options):
    snn = convert(digits_net, digits_images[:20], 5, **options)
    assert_same_in_nir(snn, digits_images[:2], tmp_path / "net.nir")


@needs_nir
@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", ["bottlenecks", "shortcuts", "preactivated"])
def test_sums_groups_pairs_and_norms_send_the_same_spikes(tmp_path, name, reset_mode):
    net, images = small_model(name)
    snn = convert(net, images, 4, signed="pair", reset_mode=reset_mode)
    assert_same_in_nir(snn, images[:4], tmp_path / "net.nir")


PLACES = {
    "tall kernel": lambda: reading(lambda n, x: F.relu(n.a(x)), a=nn.Conv2d(4, 4, (3, 1), padding=(1, 0))),
    "even kernel, same": lambda: reading(lambda n, x: F.relu(n.a(x)), a=nn.Conv2d(4, 4, 4, padding="same")),
    "dilated, strided": lambda: reading(lambda n, x: F.relu(n.a(x)), a=nn.Conv2d(4, 4, 3, (2, 1), 2, 2)),
    "groups": lambda: reading(lambda n, x: F.relu(n.a(x)), a=conv(4, 6, groups=2)),
    "pooling 5x5": lambda: reading(lambda n, x: F.relu(n.a(F.avg_pool2d(x, 5, 1))), a=conv(4, 4)),
    "pooling 3x2": lambda: reading(lambda n, x: F.relu(n.a(F.avg_pool2d(x, (3, 2)))), a=conv(4, 4, 1)),
    "padded pooling": lambda: reading(lambda n, x: F.relu(n.a(F.avg_pool2d(x, 3, 2, 1))), a=conv(4, 4)),
    "pooled currents": lambda: reading(lambda n, x: F.relu(F.avg_pool2d(n.a(x), 2)), a=conv(4, 4)),
    "pads that differ": lambda: reading(lambda n, x: F.relu(n.a(F.pad(x, (2, 1, 0, 3)))), a=conv(4, 4)),
    "crop": lambda: reading(lambda n, x: F.relu(n.a(F.pad(x, (-1, 0, 1, -2)))), a=conv(4, 4)),
    "concatenation": lambda: reading(
        lambda n, x: F.relu(n.b(torch.cat([x, F.relu(n.a(x))], 1))), a=conv(4, 2), b=conv(6, 4)
    ),
    "twice the same": lambda: reading(lambda n, x: F.relu(n.a(x + x)), a=conv(4, 4)),
    "difference": lambda: reading(lambda n, x: F.relu(n.a(x) - n.b(x)), a=conv(4, 4), b=conv(4, 4, 1)),
    "hidden linear layer": lambda: reading(lambda n, x: F.relu(n.a(x.flatten(1))), a=nn.Linear(256, 9)),
    "average behind the spikes": lambda: reading(lambda n, x: F.relu(n.a(x)).mean([2, 3]), a=conv(4, 4)),
}


@needs_nir
@pytest.mark.parametrize("place", PLACES)
def test_a_layer_sends_the_same_spikes_in_nirtorch(tmp_path, place):
    torch.manual_seed(len(place))
    images = torch.rand(4, 1, 8, 8)
    snn = convert(PLACES[place](), images, 4)
    path = str(tmp_path / "net.nir")
    assert_same_in_nir(snn, images, path)
    _, total = imported_counts("nirtorch", path, images)
    with torch.no_grad():
        assert torch.allclose(total, snn(images), rtol=1e-5, atol=1e-5)


@needs_nir
def test_a_readout_of_per_channel_lambdas_makes_the_scores(tmp_path):
    images = torch.rand(4, 1, 8, 8)
    snn = convert(reading(lambda n, x: F.relu(n.a(x)), a=conv(4, 4)), images, 4, per_channel="both")
    write_nir(snn, str(tmp_path / "net.nir"), images)
    _, total = imported_counts("nirtorch", tmp_path / "net.nir", images)
    with torch.no_grad():
        assert torch.allclose(total, snn(images), rtol=1e-5, atol=1e-5)


@needs_nir
def test_the_check_of_importers_fails_for_another_neuron(monkeypatch, capsys):
    images = torch.rand(4, 1, 8, 8)
    snn = convert(reading(lambda n, x: F.relu(n.a(x)), a=conv(4, 4)), images, 8)
    monkeypatch.setattr(tools.check_importer, "networks", lambda: [("small", snn, images)])
    assert tools.check_importer.main("nirtorch") == 0
    lines = tools.check_importer.lines_of("nirtorch", "x")
    assert "u >= self.Vthr" in lines
    read = tools.check_importer.lines_of
    monkeypatch.setattr(
        tools.check_importer, "lines_of", lambda *names: read(*names).replace("u >= self.Vthr", "u > self.Vthr")
    )
    assert tools.check_importer.main("nirtorch") == 1
    same, other = capsys.readouterr().out.splitlines()
    assert same.endswith(" 0 counts differ") and not other.endswith(" 0 counts differ")
    with pytest.raises(SystemExit, match="error: unknown importer lava, use one of nirtorch"):
        tools.check_importer.main("lava")


# ---------------------------------------------------------------------------------------------------------------------
# The file


@needs_nir
def test_the_file_holds_integers_thresholds_and_potentials(digits_net, digits_images, tmp_path):
    import nir

    snn = convert(digits_net, digits_images[:20], 4, reset_mode="zero")
    line = write_nir(snn, str(tmp_path / "net.nir"), digits_images[:1])
    size = (tmp_path / "net.nir").stat().st_size
    assert line == (
        f"NIR: 14 nodes, 5 of them neurons, {size:,} bytes in {tmp_path / 'net.nir'}; docs/export.md has the lines "
        "that import it"
    )
    graph = nir.read(tmp_path / "net.nir")
    conv2, neurons = graph.nodes["conv2"], snn.neurons()
    assert np.array_equal(conv2.weight, snn.ops["conv2"].op.weight_q.numpy()) and conv2.metadata["bits"] == 4
    assert graph.metadata["neurons"].split() == list(neurons)
    assert (int(graph.metadata["timesteps"]), int(graph.metadata["readout"])) == (4, 1)
    for name, neuron in neurons.items():
        node = graph.nodes[name]
        assert (node.r == 1).all() and (node.v_reset == 0).all() and node.metadata["reset"] == "zero"
        shape = node.v_threshold.shape
        assert len(shape) == 3 and node.r.shape == node.metadata["v_init"].shape == shape
        assert np.array_equal(node.v_threshold, np.broadcast_to(neuron.Vthr.numpy(), shape))
        assert np.array_equal(node.metadata["v_init"], np.broadcast_to(neuron.initial_potential.numpy(), shape))
    assert all(node.groups == 1 for node in graph.nodes.values() if isinstance(node, nir.Conv2d))


@needs_nir
def test_a_skip_without_a_layer_is_the_last_edge(tmp_path):
    import nir

    net = reading(lambda n, x: F.relu(n.a(x) + n.b(x)), a=conv(4, 4), b=conv(4, 4))
    images = torch.rand(4, 1, 8, 8)
    snn = convert(net, images, 4)
    graph = export.nir_graph.nir_graph(snn, images)
    skips = [all(isinstance(graph.nodes[name], nir.IF) for name in edge) for edge in graph.edges]
    assert skips == sorted(skips)


@needs_nir
def test_a_loaded_network_that_knows_its_images_needs_none(tmp_path):
    net, images = small_model("shortcuts")
    snn = convert(net, images, 4)
    snn.preprocessing = {
        "input_shape": [2, 7, 7],
        "mean": [0.5, 0.25],
        "std": [0.5, 0.5],
        "resize": None,
        "classes": ["a", "b", "c"],
    }
    torch.save(snn, tmp_path / "snn.pth")
    write_nir(load_dag(tmp_path / "snn.pth"), str(tmp_path / "net.nir"))
    import nir

    metadata = nir.read(tmp_path / "net.nir").metadata
    assert metadata["classes"].split("\n") == ["a", "b", "c"] and metadata["mean"].tolist() == [0.5, 0.25]


@needs_nir
def test_layers_behind_the_spikes_that_are_not_linear_stay_outside(tmp_path):
    net = reading(lambda n, x: F.relu(n.a(x)), a=conv(4, 4))
    net = nn.Sequential(net, nn.Softmax(1))
    images = torch.rand(4, 1, 8, 8)
    graph = export.nir_graph.nir_graph(convert(net, images, 4), images)
    assert graph.metadata["readout"] == 0 and ("relu2", "output") in graph.edges


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nir" else find(name))
    with pytest.raises(ValueError, match=r"^--nir needs nir, which is missing: pip install nir$"):
        write_nir(None, str(tmp_path / "net.nir"))


def test_an_old_version_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export.nir_graph, "check_packages", lambda *names: None)
    monkeypatch.setattr(export.nir_graph, "version", lambda name: "1.0.4")
    with pytest.raises(ValueError, match=r"^--nir needs nir 1.0.8 or later, found 1.0.4: pip install 'nir>=1.0.8'$"):
        write_nir(None, str(tmp_path / "net.nir"))


def refusal_of(snn, images, tmp_path):
    with pytest.raises(ValueError) as error:
        write_nir(snn, str(tmp_path / "net.nir"), images)
    assert not list(tmp_path.iterdir())
    return str(error.value)


@needs_nir
@pytest.mark.parametrize(
    "name, message",
    [
        ("dense", "max_pool1 cannot be written: NIR has no node for max pooling"),
        ("upwards", "conv_transpose1 (up) cannot be written: NIR has no node for transposed convolutions"),
        ("constants", "bias_map1 cannot be written: NIR has no node for a bias for every element of a sample"),
    ],
)
def test_what_has_no_node_is_refused_by_name(tmp_path, name, message):
    net, images = small_model(name)
    assert refusal_of(convert(net, images, 4), images, tmp_path) == message


@needs_nir
def test_neurons_that_nir_cannot_describe_are_refused(tmp_path):
    net, images = small_model("shortcuts")
    snn = convert(net, images, 4, listen=2)
    assert refusal_of(snn, images, tmp_path) == (
        "relu1 (first.1) hears 2 steps before it fires (--listen), NIR has no such neuron"
    )
    for neuron in snn.neurons().values():
        neuron.listen, neuron.window = 0, 3
    assert "relu1 (first.1) fires in 3 steps only (--listen auto)" in refusal_of(snn, images, tmp_path)
    for neuron in snn.neurons().values():
        neuron.window = None
    snn.neurons()["relu2"].largest_current = 2.0**23
    assert "relu2: its potentials exceed 2^24" in refusal_of(snn, images, tmp_path)


@needs_nir
def test_what_is_no_converted_network_is_refused(tmp_path):
    net, images = small_model("shortcuts")
    snn = convert(net, images, 4)
    assert "give images, or --input_shape" in refusal_of(snn, None, tmp_path)
    from ann_parser import parse_ann_model

    ann = parse_ann_model(net, (images,))
    assert refusal_of(ann, images, tmp_path) == "the network has no neurons, convert it first (ann2snn.py)"
    assert refusal_of(*with_two_inputs(), tmp_path) == "the network has 2 inputs, importers of NIR take one"


@needs_nir
@pytest.mark.parametrize("between", [F.relu, lambda x: x], ids=["relu", "no relu"])
def test_a_network_with_an_ann_layer_inside_is_refused(tmp_path, between):
    """Without a ReLU behind it, too: a convolution of spikes and one of activations are the same node of NIR."""
    net = reading(lambda n, x: F.relu(n.b(between(n.a(x)))), a=conv(4, 4), b=conv(4, 4))
    images = torch.rand(4, 1, 8, 8)
    assert refusal_of(convert(net, images, 4, ann_layers=("a",)), images, tmp_path) == (
        "conv2 (a) stays ANN between spiking layers, which NIR cannot hold: convert without --ann_layers"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights in other forms


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sides=st.tuples(*[st.tuples(st.integers(-2, 3), st.integers(-2, 3))] * 2),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(12, 14), st.integers(12, 14)),
)
def test_a_square_kernel_computes_the_same(kernel, sides, stride, dilation, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (1, 2, *size), generator=generator).double()
    weight = torch.randint(-9, 9, (3, 2, *kernel), generator=generator).double()
    expected = F.conv2d(F.pad(x, (*sides[1], *sides[0])), weight, None, stride, 0, dilation)
    try:
        whole, padding = square(weight.numpy(), sides, stride, dilation, size)
    except Unwritable as error:
        assert str(error) == "a kernel of {} x {} with this padding and stride".format(*kernel)
        return
    assert whole.shape[2] == whole.shape[3]
    assert torch.equal(F.conv2d(x, torch.from_numpy(whole), None, stride, padding, dilation), expected)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 1), (1, 7), (3, 5), (2, 2)])
def test_odd_kernels_and_square_ones_always_fit(kernel):
    sides = [(k // 2, k // 2) for k in kernel]
    whole, _ = square(np.ones((1, 1, *kernel)), sides, (1, 1), (1, 1), (8, 8))
    assert whole.shape[2:] == (max(kernel), max(kernel)) and whole.sum() == kernel[0] * kernel[1]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_become_zeros(groups):
    x, weight = torch.rand(2, 4, 5, 5).double(), torch.rand(8, 4 // groups, 3, 3).double()
    whole = torch.from_numpy(dense(weight.numpy(), groups))
    assert torch.allclose(F.conv2d(x, whole), F.conv2d(x, weight, groups=groups))


def test_averages_that_float32_gets_back_are_those_of_small_windows():
    exact = [k for k in range(1, 9) if averages_exactly(k * k, k * k)]
    assert exact == [1, 2, 3, 4, 6, 8]


def test_values_per_channel():
    assert per_channel(np.array(3.0), 2).tolist() == [3, 3]
    assert per_channel(np.array([[[1.0]], [[2.0]]]), 2).tolist() == [1, 2]
    assert per_channel(np.ones((2, 3, 3)), 2).tolist() == [1, 1]
    with pytest.raises(Unwritable, match="weights that differ within a channel"):
        per_channel(np.arange(18).reshape(2, 3, 3), 2)


def test_pairs_of_signs_make_their_value_again():
    heard = np.array([1.0, 0.0, 1.0])
    x = np.array([2.0, -3.0, 5.0])
    pairs = signed_pairs(heard) @ x
    assert pairs.tolist() == [2, -2, -3, 0, 5, -5]
    assert (pairs_to_values(np.full(6, 7.0), np.array([-1.0]), 1) @ np.maximum(pairs, 0)).tolist() == [14, 0, 35]
    assert (pairs_to_values(np.ones(4), np.array([-1.0]), 2) @ np.array([1, 2, 10, 20])).tolist() == [-9, -18]
