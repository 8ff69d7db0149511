"""Squared errors of activations that are rounded to steps of many sizes, in one pass on a CPU, compiled by numba."""

import numpy as np
import torch

from kernels.neurons_cpu import compiled, njit

if njit is not None:

    @compiled
    def add_errors(values, channels, steps, errors, most):
        """Add to `errors`, [C, K], the squared errors of values, [N], in steps of K sizes for each channel, [C, K]."""
        for i in range(len(values)):
            value, step, error = values[i], steps[channels[i]], errors[channels[i]]
            for k in range(len(step)):
                difference = min(np.rint(value / step[k]), most) * step[k] - value
                error[k] += difference * difference


def can_sum(values):
    """Whether `sum_errors` can take these values: float32 on a CPU, with numba."""
    return njit is not None and values.device.type == "cpu" and values.dtype == torch.float32


def sum_errors(values, channels, steps, most):
    """The sums of the squared errors of values that are rounded to 0 to `most` steps: float32 [C, K].

    values: float32 [N], from 0 on. channels: the channel of each, int64 [N]. steps: K sizes of a step for each channel,
    float32 [C, K].
    """
    errors = torch.zeros_like(steps)
    add_errors(values.numpy(), channels.numpy(), steps.numpy(), errors.numpy(), np.float32(most))
    return errors
