"""Files of spiking networks: damaged ones, those of other kinds, and networks whose data was edited."""

import copy
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import saved_bytes
from torch import nn

from ann_parser import parse_ann_model
from dag_checks import NEURON, NEURON_OF_LATER_FILES, OP, OP_OF_LATER_FILES, TENSORS
from quantization import init_quantize_net, quantize_layers
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import SpikeDAGModule, from_dict, load_dag
from spike_layers import OP_TYPES, SpikeConv2d, SpikeReLU
from spike_simulator import Misfit

ROOT = Path(__file__).resolve().parents[1]


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


OUT_OF_RANGE = [
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
    ("pad1", {"pads": (1, 1, 1)}, r"pad1 pads \(1, 1, 1\): use two for each dimension"),
    ("relu2", {"ceiling": float("nan")}, "relu2 ceiling nan: use None or a positive number"),
    ("relu4", {"Vthr": torch.tensor(0)}, "relu4 neuron Vthr .*: use a tensor of positive numbers"),
    ("relu4", {"reset_mode": "soft"}, "relu4 neuron reset_mode 'soft': use 'zero', 'subtraction'"),
    ("relu4", {"listen": 10**9}, "relu4 neuron listen 1000000000: use a whole number, 0 to 65536"),
    ("relu4", {"largest_current": -1}, "relu4 neuron largest_current -1"),
    ("relu4", {"spike_type": torch.int8}, r"relu4 neuron spike_type torch\.int8"),
    ("relu4", {"neuron": None}, "relu4 spiking True, but it takes neurons for currents and none for spikes"),
    ("add1", {"branch_weights": (None,)}, r"add1 branch_weights \(None,\)"),
    ("softmax1", {"dim": 0}, "softmax1 dim 0"),
]


@pytest.mark.parametrize("name, changes, message", OUT_OF_RANGE)
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


@pytest.mark.slow
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
