"""Operations, joules and bits, against counting them one by one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import convert, count_reached, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.energy import (
    COSTS_45_NM,
    Costs,
    count_operations,
    energy_table,
    joules,
    potential_bound,
    signed_bits,
)
from reports.observe import count_spikes, observe, replay
from reports.price import price_of
from spike_layers import SignedReLU, SpikeAvgPool2d, SpikeConv2d, SpikeConvTranspose2d, SpikeLinear
from spike_neurons import IFNeuron
from spike_simulator import Stages, counting_of, node_shapes
from spike_tensor import Current


def test_a_3x3_convolution_counted_by_hand():
    """2 -> 4 channels, padding 1, on 3 x 4: a corner is read by 4 windows, an edge by 6, the middle by 9."""
    layer = SpikeConv2d(2, 4, 3, padding=1)
    windows = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]], dtype=torch.float64)
    assert torch.equal(layer.fan_out((2, 3, 4)), 4 * windows.expand(2, 3, 4))
    count = 0
    for _, y, x, dy, dx in np.ndindex(2, 3, 4, 3, 3):  # every input of every window that lies inside
        count += 4 * (0 <= y + dy - 1 < 3 and 0 <= x + dx - 1 < 4)
    assert layer.synapses((2, 3, 4)) == count == 2 * 4 * 70
    spikes = torch.zeros(2, 3, 4)
    spikes[0, 0, 0], spikes[1, 1, 2], spikes[1, 2, 1] = 3, 5, 7
    assert layer.spike_operations(spikes) == 4 * (3 * 4 + 5 * 9 + 7 * 6)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (SpikeConv2d(2, 4, 3, stride=2, padding=1), (2, 7, 6)),
        (SpikeConv2d(2, 4, (3, 2), dilation=2), (2, 7, 7)),
        (SpikeConv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
        (SpikeConv2d(3, 3, 5, padding=2, groups=3), (3, 4, 4)),
        (SpikeConv2d(1, 2, 1, stride=3), (1, 5, 5)),
        (SpikeConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 3)),
        (SpikeConvTranspose2d(4, 2, 2, stride=3, groups=2), (4, 3, 3)),
        (SpikeAvgPool2d(3, 2, 2), (3, 5, 5)),
        (SpikeAvgPool2d(2, 3, 2, 1), (2, 5, 4)),
        (SpikeLinear(6, 4), (6,)),
    ],
)
def test_fan_out_is_the_number_of_outputs_reached(layer, shape):
    assert torch.equal(layer.fan_out(shape), count_reached(layer, shape).double())
    assert not layer.weight.grad


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_fan_out_of_random_convolutions(data):
    draw = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    groups, transposed = draw(1, 3), data.draw(st.booleans())
    channels = groups * draw(1, 2), groups * draw(1, 2)
    kernel, stride, dilation = (draw(1, 3), draw(1, 3)), (draw(1, 3), draw(1, 3)), draw(1, 2)
    padding = 0 if transposed else draw(0, 2)
    kind = SpikeConvTranspose2d if transposed else SpikeConv2d
    layer = kind(*channels, kernel, stride=stride, padding=padding, groups=groups, dilation=dilation)
    shape = channels[0], draw(5, 8), draw(5, 8)
    assert torch.equal(layer.fan_out(shape), count_reached(layer, shape).double())


@pytest.mark.parametrize("name", ["dense", "bottlenecks", "shortcuts", "upwards"])
def test_operations_of_a_network_are_counted_spike_by_spike(name):
    net, images = small_model(name)
    snn = convert(net, images, 6, 4, maxpool="gate", signed="pair")
    counts = observe(snn, images[:1]).counts
    spikes, shapes = {node: count.mean(0) for node, count in counts.items()}, node_shapes(snn, images[:1])
    rows = count_operations(snn, shapes, spikes, 6)
    checked = pairs = 0
    for op, entry in snn.ops.items():
        layer, (node, *_), (out,) = entry["op"], entry["in_nodes"], entry["out_nodes"]
        if isinstance(layer, (SpikeConv2d, SpikeConvTranspose2d, SpikeLinear)):
            reached = count_reached(layer, shapes[node])
            trained = not isinstance(layer, SpikeAvgPool2d)
            of_pair = any(isinstance(e["op"], SignedReLU) and node in e["out_nodes"] for e in snn.ops.values())
            in_ann = reached.sum() / (2 if of_pair else 1)  # the ANN reads one channel of each pair
            pairs += of_pair
            assert rows[op]["ann_mac" if trained else "ann_ac"] == in_ann
            if not layer.spiking:
                assert rows[op]["snn_mac" if trained else "snn_ac"] == in_ann and rows[op]["synops"] == 0
            elif node in counts:
                expected = (counts[node] * reached).flatten(1).sum(1).mean().item()
                assert rows[op]["synops"] == pytest.approx(expected, rel=1e-12) and expected > 0
                biases = 6 * np.prod(shapes[out]) if layer.bias_q is not None else 0
                assert rows[op]["snn_ac"] == pytest.approx(expected + biases, rel=1e-12)
                assert rows[op]["snn_mac"] == 0
                checked += 1
            elif trained:  # its current is computed once, and added at every step
                assert (rows[op]["snn_mac"], rows[op]["snn_ac"]) == (reached.sum(), 6 * np.prod(shapes[out]))
            else:  # a pooling of currents adds all of them at every step
                assert (rows[op]["snn_mac"], rows[op]["snn_ac"]) == (0, 6 * reached.sum())
        elif op.startswith("add") and layer.spiking:
            expected = sum(counts[n].flatten(1).sum(1).mean().item() for n in entry["in_nodes"] if n in counts)
            assert rows[op]["synops"] == pytest.approx(expected, rel=1e-12)
            assert rows[op]["ann_ac"] == np.prod(shapes[out])
    assert checked >= 2 and (pairs > 0) == (name == "bottlenecks")


@pytest.mark.parametrize("listen", [0, 6])
@pytest.mark.parametrize("name", ["dense", "shortcuts"])
def test_spikes_are_counted_in_parts_as_in_one(name, listen):
    """By one pass for all steps where the layers listen, and for images that do not fit together into the memory."""
    net, images = small_model(name)
    snn = convert(net, images, 6, 4, signed="pair", avgpool="fold", listen=listen, reset_mode="subtraction")
    assert (counting_of(snn, Stages(snn), (images,), 6) is not None) == (listen == 6)
    expected, outputs = observe(snn, images).counts, snn(images)
    for budget in (None, 4096):
        snn.set_engine("auto", budget)
        found, counts = count_spikes(snn, images)
        assert torch.allclose(found, outputs, atol=1e-6) and counts.keys() == expected.keys()
        assert all(torch.equal(counts[node], expected[node].sum(0)) for node in expected)
    spikes, rows = {node: count.mean(0) for node, count in expected.items()}, node_shapes(snn, images[:1])
    synops = sum(row["synops"] for row in count_operations(snn, rows, spikes, 6).values())
    assert price_of(snn, images)["synops"] == pytest.approx(synops, rel=1e-9) and synops > 0


def test_joules_by_hand():
    assert {"FP32": Costs(0.9, 4.6), "INT8": Costs(0.03, 0.23)} == COSTS_45_NM
    assert joules(10, 100, Costs(ac=0.5, mac=3)) == pytest.approx(80e-12)
    one = {"ann_mac": 1000.0, "ann_ac": 10.0, "snn_mac": 200.0, "snn_ac": 4000.0, "synops": 3000.0}
    table = energy_table({"conv1": one, "conv2": one})
    assert table["FP32"]["ann"] == pytest.approx(2 * (1000 * 4.6 + 10 * 0.9) * 1e-12)
    assert table["FP32"]["snn"] == pytest.approx(2 * (200 * 4.6 + 4000 * 0.9) * 1e-12)
    assert table["INT8"]["snn"] == pytest.approx(2 * (200 * 0.23 + 4000 * 0.03) * 1e-12)
    own = energy_table({"conv1": one}, {"own": Costs(1, 2)})
    assert own == {"own": {"ann": 2010e-12, "snn": 4400e-12, "pj_per_ac": 1, "pj_per_mac": 2}}


@given(st.integers(-(2**30), 2**30), st.integers(0, 2**30))
def test_signed_bits_are_the_fewest_that_hold_both_ends(low, width):
    high = low + width
    bits = next(b for b in range(1, 40) if -(2 ** (b - 1)) <= low and high <= 2 ** (b - 1) - 1)
    assert signed_bits(low, high) == bits


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=12),
    st.sampled_from(["zero", "subtraction"]),
    st.integers(-5, 5),
    st.integers(0, 3),
)
def test_no_potential_leaves_the_bound(currents, reset_mode, initial, listen):
    T, potentials = len(currents), []
    neuron = IFNeuron(torch.tensor(3), 1.0, torch.tensor(initial), reset_mode, largest_current=9, listen=min(listen, T))
    current = Current(torch.tensor(currents, dtype=torch.float32)[:, None], T)
    replay(neuron, current, None, lambda u, spikes: potentials.append(u.item()))
    assert max(map(abs, potentials)) <= potential_bound(neuron, T) == 9 * T + abs(initial)
    assert potential_bound(SimpleNamespace(largest_current=None), T) is None


def test_the_bound_is_reached():
    neuron = IFNeuron(torch.tensor(3), 1.0, torch.tensor(-2), "subtraction", largest_current=9)
    potentials = []
    replay(neuron, Current(torch.full((4, 1), -9.0), 4), None, lambda u, spikes: potentials.append(u.item()))
    assert min(potentials) == -potential_bound(neuron, 4)
