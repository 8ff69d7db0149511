"""Fast ways to compute what a spiking layer computes, each exact; chosen by what the machine has.

    if_steps             all timesteps of integrate-and-fire neurons in one pass, by numba (CPU) or Triton (GPU)
    learning_steps       the same where autograd follows, and back through time
    Int8Weights          CPU: convolutions and linear layers of spikes with 8-bit weights, by oneDNN in integers
    GpuWeights           GPU: convolutions of spikes with integer weights, by Triton in integers
    exact_type           GPU, other layers: the narrowest floating-point type in which currents are exact, tried out

Where one of them is missing, `spike_layers` computes the same with plain PyTorch.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch

try:
    from numba import njit
except ImportError:  # optional: without it the neurons run in plain PyTorch
    njit = None

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with PyTorch's builds for GPUs
    triton = None

CHUNK = 1024  # neurons whose membrane potentials stay in the L1 cache over all timesteps


def compiled(function):
    """Compile for the CPU without the interpreter's lock; on disk, too, where that can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba has nowhere to keep the compiled code
        return njit(nogil=True)(function)


if njit is not None:

    @compiled
    def run_neurons(current, constant, extra, extra_weight, Vthr, membrane, spikes, subtract):
        """Integrate and fire: spikes[t, i] = u_i >= Vthr, then u_i -= Vthr or u_i = 0.

        The current of neuron i at step t is constant[i], or current[t, i] + extra[t, i] * extra_weight; what has no
        elements is left out. Vthr and extra_weight repeat over the neurons. membrane, [N], is read and written.
        """
        timesteps, neurons = spikes.shape
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

    @compiled
    def run_learning_neurons(first, stop, steps, Vthr, start, potentials, spikes, listen, subtract):
        """Fill potentials, before the reset, and spikes, float32 [T, B, N] as steps, of samples `first` to `stop` - 1.

        Vthr, start: [N].
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
        """The triangle that stands for the derivative of a spike (`spike_layers.SpikesThroughTime`)."""
        away = potential / Vthr - np.float32(1)
        slope = np.float32(1) - (away if away > np.float32(0) else -away)  # branches vectorise, max and abs do not
        return (slope if slope > np.float32(0) else np.float32(0)) / Vthr

    @compiled
    def run_learning_neurons_back(first, stop, gradient, potentials, Vthr, of_steps, listen, subtract):
        """Fill of_steps, what `gradient` of the spikes is for the currents, with a triangle for that of a spike."""
        timesteps, _, neurons = gradient.shape
        for b in range(first, stop):
            m = np.zeros(neurons, np.float32)  # the gradient for the membrane potential
            for t in range(timesteps - 1, -1, -1):
                g, p = gradient[t, b], potentials[t, b]
                c = of_steps[min(t + listen, timesteps - 1), b]  # what is written there too early is overwritten
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


if triton is not None:

    @triton.jit
    def run_neurons_on_gpu(
        current,
        extra,
        extra_weight,
        Vthr,
        membrane,
        spikes,
        timesteps,
        neurons,
        weight_period,
        Vthr_period,
        is_constant: tl.constexpr,
        has_extra: tl.constexpr,
        subtract: tl.constexpr,
        block: tl.constexpr,
    ):
        """As `run_neurons`: each program has `block` neurons, whose membrane potentials stay in registers."""
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
        steps,
        Vthr,
        start,
        potentials,
        spikes,
        timesteps,
        neurons,
        period,
        listen,
        subtract: tl.constexpr,
        block: tl.constexpr,
    ):
        """As `run_learning_neurons`, for `block` of B * N neurons; Vthr and start repeat after `period` of them."""
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
        gradient,
        potentials,
        Vthr,
        of_steps,
        timesteps,
        neurons,
        period,
        listen,
        last,
        subtract: tl.constexpr,
        block: tl.constexpr,
    ):
        """As `run_learning_neurons_back`, for `block` of B * N neurons; `last` is where the last step begins."""
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

    @triton.jit
    def window_of(pixel, H, W, C, out_H, out_W, stride_h, stride_w, pad_h, pad_w):
        """Where the window of an output pixel begins in the inputs [N, H, W, C]: its first element, row and column."""
        image = pixel // (out_H * out_W)
        top = (pixel // out_W % out_H).to(tl.int32) * stride_h - pad_h
        left = (pixel % out_W).to(tl.int32) * stride_w - pad_w
        return ((image * H + top) * W + left) * C, top, left

    @triton.jit
    def convolve_integers(
        inputs,
        weight,
        bias,
        currents,
        pixels,
        H,
        W,
        C: tl.constexpr,
        out_H,
        out_W,
        out_C: tl.constexpr,
        stride_h,
        stride_w,
        pad_h,
        pad_w,
        dilation_h,
        dilation_w,
        kernel_w: tl.constexpr,
        taps: tl.constexpr,
        has_bias: tl.constexpr,
        block_pixels: tl.constexpr,
        block_out: tl.constexpr,
        block_in: tl.constexpr,
    ):
        """currents [N, out_H, out_W, out_C] of inputs [N, H, W, C], 0 to 127, and int8 weights [taps * C, out_C].

        Each program has `block_pixels` of the N * out_H * out_W pixels, and `block_out` channels.
        """
        pixel = tl.program_id(0).to(tl.int64) * block_pixels + tl.arange(0, block_pixels)
        out_channel = tl.program_id(1) * block_out + tl.arange(0, block_out)
        in_channel = tl.arange(0, block_in)
        inside = pixel < pixels
        corner, top, left = window_of(pixel, H, W, C, out_H, out_W, stride_h, stride_w, pad_h, pad_w)
        total = tl.zeros((block_pixels, block_out), tl.int32)
        for tap in range(taps):
            down, right = tap // kernel_w * dilation_h, tap % kernel_w * dilation_w
            row, column = top + down, left + right
            is_in_image = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            at = corner + (down * W + right) * C
            for first in tl.static_range(0, C, block_in):
                channel = first + in_channel
                read = is_in_image[:, None] & (channel < C)[None, :]
                x = tl.load(inputs + at[:, None] + channel[None, :], read, 0).to(tl.int8)
                read = (channel < C)[:, None] & (out_channel < out_C)[None, :]
                w = tl.load(weight + (tap * C + channel)[:, None] * out_C + out_channel[None, :], read, 0)
                total = tl.dot(x, w, total, out_dtype=tl.int32)
        if has_bias:
            total += tl.load(bias + out_channel, out_channel < out_C, 0)[None, :]
        write = inside[:, None] & (out_channel < out_C)[None, :]
        at = pixel[:, None] * out_C + out_channel[None, :]
        tl.store(currents + at, total.to(currents.dtype.element_ty), write)

    @triton.jit
    def convolve_each_channel(
        inputs,
        weight,
        bias,
        currents,
        elements,
        H,
        W,
        C,
        out_H,
        out_W,
        stride_h,
        stride_w,
        pad_h,
        pad_w,
        dilation_h,
        dilation_w,
        kernel_w: tl.constexpr,
        taps: tl.constexpr,
        has_bias: tl.constexpr,
        block: tl.constexpr,
    ):
        """As `convolve_integers` with int8 weights [taps, C], of every channel alone: `block` elements a program."""
        i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = i < elements
        channel, pixel = (i % C).to(tl.int32), i // C
        corner, top, left = window_of(pixel, H, W, C, out_H, out_W, stride_h, stride_w, pad_h, pad_w)
        corner += channel
        total = tl.zeros((block,), tl.int32)
        if has_bias:
            total += tl.load(bias + channel, inside, 0)
        for tap in tl.static_range(taps):
            down, right = tap // kernel_w * dilation_h, tap % kernel_w * dilation_w
            row, column = top + down, left + right
            read = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            x = tl.load(inputs + corner + (down * W + right) * C, read, 0).to(tl.int32)
            total += x * tl.load(weight + tap * C + channel, inside, 0).to(tl.int32)
        tl.store(currents + i, total.to(currents.dtype.element_ty), inside)


def can_run_compiled(tensor):
    """Whether compiled neurons can work on a tensor."""
    compiler = {"cpu": njit, "cuda": triton}.get(tensor.device.type)
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
    run = if_steps_on_cpu if membrane.device.type == "cpu" else if_steps_on_gpu
    run(steps, constant, extra, Vthr, membrane, spikes, subtract, timesteps)
    return spikes


def if_steps_on_cpu(steps, constant, extra, Vthr, membrane, spikes, subtract, timesteps):
    """Fill `spikes` by the kernel that numba compiles."""
    empty = torch.empty(0)
    Vthr = per_neuron(Vthr, membrane)
    weight = Vthr if extra is None else per_neuron(extra[1], membrane)
    period = math.lcm(len(Vthr), len(weight))
    chunk = period * -(-CHUNK // period)  # neurons after which both begin anew
    run_neurons(
        flat(empty if steps is None else steps, membrane, timesteps).numpy(),
        empty.numpy() if constant is None else flat(constant, membrane, 1)[0].numpy(),
        flat(empty.to(torch.uint8) if extra is None else extra[0], membrane, timesteps).numpy(),
        weight.repeat(chunk // len(weight)).numpy(),
        Vthr.repeat(chunk // len(Vthr)).numpy(),
        flat(membrane, membrane, 1)[0].numpy(),
        flat(spikes, membrane, timesteps).numpy(),
        subtract,
    )


def if_steps_on_gpu(steps, constant, extra, Vthr, membrane, spikes, subtract, timesteps):
    """Fill `spikes` by the kernel that Triton compiles."""
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


def learning_steps(steps, Vthr, start, listen, subtract):
    """Membrane potentials before the reset, and spikes, of integrate-and-fire neurons: float32 [T, B, ...].

    steps: their currents, float32 [T, B, ...], of which `listen` come before the first spike. Vthr, start: each
    broadcastable to a sample.
    """
    last = is_channels_last(steps)
    sample, steps = steps.shape[2:], in_memory_order(steps, last)
    potentials, spikes = torch.empty_like(steps), torch.empty_like(steps)
    run = learning_steps_on_cpu if steps.device.type == "cpu" else learning_steps_on_gpu
    run(steps, each_neuron(Vthr, sample, last), each_neuron(start, sample, last), potentials, spikes, listen, subtract)
    return in_usual_order(potentials, last), in_usual_order(spikes, last)


def learning_steps_on_cpu(steps, Vthr, start, potentials, spikes, listen, subtract):
    """Fill `potentials` and `spikes` by the kernel that numba compiles."""
    share_samples(run_learning_neurons, (steps, Vthr, start, potentials, spikes), listen, subtract)


def learning_steps_on_gpu(steps, Vthr, start, potentials, spikes, listen, subtract):
    """Fill `potentials` and `spikes` by the kernel that Triton compiles."""
    neurons, block = steps[0].numel(), 512
    with on_its_gpu(steps):
        run_learning_neurons_on_gpu[(triton.cdiv(neurons, block),)](
            steps, Vthr, start, potentials, spikes, len(steps), neurons, len(Vthr), listen, subtract, block
        )


def learning_steps_back(gradient, potentials, Vthr, listen, subtract):
    """The gradient for the currents of `learning_steps`, [T, B, ...], from that for the spikes."""
    last = is_channels_last(potentials)
    Vthr = each_neuron(Vthr, potentials.shape[2:], last)
    gradient, potentials = in_memory_order(gradient, last), in_memory_order(potentials, last)
    of_steps = torch.empty_like(gradient)
    run = learning_steps_back_on_cpu if gradient.device.type == "cpu" else learning_steps_back_on_gpu
    run(gradient, potentials, Vthr, of_steps, listen, subtract)
    return in_usual_order(of_steps, last)


def learning_steps_back_on_cpu(gradient, potentials, Vthr, of_steps, listen, subtract):
    """Fill `of_steps` by the kernel that numba compiles."""
    share_samples(run_learning_neurons_back, (gradient, potentials, Vthr, of_steps), listen, subtract)


def learning_steps_back_on_gpu(gradient, potentials, Vthr, of_steps, listen, subtract):
    """Fill `of_steps` by the kernel that Triton compiles."""
    neurons, block = gradient[0].numel(), 512
    last = gradient[:-1].numel()
    with on_its_gpu(gradient):
        run_learning_neurons_back_on_gpu[(triton.cdiv(neurons, block),)](
            gradient, potentials, Vthr, of_steps, len(gradient), neurons, len(Vthr), listen, last, subtract, block
        )


def is_channels_last(steps):
    """Whether steps [T, B, C, H, W] lie in memory as [T, B, H, W, C]."""
    return steps.dim() == 5 and steps[0].is_contiguous(memory_format=torch.channels_last)


def in_memory_order(steps, last):
    """Steps [T, B, ...], or with channels `last` [T, B, H, W, C], without gaps."""
    return (steps.movedim(2, -1) if last else steps).contiguous()


def in_usual_order(steps, last):
    """The inverse of `in_memory_order`, without a copy."""
    return steps.movedim(-1, 2) if last else steps


def each_neuron(values, sample, last):
    """Values broadcastable to a sample's shape, as one for every neuron in memory order: float32 [N]."""
    values = values.to(torch.float32).expand(sample)
    return (values.movedim(0, -1) if last else values).flatten().contiguous()


def share_samples(kernel, tensors, listen, subtract):
    """Run a learning kernel on tensors [T, B, ...] and [N]: every thread has some of the samples."""
    samples = tensors[0].shape[1]
    arrays = [tensor.flatten(2).numpy() if tensor.dim() > 1 else tensor.numpy() for tensor in tensors]
    threads = min(torch.get_num_threads(), samples)
    bounds = [samples * n // threads for n in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda first, stop: kernel(first, stop, *arrays, listen, subtract), bounds, bounds[1:]))


def on_its_gpu(tensor):
    """A context in which Triton launches on the GPU of a tensor, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def order(tensor):
    """Channels last where there are channels and space."""
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def flat(tensor, like, steps):
    """A tensor as [steps, N], in the memory order of `like`; no copy where it is in that order."""
    if not tensor.numel():
        return tensor.reshape(0, 0)
    tensor = tensor.contiguous(memory_format=order(like))
    if like.dim() == 4:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(steps, -1)


def per_neuron(values, like):
    """Values broadcastable to a sample of `like`, as float32 in memory order; they repeat over the neurons."""
    values, shape = values.to(like.device, torch.float32), like.shape[1:]
    is_per_channel = values.dim() == len(shape) == 3 and values.numel() == len(values)
    if values.numel() > 1 and not is_per_channel:
        values = values.expand(shape)
        values = values.permute(1, 2, 0) if values.dim() == 3 else values
    return values.flatten().contiguous()


def convolves_on_gpu(largest, device):
    """Whether `GpuWeights` can be used for inputs of 0 to `largest`: on GPUs that Triton compiles int8 products for."""
    return triton is not None and largest <= 127 and torch.cuda.get_device_capability(device) >= (8, 0)


class GpuWeights:
    """The integer weights of a convolution for Triton: uint8 spikes in, exact integers out.

    conv: (stride, padding, dilation, groups), of which groups are 1, or C_in = C_out. largest: bound of |current|.
    """

    def __init__(self, weight_q, bias_q, conv, largest):
        self.channels, self.inputs, *self.kernel = weight_q.shape
        self.weight = weight_q.permute(2, 3, 1, 0).contiguous()  # [kh, kw, C_in or 1, C_out]
        self.bias = bias_q
        self.stride, self.padding, self.dilation, groups = conv
        self.each_alone = groups > 1
        self.type = torch.int16 if largest < 2**15 else torch.int32

    def __call__(self, spikes):
        """Currents [N, C_out, H', W'], channels last, of uint8 spikes [N, C_in, H, W]."""
        spikes = spikes.contiguous(memory_format=torch.channels_last)
        size, out_size = spikes.shape[2:], self.output_size(spikes.shape[2:])
        currents = torch.empty(
            (len(spikes), self.channels, *out_size),
            dtype=self.type,
            device=spikes.device,
            memory_format=torch.channels_last,
        )
        bias = self.weight if self.bias is None else self.bias  # the former is not read
        tensors, geometry = (spikes, self.weight, bias, currents), (*self.stride, *self.padding, *self.dilation)
        kinds = {"kernel_w": self.kernel[1], "taps": math.prod(self.kernel), "has_bias": self.bias is not None}
        with on_its_gpu(spikes):
            if self.each_alone:
                grid, sizes = (triton.cdiv(currents.numel(), 1024),), (*size, self.channels, *out_size)
                convolve_each_channel[grid](*tensors, currents.numel(), *sizes, *geometry, **kinds, block=1024)
            else:
                pixels, sizes = len(spikes) * math.prod(out_size), (*size, self.inputs, *out_size, self.channels)
                blocks = self.blocks()
                grid = triton.cdiv(pixels, blocks["block_pixels"]), triton.cdiv(self.channels, blocks["block_out"])
                convolve_integers[grid](*tensors, pixels, *sizes, *geometry, **kinds, **blocks)
        return currents

    def output_size(self, size):
        """H', W'."""
        extents = zip(size, self.padding, self.dilation, self.kernel, self.stride)
        return [
            (x + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for x, padding, dilation, kernel, stride in extents
        ]

    def blocks(self):
        """What one program computes, the fastest of those tried on an H200."""
        block_out = min(64, max(16, triton.next_power_of_2(self.channels)))
        if self.inputs > 32 and block_out == 64:
            return {"block_pixels": 256, "block_out": 64, "block_in": 64, "num_warps": 8}
        return {"block_pixels": 128, "block_out": block_out, "block_in": 32, "num_warps": 4}


class Int8Weights:
    """The integer weights of a convolution or linear layer, packed for oneDNN: uint8 spikes in, exact float32 out."""

    def __init__(self, weight_q, bias_q, conv=None):
        channels = len(weight_q)
        self.conv = conv  # (stride, padding, dilation, groups), None for a linear layer
        self.scale, self.zero = torch.ones(channels), torch.zeros(channels, dtype=torch.int64)
        self.bias = None if bias_q is None else bias_q.to(torch.float32)
        onednn = torch.ops.onednn
        if conv is None:
            self.packed = onednn.qlinear_prepack(weight_q.contiguous(), None)
        else:
            self.packed = onednn.qconv_prepack(weight_q.contiguous(), self.scale, 1.0, 0, *conv)

    def __call__(self, spikes):
        """Currents of uint8 spikes."""
        weights = (self.packed, self.scale, self.zero, self.bias)
        if self.conv is None:
            tail = (1.0, 0, torch.float32, "none", [], "")
            return torch.ops.onednn.qlinear_pointwise(spikes, 1.0, 0, *weights, *tail)
        tail = (1.0, 0, torch.float32, "none", [], "")
        spikes = spikes.contiguous(memory_format=torch.channels_last)
        return torch.ops.onednn.qconv2d_pointwise(spikes, 1.0, 0, *weights, *self.conv, *tail)


@functools.cache
def int8_is_exact(largest=1):
    """Whether this machine's int8 operators exist and are exact for inputs of 0 to `largest`, tried out once.

    Without VNNI a processor may add products in pairs of 16 bits, which the largest inputs and weights overflow: so
    these are tried beside random ones.
    """
    generator = torch.Generator().manual_seed(0)
    spikes = torch.randint(0, largest + 1, (3, 32, 9, 9), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (16, 32, 3, 3), generator=generator, dtype=torch.int8)
    extremes = torch.full_like(spikes, largest), torch.full_like(weight, 127)
    return all(int8_gives_exact(*tried) for tried in ((spikes, weight), extremes))


def int8_gives_exact(spikes, weight):
    """Whether int8 operators exist, and a convolution and a linear layer by them equal those in float64."""
    bias = torch.arange(16, dtype=torch.int32)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    try:
        current = Int8Weights(weight, bias, conv)(spikes)
        linear = Int8Weights(weight.flatten(1), bias)(spikes[:, :, :3, :3].flatten(1))
    except (AttributeError, RuntimeError):  # no such operator in this build of torch, or on this processor
        return False
    expected = torch.nn.functional.conv2d(spikes.double(), weight.double(), bias.double(), padding=1)
    rows = spikes[:, :, :3, :3].flatten(1).double() @ weight.flatten(1).double().T + bias
    return torch.equal(current.double(), expected) and torch.equal(linear.double(), rows)


LARGEST_EXACT = {torch.float16: 2**11, torch.float32: 2**24}  # integers up to here are exact in a type


def exact_type(operate, largest, shape, device, largest_input=1, types=LARGEST_EXACT):
    """float16, float32 or float64: the narrowest type in which `operate(spikes)` has exact currents on this device.

    operate: a layer's function of spikes, in their type. largest: bound of |current|. shape: of the spikes.
    largest_input: 1 for spikes, up to 255 for sums of them. Integers below 2^11 and 2^24 are exact in float16 and
    float32 (TF32 included: it rounds the factors, which are at most 255, not their sums), but an algorithm that
    transforms its inputs, as Winograd's does, rounds them; libraries choose by the shape. So each type is tried on
    random spikes of that shape, and on the largest everywhere. types: those to try -> the largest integer exact in it.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, largest_input + 1, shape, generator=generator, dtype=torch.uint8).to(device)
    tried = random, torch.full_like(random, largest_input)
    for dtype, most in types.items():
        if largest <= most and all(is_exact(operate, spikes, dtype) for spikes in tried):
            return dtype
    return torch.float64


def is_exact(operate, spikes, dtype):
    """Whether an operator gives the same in `dtype` as in float64."""
    spikes = spikes.contiguous(memory_format=order(spikes))
    return torch.equal(operate(spikes.to(dtype)).double(), operate(spikes.double()))
