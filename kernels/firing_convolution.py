"""Convolutions and the integrate-and-fire neurons behind them in one pass on a CPU, compiled by numba.

    plan = plan_tiles(weight_q, conv, sample, largest)     # None if no kernel suits the convolution or the processor
    FiringConvolution(weight_q, bias_q, plan)              # its integers, packed

The currents never leave the registers (`kernels.tile_code`), so that neither currents nor their conversion take time.
Where few inputs spike, `kernels.event_convolution` takes less time still.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from kernels.event_convolution import MOST_SUM, plan_events
from kernels.memory_order import flat, order
from kernels.neurons_cpu import compiled, njit

MOST_PIXELS = 24  # output pixels of a tile

if njit is not None:
    from kernels.tile_code import CODE, SOURCE, call_tile, compile_tile, go_to, in_order, run_tile, usable_instructions

    @compiled
    def pad_image(spikes, padded, image, shape):
        """Copy all steps of an image, in spikes [T, B, H, W, C], into `padded`, [T, rows, columns, quads * 4]."""
        steps, images, height, width, channels, rows, columns, wide, top, left = shape[:10]
        for t in range(steps):
            for y in range(height):
                source = spikes[((t * images + image) * height + y) * width * channels :]
                target = padded[((t * rows + y + top) * columns + left) * wide :]
                if channels == wide:
                    for i in range(width * channels):
                        target[i] = source[i]
                else:
                    for x in range(width):
                        for i in range(channels):
                            target[x * wide + i] = source[x * channels + i]

    @compiled
    def run_tiles(tile, spikes, shape, places):
        """Run all tiles of a convolution, and return the number of spikes.

        tile: address of a compiled tile. spikes: uint8 [T*B*H*W*C]. shape: see `FiringConvolution.shape`.
        places: what `PLACES` names, for the first tile of the first image, apart from "source".
        """
        steps, images, height, width, channels, rows, columns, wide = shape[:8]
        out_height, out_width, out_channels, stride_height, stride_width, pixels, block, tile_weights = shape[10:]
        copies = rows != height or columns != width or wide != channels
        padded = np.zeros(steps * rows * columns * wide if copies else 0, np.uint8)
        first, fired = places.copy(), 0
        for image in range(images):
            source = spikes.ctypes.data + image * height * width * channels
            if copies:
                pad_image(spikes, padded, image, shape)
                source = padded.ctypes.data
            for n in range(out_channels // block):
                for pixel in range(0, out_height * out_width, pixels):
                    y, x = pixel // out_width, pixel % out_width
                    at = (image * out_height * out_width + pixel) * out_channels + n * block
                    go_to(places, first, at, n * block, n * tile_weights)
                    places[SOURCE] = source + (y * stride_height * columns + x * stride_width) * wide
                    fired += call_tile(tile, places.ctypes.data)
        return fired


@functools.cache
def tile_of(pixels, blocks, pitch, instructions):
    """A compiled tile (`kernels.tile_code`)."""
    version = CODE

    def tile(places):
        return run_tile(pixels, blocks, pitch, instructions, version, places)

    return compile_tile(tile)


@dataclass(frozen=True)
class TilePlan:
    """How a convolution is cut into tiles.

    sample: (C_in, H, W). output: (C_out, H', W'); out_shape is the same where no rows are merged: those of a 1x1
    convolution count as one. conv: (stride, padding, dilation). kernel: (kh, kw). pixels, blocks: of a tile.
    instructions: of `tile_code`. taps_at_once: positions of the kernel whose products fit a sum of 16 bits. largest:
    the largest input.
    """

    sample: tuple
    output: tuple
    out_shape: tuple
    conv: tuple
    kernel: tuple
    pixels: int
    blocks: int
    instructions: object
    taps_at_once: int
    largest: int


def plan_tiles(weight_q, conv, sample, largest):
    """The TilePlan of a convolution, or None if no kernel suits it.

    weight_q: int8 [C_out, C_in, kh, kw]. conv: (stride, padding, dilation, groups). sample: shape of the input, [C_in,
    H, W]. largest: the largest input.
    """
    if njit is None or conv is None or conv[3] != 1 or len(sample) != 3 or sample[0] != weight_q.shape[1]:
        return None
    stride, padding, dilation, _ = conv
    channels, kernel = len(weight_q), tuple(weight_q.shape[2:])
    out_shape = sizes = output_sizes(sample[1:], kernel, stride, padding, dilation)
    if min(sizes) < 1:
        return None
    if kernel == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0):
        sample, sizes = (sample[0], 1, sample[1] * sample[2]), [1, sizes[0] * sizes[1]]
    for instructions in usable_instructions():
        taps_at_once = most_taps(weight_q, largest, instructions)
        tile = best_tile(sizes[1], channels, instructions) if taps_at_once else None
        if tile is not None:
            conv = tuple(stride), tuple(padding), tuple(dilation)
            shapes = tuple(sample), (channels, *sizes), (channels, *out_shape)
            return TilePlan(*shapes, conv, kernel, *tile, instructions, taps_at_once, largest)
    return None


def output_sizes(sizes, kernel, stride, padding, dilation):
    """Height and width of the output of a convolution, from those of its input."""
    return [
        (size + 2 * pad - step * (extent - 1) - 1) // jump + 1
        for size, pad, step, extent, jump in zip(sizes, padding, dilation, kernel, stride)
    ]


def most_taps(weight_q, largest, instructions):
    """How many positions of the kernel are summed before the sums go to the potentials; 0 if not even one fits."""
    taps, quads = weight_q[0, 0].numel(), -(-weight_q.shape[1] // 4)
    if instructions.product is not None:  # sums of 32 bits
        return taps
    pair = 2 * largest * max(1, int(weight_q.to(torch.int16).abs().max()))
    return min(taps, MOST_SUM // pair // quads)


def best_tile(width, channels, instructions):
    """`pixels, blocks` of the tile that loads least per product, or None if there is none.

    A row of `width` output pixels has to consist of whole tiles, and the channels of whole vectors.
    """
    vectors, rest = divmod(channels, instructions.lanes)
    if rest:
        return None
    tiles = [
        (pixels, blocks)
        for pixels in range(1, min(width, MOST_PIXELS) + 1)
        for blocks in range(1, min(vectors, 4) + 1)
        if not width % pixels and not vectors % blocks and 4 <= pixels * blocks <= instructions.most
    ]

    def cost(tile):
        # loads per product; with fewer than 8 sums at a time each product waits for the one before; of two tiles with
        # as many loads, the one that loads fewer weights, because these come from the second cache
        pixels, blocks = tile
        return (pixels + blocks) / (pixels * blocks) + max(0, 8 - pixels * blocks) / 8, blocks

    return min(tiles, key=cost, default=None)


class FiringConvolution:
    """A convolution with integer weights and the integrate-and-fire neurons behind it, for input of one shape.

    weight_q: int8 [C_out, C_in, kh, kw]. bias_q: [C_out] or None. plan: a TilePlan.
    """

    def __init__(self, weight_q, bias_q, plan):
        self.plan = plan
        self.weights, self.tile_weights = pack(weight_q.numpy(), plan)
        self.out_shape = plan.out_shape
        self.bias = np.zeros(len(weight_q), np.int32)
        if bias_q is not None:
            self.bias[:] = bias_q.numpy()
        self.shape = self.shape_of_image()
        self.taps = self.tap_offsets()
        pitch = plan.conv[0][1] * self.shape[5]
        self.tile = tile_of(plan.pixels, plan.blocks, int(pitch), plan.instructions.code)
        self.events = plan_events(weight_q, plan)

    def shape_of_image(self):
        """Sizes for `run_tiles` behind steps and images: of the input, the padded input, and the output, as int64."""
        plan, (channels, height, width) = self.plan, self.plan.sample
        (stride, (top, left), _), wide = plan.conv, -(-channels // 4) * 4
        padded = height + 2 * top, width + 2 * left, wide
        block = plan.blocks * plan.instructions.lanes
        out = (*plan.output[1:], plan.output[0], *stride, plan.pixels, block, self.tile_weights)
        return np.array([height, width, channels, *padded, top, left, *out], np.int64)

    def tap_offsets(self):
        """The offset in the padded input, in bytes, of every position of the kernel."""
        columns, wide = self.shape[4:6]
        down, right = self.plan.conv[2]
        rows, positions = (np.arange(extent) for extent in self.plan.kernel)
        return ((rows[:, None] * down * columns + positions * right) * wide).flatten().astype(np.int64)

    def fits(self, extra, rest, Vthr, membrane):
        """Whether the kernel can take these arguments of a call."""
        values = [Vthr] if extra is None else [Vthr, extra[1]]
        whole = not any(each.is_floating_point() for each in values)
        shape, channels = membrane.shape[1:], len(self.bias)
        per_channel = all(each.numel() == 1 or tuple(each.shape) == (channels, 1, 1) for each in values)
        sums = [each for each in (rest, None if extra is None else extra[0]) if each is not None]
        alike = all(each.shape[1:] == shape for each in sums) and membrane.dtype == torch.float32
        spikes = extra is None or extra[0].dtype == torch.uint8
        return whole and per_channel and alike and spikes and (rest is None or rest.dtype == torch.float32)

    def __call__(self, spikes, extra, rest, Vthr, membrane, subtract, timesteps):
        """`spikes, fired`: the spikes [T*B, ...] of the neurons, uint8, and their number.

        spikes: uint8 [T*B, C_in, H, W]. extra: (uint8 spikes [T*B, ...], weight) that flow in, too, or None. rest: a
        float32 current [T*B, ...] of whole numbers that flows in, too, or None. Vthr and the weight of `extra` are
        integers, scalars or [C_out, 1, 1]. membrane: float32 [B, ...] of whole numbers, changed in place.
        """
        sent = torch.empty((len(spikes), *membrane.shape[1:]), dtype=torch.uint8, memory_format=order(membrane))
        read = flat(spikes, spikes, 1)[0].numpy()
        added = None if extra is None else flat(extra[0], membrane, timesteps)
        rest = None if rest is None else flat(rest, membrane, timesteps)
        Vthr, weight = (self.each_channel(each) for each in (Vthr, 0 if extra is None else extra[1]))
        places = {
            **{"bias": self.bias.ctypes.data, "Vthr": Vthr.ctypes.data},
            **{"extra": address(added), "extra_weight": weight.ctypes.data, "rest": address(rest)},
            **{"membrane": membrane.data_ptr(), "spikes": sent.data_ptr(), "steps": timesteps},
            **{"spikes_step": sent[0].numel() * len(membrane), "channels": len(self.bias), "kept": -int(subtract)},
        }
        if self.events is not None and self.events.pay(read):
            return sent, self.events.run(read, timesteps, len(membrane), places)
        return sent, self.run(read, timesteps, len(membrane), places)

    def run(self, spikes, timesteps, images, places):
        """The number of spikes that the neurons send. spikes: uint8 [T*B*H*W*C]. places: some of `PLACES` -> value."""
        step = self.shape[3] * self.shape[4] * self.shape[5]
        direct = tuple(self.shape[:3]) == tuple(self.shape[3:6])
        places |= {"weights": self.weights.ctypes.data, "source_step": step * (images if direct else 1)}
        places |= {"tap_offsets": self.taps.ctypes.data, "taps": len(self.taps), "quads": self.shape[5] // 4}
        places |= {"taps_at_once": self.plan.taps_at_once}
        shape = np.concatenate([np.array([timesteps, images], np.int64), self.shape])
        return run_tiles(self.tile.address, spikes, shape, in_order(places))

    def each_channel(self, values):
        """A scalar or [C_out, 1, 1] as int32 [C_out]."""
        each = np.empty(len(self.bias), np.int32)
        each[:] = torch.as_tensor(values).flatten().numpy()
        return each


class PendingConvolution:
    """The current of a convolution that is not computed yet.

    kernel: a FiringConvolution. spikes: its input, uint8 [T*B, C_in, H, W]. current_of: a function that computes the
    current alone. rest: another current [T*B, ...] that belongs to it, or None.
    """

    def __init__(self, kernel, spikes, current_of, rest=None):
        self.kernel, self.spikes, self.current_of, self.rest = kernel, spikes, current_of, rest

    @property
    def work(self):
        """Number of weights, by which convolutions with the same output compare."""
        return self.kernel.weights.size

    @property
    def shape(self):
        """The shape of the current, [T*B, C_out, H', W']."""
        return (len(self.spikes), *self.kernel.out_shape)

    def plus(self, current):
        """This current and another one, [T*B, ...]."""
        rest = current if self.rest is None else self.rest + current
        return PendingConvolution(self.kernel, self.spikes, self.current_of, rest)

    def compute(self):
        """The current, [T*B, ...]."""
        current = self.current_of()
        return current if self.rest is None else current + self.rest

    def fits(self, extra, Vthr, membrane):
        """Whether `fire` can take these arguments."""
        return self.kernel.fits(extra, self.rest, Vthr, membrane)

    def fire(self, extra, Vthr, membrane, subtract, timesteps):
        """`spikes, fired` of the neurons that this current flows into (`FiringConvolution.__call__`)."""
        return self.kernel(self.spikes, extra, self.rest, Vthr, membrane, subtract, timesteps)


def address(tensor):
    """The address of a tensor's data, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def pack(weight_q, plan):
    """`weights, size`: weights in the order in which tiles read them, and the bytes of those of one tile.

    weight_q: int8 [C_out, C_in, kh, kw], packed as [C_out / (blocks * lanes), kh * kw, C_in / 4, blocks, lanes, 4].
    """
    channels, inputs, *kernel = weight_q.shape
    quads, lanes, taps = -(-inputs // 4), plan.instructions.lanes, kernel[0] * kernel[1]
    whole = np.zeros((channels, quads * 4, taps), np.int8)
    whole[:, :inputs] = weight_q.reshape(channels, inputs, taps)
    whole = whole.reshape(-1, plan.blocks, lanes, quads, 4, taps).transpose(0, 5, 3, 1, 2, 4)
    space = np.empty(whole.size + 64, np.int8)  # vectors of 64 bytes are read fastest from such addresses
    first = -space.ctypes.data % 64
    weights = space[first : first + whole.size]
    weights[:] = whole.ravel()
    return weights, whole[0].size
