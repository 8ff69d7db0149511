"""What every layer of a SpikeDAGModule has.

A layer computes its ANN function on plain tensors, `activation`, and its spiking function in two steps: `current` says
what spikes, or other currents, cause, and `send` hands it on, as the spikes of the neuron that stands there, if any.
All that is true of a layer stands in its class: a new one is one class here and one line in the tracer's table.
"""

import torch
from torch import nn

# The kinds of values in a converted network.
ANALOG = "activations"  # of the image, of layers that stay ANN, and behind the last spiking layer
CURRENT = "currents"  # what flows into a neuron
SPIKES = "spikes"

OP_TYPES = {}  # name -> class of every layer that a file may hold


class SpikeLayer(nn.Module):
    """The base of all layers.

    Of the class:
    fields: constructor argument -> rule of what a file may hold (`runtime.rules`).
    arity: the least and the most inputs.
    has_weights: whether it weighs what it reads. is_trained: whether finetuning moves these weights.
    is_linear: it is a weighted sum, which a current may pass on its way to a neuron.
    rectifies: a neuron stands here where a current comes in. fires: one stands here wherever spikes are sent.
    adds: the currents that it joins share one unit.
    passes_spikes: spikes stay spikes where no neuron stands here. passes_sums: so do sums of them, of a folded pooling.
    hands_on: layers behind it that need spikes need them before it, too.
    selects: it lets some of the spikes pass, by what it has seen before.
    splits_signs: two channels, of opposite signs, for one that comes in. carries_bias: converted, it has a bias_q.
    is_measured: calibration pools its activations; those of the others are activations of the layers before them.
    passes_scale, passes_shift: a positive factor per channel, and also a constant, may pass it.
    ceiling: what its activations cannot exceed, or None.

    Of the layer:
    spiking: it works on spikes or currents, not on activations; set by the conversion.
    neuron: the IFNeuron that fires behind it, or None.
    levels: the ClipFloorShift that quantizes what this layer, which is to fire, returns in the ANN, or None.
    frozen: names of the parameters that the traced network does not train (`frozen_names`).
    """

    fields = {}  # noqa: RUF012  every class has its own
    arity = (1, 1)
    has_weights = is_trained = is_linear = rectifies = fires = adds = False
    passes_spikes = passes_sums = passes_scale = passes_shift = False
    hands_on = False
    is_measured = True
    folded = selects = splits_signs = carries_bias = False
    ceiling = None
    frozen = frozenset()

    def __init_subclass__(cls, abstract=False, **kwargs):
        super().__init_subclass__(**kwargs)
        if not abstract:
            OP_TYPES[cls.__name__] = cls

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spiking = False
        self.neuron = None
        self.levels = None

    # what it computes

    def forward(self, *inputs, memory=None):
        """The layer's output for activations [B, ...], or for spikes and currents [T*B, ...]."""
        if isinstance(inputs[0], torch.Tensor):
            activation = self.activation(*inputs)
            return activation if self.levels is None else self.levels(activation)
        return self.send(self.current(*inputs), memory)

    def activation(self, *inputs):
        """The ANN function: activations [B, ...] -> [B, ...]."""
        raise NotImplementedError(f"{type(self).__name__} has no ANN function")

    def current(self, *inputs):
        """What spikes and currents cause: a Current for a neuron, or a SpikeTensor where spikes pass."""
        raise NotImplementedError(f"{type(self).__name__} does not work on spikes")

    def send(self, current, memory=None):
        """The spikes of the neuron that stands here, or the current itself where none does."""
        return current if self.neuron is None else self.neuron(current, memory)

    def largest_sum(self, largest_read):
        """The bound of |current| per step that leaves this layer for a neuron, from those of what it reads."""
        return max(largest_read)

    # how it converts

    def plan(self, place):
        """What this layer sends in the converted network, by its place (`conversion.plan.Place`): mostly what it reads.

        Raises ValueError where it cannot be converted there.
        """
        return place.passes_on()

    def convert(self, setter, entry):
        """Take integers, a unit and a neuron (`conversion.integers.SpikeSetter`); mostly values pass as they are."""
        setter.pass_on(entry.inputs[0], entry.out, setter.value_of(entry.inputs[0]))

    def targets(self, values, shapes, out_shape):
        """The lambdas per channel of spikes that pass, from those of the inputs, of samples of these shapes."""
        return values[0]

    def misfit(self, reads):
        """Why this spiking layer cannot work on inputs of the kinds `reads`, CURRENT or SPIKES, in words, or None."""
        return "it has no place for neurons" if self.neuron is not None else None

    def held(self, inputs, output):
        """(name, tensor or None, shape that it has to fit) of what a spiking layer holds, for activations [1, ...]."""
        return []

    # what it costs

    def ann_operations(self, shape, outputs):
        """MACs and accumulates of a sample in an ANN; shape: of its first input, outputs: their number."""
        return 0.0, 0.0

    def spike_operations(self, spikes):
        """Accumulates that spikes, counts per input position of a sample, cause."""
        return 0.0

    # what a file holds

    @classmethod
    def contradiction(cls, config):
        """What fields of a file's `config` contradict each other, in words, or None."""
        return None

    def config(self):
        """The constructor's arguments, as plain data."""
        return {name: getattr(self, name) for name in self.fields}

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.config().items() if value is not None)

    def trained_parameters(self):
        """The parameters that finetuning moves: those that are not frozen."""
        named = self.named_parameters()
        return [p for name, p in named if p.requires_grad and name not in self.frozen]


def frozen_names(weight, bias):
    """The names among "weight" and "bias" that are frozen parameters, or not parameters at all.

    While a network is traced without gradients, only a parameter still tells: what is computed from one does not.
    """
    named = {"weight": weight, "bias": bias}
    return frozenset(
        name for name, x in named.items() if x is None or (isinstance(x, nn.Parameter) and not x.requires_grad)
    )


def as_pair(value):
    """A kernel size, stride or padding as two numbers."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def widened(data):
    """Spikes as float32, in which sums are exact; other types as they are."""
    return data.to(torch.float32) if data.dtype == torch.uint8 else data
