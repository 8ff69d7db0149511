"""An ONNX graph under construction: its nodes, constants and integer weights, written by hand with onnx.helper."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 21, 10  # the first with INT4; the defaults of onnx are newer than what runtimes load
FEW = 16  # values: as float32 they take less room than integers with a DequantizeLinear
EXACT_IN_FLOAT32 = 2**24  # below, float32 represents every whole number


@dataclass(frozen=True)
class Value:
    """A value of the network in the graph.

    name: of the ONNX value. shape: of one sample. constant: it is the same at every timestep, [B, ...]; other values
    are those of one step, [B, ...], or of all steps, [T*B, ...] (`export.onnx_time`).
    """

    name: str
    shape: tuple
    constant: bool = False


class Builder:
    """Collects nodes and initializers.

    nodes: the list that new nodes go to (`into`). weights: the nodes that make float32 weights of the integers; they
    stand outside of every loop, so that they run once.
    """

    def __init__(self):
        self.initializers, self.known, self.weights, self.taken = [], {}, [], {}
        self.nodes = []

    def fresh(self, label):
        """An unused name that starts with `label`."""
        number = self.taken[label] = self.taken.get(label, -1) + 1
        return f"{label}_{number}" if number else label

    @contextmanager
    def into(self, nodes):
        """Context in which new nodes go to another list."""
        before, self.nodes = self.nodes, nodes
        try:
            yield
        finally:
            self.nodes = before

    def node(self, kind, *inputs, out=None, **attributes):
        """Append a node with one output and return its name: `out`, or an unused one."""
        out = out or self.fresh(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def constant(self, values, kind=np.float32):
        """The name of a constant of these values, a tensor, an array or a list; equal ones share one initializer."""
        values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
        values = np.asarray(values, kind)
        key = (values.dtype, values.shape, values.tobytes())
        if key not in self.known:
            name = self.known[key] = self.fresh("constant")
            self.initializers.append(numpy_helper.from_array(values, name))
        return self.known[key]

    def indices(self, *values):
        """The name of a constant int64 vector: shapes, axes, places."""
        return self.constant(values, np.int64)

    def whole(self, values):
        """The name of integers as float32: of INT4 up to 4 bits, else of INT8 or INT32, behind a DequantizeLinear.

        Floats, and a few integers, are stored as float32. Raises ValueError for integers that float32 rounds.
        """
        if values.is_floating_point() or values.numel() <= FEW:
            return self.constant(values)
        integers = values.cpu().numpy()
        least, most = int(integers.min()), int(integers.max())
        if max(-least, most) > EXACT_IN_FLOAT32:
            raise ValueError(f"integers up to {max(-least, most)}, over 2^24, are rounded in float32")
        name = self.fresh("integers")
        if least >= -8 and most <= 7:
            self.initializers.append(int4(integers, name))
        else:
            kind = np.int8 if least >= -128 and most <= 127 else np.int32
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(integers, kind), name))
        one = self.constant(1.0)
        with self.into(self.weights):
            return self.node("DequantizeLinear", name, one, out=self.fresh("weight"))

    def ones(self, shape):
        """The name of a float32 weight of ones, which takes no room."""
        shape = self.indices(*shape)
        with self.into(self.weights):
            return self.node("Expand", self.constant(1.0), shape, out=self.fresh("ones"))

    def reshape(self, x, *sizes):
        """The value `x` as [-1, *sizes]."""
        return self.node("Reshape", x, self.indices(-1, *sizes))


def int4(integers, name):
    """Integers from -8 to 7 as an INT4 tensor: two to a byte, the first in the low bits."""
    halves = (integers.ravel() & 15).astype(np.uint8)
    halves = np.append(halves, np.zeros(len(halves) % 2, np.uint8))
    packed = (halves[0::2] | halves[1::2] << 4).tobytes()
    return helper.make_tensor(name, TensorProto.INT4, integers.shape, packed, raw=True)
