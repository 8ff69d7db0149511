"""Spike trains, and the currents they cause.

`firing_ratio_record` is the one module-level switch: while it is on, every spiking layer that fires appends its
firing ratio (spikes per neuron and step) to `firing_ratios`. `record_firing_ratios()` sets and restores it.
"""

import threading
from contextlib import contextmanager

import torch

firing_ratio_record = False
firing_ratios = []
of_this_thread = threading.local()  # `ratios`: where a part of a simulation keeps its own record


@contextmanager
def record_firing_ratios():
    """Switch the record on, with an empty list, and afterwards off again, as it was."""
    global firing_ratio_record
    before = firing_ratio_record
    firing_ratio_record = True
    firing_ratios.clear()
    try:
        yield firing_ratios
    finally:
        firing_ratio_record = before
        firing_ratios.clear()


def note_firing_ratio(data):
    """Append spikes per neuron and step to this thread's own record in a simulation, else to `firing_ratios`."""
    record = getattr(of_this_thread, "ratios", None)
    record = firing_ratios if record is None else record
    record.append(data.sum(dtype=torch.float32).item() / data.numel())


class SpikeTensor:
    """The spikes of one layer over all timesteps.

    data: 0 or 1, [T*B, C, H, W] or [T*B, N], timestep by timestep; behind a folded pooling sums of them over its
    windows. timesteps: T.
    scale_factor: lambda, the activation that a spike (one more in a sum) at every step stands for; a scalar or
    broadcastable to data[0].
    Creating one counts as a layer that fires; `like` makes one of spikes that were counted before.
    """

    fresh = False  # from a neuron, so 0 or 1

    def __init__(self, data, timesteps, scale_factor):
        self.data, self.timesteps, self.scale_factor = data, timesteps, torch.as_tensor(scale_factor)
        self.fresh = True
        if firing_ratio_record:
            note_firing_ratio(data)

    @classmethod
    def like(cls, data, timesteps, scale_factor):
        """The same spikes in another shape or order: no new firing ratio."""
        spikes = cls.__new__(cls)
        spikes.data, spikes.timesteps, spikes.scale_factor = data, timesteps, torch.as_tensor(scale_factor)
        return spikes

    def counts(self):
        """Spikes of every neuron over all steps, [B, ...]."""
        steps, dtype = self.data.unflatten(0, (self.timesteps, -1)), self.scale_factor.dtype  # [T, B, ...]
        if self.fresh and steps.dtype == torch.uint8:  # adding bytes is several times faster
            return sum(part.sum(0, dtype=torch.uint8).to(dtype) for part in steps.split(255))
        return steps.sum(0, dtype=dtype)

    def to_float(self):
        """The activation that the spikes stand for, lambda * mean_t(spike): [B, ...]."""
        return decode(self.counts(), self.scale_factor, self.timesteps)

    def to_float_every_step(self, before=0, steps_before=0):
        """The activation as known after each step, one step's batch after the other: [T*B, ...].

        before: the counts of `steps_before` steps that came first.
        """
        spikes = self.data.unflatten(0, (self.timesteps, -1))  # [T, B, ...]
        counts = spikes.cumsum(0, dtype=self.scale_factor.dtype) + before
        steps = torch.arange(1, self.timesteps + 1, device=spikes.device) + steps_before
        return decode(counts, self.scale_factor, steps.view(-1, *[1] * (spikes.dim() - 1))).flatten(0, 1)


def decode(counts, scale_factor, timesteps):
    """The activation that `counts` spikes in `timesteps` steps stand for."""
    return counts * (scale_factor / timesteps)


class Current:
    """What flows into neurons: per step [T*B, ...], or [B, ...] where it is the same at every step (`constant`).

    data: float32 or float64; of a GPU layer also float16, where its currents are exact in it, or int32.
    spikes: (0 or 1 [T*B, ...], weight) that flow in too and were not added yet, or None.
    """

    def __init__(self, data, timesteps, constant=False, spikes=None):
        self.data, self.timesteps, self.constant, self.spikes = data, timesteps, constant, spikes

    def like(self, data):
        """Another current of the same duration."""
        return Current(data, self.timesteps, self.constant)

    def total(self):
        """All of it as one tensor, in a type wide enough for sums of currents."""
        of_integers = torch.float64 if self.data.dtype == torch.int32 else torch.float32
        data = self.data.to(torch.promote_types(self.data.dtype, of_integers))
        if self.spikes is None:
            return data
        spikes, weight = self.spikes
        return data + spikes * weight.to(data.dtype)

    def per_step(self):
        """[T, B, ...]; a constant current is expanded without a copy."""
        if self.constant:
            return self.data.expand(self.timesteps, *self.data.shape)
        return self.total().unflatten(0, (self.timesteps, -1))


class Memory:
    """What a part of a simulation keeps from step to step: membrane potentials and counts, by layer.

    timesteps: of the whole simulation; the layers may get them in chunks.
    """

    def __init__(self, timesteps):
        self.timesteps, self.by_layer = timesteps, {}
