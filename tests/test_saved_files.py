"""Files that are read: damaged ones, those of other kinds, and networks whose data was edited."""

import argparse
import builtins
import copy
import io
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ann_parser import parse_ann_model
from build_network import get_net_by_name
from dag_checks import NEURON, NEURON_OF_LATER_FILES, OP, OP_OF_LATER_FILES, TENSORS
from networks.checkpoint import load_weights
from quantization import init_quantize_net, quantize_layers
from runtime.torch_files import OtherFile, read_torch_file
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import SpikeDAGModule, from_dict, load_dag
from spike_layers import OP_TYPES, SpikeConv2d, SpikeReLU
from spike_simulator import Misfit

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def load_debug_net(path):
    return load_weights(get_net_by_name("debug_net0"), path)


def saved_bytes(value, **options):
    """What torch.save writes for a value."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


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


KINDS = {
    "whole network": (saves(nn.Linear(2, 2)), r"a whole network \(torch\.nn\.modules\.linear\.Linear\), which are not"),
    "network of the user": (
        lambda path: torch.save(get_net_by_name("example_net"), path),
        r"it holds Python objects \(build_network\.ExampleNet\), which are not loaded for safety: save the weights",
    ),
    "namespace": (
        lambda path: torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, path),
        r"it holds Python objects \(argparse\.Namespace\), .* torch\.save\(net\.state_dict\(\), path\)",
    ),
    "number of NumPy": (saves({"acc": np.float64(3)}), r"Python objects \(numpy\.\S+\.scalar\)"),
    "TorchScript": (torchscript, "it is TorchScript: take the PyTorch network"),
    "torch.export": (exported, "it is a program of torch.export: take the PyTorch network"),
    "ONNX": (onnx_model, "it is an ONNX file: take the PyTorch network"),
    "safetensors": (
        writes((64).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}'),
        r"it is a safetensors file: torch\.save what safetensors\.torch\.load_file\(path\) returns",
    ),
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


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class Everything(nn.Module):
    """An op of every type but SignedReLU, for images of 1x6x6."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), nn.ReLU6(), nn.MaxPool2d(2))
        self.norm = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(8, 4, 3, stride=2, groups=2), nn.ReLU(), nn.ZeroPad2d(1), nn.AvgPool2d(2))
        self.fc = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x):  # [B, 1, 6, 6]
        y = self.conv(x)
        y = torch.cat([self.up(y) + y, y], 1)  # [B, 8, 6, 6]
        y = self.down(self.norm(y))
        return torch.softmax(self.fc(y.flatten(1)), 1)


class Signed(nn.Module):
    """An average pooling of values of both signs, and a residual of currents."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x):  # [B, 1, 6, 6]
        y = torch.relu(self.a(x))
        y = torch.relu(self.b(y) + y)
        return self.c(nn.functional.avg_pool2d(self.b(y), 2))


def converted(net, bits=4, **options):
    """A quantized network, its spiking network of 4 steps, and images."""
    torch.manual_seed(0)
    images = torch.rand(4, 1, 6, 6)
    qnet = parse_ann_model(net.eval(), (images[:1],))
    init_quantize_net(qnet, bits)
    loader = [(images, torch.zeros(4))]
    return qnet, trans_ann2snn_weight(qnet, loader, "cpu", 4, bits, maxpool="gate", signed="pair", **options), images


NETWORKS = {
    "everything": lambda: converted(Everything()),
    "everything, folded, channels": lambda: converted(
        Everything(), 8, avgpool="fold", granularity="channel", per_channel=True, listen=2
    ),
    "signed": lambda: converted(Signed(), 1, reset_mode="zero"),
    "signed, floats": lambda: converted(Signed(), 32),
}


@pytest.fixture(scope="module")
def networks():
    """Name -> quantized network, spiking network, images."""
    return {name: build() for name, build in NETWORKS.items()}


class Edited:
    """torch.save writes it as a network of this data."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return from_dict, (self.data,)


def fields(data):
    """`holder, key` of every field of nested dicts and lists; tuples become lists."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        if isinstance(value, tuple):
            value = data[key] = list(value)
        yield data, key
        if isinstance(value, (dict, list)):
            yield from fields(value)


EDITS = 150  # of each network, of some 2,000 to 4,000
PLAIN = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    300,
    2**31,
    10**9,
    -0.5,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "conv1",
    "gate",
    b"x",
]
NESTED = [(), (0, 0), (1, 1), (2, 2), [1], [0, 1, 1, 0], {}, {"x": 1}, torch.uint8, torch.tensor(1), torch.zeros(2, 2)]


def edits_of(value, rng):
    """Other values for a field: some of a fixed list, and of a tensor others of the kind."""
    if isinstance(value, torch.Tensor) and value.numel():
        yield from (torch.zeros_like(value), value.flatten()[:0], value.double(), value[None], -value, value.short())
        yield from (value.flatten(), value.repeat_interleave(2, 0) if value.dim() else value.expand(2), value * 2)
        yield value.float().fill_(torch.nan)
    if isinstance(value, bool):
        yield not value
    if isinstance(value, list):
        yield from (value[:-1], value + value[-1:], value[::-1])
    yield from rng.sample(PLAIN, 4) + rng.sample(NESTED, 2)


def refused_or_runs(data, images):
    """Whether a network of this data is refused; whatever it is, no other exception than ValueError may come."""
    try:
        from_dict(data)(images[:2])
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("kind", [0, 1], ids=["quantized", "spiking"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_an_edited_field_is_refused_or_the_network_runs(networks, name, kind):
    *both, images = networks[name]
    whole, rng = both[kind].to_dict(), random.Random(0)
    assert not refused_or_runs(copy.deepcopy(whole), images)
    values = [edits_of(holder[key], rng) for holder, key in fields(copy.deepcopy(whole))]
    edits = [(place, value) for place, others in enumerate(values) for value in others]
    refused = 0
    for place, value in rng.sample(edits, EDITS):
        data = copy.deepcopy(whole)
        holder, key = list(fields(data))[place]
        holder[key] = copy.deepcopy(value)
        refused += refused_or_runs(data, images)
    assert 0.6 * EDITS < refused < EDITS


def test_every_field_of_an_op_has_a_rule(networks):
    """A field without one would keep every file with it from loading."""
    for qnet, snn, _ in networks.values():
        for entry in [*qnet.to_dict()["ops"], *snn.to_dict()["ops"]]:
            assert set(entry["config"]) == set(OP_TYPES[entry["type"]].fields)
            assert set(entry) == {*OP, *OP_OF_LATER_FILES} and set(entry["tensors"]) <= set(TENSORS)
            assert entry["neuron"] is None or set(entry["neuron"]) == {*NEURON, *NEURON_OF_LATER_FILES}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_files_from_before_later_fields_load(networks, name):
    _, snn, images = networks[name]
    older = copy.deepcopy(snn.to_dict())
    for entry in older["ops"]:
        for field in ("frozen", "levels", "weight_back"):
            del entry[field]
        if entry["neuron"] is not None and not entry["neuron"]["listen"]:
            del entry["neuron"]["listen"], entry["neuron"]["spike_type"]
    assert torch.equal(from_dict(older)(images), snn(images))


def edited(snn, op, **changes):
    """Data of a network in which one op, or its config, neuron or tensors, has other values."""
    data = copy.deepcopy(snn.to_dict())
    entry = next(entry for entry in data["ops"] if entry["name"] == op)
    for key, value in changes.items():
        holder = next(h for h in (entry["config"], entry["neuron"] or {}, entry["tensors"], entry) if key in h)
        holder[key] = value
    return data


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("conv2", {"stride": (0, 0)}, r"conv2 stride \(0, 0\): use a whole number, 1 to 65536, or two of them"),
        ("conv2", {"padding": -1}, "conv2 padding -1: use a whole number, 0 to 4096"),
        ("conv2", {"groups": 3}, "conv2 groups 3 do not divide the 8 and 4 channels"),
        ("conv2", {"out_channels": 2**31 - 2}, r"conv2 weight \[4, 4, 3, 3\]: the op has \[2147483646, 4, 3, 3\]"),
        ("conv2", {"kernel_size": (3, 3, 3)}, r"conv2 kernel_size \(3, 3, 3\)"),
        ("conv2", {"weight_bits": 3}, "conv2 weight_q holds integers beyond 3, the largest of 3 bits"),
        ("conv2", {"weight_q": torch.zeros(4, 4, 3, 3, dtype=torch.int16)}, "conv2 weight_q .torch.int16"),
        ("conv2", {"bias_q": torch.zeros(1, dtype=torch.int32)}, r"conv2 bias_q \[1\]: use \[4\]"),
        ("conv2", {"unit": torch.tensor(0.0)}, r"conv2 unit .*: use a tensor of positive numbers"),
        ("conv2", {"weight": torch.full((4, 4, 3, 3), torch.nan)}, "conv2 weight .*: use a tensor of finite numbers"),
        ("conv2", {"weight": torch.zeros(4, 4, 3, 3, device="meta")}, r"conv2 weight \(another kind of tensor\)"),
        ("conv2", {"weight": torch.zeros(4, 4, 3, 3).double()}, r"conv2 weight is torch\.float64, what stands before"),
        ("conv2", {"in_nodes": ("relu3_out1", "relu3_out1")}, r"conv2 in_nodes .*: SpikeConv2d reads 1"),
        ("conv2", {"frozen": ["spike"]}, r"conv2 frozen \['spike'\]"),
        ("relu4", {"spiking": False}, "relu4 spiking False, but it reads currents"),
        ("conv2", {"spiking": 1}, "conv2 spiking 1: use True or False"),
        ("conv2", {"path": None}, "conv2 path None: use a string"),
        ("conv2", {"name": "a.b"}, "damaged network data"),
        ("max_pool1", {"mode": "most"}, "max_pool1 mode 'most': use None or 'gate', 'or'"),
        ("max_pool1", {"mode": None}, "max_pool1 spiking True, but it reads no spikes, or has no mode"),
        ("max_pool1", {"padding": (2, 2)}, r"max_pool1 padding \(2, 2\): use at most half of kernel_size"),
        ("conv_transpose1", {"output_padding": (2, 2)}, "conv_transpose1 output_padding .*: use less than stride"),
        ("view1", {"shape": (-1,)}, r"view1 shape \(-1,\)"),
        ("pad1", {"pads": (1, 1, 1)}, r"pad1 pads \(1, 1, 1\): use 4 times a whole number"),
        ("relu2", {"ceiling": float("nan")}, "relu2 ceiling nan: use None or a positive number"),
        ("relu4", {"Vthr": torch.tensor(0)}, "relu4 neuron Vthr .*: use a tensor of positive numbers"),
        ("relu4", {"reset_mode": "soft"}, "relu4 neuron reset_mode 'soft': use 'zero', 'subtraction'"),
        ("relu4", {"listen": 10**9}, "relu4 neuron listen 1000000000: use a whole number, 0 to 65536"),
        ("relu4", {"largest_current": -1}, "relu4 neuron largest_current -1"),
        ("relu4", {"spike_type": torch.int8}, r"relu4 neuron spike_type torch\.int8"),
        ("relu4", {"neuron": None}, "relu4 spiking True, but it takes neurons for currents and none for spikes"),
        ("add1", {"branch_weights": (None,)}, r"add1 branch_weights \(None,\)"),
        ("softmax1", {"dim": 0}, "softmax1 dim 0"),
    ],
)
def test_a_field_out_of_range_is_named(networks, name, changes, message):
    with pytest.raises(ValueError, match=message):
        from_dict(edited(networks["everything"][1], name, **changes))


@pytest.mark.parametrize("timesteps", [0, -1, 10**9, 4.0, True, "4", None])
def test_timesteps_out_of_range(networks, timesteps):
    data = {**networks["everything"][1].to_dict(), "timesteps": timesteps}
    with pytest.raises(ValueError, match=f"the network timesteps {timesteps!r}"):
        from_dict(data)


@torch.no_grad()
def test_what_does_not_fit_the_inputs_names_the_op(networks):
    _, snn, images = networks["everything"]
    with pytest.raises(Misfit, match=r"conv1 \(conv\.0\) cannot run on inputs of \[1, 2, 6, 6\]: "):
        snn(torch.rand(3, 2, 6, 6))
    loaded = from_dict(edited(snn, "relu4", Vthr=torch.ones(5, 1, 1, dtype=torch.int32)))
    with pytest.raises(Misfit, match=r"relu4 .*Vthr \[5, 1, 1\] does not fit values of \[4, 2, 2\]"):
        loaded(images)


# A process, whose memory counts alone.
LOAD_A_LARGE_ONE = """
import resource, sys, torch
from spike_dag import load_dag
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_dag(sys.argv[1])
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("expanded", [False, True], ids=["one weight", "one weight, seen as all"])
def test_declared_size_takes_no_memory(tmp_path, expanded):
    dag = SpikeDAGModule()
    dag.add_input("x")
    dag.add_op("conv1", SpikeConv2d(1, 1, 3), ["x"], ["y"])
    dag.outputs_nodes = ("y",)
    data = dag.to_dict()
    data["ops"][0]["config"].update(in_channels=20_000, out_channels=20_000)  # 14 GB
    if expanded:
        data["ops"][0]["tensors"]["weight"] = torch.ones(1, 1, 1, 1).expand(20_000, 20_000, 3, 3)
    torch.save(Edited(data), tmp_path / "dag.pth")
    command = [sys.executable, "-c", LOAD_A_LARGE_ONE, tmp_path / "dag.pth"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    message, grown = run.stdout.splitlines()
    assert "dag.pth holds no network of this toolkit: damaged network data: conv1 weight" in message
    assert int(grown) < 100_000  # KB


def test_flipped_bits_of_a_network(tmp_path, networks):
    _, snn, images = networks["everything"]
    data, rng, refused = saved_bytes(snn), random.Random(0), 0
    with torch.no_grad():
        expected = snn(images)
        for _ in range(100):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (tmp_path / "snn.pth").write_bytes(damaged)
            try:
                loaded = load_dag(tmp_path / "snn.pth")
            except ValueError:
                refused += 1
            else:
                assert torch.equal(loaded(images), expected)
    assert 40 < refused < 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "truncated, old"])
def test_a_network_of_another_kind_is_named(tmp_path, kind):
    write, message = KINDS[kind]
    write(tmp_path / "odd.pth")
    found = re.split(r": |, |\.\*", message)[0]
    with pytest.raises(ValueError, match=rf"odd\.pth holds no network of this toolkit: .*{found}.*, convert it again"):
        load_dag(tmp_path / "odd.pth")


def test_a_block_of_safe_globals_leaves_networks_loadable(tmp_path, networks):
    """Leaving the block removes the names in it, also those that were allowed before."""
    _, snn, _ = networks["signed"]
    torch.save(snn, tmp_path / "snn.pth")
    before = torch.serialization.get_safe_globals()
    try:
        with torch.serialization.safe_globals([from_dict]):
            assert load_dag(tmp_path / "snn.pth").timesteps == 4
            assert from_dict in torch.serialization.get_safe_globals()
        assert from_dict not in torch.serialization.get_safe_globals()
        assert load_dag(tmp_path / "snn.pth").timesteps == 4
        torch.serialization.clear_safe_globals()
        assert load_dag(tmp_path / "snn.pth").timesteps == 4
        assert torch.serialization.get_safe_globals() == []
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    load_dag(tmp_path / "snn.pth")
    assert torch.load(tmp_path / "snn.pth", weights_only=True).timesteps == 4  # still allowed


# ---------------------------------------------------------------------------------------------------------------------
# Weights in full precision


def test_a_quantized_network_can_be_trained_on_from_a_copy_and_a_file(tmp_path, networks):
    qnet = networks["everything"][0]
    torch.save(qnet, tmp_path / "qnet.pth")
    for again in (copy.deepcopy(qnet), load_dag(tmp_path / "qnet.pth"), copy.deepcopy(load_dag(tmp_path / "qnet.pth"))):
        for name, layer in qnet.weighted_layers().items():
            copied = again.ops[name]["op"].weight
            assert torch.equal(copied.weight_back, layer.weight.weight_back)
            assert copied.weight_back is not layer.weight.weight_back
            assert not torch.equal(copied, copied.weight_back)
            with torch.no_grad():
                copied.zero_()
        quantize_layers(again)
        layers = zip(again.weighted_layers().values(), qnet.weighted_layers().values())
        assert all(torch.equal(layer.weight, wanted.weight) for layer, wanted in layers)


def test_shadows_of_a_converted_network_stay_in_copies_and_out_of_files(tmp_path, networks):
    snn = copy.deepcopy(networks["everything"][1])
    torch.save(snn, tmp_path / "plain.pth")
    snn.conv2.weight.weight_back = torch.ones_like(snn.conv2.weight)  # as finetuning on spikes leaves it
    assert torch.equal(copy.deepcopy(snn).conv2.weight.weight_back, snn.conv2.weight.weight_back)
    torch.save(snn, tmp_path / "shade.pth")
    assert not hasattr(load_dag(tmp_path / "shade.pth").conv2.weight, "weight_back")
    assert abs((tmp_path / "shade.pth").stat().st_size - (tmp_path / "plain.pth").stat().st_size) < 100


def test_a_copy_of_weights_that_are_not_finite_is_no_damaged_file():
    """What made them so is said where they are used."""
    dag = SpikeDAGModule()
    dag.add_input("x")
    dag.add_op("conv1", SpikeConv2d(1, 1, 1, bias=False), ["x"], ["y"])
    dag.add_op("relu1", SpikeReLU(), ["y"], ["z"])
    dag.outputs_nodes = ("z",)
    torch.nn.init.constant_(dag.conv1.weight, torch.inf)
    assert copy.deepcopy(dag).conv1.weight.item() == torch.inf
    with pytest.raises(ValueError, match=r"conv1 weight \(torch\.float32 \[1, 1, 1, 1\]\): use a tensor of finite"):
        from_dict(dag.to_dict())
