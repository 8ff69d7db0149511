"""LLVM code for a CPU: a convolution and its integrate-and-fire neurons in one pass, for a tile of a few pixels.

A tile holds `pixels` neighbouring output pixels of one row, and `blocks` vectors of output channels for each. The
membrane potentials stay in vector registers over all timesteps, and products of spikes and weights are added to them
directly. So no current is ever written to memory. All numbers are integers of 32 bits.

The products of four input channels (a quad) come from one instruction: vpdpbusd on a processor with VNNI, otherwise
vpmaddubsw of AVX2, whose sums of 16 bits are added to the potentials before they can overflow.
"""

import functools
import os
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import cfunc, config, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from kernels.neurons_cpu import compiled


@dataclass(frozen=True)
class Instructions:
    """A set of vector instructions. lanes: 32-bit integers in a vector. most: potentials of a tile, in vectors.

    features: what the processor needs, each a group of alternatives. product: the LLVM intrinsic of VNNI, None for
    AVX2. code: the number that the compiled kernels know it by.
    """

    code: int
    lanes: int
    most: int
    features: tuple
    product: str | None


# `most` leaves registers for weights and spikes: 16 registers with AVX2, of which sums take as many as potentials would
INSTRUCTIONS = (
    Instructions(0, 16, 24, (("avx512vnni",), ("avx512f",), ("avx512bw",)), "llvm.x86.avx512.vpdpbusd.512"),
    Instructions(1, 8, 12, (("avxvnni", "avx512vnni"), ("avxvnni", "avx512vl")), "llvm.x86.avx512.vpdpbusd.256"),
    Instructions(2, 8, 12, (("avx2",),), None),
)
# ONEDNN_MAX_CPU_ISA limits these kernels like those of oneDNN: value -> instructions that it leaves
LIMITS = {"SSE41": (), "AVX": (), "AVX2": (2,), "AVX512_CORE": (2,), "AVX2_VNNI": (1, 2), "AVX2_VNNI_2": (1, 2)}

# What a tile reads, as int64 in this order: addresses, numbers, and steps in bytes.
PLACES = (
    "source", "weights", "bias", "Vthr", "extra", "extra_weight", "rest", "membrane", "spikes",
    "steps", "source_step", "spikes_step", "channels", "tap_offsets", "taps", "taps_at_once", "quads", "kept",
    "events",
)  # fmt: skip
SOURCE, WEIGHTS, BIAS, VTHR, EXTRA, EXTRA_WEIGHT, REST, MEMBRANE, SPIKES = range(9)


def in_order(places):
    """What a tile reads, as an array. places: some of PLACES -> value; the others are 0."""
    return np.array([places.get(name, 0) for name in PLACES], np.int64)


@functools.cache
def usable_instructions():
    """The Instructions that numba may use on this processor, the fastest first."""
    if config.DISABLE_JIT:
        return ()
    features = {
        name[1:] for name in str(cpu_target.target_context.codegen().magic_tuple()[2]).split(",") if name[:1] == "+"
    }
    allowed = LIMITS.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), range(len(INSTRUCTIONS)))
    return tuple(
        each
        for each in INSTRUCTIONS
        if each.code in allowed and all(features.intersection(group) for group in each.features)
    )


# A number for the code that is generated here and in `event_code`. A tile has it in its closure, because numba's cache
# on disk looks at a function's own file and closure, not at what generates its code.
CODE = zlib.crc32(b"".join(Path(__file__).with_name(name).read_bytes() for name in ("tile_code.py", "event_code.py")))

I64, I32, I16, I8, F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8), ir.FloatType()


def number(value, kind=I64):
    """A constant integer."""
    return ir.Constant(kind, value)


class TileCode:
    """Emits the code of one tile with an llvmlite builder. pitch: bytes from one pixel's window to the next one's."""

    def __init__(self, builder, places, pixels, blocks, pitch, instructions):
        self.b, self.pixels, self.blocks, self.pitch, self.instructions = builder, pixels, blocks, pitch, instructions
        lanes = self.lanes = instructions.lanes
        self.ints, self.floats, self.shorts, self.bytes, self.quads = (
            ir.VectorType(kind, n)
            for kind, n in ((I32, lanes), (F32, lanes), (I16, 2 * lanes), (I8, lanes), (I8, 4 * lanes))
        )
        self.place = {name: self.load(builder.add(places, number(8 * i)), I64) for i, name in enumerate(PLACES)}
        self.cells = [(pixel, block) for pixel in range(pixels) for block in range(blocks)]
        self.u = {cell: cgutils.alloca_once(builder, self.ints) for cell in self.cells}
        self.sums = {cell: cgutils.alloca_once(builder, self.shorts) for cell in self.cells}
        self.fired = cgutils.alloca_once(builder, self.ints)
        builder.store(self.all(0), self.fired)

    # shorthand

    def load(self, address, kind):
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=1)

    def store(self, value, address):
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def all(self, value, kind=None):
        """A constant vector with the same value everywhere."""
        kind = kind or self.ints
        return ir.Constant(kind, [value] * kind.count)

    def spread(self, value):
        """A vector that repeats one 32-bit integer."""
        nothing = ir.Constant(self.ints, ir.Undefined)
        return self.b.shuffle_vector(self.b.insert_element(nothing, value, number(0, I32)), nothing, self.all(0))

    def call(self, name, result, *arguments):
        function = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), arguments)

    def add_to(self, variable, value):
        self.b.store(self.b.add(self.b.load(variable), value), variable)

    def vectors(self, name, kind=None):
        """The vectors of one value per output channel."""
        kind = kind or self.ints
        return [self.load(self.b.add(self.place[name], number(4 * self.lanes * i)), kind) for i in range(self.blocks)]

    def cell_address(self, base, cell, size):
        """The address of a cell in a tensor [..., W, C] whose elements have `size` bytes."""
        pixel, block = cell
        pixel = self.b.mul(self.place["channels"], number(size * pixel))
        return self.b.add(base, self.b.add(pixel, number(size * self.lanes * block)))

    def step_address(self, name, t, size):
        """The address of the tile in a tensor like the spikes at step `t`, whose elements have `size` bytes."""
        return self.b.add(self.place[name], self.b.mul(self.b.mul(self.place["spikes_step"], t), number(size)))

    # the parts of a tile

    def emit(self):
        """The whole tile. Returns the number of spikes, an i64."""
        for cell in self.cells:
            address = self.cell_address(self.place["membrane"], cell, 4)
            self.b.store(self.b.fptosi(self.load(address, self.floats), self.ints), self.u[cell])
        with cgutils.for_range(self.b, self.place["steps"]) as steps:
            self.add_products(steps.index)
            self.add_spikes(steps.index)
            self.add_rest(steps.index)
            self.fire(steps.index)
        for cell in self.cells:
            address = self.cell_address(self.place["membrane"], cell, 4)
            self.store(self.b.sitofp(self.b.load(self.u[cell]), self.floats), address)
        return self.b.zext(self.call(f"llvm.vector.reduce.add.v{self.lanes}i32", I32, self.b.load(self.fired)), I64)

    def add_products(self, t):
        """Add the products of spikes and weights to the potentials."""
        b = self.b
        source = b.add(self.place["source"], b.mul(self.place["source_step"], t))
        weights = cgutils.alloca_once(b, I64)
        b.store(self.place["weights"], weights)
        taps, at_once = self.place["taps"], self.place["taps_at_once"]
        groups = b.sdiv(b.add(taps, b.sub(at_once, number(1))), at_once)
        with cgutils.for_range(b, groups) as group:
            first = b.mul(group.index, at_once)
            rest = b.sub(taps, first)
            with (
                self.short_sums(),
                cgutils.for_range(b, b.select(b.icmp_signed("<", rest, at_once), rest, at_once)) as tap,
            ):
                offset = b.add(self.place["tap_offsets"], b.mul(b.add(first, tap.index), number(8)))
                self.add_tap(b.add(source, self.load(offset, I64)), weights)

    def add_tap(self, window, weights):
        """Add the products of one position of the kernel, and move the address `weights` behind its weights."""
        with cgutils.for_range(self.b, self.place["quads"]) as quad:
            self.add_quad(self.b.add(window, self.b.mul(quad.index, number(4))), weights)

    def short_sums(self):
        """A context in which products are summed in 16 bits; nothing to do with VNNI."""
        return nullcontext() if self.instructions.product else ShortSums(self)

    def add_short_sums(self):
        """Add the sums of 16 bits to the potentials."""
        for cell in self.cells:
            pairs = self.b.load(self.sums[cell])
            self.add_to(self.u[cell], self.call("llvm.x86.avx2.pmadd.wd", self.ints, pairs, self.all(1, self.shorts)))

    def add_quad(self, window, weights):
        """Add the products of four input channels, and move the address `weights` to the next four."""
        size = 4 * self.lanes
        address = self.b.load(weights)
        w = [self.load(self.b.add(address, number(size * i)), self.quads) for i in range(self.blocks)]
        self.b.store(self.b.add(address, number(size * self.blocks)), weights)
        for pixel in range(self.pixels):
            spikes = self.spread(self.load(self.b.add(window, number(self.pitch * pixel)), I32))
            for block in range(self.blocks):
                self.add_product((pixel, block), spikes, w[block])

    def add_product(self, cell, spikes, weights):
        b = self.b
        if self.instructions.product is None:
            pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", self.shorts, b.bitcast(spikes, self.quads), weights)
            self.add_to(self.sums[cell], pairs)
            return
        # vectors of 32-bit integers, as LLVM declared this intrinsic up to version 21; later ones convert them
        weights = b.bitcast(weights, self.ints)
        b.store(self.call(self.instructions.product, self.ints, b.load(self.u[cell]), spikes, weights), self.u[cell])

    def add_spikes(self, t):
        """Add the spikes of an identity branch times its weight, if there are any."""
        b = self.b
        with b.if_then(b.icmp_signed("!=", self.place["extra"], number(0))):
            weights, base = self.vectors("extra_weight"), self.step_address("extra", t, 1)
            for cell in self.cells:
                spikes = b.zext(self.load(self.cell_address(base, cell, 1), self.bytes), self.ints)
                self.add_to(self.u[cell], b.mul(spikes, weights[cell[1]]))

    def add_rest(self, t):
        """Add a float current of whole numbers, if there is one."""
        b = self.b
        with b.if_then(b.icmp_signed("!=", self.place["rest"], number(0))):
            base = self.step_address("rest", t, 4)
            for cell in self.cells:
                current = self.load(self.cell_address(base, cell, 4), self.floats)
                self.add_to(self.u[cell], b.fptosi(current, self.ints))

    def fire(self, t):
        """Add the biases, write the spikes, and reset. `kept` is -1 for reset by subtraction, 0 for reset to zero."""
        b = self.b
        bias, Vthr, base = self.vectors("bias"), self.vectors("Vthr"), self.step_address("spikes", t, 1)
        kept = self.spread(b.trunc(self.place["kept"], I32))
        for cell in self.cells:
            u = b.add(b.load(self.u[cell]), bias[cell[1]])
            fires = b.icmp_signed(">=", u, Vthr[cell[1]])
            b.store(b.select(fires, b.and_(b.sub(u, Vthr[cell[1]]), kept), u), self.u[cell])
            self.store(b.zext(fires, self.bytes), self.cell_address(base, cell, 1))
            self.add_to(self.fired, b.zext(fires, self.ints))


class ShortSums:
    """Within it products are added to sums of 16 bits; at its end these are added to the potentials."""

    def __init__(self, code):
        self.code = code

    def __enter__(self):
        for cell in self.code.cells:
            self.code.b.store(self.code.all(0, self.code.shorts), self.code.sums[cell])

    def __exit__(self, *error):
        self.code.add_short_sums()


@intrinsic(prefer_literal=True)
def run_tile(typing, pixels, blocks, pitch, instructions, version, places):
    """`run_tile(pixels, blocks, pitch, instructions, version, places)`: run one tile; returns its number of spikes.

    version: CODE. places: the address of an int64 array with the values that PLACES names. The other arguments are
    constants.
    """
    constants = (pixels, blocks, pitch, instructions)
    if not all(isinstance(each, types.IntegerLiteral) for each in constants):
        return None
    sizes = [each.literal_value for each in constants]

    def generate(context, builder, signature, arguments):
        return TileCode(builder, arguments[-1], *sizes[:3], INSTRUCTIONS[sizes[3]]).emit()

    return types.int64(*constants, version, types.int64), generate


def compile_tile(tile):
    """Compile `tile`, a function of the address of what PLACES names; `call_tile` calls its `address`."""
    signature = types.int64(types.int64)
    try:
        return cfunc(signature, cache=True)(tile)
    except RuntimeError:  # numba found no writable folder for its cache
        return cfunc(signature)(tile)


@compiled
def go_to(places, first, at, channel, weights):
    """Let a tile compute the outputs from number `at` on, whose first channel is `channel`.

    places: what PLACES names, changed in place; first: the same for the first tile. weights: bytes of the weights of
    the tiles before.
    """
    places[WEIGHTS] = first[WEIGHTS] + weights
    places[BIAS] = first[BIAS] + 4 * channel
    places[VTHR] = first[VTHR] + 4 * channel
    places[EXTRA] = first[EXTRA] + at if first[EXTRA] else 0
    places[EXTRA_WEIGHT] = first[EXTRA_WEIGHT] + 4 * channel
    places[REST] = first[REST] + 4 * at if first[REST] else 0
    places[MEMBRANE] = first[MEMBRANE] + 4 * at
    places[SPIKES] = first[SPIKES] + at


@intrinsic
def call_tile(typing, tile, places):
    """`call_tile(tile, places)`: call the compiled tile at the address `tile`."""

    def generate(context, builder, signature, arguments):
        function = ir.FunctionType(I64, [I64]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], function), [arguments[1]])

    return types.int64(types.int64, types.int64), generate
