"""All timesteps of integrate-and-fire neurons in one pass: forward and, for training, back through time."""

import torch

from kernels import neurons_cpu, neurons_gpu
from kernels.gpu import triton
from kernels.memory_order import each_neuron, in_memory_order, in_usual_order, is_channels_last, order


def can_run_compiled(tensor):
    """Whether a compiled kernel exists for the device of a tensor."""
    compiler = {"cpu": neurons_cpu.njit, "cuda": triton}.get(tensor.device.type)
    return compiler is not None


def if_steps(steps, constant, extra, Vthr, membrane, subtract, timesteps):
    """`spikes, fired`: the spikes, uint8 [T*B, ...], of integrate-and-fire neurons, and their number.

    On a GPU `fired` is None, because the CPU would have to wait for it.

    steps: currents [T*B, ...] or None; float32, on a GPU also float16 or integers. constant: current [B, ...] that is
    the same at every step, or None. extra: (uint8 spikes [T*B, ...], weight) whose product is added to the current, or
    None. Vthr and weight are broadcastable to a sample. membrane: membrane potentials, float32 [B, ...] in the memory
    format `order(membrane)`, changed in place; the other tensors are converted to this format. subtract: whether a
    spike subtracts Vthr, otherwise it resets to 0.
    """
    shape = (timesteps * len(membrane), *membrane.shape[1:])
    spikes = torch.empty(shape, dtype=torch.uint8, device=membrane.device, memory_format=order(membrane))
    run = neurons_cpu.if_steps_on_cpu if membrane.device.type == "cpu" else neurons_gpu.if_steps_on_gpu
    return spikes, run(steps, constant, extra, Vthr, membrane, spikes, subtract, timesteps)


def learning_steps(steps, Vthr, start, listen, subtract):
    """`potentials, spikes` of integrate-and-fire neurons, each float32 [T, B, ...]; potentials are before the reset.

    steps: currents, float32 [T, B, ...]. listen: steps that are integrated before the first spike. Vthr, start: the
    threshold and the initial membrane potential, each broadcastable to a sample.
    """
    last = is_channels_last(steps)
    sample, steps = steps.shape[2:], in_memory_order(steps, last)
    potentials, spikes = torch.empty_like(steps), torch.empty_like(steps)
    run = neurons_cpu.learning_steps_on_cpu if steps.device.type == "cpu" else neurons_gpu.learning_steps_on_gpu
    run(steps, each_neuron(Vthr, sample, last), each_neuron(start, sample, last), potentials, spikes, listen, subtract)
    return in_usual_order(potentials, last), in_usual_order(spikes, last)


def learning_steps_back(gradient, potentials, Vthr, listen, subtract):
    """The gradient with respect to the currents of `learning_steps`, from that with respect to its spikes.

    gradient, potentials and the result: float32 [T, B, ...].
    """
    last = is_channels_last(potentials)
    Vthr = each_neuron(Vthr, potentials.shape[2:], last)
    gradient, potentials = in_memory_order(gradient, last), in_memory_order(potentials, last)
    of_steps = torch.empty_like(gradient)
    run = (
        neurons_cpu.learning_steps_back_on_cpu
        if gradient.device.type == "cpu"
        else neurons_gpu.learning_steps_back_on_gpu
    )
    run(gradient, potentials, Vthr, of_steps, listen, subtract)
    return in_usual_order(of_steps, last)
