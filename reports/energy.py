"""The cost of running a network: operations, joules, bits of the membrane potential. All functions are pure.

An ANN needs one multiply-accumulate (MAC) per synapse, a spiking network one accumulate (AC) per spike and synapse.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Costs:
    """Picojoules per accumulate (`ac`) and per multiply-accumulate (`mac`)."""

    ac: float
    mac: float


# Horowitz, Computing's Energy Problem, ISSCC 2014: 45 nm, arithmetic only, without memory and communication
COSTS_45_NM = {"FP32": Costs(ac=0.9, mac=4.6), "INT8": Costs(ac=0.03, mac=0.23)}


def count_operations(snn, shapes, spikes, timesteps):
    """Op name -> operations per sample as an ANN ("ann_mac", "ann_ac") and as an SNN ("snn_mac", "snn_ac", "synops").

    shapes: node -> shape of a sample. spikes: node -> mean spike counts over `timesteps` steps, [C, H, W] or [N], for
    every node of spikes.

    "synops" is spikes times fan-out. "snn_ac" is synops plus the biases and the constant current of the image, which
    are added at every step. Layers that stay ANN cost the same in both networks. A folded pooling costs nothing,
    because the next layer has a synapse for every spike of a window. With split signs (`--signed pair`), the ANN has
    half the synapses.
    """
    pairs = set()
    for entry in snn.ops.values():
        passes = not (entry.op.is_trained or entry.op.joins_signs) and pairs.issuperset(entry.inputs)
        if entry.op.splits_signs or passes:
            pairs.add(entry.out)
    return {name: operations(entry, shapes, spikes, timesteps, pairs) for name, entry in snn.ops.items()}


def operations(entry, shapes, spikes, timesteps, pairs):
    """The operations of one op (`count_operations`). pairs: nodes that have two channels for each one of the ANN."""
    op, first = entry.op, entry.inputs[0]
    outputs = torch.Size(shapes[entry.out]).numel()
    mac, ac = op.ann_operations(shapes[first], outputs)
    mac = mac / 2 if first in pairs else mac
    additions_of_ann = ac / 2 if entry.out in pairs else ac
    ann = {"ann_mac": mac, "ann_ac": additions_of_ann}
    if not op.spiking:
        return {**ann, "snn_mac": mac, "snn_ac": ac, "synops": 0.0}
    synops = sum(op.spike_operations(spikes[node]) for node in entry.inputs if node in spikes)
    from_image = op.is_trained and first not in spikes
    additions = timesteps * outputs if from_image or getattr(op, "bias_q", None) is not None else 0.0
    if op.has_weights and not op.is_trained and first not in spikes:
        additions = timesteps * ac  # a pooling of currents adds all of them at every step
    return {**ann, "snn_mac": mac if from_image else 0.0, "snn_ac": synops + additions, "synops": synops}


def joules(mac, ac, costs):
    """The energy of `mac` and `ac` operations, in joules. costs: Costs."""
    return (mac * costs.mac + ac * costs.ac) * 1e-12


def energy_table(operations, costs_by_name=None):
    """Name of the arithmetic -> joules per sample ("ann", "snn") and picojoules per operation.

    operations: result of `count_operations`.
    """
    totals = {key: sum(each[key] for each in operations.values()) for key in ("ann_mac", "ann_ac", "snn_mac", "snn_ac")}
    return {
        name: {
            "ann": joules(totals["ann_mac"], totals["ann_ac"], costs),
            "snn": joules(totals["snn_mac"], totals["snn_ac"], costs),
            "pj_per_ac": costs.ac,
            "pj_per_mac": costs.mac,
        }
        for name, costs in (costs_by_name or COSTS_45_NM).items()
    }


def signed_bits(lowest, highest):
    """The bits that two's complement integers from `lowest` to `highest` need: 8 for -128 to 127."""
    magnitude = max(-int(lowest) - 1 if lowest < 0 else 0, int(highest) if highest > 0 else 0)
    return magnitude.bit_length() + 1


def potential_bound(neuron, timesteps):
    """The largest |u| that any input can cause in `timesteps` steps; None for the first layer: its current is float."""
    if neuron.largest_current is None:
        return None
    return neuron.largest_current * timesteps + neuron.initial_potential.abs().max().item()
