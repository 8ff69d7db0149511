"""--resume: a training that is cut off anywhere goes on to the same bits, and says so where it cannot."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROOT, slow
from torch.utils.data import DataLoader

import analyse_error
import ann2snn
import spike_neurons
import train_ann
from finetuning import state
from finetuning.state import State, generators_of
from runtime.cli import run_script
from runtime.progress import Progress

NET = """
from torch import nn

def net(in_channels, num_classes):
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, num_classes),
    )
"""
FEW = "-e 1 --calibration_samples 100 --spike_epochs 1 --spike_epochs_unlabelled 1"
RUNS = {  # script, flags, and how many of the writes of the state are passed over from one cut to the next
    "ann": (train_ann, "--epochs 2 --lr 0.05", 4),
    "ann with workers": (train_ann, "--epochs 2 --lr 0.05 --num_workers 1 --batch_size 600", 2),
    "ann averaged": (train_ann, "--epochs 1 --lr 0.05 --val_share 0.2 --average 1 --ann_weight WEIGHTS", 4),
    "sgd": (ann2snn, "-e 4 --timesteps 4", 6),
    "adam": (ann2snn, "-e 2 --finetune_optimizer adam --activation_levels 4 --finetune_distill 0.5", 4),
    "through time": (ann2snn, f"{FEW} --timesteps 2", 6),
    "tandem": (ann2snn, f"{FEW} --timesteps 8 --per_channel both", 6),
    "rounding": (ann2snn, "-e 0 --rounding learnt --calibration_samples 100 --spike_epochs 1 --timesteps 8", 3),
}
QUICK = ("ann averaged", "sgd", "tandem")  # the others run with the slow tests


class Killed(BaseException):
    """Stands for a process that ends without a word."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small network, net.py, and weights for it, start.pth."""
    path = tmp_path_factory.mktemp("state")
    (path / "net.py").write_text(NET)
    main(train_ann, arguments(path, "--epochs 1 --lr 0.05", path / "start.pth"))
    return path


@pytest.fixture(autouse=True)
def always_written(monkeypatch):
    """The state is written behind every batch, and no kernel is compiled for a few images."""
    monkeypatch.setattr(state, "SECONDS_BETWEEN", 0)
    monkeypatch.setattr(spike_neurons, "learns_compiled", lambda steps: False)


def arguments(folder, flags, save):
    given = f"{folder}/net.py:net --input_shape 1,8,8 --batch_size 400 {flags}".replace(
        "WEIGHTS", f"{folder}/start.pth"
    )
    return [*given.split(), "--save_file", str(save)]


def main(script, argv):
    script.main(script.parse_args(argv))


def convert(folder, flags, save):
    return arguments(folder, f"--ann_weight WEIGHTS {flags}", save)


def counted(monkeypatch, last=None):
    """A list that grows with every write of a state; the process is killed behind write number `last`."""
    write, written = State.write, []

    def write_and_count(self, position):
        write(self, position)
        written.append(position["stage"])
        if len(written) == last:
            raise Killed

    monkeypatch.setattr(State, "write", write_and_count)
    return written


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in RUNS])
def test_a_run_cut_off_after_any_write_ends_in_the_same_bits(name, folder, tmp_path, monkeypatch, capsys):
    script, flags, step = RUNS[name]
    argv = (arguments if script is train_ann else convert)(folder, flags, tmp_path / "net.pth")
    with monkeypatch.context() as patch:
        written = counted(patch)
        main(script, argv)
        writes = len(written)
    expected = (tmp_path / "net.pth").read_bytes()
    assert writes > step
    for last in range(1, writes + 1, step):
        os.remove(tmp_path / "net.pth")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            counted(patch, last)
            main(script, argv)
        assert not (tmp_path / "net.pth").exists()
        main(script, [*argv, "--resume"])
        assert (tmp_path / "net.pth").read_bytes() == expected, f"cut off after write {last} of {writes}"
        assert not (tmp_path / "net.pth.state").exists()


def without_seconds(value):
    """JSON without the times that a run took."""
    if not isinstance(value, dict):
        return value
    return {name: without_seconds(each) for name, each in value.items() if "seconds" not in name}


@pytest.mark.slow
def test_an_analysis_that_is_cut_off_writes_the_same_report(folder, tmp_path, monkeypatch):
    report = tmp_path / "report"
    argv = f"{folder}/net.py:net --input_shape 1,8,8 --batch_size 400 --load {folder}/start.pth -e 2 --timesteps 4"
    argv = [*argv.split(), "--analysis_images", "16", "--out", str(report)]
    main(analyse_error, argv)
    expected = without_seconds(json.loads((report / "report.json").read_text()))
    shutil.rmtree(report)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        counted(patch, 3)
        main(analyse_error, argv)
    assert not (report / "report.json").exists()
    main(analyse_error, [*argv, "--resume"])
    assert without_seconds(json.loads((report / "report.json").read_text())) == expected


def test_a_run_that_is_cut_off_twice_ends_in_the_same_bits(folder, tmp_path, monkeypatch):
    argv = convert(folder, "-e 4 --timesteps 4", tmp_path / "net.pth")
    main(ann2snn, argv)
    expected = (tmp_path / "net.pth").read_bytes()
    for resume, last in (([], 6), (["--resume"], 5)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            counted(patch, last)
            main(ann2snn, [*argv, *resume])
    main(ann2snn, [*argv, "--resume"])
    assert (tmp_path / "net.pth").read_bytes() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Random states


def test_all_random_generators_go_on(tmp_path):
    loader = DataLoader(range(9), 3, shuffle=True, generator=torch.Generator().manual_seed(1))

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), [x.tolist() for x in loader]

    kept = State(str(tmp_path / "file"), {}, [loader])
    draw()
    states = kept.randomness()
    drawn = draw()
    assert drawn != draw()
    kept.set_randomness(states)
    assert drawn == draw()


def test_generators_of_a_loader_are_found_once():
    own = torch.Generator()
    assert generators_of(DataLoader(range(4), shuffle=True, generator=own)) == [own]
    assert generators_of(DataLoader(range(4))) == generators_of([1, 2]) == []


def test_the_workers_that_keep_random_states_are_told_of(tmp_path, capsys):
    path = str(tmp_path / "file")
    State(path, {}).write({"stage": None})
    State(path, {}, [DataLoader(range(4), num_workers=1, persistent_workers=True)], resume=True)
    assert "persistent_workers in your data loader: their random numbers start again" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def refused(capsys, script, argv):
    """The one line on stderr, of those that begin with error:, with which a script ends."""
    with pytest.raises(SystemExit) as end:
        run_script(script.main, script.parse_args(argv))
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def cut_off(folder, tmp_path, monkeypatch):
    """The command line of a run that was killed in its second epoch."""
    argv = convert(folder, "-e 2 --timesteps 4", tmp_path / "net.pth")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        counted(patch, 6)
        main(ann2snn, argv)
    return argv


def test_without_a_state_there_is_nothing_to_resume(folder, tmp_path, capsys):
    argv = convert(folder, "-e 1", tmp_path / "net.pth")
    line = refused(capsys, ann2snn, [*argv, "--resume"])
    assert line == (
        f"error: --resume: there is no {tmp_path}/net.pth.state, the run ended or has not trained yet: "
        "leave --resume out"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: data[: len(data) // 2], "holds no state of a training, it is truncated"),
        (
            lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
            "no state of a training, it is damaged",
        ),
        (lambda data: b"", "holds no state of a training, it is empty"),
    ],
)
def test_a_damaged_state_is_refused(damage, words, cut_off, tmp_path, capsys):
    path = tmp_path / "net.pth.state"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    assert words in refused(capsys, ann2snn, [*cut_off, "--resume"])
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["net.pth.state"]


def test_another_file_of_torch_is_refused(cut_off, tmp_path, capsys):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "net.pth.state")
    assert "holds no state of a training of this version" in refused(capsys, ann2snn, [*cut_off, "--resume"])


@pytest.mark.parametrize(
    "flags, difference",
    [
        ("--timesteps 8", "timesteps 4, not 8"),
        ("--finetune_lr 0.1 --seed 1", "finetune_lr 0.01, not 0.1; seed 0, not 1"),
        ("--weight_bitwidth 8", "weight_bitwidth 4, not 8"),
    ],
)
def test_other_options_are_refused_with_the_difference(flags, difference, cut_off, tmp_path, capsys):
    line = refused(capsys, ann2snn, [*cut_off, *flags.split(), "--resume"])
    assert line == (
        f"error: --resume: {tmp_path}/net.pth.state is of a run with {difference}: give the same flags, or leave "
        "--resume out"
    )


def test_options_without_influence_may_differ(cut_off, tmp_path):
    main(ann2snn, [*cut_off, "--resume", "--results", str(tmp_path / "r.json"), "--test_batch_size", "7"])
    assert (tmp_path / "r.json").exists()


def test_other_weights_are_refused(cut_off, folder, tmp_path, capsys):
    weights = torch.load(folder / "start.pth", weights_only=True)
    torch.save({name: value * 2 for name, value in weights["state_dict"].items()}, tmp_path / "other.pth")
    before = (folder / "start.pth").read_bytes()
    try:
        (tmp_path / "other.pth").replace(folder / "start.pth")
        line = refused(capsys, ann2snn, [*cut_off, "--resume"])
    finally:
        (folder / "start.pth").write_bytes(before)
    assert "net.pth.state is of another network, with other weights: leave --resume out" in line


def test_a_new_run_says_that_it_does_not_go_on(cut_off, tmp_path, capsys):
    main(ann2snn, cut_off)
    line = f"{tmp_path}/net.pth.state is of an unfinished run, --resume goes on with it; this one begins anew"
    assert line in capsys.readouterr().err.splitlines()
    assert not (tmp_path / "net.pth.state").exists()


def test_a_loader_with_fewer_batches_is_refused(tmp_path):
    net, path = torch.nn.Linear(1, 1), str(tmp_path / "file")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def go(progress, batches):
        for _ in progress.epochs("train", 1, net, optimizer):
            for _ in progress.batches([torch.zeros(1, 1)] * batches, "words"):
                progress.count(torch.zeros(()), 1)
                if progress.batch == 2 and batches == 5:
                    raise Killed

    with pytest.raises(Killed):
        go(Progress(State(path, {})), 5)
    with pytest.raises(ValueError, match=f"--resume: {path} is at batch 2, the data loader has 1 now"):
        go(Progress(State(path, {}, resume=True)), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


def test_a_full_disk_does_not_end_the_training_and_keeps_the_last_state(folder, tmp_path, monkeypatch, capsys):
    argv = convert(folder, "-e 2 --timesteps 4", tmp_path / "net.pth")
    main(ann2snn, argv)
    expected, replace, states = (tmp_path / "net.pth").read_bytes(), os.replace, []

    def full_after_two(source, target):
        if target.endswith(".state"):
            states.append(source)
            if len(states) > 2:
                raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("runtime.files.os.replace", full_after_two)
    main(ann2snn, argv)
    warning = f"warning: cannot write {tmp_path}/net.pth.state (No space left on device), free some room or name"
    assert capsys.readouterr().err.count(warning) == 1 and len(states) > 4
    assert (tmp_path / "net.pth").read_bytes() == expected
    assert not any(name.endswith(".tmp") for name in os.listdir(tmp_path))


def test_a_result_that_does_not_fit_leaves_the_state(folder, tmp_path, monkeypatch, capsys):
    argv = convert(folder, "-e 1 --timesteps 4", tmp_path / "net.pth")
    replace = os.replace

    def full_for_result(source, target):
        if target.endswith("net.pth"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("runtime.files.os.replace", full_for_result)
        line = refused(capsys, ann2snn, argv)
    assert line.endswith(f"free some room or name another place; --resume goes on from {tmp_path}/net.pth.state")
    with monkeypatch.context() as patch:
        patch.setattr("quantization.quantize_train", None)  # the finetuning has ended
        main(ann2snn, [*argv, "--resume"])
    assert sorted(os.listdir(tmp_path)) == ["net.pth", "net_qnet.pth"]


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_behind_the_batch(number, status, folder, tmp_path, monkeypatch, capsys):
    argv = convert(folder, "-e 2 --timesteps 4", tmp_path / "net.pth")
    main(ann2snn, argv)
    expected = (tmp_path / "net.pth").read_bytes()
    os.remove(tmp_path / "net.pth"), os.remove(tmp_path / "net_qnet.pth")
    monkeypatch.setattr(state, "SECONDS_BETWEEN", 1e9)
    monkeypatch.setattr(sys, "argv", ["ann2snn.py", *argv])
    count, before = Progress.count, signal.getsignal(number)

    def count_and_signal(self, *args):
        count(self, *args)
        if (self.epoch, self.batch) == (2, 1):
            os.kill(os.getpid(), number)

    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(Progress, "count", count_and_signal)
            run_script(ann2snn.main, ann2snn.parse_args(argv))
    finally:
        signal.signal(number, before)
    lines = [line for line in capsys.readouterr().err.splitlines() if "|" not in line]
    assert end.value.code == status and os.listdir(tmp_path) == ["net.pth.state"]
    assert lines[-2] == f"go on with: python3 ann2snn.py {' '.join(argv)} --resume"
    assert lines[-1] == "interrupted, no result is half-written"
    saved = torch.load(tmp_path / "net.pth.state", weights_only=True)
    assert (saved["stage"], saved["epoch"], saved["batch"]) == ("finetune", 2, 2)
    main(ann2snn, [*argv, "--resume"])
    assert (tmp_path / "net.pth").read_bytes() == expected


PATIENT = """
import sys
import finetuning.state
from runtime.cli import run_script
finetuning.state.SECONDS_BETWEEN = 0
script = __import__(sys.argv[1])
sys.argv = sys.argv[1:]
run_script(script.main, script.parse_args())
"""


def start(script, argv):
    """A process that writes its state behind every batch."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PATIENT, script, *argv]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags", [("ann2snn", f"{FEW} -e 3 --timesteps 8"), ("train_ann", "--epochs 4 --lr 0.05 --num_workers 1")]
)
def test_a_process_killed_at_random_moments_ends_in_the_same_bits(script, flags, folder, tmp_path):
    argv = partial(arguments if script == "train_ann" else convert, folder, f"{flags} --batch_size 100")
    assert start(script, argv(tmp_path / "whole.pth")).wait(300) == 0
    cut, kills, drawn = argv(tmp_path / "cut.pth"), 0, random.Random(0)
    for _ in range(3):
        has_state = (tmp_path / "cut.pth.state").exists()
        process = start(script, [*cut, "--resume"] if has_state else cut)
        while process.poll() is None and not (tmp_path / "cut.pth.state").exists():
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 1))
        kills += process.poll() is None
        process.kill()
        process.communicate()
    if (tmp_path / "cut.pth.state").exists():
        assert start(script, [*cut, "--resume"]).wait(300) == 0
    assert kills and (tmp_path / "cut.pth").read_bytes() == (tmp_path / "whole.pth").read_bytes()


@pytest.mark.slow
def test_a_terminated_process_leaves_its_state_alone_and_says_how_to_go_on(folder, tmp_path):
    argv = arguments(folder, "--epochs 100000 --lr 0.01", tmp_path / "net.pth")
    process = start("train_ann", argv)
    while not (tmp_path / "net.pth.state").exists():
        time.sleep(0.1)
    process.terminate()
    said = process.communicate(timeout=60)[1].decode().splitlines()
    assert process.returncode == 143 and said[-1] == "interrupted, no result is half-written"
    assert said[-2].startswith("go on with: python3 train_ann ") and said[-2].endswith(" --resume")
    assert set(os.listdir(tmp_path)) <= {"net.pth.state", "net.pth.part"}
