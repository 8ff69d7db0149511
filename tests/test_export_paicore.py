"""Networks for PAICORE: the layers as cores take them, in NumPy; their spikes in PAIBox, where it is installed."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_helpers import needs_paibox, simulate_cores, with_two_inputs
from helpers import conv, convert, reading, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hw_constraints
from export.paicore import Mapped, check_cores, spike_trains, write_paicore
from export.paicore_layers import core_layers, core_rows, rows_in_bits, width_of
from hw_constraints import PAICORE, core_table

TIMESTEPS = 6


NETWORKS = {
    "skip": lambda: reading(lambda n, x: F.relu(n.b(F.relu(n.a(x))) + x), a=conv(4, 4), b=conv(4, 4)),
    "two branches": lambda: reading(
        lambda n, x: F.relu(n.b(F.relu(n.a(x))) + n.c(x)), a=conv(4, 4), b=conv(4, 4), c=conv(4, 4, 1)
    ),
    "sum of spikes": lambda: reading(lambda n, x: F.relu(n.a(x + F.relu(n.b(x)))), a=conv(4, 4), b=conv(4, 4)),
    "pooling, groups, stride": lambda: reading(
        lambda n, x: F.relu(n.a(F.avg_pool2d(x, 2))), a=nn.Conv2d(4, 6, 3, 2, 1, groups=2)
    ),
    "linear layer": lambda: reading(lambda n, x: F.relu(n.a(F.avg_pool2d(x, 2).flatten(1))), a=nn.Linear(64, 10)),
}


def converted(name, **options):
    torch.manual_seed(0)
    images = torch.rand(8, 1, 8, 8)
    return convert(NETWORKS[name](), images, TIMESTEPS, **options), images


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_in_plain_numbers_send_the_same_spikes(name, reset_mode):
    snn, images = converted(name, reset_mode=reset_mode)
    trains = spike_trains(snn, images[:2])
    hosts, layers = core_layers(snn, trains)
    assert list(hosts) == ["relu1"] and [layer.name for layer in layers] == snn.spiking_layers()[1:]
    found = simulate_cores(layers, {"relu1": trains["relu1"]}, TIMESTEPS)
    for layer in layers:
        assert np.array_equal(found[layer.name], trains[layer.name]), layer.name
        assert trains[layer.name].any()


def test_a_layer_fires_one_step_after_the_last_that_it_reads():
    snn, images = converted("skip")
    _, layers = core_layers(snn, spike_trains(snn, images[:1]))
    assert [(layer.name, layer.depth) for layer in layers] == [("relu2", 1), ("relu3", 2)]
    rows = core_rows({"relu1": (4, 8, 8)}, layers)
    assert rows[-1] == ("relu1 in step 1", 256, 256, layers[0].bits)  # its spikes wait for those of relu2


@settings(deadline=None)
@given(st.lists(st.integers(-300, 300), min_size=1, max_size=5), st.sampled_from([1, 2, 4, 8]))
def test_rows_have_the_bits_of_the_layer_and_the_right_sum(values, bits):
    values = [abs(value) for value in values] if bits == 1 else values
    rows = rows_in_bits(values, bits)
    assert rows.sum(0, dtype=int).tolist() == values
    assert all(width_of(row) <= bits for row in rows)


@pytest.mark.parametrize(
    "weights, bits", [([0, 1], 1), ([-1, 1], 2), ([-2], 2), ([2], 4), ([7], 4), ([8], 8), ([-127], 8)]
)
def test_widths_are_those_of_the_chip(weights, bits):
    assert width_of(np.array(weights)) == bits


# ---------------------------------------------------------------------------------------------------------------------
# Cores


@pytest.mark.parametrize(
    "neurons, inputs, bits, cores",
    [
        (1568, 6274, 1, 25),
        (2304, 1574, 4, 36),
        (576, 2306, 1, 5),
        (512, 587, 4, 4),
        (16384, 16384, 4, 2048),
        (1, 1, 3, 1),
    ],
)
def test_cores_of_a_layer(neurons, inputs, bits, cores):
    """The first four are those that PAIBox 1.3 needs for example_net, the fifth a 3x3 convolution of 64 channels."""
    assert PAICORE.cores_of(neurons, inputs, bits) == cores


def test_the_table_counts_all_cores():
    table, needed = core_table([("a", 512, 10, 1), ("b", 512, 2000, 3)])
    assert needed == 1 + 8 and table[-1] == ("all", "", "", "", "9 of 1008")
    assert table[2] == ("b", 512, 2000, 4, 8)


def test_a_network_over_the_chip_is_refused_with_its_largest_layer(capsys):
    snn, images = converted("skip")
    hosts, layers = core_layers(snn, spike_trains(snn, images[:1]))
    layers[1].shape = (1000, 32, 32)
    with pytest.raises(
        ValueError, match=r"^Hardware paicore: the network needs \d+ cores, over 1008, most of them for relu3"
    ):
        check_cores(hosts, layers)
    assert "relu3" in capsys.readouterr().out


def test_the_script_prints_cores(capsys):
    hw_constraints.main(hw_constraints.parse_args(["example_net", "--hardware", "paicore"]))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:]] == ["avg_pool1", "conv2", "avg_pool2", "conv3", "all"]
    assert [row[-1] for row in rows[1:-1]] == ["25", "36", "3", "4"] and rows[-1][1:] == ["68", "of", "1008"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "resnet20 --input_shape 3,32,32",
            "Hardware paicore: the network needs 18048 cores, over 1008, most of them for conv2",
        ),
        ("example_net --avgpool fold", "cores take spikes and no sums of them: use --avgpool spike"),
        ("example_net --weight_bitwidth auto", "takes 1 to 8 bits in every layer, give --weight_bitwidth BITS"),
        ("example_net --weight_bitwidth 32", "has float weights, cores take 1 to 8 bits"),
    ],
)
def test_the_script_refuses_what_does_not_fit(capsys, flags, message):
    with pytest.raises(ValueError, match=message):
        hw_constraints.main(hw_constraints.parse_args([*flags.split(), "--hardware", "paicore"]))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "paibox" else find(name))
    with pytest.raises(ValueError, match=r"^--paibox needs paibox, which is missing: pip install paibox$"):
        write_paicore(None, str(tmp_path / "chip"))


def refusal_of(snn, images):
    with pytest.raises(ValueError) as error:
        core_layers(snn, spike_trains(snn, images[:1]))
    return str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"per_channel": "spikes"},
            "its thresholds differ by channel, cores take one for a layer: convert with --per_channel none",
        ),
        ({"avgpool": "fold"}, "it hands on sums of spikes, convert with --avgpool spike"),
        ({"listen": 2}, "its neurons wait before they fire (--listen)"),
        ({"bits": 32}, "its weights are floats"),
    ],
)
def test_what_cores_cannot_do_is_refused_by_name(options, message):
    snn, images = converted("pooling, groups, stride", **options)
    assert refusal_of(snn, images).endswith(f" does not fit PAICORE: {message}")


def test_layers_that_cores_do_not_compute_are_refused():
    net, images = small_model("upwards")
    snn = convert(net, images, 4)
    assert (
        refusal_of(snn, images)
        == "conv_transpose1 (up) does not fit PAICORE: cores do not compute transposed convolutions"
    )


def test_a_network_of_one_layer_leaves_nothing_for_the_cores():
    net = nn.Sequential(conv(1, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    images = torch.rand(4, 1, 8, 8)
    assert refusal_of(convert(net, images, 4), images) == "no layer is left for the cores: all neurons read the image"


def test_an_ann_layer_that_waits_for_all_spikes_of_cores_is_refused():
    """On the host it may stand between the image and the first layer of the cores."""
    net = reading(lambda n, x: F.relu(n.c(F.relu(n.b(F.relu(n.a(x)))))), a=conv(4, 4), b=conv(4, 4), c=conv(4, 4))
    images = torch.rand(4, 1, 8, 8)
    assert refusal_of(convert(net, images, 4, ann_layers=("b",)), images) == (
        "conv3 (b) does not fit PAICORE: it stays ANN and reads all spikes of cores before others start, convert "
        "without --ann_layers"
    )
    snn = convert(net, images, 4, ann_layers=("a",))
    trains = spike_trains(snn, images[:1])
    hosts, layers = core_layers(snn, trains)
    assert list(hosts) == ["relu1", "relu3"] and [layer.name for layer in layers] == ["relu4"]
    assert np.array_equal(simulate_cores(layers, {name: trains[name] for name in hosts}, 4)["relu4"], trains["relu4"])


# ---------------------------------------------------------------------------------------------------------------------
# PAIBox


@needs_paibox
@pytest.mark.parametrize("options", [{}, {"reset_mode": "zero"}], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_paibox_sends_the_same_spikes_and_needs_as_many_cores(name, options):
    import paibox

    snn, images = converted(name, **options)
    trains = spike_trains(snn, images[:2])
    hosts, layers = core_layers(snn, trains)
    network = Mapped(paibox, hosts, layers)
    assert network.compare(trains, TIMESTEPS) == sum(trains[layer.name].size for layer in layers)
    files, info = network.files()
    assert info["n_core_required"] == core_table(core_rows(hosts, layers))[1]
    assert "config_all.bin" in files


@needs_paibox
def test_several_inputs_are_refused(tmp_path):
    snn, images = with_two_inputs()
    with pytest.raises(ValueError, match="has 2 inputs, export a network of one to PAICORE"):
        write_paicore(snn, str(tmp_path / "chip"), images)


@needs_paibox
def test_another_spike_is_an_error():
    import paibox

    snn, images = converted("linear layer")
    trains = spike_trains(snn, images[:1])
    network = Mapped(paibox, *core_layers(snn, trains))
    trains["relu2"][0, 0, 3] ^= 1
    with pytest.raises(ValueError, match=r"^relu2.* sends 1 other spikes when PAIBox simulates it, report this$"):
        network.compare(trains, TIMESTEPS)


@needs_paibox
def test_the_folder_says_what_the_host_sends(tmp_path, capsys):
    snn, images = converted("skip")
    line = write_paicore(snn, str(tmp_path / "chip"), images)
    assert line.startswith("PAIBox: 2 layers on ") and "6,144 neurons and steps simulated alike" in line
    host = json.loads((tmp_path / "chip/host.json").read_text())
    assert host["timesteps"] == TIMESTEPS and list(host["spikes"].values()) == ["relu1"]
    assert [layer["first_step"] for layer in host["layers"].values()] == [1, 2]
    assert {start["layer"]: start["step"] for start in host["first_potentials"].values()} == {"relu2": 1, "relu3": 2}
    assert "build elements" not in capsys.readouterr().out
