"""The runner of a graph, as an ANN or through time.

    run_ops(entries, values)                               # an ANN, or the ANN part of a converted network
    run_ops(entries, values, timesteps, memory)            # spiking ops
    simulate(dag, inputs, timesteps)                       # a converted network, from the image to its outputs

A caller who wants to see values passes a `watch`. `watch(name, current, value)` is called after every op, with the
current into its neuron (None for an op that stays ANN) and the value that it sends. If `watch` returns a value other
than None, that value is sent instead.
"""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

import spike_tensor
from spike_tensor import Counting, Current, Memory, SpikeTensor, decode

BYTES_PER_CURRENT = 16  # working set per element of the largest layer: current, spikes, membrane potential, skips
BYTES_AT_ONCE = 24  # the same where all timesteps are one chunk: 22 in a ResNet-20 whose layers listen
THREAD_BYTES = 64 * 2**20  # working set of one CPU thread; the currents, a quarter of it, stay in the cache
GPU_BYTES = 2**33  # a larger working set was not faster on an H200


class Misfit(ValueError, RuntimeError):
    """Inputs that do not fit the network. Also a RuntimeError, as PyTorch's own errors for wrong shapes."""


# ---------------------------------------------------------------------------------------------------------------------
# Ops in order


def run_ops(entries, values, timesteps=None, memory=None, watch=None, wanted=None):
    """Run ops in order and write their outputs into `values`, a dict node -> value.

    Without `timesteps` every op runs as an ANN, on activations [B, ...]. With `timesteps` and a `memory`, spiking ops
    run through that many steps, on values [steps*B, ...]; ops that stay ANN read decoded spikes.
    wanted: the nodes that are read afterwards, or a Counter of them; if given, every other value is replaced by None
    after its last reader. Raises Misfit, which names the op and the shapes, if shapes do not fit an op.
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
    """The current of a spiking op for its inputs. Activations count as a current that is the same at every step."""
    return op.current(*[Current(x, timesteps, constant=True) if isinstance(x, torch.Tensor) else x for x in inputs])


def misfit(entry, inputs, error):
    """A Misfit that names the op, the shapes of its inputs and the error."""
    shapes = " and ".join(str(list(x.data.shape)) for x in inputs)
    return Misfit(f"{entry.where} cannot run on inputs of {shapes}: {(str(error).splitlines() or [''])[0]}")


def count_readers(entries, wanted):
    """Counter of how often each node is read: by `entries`, and afterwards by `wanted`."""
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
    """Node -> shape of one sample, without the batch, in an ANN run on `inputs`, [B, ...] each."""
    values = dict(zip(dag.inputs_nodes, inputs))
    run_ops(dag.ops.values(), values)
    return {node: tuple(value.shape[1:]) for node, value in values.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Through time


def simulate(dag, inputs, timesteps, every_step=False, watch=None, watch_sums=None):
    """The outputs of a converted network, a list of [B, ...], or with `every_step` of [T, B, ...].

    The batch is cut into parts and the timesteps into chunks, so that the working set fits the cache and
    `memory_budget` for any B and T. All steps are one chunk if a layer listens before it fires, or if a layer between
    spiking ones stays ANN. Where all layers hear everything before they fire, one pass computes all spike counts. On a
    CPU each thread simulates other parts. With a `watch`, the whole batch is one part, and `watch` is called for every
    op and chunk. Raises Misfit if shapes do not fit an op.

    watch_sums: a `watch` that only adds up spikes, for which the simulation does not change: it is called for each
    part, by several threads at once, and gets spike counts, as a train of one step, where one pass computes these. It
    does not know which images a part holds.
    """
    stages = Stages(dag)
    counting = counting_of(dag, stages, inputs, timesteps) if watch is None else None
    if counting is not None and counts_fit_bytes(stages, timesteps) and counting.dtype == torch.float32:
        counting.counts_type = torch.int8
    images, steps = cut(dag, inputs, timesteps if counting is None else 1, stages)
    parts = [inputs] if watch is not None else list(zip(*(x.split(images) for x in inputs)))

    def work(part):
        if counting is not None:
            return CountedPart(dag, stages, part, timesteps, counting, watch_sums).run(every_step)
        return Part(dag, stages, part, timesteps, watch or watch_sums).run(steps, every_step)

    results = each_part(work, parts)
    if spike_tensor.firing_ratio_record:
        weights = [len(part[0]) for part in parts]
        spike_tensor.firing_ratios.extend(mean_ratios([ratios for _, ratios in results], weights))
    if len(parts) == 1:
        return results[0][0]
    return [torch.cat(outputs, int(every_step)) for outputs in zip(*(outputs for outputs, _ in results))]


def each_part(work, parts):
    """`work(part)` for every part of a batch, as a list. On a CPU all threads work at once unless gradients are on."""
    on_threads = parts[0][0].device.type == "cpu" and len(parts) > 1 and not torch.is_grad_enabled()
    if not on_threads:
        return [work(part) for part in parts]
    with one_thread_per_operator as threads, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(torch.no_grad()(work), parts))  # no_grad again: a thread starts with gradients on


def cut(dag, inputs, timesteps, stages=None):
    """`images, steps`: how many images, and how many of their timesteps, to simulate at a time."""
    stages = Stages(dag) if stages is None else stages
    batch, device = len(inputs[0]), inputs[0].device
    threads = threads_of(device)
    budget = default_memory_budget(device, threads)
    if dag.memory_budget is not None:
        budget = min(budget, dag.memory_budget)
    at_once = is_one_chunk(stages, timesteps)
    values = max(1, budget // threads // (bytes_of(at_once) * dag.largest_sample(inputs)))  # images * steps
    images = max(1, min(values // timesteps, -(-batch // threads)))
    return images, timesteps if at_once else max(1, min(timesteps, values // images))


def least_memory(dag, inputs):
    """Bytes that the smallest part of a simulation takes, one image on each thread; it exceeds a smaller budget."""
    stages = Stages(dag)
    counts = counting_of(dag, stages, inputs, dag.timesteps) is not None
    at_once = not counts and is_one_chunk(stages, dag.timesteps)
    steps = dag.timesteps if at_once else 1
    return threads_of(inputs[0].device) * steps * bytes_of(at_once) * dag.largest_sample(inputs)


def is_one_chunk(stages, timesteps):
    """Whether several timesteps cannot be cut into chunks."""
    return timesteps > 1 and stages.all_at_once()


def bytes_of(at_once):
    """Working set per element of the largest layer; at_once: whether all timesteps are one chunk."""
    return BYTES_AT_ONCE if at_once else BYTES_PER_CURRENT


def threads_of(device):
    """How many threads simulate parts at the same time."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def default_memory_budget(device, threads):
    """Working set in bytes: `THREAD_BYTES` per CPU thread, or up to a quarter of a GPU's free memory."""
    if device.type == "cpu":
        return threads * THREAD_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return min(GPU_BYTES, 2 ** ((free // 4).bit_length() - 1))  # a power of two, so that shapes recur


class Stages:
    """The ops of a converted network in three stages, in order.

    before: ANN ops before the first spikes. between: the spiking ops, and ANN ops whose output a spiking op needs.
    behind: ANN ops behind the last spikes, which read decoded spikes.
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

    def all_at_once(self):
        """Whether all timesteps have to be one chunk: a layer listens, has a window, or stays ANN between spikes."""
        neurons = [entry.op.neuron for entry in self.between if entry.op.neuron is not None]
        are_timed = any(neuron.listen or neuron.window is not None for neuron in neurons)
        return are_timed or not all(entry.op.spiking for entry in self.between)


def nodes_before_spikes(dag):
    """The nodes that a spiking layer reads, directly or through other ops."""
    nodes = set()
    for entry in reversed(dag.ops.values()):
        if entry.op.spiking or entry.out in nodes:
            nodes.update(entry.inputs)
    return nodes


class Part:
    """The simulation of a part of a batch. inputs: the network's inputs, [B, ...] each."""

    def __init__(self, dag, stages, inputs, timesteps, watch=None):
        self.stages, self.timesteps, self.watch = stages, timesteps, watch
        self.constants, self.memory = dict(zip(dag.inputs_nodes, inputs)), Memory(timesteps)
        self.later = count_readers(stages.behind, stages.outputs)  # nodes read behind the last spikes
        self.counts, self.scales, self.done = {}, {}, 0

    def run(self, chunk, every_step):
        """`outputs, ratios`: the network's outputs, and the firing rate of every layer; `chunk` steps at a time."""
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
                is_read = not every_step or self.done + steps < self.timesteps  # the curve holds its own last counts
                self.count(trains if is_read else {}, steps)
        outputs = [torch.cat(steps) for steps in zip(*curve)] if every_step else self.outputs(values)
        return outputs, mean_ratios(ratios, weights)

    def advance(self, steps):
        """`values, trains` of the next steps: node -> value, and node -> SpikeTensor for those that are read later."""
        values = dict(self.constants)
        with torch.no_grad():  # no gradient passes the spikes of a simulation
            run_ops(self.stages.between, values, steps, self.memory, self.watch, self.later)
        return values, {node: value for node, value in values.items() if isinstance(value, SpikeTensor)}

    def count(self, trains, steps):
        """Add the spikes of these steps to the spike counts."""
        for node, train in trains.items():
            counted = train.counts()
            self.counts[node] = self.counts[node] + counted if self.done else counted
            self.scales[node] = train.scale_factor
        self.done += steps

    def outputs_so_far(self, values, trains, steps):
        """The outputs decoded after each of these steps, a list of [steps, B, ...]."""
        values = {node: value for node, value in values.items() if node in self.later}
        for node, value in values.items():
            if node in trains:
                values[node] = trains[node].to_float_every_step(self.counts.get(node, 0), self.done)
            else:  # an activation, the same at every step
                values[node] = value.repeat(steps, *[1] * (value.dim() - 1))
        return [output.unflatten(0, (steps, -1)) for output in self.read_out(values)]

    def outputs(self, values):
        """The outputs for the decoded spikes of all steps, a list of [B, ...]."""
        for node, count in self.counts.items():
            values[node] = decode(count, self.scales[node], self.timesteps)
        return self.read_out(values)

    def read_out(self, values):
        """Run the ops behind the last spikes on `values` and return the network's outputs."""
        run_ops(self.stages.behind, values, watch=self.watch)
        return [values[node] for node in self.stages.outputs]


class CountedPart(Part):
    """The simulation of a part of a batch by spike counts: one pass for all steps (`counting_of`)."""

    def __init__(self, dag, stages, inputs, timesteps, counting, watch=None):
        super().__init__(dag, stages, inputs, timesteps, watch)
        self.memory = Memory(timesteps, counting)

    def run(self, every_step):
        """`outputs, ratios`, as `Part.run`: the same numbers."""
        run_ops(self.stages.before, self.constants, watch=self.watch)
        with own_record() as record:
            values, trains = self.advance(1)
        self.count(trains, 1)
        if not every_step:
            return self.outputs(values), list(record)
        self.counts, self.done = {}, 0
        trains = {node: without_gaps(train, self.timesteps) for node, train in trains.items()}
        return self.outputs_so_far({**values, **trains}, trains, self.timesteps), list(record)


def without_gaps(train, timesteps):
    """The spikes of counts: each neuron fires at every step from the first on. SpikeTensor [B, ...] -> [T*B, ...]."""
    steps = torch.arange(timesteps, device=train.data.device).view(-1, *[1] * train.data.dim())
    return SpikeTensor.like((train.data > steps).to(torch.uint8).flatten(0, 1), timesteps, train.scale_factor)


def counting_of(dag, stages, inputs, timesteps):
    """The Counting of a simulation whose layers all hear everything before they fire, or None if steps are needed.

    Such neurons send clip(floor(u / Vthr), 0, T) spikes, where u contains the currents of all steps. As currents are
    weighted sums, the sum of all currents is the current of the spike counts, plus T - 1 times that of no spikes at
    all: the biases. The counts are those of the steps, bit for bit. A layer hears everything if it listens for T steps,
    or, without biases, for as many as the layers before it may fire. Steps are needed for gradients, by the reference
    engine, with reset to zero, with float weights, and where an ANN layer stands between spiking ones. On a GPU, whose
    libraries choose algorithms that round, too.
    """
    if inputs[0].device.type != "cpu" or not all(entry.op.spiking for entry in stages.between):
        return None
    lengths, types, early = last_steps(dag, stages, timesteps), {torch.float32}, []
    for entry in stages.between:
        neuron, steps = entry.op.neuron, last_of([lengths[node] for node in entry.inputs])
        if neuron is None:
            continue
        if not neuron.counts_suffice(min(steps, timesteps)):
            return None
        if steps <= timesteps:
            if neuron.largest_current is None:  # a float current with spikes in it
                return None
            types.add(neuron.membrane_type(timesteps))
            early += [neuron] if neuron.listen < timesteps else []
    counting = Counting(torch.float64 if torch.float64 in types else torch.float32)
    CountedPart(dag, stages, [x[:1] for x in inputs], timesteps, counting).run(False)
    counting.measures = False
    return None if any(counting.at_rest[neuron].any() for neuron in early) else counting


def counts_fit_bytes(stages, timesteps):
    """Whether spike counts, and their sums in the windows of folded poolings, are at most 127."""
    return timesteps * max(getattr(entry.op, "largest_input", 1) for entry in stages.between) <= 127


IMAGE = float("inf")  # the image's current never ends


def last_steps(dag, stages, timesteps):
    """Node -> the number of steps within which its spikes arrive, or `IMAGE` for a current of the image alone."""
    lengths = dict.fromkeys(set(dag.nodes) - {entry.out for entry in stages.between}, IMAGE)
    for entry in stages.between:
        if entry.op.neuron is not None:
            lengths[entry.out] = entry.op.neuron.most_spikes(timesteps)
        elif not entry.op.spiking:
            lengths[entry.out] = timesteps
        else:
            lengths[entry.out] = last_of([lengths[node] for node in entry.inputs])
    return lengths


def last_of(lengths):
    """The step within which all spikes of a sum arrive, from those of its parts; `IMAGE` if no part holds spikes."""
    return max([steps for steps in lengths if steps != IMAGE], default=IMAGE)


def mean_ratios(ratios, weights):
    """The weighted mean of lists of firing rates. Each list has one entry per layer, and one weight."""
    if len(ratios) == 1:
        return ratios[0]
    total = sum(weights)
    return [sum(r * weight for r, weight in zip(layer, weights)) / total for layer in zip(*ratios)]


@contextmanager
def own_record():
    """Give this thread its own record of firing rates; the list stays empty if recording is off."""
    record = spike_tensor.of_this_thread.ratios = []
    try:
        yield record
    finally:
        spike_tensor.of_this_thread.ratios = None


class OneThreadPerOperator:
    """A context in which each PyTorch operator uses one thread. It yields the number of threads that were set before.

    The caller then runs its own threads on separate parts. Contexts may overlap; the last one to end restores the
    number.
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
    """Timesteps that a chip needs: a dict of "firing", "interval" and "latency".

    "firing" is T, or the longest window in which a layer fires. "interval" is the time from image to image: the longest
    time for which a layer listens and fires. "latency" is the time from image to answer, along the longest path: the
    steps for which every layer listens, the steps in which the last one fires, and T wherever an ANN layer between
    spiking ones reads spikes, because it needs those of all steps.
    """
    delays, sent, longest, firing = dict.fromkeys(dag.inputs_nodes, 0), set(), 0, 0
    stages = Stages(dag)
    lengths = last_steps(dag, stages, timesteps)
    for entry in dag.ops.values():
        neuron = entry.op.neuron
        own = 0 if neuron is None else min(neuron.listen, timesteps)
        stays_ann = entry in stages.between and not entry.op.spiking  # it needs the spikes of all steps
        inputs = [delays[node] + timesteps * (stays_ann and node in sent) for node in entry.inputs]
        delays[entry.out] = own + max(inputs)
        if neuron is not None:
            longest = max(longest, own + neuron.most_spikes(timesteps))
            firing = max(firing, neuron.most_spikes(timesteps))
        if entry.op.spiking:
            sent.add(entry.out)
    ends = [delays[node] + min(lengths.get(node, timesteps), timesteps) for node in read_last(dag, stages)]
    return {"firing": firing, "interval": longest, "latency": max(ends)}


def read_last(dag, stages):
    """The nodes whose spikes, or values, make the outputs: those that the last ANN layers read, and the outputs."""
    made = {entry.out for entry in stages.behind}
    read = [*(node for entry in stages.behind for node in entry.inputs), *dag.outputs_nodes]
    return [node for node in read if node not in made]


def bound_currents(dag):
    """Recompute `largest_current`, the bound of |current| per step, of every integer neuron from weights and biases."""
    largest = {}  # node of currents -> bound; spikes are at most 1
    for entry in dag.ops.values():
        op = entry.op
        if not op.spiking:
            continue
        largest[entry.out] = op.largest_sum([largest.get(node, 1) for node in entry.inputs])
        if op.neuron is not None:
            if op.neuron.largest_current is not None:  # None for float currents
                op.neuron.largest_current = int(largest[entry.out])
            largest[entry.out] = 1
