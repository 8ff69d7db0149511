"""Networks and data of the user's own, by file, module and package, as the command line names them."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import python

import ann2snn
import predict
import train_ann
from build_network import choose_input, get_net_by_name, input_shape
from datasets import get_dataset
from runtime.user_code import assignments, load_code, names_code, names_in
from spike_dag import load_dag

NET = """
import torch
from torch import nn
from layers import block
from datasets import CHANNELS


class Net(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.features = nn.Sequential(block(CHANNELS, width), nn.MaxPool2d(2))
        self.fc = nn.Linear(9 * width, num_classes)

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


def small(in_channels, num_classes):
    assert in_channels == 1
    return Net(num_classes, width=2)


def fails(num_classes):
    return undefined


def leaves(num_classes):
    raise SystemExit("no")


class Typo(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(36, 2)

    def forward(self, x):
        return self.fcc(x.flatten(1))


def number():
    return 3


ready = Net(2)
Net.input_shape = (1, 6, 6)
"""
LAYERS = "from .blocks import block\n"
BLOCKS = """
from torch import nn


def block(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
"""
DATA = """
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

CHANNELS = 1


def images(count, seed=0):
    torch.manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = torch.rand(count, 1, 6, 6)
    pixels[:, :, :3] += labels.view(-1, 1, 1, 1).float()
    return TensorDataset(pixels, labels)


def both():
    return images(40), images(20, 1)


def named():
    return {"train": DataLoader(images(40), 8), "test": DataLoader(images(20, 1), 5), "calibration": images(16, 2)}


def one():
    return images(50)


class Named(Dataset):
    classes = ["low", "high"]

    def __init__(self, count):
        self.inside = images(count)

    def __len__(self):
        return len(self.inside)

    def __getitem__(self, index):
        return self.inside[index]


def with_names():
    return Named(40), Named(20)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([images(40)[i] for i in range(40)])


def stream():
    return DataLoader(Stream(), 8), DataLoader(Stream(), 8)


def wrong():
    return 3


def fails():
    return open("/nowhere/at/all")


def empty():
    return [], []
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder whose files have the names of the toolkit's own: net.py, layers/, datasets.py."""
    (tmp_path / "layers").mkdir()
    for name, text in (("net", NET), ("datasets", DATA), ("layers/__init__", LAYERS), ("layers/blocks", BLOCKS)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaders(dataset, **options):
    return get_dataset(SimpleNamespace(dataset=dataset, **options))


# ---------------------------------------------------------------------------------------------------------------------
# networks


def test_a_file_of_the_names_of_the_toolkit_is_imported_beside_it(project):
    ours = {name: sys.modules[name] for name in ("layers", "datasets", "layers.base")}
    net = get_net_by_name(f"{project}/net.py:Net", 3, 5, net_args={"width": 6})
    assert net.fc.weight.shape == (5, 54) and net.features[0][0].weight.shape == (6, 1, 3, 3)
    assert all(sys.modules[name] is module for name, module in ours.items()) and "layers.blocks" not in sys.modules
    again = get_net_by_name(f"{project}/net.py:Net", 3, 5)
    assert type(again) is type(net)  # the file ran once


def test_files_of_one_name_in_two_folders_are_two_networks(project):
    for width in (2, 3):
        (project / f"v{width}").mkdir()
        (project / f"v{width}" / "net.py").write_text(f"from torch import nn\nNet = lambda: nn.Linear({width}, 1)\n")
    nets = [get_net_by_name(f"v{width}/net.py:Net", 1, 2) for width in (2, 3, 2)]
    assert [net.weight.shape[1] for net in nets] == [2, 3, 2] and "net" not in sys.modules


@pytest.mark.parametrize("name, width", [("net.py:Net", 4), ("net:Net", 4), ("net.py:small", 2), ("net:ready", 4)])
def test_a_class_a_function_or_an_instance_makes_the_network(project, name, width):
    net = get_net_by_name(name, 1, 2)
    assert net.fc.weight.shape == (2, 9 * width)
    assert get_net_by_name("net:ready", 1, 2) is not get_net_by_name("net:ready", 1, 2)


def test_a_file_in_a_package_may_import_relatively(project):
    (project / "kit" / "models").mkdir(parents=True)
    (project / "kit" / "__init__.py").write_text("")
    (project / "kit" / "models" / "__init__.py").write_text("")
    (project / "kit" / "models" / "head.py").write_text("from ..parts import head\n")
    (project / "kit" / "parts.py").write_text(
        "from torch import nn\nhead = lambda num_classes: nn.Linear(3, num_classes)\n"
    )
    assert get_net_by_name(f"{project}/kit/models/head.py:head", 1, 7).weight.shape == (7, 3)


def test_a_package_is_named_by_its_module(project):
    net = get_net_by_name("torchvision.models:resnet18", 3, 7, net_args={"num_classes": 4})
    assert net.fc.weight.shape == (4, 512)


def test_the_network_says_what_it_reads(project):
    assert input_shape("net.py:Net") == (1, 6, 6) and input_shape("net.py:small") == (None, None, None)
    args = SimpleNamespace(net_name="net.py:small", input_shape=None)
    choose_input(args)
    assert (args.channels, args.image_size) == (None, None)
    args = SimpleNamespace(net_name="net.py:small", input_shape=(3, 8, 6))
    choose_input(args)
    assert (args.channels, args.image_size) == (3, (8, 6))


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("net.py:fails", {}, r"net.py:fails failed: NameError: name 'undefined' is not defined \(.*/net.py, line 24\)"),
        ("net.py:leaves", {}, r"net.py:leaves failed: SystemExit: no \(.*/net.py, line 28\)"),
        ("net.py:number", {}, "net.py:number returns a int, it has to return a torch.nn.Module"),
        ("net.py:CHANNELS", {}, "net.py:CHANNELS is a int, name a class or function that makes a network"),
        ("net.py:Nett", {}, "net.py:Nett: there is no Nett, did you mean Net?"),
        ("net.py:Net", {"wide": 3}, "net.py:Net has no argument wide, it has num_classes, width, did you mean width?"),
        ("layers/blocks.py:block", {}, "block needs the argument a, give it with --net_args a=VALUE"),
        ("gone.py:Net", {}, "no file gone.py, which gone.py:Net names"),
        ("gone.net:Net", {}, "gone.net:Net: there is no module gone in .* or among the packages"),
        ("broken.py:Net", {}, r"broken.py:Net failed: SyntaxError: .* \(.*/broken.py, line 1\)"),
        ("needs.py:Net", {}, r"needs.py:Net failed: No module named 'not_there' \(.*/needs.py, line 1\)"),
    ],
)
def test_an_error_of_the_users_code_is_one_line(project, name, arguments, message):
    (project / "broken.py").write_text("def (\n")
    (project / "needs.py").write_text("import not_there\n")
    with pytest.raises((ValueError, OSError), match=message):
        get_net_by_name(name, 1, 2, net_args=arguments)


def test_arguments_are_for_own_networks():
    with pytest.raises(ValueError, match="--net_args are for networks of your own and timm:NAME, example_net takes"):
        get_net_by_name("example_net", net_args={"width": 3})
    with pytest.raises(ValueError, match=r"unknown network 'exampel_net', choose one of .* did you mean example_net?"):
        get_net_by_name("exampel_net")


def test_assignments_are_literals_or_text():
    text = "width=24,stages=(1, 2),name=small,on=True,rate=0.5"
    assert assignments(text) == {"width": 24, "stages": (1, 2), "name": "small", "on": True, "rate": 0.5}
    with pytest.raises(ValueError, match="'24' has not the form NAME=VALUE"):
        assignments("24")


def test_names_of_code():
    assert names_code("a/b.py:Net") and names_code("a.b:Net.make") and names_code("C:/x/b.py:Net")
    assert not names_code("a/b.py") and not names_code("a-b:Net") and not names_code("digits")
    with pytest.raises(ValueError, match=r"'digits' names no code, use path/to/file.py:callable"):
        load_code("digits")


def test_a_network_of_timm_is_built_for_the_data():
    pytest.importorskip("timm")
    net = get_net_by_name("timm:resnet18", 1, 7, net_args={"drop_rate": 0.5})
    assert net.conv1.weight.shape == (64, 1, 7, 7) and net.fc.weight.shape == (7, 512) and net.drop_rate == 0.5
    assert input_shape("timm:resnet18") == (3, 224, 224)
    with pytest.raises(ValueError, match=r"timm has no network 'resnet-18', see timm.list_models"):
        get_net_by_name("timm:resnet-18")
    with pytest.raises(ValueError, match=r"timm cannot make resnet18: .*unexpected keyword"):
        get_net_by_name("timm:resnet18", net_args={"no_such": 3})


# ---------------------------------------------------------------------------------------------------------------------
# data


@pytest.mark.parametrize(
    "name, sizes", [("both", (20, 0, 40, 40)), ("one", (10, 0, 40, 40)), ("with_names", (20, 0, 40, 40))]
)
def test_datasets_become_loaders(project, name, sizes):
    found = loaders(f"datasets.py:{name}", batch_size=8, test_batch_size=5)
    assert tuple(len(loader.dataset) for loader in found) == sizes
    images = found[0].dataset
    assert images.num_classes == 2 and images.channels == 1 and images.preprocessing.shape == (1, 6, 6)
    assert images.classes == (("low", "high") if name == "with_names" else ())
    batches = list(found[0])
    assert sum(len(x) for x, _ in batches) == sizes[0] and batches[0][0].shape[0] == 5
    assert torch.equal(images[3][0], batches[0][0][3])


def test_loaders_are_used_as_they_are(project):
    test, _, train, calibration = loaders("datasets:named")
    assert [len(x) for x, _ in train] == [8] * 5 and [len(x) for x, _ in test] == [5] * 4
    assert sum(len(x) for x, _ in calibration) == 16 and test.dataset.num_classes == 2
    streams = loaders("datasets:stream")
    assert [len(x) for x, _ in streams[0]] == [8] * 5 and streams[0].dataset.num_classes == 2


def test_validation_images_are_held_out_of_a_dataset(project):
    _, val, train, _ = loaders("datasets.py:both", val_share=0.25)
    assert (len(val.dataset), len(train.dataset)) == (10, 30)
    with pytest.raises(ValueError, match=r"--val_share 0.25 needs a torch Dataset, datasets:named returns a stream"):
        loaders("datasets:named", val_share=0.25)


@pytest.mark.parametrize(
    "name, message",
    [
        ("wrong", r"datasets.py:wrong returns an int, it has to return \(train, test\)"),
        ("fails", r"datasets.py:fails failed: FileNotFoundError: .*nowhere.* \(.*/datasets.py, line \d+\)"),
        ("empty", "datasets.py:empty returns data without any sample"),
        ("CHANNELS", "datasets.py:CHANNELS is a int, name a function that returns"),
    ],
)
def test_data_that_are_none_are_refused(project, name, message):
    with pytest.raises(ValueError, match=message):
        loaders(f"datasets.py:{name}")


# ---------------------------------------------------------------------------------------------------------------------
# one command


def test_one_command_converts_it_and_the_file_predicts(project, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(sys, "argv", ["ann2snn.py"])
    torch.manual_seed(0)
    torch.save(get_net_by_name("net.py:Net", 1, 2).state_dict(), "weights.pth")
    flags = "net.py:Net --dataset datasets.py:with_names --ann_weight weights.pth -e 2 --weight_bitwidth 8"
    ann2snn.main(ann2snn.parse_args(flags.split()))
    said = capsys.readouterr()
    assert "images of datasets.py:with_names: 1x6x6, prepared by the user's own code" in said.err
    assert "max pooling: gate, the largest spike count of a window passes" in said.err
    assert "top-1 % by timestep: T=1 " in said.out and "T=8 " in said.out
    assert "next: python3 show.py out_snn.pth" in said.out
    snn = load_dag("out_snn.pth")
    assert snn.preprocessing["classes"] == ["low", "high"] and snn.preprocessing["mean"] is None
    Image.new("L", (6, 6), 200).save("grey.png")
    run = python("predict.py", project / "out_snn.pth", project / "grey.png", "--mean", "0", "--std", "1", "--top", "1")
    scores = snn(torch.full((1, 1, 6, 6), 200 / 255))[0].softmax(0)
    best = f"{('low', 'high')[scores.argmax()]} {100 * scores.max():.1f} %"
    assert (run.returncode, run.stdout.splitlines()[1].split(maxsplit=1)[1].strip()) == (0, best)
    with pytest.raises(ValueError) as error:
        predict.main(predict.parse_args([str(project / "out_snn.pth"), "grey.png"]))
    assert str(error.value) == (
        f"{project}/out_snn.pth does not hold the normalisation of its images, give --mean and --std"
    )


def test_show_prints_layers_and_memory(project, capsys, monkeypatch):
    import show

    train = loaders("datasets.py:both")[2]
    from snn_weight_setter import trans_ann2snn_weight

    snn = trans_ann2snn_weight(get_net_by_name("net.py:Net", 1, 2), train, "cpu", 4, 4)
    torch.save(snn, "snn.pth")
    show.main(show.parse_args(["snn.pth", "--input_shape", "1,6,6"]))
    said = capsys.readouterr().out.splitlines()
    conv, relu = next(line for line in said if line.startswith("conv1")), next(x for x in said if x.startswith("relu1"))
    weight_q = snn.ops["conv1"].op.weight_q
    assert f"4x6x6   36 in {weight_q.min():g}..{weight_q.max():g}" in " ".join(conv.split()).replace(
        "4x6x6 ", "4x6x6   "
    )
    assert "144" in relu  # 4 * 6 * 6 neurons
    # 36 + 72 weights of 4 bits
    assert "weights: 108, 0.1 KiB packed to their bits" in said
    assert any(line.startswith("timesteps: 4, the next image starts after 4") for line in said)


def test_expect_top1_stops_before_the_work(project):
    torch.save(get_net_by_name("net.py:Net", 1, 2).state_dict(), "weights.pth")
    flags = "net.py:Net --dataset datasets.py:both --ann_weight weights.pth -e 1 --expect_top1 20"
    with pytest.raises(ValueError, match="% of 20 test images, --expect_top1 is 20: look at the normalisation first"):
        ann2snn.main(ann2snn.parse_args(flags.split()))
    assert not (project / "out_snn.pth").exists()


def test_an_own_network_trains_too(project, capsys):
    flags = "net.py:Net --dataset datasets.py:both --epochs 3 --save_file trained.pth --val_share 0 --lr 0.05"
    train_ann.main(train_ann.parse_args(flags.split()))
    said = capsys.readouterr().out
    assert "saved trained.pth" in said
    top1 = re.search(r"test top-1 ([\d.]+) %", said)[1]
    flags = f"net.py:Net --dataset datasets.py:both --ann_weight trained.pth -e 0 --expect_top1 {top1}"
    ann2snn.main(ann2snn.parse_args(flags.split()))


@pytest.mark.parametrize(
    "teacher, split", [("a.py:Net:w.pth", ("a.py:Net", "w.pth")), ("vgg9_bn:x:y", ("vgg9_bn", "x:y"))]
)
def test_a_teacher_may_be_named_by_file(teacher, split):
    assert train_ann.network_and_file(teacher) == split


def test_an_error_of_forward_is_one_line_with_its_place(project):
    flags = "net.py:Typo --dataset datasets.py:both -e 0"
    message = r"the network's forward failed: AttributeError: 'Typo' object has no attribute 'fcc' \(.*, line \d+\)"
    with pytest.raises(ValueError, match=message):
        ann2snn.main(ann2snn.parse_args(flags.split()))


def test_a_shape_that_does_not_fit_names_the_flag(project):
    flags = "net.py:Wide --dataset datasets.py:both -e 0"
    (project / "net.py").write_text(
        (project / "net.py").read_text() + "\n\ndef Wide():\n    return nn.Conv2d(3, 2, 3)\n"
    )
    with pytest.raises(ValueError, match=r"cannot run on an input of .*; the images are 1,6,6, --input_shape C,H,W"):
        ann2snn.main(ann2snn.parse_args(flags.split()))


@pytest.mark.parametrize(
    "name, message",
    [("net.py", "net.py is a file, name the class or function in it, net.py:NAME"), ("w.pth", "w.pth is a checkpoint")],
)
def test_a_file_alone_is_no_network(name, message):
    with pytest.raises(ValueError, match=message):
        get_net_by_name(name)


def test_a_file_alone_names_what_it_defines_and_does_not_run(tmp_path):
    path, many = tmp_path / "some.py", tmp_path / "many.py"
    path.write_text("raise SystemExit\n\nclass Net:\n    pass\n\ndef _own(): ...\n\ndef small(): ...\n")
    many.write_text("".join(f"def f{i}(): ...\n" for i in range(13)))
    assert names_in(path) == " (Net, small)"
    assert names_in(many) == f" ({', '.join(f'f{i}' for i in range(12))}, ...)"
    with pytest.raises(ValueError, match=r"name the class or function in it, \S+some\.py:NAME \(Net, small\)$"):
        get_net_by_name(str(path))


@pytest.mark.parametrize("content", [b"def broken(:\n", b"\0", b"x = 1\n"])
def test_a_file_without_names_has_none_to_offer(tmp_path, content):
    (tmp_path / "some.py").write_bytes(content)
    assert names_in(tmp_path / "some.py") == ""
