"""Checks of a saved network before it runs: its fields, the kinds of values that its ops read, and shapes.

check_network_data(data)             # plain data of a file: type and range of every field, before any is used
check_tensors(name, op, tensors)     # the tensors of an op, before the op takes them
check_spikes(dag)                    # the kinds that ops of a converted network read: activations, currents or spikes
check_sample(entry, values, output)  # shapes, as soon as there are inputs
"""

import reprlib

import torch

from runtime.rules import (
    BOOL,
    DICT,
    INTEGERS,
    NAMES,
    NONE,
    NUMBER,
    POSITIVE,
    POTENTIALS,
    STEPS,
    TEXT,
    WEIGHTS,
    Rule,
    either,
    instance,
    one_of,
    several,
    tensor,
    whole,
)
from runtime.torch_files import FLOATS, OtherFile, unusual_kind
from spike_layers import ANALOG, CURRENT, OP_TYPES, SPIKES
from spike_neurons import RESET_MODES
from spike_simulator import Misfit


class DamagedData(OtherFile):
    """Plain data that no valid network has. The message names the op and the field."""

    def __init__(self, fault):
        super().__init__(f"damaged network data: {fault}")


# ---------------------------------------------------------------------------------------------------------------------
# The fields of plain data, each with its rule

NETWORK = {
    "inputs_nodes": NAMES,
    "outputs_nodes": NAMES,
    "timesteps": either(NONE, STEPS),
    "training": BOOL,
    "ops": instance((list, tuple), "a list"),
}
PREPROCESSING = {
    "input_shape": several(whole(1, 65536), 3, 3),
    "mean": either(NONE, several(NUMBER, 1, 65536)),
    "std": either(NONE, several(POSITIVE, 1, 65536)),
    "resize": either(NONE, whole(1, 65536)),
    "classes": NAMES,
}
OP = {
    "name": TEXT,
    "type": TEXT,
    "config": DICT,
    "in_nodes": NAMES,
    "out_nodes": several(TEXT, 1, 1),
    "path": TEXT,
    "spiking": BOOL,
    "neuron": either(NONE, DICT),
    "tensors": DICT,
}
OP_OF_LATER_FILES = {
    "frozen": Rule(
        lambda value: isinstance(value, (list, tuple)) and all(one_of("weight", "bias").holds(x) for x in value),
        "a list of 'weight', 'bias'",
    ),
    "levels": either(NONE, STEPS),
    "weight_bits": either(NONE, whole(1, 8), whole(32, 32)),
    "largest_input": either(NONE, whole(1, 255)),  # as many spikes as uint8 counts
    "weight_back": either(NONE, WEIGHTS),
}
NEURON = {
    "Vthr": tensor(torch.int32, *FLOATS, positive=True),
    "scale_factor": tensor(*FLOATS, positive=True),
    "initial_potential": POTENTIALS,
    "reset_mode": one_of(*RESET_MODES),
}
NEURON_OF_LATER_FILES = {
    "largest_current": either(NONE, whole(0, 2**53)),  # up to here float64 holds every integer
    "spike_type": Rule(lambda value: value in (torch.uint8, torch.float64), "torch.uint8 or torch.float64"),
    "listen": whole(0, 65536),
    "window": either(NONE, whole(1, 65536)),
}
TENSORS = {
    "weight": WEIGHTS,
    "bias": WEIGHTS,
    "weight_scale": WEIGHTS,
    "weight_q": INTEGERS,
    "bias_q": POTENTIALS,
    "unit": tensor(*FLOATS, positive=True),
    "levels.scale": WEIGHTS,
    "slope": WEIGHTS,
    "signs": WEIGHTS,
    "branch_weight0": POTENTIALS,
    "branch_weight1": POTENTIALS,
}


# ---------------------------------------------------------------------------------------------------------------------
# Checks of plain data


def check_network_data(data):
    """Raise DamagedData unless every field of data from `SpikeDAGModule.to_dict` has its type and range."""
    check_fields("the network", data, NETWORK)
    if data.get("preprocessing") is not None:  # older files lack it
        check_preprocessing(data["preprocessing"])
    for place, entry in enumerate(data["ops"]):
        if not isinstance(entry, dict):
            raise DamagedData(f"op {place} is {in_short(entry)}")
        check_op(entry, entry["name"] if isinstance(entry.get("name"), str) else f"op {place}")
    if data["timesteps"] is None and any(entry["neuron"] is not None for entry in data["ops"]):
        raise DamagedData("the network timesteps None, but it has neurons")
    check_types(data["ops"])


def check_preprocessing(facts):
    """Raise DamagedData unless what a file says of the network's images has the types and ranges of PREPROCESSING."""
    if not isinstance(facts, dict):
        raise DamagedData(f"the network preprocessing {in_short(facts)}: use {DICT.words}")
    check_known("preprocessing", facts, PREPROCESSING)
    check_fields("preprocessing", facts, PREPROCESSING)
    for key in ("mean", "std"):
        if facts[key] is not None and len(facts[key]) != facts["input_shape"][0]:
            raise DamagedData(
                f"preprocessing {key} has {len(facts[key])} values for {facts['input_shape'][0]} channels"
            )
    if (facts["mean"] is None) != (facts["std"] is None):
        raise DamagedData("preprocessing has one of mean and std, not both")


def check_types(ops):
    """Raise DamagedData unless weights, biases and scale_factors have one type: they meet in layers that stay ANN."""
    first = None
    for entry in ops:
        tensors = {key: entry["tensors"].get(key) for key in ("weight", "bias")}
        tensors["neuron scale_factor"] = None if entry["neuron"] is None else entry["neuron"]["scale_factor"]
        for key, value in tensors.items():
            first = value if first is None else first
            if value is not None and value.dtype != first.dtype:
                raise DamagedData(f"{entry['name']} {key} is {value.dtype}, what stands before it {first.dtype}")


def check_fields(where, values, rules, may_lack=()):
    """Raise DamagedData for the first field that breaks its rule, or is missing and not in `may_lack`."""
    for field, rule in rules.items():
        if field not in values:
            if field not in may_lack:
                raise DamagedData(f"{where} lacks {field}")
        elif not rule.holds(values[field]):
            raise DamagedData(f"{where} {field} {in_short(values[field])}: use {rule.words}")


def check_known(where, values, rules):
    """Raise DamagedData for the first field without a rule."""
    unknown = [field for field in values if field not in rules]
    if unknown:
        raise DamagedData(f"{where} {in_short(unknown[0])} is no field of it")


def check_op(entry, name):
    """Raise DamagedData unless every field of one op has its type and range, and none contradict each other."""
    check_fields(name, entry, OP | OP_OF_LATER_FILES, may_lack=OP_OF_LATER_FILES)
    kind, config, tensors, neuron = entry["type"], entry["config"], entry["tensors"], entry["neuron"]
    if kind not in OP_TYPES:
        raise DamagedData(f"unknown op type {kind:.40} of {name}")
    least, most = OP_TYPES[kind].arity
    if not least <= len(entry["in_nodes"]) <= most:
        raise DamagedData(f"{name} in_nodes {in_short(entry['in_nodes'])}: {kind} reads {least}")
    fields = OP_TYPES[kind].fields
    check_known(name, config, fields)
    check_fields(name, config, fields, may_lack=fields)  # the constructor reports missing arguments
    contradiction = OP_TYPES[kind].contradiction(config)
    if contradiction:
        raise DamagedData(f"{name} {contradiction}")
    check_known(name, tensors, TENSORS)
    check_fields(name, tensors, TENSORS, may_lack=TENSORS)
    if entry.get("levels") is not None and "levels.scale" not in tensors:
        raise DamagedData(f"{name} levels {entry['levels']} without levels.scale")
    if neuron is not None:
        rules = NEURON | NEURON_OF_LATER_FILES
        check_known(f"{name} neuron", neuron, rules)
        check_fields(f"{name} neuron", neuron, rules, may_lack=NEURON_OF_LATER_FILES)
    check_bits(name, entry.get("weight_bits"), tensors.get("weight_q"))


def check_bits(name, bits, weight_q):
    """Raise DamagedData if integer weights need more than `bits` bits."""
    if bits is None or bits > 8 or weight_q is None:
        return
    largest = max(2 ** (bits - 1) - 1, 1)
    if weight_q.max() > largest or weight_q.min() < -largest:
        raise DamagedData(f"{name} weight_q holds integers beyond {largest}, the largest of {bits} bits")


def in_short(value):
    """A value as messages show it: type and shape of a tensor, the beginning of a long value."""
    if isinstance(value, torch.Tensor):
        return f"({value.dtype} {list(value.shape)})" if unusual_kind(value) is None else "(another kind of tensor)"
    return reprlib.repr(value)


def check_tensors(name, op, tensors):
    """Raise DamagedData unless `tensors` are exactly those of the op, in the shapes of its configuration."""
    expected = op.state_dict()
    for key, value in expected.items():
        if key not in tensors:
            raise DamagedData(f"{name} lacks the tensor {key} {list(value.shape)}")
        if tensors[key].shape != value.shape:
            raise DamagedData(f"{name} {key} {list(tensors[key].shape)}: the op has {list(value.shape)}")
    more = [key for key in tensors if key not in expected]
    if more:
        raise DamagedData(f"{name} holds the tensor {more[0]}, which the op does not have")


def check_integers(name, op, weight_back):
    """Raise DamagedData unless all tensors that belong to a layer's weights fit them.

    weight_q and weight_back need the shape of the weight, bias_q is [C_out], and unit and weight_scale broadcast.
    """
    channels = op.output_channels
    exact = {"weight_q": getattr(op, "weight_q", None), "weight_back": weight_back}
    for key, value in exact.items():
        if value is not None and value.shape != op.weight.shape:
            raise DamagedData(f"{name} {key} {list(value.shape)}: the weight is {list(op.weight.shape)}")
    bias_q, unit, scale = getattr(op, "bias_q", None), getattr(op, "unit", None), op.weight_scale
    if bias_q is not None and bias_q.shape != (channels,):
        raise DamagedData(f"{name} bias_q {list(bias_q.shape)}: use [{channels}]")
    if unit is not None and not broadcasts(unit, (channels, *[1] * op.spatial)):
        raise DamagedData(f"{name} unit {list(unit.shape)}: use a number, or one for each of {channels} outputs")
    if scale is not None and not broadcasts(scale, op.weight.shape):
        raise DamagedData(f"{name} weight_scale {list(scale.shape)}: the weight is {list(op.weight.shape)}")


def broadcasts(values, shape):
    """Whether a tensor can be expanded to this shape."""
    fits = all(extent in (1, wanted) for extent, wanted in zip(reversed(values.shape), reversed(shape)))
    return values.dim() <= len(shape) and fits


# ---------------------------------------------------------------------------------------------------------------------
# The kinds that ops read


def check_spikes(dag):
    """Raise DamagedData unless every op of a converted network can read the kinds of its inputs."""
    neurons = dag.neurons()
    if not neurons:
        return
    if len({neuron.spike_type for neuron in neurons.values()}) > 1:
        raise DamagedData("the neurons' spike_type is not the same in all layers")
    kinds = dict.fromkeys(dag.inputs_nodes, ANALOG)
    for name, entry in dag.ops.items():
        kinds[entry.out] = kind_sent(name, entry.op, [kinds[node] for node in entry.inputs])
    currents = [node for node in dag.outputs_nodes if kinds[node] == CURRENT]
    if currents:
        raise DamagedData(f"the output {currents[0]} is a current, which no neuron turns into spikes")


def kind_sent(name, op, read):
    """The kind that an op sends: ANALOG, CURRENT or SPIKES. read: the kinds of its inputs.

    Raises DamagedData if it cannot read these kinds.
    """
    if not op.spiking:
        if op.neuron is not None or CURRENT in read:
            raise DamagedData(f"{name} spiking False, but it {'reads currents' if CURRENT in read else 'has neurons'}")
        return ANALOG
    read = [SPIKES if kind == SPIKES else CURRENT for kind in read]  # activations count as currents
    fault = op.misfit(read)
    if fault:
        raise DamagedData(f"{name} spiking True, but {fault}")
    if op.neuron is not None:
        return SPIKES
    return SPIKES if (op.passes_spikes or op.folded) and set(read) == {SPIKES} else CURRENT


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def check_sample(entry, activations, output):
    """Raise Misfit unless all tensors of a spiking op and its neuron fit the shapes of one sample.

    activations: node -> value of the sample in the ANN, [1, ...]. output: the op's output in the ANN, [1, ...].
    """
    op = entry.op
    if not op.spiking:
        return
    inputs = [activations[node] for node in entry.inputs]
    if op.arity == (2, 2) and inputs[0].shape != inputs[1].shape:
        raise Misfit(f"{entry.where} adds {list(inputs[0].shape)} and {list(inputs[1].shape)}")
    held = op.held(inputs, output)
    if op.neuron is not None:
        for key in ("Vthr", "scale_factor", "initial_potential"):
            held.append((key, getattr(op.neuron, key), output.shape[1:]))
    for key, values, shape in held:
        if values is not None and not broadcasts(values, shape):
            raise Misfit(f"{entry.where} {key} {list(values.shape)} does not fit values of {list(shape)}")
