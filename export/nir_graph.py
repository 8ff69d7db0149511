"""A converted network as a file of NIR, the Neuromorphic Intermediate Representation (Pedersen et al., Nature
Communications 2024), which nirtorch, SpikingJelly, sinabs, snnTorch and norse read.

    write_nir(snn, "network.nir")

NIR knows no reset mode, no initial potential and no number of steps; they stand in the metadata, which importers carry
along but do not read. The few lines that make each importer exact stand in docs/export.md.

Rules that every importer needs: the parameters of IF nodes have the shape of a sample, r is 1, convolutions are square
and without groups, Flatten starts at dimension 0, and a skip without a layer is the last edge into its neuron.
"""

import copy
import os
from importlib.metadata import version

import numpy as np
import torch

from export.nir_weights import Unwritable, dense, embedding, pairs_to_values, per_channel, signed_pairs, square
from runtime.files import check_writable, write_atomically
from runtime.packages import check_packages
from spike_simulator import Stages, simulate
from spike_tensor import SpikeTensor

FORMAT = "ann2snn-nir-1"
LEAST_VERSION = (1, 0, 8)  # the one that importers were compared with; IF has no v_reset in 1.0.4
WORDS = {  # what NIR has no node for, in words
    "SpikeMaxPool2d": "max pooling",
    "SpikeConvTranspose2d": "transposed convolutions",
    "SpikeBiasMap": "a bias for every element of a sample",
    "ImageAffine": "a factor for every element of a sample",
    "SpikePad": "zeros beside channels or features",
    "SliceOp": "slices",
    "IndexOp": "an index",
    "PermuteOp": "another order of dimensions",
    "ViewOp": "views other than flattening",
    "SpikeRepeat": "repeated pixels",
    "SpikeGather": "gathered pixels",
    "SpikeReLU": "a ReLU without neurons",
    "LeakyReLUOp": "a LeakyReLU or PReLU",
    "SoftmaxOp": "softmax",
    "FunctionOp": "this function",
    "ConcatOp": "a concatenation along height or width",
}


def write_nir(snn, path, images=None):
    """Write a converted network, a SpikeDAGModule, as a file of NIR, and return a line that says so.

    images: [B, C, H, W], also as a tuple of one, whose shape is that of the network's inputs; None if the network knows
    it. Raises ValueError if nir is missing or too old, for a network that is not converted, and, naming the layer, for
    what NIR cannot hold; OSError if the file cannot be written. The file is written whole or not at all.
    """
    check_nir()
    check_writable(path)
    import nir

    graph = nir_graph(snn, images)
    write_atomically(path, lambda temporary: nir.write(temporary, graph))
    neurons = graph.metadata["neurons"].split()
    return (
        f"NIR: {len(graph.nodes)} nodes, {len(neurons)} of them neurons, {os.path.getsize(path):,} bytes in {path}; "
        "docs/export.md has the lines that import it"
    )


def check_nir():
    """Raise ValueError unless nir is installed in a version that importers were compared with."""
    check_packages("--nir", "nir", "h5py")
    found = version("nir")
    if tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise ValueError(f"--nir needs nir {least} or later, found {found}: pip install 'nir>={least}'")


def nir_graph(snn, images=None):
    """The nir.NIRGraph of a converted network. Arguments and errors as those of `write_nir`."""
    snn = copy.deepcopy(snn).cpu().eval()
    check_network(snn)
    return GraphWriter(snn, values_of_a_step(snn, one_sample(snn, images))).graph()


def check_network(snn):
    """Raise ValueError for a network that is not converted, or whose neurons NIR cannot describe."""
    if not snn.is_spiking():
        raise ValueError("the network has no neurons, convert it first (ann2snn.py)")
    if len(snn.inputs_nodes) > 1:
        raise ValueError(f"the network has {len(snn.inputs_nodes)} inputs, importers of NIR take one")
    for name, neuron in snn.neurons().items():
        where = snn.where(name)
        if neuron.listen:
            raise ValueError(f"{where} hears {neuron.listen} steps before it fires (--listen), NIR has no such neuron")
        if neuron.window is not None:
            raise ValueError(f"{where} fires in {neuron.window} steps only (--listen auto), NIR has no such neuron")
        if neuron.membrane_type(snn.timesteps) == torch.float64:
            raise ValueError(f"{where}: its potentials exceed 2^24, beyond the float32 of NIR's importers")
    odd = next((name for name in snn.ops if "/" in name), None)
    if odd is not None:
        raise ValueError(f"{odd}: a file of NIR cannot hold a name with '/', rename the layer")


def check_stages(stages):
    """Raise ValueError for a layer that stays ANN between spiking ones: it reads the spikes of all steps."""
    for entry in stages.between:
        if not entry.op.spiking:
            raise ValueError(
                f"{entry.where} stays ANN between spiking layers, which NIR cannot hold: convert without --ann_layers"
            )


def one_sample(snn, images):
    """An input [1, C, H, W]. images: [B, C, H, W], also as a tuple of one, or None. ValueError for an unknown shape."""
    if images is not None:
        return of_one_input(images)[:1].cpu().float()
    if snn.preprocessing is None:
        raise ValueError("the network does not hold the shape of its inputs: give images, or --input_shape")
    return torch.zeros(1, *snn.preprocessing["input_shape"])


def of_one_input(images):
    """Images [B, C, H, W], which the scripts give as a tuple of one, since networks may have several inputs."""
    return images[0] if isinstance(images, tuple) else images


def values_of_a_step(snn, sample):
    """Node -> its value in a simulation of one step: a SpikeTensor, a Current, or a tensor of activations."""
    values = {snn.inputs_nodes[0]: sample}

    def watch(name, current, value):
        values[snn.ops[name].out] = value

    with torch.no_grad():
        simulate(snn, (sample,), 1, watch=watch)
    return values


def shape_of(value):
    """The shape of a sample of a value of one step."""
    return tuple(value.data.shape[1:])


class GraphWriter:
    """A graph of NIR, made op by op.

    sources: node of the network -> names of the NIR nodes whose sum it is. A node of NIR sums all that flows into it,
    so that adds need no node of their own. decoded: node behind the last spikes -> the factor [C, ...] that makes its
    sum over all steps an activation, or None where a layer before it has taken the factor up.
    """

    def __init__(self, snn, values):
        self.snn, self.values, self.timesteps = snn, values, snn.timesteps
        self.nodes, self.edges, self.sources, self.decoded = {}, [], {}, {}

    def graph(self):
        """The whole graph: what the image needs, the spiking layers, and the linear layers behind them."""
        import nir

        stages, (image,) = Stages(self.snn), self.snn.inputs_nodes
        self.add("input", nir.Input(np.array(self.shape(image))))
        self.sources[image] = ["input"]
        check_stages(stages)
        for entry in stages.before + stages.between:
            self.write(entry)
        end = self.end_of(stages)
        with_readout = self.write_readout(stages, end)
        (last,) = self.snn.outputs_nodes if with_readout else (end,)
        self.add("output", nir.Output(np.array(self.shape(last))), self.sources[last])
        metadata = self.metadata(with_readout)
        return nir.NIRGraph(self.nodes, sorted(self.edges, key=self.is_bare_skip), metadata=metadata)

    def metadata(self, with_readout):
        """What NIR has no field for. Arrays, numbers and text survive in a file; lists of text do not."""
        data = {
            "format": FORMAT,
            "timesteps": self.timesteps,
            "neurons": " ".join(self.snn.spiking_layers()),
            "readout": int(with_readout),
        }
        known = self.snn.preprocessing or {}
        data.update({name: np.array(known[name]) for name in ("mean", "std") if known.get(name) is not None})
        if known.get("classes"):
            data["classes"] = "\n".join(known["classes"])
        return data

    # nodes and edges

    def shape(self, node):
        """The shape of a sample of a node of the network."""
        return shape_of(self.values[node])

    def add(self, name, node, sources=()):
        """Add a node that reads the sum of `sources`, and return its name. A source may occur twice."""
        self.nodes[name] = node
        once = list(dict.fromkeys(sources))
        for source in once:
            self.edges.append((source, name))
        repeated = [source for i, source in enumerate(sources) if source in sources[:i]]
        for i, source in enumerate(repeated):  # NIR has no double edge: a layer of ones in between
            shape = tuple(self.nodes[source].output_type["output"])
            self.edges.append((self.add_map(f"{name}_again{i or ''}", np.eye(shape[0]), None, shape, [source]), name))
        return name

    def is_bare_skip(self, edge):
        """Whether spikes flow into a neuron without a layer; sinabs takes such an edge only as the last."""
        import nir

        return all(isinstance(self.nodes[name], nir.IF) for name in edge)

    def add_map(self, name, matrix, bias, shape, sources, **metadata):
        """Add a layer that mixes the channels of samples of `shape` by a matrix [C_out, C_in]; bias: [C_out]."""
        import nir

        matrix = np.asarray(matrix, np.float32)
        if len(shape) == 1:
            node = nir.Affine(matrix, as_bias(bias, len(matrix)), metadata=metadata)
            return self.add(name, node, sources)
        return self.add_convolution(name, matrix[:, :, None, None], bias, shape, sources, **metadata)

    def add_convolution(
        self, name, weight, bias, shape, sources, stride=(1, 1), padding=(0, 0), dilation=(1, 1), **metadata
    ):
        """Add a convolution of samples of `shape`, [C, H, W]; weight: [C_out, C_in, k, k], bias: [C_out] or None."""
        import nir

        if len(shape) != 3:
            raise Unwritable(f"samples of {len(shape)} dimensions")
        weight = np.ascontiguousarray(weight, np.float32)
        node = nir.Conv2d(
            tuple(shape[1:]), weight, stride, padding, dilation, 1, as_bias(bias, len(weight)), metadata=metadata
        )
        return self.add(name, node, sources)

    def add_neurons(self, name, neuron, shape, sources):
        """Add the neurons of a layer whose samples have `shape`."""
        import nir

        def full(values):
            return np.ascontiguousarray(np.broadcast_to(values.detach().numpy().astype(np.float32), shape))

        scale = neuron.scale_factor.detach().numpy()
        metadata = {
            "v_init": full(neuron.initial_potential),
            "reset": neuron.reset_mode,
            "lambda": scale.item() if scale.size == 1 else scale,
        }
        ones, zeros = np.ones(shape, np.float32), np.zeros(shape, np.float32)
        return self.add(name, nir.IF(ones, full(neuron.Vthr), zeros, metadata=metadata), sources)

    # ops

    def write(self, entry):
        """Add the nodes of one op. Raises ValueError, which names it, for what NIR cannot hold."""
        kind = type(entry.op).__name__
        try:
            if kind not in WRITERS:
                raise Unwritable(WORDS.get(kind, f"what {kind} computes"))
            sources = WRITERS[kind](self, entry)
        except Unwritable as error:
            where = "" if entry.op.spiking else ", and this layer stays ANN"
            raise ValueError(f"{entry.where} cannot be written: NIR has no node for {error}{where}") from error
        if entry.op.neuron is not None:
            sources = [self.add_neurons(entry.name, entry.op.neuron, self.shape(entry.out), sources)]
        self.sources[entry.out] = sources

    def reads(self, entry):
        """The names of the NIR nodes that flow into the first input of an op."""
        return self.sources[entry.inputs[0]]

    def part(self, entry):
        """The name of the node that computes the current of an op; that of the op belongs to its neurons."""
        return entry.name if entry.op.neuron is None else f"{entry.name}_sum"

    def weights(self, entry):
        """`weight, bias` of an op with weights as float arrays: its integers, or floats behind the image.

        Behind the last spikes the sum over all steps is the output, so that lambda / T enters the weights, and a T-th
        of the bias is added at each step.
        """
        op, node = entry.op, entry.inputs[0]
        if op.spiking and not isinstance(self.values[node], torch.Tensor):
            return array(op.weight_q), array(op.bias_q)
        weight, bias = op.weight.detach(), None if op.bias is None else op.bias.detach()
        if op.spiking:
            unit = op.per_output_unit().detach()
            return array(weight / op.weight_view(unit)), None if bias is None else array(bias / unit)
        if node not in self.decoded:
            return array(weight), array(bias)
        factor = self.decoded[node]
        if factor is not None:
            weight = weight * op.input_view(torch.tensor(per_channel(factor, len(factor))))
        return array(weight), None if bias is None else array(bias / self.timesteps)

    # behind the last spikes

    def end_of(self, stages):
        """The node of the last spikes. Raises ValueError if there are several."""
        read = {node for entry in stages.behind for node in entry.inputs} | set(stages.outputs)
        written = {entry.out for entry in stages.behind}
        ends = [entry for entry in self.snn.ops.values() if entry.out in read - written]
        if len(ends) != 1 or not ends[0].op.spiking or len(self.snn.outputs_nodes) > 1:
            names = ", ".join(entry.where for entry in ends)
            raise ValueError(f"the layers behind the last spikes read {names}: importers of NIR take one output")
        return ends[0].out

    def write_readout(self, stages, end):
        """Add the linear layers behind the last spikes; False, and nothing is added, if NIR lacks one of them."""
        if not stages.behind:
            return False
        before = dict(self.nodes), list(self.edges)
        scale = self.values[end].scale_factor.detach().numpy() / self.timesteps
        self.decoded[end] = np.broadcast_to(scale.astype(np.float32), self.shape(end))
        try:
            for entry in stages.behind:
                self.decoded[entry.out] = None
                self.write(entry)
            if self.decoded[stages.outputs[0]] is None:
                return True
        except ValueError:
            pass
        self.nodes, self.edges = before
        return False


def array(values):
    """A tensor as a float32 array, or None."""
    return None if values is None else values.detach().numpy().astype(np.float32)


def as_bias(bias, channels):
    """A bias [C] of float32; zeros if there is none, because importers need an array."""
    return np.zeros(channels, np.float32) if bias is None else np.asarray(bias, np.float32).reshape(channels)


# ---------------------------------------------------------------------------------------------------------------------
# One function per op: it adds the nodes of the op and returns the names of those whose sum the op sends.


def write_convolution(writer, entry):
    op, shape = entry.op, writer.shape(entry.inputs[0])
    weight, bias = writer.weights(entry)
    weight, padding = square(dense(weight, op.groups), sides_of(op), op.stride, op.dilation, shape[1:])
    options = dict(stride=op.stride, padding=padding, dilation=op.dilation, **bits_of(op))
    return [writer.add_convolution(writer.part(entry), weight, bias, shape, writer.reads(entry), **options)]


def sides_of(op):
    """The padding of a convolution, ((top, bottom), (left, right)); PyTorch's "same" puts odd zeros at the end."""
    if op.padding == "same":
        totals = [dilation * (k - 1) for dilation, k in zip(op.dilation, op.kernel_size)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(0, 0)] * 2 if op.padding == "valid" else [(side, side) for side in op.padding]


def bits_of(op):
    """The bit width of integer weights, as metadata; empty for floats."""
    return {"bits": op.weight_bits} if op.spiking and op.weight_bits is not None else {}


def write_linear(writer, entry):
    (weight, bias), shape = writer.weights(entry), writer.shape(entry.inputs[0])
    return [writer.add_map(writer.part(entry), weight, bias, shape, writer.reads(entry), **bits_of(entry.op))]


def write_pooling(writer, entry):
    """A pooling of spikes is a SumPool2d, if its sums are exact in every importer, else a convolution of ones."""
    import nir

    op = entry.op
    is_square = len({*op.kernel_size}) == len({*op.stride}) == 1 and not any(op.padding)
    reads_spikes = op.spiking and isinstance(writer.values[entry.inputs[0]], SpikeTensor)
    if not (is_square and reads_spikes and averages_exactly(op.window, op.window * op.largest_input)):
        return write_convolution(writer, entry)
    sizes = [np.array(size) for size in (op.kernel_size, op.stride, op.padding)]
    return [writer.add(writer.part(entry), nir.SumPool2d(*sizes), writer.reads(entry))]


def averages_exactly(window, most):
    """Whether float32 gets back every sum up to `most` from its average, as importers compute it (LPPool2d)."""
    sums = np.arange(most + 1, dtype=np.float32)
    return bool((sums / np.float32(window) * np.float32(window) == sums).all())


def write_relu(writer, entry):
    if not entry.op.spiking:
        raise Unwritable(WORDS["SpikeReLU"])
    return writer.reads(entry)


def write_scaling(writer, entry):
    """A BatchNorm or arithmetic that could not be folded: a factor and a constant per channel."""
    op, node = entry.op, entry.inputs[0]
    if op.spiking and op.passes_spikes:
        return writer.reads(entry)
    weight, bias = (array(x) for x in ((op.weight_q, op.bias_q) if op.spiking else (op.weight, op.bias)))
    shape = writer.shape(node)
    weight, bias = per_channel(weight, shape[0]), per_channel(bias, shape[0])
    if node in writer.decoded:
        factor = writer.decoded[node]
        weight = weight if factor is None else weight * per_channel(factor, shape[0])
        bias = bias / writer.timesteps
    return [writer.add_map(writer.part(entry), np.diag(weight), bias, shape, writer.reads(entry))]


def write_sum(writer, entry):
    """The sum of currents is that of their sources; spikes of a weight other than 1 pass a layer."""
    sources = []
    for i, (node, weight) in enumerate(zip(entry.inputs, entry.op.branch_weights)):
        if not entry.op.spiking:
            weight = None if entry.op.signs[i] == 1 else torch.tensor(-1.0)
        if weight is None or (weight == 1).all():
            sources += writer.sources[node]
            continue
        shape = writer.shape(node)
        matrix = np.diag(per_channel(array(weight), shape[0]))
        sources.append(writer.add_map(f"{entry.name}_branch{i}", matrix, None, shape, writer.sources[node]))
    if any(node in writer.decoded for node in entry.inputs):
        raise Unwritable("sums behind the last spikes")
    return sources


def write_concatenation(writer, entry):
    """Each input fills some of the channels, and the sum of all is the whole."""
    shapes = [writer.shape(node) for node in entry.inputs]
    if entry.op.dim != 1 or any(node in writer.decoded for node in entry.inputs):
        raise Unwritable(WORDS["ConcatOp"])
    channels, sources, start = sum(shape[0] for shape in shapes), [], 0
    for i, (node, shape) in enumerate(zip(entry.inputs, shapes)):
        matrix = embedding(shape[0], start, channels)
        sources.append(writer.add_map(f"{entry.name}_part{i}", matrix, None, shape, writer.sources[node]))
        start += shape[0]
    return sources


def write_view(writer, entry):
    import nir

    node, before, after = entry.inputs[0], writer.shape(entry.inputs[0]), writer.shape(entry.out)
    if before != after and len(after) != 1:
        raise Unwritable(WORDS["ViewOp"])
    if writer.decoded.get(node) is not None:
        writer.decoded[entry.out] = writer.decoded[node].reshape(after)
    if before == after:
        return writer.reads(entry)
    return [writer.add(entry.name, nir.Flatten({"input": np.array(before)}, 0, -1), writer.reads(entry))]


def write_padding(writer, entry):
    """Zeros around a map, or a crop, are a convolution by one weight of 1 per channel."""
    op, shape = entry.op, writer.shape(entry.inputs[0])
    if len(shape) != 3 or op.of_channels or entry.inputs[0] in writer.decoded:
        raise Unwritable(WORDS["SpikePad"])
    left, right, top, bottom = op.pads[:4]
    weight, padding = np.eye(shape[0])[:, :, None, None], ((top, bottom), (left, right))
    weight, padding = square(weight, padding, (1, 1), (1, 1), shape[1:])
    return [writer.add_convolution(entry.name, weight, None, shape, writer.reads(entry), padding=padding)]


def write_signs(writer, entry):
    op, shape = entry.op, writer.shape(entry.inputs[0])
    if not op.spiking:
        raise Unwritable(WORDS["SpikeReLU"])
    heard = np.ones(shape[0]) if op.slope is None else array(op.slope != 0)
    return [writer.add_map(writer.part(entry), signed_pairs(heard), None, shape, writer.reads(entry))]


def write_merge(writer, entry):
    op, shape = entry.op, writer.shape(entry.inputs[0])
    if not op.spiking:
        raise Unwritable("pairs of signs behind the last spikes")
    weight = per_channel(array(op.branch_weight0), shape[0])
    matrix = pairs_to_values(weight, array(op.signs).reshape(-1), op.block)
    return [writer.add_map(writer.part(entry), matrix, None, shape, writer.reads(entry))]


WRITERS = {
    "SpikeConv2d": write_convolution,
    "SpikeConvBN": write_convolution,
    "SpikeLinear": write_linear,
    "SpikeAvgPool2d": write_pooling,
    "SpikeReLU": write_relu,
    "SpikeBatchNorm": write_scaling,
    "SpikeAffine": write_scaling,
    "SpikeAdd": write_sum,
    "SpikeSubtract": write_sum,
    "ConcatOp": write_concatenation,
    "ViewOp": write_view,
    "SpikePad": write_padding,
    "SignedReLU": write_signs,
    "MergeSigns": write_merge,
}
