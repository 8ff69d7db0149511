"""A look into a simulation: what flows into every neuron, its membrane potential, and the spikes it sends."""

import torch

from spike_dag import run_ops
from spike_neurons import if_step
from spike_tensor import Memory, SpikeTensor


class Observation:
    """Of one batch. currents: op name -> sum of the currents of T steps into its neurons, float64 [B, ...].

    counts: node of spikes -> spikes of T steps, float64 [B, ...], of a folded pooling those of each window. scales:
    node of spikes -> lambda, of a folded pooling that of one spike of a window.
    """

    def __init__(self):
        self.currents, self.counts, self.scales = {}, {}, {}

    def add(self, store, key, value):
        """Add what some more timesteps brought."""
        store[key] = store.get(key, 0) + value


@torch.no_grad()
def observe(snn, images, on_step=None):
    """The Observation of a converted network on images [B, ...], some timesteps at a time as it simulates itself.

    on_step: called as `on_step(name, potentials, spikes)` for every neuron and step, with u before it is reset and the
    spikes, both [B, ...] float64; spikes is None while a layer only listens. It costs as much as the simulation.
    """
    timesteps, memory, seen = snn.timesteps, Memory(snn.timesteps), Observation()
    names = {id(entry): name for name, entry in snn.ops.items()}
    before, between, _ = snn.stages()
    constants = {snn.inputs_nodes[0]: images}
    run_ops(before, constants)
    membranes, (_, chunk) = {}, snn.cut((images,), timesteps)
    for start in range(0, timesteps, chunk):
        steps = min(chunk, timesteps - start)
        values = dict(constants)
        for entry in between:
            name, neuron = names[id(entry)], entry["op"].neuron
            if neuron is None:
                run_ops([entry], values, steps, memory)
            else:
                current = current_into(entry, values, steps)
                seen.add(seen.currents, name, total_current(current))
                values[entry["out_nodes"][0]] = neuron(current, memory)
                if on_step is not None:
                    membranes[name] = replay(neuron, current, membranes.get(name), lambda *at, n=name: on_step(n, *at))
        for node, value in values.items():
            if isinstance(value, SpikeTensor):
                seen.add(seen.counts, node, value.counts().double())
                seen.scales[node] = value.scale_factor.double()
    return seen


@torch.no_grad()
def run_spiking(snn, images):
    """Node -> value of every op up to the last spikes, all timesteps at a time."""
    before, between, _ = snn.stages()
    values = {snn.inputs_nodes[0]: images}
    run_ops(before, values)
    run_ops(between, values, snn.timesteps, Memory(snn.timesteps))
    return values


@torch.no_grad()
def node_values(dag, images):
    """Node -> value of every op of an ANN, [B, ...]."""
    values = {dag.inputs_nodes[0]: images}
    run_ops(dag.ops.values(), values)
    return values


@torch.no_grad()
def activations_on_spikes(qnet, seen, images, timesteps):
    """Node -> what the quantized ANN's op returns for what the spikes before it stand for, [B, ...]."""
    known, returned = {qnet.inputs_nodes[0]: images}, {}
    for entry in qnet.ops.values():
        (out,) = entry["out_nodes"]
        returned[out] = known[out] = entry["op"](*[known[node] for node in entry["in_nodes"]])
        if out in seen.counts:
            known[out] = (seen.counts[out] * (seen.scales[out] / timesteps)).to(images.dtype)
    return returned


def current_into(entry, values, timesteps):
    """The current that flows into the neurons of an op."""
    op = entry["op"]
    neuron, op.neuron = op.neuron, None  # without it the op returns its current
    try:
        known = dict(values)
        run_ops([entry], known, timesteps, Memory(timesteps))
        return known[entry["out_nodes"][0]]
    finally:
        op.neuron = neuron


def total_current(current):
    """The sum of a current over its steps, float64 [B, ...]."""
    if current.constant:
        return current.total().double() * current.timesteps
    return current.per_step().sum(0, dtype=torch.float64)


def replay(neuron, current, membrane, on_step):
    """Run neurons step by step in float64 from `membrane` (None: the initial one); the membrane potentials after."""
    steps = current.per_step().double()  # [T, B, ...]
    Vthr = neuron.Vthr.double()
    u = neuron.initial_potential.double().expand(steps.shape[1:]) if membrane is None else membrane
    silence = torch.zeros_like(steps[0])
    for t in range(len(steps) + neuron.listen):
        step = steps[t] if t < len(steps) else silence
        if t < neuron.listen:
            u = u + step
            on_step(u, None)
            continue
        before = u + step
        u, spikes = if_step(u, step, Vthr, neuron.reset_mode)
        on_step(before, spikes)
    return u
