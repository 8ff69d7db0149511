"""The layers of a converted network as cores of PAICORE take them: plain numbers, without PAIBox."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from hw_constraints import PAICORE
from spike_simulator import Stages


@dataclass
class Synapse:
    """What one layer sends another. source: op name. kind: "conv", weight [C_out, C_in / groups, kh, kw], or "full",
    weight [inputs, outputs]; int8.
    """

    source: str
    kind: str
    weight: np.ndarray
    inputs: int
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    groups: int = 1


@dataclass
class CoreLayer:
    """A layer of neurons on the chip.

    name, where: as messages name it. shape: of a sample. initial_potential, bias: per neuron, flat integers. depth: the
    step in which it fires first.
    """

    name: str
    where: str
    shape: tuple
    Vthr: int
    subtracts: bool
    initial_potential: np.ndarray
    bias: np.ndarray
    synapses: list = field(default_factory=list)
    depth: int = 1

    @property
    def neurons(self):
        """The number of neurons."""
        return math.prod(self.shape)

    @property
    def bits(self):
        """The weight width that the cores of the layer need, its first potentials included."""
        bits = max(width_of(synapse.weight) for synapse in self.synapses)
        return max(bits, 2) if (self.initial_potential < 0).any() else bits

    @property
    def axons(self):
        """The number of inputs, with those of the first potentials."""
        sources = {synapse.source: synapse.inputs for synapse in self.synapses}
        return sum(sources.values()) + len(rows_in_bits(self.initial_potential, self.bits))

    def as_dict(self):
        """What a host needs to know, as plain data."""
        return {
            "layer": self.name,
            "shape": list(self.shape),
            "Vthr": self.Vthr,
            "first_step": self.depth,
            "bits": self.bits,
        }


def width_of(weight):
    """The narrowest of PAICORE's weight widths: 1 bit for 0 and 1, otherwise signed."""
    least, most = int(weight.min(initial=0)), int(weight.max(initial=0))
    if least >= 0 and most <= 1:
        return 1
    return next(bits for bits in PAICORE.widths[1:] if -(2 ** (bits - 1)) <= least and most < 2 ** (bits - 1))


def rows_in_bits(values, bits):
    """Rows of integers of `bits` bits, [n, neurons] int8, whose sum is `values`, [neurons]."""
    least, most = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    rows, rest = [], np.asarray(values, np.int64)
    while rest.any():
        rows.append(rest.clip(least, most))
        rest = rest - rows[-1]
    return np.stack(rows).astype(np.int8) if rows else np.zeros((0, len(rest)), np.int8)


class Unfit(Exception):
    """What a core cannot compute, in words."""


def core_layers(snn, trains):
    """`hosts, layers`: op name -> shape of the layers that stay on the host, and the CoreLayers in order.

    trains: op name -> spikes [T, B, ...]. Raises ValueError, which names the layer, for what PAICORE cannot hold.
    """
    return Walk(snn, {name: train.shape[2:] for name, train in trains.items()}).result()


def core_rows(hosts, layers):
    """`(name, neurons, inputs, bits)` of every layer, and of the neurons in which spikes wait that skip a layer.

    Neurons that read the same spikes in the same step share cores, so that waiting ones take the width of the others.
    """
    depths = {**dict.fromkeys(hosts, 0), **{layer.name: layer.depth for layer in layers}}
    rows, waiting, widths = [], {}, {}
    for layer in layers:
        rows.append((layer.where, layer.neurons, layer.axons, layer.bits))
        for synapse in layer.synapses:
            read = synapse.source, layer.depth
            widths[read] = max(widths.get(read, 1), layer.bits)
            steps = range(depths[synapse.source] + 1, layer.depth)
            waiting.update({(synapse.source, depth): synapse.inputs for depth in steps})
    for (name, depth), size in waiting.items():
        rows.append((f"{name} in step {depth}", size, size, widths.get((name, depth), 1)))
    return rows


@dataclass
class Spikes:
    """A value of the network: the spikes of layer `source`, in samples of `shape`."""

    source: str
    shape: tuple


@dataclass
class Currents:
    """A value of the network: a sum of synapses, and a bias per neuron or for all. synapses: None for the image's."""

    synapses: list
    bias: np.ndarray = 0


class Walk:
    """A walk through the ops of a network, which notes what every node carries: Spikes, Currents, or None."""

    def __init__(self, snn, shapes):
        self.snn, self.shapes = snn, shapes
        self.hosts, self.layers, self.values = {}, [], {}

    def result(self):
        for entry in Stages(self.snn).between:
            try:
                self.visit(entry)
            except Unfit as error:
                raise ValueError(f"{entry.where} does not fit PAICORE: {error}") from error
        if not self.layers:
            raise ValueError("no layer is left for the cores: all neurons read the image")
        return self.hosts, self.layers

    def visit(self, entry):
        """Note the value of an op, and its layer if it fires."""
        kind, inputs = type(entry.op).__name__, [self.values.get(node) for node in entry.inputs]
        if not entry.op.spiking:
            if any(value is not None and self.is_on_chip(value) for value in inputs):
                raise Unfit(
                    "it stays ANN and reads all spikes of cores before others start, convert without --ann_layers"
                )
            return
        if kind not in COMPUTED:
            raise Unfit(f"cores do not compute {BEYOND_CORES.get(kind, kind)}")
        value = COMPUTED[kind](self, entry, inputs)
        if entry.op.neuron is not None:
            value = self.fire(entry, value)
        self.values[entry.out] = value

    def is_on_chip(self, value):
        """Whether a value is computed on the chip, not on the host."""
        return not (isinstance(value, Spikes) and value.source in self.hosts)

    def fire(self, entry, currents):
        """Note a layer of neurons. One that reads the image stays on the host."""
        neuron, shape = entry.op.neuron, tuple(self.shapes[entry.name])
        if currents is None:
            self.hosts[entry.name] = shape
            return Spikes(entry.name, shape)
        if neuron.listen or neuron.window is not None:
            raise Unfit("its neurons wait before they fire (--listen)")
        if neuron.Vthr.is_floating_point():
            raise Unfit("its weights are floats")
        if (neuron.Vthr != neuron.Vthr.flatten()[0]).any():
            raise Unfit("its thresholds differ by channel, cores take one for a layer: convert with --per_channel none")

        def flat(values):
            return np.broadcast_to(np.asarray(values, np.int64), shape).ravel()

        subtracts = neuron.reset_mode == "subtraction"
        layer = CoreLayer(
            entry.name,
            entry.where,
            shape,
            int(neuron.Vthr.flatten()[0]),
            subtracts,
            flat(neuron.initial_potential.numpy()),
            flat(currents.bias),
            currents.synapses,
        )
        depths = {each.name: each.depth for each in self.layers}
        layer.depth = 1 + max(depths.get(synapse.source, 0) for synapse in layer.synapses)
        self.layers.append(layer)
        return Spikes(entry.name, shape)


def integers(weight):
    """Integer weights as int8. Raises Unfit for others."""
    if weight.is_floating_point() or weight.abs().max() > 127:
        raise Unfit("its weights are no integers of 8 bits")
    return weight.numpy().astype(np.int8)


def spikes_of(value):
    """A value that must be spikes."""
    if not isinstance(value, Spikes):
        raise Unfit("it reads currents, cores read spikes")
    return value


def convolution(walk, entry, inputs):
    op, (value,) = entry.op, inputs
    if value is None:
        return None
    spikes = spikes_of(value)
    if getattr(op, "folded", False):
        raise Unfit("it hands on sums of spikes, convert with --avgpool spike")
    if isinstance(op.padding, str) or max(op.dilation) > 1:
        raise Unfit("PAIBox takes no dilation and no padding in words")
    synapse = Synapse(
        spikes.source, "conv", integers(op.weight_q), math.prod(spikes.shape), op.stride, op.padding, op.groups
    )
    return Currents([synapse], bias_of(op, [1, 1]))


def linear(walk, entry, inputs):
    if inputs[0] is None:
        return None
    spikes = spikes_of(inputs[0])
    weight = np.ascontiguousarray(integers(entry.op.weight_q).T)
    return Currents([Synapse(spikes.source, "full", weight, math.prod(spikes.shape))], bias_of(entry.op, []))


def bias_of(op, trailing):
    """The bias of a layer, broadcastable to a sample."""
    return 0 if op.bias_q is None else op.bias_q.to(torch.int64).numpy().reshape(-1, *trailing)


def relu(walk, entry, inputs):
    return inputs[0]


def view(walk, entry, inputs):
    if len(entry.op.shape) != 1 or not isinstance(inputs[0], Spikes):
        raise Unfit("its view is no flattening of spikes")
    return Spikes(inputs[0].source, entry.op.shape)


def addition(walk, entry, inputs):
    """The sum of currents; spikes become a depthwise convolution by their branch weight."""
    if any(value is None for value in inputs):
        if all(value is None for value in inputs):
            return None
        raise Unfit("it adds a value that the host computes, the image's own or that of an ANN layer, to spikes")
    synapses, bias = [], 0
    for value, weight in zip(inputs, entry.op.branch_weights):
        if isinstance(value, Currents):
            if weight is not None:
                raise Unfit("it weighs currents")
            synapses, bias = synapses + value.synapses, bias + value.bias
            continue
        synapses.append(of_channels(value, torch.ones((), dtype=torch.int32) if weight is None else weight))
    return Currents(synapses, bias)


def of_channels(spikes, weight):
    """The synapse of spikes that reach their own place only, with one weight per channel."""
    if len(spikes.shape) != 3 or weight.numel() not in (1, spikes.shape[0]):
        raise Unfit("it adds spikes of a flat layer, or weighs each element")
    kernel = np.broadcast_to(integers(weight).reshape(-1, 1, 1, 1), (spikes.shape[0], 1, 1, 1)).copy()
    return Synapse(spikes.source, "conv", kernel, math.prod(spikes.shape), groups=spikes.shape[0])


BEYOND_CORES = {  # layers that cores do not compute, in words
    "SpikeConvTranspose2d": "transposed convolutions",
    "SpikeMaxPool2d": "max pooling",
    "ConcatOp": "concatenations",
    "SpikePad": "padding apart from a convolution",
    "SpikeBatchNorm": "a BatchNorm that was not folded",
    "MergeSigns": "pairs of signs",
    "SignedReLU": "pairs of signs",
    "SpikeSubtract": "a difference of spikes",
    "SpikeAffine": "a factor that was not folded",
    "SpikeBiasMap": "a bias for every element of a sample",
    "SliceOp": "slices",
    "IndexOp": "an index",
    "PermuteOp": "another order of dimensions",
    "SpikeRepeat": "repeated pixels",
    "SpikeGather": "gathered pixels",
}
COMPUTED = {
    "SpikeConv2d": convolution,
    "SpikeConvBN": convolution,
    "SpikeAvgPool2d": convolution,
    "SpikeLinear": linear,
    "SpikeReLU": relu,
    "ViewOp": view,
    "SpikeAdd": addition,
}
