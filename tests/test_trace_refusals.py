"""What the tracer refuses: by function, path and advice, or by the values that an example has."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tracing import (
    Call,
    SmallNet,
    SmallResNet,
    after_conv,
    assert_unchanged,
    iadd,
    image,
    largest_difference,
    snapshot,
    trace_and_compare,
)

from ann_parser import parse_ann_model


def in_a_block(module):
    """A network whose module `block.inner` is the given one."""
    net = nn.Sequential()
    net.add_module("first", nn.Conv2d(3, 4, 1))
    net.add_module("block", nn.Sequential())
    net.block.add_module("inner", module)
    return net


REFUSED = {
    "indices of MaxPool2d": (nn.MaxPool2d(2, return_indices=True), "max_pool2d", "indices of the maxima"),
    "BatchNorm2d without statistics": (
        nn.BatchNorm2d(4, track_running_stats=False),
        "batch_norm",
        "track_running_stats=True",
    ),
    "GroupNorm": (nn.GroupNorm(2, 4), "group_norm", "use BatchNorm"),
    "bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), "interpolate", "some of its weights are negative"),
    "aligned corners": (nn.UpsamplingBilinear2d(scale_factor=2), "interpolate", "57600 copies of pixels"),
    "LPPool2d": (nn.LPPool2d(2, 2), "lp_pool2d", "no powers of its input"),
    "FractionalMaxPool2d": (nn.FractionalMaxPool2d(2, 4), "fractional_max_pool2d", "fixed windows"),
    "indices of AdaptiveMaxPool2d": (
        nn.AdaptiveMaxPool2d(2, return_indices=True),
        "adaptive_max_pool2d",
        "indices of the maxima",
    ),
    "reflected channels": (lambda x: F.pad(x[:, None], (1, 1, 1, 1, 1, 1), "reflect"), "pad", "height and width alone"),
    "pad with ones": (lambda x: F.pad(x, (1, 1), value=1.0), "pad", "only zeros"),
    "x * x": (lambda x: x * x, "mul", "no product or quotient of two activations"),
    "squeeze and excite": (lambda x: x * x.mean([2, 3], True), "mul", "no product or quotient of two activations"),
    "x / x": (lambda x: x / x, "div", "no product or quotient of two activations"),
    "1 / x": (lambda x: 1 / x, "div", "no quotient by an activation"),
    "x / 0": (lambda x: x / 0, "div", "divides by 0"),
    "x * nan": (lambda x: x * float("nan"), "mul", "the constant is NaN or infinite"),
    "x // 2": (lambda x: torch.div(x, 2, rounding_mode="floor"), "div", "rounding_mode=None"),
    "a factor for every pixel": (lambda x: x * torch.rand(8, 8), "mul", "only the image can have more"),
    "a factor for every image": (lambda x: x * torch.arange(2.0).view(2, 1, 1, 1), "mul", "for every image of a batch"),
    "a constant of another shape": (lambda x: x + torch.rand(5, 1, 1), "add", "[5, 1, 1] does not fit samples of [4,"),
    "a constant in place": (lambda x: torch.zeros(2, 4, 8, 8).add_(x), "add_", "changed in place"),
    "weight @ x": (lambda x: torch.ones(2, 2) @ x.flatten(1), "matmul", "stand on the right"),
    "maps @ weight": (lambda x: x @ torch.ones(8, 2), "matmul", "[2, 4, 8, 8] and [8, 2]"),
    "x @ vector": (lambda x: x.flatten(1) @ torch.ones(256), "matmul", "[2, 256] and [256]"),
    "x.bmm(x)": (lambda x: x.bmm(x), "bmm", "a product of two activations"),
    "tensordot": (lambda x: torch.tensordot(x, torch.ones(4, 2), ([1], [0])), "tensordot", "is a 1x1 convolution"),
    "bilinear": (lambda x: F.bilinear(x, x, torch.ones(2, 8, 8)), "bilinear", "product of two activations"),
    "a bound for every pixel": (lambda x: x.clamp(max=torch.rand(8, 8)), "clamp", "differs within a channel"),
    "a bound of the input": (lambda x: x.clamp(max=x.mean([2, 3], True)), "clamp", "must not be computed from"),
    "clamp(1, 0)": (lambda x: x.clamp(1, 0), "clamp", "above the lower one"),
    "the larger of two": (lambda x: torch.maximum(x, x.relu()), "maximum", "b + relu(a - b)"),
    "the largest channel": (lambda x: x.max(1)[0], "max", "only max_pool2d"),
    "threshold": (lambda x: F.threshold(x, 0.5, 0.0), "threshold", "a relu, are supported"),
    "where": (lambda x: torch.where(x > 0, x, 0.0), "gt", "relu, clamp, maximum and minimum"),
    "einsum": (lambda x: torch.einsum("bchw,cd->bhwd", x, torch.ones(4, 2)), "einsum", "a 1x1 convolution"),
    "pad the batch": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)), "pad", "the batch cannot be padded"),
    "permute the batch": (lambda x: x.permute(1, 0, 2, 3), "permute", "must stay the batch"),
    "x.transpose(0, 1)": (lambda x: x.transpose(0, 1), "transpose", "must stay the batch"),
    "x.flip(0)": (lambda x: x.flip(0), "flip", "must stay the batch"),
    "x.repeat of the batch": (lambda x: x.repeat(2, 1, 1, 1), "repeat", "must stay the batch"),
    "x.repeat to more dimensions": (lambda x: x.repeat(2, 1, 1, 1, 1), "repeat", "no dimension may be added"),
    "x.roll() of all": (lambda x: x.roll(1), "roll", "must stay the batch"),
    "x.chunk of the batch": (lambda x: x.chunk(2)[0], "chunk", "must stay the batch"),
    "x.unbind of the batch": (lambda x: x.unbind()[0], "unbind", "must stay the batch"),
    "one image": (lambda x: x[0], "__getitem__", "must stay the batch, as in x[:, 1:]"),
    "a part of the batch": (lambda x: x[1:], "__getitem__", "must stay the batch"),
    "no channels": (lambda x: x[:, 4:], "__getitem__", "[B, 0, 8, 8] holds no values"),
    "two lists of places": (lambda x: x[:, [0, 1], [1, 0]], "__getitem__", "one dimension only"),
    "places of the input": (lambda x: x[:, :, x], "__getitem__", "must not depend on the values"),
    "overlapping parts": (lambda x: x.tensor_split((3, 2), 1)[0], "tensor_split", "side by side"),
    "gather": (lambda x: x.gather(1, torch.zeros(2, 1, 8, 8, dtype=torch.long)), "gather", "slices, index_select"),
    "pixel_shuffle of 5 dimensions": (lambda x: F.pixel_shuffle(x[:, None], 2), "pixel_shuffle", "[B, C, H, W]"),
    "x[:, 0] = 1": (lambda x: x.__setitem__((slice(None), 0), 1.0), "__setitem__", "torch.cat or F.pad"),
    "x.half()": (lambda x: x.half(), "half", "traced in one type"),
    "broadcast": (lambda x: x + x.mean([2, 3], keepdim=True), "add", "[2, 4, 8, 8] and [2, 4, 1, 1]"),
    "x.sum()": (lambda x: x.sum(), "sum", "as in x.mean([2, 3])"),
    "if x.sum() > 0": (lambda x: x if x.sum() > 0 else -x, "sum", "as in x.mean([2, 3])"),
    "if x > 0": (lambda x: x if x > 0 else -x, "gt", "must not depend on the values"),
    "if x": (lambda x: x if x else -x, "__bool__", "must not depend on the values"),
    "x.item()": (lambda x: x.item(), "item", "must not depend on the values"),
    "x.numpy()": (lambda x: torch.from_numpy(x.numpy()), "numpy", "keep the computation in torch"),
    "view(-1)": (lambda x: x.view(-1), "view", "the batch"),
    "view(-1, 64)": (lambda x: x.view(-1, 64), "view", "the batch"),
    "x.flatten()": (lambda x: x.flatten(), "flatten", "the batch"),
    "unsqueeze(0)": (lambda x: x.unsqueeze(0), "unsqueeze", "the batch"),
    "cat, batch": (lambda x: torch.cat([x, x]), "cat", "use dim=1"),
    "cat with a constant": (lambda x: torch.cat([x, torch.ones(2, 4, 8, 8)], 1), "block.inner", "constant"),
    "mean of all": (lambda x: x.mean(), "mean", "x.mean([2, 3])"),
    "mean over channels": (lambda x: x.mean(1), "mean", "only over height and width"),
    "sum over channels": (lambda x: x.sum((1, 2)), "sum", "only over height and width"),
    "amax over channels": (lambda x: x.amax(1), "amax", "only over height and width"),
    "part windows with a divisor": (
        lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True, divisor_override=7),
        "avg_pool2d",
        "needs ceil_mode=False",
    ),
    "negative divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=-4), "avg_pool2d", "has to be positive"),
    "pooling without a batch": (lambda x: F.avg_pool2d(x.flatten(2), 2), "avg_pool2d", "must be [B, C, H, W]"),
    "dropout always on": (lambda x: F.dropout(x, 0.5), "dropout", "training=self.training"),
    "linear on channels": (nn.Linear(8, 2), "linear", "flatten it before"),
    "another type": (lambda x: x.to(torch.float64), "to", "the type must stay torch.float32"),
    "product with a weight": (lambda x: F.conv2d(x, x), "conv2d", "must not be computed from the input"),
}


@pytest.mark.parametrize("inner, function, advice", REFUSED.values(), ids=REFUSED)
def test_refusal_names_function_path_and_advice(inner, function, advice):
    net = in_a_block(inner if isinstance(inner, nn.Module) else Call(inner))
    with pytest.raises(NotImplementedError) as caught:
        parse_ann_model(net, (image(),))
    assert [part for part in (function, "block.inner", advice) if part not in str(caught.value)] == []


def test_exported_programs_are_refused_as_such():
    program = torch.export.export(SmallNet().eval(), (image(),))
    for exported in (program, program.module()):
        with pytest.raises(NotImplementedError, match=r"exported program .* pass the Python module"):
            parse_ann_model(exported, (image(),))


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match=r"the network is a function, give a torch\.nn\.Module"):
        parse_ann_model(iadd, (image(),))


def test_dimension_before_the_batch_is_refused_also_for_a_batch_of_one():
    with pytest.raises(NotImplementedError, match="the batch"):
        parse_ann_model(after_conv(lambda x: x.unsqueeze(0)), (image(1),))


def test_view_without_any_dimension_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 1, 8), Call(lambda x: x.reshape(())))
    with pytest.raises((NotImplementedError, ValueError)):
        parse_ann_model(net, (image(1),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_module_is_refused_by_its_path():
    with pytest.raises(NotImplementedError, match=r"block\.inner .*torch\.jit.* pass the Python module"):
        parse_ann_model(in_a_block(torch.jit.script(nn.ReLU())), (image(),))


OUTPUTS = {
    "constant": lambda x: torch.ones(2),
    "list": lambda x: [x],
    "dict": lambda x: {"out": x},
    "None": lambda x: None,
}


@pytest.mark.parametrize("function", OUTPUTS.values(), ids=OUTPUTS)
def test_output_that_is_no_traced_tensor_is_refused(function):
    with pytest.raises(NotImplementedError, match="return a tensor or a tuple of tensors"):
        parse_ann_model(after_conv(function), (image(),))


SHAPE_QUESTIONS = {
    "shape": lambda x: x.shape[1:] == (4, 8, 8),
    "size": lambda x: x.size(1) == 4 and tuple(x.size())[2:] == (8, 8),
    "dtype": lambda x: x.dtype == torch.float32 and x.is_floating_point(),
    "dim": lambda x: x.dim() == 4 and x.ndim == 4,
    "device": lambda x: x.device.type == "cpu" and not x.is_cuda,
    "numel": lambda x: x.numel() == len(x) * 256,
    "stride": lambda x: x.stride()[-1] == 1 and x.is_contiguous(),
}


@pytest.mark.parametrize("question", SHAPE_QUESTIONS.values(), ids=SHAPE_QUESTIONS)
def test_shape_question_passes(question):
    dag = trace_and_compare(after_conv(lambda x: F.relu(x) if question(x) else x + x))
    assert list(dag.ops) == ["conv1", "relu1"]


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (2, 3, 2, 2)])
def test_input_of_a_wrong_shape_names_the_layer(shape):
    net = nn.Sequential()
    net.add_module("block", nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=r"block\.1 cannot run on an input of \[B, \d, \d, \d\]"):
        parse_ann_model(net, (torch.randn(shape),))


def test_linear_layer_of_a_wrong_size_is_named():
    with pytest.raises(ValueError, match=r"^2 cannot run on an input of \[B, 3, 8, 8\]"):
        parse_ann_model(nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(100, 2)), (image(),))


@pytest.mark.parametrize("examples", [0, 2])
def test_wrong_number_of_inputs_is_a_value_error(examples):
    with pytest.raises(ValueError):
        parse_ann_model(SmallResNet(), tuple(image() for _ in range(examples)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["layer1.1.conv2.weight", "fc.bias"])
def test_weight_that_is_not_finite_is_named(tensor, value):
    net = SmallResNet()
    net.get_parameter(tensor).data.view(-1)[0] = value
    with pytest.raises(ValueError, match=tensor.replace(".", r"\.")):
        parse_ann_model(net, (image(),))


class RandomWeights(nn.Module):
    """A convolution with other weights at every call."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return F.relu(F.conv2d(x, self.size * torch.rand(2, 3, 3, 3)))


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-12, 1e-30])
def test_random_weights_are_refused_however_small_the_outputs(size):
    with pytest.raises(ValueError, match="draw random numbers"):
        parse_ann_model(RandomWeights(size), (image().abs(),))


@pytest.mark.parametrize("size", [1e-30, 1e-5, 1.0, 1e5, 1e20])
def test_outputs_of_every_size_are_accepted(size):
    net = SmallNet()
    net.fc.weight.data *= size
    net.fc.bias.data *= size
    parse_ann_model(net, (image(),))


def test_outputs_of_zero_are_accepted():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net[1].bias.data.fill_(-100.0)
    dag = parse_ann_model(net, (image(),))
    assert not dag(image()).any()


def test_small_differences_of_large_values_are_accepted():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        net[0].bias += 1e4
        net[1].running_mean += 1e4  # of outputs of size 1, of which rounding has taken four digits
        net[1].running_var *= 100
        net[3].running_mean.copy_(net[:3](image(64)).mean((0, 2, 3)))
    dag = parse_ann_model(net, (image(),))
    x = image()
    assert largest_difference(dag(x), net(x)) > 1e-4 * net(x).abs().max()  # it is rounding, on both sides


def test_infinite_activations_are_no_in_place_operations():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    net[0].weight.data *= 1e38
    net[2].weight.data *= 1e38
    with pytest.raises(ValueError, match="NaN or infinite values") as caught:
        parse_ann_model(net, (image(),))
    assert "in place" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_is_named(value):
    x = image()
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="the example input has NaN or infinite values"):
        parse_ann_model(SmallNet(), (x,))


@pytest.mark.parametrize("inputs", [(), torch.zeros(0, 3, 8, 8), (torch.tensor(1.0),), (3,)], ids=str)
def test_an_example_without_an_image_is_refused(inputs):
    with pytest.raises(ValueError, match="no example input"):
        parse_ann_model(SmallNet(), inputs)


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("example", [*HALF, torch.float32])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_networks_are_traced_in_float32(dtype, example):
    net = SmallResNet().to(dtype).eval()
    net.fc.bfloat16()  # of mixed types
    before = snapshot(net)
    dag = parse_ann_model(net, (image().to(example),))
    assert_unchanged(net, before)
    assert {p.dtype for p in dag.parameters()} == {torch.float32} and net.conv1.weight.dtype == dtype
    assert torch.equal(dag.conv1.weight, net.conv1.weight.float())
    assert dag(image()).dtype == torch.float32


class UnderAutocast(nn.Module):
    """A network that runs in bfloat16, as its own forward asks for."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)


@pytest.mark.parametrize("inside", [True, False], ids=["in the forward", "around the call"])
def test_autocast_is_off_while_a_network_is_traced(inside):
    net, x = SmallNet().eval(), image()
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        dag = parse_ann_model(UnderAutocast(net) if inside else net, (x,))
    assert {p.dtype for p in dag.parameters()} == {torch.float32}
    assert largest_difference(dag(x), net(x)) <= 1e-5


def test_network_that_computes_something_else_at_every_call_is_refused():
    functions = itertools.cycle([F.relu, lambda x: x + x])
    with pytest.raises(ValueError, match="differs from the network"):
        parse_ann_model(Call(lambda x: next(functions)(x)), (image(),))


def test_a_network_that_cannot_be_copied_says_why():
    net = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(1, 2, 3)), nn.ReLU())
    net(torch.zeros(1, 1, 5, 5))  # its weight is now a tensor with a history
    with pytest.raises(ValueError, match="remove its weight_norm"):
        parse_ann_model(net, (torch.zeros(1, 1, 5, 5),))
