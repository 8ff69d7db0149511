"""Which values of a network become currents and spikes, and where neurons stand."""

from collections import defaultdict
from dataclasses import dataclass, field

from spike_layers import ANALOG, CURRENT, SPIKES, SpikeMaxPool2d

LARGEST_SUM = 255  # spikes in the window of a folded pooling: what uint8 holds


@dataclass
class Plan:
    """kinds: node -> ANALOG, CURRENT or SPIKES. firing: names of the ops that get a neuron.

    folded: names of the average poolings of spikes that the layers behind them sum, without a neuron.
    """

    kinds: dict
    firing: list = field(default_factory=list)
    folded: list = field(default_factory=list)


def plan_conversion(dag, ann_layers=()):
    """Which values become currents and spikes, and which ops fire.

    What stands before the first convolution or linear layer that feeds a ReLU, what stands behind the last neuron
    (pooling, the final linear layer, softmax) and `ann_layers` (op names, module paths or their beginnings) stay ANN.
    Raises ValueError for a convolution without a ReLU behind it, unless it is the network's last layer, for max pooling
    whose mode is not chosen, and for what else cannot be expressed in spikes.
    """
    view = LookAhead(dag, find_ann_layers(dag, ann_layers))
    plan = Plan(dict.fromkeys(dag.inputs_nodes, ANALOG))
    for entry in dag.ops.values():
        reads = [plan.kinds[node] for node in entry.inputs]
        if entry.name in view.stays_ann:
            check_stays_ann(entry, reads)
            kind = ANALOG
        else:
            kind = entry.op.plan(Place(view, entry, reads))
        plan.kinds[entry.out] = kind
        if kind == SPIKES and (entry.op.fires or (entry.op.rectifies and CURRENT in reads)):
            plan.firing.append(entry.name)
    plan.folded = folded_poolings(dag, plan.kinds)
    plan.firing = [name for name in plan.firing if name not in plan.folded]
    check_outputs(dag, plan)
    if not plan.firing:
        raise ValueError("the network has no convolution or linear layer with a ReLU behind it, nothing can spike")
    return plan


class LookAhead:
    """What lies behind each node of a network whose ops `stays_ann` do not spike.

    feeds_neuron: node -> whether its value reaches a neuron as a current. before_neuron: node -> whether any neuron
    lies behind it. needs_spikes: node -> whether a layer with weights reads it, so that it has to be spikes.
    """

    def __init__(self, dag, stays_ann=frozenset()):
        self.dag, self.stays_ann = dag, stays_ann
        self.feeds_neuron, self.before_neuron = defaultdict(bool), defaultdict(bool)
        self.needs_spikes = defaultdict(bool)
        for entry in reversed(dag.ops.values()):
            op, out, spikes = entry.op, entry.out, entry.name not in stays_ann
            rectifies = spikes and op.rectifies
            for node in entry.inputs:
                self.feeds_neuron[node] |= rectifies or (spikes and op.is_linear and self.feeds_neuron[out])
                self.before_neuron[node] |= rectifies or self.before_neuron[out]
                self.needs_spikes[node] |= spikes and (op.is_trained or (op.hands_on and self.needs_spikes[out]))


class Place:
    """Where an op stands in a network that is planned. reads: the kinds of its inputs."""

    def __init__(self, view, entry, reads):
        self.dag, self.entry, self.reads = view.dag, entry, reads
        self.feeds_neuron = view.feeds_neuron[entry.out]
        self.before_neuron = view.before_neuron[entry.out]
        self.needs_spikes = view.needs_spikes[entry.out]

    @property
    def where(self):
        """The op as messages name it."""
        return self.entry.where

    def passes_on(self):
        """The kind of its first input; spikes without a neuron behind them are decoded."""
        return ANALOG if self.reads[0] == SPIKES and not self.before_neuron else self.reads[0]

    def splits_signs(self):
        """Whether the network's signs were split (`dag_rewrites.split_signs`)."""
        return any(entry.op.splits_signs for entry in self.dag.ops.values())

    def has_weights_behind(self):
        """Whether a layer with weights lies behind the op (`has_weights_behind`)."""
        return has_weights_behind(self.dag, self.entry.name)

    def max_pool_behind(self):
        """The max pooling that its values reach without a ReLU, for messages, or None: their signs cannot be split."""
        name = max_pool_behind(self.dag, self.entry.out)
        return None if name is None else self.dag.where(name)

    def check_analog(self):
        """Raise ValueError where activations meet spikes or currents that cannot be decoded there."""
        if CURRENT not in self.reads and not (SPIKES in self.reads and self.before_neuron):
            return
        images = [holds_image(self.dag, node) for node in self.entry.inputs]
        if any(images):
            others = sorted({kind for kind, image in zip(self.reads, images) if not image})
            raise ValueError(
                f"{self.where} joins the image and {' and '.join(others)}: give the image a convolution and a "
                "ReLU of its own before it"
            )
        raise ValueError(
            f"{self.where} joins {' and '.join(sorted(set(self.reads)))}: put a ReLU behind every layer before it"
        )


def check_stays_ann(entry, reads):
    """Raise ValueError where a layer that stays ANN on request reads what flows into a neuron."""
    if CURRENT in reads:
        raise ValueError(f"{entry.where} cannot stay ANN alone, name the layer before it up to the ReLU too")


def find_ann_layers(dag, names):
    """Names of the ops that `names` (op names, module paths or their beginnings) mean. Raises ValueError for others."""
    found = set()
    for wanted in names:
        paths = {name: entry.path for name, entry in dag.ops.items()}
        matches = {n for n, path in paths.items() if n == wanted or path == wanted or path.startswith(wanted + ".")}
        if not matches:
            known = ", ".join(sorted({path for path in paths.values() if path})[:10]) or ", ".join(list(paths)[:10])
            raise ValueError(f"no layer {wanted} to leave as ANN, the network has {known}")
        found |= matches
    return found


def max_pool_behind(dag, node):
    """Name of a max pooling that values reach without a ReLU, or None."""
    for name in dag.readers(node):
        op = dag.ops[name].op
        if isinstance(op, SpikeMaxPool2d):
            return name
        found = max_pool_behind(dag, dag.ops[name].out) if op.is_linear else None
        if found is not None:
            return found
    return None


def has_weights_behind(dag, name):
    """Whether a trained layer reads what op `name` sends, directly or through others."""
    reached = {dag.ops[name].out}
    for entry in dag.ops.values():
        if reached.isdisjoint(entry.inputs):
            continue
        if entry.op.is_trained:
            return True
        reached.add(entry.out)
    return False


def holds_image(dag, node):
    """Whether a node holds the network's input, or what no layer with weights has computed from it."""
    name = dag.writer(node)
    return name is None or (
        not dag.ops[name].op.is_trained and all(holds_image(dag, read) for read in dag.ops[name].inputs)
    )


def folded_poolings(dag, kinds):
    """Names of the average poolings marked as `folded` that can be; kinds: node -> what its value is (`Plan`).

    Such a pooling reads spikes, and only convolutions and linear layers that make currents read it, through views and
    paddings at most. Its windows do not overlap, so that every weight of the folded kernel is one of the layer's and
    keeps its bit width, and hold at most `LARGEST_SUM` inputs. Any other one keeps its neuron.
    """
    return [
        name
        for name, entry in dag.ops.items()
        if entry.op.folded
        and all(kinds[node] == SPIKES for node in (*entry.inputs, entry.out))
        and all(step >= size for step, size in zip(entry.op.stride, entry.op.kernel_size))
        and entry.op.window <= LARGEST_SUM
        and feeds_synapses_alone(dag, kinds, entry.out)
    ]


def feeds_synapses_alone(dag, kinds, node):
    """Whether all that reads a node are layers with trained weights that make currents, or lead to such alone."""
    names = dag.readers(node)
    return bool(names) and node not in dag.outputs_nodes and all(is_synapse(dag, kinds, name) for name in names)


def is_synapse(dag, kinds, name):
    """Whether an op weighs spikes, or hands sums of them on to ops that do."""
    op, out = dag.ops[name].op, dag.ops[name].out
    if op.is_trained:
        return kinds[out] == CURRENT
    return op.passes_sums and kinds[out] == SPIKES and feeds_synapses_alone(dag, kinds, out)


def check_outputs(dag, plan):
    """Raise ValueError where the network returns what flows into a neuron."""
    for node in dag.outputs_nodes:
        if plan.kinds[node] == CURRENT:
            where = dag.where(dag.writer(node))
            raise ValueError(f"{where} is returned by the network and feeds a ReLU too, return what stands behind it")
