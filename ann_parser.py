"""The tracer: runs a network once and records what it computes as a SpikeDAGModule.

`wrapped_functions` is the table of what can be traced: the name of a torch function -> (the function, the function
that runs and records it instead). A `TorchFunctionMode` sends every call on a traced tensor through that table; torch
itself is not patched, so nothing has to be restored after an error. What is not in the table is refused by name.
"""

import copy
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from dag_rewrites import fold_batch_norms
from spike_dag import SpikeDAGModule
from spike_layers import (
    ConcatOp,
    SoftmaxOp,
    SpikeAdd,
    SpikeAvgPool2d,
    SpikeBatchNorm,
    SpikeConv2d,
    SpikeConvTranspose2d,
    SpikeLinear,
    SpikeMaxPool2d,
    SpikePad,
    SpikeReLU,
    ViewOp,
)

CAN_BE_TRACED = (
    "conv2d, conv_transpose2d, linear, batch_norm, relu, relu6, avg_pool2d, max_pool2d, add, cat, pad, view and flatten"
)

ON_THE_IMAGE = "normalise the images in the data set or its loader instead, or write a BatchNorm as the first layer"
EXPORTED = "is an exported program and cannot be traced, pass the Python module that was given to torch.export instead"

# what a user can write instead of functions that are refused, by their names
ADVICE_FOR = {
    "use BatchNorm, whose statistics are constant in eval mode": ("instance_norm", "layer_norm", "group_norm"),
    "the indices of the maxima are not supported, use conv_transpose2d to go back up": ("max_pool2d_with_indices",),
    "use max_pool2d with a kernel size": ("adaptive_max_pool2d", "adaptive_max_pool2d_with_indices"),
    "use conv_transpose2d with a relu behind it; for nearest neighbours of values without a sign its weights are ones, "
    "with as many groups as channels and the kernel size and stride of the factor": (
        "interpolate",
        "upsample",
        "upsample_nearest",
        "upsample_bilinear",
        "pixel_shuffle",
    ),
    "use relu: a neuron sends no negative spikes": (
        *("leaky_relu", "rrelu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish"),
        *("softplus", "softsign", "tanhshrink", "hardshrink", "softshrink"),
    ),
    "inside of a network put a ReLU in its place; at its end leave it out, and apply it outside, to what the converted "
    "network returns": ("sigmoid", "logsigmoid", "hardsigmoid", "tanh", "exp"),
    "a network's path must not depend on the values of its activations": (
        *("bool", "item", "tolist", "int", "float", "index", "nonzero", "where"),
        *("eq", "ne", "lt", "le", "gt", "ge", "allclose", "equal", "argmax", "argmin", "topk", "sort"),
    ),
    "keep the computation in torch": ("numpy", "array"),
    "write it with convolutions of weights 0 and 1: a 1x1 convolution takes some of the channels, and with stride 2 "
    "every second pixel": (
        *("getitem", "narrow", "select", "index_select", "chunk", "split", "split_with_sizes", "tensor_split"),
        *("unbind", "take_along_dim", "gather", "slice"),
    ),
    "leave it out, and permute the weights of the layer behind it instead: features stay in the order C, H, W": (
        *("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "flip", "roll", "T", "mT"),
    ),
    "the product with a constant weight is a linear layer, F.linear(x, weight.t()); a product of two activations "
    "cannot be computed by spikes": (
        *("matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "dot", "inner"),
    ),
    "use x.mean([2, 3]) or an average pooling, and put the factor into the weights behind it": ("sum",),
    "put the minus sign into the weights of the layer before it": ("neg", "negative"),
    "leave it out, a network is traced in one type": ("half", "bfloat16", "double", "type"),
}
ADVICE = {name: advice for advice, names in ADVICE_FOR.items() for name in names}
SUBTRACTIONS = ("sub", "subtract", "rsub", "isub")
PRODUCTS = (
    *("mul", "multiply", "rmul", "imul"),
    *("div", "divide", "true_divide", "truediv", "rdiv", "rtruediv", "itruediv"),
)

HALF_TYPES = (torch.float16, torch.bfloat16)
SAME_SHARE = 1e-4  # of the largest output: what folding and another order of summing leave between two equal networks
ROUNDINGS = 10  # of the graph's own rounding that may lie between them, where outputs are small sums of large values


def parse_ann_model(model, inputs, fold=True):
    """The SpikeDAGModule that computes what `model.eval()` computes, with its own copy of the weights.

    inputs: a tuple of example inputs, [B, C, H, W] each; the batch size is not recorded. fold: BatchNorm becomes part
    of the layer before or behind it where that is exact (`fold_batch_norms`). Dropout and identities leave no op.
    Weights that two calls share become two copies. A float16 or bfloat16 network is traced as a float32 copy, on
    float32 copies of `inputs`, and autocast is off. `model` and torch stay as they were, also after an error.

    Raises NotImplementedError for a function that cannot be traced, with its name, module path and advice, and
    ValueError for values that are not finite, where the network cannot run on `inputs`, or where the graph does not
    compute the network's output.
    """
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    check_example(inputs)
    refuse_compiled(model)
    check_finite_weights(model)
    model, inputs = in_float32(model), tuple(as_float32(x) for x in inputs)
    # two images at least: with one, a view that mixes up batch and channels could pass unnoticed
    traced = Trace(copy_of(model).eval()).run(*[torch.cat([x, x]) if len(x) == 1 else x for x in inputs])
    dag = copy.deepcopy(traced)
    if fold:
        fold_batch_norms(dag)
    dag.lint()
    with torch.no_grad(), WithoutAutocast():
        expected = copy_of(model).eval()(*[x.clone() for x in inputs])
    check_same_output(as_tuple(expected), dag, traced, inputs, "the traced graph")
    return dag


def check_example(inputs):
    """Raise ValueError unless there are example inputs, with an image each, and all values are finite."""
    if not inputs or not all(isinstance(x, torch.Tensor) and x.dim() and len(x) for x in inputs):
        raise ValueError("no example input, give a tuple of tensors [B, C, H, W] with one image or more")
    if not all(torch.isfinite(x).all() for x in inputs):
        raise ValueError("the example input has NaN or infinite values, look at how images are read and normalised")


def in_float32(model):
    """The model, or a float32 copy of one with float16 or bfloat16 weights or buffers."""
    is_half = any(x.dtype in HALF_TYPES for x in (*model.parameters(), *model.buffers()))
    return copy_of(model).float() if is_half else model


def as_float32(value):
    """A float16 or bfloat16 tensor in float32, anything else as it is."""
    is_half = isinstance(value, torch.Tensor) and value.dtype in HALF_TYPES
    return value.float() if is_half else value


@contextmanager
def autocast_off():
    """Within it autocast is off, on every device where it is on."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class WithoutAutocast(TorchFunctionMode):
    """Within it no call runs under autocast, also where a network's own forward switches it on."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        with autocast_off():
            return function(*args, **(kwargs or {}))


def copy_of(model):
    """A deep copy. Raises ValueError where PyTorch cannot make one."""
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # torch.nn.utils.weight_norm leaves tensors that cannot be copied
        raise ValueError(
            f"the network cannot be copied ({str(error).splitlines()[0][:80]}), remove its weight_norm and "
            "spectral_norm (torch.nn.utils.remove_weight_norm), or use those of torch.nn.utils.parametrizations"
        ) from error


def refuse_compiled(model):
    """Raise NotImplementedError for what is no Python module, or has one inside whose calls cannot be seen."""
    if isinstance(model, torch.export.ExportedProgram):
        raise NotImplementedError(f"the network {EXPORTED}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"the network is a {type(model).__name__}, give a torch.nn.Module")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"{path or 'the network'} is compiled by torch.jit and cannot be traced, pass the Python module instead"
            )


def check_finite_weights(model):
    """Raise ValueError that names the first tensor with NaN or infinite values."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of the network has NaN or infinite values, train the network again")


@torch.no_grad()
def check_same_output(expected, dag, traced, inputs, name):
    """Raise ValueError unless the graph `name` computes the tensors `expected` from `inputs`, but for rounding.

    The measure is the largest output, however small. Where outputs are small differences of large values, it is how far
    rounding moves the outputs of `traced`, the graph with no BatchNorm folded, which a run in float64 shows.
    """
    if not all(torch.isfinite(x).all() for x in expected):
        raise ValueError("the network returns NaN or infinite values for finite inputs, train it again")
    with autocast_off():
        errors = differences(expected, as_tuple(dag(*inputs)))
    limits = [SAME_SHARE * x.abs().max().item() for x in expected]
    if any(error > limit for error, limit in zip(errors, limits)):
        limits = [max(limit, ROUNDINGS * error) for limit, error in zip(limits, rounding_errors(traced, inputs))]
    for error, limit in zip(errors, limits):
        if not error <= limit:
            raise ValueError(
                f"{name} differs from the network by {error:.2g}: does it change a view in place, or draw random "
                "numbers? Write these parts without in-place operations"
            )


def differences(outputs, others):
    """The largest difference between each two tensors; infinite between two shapes, or where one has NaN."""
    pairs = zip(outputs, others, strict=True)
    return [(a - b).abs().nan_to_num(nan=torch.inf).max().item() if a.shape == b.shape else torch.inf for a, b in pairs]


def rounding_errors(dag, inputs):
    """How far each output of the graph is from the same computed in float64."""
    with autocast_off():
        outputs = as_tuple(dag(*inputs))
        exact = as_tuple(copy.deepcopy(dag).double()(*[x.double() for x in inputs]))
    return differences([x.double() for x in outputs], exact)


def as_tuple(value):
    """A tuple of outputs, also for a single one."""
    return value if isinstance(value, tuple) else (value,)


class Trace(TorchFunctionMode):
    """One run of a network with every call on a traced tensor recorded.

    names: id of a tensor -> its node. kept: those tensors, alive so that no id is used twice.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.dag = SpikeDAGModule()
        self.recorders = dict(wrapped_functions.values())
        self.names = {}
        self.kept = []
        self.counts = {}
        self.paths = [""]

    def run(self, *inputs):
        """The graph of the model on `inputs`."""
        self.batch_size = len(inputs[0])
        inputs = [x.clone() for x in inputs]  # the network may change its input in place
        for i, x in enumerate(inputs, start=1):
            self.dag.add_input(f"input{i}_out1")
            self.remember(x, f"input{i}_out1")
        for path, module in self.model.named_modules():
            self.follow(module, path)
        with torch.no_grad(), self:
            try:
                output = self.model(*inputs)
            except NotImplementedError:
                raise  # a refusal; it is a RuntimeError too
            except (RuntimeError, IndexError, TypeError) as error:
                shape = " and ".join(f"[B, {str(list(x.shape[1:]))[1:]}" for x in inputs)
                message = str(error).splitlines()[0]
                raise ValueError(f"{self.here()} cannot run on an input of {shape}: {message}") from error
        self.dag.outputs_nodes = tuple(self.output_node(value) for value in as_tuple(output))
        return self.dag

    def follow(self, module, path):
        """Keep `self.paths` the stack of modules that are running."""

        def enter(module, inputs):
            self.paths.append(path)

        def leave(module, inputs, output):
            self.paths.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def output_node(self, value):
        """The node of an output. Raises NotImplementedError for what was not computed from the input."""
        if not isinstance(value, torch.Tensor) or id(value) not in self.names:
            raise NotImplementedError(
                f"the network returns a {type(value).__name__} that is not computed from its input by traced "
                "operations, return a tensor or a tuple of tensors"
            )
        return self.node_of(value)

    def here(self):
        """The running module, for messages."""
        return self.paths[-1] or "the network's forward"

    def remember(self, tensor, node):
        """From now on `tensor` is the value of `node`."""
        self.names[id(tensor)] = node
        self.kept.append(tensor)

    def record_in_place(self, op_type, op, inputs, output):
        """As `record`; other tensors that share the memory of `output` no longer hold their node's value."""
        self.record(op_type, op, inputs, output)
        memory = output.untyped_storage().data_ptr()
        for other in self.kept:
            if other is not output and other.untyped_storage().data_ptr() == memory:
                self.names[id(other)] = None
        return output

    def is_traced(self, value):
        """Whether the value is, or holds, a traced tensor."""
        if isinstance(value, (list, tuple)):
            return any(self.is_traced(item) for item in value)
        return isinstance(value, torch.Tensor) and id(value) in self.names

    def refuse(self, function, advice=None, operands=()):
        """Raise NotImplementedError with the function, the module path and what to write instead."""
        if isinstance(function, torch._ops.OpOverload):
            raise NotImplementedError(f"{self.paths[-1] or 'the network'} {EXPORTED}")
        name = resolve_name(function) or getattr(function, "__name__", str(function))
        word = name.removesuffix(".__get__").split(".")[-1].strip("_")
        advice = advice or self.advice_on_numbers(word, operands) or ADVICE.get(word)
        advice = advice or f"write it with {CAN_BE_TRACED}"
        raise NotImplementedError(f"{name} in {self.here()} cannot be converted: {advice}")

    def advice_on_numbers(self, word, operands):
        """What to write instead of a difference, product or quotient `word` of `operands`; None for what is none."""
        if word not in SUBTRACTIONS + PRODUCTS:
            return None
        if sum(map(self.is_traced, operands)) > 1:
            minus = "put the minus sign into the weights of the layer whose output is subtracted, and add"
            return minus if word in SUBTRACTIONS else "spikes compute no product or quotient of two activations"
        if self.is_image(operands):
            return ON_THE_IMAGE
        if word in SUBTRACTIONS:
            return "put the constant into the bias of the layer before it, and a minus sign into the weights"
        return "put the factor into the weights of the layer before or behind it"

    def is_image(self, operands):
        """Whether one of the operands is an input of the network, before any layer."""
        return any(self.is_traced(x) and self.names.get(id(x)) in self.dag.inputs_nodes for x in operands)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with autocast_off():  # the network's own forward may have switched it on
            if function in SHAPE_QUESTIONS or not self.is_traced([*args, *kwargs.values()]):
                return function(*args, **kwargs)
            if function not in self.recorders:
                self.refuse(function, operands=args)
            return self.recorders[function](self, function, *args, **kwargs)

    def record(self, op_type, op, inputs, output):
        """Append an op that computes the tensor `output` from the tensors `inputs`."""
        in_nodes = [self.node_of(x) for x in inputs]
        op.to(output.device, output.dtype)
        self.counts[op_type] = self.counts.get(op_type, 0) + 1
        name = f"{op_type}{self.counts[op_type]}"
        self.dag.add_op(name, op, in_nodes, [f"{name}_out1"], self.paths[-1])
        self.remember(output, f"{name}_out1")
        return output

    def node_of(self, tensor):
        """The node of a traced tensor. Raises NotImplementedError for another value."""
        if not self.is_traced(tensor):
            raise NotImplementedError(
                f"an operand in {self.here()} is a constant, not an activation: move it into a bias or a weight"
            )
        if self.names[id(tensor)] is None:
            raise NotImplementedError(
                f"a tensor read in {self.here()} shares its memory with one that was changed in place, "
                "write it without in-place operations"
            )
        return self.names[id(tensor)]


# The recording functions: (trace, function, the function's own arguments) -> its result.


def record_conv2d(trace, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if trace.is_traced([weight, bias]):
        trace.refuse(function, "the weights must not be computed from the input")
    if input.dim() != 4:
        trace.refuse(function, f"the input must be [B, C, H, W], not {list(input.shape)}")
    C_out, C_in, *kernel_size = weight.shape
    op = SpikeConv2d(C_in * groups, C_out, kernel_size, stride, padding, dilation, groups, bias is not None)
    copy_weights(op, weight, bias)
    output = function(input, weight, bias, stride, padding, dilation, groups)
    return trace.record("conv", op, [input], output)


def record_linear(trace, function, input, weight, bias=None):
    if trace.is_traced([weight, bias]):
        trace.refuse(function, "the weights must not be computed from the input")
    if input.dim() != 2:
        trace.refuse(function, f"the input must be [B, N], not {list(input.shape)}: flatten it before")
    op = SpikeLinear(weight.shape[1], weight.shape[0], bias is not None)
    copy_weights(op, weight, bias)
    return trace.record("linear", op, [input], function(input, weight, bias))


def record_conv_transpose2d(
    trace, function, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    if trace.is_traced([weight, bias]):
        trace.refuse(function, "the weights must not be computed from the input")
    C_in, C_out, *kernel_size = weight.shape
    op = SpikeConvTranspose2d(
        C_in, C_out * groups, kernel_size, stride, padding, output_padding, groups, bias is not None, dilation
    )
    copy_weights(op, weight, bias)
    output = function(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return trace.record("conv_transpose", op, [input], output)


def record_batch_norm(
    trace, function, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if training or running_mean is None:
        trace.refuse(function, "it needs running statistics, track_running_stats=True")
    if input.dim() not in (2, 4):
        trace.refuse(function, f"the input must be [B, C, H, W] or [B, N], not {list(input.shape)}")
    op = SpikeBatchNorm(len(running_mean))
    factor = (running_var.detach().double() + eps).rsqrt() * (1.0 if weight is None else weight.detach().double())
    shift = (0.0 if bias is None else bias.detach().double()) - running_mean.detach().double() * factor
    op.weight, op.bias = nn.Parameter(factor.to(input.dtype)), nn.Parameter(shift.to(input.dtype))
    op.frozen = frozen_names(weight, bias)
    output = function(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return trace.record("batch_norm", op, [input], output)


def copy_weights(op, weight, bias):
    """Clones of a layer's weight and bias as the op's parameters."""
    op.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        op.bias = nn.Parameter(bias.detach().clone())
    op.frozen = frozen_names(weight, bias)


def frozen_names(weight, bias):
    """Which of "weight" and "bias" are parameters that shall not be trained, or are none at all.

    While a network is traced without gradients, only a parameter still tells: what is computed from one does not.
    """
    named = {"weight": weight, "bias": bias}
    return frozenset(
        name for name, x in named.items() if x is None or (isinstance(x, nn.Parameter) and not x.requires_grad)
    )


def record_relu(trace, function, input, inplace=False, ceiling=None):
    return trace.record("relu", SpikeReLU(ceiling), [input], input.clamp(0, ceiling))


def record_relu_in_place(trace, function, input, ceiling=None):
    # the name `input` now means the result
    return trace.record_in_place("relu", SpikeReLU(ceiling), [input], input.clamp_(0, ceiling))


def record_functional_relu(trace, function, input, inplace=False, ceiling=None):
    if inplace:
        return record_relu_in_place(trace, function, input, ceiling)
    return record_relu(trace, function, input, ceiling=ceiling)


def record_relu6(trace, function, input, inplace=False):
    return record_functional_relu(trace, function, input, inplace, 6.0)


def record_hardtanh(trace, function, input, min_val=-1.0, max_val=1.0, inplace=False):
    check_clamp(trace, function, min_val, max_val)
    return record_functional_relu(trace, function, input, inplace, float(max_val))


def record_hardtanh_in_place(trace, function, input, min_val=-1.0, max_val=1.0):
    return record_hardtanh(trace, function, input, min_val, max_val, inplace=True)


def record_clamp(trace, function, input, min=None, max=None):
    check_clamp(trace, function, min, max)
    return record_relu(trace, function, input, ceiling=None if max is None else float(max))


def record_clamp_in_place(trace, function, input, min=None, max=None):
    check_clamp(trace, function, min, max)
    return record_relu_in_place(trace, function, input, None if max is None else float(max))


def check_clamp(trace, function, least, most):
    """Refuse every clamp that is not a ReLU, with a ceiling or without."""
    numbers = [value for value in (least, most) if value is not None]
    if any(isinstance(value, torch.Tensor) for value in numbers) or least != 0 or (most is not None and most <= 0):
        trace.refuse(function, "only a lower bound of 0 and an upper one above it, a relu or relu6, are supported")


def record_avg_pool2d(
    trace,
    function,
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    output = function(input, kernel_size, stride, padding)
    kernel, padding = as_pair(kernel_size), as_pair(padding)
    # ceil_mode makes no difference where the last windows are whole, as on the traced size
    has_part_windows = ceil_mode and function(input, kernel, stride, padding, True).shape != output.shape
    has_other_divisor = divisor_override not in (None, kernel[0] * kernel[1])
    if has_part_windows or has_other_divisor or (not count_include_pad and padding != (0, 0)):
        trace.refuse(
            function,
            "only ceil_mode=False, count_include_pad=True, divisor_override=None are supported, or what is the same: "
            "choose a size that whole windows fill",
        )
    input_size = tuple(input.shape[-2:]) if ceil_mode else None
    op = SpikeAvgPool2d(input.shape[1], kernel, as_pair(stride or kernel_size), padding, input_size=input_size)
    return trace.record("avg_pool", op, [input], output)


def as_pair(value):
    """A kernel size, stride or padding as two numbers."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def record_adaptive_avg_pool2d(trace, function, input, output_size):
    window = tuple(input.shape[-2:])
    sizes = tuple(extent if size is None else size for size, extent in zip(as_pair(output_size), window))
    refuse_uneven_windows(trace, function, sizes, window)
    output = function(input, output_size)
    kernel = tuple(extent // size for size, extent in zip(sizes, window))
    if kernel == (1, 1):  # a view of the same shape refuses images of another size, where it would be a pooling
        return trace.record("view", ViewOp(output.shape[1:]), [input], output)
    op = SpikeAvgPool2d(input.shape[1], kernel, kernel, input_size=window)
    return trace.record("avg_pool", op, [input], output)


def refuse_uneven_windows(trace, function, sizes, window):
    """Refuse an adaptive pooling of `window` to `sizes` whose windows differ in size, or overlap."""
    if any(size > extent for size, extent in zip(sizes, window)):
        trace.refuse(
            function,
            f"its output {list(sizes)} is larger than its input {list(window)}, of which it holds copies: use larger "
            "images, or leave it out and let the layer behind it have the sum of its weights for each value's copies",
        )
    if any(extent % size for size, extent in zip(sizes, window)):
        trace.refuse(
            function,
            f"its output {list(sizes)} does not divide its input {list(window)}: use avg_pool2d with a kernel size",
        )


def record_max_pool2d(
    trace, function, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):  # with indices it is another function, which is refused
    sizes = as_pair(kernel_size), as_pair(stride or kernel_size), as_pair(padding), as_pair(dilation)
    op = SpikeMaxPool2d(*sizes, ceil_mode)
    return trace.record("max_pool", op, [input], op.pool(input))


def record_pad(trace, function, input, pad, mode="constant", value=None):
    if mode != "constant" or value not in (None, 0):
        trace.refuse(function, "only zeros are supported, mode='constant' with value 0")
    pads = [*pad, 0, 0, 0, 0]
    if input.dim() != 4 or any(pads[4:]):
        trace.refuse(
            function,
            "only height and width of [B, C, H, W] can be padded; a 1x1 convolution with rows of zeros adds channels",
        )
    return trace.record("pad", SpikePad(pads[:4]), [input], function(input, pad))


def record_mean(trace, function, input, dim=None, keepdim=False, *, dtype=None):
    dims = sorted(d % input.dim() for d in ([dim] if isinstance(dim, int) else dim or []))
    if dims != [2, 3] or input.dim() != 4 or dtype is not None:
        trace.refuse(function, "only the mean over height and width, x.mean([2, 3]), is supported")
    pooled = record_adaptive_avg_pool2d(trace, function=F.adaptive_avg_pool2d, input=input, output_size=1)
    return pooled if keepdim else record_view(trace, torch.Tensor.view, pooled, input.shape[:2])


def record_add(trace, function, input, other, *, alpha=1):
    if is_zero(other):  # what sum(...) starts with
        return record_nothing(trace, torch.Tensor.clone, input)
    check_add(trace, function, input, other, alpha)
    return trace.record("add", SpikeAdd(), [input, other], torch.add(input, other))


def record_add_in_place(trace, function, input, other, *, alpha=1):
    check_add(trace, function, input, other, alpha)
    return trace.record_in_place("add", SpikeAdd(), [input, other], input.add_(other))


def is_zero(value):
    """Whether an operand is the plain number 0."""
    return isinstance(value, (int, float)) and value == 0


def check_add(trace, function, input, other, alpha):
    """Refuse what is not a plain sum of two activations of one shape."""
    if not trace.is_traced(input) or not trace.is_traced(other):
        into_bias = "adding a constant is not supported, move it into the bias of the layer before"
        trace.refuse(function, ON_THE_IMAGE if trace.is_image([input, other]) else into_bias)
    if alpha != 1:
        trace.refuse(function, "only alpha=1 is supported, move the factor into the weights before it")
    if input.shape != other.shape:
        trace.refuse(function, f"the shapes {list(input.shape)} and {list(other.shape)} differ")


def record_cat(trace, function, tensors, dim=0, **names):
    dim = names.get("axis", dim) % tensors[0].dim()
    if dim == 0:
        trace.refuse(function, "the batch dimension cannot be concatenated, use dim=1")
    return trace.record("concat", ConcatOp(dim), list(tensors), torch.cat(tensors, dim))


def record_view(trace, function, input, *shape, **names):
    output = function(input, *shape, **names)
    if output.dtype != input.dtype or output.shape[:1] != input.shape[:1]:
        trace.refuse(
            function, f"the first dimension must stay the batch, as in x.view(x.size(0), -1), not {list(shape)}"
        )
    return trace.record("view", ViewOp(output.shape[1:]), [input], output)


def record_softmax(trace, function, input, dim=None, _stacklevel=3, dtype=None):
    dim = (1 if dim is None else dim) % input.dim()
    if dim == 0 or dtype is not None:
        trace.refuse(function, "only softmax over the classes, dim=1, in the input's own type is supported")
    op = SoftmaxOp(dim, log="log_softmax" in resolve_name(function))
    return trace.record("softmax", op, [input], op(input))


def record_dropout(trace, function, input, p=0.5, training=False, inplace=False):
    if training:
        trace.refuse(function, "dropout must be off in eval mode, pass training=self.training")
    return input


def record_nothing(trace, function, input, *args, **kwargs):
    """The same values: the result is another name of the input's node."""
    output = function(input, *args, **kwargs)
    if output.dtype != input.dtype:
        trace.refuse(function, f"the type must stay {input.dtype}")
    trace.remember(output, trace.node_of(input))
    return output


RELU_FUNCTIONS = (torch.relu, torch.Tensor.relu)
RELU_IN_PLACE_FUNCTIONS = (F.relu_, torch.relu_, torch.Tensor.relu_)
VIEW_FUNCTIONS = (
    torch.Tensor.view,
    torch.Tensor.reshape,
    torch.reshape,
    torch.flatten,
    torch.Tensor.flatten,
    torch.squeeze,
    torch.Tensor.squeeze,
    torch.unsqueeze,
    torch.Tensor.unsqueeze,
    torch.unflatten,
    torch.Tensor.unflatten,
)
CLAMP_FUNCTIONS = (
    torch.clamp,
    torch.Tensor.clamp,
    torch.Tensor.clamp_min,
    torch.clamp_min,
    torch.clip,
    torch.Tensor.clip,
)
CLAMP_IN_PLACE_FUNCTIONS = (
    torch.clamp_,
    torch.Tensor.clamp_,
    torch.clamp_min_,
    torch.Tensor.clamp_min_,
    torch.clip_,
    torch.Tensor.clip_,
)
ADD_FUNCTIONS = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
ADD_IN_PLACE_FUNCTIONS = (torch.Tensor.add_, torch.Tensor.__iadd__)
DROPOUT_FUNCTIONS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
)
SAME_VALUE_FUNCTIONS = (
    torch.Tensor.contiguous,
    torch.Tensor.clone,
    torch.clone,
    torch.Tensor.detach,
    torch.Tensor.float,
    torch.Tensor.to,
)

RECORDING_FUNCTIONS = {
    record_conv2d: (F.conv2d,),
    record_conv_transpose2d: (F.conv_transpose2d,),
    record_linear: (F.linear,),
    record_batch_norm: (F.batch_norm,),
    record_relu6: (F.relu6,),
    record_hardtanh: (F.hardtanh,),
    record_hardtanh_in_place: (F.hardtanh_,),
    record_functional_relu: (F.relu,),
    record_relu: RELU_FUNCTIONS,
    record_relu_in_place: RELU_IN_PLACE_FUNCTIONS,
    record_clamp: CLAMP_FUNCTIONS,
    record_clamp_in_place: CLAMP_IN_PLACE_FUNCTIONS,
    record_avg_pool2d: (F.avg_pool2d,),
    record_adaptive_avg_pool2d: (F.adaptive_avg_pool2d,),
    record_max_pool2d: (F.max_pool2d, torch.max_pool2d),
    record_pad: (F.pad,),
    record_mean: (torch.mean, torch.Tensor.mean),
    record_add: ADD_FUNCTIONS,
    record_add_in_place: ADD_IN_PLACE_FUNCTIONS,
    record_cat: (torch.cat, torch.concat, torch.concatenate),
    record_view: VIEW_FUNCTIONS,
    record_softmax: (
        F.softmax,
        F.log_softmax,
        torch.softmax,
        torch.log_softmax,
        torch.Tensor.softmax,
        torch.Tensor.log_softmax,
    ),
    record_dropout: DROPOUT_FUNCTIONS,
    record_nothing: SAME_VALUE_FUNCTIONS,
}

# name -> (the torch function, the function that runs and records it)
wrapped_functions = {
    resolve_name(function) or function.__name__: (function, recorder)
    for recorder, functions in RECORDING_FUNCTIONS.items()
    for function in functions
}

# questions about a tensor whose answers do not depend on its values
SHAPE_QUESTIONS = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.stride,
    torch.Tensor.__len__,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.is_floating_point,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "layout", "is_leaf", "grad_fn")
    ),
}
