"""The benchmarks: accuracies are those of ann2snn.py, every mode has a row, and a wrong line ends in one error."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import ann2snn
from benchmarks import accuracy, peers, simulate
from runtime.cli import run_script

ROOT = Path(__file__).parents[1]
NETWORK = f"example_net:{ROOT}/checkpoint/example_net_ann.pth"
FLAGS = "-e 1 --threshold mse --granularity channel --calibration_epochs 1 --calibration_samples 100 --finetune_snn 1"


@pytest.mark.slow
def test_accuracy_is_that_of_ann2snn(tmp_path, capsys):
    table = tmp_path / "table.json"
    argv = ["--networks", NETWORK, "--timesteps", "3", "--methods", f"own: {FLAGS} --listen T"]
    accuracy.main(accuracy.parse_args([*argv, "--results", f"{table}"]))
    printed = capsys.readouterr().out
    results, saved = tmp_path / "results.json", tmp_path / "snn.pth"
    one = f"example_net {FLAGS} --listen 3 --timesteps 3 --weight_bitwidth 8 --ann_weight {NETWORK.split(':')[1]}"
    ann2snn.main(ann2snn.parse_args([*one.split(), "--results", f"{results}", "--save_file", f"{saved}"]))
    (run,), wanted = json.loads(table.read_text())["runs"], json.loads(results.read_text())
    for key in ("ann_top1", "qnet_top1", "snn_top1"):
        assert run[key] == wanted[key]
    assert f"{run['snn_top1']:.2f}" in printed
    assert run["samples"] == 359 and run["interval"] == 6 and run["latency"] > run["interval"]
    assert run["spikes"] > 0 and run["synops"] > run["spikes"]


@pytest.mark.slow
def test_rows_that_share_their_finetuning_are_those_of_each_alone():
    """One finetuning serves both T, and the second row draws the random numbers that it would have drawn alone."""
    args = accuracy.parse_args(["--networks", NETWORK])
    flags = "-e 1 --activation_levels 4 --finetune_snn 1 --calibration_samples 100"

    def row(timesteps, loaders, finetuned):
        given = accuracy.conversion_args(NETWORK, 2, flags, timesteps, 0, "digits")
        return accuracy.measure(args, given, loaders, finetuned)

    loaders, finetuned = {}, {}
    shared = [row(timesteps, loaders, finetuned) for timesteps in (2, 3)]
    assert len(loaders) == len(finetuned) == 1
    alone = row(3, {}, {})
    keys = ("qnet_top1", "snn_top1", "spikes")
    assert [shared[1][key] for key in keys] == [alone[key] for key in keys]
    assert shared[0]["qnet_top1"] == alone["qnet_top1"] and shared[0]["spikes"] != alone["spikes"]


def test_several_seeds_give_mean_and_spread():
    runs = [
        {"ann_top1": 90.0, "snn_top1": snn, "interval": 4, "latency": 9, "spikes": 2000.0, "synops": 5e6}
        for snn in (88.0, 89.0, 87.0)
    ]
    ann, snn, points, *_ = accuracy.summary(runs)
    assert (ann, snn) == ("90.00", "88.00")
    assert points == f"-2.00 +- {math.sqrt(((88 - 88) ** 2 + 1 + 1) / 2):.2f}"


@pytest.mark.slow
def test_speed_has_a_row_for_every_mode(tmp_path):
    table = tmp_path / "table.json"
    argv = f"--networks example_net --timesteps 3 --batch 2 --rounds 1 --special --save_file {table}".split()
    simulate.main(simulate.parse_args(argv))
    rows = {row["contender"]: row for row in json.loads(table.read_text())["rows"]}
    modes = ["", ", --per_channel spikes", ", --listen T", ", --avgpool fold"]
    assert {f"this toolkit{mode}" for mode in modes} | {"ANN", "its reference engine"} <= set(rows)
    assert all(row["images/s"] > 0 and row["x T x ANN"] > 0 for row in rows.values())
    networks = simulate.special_networks("example_net", 3, 2, torch.device("cpu"))
    channel, listen, fold = networks.values()
    assert any(neuron.Vthr.numel() > 1 for neuron in channel.neurons().values())
    assert {neuron.listen for neuron in listen.neurons().values()} == {3}
    assert len(fold.neurons()) < len(listen.neurons())
    assert list(simulate.special_networks("resnet20", 2, 1, torch.device("cpu"))) == list(networks)[:2]  # folds none


@pytest.mark.parametrize(
    "script, argv, message",
    [
        (accuracy, ["--networks", "example_net"], "network 'example_net' has no weights, write it as NAME:FILE"),
        (accuracy, ["--networks", "torchvision:resnet18"], "'torchvision:resnet18' has no weights"),
        (accuracy, ["--networks", NETWORK, "--methods", "-e 0"], "method '-e 0' has no name"),
        (accuracy, ["--networks", NETWORK, "--methods", "a: -e 0", "a: -e 1"], "two methods are named 'a'"),
        (accuracy, ["--networks", "yolo_tiny:x.pth", "--dataset", "COCO"], "--dataset COCO is for detectors"),
        (accuracy, ["--networks", "nonet:x.pth"], "nonet"),
    ],
)
def test_a_wrong_line_ends_in_one_error(script, argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(script.main, script.parse_args(argv))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith("error: ") and message in error


def test_peers_are_optional(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "spikingjelly", None)  # as if it were not installed
    with pytest.raises(SystemExit) as end:
        run_script(peers.main, peers.parse_args(["--networks", NETWORK]))
    assert end.value.code == 2
    assert "pip install spikingjelly" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("spikingjelly") is None, reason="needs SpikingJelly")
def test_peer_reaches_its_ann_at_many_timesteps():
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    images = torch.rand(60, 1, 4, 4)
    with torch.no_grad():
        batches = [(images, net(images).argmax(1))]
    found = peers.measure(net, peers.recipes(batches)["99.9 %"], batches, batches, [4, 256])
    assert found[""][256] >= 95 and found[""][256] >= found[""][4]
