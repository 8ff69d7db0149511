"""analyse_error.py: errors that add up, a worst layer that is the worst, and a report that opens anywhere."""

import copy
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import MODELS, convert, errors_of, python, small_model, spikes_and_first_currents
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import quantized_ann, simulate

import analyse_error
import ann2snn
import reports.analysis
import reports.figures
import spike_simulator
from ann_parser import parse_ann_model
from build_network import get_net_by_name
from conversion import integers
from conversion.correction import bias_beyond, correct_spikes
from dag_rewrites import prepare_conversion
from datasets import get_dataset
from networks.checkpoint import load_weights
from pipeline import convert_by_options as convert_by_flags
from quantization import quantize_finetune, quantize_layer
from reports.alternatives import (
    CONTROL,
    alternatives,
    layers_worth_repairing,
    measure,
    repair_layers,
    try_alternatives,
)
from reports.errors import PARTS, ErrorSums, decoded, split_error
from reports.layers import choose_layers, spread
from reports.observe import activations_on_spikes, node_values, observe
from reports.samples import choose_images
from reports.statistics import to_hex
from runtime.cli import run_script
from runtime.files import check_folder, write_folder
from spike_dag import load_dag
from spike_neurons import IFNeuron

ROOT = Path(__file__).parents[1]
CHECKPOINT = "checkpoint/example_net_ann.pth"
COMMAND = f"analyse_error.py --load {CHECKPOINT} example_net --finetune_epochs 10 --analysis_images 48"
FIGURES = ["accuracy", "alternatives", "classes", "density", "error_parts", "firing_rate", "neurons", "operations"]
FIGURES += ["pareto", "repaired_layers", "weights"]


# ---------------------------------------------------------------------------------------------------------------------
# error parts


def brute_force_split(a, q, on_spikes, currents, sent, Vthr, corrected, initial, scale, T):
    """The parts of one neuron, in Python's own numbers. currents: of every step; sent: its spikes."""

    def count(current, u):
        return min(max((current + u) // Vthr, 0), T)

    clipped = min(max(q, 0.0), scale)
    ideal = clipped * (T * Vthr / scale), on_spikes * (T * Vthr / scale) + 0.01
    even, inherited = (count(current, initial) * scale / T for current in ideal)
    came, shifted = (count(sum(currents), u) * scale / T for u in (initial, corrected))
    stages = [a, q, clipped, even, inherited, came, shifted, sent * scale / T]
    return dict(zip(PARTS, (after - before for before, after in pairwise(stages))))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_parts_of_one_neuron_are_those_counted_by_hand(data):
    T, Vthr = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 40))
    currents = data.draw(st.lists(st.integers(-30, 30), min_size=T, max_size=T))
    corrected, share = data.draw(st.integers(-50, 50)), data.draw(st.sampled_from([0.0, 0.3, 0.5]))
    held = data.draw(st.integers(0, 5))  # added at every step, and taken off before the first
    scale = Vthr * data.draw(st.sampled_from([1 / 64, 1 / 16, 1 / 4]))
    a, q, read = (data.draw(st.integers(-64, 640)) / 64 for _ in range(3))
    neuron = IFNeuron(torch.tensor(Vthr), scale, torch.tensor(corrected), "subtraction", largest_current=30)
    u, sent = corrected, 0
    for current in currents:
        u += current + held
        if u >= Vthr:
            u, sent = u - Vthr, sent + 1
    totals = (torch.tensor([[float(x)]]) for x in (a, q, read, sum(currents) + held * T, sent))
    parts = split_error(*(x.double() for x in totals), neuron, T, share, held * T)
    expected = brute_force_split(a, q, read, currents, sent, Vthr, corrected + held * T, int(Vthr * share), scale, T)
    assert {part: pytest.approx(value.item(), abs=1e-12) for part, value in parts.items()} == expected
    assert sum(value.item() for value in parts.values()) == pytest.approx(sent * scale / T - a, abs=1e-12)


def parts_of(name, T=6, bits=4, **options):
    """Op name -> (parts, float activation, decoded spikes) of a small network whose ANN is not quantized yet."""
    return parts_of_net(*small_model(name), T, bits, maxpool="gate", signed="pair", **options)


def parts_of_net(net, images, T=6, bits=4, **options):
    """The same of a plain network on images."""
    snn = convert(net, images, T, bits, **options)
    dag = prepare_conversion(parse_ann_model(net, (images[:2],)), "gate", "pair").eval()
    seen, values = observe(snn, images), node_values(dag, images)
    on_spikes = activations_on_spikes(dag, seen, images, T)
    share = 0.5 if options.get("reset_mode") != "zero" else 0.0
    found = {}
    for op, neuron in snn.neurons().items():
        (out,) = snn.ops[op]["out_nodes"]
        known = values[out], values[out] * 1.01, on_spikes[out], seen.currents[op], seen.counts[out]
        moved = 0 if options.get("correction") == "none" else bias_beyond(snn, dag, op) * T
        parts = split_error(*known, neuron, T, share, moved)
        found[op] = parts, values[out], decoded(seen.counts[out], neuron, T)
    return found


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in MODELS),
        ("shortcuts", {"listen": 2, "correction": "bias"}),
        ("upwards", {"reset_mode": "zero"}),
    ],
)
def test_parts_add_up_to_the_error_of_every_neuron(name, options):
    for parts, activation, spikes in parts_of(name, **options).values():
        total = torch.stack(list(parts.values())).sum(0)
        assert list(parts) == list(PARTS)
        assert torch.allclose(total, spikes - activation.double(), rtol=0, atol=1e-12 * spikes.max().item() + 1e-13)
        sums = ErrorSums()
        for half in (slice(0, 3), slice(3, None)):
            sums.add({part: value[half] for part, value in parts.items()}, activation[half])
        summary = sums.summary()
        assert sum(summary["parts_of_squared_error"].values()) == pytest.approx(summary["relative_squared_error"])
        error = (spikes - activation.double()).square().mean().item()
        assert summary["rms_error"] == pytest.approx(error**0.5)
        assert summary["relative_squared_error"] == pytest.approx(error / activation.double().square().mean().item())


@pytest.mark.parametrize("name", ["shortcuts", "upwards"])
def test_nothing_arrives_unevenly_where_layers_listen_to_all(name):
    for parts, _, _ in parts_of(name, listen=6).values():
        assert not parts["arrival"].any() and parts["rounding"].any()
    uneven = [parts["arrival"].any() for parts, _, _ in parts_of(name).values()]
    assert any(uneven)


def test_float_weights_need_no_integers():
    for parts, _, spikes in parts_of("shortcuts", T=16, bits=32, correction="none").values():
        wrong = (parts["integers"].abs() > 1e-9).double().mean().item()
        assert wrong < 0.01  # at the edge of a step, by the last bit of a float
        assert parts["integers"].abs().max() <= 1.001 * spikes[spikes > 0].min().item()
    layers = torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.AvgPool2d(2), torch.nn.Conv2d(4, 4, 2), torch.nn.ReLU()
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, 3))
    pooled = parts_of_net(net, torch.rand(16, 2, 7, 7), T=16)["avg_pool1"][0]
    assert pooled["rounding"].any() and not pooled["integers"].any()  # a pooling has weights of one
    rounded = parts_of("shortcuts", bits=3, correction="none")
    assert any((parts["integers"].abs() > 1e-9).double().mean() > 0.05 for parts, _, _ in rounded.values())


def test_images_are_chosen_from_all_of_the_test_set(digits_loaders):
    dataset = digits_loaders[0].dataset
    images, targets = choose_images(dataset, 100, 0, "cpu")
    again, _ = choose_images(dataset, 100, 0, "cpu")
    assert torch.equal(images, again) and images.shape == (100, 1, 32, 32) and len(targets.unique()) == 10
    assert not torch.equal(images, choose_images(dataset, 100, 1, "cpu")[0])
    assert len(choose_images(dataset, 10_000, 0, "cpu")[0]) == 359


def test_nothing_is_clipped_or_corrected_where_nothing_can_be():
    found = parts_of("shortcuts", threshold="max", correction="none", bits=32, T=64)
    for parts, activation, _ in found.values():
        assert not parts["correction"].any()
        assert torch.allclose(parts["weights"], 0.01 * activation.double(), atol=1e-5)
        assert parts["clipping"].abs().max() <= 0.0101 * activation.max()  # of the one per cent that was added
    assert any(parts["clipping"].any() for parts, _, _ in parts_of("shortcuts", quantile=0.9).values())


@pytest.mark.parametrize("reset_mode, listen", [("subtraction", 0), ("zero", 0), ("subtraction", 3)])
@pytest.mark.parametrize("chunk", [None, 2])
def test_observations_are_those_of_the_integer_reference(monkeypatch, reset_mode, listen, chunk):
    net, images = small_model("shortcuts")
    snn = convert(net, images, 6, 4, reset_mode=reset_mode, listen=listen)
    if chunk and not listen:
        monkeypatch.setattr(spike_simulator, "cut", lambda dag, inputs, *_: (len(images), chunk))
    trains, currents = spikes_and_first_currents(snn, images, 6)
    expected, last, sums = simulate(snn, currents, 6), {}, {}

    def on_step(name, potentials, spikes):
        if spikes is not None:
            sums[name] = sums.get(name, 0) + spikes
        last[name] = potentials

    seen = observe(snn, images, on_step)
    for name, train in expected.items():
        (out,) = snn.ops[name]["out_nodes"]
        assert np.array_equal(seen.counts[out].numpy(), train.astype(np.float64).sum(0))
        assert torch.equal(sums[name].double(), seen.counts[out])  # potentials are those that made the spikes
        fired = last[name] >= snn.ops[name]["op"].neuron.Vthr
        assert np.array_equal(fired.numpy(), trains[name][-1].astype(bool))
    if listen == 6:
        assert quantized_ann(snn, trains, 6)


# ---------------------------------------------------------------------------------------------------------------------
# measured, not guessed


def digits_conversion(digits_loaders, *flags):
    """args, float and quantized network, loaders, and images with what the float ANN says of them."""
    argv = ["example_net", "--load", CHECKPOINT, "-e", "0", "--analysis_images", "24", "--timesteps", "8", *flags]
    args = analyse_error.parse_args(argv)
    net = parse_ann_model(load_weights(get_net_by_name("example_net"), ROOT / CHECKPOINT), (torch.zeros(1, 1, 32, 32),))
    net = prepare_conversion(net, avgpool=args.avgpool).eval()
    return args, net, digits_loaders


def quantized_and_expected(args, net, loaders):
    qnet = quantize_finetune(net, loaders[2], torch.nn.CrossEntropyLoss(), "cpu", args).eval()
    images, targets = choose_images(loaders[0].dataset, 24, 0, "cpu")
    with torch.no_grad():
        return qnet, images, targets, net(images)


@torch.no_grad()
def round_all_but(net, spoilt, bits):
    """Round the weights of every layer of the float network but one, so that quantizing changes that one alone."""
    for name, layer in net.weighted_layers().items():
        if name != spoilt:
            weight_q, scale = quantize_layer(layer, layer.weight, bits)
            layer.weight.copy_(weight_q / scale)


@pytest.mark.parametrize("spoilt", ["conv2", "conv3"])
def test_the_layer_that_rounding_spoils_is_found_by_repairing(digits_loaders, spoilt):
    args, net, loaders = digits_conversion(digits_loaders, "--weight_bitwidth", "3")
    round_all_but(net, spoilt, 3)
    qnet, *known = quantized_and_expected(args, net, loaders)
    before = copy.deepcopy(qnet.state_dict())
    repaired = repair_layers(args, qnet, loaders[3], "cpu", *known)
    assert set(repaired) == {"as asked for", "conv1", "conv2", "conv3", "linear1"}
    assert min(repaired, key=lambda name: repaired[name]["error"]) == spoilt
    assert layers_worth_repairing(args, net, qnet, loaders[3], "cpu", most=1) == [spoilt]
    asked_for = repaired.pop("as asked for")["error"]
    assert repaired.pop(spoilt)["error"] < 0.75 * asked_for  # what is left is the error of 8 timesteps
    assert [each["error"] for each in repaired.values()] == 3 * [
        pytest.approx(asked_for, rel=1e-6)
    ]  # nothing to repair
    assert all(torch.equal(before[key], value) for key, value in qnet.state_dict().items())


def test_a_repair_is_what_a_conversion_with_float_weights_there_gives(digits_loaders, monkeypatch):
    """Against the conversion itself, made to leave the weights of one layer as they are."""
    args, net, loaders = digits_conversion(digits_loaders, "--weight_bitwidth", "3")
    qnet, *known = quantized_and_expected(args, net, loaders)
    repaired = repair_layers(args, qnet, loaders[3], "cpu", *known)
    original = integers.SpikeSetter.set_weight
    for name in ("conv2", "conv3"):

        def leave_float(setter, layer, entry, name=name):
            original(setter, layer, entry)
            if entry.name == name:
                scale, unit = setter.scales[entry.inputs[0]], setter.units[entry.out]
                weight = net.ops[name]["op"].weight.detach()
                layer.set_integers(weight * (scale / unit), None, layer.unit)
                layer.weight.data.copy_(weight)

        monkeypatch.setattr(integers.SpikeSetter, "set_weight", leave_float)
        ann = copy.deepcopy(qnet)
        snn = convert_by_flags(ann, loaders[3], "cpu", args, calibration_samples=24, correction="none")
        ann.ops[name]["op"].weight.data.copy_(net.ops[name]["op"].weight)
        correct_spikes(snn, ann, loaders[3], "cpu", 24, hold_back=args.hold_back)
        assert measure(snn, *known)["error"] == pytest.approx(repaired[name]["error"], rel=1e-3)
        assert measure(snn, *known)["error"] < repaired["as asked for"]["error"]


def test_alternatives_are_what_their_flags_give(digits_loaders):
    timesteps = ("--timesteps", "16")  # from 16 steps on, preset exact learns nothing
    args, net, loaders = digits_conversion(digits_loaders, *timesteps)
    qnet, *known = quantized_and_expected(args, net, loaders)
    tried = try_alternatives(args, net, qnet, loaders[3], "cpu", *known)
    assert next(iter(tried)) == CONTROL and len(tried) == 9
    assert tried["--listen 16"]["duration"] == {"firing": 16, "interval": 32, "latency": 96}
    for flags in (
        "as asked for",
        "--weight_bitwidth 8",
        "--per_channel weights",
        "--per_channel spikes",
        "--listen 16",
        "--preset exact",
    ):
        asked_for = [] if flags == "as asked for" else flags.split()
        again, anew, _ = digits_conversion(digits_loaders, *timesteps, *asked_for)
        again.calibration_samples = 24
        snn = convert_by_flags(quantized_and_expected(again, anew, loaders)[0], loaders[3], "cpu", again)
        assert measure(snn, *known)["error"] == pytest.approx(tried[flags]["error"], rel=1e-6), flags


@pytest.mark.parametrize(
    "flags, missing",
    [
        ("--weight_bitwidth 32", ["--weight_bitwidth 32", "--weight_bitwidth 8", "--per_channel weights"]),
        ("--threshold mse --listen 8", ["--threshold mse", "--listen 8"]),
        ("--weight_bitwidth 8 --weight_granularity channel", ["--weight_bitwidth 8", "--per_channel weights"]),
        ("--activation_levels 4", ["--threshold mse", "--per_channel spikes"]),  # lambda is learnt
    ],
)
def test_what_was_asked_for_is_no_alternative(digits_loaders, flags, missing):
    args, net, _ = digits_conversion(digits_loaders, *flags.split())
    assert not set(missing) & set(alternatives(args, net, net))
    assert "--correction potential" not in alternatives(args, net, net)
    args.correction = "none"
    assert "--correction potential" in alternatives(args, net, net)


def test_measures_by_hand():
    images, targets = torch.zeros(4, 1), torch.tensor([0, 1, 1, 0])
    expected = torch.tensor([[3.0, 1.0], [1.0, 3.0], [1.0, 3.0], [3.0, 1.0]])
    outputs = torch.tensor([[3.0, 1.0], [1.0, 3.0], [3.0, 1.0], [3.0, 3.0]])
    result = measure(lambda part: outputs[: len(part)], images, targets, expected)
    assert result["error"] == pytest.approx(100 * ((4 + 4 + 4) / 8) ** 0.5)  # the scores vary by 1
    assert (result["top1"], result["same_class"]) == (75, 75)
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(outputs, targets).item())


def test_neurons_to_watch_are_spread_over_the_active_ones():
    counts = torch.tensor([0.0, 5, 0, 1, 3, 2, 4, 0])
    assert counts[spread(counts, 3)].tolist() == [1, 3, 5]
    assert counts[spread(counts, 99)].tolist() == [1, 2, 3, 4, 5]
    assert len(spread(torch.zeros(4), 3)) == 3
    net, images = small_model("shortcuts")
    snn = convert(net, images)
    names = list(snn.neurons())
    assert choose_layers(snn, "conv1") == [names[0], names[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command of the specification, on fewer images, into a folder that holds a file of the user's."""
    folder = tmp_path_factory.mktemp("analysis")
    (folder / "notes.txt").write_text("mine")
    (folder / "report.json").write_text("old")
    finished = python(*COMMAND.split(), "--out", folder)
    finished.folder = folder
    finished.result = json.loads((folder / "report.json").read_text()) if not finished.returncode else None
    return finished


@pytest.mark.slow
def test_the_command_writes_figures_and_report(run):
    assert (run.returncode, errors_of(run.stderr)) == (0, [])
    files = {f"{name}.png" for name in FIGURES} | {"report.html", "report.json"}
    assert set(os.listdir(run.folder)) == files | {"notes.txt"}
    assert (run.folder / "notes.txt").read_text() == "mine"
    for name in FIGURES:
        assert (run.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert all((run.folder / name).stat().st_size < 300_000 for name in files)
    assert os.listdir(run.folder.parent) == [run.folder.name] or not [
        name for name in os.listdir(run.folder.parent) if name.endswith(".tmp")
    ]


@pytest.mark.slow
def test_the_table_says_what_the_report_holds(run):
    result, lines = run.result, run.stdout.splitlines()
    for key, label in (("ann", "ANN"), ("qnet", "quantized ANN"), ("snn", "SNN, T=16")):
        row = next(line for line in lines if line.startswith(label + "  "))
        accuracy = result["accuracy"][key]
        assert row.removeprefix(label).split() == [f"{accuracy['top1']:.2f}", f"{accuracy['loss']:.4f}"]
    for name, layer in result["layers"].items():
        assert any(line.startswith(name) and f"{layer['firing_rate']:.4f}" in line for line in lines)
    assert len(result["verdict"]) == 3 and all(sentence in lines for sentence in result["verdict"])
    assert len(lines) < 20


@pytest.mark.slow
def test_the_report_is_of_the_conversion_that_the_flags_ask_for(run, tmp_path):
    """ann2snn.py with the same flags measures the same."""
    results = tmp_path / "results.json"
    argv = f"example_net --ann_weight {CHECKPOINT} --finetune_epochs 10 --save_file {tmp_path}/snn.pth"
    ann2snn.main(ann2snn.parse_args([*argv.split(), "--results", str(results)]))
    expected, accuracy = json.loads(results.read_text()), run.result["accuracy"]
    assert [accuracy[key]["top1"] for key in ("ann", "qnet", "snn")] == [
        expected[f"{key}_top1"] for key in ("ann", "qnet", "snn")
    ]
    assert accuracy["by_timestep"] == expected["snn_top1_by_timestep"]
    assert {name: layer["firing_rate"] for name, layer in run.result["layers"].items()} == expected["firing_rate"]


@pytest.mark.slow
def test_the_report_agrees_with_itself(run):
    result = run.result
    assert (result["samples"], result["analysis_images"], result["seed"]) == (359, 48, 0)
    assert result["versions"]["torch"] == torch.__version__
    for layer in result["layers"].values():
        assert sum(layer["parts_of_squared_error"].values()) == pytest.approx(layer["relative_squared_error"])
        assert layer["bits_observed"] is None or layer["bits_observed"] <= layer["bits_bound"]
    assert result["layers"]["relu1"]["bits_bound"] is None and result["layers"]["relu3"]["bits_bound"] >= 8
    repaired = {name: each["error"] for name, each in result["repaired"].items() if name != CONTROL}
    assert result["shown_layer"] == min(repaired, key=repaired.get)
    assert result["repaired"]["as asked for"]["error"] == pytest.approx(
        result["alternatives"]["as asked for"]["error"], rel=0.05
    )
    assert result["worst_layer"] is None and result["claims"]["recommended"] is None  # all images are right already
    assert "all of them are answered right" in result["verdict"][1]
    assert result["validation"] == {"images": 48, "words": result["validation"]["words"]}
    assert result["next"]["command"].startswith(f"python3 ann2snn.py example_net --ann_weight {CHECKPOINT}")
    assert result["operations"]["conv2"]["synops"] > 0 and result["operations"]["conv1"]["synops"] == 0
    assert result["operations"]["linear1"]["snn_mac"] == 5120
    assert [row[0] for row in result["hardware"]["rows"][1:]] == [
        "conv1",
        "avg_pool1",
        "conv2",
        "avg_pool2",
        "conv3",
        "linear1",
    ]


def test_ann2snn_writes_the_same_report(tmp_path, monkeypatch):
    without_drawing(monkeypatch)
    monkeypatch.setattr(reports.analysis, "SWEPT_BITS", (2, 8))
    flags = ["debug_net1", "--dataset", "debug0", "-e", "0", "--analysis_images", "8", "--sweep"]
    output = f"--save_file {tmp_path}/snn.pth --report {tmp_path}/new/report".split()
    ann2snn.main(ann2snn.parse_args([*flags, *output]))
    result = json.loads((tmp_path / "new/report/report.json").read_text())
    analyse_error.main(analyse_error.parse_args([*flags, "--out", f"{tmp_path}/other"]))
    assert without_seconds(json.loads((tmp_path / "other/report.json").read_text())) == without_seconds(result)
    assert (result["net"], result["accuracy"]["ann"]["top1"]) == ("debug_net1", 100)
    assert {f"{name}.png" for name in [*FIGURES, "sweep"]} <= set(os.listdir(tmp_path / "new/report"))
    assert list(result["sweep"]) == ["2", "4", "8"]
    assert all(list(row) == ["1", "2", "4", "8", "16", "32"][-len(row) :] for row in result["sweep"].values())
    assert (tmp_path / "snn.pth").exists() and sorted(os.listdir(tmp_path / "new")) == ["report"]
    seconds = json.loads((tmp_path / "other/report.json").read_text())["seconds"]
    assert set(seconds["report_cpu"]) == {"layers", "repaired layers", "alternatives", "sweep", "neurons", "figures"}
    assert seconds["estimate"] > 0 and seconds["conversion"]["trans_ann2snn_weight"] > 0


@pytest.mark.parametrize(
    "bits, timesteps, expected",
    [
        (5, 16, ([2, 3, 4, 5, 6, 8], [2, 4, 8, 16, 32])),
        (32, 12, ([2, 3, 4, 6, 8], [2, 4, 8, 12, 16])),
        ((8, 4), 256, ([2, 3, 4, 6, 8], [16, 32, 64, 128, 256, 512])),
    ],
)
def test_bits_and_timesteps_of_a_sweep(bits, timesteps, expected):
    assert reports.analysis.swept_values(SimpleNamespace(weight_bitwidth=bits, timesteps=timesteps)) == expected


def without_drawing(monkeypatch):
    """Figures are described, not drawn: drawing takes longer than the rest."""
    monkeypatch.setattr(reports.figures, "render_png", lambda chart: chart.title.encode())
    monkeypatch.setattr(reports.figures, "render_svgs", lambda name, chart: [f"<svg>{name}</svg>"])


def without_seconds(result):
    """A report.json without what differs between two runs."""
    for each in result["alternatives"].values():
        del each["cpu_seconds"]
    return {key: value for key, value in result.items() if key != "seconds"}


def test_a_network_that_listens_to_windows_has_a_report(tmp_path, monkeypatch):
    without_drawing(monkeypatch)
    monkeypatch.setattr(reports.analysis, "SWEPT_BITS", (2,))
    argv = f"debug_net1 --dataset debug0 -e 0 --listen auto --timesteps 4 --save_file {tmp_path}/snn.pth"
    ann2snn.main(ann2snn.parse_args(f"{argv} --report {tmp_path}/report --analysis_images 8 --sweep".split()))
    result = json.loads((tmp_path / "report/report.json").read_text())
    assert "--listen 4" in json.dumps(result["alternatives"]) and list(result["sweep"]) == ["2", "4"]


def test_without_synaptic_operations_no_chart_compares_them(tmp_path, monkeypatch):
    """A single spiking layer reads the image, and the layer behind it stays ANN."""
    without_drawing(monkeypatch)
    layers = "nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)"
    (tmp_path / "one.py").write_text(f"from torch import nn\n\n\ndef net():\n    return nn.Sequential({layers})\n")
    argv = f"{tmp_path}/one.py:net -e 0 --timesteps 2 --save_file {tmp_path}/snn.pth --report {tmp_path}/report"
    ann2snn.main(ann2snn.parse_args([*argv.split(), "--analysis_images", "8"]))
    result = json.loads((tmp_path / "report/report.json").read_text())
    assert {each["test"]["synops"] for each in result["alternatives"].values()} == {0}
    written = set(os.listdir(tmp_path / "report"))
    assert "accuracy.png" in written and "pareto.png" not in written
    assert "Accuracy against the work" not in (tmp_path / "report/report.html").read_text()


@pytest.mark.slow
def test_presets_that_train_are_those_of_their_own_runs(tmp_path, monkeypatch):
    without_drawing(monkeypatch)
    flags = ["debug_net1", "--dataset", "debug0", "--timesteps", "4", "--analysis_images", "8", "--save_file"]
    asked_for = ["-e", "0", "--try_presets", "--report", f"{tmp_path}/report"]
    ann2snn.main(ann2snn.parse_args([*flags, f"{tmp_path}/snn.pth", *asked_for]))
    result = json.loads((tmp_path / "report/report.json").read_text())
    tried = result["alternatives"]
    assert {"--preset calibrated", "--preset finetuned", "--preset exact"} <= set(tried)
    assert all(each["cpu_seconds"] > 0 for each in tried.values())
    assert {tried[f"--preset {name}"]["note"].split(",")[0] for name in ("calibrated", "finetuned")} == {"trained"}
    ann2snn.main(ann2snn.parse_args([*flags, f"{tmp_path}/again.pth", "--preset", "calibrated"]))
    snn = load_dag(tmp_path / "again.pth")
    dataset = get_dataset(SimpleNamespace(dataset="debug0", batch_size=128, test_batch_size=100))[0].dataset
    images, targets = choose_images(dataset, 8, 0, "cpu")
    with torch.no_grad():
        right = snn(images).argmax(1) == targets
    assert to_hex(right) == tried["--preset calibrated"]["test"]["right"]


# ---------------------------------------------------------------------------------------------------------------------
# what a user can get wrong


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        run_script(analyse_error.main, analyse_error.parse_args(list(argv)))
    (line,) = errors_of(capsys.readouterr().err)
    assert end.value.code == 2 and line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "flags, words",
    [
        ("nonet", ["unknown network 'nonet'"]),
        ("example_net --load {dir}/missing.pth", ["{dir}/missing.pth"]),
        ("example_net --ann_weight {dir}/file", ["{dir}/file", "not a file of weights"]),
        ("example_net --out {dir}/file", ["cannot write into {dir}/file", "is a file"]),
        ("example_net --out {dir}/file/below", ["{dir}/file is a file"]),
        ("example_net --out /proc/none", ["/proc/none"]),
        ("example_net --analysis_images 1", ["--analysis_images", "2 or more"]),
        ("example_net --timesteps 4 --listen 5", ["--listen 5", "--timesteps 4"]),
        ("example_net --no_such_flag", ["--no_such_flag"]),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, capsys, monkeypatch, flags, words):
    (tmp_path / "file").write_text("no weights")
    monkeypatch.setattr(
        "datasets.get_dataset", SimpleNamespace
    )  # all of it is found before the work, or by the weights
    if "ann_weight" in flags or "load" in flags:
        monkeypatch.undo()
    argv = flags.format(dir=tmp_path).split()
    line = refused(capsys, *argv, *([] if "--out" in argv else ["--out", str(tmp_path / "new")]))
    assert [word for word in words if word.format(dir=tmp_path) not in line] == []
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "no weights"


def test_ann2snn_refuses_a_report_folder_that_is_a_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    argv = f"debug_net0 --dataset debug0 -e 0 --save_file {tmp_path}/snn.pth --report {file}".split()
    with pytest.raises(SystemExit):
        run_script(ann2snn.main, ann2snn.parse_args(argv))
    assert "is a file" in capsys.readouterr().err and os.listdir(tmp_path) == ["file"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "a" / "b"
    write_folder(str(folder), {"one": b"1", "two": b"2"})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"one": b"1", "two": b"2"}
    with pytest.raises(TypeError):
        write_folder(str(folder), {"one": b"new", "two": "no bytes"})
    (folder / "three").mkdir()
    with pytest.raises(OSError, match="three"):
        write_folder(str(folder), {"one": b"new", "three": b"3"})
    assert (folder / "one").read_bytes() == b"1" and os.listdir(tmp_path / "a") == ["b"]
    for wrong in ("", str(folder / "one")):
        with pytest.raises(OSError, match="name a folder"):
            check_folder(wrong)


@pytest.mark.parametrize(
    "name, safe",
    [("torchvision:resnet18", "torchvision_resnet18"), ("example_net", "example_net"), ("a/../b", "a_.._b")],
)
def test_the_default_folder_is_a_safe_name(name, safe):
    assert analyse_error.safe_name(name) == safe


def test_help_and_wrong_flags_answer_without_loading_torch():
    script = "import analyse_error, sys; analyse_error.parse_args(['net']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
