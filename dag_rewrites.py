"""Rewrites of a traced network into one that computes the same function and can spike.

    fold_batch_norms     conv, BatchNorm -> one convolution (SpikeConvBN); BatchNorm, conv -> one convolution;
                         the same for arithmetic with constants (`rewrites/constants.py`)
    pool_behind_relus    max pooling, ReLU -> ReLU, max pooling: the pooling then reads spikes
    split_leaky_relus    LeakyReLU -> relu(x) and relu(-x), with the slope in the threshold
    split_signs          a layer that reads values of either sign reads relu(x) and relu(-x) instead
                         (both in `rewrites/signs.py`)
    replace_activations  SiLU, GELU, tanh, ... -> ReLU: another function, to be finetuned
    replace_gates        squeeze-and-excitation -> constant factors: another function, to be finetuned
                         (`rewrites/gates.py`)
    equalize_channels    equally large weights in all output channels of a layer

The first four change the SpikeDAGModule that they are given; the last three return a copy.
"""

import copy
from collections import Counter

import torch

from options import check_option
from rewrites.graph import has_weights_behind, read_instead, replace_op
from rewrites.signs import split_leaky_relus, split_signs
from spike_layers import (
    FunctionOp,
    SpikeAvgPool2d,
    SpikeLinear,
    SpikeMaxPool2d,
    SpikeReLU,
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
