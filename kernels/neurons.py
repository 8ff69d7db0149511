"""All timesteps of integrate-and-fire neurons in one pass, forward and, where autograd follows, back through time."""

import torch

from kernels import neurons_cpu, neurons_gpu
from kernels.gpu import triton
from kernels.memory_order import each_neuron, in_memory_order, in_usual_order, is_channels_last, order


def can_run_compiled(tensor):
    """Whether compiled neurons can work on a tensor."""
    compiler = {"cpu": neurons_cpu.njit, "cuda": triton}.get(tensor.device.type)
    return compiler is not None


def if_steps(steps, constant, extra, Vthr, membrane, subtract, timesteps):
    """Spikes, uint8 [T*B, ...], of integrate-and-fire neurons; `membrane` [B, ...] float32 is changed in place.

    steps: currents [T*B, ...], float32 or on a GPU float16 or integers too, or None. constant: a current that is the
    same at every step, [B, ...] or None. extra: (spikes uint8 [T*B, ...], weight) that flow in too, or None. Vthr and
    weight are broadcastable to a sample. `membrane` is in the memory order that `order` says; the others are brought
    into it.
    """
    shape = (timesteps * len(membrane), *membrane.shape[1:])
    spikes = torch.empty(shape, dtype=torch.uint8, device=membrane.device, memory_format=order(membrane))
    run = neurons_cpu.if_steps_on_cpu if membrane.device.type == "cpu" else neurons_gpu.if_steps_on_gpu
    run(steps, constant, extra, Vthr, membrane, spikes, subtract, timesteps)
    return spikes


def learning_steps(steps, Vthr, start, listen, subtract):
    """Membrane potentials before the reset, and spikes, of integrate-and-fire neurons: float32 [T, B, ...].

    steps: their currents, float32 [T, B, ...], of which `listen` come before the first spike. Vthr, start: each
    broadcastable to a sample.
    """
    last = is_channels_last(steps)
    sample, steps = steps.shape[2:], in_memory_order(steps, last)
    potentials, spikes = torch.empty_like(steps), torch.empty_like(steps)
    run = neurons_cpu.learning_steps_on_cpu if steps.device.type == "cpu" else neurons_gpu.learning_steps_on_gpu
    run(steps, each_neuron(Vthr, sample, last), each_neuron(start, sample, last), potentials, spikes, listen, subtract)
    return in_usual_order(potentials, last), in_usual_order(spikes, last)


def learning_steps_back(gradient, potentials, Vthr, listen, subtract):
    """The gradient for the currents of `learning_steps`, [T, B, ...], from that for the spikes."""
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
