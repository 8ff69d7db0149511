#!/bin/sh
# onnxruntime 1.32.0 refuses a dilated convolution with auto_pad that onnx 1.23.2 checks, infers and computes.
#
# auto_pad SAME_UPPER lets the output have ceil(input / stride) pixels, whatever the kernel and its dilations. Expected:
# onnxruntime computes what onnx's ReferenceEvaluator does. It refuses, when the network runs and not when it is loaded:
# "Dilation not supported for AutoPadType::SAME_UPPER or AutoPadType::SAME_LOWER". So a converter that reads such a file
# computes the padding itself; written out as `pads`, the same convolution runs, with the same result.
# https://onnx.ai/onnx/operators/onnx__Conv.html
#
# Seen: "reference (1, 3, 9, 9), onnxruntime refuses; written out: differences up to 1e-06". Exit status 1 where that
# changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper, shape_inference
from onnx.reference import ReferenceEvaluator

rng = np.random.default_rng(0)
image, weight = (rng.random(shape, dtype=np.float32) for shape in ((1, 2, 9, 9), (3, 2, 3, 3)))
onnxruntime.set_default_logger_severity(4)


def model(**padding):
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], dilations=[2, 2], **padding)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, c, 9, 9)) for name, c in (("x", 2), ("y", 3)))
    weights = helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.ravel())
    graph = helper.make_graph([node], "graph", [x], [y], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def run(proto):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": image})[0]


same = model(auto_pad="SAME_UPPER")
checker.check_model(same, full_check=True)
shape_inference.infer_shapes(same, strict_mode=True)
expected = ReferenceEvaluator(same).run(None, {"x": image})[0]
try:
    run(same)
    answer = "computes"
except Exception as error:  # its errors have no common class
    answer = "refuses" if "Dilation not supported" in str(error) else "fails otherwise"
difference = np.abs(run(model(pads=[2, 2, 2, 2])) - expected).max()
print(f"reference {expected.shape}, onnxruntime {answer}; written out: differences up to {difference:.1g}")
sys.exit(not (expected.shape == (1, 3, 9, 9) and answer == "refuses" and difference < 1e-5))
PYTHON
