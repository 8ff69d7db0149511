"""Activations rounded to levels on a CPU, and their gradients, each in one pass over the memory, compiled by numba."""

import numpy as np
import torch

from kernels.memory_order import flat, order, per_neuron
from kernels.neurons_cpu import compiled, in_chunks, in_threads, njit

WORTH_A_THREAD = 2**16  # activations; with fewer, to start threads takes longer than the work

if njit is not None:

    @compiled
    def steps_of(x, size, levels):
        """Activations x in units of size / levels, from 0 to `levels`. NaN stays NaN."""
        steps = x / size
        steps = np.float32(0) if steps < np.float32(0) else steps
        return (np.float32(1) if steps > np.float32(1) else steps) * levels

    @compiled
    def run_levels(x, size, step, rounded, levels):
        """Fill `rounded`, [N], from activations x, [N]. size, step: lambda and one level, repeated over the neurons."""
        chunk, half = len(size), np.float32(0.5)
        for first in range(0, len(x), chunk):
            length = min(chunk, len(x) - first)
            read, written = x[first : first + length], rounded[first : first + length]
            for i in range(length):
                written[i] = np.floor(steps_of(read[i], size[i], levels) + half) * step[i]

    @compiled
    def run_levels_back(x, gradient, size, of_x, of_size, levels):
        """Fill `of_x`, [N], the gradient of x, from `gradient`, [N], and add the gradients of lambda to `of_size`.

        size and of_size repeat over the neurons; the gradient of lambda lacks the factors that all neurons share.
        """
        chunk, half, nothing, one = len(size), np.float32(0.5), np.float32(0), np.float32(1)
        for first in range(0, len(x), chunk):
            length = min(chunk, len(x) - first)
            read, g, written = x[first : first + length], gradient[first : first + length], of_x[first : first + length]
            for i in range(length):
                steps = steps_of(read[i], size[i], levels)
                is_inside = (steps > nothing) & (steps < levels)
                written[i] = g[i] * (one if is_inside else nothing)  # 0 x NaN is NaN, as in plain PyTorch
                above = levels if steps >= levels else nothing
                of_size[i] += g[i] * (np.floor(steps + half) - steps if is_inside else above)


def round_on_cpu(x, size, levels):
    """Activations, float32 [B, ...], rounded to `levels` steps from 0 to `size`, a scalar or one value per channel.

    The result is in the memory order `order(x)`, whatever that of x.
    """
    rounded = torch.empty_like(x, memory_format=order(x))
    sizes, steps = in_chunks(per_neuron(size, x), per_neuron(size / levels, x))
    arrays = [flat(each, x, len(x)).numpy() for each in (x, rounded)]

    def run(read, written):
        run_levels(read.reshape(-1), sizes, steps, written.reshape(-1), np.float32(levels))

    share(run, arrays)
    return rounded


def round_back_on_cpu(x, gradient, size, levels):
    """`of_x, of_size`: the gradients of `round_on_cpu`, of which that of size lacks what all neurons share."""
    of_x = torch.empty_like(x, memory_format=order(x))
    values = per_neuron(size, x)
    sizes, _ = in_chunks(values, values)
    arrays = [flat(each, x, len(x)).numpy() for each in (x, gradient, of_x)]

    def run(read, of_rounded, written):
        sums = np.zeros(len(sizes), np.float32)
        run_levels_back(read.reshape(-1), of_rounded.reshape(-1), sizes, written.reshape(-1), sums, np.float32(levels))
        return sums.reshape(-1, len(values)).sum(0)

    of_size = torch.from_numpy(np.sum(share(run, arrays), 0))
    return of_x, of_size.view_as(size)


def share(run, arrays):
    """The results of `run` on parts of arrays [B, N]; the threads share the samples."""
    most = 1 if arrays[0].size < WORTH_A_THREAD else len(arrays[0])
    return in_threads(lambda first, stop: run(*(each[first:stop] for each in arrays)), len(arrays[0]), most)
