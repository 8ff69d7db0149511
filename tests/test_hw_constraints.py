"""Hardware limits: the specification's table, the rules, the messages and the script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import build_network
import hw_constraints
from ann_parser import parse_ann_model
from hw_constraints import (
    HARDWARE,
    Layer,
    check_hardware,
    hardware_layers,
    hardware_table,
    largest_bitwidth,
    violations,
)
from options import CHIPS, DEFAULT_CHIP

ROOT = Path(__file__).parents[1]
V1 = HARDWARE["v1.0"]


def conv_layer(kernel_size=3, in_channels=16, role="hidden", has_relu=True):
    return Layer("conv2", "body.0", (kernel_size, kernel_size), in_channels, role, has_relu)


def layers_of(*modules, in_channels=1, size=8):
    """The layers of a chain of modules, as the chip sees them."""
    return hardware_layers(parse_ann_model(nn.Sequential(*modules), (torch.zeros(1, in_channels, size, size),)))


def run_script(*arguments):
    """hw_constraints.py in a process of its own."""
    return subprocess.run(
        [sys.executable, "hw_constraints.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# numbers


@pytest.mark.parametrize(
    "kernel_size, bits, channels",
    [(3, 1, 113), (3, 2, 56), (3, 3, 37), (3, 4, 28), (5, 1, 40), (5, 2, 20), (5, 3, 13), (5, 4, 10)],
)
def test_largest_in_channels_are_those_of_the_specification(kernel_size, bits, channels):
    assert V1.largest_in_channels(kernel_size, bits) == channels
    check_hardware([conv_layer(kernel_size, channels)], bits, V1)
    with pytest.raises(ValueError, match="over 1024"):
        check_hardware([conv_layer(kernel_size, channels + 1)], bits, V1)


def test_limit_is_1024_bits_inclusive():
    assert V1.fan_in_bits == 1024
    assert violations([conv_layer(1, 128)], 8, V1) == []
    assert [broken for _, broken in violations([conv_layer(1, 129)], 8, V1)] == ["1032 fan-in bits, over 1024"]


@pytest.mark.parametrize(
    "kernel_size, in_channels, bits",
    [(3, 1, 8), (3, 14, 8), (3, 15, 7), (3, 16, 7), (3, 28, 4), (3, 113, 1), (3, 114, 0)],
)
def test_largest_bitwidth(kernel_size, in_channels, bits):
    layer = conv_layer(kernel_size, in_channels)
    assert largest_bitwidth(layer, V1) == bits
    assert violations([layer], bits, V1) == []
    assert bits == 8 or len(violations([layer], bits + 1, V1)) == 1


def test_a_kernel_need_not_be_square():
    layer = Layer("conv1", "", (1, 7), 36, "hidden", True)
    assert layer.fan_in == 252
    assert violations([layer], 4, V1) == [] and len(violations([layer], 5, V1)) == 1


@pytest.mark.parametrize("groups, per_group", [(1, 64), (4, 16), (64, 1)])
def test_channels_count_per_group(groups, per_group):
    layers = layers_of(
        nn.Conv2d(1, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(2304, 2)
    )
    assert [layer.in_channels for layer in layers] == [1, per_group, 2304]
    assert largest_bitwidth(layers[1], V1) == min(1024 // (9 * per_group), 8)


def test_last_layer_is_free():
    linear = layers_of(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    conv = layers_of(nn.Conv2d(1, 256, 3), nn.ReLU(), nn.Conv2d(256, 10, 3))
    for layers in (linear, conv):
        assert [layer.role for layer in layers] == ["first", "last"]
        assert layers[1].fan_in * 8 > 1024 and violations(layers, 8, V1) == []
        assert hardware_table(layers, 8, V1)[2][-1] == "stays ANN"


def test_a_linear_layer_with_a_relu_counts_its_inputs():
    layers = layers_of(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 20), nn.ReLU(), nn.Linear(20, 2))
    assert [(layer.kernel_size, layer.in_channels, layer.role) for layer in layers] == [
        ((1, 1), 64, "first"),
        ((1, 1), 300, "hidden"),
        ((1, 1), 20, "last"),
    ]
    assert [layer.name for layer, _ in violations(layers, 4, V1)] == ["linear2"]


def test_a_pool_counts_one_bit():
    layers = layers_of(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.AvgPool2d(4), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert [layer.role for layer in layers] == ["first", "pool", "hidden"]
    row = dict(zip(*hardware_table(layers, 8, V1)[::2]))
    assert (row["bits"], row["fan-in bits"], row[""]) == (1, 16, "ok")
    assert violations([Layer("avg_pool1", "", (32, 32), 1, "pool", False)], 8, V1) == []


def test_a_pool_of_33x33_fits_at_no_bit_width():
    pool = Layer("avg_pool1", "", (33, 33), 1, "pool", False)
    with pytest.raises(ValueError, match=r"avg_pool1 has 1089 fan-in bits, over 1024: make its kernel"):
        check_hardware([pool], 1, V1)
    assert hardware_table([pool], 1, V1)[1][-2] == "nothing"


# ---------------------------------------------------------------------------------------------------------------------
# messages


def test_message_names_layer_path_limit_and_largest_bit_width():
    layers = layers_of(
        nn.Sequential(nn.Conv2d(1, 30, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(30, 4, 3), nn.ReLU()), nn.Flatten()
    )
    check_hardware(layers, 3, V1)
    with pytest.raises(ValueError) as error:
        check_hardware(layers, 4, V1)
    assert str(error.value) == "Hardware v1.0: conv2 (1.0) has 1080 fan-in bits, over 1024: at most 3 bits fit"


def test_message_gives_other_advice_where_no_bit_width_fits():
    with pytest.raises(
        ValueError, match=r"conv2 \(body.0\) has 1026 fan-in bits, over 1024: make its kernel or channels"
    ):
        check_hardware([conv_layer(3, 114)], 1, V1)


def test_a_convolution_without_a_relu_is_named():
    layers = layers_of(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    assert [(layer.path, broken) for layer, broken in violations(layers, 4, V1)] == [("2", "no ReLU behind it")]
    with pytest.raises(ValueError, match=r"conv2 \(2\) has no ReLU behind it: add one"):
        check_hardware(layers, 4, V1)


def test_the_first_of_several_violations_is_raised():
    layers = [conv_layer(3, 10), Layer("conv7", "a", (3, 3), 40, "hidden", True), conv_layer(5, 99)]
    assert len(violations(layers, 4, V1)) == 2
    with pytest.raises(ValueError, match=r"conv7 \(a\) has 1440 fan-in bits.*at most 2 bits"):
        check_hardware(layers, 4, V1)


# ---------------------------------------------------------------------------------------------------------------------
# the script


def test_script_prints_a_row_per_layer(capsys):
    hw_constraints.main(hw_constraints.parse_args(["example_net", "--weight_bitwidth", "4"]))
    printed = capsys.readouterr()
    header, *rows = printed.out.splitlines()
    assert printed.err == ""
    assert [row.split()[0] for row in rows] == ["conv1", "avg_pool1", "conv2", "avg_pool2", "conv3", "linear1"]
    at = header.index("limit")
    assert [row[at : at + 5].strip() for row in rows] == ["1024"] * 5 + ["-"]
    at = header.index("fan-in bits")
    assert [row[at : at + 11].strip() for row in rows] == ["100", "4", "288", "4", "576", "-"]


def test_script_ends_with_status_2_over_the_limit_and_still_prints_the_table():
    run = run_script("example_net", "--weight_bitwidth", "8")
    assert run.returncode == 2 and len(run.stdout.splitlines()) == 7
    assert run.stderr == "error: Hardware v1.0: conv3 (conv3) has 1152 fan-in bits, over 1024: at most 7 bits fit\n"


@pytest.mark.parametrize("name, layers", [("debug_net0", 2), ("debug_net1", 5), ("debug_net2", 3), ("debug_net3", 4)])
def test_script_knows_the_channels_of_every_network(capsys, name, layers):
    hw_constraints.main(hw_constraints.parse_args([name]))
    assert len(capsys.readouterr().out.splitlines()) == 1 + layers


def test_script_takes_a_network_without_convolutions(capsys, monkeypatch):
    monkeypatch.setattr(build_network, "NETWORKS", {})

    @build_network.network(image_size=8)
    def perceptron(channels, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 8), nn.ReLU(), nn.Linear(8, classes))

    hw_constraints.main(hw_constraints.parse_args(["perceptron"]))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["linear1", "linear2"]


def test_in_channels_are_those_of_the_command_line(capsys):
    hw_constraints.main(hw_constraints.parse_args(["example_net", "--in_channels", "3"]))
    assert capsys.readouterr().out.splitlines()[1].split()[3:7] == ["5x5", "3", "4", "300"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--weight_bitwidth", "0"],
        ["--weight_bitwidth", "9"],
        ["--hardware", "v9"],
        ["--in_channels", "0"],
        ["--in_channels", "-1"],
        ["--num_classes", "0"],
        ["--num_classes", "-1"],
    ],
)
def test_a_wrong_flag_is_named_in_one_line(capsys, flags):
    with pytest.raises(SystemExit) as end:
        hw_constraints.parse_args(["example_net", *flags])
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and flags[0] in message


def test_every_chip_has_a_name_among_the_options():
    assert tuple(hw_constraints.HARDWARE) == CHIPS and DEFAULT_CHIP in CHIPS
    assert all(name == chip.name for name, chip in hw_constraints.HARDWARE.items())
