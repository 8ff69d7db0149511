"""The tracer: runs a network once and records its operations as a SpikeDAGModule.

`RECORDING_FUNCTIONS` is the table of all functions that can be traced: recorder -> the torch functions that it runs and
records. A `TorchFunctionMode` sends every call on a traced tensor through this table. torch itself is not patched, so
nothing has to be restored after an error. A function outside the table is refused by name.
"""

import copy
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from layers import arithmetic, lines, pooling, recorders
from layers.advice import ADVICE
from layers.functions import SPELLINGS
from rewrites.constants import fold_batch_norms
from rewrites.graph import holds_image, remove_unread
from rewrites.roundings import roundings_to_levels, unrounded, without_levels
from spike_dag import SpikeDAGModule
from spike_layers import (
    ConcatOp,
    FunctionOp,
    LeakyReLUOp,
    SoftmaxOp,
    SpikeAvgPool2d,
    SpikeBatchNorm,
    SpikeConv2d,
    SpikeConvTranspose2d,
    SpikeLinear,
    SpikeMaxPool2d,
    SpikeReLU,
    ViewOp,
)

CAN_BE_TRACED = (
    "conv2d, conv_transpose2d, linear, batch_norm, relu, clamp, avg_pool2d, max_pool2d, interpolate, add, cat, pad, "
    "view, flatten, slices, permutations, arithmetic with constants, and the layers of one dimension"
)

CANNOT_RUN = "cannot run on an input of"
EXPORTED = "is an exported program and cannot be traced, pass the Python module that was given to torch.export instead"


HALF_TYPES = (torch.float16, torch.bfloat16)
# Largest difference between a network and its graph, relative to the largest output. Folded BatchNorms and another
# order of summing leave such differences.
SAME_SHARE = 1e-4
# Largest difference relative to the graph's own float32 rounding error, where outputs are small sums of large values.
ROUNDINGS = 10


def parse_ann_model(model, inputs, fold=True, takes_gates=False):
    """A SpikeDAGModule with the function of `model.eval()` and its own copy of the weights.

    inputs: a tensor or tuple of example inputs, [B, C, H, W] each. The batch size is not recorded. fold: fold each
    BatchNorm into the layer before or behind it if that is exact (`fold_batch_norms`). Dropout and identities leave no
    op. takes_gates: record gates, for `rewrites.gates.replace_gates`, instead of refusing them. Weights shared by two
    calls become two copies. A float16 or bfloat16 network is traced as a float32 copy, on float32 copies of `inputs`,
    with autocast off. `model` and torch are not changed, even after an error.

    Raises NotImplementedError for a function that cannot be traced; the message gives its name, its module path and
    advice. Raises ValueError for weights, inputs or outputs that are not finite, if the network cannot run on `inputs`
    or cannot be copied, or if the graph's output differs from the network's.
    """
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    check_example(inputs)
    refuse_compiled(model)
    check_finite_weights(model)
    model, inputs = in_float32(model), tuple(as_float32(x) for x in inputs)
    # at least two images: a view that mixes batch and channels can go unnoticed with one
    trace = Trace(copy_of(model).eval(), takes_gates=takes_gates)
    traced = trace.run(*[torch.cat([x, x]) if len(x) == 1 else x for x in inputs])
    remove_unread(traced)
    moved = roundings_to_levels(traced, trace.shapes)
    traced.to(inputs[0].device)  # the ops that took the place of roundings, too
    dag = copy.deepcopy(traced)
    if fold:
        fold_batch_norms(dag, trace.shapes)
    dag.lint()
    check_same_function(model, dag, traced, inputs, moved)
    return dag


def check_same_function(model, dag, traced, inputs, moved):
    """Raise ValueError unless the graph computes what the network does.

    traced: the graph before folding. moved: names of the roundings that became levels. Both are compared without these:
    near the middle of two levels the least difference decides to which one an activation is rounded.
    """
    if moved:
        trace = Trace(copy_of(model).eval(), moved, takes_gates=True)
        trace.run(*inputs)
        expected, dag, traced = trace.outputs, without_levels(dag), without_levels(traced)
    else:
        with torch.no_grad(), WithoutAutocast():
            expected = copy_of(model).eval()(*[x.clone() for x in inputs])
    check_same_output(as_tuple(expected), dag, traced, inputs, "the traced graph")


def check_example(inputs):
    """Raise ValueError unless there are example inputs, each has at least one image, and all values are finite."""
    if not inputs or not all(isinstance(x, torch.Tensor) and x.dim() and len(x) for x in inputs):
        raise ValueError("no example input, give a tuple of tensors [B, C, H, W] with one image or more")
    if not all(torch.isfinite(x).all() for x in inputs):
        raise ValueError("the example input has NaN or infinite values, look at how images are read and normalised")


def in_float32(model):
    """The model, or a float32 copy of one with float16 or bfloat16 weights or buffers."""
    is_half = any(x.dtype in HALF_TYPES for x in (*model.parameters(), *model.buffers()))
    return copy_of(model).float() if is_half else model


def as_float32(value):
    """A float16 or bfloat16 tensor as float32; any other value unchanged."""
    is_half = isinstance(value, torch.Tensor) and value.dtype in HALF_TYPES
    return value.float() if is_half else value


@contextmanager
def autocast_off():
    """A context in which autocast is off on every device."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class WithoutAutocast(TorchFunctionMode):
    """A context in which no torch call runs under autocast, even if the network's forward switches it on."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        with autocast_off():
            return function(*args, **(kwargs or {}))


def copy_of(model):
    """A deep copy of a network. Raises ValueError if PyTorch cannot copy it."""
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # torch.nn.utils.weight_norm leaves tensors that cannot be copied
        raise ValueError(
            f"the network cannot be copied ({str(error).splitlines()[0][:80]}), remove its weight_norm and "
            "spectral_norm (torch.nn.utils.remove_weight_norm), or use those of torch.nn.utils.parametrizations"
        ) from error


def refuse_compiled(model):
    """Refuse a network whose calls cannot be traced.

    Raises NotImplementedError for an exported program and for modules compiled by torch.jit, and ValueError for
    anything else that is not a torch.nn.Module.
    """
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
    """Raise ValueError if weights or buffers have NaN or infinite values; it names the first such tensor."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of the network has NaN or infinite values, train the network again")


@torch.no_grad()
def check_same_output(expected, dag, traced, inputs, name):
    """Raise ValueError unless the graph `dag` computes the tensors `expected` from `inputs`, up to rounding.

    The limit is `SAME_SHARE` of the largest output. Outputs that are small differences of large values can exceed it by
    rounding alone. Then the limit rises to `ROUNDINGS` times the rounding error of `traced`, the graph before
    BatchNorms were folded, measured against a float64 run. name: the name of the graph in messages.
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
    """The largest difference within each pair of tensors; infinite if shapes differ or a difference is NaN."""
    pairs = zip(outputs, others, strict=True)
    return [(a - b).abs().nan_to_num(nan=torch.inf).max().item() if a.shape == b.shape else torch.inf for a, b in pairs]


def rounding_errors(dag, inputs):
    """The largest float32 rounding error of each output of the graph, compared with a float64 run."""
    with autocast_off():
        outputs = as_tuple(dag(*inputs))
        exact = as_tuple(copy.deepcopy(dag).double()(*[x.double() for x in inputs]))
    return differences([x.double() for x in outputs], exact)


def as_tuple(value):
    """The outputs as a tuple, even if there is only one."""
    return value if isinstance(value, tuple) else (value,)


class Trace(TorchFunctionMode):
    """One run of a network that records every call on a traced tensor.

    names: id of a tensor -> its node, None after its memory was overwritten. lines: which of them are stored with one
    dimension more. shapes: node -> shape of a sample. kept: the tensors themselves, kept alive so that no id is used
    twice. paths: module paths of the modules that are running, innermost last. outputs: what the network returned.
    left_out: names of roundings that are not computed. takes_gates: whether a gate is recorded, and not refused.
    """

    def __init__(self, model, left_out=(), takes_gates=False):
        super().__init__()
        self.model, self.left_out, self.takes_gates, self.outputs = model, left_out, takes_gates, None
        self.dag = SpikeDAGModule()
        self.recorders = dict(wrapped_functions.values())
        self.names = {}
        self.shapes = {}
        self.lines = lines.Lines(self)
        self.kept = []
        self.counts = {}
        self.paths = [""]

    def run(self, *inputs):
        """The graph of the model, traced on `inputs`. Raises as `parse_ann_model`."""
        self.batch_size = len(inputs[0])
        inputs = [x.clone() for x in inputs]  # copies: the network may change its input in place
        for i, x in enumerate(inputs, start=1):
            self.dag.add_input(f"input{i}_out1")
            self.remember(x, f"input{i}_out1")
        for path, module in self.model.named_modules():
            self.follow(module, path)
        with torch.no_grad(), self:
            try:
                output = self.model(*inputs)
            except NotImplementedError:
                raise  # a refusal by the tracer; NotImplementedError is a RuntimeError, too
            except (RuntimeError, IndexError, TypeError) as error:
                shape = " and ".join(f"[B, {str(list(x.shape[1:]))[1:]}" for x in inputs)
                message = str(error).splitlines()[0]
                raise ValueError(f"{self.here()} {CANNOT_RUN} {shape}: {message}") from error
        self.outputs = as_tuple(output)
        self.dag.outputs_nodes = tuple(self.output_node(value) for value in self.outputs)
        return self.dag

    def value_of(self, op, input, output):
        """What a function of an activation returns: its `output`, or the activation that it was to round."""
        return unrounded(op, input) if self.next_name(op.name) in self.left_out else output

    def next_name(self, op_type):
        """The name that the next op of this type gets."""
        return f"{op_type}{self.counts.get(op_type, 0) + 1}"

    def follow(self, module, path):
        """Register hooks that keep `self.paths` the stack of running modules."""

        def enter(module, inputs):
            self.paths.append(path)

        def leave(module, inputs, output):
            self.paths.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def output_node(self, value):
        """The node of an output. Raises NotImplementedError for a value that was not computed from the input."""
        if not isinstance(value, torch.Tensor) or id(value) not in self.names:
            raise NotImplementedError(
                f"the network returns a {type(value).__name__} that is not computed from its input by traced "
                "operations, return a tensor or a tuple of tensors"
            )
        return self.node_of(value)

    def here(self):
        """The path of the running module, for messages."""
        return self.paths[-1] or "the network's forward"

    def remember(self, tensor, node):
        """Note that `tensor` now holds the value of `node`."""
        self.names[id(tensor)] = node
        self.shapes[node] = tuple(tensor.shape[1:])
        self.kept.append(tensor)

    def record_in_place(self, op_type, op, inputs, output):
        """As `record`, for an in-place function: other tensors with the same memory lose their node."""
        self.record(op_type, op, inputs, output)
        return self.overwrite(output, self.names[id(output)])

    def overwrite(self, output, node):
        """Note that the memory of `output` now holds the value of `node`; other tensors with it lose their node."""
        self.lines.note(output, node) if id(output) in self.lines.ids else self.remember(output, node)
        memory = output.untyped_storage().data_ptr()
        for other in self.kept:
            if other is not output and other.untyped_storage().data_ptr() == memory and overlap(other, output):
                self.names[id(other)] = None
        return output

    def is_traced(self, value):
        """Whether a value is a traced tensor, or a list or tuple that contains one."""
        if isinstance(value, (list, tuple)):
            return any(self.is_traced(item) for item in value)
        return isinstance(value, torch.Tensor) and id(value) in self.names

    def refuse(self, function, advice=None):
        """Raise NotImplementedError that names the function, the module path and a replacement."""
        if isinstance(function, torch._ops.OpOverload):
            raise NotImplementedError(f"{self.paths[-1] or 'the network'} {EXPORTED}")
        name = resolve_name(function) or getattr(function, "__name__", str(function))
        word = name.removesuffix(".__get__").split(".")[-1].strip("_")
        advice = advice or ADVICE.get(word) or f"write it with {CAN_BE_TRACED}"
        raise NotImplementedError(f"{name} in {self.here()} cannot be converted: {advice}")

    def on_image(self, tensor):
        """Whether a tensor is an input of the network, or is computed from inputs by layers without weights only."""
        return holds_image(self.dag, self.stored_node(tensor))

    def is_computed_from(self, tensor, other):
        """Whether a tensor is the output of ops that read another one, directly or through other ops."""
        reached = {self.stored_node(other)}
        for entry in self.dag.ops.values():
            if not reached.isdisjoint(entry.inputs):
                reached.add(entry.out)
        return tensor is not other and self.stored_node(tensor) in reached

    def is_rectified(self, tensor):
        """Whether a tensor is the output of a ReLU."""
        name = self.dag.writer(self.stored_node(tensor))
        return name is not None and isinstance(self.dag.ops[name].op, SpikeReLU)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with autocast_off():  # the network's forward may have switched it on
            if function in SHAPE_QUESTIONS or not self.is_traced([*args, *kwargs.values()]):
                return function(*args, **kwargs)
            if function not in self.recorders:
                self.refuse(function)
            return self.recorders[function](self, function, *args, **kwargs)

    def record(self, op_type, op, inputs, output):
        """Append an op that computes `output` from `inputs` (tensors), and return `output`."""
        op.to(output.device, output.dtype)
        in_nodes, sends_line = self.lines.nodes_read(op, inputs)
        name = self.next_name(op_type)
        self.counts[op_type] = self.counts.get(op_type, 0) + 1
        self.dag.add_op(name, op, in_nodes, [f"{name}_out1"], self.paths[-1])
        self.remember(output, f"{name}_out1")
        self.lines.note(output, f"{name}_out1") if sends_line else self.lines.forget(output)
        return output

    def record_nothing(self, function, input, *args, **kwargs):
        """Run a function that changes no values: its result belongs to the input's node."""
        output = function(input, *args, **kwargs)
        if output.dtype != input.dtype:
            self.refuse(function, f"the type must stay {input.dtype}")
        return self.alias(output, input)

    def alias(self, output, input):
        """Note that `output` has the value of `input`, and return it."""
        node, is_line = self.stored_node(input), id(input) in self.lines.ids
        self.lines.note(output, node) if is_line else self.remember(output, node)
        return output

    def refuse_traced_weights(self, function, weight, bias):
        """Raise NotImplementedError for weights that are no tensors, or are computed from the network's input."""
        for value in (weight, bias):
            if value is not None and not isinstance(value, torch.Tensor):  # as Brevitas' quantized weights
                kind = type(value).__name__
                self.refuse(function, f"its weights are of the type {kind}, give the same network with plain layers")
        if self.is_traced([weight, bias]):
            self.refuse(function, "the weights must not be computed from the input")

    def node_of(self, tensor):
        """The node of a traced tensor, in its own shape. Raises as `stored_node`."""
        return self.lines.flat_node(tensor) if id(tensor) in self.lines.ids else self.stored_node(tensor)

    def stored_node(self, tensor):
        """The node of a traced tensor, or of its map if it is a line.

        Raises NotImplementedError for a constant or an overwritten tensor.
        """
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


def overlap(a, b):
    """Whether two tensors of one storage have an element in common; two slices side by side have none."""
    taken = torch.zeros(b.untyped_storage().nbytes() // b.element_size(), dtype=torch.bool)
    taken.as_strided(b.size(), b.stride(), b.storage_offset()).fill_(True)
    return bool(taken.as_strided(a.size(), a.stride(), a.storage_offset()).any())


def record_dropout(trace, function, input, p=0.5, training=False, inplace=False):
    """Record nothing: dropout in eval mode is the identity. Raises NotImplementedError if it is on."""
    if training:
        trace.refuse(function, "dropout must be off in eval mode, pass training=self.training")
    return input


# The tracer's table: recorder -> the functions that it records. A recorder is called with the trace, the function and
# the function's own arguments. It runs the function and returns its result.
RECORDING_FUNCTIONS = {
    SpikeConv2d.traced: (F.conv2d,),
    SpikeConvTranspose2d.traced: (F.conv_transpose2d,),
    SpikeLinear.traced: (F.linear,),
    lines.record_conv: (F.conv1d,),
    lines.record_conv_transpose: (F.conv_transpose1d,),
    lines.of_lines_too(SpikeBatchNorm.traced): (F.batch_norm,),
    SpikeReLU.traced: (F.relu, torch.relu, torch.Tensor.relu),
    SpikeReLU.traced_in_place: (F.relu_, torch.relu_, torch.Tensor.relu_),
    SpikeReLU.traced_relu6: (F.relu6,),
    arithmetic.record_hardtanh: (F.hardtanh,),
    arithmetic.record_clamp: (
        *(torch.clamp, torch.Tensor.clamp, torch.clip, torch.Tensor.clip),
        *(torch.clamp_, torch.Tensor.clamp_, torch.clip_, torch.Tensor.clip_),
    ),
    arithmetic.record_clamp_min: (
        *(torch.clamp_min, torch.Tensor.clamp_min, torch.clamp_min_, torch.Tensor.clamp_min_),
    ),
    arithmetic.record_clamp_max: (
        *(torch.clamp_max, torch.Tensor.clamp_max, torch.clamp_max_, torch.Tensor.clamp_max_),
    ),
    arithmetic.record_maximum: (torch.maximum, torch.Tensor.maximum, torch.max, torch.Tensor.max, torch.fmax),
    arithmetic.record_minimum: (torch.minimum, torch.Tensor.minimum, torch.min, torch.Tensor.min, torch.fmin),
    arithmetic.record_threshold: (F.threshold, torch.threshold),
    SpikeAvgPool2d.traced: (F.avg_pool2d,),
    SpikeAvgPool2d.traced_adaptive: (F.adaptive_avg_pool2d,),
    lines.reduction(pooling.record_mean): (torch.mean, torch.Tensor.mean),
    lines.reduction(pooling.record_sum_of_pixels): (torch.sum, torch.Tensor.sum),
    lines.record_interpolate: (F.interpolate,),
    SpikeMaxPool2d.traced: (F.max_pool2d, torch.max_pool2d),
    SpikeMaxPool2d.traced_adaptive: (F.adaptive_max_pool2d,),
    lines.reduction(SpikeMaxPool2d.traced_amax): (torch.amax, torch.Tensor.amax),
    lines.record_avg_pool: (F.avg_pool1d,),
    lines.record_adaptive_avg_pool: (F.adaptive_avg_pool1d,),
    lines.record_max_pool: (F.max_pool1d, torch.max_pool1d),
    lines.record_adaptive_max_pool: (F.adaptive_max_pool1d,),
    lines.record_pad: (F.pad,),
    arithmetic.record_sum: (
        *(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__),
        *(torch.Tensor.add_, torch.Tensor.__iadd__),
    ),
    arithmetic.record_difference: (
        *(torch.sub, torch.subtract, torch.Tensor.sub, torch.Tensor.subtract, torch.Tensor.__sub__),
        *(torch.Tensor.sub_, torch.Tensor.subtract_, torch.Tensor.__isub__),
    ),
    arithmetic.record_reverse_difference: (torch.rsub, torch.Tensor.__rsub__),
    arithmetic.record_product: (
        *(torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply, torch.Tensor.__mul__),
        *(torch.Tensor.__rmul__, torch.Tensor.mul_, torch.Tensor.multiply_, torch.Tensor.__imul__),
    ),
    arithmetic.record_quotient: (
        *(torch.div, torch.divide, torch.true_divide, torch.Tensor.div, torch.Tensor.divide, torch.Tensor.true_divide),
        *(torch.Tensor.__truediv__, torch.Tensor.div_, torch.Tensor.divide_, torch.Tensor.__itruediv__),
    ),
    arithmetic.record_negative: (
        *(torch.neg, torch.negative, torch.Tensor.neg, torch.Tensor.negative, torch.Tensor.__neg__),
        *(torch.neg_, torch.Tensor.neg_, torch.Tensor.negative_),
    ),
    arithmetic.record_matmul: (
        *(torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__),
    ),
    arithmetic.record_addmm: (torch.addmm, torch.Tensor.addmm),
    arithmetic.record_einsum: (torch.einsum,),
    arithmetic.record_cast: (torch.Tensor.float, torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as),
    arithmetic.make_constant: (
        *(torch.zeros_like, torch.ones_like, torch.full_like, torch.Tensor.new_zeros, torch.Tensor.new_ones),
        *(torch.Tensor.new_full, torch.Tensor.new_tensor),
    ),
    ConcatOp.traced: (torch.cat, torch.concat, torch.concatenate),
    ConcatOp.traced_stack: (torch.stack,),
    recorders.record_getitem: (torch.Tensor.__getitem__,),
    recorders.record_narrow: (torch.narrow, torch.Tensor.narrow),
    recorders.record_select: (torch.select, torch.Tensor.select),
    recorders.record_parts: (
        *(torch.chunk, torch.Tensor.chunk, torch.split, torch.Tensor.split),
        *(torch.split_with_sizes, torch.Tensor.split_with_sizes, torch.tensor_split, torch.Tensor.tensor_split),
    ),
    recorders.record_unbind: (torch.unbind, torch.Tensor.unbind),
    recorders.record_index_select: (torch.index_select, torch.Tensor.index_select),
    recorders.record_flip: (torch.flip, torch.Tensor.flip),
    recorders.record_fliplr: (torch.fliplr, torch.Tensor.fliplr),
    recorders.record_roll: (torch.roll, torch.Tensor.roll),
    recorders.record_copies: (
        *(torch.Tensor.repeat, torch.tile, torch.Tensor.tile, torch.Tensor.expand, torch.Tensor.expand_as),
        *(torch.broadcast_to, torch.Tensor.broadcast_to),
    ),
    recorders.record_repeat_interleave: (torch.repeat_interleave, torch.Tensor.repeat_interleave),
    recorders.record_permutation: (
        *(torch.permute, torch.Tensor.permute, torch.transpose, torch.Tensor.transpose, torch.t, torch.Tensor.t),
        *(torch.swapaxes, torch.Tensor.swapaxes, torch.swapdims, torch.Tensor.swapdims),
        *(torch.movedim, torch.Tensor.movedim, torch.moveaxis, torch.Tensor.moveaxis),
        *(torch.Tensor.T.__get__, torch.Tensor.mT.__get__),
    ),
    recorders.record_channel_shuffle: (F.channel_shuffle, F.native_channel_shuffle),
    recorders.record_pixel_shuffle: (F.pixel_shuffle,),
    recorders.record_pixel_unshuffle: (F.pixel_unshuffle,),
    ViewOp.traced: (
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
    ),
    LeakyReLUOp.traced: (F.leaky_relu,),
    LeakyReLUOp.traced_in_place: (F.leaky_relu_,),
    LeakyReLUOp.traced_prelu: (F.prelu, torch.Tensor.prelu),
    LeakyReLUOp.traced_rrelu: (F.rrelu, torch.rrelu),
    LeakyReLUOp.traced_rrelu_in_place: (F.rrelu_,),
    LeakyReLUOp.traced_abs: (
        torch.abs,
        torch.absolute,
        torch.Tensor.abs,
        torch.Tensor.absolute,
        torch.Tensor.__abs__,
    ),
    LeakyReLUOp.traced_abs_in_place: (torch.abs_, torch.Tensor.abs_, torch.Tensor.absolute_),
    FunctionOp.traced: tuple(SPELLINGS),
    SoftmaxOp.traced: (
        F.softmax,
        F.log_softmax,
        torch.softmax,
        torch.log_softmax,
        torch.Tensor.softmax,
        torch.Tensor.log_softmax,
    ),
    record_dropout: (
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
    ),
    Trace.record_nothing: (
        torch.Tensor.contiguous,
        torch.Tensor.clone,
        torch.clone,
        torch.Tensor.detach,
        torch.Tensor.data.__get__,
        torch.Tensor.positive,
        torch.positive,
    ),
}

# name of a torch function -> (the function, its recorder)
wrapped_functions = {
    resolve_name(function) or function.__name__: (function, recorder)
    for recorder, functions in RECORDING_FUNCTIONS.items()
    for function in functions
}

# functions of a tensor whose results do not depend on its values
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
