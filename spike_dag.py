"""SpikeDAGModule: a network as a list of ops in topological order, ANN and SNN alike.

`nodes` names every value, `ops` every layer: {'op': layer, 'in_nodes': names, 'out_nodes': names, 'path': module path
in the user's network}. `torch.save(dag, file)` writes plain data, and `torch.load(file)`, with its safe default
`weights_only=True`, rebuilds the network from it once this module is imported.
"""

import copy
import math
from collections import OrderedDict

import torch
from torch import nn

from dag_checks import DamagedData, check_integers, check_network_data, check_sample, check_spikes, check_tensors
from options import check_option
from runtime.torch_files import OtherFile, read_torch_file
from spike_layers import OP_TYPES
from spike_neurons import ClipFloorShift, IFNeuron
from spike_simulator import duration, run_ops, simulate

FORMAT = "ann2snn-dag-1"
ENGINES = {"auto": torch.uint8, "reference": torch.float64}


class OpEntry(dict):
    """One op of a network: the dict {'op', 'in_nodes', 'out_nodes', 'path'} with its contents as attributes.

    name: of the op. inputs: names of the nodes that it reads. out: name of the node that it writes. path: of the module
    in the user's network.
    """

    def __init__(self, name, op, in_nodes, out_nodes, path=""):
        self.name = name
        self["op"], self["in_nodes"], self["out_nodes"], self["path"] = op, in_nodes, out_nodes, path

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        if key == "out_nodes":
            (self.out,) = value
        else:
            setattr(self, "inputs" if key == "in_nodes" else key, value)

    @property
    def where(self):
        """The op as messages name it: "conv2 (layer1.0.conv1)"."""
        return f"{self.name} ({self.path})" if self.path else self.name


class SpikeDAGModule(nn.Module):
    """Runs `ops` in order, from `inputs_nodes` to `outputs_nodes`.

    nodes: OrderedDict, node name (`<op_name>_out<id>`) -> value while a forward pass runs, else None.
    ops: OrderedDict, op name (`<op_type><id>`) -> {'op', 'in_nodes', 'out_nodes', 'path'}.
    timesteps: T of a converted network, None for an ANN. memory_budget: bytes that a simulation may work with at a
    time, None for what suits the device. scales_of_conversion: of a network that is to be finetuned for spikes, a
    function (network, per_channel) -> {op name: weight scale}, of the layers whose scale its conversion will decide.
    """

    def __init__(self):
        super().__init__()
        self.nodes = OrderedDict()
        self.ops = OrderedDict()
        self.inputs_nodes = ()
        self.outputs_nodes = ()
        self.timesteps = None
        self.memory_budget = None
        self.scales_of_conversion = None
        self.largest_by_shape = {}

    def add_input(self, node):
        """Declare one more input node."""
        if node in self.nodes:
            raise ValueError(f"the name {node} is taken")
        self.nodes[node] = None
        self.inputs_nodes += (node,)

    def add_op(self, name, op, in_nodes, out_nodes, path=""):
        """Append an op. Raises ValueError where a node does not exist yet, or a name is taken."""
        for node in in_nodes:
            if node not in self.nodes:
                raise ValueError(f"{name} reads the node {node}, which no op before it writes")
        for taken in [node for node in out_nodes if node in self.nodes] + [name] * (name in self.ops):
            raise ValueError(f"{name}: the name {taken} is taken")
        self.add_module(name, op)
        self.ops[name] = OpEntry(name, op, tuple(in_nodes), tuple(out_nodes), path)
        self.nodes.update(dict.fromkeys(out_nodes))

    def lint(self):
        """Raise ValueError unless every node is written once, before it is read, and every output exists."""
        written = set(self.inputs_nodes)
        for name, entry in self.ops.items():
            missing = [node for node in entry.inputs if node not in written]
            if missing:
                raise ValueError(f"{name}: node {missing[0]} is not written before")
            if entry.out in written:
                raise ValueError(f"{name}: node {entry.out} is taken")
            if getattr(self, name) is not entry.op:
                raise ValueError(f"{name}: the op in `ops` is not the registered module")
            written.add(entry.out)
        lost = [node for node in self.outputs_nodes if node not in written]
        if lost or not self.outputs_nodes or not self.inputs_nodes:
            raise ValueError(f"the graph lacks {f'the output {lost[0]}' if lost else 'inputs or outputs'}")

    def forward(self, *inputs, timesteps=None, every_step=False):
        """The network's output(s): [B, ...].

        Converted: simulates `timesteps` steps (default: those it was converted for; what `hold_back` adds to biases
        suits no others); with `every_step` the outputs after each step of the last spiking layer, [T, B, ...], which
        are those of shorter simulations where no layer listens first or between stays ANN. Only what stays ANN behind
        the last spikes has gradients.
        """
        if len(inputs) != len(self.inputs_nodes):
            raise ValueError(f"the network takes {len(self.inputs_nodes)} inputs, got {len(inputs)}")
        if not self.is_spiking():
            return one_or_all(self.forward_ann(inputs))
        timesteps = self.timesteps if timesteps is None else check_option("timesteps", timesteps)
        inputs = check_inputs(self, inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):  # integers are not exact in narrower types
            return one_or_all(simulate(self, inputs, timesteps, every_step))

    def forward_ann(self, inputs, watch=None):
        """The outputs of a network as an ANN, a list; `watch` as in `spike_simulator`."""
        self.nodes.update(zip(self.inputs_nodes, inputs))
        try:
            run_ops(self.ops.values(), self.nodes, watch=watch, wanted=self.outputs_nodes)
            return [self.nodes[node] for node in self.outputs_nodes]
        finally:
            self.nodes.update(dict.fromkeys(self.nodes))

    def note_sizes(self, shapes):
        """Tell what `largest_sample` would find out. shapes: node -> shape of a sample, of every node."""
        size = max(math.prod(shape) for shape in shapes.values())
        self.largest_by_shape = {"shape": shapes[self.inputs_nodes[0]], "size": size}

    def largest_sample(self, inputs):
        """Elements of the largest value of one sample, for inputs of this shape."""
        shape = tuple(inputs[0].shape[1:])
        if self.largest_by_shape.get("shape") != shape:
            values = dict(zip(self.inputs_nodes, [x[:1] for x in inputs]))
            sizes = [inputs[0][:1].numel()]

            def look(name, current, value):
                check_sample(self.ops[name], values, value)
                sizes.append(value.numel())

            with torch.no_grad():
                run_ops(self.ops.values(), values, watch=look)
            self.largest_by_shape = {"shape": shape, "size": max(sizes)}
        return self.largest_by_shape["size"]

    def readers(self, node):
        """Names of the ops that read a node, once per reading."""
        return [name for name, entry in self.ops.items() for read in entry.inputs if read == node]

    def writer(self, node):
        """Name of the op that writes a node, None for an input."""
        return next((name for name, entry in self.ops.items() if entry.out == node), None)

    def only_reader(self, node):
        """Name of the one op that reads a node, None where there are more, or the node is an output."""
        names = self.readers(node)
        return names[0] if len(names) == 1 and node not in self.outputs_nodes else None

    def is_spiking(self):
        """Whether the network is a converted one: neurons stand in it."""
        return bool(self.neurons())

    def neurons(self):
        """Op name -> IFNeuron of every spiking layer, in order; empty for an ANN."""
        return {name: entry.op.neuron for name, entry in self.ops.items() if entry.op.neuron is not None}

    def duration(self, timesteps=None):
        """Timesteps that the chip needs: firing, from image to image, to the answer (`spike_simulator.duration`)."""
        return duration(self, self.timesteps if timesteps is None else timesteps)

    def spiking_layers(self):
        """Names of the ops that fire, in order: the order of `spike_tensor.firing_ratios`."""
        return list(self.neurons())

    def set_engine(self, engine, memory_budget=None):
        """How to simulate: "auto" (the fastest exact way here) or "reference" (float64 in plain PyTorch throughout).

        memory_budget: bytes to work with at a time, at most; None for what suits the device.
        """
        if engine not in ENGINES:
            raise ValueError(f"unknown engine '{engine}', use one of {', '.join(ENGINES)}")
        self.memory_budget = memory_budget
        for neuron in self.neurons().values():
            neuron.spike_type = ENGINES[engine]

    def weighted_layers(self):
        """Op name -> layer with trained weights (convolutions and linear layers), in order."""
        return {name: entry.op for name, entry in self.ops.items() if entry.op.is_trained}

    def trained_parameters(self):
        """What finetuning moves: all parameters but those that the traced network has frozen, and fixed ones."""
        return [p for entry in self.ops.values() for p in entry.op.trained_parameters()]

    def where(self, name):
        """An op as messages name it: "conv2 (layer1.0.conv1)"."""
        return self.ops[name].where

    def table(self):
        """The ops as rows: op, type, module path, inputs, output."""
        rows = [("op", "layer", "module path", "inputs", "output")]
        for name, entry in self.ops.items():
            layer = str(entry.op).splitlines()[0].removesuffix("(") if entry.op.neuron else str(entry.op)
            rows.append((name, layer, entry.path, ", ".join(entry.inputs), entry.out))
        return rows

    def __str__(self):
        return format_table(self.table())

    def to_dict(self):
        """The whole network as plain data: names, numbers and tensors."""
        return {
            "format": FORMAT,
            "inputs_nodes": self.inputs_nodes,
            "outputs_nodes": self.outputs_nodes,
            "timesteps": self.timesteps,
            "training": self.training,
            "ops": [op_to_dict(entry) for entry in self.ops.values()],
        }

    def __reduce__(self):
        data = self.to_dict()
        if self.neurons():  # converted: only a quantized network is trained on from its file
            for entry in data["ops"]:
                entry["weight_back"] = None
        return from_dict, (data,)

    def __deepcopy__(self, memo):
        memo[id(self.scales_of_conversion)] = self.scales_of_conversion  # shared: it is never changed
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.largest_by_shape = {}
        for name, entry in self.ops.items():
            weight = getattr(entry.op, "weight", None)
            if hasattr(weight, "weight_back"):  # a Parameter does not copy its attributes
                copied.ops[name].op.weight.weight_back = weight.weight_back.clone()
        return copied


def check_inputs(dag, inputs):
    """The images as float32. Raises ValueError for none, and for NaN, which neurons would take for silence."""
    if not len(inputs[0]):
        raise ValueError("the batch is empty, give at least one image to simulate")
    for node, x in zip(dag.inputs_nodes, inputs):
        if not torch.isfinite(x).all():
            raise ValueError(f"{node} has NaN or infinite values, look at how the images are read and normalised")
    return tuple([x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in inputs])


def op_to_dict(entry):
    """One op as plain data."""
    op = entry.op
    return {
        "name": entry.name,
        "type": type(op).__name__,
        "config": op.config(),
        "in_nodes": entry["in_nodes"],
        "out_nodes": entry["out_nodes"],
        "path": entry.path,
        "spiking": op.spiking,
        "frozen": sorted(op.frozen),
        "levels": None if op.levels is None else op.levels.levels,
        "weight_bits": getattr(op, "weight_bits", None),
        "largest_input": getattr(op, "largest_input", None),
        "weight_back": getattr(getattr(op, "weight", None), "weight_back", None),
        "neuron": op.neuron.config() if op.neuron is not None else None,
        "tensors": {k: v.detach() for k, v in op.state_dict().items() if not k.startswith("neuron.")},
    }


def from_dict(data):
    """The network that `SpikeDAGModule.to_dict` described. Raises ValueError where the data is not one."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise OtherFile(f"it has no network of format {FORMAT}")
    check_network_data(data)
    try:
        dag = rebuild(data)
    except OtherFile:
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise DamagedData(f"{type(error).__name__}, {error}") from error
    check_spikes(dag)
    return dag


def rebuild(data):
    """The network of sound data."""
    dag = SpikeDAGModule()
    for node in data["inputs_nodes"]:
        dag.add_input(node)
    for entry in data["ops"]:
        dag.add_op(entry["name"], rebuild_op(entry), entry["in_nodes"], entry["out_nodes"], entry["path"])
    dag.outputs_nodes = tuple(data["outputs_nodes"])
    dag.timesteps = data["timesteps"]
    dag.train(data["training"])
    dag.lint()
    return dag


def rebuild_op(entry):
    """One op from its plain data."""
    with torch.device("meta"):  # takes no memory, however large the op says that it is
        op = OP_TYPES[entry["type"]](**entry["config"])
    tensors = dict(entry["tensors"])
    if "weight_q" in tensors:
        integers = tensors["weight_q"], tensors.get("bias_q")
        op.set_integers(*integers, tensors["unit"]) if "unit" in tensors else op.set_integers(*integers)
    if "weight_scale" in tensors:
        op.set_weight_scale(tensors["weight_scale"])
    if entry.get("levels") is not None:
        op.levels = ClipFloorShift(entry["levels"], tensors["levels.scale"])
    check_tensors(entry["name"], op, tensors)
    op.load_state_dict(tensors, assign=True)
    op.spiking = entry["spiking"]
    op.frozen = frozenset(entry.get("frozen", ()))  # older files have none
    if op.has_weights:
        op.weight_bits = entry.get("weight_bits")
        op.largest_input = entry.get("largest_input") or 1  # older files have none
        check_integers(entry["name"], op, entry.get("weight_back"))
        if entry.get("weight_back") is not None:
            op.weight.weight_back = entry["weight_back"]
    if entry["neuron"] is not None:
        op.neuron = IFNeuron(**entry["neuron"])
    return op


def load_dag(path):
    """The network saved in `path` by `torch.save`. Raises OSError or ValueError where it is missing or damaged."""
    # a block of safe_globals removes its names at the end, those too that were allowed before
    missing = [name for name in [from_dict] if name not in torch.serialization.get_safe_globals()]
    try:
        with torch.serialization.safe_globals(missing):
            dag = read_torch_file(path, takes_legacy=False)
    except OtherFile as error:
        raise ValueError(f"{path} holds no network of this toolkit: {error.found}, convert it again") from error
    if not isinstance(dag, SpikeDAGModule):
        raise ValueError(f"{path} holds a {type(dag).__name__}, not a network of this toolkit, convert it again")
    return dag


torch.serialization.add_safe_globals([from_dict])


def one_or_all(outputs):
    """The output, or a tuple where there are more."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def format_table(rows):
    """Rows of strings as aligned columns."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(str(cell).ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)
