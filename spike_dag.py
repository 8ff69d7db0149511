"""SpikeDAGModule: a network as a list of ops in topological order, ANN and SNN alike.

`nodes` names every value, `ops` every layer: {'op': layer, 'in_nodes': names, 'out_nodes': names, 'path': module path
in the user's network}. `torch.save(dag, file)` writes plain data, and `torch.load(file)`, with its safe default
`weights_only=True`, rebuilds the network from it once this module is imported.
"""

import copy
import threading
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

import spike_tensor
from dag_checks import (
    DamagedData,
    check_integers,
    check_network_data,
    check_sample,
    check_spikes,
    check_tensors,
    run_ann_op,
)
from runtime.ranges import check_option
from runtime.torch_files import OtherFile, read_torch_file
from spike_layers import OP_TYPES, WeightedLayer
from spike_neurons import ClipFloorShift, IFNeuron
from spike_tensor import Current, Memory, SpikeTensor, decode

FORMAT = "ann2snn-dag-1"
ENGINES = {"auto": torch.uint8, "reference": torch.float64}
BYTES_PER_CURRENT = 16  # working set per element of the largest layer: its current, spikes, membrane, skips
THREAD_BYTES = 64 * 2**20  # working set of one CPU thread; a quarter of it, the currents, stays in the cache
GPU_BYTES = 2**33


class SpikeDAGModule(nn.Module):
    """Runs `ops` in order, from `inputs_nodes` to `outputs_nodes`.

    nodes: OrderedDict, node name (`<op_name>_out<id>`) -> value while a forward pass runs, else None.
    ops: OrderedDict, op name (`<op_type><id>`) -> {'op', 'in_nodes', 'out_nodes', 'path'}.
    timesteps: T of a converted network, None for an ANN. memory_budget: bytes that a simulation may work with at a
    time, None for what suits the device. scales_of_conversion: of a network that is to be finetuned for spikes, a
    function (network, per_channel) -> {op name: weight scale}, of the layers whose scale its conversion will decide.
    """

    def __init__(self):
        super().__init__()
        self.nodes = OrderedDict()
        self.ops = OrderedDict()
        self.inputs_nodes = ()
        self.outputs_nodes = ()
        self.timesteps = None
        self.memory_budget = None
        self.scales_of_conversion = None
        self.largest_by_shape = {}

    def add_input(self, node):
        """Declare one more input node."""
        if node in self.nodes:
            raise ValueError(f"the name {node} is taken")
        self.nodes[node] = None
        self.inputs_nodes += (node,)

    def add_op(self, name, op, in_nodes, out_nodes, path=""):
        """Append an op. Raises ValueError where a node does not exist yet, or a name is taken."""
        for node in in_nodes:
            if node not in self.nodes:
                raise ValueError(f"{name} reads the node {node}, which no op before it writes")
        for taken in [node for node in out_nodes if node in self.nodes] + [name] * (name in self.ops):
            raise ValueError(f"{name}: the name {taken} is taken")
        self.add_module(name, op)
        self.ops[name] = {"op": op, "in_nodes": tuple(in_nodes), "out_nodes": tuple(out_nodes), "path": path}
        self.nodes.update(dict.fromkeys(out_nodes))

    def lint(self):
        """Raise ValueError unless every node is written once, before it is read, and every output exists."""
        written = set(self.inputs_nodes)
        for name, entry in self.ops.items():
            missing = [node for node in entry["in_nodes"] if node not in written]
            twice = [node for node in entry["out_nodes"] if node in written]
            if missing or twice:
                raise ValueError(
                    f"{name}: node {(missing + twice)[0]} is {'not written before' if missing else 'taken'}"
                )
            if getattr(self, name) is not entry["op"]:
                raise ValueError(f"{name}: the op in `ops` is not the registered module")
            written.update(entry["out_nodes"])
        lost = [node for node in self.outputs_nodes if node not in written]
        if lost or not self.outputs_nodes or not self.inputs_nodes:
            raise ValueError(f"the graph lacks {f'the output {lost[0]}' if lost else 'inputs or outputs'}")

    def forward(self, *inputs, timesteps=None, every_step=False):
        """The network's output(s): [B, ...].

        Converted: simulates `timesteps` steps (default: those it was converted for; what `hold_back` adds to biases
        suits no others); with `every_step` the outputs after each step of the last spiking layer, [T, B, ...], which
        are those of shorter simulations where no layer listens first or between stays ANN. Only what stays ANN behind
        the last spikes has gradients.
        """
        if len(inputs) != len(self.inputs_nodes):
            raise ValueError(f"the network takes {len(self.inputs_nodes)} inputs, got {len(inputs)}")
        if not self.neurons():
            return one_or_all(self.forward_ann(inputs))
        timesteps = self.timesteps if timesteps is None else check_option("timesteps", timesteps)
        inputs = tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in inputs)
        if not len(inputs[0]):
            raise ValueError("the batch is empty, give at least one image to simulate")
        for node, x in zip(self.inputs_nodes, inputs):
            if not torch.isfinite(x).all():  # neurons would take NaN for silence
                raise ValueError(f"{node} has NaN or infinite values, look at how the images are read and normalised")
        with torch.autocast(inputs[0].device.type, enabled=False):  # integers are not exact in narrower types
            return one_or_all(self.simulate(inputs, timesteps, every_step))

    def forward_ann(self, inputs):
        """The outputs of a network that does not spike."""
        readers = self.count_readers()
        self.nodes.update(zip(self.inputs_nodes, inputs))
        try:
            for name, entry in self.ops.items():
                read = [self.nodes[node] for node in entry["in_nodes"]]
                self.nodes[entry["out_nodes"][0]] = run_ann_op(self.where(name), entry["op"], read)
                forget_read(self.nodes, entry, readers)
            return [self.nodes[node] for node in self.outputs_nodes]
        finally:
            self.nodes.update(dict.fromkeys(self.nodes))

    def simulate(self, inputs, timesteps, every_step):
        """The outputs of a converted network, [B, ...] or [T, B, ...].

        The batch is cut into parts, and the timesteps of each part too, so that what is simulated at a time stays in
        the cache, and in `memory_budget`, whatever B and T are. Where layers listen first, or some between stay ANN,
        all steps of an image are one part. On a CPU every thread simulates parts of its own.
        """
        images, steps = self.cut(inputs, timesteps)
        parts = list(zip(*(x.split(images) for x in inputs)))
        if inputs[0].device.type == "cpu" and len(parts) > 1 and not torch.is_grad_enabled():
            with one_thread_per_operator as threads, ThreadPoolExecutor(threads) as pool:
                no_grad = torch.no_grad()  # not inherited by threads
                results = list(
                    pool.map(no_grad(lambda part: self.simulate_part(part, timesteps, steps, every_step)), parts)
                )
        else:
            results = [self.simulate_part(part, timesteps, steps, every_step) for part in parts]
        if spike_tensor.firing_ratio_record:
            spike_tensor.firing_ratios.extend(
                mean_ratios([(ratios, len(p[0])) for (_, ratios), p in zip(results, parts)])
            )
        return [torch.cat(outputs, int(every_step)) for outputs in zip(*(outputs for outputs, _ in results))]

    def cut(self, inputs, timesteps):
        """How many images and how many of their timesteps to simulate at a time."""
        batch, largest = len(inputs[0]), self.largest_sample(inputs)
        device = inputs[0].device
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        budget = default_memory_budget(device, threads)
        if self.memory_budget is not None:
            budget = min(budget, self.memory_budget)
        values = max(1, budget // threads // (BYTES_PER_CURRENT * largest))  # images times steps
        images = max(1, min(values // timesteps, -(-batch // threads)))
        whole = self.has_ann_between() or any(neuron.listen for neuron in self.neurons().values())
        steps = timesteps if whole else max(1, min(timesteps, values // images))
        return images, steps

    def largest_sample(self, inputs):
        """Elements of the largest value of one sample, for inputs of this shape."""
        shape = tuple(inputs[0].shape[1:])
        if self.largest_by_shape.get("shape") != shape:
            sizes = [inputs[0][:1].numel()]
            values = dict(zip(self.inputs_nodes, [x[:1] for x in inputs]))
            with torch.no_grad():
                for name, entry in self.ops.items():
                    where, op, read = self.where(name), entry["op"], [values[node] for node in entry["in_nodes"]]
                    values[entry["out_nodes"][0]] = value = run_ann_op(where, op, read)
                    check_sample(where, op, read, value)
                    sizes.append(value.numel())
            self.largest_by_shape = {"shape": shape, "size": max(sizes)}
        return self.largest_by_shape["size"]

    def simulate_part(self, inputs, timesteps, chunk, every_step):
        """Outputs of a few images, and the firing ratio of every spiking layer; `chunk` steps at a time."""
        before, between, behind = self.stages()
        constants, memory, counts = dict(zip(self.inputs_nodes, inputs)), Memory(timesteps), {}
        run_ops(before, constants)
        ratios, curve, done = [], [], 0
        with own_record() as record:
            while done < timesteps:
                steps = min(chunk, timesteps - done)
                values = dict(constants)
                with torch.no_grad():  # spikes have no gradient
                    run_ops(between, values, steps, memory, self.count_readers_of(behind))
                ratios.append((list(record), steps))
                record.clear()
                trains = {node: value for node, value in values.items() if isinstance(value, SpikeTensor)}
                if every_step:
                    known = {n: x.to_float_every_step(counts.get(n, 0), done) for n, x in trains.items()}
                    curve.append([y.unflatten(0, (steps, -1)) for y in self.read_out(behind, values | known)])
                for node, train in trains.items():
                    counts[node] = counts.get(node, 0) + train.counts()
                scales = {node: train.scale_factor for node, train in trains.items()}
                done += steps
        if every_step:
            outputs = [torch.cat(steps) for steps in zip(*curve)]
        else:
            decoded = {node: decode(count, scales[node], timesteps) for node, count in counts.items()}
            outputs = self.read_out(behind, values | decoded)
        return outputs, mean_ratios(ratios)

    def read_out(self, behind, values):
        """The network's outputs from the values that the layers behind the last spikes read."""
        run_ops(behind, values)
        return for_every_step([values[node] for node in self.outputs_nodes])

    def stages(self):
        """The ops before the first spikes, those up to the last ones, and those behind them, in order."""
        before_spikes, from_spikes = self.nodes_before_spikes(), set()
        before, between, behind = [], [], []
        for entry in self.ops.values():
            (out,), spiking = entry["out_nodes"], entry["op"].spiking
            if spiking or any(node in from_spikes for node in entry["in_nodes"]):
                from_spikes.add(out)
                (between if spiking or out in before_spikes else behind).append(entry)
            else:
                before.append(entry)
        return before, between, behind

    def has_ann_between(self):
        """Whether a layer between two spiking ones stays ANN: it reads what all timesteps sent."""
        return not all(entry["op"].spiking for entry in self.stages()[1])

    def count_readers_of(self, entries):
        """How many of `entries` read each node; the network's outputs count as read once more."""
        return Counter([node for entry in entries for node in entry["in_nodes"]] + list(self.outputs_nodes))

    def count_readers(self):
        """How many ops read each node; the network's outputs count as read once more."""
        return self.count_readers_of(self.ops.values())

    def nodes_before_spikes(self):
        """Nodes that a spiking layer lies behind: what it reads must be known before its first step."""
        nodes = set()
        for entry in reversed(self.ops.values()):
            if entry["op"].spiking or entry["out_nodes"][0] in nodes:
                nodes.update(entry["in_nodes"])
        return nodes

    def neurons(self):
        """Op name -> IFNeuron of every spiking layer, in order; empty for an ANN."""
        return {name: e["op"].neuron for name, e in self.ops.items() if e["op"].neuron is not None}

    def bound_currents(self):
        """Set the bound of |current| per step, `largest_current`, of every neuron of integers anew, from these."""
        largest = {}  # node of currents -> bound; spikes are at most 1
        for entry in self.ops.values():
            op, (out,) = entry["op"], entry["out_nodes"]
            if not op.spiking:
                continue
            largest[out] = op.largest_sum([largest.get(node, 1) for node in entry["in_nodes"]])
            if op.neuron is not None:
                if op.neuron.largest_current is not None:  # else real numbers flow, of the image or of float weights
                    op.neuron.largest_current = int(largest[out])
                largest[out] = 1

    def duration(self, timesteps=None):
        """Timesteps that the chip needs: "firing" T, "interval" from image to image, "latency" from image to answer.

        A layer that listens for d steps first fires d steps later than it gets its first input, so that the interval is
        T + d, and every such layer on the longest path adds d to the latency; layers between that stay ANN add T.
        """
        timesteps = self.timesteps if timesteps is None else timesteps
        delays = dict.fromkeys(self.inputs_nodes, 0)
        between, sent = self.stages()[1], {e["out_nodes"][0] for e in self.ops.values() if e["op"].spiking}
        for entry in self.ops.values():
            neuron = entry["op"].neuron
            own = 0 if neuron is None else min(neuron.listen, timesteps)
            stays_ann = entry in between and not entry["op"].spiking  # it reads what all steps have sent
            inputs = [delays[node] + timesteps * (stays_ann and node in sent) for node in entry["in_nodes"]]
            delays[entry["out_nodes"][0]] = own + max(inputs)
        listen = max((min(neuron.listen, timesteps) for neuron in self.neurons().values()), default=0)
        latency = timesteps + max(delays[node] for node in self.outputs_nodes)
        return {"firing": timesteps, "interval": timesteps + listen, "latency": latency}

    def spiking_layers(self):
        """Names of the ops that fire, in order: the order of `spike_tensor.firing_ratios`."""
        return list(self.neurons())

    def set_engine(self, engine, memory_budget=None):
        """How to simulate: "auto" (the fastest exact way here) or "reference" (float64 in plain PyTorch throughout).

        memory_budget: bytes to work with at a time, at most; None for what suits the device.
        """
        if engine not in ENGINES:
            raise ValueError(f"unknown engine '{engine}', use one of {', '.join(ENGINES)}")
        self.memory_budget = memory_budget
        for neuron in self.neurons().values():
            neuron.spike_type = ENGINES[engine]

    def weighted_layers(self):
        """Op name -> layer with trained weights (convolutions and linear layers), in order."""
        layers = {name: entry["op"] for name, entry in self.ops.items()}
        return {n: op for n, op in layers.items() if isinstance(op, WeightedLayer) and op.weight.requires_grad}

    def trained_parameters(self):
        """What finetuning moves: all parameters but those that the traced network has frozen, and fixed ones."""
        return [p for entry in self.ops.values() for p in entry["op"].trained_parameters()]

    def where(self, name):
        """An op as messages name it: "conv2 (layer1.0.conv1)"."""
        path = self.ops[name]["path"]
        return f"{name} ({path})" if path else name

    def table(self):
        """The ops as rows: op, type, module path, inputs, output."""
        rows = [("op", "layer", "module path", "inputs", "output")]
        for name, entry in self.ops.items():
            layer = str(entry["op"]).splitlines()[0].removesuffix("(") if entry["op"].neuron else str(entry["op"])
            rows.append((name, layer, entry["path"], ", ".join(entry["in_nodes"]), ", ".join(entry["out_nodes"])))
        return rows

    def __str__(self):
        return format_table(self.table())

    def to_dict(self):
        """The whole network as plain data: names, numbers and tensors."""
        ops = [
            {
                "name": name,
                "type": type(entry["op"]).__name__,
                "config": entry["op"].config(),
                "in_nodes": entry["in_nodes"],
                "out_nodes": entry["out_nodes"],
                "path": entry["path"],
                "spiking": entry["op"].spiking,
                "frozen": sorted(entry["op"].frozen),
                "levels": None if entry["op"].levels is None else entry["op"].levels.levels,
                "weight_bits": getattr(entry["op"], "weight_bits", None),
                "largest_input": getattr(entry["op"], "largest_input", None),
                "weight_back": getattr(getattr(entry["op"], "weight", None), "weight_back", None),
                "neuron": entry["op"].neuron.config() if entry["op"].neuron is not None else None,
                "tensors": {k: v.detach() for k, v in entry["op"].state_dict().items() if not k.startswith("neuron.")},
            }
            for name, entry in self.ops.items()
        ]
        return {
            "format": FORMAT,
            "inputs_nodes": self.inputs_nodes,
            "outputs_nodes": self.outputs_nodes,
            "timesteps": self.timesteps,
            "training": self.training,
            "ops": ops,
        }

    def __reduce__(self):
        data = self.to_dict()
        if self.neurons():  # converted: only a quantized network is trained on from its file
            for entry in data["ops"]:
                entry["weight_back"] = None
        return from_dict, (data,)

    def __deepcopy__(self, memo):
        copied = rebuild(copy.deepcopy(self.to_dict(), memo))
        copied.memory_budget = self.memory_budget  # not saved: they belong to this run
        copied.scales_of_conversion = self.scales_of_conversion
        return copied


def from_dict(data):
    """The network that `SpikeDAGModule.to_dict` described. Raises ValueError where the data is not one."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise OtherFile(f"it has no network of format {FORMAT}")
    check_network_data(data)
    try:
        dag = rebuild(data)
    except OtherFile:
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise DamagedData(f"{type(error).__name__}, {error}") from error
    check_spikes(dag)
    return dag


def rebuild(data):
    """The network of sound data."""
    dag = SpikeDAGModule()
    for node in data["inputs_nodes"]:
        dag.add_input(node)
    for entry in data["ops"]:
        dag.add_op(entry["name"], rebuild_op(entry), entry["in_nodes"], entry["out_nodes"], entry["path"])
    dag.outputs_nodes = tuple(data["outputs_nodes"])
    dag.timesteps = data["timesteps"]
    dag.train(data["training"])
    dag.lint()
    return dag


def rebuild_op(entry):
    """One op from its plain data."""
    with torch.device("meta"):  # takes no memory, however large the op says that it is
        op = OP_TYPES[entry["type"]](**entry["config"])
    tensors = dict(entry["tensors"])
    if "weight_q" in tensors:
        integers = tensors["weight_q"], tensors.get("bias_q")
        op.set_integers(*integers, tensors["unit"]) if "unit" in tensors else op.set_integers(*integers)
    if "weight_scale" in tensors:
        op.set_weight_scale(tensors["weight_scale"])
    if entry.get("levels") is not None:
        op.levels = ClipFloorShift(entry["levels"], tensors["levels.scale"])
    check_tensors(entry["name"], op, tensors)
    op.load_state_dict(tensors, assign=True)
    op.spiking = entry["spiking"]
    op.frozen = frozenset(entry.get("frozen", ()))  # older files have none
    if isinstance(op, WeightedLayer):
        op.weight_bits = entry.get("weight_bits")
        op.largest_input = entry.get("largest_input") or 1  # older files have none
        check_integers(entry["name"], op, entry.get("weight_back"))
        if entry.get("weight_back") is not None:
            op.weight.weight_back = entry["weight_back"]
    if entry["neuron"] is not None:
        op.neuron = IFNeuron(**entry["neuron"])
    return op


def load_dag(path):
    """The network saved in `path` by `torch.save`. Raises OSError or ValueError where it is missing or damaged."""
    # a block of safe_globals removes its names at the end, those too that were allowed before
    missing = [name for name in [from_dict] if name not in torch.serialization.get_safe_globals()]
    try:
        with torch.serialization.safe_globals(missing):
            dag = read_torch_file(path, takes_legacy=False)
    except OtherFile as error:
        raise ValueError(f"{path} holds no network of this toolkit: {error.found}, convert it again") from error
    if not isinstance(dag, SpikeDAGModule):
        raise ValueError(f"{path} holds a {type(dag).__name__}, not a network of this toolkit, convert it again")
    return dag


torch.serialization.add_safe_globals([from_dict])


def one_or_all(outputs):
    """The output, or a tuple where there are more."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def run_ops(entries, values, timesteps=None, memory=None, wanted=None):
    """Run ops in order on `values`, node -> value, with which spiking ones need `timesteps` and a `memory`.

    `wanted`, how often each node is read later on, makes it forget values after their last reader.
    """
    readers = Counter(wanted)
    readers.update(node for entry in entries for node in entry["in_nodes"])
    for entry in entries:
        op, inputs = entry["op"], [values[node] for node in entry["in_nodes"]]
        if op.spiking:
            inputs = [as_spiking(value, timesteps) for value in inputs]
            remembered = {"memory": memory} if op.keeps_memory() else {}
            values[entry["out_nodes"][0]] = op(*inputs, **remembered)
        else:
            values[entry["out_nodes"][0]] = op(*for_every_step([as_activation(value) for value in inputs]))
        if wanted is not None:
            forget_read(values, entry, readers)


def forget_read(values, entry, readers):
    """Drop the values whose last reader was this op."""
    for node in entry["in_nodes"]:
        readers[node] -= 1
        if not readers[node]:
            values[node] = None


def default_memory_budget(device, threads):
    """Bytes to simulate with at a time: what CPU caches like, or a share of a GPU's free memory."""
    if device.type == "cpu":
        return threads * THREAD_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return min(GPU_BYTES, 2 ** ((free // 4).bit_length() - 1))  # a power of two, so that shapes recur


class OneThreadPerOperator:
    """A context that gives the number of threads and makes PyTorch's operators use one each.

    The threads then work on parts of their own. Contexts may overlap; the last one that ends restores the number.
    """

    def __init__(self):
        self.lock, self.entered, self.threads = threading.Lock(), 0, 1

    def __enter__(self):
        with self.lock:
            if not self.entered:
                self.threads = torch.get_num_threads()
                torch.set_num_threads(1)
            self.entered += 1
            return self.threads

    def __exit__(self, *error):
        with self.lock:
            self.entered -= 1
            if not self.entered:
                torch.set_num_threads(self.threads)


one_thread_per_operator = OneThreadPerOperator()


@contextmanager
def own_record():
    """The firing ratios of this thread, apart from all others; an empty list where none are recorded."""
    record = spike_tensor.of_this_thread.ratios = []
    try:
        yield record
    finally:
        spike_tensor.of_this_thread.ratios = None


def mean_ratios(parts):
    """The mean of lists of firing ratios, one entry per layer; parts: (ratios, weight)."""
    total = sum(weight for _, weight in parts)
    return [sum(r * weight for r, (_, weight) in zip(layer, parts)) / total for layer in zip(*(p for p, _ in parts))]


def as_spiking(value, timesteps):
    """What a spiking op reads: activations become a current that is the same at every step."""
    return Current(value, timesteps, constant=True) if isinstance(value, torch.Tensor) else value


def as_activation(value):
    """What an ANN op reads: spikes become the activation they stand for."""
    return value.to_float() if isinstance(value, SpikeTensor) else value


def for_every_step(values):
    """Activations that meet in one op, all of them [T*B, ...] where one is: what has no steps is the same at each."""
    most = max(len(value) for value in values)
    return [value.repeat(most // len(value), *[1] * (value.dim() - 1)) for value in values]


def format_table(rows):
    """Rows of strings as aligned columns."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(str(cell).ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)
