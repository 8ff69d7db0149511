"""Spike trains, and the currents that they cause.

`firing_ratio_record` is a module-level switch. While it is on, every layer that fires appends its firing rate (spikes
per neuron and timestep) to `firing_ratios`. `record_firing_ratios()` sets and restores the switch.
"""

import threading
from contextlib import contextmanager

import torch

firing_ratio_record = False
firing_ratios = []
of_this_thread = threading.local()  # `ratios`: the record of the part of a batch that this thread simulates


@contextmanager
def record_firing_ratios():
    """Record firing rates within the context, which yields the list. Afterwards the switch is restored."""
    global firing_ratio_record
    before = firing_ratio_record
    firing_ratio_record = True
    firing_ratios.clear()
    try:
        yield firing_ratios
    finally:
        firing_ratio_record = before
        firing_ratios.clear()


def note_firing_ratio(fired, neurons_and_steps):
    """Append spikes per neuron and timestep to this thread's record in a simulation, else to `firing_ratios`."""
    record = getattr(of_this_thread, "ratios", None)
    record = firing_ratios if record is None else record
    record.append(fired / neurons_and_steps)


class SpikeTensor:
    """The spikes of one layer over all timesteps.

    data: [T*B, C, H, W] or [T*B, N], one timestep after the other; 0 or 1, or sums of spikes behind a folded pooling.
    int8 for spike counts (`Counting`).
    timesteps: T. scale_factor: lambda, the activation that a value of 1 at every step stands for; a scalar or
    broadcastable to data[0].
    The constructor records a firing rate, because a neuron has fired. `like` does not: its spikes were recorded before.
    fired: the number of spikes where it is known; otherwise they are counted for the record.
    """

    fresh = False  # whether the spikes come directly from a neuron and are 0 or 1

    def __init__(self, data, timesteps, scale_factor, fired=None):
        self.data, self.timesteps, self.scale_factor = data, timesteps, torch.as_tensor(scale_factor)
        self.fresh = True
        if firing_ratio_record:
            note_firing_ratio(data.count_nonzero().item() if fired is None else fired, data.numel())

    @classmethod
    def like(cls, data, timesteps, scale_factor):
        """The same spikes in another shape or order; no firing rate is recorded."""
        spikes = cls.__new__(cls)
        spikes.data, spikes.timesteps, spikes.scale_factor = data, timesteps, torch.as_tensor(scale_factor)
        return spikes

    def counts(self):
        """Number of spikes of every neuron over all steps, [B, ...]."""
        steps, dtype = self.data.unflatten(0, (self.timesteps, -1)), self.scale_factor.dtype  # [T, B, ...]
        # sums in uint8 are several times faster, and 255 spikes still fit into one
        if self.fresh and steps.dtype == torch.uint8:
            return sum(part.sum(0, dtype=torch.uint8).to(dtype) for part in steps.split(255))
        return steps.sum(0, dtype=dtype)

    def to_float(self):
        """The activation that the spikes stand for, lambda * mean_t(spike): [B, ...]."""
        return decode(self.counts(), self.scale_factor, self.timesteps)

    def to_float_every_step(self, before=0, steps_before=0):
        """The activation decoded after each step, one step's batch after the other: [T*B, ...].

        before: spike counts of the `steps_before` earlier steps, [B, ...].
        """
        spikes = self.data.unflatten(0, (self.timesteps, -1))  # [T, B, ...]
        counts = torch.empty_like(spikes, dtype=self.scale_factor.dtype)  # in the memory order of the spikes
        for step, count in zip(spikes, counts):  # faster than cumsum, which reads every neuron with large strides
            before = torch.add(step, before, out=count)
        steps = torch.arange(1, self.timesteps + 1, device=spikes.device) + steps_before
        return decode(counts, self.scale_factor, steps.view(-1, *[1] * (spikes.dim() - 1))).flatten(0, 1)


def decode(counts, scale_factor, timesteps):
    """The activation that `counts` spikes in `timesteps` steps stand for."""
    return counts * (scale_factor / timesteps)


class Current:
    """The input of neurons, in units of membrane potential.

    data: [T*B, ...], or [B, ...] if the current is the same at every step (`constant`). float32 or float64; on a GPU
    also int32, or float16 if it represents the currents exactly.
    spikes: (spikes [T*B, ...], weight) that also belong to the current and are not added yet, or None.
    pending: a `kernels.firing_convolution.PendingConvolution` that has yet to compute `data`, or None. Neurons that can
    compute it together with their spikes do so; for everyone else reading `data` computes it.
    """

    def __init__(self, data, timesteps, constant=False, spikes=None, pending=None):
        self.computed, self.timesteps, self.constant, self.spikes = data, timesteps, constant, spikes
        self.pending = pending

    @property
    def data(self):
        if self.pending is not None:
            self.computed, self.pending = self.pending.compute(), None
        return self.computed

    def with_spikes(self, spikes, weight):
        """This current and, not added yet, spikes [T*B, ...] times their weight."""
        return Current(self.computed, self.timesteps, self.constant, (spikes, weight), self.pending)

    def like(self, data):
        """Another current of the same duration."""
        return Current(data, self.timesteps, self.constant)

    def total(self):
        """The whole current as one tensor, spikes added, in a type wide enough for sums of currents."""
        of_integers = torch.float64 if self.data.dtype == torch.int32 else torch.float32
        data = self.data.to(torch.promote_types(self.data.dtype, of_integers))
        if self.spikes is None:
            return data
        spikes, weight = self.spikes
        return data + spikes * weight.to(data.dtype)

    def per_step(self):
        """The current of every step, [T, B, ...]; a constant current is expanded without a copy."""
        if self.constant:
            return self.data.expand(self.timesteps, *self.data.shape)
        return self.total().unflatten(0, (self.timesteps, -1))


class Memory:
    """The state that a simulation keeps between chunks of timesteps: layer -> membrane potentials or spike counts.

    timesteps: of the whole simulation; the layers may get them in chunks.
    counting: None, or the Counting of a simulation that computes the spike counts of all steps at once.
    """

    def __init__(self, timesteps, counting=None):
        self.timesteps, self.by_layer, self.counting = timesteps, {}, counting


class Counting:
    """What a simulation needs to compute spike counts of all steps at once (`spike_simulator.counting_of`).

    dtype: floating-point type in which all counts and currents are exact.
    counts_type: type of the counts that neurons send: `dtype`, or int8 where none exceeds 127.
    at_rest: neuron -> its current in a step without any spike, [1, ...]: the biases. Filled while `measures`.
    """

    def __init__(self, dtype):
        self.dtype, self.counts_type, self.at_rest, self.measures = dtype, dtype, {}, True
