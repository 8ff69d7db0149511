"""The one runner of a graph, as an ANN or through time.

    run_ops(entries, values)                               # an ANN, or what stays one
    run_ops(entries, values, timesteps, memory)            # spikes
    simulate(dag, inputs, timesteps)                       # a converted network, from the image to its outputs

Whoever wants to see something passes a `watch`: `watch(name, current, value)` is called behind every op, with the
current into its neuron (None of an op that stays ANN) and what it sends; what it returns, unless None, is sent instead.
"""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

import spike_tensor
from spike_tensor import Current, Memory, SpikeTensor, decode

BYTES_PER_CURRENT = 16  # working set per element of the largest layer: its current, spikes, membrane, skips
THREAD_BYTES = 64 * 2**20  # working set of one CPU thread; a quarter of it, the currents, stays in the cache
GPU_BYTES = 2**33  # a larger working set gained nothing on an H200


class Misfit(ValueError, RuntimeError):
    """Inputs that the network cannot take; a RuntimeError too, as PyTorch's own of the same kind."""


# ---------------------------------------------------------------------------------------------------------------------
# Ops in order


def run_ops(entries, values, timesteps=None, memory=None, watch=None, wanted=None):
    """Run ops in order on `values`, node -> value: as an ANN, or with `timesteps` and a `memory` the spiking ones.

    wanted: how often each node is read later on; given, values are forgotten after their last reader. Raises Misfit,
    which names the op, where shapes do not suit it.
    """
    readers = None if wanted is None else count_readers(entries, wanted)
    for entry in entries:
        values[entry.out] = run_op(entry, [values[node] for node in entry.inputs], timesteps, memory, watch)
        if readers is not None:
            forget_read(values, entry, readers)


def run_op(entry, inputs, timesteps, memory, watch):
    """The output of one op. A function of its own, so that the current is freed before the next op needs memory."""
    op = entry.op
    try:
        if timesteps is None or not op.spiking:
            current, value = None, op(*[x.to_float() if isinstance(x, SpikeTensor) else x for x in inputs])
        else:
            current = current_into(op, inputs, timesteps)
            value = op.send(current, memory)
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, (Misfit, NotImplementedError, torch.OutOfMemoryError)):
            raise
        raise misfit(entry, inputs, error) from error
    seen = None if watch is None else watch(entry.name, current, value)
    return value if seen is None else seen


def current_into(op, inputs, timesteps):
    """What the inputs of a spiking op cause; activations become a current that is the same at every step."""
    return op.current(*[Current(x, timesteps, constant=True) if isinstance(x, torch.Tensor) else x for x in inputs])


def misfit(entry, inputs, error):
    """The error of an op on `inputs` as one that names both."""
    shapes = " and ".join(str(list(x.data.shape)) for x in inputs)
    return Misfit(f"{entry.where} cannot run on inputs of {shapes}: {(str(error).splitlines() or [''])[0]}")


def count_readers(entries, wanted):
    """How many of `entries` read each node, more than `wanted`: Counter of how often it is read later on."""
    readers = Counter(wanted)
    for entry in entries:
        readers.update(entry.inputs)
    return readers


def forget_read(values, entry, readers):
    """Drop the values whose last reader was this op."""
    for node in entry.inputs:
        readers[node] -= 1
        if not readers[node]:
            values[node] = None


@torch.no_grad()
def node_shapes(dag, *inputs):
    """Node -> the shape of one sample, without the batch."""
    values = dict(zip(dag.inputs_nodes, inputs))
    run_ops(dag.ops.values(), values)
    return {node: tuple(value.shape[1:]) for node, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Through time


def simulate(dag, inputs, timesteps, every_step=False, watch=None):
    """The outputs of a converted network, [B, ...] each, or with `every_step` [T, B, ...].

    The batch is cut into parts, and the timesteps of each part too, so that what is simulated at a time stays in the
    cache, and in `memory_budget`, whatever B and T are. Where layers listen first, or some between stay ANN, all steps
    of an image are one part. On a CPU every thread simulates parts of its own. With a `watch`, the whole batch is one
    part, and it is called for every op and chunk of timesteps.
    """
    stages = Stages(dag)
    images, steps = cut(dag, inputs, timesteps, stages)
    parts = [inputs] if watch is not None else list(zip(*(x.split(images) for x in inputs)))

    def work(part):
        return Part(dag, stages, part, timesteps, watch).run(steps, every_step)

    results = each_part(work, parts)
    if spike_tensor.firing_ratio_record:
        weights = [len(part[0]) for part in parts]
        spike_tensor.firing_ratios.extend(mean_ratios([ratios for _, ratios in results], weights))
    if len(parts) == 1:
        return results[0][0]
    return [torch.cat(outputs, int(every_step)) for outputs in zip(*(outputs for outputs, _ in results))]


def each_part(work, parts):
    """`work(part)` of every part of a batch, on a CPU without gradients on all threads."""
    on_threads = parts[0][0].device.type == "cpu" and len(parts) > 1 and not torch.is_grad_enabled()
    if not on_threads:
        return [work(part) for part in parts]
    with one_thread_per_operator as threads, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(torch.no_grad()(work), parts))  # threads inherit no mode


def cut(dag, inputs, timesteps, stages=None):
    """How many images and how many of their timesteps to simulate at a time."""
    stages = Stages(dag) if stages is None else stages
    batch, device = len(inputs[0]), inputs[0].device
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    budget = default_memory_budget(device, threads)
    if dag.memory_budget is not None:
        budget = min(budget, dag.memory_budget)
    values = max(1, budget // threads // (BYTES_PER_CURRENT * dag.largest_sample(inputs)))  # images times steps
    images = max(1, min(values // timesteps, -(-batch // threads)))
    return images, timesteps if stages.all_at_once() else max(1, min(timesteps, values // images))


def default_memory_budget(device, threads):
    """Bytes to simulate with at a time: what CPU caches like, or a share of a GPU's free memory."""
    if device.type == "cpu":
        return threads * THREAD_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return min(GPU_BYTES, 2 ** ((free // 4).bit_length() - 1))  # a power of two, so that shapes recur


class Stages:
    """The ops of a converted network in three stages, in order.

    before: those before the first spikes. between: those up to the last spikes. behind: those that read what the spikes
    stand for.
    """

    def __init__(self, dag):
        self.outputs = dag.outputs_nodes
        self.before, self.between, self.behind = [], [], []
        needed = nodes_before_spikes(dag)
        from_spikes = set()
        for entry in dag.ops.values():
            if entry.op.spiking or not from_spikes.isdisjoint(entry.inputs):
                from_spikes.add(entry.out)
                is_between = entry.op.spiking or entry.out in needed
                (self.between if is_between else self.behind).append(entry)
            else:
                self.before.append(entry)

    def has_ann_between(self):
        """Whether a layer between two spiking ones stays ANN: it reads what all timesteps sent."""
        return not all(entry.op.spiking for entry in self.between)

    def all_at_once(self):
        """Whether all timesteps of an image have to be simulated at a time."""
        for entry in self.between:
            if not entry.op.spiking or (entry.op.neuron is not None and entry.op.neuron.listen):
                return True
        return False


def nodes_before_spikes(dag):
    """Nodes that a spiking layer lies behind: what it reads must be known before its first step."""
    nodes = set()
    for entry in reversed(dag.ops.values()):
        if entry.op.spiking or entry.out in nodes:
            nodes.update(entry.inputs)
    return nodes


class Part:
    """The simulation of a part of a batch: `inputs` [B, ...] each."""

    def __init__(self, dag, stages, inputs, timesteps, watch=None):
        self.stages, self.timesteps, self.watch = stages, timesteps, watch
        self.constants, self.memory = dict(zip(dag.inputs_nodes, inputs)), Memory(timesteps)
        self.later = count_readers(stages.behind, stages.outputs)  # what is read behind the last spikes
        self.counts, self.scales, self.done = {}, {}, 0

    def run(self, chunk, every_step):
        """The outputs, and the firing ratio of every spiking layer; `chunk` steps at a time."""
        run_ops(self.stages.before, self.constants, watch=self.watch)
        ratios, weights, curve = [], [], []
        with own_record() as record:
            while self.done < self.timesteps:
                steps = min(chunk, self.timesteps - self.done)
                values, trains = self.advance(steps)
                ratios.append(list(record))
                weights.append(steps)
                record.clear()
                if every_step:
                    curve.append(self.outputs_so_far(values, trains, steps))
                self.count(trains, steps)
        outputs = [torch.cat(steps) for steps in zip(*curve)] if every_step else self.outputs(values)
        return outputs, mean_ratios(ratios, weights)

    def advance(self, steps):
        """`values, trains` of the next steps: node -> value, and those of spikes that are read behind them."""
        values = dict(self.constants)
        with torch.no_grad():  # spikes have no gradient
            run_ops(self.stages.between, values, steps, self.memory, self.watch, self.later)
        return values, {node: value for node, value in values.items() if isinstance(value, SpikeTensor)}

    def count(self, trains, steps):
        """Add up spikes over time."""
        for node, train in trains.items():
            counted = train.counts()
            self.counts[node] = self.counts[node] + counted if self.done else counted
            self.scales[node] = train.scale_factor
        self.done += steps

    def outputs_so_far(self, values, trains, steps):
        """The outputs after each of these steps, [steps, B, ...]."""
        values = {node: value for node, value in values.items() if node in self.later}
        for node, value in values.items():
            if node in trains:
                values[node] = trains[node].to_float_every_step(self.counts.get(node, 0), self.done)
            else:  # the same at every step
                values[node] = value.repeat(steps, *[1] * (value.dim() - 1))
        return [output.unflatten(0, (steps, -1)) for output in self.read_out(values)]

    def outputs(self, values):
        """The outputs of what the spikes of all steps stand for."""
        for node, count in self.counts.items():
            values[node] = decode(count, self.scales[node], self.timesteps)
        return self.read_out(values)

    def read_out(self, values):
        """The network's outputs from the values that the layers behind the last spikes read."""
        run_ops(self.stages.behind, values, watch=self.watch)
        return [values[node] for node in self.stages.outputs]


def mean_ratios(ratios, weights):
    """The mean of lists of firing ratios, one entry per layer, each list with its weight."""
    if len(ratios) == 1:
        return ratios[0]
    total = sum(weights)
    return [sum(r * weight for r, weight in zip(layer, weights)) / total for layer in zip(*ratios)]


@contextmanager
def own_record():
    """The firing ratios of this thread, apart from all others; an empty list where none are recorded."""
    record = spike_tensor.of_this_thread.ratios = []
    try:
        yield record
    finally:
        spike_tensor.of_this_thread.ratios = None


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


# ---------------------------------------------------------------------------------------------------------------------
# Durations and bounds


def duration(dag, timesteps):
    """Timesteps that the chip needs: "firing" T, "interval" from image to image, "latency" from image to answer.

    A layer that listens for d steps first fires d steps later than it gets its first input, so that the interval is
    T + d, and every such layer on the longest path adds d to the latency; layers between that stay ANN add T.
    """
    delays, sent, longest = dict.fromkeys(dag.inputs_nodes, 0), set(), 0
    between = Stages(dag).between
    for entry in dag.ops.values():
        neuron = entry.op.neuron
        own = 0 if neuron is None else min(neuron.listen, timesteps)
        stays_ann = entry in between and not entry.op.spiking  # it reads what all steps have sent
        inputs = [delays[node] + timesteps * (stays_ann and node in sent) for node in entry.inputs]
        delays[entry.out] = own + max(inputs)
        longest = max(longest, own)
        if entry.op.spiking:
            sent.add(entry.out)
    latency = timesteps + max(delays[node] for node in dag.outputs_nodes)
    return {"firing": timesteps, "interval": timesteps + longest, "latency": latency}


def bound_currents(dag):
    """Set the bound of |current| per step, `largest_current`, of every neuron of integers anew, from these."""
    largest = {}  # node of currents -> bound; spikes are at most 1
    for entry in dag.ops.values():
        op = entry.op
        if not op.spiking:
            continue
        largest[entry.out] = op.largest_sum([largest.get(node, 1) for node in entry.inputs])
        if op.neuron is not None:
            if op.neuron.largest_current is not None:  # else real numbers flow, of the image or of float weights
                op.neuron.largest_current = int(largest[entry.out])
            largest[entry.out] = 1
