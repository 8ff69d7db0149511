"""SpikeDAGModule: lint, forward, printing, copies, and files."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ann_parser import parse_ann_model
from build_network import get_net_by_name, input_size
from quantization import init_quantize_net
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import SpikeDAGModule, from_dict, load_dag
from spike_layers import ConcatOp, SpikeAdd, SpikeConv2d, SpikeLinear, SpikeReLU

REPOSITORY = Path(__file__).resolve().parents[1]


class Branches(nn.Module):
    """Every type of op, padding='same', and two outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding="same"), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.fc = nn.Linear(8 * 9, 5)

    def forward(self, x):
        r = self.stem(x)
        y = F.relu(self.conv(r) + r)
        y = F.avg_pool2d(torch.cat([y, r], 1), 2)
        y = self.fc(y.flatten(1))
        return F.softmax(y, dim=1), F.log_softmax(y, dim=1)


def small_dag():
    """relu(x) + y, and both concatenated; built by hand."""
    dag = SpikeDAGModule()
    dag.add_input("x")
    dag.add_input("y")
    dag.add_op("relu1", SpikeReLU(), ["x"], ["relu1_out1"], "block.relu")
    dag.add_op("add1", SpikeAdd(), ["relu1_out1", "y"], ["add1_out1"])
    dag.add_op("concat1", ConcatOp(1), ["add1_out1", "x"], ["concat1_out1"])
    dag.outputs_nodes = ("add1_out1", "concat1_out1")
    dag.lint()
    return dag


def conv_dag():
    """The graph of a convolution, a ReLU and a linear layer, for images of 1x4x4."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    return parse_ann_model(net, (torch.randn(2, 1, 4, 4),))


def spiking_dag(name, bits=4, timesteps=8):
    """Network `name` with its first weights, quantized and converted, and images for it."""
    channels = 2 if name == "debug_net2" else 1
    images = torch.rand(6, channels, input_size(name), input_size(name))
    qnet = parse_ann_model(get_net_by_name(name), (images[:2],))
    init_quantize_net(qnet, bits)
    snn = trans_ann2snn_weight(qnet, [(images, None)], torch.device("cpu"), timesteps, bits)
    return snn, images


def as_list(outputs):
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


# Lint


def test_add_op_refuses_a_missing_node():
    dag = SpikeDAGModule()
    dag.add_input("x")
    with pytest.raises(ValueError, match="relu1 reads the node later, which no op before it writes"):
        dag.add_op("relu1", SpikeReLU(), ["later"], ["relu1_out1"])
    assert list(dag.ops) == [] and list(dag.nodes) == ["x"]


def test_add_op_refuses_a_name_that_is_taken():
    dag = small_dag()
    with pytest.raises(ValueError, match="the name relu1 is taken"):
        dag.add_op("relu1", SpikeReLU(), ["x"], ["another"])
    with pytest.raises(ValueError, match="the name add1_out1 is taken"):
        dag.add_op("relu2", SpikeReLU(), ["x"], ["add1_out1"])
    assert list(dag.ops) == ["relu1", "add1", "concat1"]


def test_two_inputs_of_one_name_are_refused():
    dag = SpikeDAGModule()
    with pytest.raises(ValueError, match="x"):
        dag.add_input("x")
        dag.add_input("x")
        dag.outputs_nodes = ("x",)
        dag.lint()


def remove_a_writer(dag):
    del dag.ops["relu1"]


def swap_the_order(dag):
    dag.ops.move_to_end("relu1")


def write_twice(dag):
    dag.ops["add1"]["out_nodes"] = ("relu1_out1",)


def overwrite_an_input(dag):
    dag.ops["add1"]["out_nodes"] = ("x",)


def remove_the_outputs(dag):
    dag.outputs_nodes = ()


def name_an_unknown_output(dag):
    dag.outputs_nodes = ("add1_out1", "nowhere")


def replace_an_op(dag):
    dag.ops["relu1"]["op"] = SpikeReLU()


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove_a_writer, "add1: node relu1_out1 is not written before"),
        (swap_the_order, "add1: node relu1_out1 is not written before"),
        (write_twice, "add1: node relu1_out1 is taken"),
        (overwrite_an_input, "add1: node x is taken"),
        (remove_the_outputs, "lacks inputs or outputs"),
        (name_an_unknown_output, "lacks the output nowhere"),
        (replace_an_op, "relu1: the op in `ops` is not the registered module"),
    ],
)
def test_lint_names_what_is_wrong(damage, message):
    dag = small_dag()
    damage(dag)
    with pytest.raises(ValueError, match=message):
        dag.lint()


def test_lint_of_an_empty_graph():
    with pytest.raises(ValueError, match="lacks inputs or outputs"):
        SpikeDAGModule().lint()


# Forward


def test_several_inputs_and_a_tuple_of_outputs():
    x, y = torch.tensor([[-1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    outputs = small_dag()(x, y)
    assert isinstance(outputs, tuple)
    assert [output.tolist() for output in outputs] == [[[10, 22]], [[10, 22, -1, 2]]]


def test_new_graph_has_no_timesteps():
    assert (small_dag().timesteps, copy.deepcopy(small_dag()).timesteps) == (None, None)


def test_single_output_is_no_tuple():
    dag = small_dag()
    dag.outputs_nodes = ("add1_out1",)
    assert dag(torch.tensor([[-1.0]]), torch.tensor([[3.0]])).tolist() == [[3]]


def test_input_and_inner_value_as_outputs():
    dag = small_dag()
    dag.outputs_nodes = ("x", "relu1_out1", "relu1_out1")
    assert [value.tolist() for value in dag(torch.tensor([[-1.0]]), torch.tensor([[3.0]]))] == [[[-1]], [[0]], [[0]]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_inputs(count):
    with pytest.raises(ValueError, match=f"the network takes 2 inputs, got {count}"):
        small_dag()(*[torch.zeros(1, 2)] * count)


def test_nodes_hold_nothing_after_a_forward_pass():
    dag = small_dag()
    dag(torch.ones(1, 2), torch.ones(1, 2))
    assert dict(dag.nodes) == dict.fromkeys(["x", "y", "relu1_out1", "add1_out1", "concat1_out1"])


def test_nodes_hold_nothing_after_an_exception():
    dag = conv_dag()
    with pytest.raises(RuntimeError):
        dag(torch.randn(2, 1, 6, 6))  # the view fails, behind the convolution
    assert dict(dag.nodes) == dict.fromkeys(["input1_out1"] + [f"{name}_out1" for name in dag.ops])
    assert dag(torch.randn(2, 1, 4, 4)).shape == (2, 3)


def test_value_is_dropped_after_its_last_reader():
    dag, seen = small_dag(), []
    dag.concat1.register_forward_hook(lambda *_: seen.append({k for k, v in dag.nodes.items() if v is not None}))
    dag(torch.ones(1, 2), torch.ones(1, 2))
    assert seen == [{"x", "add1_out1"}]


def test_every_step_ends_with_the_last_output():
    snn, images = spiking_dag("debug_net3")
    steps = snn(images, every_step=True)
    assert steps.shape == (8, 6, 10)
    assert (steps[-1] - snn(images)).abs().max() <= 1e-5
    assert (steps[2] - snn(images, timesteps=3)).abs().max() <= 1e-5
    assert steps[-1].abs().max() > 0


@pytest.mark.parametrize("name", ["debug_net2", "debug_net3", "example_net"])
def test_engines_agree(name):
    """Integers below 2**24 are exact in float32, so the engines spike alike."""
    snn, images = spiking_dag(name)
    outputs = []
    for engine in ("auto", "reference"):
        snn.set_engine(engine)
        outputs.append(snn(images))
    assert outputs[0].abs().max() > 0
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5


def test_unknown_engine():
    with pytest.raises(ValueError, match="unknown engine 'fast', use one of auto, reference"):
        small_dag().set_engine("fast")


# Printing


def test_table_has_a_row_for_every_op():
    assert small_dag().table() == [
        ("op", "layer", "module path", "inputs", "output"),
        ("relu1", "SpikeReLU()", "block.relu", "x", "relu1_out1"),
        ("add1", "SpikeAdd()", "", "relu1_out1, y", "add1_out1"),
        ("concat1", "ConcatOp(dim=1)", "", "add1_out1, x", "concat1_out1"),
    ]


def test_printed_table_is_aligned():
    dag = parse_ann_model(Branches(), (torch.randn(2, 1, 6, 6),))
    lines = str(dag).splitlines()
    assert len(lines) == 1 + len(dag.ops)
    column = lines[0].index("module path")
    for line, (name, entry) in zip(lines[1:], dag.ops.items(), strict=True):
        assert line.split()[0] == name
        assert line[column:].startswith(entry["path"] + "  ")
        assert entry["out_nodes"][0] in line
    assert lines[1].startswith("conv1") and "stem.0" in lines[1] and "SpikeConv2d(1, 4, kernel_size=(3, 3)" in lines[1]


def test_printed_spiking_network_has_its_ops_and_paths():
    snn, _ = spiking_dag("example_net")
    lines = str(snn).splitlines()
    assert [line.split()[0] for line in lines] == ["op", *snn.ops]
    assert [line for line in lines if "conv2" in line.split() and "SpikeConv2d" in line] == [lines[4]]


def test_where_names_op_and_path():
    dag = small_dag()
    assert (dag.where("relu1"), dag.where("add1")) == ("relu1 (block.relu)", "add1")


# Copies


@pytest.mark.parametrize("training", [True, False])
def test_deepcopy_computes_the_same(training):
    dag = parse_ann_model(Branches(), (torch.randn(2, 1, 6, 6),)).train(training)
    clone, x = copy.deepcopy(dag), torch.randn(3, 1, 6, 6)
    assert [torch.equal(a, b) for a, b in zip(clone(x), dag(x), strict=True)] == [True, True]
    assert clone.table() == dag.table()
    assert clone.training == training and clone.conv1.training == training
    assert (clone.inputs_nodes, clone.outputs_nodes) == (dag.inputs_nodes, dag.outputs_nodes)
    flags = [(name, p.requires_grad) for name, p in dag.named_parameters()]
    assert [(name, p.requires_grad) for name, p in clone.named_parameters()] == flags
    assert list(clone.state_dict()) == list(dag.state_dict())


def test_deepcopy_is_independent():
    dag = conv_dag()
    clone, x = copy.deepcopy(dag), torch.randn(3, 1, 4, 4)
    before = dag(x)
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    del clone.ops["linear1"]
    assert torch.equal(dag(x), before) and before.abs().max() > 0
    assert clone.ops["conv1"]["op"] is clone.conv1 is not dag.conv1
    assert list(dag.ops) == ["conv1", "relu1", "view1", "linear1"]


def test_deepcopy_keeps_double_precision():
    dag, x = conv_dag().double(), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(dag)(x), dag(x))


def test_deepcopy_of_a_spiking_network():
    snn, images = spiking_dag("debug_net2")
    clone, before = copy.deepcopy(snn), snn(images)
    assert torch.equal(clone(images), before)
    for neuron in clone.neurons().values():
        neuron.Vthr.fill_(1000)
    assert clone(images).abs().max() == 0
    assert torch.equal(snn(images), before) and before.abs().max() > 0
    assert clone.timesteps == snn.timesteps == 8


def test_deepcopy_keeps_the_engine():
    snn, _ = spiking_dag("debug_net2")
    snn.set_engine("reference", memory_budget=12345)
    clone = copy.deepcopy(snn)
    assert {neuron.spike_type for neuron in clone.neurons().values()} == {torch.float64}
    assert clone.memory_budget == 12345


# Files

RUN_IN_NEW_PROCESS = """
import sys, torch, spike_dag
torch.set_num_threads(int(sys.argv[1]))
for engine, folder in zip(sys.argv[2::2], sys.argv[3::2]):
    dag = torch.load(folder + "/dag.pth", weights_only=True)
    dag.set_engine(engine)
    torch.save(dag(torch.load(folder + "/images.pth")), folder + "/outputs.pth")
"""


def ann_and_images(name):
    """A graph, not spiking, and images for it."""
    if name == "branches":
        return parse_ann_model(Branches(), (torch.randn(2, 1, 6, 6),)), torch.randn(5, 1, 6, 6)
    return parse_ann_model(get_net_by_name(name), (torch.rand(2, 1, 32, 32),)), torch.rand(5, 1, 32, 32)


@pytest.mark.slow
@torch.no_grad()
def test_saved_networks_compute_bit_identical_outputs_in_a_new_process(tmp_path):
    """ANNs, and SNNs with both engines: saved, and run in one process."""
    spiking = [spiking_dag("debug_net2"), spiking_dag("debug_net3"), spiking_dag("example_net")]
    spiking.append(spiking_dag("example_net", bits=32))
    runs = [("auto", *ann_and_images("branches")), ("auto", *ann_and_images("example_net"))]
    runs += [(engine, *each) for engine in ("auto", "reference") for each in spiking]
    arguments, expected = [], {}
    for i, (engine, dag, images) in enumerate(runs):
        folder = tmp_path / str(i)
        folder.mkdir()
        dag.set_engine(engine)
        torch.save(dag, folder / "dag.pth")
        torch.save(images, folder / "images.pth")
        arguments += [engine, str(folder)]
        expected[folder] = as_list(dag(images))
    threads = str(torch.get_num_threads())  # another number adds the floats behind the last spikes in another order
    command = [sys.executable, "-c", RUN_IN_NEW_PROCESS, threads, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for folder, outputs in expected.items():
        loaded = as_list(torch.load(folder / "outputs.pth"))
        assert all(output.abs().max() > 0 for output in outputs)
        assert [torch.equal(a, b) for a, b in zip(loaded, outputs, strict=True)] == [True] * len(outputs), folder


def test_loaded_snn_keeps_its_integers(tmp_path):
    snn, _ = spiking_dag("example_net")
    torch.save(snn, tmp_path / "snn.pth")
    loaded = load_dag(tmp_path / "snn.pth")
    assert loaded.timesteps == 8
    assert loaded.conv2.weight_q.dtype == torch.int8
    assert torch.equal(loaded.conv2.weight_q, snn.conv2.weight_q) and snn.conv2.weight_q.abs().max() == 7
    assert loaded.spiking_layers() == snn.spiking_layers() == ["relu1", "avg_pool1", "relu2", "avg_pool2", "relu3"]
    for name, neuron in snn.neurons().items():
        ours = loaded.neurons()[name]
        assert torch.equal(ours.Vthr, neuron.Vthr) and ours.Vthr.dtype == neuron.Vthr.dtype
        assert torch.equal(ours.initial_potential, neuron.initial_potential)
        assert (ours.reset_mode, ours.largest_current) == (neuron.reset_mode, neuron.largest_current)
    assert [entry["op"].spiking for entry in loaded.ops.values()] == [e["op"].spiking for e in snn.ops.values()]


def test_loaded_graph_trains(tmp_path):
    dag = parse_ann_model(get_net_by_name("example_net"), (torch.rand(2, 1, 32, 32),))
    torch.save(dag, tmp_path / "dag.pth")
    loaded = load_dag(tmp_path / "dag.pth")
    loaded(torch.rand(2, 1, 32, 32)).square().sum().backward()
    assert {name for name, p in loaded.named_parameters() if p.grad is not None} == {
        "conv1.weight",
        "conv2.weight",
        "conv3.weight",
        "linear1.weight",
    }
    assert loaded.conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_file(share, tmp_path):
    path = tmp_path / "dag.pth"
    torch.save(conv_dag(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"dag\.pth holds no network of this toolkit"):
        load_dag(path)


@pytest.mark.parametrize("data", [b"", b"text", b".", b"0", b"PK\x03\x04", b"\x80\x02.", bytes(200)])
def test_file_of_something_else(data, tmp_path):
    path = tmp_path / "dag.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"dag\.pth holds no network of this toolkit"):
        load_dag(path)


@pytest.mark.parametrize(
    "value", [torch.zeros(3), {"state_dict": {}}, [1], None], ids=["tensor", "dict", "list", "None"]
)
def test_file_of_plain_data(value, tmp_path):
    torch.save(value, tmp_path / "dag.pth")
    with pytest.raises(ValueError, match=f"holds a {type(value).__name__}, not a network"):
        load_dag(tmp_path / "dag.pth")


def test_file_of_a_module(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "dag.pth")
    with pytest.raises(ValueError, match="holds no network of this toolkit"):
        load_dag(tmp_path / "dag.pth")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_dag(tmp_path / "nothing.pth")


class RunsACommand:
    """Unpickled, it runs a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("write", ["torch.save", "torch.save, old format", "pickle"])
def test_file_that_would_run_code_is_refused_and_does_not_run(write, tmp_path):
    path, mark = tmp_path / "dag.pth", tmp_path / "mark"
    attack = RunsACommand(f"echo > '{mark}'")
    if write == "pickle":
        path.write_bytes(pickle.dumps(attack, protocol=2))
    else:
        torch.save(attack, path, _use_new_zipfile_serialization=write == "torch.save")
    with pytest.raises(ValueError, match="holds no network of this toolkit"):
        load_dag(path)
    assert not mark.exists()
    if write == "pickle":  # the attack is a real one
        assert pickle.loads(path.read_bytes()) == 0
        assert mark.exists()


def change(data, *keys, to):
    """Set a value inside nested plain data."""
    for key in keys[:-1]:
        data = data[key]
    data[keys[-1]] = to


def test_from_dict_refuses_an_unknown_op_type():
    data = copy.deepcopy(conv_dag().to_dict())
    change(data, "ops", 1, "type", to="Sigmoid")
    with pytest.raises(ValueError, match="unknown op type Sigmoid"):
        from_dict(data)


@pytest.mark.parametrize(
    "keys, value",
    [
        (("format",), "ann2snn-dag-0"),
        (("ops",), None),
        (("ops",), [1]),
        (("outputs_nodes",), ()),
        (("outputs_nodes",), ("nowhere",)),
        (("inputs_nodes",), ()),
        (("ops", 0, "name"), "forward"),
        (("ops", 0, "config"), {"in_channels": 1}),
        (("ops", 0, "tensors"), {}),
        (("ops", 0, "tensors", "weight"), torch.zeros(2, 1, 5, 5)),
        (("ops", 0, "neuron"), {"Vthr": 1}),
        (("ops", 1, "in_nodes"), ("nowhere",)),
    ],
)
def test_from_dict_refuses_damaged_data(keys, value):
    data = copy.deepcopy(conv_dag().to_dict())
    change(data, *keys, to=value)
    with pytest.raises(ValueError):
        from_dict(data)


@pytest.mark.parametrize("data", [None, [], {}, {"format": "ann2snn-dag-1"}])
def test_from_dict_refuses_what_is_no_network(data):
    with pytest.raises(ValueError):
        from_dict(data)


def test_from_dict_inverts_to_dict():
    dag = SpikeDAGModule()
    dag.add_input("x")
    dag.add_op("conv1", SpikeConv2d(1, 2, 3, padding=1, groups=1, bias=False), ["x"], ["conv1_out1"], "a.b")
    dag.add_op("linear1", SpikeLinear(4, 3), ["conv1_out1"], ["linear1_out1"], "c")
    dag.outputs_nodes = ("linear1_out1", "conv1_out1")
    again, x = from_dict(dag.to_dict()), torch.randn(2, 1, 4, 4)
    assert again.table() == dag.table()
    assert [torch.equal(a, b) for a, b in zip(again(x), dag(x), strict=True)] == [True, True]
