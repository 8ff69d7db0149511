"""Gates: factors for the channels that a network computes from the image, as in squeeze-and-excitation."""

from layers.base import SpikeLayer


class GateOp(SpikeLayer):
    """x * gate, one factor for each channel and image (squeeze-and-excitation; Hu et al., CVPR 2018).

    inputs: x [B, C, H, W] and the gate, [B, C, 1, 1] or constant within every channel. Spikes cannot compute it:
    `rewrites.gates.replace_gates` puts constants in its place before anything is converted.
    """

    arity = (2, 2)
    any_shape = True

    def activation(self, x, gate):
        return x * gate

    def plan(self, place):
        raise ValueError(f"{place.where}: spikes compute no product of two activations (--replace_gates mean)")


def is_gate(values):
    """Whether the values [B, C, ...] are constant within every channel of every sample."""
    rows = values.flatten(2) if values.dim() > 2 else None
    return rows is not None and bool((rows == rows[..., :1]).all())
