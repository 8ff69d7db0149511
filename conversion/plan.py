"""The plan of a conversion: which values become currents or spikes, and which ops get neurons."""

from collections import defaultdict
from dataclasses import dataclass, field

from rewrites.graph import has_weights_behind, holds_image
from spike_layers import ANALOG, CURRENT, SPIKES, SpikeMaxPool2d

LARGEST_SUM = 255  # most spikes in the window of a folded pooling: the largest uint8


@dataclass
class Plan:
    """The plan of a conversion.

    kinds: node -> ANALOG, CURRENT or SPIKES. firing: names of the ops that get a neuron. folded: names of the average
    poolings without a neuron, whose spikes the layers behind them weigh. windows: op name -> number of steps in which
    it may fire, where that is not T.
    """

    kinds: dict
    firing: list = field(default_factory=list)
    folded: list = field(default_factory=list)
    windows: dict = field(default_factory=dict)

    def largest_lambda(self, entry, timesteps):
        """The lambda of T steps that an op's ceiling allows: its neuron reaches lambda only within its window."""
        ceiling = float("inf") if entry.op.ceiling is None else entry.op.ceiling
        return ceiling * timesteps / self.windows.get(entry.name, timesteps)

    def measured(self, dag):
        """Names of the ops whose statistics a conversion reads, in order: those of spikes, and of currents with a
        unit of their own. The currents of layers with trained weights and of adds take any unit, unless a concatenation
        or a view hands them on: it has the statistics of its first input (`Units.mean_square`).
        """
        names = set()
        for name, entry in dag.ops.items():
            op, kind = entry.op, self.kinds[entry.out]
            if op.is_measured and (kind == SPIKES or (kind == CURRENT and not (op.is_trained or op.adds))):
                names.add(name)
            if not op.is_measured and kind == CURRENT:
                names.add(first_measured(dag, name))
        return [name for name in dag.ops if name in names]


def first_measured(dag, name):
    """The name of op `name`, or of the first op before it whose activations are measured, along first inputs."""
    while not dag.ops[name].op.is_measured:
        name = dag.writer(dag.ops[name].inputs[0])
    return name


def plan_conversion(dag, ann_layers=()):
    """The Plan of a network: the kind of every value, and the ops that fire.

    Three parts stay ANN: the ops before the first convolution or linear layer that feeds a ReLU, the ops behind the
    last neuron (pooling, the final linear layer, softmax), and `ann_layers` (op names, module paths or their
    beginnings). Raises ValueError for a convolution without a ReLU behind it, unless it is the network's last layer,
    for max pooling without a mode, for unknown `ann_layers`, and for anything else that spikes cannot express.
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
    lies behind it. needs_spikes: node -> whether a layer with weights reads it, which needs spikes.
    """

    def __init__(self, dag, stays_ann=frozenset()):
        self.dag, self.stays_ann = dag, stays_ann
        self.feeds_neuron, self.before_neuron = defaultdict(bool), defaultdict(bool)
        self.needs_spikes, weights_behind = defaultdict(bool), defaultdict(bool)
        for entry in reversed(dag.ops.values()):
            op, out, spikes = entry.op, entry.out, entry.name not in stays_ann
            # an op that cannot spike inside of a network gets the currents, and refuses them by its own name
            rectifies = spikes and (op.rectifies or (op.stays_behind and weights_behind[out]))
            for node in entry.inputs:
                weights_behind[node] |= op.is_trained or weights_behind[out]
                self.feeds_neuron[node] |= rectifies or (spikes and op.is_linear and self.feeds_neuron[out])
                self.before_neuron[node] |= rectifies or self.before_neuron[out]
                self.needs_spikes[node] |= spikes and (op.is_trained or (op.hands_on and self.needs_spikes[out]))


class Place:
    """The surroundings of an op while a network is planned. reads: the kinds of the op's inputs."""

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
        """The kind of the op's first input, or ANALOG for spikes with no neuron behind them, which are decoded."""
        return ANALOG if self.reads[0] == SPIKES and not self.before_neuron else self.reads[0]

    def splits_signs(self):
        """Whether the network's signs were split (`dag_rewrites.split_signs`)."""
        return any(entry.op.splits_signs for entry in self.dag.ops.values())

    def has_weights_behind(self):
        """Whether a layer with weights lies behind the op (`has_weights_behind`)."""
        return has_weights_behind(self.dag, self.entry.name)

    def is_image(self):
        """Whether the op reads only what is computed from the image without trained weights."""
        return all(holds_image(self.dag, node) for node in self.entry.inputs)

    def max_pool_behind(self):
        """The max pooling, as messages name it, that the op's values reach without a ReLU, or None.

        Such values can be pooled as pairs of signs only.
        """
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
    """Raise ValueError if a layer that stays ANN on request reads a current, which only a neuron can read."""
    if CURRENT in reads:
        raise ValueError(f"{entry.where} cannot stay ANN alone, name the layer before it up to the ReLU too")


def find_ann_layers(dag, names):
    """Names of the ops that `names` stand for: op names, module paths or their beginnings.

    Raises ValueError for a name that fits no op.
    """
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
    """Name of a max pooling that the values of `node` reach without a ReLU, or None."""
    for name in dag.readers(node):
        op = dag.ops[name].op
        if isinstance(op, SpikeMaxPool2d):
            return name
        found = max_pool_behind(dag, dag.ops[name].out) if op.is_linear else None
        if found is not None:
            return found
    return None


def folded_poolings(dag, kinds):
    """Names of the average poolings marked as `folded` that can be folded. kinds: node -> kind, as in `Plan`.

    A pooling can be folded if it reads spikes, if only convolutions and linear layers read it (also through views and
    paddings) and make currents of it, if its windows do not overlap, and if they hold at most `LARGEST_SUM` inputs. In
    overlapping windows a weight of the folded kernel would be a sum of the layer's weights, beyond its bit width. Any
    other pooling keeps its neuron.
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
    """Whether every op that reads a node weighs its spikes or leads only to ops that do (`is_synapse`)."""
    names = dag.readers(node)
    return bool(names) and node not in dag.outputs_nodes and all(is_synapse(dag, kinds, name) for name in names)


def is_synapse(dag, kinds, name):
    """Whether an op weighs spikes into a current, or passes sums of spikes only to ops that do."""
    op, out = dag.ops[name].op, dag.ops[name].out
    if op.is_trained:
        return kinds[out] == CURRENT
    return op.passes_sums and kinds[out] == SPIKES and feeds_synapses_alone(dag, kinds, out)


def check_outputs(dag, plan):
    """Raise ValueError if the network returns a current, the input of a neuron."""
    for node in dag.outputs_nodes:
        if plan.kinds[node] == CURRENT:
            where = dag.where(dag.writer(node))
            raise ValueError(f"{where} is returned by the network and feeds a ReLU too, return what stands behind it")
