"""One node of an ONNX graph, as the importer sees it: its constants, its attributes, and its name in messages."""

import copy

import numpy as np
import onnx

from networks.onnx_file import array_of, shown

MAX_SIZE = 2**16  # bound of a kernel size, stride, padding or factor, as in a saved network


def as_written(value):
    """A float32 number as the network had it in Python: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class Damaged(ValueError):
    """Error for a node that does not fit its inputs, or declares impossible sizes."""


class Node:
    """A node of the graph.

    op: name of the operator. name: its name, or that of its first output. inputs, outputs: names of values, "" for one
    that is left out. attributes: name -> value; a tensor is a NumPy array. opset: version of the operators.
    constants: name of a value -> its NumPy array, for all values known so far. batch: images per batch that the file
    declares, or None. is_nonnegative: whether no activation that it reads can be negative.
    """

    is_nonnegative = False

    def __init__(self, proto, path, opset, batch, constants):
        self.op, self.path, self.opset, self.batch = proto.op_type, path, opset, batch
        self.inputs, self.outputs = list(proto.input), list(proto.output)
        self.name = proto.name or next((name for name in self.outputs if name), "")
        self.constants = constants
        self.attributes = {each.name: self.value_of(each) for each in proto.attribute}

    @property
    def label(self):
        """The node in messages."""
        return f"{self.path}: node {shown(self.name)} ({shown(self.op)})"

    def alone(self):
        """A copy that holds its own constants only, for a layer that keeps it."""
        node = copy.copy(self)
        node.constants = {name: self.constants[name] for name in self.inputs if name in self.constants}
        return node

    def refuse(self, reason):
        """Raise NotImplementedError that names the node."""
        raise NotImplementedError(f"{self.label} cannot be imported: {reason}")

    def damaged(self, reason):
        """Raise Damaged, a ValueError, that names the node."""
        raise Damaged(f"{self.label} is damaged: {reason}")

    def value_of(self, attribute):
        """The value of an attribute. Raises NotImplementedError for a graph, a sparse tensor and the like."""
        kinds = onnx.AttributeProto
        if attribute.type == kinds.TENSOR:
            return array_of(attribute.t, self.path)
        if attribute.type not in (kinds.FLOAT, kinds.INT, kinds.STRING, kinds.FLOATS, kinds.INTS, kinds.STRINGS):
            self.refuse(f"its attribute {attribute.name} is no number and no dense tensor")
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.type == kinds.FLOAT:
            return as_written(value)
        return value.decode(errors="replace") if isinstance(value, bytes) else value

    def has(self, i):
        """Whether input `i` is given."""
        return i < len(self.inputs) and self.inputs[i] != ""

    def is_constant(self, i):
        """Whether input `i` is given and known."""
        return self.has(i) and self.inputs[i] in self.constants

    def constant(self, i):
        """The array of input `i`, None if it is left out. Raises NotImplementedError if the network computes it."""
        if not self.has(i):
            return None
        if not self.is_constant(i):
            self.refuse(f"its input {shown(self.inputs[i])} is computed by the network, a constant is supported")
        return self.constants[self.inputs[i]]

    def weight(self, i):
        """As `constant`, but it must be there, as floating point."""
        array = self.constant(i)
        if array is None or array.dtype != np.float32:
            self.damaged(f"its input {i + 1} must be a floating-point tensor")
        return array

    def check_activations(self, *places):
        """Raise NotImplementedError unless the inputs at these places are computed by the network."""
        for i in places:
            if not self.has(i) or self.is_constant(i):
                self.refuse(f"its input {i + 1} is a constant, an activation is supported")

    def attribute(self, name, default=None):
        """An attribute, or its default."""
        return self.attributes.get(name, default)

    def sizes(self, name, rank, default=1, least=1):
        """An attribute of `rank` whole numbers within bounds, such as strides. Raises ValueError for other values."""
        values = tuple(self.attribute(name) or [default] * rank)
        if len(values) != rank or not all(least <= value <= MAX_SIZE for value in values):
            self.damaged(f"{name} is {list(values)}, use {rank} numbers from {least} to {MAX_SIZE}")
        return values

    def numbers(self, name, i):
        """Whole numbers that older opsets hold in attribute `name` and newer ones in input `i`; None if left out."""
        if name in self.attributes:
            return [int(value) for value in np.ravel(self.attributes[name])]
        array = self.constant(i)
        return None if array is None else [int(value) for value in array.ravel()]
