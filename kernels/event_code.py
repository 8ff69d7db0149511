"""LLVM code for a CPU: as `kernels.tile_code`, for one pixel, where only inputs that spiked cost time.

A list holds the events of one step and one column of the padded input: the places of the weights of its inputs that
spiked. These weights are added to sums of 16 bits, and those to the membrane potentials. With a few percent of the
inputs spiking, this is less work than multiplying all of them by 0 or 1.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.tile_code import I8, I32, I64, INSTRUCTIONS, ShortSums, TileCode, number

AVX2 = INSTRUCTIONS[-1]  # its vectors of 32 bytes; every processor that these kernels run on has them
LANES = 2 * AVX2.lanes  # channels of a sum of 16 bits
WORD = 8  # inputs, one byte each, that are listed at a time
GROUP = 4  # events that are added at a time; lists are filled up to whole groups, because a loop for the rest takes as
# long as four events


class EventCode(TileCode):
    """Emits the code of one output pixel.

    "source" of `PLACES` is the address of a list's start in `events`, int32, behind which its end stands; "tap_offsets"
    lead from there to those of the other columns of the kernel, and "quads" is the number of bytes of the weights of a
    column. An event is the place of its weights in the column, in bytes.
    """

    def __init__(self, builder, places, blocks):
        super().__init__(builder, places, 1, blocks, 0, AVX2)

    def add_tap(self, window, weights):
        b, first = self.b, self.b.load(weights)
        start, end = (b.sext(self.load(b.add(window, number(4 * i)), I32), I64) for i in range(2))
        events = b.add(self.place["events"], b.mul(start, number(4)))
        with cgutils.for_range(b, b.udiv(b.sub(end, start), number(GROUP))) as group:
            at = b.add(events, b.mul(group.index, number(4 * GROUP)))
            for event in range(GROUP):
                row = b.add(first, b.sext(self.load(b.add(at, number(4 * event)), I32), I64))
                for block in range(0, self.blocks, 2):
                    eight_bits = self.load(b.add(row, number(AVX2.lanes * block)), ir.VectorType(I8, LANES))
                    self.add_to(self.sums[0, block], b.sext(eight_bits, self.shorts))
        b.store(b.add(first, self.place["quads"]), weights)

    def short_sums(self):
        return ShortSums(self)

    def add_short_sums(self):
        for block in range(self.blocks):
            sums = self.b.load(self.sums[0, block - block % 2])
            half = range(block % 2 * AVX2.lanes, (block % 2 + 1) * AVX2.lanes)
            lanes = ir.Constant(ir.VectorType(I32, AVX2.lanes), list(half))
            self.add_to(self.u[0, block], self.b.sext(self.b.shuffle_vector(sums, sums, lanes), self.ints))


@intrinsic(prefer_literal=True)
def run_event_tile(typing, blocks, version, places):
    """`run_event_tile(blocks, version, places)`: compute an output pixel for all steps; returns its number of spikes.

    version: `tile_code.CODE`.
    """
    if not isinstance(blocks, types.IntegerLiteral):
        return None

    def generate(context, builder, signature, arguments):
        return EventCode(builder, arguments[-1], blocks.literal_value).emit()

    return types.int64(blocks, version, types.int64), generate


@intrinsic
def list_spikes(typing, source, words, first, step, table, events):
    """`list_spikes(source, words, first, step, table, events)`: list the spikes of one pixel, and return their number.

    source: address of its inputs, bytes of 0 and 1, `words` times `WORD` of them. first: the event of the first input;
    `step` is added after each word. table: address of an int32 [256, WORD], the events of each pattern of a word.
    events: address of the list, behind whose end `WORD` values may be overwritten.
    """

    def generate(context, builder, signature, arguments):
        source, words, first, step, table, events = arguments
        eight = ir.VectorType(I32, WORD)
        nothing = ir.Constant(eight, ir.Undefined)
        listed = cgutils.alloca_once_value(builder, number(0))

        def place(address, kind):
            return builder.inttoptr(address, kind.as_pointer())

        with cgutils.for_range(builder, words) as loop:
            word = builder.load(place(builder.add(source, builder.mul(loop.index, number(WORD))), I64), align=1)
            # bit k of the highest byte is byte k of the word
            pattern = builder.lshr(builder.mul(word, number(0x0102040810204080)), number(56))
            values = builder.load(place(builder.add(table, builder.mul(pattern, number(4 * WORD))), eight), align=1)
            added = builder.trunc(builder.add(first, builder.mul(step, loop.index)), I32)
            added = builder.insert_element(nothing, added, number(0, I32))
            added = builder.shuffle_vector(added, nothing, ir.Constant(eight, [0] * WORD))
            so_far = builder.load(listed)
            target = builder.add(events, builder.mul(so_far, number(4)))
            builder.store(builder.add(values, added), place(target, eight), align=1)
            builder.store(builder.add(so_far, builder.ctpop(pattern)), listed)
        return builder.load(listed)

    return types.int64(*[types.int64] * 6), generate
