"""A C program in the making: its constants, its buffers, its statements, and where each value lies in memory."""

import re
from dataclasses import dataclass

import numpy as np
import torch

from export.c_functions import TYPES

NUMPY_TYPES = {"u8": np.uint8, "i32": np.int32, "cur": np.int32, "f32": np.float32, "i16": np.int16, "i8": np.int8}
C_TYPES = TYPES | {"i16": "int16_t", "i8": "int8_t"}
RESERVED = ("snn_start", "snn_step", "snn_read", "snn_run", "first_differs")
BYTES_OF_SPIKE = 12  # of a `struct spike`
LINE = 116  # letters of numbers in a line of a constant


@dataclass
class Value:
    """A node of the network in the C program.

    name: of its buffer. kind: "u8" spikes or sums of spikes, "cur" currents, "f32" real values. shape: of a sample, as
    in PyTorch. order: [n], the element of the flattened sample that lies at each place of the buffer. start: the step
    in which its first value is sent.
    """

    name: str
    kind: str
    shape: tuple
    order: torch.Tensor
    start: int = 0
    read_once: bool = False

    @property
    def size(self):
        """Number of elements."""
        return len(self.order)

    @property
    def places(self):
        """The inverse of `order`: the place of each element."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(self.size)
        return places

    @property
    def channels_last(self):
        """Whether it lies in memory as [rows][columns][channels], and what is no map as in PyTorch."""
        return torch.equal(self.order, canonical_order(self.shape))


def canonical_order(shape):
    """The order in memory that layers read and write: maps [C, H, W] with channels last, all else as in PyTorch."""
    places = torch.arange(int(np.prod(shape, dtype=np.int64))).view(shape)
    return (places.permute(1, 2, 0) if len(shape) == 3 else places).flatten()


def in_comment(text):
    """A name from a file as it may stand in a C comment."""
    return re.sub(r"[^\w .:()\[\],>=-]", "_", str(text))


class Program:
    """The C program of a network.

    timesteps: T. shapes: node -> shape of a sample. current_bits: of the current of a step, 16 or 32. listens: whether
    any layer listens before it fires, so that the layers do not all work in the same steps. parts: the statements of
    `current` (once an image: real values), `reset`, `step` and `readout`; `part` is the one that grows. firsts: op name
    -> the real-valued current into it.
    """

    def __init__(self, timesteps, shapes, listens, current_bits=32):
        self.current_bits = current_bits
        self.timesteps, self.shapes, self.listens = timesteps, shapes, listens
        self.functions, self.constants, self.buffers, self.names = set(), [], [], set(RESERVED)
        self.parts, self.part = {"current": [], "reset": [], "step": [], "readout": []}, "current"
        self.known, self.currents, self.firsts, self.end = {}, {}, {}, timesteps
        self.row = self.places = 0
        self.weight_bytes = self.ram = 0

    # names and numbers

    def fresh(self, name):
        """A C identifier like `name` that is not taken."""
        name = stem = re.sub(r"\W", "_", name, flags=re.ASCII)
        name = stem = f"n{name}" if not name[:1].isalpha() else name
        number = 1
        while name in self.names:
            number += 1
            name = f"{stem}_{number}"
        self.names.add(name)
        return name

    def constant(self, name, array, kind):
        """The name of a constant array. Equal ones are stored once; one of a single number is named after it."""
        array = np.ascontiguousarray(array, NUMPY_TYPES[kind]).reshape(-1)
        key = (kind, array.tobytes())
        if key not in self.known:
            name = f"{kind}_{array[0]:.5g}".replace("-", "minus_") if len(array) == 1 else name
            self.known[key] = self.fresh(name)
            numbers = [f"{x:.9g}" for x in array] if kind == "f32" else [str(x) for x in array]
            if kind == "f32":
                numbers = [f"{x}f" if re.search(r"[.e]", x) else f"{x}.0f" for x in numbers]
            head = f"static const {C_TYPES[kind]} {self.known[key]}[{len(array)}] = {{"
            self.constants.append(f"{head}\n{in_lines(numbers)}\n}};\n")
        return self.known[key]

    def packed(self, name, weights):
        """The name of a `struct packed` of integer weights, [n], in as few bits as their values take."""
        weights = weights.reshape(-1).long()
        lowest, highest = weights.min().item(), weights.max().item()
        offsets = weights - lowest
        step = int(np.gcd.reduce(offsets.numpy())) or 1
        bits = max(1, ((highest - lowest) // step).bit_length())
        codes = pack((offsets // step).numpy().astype(np.uint32), bits)
        array = self.constant(f"{name}_codes", codes, "u8")
        name = self.fresh(f"{name}_weights")
        self.constants.append(f"static const struct packed {name} = {{{array}, {bits}, {lowest}, {step}}};\n")
        self.weight_bytes += len(codes) - 1
        return name, bits

    def window(self, name, x, shape, **sizes):
        """The name of a `struct window` from the map `x` to one of `shape`, with the pairs of numbers `sizes`."""
        name, (channels, rows, columns) = self.fresh(f"{name}_window"), x.shape
        fields = {"channels": channels, "rows": rows, "columns": columns}
        fields |= {"out_channels": shape[0], "out_rows": shape[1], "out_columns": shape[2]}
        pairs = {"kernel": (1, 1), "stride": (1, 1), "pad": (0, 0), "dilation": (1, 1)} | sizes
        groups = pairs.pop("groups", 1)
        for size, (down, right) in pairs.items():
            fields |= {f"{size}_rows": down, f"{size}_columns": right}
        fields["groups"] = groups
        text = in_lines([f".{field} = {number}" for field, number in fields.items()])
        self.constants.append(f"static const struct window {name} = {{\n{text}\n}};\n")
        return name

    def per_element(self, name, values, value, kind=None):
        """`array, period`: numbers that are broadcastable to a sample of `value`, in its order in memory."""
        full = torch.as_tensor(values).detach().expand(value.shape).flatten()[value.order]
        return self.periodic(name, full, (1, value.shape[0]), kind or ("f32" if value.kind == "f32" else "cur"))

    def periodic(self, name, full, periods, kind, width=1):
        """`array, period` of numbers [n * width], stored as the shortest of the periods that they repeat in."""
        n = len(full) // width
        period = next((p for p in periods if n % p == 0 and repeats(full, p * width)), n)
        return self.constant(name, full[: period * width].numpy(), kind), period

    # buffers

    def bytes_of(self, kind):
        """Bytes of a value."""
        return self.current_bits // 8 if kind == "cur" else np.dtype(NUMPY_TYPES[kind]).itemsize

    def buffer(self, name, kind, size):
        """The name of a static buffer."""
        name = self.fresh(name)
        self.buffers.append(f"static {C_TYPES[kind]} {name}[{size}];\n")
        self.ram += size * self.bytes_of(kind)
        return name

    def value(self, name, kind, shape, order=None, start=0):
        """A Value with a buffer of its own. Currents share one array, each as long as it is read (`layout`)."""
        order = canonical_order(shape) if order is None else order
        if kind == "cur" and self.part == "step":
            name = self.fresh(name)
            self.currents[name] = [len(order), len(self.parts["step"]), len(self.parts["step"])]
        else:
            name = self.buffer(name, kind, len(order))
        return Value(name, kind, tuple(shape), order, start)

    def layout(self):
        """`size, places`: the length of the array that all currents share, and where each of them starts."""
        placed = []  # (start, end, first statement, last statement)
        for size, first, last in self.currents.values():
            start = 0
            for low, high, begun, ended in sorted(placed):
                if begun <= last and first <= ended and start < high and low < start + size:
                    start = high
            placed.append((start, start + size, first, last))
        return max((end for _, end, *_ in placed), default=0), [start for start, *_ in placed]

    def memory(self):
        """Bytes of memory that the program takes: all buffers, the currents, a row of weights, and a list of spikes."""
        return self.ram + self.bytes_of("cur") * (self.layout()[0] + self.row) + BYTES_OF_SPIKE * self.places

    # statements

    def say(self, text):
        """A comment before the next statements."""
        self.parts[self.part].append(("comment", f"/* {in_comment(text)} */"))

    def call(self, function, *arguments, start=None):
        """A call of a C function; arguments: Values, names and numbers. start: the step from which on it is made."""
        self.functions.add(function)
        statements = self.parts[self.part]
        for argument in arguments:
            if isinstance(argument, Value) and argument.name in self.currents:
                self.currents[argument.name][2] = len(statements)
        words = ", ".join(x.name if isinstance(x, Value) else str(x) for x in arguments)
        statements.append((start or 0, f"{function}({words});"))

    def zero(self, name, part="reset"):
        """Set a buffer to zeros when an image begins."""
        self.parts[part].append((0, f"memset({name}, 0, sizeof {name});"))

    def text_of(self, part):
        """The statements of a part as C. Where layers listen, each waits for its first input."""
        lines, waiting, comments = [], 0, []
        for start, text in self.parts[part]:
            if start == "comment":
                comments.append(text)
                continue
            if part == "step" and start != waiting:
                lines += ["    }"] * bool(waiting) + [f"    if (t >= {start}) {{"] * bool(start)
                waiting = start
            indent = "        " if waiting else "    "
            lines += [f"{indent}{line}" for line in (*comments, text)]
            comments = []
        return "\n".join([*lines, *["    }"] * bool(waiting), *(f"    {line}" for line in comments)])

    # where values lie

    def settled(self, x):
        """A map with its channels last in memory; what is no map in PyTorch's order."""
        return x if x.channels_last else self.moved(x, x.places[canonical_order(x.shape)], x.shape)

    def moved(self, x, table, shape, order=None):
        """The Value of `shape` that holds x's places `table`, -1 for a zero."""
        order = canonical_order(shape) if order is None else order
        y = self.value(f"{x.name}_moved", x.kind, shape, order, x.start)
        axes = separate(table, x.shape, shape) if len(x.shape) == len(shape) == 3 else None
        if axes is None:
            places = self.constant(f"{y.name}_places", table.numpy(), "i32")
            self.call(f"rearrange_{x.kind}", x, y.size, places, y, start=x.start)
            return y
        rows, columns, channels = (self.constant(f"{y.name}_read", axis.numpy(), "i16") for axis in axes)
        read = (rows, shape[1], columns, shape[2], channels, shape[0])
        self.call(f"choose_{x.kind}", x, x.shape[2], x.shape[0], *read, y, start=x.start)
        return y

    def aligned(self, inputs):
        """The inputs, all sent in the same steps: earlier ones are delayed."""
        start = max(x.start for x in inputs)
        return [x if x.start == start or x.kind == "f32" else self.delayed(x, start) for x in inputs]

    def delayed(self, x, start):
        depth, y = start - x.start, self.value(f"{x.name}_later", x.kind, x.shape, x.order, start)
        kept = self.buffer(f"{y.name}_kept", x.kind, depth * x.size)
        self.call(f"delay_{x.kind}", x, x.size, kept, depth, "t", y, start=x.start)
        return y

    def in_order_of(self, x, other):
        """x with its elements where those of `other` lie."""
        return x if torch.equal(x.order, other.order) else self.moved(x, x.places[other.order], x.shape, other.order)


def repeats(full, period):
    return bool((full.view(-1, period) == full[:period]).all())


def separate(table, read, written):
    """`rows, columns, channels` if places of a map [C, H, W] are chosen along each axis alone, else None."""
    (channels, _, columns), (out_channels, out_rows, out_columns) = read, written
    if max(*read, *written) > np.iinfo(np.int16).max:
        return None
    table = table.view(out_rows, out_columns, out_channels)
    parts = (table // (columns * channels), table // channels % columns, table % channels)
    others = ((1, 2), (0, 2), (0, 1))
    axes = [torch.where(table >= 0, part, -1).amax(dims) for part, dims in zip(parts, others)]
    i, j, k = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None]
    again = torch.where((i >= 0) & (j >= 0) & (k >= 0), (i * columns + j) * channels + k, -1)
    return axes if torch.equal(again, table) else None


def pack(codes, bits):
    """Codes of so many bits one behind the other, the lowest bit first, and one byte more: uint8."""
    each = (codes[:, None] >> np.arange(bits, dtype=np.uint32) & 1).astype(np.uint8)
    return np.append(np.packbits(each.reshape(-1), bitorder="little"), np.uint8(0))


def in_lines(numbers):
    """Numbers with commas, in lines of `LINE` letters."""
    lines, line = [], ""
    for number in numbers:
        if len(line) + len(number) + 2 > LINE:
            lines.append(line)
            line = ""
        line += f" {number}," if line else f"    {number},"
    return "\n".join([*lines, line]).rstrip(",")
