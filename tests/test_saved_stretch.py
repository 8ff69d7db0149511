"""A saved stretch: its manifest and vectors, their replay, and every damage in one line."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_reference_agrees, with_random_norms, with_status
from torch import nn

import snn_transformer
from build_network import get_net_by_name
from runtime.cli import run_script
from snn_transformer import SNNTransformer
from spike_dag import SpikeDAGModule
from transformer import saved as saved_snn
from transformer.saved import load_saved_snn, make_vectors, read_manifest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder written by save_snn, of a stretch with two inputs, one of which is added as it is."""
    torch.manual_seed(0)
    net = with_random_norms(get_net_by_name("resnet20", 3, 10))[:6]
    transformer = with_status(net, ["3.conv2", "3.relu2", "4"], torch.randn(5, 3, 8, 8), timesteps=5)
    folder = tmp_path_factory.mktemp("saved") / "stretch"
    transformer.save_snn(folder, samples=3)
    return folder, transformer


def replay(folder):
    """Exit status of the replay in this process."""
    with pytest.raises(SystemExit) as end:
        run_script(snn_transformer.main, snn_transformer.parse_args(["replay", str(folder)]))
    return end.value.code


def copy_of_folder(folder, tmp_path):
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


def change_manifest(folder, change):
    """Apply `change(manifest)`, and make the sha256 fit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = saved_snn.hash_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_fresh_process_replays_every_bit(saved):
    command = [sys.executable, "snn_transformer.py", "replay", str(saved[0])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch(r"identical: \d+ spikes of 3 layers, 3072 output values \(3 inputs, T=5\)\n", run.stdout)


def test_the_reference_replays_the_files(saved):
    folder, transformer = saved
    manifest = read_manifest(folder)
    snn = load_saved_snn(folder, manifest)
    assert isinstance(snn, SpikeDAGModule)
    assert_reference_agrees(snn, saved_snn.read_vectors(folder, manifest))
    inputs = tuple(x[:3] for x in transformer.stretch_inputs()[0])
    with torch.no_grad():
        assert torch.equal(snn(*inputs), transformer.snn(*inputs))


def test_the_manifest_holds_what_a_chip_needs(saved):
    folder, transformer = saved
    manifest = read_manifest(folder)
    assert (manifest["timesteps"], manifest["weight_bitwidth"], manifest["reset_mode"]) == (5, 4, "subtraction")
    assert [entry["shape"] for entry in manifest["inputs"]] == [[16, 8, 8]] * 2
    ops = {op["name"]: op for op in manifest["ops"]}
    assert list(ops) == list(transformer.snn.ops) and ops["conv2"]["path"] == "4.conv1.0"
    weight = np.load(folder / ops["conv2"]["tensors"]["weight_q"]["file"])
    assert weight.dtype == np.int8 and np.array_equal(weight, transformer.snn.conv2.weight_q.numpy())
    assert set(ops["conv2"]["tensors"]) == {
        "weight_q",
        "bias_q",
        "unit",
    }  # integers; floats only where the input is real
    assert {"weight", "weight_q"} <= set(ops["conv1"]["tensors"])
    Vthr = ops["relu2"]["neuron"]["Vthr"]
    assert Vthr == {"dtype": "int32", "value": transformer.snn.relu2.neuron.Vthr.item()}
    assert ops["relu2"]["out_shape"] == [16, 8, 8]


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rename(manifest, kind, node):
    """A node of the vectors gets a name that no op has."""
    manifest["vectors"][kind]["x"] = manifest["vectors"][kind].pop(node)


def change_array(folder, kind, change, **more):
    """Write the first array of a kind of vectors anew, and make both sha256 fit."""

    def change_entry(manifest):
        entry = next(iter(manifest["vectors"][kind].values()))
        path = folder / entry["file"]
        np.save(path, change(np.load(path)), allow_pickle=True)
        entry.update(sha256=saved_snn.file_hash(path), **more)

    change_manifest(folder, change_entry)


def declare_larger(folder):
    """The header of a .npy file says that it holds 2**40 numbers."""

    def change_entry(manifest):
        entry = next(iter(manifest["vectors"]["outputs"].values()))
        path, shape = folder / entry["file"], [2**20, 16, 2**16, 1]
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)})
            file.write(bytes(64))
        entry.update(sha256=saved_snn.file_hash(path), shape=shape)

    change_manifest(folder, change_entry)


DAMAGES = {
    "weight": (lambda f: flip_last_bit(f / "weights/conv2.weight_q.npy"), "weight_q.npy is damaged, its"),
    "vector": (lambda f: flip_last_bit(f / "vectors/relu1_out1.npy"), "relu1_out1.npy is damaged, its sha256"),
    "missing file": (lambda f: (f / "vectors/relu1_out1.npy").unlink(), "relu1_out1.npy is missing"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json, name a folder that"),
    "truncated": (lambda f: (f / "manifest.json").write_text('{"format": '), "manifest.json is damaged"),
    "another number": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('steps": 5', 'steps": 6')),
        "manifest.json is damaged, its sha256 is another",
    ),
    "other format": (lambda f: change_manifest(f, lambda m: m.update(format="x")), "is not a manifest of format"),
    "lacks": (lambda f: change_manifest(f, lambda m: m.pop("ops")), "is damaged (KeyError: 'ops')"),
    "timesteps x": (lambda f: change_manifest(f, lambda m: m.update(timesteps="x")), "is damaged ("),
    "timesteps 0": (lambda f: change_manifest(f, lambda m: m.update(timesteps=0)), "is damaged ("),
    "timesteps null": (lambda f: change_manifest(f, lambda m: m.update(timesteps=None)), "is damaged ("),
    "unknown node": (lambda f: change_manifest(f, lambda m: rename(m, "spikes", "relu1_out1")), "vectors hold"),
    "no spikes": (lambda f: change_manifest(f, lambda m: m["vectors"]["spikes"].clear()), "hold spikes of []"),
    "no outputs": (lambda f: change_manifest(f, lambda m: m["vectors"]["outputs"].clear()), "the vectors hold outputs"),
    "one more": (
        lambda f: change_manifest(f, lambda m: m["vectors"]["constants"].update(m["vectors"]["outputs"])),
        "the vectors hold constants of",
    ),
    "no inputs": (lambda f: change_manifest(f, lambda m: rename(m, "constants", "input1_out1")), "vectors hold"),
    "no weight": (lambda f: change_manifest(f, lambda m: m["ops"][0]["tensors"].clear()), "is damaged ("),
    "wrong op": (lambda f: change_manifest(f, lambda m: m["ops"][0].update(type="x")), "damaged (unknown op type x"),
    "stride 0": (
        lambda f: change_manifest(f, lambda m: m["ops"][0]["config"].update(stride=[0, 0])),
        "manifest.json is damaged (conv1 stride (0, 0): use a whole number, 1 to 65536",
    ),
    "channels": (
        lambda f: change_manifest(f, lambda m: m["ops"][0]["config"].update(out_channels=2**30)),
        "manifest.json is damaged (conv1 weight [16, 16, 3, 3]: the op has [1073741824, 16, 3, 3]",
    ),
    "timesteps 1e9": (
        lambda f: change_manifest(f, lambda m: m.update(timesteps=10**9)),
        "manifest.json is damaged (the network timesteps 1000000000: use None or a whole number, 1 to 65536",
    ),
    "few inputs": (
        lambda f: change_array(f, "constants", lambda x: x[:2], shape=[2, 16, 8, 8]),
        "are [3, 16, 8, 8], in the network [2, 16, 8, 8]",
    ),
    "large inputs": (
        lambda f: change_array(f, "constants", lambda x: x.repeat(2, 3), shape=[3, 16, 8, 16]),
        "is damaged (Misfit: add",
    ),
    "other steps": (lambda f: change_manifest(f, lambda m: m.update(timesteps=4)), "in the network [4, 3, 16, 8, 8]"),
    "larger than its file": (declare_larger, "it holds no array of numbers"),
    "deep": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
    "dtype": (lambda f: change_array(f, "constants", lambda x: x.astype(np.float64)), "input1_out1.npy is damaged: it"),
    "both dtypes": (
        lambda f: change_array(f, "constants", lambda x: x.astype(np.float64), dtype="float64"),
        "the constants of input1_out1 are float64",
    ),
    "shape": (lambda f: change_array(f, "outputs", lambda x: x[:, :2]), "is damaged: it holds float32"),
    "objects": (lambda f: change_array(f, "outputs", lambda x: x.astype(object)), "it holds no array of numbers"),
    "few bits": (lambda f: change_array(f, "spikes", lambda x: x[:-1]), "has the wrong size for spikes"),
    "many bits": (lambda f: change_array(f, "spikes", lambda x: np.append(x, x[:1])), "has the wrong size for spikes"),
    "no samples": (
        lambda f: change_array(f, "outputs", lambda x: x[:0], shape=[0, 16, 8, 8]),
        "are float32 [0, 16, 8, 8]",
    ),
    "outside": (
        lambda f: change_manifest(f, lambda m: m["vectors"]["outputs"]["relu3_out1"].update(file="../../x.npy")),
        "names the file ../../x.npy outside of the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line_and_status_2(saved, tmp_path, capsys, name):
    damage, message = DAMAGES[name]
    folder = copy_of_folder(saved[0], tmp_path)
    damage(folder)
    assert replay(folder) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert "allow_pickle" not in err


def fields_of(data):
    """`holder, key` of every field of nested dicts and lists."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from fields_of(value)


def test_an_edited_field_of_the_manifest_is_one_line(saved, tmp_path):
    """Whatever it is, also in NumPy and PyTorch; what no replay reads may be anything."""
    folder, rng = copy_of_folder(saved[0], tmp_path), random.Random(0)
    whole = (folder / "manifest.json").read_text()
    places, statuses = len(list(fields_of(json.loads(whole)))), []
    for _ in range(100):
        manifest = json.loads(whole)
        holder, key = list(fields_of(manifest))[rng.randrange(places)]
        holder[key] = rng.choice([None, True, -1, 0, 1, 3, 10**9, 2**70, -0.5, "", "x", "conv1", [], [0, 0], [1], {}])
        (folder / "manifest.json").write_text(json.dumps(manifest))
        change_manifest(folder, lambda manifest: None)
        try:
            saved_snn.replay(folder)
        except (saved_snn.Mismatch, saved_snn.Damaged, OSError) as error:
            statuses.append(type(error))
            assert str(error).count("\n") == 0
    assert statuses.count(saved_snn.Damaged) > 20


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda ops: ops["relu2"]["neuron"]["Vthr"].update(value=1), "relu2_out1: "),
        (lambda ops: ops["relu3"]["neuron"].update(reset_mode="zero"), "relu3_out1: "),
        (lambda ops: ops["conv1"]["tensors"]["unit"].update(value=1e-3), "conv1_out1: the inputs cause currents"),
    ],
)
def test_other_spikes_are_one_line_and_status_1(saved, tmp_path, capsys, change, message):
    folder = copy_of_folder(saved[0], tmp_path)
    change_manifest(folder, lambda manifest: change({op["name"]: op for op in manifest["ops"]}))
    assert replay(folder) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_an_earlier_result_is_replaced_and_nothing_else(saved, tmp_path, monkeypatch):
    transformer = saved[1]
    target = tmp_path / "stretch"
    transformer.save_snn(target, samples=1)
    (target / "weights" / "old.npy").write_bytes(b"old")
    transformer.save_snn(target, samples=2)
    assert not (target / "weights" / "old.npy").exists() and "2 inputs" in saved_snn.replay(target)
    with monkeypatch.context() as patch:
        patch.setattr(saved_snn, "hash_of", lambda manifest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transformer.save_snn(target, samples=3)
    assert "2 inputs" in saved_snn.replay(target) and [path.name for path in tmp_path.iterdir()] == ["stretch"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name, message in (
        ("thesis", "holds other files"),
        ("file", "it is a file"),
        ("nowhere/saved", "there is no folder"),
    ):
        with pytest.raises(OSError, match=message):
            transformer.save_snn(tmp_path / name)
    monkeypatch.chdir(tmp_path / "thesis")
    with pytest.raises(OSError, match="cannot write to an empty folder name, name a folder"):
        transformer.save_snn("")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.txt"]


@pytest.mark.parametrize("format", ["x", saved_snn.FORMAT])
def test_a_folder_with_another_manifest_is_left_alone(saved, tmp_path, format):
    target = tmp_path / "extension"
    (target / "weights").mkdir(parents=True)
    (target / "manifest.json").write_text(json.dumps({"format": format}))
    if format == saved_snn.FORMAT:
        (target / "weights" / "notes.txt").write_text("years of work")
    before = sorted(target.rglob("*"))
    with pytest.raises(OSError, match="the folder holds other files"):
        saved[1].save_snn(target)
    assert sorted(target.rglob("*")) == before


def test_a_link_to_a_folder_stays_a_link(saved, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    saved[1].save_snn(tmp_path / "link", samples=1)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_vectors_are_of_several_calls_where_one_has_too_few(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    transformer, calls = SNNTransformer(net, ["0", "1"], timesteps=4), torch.rand(3, 2, 1, 4, 4)
    with torch.no_grad():
        for x in (calls[0], torch.rand(2, 1, 6, 6), *calls[1:]):
            transformer.inference_get_status(x)
    for samples, kept in ((1, 1), (3, 3), (100, 6)):
        transformer.save_snn(tmp_path / "saved", samples=samples)
        assert f"({kept} inputs, T=4)" in saved_snn.replay(tmp_path / "saved")
        vectors = saved_snn.read_vectors(tmp_path / "saved", read_manifest(tmp_path / "saved"))
        assert np.array_equal(vectors["constants"]["input1_out1"], calls.flatten(0, 1)[:kept].numpy())
    for samples, message in (
        (0, "samples 0: use a whole number, 1 or more"),
        (1.5, "samples 1.5: use a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer.save_snn(tmp_path / "saved", samples=samples)


def test_everything_with_a_neuron_can_be_saved(tmp_path):
    """Poolings, transposed and grouped layers, max pooling, concatenations, linear layers: back from their files."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.ReLU6()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)),
    )
    x = torch.randn(6, 2, 8, 8)
    transformer = with_status(net, ["0", "1", "2", "3"], x, maxpool="gate", per_channel=True)
    transformer.save_snn(tmp_path / "saved")
    assert "4 inputs" in saved_snn.replay(tmp_path / "saved")
    snn = load_saved_snn(tmp_path / "saved")
    assert_reference_agrees(snn, make_vectors(snn, (x,)))
    with torch.no_grad():
        assert torch.equal(snn(x), transformer.snn(x))
