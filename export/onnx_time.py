"""A converted network through time, as an ONNX graph. Three forms share the nodes of the layers.

    LoopOverTime    one Loop over T whose body is a step of the whole network (two steps: `export.onnx_pairs`)
    LoopPerLayer    layer after layer, all T steps at once, and a Loop for each layer's neurons: for layers that listen
                    or have a window, and for ANN layers between spiking ones
    OneStep         one step, with its state as inputs and outputs

What the image causes is computed once, before the first step. What stays ANN behind the last spikes reads the decoded
counts of all steps.
"""

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from export.onnx_graph import EXACT_IN_FLOAT32, Builder, Scope, Value
from export.onnx_nodes import emit, pool_maxima
from spike_simulator import Stages, simulate
from spike_tensor import SpikeTensor

FLOAT, INT32, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
MOST_IN_INT32 = 2**31
BEYOND = {  # kind -> (threshold, its type) that no potential reaches
    FLOAT: (np.finfo(np.float32).max, np.float32),
    INT32: (np.iinfo(np.int32).max, np.int32),
}


def is_timed(snn):
    """Whether a layer listens, has a window, or stays ANN between spiking ones: one Loop cannot hold it."""
    return Stages(snn).all_at_once()


class Probe:
    """Shapes and lambdas of every node, seen in one step of one sample. inputs: [1, ...] each.

    shapes: node -> shape of a sample. scales: node -> lambda, for nodes of spikes.
    """

    def __init__(self, snn, inputs):
        self.shapes = {node: tuple(x.shape[1:]) for node, x in zip(snn.inputs_nodes, inputs)}
        self.scales = {}

        def watch(name, current, value):
            node = snn.ops[name].out
            self.shapes[node] = tuple((value if isinstance(value, torch.Tensor) else value.data).shape[1:])
            if isinstance(value, SpikeTensor):
                self.scales[node] = value.scale_factor

        with torch.no_grad():
            simulate(snn, inputs, 1, watch=watch)


class Spiking:
    """The parts that all forms share; a form adds `fire`, `pass_maxima` and how steps follow each other.

    head, body, tail: scopes before, in and behind the steps. counts: node -> name of its spike counts, [B, ...].
    dequantizes: as in `Builder`.
    """

    dequantizes = False

    def __init__(self, snn, inputs):
        self.snn, self.stages, self.probe = snn, Stages(snn), Probe(snn, inputs)
        self.b = Builder(self.dequantizes)
        self.head = self.body = self.b.scope
        self.tail = Scope(self.head)
        self.counts, self.full_shapes = {}, {}
        self.values = {
            node: Value(name, self.probe.shapes[node], True) for node, name in zip(snn.inputs_nodes, self.image_names())
        }
        read = {node for entry in self.stages.behind for node in entry.inputs} | set(snn.outputs_nodes)
        self.counted = {snn.ops[name].out for name in snn.neurons()} | {n for n in read if n in self.probe.scales}
        self.b.taken.update(dict.fromkeys([*self.image_names(), *self.output_names(), "T", "step"], 0))

    def image_names(self):
        """Names of the graph's inputs: "image", or those of the nodes if there are several."""
        nodes = self.snn.inputs_nodes
        return ["image"] if len(nodes) == 1 else [*nodes]

    def output_names(self):
        """Names of the graph's outputs: "logits", or one for each if there are several."""
        count = len(self.snn.outputs_nodes)
        return ["logits"] if count == 1 else [f"output_{i}" for i in range(count)]

    def write(self):
        """Write all nodes. Raises ValueError, with the layer's name, for what the graph cannot hold."""
        with self.b.into(self.head):
            self.begin()
            for entry in self.stages.before:
                self.analog(entry)
        for entry in self.stages.between:
            self.spiking(entry)
        with self.b.into(self.tail):
            self.end()
            for node in self.read_last():
                self.values[node] = Value(self.decoded(self.counts[node], node), self.probe.shapes[node], True)
            for entry in self.stages.behind:
                self.analog(entry)
            for node, name in zip(self.snn.outputs_nodes, self.output_names()):
                self.b.node("Identity", self.values[node].name, out=name)
            for name, node in self.neuron_nodes():
                self.b.node("Identity", self.counts[node], out=f"count_{name}")

    def begin(self):
        """Write the batch size, and the timesteps as a float."""
        self.batch = self.b.node("Shape", self.image_names()[0], start=0, end=1)
        self.timesteps = self.b.node("Cast", "T", to=FLOAT)

    def neuron_nodes(self):
        """`(op name, node)` of every layer that fires."""
        return [(name, self.snn.ops[name].out) for name in self.snn.neurons()]

    def read_last(self):
        """The nodes of spikes that the ANN layers behind, or the outputs, read."""
        read = [node for entry in self.stages.behind for node in entry.inputs] + [*self.snn.outputs_nodes]
        return [node for node in dict.fromkeys(read) if node in self.probe.scales]

    def decoded(self, counts, node):
        """The activations that spike counts [B, ...] stand for."""
        scale = self.b.node("Div", self.b.constant(self.probe.scales[node]), self.timesteps)
        return self.b.node("Mul", counts, scale)

    def analog(self, entry, values=None):
        """Write an op that stays ANN. values: its inputs, if they are not those of its nodes."""
        y = emit(self.b, entry, values or [self.values[node] for node in entry.inputs])
        if entry.op.levels is not None:
            y = self.to_levels(y, entry.op.levels)
        self.values[entry.out] = Value(y, self.probe.shapes[entry.out], True)

    def to_levels(self, x, levels):
        """Activations rounded to levels (`ClipFloorShift`)."""
        size, most = self.b.constant(levels.scale.abs().clamp_min(1e-6)), self.b.constant(float(levels.levels))
        share = self.b.node("Clip", self.b.node("Div", x, size), self.b.constant(0.0), self.b.constant(1.0))
        steps = self.b.node("Add", self.b.node("Mul", share, most), self.b.constant(0.5))
        return self.b.node("Mul", self.b.node("Floor", steps), self.b.node("Div", size, most))

    def spiking(self, entry):
        """Write an op of the spiking part: its current, and its neurons if it has any."""
        values = [self.values[node] for node in entry.inputs]
        is_constant = all(value.constant for value in values)
        if not entry.op.spiking:
            self.between(entry)
            return
        with self.b.into(self.head if is_constant else self.body):
            if entry.op.selects and entry.op.mode == "gate":
                value = self.pass_maxima(entry, values[0])
            elif is_constant:
                value = Value(emit(self.b, entry, values), self.probe.shapes[entry.out], True)
            else:
                value = self.stepping(entry, values)
        with self.b.into(self.body):
            if entry.op.neuron is not None:
                value = self.fire(entry, value)
            if entry.out in self.counted:
                self.count(entry.out, value)
        self.values[entry.out] = value

    def between(self, entry):
        """Write an op that stays ANN between spiking ones."""
        raise ValueError(
            f"{entry.where} stays ANN between spiking layers and reads the spikes of all steps, which one step does "
            "not have: write --onnx, or convert without --ann_layers"
        )

    def stepping(self, entry, values):
        """The Value of a spiking op without its neurons, for values of which one changes from step to step."""
        return Value(emit(self.b, entry, values), self.probe.shapes[entry.out])

    def full_shape(self, shape):
        """The name of the shape [B, *shape]."""
        if shape not in self.full_shapes:
            with self.b.into(self.head):
                full = self.b.node("Concat", self.batch, self.b.indices(*shape), axis=0)
            self.full_shapes[shape] = full
        return self.full_shapes[shape]

    def potentials(self, entry, shape):
        """`kind, Vthr, start`: the type of membrane potentials, and names of Vthr and of the start, [B, ...]."""
        neuron, kind = entry.op.neuron, potential_kind(entry, self.snn.timesteps)
        numbers = np.float32 if kind == FLOAT else np.int32
        with self.b.into(self.head):
            start = self.b.node("Expand", self.b.constant(neuron.initial_potential, numbers), self.full_shape(shape))
        return kind, self.b.constant(neuron.Vthr, numbers), start

    def step_neurons(self, entry, u, current, Vthr, kind, may_fire=None):
        """`u, spikes` behind one step: names of float32 spikes and of the potentials. may_fire: a BOOL, or None."""
        b = self.b
        if kind != FLOAT:
            current = b.node("Cast", current, to=kind)
        v = b.node("Add", u, current)
        limit = Vthr if may_fire is None else b.node("Where", may_fire, Vthr, b.constant(*BEYOND[kind]))
        fires = b.node("GreaterOrEqual", v, limit)
        spikes = b.node("Cast", fires, to=FLOAT)
        whole = spikes if kind == FLOAT else b.node("Cast", fires, to=kind)
        subtracts = entry.op.neuron.reset_mode == "subtraction"
        spent = b.node("Mul", whole, Vthr if subtracts else v)  # a Where of 0 and 1 at random took 15 times as long
        return b.node("Sub", v, spent), spikes

    # the finished graph

    def images(self):
        """The graph's inputs of images."""
        pairs = zip(self.image_names(), self.snn.inputs_nodes)
        return [described(name, FLOAT, self.probe.shapes[node]) for name, node in pairs]

    def results(self):
        """The graph's outputs: those of the network, and the spike counts of every layer."""
        outputs = zip(self.output_names(), self.snn.outputs_nodes)
        counts = ((f"count_{name}", node) for name, node in self.neuron_nodes())
        return [described(name, FLOAT, self.probe.shapes[node]) for name, node in (*outputs, *counts)]

    def graph(self):
        """The GraphProto, once `write` has run."""
        timesteps = numpy_helper.from_array(np.asarray(self.snn.timesteps, np.int64), "T")
        inputs = [*self.images(), helper.make_tensor_value_info("T", INT64, [])]
        nodes = [*self.head.nodes, *self.steps(), *self.tail.nodes]
        return helper.make_graph(nodes, "snn", inputs, self.results(), [timesteps, *self.head.initializers])


def described(name, kind, shape, batch="B"):
    """The ValueInfoProto of [B, *shape]."""
    return helper.make_tensor_value_info(name, kind, [batch, *shape])


def largest_potential(entry):
    """`per_step, at_start`: bounds of a potential of integers, per_step * T + at_start."""
    neuron = entry.op.neuron
    return neuron.largest_current, neuron.Vthr.abs().max().item() + neuron.initial_potential.abs().max().item()


def potential_kind(entry, timesteps):
    """FLOAT if float32 represents every potential within `timesteps` steps, else INT32. ValueError beyond both."""
    if entry.op.neuron.largest_current is None:
        return FLOAT
    per_step, at_start = largest_potential(entry)
    if per_step >= EXACT_IN_FLOAT32 or per_step * timesteps + at_start >= MOST_IN_INT32:
        raise ValueError(f"{entry.where}: its membrane potentials need more than 32 bits at T={timesteps}, use fewer")
    return FLOAT if per_step * timesteps + at_start < EXACT_IN_FLOAT32 else INT32


def largest_timesteps(snn):
    """The largest T for which the potentials of the exported file are exact; None if no layer bounds it."""
    bounds = []
    for name, neuron in snn.neurons().items():
        entry = snn.ops[name]
        if neuron.largest_current:
            per_step, at_start = largest_potential(entry)
            most = EXACT_IN_FLOAT32 if potential_kind(entry, snn.timesteps) == FLOAT else MOST_IN_INT32
            bounds.append(int((most - 1 - at_start) // per_step))
    return min(bounds, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Step after step


class Stepwise(Spiking):
    """Forms whose nodes are those of one step, or of several steps one after the other (`apart`).

    states: (label, kind, shape, start, name before, name behind).
    """

    def __init__(self, snn, inputs):
        super().__init__(snn, inputs)
        self.body, self.states = Scope(self.head), []

    def begin(self):
        super().begin()
        self.check()

    def check(self):
        """Raise ValueError, with the layer's name, if a layer listens or has a window."""
        for name, neuron in self.snn.neurons().items():
            if neuron.listen or neuron.window is not None:
                raise ValueError(
                    f"{self.snn.where(name)} listens before it fires, or has a window: its first step of spikes needs "
                    "later steps of its input, which one step of the network does not have, convert with --listen 0"
                )

    def before_step(self, label, start):
        """The name of a state before the step."""
        return self.b.fresh(f"{label}_before")

    def zeros(self, shape):
        """The name of float32 zeros [B, *shape]."""
        zero = numpy_helper.from_array(np.zeros(1, np.float32))
        with self.b.into(self.head):
            return self.b.node("ConstantOfShape", self.full_shape(shape), value=zero)

    def apart(self, value):
        """The names of the steps of a value."""
        return [value.name]

    def joined(self, names, shape):
        """The Value of these steps."""
        return Value(names[0], shape)

    def may_fire(self, i):
        """The name of whether neurons may fire in the i-th step of those written, or None if they always may."""

    def fire(self, entry, current):
        kind, Vthr, start = self.potentials(entry, current.shape)
        label = f"u_{entry.name}"
        u = before = self.before_step(label, start)
        sent = []
        for i, name in enumerate(self.apart(current)):
            u, spikes = self.step_neurons(entry, u, name, Vthr, kind, self.may_fire(i))
            sent.append(spikes)
        self.states.append((label, kind, current.shape, start, before, u))
        return self.joined(sent, current.shape)

    def sum_up(self, label, value):
        """The names of the sums of a value up to each step, the last of which is a state."""
        start = self.zeros(value.shape)
        total = before = self.before_step(label, start)
        sums = []
        for name in self.apart(value):
            total = self.b.node("Add", total, name)
            sums.append(total)
        self.states.append((label, FLOAT, value.shape, start, before, total))
        return sums

    def count(self, node, value):
        self.counts[node] = self.sum_up(f"n_{self.snn.writer(node)}", value)[-1]

    def pass_maxima(self, entry, spikes):
        """The spikes that raise the largest count of their window."""
        shape, label = self.probe.shapes[entry.out], f"sent_{entry.name}"
        start = self.zeros(shape)
        largest = before = self.before_step(label, start)
        rises = []
        for counts in self.sum_up(f"seen_{entry.name}", spikes):
            earlier, largest = largest, pool_maxima(self.b, entry.op, Value(counts, spikes.shape))
            rises.append(self.b.node("Sub", largest, earlier))
        self.states.append((label, FLOAT, shape, start, before, largest))
        return self.joined(rises, shape)


class LoopOverTime(Stepwise):
    """The whole network in the body of one Loop, T times.

    The body holds its own weights. onnxruntime rearranges weights for its fastest convolutions only in their own graph.
    """

    def __init__(self, snn, inputs):
        super().__init__(snn, inputs)
        self.body = Scope()

    def trips(self):
        """The name of the number of iterations."""
        return "T"

    def begin(self):
        super().begin()
        self.trip_count = self.trips()
        self.true = self.b.constant(True, np.bool_)  # a condition that is left out stops onnx's reference evaluator

    def end(self):
        """Read the counts behind the last step instead of those in the body."""
        behind = {state[-1]: f"{state[0]}_end" for state in self.states}
        self.counts = {node: behind[name] for node, name in self.counts.items()}

    def steps(self):
        """The node of the loop."""
        before = [described(name, kind, shape) for _, kind, shape, _, name, _ in self.states]
        behind = [described(name, kind, shape) for _, kind, shape, _, _, name in self.states]
        counter = [helper.make_tensor_value_info("t", INT64, []), helper.make_tensor_value_info("go_before", BOOL, [])]
        goes_on = helper.make_tensor_value_info("go", BOOL, [])
        nodes = [helper.make_node("Identity", ["go_before"], ["go"]), *self.body.nodes]
        body = helper.make_graph(nodes, "step", [*counter, *before], [goes_on, *behind], self.body.initializers)
        starts, ends = [state[3] for state in self.states], [f"{state[0]}_end" for state in self.states]
        return [helper.make_node("Loop", [self.trip_count, self.true, *starts], ends, name="time", body=body)]


class OneStep(Stepwise):
    """One step of the network. The input `step` is the number of steps done before: at 0 the states start.

    Each state is an input, `<label>_in`, and an output, `<label>_out`; at step 0 any values will do. The outputs are
    decoded from all spikes so far.
    """

    def begin(self):
        self.batch = self.b.node("Shape", self.image_names()[0], start=0, end=1)
        done = self.b.node("Add", "step", self.b.constant(1, np.int64))
        self.timesteps = self.b.node("Cast", done, to=FLOAT)
        self.is_first = self.b.node("Equal", "step", self.b.constant(0, np.int64))
        self.check()

    def before_step(self, label, start):
        return self.b.node("Where", self.is_first, start, f"{label}_in")

    def end(self):
        """Name the states behind the step."""
        for label, _, _, _, _, name in self.states:
            self.b.node("Identity", name, out=f"{label}_out")

    def results(self):
        """The network's outputs, and the states; the counts are among them."""
        outputs = zip(self.output_names(), self.snn.outputs_nodes)
        states = [described(f"{label}_out", kind, shape) for label, kind, shape, *_ in self.states]
        return [*(described(name, FLOAT, self.probe.shapes[node]) for name, node in outputs), *states]

    def neuron_nodes(self):
        return []

    def graph(self):
        states = [described(f"{label}_in", kind, shape) for label, kind, shape, *_ in self.states]
        inputs = [*self.images(), helper.make_tensor_value_info("step", INT64, []), *states]
        nodes = [*self.head.nodes, *self.body.nodes, *self.tail.nodes]
        return helper.make_graph(nodes, "snn_step", inputs, self.results(), self.head.initializers)


# ---------------------------------------------------------------------------------------------------------------------
# Layer after layer


class LoopPerLayer(Spiking):
    """All steps of a layer at once, [T*B, ...], and a Loop for its neurons."""

    def begin(self):
        super().begin()
        self.T = self.b.node("Reshape", "T", self.b.indices(1))
        self.last = self.b.node("Sub", "T", self.b.constant(1, np.int64))

    def end(self):
        """Nothing is left to do behind the last layer."""

    def steps(self):
        return []

    def by_step(self, value):
        """The name of [T*B, ...] as [T, B, ...]."""
        shape = self.b.node("Concat", self.T, self.b.indices(-1, *value.shape), axis=0)
        return self.b.node("Reshape", value.name, shape)

    def flat(self, steps, shape):
        """The name of [T, B, ...] as [T*B, ...]."""
        return self.b.reshape(steps, *shape)

    def stepping(self, entry, values):
        """The current of all steps; a constant is repeated."""
        return super().stepping(entry, [self.repeated(value) if value.constant else value for value in values])

    def repeated(self, value):
        shape = self.b.node("Concat", self.T, self.full_shape(value.shape), axis=0)
        return Value(self.flat(self.b.node("Expand", value.name, shape), value.shape), value.shape)

    def count(self, node, value):
        steps = self.by_step(value)
        self.counts[node] = self.b.node("ReduceSum", steps, self.b.indices(0), keepdims=0)

    def between(self, entry):
        with self.b.into(self.body):
            self.analog(entry, [self.activation(node) for node in entry.inputs])

    def activation(self, node):
        """A node as activations, its spikes decoded."""
        value = self.values[node]
        if value.constant:
            return value
        if node not in self.counts:
            self.count(node, value)
        return Value(self.decoded(self.counts[node], node), value.shape, True)

    def pass_maxima(self, entry, spikes):
        """The spikes that raise the largest count of their window: the rise of the largest count."""
        b, shape = self.b, self.probe.shapes[entry.out]
        counts = b.node("CumSum", self.by_step(spikes), b.constant(0, np.int64))
        largest = pool_maxima(b, entry.op, Value(self.flat(counts, spikes.shape), spikes.shape))
        largest = self.by_step(Value(largest, shape))  # [T, B, ...]
        first = b.node("Slice", largest, b.indices(0), b.indices(1), b.indices(0))
        nothing = b.node("Mul", first, b.constant(0.0))
        earlier = b.node("Slice", largest, b.indices(0), b.indices(-1), b.indices(0))
        return Value(self.flat(b.node("Sub", largest, b.node("Concat", nothing, earlier, axis=0)), shape), shape)

    def fire(self, entry, current):
        """The spikes [T*B, ...] of the T steps in which the neurons may fire."""
        b, neuron = self.b, entry.op.neuron
        kind, Vthr, start = self.potentials(entry, current.shape)
        source = current.name if current.constant else self.by_step(current)
        heard = b.node("Min", "T", b.constant(neuron.listen, np.int64))
        body = self.neurons_body(entry, current, source, Vthr, kind, heard)
        trips, true = b.node("Add", "T", heard), b.constant(True, np.bool_)
        spikes, label = b.fresh(f"spikes_{entry.name}"), f"u_{entry.name}"
        inputs = [trips, true, start]
        b.scope.nodes.append(
            helper.make_node("Loop", inputs, [f"{label}_end", spikes], name=f"time_{entry.name}", body=body)
        )
        flat = self.flat(spikes, current.shape)  # onnx's reference evaluator stacks the steps in this shape, too
        if not neuron.listen:
            return Value(flat, current.shape)
        begin, finish = b.node("Reshape", heard, b.indices(1)), b.node("Reshape", trips, b.indices(1))
        steps = b.node("Reshape", flat, b.node("Concat", finish, b.indices(-1, *current.shape), axis=0))
        return Value(self.flat(b.node("Slice", steps, begin, finish, b.indices(0)), current.shape), current.shape)

    def neurons_body(self, entry, current, source, Vthr, kind, heard):
        """The GraphProto of one step of the neurons: it hears its current in the first T steps, then nothing."""
        b, neuron, scope, label = self.b, entry.op.neuron, Scope(), f"u_{entry.name}"
        t, go, u = f"{label}_t", f"{label}_go", f"{label}_before"
        with b.into(scope):
            going = b.node("Identity", go)
            heard_now = source
            if not current.constant:
                heard_now = b.node("Gather", source, b.node("Min", t, self.last), axis=0)
            if neuron.listen:
                heard_now = b.node("Where", b.node("Less", t, "T"), heard_now, b.constant(0.0))
            may_fire = self.in_time(neuron, t, heard)
            behind, spikes = self.step_neurons(entry, u, heard_now, Vthr, kind, may_fire)
        scalars = [helper.make_tensor_value_info(t, INT64, []), helper.make_tensor_value_info(go, BOOL, [])]
        outputs = [
            helper.make_tensor_value_info(going, BOOL, []),
            described(behind, kind, current.shape),
            described(spikes, FLOAT, current.shape),
        ]
        inputs = [*scalars, described(u, kind, current.shape)]
        return helper.make_graph(scope.nodes, label, inputs, outputs, scope.initializers)

    def in_time(self, neuron, t, heard):
        """The name of whether neurons may fire in step `t`, or None if they always may."""
        conditions = []
        if neuron.listen:
            conditions.append(self.b.node("GreaterOrEqual", t, heard))
        if neuron.window is not None:
            end = self.b.node("Add", heard, self.b.constant(neuron.window, np.int64))
            conditions.append(self.b.node("Less", t, end))
        return self.b.node("And", *conditions) if len(conditions) > 1 else next(iter(conditions), None)
