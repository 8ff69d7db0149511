"""Convolutions and the neurons behind them on a CPU that add the weights of the inputs that spiked, and of no others.

    events = plan_events(weight_q, plan)              # None where they cannot be used, or never pay
    events.pay(spikes)                                # few enough spikes: faster than `firing_convolution`
    events.run(spikes, timesteps, images, places)     # the number of spikes that the neurons send

Spikes are few: in vgg9_bn at T = 16, 11 to 18 % of the inputs of a layer spike in a step. For each row of outputs, the
spikes in the kernel's reach are listed once, in one list for each column of the padded input and step
(`event_code.list_spikes`). An output pixel adds the weights of the kw lists that it sees (`event_code.EventCode`).
"""

import functools

import numpy as np

from kernels.neurons_cpu import compiled, njit

MOST_SUM = 2**15 - 1  # in 16 bits, as the sums of both kernels without VNNI
MOST_CHANNELS = 128  # output channels of a tile, whose sums stay in registers

# What one output pixel takes for one step, in ns on an AMD EPYC with AVX2 and without VNNI, fitted to the layers of
# vgg9_bn and resnet20: always, for each output channel, word of inputs, event, and vector of the weights of an event
NS_PIXEL, NS_CHANNEL, NS_WORD, NS_EVENT, NS_VECTOR = 40, 1.2, 1.7, 0.5, 0.3
NS_FAR_VECTOR = 0.6  # instead of NS_VECTOR, where the weights do not stay in a core's own cache
NEAR_BYTES = 2**18
# Products per ns of the other kernel, by `tile_code.Instructions.code`; 60 is measured on that processor. Processors
# with VNNI reach 400 with vectors of 64 bytes; as they are faster with events, too, they count as 250 here, and half of
# it with 32 bytes.
PRODUCTS = {0: 250, 1: 125, 2: 60}
SURELY = 0.8  # of the other kernel's time that events may take at most
MOST_SHARE = 0.3  # of inputs that spike, from which events took longer in a layer of 128 channels

if njit is not None:
    from kernels.event_code import GROUP, LANES, WORD, list_spikes, run_event_tile
    from kernels.tile_code import CODE, SOURCE, call_tile, compile_tile, go_to, in_order

    @compiled
    def list_row(spikes, image, row, shape, table, starts, events):
        """Fill `starts`, [T, columns + 1], and `events` with the lists for one row of outputs of an image.

        spikes: address of uint8 [T, B, H, W, C]. A list is filled up to whole groups with events whose weights are 0.
        """
        steps, images, height, width, channels, columns, top, left, kernel_rows, down, stride, row_bytes = shape[:12]
        n, none = 0, kernel_rows * channels * row_bytes  # none: the row of zeros behind the weights of a column
        for t in range(steps):
            for column in range(columns):
                starts[t, column] = n
                x = column - left
                for tap in range(kernel_rows if 0 <= x < width else 0):
                    y = row * stride + tap * down - top
                    if 0 <= y < height:
                        source = spikes + (((t * images + image) * height + y) * width + x) * channels
                        first, end = tap * channels * row_bytes, events.ctypes.data + 4 * n
                        n += list_spikes(source, channels // WORD, first, WORD * row_bytes, table.ctypes.data, end)
                for i in range(n, n + GROUP - 1):
                    events[i] = none
                n = (n + GROUP - 1) // GROUP * GROUP
            starts[t, columns] = n

    @compiled
    def run_events(tile, spikes, shape, table, starts, events, places):
        """Run all tiles, and return the number of spikes that the neurons send.

        tile: address of a compiled tile. spikes: as of `list_row`. shape: see `Events.shape`. table, starts, events:
        what `list_spikes` reads and `list_row` fills. places: what `PLACES` names, for the first tile.
        """
        images, block, (out_height, out_width, out_channels, stride, tile_weights) = shape[1], shape[11], shape[12:]
        first, fired = places.copy(), 0
        for image in range(images):
            for row in range(out_height):
                list_row(spikes, image, row, shape, table, starts, events)
                for n in range(out_channels // block):
                    for column in range(out_width):
                        at = ((image * out_height + row) * out_width + column) * out_channels + n * block
                        go_to(places, first, at, n * block, n * tile_weights)
                        places[SOURCE] = starts.ctypes.data + 4 * column * stride
                        fired += call_tile(tile, places.ctypes.data)
        return fired


@functools.cache
def tile_of(blocks):
    """A compiled tile of one pixel (`kernels.event_code`)."""
    version = CODE

    def tile(places):
        return run_event_tile(blocks, version, places)

    return compile_tile(tile)


def plan_events(weight_q, plan):
    """The Events of a convolution, or None where they cannot be used or never pay.

    weight_q: int8 [C_out, C_in, kh, kw]. plan: a `firing_convolution.TilePlan`.
    """
    channels, inputs = weight_q.shape[:2]
    if plan.largest != 1 or inputs % WORD or channels % LANES:
        return None
    share = largest_share(plan)
    columns = most_columns(weight_q) if share > 0 else 0
    return Events(weight_q, plan, columns, share) if columns else None


def most_columns(weight_q):
    """How many columns of the kernel a sum of 16 bits can hold, whatever spikes; 0 if not even one fits."""
    weights = weight_q.double()
    largest = max(part.clamp_min(0).sum((1, 2)).max().item() for part in (weights, -weights))  # of one column
    return min(weight_q.shape[3], int(MOST_SUM // max(largest, 1)))


def largest_share(plan):
    """The largest share of inputs that spike with which events take less time, at most `MOST_SHARE`.

    It is not positive where they never take less.
    """
    (inputs, *_), channels, (rows, columns) = plan.sample, plan.output[0], plan.kernel
    taps, stride, tiles = rows * columns, plan.conv[0][1], channels // tile_channels(channels)
    other = taps * inputs * channels / PRODUCTS[plan.instructions.code]
    always = NS_PIXEL * tiles + NS_CHANNEL * channels + NS_WORD * stride * rows * inputs / WORD
    of_vector = NS_VECTOR if taps * inputs * channels <= NEAR_BYTES else NS_FAR_VECTOR
    each = NS_EVENT * tiles + of_vector * channels / LANES
    return min((SURELY * other - always) / (taps * inputs * each), MOST_SHARE)


def tile_channels(channels):
    """The output channels of a tile: as many whole vectors as divide all, and fit."""
    return max(n for n in range(LANES, min(channels, MOST_CHANNELS) + 1, LANES) if channels % n == 0)


class Events:
    """The weights of a convolution, packed by input, and what its lists need.

    weight_q: int8 [C_out, C_in, kh, kw]. plan: a TilePlan. columns: of `most_columns`. share: of `largest_share`.
    """

    def __init__(self, weight_q, plan, columns, share):
        self.plan, self.columns, self.share = plan, columns, share
        self.block = tile_channels(len(weight_q))
        self.weights = self.pack(weight_q.numpy())  # [C_out / block, kw, kh * C_in + 1, block]
        self.table = np.zeros((2**WORD, WORD), np.int32)
        for pattern, row in enumerate(self.table):
            spiking = [i for i in range(WORD) if pattern >> i & 1]
            row[: len(spiking)] = [i * self.block for i in spiking]
        self.shape = self.shape_of_image()
        self.tile = tile_of(2 * self.block // LANES)  # potentials have half as many lanes as sums

    def pack(self, weight_q):
        """The weights in the order of the events, with a row of zeros behind each column of the kernel."""
        channels, inputs, rows, columns = weight_q.shape
        weights = np.zeros((channels // self.block, columns, rows * inputs + 1, self.block), np.int8)
        tiles = weight_q.reshape(-1, self.block, inputs, rows, columns).transpose(0, 4, 3, 2, 1)
        weights[:, :, :-1] = tiles.reshape(len(weights), columns, rows * inputs, self.block)
        return weights

    def shape_of_image(self):
        """Sizes for `run_events` behind steps and images, as int64."""
        (stride, (top, left), (down, _)), (channels, *sizes) = self.plan.conv, self.plan.sample
        channels_out, *out_sizes = self.plan.out_shape
        # rows that a plan merges are rows again: the lists of one row stay in the cache
        height, width = sizes if self.plan.output == self.plan.out_shape else out_sizes
        read = height, width, channels, width + 2 * left, top, left, self.plan.kernel[0], down, stride[0], self.block
        out = *out_sizes, channels_out, stride[1], self.weights[0].size
        return np.array([*read, *out], np.int64)

    def pay(self, spikes):
        """Whether so few of the inputs, uint8 [N], spike that events take less time."""
        return np.count_nonzero(spikes.view(np.bool_)) <= self.share * spikes.size

    def run(self, spikes, timesteps, images, places):
        """The number of spikes that the neurons send. spikes: uint8 [T*B*H*W*C]. places: some of `PLACES` -> value."""
        columns, rows_and_inputs = self.shape[3], self.weights.shape[2] - 1
        starts = np.empty((timesteps, columns + 1), np.int32)
        # room for every input, for filling up groups, and for what a word writes behind the last event
        events = np.empty(timesteps * columns * (rows_and_inputs + GROUP) + WORD, np.int32)
        offsets = np.arange(self.plan.kernel[1]) * 4 * self.plan.conv[2][1]
        places |= {"weights": self.weights.ctypes.data, "source_step": starts[0].nbytes, "events": events.ctypes.data}
        places |= {"tap_offsets": offsets.ctypes.data, "taps": len(offsets), "taps_at_once": self.columns}
        places |= {"quads": self.weights[0, 0].size}
        shape = np.concatenate([np.array([timesteps, images], np.int64), self.shape])
        return run_events(self.tile.address, spikes.ctypes.data, shape, self.table, starts, events, in_order(places))
