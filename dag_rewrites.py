"""Rewrites of a traced network into one that computes the same function and can spike.

    fold_batch_norms     conv, BatchNorm -> one convolution (SpikeConvBN); BatchNorm, conv -> one convolution
    pool_behind_relus    max pooling, ReLU -> ReLU, max pooling: the pooling then reads spikes
    split_leaky_relus    LeakyReLU -> relu(x) and relu(-x), with the slope in the threshold
    split_signs          a layer that reads values of either sign reads relu(x) and relu(-x) instead
    replace_activations  SiLU, GELU, tanh, ... -> ReLU: another function, to be finetuned
    equalize_channels    equally large weights in all output channels of a layer

The first four change the SpikeDAGModule that they are given; the last two return a copy.
"""

import copy
from collections import Counter

import torch
from torch import nn

from layers.signs import LEAST_SLOPE
from options import check_option
from spike_dag import SpikeDAGModule
from spike_layers import (
    FunctionOp,
    LeakyReLUOp,
    MergeSigns,
    SignedReLU,
    SpikeAvgPool2d,
    SpikeBatchNorm,
    SpikeConv2d,
    SpikeConvBN,
    SpikeConvTranspose2d,
    SpikeLinear,
    SpikeMaxPool2d,
    SpikeReLU,
    ViewOp,
)


def prepare_conversion(dag, maxpool=None, signed=None, avgpool="spike"):
    """A copy of `dag` that computes the same function and is ready for `plan_conversion`.

    Max poolings are moved behind ReLUs. maxpool: "gate" or "or", the mode of all max poolings (`SpikeMaxPool2d`), or
    None to keep their modes. signed: "pair" splits values without a ReLU, and behind a LeakyReLU, by sign
    (`split_signs`, `split_leaky_relus`); None leaves them, and `plan_conversion` refuses them. avgpool: "fold" marks
    all average poolings to be folded if possible (`conversion.plan.folded_poolings`), "spike" none. Raises ValueError
    for other values.
    """
    for name, value in {"maxpool": maxpool, "signed": signed, "avgpool": avgpool}.items():
        check_option(name, value)
    dag = copy.deepcopy(dag)
    pool_behind_relus(dag)
    if signed == "pair":
        split_leaky_relus(dag)
        split_signs(dag)
    for entry in dag.ops.values():
        if isinstance(entry.op, SpikeMaxPool2d) and maxpool is not None:
            entry.op.mode = maxpool
        if isinstance(entry.op, SpikeAvgPool2d):
            entry.op.folded = avgpool == "fold"
    return dag


# ---------------------------------------------------------------------------------------------------------------------
# The graph


def read_instead(dag, old, new):
    """Replace node `old` by `new` in the inputs of all ops and in the outputs."""
    for entry in dag.ops.values():
        entry["in_nodes"] = tuple(new if node == old else node for node in entry.inputs)
    dag.outputs_nodes = tuple(new if node == old else node for node in dag.outputs_nodes)


def remove_op(dag, name):
    """Remove an op with one input. Its readers then read that input."""
    entry = dag.ops[name]
    read_instead(dag, entry.out, entry.inputs[0])
    del dag.ops[name], dag.nodes[entry.out]
    delattr(dag, name)


def replace_op(dag, name, op):
    """Replace the layer of op `name` by `op`."""
    dag.ops[name]["op"] = op
    setattr(dag, name, op)


def insert_after(dag, node, op_type, op):
    """Insert a new op that reads `node`, right behind the op that writes it. Returns the new op's output node."""
    taken, count = set(dag.ops), 1
    while f"{op_type}{count}" in taken:
        count += 1
    name, out = f"{op_type}{count}", f"{op_type}{count}_out1"
    before = dag.writer(node)
    path = dag.ops[before].path if before else ""
    dag.add_op(name, op, [node], [out], path)
    position = list(dag.ops).index(before) + 1 if before else 0
    for later in list(dag.ops)[position:-1]:
        dag.ops.move_to_end(later)
    return out


def has_weights_behind(dag, name):
    """Whether a layer with trained weights reads the output of op `name`, directly or through other ops."""
    reached = {dag.ops[name].out}
    for entry in dag.ops.values():
        if reached.isdisjoint(entry.inputs):
            continue
        if entry.op.is_trained:
            return True
        reached.add(entry.out)
    return False


def holds_image(dag, node):
    """Whether a node is an input, or is computed from inputs by ops without trained weights only."""
    name = dag.writer(node)
    return name is None or (
        not dag.ops[name].op.is_trained and all(holds_image(dag, read) for read in dag.ops[name].inputs)
    )


# ---------------------------------------------------------------------------------------------------------------------
# BatchNorm


@torch.no_grad()
def fold_batch_norms(dag: SpikeDAGModule):
    """Fold each BatchNorm into the layer before it, or into the layer behind it if that is exact, in place.

    The layer before can be a convolution, transposed convolution or linear layer, if only the BatchNorm reads it. A
    convolution becomes a SpikeConvBN. The layer behind can be a linear layer, or a convolution without padding, if it
    is the only reader, directly or through average poolings and a flatten (`layer_behind`). Any other BatchNorm stays a
    SpikeBatchNorm. The network's function in eval mode does not change.
    """
    for name in [name for name, entry in dag.ops.items() if isinstance(entry.op, SpikeBatchNorm)]:
        fold_into_layer_before(dag, name) or fold_into_layer_behind(dag, name)


def fold_into_layer_before(dag, name):
    """Fold the BatchNorm `name` into the layer that it reads, if possible. Returns whether it was folded."""
    norm, (node,) = dag.ops[name].op, dag.ops[name].inputs
    before = dag.writer(node)
    if before is None or not dag.ops[before].op.is_trained or dag.only_reader(node) is None:
        return False
    layer = dag.ops[before].op
    layer.scale_output(norm.weight, norm.bias)
    layer.frozen &= norm.frozen  # a parameter stays frozen only if it is frozen in both
    if type(layer) is SpikeConv2d:
        folded = SpikeConvBN(**layer.config())
        folded.weight, folded.bias, folded.frozen = layer.weight, layer.bias, layer.frozen
        replace_op(dag, before, folded.train(layer.training))
    remove_op(dag, name)
    return True


def fold_into_layer_behind(dag, name):
    """Fold the BatchNorm `name` into the layer that reads it, if possible. Returns whether it was folded."""
    norm, layer = dag.ops[name].op, layer_behind(dag, name)
    if type(layer) not in (SpikeConv2d, SpikeConvBN, SpikeLinear) or any(getattr(layer, "padding", ())):
        return False
    groups = getattr(layer, "groups", 1)
    per_group = layer.weight.shape[1]
    repeats = groups * per_group // len(norm.weight)  # features per channel, if a view has flattened channels
    # values of the input channels that each output channel reads, [C_out, C_in / groups]
    factor, shift = (
        x.repeat_interleave(repeats).view(groups, per_group).repeat_interleave(len(layer.weight) // groups, 0)
        for x in (norm.weight, norm.bias)
    )
    spatial = [1] * (layer.weight.dim() - 2)
    added = (layer.weight * shift.view(*shift.shape, *spatial)).flatten(1).sum(1)
    layer.weight.mul_(factor.view(*factor.shape, *spatial))
    layer.bias = nn.Parameter(added if layer.bias is None else layer.bias + added)
    layer.frozen &= norm.frozen
    remove_op(dag, name)
    return True


def layer_behind(dag, name):
    """The only op that reads op `name`, directly or through average poolings without padding and flattening views.

    A factor and a constant per channel pass these ops unchanged. None if there is no such op.
    """
    while (behind := dag.only_reader(dag.ops[name].out)) is not None:
        op = dag.ops[behind].op
        if not op.passes_shift:
            return op
        name = behind
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling


def pool_behind_relus(dag):
    """Swap every max pooling with the ReLU or LeakyReLU behind it, if nothing else reads the pooling.

    The maximum of ReLUs equals the ReLU of the maximum. A view between them changes no value and is swapped, too; but
    not with a LeakyReLU, which may have a slope per channel.
    """
    pools = []
    for name, entry in dag.ops.items():
        is_view_of_pool = isinstance(entry.op, ViewOp) and dag.writer(entry.inputs[0]) in pools
        if isinstance(entry.op, SpikeMaxPool2d) or is_view_of_pool:
            pools.append(name)
    for name in reversed(pools):  # the last one first: its swap brings the ReLU next to the one before it
        pool, node = dag.ops[name].op, dag.ops[name].out
        behind = dag.only_reader(node)
        if behind is not None and commutes(pool, dag.ops[behind].op):
            rename_swapped(dag, name, behind, pool)


def commutes(pool, function):
    """Whether a max pooling, or a view behind one, may stand behind the function of each value instead."""
    return isinstance(function, SpikeReLU) or (isinstance(pool, SpikeMaxPool2d) and function.passes_maximum)


def rename_swapped(dag, pool_name, relu_name, pool):
    """Swap a pooling or view with the ReLU behind it. Readers of the ReLU then read the pooling."""
    pool_entry, relu_entry = dag.ops[pool_name], dag.ops[relu_name]
    pooled, rectified = pool_entry.out, relu_entry.out
    relu_entry["in_nodes"] = pool_entry.inputs
    read_instead(dag, rectified, pooled)
    pool_entry["in_nodes"] = (rectified,)
    order = list(dag.ops)
    order.remove(relu_name)
    order.insert(order.index(pool_name), relu_name)
    for name in order:
        dag.ops.move_to_end(name)


# ---------------------------------------------------------------------------------------------------------------------
# Signed values


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
    """Whether a node holds the output of a layer with trained weights that no ReLU has rectified yet, or of a pair."""
    name = dag.writer(node)
    if name is None:
        return False
    op, in_nodes = dag.ops[name].op, dag.ops[name].inputs
    if op.is_trained or op.joins_signs:
        return not (op.joins_signs and holds_image(dag, node))
    return op.is_linear and any(may_be_negative(dag, read) for read in in_nodes)


def is_rectified(dag, node):
    """Whether no value of a node is negative, because a ReLU stands before it."""
    name = dag.writer(node)
    if name is None:
        return False
    op = dag.ops[name].op
    passes = op.passes_spikes or op.fires
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


# ---------------------------------------------------------------------------------------------------------------------
# Activation functions without spikes


def replace_activations(dag, by="relu"):
    """`dag, replaced`: a copy of a traced network with ReLUs for activation functions that spikes cannot compute.

    by: "relu", or None to replace nothing. Functions behind the last layer with weights stay. The copy computes another
    function and has to be finetuned. replaced: Counter, name of a function -> how often it was replaced
    (`replaced_in_words`). Raises ValueError for another `by`.
    """
    if by not in (None, "relu"):
        raise ValueError(f"unknown activation function '{by}' to replace others by, use relu")
    dag, replaced = copy.deepcopy(dag), Counter()
    for name, entry in dag.ops.items():
        op = entry.op
        if by and isinstance(op, FunctionOp) and op.is_activation and has_weights_behind(dag, name):
            replaced[op.name] += 1
            replace_op(dag, name, SpikeReLU().train(op.training))
    return dag, replaced


def replaced_in_words(replaced):
    """The Counter of `replace_activations` in words: "replaced 17 silu and 2 gelu by relu"; "" for an empty one."""
    counts = [f"{count} {name}" for name, count in replaced.items()]
    return f"replaced {' and '.join(counts)} by relu" if counts else ""


# ---------------------------------------------------------------------------------------------------------------------
# Equalization


@torch.no_grad()
def equalize_channels(dag):
    """A copy of `dag` that computes the same function, with equally large weights in all output channels of a layer.

    A factor per channel passes a ReLU and an average pooling. So each output channel is divided by its largest |W|
    relative to the layer's mean, and the next layer's weights for this channel are multiplied by it. One s_w per layer
    then suits all channels (weight equalisation; Nagel et al., Data-Free Quantization, ICCV 2019). A layer does not
    change if its output is added, concatenated, read twice or merged into fewer channels by a view.
    """
    dag = copy.deepcopy(dag)
    for name, layer in dag.weighted_layers().items():
        reader = next_weighted_layer(dag, name)
        if reader is None:
            continue
        largest = layer.rows(layer.weight).abs().amax(1)  # [C]
        inputs = reader.in_features if isinstance(reader, SpikeLinear) else reader.in_channels
        if inputs % len(largest):
            continue  # a view has merged several of them into one channel
        factor = torch.where(largest > 0, largest / largest.mean(), 1.0)
        layer.scale_output(1 / factor)
        per_input = factor.repeat_interleave(inputs // len(factor))  # a view may have flattened channels
        reader.weight.mul_(reader.input_view(per_input))
    return dag


def next_weighted_layer(dag, name):
    """The only layer with weights that reads op `name`, through ReLUs, average poolings and views.

    None if there is no such layer, or if it is a grouped convolution.
    """
    node = dag.ops[name].out
    while (behind := dag.only_reader(node)) is not None:
        op, node = dag.ops[behind].op, dag.ops[behind].out
        if op.is_trained:
            return op if getattr(op, "groups", 1) == 1 else None
        if not op.passes_scale:
            return None
    return None
