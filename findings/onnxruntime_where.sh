#!/bin/sh
# onnxruntime 1.32.0 takes many times as long for a Where of a random condition as for the same choice in arithmetic.
#
# Where(fires, v - 1, v) of floats equals v - Cast(fires). Expected: Where is the faster one, as a pass without
# arithmetic. It took 13 times as long on an AVX-512 machine for one in five elements at random, as if it branched for
# each of them. So neurons, masks and clippings are written with Cast, Mul and Sub.
# https://onnx.ai/onnx/operators/onnx__Where.html
#
# Seen: "same numbers; Where takes over 3 times as long as Cast and Sub (13)". Exit status 1 where that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper, numpy_helper

rng = np.random.default_rng(0)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1


def session(graph):
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def least_seconds(calls, rounds=9):
    """Processor time of each call, the least of several rounds in turn."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, seen in zip(calls, times):
            start = time.process_time()
            call()
            seen.append(time.process_time() - start)
    return [min(seen) for seen in times]


SHAPE = (2**18,)
FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL
fires, v = rng.random(SHAPE) < 0.2, rng.random(SHAPE, dtype=np.float32)
inputs = [helper.make_tensor_value_info("fires", BOOL, SHAPE), helper.make_tensor_value_info("v", FLOAT, SHAPE)]
output = helper.make_tensor_value_info("u", FLOAT, SHAPE)
minus_one = [helper.make_node("Sub", ["v", "one"], ["less"]), helper.make_node("Where", ["fires", "less", "v"], ["u"])]
arithmetic = [helper.make_node("Cast", ["fires"], ["f"], to=FLOAT), helper.make_node("Sub", ["v", "f"], ["u"])]


def chosen(nodes, *constants):
    made = session(helper.make_graph(nodes, "graph", inputs, [output], constants))
    return lambda: made.run(None, {"fires": fires, "v": v})[0]


calls = chosen(minus_one, numpy_helper.from_array(np.float32(1), "one")), chosen(arithmetic)
same = np.array_equal(*(call() for call in calls))
where, cast = least_seconds(calls)
is_slower = where > 3 * cast
print(
    f"{'same' if same else 'other'} numbers; Where takes {'over' if is_slower else 'not'} 3 times as long as Cast and "
    f"Sub ({where / cast:.0f})"
)
sys.exit(not (same and is_slower))
PYTHON
