"""A look into a simulation: what flows into every neuron, its membrane potential, and the spikes it sends."""

from functools import partial

import torch

from spike_neurons import if_step
from spike_simulator import Stages, run_ops, simulate
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
    seen, membranes = Observation(), {}

    def watch(name, current, value):
        entry = snn.ops[name]
        if entry.op.neuron is not None:
            seen.add(seen.currents, name, total_current(current))
            if on_step is not None:
                membranes[name] = replay(entry.op.neuron, current, membranes.get(name), partial(on_step, name))
        if isinstance(value, SpikeTensor):
            seen.add(seen.counts, entry.out, value.counts().double())
            seen.scales[entry.out] = value.scale_factor.double()

    simulate(snn, (images,), snn.timesteps, watch=watch)
    return seen


@torch.no_grad()
def spikes_of(snn, images):
    """Node -> SpikeTensor of every op that sends spikes, all timesteps at a time."""
    stages, values = Stages(snn), {snn.inputs_nodes[0]: images}
    run_ops(stages.before, values)
    run_ops(stages.between, values, snn.timesteps, Memory(snn.timesteps))
    return {node: value for node, value in values.items() if isinstance(value, SpikeTensor)}


@torch.no_grad()
def node_values(dag, images):
    """Node -> value of every op of an ANN, [B, ...]."""
    values = {dag.inputs_nodes[0]: images}
    run_ops(dag.ops.values(), values)
    return values


@torch.no_grad()
def activations_on_spikes(qnet, seen, images, timesteps):
    """Node -> what the quantized ANN's op returns for what the spikes before it stand for, [B, ...]."""
    returned = {qnet.inputs_nodes[0]: images}

    def watch(name, current, activation):
        node = qnet.ops[name].out
        returned[node] = activation
        if node in seen.counts:
            return (seen.counts[node] * (seen.scales[node] / timesteps)).to(images.dtype)
        return None

    run_ops(qnet.ops.values(), dict(returned), watch=watch)
    return returned


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
