"""SpikeDAGModule: an ANN or SNN as a list of ops in topological order.

`nodes` holds the name of every value. `ops` holds every layer: {'op': layer, 'in_nodes': names, 'out_nodes': names,
'path': module path in the user's network}. `torch.save(dag, file)` writes plain data. `torch.load(file)`, with its safe
default `weights_only=True`, rebuilds the network from this data once this module is imported.
"""

import copy
import math
from collections import OrderedDict

import torch
from torch import nn

from dag_checks import DamagedData, check_integers, check_network_data, check_sample, check_spikes, check_tensors
from options import check_option
from runtime.tensor_files import is_tensor_file, read_tensor_file
from runtime.torch_files import OtherFile, read_torch_file
from spike_layers import OP_TYPES
from spike_neurons import ClipFloorShift, IFNeuron
from spike_simulator import duration, run_ops, simulate

FORMAT = "ann2snn-dag-1"
CONVERT_ONE = "convert one with ann2snn.py"
ENGINES = {"auto": torch.uint8, "reference": torch.float64}  # name -> the type of spikes that selects it


class OpEntry(dict):
    """One op of a network: a dict {'op', 'in_nodes', 'out_nodes', 'path'} whose entries are attributes, too.

    name: the op's name. inputs: names of the nodes that it reads. out: name of the one node that it writes. path: path
    of the module in the user's network, "" if there is none.
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
    """A network that runs its `ops` in order, from `inputs_nodes` to `outputs_nodes`.

    nodes: OrderedDict, node name (`<op_name>_out<id>`) -> value during an ANN pass, else None.
    ops: OrderedDict, op name (`<op_type><id>`) -> OpEntry {'op', 'in_nodes', 'out_nodes', 'path'}.
    timesteps: T of a converted network, None for an ANN. memory_budget: most bytes of a simulation's working set, None
    for the default of the device. scales_of_conversion: None, or in a network that is finetuned for spikes a function
    (network, per_channel) -> {op name: s_w} for the layers whose s_w is decided by the conversion. preprocessing: what
    `inputs.preprocessing.Preprocessing.to_dict` says of the images that the network takes, or None. quantized_by: the
    flags of a finetuned network in a file (`finetuning.saved`), or None.
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
        self.preprocessing = self.quantized_by = None
        self.largest_by_shape = {}

    def add_input(self, node):
        """Append an input node. Raises ValueError if the name is taken."""
        if node in self.nodes:
            raise ValueError(f"the name {node} is taken")
        self.nodes[node] = None
        self.inputs_nodes += (node,)

    def add_op(self, name, op, in_nodes, out_nodes, path=""):
        """Append an op. Raises ValueError if it reads a node that does not exist yet, or if a name is taken."""
        for node in in_nodes:
            if node not in self.nodes:
                raise ValueError(f"{name} reads the node {node}, which no op before it writes")
        for taken in [node for node in out_nodes if node in self.nodes] + [name] * (name in self.ops):
            raise ValueError(f"{name}: the name {taken} is taken")
        self.add_module(name, op)
        self.ops[name] = OpEntry(name, op, tuple(in_nodes), tuple(out_nodes), path)
        self.nodes.update(dict.fromkeys(out_nodes))

    def lint(self):
        """Raise ValueError unless each node is written once, before it is read, and inputs and outputs exist."""
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
        """The network's output, or a tuple of outputs, [B, ...] each.

        A converted network simulates `timesteps` steps, by default the T of its conversion. (`hold_back` adjusts biases
        to that T.) every_step: return the outputs after each step of the last spiking layer, [T, B, ...]. They equal
        the outputs of shorter simulations unless a layer listens, or stays ANN between spiking ones. In a converted
        network only the ANN layers behind the last spikes have gradients. Raises ValueError for a wrong number of
        inputs, an empty batch, NaN or infinite inputs, `timesteps` out of range, and shapes that do not fit (Misfit).
        """
        if len(inputs) != len(self.inputs_nodes):
            raise ValueError(f"the network takes {len(self.inputs_nodes)} inputs, got {len(inputs)}")
        if not self.is_spiking():
            return one_or_all(self.forward_ann(inputs))
        timesteps = self.timesteps if timesteps is None else check_option("timesteps", timesteps)
        inputs = check_inputs(self, inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):  # narrower types are not exact for integers
            return one_or_all(simulate(self, inputs, timesteps, every_step))

    def forward_ann(self, inputs, watch=None):
        """The outputs of the network run as an ANN, a list of [B, ...]. watch: as in `spike_simulator`."""
        self.nodes.update(zip(self.inputs_nodes, inputs))
        try:
            run_ops(self.ops.values(), self.nodes, watch=watch, wanted=self.outputs_nodes)
            return [self.nodes[node] for node in self.outputs_nodes]
        finally:
            self.nodes.update(dict.fromkeys(self.nodes))

    def note_sizes(self, shapes):
        """Store the result of `largest_sample`, to save its pass. shapes: node -> shape of a sample, for all nodes."""
        size = max(math.prod(shape) for shape in shapes.values())
        self.largest_by_shape = {"shape": shapes[self.inputs_nodes[0]], "size": size}

    def largest_sample(self, inputs):
        """Number of elements of the largest node, per sample, for inputs [B, ...]. Raises Misfit for wrong shapes."""
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
        """Names of the ops that read a node; an op that reads it twice is listed twice."""
        return [name for name, entry in self.ops.items() for read in entry.inputs if read == node]

    def writer(self, node):
        """Name of the op that writes a node, or None for an input."""
        return next((name for name, entry in self.ops.items() if entry.out == node), None)

    def only_reader(self, node):
        """Name of the only op that reads a node. None if there are several or none, or if the node is an output."""
        names = self.readers(node)
        return names[0] if len(names) == 1 and node not in self.outputs_nodes else None

    def is_spiking(self):
        """Whether the network is converted: it has neurons."""
        return bool(self.neurons())

    def neurons(self):
        """Op name -> IFNeuron of every layer that fires, in order; empty for an ANN."""
        return {name: entry.op.neuron for name, entry in self.ops.items() if entry.op.neuron is not None}

    def duration(self, timesteps=None):
        """Timesteps that a chip needs: "firing", "interval" and "latency" (`spike_simulator.duration`)."""
        return duration(self, self.timesteps if timesteps is None else timesteps)

    def spiking_layers(self):
        """Names of the ops that fire, in order: the order of `spike_tensor.firing_ratios`."""
        return list(self.neurons())

    def set_engine(self, engine, memory_budget=None):
        """Choose the simulator: "auto" (the fastest exact one) or "reference" (float64 in plain PyTorch).

        memory_budget: most bytes of the working set, None for the default of the device. Raises ValueError for another
        engine.
        """
        if engine not in ENGINES:
            raise ValueError(f"unknown engine '{engine}', use one of {', '.join(ENGINES)}")
        self.memory_budget = memory_budget
        for neuron in self.neurons().values():
            neuron.spike_type = ENGINES[engine]

    def weighted_layers(self):
        """Op name -> layer, for all layers with trained weights (convolutions and linear layers), in order."""
        return {name: entry.op for name, entry in self.ops.items() if entry.op.is_trained}

    def trained_parameters(self):
        """The parameters that finetuning changes: all except fixed ones and those frozen in the traced network."""
        return [p for entry in self.ops.values() for p in entry.op.trained_parameters()]

    def where(self, name):
        """The op `name` as messages name it: "conv2 (layer1.0.conv1)"."""
        return self.ops[name].where

    def table(self):
        """The ops as rows of strings, after a row of headings: op, layer, module path, inputs, output."""
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
            "preprocessing": self.preprocessing,
            "training": self.training,
            "ops": [op_to_dict(entry) for entry in self.ops.values()],
            **({} if self.quantized_by is None else {"quantized_by": self.quantized_by}),
        }

    def __reduce__(self):
        data = self.to_dict()
        if self.neurons():  # a converted network is not trained further, so its file needs no weight_back
            for entry in data["ops"]:
                entry["weight_back"] = None
        return from_dict, (data,)

    def __deepcopy__(self, memo):
        memo[id(self.scales_of_conversion)] = self.scales_of_conversion  # shared, because it never changes
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.largest_by_shape = {}
        for name, entry in self.ops.items():
            weight = getattr(entry.op, "weight", None)
            if hasattr(weight, "weight_back"):  # a Parameter does not copy its attributes
                copied.ops[name].op.weight.weight_back = weight.weight_back.clone()
        return copied


def check_inputs(dag, inputs):
    """The inputs, [B, ...] each, with float16 and bfloat16 as float32.

    Raises ValueError for an empty batch, and for NaN or infinite values: a neuron with a NaN potential never fires.
    """
    if not len(inputs[0]):
        raise ValueError("the batch is empty, give at least one image to simulate")
    for node, x in zip(dag.inputs_nodes, inputs):
        if not torch.isfinite(x).all():
            raise ValueError(f"{node} has NaN or infinite values, look at how the images are read and normalised")
    return tuple([x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in inputs])


def op_to_dict(entry):
    """One op as plain data, a dict."""
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
    """The network described by the data of `SpikeDAGModule.to_dict`. Raises OtherFile for data of another kind.

    Raises DamagedData, an OtherFile, for data with a missing or invalid field; it names the op and the field.
    """
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
    """The network described by data that `check_network_data` accepts."""
    dag = SpikeDAGModule()
    for node in data["inputs_nodes"]:
        dag.add_input(node)
    for entry in data["ops"]:
        dag.add_op(entry["name"], rebuild_op(entry), entry["in_nodes"], entry["out_nodes"], entry["path"])
    dag.outputs_nodes = tuple(data["outputs_nodes"])
    dag.timesteps, dag.preprocessing = data["timesteps"], data.get("preprocessing")  # older files lack the latter
    dag.quantized_by = data.get("quantized_by")
    dag.train(data["training"])
    dag.lint()
    return dag


def rebuild_op(entry):
    """The layer described by the plain data of one op. Raises DamagedData for tensors that do not fit it."""
    with torch.device("meta"):  # takes no memory for any declared size
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
    op.frozen = frozenset(entry.get("frozen", ()))  # older files lack it
    if op.has_weights:
        op.weight_bits = entry.get("weight_bits")
        op.largest_input = entry.get("largest_input") or 1  # older files lack it
        check_integers(entry["name"], op, entry.get("weight_back"))
        if entry.get("weight_back") is not None:
            op.weight.weight_back = entry["weight_back"]
    if entry["neuron"] is not None:
        op.neuron = IFNeuron(**entry["neuron"])
    return op


def load_dag(path):
    """The network saved in `path` by `torch.save`, or as a file of safetensors (`export.safetensors`).

    Raises OSError for a missing file, and ValueError for a damaged file or one of another kind.
    """
    # safe_globals removes all its names at the end, even if they were allowed before: pass only the missing ones
    missing = [name for name in [from_dict] if name not in torch.serialization.get_safe_globals()]
    try:
        with torch.serialization.safe_globals(missing):
            is_tensors = is_tensor_file(path)
            dag = from_dict(read_tensor_file(path)) if is_tensors else read_torch_file(path, takes_legacy=False)
    except OtherFile as error:
        raise ValueError(
            f"{path} holds no network of this toolkit: {error.found}, convert one with ann2snn.py"
        ) from error
    if not isinstance(dag, SpikeDAGModule):
        raise ValueError(
            f"{path} holds a {type(dag).__name__}, not a network of this toolkit, convert one with ann2snn.py"
        )
    return dag


torch.serialization.add_safe_globals([from_dict])


def one_or_all(outputs):
    """The only output, or a tuple of several."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def span(values):
    """The range of a tensor as text: "least..most", or one number if all are equal."""
    least, most = values.min().item(), values.max().item()
    return f"{least:.4g}" if least == most else f"{least:.4g}..{most:.4g}"


def format_table(rows):
    """Rows of strings as one string with aligned columns."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(str(cell).ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)
