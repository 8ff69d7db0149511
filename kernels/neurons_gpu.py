"""Integrate-and-fire neurons on a GPU: all timesteps in one launch, compiled by Triton."""

from kernels.gpu import on_its_gpu, tl, triton
from kernels.memory_order import flat, per_neuron

if triton is not None:

    @triton.jit
    def run_neurons_on_gpu(
        current, extra, extra_weight, Vthr, membrane, spikes, timesteps, neurons, weight_period, Vthr_period,
        is_constant: tl.constexpr, has_extra: tl.constexpr, subtract: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        """Like `run_neurons`; each program computes `block` neurons, with their membrane potentials in registers."""
        i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = i < neurons
        u = tl.load(membrane + i, inside, 0.0)
        threshold = tl.load(Vthr + i % Vthr_period, inside, 1.0)
        if has_extra:
            weight = tl.load(extra_weight + i % weight_period, inside, 0.0)
        if is_constant:
            c = tl.load(current + i, inside, 0.0).to(tl.float32)
        at = i
        for _ in range(timesteps):
            if not is_constant:
                c = tl.load(current + at, inside, 0.0).to(tl.float32)
            if has_extra:
                c += tl.load(extra + at, inside, 0).to(tl.float32) * weight
            u += c
            fires = u >= threshold
            tl.store(spikes + at, fires.to(tl.uint8), inside)
            u = tl.where(fires, u - threshold if subtract else 0.0, u)
            at += neurons
        tl.store(membrane + i, u, inside)

    @triton.jit
    def run_learning_neurons_on_gpu(
        steps, Vthr, start, potentials, spikes, timesteps, neurons, period, listen, subtract: tl.constexpr,
        block: tl.constexpr,
    ):  # fmt: skip
        """Like `run_learning_neurons`, for `block` of the B * N neurons; Vthr and start repeat after `period`."""
        i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = i < neurons
        u = tl.load(start + i % period, inside, 0.0)
        threshold = tl.load(Vthr + i % period, inside, 1.0)
        read, write = i, i
        for _ in range(listen):
            u += tl.load(steps + read, inside, 0.0)
            read += neurons
        for t in range(timesteps):
            if t + listen < timesteps:
                u += tl.load(steps + read, inside, 0.0)
                read += neurons
            fires = u >= threshold
            tl.store(potentials + write, u, inside)
            tl.store(spikes + write, fires.to(tl.float32), inside)
            u = tl.where(fires, u - threshold if subtract else 0.0, u)
            write += neurons

    @triton.jit
    def run_learning_neurons_back_on_gpu(
        gradient, potentials, Vthr, of_steps, timesteps, neurons, period, listen, last, subtract: tl.constexpr,
        block: tl.constexpr,
    ):  # fmt: skip
        """Like `run_learning_neurons_back`, for `block` of the B * N neurons; last: first element of the last step."""
        i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = i < neurons
        V = tl.load(Vthr + i % period, inside, 1.0)
        m = tl.zeros((block,), tl.float32)
        read, write = i + last, i + last
        for t in range(timesteps):
            g, p = tl.load(gradient + read, inside, 0.0), tl.load(potentials + read, inside, 0.0)
            slope = tl.maximum(0.0, 1.0 - tl.abs(p / V - 1.0)) / V
            kept = m if subtract else tl.where(p >= V, 0.0, m)
            m = kept + slope * (g - (V if subtract else p) * m)
            read -= neurons
            if t >= listen:
                tl.store(of_steps + write, m, inside)
                write -= neurons
        for _ in range(listen):
            tl.store(of_steps + write, m, inside)
            write -= neurons


def if_steps_on_gpu(steps, constant, extra, Vthr, membrane, spikes, subtract, timesteps):
    """Fill `spikes` with the kernel compiled by Triton; arguments as for `neurons.if_steps`."""
    neurons, block = membrane.numel(), 512
    Vthr = per_neuron(Vthr, membrane)
    weight = Vthr if extra is None else per_neuron(extra[1], membrane)
    current = flat(steps, membrane, timesteps) if constant is None else flat(constant, membrane, 1)
    arguments = (
        current,
        current if extra is None else flat(extra[0], membrane, timesteps),
        weight,
        Vthr,
        flat(membrane, membrane, 1),
        flat(spikes, membrane, timesteps),
        timesteps,
        neurons,
        len(weight),
        len(Vthr),
    )
    kinds = {"is_constant": constant is not None, "has_extra": extra is not None, "subtract": subtract, "block": block}
    with on_its_gpu(membrane):
        run_neurons_on_gpu[(triton.cdiv(neurons, block),)](*arguments, **kinds)


def learning_steps_on_gpu(steps, Vthr, start, potentials, spikes, listen, subtract):
    """Fill `potentials` and `spikes` with the kernel compiled by Triton."""
    neurons, block = steps[0].numel(), 512
    with on_its_gpu(steps):
        run_learning_neurons_on_gpu[(triton.cdiv(neurons, block),)](
            steps, Vthr, start, potentials, spikes, len(steps), neurons, len(Vthr), listen, subtract, block
        )


def learning_steps_back_on_gpu(gradient, potentials, Vthr, of_steps, listen, subtract):
    """Fill `of_steps` with the kernel compiled by Triton."""
    neurons, block = gradient[0].numel(), 512
    last = gradient[:-1].numel()
    with on_its_gpu(gradient):
        run_learning_neurons_back_on_gpu[(triton.cdiv(neurons, block),)](
            gradient, potentials, Vthr, of_steps, len(gradient), neurons, len(Vthr), listen, last, subtract, block
        )
