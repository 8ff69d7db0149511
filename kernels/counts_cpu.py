"""The number of spikes of integrate-and-fire neurons on a CPU, without the spikes themselves, compiled by numba."""

import math

import numpy as np
import torch

from kernels.memory_order import flat, order, per_neuron
from kernels.neurons_cpu import compiled, njit

CHUNK = 4096  # neurons at a time: 1024, whose values fit into the L1 cache, took a fifth more time

if njit is not None:

    @compiled
    def run_counts(current, added, Vthr, start, counts, timesteps, listen, window, subtract):
        """Fill `counts`, [N]: the spikes of `window` steps, of which the first comes after `listen` steps of input.

        current: [T, N], or [1, N] if it is the same at every step. added, Vthr and start repeat over the neurons.
        """
        zero, one = np.float32(0), np.float32(1)
        rows, neurons = current.shape
        chunk = len(Vthr)
        u = np.empty(chunk, np.float32)
        for first in range(0, neurons, chunk):
            stop = min(first + chunk, neurons)
            s = counts[first:stop]
            u[:] = start
            s[:] = zero
            for t in range(listen):
                c = current[min(t, rows - 1), first:stop]
                for i in range(stop - first):
                    u[i] += c[i] + added[i]
            for t in range(listen, listen + window):
                if t < timesteps:
                    c = current[min(t, rows - 1), first:stop]
                    for i in range(stop - first):
                        u[i] += c[i] + added[i]
                if subtract:
                    for i in range(stop - first):
                        fires = u[i] >= Vthr[i]
                        s[i] += one if fires else zero
                        u[i] = u[i] - Vthr[i] if fires else u[i]
                else:
                    for i in range(stop - first):
                        fires = u[i] >= Vthr[i]
                        s[i] += one if fires else zero
                        u[i] = u[i] - u[i] if fires else u[i]


def can_count(current):
    """Whether `count_spikes` can take these currents: on a CPU, with numba."""
    return njit is not None and current.device.type == "cpu"


def count_spikes(current, rows, added, Vthr, start, timesteps, listen, window, subtract):
    """The number of spikes of every neuron in `window` steps, float32 [B, ...].

    current: float32 [rows*B, ...] for rows = T steps, or for rows = 1 the current of every step. added: a current that
    comes at every step, too. Vthr, start: threshold and initial potential. These three are broadcastable to a sample.
    listen: steps of input before the first spike. subtract: a spike subtracts Vthr, otherwise it resets to 0.
    """
    counts = torch.empty_like(current[: len(current) // rows], memory_format=order(current))  # [B, ...]
    values = [per_neuron(each, counts) for each in (added, Vthr, start)]
    period = math.lcm(*(len(each) for each in values))
    chunk = period * -(-CHUNK // period)  # a multiple of all periods, so that each chunk starts with the first values
    values = [each.repeat(chunk // len(each)).numpy() for each in values]
    numbers = timesteps, listen, window, subtract
    run_counts(flat(current, counts, rows).numpy(), *values, flat(counts, counts, 1)[0].numpy(), *numbers)
    return counts
