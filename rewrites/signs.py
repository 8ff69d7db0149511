"""Values of either sign, split into pairs of spikes: LeakyReLUs, and layers without a ReLU (`layers.signs`)."""

import torch
from torch import nn

from layers.signs import LEAST_SLOPE
from rewrites.graph import has_weights_behind, holds_image, insert_after, remove_op, replace_op
from spike_layers import (
    LeakyReLUOp,
    MergeSigns,
    SignedReLU,
    SpikeConvTranspose2d,
    SpikeLinear,
    SpikeMaxPool2d,
)


def split_leaky_relus(dag):
    """Replace every LeakyReLU by a pair of ReLUs and the sum of the pair, and let pairs pass max poolings, in place.

    The sum then moves behind as many layers as possible (`pass_pairs`). A max pooling of values of either sign gets a
    pair, too: it takes the largest relu(x) and the smallest relu(-x) of a window. A LeakyReLU of the image stays.
    """
    for name in [name for name, entry in dag.ops.items() if isinstance(entry.op, LeakyReLUOp)]:
        node, slope = dag.ops[name].inputs[0], dag.ops[name].op.slope
        if is_rectified(dag, node):
            remove_op(dag, name)  # the values are not negative
        elif not holds_image(dag, node):
            slope = torch.where(slope.abs() < LEAST_SLOPE, 0.0, slope)
            replace_op(dag, name, SignedReLU(slope).train(dag.ops[name].op.training))
            insert_merge(dag, dag.ops[name].out, MergeSigns(-slope.sign()))
    pass_pairs(dag)
    for name in [name for name, entry in dag.ops.items() if isinstance(entry.op, SpikeMaxPool2d)]:
        node = dag.ops[name].inputs[0]
        if may_be_negative(dag, node) and has_weights_behind(dag, name):
            pairs = insert_after(dag, node, "signed_relu", SignedReLU())
            signs = -torch.ones((), dtype=next(dag.parameters()).dtype, device=next(dag.parameters()).device)
            dag.ops[name]["in_nodes"] = (insert_after(dag, pairs, "merge", MergeSigns(signs)),)
            pass_pairs(dag)


def insert_merge(dag, node, merge):
    """Insert the sum of the pairs in a node. Every other op that reads the node, and the outputs, read the sum."""
    readers = [dag.ops[name] for name in dag.readers(node)]
    merged = insert_after(dag, node, "merge", merge)
    for entry in readers:
        entry["in_nodes"] = tuple(merged if read == node else read for read in entry.inputs)
    dag.outputs_nodes = tuple(merged if read == node else read for read in dag.outputs_nodes)


def pass_pairs(dag):
    """Let every layer that reads sums of pairs read the pairs themselves, if that computes the same, in place.

    A layer with weights reads both values of a pair (`with_both_signs`). A layer that works on each channel alone, such
    as a pooling, passes the pairs on, and their sum stands behind it (`SpikeLayer.on_pairs`). Before an add and at the
    network's end the sum stays.
    """
    for name in list(dag.ops):
        entry = dag.ops[name]
        writers = [dag.ops.get(dag.writer(node)) for node in entry.inputs]
        if not all(writer is not None and writer.op.joins_signs for writer in writers):
            continue
        merges = [writer.op for writer in writers]
        if entry.op.is_trained:
            replace_op(dag, name, with_both_signs(entry.op, *merges))
        else:
            passed = entry.op.on_pairs(merges)
            if passed is None:
                continue
            replace_op(dag, name, passed[0].train(entry.op.training))
            insert_merge(dag, entry.out, passed[1])
        entry["in_nodes"] = tuple(writer.inputs[0] for writer in writers)
    for name in [name for name, entry in dag.ops.items() if entry.op.joins_signs]:
        node = dag.ops[name].out
        if not dag.readers(node) and node not in dag.outputs_nodes:
            remove_op(dag, name)


def split_signs(dag):
    """Split the input of every layer with weights that reads values without a ReLU into relu(x) and relu(-x), in place.

    Both can be sent as spikes, x of either sign cannot. x = relu(x) - relu(-x), so the layer's weights W become W and
    -W. Linear bottlenecks as in MobileNetV2 need this. Other readers of x, such as an add, do not change.
    """
    pairs = {}
    for name in list(dag.ops):
        layer, node = dag.ops[name].op, dag.ops[name].inputs[0]
        if not layer.is_trained or not may_be_negative(dag, node):
            continue
        if node not in pairs:
            pairs[node] = insert_after(dag, node, "signed_relu", SignedReLU())
        dag.ops[name]["in_nodes"] = (pairs[node],)
        replace_op(dag, name, with_both_signs(layer))


def may_be_negative(dag, node):
    """Whether a node holds the output of a layer with trained weights that no ReLU has rectified yet, or of a pair.

    Also for a difference, and for what a constant or a factor makes negative, unless it is computed from the image.
    """
    name = dag.writer(node)
    if name is None:
        return False
    entry = dag.ops[name]
    if entry.op.joins_signs:
        return not holds_image(dag, node)
    if entry.op.may_turn_negative and (entry.op.is_trained or not holds_image(dag, node)):
        return True
    return entry.op.is_linear and any(may_be_negative(dag, read) for read in entry.inputs)


def is_rectified(dag, node):
    """Whether no value of a node is negative, because a ReLU stands before it."""
    name = dag.writer(node)
    if name is None:
        return False
    op = dag.ops[name].op
    passes = (op.passes_spikes or op.fires) and not op.may_turn_negative
    return op.rectifies or (passes and all(is_rectified(dag, read) for read in dag.ops[name].inputs))


@torch.no_grad()
def with_both_signs(layer, merge=None):
    """A copy of `layer`, which reads x, that reads the pairs of x instead: relu(x) and relu(-x), with weights W and -W.

    merge: the MergeSigns by which x is computed from the pairs; None for relu(x) - relu(-x) with interleaved channels.
    """
    config = layer.config()
    size = "in_features" if isinstance(layer, SpikeLinear) else "in_channels"
    config[size] *= 2
    wide = type(layer)(**config)
    inputs = 0 if isinstance(layer, SpikeConvTranspose2d) else 1  # dimension of the weight's input channels
    block = 1 if merge is None else merge.block
    second = -layer.weight if merge is None else layer.weight * layer.input_view(merge.signs_of_features())
    blocks = [weight.unflatten(inputs, (-1, block)) for weight in (layer.weight, second)]
    signs = torch.stack(blocks, inputs + 1).flatten(inputs, inputs + 2)
    wide.weight, wide.bias, wide.frozen = nn.Parameter(signs), layer.bias, layer.frozen
    scale = layer.weight_scale
    if scale is not None:
        wide.set_weight_scale(scale.repeat_interleave(2, 0) if scale.dim() and inputs == 0 else scale)
    return wide.train(layer.training)
