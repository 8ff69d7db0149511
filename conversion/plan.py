"""Which values of a network become currents and spikes, and where neurons stand."""

from collections import defaultdict
from dataclasses import dataclass, field

from dag_rewrites import is_trained, readers, writer
from spike_layers import (
    ConcatOp,
    SignedReLU,
    SoftmaxOp,
    SpikeAdd,
    SpikeAvgPool2d,
    SpikeBatchNorm,
    SpikeMaxPool2d,
    SpikePad,
    SpikeReLU,
    ViewOp,
)

# What the value of a node is in the converted network.
ANALOG = "activations"  # of the image, of layers that stay ANN, and behind the last spiking layer

CURRENT = "currents"  # what flows into a neuron

SPIKES = "spikes"

LARGEST_SUM = 255  # spikes in the window of a folded pooling: what uint8 holds


@dataclass
class Plan:
    """kinds: node -> ANALOG, CURRENT or SPIKES. firing: names of the ops that get a neuron.

    folded: names of the average poolings of spikes that the layers behind them sum, without a neuron.
    """

    kinds: dict
    firing: list = field(default_factory=list)
    folded: list = field(default_factory=list)


RELUS = (SpikeReLU, SignedReLU)

# what flows into a neuron passes these on the way: each is a weighted sum
LINEAR_OPS = (SpikeAdd, ConcatOp, ViewOp, SpikePad, SpikeBatchNorm, SpikeAvgPool2d)


def plan_conversion(dag, ann_layers=()):
    """Which values become currents and spikes, and which ops fire.

    What stands before the first convolution or linear layer that feeds a ReLU, what stands behind the last neuron
    (pooling, the final linear layer, softmax) and `ann_layers` (op names, module paths or their beginnings) stay ANN.
    Raises ValueError for a convolution without a ReLU behind it, unless it is the network's last layer, for max pooling
    whose mode is not chosen, and for what else cannot be expressed in spikes.
    """
    stays_ann = find_ann_layers(dag, ann_layers)
    feeds_relu, leads_to_relu = look_ahead(dag, stays_ann)
    needs_spikes = look_for_synapses(dag, stays_ann)
    plan = Plan(dict.fromkeys(dag.inputs_nodes, ANALOG))
    for name, entry in dag.ops.items():
        op, (out,) = entry["op"], entry["out_nodes"]
        inputs = [plan.kinds[node] for node in entry["in_nodes"]]
        ahead = feeds_relu[out], leads_to_relu[out]
        if name in stays_ann:
            kind = plan_ann(dag, name, inputs)
        elif is_trained(op):
            kind = plan_weighted(dag, name, inputs[0], *ahead)
        elif isinstance(op, SoftmaxOp):
            kind = plan_softmax(dag, name, inputs, leads_to_relu[out])
        elif isinstance(op, RELUS):
            kind = SPIKES if inputs[0] == CURRENT else inputs[0]
        elif isinstance(op, SpikeMaxPool2d):
            kind = plan_max_pool(dag, name, inputs[0], leads_to_relu[out])
        elif isinstance(op, SpikeBatchNorm):
            kind = plan_batch_norm(dag, name, inputs[0], *ahead)
        elif isinstance(op, SpikeAdd):
            kind = plan_add(dag, name, inputs, *ahead, needs_spikes[out])
        elif isinstance(op, ConcatOp):
            kind = plan_concat(dag, name, inputs, *ahead)
        elif isinstance(op, (SpikeAvgPool2d, SpikePad, ViewOp)):
            kind = plan_pass(inputs[0], leads_to_relu[out])
        else:
            raise NotImplementedError(f"{dag.where(name)}: a {type(op).__name__} cannot be converted")
        plan.kinds[out] = kind
        if kind == SPIKES and fires(op, inputs):
            plan.firing.append(name)
    plan.folded = folded_poolings(dag, plan.kinds)
    plan.firing = [name for name in plan.firing if name not in plan.folded]
    check_outputs(dag, plan)
    if not plan.firing:
        raise ValueError("the network has no convolution or linear layer with a ReLU behind it, nothing can spike")
    return plan


def fires(op, inputs):
    """Whether a neuron stands at an op whose output is spikes."""
    return CURRENT in inputs if isinstance(op, RELUS) else isinstance(op, (SpikeAvgPool2d, SpikeAdd))


def folded_poolings(dag, kinds):
    """Names of the average poolings marked as `folded` that can be; kinds: node -> what its value is (`Plan`).

    Such a pooling reads spikes, and only convolutions and linear layers that make currents read it, through views and
    paddings at most. Its windows do not overlap, so that every weight of the folded kernel is one of the layer's and
    keeps its bit width, and hold at most `LARGEST_SUM` inputs. Any other one keeps its neuron.
    """
    return [
        name
        for name, entry in dag.ops.items()
        if isinstance(entry["op"], SpikeAvgPool2d)
        and entry["op"].folded
        and all(kinds[node] == SPIKES for node in (*entry["in_nodes"], *entry["out_nodes"]))
        and all(step >= size for step, size in zip(entry["op"].stride, entry["op"].kernel_size))
        and entry["op"].window <= LARGEST_SUM
        and feeds_synapses_alone(dag, kinds, entry["out_nodes"][0])
    ]


def feeds_synapses_alone(dag, kinds, node):
    """Whether all that reads a node are layers with trained weights that make currents, or lead to such alone."""
    names = readers(dag, node)
    return bool(names) and node not in dag.outputs_nodes and all(is_synapse(dag, kinds, name) for name in names)


def is_synapse(dag, kinds, name):
    """Whether an op weighs spikes, or hands them on to ops that do."""
    op, (out,) = dag.ops[name]["op"], dag.ops[name]["out_nodes"]
    if is_trained(op):
        return kinds[out] == CURRENT
    passes = isinstance(op, (ViewOp, SpikePad, SpikeReLU)) and kinds[out] == SPIKES
    return passes and feeds_synapses_alone(dag, kinds, out)


def find_ann_layers(dag, names):
    """Names of the ops that `names` (op names, module paths or their beginnings) mean. Raises ValueError for others."""
    found = set()
    for wanted in names:
        paths = {name: entry["path"] for name, entry in dag.ops.items()}
        matches = {n for n, path in paths.items() if n == wanted or path == wanted or path.startswith(wanted + ".")}
        if not matches:
            known = ", ".join(sorted({path for path in paths.values() if path})[:10]) or ", ".join(list(paths)[:10])
            raise ValueError(f"no layer {wanted} to leave as ANN, the network has {known}")
        found |= matches
    return found


def look_ahead(dag, stays_ann=()):
    """Two maps over nodes: whether the value reaches a neuron as a current, and whether any neuron lies behind it."""
    feeds_relu, leads_to_relu = defaultdict(bool), defaultdict(bool)
    for name, entry in reversed(dag.ops.items()):
        (out,), spikes = entry["out_nodes"], name not in stays_ann
        is_relu = spikes and isinstance(entry["op"], RELUS)
        passes = spikes and isinstance(entry["op"], LINEAR_OPS)
        for node in entry["in_nodes"]:
            feeds_relu[node] |= is_relu or (passes and feeds_relu[out])
            leads_to_relu[node] |= is_relu or leads_to_relu[out]
    return feeds_relu, leads_to_relu


def look_for_synapses(dag, stays_ann=()):
    """A map over nodes: whether a convolution or linear layer reads the value, so that it has to be spikes."""
    needs_spikes = defaultdict(bool)
    for name, entry in reversed(dag.ops.items()):
        (out,), op = entry["out_nodes"], entry["op"]
        if name in stays_ann:
            continue
        for node in entry["in_nodes"]:
            passes = isinstance(op, (*LINEAR_OPS, SpikeMaxPool2d))
            needs_spikes[node] |= is_trained(op) or (passes and needs_spikes[out])
    return needs_spikes


def plan_ann(dag, name, inputs):
    """A layer that stays ANN on request: it reads activations, decoded where it has to."""
    if CURRENT in inputs:
        raise ValueError(f"{dag.where(name)} cannot stay ANN alone, name the layer before it up to the ReLU too")
    return ANALOG


def plan_weighted(dag, name, input, feeds_relu, leads_to_relu):
    """A convolution or linear layer: a current for a neuron, or the network's last layer, which stays ANN."""
    where, is_split = dag.where(name), any(isinstance(entry["op"], SignedReLU) for entry in dag.ops.values())
    if input == CURRENT:
        split = "" if is_split else ", or split what it reads by sign (--signed pair)"
        raise ValueError(f"{where} has no ReLU before it: add one{split}")
    if feeds_relu:
        return CURRENT
    if leads_to_relu or (weighted_behind(dag, name) and dag.ops[name]["op"].weight.dim() == 4):
        pool = max_pool_behind(dag, dag.ops[name]["out_nodes"][0])
        if pool is not None:
            raise ValueError(
                f"{where} has no ReLU behind it, and {dag.where(pool)} pools its values, which may be negative: put a "
                "ReLU before the pooling, or next behind it"
            )
        split = "" if is_split else " split its output by sign (--signed pair),"
        raise ValueError(
            f"{where} has no ReLU behind it: add one (only the network's last layer goes without),{split} or leave it "
            "ANN (--ann_layers)"
        )
    return ANALOG


def max_pool_behind(dag, node):
    """Name of a max pooling that values reach without a ReLU, or None: their signs cannot be split before it."""
    for name in readers(dag, node):
        op, (out,) = dag.ops[name]["op"], dag.ops[name]["out_nodes"]
        if isinstance(op, SpikeMaxPool2d):
            return name
        found = max_pool_behind(dag, out) if isinstance(op, LINEAR_OPS) else None
        if found is not None:
            return found
    return None


def weighted_behind(dag, name):
    """Whether a trained layer reads what op `name` sends, directly or through others."""
    reached = set(dag.ops[name]["out_nodes"])
    for entry in dag.ops.values():
        if reached.isdisjoint(entry["in_nodes"]):
            continue
        if is_trained(entry["op"]):
            return True
        reached.update(entry["out_nodes"])
    return False


def plan_softmax(dag, name, inputs, leads_to_relu):
    """Softmax stays ANN, behind the last layer."""
    if leads_to_relu or CURRENT in inputs:
        raise ValueError(f"{dag.where(name)}: softmax is supported behind the last layer only")
    return ANALOG


def plan_max_pool(dag, name, input, leads_to_relu):
    """Max pooling of spikes in the chosen mode, or of activations."""
    if input == CURRENT:
        raise ValueError(f"{dag.where(name)} pools values that may be negative, put a ReLU before it, or next behind")
    kind = plan_pass(input, leads_to_relu)
    if kind == SPIKES and dag.ops[name]["op"].mode is None:
        raise ValueError(
            f"{dag.where(name)}: choose how spikes are max pooled, --maxpool gate (the largest count passes) or "
            "--maxpool or (any spike passes), or use average pooling in the network"
        )
    return kind


def plan_batch_norm(dag, name, input, feeds_relu, leads_to_relu):
    """A BatchNorm that could not be folded: part of what flows into a neuron, or of what stays ANN."""
    if input == ANALOG or (input == SPIKES and not leads_to_relu):
        return ANALOG
    if feeds_relu:
        return CURRENT
    raise ValueError(
        f"{dag.where(name)}: this BatchNorm cannot be folded into a convolution, put it behind one, or before a ReLU"
    )


def plan_add(dag, name, inputs, feeds_relu, leads_to_relu, needs_spikes):
    """An add of currents and spikes in front of a neuron, of spikes with a neuron of its own, or an ANN add."""
    if set(inputs) == {SPIKES} and (needs_spikes or not feeds_relu):
        return plan_pass(SPIKES, leads_to_relu)
    if CURRENT in inputs or (SPIKES in inputs and feeds_relu):
        return CURRENT
    check_analog(dag, name, inputs, leads_to_relu)
    return ANALOG


def plan_concat(dag, name, inputs, feeds_relu, leads_to_relu):
    """Spikes side by side; with currents among them, currents; or activations."""
    if set(inputs) == {SPIKES}:
        return plan_pass(SPIKES, leads_to_relu)
    if CURRENT in inputs and ANALOG not in inputs and feeds_relu:
        return CURRENT
    check_analog(dag, name, inputs, leads_to_relu)
    return ANALOG


def check_analog(dag, name, inputs, leads_to_relu):
    """Raise ValueError where activations meet spikes or currents that cannot be decoded there."""
    if CURRENT in inputs or (SPIKES in inputs and leads_to_relu):
        images = [holds_image(dag, node) for node in dag.ops[name]["in_nodes"]]
        if any(images):
            others = sorted({kind for kind, image in zip(inputs, images) if not image})
            raise ValueError(
                f"{dag.where(name)} joins the image and {' and '.join(others)}: give the image a convolution and a "
                "ReLU of its own before it"
            )
        raise ValueError(
            f"{dag.where(name)} joins {' and '.join(sorted(set(inputs)))}: put a ReLU behind every layer before it"
        )


def holds_image(dag, node):
    """Whether a node holds the network's input, or what no layer with weights has computed from it."""
    name = writer(dag, node)
    return name is None or (
        not is_trained(dag.ops[name]["op"]) and all(holds_image(dag, read) for read in dag.ops[name]["in_nodes"])
    )


def plan_pass(input, leads_to_relu):
    """An op that keeps the kind of its input; spikes without a neuron behind them are decoded."""
    return ANALOG if input == SPIKES and not leads_to_relu else input


def check_outputs(dag, plan):
    """Raise ValueError where the network returns what flows into a neuron."""
    for node in dag.outputs_nodes:
        if plan.kinds[node] == CURRENT:
            where = dag.where(writer(dag, node))
            raise ValueError(f"{where} is returned by the network and feeds a ReLU too, return what stands behind it")
