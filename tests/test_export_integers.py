"""Whole networks as a folder of integers, and as files of safetensors."""

import csv
import json

import numpy as np
import pytest
import torch
from helpers import MODELS, assert_reference_agrees, convert, python, small_model
from torch import nn

from ann_parser import parse_ann_model
from export.integers import write_integers
from export.safetensors import write_safetensors
from runtime.tensor_files import read_tensor_file, write_tensor_file
from spike_dag import load_dag
from transformer.saved import Damaged, load_saved_snn, make_vectors, read_manifest, replay


def small_snn(name="upwards", bits=4, **options):
    net, images = small_model(name)
    return convert(net, images, 8, bits, maxpool="gate", signed="pair", **options), images


@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_replayed(tmp_path, name, reset_mode):
    snn, images = small_snn(name, reset_mode=reset_mode, listen=2)
    assert f"replay {tmp_path / 'saved'}" in write_integers(snn, tmp_path / "saved", images[:2])
    vectors = make_vectors(snn, (images[:2],))
    spikes = sum(int(train.sum()) for train in vectors["spikes"].values())
    assert replay(tmp_path / "saved").startswith(f"identical: {spikes} spikes of {len(snn.neurons())} layers, 6 output")
    again = load_saved_snn(tmp_path / "saved")
    assert torch.equal(again(images), snn(images))
    assert_reference_agrees(again, vectors)


def test_the_command(tmp_path):
    snn, images = small_snn()
    line = write_integers(snn, tmp_path / "saved", images[:1])
    done = python(*line.split("python3 ")[1].split())
    assert done.returncode == 0 and done.stdout.startswith("identical: ")


def rows_of(folder):
    with open(folder / "layers.csv", encoding="utf-8", newline="") as file:
        return {row["layer"]: row for row in csv.DictReader(file)}


def test_the_table_of_layers(tmp_path):
    snn, images = small_snn(reset_mode="zero", listen=3)
    write_integers(snn, tmp_path / "saved", images[:2])
    rows = rows_of(tmp_path / "saved")
    up = snn.ops["conv_transpose1"].op
    row = rows["conv_transpose1"]
    assert (row["path"], row["type"], row["shape"], row["bits"]) == ("up", "SpikeConvTranspose2d", "6x6x6", "4")
    assert row["range"] == f"{up.weight_q.min()}..{up.weight_q.max()}" and row["neurons"] == "0"
    synapses = sum(
        0 <= 2 * y - 1 + i < 6 for y in range(3) for i in range(3)
    )  # along one side, padding 1 and output_padding 1
    assert int(row["synapses"]) == synapses**2 * 4 * 3  # each of 4 channels reaches the 3 of its group
    fires = snn.neurons()
    for name, neuron in fires.items():
        row = rows[name]
        assert (row["reset"], row["listen"], row["window"]) == ("zero", "3", "")
        assert float(row["Vthr"].split("..")[0]) == pytest.approx(neuron.Vthr.min().item(), rel=1e-8)
        assert float(row["u0"].split("..")[-1]) == pytest.approx(neuron.initial_potential.max().item(), rel=1e-8)
        assert float(row["scale"].split("..")[0]) == pytest.approx(neuron.scale_factor.min().item(), rel=1e-8)
        assert int(row["neurons"]) == np.prod([int(n) for n in row["shape"].split("x")])


def test_an_earlier_result_is_replaced_and_other_files_are_not(tmp_path):
    snn, images = small_snn()
    for _ in range(2):
        write_integers(snn, tmp_path / "saved", images[:1])
    (tmp_path / "saved" / "mine.txt").write_text("mine")
    with pytest.raises(OSError, match="holds other files"):
        write_integers(snn, tmp_path / "saved", images[:1])
    assert (tmp_path / "saved" / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_a_damaged_or_missing_table_is_found(tmp_path):
    snn, images = small_snn()
    write_integers(snn, tmp_path / "saved", images[:1])
    table = tmp_path / "saved" / "layers.csv"
    table.write_text(table.read_text().replace("4x3x3", "4x3x4", 1))
    with pytest.raises(Damaged, match=r"layers\.csv is damaged, its sha256 is another"):
        replay(tmp_path / "saved")
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"layers\.csv is missing"):
        replay(tmp_path / "saved")


def test_every_bit_width_is_in_the_manifest(tmp_path):
    snn, images = small_snn(bits=8)
    write_integers(snn, tmp_path / "saved", images[:1])
    manifest = read_manifest(tmp_path / "saved")
    assert manifest["weight_bitwidth"] == dict.fromkeys(snn.weighted_layers(), 8)
    assert manifest["reset_mode"] == "subtraction" and manifest["table"]["file"] == "layers.csv"


def test_what_cannot_be_written_as_integers(tmp_path):
    snn, images = small_snn()
    with pytest.raises(ValueError, match="give images, or --input_shape"):
        write_integers(snn, tmp_path / "saved")
    dag = parse_ann_model(nn.Sequential(nn.Conv2d(2, 3, 3)), (images[:1],))
    with pytest.raises(ValueError, match="it has no neurons"):
        write_integers(dag, tmp_path / "saved", images)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_a_network_in_a_file_of_safetensors(tmp_path, safetensors, name):
    """The same data, bit for bit, as in a file of torch.save."""
    snn, images = small_snn(name)
    path = tmp_path / "out_snn.safetensors"
    assert f"safetensors: {path}" in write_safetensors(snn, path)
    torch.save(snn, tmp_path / "out_snn.pth")
    again, saved = load_dag(path), load_dag(tmp_path / "out_snn.pth")
    assert torch.equal(again(images), saved(images))
    assert_same(again.to_dict(), saved.to_dict())


def assert_same(a, b):
    """Equal plain data; lists and tuples are the same."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b and type(a) is type(b)


def test_an_ann_in_a_file_of_safetensors(tmp_path, safetensors):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval()
    images = torch.rand(2, 2, 6, 6)
    dag = parse_ann_model(net, (images,))
    write_safetensors(dag, tmp_path / "ann.safetensors")
    assert torch.equal(load_dag(tmp_path / "ann.safetensors")(images), dag(images))


def test_arrays_are_contiguous_and_their_order_comes_back(tmp_path, safetensors):
    """Arrays with another order in memory, or in the memory of another, are written in the order of their indices."""
    x = torch.arange(24.0)
    data = {
        "turned": x.view(4, 6).T,
        "last": x.view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "part": x[3:9],
        "one": torch.tensor(3, dtype=torch.int8),
        "wide": x[:1].expand(5),
        "deep": [{"type": torch.uint8, "none": None, "name": "é", "no": False, "many": (1, 2.5)}],
    }
    write_tensor_file(tmp_path / "x", data, "--safetensors")
    again = read_tensor_file(tmp_path / "x")
    assert_same(again, data)
    assert again["last"].is_contiguous(memory_format=torch.channels_last) and not again["last"].is_contiguous()
    with safetensors.safe_open(tmp_path / "x", "np") as file:
        assert all(isinstance(value, str) for value in file.metadata().values())
        assert np.array_equal(file.get_tensor("turned"), x.view(4, 6).T.numpy())


def test_every_flipped_bit_is_found(tmp_path, safetensors):
    snn, _ = small_snn()
    path = tmp_path / "out_snn.safetensors"
    write_safetensors(snn, path)
    contents = path.read_bytes()
    for place in torch.randint(len(contents), (60,), generator=torch.Generator().manual_seed(1)).tolist():
        damaged = bytearray(contents)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match="holds no network of this toolkit: "):
            load_dag(path)


def test_other_files_of_safetensors_are_refused(tmp_path, safetensors):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="it is a safetensors file of weights, without a network"):
        load_dag(tmp_path / "weights.safetensors")
    write_tensor_file(tmp_path / "other.safetensors", {"format": "of tomorrow"}, "--safetensors")
    with pytest.raises(ValueError, match="it has no network of format"):
        load_dag(tmp_path / "other.safetensors")
    write_tensor_file(tmp_path / "list.safetensors", [1], "--safetensors")
    with pytest.raises(ValueError, match="it has no network of format"):
        load_dag(tmp_path / "list.safetensors")


def test_without_the_package(tmp_path, monkeypatch):
    snn, _ = small_snn()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--safetensors needs safetensors, which is missing: pip install safetensors"):
        write_safetensors(snn, tmp_path / "out_snn.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_header_names_the_layers(tmp_path, safetensors):
    """Other programs find a tensor under the place of its op, and the rest as JSON."""
    snn, _ = small_snn()
    write_safetensors(snn, tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        data = json.loads(file.metadata()["data"])
        for place, op in enumerate(data["ops"]):
            if "weight_q" in op["tensors"]:
                assert torch.equal(file.get_tensor(f"ops.{place}.tensors.weight_q"), snn.ops[op["name"]].op.weight_q)
