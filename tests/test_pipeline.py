"""The steps from a trained network to a spiking one: as one call in Python, and as the scripts make them."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ann2snn
from build_network import build_trained_net, get_net_by_name
from networks.checkpoint import load_weights
from pipeline import convert_network, where_they_part
from runtime.flags import memory_in_words
from spike_dag import load_dag

CHECKPOINT = Path(__file__).parents[1] / "checkpoint/example_net_ann.pth"
FAST = {"finetune_epochs": 0, "calibration_samples": 200, "device": "cpu"}


def digits_net():
    return load_weights(get_net_by_name("example_net"), str(CHECKPOINT))


def small_net():
    """A network of the user's own, and its images, labels and one batch as a loader."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    images, labels = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
    return net, [(images, labels)]


def test_one_call_measures_what_ann2snn_measures(digits_loaders, tmp_path):
    """Without finetuning both see the same calibration images."""
    test_loader, _, _, calibration_loader = digits_loaders
    result = convert_network(digits_net(), calibration_loader, test_loader, weight_bitwidth=4, timesteps=4, **FAST)
    results = tmp_path / "results.json"
    flags = f"example_net -e 0 --weight_bitwidth 4 --timesteps 4 --calibration_samples 200 --ann_weight {CHECKPOINT}"
    argv = [*flags.split(), "--results", str(results), "--save_file", str(tmp_path / "snn.pth"), "--device", "cpu"]
    ann2snn.main(ann2snn.parse_args(argv))
    wanted, saved = json.loads(results.read_text()), load_dag(tmp_path / "snn.pth")
    assert (result.ann_top1, result.qnet_top1, result.snn_top1) == (
        wanted["ann_top1"],
        wanted["qnet_top1"],
        wanted["snn_top1"],
    )
    assert list(wanted["seconds"]) == ["data", *result.seconds]
    assert list(result.snn_top1_by_timestep) == list(wanted["snn_top1_by_timestep"].values())
    images = next(iter(test_loader))[0]
    with torch.no_grad():
        assert torch.equal(result.snn(images), saved(images))
    assert {key: value.shape for key, value in result.snn.state_dict().items()} == {
        key: value.shape for key, value in saved.state_dict().items()
    }


def test_one_call_leaves_the_network_as_it_was_and_returns_all_three():
    net, loader = small_net()
    before = copy.deepcopy(net.state_dict())
    result = convert_network(net, loader, loader, timesteps=3, finetune_epochs=1, device="cpu")
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    images = loader[0][0]
    with torch.no_grad():
        assert torch.allclose(result.ann.eval()(images), net.eval()(images), atol=1e-5)
    assert result.qnet.ops["conv1"].op.weight_bits == 4 and result.snn.timesteps == 3 and result.snn.neurons()
    assert len(result.snn_top1_by_timestep) == 3 and result.snn_top1_by_timestep[-1] == result.snn_top1
    assert result.seconds and all(seconds >= 0 for seconds in result.seconds.values())


def test_one_call_without_images_to_measure_on():
    net, loader = small_net()
    result = convert_network(net, loader, timesteps=3, **FAST)
    assert result.accuracies == {} and result.snn(loader[0][0]).shape == (24, 3)


def test_a_preset_reaches_the_network():
    """exact: every layer listens for T steps, so that an image takes twice as long, and its answer T more per layer."""
    net, loader = small_net()
    result = convert_network(net, loader, loader, preset="exact", timesteps=16, device="cpu")
    assert {neuron.listen for neuron in result.snn.neurons().values()} == {16}
    assert result.snn.duration()["interval"] == 32
    assert {layer.weight_bits for layer in result.qnet.weighted_layers().values()} == {8}
    assert {neuron.Vthr.numel() for neuron in result.snn.neurons().values()} == {4}


@pytest.mark.parametrize("levels", [None, 4])
def test_options_reach_every_step(levels):
    net, loader = small_net()
    options = {"activation_levels": levels} if levels else {}
    options |= {"finetune_epochs": 1, "finetune_optimizer": "adam", "per_channel": "both", "equalize": True}
    options |= {"spike_epochs": 1, "spike_epochs_unlabelled": 1, "calibration_samples": 8, "weight_bitwidth": (5, 6)}
    options |= {"engine": "reference", "device": "cpu", "seed": 3, "timesteps": 2}
    result = convert_network(net, loader, loader, **options)
    assert [layer.weight_bits for layer in result.snn.weighted_layers().values()] == [5, 6]
    assert result.qnet.ops["conv1"].op.weight_scale.numel() == 4  # per channel
    assert result.snn.neurons()["relu1"].Vthr.numel() == 4
    assert (result.qnet.ops["relu1"].op.levels is not None) == bool(levels)


def test_the_same_seed_gives_the_same_network():
    net, loader = small_net()
    options = {"timesteps": 2, "finetune_epochs": 2, "spike_epochs": 1, "device": "cpu"}
    first, again = (convert_network(net, loader, **options).snn.state_dict() for _ in range(2))
    assert all(torch.equal(value, again[key]) for key, value in first.items())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"bits": 4}, TypeError, "has no option bits, it has .*weight_bitwidth.*timesteps"),
        ({"timesteps": 0}, ValueError, "timesteps 0: use a whole number, 1 to 65536"),
        ({"timesteps": 2, "listen": 3}, ValueError, "listen 3: use 0 to 2, the timesteps"),
        ({"finetune_lr": -1}, ValueError, "finetune_lr -1: use a number of at least 0"),
        ({"spike_epochs": 0.5}, ValueError, "spike_epochs 0.5: use a whole number, 0 or more"),
        ({"weight_bitwidth": 9}, ValueError, "weight bit width 9: use 1 to 8"),
        ({"preset": "best"}, ValueError, "unknown preset 'best', use one of specification"),
        ({"device": "gpu"}, ValueError, "'gpu'"),
    ],
)
def test_a_wrong_option_is_refused_before_the_work(options, error, message):
    net, loader = small_net()
    with pytest.raises(error, match=message):
        convert_network(net, loader, loader, **options)


def test_what_is_no_network_is_refused_with_what_to_give(small):
    net, images, labels = small
    loader = [(images, labels)]
    with pytest.raises(
        ValueError, match=r"the network is the class Sequential, give an instance, Sequential\(\.\.\.\)"
    ):
        convert_network(torch.nn.Sequential, loader)
    with pytest.raises(ValueError, match=r"the network is a OrderedDict, give a torch\.nn\.Module with its weights"):
        convert_network(net.state_dict(), loader)
    with pytest.raises(TypeError, match="convert_network has no option timestep, did you mean timesteps"):
        convert_network(net, loader, timestep=8)


def test_datasets_may_stand_for_loaders_and_the_result_prints_in_a_line(small):
    net, images, labels = small
    dataset = torch.utils.data.TensorDataset(images, labels)
    result = convert_network(net, dataset, dataset, finetune_epochs=0, timesteps=4, device="cpu")
    assert (
        repr(result)
        == f"Networks(ann {result.ann_top1:.2f} %, qnet {result.qnet_top1:.2f} %, snn {result.snn_top1:.2f} %)"
    )
    again = convert_network(net, [(images, labels)], [(images, labels)], finetune_epochs=0, timesteps=4, device="cpu")
    assert result.ann_top1 == again.ann_top1 and repr(
        convert_network(net, dataset, finetune_epochs=0, timesteps=2)
    ) == ("Networks(not measured)")


@pytest.fixture
def small():
    """A small network, 32 images and their labels."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU(), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 3)).eval(), torch.rand(32, 1, 8, 8), torch.arange(32) % 3


@pytest.mark.parametrize(
    ("shares", "listen", "said"),
    [
        ((0.98, 0.97), 0, None),
        (
            (0.98, 0.03),
            0,
            "on 3 % of 64 calibration images, the quantized one on 98 %: 50 spiking layers at T=32 without ",
        ),
        ((0.98, 0.5), 8, "with --listen 8; try --preset exact or --listen auto"),
        ((0.98, 0.5), 32, "with --listen 32; try more --timesteps"),
        ((0.98, 0.5), "auto", "with --listen auto; try more --timesteps"),
        (
            (0.4, 0.4),
            0,
            "the quantized network agrees with the float one on 40 % of 64 calibration images: 4-bit weights; "
            "try finetuning or more bits or --rounding learnt",
        ),
    ],
)
def test_a_line_says_where_the_networks_part(shares, listen, said):
    args = SimpleNamespace(timesteps=32, listen=listen, weight_bitwidth=4, finetune_epochs=0, rounding="nearest")
    line = where_they_part(*shares, 64, 50, args)
    assert (line is None) if said is None else (said in line)


def test_the_line_comes_for_a_network_that_loses_its_classes(digits_images, capsys):
    """resnet20 at T = 1: 20 layers, each with one spike or none."""
    net = build_trained_net("resnet20", 3, 10, str(CHECKPOINT.with_name("resnet20_cifar10_ann.pth")))
    images = digits_images[:64].expand(-1, 3, -1, -1) * 4 - 2
    options = {"finetune_epochs": 0, "weight_bitwidth": 8, "device": "cpu"}
    convert_network(net, [(images, None)], timesteps=1, **options)
    assert "spiking layers at T=1 without listening; try --preset exact" in capsys.readouterr().err


@pytest.mark.parametrize("budget, said", [(2**30, ""), (1000, "--memory_budget 1000 is too small: one image")])
def test_a_memory_budget_that_is_too_small_says_what_is_needed(budget, said, digits_loaders, capsys):
    snn = convert_network(digits_net(), digits_loaders[3], timesteps=2, memory_budget=budget, **FAST).snn
    line = "".join(each for each in capsys.readouterr().err.splitlines(True) if "budget" in each)
    assert line.startswith(said) and bool(line) == bool(said)
    size = snn.largest_sample((torch.zeros(1, 1, 32, 32),))
    if said:
        assert line.endswith(f"takes about {memory_in_words(16 * size * torch.get_num_threads())}\n")
