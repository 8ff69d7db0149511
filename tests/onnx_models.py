"""Small ONNX models for the tests of the importer, and what is asserted of an imported one."""

import importlib.util

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from networks.onnx_import import load_onnx

HAS_RUNTIME = importlib.util.find_spec("onnxruntime") is not None
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}


def values(*shape, seed=0, dtype=np.float32):
    """Random values of both signs."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def whole(*numbers):
    """A tensor of whole numbers, as shapes and axes are."""
    return np.array(numbers, np.int64)


def node(op, inputs, outputs="y", **attributes):
    """A node; inputs and outputs are names with blanks between them, "-" for one that is left out."""
    split = [["" if name == "-" else name for name in names.split()] for names in (inputs, outputs)]
    return helper.make_node(op, *split, **{"name": attributes.pop("name", f"the_{op}"), **attributes})


def model(*nodes, shape=(2, 3, 8, 8), opset=17, outputs="y", kind=TensorProto.FLOAT, ranks=None, **constants):
    """A model from "x" of this shape to `outputs`; constants: name -> array."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, kind, ranks) for name in outputs.split()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def saved(proto, path):
    """The path of a model's file."""
    path = str(path / "model.onnx") if path.is_dir() else str(path)
    onnx.save(proto, path)
    return path


def computed(path, *inputs):
    """The outputs of a file: by onnxruntime where it is installed, else by onnx's reference."""
    if not HAS_RUNTIME:
        session = ReferenceEvaluator(path)
        return session.run(None, dict(zip(session.input_names, inputs)))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([each.name for each in session.get_inputs()], inputs)))


@torch.no_grad()
def assert_same(proto, path, x=None, share=1e-5):
    """The imported network computes what the file says; the network. share: of the largest output."""
    path = saved(proto, path)
    sizes = [dim.dim_value or 2 for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    x = values(*sizes, seed=1) if x is None else x
    net = load_onnx(path)
    outputs = net(torch.from_numpy(x))
    expected = computed(path, x)
    for found, wanted in zip(outputs if isinstance(outputs, tuple) else (outputs,), expected, strict=True):
        assert found.shape == wanted.shape
        assert np.allclose(found.numpy(), wanted, rtol=0, atol=share * max(1, np.abs(wanted).max()))
    return net
