"""Gates, as in squeeze-and-excitation, become constants: another network, which has to be finetuned."""

import copy

import torch

from layers.gates import is_gate
from rewrites.constants import fold_batch_norms
from rewrites.graph import remove_writer, replace_op
from runtime.batches import inputs_of
from spike_layers import GateOp, SpikeAffine

AT_A_TIME = 32  # images: 96 channels of 112x112 pixels then take 154 MB


@torch.no_grad()
def replace_gates(dag, loader, samples):
    """`dag, spreads, images`: a copy of a traced network, every gate in it its mean over images, folded into weights.

    loader: batches that `batches.split_batch` accepts; the first `samples` images are used. spreads: name of each
    gate's op -> the mean standard deviation of its factors from image to image, relative to their mean
    (`gates_in_words`). images: how many were used. Everything that only computes a gate is removed. A network without
    gates is returned as it is.

    Raises ValueError if there are no images, and for a gate that differs within a channel of some image.
    """
    gates = {name: entry.inputs[1] for name, entry in dag.ops.items() if isinstance(entry.op, GateOp)}
    if not gates:
        return dag, {}, 0
    dag, spreads = copy.deepcopy(dag).eval(), {}
    factors, shapes = measure_gates(dag, set(gates.values()), loader, samples)
    for name, gate in reversed(gates.items()):
        if name not in dag.ops:  # it was in the branch that computes a gate behind it
            continue
        affine = SpikeAffine(factors[gate].shape[1])
        affine.weight.copy_(factors[gate].mean(0))
        affine.frozen = frozenset({"weight", "bias"})
        replace_op(dag, name, affine.to(factors[gate].device))
        dag.ops[name]["in_nodes"] = dag.ops[name].inputs[:1]
        remove_writer(dag, gate)
        spreads[name] = spread(factors[gate])
    fold_batch_norms(dag, shapes)
    dag.lint()
    return dag, spreads, len(next(iter(factors.values())))


def measure_gates(dag, nodes, loader, samples):
    """`factors, shapes`: node of a gate -> its factors, [N, C], and every node -> the shape of a sample."""
    found, shapes = {node: [] for node in nodes}, {}
    device = next((p.device for p in dag.parameters()), torch.device("cpu"))

    def look(node, values):
        shapes[node] = tuple(values.shape[1:])
        if node in found:
            if not is_gate(values):
                name = dag.writer(node)
                raise ValueError(
                    f"{node if name is None else dag.where(name)} is no gate: for some images its factors differ "
                    "within a channel, so a mean cannot replace it"
                )
            found[node].append(values.flatten(2)[..., 0])

    for inputs in inputs_of(loader, device, samples):
        for part in zip(*(x.split(AT_A_TIME) for x in inputs)):
            for node, x in zip(dag.inputs_nodes, part):
                look(node, x)
            dag.forward_ann(part, lambda name, current, values: look(dag.ops[name].out, values))
    return {node: torch.cat(parts) for node, parts in found.items()}, shapes


def spread(factors):
    """The mean standard deviation of factors [N, C] from image to image, relative to their mean."""
    mean = factors.mean().abs()
    return (factors.std(0, correction=0).mean() / mean).item() if mean > 0 else 0.0


def gates_in_words(spreads, images):
    """The spreads of `replace_gates` in words, "" without gates. images: how many the means are over."""
    if not spreads:
        return ""
    gates = "1 gate by its mean" if len(spreads) == 1 else f"{len(spreads)} gates by their means"
    share = sum(spreads.values()) / len(spreads)
    return f"replaced {gates} over {images} images, from which the factors of an image differ by {share:.0%}"
