"""Two timesteps of a network in one float32, for an ONNX graph that takes half as many convolutions.

Sums of spikes are linear, and whole. A value c of one step and d of the next travel as d + c / 4096: float32 has 24
bits, 12 for each. Convolutions, sums and rearrangements compute both at once, exactly as long as |c| and |d| stay below
2048. Neurons take the steps apart: d is the nearest whole number.
"""

import math
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from export.onnx_graph import Value
from export.onnx_nodes import emit
from export.onnx_time import LoopOverTime
from layers.pooling import SpikeAvgPool2d

PLACE = 4096.0  # 2^12: one step is counted in 4096ths
MOST = 2047  # of |c| and |d|: half of 4096, so that d is the nearest whole number
UNKNOWN = (-math.inf, math.inf, math.inf)  # bounds of values that need not be whole
MOST_IN_SUM = 4094  # of the sum of all |products| of one step, so that a sum on the way takes 24 bits, too


@dataclass
class Pair:
    """Two steps of a value: in one number (`together`), as two names (`steps`), or both. shape: of one sample."""

    shape: tuple
    together: str | None = None
    steps: tuple = ()
    constant = False


class LoopOverPairs(LoopOverTime):
    """The whole network in the body of one Loop, two timesteps each time; with an odd T the last step sends nothing."""

    def __init__(self, snn, inputs):
        super().__init__(snn, inputs)
        self.fits = layers_that_fit(snn)

    def trips(self):
        """The name of half of T, rounded up."""
        b = self.b
        return b.node("Div", b.node("Add", "T", b.constant(1, np.int64)), b.constant(2, np.int64))

    def begin(self):
        super().begin()
        b = self.b
        with b.into(self.body):
            second = b.node("Add", b.node("Mul", "t", b.constant(2, np.int64)), b.constant(1, np.int64))
            self.has_second = b.node("Less", second, "T")
            self.most_in_second = b.node("Cast", self.has_second, to=TensorProto.FLOAT)

    def may_fire(self, i):
        return self.has_second if i else None

    def potentials(self, entry, shape):
        """As in other forms, but potentials of whole numbers count from the last one that does not fire."""
        kind, Vthr, start = super().potentials(entry, shape)
        if counts_from_Vthr(entry, kind):
            with self.b.into(self.head):
                start = self.b.node("Sub", start, self.b.constant(entry.op.neuron.Vthr - 1))
        return kind, Vthr, start

    def step_neurons(self, entry, u, current, Vthr, kind, may_fire=None):
        """As in other forms. Whole numbers fire above 0, so that spikes are their part between 0 and 1."""
        if not counts_from_Vthr(entry, kind):
            return super().step_neurons(entry, u, current, Vthr, kind, may_fire)
        b = self.b
        v = b.node("Add", u, current)
        spikes = b.node("Clip", v, b.constant(0.0), b.constant(1.0) if may_fire is None else self.most_in_second)
        return b.node("Sub", v, b.node("Mul", spikes, Vthr)), spikes

    def stepping(self, entry, values):
        """The Pair of an op: of both steps at once where it fits and everything changes from step to step."""
        b, shape = self.b, self.probe.shapes[entry.out]
        if entry.name in self.fits and not any(value.constant for value in values):
            with b.added_as(1 + 1 / PLACE):
                return Pair(shape, emit(b, entry, [Value(self.together(value), value.shape) for value in values]))
        steps = zip(*(self.apart(value) for value in values))
        shapes = [value.shape for value in values]
        return self.joined([emit(b, entry, [Value(*each) for each in zip(names, shapes)]) for names in steps], shape)

    def joined(self, names, shape):
        return Pair(shape, steps=tuple(names))

    def together(self, pair):
        """The name of both steps of a value in one number."""
        if pair.together is None:
            first, second = pair.steps
            pair.together = self.b.node("Add", self.b.node("Mul", first, self.b.constant(1 / PLACE)), second)
        return pair.together

    def apart(self, value):
        if value.constant:
            return value.name, value.name
        if not value.steps:
            second = self.b.node("Round", value.together)
            rest = self.b.node("Sub", value.together, second)
            value.steps = self.b.node("Mul", rest, self.b.constant(PLACE)), second
        return value.steps


def counts_from_Vthr(entry, kind):
    """Whether the potentials of a layer are whole float32 numbers from which a spike subtracts Vthr."""
    neuron = entry.op.neuron
    is_whole = not (neuron.Vthr.is_floating_point() or neuron.initial_potential.is_floating_point())
    return kind == TensorProto.FLOAT and is_whole and neuron.reset_mode == "subtraction"


def layers_that_fit(snn):
    """Names of the spiking ops that can compute two steps in one number."""
    bounds, fitting = {}, set()  # node -> (least value, most, bound of the sum of all |products|)
    for name, entry in snn.ops.items():
        op = entry.op
        if not op.spiking:
            continue
        read = [bounds.get(node, UNKNOWN) for node in entry.inputs]  # of the image, or behind a layer that stays ANN
        found = UNKNOWN if UNKNOWN in read or not is_whole(op) else bounds_of(op, read)
        if not op.selects and found[0] >= -MOST and found[1] <= MOST and found[2] <= MOST_IN_SUM:
            fitting.add(name)
        bounds[entry.out] = found if op.neuron is None else (0, 1, 1)
    return fitting


def is_whole(op):
    """Whether what a spiking op makes of whole numbers is whole."""
    held = [getattr(op, name, None) for name in ("weight_q", "bias_q")]
    return not any(each is not None and each.is_floating_point() for each in held)


def bounds_of(op, read):
    """`least, most, largest` of what a spiking op sends in one step, before its neurons. read: those of its inputs."""
    largest = op.largest_sum([each[2] for each in read])
    least, most = min(0, *(each[0] for each in read)), max(0, *(each[1] for each in read))  # 0: of padding
    if op.adds:
        parts = [products(each, weight) for each, weight in zip(read, op.branch_weights)]
        return sum(part[0] for part in parts), sum(part[1] for part in parts), largest
    if isinstance(op, SpikeAvgPool2d):
        return least * op.window, most * op.window, largest
    if op.has_weights:
        rows = op.rows(op.weight_q.double())  # [C_out, N]
        above, below = rows.clamp_min(0).sum(1), rows.clamp_max(0).sum(1)
        bias = 0 if op.bias_q is None else op.bias_q.double().flatten()
        ends = above * least + below * most + bias, above * most + below * least + bias
        return ends[0].min().item(), ends[1].max().item(), largest
    if hasattr(op, "weight_q") or op.splits_signs or op.joins_signs:
        return -largest, largest, largest
    return least, most, largest


def products(bounds, weight):
    """`least, most` of a value times a branch weight, a tensor or None."""
    factors = (1,) if weight is None else (weight.min().item(), weight.max().item())
    ends = [bound * factor for bound in (0, *bounds[:2]) for factor in factors]
    return min(ends), max(ends)
