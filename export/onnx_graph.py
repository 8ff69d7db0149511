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


class Scope:
    """The nodes of a graph, or of the body of a loop, and its constants; parts of one graph share these.

    initializers: the constants' tensors. known: what a constant holds -> its name.
    """

    def __init__(self, graph=None):
        self.nodes = []
        self.initializers, self.known = ([], {}) if graph is None else (graph.initializers, graph.known)


class Builder:
    """Collects nodes and initializers in the current scope (`into`).

    dequantizes: whether DequantizeLinear makes floats of integer weights, or Cast. The first marks quantized layers
    for tools. The second is computed once, when a runtime loads the file, also in the body of a loop. steps: the number
    that a constant added at every step is multiplied by, other than 1 for several steps in one number
    (`export.onnx_pairs`).
    """

    def __init__(self, dequantizes=False):
        self.scope, self.taken, self.dequantizes, self.steps = Scope(), {}, dequantizes, 1.0

    def fresh(self, label):
        """An unused name that starts with `label`."""
        number = self.taken[label] = self.taken.get(label, -1) + 1
        return f"{label}_{number}" if number else label

    @contextmanager
    def into(self, scope):
        """Context in which new nodes and constants go to another scope."""
        before, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = before

    @contextmanager
    def added_as(self, steps):
        """Context in which `bias` multiplies by `steps`."""
        before, self.steps = self.steps, steps
        try:
            yield
        finally:
            self.steps = before

    def node(self, kind, *inputs, out=None, **attributes):
        """Append a node with one output and return its name: `out`, or an unused one."""
        out = out or self.fresh(kind.lower())
        self.scope.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def constant(self, values, kind=np.float32):
        """The name of a constant of these values, a tensor, an array or a list; equal ones share one initializer."""
        values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
        values = np.asarray(values, kind)
        key = (values.dtype, values.shape, values.tobytes())
        known = self.scope.known
        if key not in known:
            name = known[key] = self.fresh("constant")
            self.scope.initializers.append(numpy_helper.from_array(values, name))
        return known[key]

    def indices(self, *values):
        """The name of a constant int64 vector: shapes, axes, places."""
        return self.constant(values, np.int64)

    def whole(self, values):
        """The name of integers as float32: of INT4 up to 4 bits, else of INT8 or INT32, behind a node that widens them.

        Floats, and a few integers, are stored as float32. Raises ValueError for integers that float32 rounds.
        """
        if values.is_floating_point() or values.numel() <= FEW:
            return self.constant(values)
        integers = values.cpu().numpy()
        least, most = int(integers.min()), int(integers.max())
        if max(-least, most) > EXACT_IN_FLOAT32:
            raise ValueError(f"integers up to {max(-least, most)}, over 2^24, are rounded in float32")
        key = ("whole", integers.shape, integers.tobytes())
        if key not in self.scope.known:
            name = self.fresh("integers")
            if least >= -8 and most <= 7:
                self.scope.initializers.append(int4(integers, name))
            else:
                kind = np.int8 if least >= -128 and most <= 127 else np.int32
                self.scope.initializers.append(numpy_helper.from_array(np.ascontiguousarray(integers, kind), name))
            self.scope.known[key] = self.widened(name)
        return self.scope.known[key]

    def widened(self, name):
        """The name of integers, an initializer, as float32."""
        out = self.fresh("weight")
        if self.dequantizes:
            return self.node("DequantizeLinear", name, self.constant(1.0), out=out)
        return self.node("Cast", name, to=TensorProto.FLOAT, out=out)

    def ones(self, shape):
        """The name of a float32 weight of ones, which takes no room."""
        key = ("ones", tuple(shape))
        if key not in self.scope.known:
            sizes = self.indices(*shape)
            self.scope.known[key] = self.node("Expand", self.constant(1.0), sizes, out=self.fresh("ones"))
        return self.scope.known[key]

    def bias(self, values):
        """The name of integers that are added at every step."""
        if self.steps == 1:
            return self.whole(values)
        return self.constant(values.double() * self.steps)

    def reshape(self, x, *sizes):
        """The value `x` as [-1, *sizes]."""
        return self.node("Reshape", x, self.indices(-1, *sizes))


def int4(integers, name):
    """Integers from -8 to 7 as an INT4 tensor: two to a byte, the first in the low bits."""
    halves = (integers.ravel() & 15).astype(np.uint8)
    halves = np.append(halves, np.zeros(len(halves) % 2, np.uint8))
    packed = (halves[0::2] | halves[1::2] << 4).tobytes()
    return helper.make_tensor(name, TensorProto.INT4, integers.shape, packed, raw=True)
