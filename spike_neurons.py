"""Integrate-and-fire neurons, and the quantized activations that model them in the ANN."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

import spike_tensor
from kernels.currents import EXACT_IN_FLOAT32
from kernels.integer_state import IntegerState
from kernels.levels_cpu import round_back_on_cpu, round_on_cpu
from kernels.memory_order import order
from kernels.neurons import can_run_compiled, if_steps, learning_steps, learning_steps_back
from kernels.neurons_cpu import count_constant, count_whole
from spike_tensor import Current, Memory, SpikeTensor, note_firing_ratio

RESET_MODES = ("zero", "subtraction")


def if_step(membrane, current, Vthr, reset_mode):
    """One timestep of integrate-and-fire neurons: `membrane, spike`, both in the shape and type of `membrane`.

    A neuron fires if its membrane potential u is at least Vthr. Then "subtraction" subtracts Vthr from u, and "zero"
    sets u to 0.
    """
    membrane = membrane + current
    fires = membrane >= Vthr
    spike = fires.to(membrane.dtype)
    if reset_mode == "subtraction":
        return membrane - Vthr * spike, spike
    return membrane.masked_fill(fires, 0), spike


class SpikesThroughTime(torch.autograd.Function):
    """The spikes of integrate-and-fire neurons, [T, B, ...], from their currents, with a surrogate gradient.

    steps: currents of T steps, [T, B, ...]; the first spike comes after `listen` of them. The gradient of a
    spike is a triangle of area 1 over the membrane potential, from u = 0 over Vthr to 2 Vthr (piecewise linear; Bellec
    et al., Long Short-Term Memory and Learning-to-Learn in Networks of Spiking Neurons, NeurIPS 2018); it passes
    through the reset too. The initial potential has the gradient of the first step's current.
    """

    @staticmethod
    def forward(ctx, steps, Vthr, initial_potential, reset_mode, listen):
        run = learning_steps if learns_compiled(steps) else learning_steps_in_turn
        potentials, spikes = run(steps, Vthr, initial_potential, listen, reset_mode == "subtraction")
        ctx.save_for_backward(potentials, Vthr)
        ctx.reset_mode, ctx.listen, ctx.start_shape = reset_mode, listen, initial_potential.shape
        return spikes

    @staticmethod
    def backward(ctx, gradient):
        potentials, Vthr = ctx.saved_tensors
        run = learning_steps_back if learns_compiled(potentials) else learning_steps_back_in_turn
        of_steps = run(gradient, potentials, Vthr, ctx.listen, ctx.reset_mode == "subtraction")
        of_start = of_steps[0].sum(0).sum_to_size(ctx.start_shape) if ctx.needs_input_grad[2] else None
        return of_steps, None, of_start, None, None


def learns_compiled(steps):
    """Whether the compiled `learning_steps` can take these currents: float32, on a device with a compiler."""
    return steps.dtype == torch.float32 and can_run_compiled(steps)


def learning_steps_in_turn(steps, Vthr, start, listen, subtract):
    """As `learning_steps`, in plain PyTorch, for any floating-point type."""
    potentials, spikes = torch.empty_like(steps), torch.empty_like(steps)
    membrane = start + steps[:listen].sum(0)
    for t, (potential, spike) in enumerate(zip(potentials, spikes)):
        if t + listen < len(steps):
            membrane = membrane + steps[t + listen]
        potential.copy_(membrane)
        spike.copy_(potential >= Vthr)
        membrane = membrane - Vthr * spike if subtract else membrane * (1 - spike)
    return potentials, spikes


def learning_steps_back_in_turn(gradient, potentials, Vthr, listen, subtract):
    """As `learning_steps_back`, in plain PyTorch, for any floating-point type."""
    of_steps, of_membrane = torch.empty_like(potentials), torch.zeros_like(potentials[0])
    of_spike = (potentials / Vthr).sub_(1).abs_().neg_().add_(1).clamp_min_(0).div_(Vthr)  # [T, B, ...]
    for t in reversed(range(len(potentials))):
        kept = of_membrane if subtract else of_membrane * (potentials[t] < Vthr)
        reset = Vthr if subtract else potentials[t]
        of_membrane = kept + of_spike[t] * (gradient[t] - reset * of_membrane)
        if t + listen < len(potentials):
            of_steps[t + listen] = of_membrane
    of_steps[:listen] = of_membrane
    return of_steps


class IFNeuron(nn.Module):
    """Integrate-and-fire neurons of one layer.

    Vthr: threshold, an integer unless the currents are floats (behind the image, or with float weights).
    scale_factor: lambda, the activation that a spike at every step stands for. initial_potential: membrane potential
    before the first step. Each is a scalar or [C, 1, 1] ([N] behind a linear layer).
    reset_mode: "zero" or "subtraction"; ValueError for others. largest_current: bound of |current| per step, None for
    float currents.
    listen: number of steps that are integrated before the first spike. The T steps of spikes come that much later. At
    listen = T the whole input is known before the first spike, and the neuron sends floor(u / Vthr) spikes, 0 to T.
    window: number of steps in which it may fire, from its first on; afterwards it stays silent. None for all T.
    learns: autograd follows the spikes (`finetuning.on_spikes.learning`).
    start_share: the initial potential in Vthr while it is learnt, with a gradient; else None.
    spike_type: uint8, so that the layers behind compute float32 currents, or float64 for the reference engine.
    """

    def __init__(
        self,
        Vthr,
        scale_factor,
        initial_potential,
        reset_mode,
        largest_current=None,
        spike_type=torch.uint8,
        listen=0,
        window=None,
    ):
        super().__init__()
        if reset_mode not in RESET_MODES:
            raise ValueError(f"unknown reset mode '{reset_mode}', use one of {', '.join(RESET_MODES)}")
        self.register_buffer("Vthr", torch.as_tensor(Vthr))
        self.register_buffer("scale_factor", torch.as_tensor(scale_factor))
        self.register_buffer("initial_potential", torch.as_tensor(initial_potential))
        self.reset_mode = reset_mode
        self.largest_current = largest_current
        self.spike_type = spike_type
        self.listen = listen
        self.window = window
        self.learns = False
        self.start_share = None
        self.state = None

    def config(self):
        """The constructor's arguments, as a dict."""
        tensors = ("Vthr", "scale_factor", "initial_potential")
        settings = ("reset_mode", "largest_current", "spike_type", "listen", "window")
        return {name: getattr(self, name) for name in tensors + settings}

    def most_spikes(self, timesteps):
        """The number of steps in which a neuron may fire in a simulation of T steps."""
        return timesteps if self.window is None else min(self.window, timesteps)

    def membrane_type(self, timesteps):
        """float32 if it represents every membrane potential within `timesteps` steps exactly, else float64.

        Always float32 for float currents; otherwise always float64 in the reference engine.
        """
        if self.largest_current is None:
            return torch.float32
        if self.spike_type == torch.float64:
            return torch.float64
        state = self.state  # several simulating threads may set it
        if state is None or not state.holds(self.Vthr, self.initial_potential):
            # kept in `state`: item() makes the CPU wait for the GPU
            largest = self.Vthr.max().item() + self.initial_potential.abs().max().item()
            state = self.state = IntegerState(largest, self.Vthr, self.initial_potential)
        largest = self.largest_current * timesteps + state.made
        return torch.float32 if largest < EXACT_IN_FLOAT32 else torch.float64

    def forward(self, current, memory=None):
        """Current of some steps -> SpikeTensor of the same steps, [steps*B, ...].

        `memory` keeps the membrane potentials for the following steps.
        """
        memory = Memory(current.timesteps) if memory is None else memory
        if memory.counting is not None:
            return self.count(current, memory)
        dtype = self.membrane_type(memory.timesteps)
        if self.learns:
            return SpikeTensor.like(self.unroll(current, dtype), current.timesteps, self.scale_factor)
        membrane = memory.by_layer.get(self)
        if membrane is None:
            membrane = potentials_before(current, self.initial_potential.to(dtype))
        if fires_with_convolution(self, current, membrane):
            return fire_with_convolution(self, current, membrane, memory)
        exact_in_float32 = dtype == torch.float32 and current.data.dtype != torch.float64
        compiled = self.spike_type == torch.uint8 and exact_in_float32 and can_run_compiled(current.data)
        sent = []
        for part in self.hear(current, membrane) if self.listen else [current]:
            spikes, membrane, fired = (self.run_compiled if compiled else self.run)(part, membrane)
            sent.append(spikes)
        memory.by_layer[self] = membrane
        fired = None if self.listen or self.window is not None else fired  # `fired` holds all spikes of one part
        spikes = torch.cat(sent) if len(sent) > 1 else spikes
        if self.window is not None:
            spikes.unflatten(0, (current.timesteps, -1))[self.window :] = 0
        return SpikeTensor(spikes, current.timesteps, self.scale_factor, fired)  # [T*B, ...]

    def counts_suffice(self, timesteps):
        """Whether `count` gives the spikes of a simulation, if all input has arrived within `timesteps` steps."""
        listens = self.listen >= timesteps and self.reset_mode == "subtraction"
        return listens and self.spike_type == torch.uint8 and not self.learns

    def count(self, current, memory):
        """The number of spikes in all T steps, a SpikeTensor of one step, for neurons that hear all before they fire.

        They know the sum of their currents before the first spike, so that they send clip(floor(u / Vthr), 0, T)
        spikes, or as many as their window takes, without a gap. current: that of the sum of all steps' spikes, with the
        biases of one step, or the same at every step (`constant`).
        """
        counting, timesteps = memory.counting, memory.timesteps
        total = current.total().to(counting.dtype)  # [B, ...]
        if counting.measures:
            counting.at_rest[self], counts, fired = total, torch.zeros_like(total), 0
        elif current.constant:
            counts, fired = count_in_turn(self, current.data, timesteps, counting.counts_type), None
        else:
            at_rest = (timesteps - 1) * counting.at_rest[self] + self.initial_potential
            counts, fired = count_at_once(self, total, at_rest, self.most_spikes(timesteps), counting.counts_type)
        if spike_tensor.firing_ratio_record:
            fired = counts.sum(dtype=torch.float64).item() if fired is None else fired
            note_firing_ratio(fired, counts.numel() * timesteps)
        return SpikeTensor.like(counts, 1, self.scale_factor)

    def hear(self, current, membrane):
        """Add the first `listen` steps to `membrane`, and return the currents of the T steps in which neurons fire.

        These are the remaining steps, followed by zeros. The zeros are one constant current, which takes little memory.
        """
        steps = current.per_step()  # [T, B, ...]
        for step in steps[: self.listen]:
            membrane += step
        rest = steps[self.listen :]
        silence = Current(torch.zeros_like(steps[0]), len(steps) - len(rest), constant=True)
        return [Current(rest.flatten(0, 1), len(rest)), silence] if len(rest) else [silence]

    def unroll(self, current, dtype):
        """The spikes of all steps, float32 [T*B, ...], computed so that autograd can follow them through time."""
        steps, Vthr, initial = (x.to(dtype) for x in (current.per_step(), self.Vthr, self.learnt_potential()))
        spikes = SpikesThroughTime.apply(steps, Vthr, initial, self.reset_mode, self.listen)  # [T, B, ...]
        if self.window is not None:
            spikes = torch.cat([spikes[: self.window], torch.zeros_like(spikes[self.window :])])
        return spikes.flatten(0, 1).to(torch.float32)

    def learn_start(self):
        """Let training change the initial potential from now on. Returns `start_share`, the parameter to train."""
        self.start_share = (self.initial_potential / self.Vthr).float().detach().requires_grad_()
        return self.start_share

    @torch.no_grad()
    def set_start(self):
        """Set the initial potential that `start_share` stands for, an integer if it was one."""
        if self.start_share is not None:
            self.initial_potential = self.learnt_potential().to(self.initial_potential.dtype)

    def learnt_potential(self):
        """The initial potential; while it is learnt, the nearest allowed one to `start_share`, with its gradient."""
        if self.start_share is None:
            return self.initial_potential
        potential = self.start_share * self.Vthr
        if self.initial_potential.is_floating_point():
            return potential
        return potential + (potential.round() - potential).detach()

    def run(self, current, membrane):
        """`spikes, membrane, fired`: spikes [T*B, ...], the final membrane potentials [B, ...], and None.

        It computes step by step in plain PyTorch, and does not count the spikes.
        """
        steps, Vthr = current.per_step(), self.Vthr.to(membrane.dtype)  # [T, B, ...]
        spikes = torch.empty(steps.shape, dtype=self.spike_type, device=steps.device)
        for t, step in enumerate(steps):
            membrane, spikes[t] = if_step(membrane, step.to(membrane.dtype), Vthr, self.reset_mode)
        return spikes.flatten(0, 1), membrane, None

    def run_compiled(self, current, membrane):
        """As `run`, by a compiled kernel, which changes `membrane` in place and, on a CPU, counts the spikes."""
        steps, constant = (None, current.data) if current.constant else (current.data, None)
        subtract = self.reset_mode == "subtraction"
        spikes, fired = if_steps(steps, constant, current.spikes, self.Vthr, membrane, subtract, current.timesteps)
        return spikes, membrane, fired

    def extra_repr(self):
        threshold = f"{self.Vthr:g}" if self.Vthr.numel() == 1 else f"{self.Vthr.min():g}..{self.Vthr.max():g}"
        return f"Vthr={threshold}, reset_mode={self.reset_mode}"


def count_in_turn(neuron, current, timesteps, dtype):
    """The spike counts, `dtype` [B, ...], of a float current [B, ...] that is the same at every step.

    It adds and subtracts in the order of the steps, because sums of floats depend on it.
    """
    window = neuron.most_spikes(timesteps)
    if learns_compiled(current):
        return count_constant(current, neuron.initial_potential, neuron.Vthr, timesteps, window, dtype)
    membrane, counts = neuron.initial_potential.to(torch.float32).expand_as(current), torch.zeros_like(current)
    for _ in range(timesteps):
        membrane = membrane + current
    for _ in range(window):
        membrane, spike = if_step(membrane, torch.zeros((), device=current.device), neuron.Vthr, neuron.reset_mode)
        counts += spike
    return counts.to(dtype)


def count_at_once(neuron, total, at_rest, window, dtype):
    """`counts, fired`: the spike counts, `dtype` [B, ...], and their sum, or None where it is not known.

    total: the sum of all currents [B, ...] but for `at_rest`, broadcastable to it. All are whole numbers, below 2^24 in
    float32 and below 2^53 in float64, so that no quotient reaches the next whole number by rounding.
    """
    if learns_compiled(total) and at_rest.shape[0] == 1:
        return count_whole(total, at_rest[0], neuron.Vthr, window, dtype)
    return ((total + at_rest) / neuron.Vthr).floor_().clamp_(0, window).to(dtype), None


def potentials_before(current, initial_potential):
    """The membrane potentials [B, ...] before the first step of a current, in the type of `initial_potential`."""
    shape = current.data.shape if current.pending is None else current.pending.shape
    batch = shape[0] // (1 if current.constant else current.timesteps)
    membrane = initial_potential.expand(batch, *shape[1:])
    return torch.empty_like(membrane, memory_format=order(membrane)).copy_(membrane)


def fires_with_convolution(neuron, current, membrane):
    """Whether the convolution that is to compute `current` can compute the spikes at once: all are integers."""
    if current.pending is None or neuron.listen or neuron.window is not None or neuron.spike_type != torch.uint8:
        return False
    whole = neuron.largest_current is not None and not neuron.initial_potential.is_floating_point()
    return whole and current.pending.fits(current.spikes, neuron.Vthr, membrane)


def fire_with_convolution(neuron, current, membrane, memory):
    """As `IFNeuron.forward`, by a kernel that computes the pending convolution and the spikes in one pass."""
    subtract, steps = neuron.reset_mode == "subtraction", current.timesteps
    spikes, fired = current.pending.fire(current.spikes, neuron.Vthr, membrane, subtract, steps)
    memory.by_layer[neuron] = membrane
    return SpikeTensor(spikes, steps, neuron.scale_factor, fired)


class ClipFloorShift(nn.Module):
    """Quantized activations: scale / levels * clip(floor(x levels / scale + 1/2), 0, levels).

    These are the activations that spikes can express in T = `levels` timesteps. The function is clip-floor-shift (Bu et
    al., ICLR 2022) with a learnt scale, lambda, a scalar or one per channel. The gradient of x ignores the floor. The
    gradient of the scale is that of LSQ (Esser et al., Learned Step Size Quantization, ICLR 2020), divided by
    sqrt(neurons * levels) because all neurons with this scale contribute to it.
    """

    def __init__(self, levels, scale):
        super().__init__()
        self.levels = levels
        self.scale = nn.Parameter(scale)

    def forward(self, x):
        return RoundToLevels.apply(x, self.scale, self.levels)

    def extra_repr(self):
        return f"levels={self.levels}"


class RoundToLevels(torch.autograd.Function):
    """The function of `ClipFloorShift`, with its gradients for x and scale."""

    @staticmethod
    def forward(ctx, x, scale, levels):
        size = scale.abs().clamp_min(1e-6)  # no division by 0 while it is learnt
        ctx.save_for_backward(x, scale, size)
        ctx.levels, ctx.share = levels, (x[0].numel() / scale.numel() * levels) ** -0.5
        return round_on_cpu(x, size, levels) if rounds_compiled(x, size) else round_in_turn(x, size, levels)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x, scale, size), levels = ctx.saved_tensors, ctx.levels
        back = round_back_on_cpu if rounds_compiled(x, size) else round_back_in_turn
        of_x, of_size = back(x, gradient, size, levels)
        return of_x, of_size * (ctx.share / levels) * scale.sign(), None


def rounds_compiled(x, size):
    """Whether the compiled kernels can round activations [B, ...]: float32 on a CPU, one size, or one per channel."""
    per_channel = (x.shape[1], *[1] * (x.dim() - 2)) if x.dim() in (2, 4) else None
    fits = size.numel() == 1 or tuple(size.shape) == per_channel
    return fits and x.device.type == "cpu" and x.dtype == size.dtype == torch.float32 and can_run_compiled(x)


def round_in_turn(x, size, levels):
    """Activations rounded to `levels` steps from 0 to `size`, in plain PyTorch."""
    return ((x / size).clamp_(0, 1).mul_(levels) + 0.5).floor_().mul_(size / levels)


def round_back_in_turn(x, gradient, size, levels):
    """`of_x, of_size`: the gradients of `round_in_turn`; that of size lacks the factors that all neurons share."""
    steps = (x / size).clamp_(0, 1).mul_(levels)
    inside = (steps > 0) & (steps < levels)
    of_size = (steps + 0.5).floor_().sub_(steps).mul_(inside).add_(steps >= levels, alpha=levels)
    return gradient * inside, of_size.mul_(gradient).sum_to_size(size.shape)
