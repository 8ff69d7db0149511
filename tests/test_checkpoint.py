"""Checkpoints of weights: damaged ones, tensors that are no weights, and files of other kinds, of networks too."""

import builtins
import fractions
import io
import os
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from helpers import saved_bytes
from torch import nn

from build_network import get_net_by_name
from networks.checkpoint import load_weights
from runtime.torch_files import OtherFile, read_torch_file
from spike_dag import load_dag


def load_debug_net(path):
    return load_weights(get_net_by_name("debug_net0"), path)


# ---------------------------------------------------------------------------------------------------------------------
# Checksums


def same_or_refused(path, data, expected):
    """Whether a file of these bytes is refused; a promise that it otherwise holds the same tensors."""
    path.write_bytes(data)
    try:
        loaded = read_torch_file(path)
    except OtherFile:
        return True
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    return False


def test_flipped_bits_are_seen_or_harmless(tmp_path):
    """All bits of what the zip file's directory says of a tensor, one of every fourth byte. Dates carry nothing."""
    expected = {"weight": torch.arange(6.0).view(2, 3)}
    data = saved_bytes(expected)
    entry = data.index(b"PK\x01\x02", data.rindex(b"archive/data/0") - 50)
    bits = [*range(8 * entry, 8 * (entry + 60)), *(8 * i + i // 4 % 8 for i in range(0, len(data), 4))]
    refused = 0
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        refused += same_or_refused(tmp_path / "flipped.pth", damaged, expected)
    assert 0.3 * len(bits) < refused < len(bits)


@pytest.mark.parametrize("part", ["data.pkl", "data/0", "byteorder", "version"])
def test_a_flipped_bit_of_a_part_is_named(tmp_path, part):
    path = tmp_path / "net.pth"
    torch.save(get_net_by_name("debug_net0").state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"net/{part}")
        assert entry.CRC
        contents, data = archive.read(entry), bytearray(path.read_bytes())
    data[data.index(contents, entry.header_offset + 30)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"net\.pth cannot be read: it is damaged, 'net/{part}' in it has changed"):
        load_debug_net(path)


def test_files_without_checksums_load(tmp_path):
    """torch.serialization.set_crc32_options(False), and files from before PyTorch 1.6."""
    state = get_net_by_name("debug_net0").state_dict()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "zeros.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("zeros.pth", "legacy.pth"):
        loaded = load_debug_net(tmp_path / name).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


# ---------------------------------------------------------------------------------------------------------------------
# Other kinds of files


def torchscript(path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(path)


def exported(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


def onnx_model(path):
    import onnx

    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:]))
    onnx.save(model, path)


def numpy_bytes(save):
    file = io.BytesIO()
    save(file, np.zeros(2))
    return file.getvalue()


def writes(data):
    return lambda path: path.write_bytes(data)


def saves(value):
    return lambda path: torch.save(value, path)


def zip_with(name):
    """A function that writes a zip file with one entry."""

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"contents")

    return write


def tar_file(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__)


KINDS = {
    "whole network": (saves(nn.Linear(2, 2)), r"a whole network \(torch\.nn\.modules\.linear\.Linear\), which is not"),
    "network of the user": (
        lambda path: torch.save(get_net_by_name("example_net"), path),
        r"it holds a whole network \(build_network\.ExampleNet\), which is not loaded for safety: save the weights",
    ),
    "network of the user, old": (
        lambda path: torch.save({"net": get_net_by_name("example_net")}, path, _use_new_zipfile_serialization=False),
        r"it holds a whole network \(build_network\.ExampleNet\), which is not loaded",
    ),
    "network in parallel": (
        saves({"epoch": 1, "model": nn.DataParallel(nn.Linear(2, 2))}),
        r"it holds a whole network \(torch\.nn\.parallel\.data_parallel\.DataParallel\)",
    ),
    "graph of torch.fx": (saves(torch.fx.symbolic_trace(nn.Linear(2, 2))), r"it holds a whole network \(torch\.fx\."),
    "object": (
        saves({"state_dict": {}, "lr": fractions.Fraction(1, 3)}),
        r"it holds Python objects \(fractions\.Fraction\), .* torch\.save\(net\.state_dict\(\), path\)",
    ),
    "loss as an object": (
        saves({"loss": nn.CrossEntropyLoss()}),
        r"it holds Python objects \(torch\.nn\.modules\.loss\.",
    ),
    "TorchScript": (torchscript, "it is TorchScript: take the PyTorch network"),
    "torch.export": (exported, "it is a program of torch.export: take the PyTorch network"),
    "ONNX": (onnx_model, "it is an ONNX file: give it as the network, .* or take the PyTorch network"),
    "safetensors": (writes((64).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}'), "it is a safetensors file"),
    "TensorFlow Lite": (writes(b"\x1c\0\0\0TFL3" + bytes(20)), "it is a TensorFlow Lite file: convert its weights"),
    "GGUF": (writes(b"GGUF\3\0\0\0"), "it is a GGUF file: convert its weights"),
    "tar": (tar_file, "it is a tar archive: unpack it"),
    "JSON": (writes(b'{\n  "metadata": {"total_size": 3}}'), "it is a JSON file"),
    "Keras": (zip_with("model.weights.h5"), "it is a Keras file: convert its weights"),
    "zip around a checkpoint": (zip_with("net/pytorch_model.bin"), "it is a zip file with a file of weights in it"),
    "zip around weights": (zip_with("net.pth"), "it is a zip file with a file of weights in it: unpack it"),
    "another zip": (zip_with("readme.txt"), "it is a zip file that torch.save did not write"),
    "pickle": (writes(pickle.dumps({"a": 1}, protocol=4)), "it is a pickle that torch.save did not write"),
    "npz": (writes(numpy_bytes(np.savez)), "it is a .npz file of NumPy"),
    "npy": (writes(numpy_bytes(np.save)), "it is a .npy file of NumPy"),
    "Git LFS": (writes(b"version https://git-lfs.github.com/spec/v1\n"), "it is a pointer of Git LFS.* git lfs pull"),
    "web page": (writes(b"<!DOCTYPE html><html>"), "it is a web page: download the file itself"),
    "gzip": (writes(b"\x1f\x8b\x08" + bytes(50)), "it is a compressed file: unpack it"),
    "HDF5": (writes(b"\x89HDF\r\n\x1a\n"), "it is an HDF5 file"),
    "empty": (writes(b""), "it is empty"),
    "text": (writes(b"no weights"), "it is truncated, or not a file of weights"),
    "truncated zip": (writes(saved_bytes({"a": torch.zeros(3)})[:500]), "it is truncated or damaged"),
    "truncated, old": (
        writes(saved_bytes({"a": torch.zeros(3)}, _use_new_zipfile_serialization=False)[:-8]),
        "it is damaged, or holds what torch.load does not take",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_kind_is_named(tmp_path, kind):
    write, message = KINDS[kind]
    path = tmp_path / "odd.pt2"
    write(path)
    with pytest.raises(ValueError, match=rf"the checkpoint {path} cannot be read: .*{message}") as refusal:
        load_debug_net(path)
    assert "weights_only" not in str(refusal.value) and str(refusal.value).count("\n") == 0


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, error, message in (
        ("", IsADirectoryError, "is a folder, name a file"),
        ("pipe", OSError, "is a pipe or a device, name a file"),
        ("nothing", FileNotFoundError, "nothing"),
    ):
        for load in (load_debug_net, read_torch_file):
            with pytest.raises(error, match=message):
                load(tmp_path / name)


def test_a_file_without_permission(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "net.pth")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", refuse)  # root may read all files
    with pytest.raises(PermissionError, match=r"net\.pth cannot be read \(Permission denied\), see its permissions"):
        load_debug_net(tmp_path / "net.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of other kinds


def of_kind(weight, kind):
    """A weight [2, 1, 3, 3] as another kind of tensor."""
    return {
        "meta": lambda: weight.to("meta"),
        "sparse_coo": lambda: weight.to_sparse(),
        "sparse_csr": lambda: weight[:, 0, 0].to_sparse_csr(),
        "quint8": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.quint8),
        "qint8": lambda: torch.quantize_per_channel(weight, torch.ones(2), torch.zeros(2), 0, torch.qint8),
        "float8_e4m3fn": lambda: weight.to(torch.float8_e4m3fn),
        "float8_e5m2": lambda: weight.to(torch.float8_e5m2),
        "nested": lambda: torch.nested.nested_tensor([weight[0], weight[1]]),
        "complex64": lambda: weight.to(torch.complex64),
        "int64": lambda: weight.long(),
        "bool": lambda: weight.bool(),
    }[kind]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["meta", "sparse_coo", "sparse_csr", "quint8", "qint8", "float8_e4m3fn", "float8_e5m2", "nested"]
    + ["complex64", "int64", "bool"],
)
def test_tensors_that_are_no_weights_are_named(tmp_path, kind):
    state = get_net_by_name("debug_net0").state_dict()
    torch.save({**state, "0.weight": of_kind(state["0.weight"], kind)}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=rf"net\.pth holds 0\.weight as .*{kind}.*, save it as .*floating point"):
        load_debug_net(tmp_path / "net.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_load(tmp_path, dtype):
    state = get_net_by_name("debug_net0").state_dict()
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "net.pth")
    loaded = load_debug_net(tmp_path / "net.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_weight_that_float32_cannot_hold(tmp_path):
    state = get_net_by_name("debug_net0").state_dict()
    torch.save({**state, "0.weight": state["0.weight"].double() * 1e300}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"has NaN or infinite values in 0\.weight"):
        load_debug_net(tmp_path / "net.pth")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith(", old")])
def test_a_network_of_another_kind_is_named(tmp_path, kind):
    write, message = KINDS[kind]
    write(tmp_path / "odd.pth")
    found = re.split(r": |, |\.\*", message)[0]
    with pytest.raises(ValueError, match=rf"odd\.pth holds no network .*: .*{found}.*, convert one with ann2snn"):
        load_dag(tmp_path / "odd.pth")
