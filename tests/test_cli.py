"""ann2snn.py as a user runs it: results, saved networks, and one line for everything that cannot work.

The runs that succeed, and some that fail, are processes of their own; the other bad inputs are run in this process.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, errors_of, python
from PIL import Image

import ann2snn
import build_network
from build_network import get_net_by_name
from networks.checkpoint import load_weights
from runtime.cli import run_script
from runtime.device import choose_device
from runtime.files import check_writable, write_atomically, write_json
from runtime.flags import memory_in_words
from spike_dag import load_dag

CHECKPOINT = "checkpoint/example_net_ann.pth"
TRAINED = "example_net -e 1 --weight_bitwidth 4 --timesteps 3 --reset_mode zero"
DEBUG_NETS = {"debug_net0": "debug0", "debug_net1": "debug0", "debug_net2": "debug1", "debug_net3": "debug2"}
ACCURACIES = ("ann_top1", "qnet_top1", "snn_top1", "ann_loss", "qnet_loss", "snn_loss", "snn_top1_by_timestep")

# name of a run -> what Python runs; {dir} is the folder of the fixture `files`
RUNS = {
    **{net: f"ann2snn.py {net} --dataset {dataset} -e 0" for net, dataset in DEBUG_NETS.items()},
    "digits": f"ann2snn.py example_net -e 0 --weight_bitwidth 8 --ann_weight {CHECKPOINT}",
    "seed3": f"ann2snn.py {TRAINED} --seed 3",
    "seed3_again": f"ann2snn.py {TRAINED} --seed 3",
    "shape": "ann2snn.py debug_net0 --dataset debug0 --ann_weight {dir}/shape.pth",
    "debug": "ann2snn.py nonet --debug",
    "squashed": "{dir}/user.py squashed",
    "bare": "{dir}/user.py bare",
}

# a user's own networks, added to build_network.NETWORKS by a script
USER_SCRIPT = """
import sys
from collections import OrderedDict
from torch import nn
import ann2snn
import build_network
from build_network import network
from runtime.cli import run_script


def chain(*names):
    layers = {"conv": nn.Conv2d(1, 1, 3, padding=1), "relu": nn.ReLU(), "sigmoid": nn.Sigmoid()}
    return nn.Sequential(OrderedDict((name, layers[name]) for name in names))


@network(image_size=6)
def squashed(in_channels, num_classes):
    return nn.Sequential(OrderedDict(body=chain("conv", "sigmoid"), head=chain("conv", "relu")))


@network(image_size=6)
def bare(in_channels, num_classes):
    return nn.Sequential(OrderedDict(stem=chain("conv", "relu"), body=chain("conv"), tail=chain("conv", "relu")))


run_script(ann2snn.main, ann2snn.parse_args([*sys.argv[1:], "--dataset", "debug0", "-e", "0"]))
"""

LOADER = """
import json, sys
from types import SimpleNamespace
from torch import nn
from datasets import get_dataset
from spike_dag import load_dag
from validate import evaluate
dag = load_dag(sys.argv[1])
loader = get_dataset(SimpleNamespace(dataset="debug2"))[0]
result = evaluate(dag, loader, "cpu", nn.CrossEntropyLoss(), dag.timesteps, every_step=True)
print(json.dumps({"timesteps": dag.timesteps, **result}))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of bad checkpoints and data folders, and a script with networks of the user's own."""
    folder = tmp_path_factory.mktemp("files")
    state = torch.load(ROOT / CHECKPOINT)["state_dict"]
    rgb = get_net_by_name("example_net", 3, 10).state_dict()
    torch.save(rgb, folder / "rgb.pth")
    debug = get_net_by_name("debug_net0", 1, 2).state_dict()
    torch.save({**debug, "0.weight": torch.zeros(2, 3, 3, 3)}, folder / "shape.pth")
    nan = {name: tensor.clone() for name, tensor in state.items()}
    nan["conv2.weight"][1, 2, 0, 0] = float("nan")
    torch.save(nan, folder / "nan.pth")
    torch.save({name: tensor for name, tensor in state.items() if name != "fc.weight"}, folder / "lacks.pth")
    torch.save({**state, "fc.bias": torch.zeros(10)}, folder / "more.pth")
    torch.save([1, 2], folder / "list.pth")
    whole = (ROOT / CHECKPOINT).read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pth").write_text("no weights")
    (folder / "empty").mkdir()
    for split in ("train", "test"):
        for name in ("a", "b", "c"):
            (folder / "three" / split / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(folder / "three" / split / name / "0.png")
    (folder / "user.py").write_text(USER_SCRIPT)
    return folder


@pytest.fixture(scope="module")
def runs(files, tmp_path_factory):
    """Name -> finished process, with `.save` and `.results`, the files it should write. Two at a time."""

    def start(name):
        folder = tmp_path_factory.mktemp(name)
        save, results = folder / "snn.pth", folder / "results.json"
        save.write_bytes(b"old")
        run = python(*RUNS[name].format(dir=files).split(), "--save_file", save, "--results", results)
        run.save, run.results = save, results
        return run

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(start, RUNS)))


def results_of(run):
    return json.loads(run.results.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# runs that succeed


@pytest.mark.slow
@pytest.mark.parametrize("net", DEBUG_NETS)
def test_debug_nets_convert(runs, net):
    run = runs[net]
    assert (run.returncode, errors_of(run.stderr)) == (0, [])
    assert f"Save the SNN in {run.save}" in run.stdout
    results = results_of(run)
    assert results["ann_top1"] == results["qnet_top1"] == results["snn_top1"] == 100.0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DEBUG_NETS, "digits", "seed3"])
def test_results_hold_every_key(runs, name):
    results, dag = results_of(runs[name]), load_dag(runs[name].save)
    flags = dict(net="example_net", dataset="digits", weight_bitwidth=4, timesteps=16, reset_mode="subtraction", seed=0)
    flags |= {"net": name, "dataset": DEBUG_NETS[name]} if name in DEBUG_NETS else {}
    flags |= {"weight_bitwidth": 8} if name == "digits" else {}
    flags |= {"timesteps": 3, "reset_mode": "zero", "seed": 3} if name == "seed3" else {}
    assert {key: results[key] for key in flags} == flags
    T = flags["timesteps"]
    assert list(results["snn_top1_by_timestep"]) == [str(t) for t in range(1, T + 1)]
    assert results["snn_top1_by_timestep"][str(T)] == results["snn_top1"]
    percents = [results[f"{net}_top1"] for net in ("ann", "qnet", "snn")] + list(
        results["snn_top1_by_timestep"].values()
    )
    assert all(0 <= percent <= 100 for percent in percents)
    assert list(results["firing_rate"]) == dag.spiking_layers()
    assert all(0 < rate < 1 for rate in results["firing_rate"].values())
    assert len(results["seconds"]) >= 3 and all(second >= 0 for second in results["seconds"].values())
    assert results["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_table_on_stdout_holds_the_results(runs):
    results, lines = results_of(runs["digits"]), runs["digits"].stdout.splitlines()
    for label, key in (("ANN", "ann"), ("quantized ANN", "qnet"), ("SNN, T=16", "snn")):
        row = next(line for line in lines if line.startswith(label + "  "))
        assert row.removeprefix(label).split() == [f"{results[key + '_top1']:.2f}", f"{results[key + '_loss']:.4f}"]
    for layer, rate in results["firing_rate"].items():
        assert [line.split()[-1] for line in lines if line.startswith(layer)] == [f"{rate:.4f}"]


@pytest.mark.slow
def test_example_net_loses_at_most_two_points_at_8_bits(runs):
    results = results_of(runs["digits"])
    assert runs["digits"].returncode == 0 and results["samples"] == 359
    assert results["ann_top1"] > 97
    assert abs(results["snn_top1"] - results["ann_top1"]) <= 2


@pytest.mark.slow
def test_a_limit_that_was_not_asked_for_is_a_warning(runs):
    assert [line for line in runs["digits"].stderr.splitlines() if line.startswith("warning:")] == [
        "warning: 1 layer exceeds Hardware v1.0 with 8-bit weights (conv3 (conv3)), see hw_constraints.py"
    ]
    assert "random weights" in runs["seed3"].stderr


@pytest.mark.slow
def test_saved_network_loads_in_a_new_process(runs):
    run = python("-c", LOADER, runs["debug_net3"].save)
    assert (run.returncode, errors_of(run.stderr)) == (0, [])
    loaded, results = json.loads(run.stdout), results_of(runs["debug_net3"])
    assert (loaded["timesteps"], loaded["top1"], loaded["loss"]) == (16, results["snn_top1"], results["snn_loss"])
    assert loaded["firing_rate"] == results["firing_rate"]


@pytest.mark.slow
def test_same_seed_gives_the_same_results_and_the_same_network(runs):
    first, again = results_of(runs["seed3"]), results_of(runs["seed3_again"])
    assert all(first[key] == again[key] for key in (*ACCURACIES, "firing_rate"))
    tensors, same = load_dag(runs["seed3"].save).state_dict(), load_dag(runs["seed3_again"].save).state_dict()
    assert list(tensors) == list(same) and all(torch.equal(tensors[name], same[name]) for name in tensors)


@pytest.mark.slow
def test_another_seed_gives_another_network(runs, tmp_path):
    save = tmp_path / "snn.pth"
    ann2snn.main(ann2snn.parse_args(f"{TRAINED} --seed 4 --save_file {save}".split()))
    tensors, other = load_dag(runs["seed3"].save).state_dict(), load_dag(save).state_dict()
    assert list(tensors) == list(other) and not torch.equal(tensors["conv2.weight"], other["conv2.weight"])


def test_reset_mode_reaches_every_neuron(tmp_path):
    rates = {}
    for mode in ("zero", "subtraction"):
        save, results = tmp_path / f"{mode}.pth", tmp_path / f"{mode}.json"
        argv = f"debug_net1 --dataset debug0 -e 0 --reset_mode {mode} --save_file {save} --results {results}".split()
        ann2snn.main(ann2snn.parse_args(argv))
        assert {neuron.reset_mode for neuron in load_dag(save).neurons().values()} == {mode}
        assert json.loads(results.read_text())["reset_mode"] == mode
        rates[mode] = json.loads(results.read_text())["firing_rate"]
    assert len(rates["zero"]) == 4
    assert rates["zero"] != rates["subtraction"]


def test_hardware_flag_accepts_what_fits(tmp_path, capsys):
    save = tmp_path / "snn.pth"
    argv = f"debug_net0 --dataset debug0 -e 0 --hardware v1.0 --save_file {save}".split()
    ann2snn.main(ann2snn.parse_args(argv))
    assert "1024" in capsys.readouterr().out.splitlines()[1] and save.exists()


# ---------------------------------------------------------------------------------------------------------------------
# runs that fail, in a process of their own


@pytest.mark.slow
def test_a_bad_input_ends_in_one_line_and_status_2(runs, files):
    run = runs["shape"]
    assert run.returncode == 2 and run.stdout == "" and "Traceback" not in run.stderr
    (line,) = errors_of(run.stderr)
    assert line.startswith(f"error: the checkpoint {files}/shape.pth does not fit the network: 0.weight is ")
    assert "[2, 3, 3, 3] in the file and [2, 1, 3, 3] in the network" in line
    assert run.save.read_bytes() == b"old" and not run.results.exists()


@pytest.mark.slow
def test_debug_shows_the_traceback(runs):
    run = runs["debug"]
    assert run.returncode == 1 and "Traceback (most recent call last)" in run.stderr
    assert run.stderr.splitlines()[-1].startswith("ValueError: unknown network 'nonet'")
    assert run.save.read_bytes() == b"old"


@pytest.mark.slow
@pytest.mark.parametrize(
    "net, words",
    [("squashed", ["sigmoid", "body.sigmoid", "ReLU"]), ("bare", ["conv2 (body.conv)", "no ReLU", "add one"])],
)
def test_a_network_of_the_user_that_cannot_be_converted_is_named(runs, net, words):
    run = runs[net]
    (line,) = errors_of(run.stderr)
    assert run.returncode == 2 and line.startswith("error: ") and all(word in line for word in words)
    assert run.save.read_bytes() == b"old"


# ---------------------------------------------------------------------------------------------------------------------
# runs that fail, in this process


def refused(capsys, *argv):
    """The one line on stderr with which ann2snn.py refuses a command line, and what it printed before."""
    with pytest.raises(SystemExit) as end:
        run_script(ann2snn.main, ann2snn.parse_args(list(argv)))
    stdout, stderr = capsys.readouterr()
    (line,) = errors_of(stderr)
    assert end.value.code == 2 and line.startswith("error: ")
    return line, stdout


BAD_INPUTS = [
    ("nonet", ["unknown network 'nonet'", "example_net", "debug_net3"]),
    ("example_net --dataset nodata", ["unknown data set 'nodata'", "digits", "folder"]),
    ("example_net --ann_weight {dir}/missing.pth", ["{dir}/missing.pth"]),
    ("example_net --ann_weight {dir}", ["{dir}"]),
    ("example_net --ann_weight {dir}/truncated.pth", ["{dir}/truncated.pth", "truncated"]),
    ("example_net --ann_weight {dir}/text.pth", ["{dir}/text.pth", "not a file of weights"]),
    ("example_net --ann_weight {dir}/list.pth", ["{dir}/list.pth", "no state dict"]),
    ("example_net --ann_weight {dir}/rgb.pth", ["{dir}/rgb.pth", "conv1.weight", "[8, 3, 5, 5]", "[8, 1, 5, 5]"]),
    ("example_net --ann_weight {dir}/lacks.pth", ["{dir}/lacks.pth", "lacks", "fc.weight", "[10, 512]"]),
    ("example_net --ann_weight {dir}/more.pth", ["{dir}/more.pth", "fc.bias"]),
    ("example_net --ann_weight {dir}/nan.pth", ["{dir}/nan.pth", "NaN", "conv2.weight"]),
    ("example_net --weight_bitwidth 0", ["--weight_bitwidth", "0", "1 to 8"]),
    ("example_net --weight_bitwidth 9", ["--weight_bitwidth", "9", "1 to 8"]),
    ("example_net --weight_bitwidth 4.5", ["--weight_bitwidth", "4.5", "1 to 8"]),
    ("example_net --timesteps 0", ["--timesteps", "0", "1 to 65536"]),
    ("example_net --batch_size 99999999999999999999", ["--batch_size", "is over 2147483647"]),
    ("example_net --activation_levels 4", ["--activation_levels", "--finetune_epochs"]),
    ("example_net --finetune_lr nan", ["--finetune_lr", "nan"]),
    ("example_net --seed -1", ["--seed", "-1"]),
    ("example_net --reset_mode soft", ["--reset_mode", "soft", "subtraction"]),
    ("example_net --hardware v9", ["--hardware", "v9", "v1.0"]),
    ("example_net --no_such_flag", ["--no_such_flag", "--help"]),
    ("example_net --dataset {dir}/empty", ["{dir}/empty", "train"]),
    ("example_net --dataset folder --dataset_root {dir}/nowhere", ["{dir}/nowhere"]),
    (
        "example_net --dataset {dir}/three --ann_weight {dir}/rgb.pth",
        ["{dir}/rgb.pth", "fc.weight", "[10, 512]", "[3, 512]"],
    ),
    ("debug_net0 --dataset debug1", ["cannot run on an input of", "2, 4, 4]", "2 channels"]),
    ("debug_net0 --dataset debug0 --device gpu", ["--device", "'gpu'", "cuda:N"]),
    ("debug_net0 --dataset debug0 --device cuda:99", ["--device", "cuda:99", "cpu"]),
    ("debug_net0 --dataset debug0 --results {dir}/nowhere/r.json", ["{dir}/nowhere/r.json", "no folder"]),
    ("debug_net0 --dataset debug0 --results {dir}", ["{dir}", "is a folder"]),
]


@pytest.mark.parametrize("command, words", BAD_INPUTS)
def test_bad_input_ends_in_one_line_that_says_what_and_where(files, tmp_path, capsys, command, words):
    save = tmp_path / "snn.pth"
    save.write_bytes(b"old")
    line, _ = refused(capsys, *command.format(dir=files).split(), "-e", "0", "--save_file", str(save))
    assert [word for word in words if word.format(dir=files) not in line] == []
    assert save.read_bytes() == b"old" and os.listdir(tmp_path) == ["snn.pth"]


@pytest.mark.parametrize(
    "save_file",
    ["{dir}/nowhere/snn.pth", "{dir}/empty", "/proc/snn.pth", "", "{dir}/" + 300 * "n", "{dir}/text.pth/snn.pth"],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(files, capsys, save_file):
    save_file = save_file.format(dir=files)
    line, _ = refused(capsys, "debug_net0", "--dataset", "debug0", "-e", "0", "--save_file", save_file)
    assert line.startswith(f"error: cannot write {save_file}")


def test_a_command_line_without_a_network_is_refused(capsys):
    assert "net_name" in refused(capsys)[0]


def test_hardware_flag_prints_the_table_and_names_the_layer_over_the_limit(tmp_path, capsys):
    save = tmp_path / "snn.pth"
    argv = f"example_net -e 0 --weight_bitwidth 8 --hardware v1.0 --save_file {save}".split()
    line, stdout = refused(capsys, *argv)
    assert line == "error: Hardware v1.0: conv3 (conv3) has 1152 fan-in bits, over 1024: at most 7 bits fit"
    assert [row.split()[0] for row in stdout.splitlines()[1:]][::2] == ["conv1", "conv2", "conv3"]
    assert not save.exists()


def test_finetuning_that_diverges_names_the_epoch_and_the_flag(tmp_path, capsys):
    argv = f"debug_net0 --dataset debug0 -e 3 --finetune_lr 1e30 --save_file {tmp_path}/snn.pth".split()
    line, _ = refused(capsys, *argv)
    assert "diverged in finetune epoch" in line and "--finetune_lr" in line and os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["meta", "mps", "xpu", "cuda:-1", ""])
def test_devices_other_than_cpu_and_cuda_are_refused(name):
    with pytest.raises(ValueError, match="--device"):
        choose_device(name)


def test_known_devices_are_accepted():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_checkpoint_truncated_anywhere_is_refused_by_name(tmp_path, share):
    whole, path = (ROOT / CHECKPOINT).read_bytes(), tmp_path / "cut.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    net = get_net_by_name("example_net")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"the checkpoint {path} cannot be read"):
        load_weights(net, str(path))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def load_example_net(path):
    return load_weights(get_net_by_name("example_net"), path)


@pytest.mark.parametrize("contents", [b".", b"u", b")", b"no weights", b"PK\x03\x04", b"\x80\x02."])
@pytest.mark.parametrize("load", [load_dag, load_example_net])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, contents, load):
    path = tmp_path / "odd.pth"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=str(path)):
        load(str(path))


@pytest.mark.slow
def test_a_truncated_spiking_network_is_refused_by_name(runs, tmp_path):
    whole, path = runs["debug_net0"].save.read_bytes(), tmp_path / "cut.pth"
    for share in (0.0, 0.2, 0.5, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=str(path)):
            load_dag(path)


def test_an_interrupted_run_ends_with_status_130(capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_script(interrupted, ann2snn.parse_args(["debug_net0"]))
    assert end.value.code == 130 and "interrupted" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# writing files


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def write(temporary):
        Path(temporary).write_bytes(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(str(path), write)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({} if old is None else {"file": old})


def test_a_write_replaces_the_old_file_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "link")  # a second name for the old contents, which only a rename leaves alone

    def write(temporary):
        Path(temporary).write_bytes(b"new")
        assert path.read_bytes() == b"old"

    write_atomically(str(path), write)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"new", "link": b"old"}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(str(path), {"top1": 98.5})
    with pytest.raises(TypeError):
        write_json(str(path), {"top1": torch.zeros(1)})
    assert json.loads(path.read_text()) == {"top1": 98.5} and os.listdir(tmp_path) == ["results.json"]


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OSError, match="cannot write"):
        check_writable(str(path))
    with pytest.raises(OSError, match="cannot write"):
        write_atomically(str(path), lambda temporary: Path(temporary).write_bytes(b"new"))
    assert path.is_fifo()


def test_a_link_into_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "link").symlink_to("nowhere/file")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/link, there is no folder {tmp_path}/nowhere, create"):
        check_writable(str(tmp_path / "link"))


# ---------------------------------------------------------------------------------------------------------------------
# what else a user can get wrong


def test_two_results_in_one_file_are_refused(tmp_path, capsys):
    file = str(tmp_path / "both")
    argv = ["debug_net0", "--dataset", "debug0", "-e", "0", "--save_file", file, "--results", file]
    assert f"the same file {file}" in refused(capsys, *argv)[0] and os.listdir(tmp_path) == []


def test_a_failed_download_leaves_no_folders(tmp_path, capsys, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    line, _ = refused(capsys, "example_net", "--dataset", "MNIST", "--dataset_root", str(tmp_path / "data"))
    assert "MNIST is not in" in line and os.listdir(tmp_path) == []


def test_a_checkpoint_of_integers_is_refused(tmp_path):
    state = {**get_net_by_name("example_net").state_dict(), "fc.weight": torch.zeros(10, 512, dtype=torch.int64)}
    torch.save(state, tmp_path / "integers.pth")
    with pytest.raises(ValueError, match=r"fc\.weight as torch\.int64"):
        load_example_net(str(tmp_path / "integers.pth"))


def test_memory_budget_is_read_in_powers_of_1024(capsys):
    def budget(text):
        return ann2snn.parse_args(["debug_net0", "--memory_budget", text]).memory_budget

    assert [budget(text) for text in ("100", "2K", "1.5m", "3G")] == [100, 2048, 1572864, 3 * 2**30]
    for wrong in ("0", "0G", "much", "G", "nan", "inf"):
        with pytest.raises(SystemExit) as end:
            budget(wrong)
        assert end.value.code == 2 and "is not a memory size such as 512M" in capsys.readouterr().err
    sizes = 100, 1536, 1023 * 1024, 2**20, 2**30 - 1, 5 * 2**29, 2**40, 100_400
    said = [memory_in_words(size) for size in sizes]
    assert said == ["100", "1.5K", "1023K", "1M", "1024M", "2.5G", "1024G", "98.05K"]
    assert all(budget(text) >= size for text, size in zip(said, sizes))


@pytest.mark.parametrize(
    "layers, words",
    [
        ([torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()], ["(1, 2, 4, 4) for one image", "[B, 2]"]),
        ([torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 7)], ["(1, 7)", "[B, 2]"]),
    ],
)
def test_a_network_that_does_not_classify_is_refused(tmp_path, capsys, monkeypatch, layers, words):
    def own_net(in_channels, num_classes):
        return torch.nn.Sequential(*layers)

    own_net.image_size = 6
    monkeypatch.setitem(build_network.NETWORKS, "own_net", own_net)
    line, _ = refused(capsys, "own_net", "--dataset", "debug0", "--save_file", str(tmp_path / "snn.pth"))
    assert all(word in line for word in ["own_net returns", *words])


def test_max_pooling_without_a_choice_says_what_is_taken(tmp_path, capsys, monkeypatch):
    def own_net(in_channels, num_classes):
        layers = [torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Conv2d(2, 2, 1)]
        return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, num_classes))

    own_net.image_size = 6
    monkeypatch.setitem(build_network.NETWORKS, "own_net", own_net)
    save = tmp_path / "snn.pth"
    argv = ["own_net", "--dataset", "debug0", "-e", "0", "--save_file", str(save)]
    ann2snn.main(ann2snn.parse_args(argv))
    assert "max pooling: gate, the largest spike count of a window passes" in capsys.readouterr().err
    assert load_dag(save).ops["max_pool1"]["op"].mode == "gate"
    for mode in ("gate", "or"):
        ann2snn.main(ann2snn.parse_args([*argv, "--maxpool", mode]))
        assert load_dag(save).ops["max_pool1"]["op"].mode == mode
