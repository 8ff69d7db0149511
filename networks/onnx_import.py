"""Import a network from an ONNX file as a plain PyTorch module, which the tracer can follow.

net = load_onnx("model.onnx")
dag = parse_ann_model(net, (torch.zeros(2, *net.input_shape),))

Nothing in the file is run as code, and no file outside of the model's folder is read.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from networks.onnx_file import DOMAINS, FLOATS, array_of, check_structure, opset_of, read_onnx, shown
from networks.onnx_layers import LAYERS, Call, SamePad, tensor
from networks.onnx_names import module_paths, place
from networks.onnx_node import Damaged, Node
from networks.onnx_numbers import FOLDS, Numbers, fold
from networks.onnx_shapes import SHAPES

MODULES = {**LAYERS, **SHAPES}  # operator -> builder of its module
MAX_ACTIVATIONS = 2**28  # values per image of one layer: 1 GB. A few declared sizes could ask for any amount of memory
# Values that constants may have in total, in multiples of those in the file, and beyond them.
MOST_FOLDED, FREE_FOLDED = 4, 2**26
# Operators whose outputs are not negative, and those whose outputs are not if no input is.
RECTIFIERS = {"Relu", "Sigmoid", "Softmax"}
KEEP_SIGN = {*SHAPES} - {"Pad"} | {
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "ReduceMean",
    "Concat",
}
QUANTIZED = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"),
    *("ConvInteger", "MatMulInteger"),
}
# advice -> operators that it helps with
ADVICE_FOR = {
    "use Relu, a neuron sends no negative spikes": (
        *("Elu", "Selu", "Celu", "Gelu", "Mish", "Swish", "HardSwish", "Softplus", "Softsign", "ThresholdedRelu"),
        *("Erf", "Tanh", "HardSigmoid", "Exp", "Max", "Min", "Abs"),
    ),
    "use BatchNormalization, whose statistics are constant": (
        *("InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization", "LRN"),
        *("LpNormalization", "MeanVarianceNormalization"),
    ),
    "a network's path must not depend on values": ("If", "Loop", "Scan"),
    "a network without recurrent layers is needed": ("LSTM", "GRU", "RNN"),
}
ADVICE = {op: advice for advice, ops in ADVICE_FOR.items() for op in ops}
IMPORTABLE = f"can be imported: {', '.join(sorted(MODULES))}"


def load_onnx(path):
    """The network in an ONNX file, in eval mode, as an `OnnxNetwork`.

    Weights are float32 parameters, statistics of BatchNorms and constants of Add, Sub, Mul and Div are buffers.
    float16, bfloat16 and float64 become float32. A file that declares a batch size takes any other as well.

    Raises OSError for a missing or unreadable file, also one with external data. Raises ValueError for a file that is
    damaged, of another kind, or does not run on the input that it declares. Raises NotImplementedError for a network
    that cannot be imported; the message names the node and its operator.
    """
    model = read_onnx(path)
    check_operators(model.graph, path)
    check_structure(model, path)
    net = Importer(model, path).build().eval()
    if net.input_shape is not None and None not in net.input_shape:
        if math.prod(net.input_shape) > MAX_ACTIVATIONS:
            raise ValueError(f"{path} takes images of {list(net.input_shape)}, which is too large")
        outputs = net.check(torch.empty(2, *net.input_shape, device="meta"))
        net.num_outputs = outputs[0].shape[1] if outputs[0].dim() == 2 else None
    return net


def check_operators(graph, path):
    """Raise NotImplementedError for the first operator that cannot be imported, and for a quantized network."""
    places = [
        f"{path}: node {shown(node.name or next(iter(node.output), ''))} ({shown(node.op_type)}) cannot be imported"
        for node in graph.node
    ]
    for node, where in zip(graph.node, places):
        if node.op_type in QUANTIZED:
            raise NotImplementedError(
                f"{where}: the network is quantized, export it before the quantization, which this tool does itself"
            )
    for node, where in zip(graph.node, places):
        if node.domain not in DOMAINS:
            raise NotImplementedError(f"{where}: it is an operator of {shown(node.domain)}; {IMPORTABLE}")
        if node.op_type not in FOLDS and node.op_type not in MODULES:
            advice = ADVICE.get(node.op_type)
            raise NotImplementedError(f"{where}{f': {advice}' if advice else ''}; {IMPORTABLE}")


@dataclass
class Step:
    """One call of a network: `run` on the values `inputs` makes the values `outputs`; `label` names it in messages.

    last: the values that no later step reads.
    """

    run: object
    inputs: list
    outputs: list
    label: str
    last: list = field(default_factory=list)


class OnnxNetwork(nn.Module):
    """A network that was imported from an ONNX file. Its submodules have the names of the exported ones.

    input_shape: of one image as declared by the file, such as (C, H, W), with None for a size that is left open; None
    if not even the number of dimensions is declared. num_outputs: values per image of the first output, None where it
    is not [B, N] or not known. It returns a tensor, or a tuple if the file has several outputs.
    """

    def __init__(self, steps, input_name, output_names, input_shape, num_outputs):
        super().__init__()
        self.steps, self.input_name, self.output_names = steps, input_name, output_names
        self.input_shape, self.num_outputs = input_shape, num_outputs
        self.checked = set()

    def forward(self, x):
        """The outputs for images [B, ...]. Raises ValueError for images that do not fit."""
        if x.device.type != "meta" and tuple(x.shape) not in self.checked:
            self.check(x)
        outputs = self.run(x)
        return outputs[0] if len(outputs) == 1 else outputs

    def check(self, x):
        """Raise ValueError if the network cannot run on such images, or needs too much memory; nothing is computed.

        Returns the outputs on the meta device, as a tuple.
        """
        state = {name: value.to("meta") for name, value in self.state_dict().items()}
        with torch.no_grad():
            outputs = functional_call(self, state, torch.empty(x.shape, dtype=x.dtype, device="meta"))
        self.checked.add(tuple(x.shape))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def run(self, x):
        """The outputs as a tuple."""
        values = {self.input_name: x}
        for step in self.steps:
            try:
                found = step.run(*(values[name] for name in step.inputs))
            except (Damaged, NotImplementedError):
                raise
            except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
                reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                raise Damaged(f"{step.label} cannot run on images of {list(x.shape[1:])}: {reason}") from error
            self.keep(step, found, values, len(x))
        return tuple(values[name] for name in self.output_names)

    @staticmethod
    def keep(step, found, values, batch):
        """Store the values that a step made, and drop those that no later one reads."""
        found = found if isinstance(found, (tuple, list)) else [found]
        if len(found) < len(step.outputs):
            raise Damaged(f"{step.label} is damaged: it has {len(step.outputs)} outputs and makes {len(found)}")
        for name, value in zip(step.outputs, found):
            if isinstance(value, torch.Tensor) and value.numel() > MAX_ACTIVATIONS * max(1, batch):
                raise Damaged(f"{step.label} makes {value.numel() // batch} values per image, which is too large")
            values[name] = value
        for name in step.last:
            values.pop(name, None)


class Importer:
    """Builds an OnnxNetwork from the nodes of a graph, in order.

    constants: name of a value -> its array. numbers: names of values that are computed from shapes, at every call.
    same: name -> name of the same value, behind an Identity. layers: name -> module that makes this value, if that is a
    layer with a bias and no other node reads the value. nonnegative: names of activations without a sign.
    """

    def __init__(self, model, path):
        self.graph, self.path, self.opset = model.graph, path, opset_of(model, path)
        self.constants = {each.name: array_of(each, path) for each in self.graph.initializer}
        if self.graph.sparse_initializer:
            raise NotImplementedError(f"{path} has sparse weights, export them as dense ones")
        self.numbers, self.same, self.layers, self.nonnegative = set(), {}, {}, set()
        self.folded = 0
        self.most_folded = FREE_FOLDED + MOST_FOLDED * sum(array.size for array in self.constants.values())
        self.input = self.only_input()
        self.shape = declared_shape(self.input.type)
        self.reads = Counter(name for node in self.graph.node for name in node.input)
        self.reads.update(each.name for each in self.graph.output)
        self.steps, self.built = [], []

    def only_input(self):
        """The graph's input. Raises NotImplementedError unless it is one floating-point tensor."""
        inputs = [each for each in self.graph.input if each.name not in self.constants]
        if len(inputs) != 1:
            names = shown(", ".join(each.name for each in inputs)) or "no input"
            raise NotImplementedError(f"{self.path} has the inputs {names}, a network of one image can be imported")
        if inputs[0].type.tensor_type.elem_type not in FLOATS:
            raise NotImplementedError(f"{self.path} takes no floating-point tensor, export it for float32 images")
        return inputs[0]

    def build(self):
        """The network."""
        batch = self.shape[0] if self.shape else None
        for proto in self.graph.node:
            self.add(proto, Node(proto, self.path, self.opset, batch, self.constants))
        if not self.graph.output:
            raise ValueError(f"{self.path} is damaged: it returns nothing")
        outputs = [self.name_of(each.name) for each in self.graph.output]
        made = {self.input.name, *(name for step in self.steps for name in step.outputs)} - self.numbers
        for each, name in zip(self.graph.output, outputs):
            if name not in made:
                raise NotImplementedError(
                    f"{self.path} returns {shown(each.name)}, which is not computed from the image"
                )
        self.note_last_reads(outputs)
        declared = declared_shape(self.graph.output[0].type)
        num_outputs = declared[1] if declared and len(declared) == 2 else None
        net = OnnxNetwork(self.steps, self.input.name, outputs, self.shape and tuple(self.shape[1:]), num_outputs)
        for (_, modules), path in zip(self.built, module_paths([proto for proto, _ in self.built])):
            for module in modules:
                is_pad = isinstance(module, (Call, SamePad)) and len(modules) > 1
                place(net, f"{path}_pad" if is_pad else path, module, nn.Module)
        return net

    def name_of(self, name):
        """The name of the value itself, behind identities."""
        return self.same.get(name, name)

    def note_last_reads(self, outputs):
        """Note for each step which values are read there for the last time."""
        seen = set(outputs)
        for step in reversed(self.steps):
            step.last = [name for name in {*step.inputs, *step.outputs} if name not in seen]
            seen.update(step.last)

    def add(self, proto, node):
        """Compute the node's value if it is a constant, else append steps for it."""
        node.inputs = [self.name_of(name) for name in node.inputs]
        given = [name for name in node.inputs if name and name not in self.constants]
        if node.op in FOLDS and not given:
            self.store(node, fold(node, [self.constants.get(name) for name in node.inputs]))
        elif node.op in ("Shape", "Size") or (node.op in FOLDS and self.numbers.issuperset(given)):
            self.numbers.update(node.outputs)
            self.steps.append(Step(Numbers(node), given, self.outputs_of(node), node.label))
        elif node.op == "CastLike" and node.is_constant(0):  # all activations are float32
            self.store(node, node.constant(0).astype(np.float32))
        elif node.op not in MODULES:
            advice = ADVICE.get(node.op, "it is supported for constants and shapes only")
            node.refuse(f"{advice}; {IMPORTABLE}")
        elif not self.joins_bias(node):
            self.add_modules(proto, node, given)

    def store(self, node, value):
        """Keep the value of a constant node. Raises Damaged if constants become much larger than the file."""
        values = value if isinstance(value, list) else [value]
        self.folded += sum(array.size for array in values)
        if self.folded > self.most_folded:
            node.damaged("its constants grow beyond the size of the file")
        if len(values) < len(self.outputs_of(node)):
            node.damaged(f"it has {len(node.outputs)} outputs")
        as_float32 = [array.astype(np.float32) if array.dtype.kind == "f" else array for array in values]
        self.constants.update(zip(node.outputs, as_float32))

    def outputs_of(self, node):
        """The node's outputs. Raises NotImplementedError if a second one is read that only its training needs."""
        if node.op == "Split":
            return node.outputs
        read = [name for name in node.outputs[1:] if name and self.reads[name]]
        if read:
            node.refuse(f"its further output {shown(read[0])} is read, only the first is supported")
        return node.outputs[:1]

    def add_modules(self, proto, node, given):
        """Append the steps of a node's modules, or note that it changes nothing."""
        node.is_nonnegative = self.nonnegative.issuperset(name for name in given if name not in self.numbers)
        if not self.numbers.isdisjoint(given if node.op in LAYERS else given[:1]):
            node.refuse("it computes with the shape of an activation")
        modules = self.modules_of(node)
        if isinstance(modules[0], nn.Identity):
            self.same[self.outputs_of(node)[0]] = given[0]
            self.forget_layer(node, given[0])
            return
        if node.op in RECTIFIERS or is_rectifier(modules[-1]) or (node.op in KEEP_SIGN and node.is_nonnegative):
            self.nonnegative.update(node.outputs)
        for i, module in enumerate(modules):
            is_last = i == len(modules) - 1
            outputs = self.outputs_of(node) if is_last else [f"{node.outputs[0]} before {i}"]
            self.steps.append(Step(module, given, outputs, node.label))
            given = outputs
        self.built.append((proto, modules))
        if isinstance(modules[-1], BIASED) and self.reads[node.outputs[0]] == 1:
            self.layers[node.outputs[0]] = modules[-1]

    def modules_of(self, node):
        """The node's modules as a list. Raises Damaged where PyTorch refuses what the file says."""
        try:
            modules = MODULES[node.op](node)
        except (Damaged, NotImplementedError):
            raise
        except Exception as error:  # a damaged file can hold any combination of shapes and attributes
            node.damaged(f"it does not fit its weights ({' '.join(str(error).split())[:100]})")
        return modules if isinstance(modules, list) else [modules]

    def joins_bias(self, node):
        """Whether an Add only adds a constant per channel to a layer before it: it becomes part of the layer's bias."""
        if node.op != "Add" or len(node.inputs) != 2:
            return False
        value, constant = (node.inputs[i] for i in ((1, 0) if node.is_constant(0) else (0, 1)))
        if value not in self.layers or constant not in self.constants:
            return False
        bias = per_channel(self.constants[constant], self.layers[value])
        if bias is None:
            return False
        layer = self.layers[value]
        layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias.detach() + bias)
        self.same[node.outputs[0]] = value
        self.forget_layer(node, value)
        return True

    def forget_layer(self, node, value):
        """Several nodes may read the value by the name that `node` gives it: its bias is then complete."""
        if self.reads[node.outputs[0]] != 1:
            self.layers.pop(value, None)


BIASED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)


def is_rectifier(module):
    """Whether the module of a Clip gives no negative values."""
    return isinstance(module, (nn.ReLU, nn.ReLU6)) or (isinstance(module, nn.Hardtanh) and module.min_val >= 0)


def per_channel(constant, layer):
    """A constant as the bias of a layer, [channels], or None if it has not one value per channel."""
    spatial = layer.weight.dim() - 2
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    shape = constant.shape[constant.ndim - spatial - 1 :] if constant.ndim > spatial else ()
    if constant.dtype != np.float32 or constant.ndim > spatial + 2 or constant.size not in (1, channels):
        return None
    if constant.size > 1 and shape != (channels,) + (1,) * spatial:
        return None
    return tensor(np.broadcast_to(constant.ravel(), channels))


def declared_shape(kind):
    """The sizes of a graph's input or output, None for one that is left open; None without any shape."""
    if not kind.tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in kind.tensor_type.shape.dim
    ]
