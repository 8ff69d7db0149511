"""The benchmarks: accuracies are those of ann2snn.py, every mode has a row, and a wrong line ends in one error."""

import importlib.util
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import Dense, convert, with_random_norms

import ann2snn
from benchmarks import accuracy, keras_form, peers, quantizers, simulate, tables
from benchmarks.network_forms import split_network, title_of
from benchmarks.pages import line_cells, table_of_quantizers, write_tables
from benchmarks.results import Kept, Results, contents, key_of
from build_network import get_net_by_name
from runtime.cli import run_script
from spike_dag import SpikeDAGModule, load_dag
from validate import evaluate

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
    assert accuracy.summary(runs)[3] == "-"  # rows of earlier versions
    agreeing = [{**run, "agreement": share} for run, share in zip(runs, (95.0, 96.0, 97.3))]
    assert accuracy.summary(agreeing)[3] == "96.10"


def test_agreement_is_the_share_of_images_with_the_class_of_the_float_network():
    torch.manual_seed(0)
    images, net = torch.rand(40, 2, 7, 7), with_random_norms(Dense())
    networks = SimpleNamespace(ann=net, qnet=net, accuracies={})
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(20)]
    measure = partial(evaluate, loader=batches, device="cpu", criterion=torch.nn.CrossEntropyLoss())
    for timesteps in (1, 8):
        snn = convert(net, images, timesteps)
        same = (snn(images).argmax(1) == net(images).argmax(1)).double().mean().item()
        assert 0.2 < same < 1
        assert accuracy.accuracies(networks, snn, timesteps, measure)["agreement"] == pytest.approx(100 * same)


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


def test_conversions_are_timed_in_passes_of_the_ann(capsys):
    argv = "--conversion --networks example_net --images 20 --timesteps 4 --rounds 1 --device cpu"
    simulate.main(simulate.parse_args(argv.split()))
    head, row = capsys.readouterr().out.splitlines()
    assert "with correction on spikes, T=4  --listen T, T=4" in head
    name, *figures = row.split()
    assert name == "example_net" and len(figures) == 4
    assert all(float(passes) > 0 for passes in figures[1:])


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


@pytest.mark.parametrize("script, package", [(peers, "spikingjelly"), (quantizers, "quantizeml")])
def test_peers_are_optional(script, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(SystemExit) as end:
        run_script(script.main, script.parse_args(["--networks", NETWORK]))
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and error.startswith("error: ") and f"pip install {package}" in error


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


# ---------------------------------------------------------------------------------------------------------------------
# Rows that were measured are kept

DEBUG = ["--networks", "debug_net0", "--dataset", "debug0", "--timesteps", "2", "--bits", "2"]


@pytest.fixture
def measured(monkeypatch):
    """The flags of every conversion that `accuracy.measure` really makes."""
    calls, measure = [], accuracy.measure

    def noted(args, flags, *others):
        calls.append(flags)
        return measure(args, flags, *others)

    monkeypatch.setattr(accuracy, "measure", noted)
    return calls


def accuracy_of(*argv):
    """Run benchmarks/accuracy.py on a debug network."""
    accuracy.main(accuracy.parse_args([*DEBUG, *argv]))


def test_what_the_results_have_is_not_measured_again(tmp_path, measured, capsys):
    argv = ["--results", f"{tmp_path / 'r.json'}", "--methods"]
    accuracy_of(*argv, "a: -e 0")
    first = capsys.readouterr().out, (tmp_path / "r.json").read_text()
    accuracy_of(*argv, "a: -e 0")
    assert len(measured) == 1
    assert (capsys.readouterr().out, (tmp_path / "r.json").read_text()) == first
    accuracy_of(*argv, "b: -e 0 --preset specification --reset_mode subtraction")  # the same conversion in other words
    assert len(measured) == 1
    accuracy_of("--again", *argv, "a: -e 0")
    assert len(measured) == 2


@pytest.mark.parametrize(
    "changed",
    [
        ["--methods", "a: -e 0 --threshold mse"],
        ["--timesteps", "3"],
        ["--seeds", "1"],
        ["--test_images", "8"],
        ["--bits", "3"],
        ["--networks", "debug_net1"],
        ["--networks", "debug_net0 --calibration_samples 20"],
    ],
    ids=" ".join,
)
def test_a_changed_row_is_measured_and_the_others_stay(tmp_path, measured, changed):
    argv = ["--results", f"{tmp_path / 'r.json'}", "--methods", "a: -e 0"]
    accuracy_of(*argv)
    accuracy_of(*argv, *changed)
    assert len(measured) == 2
    assert len(json.loads((tmp_path / "r.json").read_text())["runs"]) == 2


def test_other_weights_under_the_same_name_take_the_place_of_the_row(tmp_path, measured):
    file, results = tmp_path / "w.pth", tmp_path / "r.json"
    net = get_net_by_name("debug_net0", 1, 2)
    argv = ["--networks", f"debug_net0:{file}", "--results", f"{results}", "--methods", "a: -e 0"]
    keys = []
    for factor in (1, 2):
        torch.save({name: factor * weight for name, weight in net.state_dict().items()}, file)
        contents.cache_clear()  # of one process, as files do not change within a run
        accuracy_of(*argv)
        (run,) = json.loads(results.read_text())["runs"]
        keys.append(run["key"])
    assert len(measured) == 2 and keys[0] != keys[1]


def test_a_run_that_was_cut_off_goes_on_at_its_row(tmp_path, monkeypatch):
    made, measure = [], accuracy.measure

    def cut_off(args, flags, *others):
        if len(made) == 2 and not resumed:
            raise KeyboardInterrupt
        made.append(flags.timesteps)
        return measure(args, flags, *others)

    monkeypatch.setattr(accuracy, "measure", cut_off)
    argv = ["--timesteps", "1", "2", "3", "--methods", "a: -e 0", "--results", f"{tmp_path / 'r.json'}"]
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        accuracy_of(*argv)
    resumed = True
    accuracy_of(*argv)
    assert made == [1, 2, 3]


def test_a_kept_network_gives_the_numbers_of_its_own_run(tmp_path, monkeypatch):
    """Random numbers go on as behind the finetuning, so that epochs on spikes draw the same."""
    flags = "a: -e 1 --activation_levels 2 --per_channel both --spike_epochs 1"
    keep, kept, found = tmp_path / "keep", [], []
    load = Kept.load
    monkeypatch.setattr(Kept, "load", lambda *given: kept.append(load(*given)) or kept[-1])
    for name in ("first", "second"):
        file = tmp_path / f"{name}.json"
        accuracy_of("--keep", f"{keep}", "--results", f"{file}", "--methods", flags)
        (run,) = json.loads(file.read_text())["runs"]
        found.append({key: value for key, value in run.items() if key != "conversion_seconds"})
    assert kept[0] is None and kept[1] is not None
    assert found[0] == found[1]
    (network,) = [file for file in keep.iterdir() if ".state" not in file.name]
    assert isinstance(load_dag(network), SpikeDAGModule)
    network.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"damaged, remove them"):
        accuracy_of("--keep", f"{keep}", "--methods", flags)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "it is damaged: "),
        ("\x00\xff", "it is damaged: "),
        ("[]", "it is not of the format ann2snn-accuracy-1"),
        ('{"runs": []}', "it is not of the format ann2snn-accuracy-1"),
        ('{"format": "ann2snn-accuracy-1", "runs": [{"key": "a"}]}', "a row in it lacks a part"),
        ('{"format": "ann2snn-accuracy-1"}', "a row in it lacks a part"),
    ],
)
def test_a_damaged_results_file_is_one_line_and_stays(tmp_path, text, reason, capsys):
    file = tmp_path / "r.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit) as end:
        run_script(accuracy.main, accuracy.parse_args([*DEBUG, "--results", f"{file}"]))
    error = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(error) == 1 and file.read_text(encoding="latin-1") == text
    assert f"{file} holds no results ({reason}" in error[0] and "name another file" in error[0]


# ---------------------------------------------------------------------------------------------------------------------
# Networks of every form


@pytest.mark.parametrize(
    "text, wanted, title",
    [
        ("resnet20:a/b.pth", ("resnet20", "a/b.pth", []), "resnet20"),
        ("resnet20:weights without an end", ("resnet20", "weights without an end", []), "resnet20"),
        ("torchvision:resnet18:a.pth", ("torchvision:resnet18", "a.pth", []), "resnet18"),
        ("timm:resnet18 --ann_weight a.pth", ("timm:resnet18", None, ["--ann_weight", "a.pth"]), "resnet18"),
        ("a/net.py:Net", ("a/net.py:Net", None, []), "Net"),
        ("a/net.py:Net:w.th --mean '0, 1'", ("a/net.py:Net", "w.th", ["--mean", "0, 1"]), "Net"),
        ("package.net:Net.make --net_args a=1", ("package.net:Net.make", None, ["--net_args", "a=1"]), "Net.make"),
        ("package.net:Net:w.pth", ("package.net:Net", "w.pth", []), "Net"),
        ("a/model.onnx", ("a/model.onnx", None, []), "model.onnx"),
        ("debug_net0 --dataset debug0", ("debug_net0", None, ["--dataset", "debug0"]), "debug_net0"),
    ],
)
def test_networks_are_split_from_their_weights_and_flags(text, wanted, title):
    assert split_network(text) == wanted and title_of(text) == title


def test_a_network_has_its_own_flags_and_those_of_the_method_count_last():
    flags = accuracy.conversion_args(
        "debug_net0 --dataset debug1 --calibration_samples 20 --hold_back 0", 2, "--hold_back 0.5", 4, 0, "digits"
    )
    assert (flags.net_name, flags.dataset, flags.ann_weight) == ("debug_net0", "debug1", None)
    assert (flags.calibration_samples, flags.hold_back) == (20, 0.5)


def test_code_of_the_user_is_measured_with_its_arguments_and_its_data(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\n\n\ndef net(num_classes, width):\n    torch.manual_seed(0)\n"
        "    layers = torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, num_classes)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), *layers)\n\n\n"
        "def data():\n    images = torch.rand(40, 1, 4, 4)\n    labels = torch.arange(40) % 2\n"
        "    return [torch.utils.data.TensorDataset(images, labels)] * 2\n"
    )
    results, file = tmp_path / "r.json", tmp_path / "net.py"
    network = f"{file}:net --net_args width=6 --dataset {file}:data"
    argv = ["--networks", network, "--timesteps", "2", "--methods", "a: -e 0", "--results", f"{results}"]
    accuracy.main(accuracy.parse_args(argv))
    (run,) = json.loads(results.read_text())["runs"]
    assert run["samples"] == 40 and capsys.readouterr().out.splitlines()[1].startswith("net ")


# ---------------------------------------------------------------------------------------------------------------------
# Tables of the plan, in a page

SMALL = tables.Network("debug", "debug_net0", "{cifar10}")
PLAN = {
    "one": tables.Table("one", (tables.Line(SMALL, 2, "--hold_back 0", (1, 2), seeds=(0, 1)),), common="-e 0"),
    "two": tables.Table("two", (tables.Line(SMALL, 3, "-e 0", (2,)),)),
}
PAGE = "# Page\n\n<!-- table one -->\n\nold one\n\n<!-- end -->\n\ntext\n\n<!-- table two -->\nold two\n<!-- end -->\n"


def test_tables_replace_what_is_between_their_markers_and_nothing_else(tmp_path, monkeypatch, measured, capsys):
    monkeypatch.setattr(tables, "TABLES", PLAN)
    page, results = tmp_path / "page.md", tmp_path / "r.json"
    page.write_text(PAGE)
    written = ["--results", f"{results}", "--write", f"{page}"]
    accuracy.main(accuracy.parse_args(["--tables", "one", "--cifar10", "debug0", *written]))
    assert len(measured) == 4
    new = page.read_text()
    before, after = PAGE.split("\nold one\n")
    assert new.startswith(before + "\n|") and new.endswith(after)
    runs = json.loads(results.read_text())["runs"]
    assert {run["dataset"] for run in runs} == {"{cifar10}"}  # no paths of this machine
    points = [runs[i]["snn_top1"] - runs[i]["ann_top1"] for i in range(4)]
    cell = f"{(points[0] + points[1]) / 2:+.2f} ± {abs(points[0] - points[1]) / math.sqrt(2):.2f}"
    assert f"| debug, 2 | `--hold_back 0` | {runs[0]['ann_top1']:.2f} % |" in new and cell in new
    assert "All rows also have `-e 0`." in new and f"on {runs[0]['samples']} test images" in new
    assert "--tables one --cifar10 /path/to/cifar10 --results" in new
    capsys.readouterr()
    accuracy.main(accuracy.parse_args(written))  # without --tables nothing is measured
    assert len(measured) == 4 and page.read_text() == new
    assert capsys.readouterr().err == "table two is not written: rows are missing in the results\n"


@pytest.mark.parametrize(
    "page, message",
    [
        ("<!-- table one -->\n", "<!-- table one --> has no <!-- end -->"),
        ("<!-- end -->\n", "line 1: <!-- end --> is out of place"),
        ("<!-- table one -->\n<!-- table two -->\n<!-- end -->\n", "line 2: <!-- table two --> is out of place"),
        (PAGE + PAGE, "<!-- table one --> is out of place"),
    ],
)
def test_markers_that_do_not_belong_together_are_refused(tmp_path, page, message):
    file = tmp_path / "page.md"
    file.write_text(page)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_tables(f"{file}", {"one": "new"})
    assert file.read_text() == page


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tables", "digts"], "no table digts, there are"),
        (["--tables", "digts"], "did you mean digits?"),
        (["--tables", "without_labels"], "the table without_labels needs --cifar10"),
        (["--write", "page.md"], "--write needs the rows of --results"),
        (["--networks", "debug_net0 --mean '0"], "look at its quotes"),
        (["--networks", "example_net:none.pth"], "no checkpoint none.pth, name the file"),
    ],
)
def test_a_wrong_plan_ends_in_one_error(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(accuracy.main, accuracy.parse_args(argv))
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and message in error


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "say what to measure, --networks or --tables"),
        (["--tables", "digits", "--networks", NETWORK], "say what to measure, --networks or --tables"),
        (["--tables", "digits", "--bits", "4"], "--bits is for --networks"),
    ],
)
def test_a_command_line_names_networks_or_tables(argv, message, capsys):
    with pytest.raises(SystemExit):
        accuracy.parse_args(argv)
    assert message in capsys.readouterr().err


def test_every_table_has_its_place_and_flags_that_parse():
    page = (ROOT / "docs/accuracy.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^<!-- table (\S+) -->$", page, flags=re.MULTILINE)) == {
        *tables.TABLES,
        tables.PEERS.name,
        tables.QUANTIZERS.name,
    }
    places = dict.fromkeys(tables.PLACES, "net.py:net")
    for table in tables.TABLES.values():
        for row in table.rows():
            flags = accuracy.conversion_args(
                tables.filled_in(row.network, places), row.bits, row.flags, row.T, row.seed, "digits"
            )
            learns_levels = flags.finetune_epochs or flags.rounding == "learnt"
            assert flags.timesteps == row.T and (learns_levels or not flags.activation_levels)


def test_bits_of_every_layer_are_listed():
    run = {"ann_top1": 90.0, "qnet_top1": 89.0, "snn_top1": 88.0, "spikes": 2000.0, "synops": 5e6}
    cells = line_cells(tables.Line(SMALL, (8, 4), "-e 0", (2,)), {2: [run]}, [2])
    assert cells[:5] == ("debug, 8, 4", "`-e 0`", "90.00 %", "-1.00", "-2.00")


def test_peers_keep_what_they_measured(tmp_path, monkeypatch):
    """With recipes and a measurement of the test's own: SpikingJelly is not needed."""
    made = []

    def measure(net, recipe, calibration, batches, timesteps):
        made.append(recipe)
        return {reading: {T: 50.0 + T for T in timesteps} for reading in peers.READINGS}

    monkeypatch.setattr(peers, "check_installed", lambda: None)
    monkeypatch.setattr(peers, "recipes", lambda calibration: {"own": "recipe", "other": "second"})
    monkeypatch.setattr(peers, "measure", measure)
    plan = tables.PeersTable("peers", (SMALL,), timesteps=(2, 4), test_images=8)
    monkeypatch.setattr(peers, "PEERS", plan)
    page, results = tmp_path / "page.md", tmp_path / "p.json"
    page.write_text("<!-- table peers -->\n<!-- end -->\n")
    for _ in range(2):
        argv = ["--cifar10", "debug0", "--results", f"{results}", "--write", f"{page}"]
        peers.main(peers.parse_args(argv))
    runs = json.loads(results.read_text())["runs"]
    assert made == ["recipe", "second"]
    assert [run["mode"] for run in runs] == ["own", "own, delayed", "other", "other, delayed"]
    assert runs[0]["snn_top1"] == {"2": 52.0, "4": 54.0} and runs[0]["samples"] == 8
    assert (
        f"| debug | own, delayed | {runs[0]['ann_top1']:.2f} % | {52 - runs[0]['ann_top1']:+.2f} |" in page.read_text()
    )


class PaddedShortcut(torch.nn.Module):
    """Every second pixel, and zeros before and behind the channels (option A of He et al., CVPR 2016)."""

    def forward(self, x):
        return torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))


class WithFunctions(torch.nn.Module):
    """A block with functions for its ReLUs, its pooling and its shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 6, 3, 2, 1)
        self.shortcut, self.fc = PaddedShortcut(), torch.nn.Linear(6, 2)

    def forward(self, x):  # [B, 3, 8, 8]
        x = torch.nn.functional.relu(self.conv1(x))
        x = (self.conv2(x) + self.shortcut(x)).relu()  # [B, 6, 4, 4]
        x = torch.nn.functional.avg_pool2d(x, x.size()[3])
        return self.fc(x.view(x.size(0), -1))


def test_a_network_of_functions_becomes_one_of_modules():
    torch.manual_seed(0)
    net, images = WithFunctions().eval(), torch.randn(5, 3, 8, 8)
    graph = peers.as_modules(net, images[:1])
    kinds = [type(graph.get_submodule(node.target)).__name__ for node in graph.graph.nodes if node.op == "call_module"]
    assert kinds == ["Conv2d", "ReLU", "Conv2d", "Conv2d", "ReLU", "AvgPool2d", "Linear"]
    with torch.no_grad():
        assert torch.equal(graph(images), net(images))
    assert isinstance(net.shortcut, PaddedShortcut)  # the network itself stays


# ---------------------------------------------------------------------------------------------------------------------
# quantizeml


def test_quantizers_need_nothing_for_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "quantizeml", None)
    plan = tables.QuantizersTable("quantizeml", (SMALL,), bits=("8/8", "4/4"))
    monkeypatch.setattr(quantizers, "QUANTIZERS", plan)
    page, file = tmp_path / "page.md", tmp_path / "q.json"
    page.write_text("<!-- table quantizeml -->\n<!-- end -->\n")
    args = quantizers.parse_args(["--cifar10", "debug0", "--results", f"{file}", "--write", f"{page}"])
    (network,) = plan.quantizers()
    flags, results = quantizers.flags_of(args, network), Results(f"{file}", quantizers.FORMAT, network.FACTS, ())
    shared = {"ann_top1": 90.0, "samples": 40, "versions": "quantizeml 0", "machine": "own", "date": "2026-11-28"}
    for bits, top1 in (("8/8", 89.0), ("4/4", 85.5)):
        for mode in quantizers.modes(8):
            key = key_of(flags, accuracy.default_flags(), mode=mode, bits=bits, test_images=None)
            results.add({"key": key, "quantized_top1": top1, **shared, **network.facts(mode, bits)})
    quantizers.main(args)
    assert capsys.readouterr().out.splitlines()[1].split() == ["debug", "defaults", "8/8", "90.00", "89.00", "-1.00"]
    lines = page.read_text().splitlines()
    assert lines[2] == "| network | mode | ANN | 8/8 | 4/4 |"
    assert lines[4:8] == [f"| debug | {mode} | 90.00 % | -1.00 | -4.50 |" for mode in quantizers.modes(8)]
    assert "quantizeml 0. Points of top-1 against the ANN, on 40 test images. own, 28 November 2026:" in lines
    del results.rows[-1]
    assert table_of_quantizers(plan, results) is None


def test_keras_gets_the_layers_of_a_chain_and_no_others():
    net, images = get_net_by_name("example_net", 3, 10), torch.rand(1, 3, 32, 32)
    layers = [type(module).__name__ for module in keras_form.chain(peers.as_modules(net.eval(), images))]
    assert layers == [*["Conv2d", "ReLU", "AvgPool2d"] * 2, "Conv2d", "ReLU", "Flatten", "Linear"]
    graph = peers.as_modules(get_net_by_name("resnet20", 3, 10).eval(), images)
    with pytest.raises(ValueError, match="'add' is no layer that this benchmark builds in Keras"):
        list(keras_form.chain(graph))


@pytest.mark.skipif(importlib.util.find_spec("quantizeml") is None, reason="needs quantizeml")
def test_a_network_in_keras_is_the_same_or_refused():
    net, images = get_net_by_name("example_net", 3, 10), torch.rand(4, 3, 32, 32)
    graph = peers.as_modules(net.eval(), images[:1])
    with torch.no_grad():
        wanted = graph(images).numpy()
    found = keras_form.as_keras(graph, images).predict_on_batch(keras_form.channels_last(images))
    assert abs(found - wanted).max() <= keras_form.MAX_DIFFERENCE
    graph.of_avg_pool2d.divisor_override = 1
    with pytest.raises(ValueError, match="the network in Keras is not the same"):
        keras_form.as_keras(graph, images)
    graph.of_relu_2 = torch.nn.Sigmoid()
    with pytest.raises(ValueError, match="Sigmoid is no layer"):
        keras_form.as_keras(graph, images)
