"""The lambda that each spiking layer aims at, before Vthr is rounded. Lambda is the scale of a spike train."""

from collections import defaultdict

import torch

from spike_layers import ANALOG, CURRENT, SPIKES


def largest_spikes(dag, plan):
    """Node of spikes -> its largest value in one step: 1, or the window's size behind a folded pooling."""
    peaks = {}
    for name, entry in dag.ops.items():
        if plan.kinds[entry.out] == SPIKES:
            passed = 1 if name in plan.firing else max(peaks[node] for node in entry.inputs)
            peaks[entry.out] = entry.op.window if name in plan.folded else passed
    return peaks


def spike_targets(dag, plan, statistics, shapes, timesteps, mixed=frozenset()):
    """Node of spikes -> the lambda that its neuron aims at, a scalar tensor, or [C, 1, 1] ([N]) per channel.

    Each layer has one lambda; layers whose spikes a concatenation joins share the largest. Where every channel has a
    lambda of its own, it keeps it, unless its channels are mixed (`mixed_channels`). A ReLU with a ceiling never aims
    above it, because its neuron has to stop there.
    """
    if any(statistics[name].scales.dim() for name in plan.firing):
        return channel_targets(dag, plan, statistics, shapes, timesteps, mixed)
    targets, groups, ceilings = {}, Groups(), {}
    for name, entry in dag.ops.items():
        if plan.kinds[entry.out] != SPIKES:
            continue
        if name in plan.firing or entry.op.rescales:
            targets[entry.out] = torch.tensor(statistics[name].max_o)
        else:
            groups.join(entry.out, *entry.inputs)
        ceilings[entry.out] = plan.largest_lambda(entry, timesteps)
    for members in groups.members():
        shared = torch.stack([targets[node] for node in members if node in targets] or [torch.zeros(())]).max()
        targets.update(dict.fromkeys(members, shared))
    return {node: target.clamp_max(ceilings[node]) for node, target in targets.items()}


def channel_targets(dag, plan, statistics, shapes, timesteps, mixed=frozenset()):
    """Node of spikes -> the lambda that each channel aims at, in the shape of a sample: [C, 1, 1] or [N]."""
    targets, merged = {}, merged_pairs(dag, plan)
    for name, entry in dag.ops.items():
        if plan.kinds[entry.out] != SPIKES:
            continue
        if name in plan.firing:
            scales = statistics[name].scales
            scales = larger_of_pairs(scales) if entry.out in merged else scales
            scales = scales.max() if entry.out in mixed else scales
            targets[entry.out] = scales.clamp_max(plan.largest_lambda(entry, timesteps))
        else:
            known, samples = [targets[node] for node in entry.inputs], [shapes[node] for node in entry.inputs]
            targets[entry.out] = entry.op.targets(known, samples, shapes[entry.out])
    return targets


def merged_pairs(dag, plan):
    """Nodes of pairs (`layers.signs`) whose two values flow into one neuron: one unit then has to fit both."""
    nodes = set()
    for entry in reversed(dag.ops.values()):
        op = entry.op
        if (op.joins_signs and plan.kinds[entry.out] == CURRENT) or (
            entry.out in nodes and not (op.is_trained or op.splits_signs)
        ):
            nodes.update(entry.inputs)
    return nodes


def larger_of_pairs(scales):
    """The larger lambda of each pair of channels, for both: [2C, 1, 1] or [2N]. A single lambda is unchanged."""
    if scales.numel() == 1:
        return scales
    pairs = scales.unflatten(0, (-1, 2))
    return pairs.amax(1, keepdim=True).expand_as(pairs).flatten(0, 1)


def mixed_channels(dag, plan, shapes):
    """Nodes of spikes or currents whose channels need one lambda or unit, because a layer behind them mixes them.

    Several of them become places of one channel, as behind a pixel shuffle, and a pooling, a convolution or neurons
    read that channel.
    """
    nodes = set()
    for entry in reversed(dag.ops.values()):
        shape = shapes[entry.out]
        if plan.kinds[entry.out] == ANALOG or entry.op.rearranges or not shape or shape[0] == 1:
            continue
        numbers = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
        if reaches_mixed(dag, plan, shapes, entry.out, numbers, nodes):
            nodes.add(entry.out)
    return nodes


def reaches_mixed(dag, plan, shapes, node, numbers, nodes):
    """Whether a layer behind a node reads several of its channels as one, or hands them on to such a layer.

    numbers: those of the channels, rearranged as the node. nodes: the mixed nodes behind it.
    """
    rows = numbers.expand(shapes[node]).flatten(1) if len(shapes[node]) > 1 else numbers[..., None]
    is_mixed = bool((rows != rows[:, :1]).any())
    for name in set(dag.readers(node)):
        op, out = dag.ops[name].op, dag.ops[name].out
        if plan.kinds[out] == ANALOG:
            continue
        reads_as_one = op.reads_windows or (op.rectifies and plan.kinds[node] == CURRENT)
        if op.rearranges:
            found = reaches_mixed(dag, plan, shapes, out, op.carried(numbers, shapes[node]), nodes)
        else:
            found = (is_mixed and reads_as_one) or (out in nodes and not op.is_trained)
        if found:
            return True
    return False


class Groups:
    """Disjoint sets that can be joined (union-find)."""

    def __init__(self):
        self.parent = {}

    def find(self, item):
        """The item that represents the set of `item`; a new item becomes a set of its own."""
        self.parent.setdefault(item, item)
        while self.parent[item] != item:
            item = self.parent[item]
        return item

    def join(self, first, *others):
        """Join the sets of all these items."""
        for other in others:
            self.parent[self.find(other)] = self.find(first)
        self.find(first)

    def members(self):
        """The sets, as lists."""
        sets = defaultdict(list)
        for item in self.parent:
            sets[self.find(item)].append(item)
        return list(sets.values())
