"""Rewrites of a traced network into one that computes the same function and can spike.

    fold_batch_norms     conv, BatchNorm -> one convolution (SpikeConvBN); BatchNorm, conv -> one convolution
    pool_behind_relus    max pooling, ReLU -> ReLU, max pooling: the pooling then reads spikes
    split_signs          a layer that reads values of either sign reads relu(x) and relu(-x) instead
    equalize_channels    equally large weights in all output channels of a layer

The first three change the SpikeDAGModule that they are given; `equalize_channels` returns a copy.
"""

import copy

import torch
from torch import nn

from options import check_option
from spike_dag import SpikeDAGModule
from spike_layers import (
    SignedReLU,
    SpikeAvgPool2d,
    SpikeBatchNorm,
    SpikeConv2d,
    SpikeConvBN,
    SpikeConvTranspose2d,
    SpikeLinear,
    SpikeMaxPool2d,
    SpikeReLU,
)


def prepare_conversion(dag, maxpool=None, signed=None, avgpool="spike"):
    """A copy of `dag` that computes the same function and is ready for `plan_conversion`.

    Max poolings are moved behind ReLUs. maxpool: "gate" or "or", the mode of all max poolings (`SpikeMaxPool2d`), or
    None to keep their modes. signed: "pair" splits values without a ReLU by sign (`split_signs`); None leaves them, and
    `plan_conversion` refuses them. avgpool: "fold" marks all average poolings to be folded if possible
    (`conversion.plan.folded_poolings`), "spike" none. Raises ValueError for other values.
    """
    for name, value in {"maxpool": maxpool, "signed": signed, "avgpool": avgpool}.items():
        check_option(name, value)
    dag = copy.deepcopy(dag)
    pool_behind_relus(dag)
    if signed == "pair":
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


def remove_unread(dag):
    """Remove every op that only rearranges values and that nothing reads, as an unused part of a split."""
    for name, entry in reversed(list(dag.ops.items())):
        if entry.op.rearranges and not dag.readers(entry.out) and entry.out not in dag.outputs_nodes:
            remove_op(dag, name)


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
    """Swap every max pooling with the ReLU behind it, if nothing else reads the pooling.

    The maximum of ReLUs equals the ReLU of the maximum. What only rearranges values between them is swapped, too.
    """
    pools = []
    for name, entry in dag.ops.items():
        is_view_of_pool = entry.op.rearranges and dag.writer(entry.inputs[0]) in pools
        if isinstance(entry.op, SpikeMaxPool2d) or is_view_of_pool:
            pools.append(name)
    for name in reversed(pools):  # the last one first: its swap brings the ReLU next to the one before it
        pool, node = dag.ops[name].op, dag.ops[name].out
        behind = dag.only_reader(node)
        if behind is not None and isinstance(dag.ops[behind].op, SpikeReLU):
            rename_swapped(dag, name, behind, pool)


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
    """Whether a node holds the output of a layer with trained weights that no ReLU has rectified yet."""
    name = dag.writer(node)
    if name is None:
        return False
    entry = dag.ops[name]
    return entry.op.is_trained or (entry.op.is_linear and any(may_be_negative(dag, read) for read in entry.inputs))


@torch.no_grad()
def with_both_signs(layer):
    """A copy of `layer`, which reads x, that reads relu(x) and relu(-x) with interleaved channels instead."""
    config = layer.config()
    size = "in_features" if isinstance(layer, SpikeLinear) else "in_channels"
    config[size] *= 2
    wide = type(layer)(**config)
    inputs = 0 if isinstance(layer, SpikeConvTranspose2d) else 1  # dimension of the weight's input channels
    signs = torch.stack([layer.weight, -layer.weight], inputs + 1).flatten(inputs, inputs + 1)
    wide.weight, wide.bias, wide.frozen = nn.Parameter(signs), layer.bias, layer.frozen
    scale = layer.weight_scale
    if scale is not None:
        wide.set_weight_scale(scale.repeat_interleave(2, 0) if scale.dim() and inputs == 0 else scale)
    return wide.train(layer.training)


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
