"""Operators of imported ONNX networks: each is compared with onnxruntime, or with onnx's own reference."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx_models import assert_same, model, node, values, whole

W = values(4, 3, 3, 3) / 5
DRAWN = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NORM = {name: abs(values(3, seed=i)) + 0.5 for i, name in enumerate(("g", "b", "m", "v"))}

# name -> model
CASES = {
    "conv": model(node("Conv", "x w b"), w=W, b=values(4)),
    "conv_asymmetric": model(node("Conv", "x w", pads=[0, 1, 2, 0], strides=[2, 1]), w=W),
    "conv_same_upper": model(node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 3]), w=W),
    "conv_same_lower": model(node("Conv", "x w", auto_pad="SAME_LOWER", strides=[2, 2]), w=values(4, 3, 2, 4)),
    "conv_same_even": model(node("Conv", "x w", auto_pad="SAME_LOWER"), w=values(4, 3, 2, 4)),
    "conv_valid": model(node("Conv", "x w", auto_pad="VALID"), w=W),
    "conv_depthwise": model(node("Conv", "x w", group=3, dilations=[2, 1]), w=values(6, 1, 3, 3)),
    "conv_1d": model(node("Conv", "x w", pads=[1, 2]), shape=(2, 3, 9), w=values(4, 3, 3)),
    "transposed": model(node("ConvTranspose", "x w b", strides=[2, 2]), w=values(3, 4, 2, 2), b=values(4)),
    "transposed_grouped": model(
        node("ConvTranspose", "x w", group=3, strides=[2, 3], pads=[1, 1, 1, 1], output_padding=[1, 2]),
        w=values(3, 2, 3, 3),
    ),
    "transposed_asymmetric": model(
        node("ConvTranspose", "x w", strides=[2, 2], pads=[0, 1, 1, 0]), w=values(3, 2, 3, 3)
    ),
    "transposed_same": model(node("ConvTranspose", "x w", strides=[2, 2], auto_pad="SAME_UPPER"), w=values(3, 2, 3, 3)),
    "transposed_to": model(node("ConvTranspose", "x w", strides=[2, 2], output_shape=[16, 15]), w=values(3, 2, 3, 3)),
    "transposed_1d": model(node("ConvTranspose", "x w", strides=[2]), shape=(2, 3, 5), w=values(3, 2, 3)),
    "norm": model(node("BatchNormalization", "x g b m v", epsilon=0.01), **NORM),
    "norm_1d": model(node("BatchNormalization", "x g b m v"), shape=(2, 3), **NORM),
    "norm_opset_7": model(node("BatchNormalization", "x g b m v"), opset=7, **NORM),
    "relu": model(node("Relu", "x")),
    "clip_attributes": model(node("Clip", "x", min=0.0, max=6.0), opset=10),
    "clip_lower_attribute": model(node("Clip", "x", min=0.0), opset=7),
    "clip_inputs": model(node("Clip", "x lo hi"), lo=np.float32(0), hi=np.float32(0.7)),
    "clip_upper": model(node("Clip", "x - hi"), hi=np.float32(0.7)),
    "clip_both_signs": model(node("Clip", "x lo hi"), lo=np.float32(-0.5), hi=np.float32(0.7)),
    "leaky": model(node("LeakyRelu", "x", alpha=0.2)),
    "leaky_default": model(node("LeakyRelu", "x")),
    "prelu": model(node("PRelu", "x s"), s=values(3, 1, 1)),
    "prelu_batched": model(node("PRelu", "x s"), s=values(1, 3, 1, 1)),
    "prelu_shared": model(node("PRelu", "x s"), s=values(1)),
    "prelu_features": model(node("PRelu", "x s"), shape=(2, 5), s=values(5)),
    "sigmoid": model(node("Sigmoid", "x")),
    "softmax": model(node("Softmax", "x", axis=1)),
    "softmax_opset_11": model(node("Softmax", "x"), shape=(2, 5), opset=11),
    "log_softmax": model(node("LogSoftmax", "x"), shape=(2, 5)),
    "add_itself": model(node("Add", "x x")),
    "subtract": model(node("Relu", "x", "r"), node("Sub", "x r")),
    "add_constant": model(node("Add", "c x"), c=values(3, 1, 1)),
    "subtract_from": model(node("Sub", "c x"), c=np.float32(1.5)),
    "multiply": model(node("Mul", "x c"), c=values(1, 3, 1, 1)),
    "divide": model(node("Div", "x c"), c=np.float32([3])),
    "divide_by_tensor": model(node("Div", "x c"), c=values(8, 8)),
    "concat": model(node("Relu", "x", "r"), node("Concat", "x r x", axis=-3)),
    "global_average": model(node("GlobalAveragePool", "x")),
    "global_average_1d": model(node("GlobalAveragePool", "x"), shape=(2, 3, 7)),
    "global_max": model(node("GlobalMaxPool", "x")),
    "mean_attribute": model(node("ReduceMean", "x", axes=[2, 3], keepdims=0), opset=11),
    "mean_negative": model(node("ReduceMean", "x", axes=[-1, -2])),
    "mean_input": model(node("ReduceMean", "x a", keepdims=0), opset=18, a=whole(2, 3)),
    "gemm": model(node("Gemm", "x w b", transB=1, alpha=0.5, beta=2.0), shape=(2, 5), w=values(4, 5), b=values(4)),
    "gemm_plain": model(node("Gemm", "x w b"), shape=(2, 5), w=values(5, 4), b=values(1, 4)),
    "gemm_scalar": model(node("Gemm", "x w b"), shape=(2, 5), w=values(5, 4), b=values(1)),
    "gemm_without_bias": model(node("Gemm", "x w"), shape=(2, 5), w=values(5, 4)),
    "matmul": model(node("MatMul", "x w"), shape=(2, 5), w=values(5, 4)),
    "matmul_add": model(node("MatMul", "x w", "z"), node("Add", "b z"), shape=(2, 5), w=values(5, 4), b=values(4)),
    "flatten": model(node("Flatten", "x")),
    "flatten_negative": model(node("Flatten", "x", axis=-3)),
    "reshape": model(node("Reshape", "x s"), s=whole(2, -1)),
    "reshape_keeps": model(node("Reshape", "x s"), s=whole(0, 0, 64)),
    "reshape_attribute": model(node("Constant", "", "s", value_ints=[0, -1]), node("Reshape", "x s")),
    "squeeze": model(node("GlobalAveragePool", "x", "z"), node("Squeeze", "z", axes=[2, -1]), opset=11),
    "squeeze_input": model(node("GlobalAveragePool", "x", "z"), node("Squeeze", "z a"), a=whole(3)),
    "squeeze_all": model(node("GlobalAveragePool", "x", "z"), node("Squeeze", "z")),
    "unsqueeze": model(node("Unsqueeze", "x", axes=[2, -1]), shape=(2, 5), opset=11),
    "unsqueeze_input": model(node("Unsqueeze", "x a"), shape=(2, 5), a=whole(1, 3)),
    "transpose": model(node("Transpose", "x", perm=[0, 2, 3, 1])),
    "slice_attributes": model(node("Slice", "x", axes=[1, 2], starts=[1, -5], ends=[3, 2**62]), opset=9),
    "slice_inputs": model(node("Slice", "x s e a t"), s=whole(0, 1), e=whole(8, -1), a=whole(-1, 2), t=whole(2, 3)),
    "slice_without_axes": model(node("Slice", "x s e"), s=whole(0, 1), e=whole(2, 3)),
    "split_attribute": model(node("Split", "x", "y z", axis=1, split=[1, 2]), opset=11, outputs="y z"),
    "split_input": model(node("Split", "x s", "y z", axis=-1), outputs="y z", s=whole(3, 5)),
    "split_equal": model(node("Split", "x", "y z", axis=2), outputs="y z"),
    "split_number": model(node("Split", "x", "y z", axis=1, num_outputs=2), outputs="y z", opset=18),
    "split_to_sequence": model(
        node("SplitToSequence", "x s", "q", axis=1), node("SequenceAt", "q p"), s=whole(1, 2), p=np.int64(-1)
    ),
    "split_to_equal_parts": model(
        node("SplitToSequence", "x s", "q", axis=2), node("SequenceAt", "q p"), s=np.int64(3), p=np.int64(2)
    ),
    "pad_attribute": model(node("Pad", "x", pads=[0, 0, 1, 2, 0, 0, 0, 3]), opset=7),
    "pad_input": model(node("Pad", "x p"), p=whole(0, 0, 1, 2, 0, 0, 0, -3)),
    "pad_value": model(node("Pad", "x p c"), p=whole(0, 1, 0, 2, 0, 0, 0, 0), c=np.float32(1.5)),
    "pad_reflect": model(node("Pad", "x p", mode="reflect"), p=whole(0, 0, 1, 2, 0, 0, 0, 3)),
    "pad_edge": model(node("Pad", "x p", mode="edge"), p=whole(0, 0, 9, 2, 0, 0, 0, -3)),
    "pad_wrap": model(node("Pad", "x p", mode="wrap"), opset=19, p=whole(0, 0, 1, 2, 0, 0, 0, 3)),
    "pad_axes": model(node("Pad", "x p - a"), opset=18, p=whole(1, 0, 2, 0), a=whole(-1, 2)),
    "cast": model(node("Cast", "x", "z", to=11, name="first"), node("Cast", "z", to=1)),
    "identity": model(node("Identity", "x", "z"), node("Dropout", "z", "q"), node("Relu", "q")),
    "upsample_7": model(node("Upsample", "x", scales=[1.0, 1.0, 2.0, 3.0]), opset=7),
    "upsample_9": model(node("Upsample", "x s"), opset=9, s=np.float32([1, 1, 2, 3])),
    "resize_10": model(node("Resize", "x s"), opset=10, s=np.float32([1, 1, 3, 1])),
    "resize_default": model(node("Resize", "x - s"), s=np.float32([1, 1, 3, 2])),
    "resize_asymmetric": model(
        node("Resize", "x - s", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        s=np.float32([1, 1, 3, 4]),
    ),
    "resize_half": model(
        node("Resize", "x - s", coordinate_transformation_mode="asymmetric"), s=np.float32([1, 1, 2, 2])
    ),
    "resize_sizes": model(node("Resize", "x - - s"), s=whole(2, 3, 16, 24)),
    "resize_axes": model(node("Resize", "x - s", axes=[3, 2]), opset=18, s=np.float32([2, 1])),
    "max_pool_of_padding": model(
        node("Relu", "x", "r"),
        node("Pad", "r p c", "z"),
        node("MaxPool", "z", kernel_shape=[2, 2], pads=[0, 0, 1, 1], strides=[2, 2]),
        p=whole(0, 0, 1, 1, 0, 0, 1, 1),
        c=np.float32(-5),
        shape=(2, 3, 7, 7),
    ),
    "newest_opset": model(node("Conv", "x w", "z"), node("Relu", "z"), opset=26, w=W),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_the_file_says(name, tmp_path):
    assert_same(CASES[name], tmp_path)


@st.composite
def windows(draw, is_pooling=False):
    """Attributes of a window operator, and the size of an image that one window fits into."""
    pairs = {name: draw(st.tuples(*[st.integers(*bounds)] * 2)) for name, bounds in BOUNDS.items()}
    auto_pad = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto_pad.startswith("SAME"):
        pairs["dilations"] = (1, 1)  # onnxruntime refuses others
    pads = draw(st.tuples(*[st.integers(0, 3)] * 4))
    if is_pooling:  # a window must not lie in the padding
        pads = tuple(min(pad, size - 1) for pad, size in zip(pads, pairs["kernel_shape"] * 2))
        if auto_pad.startswith("SAME"):  # onnxruntime would pad by less than nothing
            pairs["strides"] = tuple(map(min, pairs["strides"], pairs["kernel_shape"]))
    beside = {"pads": pads} if auto_pad == "NOTSET" else {"auto_pad": auto_pad}
    return draw(st.tuples(*[st.integers(7, 10)] * 2)), pairs | beside


BOUNDS = {"kernel_shape": (1, 4), "strides": (1, 3), "dilations": (1, 2)}


def spans(attributes):
    return [(size - 1) * step + 1 for size, step in zip(attributes["kernel_shape"], attributes["dilations"])]


@DRAWN
@given(drawn=windows(), groups=st.sampled_from([1, 2]), bias=st.booleans())
def test_drawn_convolutions(drawn, groups, bias, tmp_path):
    size, attributes = drawn
    constants = {"w": values(4, 4 // groups, *attributes["kernel_shape"])} | ({"b": values(4)} if bias else {})
    conv = node("Conv", "x w b" if bias else "x w", group=groups, **attributes)
    assert_same(model(conv, shape=(2, 4, *size), **constants), tmp_path)


@DRAWN
@given(drawn=windows(), groups=st.sampled_from([1, 2]), more=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_drawn_transposed_convolutions(drawn, groups, more, tmp_path):
    size, attributes = drawn
    steps = list(zip(more, attributes["strides"], spans(attributes)))
    assume(all(extra < stride for extra, stride, _ in steps))  # onnxruntime refuses others
    # SAME would pad by less than nothing
    assume("pads" in attributes or all(stride <= span + extra for extra, stride, span in steps))
    up = node("ConvTranspose", "x w", group=groups, output_padding=more, **attributes)
    assert_same(model(up, shape=(2, 4, *size), w=values(4, 2, *attributes["kernel_shape"])), tmp_path)


@DRAWN
@given(drawn=windows(is_pooling=True), ceil=st.booleans(), behind_relu=st.booleans())
def test_drawn_max_poolings(drawn, ceil, behind_relu, tmp_path):
    size, attributes = drawn
    pool = node("MaxPool", "z", ceil_mode=int(ceil and "pads" in attributes), **attributes)
    before = node("Relu" if behind_relu else "Identity", "x", "z")
    assert_same(model(before, pool, shape=(2, 3, *size)), tmp_path)


@DRAWN
@given(drawn=windows(is_pooling=True), ceil=st.booleans(), counts=st.booleans())
def test_drawn_average_poolings(drawn, ceil, counts, tmp_path):
    size, attributes = drawn
    attributes["dilations"] = (1, 1)
    pads = attributes.get("pads", (0, 0, 0, 0))
    is_even = all(b == e and 2 * b <= k for b, e, k in zip(pads, pads[2:], attributes["kernel_shape"]))
    ceil = ceil and "pads" in attributes and (is_even or not counts)  # others are refused
    pool = node("AveragePool", "x", ceil_mode=int(ceil), count_include_pad=int(counts), **attributes)
    assert_same(model(pool, shape=(2, 3, *size), opset=19), tmp_path)
