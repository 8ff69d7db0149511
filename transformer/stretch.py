"""A stretch of a network: found by the names of its layers, and traced while the rest runs as it is.

    stretch, dag = cut_out(net, ["layer1", "layer2.0"], (inputs,), {})

Only the stretch has to be traceable; the code before, beside and behind it may be any Python code. A call of a torch
function is recognised in another run by the module that makes it and by how many such calls the module made before.
"""

from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ann_parser import (
    RECORDING_FUNCTIONS,
    SHAPE_QUESTIONS,
    Trace,
    as_float32,
    check_finite_weights,
    check_same_output,
    refuse_compiled,
)
from conversion.lambdas import Groups
from rewrites.constants import fold_batch_norms
from rewrites.graph import remove_unread
from spike_layers import SpikeReLU

RELUS = (SpikeReLU.traced, SpikeReLU.traced_in_place)
RELU_NAMES = {resolve_name(f) for recorder in RELUS for f in RECORDING_FUNCTIONS[recorder]} | {
    f"torch.nn.functional.{name}" for name in ("relu", "relu6", "hardtanh")
}
# Python's operators that change their operand; others, such as `__rsub__` and `__getitem__`, do not
IN_PLACE_OPERATORS = {
    *("__iadd__", "__isub__", "__imul__", "__imatmul__", "__itruediv__", "__idiv__", "__ifloordiv__", "__imod__"),
    *("__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__setitem__", "__set__"),
}


@dataclass
class StretchCall:
    """A call of a torch function that belongs to the stretch.

    inputs: position among the call's arguments, nested ones counted -> number of the stretch's input at this position.
    output: number of the stretch's output that the call returns, None for a value that only the stretch reads.
    """

    inputs: dict
    output: int | None = None


@dataclass
class Stretch:
    """layers: the module paths that the user named. calls: key of a call (`CallCounter`) -> StretchCall."""

    layers: tuple
    calls: dict = field(default_factory=dict)
    num_inputs: int = 0
    num_outputs: int = 0

    def __str__(self):
        return layers_in_words(self.layers)


def layers_in_words(layers):
    """The first and the last layer of a list, for messages."""
    first, last = layers[0] or "the whole network", layers[-1] or "the whole network"
    return first if first == last else f"{first} to {last}"


def cut_out(net, layers, args, kwargs):
    """`Stretch, SpikeDAGModule` of the layers at the module paths `layers`, from one run of `net(*args, **kwargs)`.

    net: in eval mode; it runs, but does not change. The stretch contains everything that runs inside the named modules,
    the operations between them in a surrounding forward (an add, a concatenation, a functional ReLU), and the ReLUs of
    that forward directly behind. Raises ValueError where the layers do not run or are not one contiguous stretch, with
    the names in the gap, and NotImplementedError for a function in the stretch that cannot be traced.
    """
    for layer in layers:
        refuse_compiled(net.get_submodule(layer))
    check_finite_weights(net)
    check_float32(net, layers)
    record = Record(net, layers)
    record.run(args, kwargs)
    members = find_members(record)
    stretch = number_ends(record, members)
    trace, again = StretchTrace(net, stretch), StretchTrace(net, stretch)
    trace.run(args, kwargs)
    again.run(args, kwargs)  # a second run shows random numbers and state that changes
    return stretch, trace.finish(again)


def check_float32(net, layers):
    """Raise ValueError where a layer has weights of another type: thresholds and test vectors are float32."""
    for layer in layers:
        for name, tensor in net.get_submodule(layer).state_dict().items():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float32:
                where = f"{layer}.{name}".lstrip(".")
                raise ValueError(
                    f"{where} is {tensor.dtype}, only float32 stretches can be converted: "
                    "convert it with .float() first"
                )


def module_paths(net, layers):
    """The module paths of `layers`, names or modules of `net`. Raises ValueError for a layer that the network lacks."""
    layers = [layers] if isinstance(layers, (str, nn.Module)) else list(layers)
    if not layers:
        raise ValueError("the list of layers to transfer is empty, name at least one module of the network")
    paths = {module: path for path, module in net.named_modules()}
    by_name = {path: paths[module] for path, module in net.named_modules(remove_duplicate=False) if path}
    return tuple(dict.fromkeys(module_path(layer, paths, by_name) for layer in layers))


def module_path(layer, paths, by_name):
    """The path of one layer."""
    if isinstance(layer, nn.Module) and layer in paths:
        return paths[layer]
    if isinstance(layer, nn.Module):
        raise ValueError(f"the layer {type(layer).__name__} is not a module of the network, pass one of its own")
    if layer not in by_name:
        known = ", ".join(list(by_name)[:12]) + (", ..." if len(by_name) > 12 else "")
        raise ValueError(f"the network has no layer {layer}, it has {known}")
    return by_name[layer]


def is_inside(path, layer):
    """Whether a module path is `layer` itself or lies inside it."""
    return not layer or path == layer or path.startswith(layer + ".")


def tensors_in(value):
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class CallCounter:
    """Gives every call of a torch function a key: (path of the running module, name, number of such calls before)."""

    def __init__(self):
        self.paths, self.made, self.entered = [""], Counter(), set()

    def key(self, function):
        """The key of the next call."""
        called = self.paths[-1], function_name(function)
        self.made[called] += 1
        return *called, self.made[called] - 1

    @contextmanager
    def follow(self, net):
        """Within it `self.paths` is the stack of running modules, and `self.entered` the set of all that ran."""

        def enter(path):
            def hook(*_):
                self.paths.append(path)
                self.entered.add(path)

            return hook

        def leave(*_):
            self.paths.pop()

        modules = list(net.named_modules())
        handles = [module.register_forward_pre_hook(enter(path)) for path, module in modules]
        handles += [module.register_forward_hook(leave) for _, module in modules]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def function_name(function):
    """A torch function's name, for messages and comparisons."""
    return resolve_name(function) or getattr(function, "__name__", str(function))


def is_in_place(name):
    """Whether the function of this name changes its first argument."""
    last = name.split(".")[-1]
    return last in IN_PLACE_OPERATORS if last.endswith("__") else last.endswith("_")


# ---------------------------------------------------------------------------------------------------------------------
# Which calls belong to the stretch


@dataclass
class Call:
    """One call that reads activations.

    reads: position among its arguments -> (id of the tensor, index of the call that wrote it). changed: the writers of
    the tensors that the call changes in place. The writer is None for a tensor that no recorded call wrote.
    """

    key: tuple
    reads: dict
    changed: set

    def __str__(self):
        return f"{self.key[1]} in {self.key[0] or 'the forward of the network'}"

    def writers(self):
        """Indices of the calls that wrote its inputs."""
        return {writer for _, writer in self.reads.values()}


class Record(TorchFunctionMode):
    """One run of a network, as the list of calls that read activations, each with the writers of its inputs.

    An activation is a tensor that depends on more than the network's parameters and buffers.
    """

    def __init__(self, net, layers):
        super().__init__()
        self.net, self.layers, self.counter = net, layers, CallCounter()
        self.calls, self.writer, self.kept, self.returned = [], {}, [], set()
        self.constants = {id(tensor) for tensor in (*net.parameters(), *net.buffers())}

    def run(self, args, kwargs):
        """Run the network once. Raises ValueError for layers that do not run."""
        with torch.no_grad(), self.counter.follow(self.net), self:
            output = self.net(*args, **kwargs)
        self.returned = {self.writer.get(id(tensor)) for tensor in tensors_in(output)}
        for layer in self.layers:
            if not any(is_inside(path, layer) for path in self.counter.entered):
                raise ValueError(f"the layer {layer} does not run in the network's forward, leave it out")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in SHAPE_QUESTIONS:
            return function(*args, **kwargs)
        key, leaves = self.counter.key(function), tree_leaves((args, kwargs))
        reads = {i: x for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)}
        active = {i: (id(x), self.writer.get(id(x))) for i, x in reads.items() if id(x) not in self.constants}
        result = function(*args, **kwargs)
        written = tensors_in(result)
        if is_in_place(key[1]) and args and isinstance(args[0], torch.Tensor):
            written.append(args[0])
        self.kept += [*reads.values(), *written]  # kept alive, so that no id is used twice
        if active:
            ids = {id(x) for x in written}
            changed = {writer for seen, writer in active.values() if seen in ids}
            self.writer.update(dict.fromkeys(ids, len(self.calls)))
            self.calls.append(Call(key, active, changed))
        elif reads or self.is_selected(key):
            self.constants.update(map(id, written))
        return result

    def is_selected(self, key):
        """Whether a call is made inside a named module."""
        return any(is_inside(key[0], layer) for layer in self.layers)

    def is_around(self, path):
        """Whether a module contains a named one."""
        return any(path != layer and is_inside(layer, path) for layer in self.layers)

    def readers(self):
        """Index of a call -> indices of the calls that read its result."""
        readers = defaultdict(list)
        for index, call in enumerate(self.calls):
            for writer in call.writers():
                readers[writer].append(index)
        return readers


def find_members(record):
    """Indices of the calls of the stretch, in order. Raises ValueError for a gap, which it names."""
    calls = record.calls
    named = {index for index, call in enumerate(calls) if record.is_selected(call.key)}
    if not named:
        raise ValueError(f"{layers_in_words(record.layers)} computes nothing that can be converted, name other layers")
    members = named | between(record, named)
    gap = [gap_name(record, call.key[0]) for call in map(calls.__getitem__, sorted(members))]
    gap = [name for name in dict.fromkeys(gap) if name is not None]
    if gap:
        raise ValueError(
            f"the layers {', '.join(record.layers)} are not a contiguous stretch: {', '.join(gap)} "
            f"{'lies' if len(gap) == 1 else 'lie'} between them, name {'it' if len(gap) == 1 else 'them'} too"
        )
    members |= relus_behind(record, members)
    check_connected(record, members)
    return sorted(members)


def between(record, named):
    """Calls that depend on a named call, directly or not, and on which a named call depends."""
    behind, before, readers = set(), set(), record.readers()
    for index, call in enumerate(record.calls):
        if call.writers() & (named | behind):
            behind.add(index)
    for index in reversed(range(len(record.calls))):
        if any(reader in named or reader in before for reader in readers[index]):
            before.add(index)
    return (behind & before) - named


def gap_name(record, path):
    """The outermost module at `path` that the user did not name; None inside the named modules and around them."""
    if any(is_inside(path, layer) for layer in record.layers) or record.is_around(path):
        return None
    parts = path.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next(prefix for prefix in prefixes if not record.is_around(prefix))


def relus_behind(record, members):
    """ReLUs in a forward around the named layers that are the only readers of an output of the stretch."""
    readers, found = record.readers(), set()
    for index in members:
        behind = readers[index]
        if len(behind) != 1 or behind[0] in members or index in record.returned:
            continue
        call = record.calls[behind[0]]
        if call.key[1] in RELU_NAMES and record.is_around(call.key[0]):
            found.add(behind[0])
    return found


def check_connected(record, members):
    """Raise ValueError where the stretch falls into parts with no tensor in common."""
    groups = Groups()
    for index in members:
        for tensor, writer in record.calls[index].reads.values():
            groups.join(index, writer if writer in members else ("input", tensor))
    parts = groups.members()
    if len(parts) > 1:
        ends = [next(record.calls[i].key[0] for i in part if isinstance(i, int)) for part in parts[:2]]
        raise ValueError(f"{ends[0]} and {ends[1]} are not connected, convert them with a transformer each")


def number_ends(record, members):
    """The Stretch of the calls `members`, with its inputs and outputs numbered."""
    stretch, numbers, readers, last_input = Stretch(record.layers), {}, record.readers(), 0
    for index in members:
        call, inputs = record.calls[index], {}
        for position, (tensor, writer) in call.reads.items():
            if writer not in members:
                inputs[position] = numbers.setdefault(tensor, len(numbers))
                last_input = index
        stretch.calls[call.key] = StretchCall(inputs)
    stretch.num_inputs = len(numbers)
    for index in members:
        outside = [reader for reader in readers[index] if reader not in members]
        if outside or index in record.returned:
            check_output(record, members, index, outside, last_input)
            stretch.calls[record.calls[index].key].output = stretch.num_outputs
            stretch.num_outputs += 1
    if not stretch.num_outputs:
        raise ValueError(f"nothing behind {stretch} reads its outputs, name other layers")
    return stretch


def check_output(record, members, index, outside, last_input):
    """Raise ValueError where an output of the stretch cannot be replaced."""
    call = record.calls[index]
    if outside and outside[0] < last_input:
        reader = record.calls[outside[0]]
        raise ValueError(
            f"{reader} reads the output of {call.key[0]} before the stretch has all of its inputs: end the stretch "
            "there, or begin it behind"
        )
    if not call.changed <= set(members):  # code outside that holds the input would see the output in it
        raise ValueError(f"{call} changes the stretch's input in place, use inplace=False there")


# ---------------------------------------------------------------------------------------------------------------------
# The stretch as a graph


class StretchTrace(Trace):
    """A run of a network that records only the calls of a stretch.

    The stretch runs in float32 without autocast, whatever the type of the rest.
    """

    def __init__(self, net, stretch):
        super().__init__(net)
        self.stretch, self.counter = stretch, CallCounter()
        self.paths = self.counter.paths
        self.inputs, self.outputs = {}, {}  # number -> (node, value)

    def run(self, args, kwargs):
        """Record the stretch in a run of the network."""
        with torch.no_grad(), self.counter.follow(self.model), self:
            self.model(*args, **kwargs)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = None if function in SHAPE_QUESTIONS else self.stretch.calls.get(self.counter.key(function))
        if call is None:
            return function(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        for position, number in call.inputs.items():
            leaves[position] = self.add_input(number, leaves[position])
        args, kwargs = tree_unflatten(leaves, spec)
        result = super().__torch_function__(function, types, args, kwargs)
        if call.output is not None:
            if isinstance(result, tuple):
                raise NotImplementedError(
                    f"{self.stretch} ends in {function_name(function)}, which returns several tensors: end it before "
                    "that call, or behind what reads them"
                )
            self.outputs[call.output] = self.output_node(result), result.clone()
        return result

    def add_input(self, number, tensor):
        """Record that the stretch reads `tensor` from outside; returns the float32 tensor that it reads."""
        if number not in self.inputs:
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.stretch} reads NaN or infinite values, look at the inputs of the network")
            node, read = f"input{number + 1}_out1", as_float32(tensor)
            self.dag.add_input(node)
            self.remember(read, node)
            self.inputs[number] = node, read.clone(), read
        return self.inputs[number][2]

    def finish(self, again):
        """The graph. Raises ValueError unless it computes the outputs of the stretch in this run and in `again`."""
        for run in (self, again):
            run.dag.outputs_nodes = tuple(node for node, _ in values_in_order(run.outputs))
            remove_unread(run.dag)
            run.dag.lint()
        fold_batch_norms(self.dag, self.shapes)
        self.dag.lint()
        for run in (self, again):
            inputs = [value for _, value, _ in values_in_order(run.inputs)]
            expected = [value for _, value in values_in_order(run.outputs)]
            check_same_output(expected, self.dag, again.dag, inputs, f"the graph of {self.stretch}")
        return self.dag


def values_in_order(by_number):
    """The values of a dict with the keys 0, 1, 2, ..."""
    return [by_number[number] for number in range(len(by_number))]
