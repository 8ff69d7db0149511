"""What keeps a network of ops from running, said before it does: values of its saved fields, what its ops read, shapes.

check_network_data(data)             # plain data of a file: types and ranges of every field, before any is used
check_tensors(name, op, tensors)     # the tensors of an op, before it takes them
check_spikes(dag)                    # what the ops of a converted network read: activations, currents or spikes
run_ann_op(where, op, inputs)        # shapes, once there are inputs
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from runtime.torch_files import FLOATS, OtherFile, unusual_kind
from spike_layers import (
    OP_TYPES,
    ConcatOp,
    SignedReLU,
    SpikeAdd,
    SpikeAvgPool2d,
    SpikeBatchNorm,
    SpikeMaxPool2d,
    SpikePad,
    SpikeReLU,
    ViewOp,
    WeightedLayer,
)
from spike_neurons import RESET_MODES


class DamagedData(OtherFile):
    """Plain data of a network that none has; the message names the op and the field."""

    def __init__(self, fault):
        super().__init__(f"damaged network data: {fault}")


class Misfit(ValueError, RuntimeError):
    """Inputs that the network cannot take; a RuntimeError too, as PyTorch's own of the same kind."""


# ---------------------------------------------------------------------------------------------------------------------
# Rules: what one field may hold


@dataclass(frozen=True)
class Rule:
    """Whether a field may hold a value, and in words which ones."""

    holds: Callable
    words: str


def whole(least, most):
    def holds(value):
        return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most

    return Rule(holds, f"a whole number, {least} to {most}")


def instance(kind, words):
    return Rule(lambda value: isinstance(value, kind), words)


def one_of(*choices):
    """One of these strings."""
    return Rule(lambda value: isinstance(value, str) and value in choices, ", ".join(map(repr, choices)))


def either(*rules):
    return Rule(lambda value: any(rule.holds(value) for rule in rules), " or ".join(rule.words for rule in rules))


def several(rule, least, most):
    """A tuple or list of `least` to `most` such values."""

    def holds(value):
        return isinstance(value, (tuple, list)) and least <= len(value) <= most and all(map(rule.holds, value))

    count = least if least == most else f"{least} to {most}"
    return Rule(holds, f"{count} times {rule.words}")


def pair(rule):
    """One value for height and width, or two."""
    return Rule(either(rule, several(rule, 2, 2)).holds, f"{rule.words}, or two of them")


def tensor(*dtypes, positive=False):
    """A tensor of one of these types with finite values, which lie in memory as often as it says."""

    def holds(value):
        is_plain = isinstance(value, torch.Tensor) and unusual_kind(value) is None and value.dtype in dtypes
        if not is_plain or not value.numel() or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            return False
        return bool(torch.isfinite(value).all()) and not (positive and not bool((value > 0).all()))

    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Rule(holds, f"a tensor of {'positive' if positive else 'finite'} numbers ({names})")


NONE = Rule(lambda value: value is None, "None")
BOOL = instance(bool, "True or False")
TEXT = instance(str, "a string")
NAMES = Rule(several(TEXT, 0, 2**31).holds, "a tuple of strings")
DICT = instance(dict, "a dictionary")
POSITIVE = Rule(
    lambda value: isinstance(value, Real) and not isinstance(value, bool) and 0 < value <= 3e38, "a positive number"
)
STEPS = whole(1, 65536)
CHANNELS = whole(1, 2**31 - 1)
SIZE = pair(whole(1, 65536))  # of a window, and between windows
PADDING = pair(whole(0, 4096))  # beyond it, zeros alone would fill the memory
DIM = whole(1, 8)
WEIGHTS = tensor(*FLOATS)
INTEGERS = tensor(torch.int8, torch.int32, *FLOATS)  # floats at 32 bits
POTENTIALS = tensor(torch.int32, *FLOATS)

NETWORK = {
    "inputs_nodes": NAMES,
    "outputs_nodes": NAMES,
    "timesteps": either(NONE, STEPS),
    "training": BOOL,
    "ops": instance((list, tuple), "a list"),
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
    "largest_input": either(NONE, whole(1, 255)),
    "weight_back": either(NONE, WEIGHTS),
}
NEURON = {
    "Vthr": tensor(torch.int32, *FLOATS, positive=True),
    "scale_factor": tensor(*FLOATS, positive=True),
    "initial_potential": POTENTIALS,
    "reset_mode": one_of(*RESET_MODES),
}
NEURON_OF_LATER_FILES = {
    "largest_current": either(NONE, whole(0, 2**53)),
    "spike_type": Rule(lambda value: value in (torch.uint8, torch.float64), "torch.uint8 or torch.float64"),
    "listen": whole(0, 65536),
}
TENSORS = {
    "weight": WEIGHTS,
    "bias": WEIGHTS,
    "weight_scale": WEIGHTS,
    "weight_q": INTEGERS,
    "bias_q": POTENTIALS,
    "unit": tensor(*FLOATS, positive=True),
    "levels.scale": WEIGHTS,
    "branch_weight0": POTENTIALS,
    "branch_weight1": POTENTIALS,
}
WINDOW = {"kernel_size": SIZE, "stride": SIZE, "padding": PADDING, "dilation": SIZE}
CONVOLUTION = {"in_channels": CHANNELS, "out_channels": CHANNELS, **WINDOW, "groups": CHANNELS, "bias": BOOL}
PADDED_CONVOLUTION = CONVOLUTION | {"padding": either(PADDING, one_of("same", "valid"))}
CONFIGS = {
    "SpikeConv2d": PADDED_CONVOLUTION,
    "SpikeConvBN": PADDED_CONVOLUTION,
    "SpikeConvTranspose2d": CONVOLUTION | {"output_padding": PADDING},
    "SpikeAvgPool2d": {
        "channels": CHANNELS,
        "kernel_size": SIZE,
        "stride": SIZE,
        "padding": PADDING,
        "folded": BOOL,
        "input_size": either(NONE, several(whole(1, 65536), 2, 2)),
    },
    "SpikeMaxPool2d": WINDOW | {"ceil_mode": BOOL, "mode": either(NONE, one_of(*SpikeMaxPool2d.modes))},
    "SpikeLinear": {"in_features": CHANNELS, "out_features": CHANNELS, "bias": BOOL},
    "SpikeBatchNorm": {"channels": CHANNELS},
    "SpikeReLU": {"ceiling": either(NONE, POSITIVE)},
    "SignedReLU": {},
    "SpikeAdd": {"branch_weights": several(either(NONE, POTENTIALS), 2, 2)},
    "ConcatOp": {"dim": DIM},
    "SpikePad": {"pads": several(whole(-4096, 4096), 4, 4)},
    "ViewOp": {"shape": several(CHANNELS, 0, 8)},
    "SoftmaxOp": {"dim": either(DIM, whole(-8, -1)), "log": BOOL},
}


# ---------------------------------------------------------------------------------------------------------------------
# Plain data


def check_network_data(data):
    """Raise DamagedData unless every field of `SpikeDAGModule.to_dict`'s data is of its type and in its range."""
    check_fields("the network", data, NETWORK)
    for place, entry in enumerate(data["ops"]):
        if not isinstance(entry, dict):
            raise DamagedData(f"op {place} is {in_short(entry)}")
        check_op(entry, entry["name"] if isinstance(entry.get("name"), str) else f"op {place}")
    if data["timesteps"] is None and any(entry["neuron"] is not None for entry in data["ops"]):
        raise DamagedData("the network timesteps None, but it has neurons")
    check_types(data["ops"])


def check_types(ops):
    """Raise DamagedData unless weights and what spikes stand for are of one type: they meet in layers that stay ANN."""
    first = None
    for entry in ops:
        tensors = {key: entry["tensors"].get(key) for key in ("weight", "bias")}
        tensors["neuron scale_factor"] = None if entry["neuron"] is None else entry["neuron"]["scale_factor"]
        for key, value in tensors.items():
            first = value if first is None else first
            if value is not None and value.dtype != first.dtype:
                raise DamagedData(f"{entry['name']} {key} is {value.dtype}, what stands before it {first.dtype}")


def check_fields(where, values, rules, may_lack=()):
    """Raise DamagedData that names the first field that is missing or breaks its rule."""
    for field, rule in rules.items():
        if field not in values:
            if field not in may_lack:
                raise DamagedData(f"{where} lacks {field}")
        elif not rule.holds(values[field]):
            raise DamagedData(f"{where} {field} {in_short(values[field])}: use {rule.words}")


def check_known(where, values, rules):
    """Raise DamagedData that names the first field that there is no rule for."""
    unknown = [field for field in values if field not in rules]
    if unknown:
        raise DamagedData(f"{where} {in_short(unknown[0])} is no field of it")


def check_op(entry, name):
    """Raise DamagedData unless the fields of one op are of their types and in their ranges."""
    check_fields(name, entry, OP | OP_OF_LATER_FILES, may_lack=OP_OF_LATER_FILES)
    kind, config, tensors, neuron = entry["type"], entry["config"], entry["tensors"], entry["neuron"]
    if kind not in OP_TYPES:
        raise DamagedData(f"unknown op type {kind:.40} of {name}")
    least, most = {"SpikeAdd": (2, 2), "ConcatOp": (1, 2**31)}.get(kind, (1, 1))
    if not least <= len(entry["in_nodes"]) <= most:
        raise DamagedData(f"{name} in_nodes {in_short(entry['in_nodes'])}: {kind} reads {least}")
    check_known(name, config, CONFIGS[kind])
    check_fields(name, config, CONFIGS[kind], may_lack=CONFIGS[kind])  # the constructor names what it needs
    check_geometry(name, kind, config)
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
    """Raise DamagedData where integer weights need more bits than the layer has."""
    if bits is None or bits > 8 or weight_q is None:
        return
    largest = max(2 ** (bits - 1) - 1, 1)
    if weight_q.max() > largest or weight_q.min() < -largest:
        raise DamagedData(f"{name} weight_q holds integers beyond {largest}, the largest of {bits} bits")


def check_geometry(name, kind, config):
    """Raise DamagedData where fields of a window or a convolution contradict each other."""
    stride, padding, dilation = config.get("stride", 1), config.get("padding", 0), config.get("dilation", 1)
    groups, channels = config.get("groups", 1), (config.get("in_channels", 0), config.get("out_channels", 0))
    if channels[0] % groups or channels[1] % groups:
        raise DamagedData(f"{name} groups {groups} do not divide the {channels[0]} and {channels[1]} channels")
    if padding == "same" and max(as_pair(stride)) > 1:
        raise DamagedData(f"{name} stride {stride}: padding 'same' takes stride 1")
    if kind in ("SpikeAvgPool2d", "SpikeMaxPool2d"):
        windows = zip(as_pair(config.get("kernel_size", 1)), as_pair(dilation), as_pair(padding))
        if any(2 * pad > step * (size - 1) + 1 for size, step, pad in windows):
            raise DamagedData(f"{name} padding {padding}: use at most half of kernel_size")
    more = zip(as_pair(config.get("output_padding", 0)), as_pair(stride), as_pair(dilation))
    if kind == "SpikeConvTranspose2d" and any(pad >= max(steps) for pad, *steps in more):
        raise DamagedData(f"{name} output_padding {config['output_padding']}: use less than stride or dilation")


def as_pair(value):
    """A size for height and width, as two."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def in_short(value):
    """A value in a message: of tensors type and shape, of long ones the beginning."""
    if isinstance(value, torch.Tensor):
        return f"({value.dtype} {list(value.shape)})" if unusual_kind(value) is None else "(another kind of tensor)"
    return reprlib.repr(value)


def check_tensors(name, op, tensors):
    """Raise DamagedData unless `tensors` are those of the op, in the shapes that its configuration declares."""
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
    """Raise DamagedData unless what belongs to the weights of a layer has their shape, or one value for each output."""
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
    """Whether a tensor expands to this shape."""
    fits = all(extent in (1, wanted) for extent, wanted in zip(reversed(values.shape), reversed(shape)))
    return values.dim() <= len(shape) and fits


# ---------------------------------------------------------------------------------------------------------------------
# What ops read

ACTIVATIONS, CURRENTS, SPIKES = "activations", "currents", "spikes"


def check_spikes(dag):
    """Raise DamagedData unless every op of a converted network can work on what it reads."""
    neurons = dag.neurons()
    if not neurons:
        return
    if len({neuron.spike_type for neuron in neurons.values()}) > 1:
        raise DamagedData("the neurons' spike_type is not the same in all layers")
    kinds = dict.fromkeys(dag.inputs_nodes, ACTIVATIONS)
    for name, entry in dag.ops.items():
        op, (out,) = entry["op"], entry["out_nodes"]
        kinds[out] = kind_sent(name, op, [kinds[node] for node in entry["in_nodes"]])
    currents = [node for node in dag.outputs_nodes if kinds[node] == CURRENTS]
    if currents:
        raise DamagedData(f"the output {currents[0]} is a current, which no neuron turns into spikes")


def kind_sent(name, op, read):
    """What an op sends, by what it reads. Raises DamagedData where it cannot work on that."""
    if not op.spiking:
        if op.neuron is not None or CURRENTS in read:
            raise DamagedData(f"{name} spiking False, but it {'reads currents' if CURRENTS in read else 'has neurons'}")
        return ACTIVATIONS
    read = [SPIKES if kind == SPIKES else CURRENTS for kind in read]  # activations flow into neurons as they are
    fault = fault_of_spiking(op, read)
    if fault:
        raise DamagedData(f"{name} spiking True, but {fault}")
    if op.neuron is not None:
        return SPIKES
    passes = isinstance(op, (SpikeMaxPool2d, SpikeReLU, SpikePad, ViewOp, ConcatOp)) or getattr(op, "folded", False)
    return SPIKES if passes and set(read) == {SPIKES} else CURRENTS


def fault_of_spiking(op, read):
    """Why a spiking op cannot work on what it reads, in words, or None."""
    has_neurons, reads_spikes = op.neuron is not None, SPIKES in read
    if isinstance(op, SignedReLU):
        return None if has_neurons and not reads_spikes else "it reads spikes, or has no neurons"
    if isinstance(op, SpikeReLU):
        return None if has_neurons != reads_spikes else "it takes neurons for currents and none for spikes"
    if isinstance(op, SpikeAdd):
        weights = op.branch_weight0, op.branch_weight1
        lacks = any(kind == SPIKES and weight is None for kind, weight in zip(read, weights))
        return "spikes that it adds have no weight" if lacks else None
    if isinstance(op, (WeightedLayer, SpikeBatchNorm)) and not hasattr(op, "weight_q"):
        return "it has no weight_q"
    if isinstance(op, SpikeAvgPool2d):
        return "it is folded, or reads currents, and has neurons" if has_neurons and takes_none(op, read) else None
    if isinstance(op, WeightedLayer):
        return None
    if has_neurons or not isinstance(op, (SpikeBatchNorm, SpikeMaxPool2d, SpikePad, ViewOp, ConcatOp)):
        return "it has no place for neurons"
    if isinstance(op, SpikeBatchNorm) and op.bias_q is None:
        return "it has no bias_q"
    if isinstance(op, SpikeMaxPool2d) and (op.mode is None or not reads_spikes):
        return "it reads no spikes, or has no mode"
    return None


def takes_none(pool, read):
    """Whether an average pooling has no neurons of its own, for what it reads."""
    return pool.folded or SPIKES not in read


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def run_ann_op(where, op, inputs):
    """What an op returns for activations [B, ...]. Raises Misfit, which names it, where their shapes do not suit it."""
    try:
        return op(*inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = " and ".join(str(list(x.shape)) for x in inputs)
        reason = (str(error).splitlines() or [""])[0]
        raise Misfit(f"{where} cannot run on inputs of {shapes}: {reason}") from error


def check_sample(where, op, inputs, output):
    """Raise Misfit unless what a spiking op holds for neurons or channels suits the shapes of one sample, [1, ...]."""
    if not op.spiking:
        return
    sample = output.shape[1:]
    held = [(key, getattr(op, key, None), sample) for key in ("unit", "weight_q", "bias_q")]
    if isinstance(op, WeightedLayer):
        held = held[:1]  # its integers have the shape of its weights (`check_integers`)
    if isinstance(op, SpikeAdd):
        held += [(f"branch_weight{i}", getattr(op, f"branch_weight{i}"), x.shape[1:]) for i, x in enumerate(inputs)]
        if len({x.shape for x in inputs}) > 1:
            raise Misfit(f"{where} adds {list(inputs[0].shape)} and {list(inputs[1].shape)}")
    if op.neuron is not None:
        held += [(key, getattr(op.neuron, key), sample) for key in ("Vthr", "scale_factor", "initial_potential")]
    for key, values, shape in held:
        if values is not None and not broadcasts(values, shape):
            raise Misfit(f"{where} {key} {list(values.shape)} does not fit values of {list(shape)}")
