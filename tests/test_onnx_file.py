"""ONNX files that cannot be imported: refused in one line.

No other file is read, and nothing of a size that a file only declares is allocated.
"""

import os

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_models import model, node, saved, values, whole

from ann_parser import parse_ann_model
from networks.onnx_import import load_onnx

W = values(4, 3, 3, 3)
CONV = node("Conv", "x w")
IN_ONE_LINE = (ValueError, NotImplementedError, OSError)
HUGE = 2**40


def refusal(path, *kinds):
    """The message with which a file is refused, one line of readable length."""
    with pytest.raises(kinds or IN_ONE_LINE) as caught:
        load_onnx(str(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1200 and str(path) in message
    return message


def refused_model(path, *nodes, **options):
    return refusal(saved(model(*nodes, **options), path), NotImplementedError)


IMPORTABLE = "can be imported: Add, AveragePool, BatchNormalization"

# name -> (model, what the message says); the node is always named
REFUSED = {
    "hard_swish": (model(node("HardSwish", "x", name="act")), "node act (HardSwish)", "use Relu", IMPORTABLE),
    "lstm": (model(node("LSTM", "x w w"), w=values(1, 4, 8)), "the_LSTM (LSTM)", "recurrent", IMPORTABLE),
    "layer_norm": (model(node("LayerNormalization", "x w"), w=values(8)), "use BatchNormalization"),
    "no_name": (model(node("Einsum", "x", name="", equation="abcd->abdc")), "node y (Einsum)", IMPORTABLE),
    "custom": (model(node("Attention", "x", domain="com.microsoft")), "an operator of com.microsoft"),
    "quantize": (
        model(node("Relu", "x", "r"), node("QuantizeLinear", "r s", name="q"), s=np.float32(0.1)),
        "node q (QuantizeLinear)",
        "the network is quantized",
    ),
    "quantized_before_unknown": (
        model(node("HardSwish", "x", "r"), node("QLinearConv", "r"), opset=17),
        "the network is quantized",
    ),
    "quotient": (model(node("Div", "x x")), "the_Div (Div)", "no product or quotient of two activations"),
    "matmul": (model(node("MatMul", "x x")), "the_MatMul", "no product of two activations"),
    "conv_of_activations": (model(node("Conv", "x x")), "the_Conv", "a constant is supported"),
    "conv_of_constants": (model(node("Conv", "w w", "c"), node("Add", "x c"), w=W), "its input 1 is a constant"),
    "conv_3d": (model(node("Conv", "x w"), shape=(1, 1, 4, 4, 4), w=values(1, 1, 2, 2, 2)), "3 dimensions"),
    "sum": (model(node("ReduceSum", "x a"), a=whole(2, 3)), "the_ReduceSum", "constants and shapes only"),
    "mean_of_batch": (model(node("ReduceMean", "x", axes=[0])), "images of a batch"),
    "mean_of_all": (model(node("ReduceMean", "x")), "images of a batch"),
    "training_norm": (
        model(
            node("BatchNormalization", "x s s s s", "y m v", training_mode=1), s=abs(values(3)), opset=15, outputs="y"
        ),
        "training mode",
    ),
    "training_dropout": (model(node("Dropout", "x r t"), r=np.float32(0.5), t=np.bool_(True)), "training mode"),
    "indices": (
        model(node("MaxPool", "x", "p i", kernel_shape=[2, 2]), node("Cast", "i", to=1)),
        "its further output i is read",
    ),
    "reflect": (
        model(node("Pad", "x p", mode="reflect"), p=whole(0, 1, 0, 0, 0, 0, 0, 0)),
        "pads channels with mode reflect",
    ),
    "pad_batch": (model(node("Pad", "x p"), p=whole(1, 0, 0, 0, 0, 0, 0, 0)), "images of a batch"),
    "linear_resize": (model(node("Resize", "x - s", mode="linear"), s=np.float32([1, 1, 2, 2])), "mode linear"),
    "half_factor": (model(node("Resize", "x - s"), s=np.float32([1, 1, 1.5, 2])), "resizes by [1.0, 1.0, 1.5, 2.0]"),
    "no_blocks": (
        model(node("Resize", "x - s", coordinate_transformation_mode="asymmetric"), s=np.float32([1, 1, 3, 3])),
        "asymmetric and nearest_mode round_prefer_floor",
    ),
    "backwards": (model(node("Slice", "x s e a t"), s=whole(7), e=whole(0), a=whole(2), t=whole(-1)), "backwards"),
    "to_integers": (model(node("Cast", "x", "i", to=7), node("Cast", "i", to=1, name="back")), "whole numbers"),
    "transposed_gemm": (model(node("Gemm", "x w", transA=1), shape=(2, 5), w=values(2, 4)), "transA"),
    "slopes": (model(node("PRelu", "x s"), s=values(3, 8, 8)), "one per channel"),
    "softmax_11": (model(node("Softmax", "x"), opset=11), "over the last axis"),
    "constant_output": (model(node("Identity", "w", "c"), node("Relu", "x"), outputs="y c", w=W), "returns c"),
    "shape_as_value": (
        model(node("Size", "x", "n"), node("Cast", "n", "f", to=1), node("Mul", "x f", name="m")),
        "node m (Mul)",
        "computes with the shape",
    ),
    "long_name": (model(node("Einsum", "x", name="a\nb" * 1000, equation="abcd->abdc")), "(Einsum)"),
    "opset": (model(node("Relu", "x"), opset=6), "opset 6, opsets 7 to 26"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_node_and_the_reason(name, tmp_path):
    proto, *parts = REFUSED[name]
    message = refusal(saved(proto, tmp_path), NotImplementedError)
    assert all(part in message for part in parts), message


def test_what_the_tracer_refuses_is_named_by_its_module(tmp_path):
    net = load_onnx(saved(model(node("Softmax", "x", name="block/part/op", axis=0)), tmp_path))
    with pytest.raises(NotImplementedError, match=r"in block\.part"):
        parse_ann_model(net, (torch.zeros(2, 3, 8, 8),))


def test_other_inputs(tmp_path):
    proto = model(node("Add", "x z"))
    proto.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (2, 3, 8, 8)))
    assert "the inputs x, z" in refusal(saved(proto, tmp_path))
    proto = model(node("Cast", "x", to=1), kind=TensorProto.UINT8)
    assert "takes no floating-point tensor" in refusal(saved(proto, tmp_path))
    proto = model(node("Constant", "", value_float=1.0))
    del proto.graph.input[:]
    assert "no input" in refusal(saved(proto, tmp_path))
    proto = model(node("Relu", "x"))
    del proto.graph.output[:]
    assert "returns nothing" in refusal(saved(proto, tmp_path))


OTHER_FILES = {
    "empty": (b"", "it is empty"),
    "text": (b"hello, this is no network", "truncated, or not an ONNX file"),
    "page": (b"<!DOCTYPE html><html></html>", "it is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "zip": (b"PK\x03\x04" + bytes(60), "torch.save"),
    "zeros": (bytes(1000), "cannot be read as ONNX"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files(name, tmp_path):
    (tmp_path / "model.onnx").write_bytes(OTHER_FILES[name][0])
    assert OTHER_FILES[name][1] in refusal(tmp_path / "model.onnx", ValueError)


def test_missing_files_and_folders(tmp_path):
    assert "does not exist" in refusal(tmp_path / "model.onnx", FileNotFoundError)
    assert "is a folder" in refusal(tmp_path, IsADirectoryError)


GOOD = model(
    node("Conv", "x w b", "a", pads=[1, 1, 1, 1]),
    node("Relu", "a", "r"),
    node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[2, 2]),
    node("Flatten", "p", "f"),
    node("Gemm", "f v", transB=1),
    w=W,
    b=values(4),
    v=values(5, 64),
).SerializeToString()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_load_or_are_refused_in_one_line(data, tmp_path):
    if data.draw(st.booleans()):
        content = GOOD[: data.draw(st.integers(0, len(GOOD) - 1))]
    else:
        content = bytearray(GOOD)
        for _ in range(data.draw(st.integers(1, 3))):
            # the weights fill the file's middle, so that half of the damage goes to its ends
            last = data.draw(st.sampled_from([600, len(GOOD) - 1]))
            place = data.draw(st.integers(0, last))
            content[-place - 1 if data.draw(st.booleans()) else place] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(content))
    try:
        load_onnx(str(path))
    except IN_ONE_LINE as error:
        assert "\n" not in str(error) and str(path) in str(error)


def declared(shape):
    """A weight that declares a shape, and holds one value."""
    return TensorProto(name="w", dims=shape, data_type=TensorProto.FLOAT, raw_data=bytes(4))


def with_weight(tensor):
    proto = model(CONV, w=W)
    proto.graph.initializer[0].CopyFrom(tensor)
    return proto


DOUBLED = [node("Concat", f"c{i} c{i}", f"c{i + 1}", axis=0, name=f"n{i}") for i in range(60)]
# name -> a model that asks for terabytes
GREEDY = {
    "weight": with_weight(declared([HUGE, 3, 3, 3])),
    "negative_weight": with_weight(declared([-4, 3, 3, 3])),
    "constant_of_shape": model(node("ConstantOfShape", "s", "c"), node("Add", "x c", name="a"), s=whole(HUGE)),
    "expand": model(node("Expand", "w s", "c"), CONV, w=W, s=whole(HUGE, 1, 1, 1, 1)),
    "range": model(node("Range", "a b c", "r"), CONV, a=whole(0)[0], b=whole(HUGE)[0], c=whole(1)[0], w=W),
    "doubled": model(*DOUBLED, CONV, c0=values(8), w=W),
    "pad": model(node("Pad", "x p"), p=whole(0, 0, HUGE, 0, 0, 0, 0, 0)),
    "pads": model(node("Pad", "x p"), p=whole(0, 0, 60000, 60000, 0, 0, 0, 0)),
    "conv_pads": model(node("Conv", "x w", pads=[60000] * 4), w=W),
    "resize": model(node("Resize", "x - s"), s=np.float32([1, 1, 60000, 60000])),
    "transposed": model(node("ConvTranspose", "x w", strides=[60000, 60000]), w=values(3, 3, 1, 1)),
    "transposed_to": model(node("ConvTranspose", "x w", output_shape=[60000, 60000]), w=values(3, 3, 1, 1)),
    "image": model(node("Relu", "x"), shape=(1, 3, HUGE, HUGE)),
}


@pytest.mark.parametrize("name", GREEDY)
def test_declared_sizes_are_checked_before_they_are_allocated(name, tmp_path):
    """The kernel would end a process that takes terabytes: this one goes on."""
    refusal(saved(GREEDY[name], tmp_path), ValueError)


def test_axes_that_stand_twice(tmp_path):
    path = saved(model(node("Unsqueeze", "x a"), a=whole(1, 1)), tmp_path)
    assert "the_Unsqueeze (Unsqueeze) is damaged: it has an axis twice" in refusal(path, ValueError)


def test_declared_sizes_of_an_open_image_are_checked_at_the_call(tmp_path):
    net = load_onnx(
        saved(model(node("Pad", "x p"), shape=("b", 3, "h", "w"), p=whole(0, 0, 60000, 60000, 0, 0, 0, 0)), tmp_path)
    )
    with pytest.raises(ValueError, match=r"the_Pad .* which is too large"):
        net(torch.zeros(1, 3, 4096, 4096))


# External data


def external(path, location="model.data", **fields):
    """A model whose weight lies in another file."""
    proto = model(CONV, w=W)
    tensor = proto.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location, **fields)
    tensor.ClearField("raw_data")
    (path / "model.onnx").write_bytes(proto.SerializeToString())
    return path / "model.onnx"


def test_external_data(tmp_path):
    (tmp_path / "model.data").write_bytes(bytes(64) + W.tobytes())
    net = load_onnx(str(external(tmp_path, offset=64, length=W.nbytes)))
    assert np.array_equal(net.the_Conv.weight.detach().numpy(), W)
    external(tmp_path, offset=64)  # the length may be left out
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        assert np.array_equal(load_onnx("model.onnx").the_Conv.weight.detach().numpy(), W)
    finally:
        os.chdir(before)


def test_missing_external_data(tmp_path):
    message = refusal(external(tmp_path), FileNotFoundError)
    assert "model.data, which is missing: put it into the same folder" in message


@pytest.mark.parametrize("fields", [{"offset": 1}, {"length": HUGE}, {"offset": HUGE}, {"length": 4}, {"offset": -4}])
def test_external_data_of_another_size(fields, tmp_path):
    (tmp_path / "model.data").write_bytes(W.tobytes())
    assert "the bytes of w are not there" in refusal(external(tmp_path, **fields), ValueError)


@pytest.mark.parametrize("location", ["../secret", "sub/../../secret", "{folder}/secret", "link", "", "a\0b"])
def test_external_data_outside_of_the_folder(location, tmp_path):
    """The file there has the right bytes, so that only its place is a reason to refuse it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(W.tobytes())
    (folder / "link").symlink_to(tmp_path / "secret")
    path = external(folder, location.replace("{folder}", str(tmp_path)))
    assert "is not in the folder of the model" in refusal(path, ValueError)


def test_external_data_that_is_read_again_and_again(tmp_path):
    """100 tensors of the same megabyte would take 100 MB."""
    data = values(64, 64, 8, 8)
    (tmp_path / "model.data").write_bytes(data.tobytes())
    nodes = [node("Conv", f"{'x' if not i else f'v{i}'} w{i}", f"v{i + 1}", name=f"n{i}") for i in range(100)]
    proto = model(*nodes, **{f"w{i}": values(1) for i in range(100)}, outputs="v100")
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(data, tensor.name))
        onnx.external_data_helper.set_external_data(tensor, "model.data")
        tensor.ClearField("raw_data")
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    assert "overlap" in refusal(tmp_path / "model.onnx", ValueError)
