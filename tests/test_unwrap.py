"""Checkpoints of every usual form: what is unwrapped, what the line says, and what is refused as another network's."""

import argparse
import builtins
import collections
import contextlib
import copy
import importlib.util
import os
import pathlib
import pickle
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from build_network import build_trained_net, get_net_by_name
from networks.checkpoint import find_weights, load_weights


class Net(nn.Module):
    """A convolution, a BatchNorm, a block and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(2)
        self.block = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        self.fc = nn.Linear(3, 4)

    def forward(self, x):  # [B, 1, 3, 3]
        return self.fc(self.block(self.bn(self.conv(x))).relu().flatten(1))


def state_of(net=None, seed=1):
    """A state dict with random numbers, the counters of BatchNorms among them."""
    generator = torch.Generator().manual_seed(seed)
    state = (net or Net()).state_dict()
    return {
        name: torch.rand(t.shape, generator=generator) if t.is_floating_point() else torch.tensor(seed)
        for name, t in state.items()
    }


def beginning(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def without_counters(state):
    return {name: tensor for name, tensor in state.items() if "num_batches" not in name}


STATE, OTHER = state_of(), state_of(seed=2)
SGD = torch.optim.SGD(Net().parameters(), 0.1, momentum=0.9)
ADAM = torch.optim.Adam(Net().parameters())
for parameter in ADAM.param_groups[0]["params"]:
    parameter.grad = torch.ones_like(parameter)
ADAM.step()


def lightning(state, **beside):
    return {"epoch": 3, "state_dict": {**beginning("model.", state), **beside}, "optimizer_states": [ADAM.state_dict()]}


PROFILED = {
    "total_ops": torch.zeros(1, dtype=torch.float64),
    "conv.total_params": torch.zeros(1, dtype=torch.float64),
    "criterion.weight": torch.ones(4),
}
# What was saved, and the line about it behind the file's name; None for no line. All hold STATE.
FORMS = {
    "plain": (STATE, None),
    "ordered": (collections.OrderedDict(STATE), None),
    "train_ann.py": ({"state_dict": STATE, "epoch": 3}, None),
    "parameters": ({name: nn.Parameter(t, t.is_floating_point()) for name, t in STATE.items()}, None),
    **{
        key: ({key: STATE, "epoch": 3, "best_prec1": 91.2, "optimizer": ADAM.state_dict()}, f'weights under "{key}"')
        for key in ("model", "model_state_dict", "net", "ema", "ema_state_dict", "state_dict_ema", "module", "network")
        + ("weights", "params_ema", "generator", "best")
    },
    "deep": ({"checkpoint": {"model": STATE}}, 'weights under "checkpoint" > "model"'),
    **{
        prefix: (beginning(prefix, STATE), f'prefix "{prefix}" removed')
        for prefix in ("module.", "_orig_mod.", "model.", "net.", "backbone.", "a.b.", "module._orig_mod.model.")
    },
    "parallel features": (
        {name.replace("block.", "block.module."): tensor for name, tensor in STATE.items()},
        "module taken out of names",
    ),
    "parallel, under a key": (
        {"state_dict": beginning("module.", STATE), "best_prec1": 91.2},
        'weights under "state_dict", prefix "module." removed',
    ),
    "SWA": (
        {"n_averaged": torch.tensor(3), **beginning("module.", STATE)},
        'prefix "module." removed, 1 extra tensor ignored (n_averaged)',
    ),
    "Lightning": (lightning(STATE), 'weights under "state_dict", prefix "model." removed'),
    "Lightning with a loss": (
        lightning(STATE, **{"criterion.weight": torch.ones(4), "val_acc.tp": torch.tensor(3)}),
        'weights under "state_dict", prefix "model." removed, 2 extra tensors ignored (criterion.weight, val_acc.tp)',
    ),
    "Lightning with EMA": (
        lightning(OTHER, **beginning("ema_model.", STATE)),
        'weights under "state_dict", not those under "state_dict" with the prefix "model.", which fit too, '
        'prefix "ema_model." removed',
    ),
    "profiler": (
        {**STATE, **PROFILED},
        "3 extra tensors ignored (total_ops, conv.total_params, criterion.weight)",
    ),
    "profiler in parallel": (
        beginning("module.", {**STATE, **PROFILED, "loss.centers": torch.ones(2, 2)}),
        'prefix "module." removed, 4 extra tensors ignored (module.total_ops, module.conv.total_params, '
        "module.criterion.weight, ...)",
    ),
    "auxiliary head": (
        {**STATE, "aux1.conv.weight": torch.ones(2, 2), "aux1.conv.bias": torch.ones(2)},
        "2 extra tensors ignored (aux1.conv.weight, aux1.conv.bias)",
    ),
    "class weights beside": (
        {**beginning("model.", STATE), "class_balance": torch.ones(4)},
        'prefix "model." removed, 1 extra tensor ignored (class_balance)',
    ),
    "raw and EMA": (
        {"model": OTHER, "model_ema": beginning("module.", STATE)},
        'weights under "model_ema", not those under "model", which fit too, prefix "module." removed',
    ),
    "EMA without BatchNorm": (
        {"ema": {name: tensor for name, tensor in OTHER.items() if "running" not in name}, "model": STATE},
        'weights under "model"',
    ),
    "usual and unusual": (
        {"first_epoch": OTHER, "model": STATE},
        'weights under "model", not those under "first_epoch", which fit too',
    ),
    "twice the same": ({"model": STATE, "state_dict": dict(STATE)}, 'weights under "model"'),
    "settings": (
        {"net": STATE, "args": argparse.Namespace(lr=0.1, path=pathlib.Path("/data")), "acc": np.float64(91.2)},
        'weights under "net"',
    ),
    "history": (
        {"net": STATE, "curve": np.arange(3.0), "best": np.float32(3), "log": collections.defaultdict(list, a=[1])},
        'weights under "net"',
    ),
    "old BatchNorm": (without_counters(STATE), "2 num_batches_tracked missing (not needed)"),
}


def load(path, net=None):
    """The state dict of a network after the weights of a file."""
    return load_weights(net or Net(), path).state_dict()


def assert_holds(loaded, state):
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_and_says_what_it_was(tmp_path, capsys, form, is_zip):
    saved, note = FORMS[form]
    path = tmp_path / "best.pth.tar"
    torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
    loaded = load(path)
    assert_holds(loaded, STATE if "num_batches" not in (note or "") else without_counters(STATE))
    line = "" if note is None else f"checkpoint {path}: {note}"
    assert capsys.readouterr() == ("", line and line + "\n")
    assert find_weights(Net(), path).note == line


def test_the_tests_weights_differ_from_new_ones():
    """Otherwise the tests above could pass without loading anything."""
    assert not any(torch.equal(tensor, OTHER[name]) for name, tensor in STATE.items())
    assert not any(torch.equal(tensor, STATE[name]) for name, tensor in Net().state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}
    torch.save({"model": beginning("module.", state)}, tmp_path / "net.pth")
    loaded = load(tmp_path / "net.pth")
    assert loaded["conv.weight"].dtype == torch.float32
    assert_holds(loaded, {name: tensor.to(STATE[name].dtype) for name, tensor in state.items()})


def test_a_line_from_build_trained_net(tmp_path, capsys):
    state = state_of(get_net_by_name("resnet20", 3, 10))
    torch.save({"net": beginning("module.", without_counters(state)), "acc": 91.0}, tmp_path / "net.pth")
    net = build_trained_net("resnet20", 3, 10, tmp_path / "net.pth")
    assert_holds(net.state_dict(), without_counters(state))
    note = 'weights under "net", prefix "module." removed, 21 num_batches_tracked missing (not needed)'
    assert capsys.readouterr() == ("", f"checkpoint {tmp_path / 'net.pth'}: {note}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Networks that are wrapped themselves, and networks with parametrizations


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential, lambda net: nn.Sequential(nn.Identity(), net)])
def test_a_network_under_a_prefix_that_the_file_lacks(tmp_path, wrap):
    net = wrap(Net())
    torch.save({"model": STATE}, tmp_path / "net.pth")
    found = find_weights(net, tmp_path / "net.pth")
    net.load_state_dict(found.state)
    prefix = next(iter(net.state_dict())).removesuffix("conv.weight")
    assert_holds(net.state_dict(), beginning(prefix, STATE))
    words = "wrappers added to names" if prefix == "module." else f'prefix "{prefix}" added'
    assert found.note.endswith(f'weights under "model", {words}')


def test_a_wrapped_network_and_its_own_file(tmp_path):
    net = nn.DataParallel(Net())
    torch.save(beginning("module.", STATE), tmp_path / "net.pth")
    found = find_weights(net, tmp_path / "net.pth")
    assert found.note == ""
    assert_holds(found.state, beginning("module.", STATE))


PARAMETRIZATIONS = {
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "weight norm, dim 1": lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=1),
    "weight norm of all": lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=None),
    "old weight norm": lambda layer: nn.utils.weight_norm(layer),
    "pruning": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


def parametrized(name):
    """A network with new weights whose convolutions have a parametrization."""
    net = Net()
    for layer in (net.conv, net.block[0]):
        PARAMETRIZATIONS[name](layer)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.rand_like(parameter))
    net(torch.zeros(2, 1, 3, 3))  # old weight norm computes the weight in a forward
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrized_weights_are_computed(tmp_path, name):
    net = parametrized(name).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    found = find_weights(Net(), tmp_path / "net.pth")
    assert found.note.endswith("2 weights computed of two tensors (conv.weight, block.0.weight)")
    plain = Net().eval()
    plain.load_state_dict(found.state)
    images = torch.rand(5, 1, 3, 3)
    torch.testing.assert_close(plain.conv.weight, net.conv.weight)
    torch.testing.assert_close(plain(images), net(images))


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_has_weight_norm_itself(tmp_path):
    net = parametrized("weight norm")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    found = find_weights(parametrized("weight norm"), tmp_path / "net.pth")
    assert found.note == ""
    assert_holds(found.state, net.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normalise", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_is_refused_with_advice(tmp_path, normalise):
    net = Net()
    normalise(net.conv)
    message = (
        r"lacks the tensor conv\.weight \[2, 1, 3, 3\] .*, it has conv\..*orig.*, of which .*: undo the parametrization"
    )
    assert_refused(net.state_dict(), message, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def save_safetensors(state, path):
    pytest.importorskip("safetensors.torch").save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_safetensors_by_their_contents(tmp_path, name, prefix):
    save_safetensors(beginning(prefix, STATE), tmp_path / name)
    found = find_weights(Net(), tmp_path / name)
    assert_holds(found.state, STATE)
    assert found.note.endswith(f'prefix "{prefix}" removed' if prefix else "")


def test_a_file_of_torch_with_the_name_of_safetensors(tmp_path):
    torch.save(STATE, tmp_path / "model.safetensors")
    assert_holds(load(tmp_path / "model.safetensors"), STATE)


def test_truncated_safetensors(tmp_path):
    save_safetensors(STATE, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for size in (20, 200, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ValueError, match="cut cannot be read: it is a safetensors file, truncated or damaged"):
            load(tmp_path / "cut")


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    save_safetensors(STATE, tmp_path / "net")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "safetensors" else find(name))
    with pytest.raises(
        ValueError, match=r"net is a safetensors file and needs safetensors, .*: pip install safetensors"
    ):
        load(tmp_path / "net")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def assert_refused(saved, message, folder, net=None):
    """A file is refused in one line, and the network stays as it is."""
    torch.save(saved, folder / "net.pth")
    net = net or Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=rf"the checkpoint {folder / 'net.pth'} .*{message}") as refusal:
        load(folder / "net.pth", net)
    assert "\n" not in str(refusal.value)
    assert_holds(net.state_dict(), before)


DEEPER = {**STATE, "block.2.weight": torch.ones(3, 3, 1, 1), "block.2.bias": torch.ones(3)}
REFUSED = {
    "missing": (
        {name.replace("fc.", "head."): tensor for name, tensor in STATE.items()},
        r"lacks the tensor fc\.weight \[4, 3\] of the network, the nearest name in it is head\.weight \[4, 3\]",
    ),
    "missing, other names": (
        {name.replace("fc.", "x_012345_"): tensor for name, tensor in STATE.items()},
        r"lacks the tensor fc\.weight \[4, 3\] of the network, it has others \(x_012345_weight, x_012345_bias\)",
    ),
    "misspelt": (
        beginning("module.", {name.replace("block.1.r", "block1.r"): tensor for name, tensor in STATE.items()}),
        r"lacks the tensor block\.1\.running_mean \[3\] .*nearest name in it is module\.block1\.running_mean \[3\]",
    ),
    "without running statistics": (
        {name: tensor for name, tensor in STATE.items() if "running" not in name},
        r"lacks the tensor bn\.running_mean \[2\]",
    ),
    "another shape": (
        {"model": beginning("module.", {**STATE, "fc.weight": torch.ones(5, 3)})},
        r"does not fit the network: module\.fc\.weight is \[5, 3\] in the file and \[4, 3\] in the network",
    ),
    "NaN": ({"net": {**STATE, "fc.bias": torch.full((4,), torch.nan)}}, r"has NaN or infinite values in fc\.bias"),
    "NaN in the EMA": (
        {"net": STATE, "ema": {**OTHER, "conv.weight": torch.full((2, 1, 3, 3), torch.inf)}},
        r"has NaN or infinite values in conv\.weight",
    ),
    "bias that the network lacks": (
        {**STATE, "conv.bias": torch.ones(2)},
        r"holds the tensor conv\.bias \[2\], which the network does not have, so it is of another network",
    ),
    "deeper": (DEEPER, r"holds the tensor block\.2\.weight \[3, 3, 1, 1\] \(and 1 more\), which the network does not"),
    "deeper, in parallel": (beginning("module.", DEEPER), r"holds the tensor module\.block\.2\.weight"),
    "deeper, Lightning": (lightning(DEEPER), r"holds the tensor model\.block\.2\.weight"),
    "another head": ({**STATE, "fc2.weight": torch.ones(2, 4)}, r"holds the tensor fc2\.weight \[2, 4\]"),
    "a head beside the backbone": (
        {**beginning("backbone.", STATE), "head.weight": torch.ones(2, 4), "head.bias": torch.ones(2)},
        r"holds the tensor head\.weight \[2, 4\] \(and 1 more\)",
    ),
    "a norm beside the backbone": (
        {**beginning("backbone.", STATE), "norm.running_mean": torch.ones(4)},
        r"holds the tensor norm\.running_mean \[4\]",
    ),
    "normalisation inside": ({**STATE, "mean": torch.ones(1)}, r"holds the tensor mean \[1\]"),
    "an auxiliary layer within a block": ({**STATE, "block.aux.weight": torch.ones(2)}, r"tensor block\.aux\.weight"),
    "a counter of another shape": ({**STATE, "total_ops": torch.ones(2, 2)}, r"holds the tensor total_ops \[2, 2\]"),
    "student and teacher": (
        {"student": STATE, "teacher": OTHER},
        r'holds weights that fit under "student" and under "teacher", save those to use alone',
    ),
    "student and teacher in one": (
        {**beginning("student.", STATE), **beginning("teacher.", OTHER)},
        r'holds weights that fit with the prefix "student\." and with the prefix "teacher\."',
    ),
    "the network twice": (
        {**STATE, **beginning("old.", OTHER)},
        r"holds the tensor old\.conv\.weight .* \(and 14 more\)",
    ),
    "optimizer": (ADAM.state_dict(), r"holds the state of an optimizer and no weights, save it with"),
    "optimizer without state": (SGD.state_dict(), r"holds the state of an optimizer and no weights"),
    "numbers": ({"epoch": 3, "acc": 91.0}, r"holds no state dict, save it with torch\.save"),
    "list": (list(STATE.values()), r"holds no state dict"),
    "tensor": (torch.zeros(3), r"holds no state dict"),
    "empty": ({}, r"holds no state dict"),
    "another network": (
        state_of(get_net_by_name("resnet20", 3, 10)),
        r"lacks the tensor conv\.weight \[2, 1, 3, 3\] of the network",
    ),
    "weights as arrays": ({name: tensor.numpy() for name, tensor in STATE.items()}, r"holds no state dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, case):
    assert_refused(*REFUSED[case], tmp_path)


def test_a_dict_that_contains_itself(tmp_path):
    saved = {"net": STATE}
    saved["again"] = saved
    torch.save(saved, tmp_path / "net.pth")
    assert_holds(load(tmp_path / "net.pth"), STATE)


def test_a_large_network_with_its_optimizer_is_found_in_seconds(tmp_path):
    net = nn.Sequential(*[nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)) for _ in range(200)])
    optimizer = torch.optim.Adam(net.parameters())
    sum(parameter.sum() for parameter in net.parameters()).backward()
    optimizer.step()
    state = state_of(net)
    torch.save({"optimizer": optimizer.state_dict(), "net": beginning("module.", state)}, tmp_path / "net.pth")
    start = time.perf_counter()
    assert_holds(find_weights(net, tmp_path / "net.pth").state, state)
    assert time.perf_counter() - start < 10  # about 1 s on one core


# ---------------------------------------------------------------------------------------------------------------------
# Planted code


class Planted:
    """A pickle that calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PLANTS = {
    "eval": lambda marker: Planted(eval, f"open({marker!r}, 'w')"),
    "exec": lambda marker: Planted(exec, f"open({marker!r}, 'w')"),
    "open": lambda marker: Planted(builtins.open, marker, "w"),
    "system": lambda marker: Planted(os.system, f"touch {marker}"),
    "mkdir": lambda marker: Planted(os.mkdir, marker),
    "getattr": lambda marker: Planted(getattr, Planted(pathlib.Path, marker), "touch"),
}
PLACES = {
    "alone": lambda plant: plant,
    "beside": lambda plant: {"state_dict": STATE, "acc": plant},
    "within": lambda plant: {"state_dict": {**STATE, "fc.bias": plant}},
    "in settings": lambda plant: {"net": STATE, "args": argparse.Namespace(lr=plant)},
    "in a path": lambda plant: {"net": STATE, "args": Planted(pathlib.PosixPath, plant)},
    "in a dict": lambda plant: {"net": STATE, "log": Planted(collections.defaultdict, plant)},
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("plant", PLANTS)
def test_no_planted_code_runs(tmp_path, plant, place, is_zip):
    marker, path = tmp_path / "marker", tmp_path / "net.pth"
    torch.save(PLACES[place](PLANTS[plant](str(marker))), path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        ValueError, match=r"net\.pth cannot be read: it holds Python objects \((\w+\.)?\w+\), which are not"
    ):
        load(path)
    assert not marker.exists()
    if plant != "getattr":
        with contextlib.suppress(TypeError):  # where the place does not take what the plant returns
            pickle.loads(pickle.dumps(PLACES[place](PLANTS[plant](str(marker)))))
        assert marker.exists()  # the plant works where it is let run
