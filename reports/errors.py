"""Where the error of a spiking layer comes from, in parts that add up to it.

The error of a neuron is what its spikes stand for, lambda * mean_t(spike), minus the activation of the float ANN. On
the way from one to the other one thing changes at a time, and every change is a part (`PARTS`, in this order):

    weights      activation of the quantized ANN minus that of the float ANN: rounded weights, here and in earlier
                 layers, and what finetuning moved
    clipping     clip(a, 0, lambda) - a: activations that a spike at every step cannot reach
    rounding     activation quantization: T spikes can say lambda * 0/T, 1/T ... T/T; those that even input of exactly
                 this activation causes, clip(floor(a T / lambda + u0 / Vthr), 0, T), minus the activation
    inherited    the same count where the quantized ANN's layer reads what the spikes before it stand for, minus that:
                 errors of earlier layers' spikes
    integers     the count from the current that really came, minus that: weights rounded once more, where branches
                 share a neuron, biases rounded to the neuron's integers or corrected (`--correction bias`), and what
                 finetuning on spikes moved
    correction   the same with the initial potential as it was corrected (`conversion.correction`), minus that
    arrival      uneven arrival: the spikes that were really sent, minus that. Without listening, a spike is sent too
                 early that later negative currents do not bear out, or too late to be sent at all. With reset to zero,
                 what is over the threshold and lost at a reset is here too
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
    """Spikes of neurons that know no time: clip(floor((sum of currents + u[0]) / Vthr), 0, T), float64."""
    return torch.div(current + initial, Vthr, rounding_mode="floor").clamp(0, timesteps)


def split_error(activation, quantized, on_spikes, current, counts, neuron, timesteps, share, moved=0):
    """The error of one layer's neurons on one batch, part -> float64 [B, ...] in units of activation (`PARTS`).

    activation, quantized: of the float and of the quantized ANN; on_spikes: of the latter where it reads decoded
    spikes, [B, ...]. current: the sum of T steps into the neurons, counts: the spikes that they sent, [B, ...]. share:
    the initial potential before its correction, in Vthr. moved: what the biases give over T steps beyond the ANN's
    (`conversion.correction.bias_beyond`), which the potential starts lower for; it counts as a part of the potential.
    The parts add up to `decoded(counts, neuron, timesteps) - activation`.
    """
    activation, quantized = activation.double(), quantized.double()
    Vthr, corrected, scale = neuron.Vthr.double(), neuron.initial_potential.double(), neuron.scale_factor.double()
    current, corrected = current - moved, corrected + moved
    initial, nudge = Vthr * share, 0.0
    if neuron.largest_current is not None:  # integers: sums lie on the edge of a step, float32 leaves some just below
        initial, nudge = initial.floor(), 0.01
    clipped = quantized.clamp_min(0).minimum(scale)
    per_activation = timesteps * Vthr / scale  # current of T steps that an activation of 1 stands for
    even = timeless_count(clipped * per_activation, initial, Vthr, timesteps)
    inherited = timeless_count(on_spikes.double() * per_activation + nudge, initial, Vthr, timesteps)
    came = timeless_count(current, initial, Vthr, timesteps)
    after_correction = timeless_count(current, corrected, Vthr, timesteps)
    values = [decoded(count, neuron, timesteps) for count in (even, inherited, came, after_correction, counts.double())]
    stages = [activation, quantized, clipped, *values]
    return {part: after - before for part, before, after in zip(PARTS, stages, stages[1:])}


def decoded(counts, neuron, timesteps):
    """The activation that spike counts of one layer stand for, float64."""
    return counts * (neuron.scale_factor.double() / timesteps)


def initial_share(initial_potential, reset_mode):
    """The initial potential before its correction, in Vthr: the flag's, or its default."""
    default = 0.5 if reset_mode == "subtraction" else 0.0
    return default if initial_potential is None else initial_potential


class ErrorSums:
    """Sums over batches of one layer's squared error and of what every part has in it.

    The error e is the sum of its parts, so its mean square is the sum of the mean products of e with each part: a share
    that adds up, negative where a part cancels others.
    """

    def __init__(self):
        self.products = dict.fromkeys(PARTS, 0.0)
        self.squares = dict.fromkeys(PARTS, 0.0)
        self.error = self.activation = 0.0
        self.values = 0

    def add(self, parts, activation):
        """One more batch of `split_error` and the float activations."""
        error = sum(parts.values())
        for part, value in parts.items():
            self.products[part] += (value * error).sum().item()
            self.squares[part] += value.square().sum().item()
        self.error += error.square().sum().item()
        self.activation += activation.double().square().sum().item()
        self.values += error.numel()

    def summary(self):
        """RMS of activation, error and parts; mean squares of the error and its parts over that of the activation."""
        return {
            "rms_activation": (self.activation / self.values) ** 0.5,
            "rms_error": (self.error / self.values) ** 0.5,
            "relative_squared_error": self.error / max(self.activation, 1e-30),
            "rms_of_parts": {part: (square / self.values) ** 0.5 for part, square in self.squares.items()},
            "parts_of_squared_error": {
                p: product / max(self.activation, 1e-30) for p, product in self.products.items()
            },
        }
