"""train_ann.py: averaged weights, and the flags that need others."""

import pytest
import torch
from torch import nn

import build_network
import train_ann
from runtime.cli import run_script

START = "checkpoint/example_net_ann.pth"


def train(tmp_path, *flags):
    """The weights after one epoch on the digits."""
    file = tmp_path / "ann.pth"
    argv = ["example_net", "--epochs", "1", "--lr", "0.01", "--ann_weight", START, "--save_file", str(file), *flags]
    train_ann.main(train_ann.parse_args(argv))
    return torch.load(file, weights_only=True)["state_dict"]


def test_average_is_the_mean_of_start_and_end(tmp_path, capsys):
    start = torch.load(START, weights_only=True)["state_dict"]
    end, mean = train(tmp_path), train(tmp_path, "--average", "2")
    for name, value in start.items():
        assert not torch.equal(end[name], value)
        assert torch.allclose(mean[name], (2 * value + end[name]) / 3, atol=1e-7)
    assert "test top-1 9" in capsys.readouterr().out


def test_an_interrupted_training_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ann.pth"]
    before, train_epoch = (tmp_path / "ann.pth").read_bytes(), train_ann.train_epoch

    def interrupt_second(*args):
        if "epoch 2" in args:
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr(train_ann, "train_epoch", interrupt_second)
    line = f"example_net --epochs 2 --lr 0.01 --save_file {tmp_path}/ann.pth"
    with pytest.raises(SystemExit) as end:
        run_script(train_ann.main, train_ann.parse_args(line.split()))
    assert end.value.code == 130 and "interrupted, no result is half-written" in capsys.readouterr().err
    assert (tmp_path / "ann.pth").read_bytes() == before
    assert torch.load(tmp_path / "ann.pth.part", weights_only=True)["epochs"] == 1


def test_average_estimates_batch_norms_anew():
    torch.manual_seed(0)
    net, other = (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)) for _ in range(2))
    images = torch.randn(40, 1, 4, 4)
    train_ann.average_weights(net, other.state_dict(), 1, [(part, None) for part in images.split(20)], "cpu")
    outputs = net[0](images)
    assert torch.allclose(net[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(net[1].running_var, outputs.var((0, 2, 3)), rtol=0.05)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("vgg9_bn:vgg9.pth", ("vgg9_bn", "vgg9.pth")),
        ("torchvision:resnet18:r18.pth", ("torchvision:resnet18", "r18.pth")),
        ("torchvision:resnet18:/data/a:b.pth", ("torchvision:resnet18", "/data/a:b.pth")),
        ("vgg9_bn:a:b.pth", ("vgg9_bn", "a:b.pth")),
    ],
)
def test_a_teacher_is_a_network_and_a_file(text, parts):
    assert train_ann.network_and_file(text) == parts


@pytest.mark.parametrize("text", ["", "vgg9_bn", "vgg9_bn:", ":a.pth", "torchvision:resnet18", "torchvision::a.pth"])
def test_a_teacher_without_a_file_or_a_name_is_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        argv = ["debug_net0", "--dataset", "debug0", "--teacher", text, "--save_file", str(tmp_path / "ann.pth")]
        run_script(train_ann.main, train_ann.parse_args(argv))
    assert end.value.code == 2 and f"--teacher '{text}' is no network with a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_torchvision_teaches(tmp_path, capsys, monkeypatch):
    teacher = build_network.get_net_by_name("example_net")
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    asked = []
    monkeypatch.setattr(build_network, "build_trained_net", lambda *args: asked.append(args) or teacher)
    argv = f"example_net --epochs 1 --lr 0.01 --teacher torchvision:resnet18:{tmp_path}/teacher.pth"
    train_ann.main(train_ann.parse_args([*argv.split(), "--save_file", str(tmp_path / "ann.pth")]))
    assert asked == [("torchvision:resnet18", 1, 10, f"{tmp_path}/teacher.pth")]


def test_average_needs_weights_to_average_with(capsys):
    with pytest.raises(SystemExit) as end:
        run_script(train_ann.main, train_ann.parse_args(["example_net", "--average", "1"]))
    assert end.value.code == 2
    assert capsys.readouterr().err.strip() == (
        "error: --average needs the weights to average with, name them by --ann_weight"
    )
