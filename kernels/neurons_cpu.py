"""Integrate-and-fire neurons on a CPU: all timesteps in one pass, compiled by numba."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from kernels.memory_order import flat, per_neuron

try:
    from numba import njit
except ImportError:  # optional: without it the neurons run in plain PyTorch
    njit = None

CHUNK = 1024  # neurons at a time, whose membrane potentials (4 KiB) stay in the L1 cache over all timesteps


def compiled(function):
    """Compile a function without Python's global lock, and cache it on disk if numba can write there."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no writable folder for its cache
        return njit(nogil=True)(function)


if njit is not None:

    @compiled
    def number_of(spikes):
        """The number of spikes among uint8 [N]. A 32-bit sum, because it is compiled to vectors of more elements."""
        fired = np.int32(0)
        for spike in spikes:
            fired += np.int32(spike)
        return fired

    @compiled
    def run_neurons(current, constant, extra, extra_weight, Vthr, membrane, spikes, subtract):
        """Integrate and fire: spikes[t, i] = u_i >= Vthr, then u_i -= Vthr (if `subtract`) or u_i = 0.

        The current of neuron i at step t is constant[i], or current[t, i] + extra[t, i] * extra_weight; an empty array
        is left out. current, extra, spikes: [T, N]. constant: [N]. Vthr and extra_weight repeat over the neurons.
        membrane, [N], holds u before and after. Returns the number of spikes.
        """
        timesteps, neurons = spikes.shape
        fired = 0
        chunk = len(Vthr)
        for start in range(0, neurons, chunk):
            stop = min(start + chunk, neurons)
            u = membrane[start:stop]
            for t in range(timesteps):
                if constant.size:
                    c = constant[start:stop]
                    for i in range(stop - start):
                        u[i] += c[i]
                elif extra.size:
                    c, e = current[t, start:stop], extra[t, start:stop]
                    for i in range(stop - start):
                        u[i] += c[i] + e[i] * extra_weight[i]
                else:
                    c = current[t, start:stop]
                    for i in range(stop - start):
                        u[i] += c[i]
                s = spikes[t, start:stop]
                if subtract:
                    for i in range(stop - start):
                        fires = u[i] >= Vthr[i]
                        s[i] = fires
                        u[i] = u[i] - Vthr[i] if fires else u[i]
                else:
                    for i in range(stop - start):
                        fires = u[i] >= Vthr[i]
                        s[i] = fires
                        u[i] = u[i] - u[i] if fires else u[i]
                fired += number_of(s)
        return fired

    @compiled
    def run_learning_neurons(first, stop, steps, Vthr, start, potentials, spikes, listen, subtract):
        """Fill the membrane potentials before the reset and the spikes of the samples `first` to `stop` - 1.

        steps, potentials, spikes: float32 [T, B, N]. Vthr, start: float32 [N].
        """
        zero, one = np.float32(0), np.float32(1)
        timesteps, _, neurons = steps.shape
        for b in range(first, stop):
            u = start.copy()
            for t in range(listen):
                u += steps[t, b]
            for t in range(timesteps):
                if t + listen < timesteps:
                    u += steps[t + listen, b]
                p, s = potentials[t, b], spikes[t, b]
                for i in range(neurons):
                    v, V = u[i], Vthr[i]
                    p[i] = v
                    s[i] = one if v >= V else zero
                    u[i] = v - (V if subtract else v) if v >= V else v

    @compiled
    def slope_of_spike(potential, Vthr):
        """The triangle that replaces the derivative of a spike (`spike_neurons.SpikesThroughTime`)."""
        away = potential / Vthr - np.float32(1)
        slope = np.float32(1) - (away if away > np.float32(0) else -away)  # branches vectorise; max and abs do not
        return (slope if slope > np.float32(0) else np.float32(0)) / Vthr

    @compiled
    def run_learning_neurons_back(first, stop, gradient, potentials, Vthr, of_steps, listen, subtract):
        """Fill `of_steps`, the gradient with respect to the currents, from `gradient`, that with respect to the spikes.

        gradient, potentials, of_steps: float32 [T, B, N]. Vthr: float32 [N].
        """
        timesteps, _, neurons = gradient.shape
        for b in range(first, stop):
            m = np.zeros(neurons, np.float32)  # gradient with respect to the membrane potential
            for t in range(timesteps - 1, -1, -1):
                g, p = gradient[t, b], potentials[t, b]
                c = of_steps[
                    min(t + listen, timesteps - 1), b
                ]  # the last step is overwritten until its final value comes
                if subtract:
                    for i in range(neurons):
                        slope = slope_of_spike(p[i], Vthr[i])
                        m[i] += slope * (g[i] - Vthr[i] * m[i])
                        c[i] = m[i]
                else:
                    for i in range(neurons):
                        slope = slope_of_spike(p[i], Vthr[i])
                        kept = np.float32(0) if p[i] >= Vthr[i] else m[i]
                        m[i] = kept + slope * (g[i] - p[i] * m[i])
                        c[i] = m[i]
            for t in range(listen):
                of_steps[t, b] = m


def if_steps_on_cpu(steps, constant, extra, Vthr, membrane, spikes, subtract, timesteps):
    """Fill `spikes` with the kernel compiled by numba, and return their number; arguments as for `if_steps`."""
    empty = torch.empty(0)
    Vthr = per_neuron(Vthr, membrane)
    weight = Vthr if extra is None else per_neuron(extra[1], membrane)
    period = math.lcm(len(Vthr), len(weight))
    chunk = period * -(-CHUNK // period)  # a multiple of both periods, so that each chunk starts with their first value
    return run_neurons(
        flat(empty if steps is None else steps, membrane, timesteps).numpy(),
        empty.numpy() if constant is None else flat(constant, membrane, 1)[0].numpy(),
        flat(empty.to(torch.uint8) if extra is None else extra[0], membrane, timesteps).numpy(),
        weight.repeat(chunk // len(weight)).numpy(),
        Vthr.repeat(chunk // len(Vthr)).numpy(),
        flat(membrane, membrane, 1)[0].numpy(),
        flat(spikes, membrane, timesteps).numpy(),
        subtract,
    )


def learning_steps_on_cpu(steps, Vthr, start, potentials, spikes, listen, subtract):
    """Fill `potentials` and `spikes` with the kernel compiled by numba."""
    share_samples(run_learning_neurons, (steps, Vthr, start, potentials, spikes), listen, subtract)


def learning_steps_back_on_cpu(gradient, potentials, Vthr, of_steps, listen, subtract):
    """Fill `of_steps` with the kernel compiled by numba."""
    share_samples(run_learning_neurons_back, (gradient, potentials, Vthr, of_steps), listen, subtract)


def share_samples(kernel, tensors, listen, subtract):
    """Run a learning kernel on tensors [T, B, ...] and [N]; the threads share the samples."""
    samples = tensors[0].shape[1]
    arrays = [tensor.flatten(2).numpy() if tensor.dim() > 1 else tensor.numpy() for tensor in tensors]
    threads = min(torch.get_num_threads(), samples)
    bounds = [samples * n // threads for n in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first, stop: kernel(first, stop, *arrays, listen, subtract), bounds, bounds[1:]))
