"""Observe a simulation: the current into every neuron, its membrane potential, and the spikes that it sends."""

import threading
from functools import partial

import torch

from spike_neurons import if_step
from spike_simulator import Stages, run_ops, simulate
from spike_tensor import Memory, SpikeTensor


class Observation:
    """Currents and spikes of one batch.

    currents: op name -> sum over T steps of the current into its neurons, float64 [B, ...].
    counts: node of spikes -> spikes in T steps, float64 [B, ...]; for a folded pooling, spikes of each window.
    scales: node of spikes -> lambda; for a folded pooling, the lambda of one spike of a window.
    """

    def __init__(self):
        self.currents, self.counts, self.scales = {}, {}, {}

    def add(self, store, key, value):
        """Add the sum of some more timesteps to `store[key]`."""
        store[key] = store.get(key, 0) + value


@torch.no_grad()
def observe(snn, images, on_step=None):
    """The Observation of a converted network on images [B, ...]; the simulation computes some timesteps at a time.

    on_step: called as `on_step(name, potentials, spikes)` for every layer of neurons and step, with the membrane
    potentials before the reset and the spikes, both float64 [B, ...]; spikes is None while a layer only listens. It
    costs as much as the simulation itself.
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
def count_spikes(snn, images):
    """`outputs, counts` of images [B, ...]: the class scores [B, classes], and node -> spikes in T steps of all images.

    counts: of every neuron, float64 [...]. It takes up to twice as long as a simulation without them, and `observe`
    several times as long.
    """
    counts, adds = {}, threading.Lock()

    def watch(name, current, value):
        if isinstance(value, SpikeTensor):
            node, spikes = snn.ops[name].out, value.counts().sum(0, dtype=torch.float64)
            with adds:
                counts[node] = counts.get(node, 0) + spikes

    return simulate(snn, (images,), snn.timesteps, watch_sums=watch)[0], counts


@torch.no_grad()
def spikes_of(snn, images):
    """Node -> SpikeTensor with all timesteps, for every op that sends spikes."""
    stages, values = Stages(snn), {snn.inputs_nodes[0]: images}
    run_ops(stages.before, values)
    run_ops(stages.between, values, snn.timesteps, Memory(snn.timesteps))
    return {node: value for node, value in values.items() if isinstance(value, SpikeTensor)}


@torch.no_grad()
def node_values(dag, images):
    """Node -> activation [B, ...] of every op of an ANN."""
    values = {dag.inputs_nodes[0]: images}
    run_ops(dag.ops.values(), values)
    return values


@torch.no_grad()
def activations_on_spikes(qnet, seen, images, timesteps):
    """Node -> activation [B, ...] of the quantized ANN's op when it reads the decoded spikes of the ops before it.

    seen: the Observation of the converted network on the same images.
    """
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
    """The sum of a current over its timesteps, float64 [B, ...]."""
    if current.constant:
        return current.total().double() * current.timesteps
    return current.per_step().sum(0, dtype=torch.float64)


def replay(neuron, current, membrane, on_step):
    """Run neurons step by step in float64; returns the membrane potentials after the last step, [B, ...].

    membrane: membrane potentials before the first step, or None for the initial ones. on_step: as in `observe`.
    """
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
        if t >= neuron.listen + neuron.most_spikes(len(steps)):  # its window is over
            u = before
            on_step(before, silence)
            continue
        u, spikes = if_step(u, step, Vthr, neuron.reset_mode)
        on_step(before, spikes)
    return u
