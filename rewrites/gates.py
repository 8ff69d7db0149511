"""Gates, as in squeeze-and-excitation, become constants: another network, which has to be finetuned."""

import copy

import torch

from rewrites.constants import fold_batch_norms
from rewrites.graph import replace_op
from spike_layers import GateOp, SpikeAffine

AT_A_TIME = 32  # images: 96 channels of 112x112 pixels then take 154 MB


@torch.no_grad()
def replace_gates(dag, inputs):
    """`dag, spreads`: a copy of a traced network in which every gate is its mean over images, folded into weights.

    inputs: images, a tuple of [N, ...]. spreads: name of each gate's op -> the mean standard deviation of its factors
    from image to image, relative to their mean (`gates_in_words`). Everything that only computes a gate is removed.
    """
    dag = copy.deepcopy(dag).eval()
    measured = measure_gates(dag, inputs)
    for name, factors in measured.items():
        x, gate = dag.ops[name].inputs
        affine = SpikeAffine(factors.shape[1])
        affine.weight.copy_(factors.mean(0))
        affine.frozen = frozenset({"weight", "bias"})
        replace_op(dag, name, affine.to(factors.device))
        dag.ops[name]["in_nodes"] = (x,)
        remove_writer(dag, gate)
    if measured:
        fold_batch_norms(dag, shapes_of(dag, inputs))
        dag.lint()
    return dag, {name: spread(factors) for name, factors in measured.items()}


def measure_gates(dag, inputs):
    """Name of each gate's op -> its factors, [N, C], for images [N, ...]."""
    names = {entry.inputs[1]: name for name, entry in dag.ops.items() if isinstance(entry.op, GateOp)}
    writers, found = {dag.writer(node): name for node, name in names.items()}, {name: [] for name in names.values()}

    def watch(name, current, activation):
        if name in writers:
            found[writers[name]].append(activation.flatten(2).mean(2))

    for part in zip(*(x.split(AT_A_TIME) for x in inputs)):
        dag.forward_ann(part, watch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def spread(factors):
    """The mean standard deviation of factors [N, C] from image to image, relative to their mean."""
    mean = factors.mean().abs()
    return (factors.std(0, correction=0).mean() / mean).item() if mean > 0 else 0.0


def remove_writer(dag, node):
    """Remove the op that writes a node, if nothing reads it any more, and then what only that op read."""
    name = dag.writer(node)
    if name is None or dag.readers(node) or node in dag.outputs_nodes:
        return
    entry = dag.ops[name]
    del dag.ops[name], dag.nodes[node]
    delattr(dag, name)
    for read in entry.inputs:
        remove_writer(dag, read)


def shapes_of(dag, inputs):
    """Node -> shape of a sample."""
    shapes = {node: tuple(x.shape[1:]) for node, x in zip(dag.inputs_nodes, inputs)}

    def watch(name, current, activation):
        shapes[dag.ops[name].out] = tuple(activation.shape[1:])

    dag.forward_ann([x[:1] for x in inputs], watch)
    return shapes


def gates_in_words(spreads, images):
    """The spreads of `replace_gates` in words, "" without gates. images: over how many the means are."""
    if not spreads:
        return ""
    gates = "1 gate by its mean" if len(spreads) == 1 else f"{len(spreads)} gates by their means"
    share = sum(spreads.values()) / len(spreads)
    return f"replaced {gates} over {images} images, from which the factors of an image differ by {share:.0%}"
