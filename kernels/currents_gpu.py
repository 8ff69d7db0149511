"""Integer convolutions of spikes on a GPU, compiled by Triton."""

import math

import torch

from kernels.gpu import on_its_gpu, tl, triton

if triton is not None:

    @triton.jit
    def window_of(pixel, H, W, C, out_H, out_W, stride_h, stride_w, pad_h, pad_w):
        """`corner, top, left`: first element, row and column of an output pixel's window in inputs [N, H, W, C]."""
        image = pixel // (out_H * out_W)
        top = (pixel // out_W % out_H).to(tl.int32) * stride_h - pad_h
        left = (pixel % out_W).to(tl.int32) * stride_w - pad_w
        return ((image * H + top) * W + left) * C, top, left

    @triton.jit
    def convolve_integers(
        inputs, weight, bias, currents, pixels, H, W, C: tl.constexpr, out_H, out_W, out_C: tl.constexpr, stride_h,
        stride_w, pad_h, pad_w, dilation_h, dilation_w, kernel_w: tl.constexpr, taps: tl.constexpr,
        has_bias: tl.constexpr, block_pixels: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr,
    ):  # fmt: skip
        """Fill currents [N, out_H, out_W, out_C] from inputs [N, H, W, C] of 0..127 and int8 weights [taps * C, out_C].

        Each program computes `block_pixels` of the N * out_H * out_W output pixels for `block_out` output channels.
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
        inputs, weight, bias, currents, elements, H, W, C, out_H, out_W, stride_h, stride_w, pad_h, pad_w,
        dilation_h, dilation_w, kernel_w: tl.constexpr, taps: tl.constexpr, has_bias: tl.constexpr,
        block: tl.constexpr,
    ):  # fmt: skip
        """Like `convolve_integers`, but depthwise: int8 weights [taps, C]. Each program computes `block` elements."""
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


def convolves_on_gpu(largest, device):
    """Whether `GpuWeights` supports a GPU and inputs from 0 to `largest`.

    Inputs are multiplied as int8, so they must be at most 127; Triton compiles int8 products for compute capability 8.0
    and later.
    """
    return triton is not None and largest <= 127 and torch.cuda.get_device_capability(device) >= (8, 0)


class GpuWeights:
    """The integer weights of a convolution for Triton; turns uint8 spikes into exact integer currents.

    weight_q: int8 [C_out, C_in / groups, kh, kw]. bias_q: [C_out] or None. conv: (stride, padding, dilation, groups);
    groups is 1, or C_in = C_out for a depthwise convolution. largest: bound of |current|.
    """

    def __init__(self, weight_q, bias_q, conv, largest):
        self.channels, self.inputs, *self.kernel = weight_q.shape
        self.weight = weight_q.permute(2, 3, 1, 0).contiguous()  # [kh, kw, C_in or 1, C_out]
        self.bias = bias_q
        self.stride, self.padding, self.dilation, groups = conv
        self.each_alone = groups > 1
        self.type = torch.int16 if largest < 2**15 else torch.int32

    def __call__(self, spikes):
        """Currents [N, C_out, H', W'], int16 or int32 and channels last, of uint8 spikes [N, C_in, H, W]."""
        spikes = spikes.contiguous(memory_format=torch.channels_last)
        size, out_size = spikes.shape[2:], self.output_size(spikes.shape[2:])
        currents = torch.empty(
            (len(spikes), self.channels, *out_size),
            dtype=self.type,
            device=spikes.device,
            memory_format=torch.channels_last,
        )
        bias = (
            self.weight if self.bias is None else self.bias
        )  # without a bias the kernel reads no bias, any tensor will do
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
        """Height and width of the output for an input of `size`, (height, width)."""
        extents = zip(size, self.padding, self.dilation, self.kernel, self.stride)
        return [
            (x + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for x, padding, dilation, kernel, stride in extents
        ]

    def blocks(self):
        """Block sizes and warps of one program, the fastest of those tried on an H200."""
        block_out = min(64, max(16, triton.next_power_of_2(self.channels)))
        if self.inputs > 32 and block_out == 64:
            return {"block_pixels": 256, "block_out": 64, "block_in": 64, "num_warps": 8}
        return {"block_pixels": 128, "block_out": block_out, "block_in": 32, "num_warps": 4}
