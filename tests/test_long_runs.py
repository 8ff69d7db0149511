"""--max_minutes, --log, the estimate of the time left, and --qnet."""

import csv
import sys
import types

import pytest
import torch

import ann2snn
import train_ann
from finetuning.saved import file_of_qnet
from runtime import progress
from runtime.cli import run_script
from runtime.progress import Progress, in_words
from spike_dag import load_dag

NET = """
from torch import nn

def net(in_channels, num_classes):
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, num_classes),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small network, net.py, and weights for it, start.pth."""
    path = tmp_path_factory.mktemp("long")
    (path / "net.py").write_text(NET)
    train(path, path / "start.pth", "--epochs 2 --lr 0.05")
    return path


def arguments(folder, save, flags):
    given = f"{folder}/net.py:net --input_shape 1,8,8 --batch_size 400 {flags} --save_file {save}"
    return given.split()


def train(folder, save, flags):
    train_ann.main(train_ann.parse_args(arguments(folder, save, flags)))


def converting(folder, save, flags):
    return arguments(folder, save, f"--ann_weight {folder}/start.pth {flags}")


def convert(folder, save, flags):
    ann2snn.main(ann2snn.parse_args(converting(folder, save, flags)))


def refused(capsys, folder, save, flags):
    """The one line that begins with error: of a conversion that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_script(ann2snn.main, ann2snn.parse_args(converting(folder, save, flags)))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0].removeprefix("error: ")


# ---------------------------------------------------------------------------------------------------------------------
# A limit of time


def test_a_run_without_time_converts_and_can_go_on(folder, tmp_path, capsys):
    flags = "-e 2 --spike_epochs 1 --timesteps 8"
    convert(folder, tmp_path / "whole.pth", flags)
    convert(folder, tmp_path / "snn.pth", f"{flags} --max_minutes 0")
    said = capsys.readouterr().err
    assert "finetune: the time is over after 0 of 2 epochs" in said
    assert "spike_epochs: the time is over after 0 of 1 epochs" in said
    assert load_dag(tmp_path / "snn.pth").timesteps == 8 and (tmp_path / "snn.pth.state").exists()
    convert(folder, tmp_path / "snn.pth", f"{flags} --resume")
    assert (tmp_path / "snn.pth").read_bytes() == (tmp_path / "whole.pth").read_bytes()
    assert not (tmp_path / "snn.pth.state").exists()


def test_the_limit_ends_a_training_behind_a_batch(folder, tmp_path, monkeypatch, capsys):
    train(folder, tmp_path / "whole.pth", "--epochs 3")
    with monkeypatch.context() as patch:  # four batches an epoch
        patch.setattr(Progress, "is_late", lambda self: (self.epoch, self.batch) == (2, 1))
        train(folder, tmp_path / "net.pth", "--epochs 3 --max_minutes 1")
    assert "train: the time is over after 1.25 of 3 epochs" in capsys.readouterr().err
    assert torch.load(tmp_path / "net.pth", weights_only=True)["epochs"] == 2
    train(folder, tmp_path / "net.pth", "--epochs 3 --resume")
    files = [torch.load(tmp_path / name, weights_only=True) for name in ("net.pth", "whole.pth")]
    assert files[0].keys() == files[1].keys() and files[0]["epochs"] == files[1]["epochs"] == 3
    assert all(torch.equal(value, files[1]["state_dict"][name]) for name, value in files[0]["state_dict"].items())


# ---------------------------------------------------------------------------------------------------------------------
# Logs and the estimate


def rows_of(path):
    with open(path / "training.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_has_a_row_an_epoch(folder, tmp_path, capsys):
    convert(folder, tmp_path / "snn.pth", f"-e 2 --spike_epochs 1 --timesteps 8 --log {tmp_path}/log")
    rows = rows_of(tmp_path / "log")
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("finetune", "1"),
        ("finetune", "2"),
        ("spike_epochs", "1"),
    ]
    assert [float(row["learning_rate"]) for row in rows[:2]] == pytest.approx([0.01, 0.001])
    assert all(0 < float(row["accuracy"]) <= 100 and row["validation_accuracy"] == "" for row in rows)
    for row in rows:  # 1,438 training images
        assert float(row["seconds"]) * float(row["images_per_second"]) == pytest.approx(1438, rel=0.01)


def test_the_log_of_a_training_has_its_losses_and_accuracies(folder, tmp_path, capsys):
    train(folder, tmp_path / "net.pth", f"--epochs 2 --log {tmp_path}/log")
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch ")]
    for row, line in zip(rows_of(tmp_path / "log"), printed, strict=True):
        assert f"training loss {float(row['loss']):.4f}" in line
        assert f"top-1 {float(row['validation_accuracy']):.2f} %" in line


def test_a_resumed_log_has_every_epoch_once(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "is_late", lambda self: (self.epoch, self.batch) == (2, 3))
        train(folder, tmp_path / "net.pth", f"--epochs 3 --log {tmp_path}/log")
    with open(tmp_path / "log" / "training.csv", "a") as file:
        file.write("train,2,9,9,9,9,9,9\n")  # a row that was written before the state of its epoch
    train(folder, tmp_path / "net.pth", f"--epochs 3 --log {tmp_path}/log --resume")
    rows = rows_of(tmp_path / "log")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and rows[1]["loss"] != "9"
    train(folder, tmp_path / "net.pth", f"--epochs 3 --log {tmp_path}/whole")
    for row, whole in zip(rows, rows_of(tmp_path / "whole"), strict=True):
        assert {k: v for k, v in row.items() if "sec" not in k} == {k: v for k, v in whole.items() if "sec" not in k}


def test_tensorboard_gets_the_same_numbers(folder, tmp_path, monkeypatch, capsys):
    given = {}

    class Writer:
        def __init__(self, path):
            assert path == f"{tmp_path}/log"

        def add_scalar(self, name, value, epoch):
            given[name, epoch] = value

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    train(folder, tmp_path / "net.pth", f"--epochs 1 --log {tmp_path}/log")
    assert float(rows_of(tmp_path / "log")[0]["loss"]) == pytest.approx(given["train/loss", 1], rel=1e-5)
    assert "tensorboard" not in capsys.readouterr().err


def test_a_missing_tensorboard_is_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(folder, tmp_path / "net.pth", f"--epochs 1 --log {tmp_path}/log")
    line = "--log: training.csv alone; pip install tensorboard adds files of TensorBoard"
    assert capsys.readouterr().err.splitlines().count(line) == 1 and len(rows_of(tmp_path / "log")) == 1


def test_a_log_that_cannot_be_written_is_refused_before_the_work(folder, tmp_path, capsys):
    (tmp_path / "log").write_text("a file")
    line = refused(capsys, folder, tmp_path / "snn.pth", f"-e 1 --log {tmp_path}/log")
    assert line == f"cannot write into {tmp_path}/log, {tmp_path}/log is a file, name a folder"


def test_the_time_left_is_told_once_where_it_is_over_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    net = torch.nn.Linear(1, 1)
    run = Progress()
    for _ in run.epochs("finetune", 30, net):
        for _ in run.batches([torch.zeros(1, 1)] * 10, "words"):
            now[0] += 4.0
    # 4 s a batch: after 3 of the 300 batches, 297 are left
    assert [line for line in capsys.readouterr().err.splitlines() if "left" in line] == [
        "finetune: 30 epochs, about 20 min left"
    ]


@pytest.mark.parametrize(
    "seconds, words", [(61, "1 min"), (1188, "20 min"), (5400, "1 h 30 min"), (36060, "10 h 01 min")]
)
def test_a_time_in_words(seconds, words):
    assert in_words(seconds) == words


# ---------------------------------------------------------------------------------------------------------------------
# The quantized network


@pytest.mark.parametrize(
    "save, qnet",
    [
        ("out_snn.pth", "out_qnet.pth"),
        ("snn.pth", "qnet.pth"),
        ("a/my_snn_4bit.pth", "a/my_qnet_4bit.pth"),
        ("snn/net.pth", "snn/net_qnet.pth"),
        ("net", "net_qnet"),
    ],
)
def test_the_name_of_the_quantized_network(save, qnet):
    assert file_of_qnet(save) == qnet


@pytest.fixture(scope="module")
def finetuned(folder):
    """A conversion whose quantized network has 8 levels and a scale per channel."""
    convert(folder, folder / "out_snn.pth", "-e 1 --activation_levels 8 --per_channel both --timesteps 8")
    return folder


def test_the_quantized_network_is_converted_again_to_the_same_bits(finetuned, tmp_path, capsys):
    convert(finetuned, tmp_path / "snn.pth", f"--qnet {finetuned}/out_qnet.pth --timesteps 8")
    said = capsys.readouterr().err
    assert (tmp_path / "snn.pth").read_bytes() == (finetuned / "out_snn.pth").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["snn.pth"]
    line = next(line for line in said.splitlines() if line.startswith(f"--qnet {finetuned}/out_qnet.pth: "))
    assert "--activation_levels 8" in line and "--per_channel both" in line and line.count(" --") == 2


@pytest.mark.parametrize("flags", ["--timesteps 4 --threshold mse", "--preset exact --timesteps 4", "--listen auto"])
def test_other_conversions_start_from_it(flags, finetuned, tmp_path):
    convert(finetuned, tmp_path / "snn.pth", f"--qnet {finetuned}/out_qnet.pth {flags}")
    layers = load_dag(tmp_path / "snn.pth").weighted_layers().values()
    assert {layer.weight_bits for layer in layers} == {4}


@pytest.mark.parametrize(
    "flags, difference",
    [
        ("--weight_bitwidth 8", "weight_bitwidth 4, not 8: leave --weight_bitwidth out, or finetune again"),
        ("--activation_levels 4", "activation_levels 8, not 4: leave --activation_levels out, or finetune again"),
        ("--per_channel none", "per_channel both, not none: leave --per_channel out, or finetune again"),
        ("--equalize", "equalize False, not True: leave --equalize out, or finetune again"),
    ],
)
def test_a_flag_that_contradicts_it_is_refused(flags, difference, finetuned, tmp_path, capsys):
    line = refused(capsys, finetuned, tmp_path / "snn.pth", f"--qnet {finetuned}/out_qnet.pth {flags}")
    assert line == f"--qnet {finetuned}/out_qnet.pth was finetuned with {difference}"
    assert list(tmp_path.iterdir()) == []


def test_files_without_a_quantized_network_are_refused(finetuned, tmp_path, capsys):
    spiking, weights, missing = finetuned / "out_snn.pth", finetuned / "start.pth", finetuned / "no.pth"
    line = refused(capsys, finetuned, tmp_path / "snn.pth", f"--qnet {spiking}")
    assert line == f"--qnet {spiking} holds a spiking network, give the quantized one, {finetuned}/out_qnet.pth"
    assert "holds a dict" in refused(capsys, finetuned, tmp_path / "snn.pth", f"--qnet {weights}")
    assert "no.pth does not exist" in refused(capsys, finetuned, tmp_path / "snn.pth", f"--qnet {missing}")


def test_the_quantized_network_of_another_one_is_refused(finetuned, tmp_path, capsys):
    (tmp_path / "net.py").write_text(NET.replace("6", "5"))
    train(tmp_path, tmp_path / "start.pth", "--epochs 1")
    line = refused(capsys, tmp_path, tmp_path / "snn.pth", f"--qnet {finetuned}/out_qnet.pth")
    assert line.startswith(f"--qnet {finetuned}/out_qnet.pth is of another network, see ")
    assert line.endswith(": give the network and the flags that it was finetuned with")


def test_the_result_may_not_replace_the_quantized_network(finetuned, capsys):
    before = (finetuned / "out_qnet.pth").read_bytes()
    line = refused(capsys, finetuned, finetuned / "out_qnet.pth", f"--qnet {finetuned}/out_qnet.pth")
    assert "two results would be written to the same file" in line
    assert (finetuned / "out_qnet.pth").read_bytes() == before


def test_flags_of_the_finetuning_have_no_effect(finetuned, capsys):
    ann2snn.parse_args(["net", "--qnet", f"{finetuned}/out_qnet.pth", "-e", "3", "--finetune_lr", "0.1"])
    said = capsys.readouterr().err
    for flag in ("finetune_epochs", "finetune_lr"):
        assert f"warning: --{flag} has no effect: the network of --qnet is finetuned already" in said
