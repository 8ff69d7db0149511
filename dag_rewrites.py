"""Rewrites of a traced network into one that computes the same function and can spike.

    fold_batch_norms     conv, BatchNorm -> one convolution (SpikeConvBN); BatchNorm, conv -> one convolution;
                         the same for arithmetic with constants
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
    SpikeAdd,
    SpikeAffine,
    SpikeAvgPool2d,
    SpikeBatchNorm,
    SpikeBiasMap,
    SpikeConv2d,
    SpikeConvBN,
    SpikeConvTranspose2d,
    SpikeLinear,
    SpikeMaxPool2d,
    SpikeReLU,
    SpikeSubtract,
)

DEFAULT_MAXPOOL = "gate"  # exact at every step: the pooled count is the largest count of its window


def prepare_conversion(dag, maxpool=None, signed=None, avgpool="spike"):
    """A copy of `dag` that computes the same function and is ready for `plan_conversion`.

    Max poolings are moved behind ReLUs. maxpool: "gate" or "or", the mode of all max poolings (`SpikeMaxPool2d`); None
    keeps their modes, and is "gate" for those without one. signed: "pair" splits values without a ReLU, and behind a
    LeakyReLU, by sign (`split_signs`, `split_leaky_relus`); None leaves them, and `plan_conversion` refuses them.
    avgpool: "fold" marks all average poolings to be folded if possible (`conversion.plan.folded_poolings`), "spike"
    none. Raises ValueError for other values.
    """
    for name, value in {"maxpool": maxpool, "signed": signed, "avgpool": avgpool}.items():
        check_option(name, value)
    dag = copy.deepcopy(dag)
    pool_behind_relus(dag)
    if signed == "pair":
        split_leaky_relus(dag)
        split_signs(dag)
    for entry in dag.ops.values():
        if isinstance(entry.op, SpikeMaxPool2d):
            entry.op.mode = maxpool or entry.op.mode or DEFAULT_MAXPOOL
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
def fold_batch_norms(dag: SpikeDAGModule, shapes):
    """Fold BatchNorms and arithmetic with constants into the layers before or behind them, in place.

    shapes: node -> shape of a sample. Each folds into the layer with weights before it, if nothing else reads that
    layer; a convolution becomes a SpikeConvBN behind which a BatchNorm stood. Else it folds into every layer behind it
    that can take it over, directly or through poolings, views and joins (`takers`). What a zero padding makes different
    at the border becomes a SpikeBiasMap behind a convolution. Before an add its constant moves behind the add. On the
    image BatchNorms fold only into an unpadded layer, and arithmetic stays. What is left stays a SpikeBatchNorm or
    SpikeAffine. The network's function in eval mode does not change.
    """
    merge_relus(dag)
    waiting = [name for name, entry in dag.ops.items() if isinstance(entry.op, (SpikeBatchNorm, SpikeBiasMap))]
    while waiting:
        name = waiting.pop(0)
        if fold_into_layer_before(dag, name):
            continue
        fold_into_layers_behind(dag, name, shapes)
        if name in dag.ops:
            waiting += move_behind_add(dag, name, shapes)


def merge_relus(dag):
    """Merge each ReLU into one of a lower ceiling that alone reads it, as in torch.minimum(x.relu(), ceiling).

    A positive factor between them changes nothing, if the first one is not clipped.
    """
    for name in [name for name, entry in dag.ops.items() if isinstance(entry.op, SpikeReLU)]:
        ceiling, behind = dag.ops[name].op.ceiling, dag.only_reader(dag.ops[name].out)
        if behind is not None and ceiling is None and isinstance(dag.ops[behind].op, SpikeAffine):
            behind = dag.only_reader(dag.ops[behind].out) if dag.ops[behind].op.only_scales() else None
        second = None if behind is None else dag.ops[behind].op
        if isinstance(second, SpikeReLU) and (second.ceiling or torch.inf) < (ceiling or torch.inf):
            remove_op(dag, name)


def fold_into_layer_before(dag, name):
    """Fold the affine op `name` into the layer that it reads, if possible. Returns whether it was folded."""
    norm, (node,) = dag.ops[name].op, dag.ops[name].inputs
    before, maps, sign = (None, [], 1) if isinstance(norm, SpikeBiasMap) else layer_before(dag, node, norm)
    if before is None:
        return False
    layer = dag.ops[before].op
    layer.scale_output(norm.weight, sign * norm.bias)
    for each in maps:
        each.bias.mul_(norm.weight.view(-1, *[1] * (each.bias.dim() - 1)))
    layer.frozen &= norm.frozen  # a parameter stays frozen only if it is frozen in both
    if type(layer) is SpikeConv2d and type(norm) is SpikeBatchNorm:
        folded = SpikeConvBN(**layer.config())
        folded.weight, folded.bias, folded.frozen = layer.weight, layer.bias, layer.frozen
        replace_op(dag, before, folded.train(layer.training))
    remove_op(dag, name)
    return True


def layer_before(dag, node, norm):
    """`name, maps, sign`: the layer with weights whose output only an affine op reads as `node`; name None for none.

    maps: the SpikeBiasMaps between them. A mere constant also reaches a layer through adds, with `sign`.
    """
    maps, name = [], dag.writer(node)
    while name is not None and dag.only_reader(node) is not None:
        entry = dag.ops[name]
        if entry.op.is_trained:
            return name, maps, 1
        if isinstance(entry.op, SpikeBiasMap):
            maps.append(entry.op)
        elif isinstance(entry.op, SpikeAdd) and isinstance(norm, SpikeAffine) and (norm.weight == 1).all():
            found = [(layer_before(dag, read, norm), sign) for read, sign in zip(entry.inputs, entry.op.signs)]
            return next(((each[0], [], sign * each[2]) for each, sign in found if each[0] is not None), (None, [], 1))
        else:
            break
        node = entry.inputs[0]
        name = dag.writer(node)
    return None, [], 1


# An affine op behind which other layers take it over. A value is followed as two maps of a sample, [1, C, H, W]:
# the factor of every element, and its constant.


def fold_into_layers_behind(dag, name, shapes):
    """Fold the affine op `name` into each layer that reads it, where that is exact; remove it if nothing is left."""
    entry = dag.ops[name]
    norm, (node,), shape = entry.op, entry.inputs, shapes[entry.out]
    on_image = holds_image(dag, node)
    if on_image and (isinstance(norm, SpikeBiasMap) or dag.only_reader(entry.out) is None):
        return
    factor, shift = maps_of(norm, shape)
    for reader in dict.fromkeys(dag.readers(entry.out)):
        found = takers(dag, reader, entry.out, factor, shift, shapes)
        if found is None or (on_image and not may_change_image(dag, norm, found)):
            continue
        for taker in found:
            take_over(dag, *taker, norm.frozen, shapes)
        read = dag.ops[reader].inputs
        dag.ops[reader]["in_nodes"] = tuple(node if each == entry.out else each for each in read)
    if not dag.readers(entry.out) and entry.out not in dag.outputs_nodes:
        remove_op(dag, name)


def maps_of(norm, shape):
    """The factor and the constant of every element of a sample, [1, C, ...] each."""
    if isinstance(norm, SpikeBiasMap):
        return torch.ones_like(norm.bias)[None], norm.bias[None]
    spread = [values.view(-1, *[1] * (len(shape) - 1)).expand(shape)[None] for values in (norm.weight, norm.bias)]
    return tuple(spread)


def may_change_image(dag, norm, found):
    """Whether an affine op on the image may be folded: a BatchNorm into unpadded layers, arithmetic into arithmetic."""
    readers = [dag.ops[name].op for name, _, _ in found]
    if any(isinstance(op, SpikeAffine) for op in (norm, *readers)):
        return all(isinstance(op, SpikeBatchNorm) for op in readers)
    same_everywhere = all(is_per_channel(shift) for _, _, shift in found)
    return same_everywhere and all(op.is_trained and not pads(op) for op in readers)


def pads(layer):
    """Whether a layer may read zeros of a padding, or weighs its inputs differently from place to place."""
    return any(getattr(layer, "padding", ())) or isinstance(layer, SpikeConvTranspose2d)


def takers(dag, name, node, factor, shift, shapes):
    """The ops that take over a factor and a constant of `node`, read by op `name`: a list of (op, factor, shift).

    None if one of the layers behind op `name` cannot take them over exactly.
    """
    entry = dag.ops[name]
    if entry.op.is_trained or isinstance(entry.op, SpikeBatchNorm):
        by_feature = isinstance(entry.op, SpikeLinear)
        fits = by_feature or is_per_channel(factor)
        fits &= entry.op.is_trained or is_per_channel(shift)
        return [(name, factor, shift)] if fits else None
    if isinstance(entry.op, SpikeBiasMap):
        return [(name, factor, shift)] if (factor == 1).all() else None
    passed = passed_on(entry, node, factor, shift, shapes)
    if passed is None or entry.out in dag.outputs_nodes:
        return None
    found = []
    for reader in dict.fromkeys(dag.readers(entry.out)):
        behind = takers(dag, reader, entry.out, *passed, shapes)
        if behind is None:
            return None
        found += behind
    return found


def passed_on(entry, node, factor, shift, shapes):
    """The factor and the constant of an op's output that stand for those of its input `node`, or None."""
    op = entry.op
    own = [each == node for each in entry.inputs]
    blank = [torch.zeros(1, *shapes[each]) for each in entry.inputs]
    shifts = [shift if mine else zeros.to(shift) for mine, zeros in zip(own, blank)]
    if op.rearranges:  # the zeros that a padding adds suit any factor
        passed = op.activation(shift)
        return op.carried(factor[0], shapes[node]).expand(passed.shape), passed
    if op.is_linear and not op.is_measured:  # a concatenation
        factors = [factor if mine else zeros.to(factor) + 1 for mine, zeros in zip(own, blank)]
        return op.activation(*factors), op.activation(*shifts)
    if op.is_linear and op.adds and (factor == 1).all() and not isinstance(op, SpikeBiasMap):
        passed = op.activation(*shifts)
        return torch.ones_like(passed), passed
    if op.channelwise and is_per_channel(factor) and (op.is_linear or (factor > 0).all()):
        passed = op.activation(shift)
        spread = factor.flatten(2)[:, :, 0].view(1, -1, *[1] * (passed.dim() - 2)).expand_as(passed)
        return spread, passed
    return None


def is_per_channel(values):
    """Whether the values of a sample, [1, C, ...], are equal within every channel."""
    rows = values.flatten(2) if values.dim() > 2 else values[..., None]
    return bool((rows == rows[..., :1]).all())


def take_over(dag, name, factor, shift, frozen, shapes):
    """Change op `name` so that, for x in place of factor * x + shift, it computes the same. factor, shift: maps."""
    op = dag.ops[name].op
    op.frozen &= frozen
    if isinstance(op, SpikeBiasMap):
        op.bias.add_(shift[0])
        return
    per_input = factor.flatten() if isinstance(op, SpikeLinear) else first_of_channels(factor)
    if isinstance(op, SpikeBatchNorm):
        op.bias.add_(op.weight * first_of_channels(shift))
        op.weight.mul_(per_input)
        return
    if not shift.any():
        op.weight.mul_(op.input_view(per_input))
        return
    added, border = constant_output(op, shift)
    op.weight.mul_(op.input_view(per_input))
    op.bias = nn.Parameter(added if op.bias is None else op.bias + added)
    if border is not None:
        add_map(dag, name, border, shapes)


def add_map(dag, name, values, shapes):
    """Add a constant map, [C, H, W], to the output of op `name`: to a SpikeBiasMap behind it, or to a new one."""
    behind = dag.only_reader(dag.ops[name].out)
    if behind is not None and isinstance(dag.ops[behind].op, SpikeBiasMap):
        dag.ops[behind].op.bias.add_(values)
        return
    bias_map = SpikeBiasMap(values.shape)
    bias_map.bias, bias_map.frozen = nn.Parameter(values), frozenset({"bias"})
    out = insert_behind(dag, name, "bias_map", bias_map)
    shapes[out] = shapes[dag.ops[name].out]


def first_of_channels(values):
    """One value for each channel, [C], of a map [1, C, ...]."""
    return values.flatten(2)[0, :, 0] if values.dim() > 2 else values[0]


NO_BORDER = 1e-5  # relative to the largest value: some roundings of float32


def constant_output(layer, shift):
    """What a layer makes of a constant, [1, C, ...], without its bias: `added, border`.

    added: the same at every place, [C_out]. border: what is left, [C_out, H, W], or None if that is nothing.
    """
    if isinstance(layer, SpikeLinear) or (not pads(layer) and is_per_channel(shift)):
        per_input = shift.flatten() if isinstance(layer, SpikeLinear) else first_of_channels(shift)
        return (layer.weight * layer.input_view(per_input)).flatten(1).sum(1), None
    output = layer.operate(shift, layer.weight, None)[0]
    added = output.flatten(1).median(1).values
    border = output - added.view(-1, 1, 1)
    border = torch.where(border.abs() <= NO_BORDER * output.abs().max(), 0.0, border)
    return added, border if border.any() else None


def insert_behind(dag, name, op_type, op):
    """Insert a new op with one input behind op `name`; all readers of that op then read the new one."""
    node = dag.ops[name].out
    readers, outputs = [dag.ops[each] for each in dict.fromkeys(dag.readers(node))], dag.outputs_nodes
    out = insert_after(dag, node, op_type, op)
    for entry in readers:
        entry["in_nodes"] = tuple(out if each == node else each for each in entry.inputs)
    dag.outputs_nodes = tuple(out if each == node else each for each in outputs)
    return out


def move_behind_add(dag, name, shapes):
    """Move the constant of an affine op whose only reader is an add behind that add, and a minus sign into it.

    The rest, a positive factor, only scales spikes. Returns the names of new affine ops.
    """
    entry = dag.ops[name]
    reader = dag.only_reader(entry.out)
    if reader is None or type(dag.ops[reader].op) not in (SpikeAdd, SpikeSubtract) or holds_image(dag, entry.out):
        return []
    moved, norm, add = [], entry.op, dag.ops[reader]
    is_map = isinstance(norm, SpikeBiasMap)
    if norm.bias.any():
        behind = SpikeBiasMap(norm.shape) if is_map else SpikeAffine(len(norm.bias))
        sign = add.op.signs[add.inputs.index(entry.out)]
        behind.bias, behind.frozen = (
            nn.Parameter(sign * norm.bias),
            norm.frozen & {"bias"} if is_map else norm.frozen | {"weight"},
        )
        out = insert_behind(dag, reader, "bias_map" if is_map else "affine", behind)
        shapes[out] = shapes[add.out]
        moved.append(dag.writer(out))
    if is_map or (norm.weight == 1).all():
        remove_op(dag, name)
        return moved
    scale = SpikeAffine(len(norm.weight))
    turns = (norm.weight < 0).all() and change_sign(dag, reader, entry.out)
    scale.weight, scale.frozen = nn.Parameter(-norm.weight if turns else norm.weight), norm.frozen | {"bias"}
    replace_op(dag, name, scale)
    if (scale.weight == 1).all():
        remove_op(dag, name)
    return moved


def change_sign(dag, name, node):
    """Make the add or difference `name` change the sign of its input `node`. Returns whether it can: one stays."""
    entry = dag.ops[name]
    signs = [-sign if each == node else sign for each, sign in zip(entry.inputs, entry.op.signs)]
    if max(signs) < 0:
        return False
    if signs[0] < 0:
        entry["in_nodes"] = entry.inputs[::-1]
    replace_op(dag, name, SpikeSubtract() if min(signs) < 0 else SpikeAdd())
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Max pooling


def pool_behind_relus(dag):
    """Swap every max pooling with the ReLU or LeakyReLU behind it, if nothing else reads the pooling.

    The maximum of ReLUs equals the ReLU of the maximum. What only rearranges values between them is swapped, too; but
    not with a LeakyReLU, which may have a slope per channel.
    """
    pools = []
    for name, entry in dag.ops.items():
        is_view_of_pool = entry.op.rearranges and dag.writer(entry.inputs[0]) in pools
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
