"""Roundings of activations that a network was trained with, as activation levels.

    floor(clamp(x / s, 0, 1) * L + 1/2) / L * s      round(clamp(x / s, 0, L)) * s      clamp(round(x / s), 0, L) * s

A network that is quantized in training rounds its activations like this, or in another order of factors
(clip-floor-shift; Bu et al., Optimal ANN-SNN Conversion, ICLR 2022; LSQ; Esser et al., Learned Step Size Quantization,
ICLR 2020). A neuron rounds the same way: it sends 0 to T spikes. So the rounding becomes the levels of the ReLU before
it (`spike_neurons.ClipFloorShift`), with the network's own lambda, which the conversion takes.
"""

import copy

import torch

from options import TIMESTEPS
from rewrites.graph import has_weights_behind, holds_image, remove_op, replace_op
from spike_dag import SpikeDAGModule
from spike_layers import FunctionOp, SpikeAdd, SpikeAffine, SpikeReLU
from spike_neurons import ClipFloorShift

TO_NEAREST = {"floor": 0.5, "round": 0.0}  # function -> the constant with which it gives the nearest integer
NEARLY = 1e-4  # steps from a whole number: lambda / step is a quotient of float32 numbers


@torch.no_grad()
def roundings_to_levels(dag: SpikeDAGModule, shapes):
    """Turn each rounding behind a clipped ReLU into levels of that ReLU, in place; return their names.

    shapes: node -> shape of a sample. The function in eval mode does not change, with two exceptions. Float rounding
    can move an activation by a level. And in the middle of two levels a neuron takes the upper one, torch.round the
    even one. A rounding of other values, on the image, or behind the last layer with weights stays what it is.
    """
    remove_straight_through(dag, shapes)
    found = [name for name, entry in dag.ops.items() if is_rounding(entry.op) and is_inside(dag, name)]
    return {name for name in found if any(move(dag, name, shapes) for move in (into_relu_behind, into_relu_before))}


def is_inside(dag, name):
    """Whether an op stands between layers with weights, where spikes have to compute it."""
    return has_weights_behind(dag, name) and not holds_image(dag, dag.ops[name].inputs[0])


def is_rounding(op):
    """Whether an op rounds every value to an integer."""
    return isinstance(op, FunctionOp) and op.name in TO_NEAREST and not op.args and not op.settings


def unrounded(op, x):
    """A value that a rounding would have given, without the rounding. The network then has no jumps."""
    return x - TO_NEAREST[op.name]


def without_levels(dag):
    """A copy of a graph whose activations are clipped, but not rounded."""
    dag = copy.deepcopy(dag)
    for entry in dag.ops.values():
        entry.op.levels = None
    return dag


def remove_straight_through(dag, shapes):
    """Replace x + (r - x), where r is a factor times a rounded value, by r: a rounding with the gradient of x."""
    if not any(is_rounding(entry.op) for entry in dag.ops.values()):
        return
    for name, entry in list(dag.ops.items()):
        if name not in dag.ops or not isinstance(entry.op, SpikeAdd):
            continue
        summands = summands_of(dag, entry.out)
        left = [node for node, share in summands.items() if share]
        writer = dag.writer(left[0]) if len(left) == 1 and len(summands) > 1 else None
        if writer is not None and is_rounding(dag.ops[writer].op):
            read = entry.inputs
            entry["in_nodes"] = (left[0],)
            replace_or_remove(dag, name, affine(shapes[entry.out][0], weight=summands[left[0]]))
            for node in read:
                remove_sums(dag, node)


def summands_of(dag, node):
    """The values that a node sums, through sums and factors: node -> factor, 0 for one that cancels out."""
    writer = dag.writer(node)
    op = None if writer is None else dag.ops[writer].op
    if isinstance(op, SpikeAdd):
        signs = op.signs
    elif isinstance(op, SpikeAffine) and is_same(op.weight) and not op.bias.any():
        signs = [op.weight[0].item()]
    else:
        return {node: 1.0}
    found = {}
    for sign, read in zip(signs, dag.ops[writer].inputs):
        for summand, share in summands_of(dag, read).items():
            found[summand] = found.get(summand, 0.0) + sign * share
    return found


def remove_sums(dag, node):
    """Remove the op that writes `node`, and the sums and factors before it, as far as nothing reads them."""
    name = dag.writer(node)
    is_sum = name is not None and isinstance(dag.ops[name].op, (SpikeAdd, SpikeAffine))
    if is_sum and not dag.readers(node) and node not in dag.outputs_nodes:
        inputs = dag.ops[name].inputs
        del dag.nodes[node], dag.ops[name]
        delattr(dag, name)
        for read in inputs:
            remove_sums(dag, read)


def into_relu_behind(dag, name, shapes):
    """Move the rounding `name` into a ReLU with a whole ceiling that alone reads it; return whether there is one."""
    entry = dag.ops[name]
    reader = dag.only_reader(entry.out)
    relu = None if reader is None else dag.ops[reader].op
    if not isinstance(relu, SpikeReLU) or relu.levels is not None or not has_whole(relu.ceiling):
        return False
    relu.levels = ClipFloorShift(round(relu.ceiling), torch.tensor(float(relu.ceiling)))
    replace_or_remove(dag, name, affine(shapes[entry.out][0], bias=-TO_NEAREST[entry.op.name]))
    return True


def into_relu_before(dag, name, shapes):
    """Move the rounding `name` into the ReLU before it, if it rounds to the nearest of levels from 0 to its ceiling.

    Return whether it could be moved.
    """
    found = relu_before(dag, name)
    if found is None:
        return False
    relu, between, factor, shift = found
    op = dag.ops[relu].op
    if not has_whole(factor * op.ceiling) or abs(shift - TO_NEAREST[dag.ops[name].op.name]) > NEARLY:
        return False
    op.levels = ClipFloorShift(round(factor * op.ceiling), torch.tensor(float(op.ceiling)))
    for each in between:
        remove_op(dag, each)
    replace_or_remove(dag, name, affine(shapes[dag.ops[relu].out][0], weight=factor))
    return True


def has_whole(levels):
    """Whether a number is a whole number of levels, as many as a network can have."""
    return levels is not None and 1 <= round(levels) <= TIMESTEPS.most and abs(levels - round(levels)) <= NEARLY


def affine(channels, weight=1.0, bias=0.0):
    """weight * x + bias, the same for all channels; finetuning does not change it."""
    op = SpikeAffine(channels)
    op.weight.fill_(weight)
    op.bias.fill_(bias)
    op.frozen = frozenset({"weight", "bias"})
    return op


def replace_or_remove(dag, name, affine):
    """Replace op `name` by an affine op, or remove it if that changes nothing."""
    if (affine.weight == 1).all() and not affine.bias.any():
        remove_op(dag, name)
    else:
        replace_op(dag, name, affine)


def relu_before(dag, name):
    """`relu, between, factor, shift`: the clipped ReLU whose output the op `name` reads as factor * y + shift.

    between: the affine ops between both. None if there is no such ReLU, if another op reads these values too, or if the
    factors of channels differ.
    """
    node, between, factor, shift = dag.ops[name].inputs[0], [], 1.0, 0.0
    while dag.only_reader(node) is not None:
        writer = dag.writer(node)
        op = None if writer is None else dag.ops[writer].op
        if isinstance(op, SpikeReLU):
            return None if op.ceiling is None or op.levels is not None else (writer, between, factor, shift)
        if not isinstance(op, SpikeAffine) or not is_same(op.weight) or not is_same(op.bias) or op.weight[0] <= 0:
            return None
        factor, shift = factor * op.weight[0].item(), shift + factor * op.bias[0].item()
        between.append(writer)
        node = dag.ops[writer].inputs[0]
    return None


def is_same(values):
    """Whether all values are equal."""
    return bool((values == values[0]).all())
