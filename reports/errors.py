"""Split the error of a spiking layer into parts that add up to it.

The error of a neuron is its decoded activation, lambda * mean_t(spike), minus the activation of the float ANN. Between
these two, one thing changes at a time. Each value below minus the value before it is one part (`PARTS`, in this order):

    weights      the activation a of the quantized ANN: weights rounded here and in earlier layers, and finetuning
    clipping     clip(a, 0, lambda): one spike per step cannot represent a larger activation
    rounding     activation quantization: T timesteps represent lambda * 0/T, 1/T ... T/T. Evenly spaced input of
                 exactly this activation causes clip(floor(a T / lambda + u0 / Vthr), 0, T) spikes
    inherited    the same count with the quantized ANN's layer on the decoded spikes of the layers before it: errors of
                 earlier layers' spikes
    integers     the count for the current that the neuron received: weights rounded again where branches share a
                 neuron, biases rounded to integers or corrected (`--correction bias`), weights fitted to the spikes
                 that arrive (`--correction weights`), and finetuning on spikes
    correction   the same count with the corrected initial potential (`conversion.correction`)
    arrival      uneven arrival: the spikes that the neuron sent. Without listening, a neuron sends premature spikes,
                 before its negative current arrives, or lacks the time to send late ones. With reset to zero, this part
                 also includes the potential above the threshold that each reset discards
"""

import torch

PARTS = {
    "weights": "weight quantization",
    "clipping": "clipping",
    "rounding": "activation quantization",
    "inherited": "inherited from earlier layers",
    "integers": "integers of the neurons",
    "correction": "correction of potentials",
    "arrival": "uneven arrival of spikes",
}


def timeless_count(current, initial, Vthr, timesteps):
    """Spike counts, float64, if all current came before the first spike: clip(floor((current + u[0]) / Vthr), 0, T).

    current: the sum over T steps, [B, ...]. initial: u[0], broadcastable.
    """
    return torch.div(current + initial, Vthr, rounding_mode="floor").clamp(0, timesteps)


def split_error(activation, quantized, on_spikes, current, counts, neuron, timesteps, share, moved=0):
    """Part (`PARTS`) -> the error of one layer's neurons on one batch, float64 [B, ...], in units of activation.

    activation, quantized: activations of the float and of the quantized ANN, [B, ...].
    on_spikes: activation of the quantized ANN's layer on decoded spikes, [B, ...].
    current: the sum of T steps of current into the neurons, [B, ...]. counts: the spikes that they sent, [B, ...].
    share: the initial potential before its correction, in Vthr.
    moved: bias of the SNN minus bias of the ANN over T steps (`conversion.correction.bias_beyond`). The initial
    potential is lower by it, so it is counted as a part of the potential.

    The parts add up to `decoded(counts, neuron, timesteps) - activation`.
    """
    activation, quantized = activation.double(), quantized.double()
    Vthr, corrected, scale = neuron.Vthr.double(), neuron.initial_potential.double(), neuron.scale_factor.double()
    current, corrected = current - moved, corrected + moved
    initial, nudge = Vthr * share, 0.0
    if neuron.largest_current is not None:  # sums of integers can lie on the edge of a step, float32 just below
        initial, nudge = initial.floor(), 0.01
    clipped = quantized.clamp_min(0).minimum(scale)
    per_activation = timesteps * Vthr / scale  # current of T steps for an activation of 1
    even = timeless_count(clipped * per_activation, initial, Vthr, timesteps)
    inherited = timeless_count(on_spikes.double() * per_activation + nudge, initial, Vthr, timesteps)
    came = timeless_count(current, initial, Vthr, timesteps)
    after_correction = timeless_count(current, corrected, Vthr, timesteps)
    values = [decoded(count, neuron, timesteps) for count in (even, inherited, came, after_correction, counts.double())]
    stages = [activation, quantized, clipped, *values]
    return {part: after - before for part, before, after in zip(PARTS, stages, stages[1:])}


def decoded(counts, neuron, timesteps):
    """The activations that a layer's spike counts represent, counts * lambda / T, float64."""
    return counts * (neuron.scale_factor.double() / timesteps)


def initial_share(initial_potential, reset_mode):
    """The initial potential before its correction, in Vthr: the value of the flag, or its default."""
    default = 0.5 if reset_mode == "subtraction" else 0.0
    return default if initial_potential is None else initial_potential


class ErrorSums:
    """Sums over batches of one layer's squared error and of the share of each part.

    The error e is the sum of its parts p, so mean(e^2) is the sum of mean(e p) over the parts. The share mean(e p) is
    negative if a part cancels others.
    """

    def __init__(self):
        self.products = dict.fromkeys(PARTS, 0.0)
        self.squares = dict.fromkeys(PARTS, 0.0)
        self.error = self.activation = 0.0
        self.values = 0

    def add(self, parts, activation):
        """Add one batch. parts: result of `split_error`. activation: of the float ANN, [B, ...]."""
        error = sum(parts.values())
        for part, value in parts.items():
            self.products[part] += (value * error).sum().item()
            self.squares[part] += value.square().sum().item()
        self.error += error.square().sum().item()
        self.activation += activation.double().square().sum().item()
        self.values += error.numel()

    def summary(self):
        """RMS of activation, error and parts; mean squared error and its parts relative to the squared activation."""
        return {
            "rms_activation": (self.activation / self.values) ** 0.5,
            "rms_error": (self.error / self.values) ** 0.5,
            "relative_squared_error": self.error / max(self.activation, 1e-30),
            "rms_of_parts": {part: (square / self.values) ** 0.5 for part, square in self.squares.items()},
            "parts_of_squared_error": {
                p: product / max(self.activation, 1e-30) for p, product in self.products.items()
            },
        }
