"""Read an ONNX file: check it for damage first, and read no file but those in its own folder.

model = read_onnx("model.onnx")      # an onnx.ModelProto with all weights in it
"""

import math
import os
import re

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from runtime.torch_files import BEGINNINGS, ZIP, beginning_of

FIRST_OPSET, LAST_OPSET = 7, 26  # before 7 Add, Mul and BatchNormalization meant something else
DOMAINS = ("", "ai.onnx")  # two names of the standard operators
MAX_FILE = 2**31 - 1  # bytes, the limit of protobuf
LONGEST_NAME = 100  # letters of a name in a message
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
INTEGERS = {
    *(TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL),
    *(TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64),
}
# Tensors may share bytes of a data file, as tied weights do. A file whose tensors read its bytes more often than this
# would need much more memory than disk.
MOST_READS = 2


def read_onnx(path):
    """The model in the file `path`, with weights from external data files, checked by onnx.

    Raises OSError if the file or its data file is missing or unreadable, ValueError for a file that is damaged or of
    another kind, and NotImplementedError for an opset that cannot be imported.
    """
    start = beginning_of(path)
    if os.path.getsize(path) > MAX_FILE:
        raise ValueError(f"{path} is larger than 2 GB, export it with external data")
    with open(path, "rb") as file:
        data = file.read()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"{path} cannot be read as ONNX: {kind_of(start)}") from error
    if not model.graph.node:
        raise ValueError(f"{path} cannot be read as ONNX: {kind_of(start) if not model.ir_version else 'it is empty'}")
    check_names(model, path)
    opset_of(model, path)
    load_external_data(model, path)
    return model


def shown(text):
    """A name from a file in messages: on one line, and not too long."""
    return " ".join(str(text).split())[:LONGEST_NAME]


def check_names(model, path):
    """Raise ValueError if a name in the model is no text: protobuf reads damaged text as bytes."""
    graph = model.graph
    names = [each.name for each in (*graph.initializer, *graph.input, *graph.output)]
    names += [
        part for tensor in tensors_of(model) for entry in tensor.external_data for part in (entry.key, entry.value)
    ]
    for node in graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
        names += [attribute.name for attribute in node.attribute]
        names += [part for entry in getattr(node, "metadata_props", ()) for part in (entry.key, entry.value)]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is damaged: a name in it is no text")


def kind_of(start):
    """What a file is that holds no ONNX model, in words. start: its first bytes."""
    if start.startswith(ZIP):
        return "it is a zip file, as torch.save writes it, give the network that was saved or its export"
    kinds = (found for pattern, found, _ in BEGINNINGS if "ONNX" not in found and re.match(pattern, start, re.DOTALL))
    return next(kinds, "it is truncated, or not an ONNX file") if start else "it is empty"


def opset_of(model, path):
    """The version of the standard operators. Raises NotImplementedError for one that cannot be imported."""
    opset = next((each.version for each in model.opset_import if each.domain in DOMAINS), None)
    if opset is None or not FIRST_OPSET <= opset <= LAST_OPSET:
        raise NotImplementedError(
            f"{path} has opset {opset}, opsets {FIRST_OPSET} to {LAST_OPSET} can be imported: export it with one of "
            "them, or use onnx.version_converter"
        )
    return opset


def check_structure(model, path):
    """Raise ValueError unless onnx's own checker accepts the model. It may lack the shapes of its input and output."""
    open_ones = [each for each in (*model.graph.input, *model.graph.output) if lacks_shape(each.type)]
    for each in open_ones:
        each.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker raises errors of several kinds for damaged fields
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    for each in open_ones:
        each.type.tensor_type.ClearField("shape")


def lacks_shape(kind):
    """Whether the type of an input or output is that of a tensor of unknown number of dimensions."""
    return kind.HasField("tensor_type") and not kind.tensor_type.HasField("shape")


def tensors_of(model):
    """Yield every tensor of the main graph: initializers, and attributes of nodes."""
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t


def load_external_data(model, path):
    """Copy the values of external data files into the tensors of `model`.

    Raises FileNotFoundError for a missing data file, and ValueError for one outside of the model's folder or without
    the bytes that a tensor declares. The declared sizes are checked before anything is read.
    """
    external = [tensor for tensor in tensors_of(model) if tensor.data_location == TensorProto.EXTERNAL]
    places = [place_of(tensor, path) for tensor in external]
    if sum(length for *_, length in places) > MAX_FILE:  # onnx's checker takes no more
        raise NotImplementedError(f"{path} has more than 2 GB of weights, which cannot be imported")
    on_disk = sum(os.path.getsize(name) for name in {name for name, *_ in places})
    if sum(length for *_, length in places) > MOST_READS * on_disk:
        raise ValueError(f"{path} is damaged: its tensors overlap in their data file")
    for tensor, (name, offset, length) in zip(external, places):
        try:
            with open(name, "rb") as file:
                file.seek(offset)
                tensor.raw_data = file.read(length)
        except OSError as error:
            raise type(error)(f"{name} cannot be read ({error.strerror}), see its permissions") from error
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]


def place_of(tensor, path):
    """(file, offset, number of bytes) of a tensor's external data, all checked."""
    fields = {entry.key: entry.value for entry in tensor.external_data}
    location = fields.get("location", "")
    folder = os.path.realpath(os.path.dirname(path) or ".")
    name = os.path.realpath(os.path.join(folder, location.replace("\0", "")))
    is_inside = os.path.commonpath([folder, name]) == folder  # links followed
    if not location or "\0" in location or os.path.isabs(location) or not is_inside:
        raise ValueError(
            f"{path} reads {shown(tensor.name)} from {shown(location)!r}, which is not in the folder of the model"
        )
    if not os.path.isfile(name):
        raise FileNotFoundError(
            f"{path} has its weights in {shown(location)}, which is missing: put it into the same folder"
        )
    expected = size_in_bytes(tensor, path)
    offset, length = (fields.get(key, default) for key, default in (("offset", "0"), ("length", str(expected))))
    is_there = re.fullmatch(r"\d{1,18}", offset) and int(offset) + expected <= os.path.getsize(name)
    if not is_there or length != str(expected):
        raise ValueError(
            f"{path} does not fit {shown(location)}: the bytes of {shown(tensor.name)} are not there, export it again"
        )
    return name, int(offset), expected


def size_in_bytes(tensor, path):
    """The bytes that a tensor declares. Raises as `array_of` for types that cannot be imported."""
    check_tensor(tensor, path)
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def check_tensor(tensor, path):
    """Raise NotImplementedError for a tensor type that no network has, and ValueError for a negative size."""
    if tensor.data_type not in FLOATS | INTEGERS:
        kind = dict(zip(TensorProto.DataType.values(), TensorProto.DataType.keys())).get(tensor.data_type, "unknown")
        raise NotImplementedError(f"{path} holds {shown(tensor.name) or 'a tensor'} as {kind}, export it as float32")
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"{path} is damaged: {shown(tensor.name)} has the shape {list(tensor.dims)}")


def array_of(tensor, path):
    """The values of a tensor as a NumPy array of its own: floating point as float32, integers and bools as they are.

    Raises ValueError if its values do not fill its declared shape, and as `check_tensor`.
    """
    check_tensor(tensor, path)
    try:
        array = numpy_helper.to_array(tensor)
        if array.size != math.prod(tensor.dims):
            raise ValueError(f"it has {array.size} values")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} is damaged: {shown(tensor.name) or 'a constant'} does not have the values of its shape "
            f"{list(tensor.dims)}"
        ) from error
    return np.array(array, np.float32 if tensor.data_type in FLOATS else array.dtype)
