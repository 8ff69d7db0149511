"""SpikeLayer, the base class of all layers of a SpikeDAGModule.

A layer computes its ANN function on plain tensors (`activation`). Its spiking function has two steps: `current`
computes the current that spikes or other currents cause, and `send` turns it into the spikes of the layer's neuron, or
passes it on if the layer has none. All facts about a layer stand in its class: a new layer is one class in this folder
and one line in the tracer's table (`ann_parser.RECORDING_FUNCTIONS`).
"""

import torch
from torch import nn

# The kinds of values in a converted network.
ANALOG = "activations"  # of the image, of layers that stay ANN, and behind the last spiking layer
CURRENT = "currents"  # what flows into a neuron
SPIKES = "spikes"

OP_TYPES = {}  # class name -> class, for every layer that a file may hold


class SpikeLayer(nn.Module):
    """The base of all layers.

    Class attributes:
    fields: constructor argument -> rule for its value in a file (`runtime.rules`).
    arity: least and largest number of inputs.
    has_weights: it weighs its input. is_trained: finetuning changes these weights.
    is_linear: it is a weighted sum, so a current may pass it on the way to a neuron.
    rectifies: it gets a neuron if it reads currents. fires: it gets a neuron whenever it sends spikes.
    adds: the currents that it joins share one unit.
    passes_spikes: without a neuron it passes spikes on. passes_sums: it also passes sums of spikes (folded pooling).
    hands_on: if a layer behind it needs spikes, this layer needs them as input.
    selects: it passes some of the spikes, depending on earlier ones.
    splits_signs: it makes two channels of opposite sign out of each one. joins_signs: it makes one of two again.
    carries_bias: converted, it has a bias_q.
    passes_maximum: the maximum of several values passes it, so a max pooling may stand before it or behind.
    stays_behind: it has no spiking form and stays ANN behind the last layer with weights; elsewhere it is refused.
    folded: it has no neuron; the layers behind it weigh every spike of its windows (`SpikeAvgPool2d`).
    rescales: its spikes stand for other activations than the spikes that it reads.
    may_turn_negative: it may send values below 0 although it reads none.
    channelwise: it computes each channel from that channel alone, so that a positive factor passes, and a constant
    becomes what the layer makes of it. Any factor passes if it is linear, too.
    rearranges: every output is one of its inputs, or 0 (`layers.rearranging`).
    reads_windows: each output comes from several places of a channel, whose spikes must have one lambda.
    is_measured: calibration pools its activations. Other layers only rearrange activations of the layers before them.
    passes_scale: scaling a channel of its input by a positive factor scales its output. passes_shift: a constant per
    channel passes, too.
    any_shape: it computes the same for samples [C, L] and [C, 1, L] (`layers.lines`).
    ceiling: upper bound of its activations, or None.

    Instance attributes:
    spiking: it works on spikes or currents instead of activations. Set by the conversion.
    neuron: the layer's IFNeuron, or None.
    levels: for a layer that will fire, the ClipFloorShift that quantizes its ANN activations, or None.
    frozen: names of the parameters that the traced network does not train (`frozen_names`).
    """

    fields = {}  # noqa: RUF012  every class defines its own
    arity = (1, 1)
    has_weights = is_trained = is_linear = rectifies = fires = adds = False
    passes_spikes = passes_sums = passes_scale = passes_shift = False
    hands_on = rescales = may_turn_negative = channelwise = rearranges = reads_windows = False
    is_measured = True
    folded = selects = splits_signs = joins_signs = carries_bias = any_shape = False
    passes_maximum = stays_behind = False
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
            return self.activation(*inputs) if self.levels is None else self.levels(self.unclipped(*inputs))
        return self.send(self.current(*inputs), memory)

    def activation(self, *inputs):
        """The ANN function: activations [B, ...] -> [B, ...]. NotImplementedError in a layer without one."""
        raise NotImplementedError(f"{type(self).__name__} has no ANN function")

    def unclipped(self, *inputs):
        """Activations [B, ...] for `levels`, which clips them at 0: they may be negative where `activation` is 0."""
        return self.activation(*inputs)

    def current(self, *inputs):
        """The Current that spikes and currents cause, or a SpikeTensor where spikes pass.

        Raises NotImplementedError in a layer that does not work on spikes.
        """
        raise NotImplementedError(f"{type(self).__name__} does not work on spikes")

    def send(self, current, memory=None):
        """The spikes of the layer's neuron, or `current` itself if there is none. memory: state between steps."""
        return current if self.neuron is None else self.neuron(current, memory)

    def largest_sum(self, largest_read):
        """The bound of the |current| per step that this layer sends, from the bounds of its inputs."""
        return max(largest_read)

    # how it converts

    def plan(self, place):
        """The kind that this layer sends in the converted network, at its `conversion.plan.Place`: ANALOG, CURRENT or
        SPIKES. By default the kind that it reads. Raises ValueError if it cannot be converted there.
        """
        return place.passes_on()

    def convert(self, setter, entry):
        """Take integers, a unit and a neuron from a `conversion.integers.SpikeSetter`. By default values pass through.

        Raises ValueError for what cannot be converted.
        """
        setter.pass_on(entry.inputs[0], entry.out, setter.value_of(entry.inputs[0]))

    def targets(self, values, shapes, out_shape):
        """The lambdas per channel of spikes that pass. values, shapes: lambdas and sample shapes of the inputs."""
        return values[0]

    def value_added(self, value):
        """The lambda or unit per channel of the sum, from that of the one input `value` of a layer that `adds`."""
        return value

    def on_pairs(self, merges):
        """`layer, merge`: this layer for pairs (`layers.signs`) as inputs, and the MergeSigns for what it then sends.

        merges: the MergeSigns that the layer reads, one per input. None if pairs cannot pass: it mixes channels, or no
        longer computes the same.
        """
        return None

    def misfit(self, reads):
        """The reason why this spiking layer cannot read inputs of the kinds `reads` (CURRENT or SPIKES), or None."""
        return "it has no place for neurons" if self.neuron is not None else None

    def held(self, inputs, output):
        """(name, tensor or None, shape that it has to fit) of every tensor that a spiking layer holds.

        inputs, output: activations of one sample, [1, ...].
        """
        return []

    # what it costs

    def ann_operations(self, shape, outputs):
        """MACs and accumulates of one sample in the ANN. shape: of the first input. outputs: number of outputs."""
        return 0.0, 0.0

    def spike_operations(self, spikes):
        """Number of accumulates that spikes cause. spikes: counts per input position of one sample."""
        return 0.0

    # what a file holds

    @classmethod
    def contradiction(cls, config):
        """A contradiction between fields of a file's `config`, in words, or None."""
        return None

    @classmethod
    def parameters_of(cls, integers):
        """The float parameters of a layer whose file has integers only. integers: "weight", "bias" -> tensor."""
        return integers

    def config(self):
        """The constructor's arguments, as plain data."""
        return {name: getattr(self, name) for name in self.fields}

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.config().items() if value is not None)

    def trained_parameters(self):
        """The parameters that finetuning changes: those that are not frozen."""
        named = self.named_parameters()
        return [p for name, p in named if p.requires_grad and name not in self.frozen]


def frozen_names(weight, bias):
    """The names among "weight" and "bias" that are frozen parameters, or not parameters at all.

    The network is traced without gradients, so a tensor computed from parameters does not show whether it is trained.
    It counts as trained.
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
    """Spikes or counts in bytes as float32, in which sums are exact; other types unchanged."""
    return data.to(torch.float32) if data.dtype in (torch.uint8, torch.int8) else data
