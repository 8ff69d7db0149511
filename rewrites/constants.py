"""BatchNorms and arithmetic with constants, folded into the layers before or behind them.

conv, BatchNorm -> one convolution (SpikeConvBN)
BatchNorm, conv -> one convolution, and a SpikeBiasMap for what a zero padding makes different at the border
"""

import torch
from torch import nn

from rewrites.graph import holds_image, insert_behind, remove_op, replace_op
from spike_dag import SpikeDAGModule
from spike_layers import (
    LeakyReLUOp,
    SpikeAdd,
    SpikeAffine,
    SpikeBatchNorm,
    SpikeBiasMap,
    SpikeConv2d,
    SpikeConvBN,
    SpikeConvTranspose2d,
    SpikeLinear,
    SpikeReLU,
    SpikeSubtract,
)


@torch.no_grad()
def fold_batch_norms(dag: SpikeDAGModule, shapes):
    """Fold BatchNorms and arithmetic with constants into the layers before or behind them, in place.

    shapes: node -> shape of a sample. Each folds into the layer with weights before it, if nothing else reads that
    layer; a convolution becomes a SpikeConvBN behind which a BatchNorm stood. Else it folds into every layer behind it
    that can take it over, directly or through poolings, views and joins (`takers`). What a zero padding makes different
    at the border becomes a SpikeBiasMap behind a convolution. Before an add its constant moves behind the add. On the
    image BatchNorms fold only into an unpadded layer, and arithmetic stays. What is left stays a SpikeBatchNorm or
    SpikeAffine, or becomes weights (`weigh_signed_branches`). The network's function in eval mode does not change.
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
    weigh_signed_branches(dag, shapes)


def merge_relus(dag):
    """Merge each ReLU into one of a lower ceiling that alone reads it, as in torch.minimum(x.relu(), ceiling).

    A positive factor between them changes nothing, if the first one is not clipped.
    """
    for name in [name for name, entry in dag.ops.items() if isinstance(entry.op, SpikeReLU)]:
        ceiling, behind = dag.ops[name].op.ceiling, dag.only_reader(dag.ops[name].out)
        if dag.ops[name].op.levels is not None:
            continue
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
    if type(norm) is SpikeBatchNorm:
        bias = norm.folded_bias(layer.bias)
        layer.scale_output(norm.weight)
        layer.bias = nn.Parameter(bias)
    else:
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
    if op.channelwise and is_per_channel(factor) and (op.is_linear or ((factor > 0).all() and is_per_channel(shift))):
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


def weigh_signed_branches(dag, shapes):
    """Make an affine op between a LeakyReLU and an add a depthwise convolution, as the identity of a RepVGG block.

    Its factors are then integers of the bit width in the unit of the add, as the weights of the other branches. The
    value of a pair of signs has a unit of its own, in which a small factor would be finer than these weights.
    """
    for name, entry in list(dag.ops.items()):
        norm, before, reader = entry.op, dag.writer(entry.inputs[0]), dag.only_reader(entry.out)
        if not isinstance(norm, SpikeBatchNorm) or None in (before, reader) or len(shapes[entry.out]) != 3:
            continue
        if isinstance(dag.ops[before].op, LeakyReLUOp) and isinstance(dag.ops[reader].op, SpikeAdd):
            layer = SpikeConv2d(norm.channels, norm.channels, (1, 1), (1, 1), (0, 0), (1, 1), norm.channels)
            layer.weight, layer.frozen = nn.Parameter(norm.weight.detach().view(-1, 1, 1, 1)), norm.frozen
            layer.bias = norm.bias if norm.bias.any() else None
            replace_op(dag, name, layer.train(norm.training))


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
