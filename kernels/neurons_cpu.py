"""Integrate-and-fire neurons on a CPU: all timesteps in one pass, compiled by numba."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from kernels.memory_order import flat, order, per_neuron

try:
    from numba import config, njit
except ImportError:  # optional: without it the neurons run in plain PyTorch
    njit = None
else:
    if config.DISABLE_JIT:  # loops in Python would take a thousand times as long as plain PyTorch
        njit = None

CHUNK = 1024  # neurons at a time, whose membrane potentials (4 KiB) stay in the L1 cache over all timesteps


def compiled(function):
    """Compile a function without Python's global lock, and cache it on disk if numba can write there.

    Divisions do not check for 0, as Python's do, because loops with that check do not become vectors.
    """
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no writable folder for its cache
        return njit(nogil=True, error_model="numpy")(function)


if njit is not None:

    @compiled
    def number_of(spikes):
        """The number of spikes, or sum of counts, [N]. In 32 bits, because vectors hold more of them."""
        fired = np.int32(0)
        for spike in spikes:
            fired += np.int32(spike)
        return fired

    @compiled
    def fire(u, Vthr, subtract):
        """The membrane potential after the reset, and whether a neuron with the potential u fires."""
        fires = u >= Vthr
        return u - (Vthr if subtract else u) if fires else u, fires

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
                s = spikes[t, start:stop]
                if constant.size:
                    c = constant[start:stop]
                    for i in range(stop - start):
                        u[i], s[i] = fire(u[i] + c[i], Vthr[i], subtract)
                elif extra.size:
                    c, e = current[t, start:stop], extra[t, start:stop]
                    for i in range(stop - start):
                        u[i], s[i] = fire(u[i] + (c[i] + e[i] * extra_weight[i]), Vthr[i], subtract)
                else:
                    c = current[t, start:stop]
                    for i in range(stop - start):
                        u[i], s[i] = fire(u[i] + c[i], Vthr[i], subtract)
                fired += number_of(s)
        return fired

    @compiled
    def run_counting_neurons(current, start, Vthr, counts, steps, window):
        """Fill the spike counts of neurons that hear a constant current for `steps` steps before they fire.

        current: float32 [N]. start, Vthr: float32, repeated over the neurons. counts: [N]. window: steps in which they
        fire; each spike subtracts Vthr. Sums are rounded in the order of the steps.
        """
        chunk = len(Vthr)
        u, n = np.empty(chunk, np.float32), np.empty(chunk, np.float32)
        for first in range(0, len(current), chunk):
            size = min(chunk, len(current) - first)
            c = current[first : first + size]
            for i in range(size):
                u[i] = start[i]
                n[i] = np.float32(0)
            for _ in range(steps):
                for i in range(size):
                    u[i] += c[i]
            for _ in range(window):
                for i in range(size):
                    fires = u[i] >= Vthr[i]
                    n[i] += np.float32(1) if fires else np.float32(0)
                    u[i] = u[i] - Vthr[i] if fires else u[i]
            for i in range(size):
                counts[first + i] = n[i]

    @compiled
    def run_whole_counts(total, at_rest, Vthr, counts, window):
        """Fill the spike counts of neurons that know the sum of their currents: clip(floor(u / Vthr), 0, window).

        total: float32 [N], the sum of the currents but for `at_rest`, float32, which repeats over the neurons as Vthr
        does: currents of no spikes and initial potentials. All are whole numbers below 2^24. Returns the sum of counts.
        """
        fired, chunk, most = 0, len(Vthr), np.float32(window)
        for first in range(0, len(total), chunk):
            size = min(chunk, len(total) - first)
            c, n = total[first : first + size], counts[first : first + size]
            for i in range(size):
                # a quotient of whole numbers below 2^24 never reaches the next whole number by rounding
                count = np.floor((c[i] + at_rest[i]) / Vthr[i])
                count = count if count > np.float32(0) else np.float32(0)
                n[i] = count if count < most else most
            fired += number_of(n)
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


def count_constant(current, start, Vthr, steps, window, dtype):
    """The spike counts, `dtype` [B, ...], of neurons that hear a constant float32 current [B, ...] before they fire.

    start, Vthr: initial potential and threshold, broadcastable to a sample. See `run_counting_neurons`.
    """
    counts = torch.empty_like(current, dtype=dtype, memory_format=order(current))
    start, Vthr = in_chunks(per_neuron(start, current), per_neuron(Vthr, current))
    flat_counts = flat(counts, counts, 1)[0].numpy()
    run_counting_neurons(flat(current, current, 1)[0].numpy(), start, Vthr, flat_counts, steps, window)
    return counts


def count_whole(total, at_rest, Vthr, window, dtype):
    """`counts, fired`: spike counts, `dtype` [B, ...], of neurons that know their whole current, and their sum.

    total: float32 [B, ...]. at_rest, Vthr: broadcastable to a sample. See `run_whole_counts`.
    """
    counts = torch.empty_like(total, dtype=dtype, memory_format=order(total))
    at_rest, Vthr = in_chunks(per_neuron(at_rest, total), per_neuron(Vthr, total))
    flat_counts = flat(counts, counts, 1)[0].numpy()
    return counts, run_whole_counts(flat(total, total, 1)[0].numpy(), at_rest, Vthr, flat_counts, window)


def in_chunks(first, second):
    """Two tensors of one period each, repeated to arrays of one chunk, which both periods divide."""
    period = math.lcm(len(first), len(second))
    chunk = period * -(-CHUNK // period)  # each chunk starts with the first value of both
    return first.repeat(chunk // len(first)).numpy(), second.repeat(chunk // len(second)).numpy()


def if_steps_on_cpu(steps, constant, extra, Vthr, membrane, spikes, subtract, timesteps):
    """Fill `spikes` with the kernel compiled by numba, and return their number; arguments as for `if_steps`."""
    empty = torch.empty(0)
    Vthr = per_neuron(Vthr, membrane)
    weight = Vthr if extra is None else per_neuron(extra[1], membrane)
    weight, Vthr = in_chunks(weight, Vthr)
    return run_neurons(
        flat(empty if steps is None else steps, membrane, timesteps).numpy(),
        empty.numpy() if constant is None else flat(constant, membrane, 1)[0].numpy(),
        flat(empty.to(torch.uint8) if extra is None else extra[0], membrane, timesteps).numpy(),
        weight,
        Vthr,
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
    arrays = [tensor.flatten(2).numpy() if tensor.dim() > 1 else tensor.numpy() for tensor in tensors]
    in_threads(lambda first, stop: kernel(first, stop, *arrays, listen, subtract), tensors[0].shape[1])


def in_threads(run, samples, most=sys.maxsize):
    """The results of `run(first, stop)` for parts of the samples, one for each of torch's threads, at most `most`."""
    threads = max(1, min(torch.get_num_threads(), samples, most))
    bounds = [samples * n // threads for n in range(threads + 1)]
    if threads == 1:
        return [run(*bounds)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, bounds, bounds[1:]))
