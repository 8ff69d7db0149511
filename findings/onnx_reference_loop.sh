#!/bin/sh
# onnx 1.23.2's ReferenceEvaluator joins the scan outputs of a Loop along their first dimension instead of a new one.
#
# A Loop returns what every iteration hands out, stacked along a new first dimension, the iterations. Expected: a value
# of (2, 3) in 4 iterations comes back as (4, 2, 3), as onnx's own shape inference says and onnxruntime 1.32.0 computes.
# The reference evaluator returns (8, 3). A network whose timesteps are a Loop thus has its steps and its batch in one
# dimension there, without an error. Values of one dimension and more are affected; a Reshape behind the Loop helps.
# https://onnx.ai/onnx/operators/onnx__Loop.html
#
# Seen: "inferred (4, 2, 3), onnxruntime (4, 2, 3), reference (8, 3), same numbers". Exit status 1 where that changes.
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

STEPS, SHAPE = 4, (2, 3)
truth = helper.make_tensor_value_info("truth", TensorProto.BOOL, [])
count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
still = helper.make_tensor_value_info("still", TensorProto.BOOL, [])
each = helper.make_tensor_value_info("each", TensorProto.FLOAT, SHAPE)
nodes = [helper.make_node("Identity", ["truth"], ["still"]), helper.make_node("Identity", ["x"], ["each"])]
body = helper.make_graph(nodes, "body", [count, truth], [still, each])
graph = helper.make_graph(
    [helper.make_node("Loop", ["steps", "go"], ["all"], body=body)],
    "graph",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
    [helper.make_tensor_value_info("all", TensorProto.FLOAT, (STEPS, *SHAPE))],
    [helper.make_tensor("steps", TensorProto.INT64, [], [STEPS]), helper.make_tensor("go", TensorProto.BOOL, [], [True])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
checker.check_model(model, full_check=True)
shape = shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type.shape
inferred = tuple(dim.dim_value for dim in shape.dim)

x = np.arange(6, dtype=np.float32).reshape(SHAPE)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
runtime, reference = session.run(None, {"x": x})[0], ReferenceEvaluator(model).run(None, {"x": x})[0]
same = "same numbers" if np.array_equal(runtime.ravel(), reference.ravel()) else "other numbers"
print(f"inferred {inferred}, onnxruntime {runtime.shape}, reference {reference.shape}, {same}")
sys.exit((inferred, runtime.shape, reference.shape, same) != ((4, 2, 3), (4, 2, 3), (8, 3), "same numbers"))
PYTHON
