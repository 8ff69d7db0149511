"""Correction of a converted network against its ANN, layer by layer, on the spikes that reach each layer.

    correct_spikes(snn, qnet, loader, device, samples)

The correction shifts initial membrane potentials and biases. Both are integers behind the first layer, so a chip can
hold the corrected values. Each layer takes three steps:

1. With `--correction weights`, the weights are fitted to the spikes that arrive. Premature and late spikes give a
   layer's inputs errors. Other weights do better on them: they rely less on neurons that are often wrong, and more on
   others that say the same. (Li et al., A Free Lunch From ANN, ICML 2021, train the weights of each layer for this;
   here it is one least squares, `conversion.least_squares`.)
2. Neurons with a bias are held back: the membrane potential starts lower by a share of Vthr, and the bias returns this
   share over the T steps. The share is fixed, or the one of least squared error. The total input stays the same, but
   fewer spikes are premature. A premature spike, sent before the inhibitory input arrives, cannot be taken back.
3. The mean decoded activations of the channels are matched to those of the ANN.
"""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from tqdm import tqdm

from conversion.least_squares import HELD_OUT, can_fit, fitted_integers, positions, sample_inputs, sample_outputs
from conversion.packed import PackedCounts, PackedSpikes
from kernels.counts_cpu import can_count, count_spikes
from kernels.memory_order import order
from runtime.batches import batches_of, on_device, split_batch
from runtime.memory import give_back
from spike_simulator import Stages, bound_currents, counting_of, current_into, one_thread_per_operator, run_ops
from spike_tensor import Counting, Current, Memory, SpikeTensor, decode

MOST_IMAGES = 256  # a channel's mean activation needs few images
MOST_TO_FIT = 1024  # weights need more: a ResNet-20 at T = 8 lost 3.6 points with 256 images, 3.1 with these
MOST_POSITIONS = 2**17  # sampled for a layer to fit: the errors of spikes are noise, which takes many to average out
MOST_BYTES = 2**28  # limit for the spikes of the largest layer, over all images of a correction
MOST_IN_A_BYTE = 255
MOST_KEPT = 2**29  # bytes of the currents into one layer that are kept; the others are computed for every round
LARGE_BYTES = 2**27  # activations of a layer behind which memory is given back: 8 times the largest of a ResNet-20
CHUNK_BYTES = 2**25  # limit for the float32 currents of the largest layer, over the images of one thread
TRIAL_IMAGES = 64  # images on which `SHARES` are tried: a channel has hundreds of neurons in most layers
MOST_PLACES = 32 * 32  # of a map that means are taken over: neighbours in a larger map say almost the same
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75)  # candidates of hold_back "auto"; above 1/2 the error changes slowly


@torch.no_grad()
def correct_spikes(snn, qnet, loader, device, samples, with_bias=False, hold_back=0.0, with_weights=False):
    """Shift initial potentials and biases until the mean decoded activations equal those of the ANN.

    The layers are corrected in order, each on the spikes of the corrected layers before it (`correct_means`). `snn` is
    changed in place.

    snn: the converted network. qnet: its ANN, with the same ops. samples: number of images taken from `loader`, at most
    `MOST_IMAGES` (`MOST_TO_FIT` with weights), and fewer if T steps of the largest layer exceed `MOST_BYTES`.
    with_bias: put the integer part of a shift into the biases, where there are any. hold_back: the share of Vthr by
    which neurons start lower; the biases return it over the T steps (`current_held_back`). "auto" chooses a share for
    every channel (`best_shares`).
    with_weights: fit the weights first, in a network whose layers do not all listen for T steps.
    """
    (first, *_) = calibration_images(loader, device, 1, qnet, 1)
    counting = counting_of(snn, Stages(snn), first, snn.timesteps)
    steps = snn.timesteps if counting is None else 4  # bytes per element: an ANN's activation takes more than a count
    most = MOST_TO_FIT if with_weights else MOST_IMAGES
    chunks = calibration_images(loader, device, min(samples, most), qnet, steps)
    images = CorrectionImages(snn, qnet, chunks, counting)
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    with one_thread_per_operator, ThreadPoolExecutor(threads) as pool:
        for name in tqdm(snn.neurons(), "correct", leave=False, delay=1):
            moved = images.fit_weights(name, pool) if with_weights else 0
            images.correct(name, pool, with_bias, hold_back, moved)
    bound_currents(snn)


class CorrectionImages:
    """The images of a correction, in chunks, with the values that both networks compute from them.

    activations: for every chunk, a dict node -> activation in the ANN, [B, ...].
    values: for every chunk, a dict node -> input, or spikes of a corrected layer. On a CPU each spike takes one bit
    (`PackedSpikes`), so the memory of a correction hardly grows with T.
    counting: the Counting of a network whose layers all listen for T steps, so that counts take the place of spikes.
    """

    def __init__(self, snn, qnet, chunks, counting=None):
        self.snn, self.qnet, self.timesteps = snn, qnet, snn.timesteps
        self.activations = [dict(zip(snn.inputs_nodes, inputs)) for inputs in chunks]
        self.values = [dict(known) for known in self.activations]
        self.counting = counting
        self.steps = 1 if self.counts else snn.timesteps  # counts have one step for all T
        self.before, self.reads = sections(snn)

    @property
    def counts(self):
        """Whether all layers listen for T steps, so that counts take the place of spikes (`counting_of`)."""
        return self.counting is not None

    def fit_weights(self, name, pool):
        """Fit the weights of the layers before the neuron of op `name`, and return what their biases got by it.

        That is a current per step, in the shape of a bias in a sample. All layers before must be corrected already.
        """
        moved = 0
        for carrier in bias_carriers(self.snn, self.snn.ops[name].inputs[0]):
            layer = self.snn.ops[carrier].op
            if not can_fit(layer):
                continue
            samples = pool.map(partial(self.samples_of, name, carrier), range(len(self.values)))
            inputs, errors, held_out = (torch.cat(parts, dim) for parts, dim in zip(zip(*samples), (1, 0, 0)))
            weight = layer.weight_q / layer.weight_scale
            wanted = errors + (inputs @ layer.rows(weight).unflatten(0, (len(inputs), -1)).mT).transpose(0, 1).flatten(
                1
            )
            weight_q, shift = fitted_integers(layer, weight, inputs, wanted, held_out)
            layer.weight.copy_(weight_q / layer.weight_scale)
            layer.set_integers(weight_q.to(layer.weight_q.dtype), layer.bias_q, layer.unit)
            current = layer.output_view(shift) / layer.unit
            current = current if has_float_bias(layer) else current.round()
            add_bias(layer, self.snn.ops[name].op.neuron, current)
            moved = moved + current
        bound_currents(self.snn)  # of the new weights
        return moved

    @torch.no_grad()
    def samples_of(self, name, carrier, chunk):
        """`inputs, errors, held_out` of the layer `carrier` before op `name` on a chunk of images, at drawn positions.

        inputs: what its spikes decode to, [G, N, K]. errors: the current of the ANN minus that of the spikes, in units
        of activation, [N, C_out]. held_out: [N], true for every `HELD_OUT`th image.
        """
        node, layer = self.snn.ops[name].inputs[0], self.snn.ops[carrier].op
        values = self.values_before(name, self.values[chunk])
        current = values[node].per_step().mean(0) * layer.unit
        error = self.activations_before(name, self.activations[chunk])[node] - current
        most = positions(layer, MOST_POSITIONS) // len(self.values) + 1
        drawn, errors = sample_outputs(error, layer.output_channels, most, torch.Generator().manual_seed(chunk))
        inputs = sample_inputs(layer, values[self.snn.ops[carrier].inputs[0]].to_float(), drawn)
        return inputs, errors, (chunk * len(error) + drawn[0]) % HELD_OUT == 0

    def correct(self, name, pool, with_bias, hold_back, moved=0):
        """Hold back and correct the neurons of op `name`. All layers before it must be corrected already.

        moved: the current per step that `fit_weights` gave to the biases.
        """

        def each(function, *lists):
            """Apply `function` to the entries of the lists, one call per chunk, on all threads."""
            return list(pool.map(torch.no_grad()(function), *lists))

        neuron, carrier = self.snn.ops[name].op.neuron, carrier_of(self.snn, name)
        is_whole = neuron.largest_current is not None and not (carrier is not None and has_float_bias(carrier))
        carrier = carrier if with_bias else None
        targets = each(partial(self.activation_of, name), self.activations)
        wanted = [some_places(target) for target in targets]
        currents = KeptCurrents(partial(self.current_into, name), self.values, is_whole)

        def each_current(function, chunks=None):
            """Apply `function(current, target)`, at some places, to every chunk, or to the first ones."""
            return each(lambda n, target: function(currents.of(n), target), range(len(wanted[:chunks])), wanted)

        share = hold_back
        if hold_back == "auto":
            share = self.best_shares(name, each_current, wanted, carrier, moved)
        currents.add(hold_back_neuron(self.snn, self.qnet, name, share, moved))
        decode = decoded_steps
        if self.counts:
            decode = partial(self.decoded_counts, at_rest=some_places(self.note_rest(name)))
        currents.add(correct_means(neuron, each_current, carrier, self.timesteps, decode))
        self.note_rest(name)
        self.keep(name, targets, each(lambda n: self.spikes_of(name, currents.take(n)), range(len(targets))))
        if sum(target.nbytes for target in targets) > LARGE_BYTES:
            give_back()

    def keep(self, name, targets, spikes):
        """Note the activations and spikes of op `name`, for every chunk; drop the nodes that no op behind it needs."""
        out, later = self.snn.ops[name].out, list(self.reads)[list(self.reads).index(name) + 1 :]
        wanted = set().union(*(self.reads[other] for other in later))
        for store, values in ((self.activations, targets), (self.values, spikes)):
            for known, value in zip(store, values):
                known[out] = value
                for node in set(known) - wanted:
                    del known[node]

    def best_shares(self, name, each_current, targets, carrier, moved=0):
        """The share of `SHARES` with the least squared error after the correction, for every channel of op `name`.

        [C, 1, 1] or [N]; 0 where nothing can be held back. The first of equal shares wins. targets: the ANN's
        activations, a list of chunks. carrier: the layer whose bias takes a part of the shift, or None. moved: as of
        `correct`.
        """
        trials, neuron = [], self.snn.ops[name].op.neuron
        for share in SHARES:
            lower, current = held_back(self.snn, self.qnet, name, share, moved)
            trial = copy.deepcopy(neuron)
            trial.initial_potential = neuron.initial_potential - lower
            trials.append(ShiftSearch(trial, carrier, self.timesteps, decoded_steps, held=current))
        if not any(trial.held.any() for trial in trials):
            return 0.0
        chunks = -(-TRIAL_IMAGES // len(targets[0]))
        few = partial(each_current, chunks=chunks)
        search_shifts(trials, few, rounds=2)  # enough to rank the shares; the chosen one gets all rounds
        errors = torch.stack([trial.error for trial in trials])  # [shares, C, 1, 1]
        return torch.tensor(SHARES, device=errors.device)[errors.argmin(0)]

    def current_into(self, name, known):
        """The current into the neuron of op `name`, computed from the values of the nodes `known`."""
        entry, values = self.snn.ops[name], self.values_before(name, known)
        return current_into(entry.op, [values[node] for node in entry.inputs], self.steps)

    def values_before(self, name, known):
        """Node -> value of the converted network, up to the inputs of op `name`, from the values of `known`."""
        packed, read = (PackedSpikes, PackedCounts), {node: known[node] for node in self.reads[name]}
        values = {node: each.unpack() if isinstance(each, packed) else each for node, each in read.items()}
        run_ops(self.before[name], values, self.steps, Memory(self.timesteps, self.counting))
        return values

    def note_rest(self, name):
        """Measure the current into the neuron of op `name` in a step without spikes, and return it; None for steps."""
        if not self.counts:
            return None
        current = self.current_into(name, {node: at_rest(self.values[0][node]) for node in self.reads[name]})
        total = current.total().to(self.counting.dtype)
        self.counting.at_rest[self.snn.ops[name].op.neuron] = total
        return total

    def decoded_counts(self, neuron, current, added, at_rest):
        """As `decoded_steps`, for a current of counts; at_rest: the current of a step without spikes."""
        current = shifted(current, added) if added.any() else current
        counting = Counting(self.counting.dtype)
        counting.measures, counting.at_rest = False, {neuron: at_rest + added}
        spikes = neuron(current, Memory(self.timesteps, counting))
        return decode(spikes.data, spikes.scale_factor, self.timesteps)

    def spikes_of(self, name, current):
        """The spikes of op `name`, or their counts, packed on a CPU."""
        spikes = self.snn.ops[name].op.send(current, Memory(self.timesteps, self.counting))
        if self.counts:
            return PackedCounts(spikes) if self.timesteps <= MOST_IN_A_BYTE else spikes
        return PackedSpikes(spikes) if spikes.data.device.type == "cpu" else spikes

    def activation_of(self, name, known):
        """The activation of op `name` in the ANN, [B, ...]."""
        values = self.activations_before(name, known)
        run_ops([self.qnet.ops[name]], values)
        return values[self.qnet.ops[name].out].contiguous()  # means of floats depend on the memory order

    def activations_before(self, name, known):
        """Node -> activation of the ANN, up to the inputs of op `name`."""
        values = dict(known)
        run_ops([self.qnet.ops[entry.name] for entry in self.before[name]], values)
        return values


class KeptCurrents:
    """The currents into one neuron, for every chunk of images: those of the first chunks are kept, within `MOST_KEPT`.

    compute: function from a dict node -> value to a Current. values: such a dict for every chunk. is_whole: whether the
    currents are integers, so that the order of a sum does not matter. leaves_out: whether `of` leaves places out.
    """

    def __init__(self, compute, values, is_whole):
        self.compute, self.values, self.is_whole, self.kept = compute, values, is_whole, {}
        self.leaves_out = False

    def of(self, n):
        """The current of chunk number n at `some_places`."""
        if n in self.kept:
            return self.kept[n]
        whole = self.whole(n)
        current = at_some_places(whole)
        self.leaves_out = current is not whole
        data = current.data.contiguous(memory_format=order(current.data))  # now, not for every count
        current = Current(data, current.timesteps, current.constant, current.spikes)
        if (n + 1) * current.data.nbytes <= MOST_KEPT:
            self.kept[n] = current
        return current

    def whole(self, n):
        """The current of chunk number n at all places, computed from the values."""
        current = self.compute(self.values[n])
        if self.is_whole and current.spikes is not None and current.data.dtype == torch.float32:
            add_spikes(current)
        return current

    def take(self, n):
        """The current of chunk number n at all places, for the last time: the memory is free then."""
        kept = self.kept.pop(n, None)
        return self.whole(n) if kept is None or self.leaves_out else kept

    def add(self, current):
        """Note that the biases give `current` more at every step from now on."""
        if current.any():
            self.kept = {n: shifted(kept, current) for n, kept in self.kept.items()} if self.is_whole else {}


def add_spikes(current):
    """Add the spikes that belong to a current to its data, in place.

    It goes step by step, so that the products stay in the cache.
    """
    spikes, weight = current.spikes
    steps = current.data.unflatten(0, (current.timesteps, -1)), spikes.unflatten(0, (current.timesteps, -1))
    for step, sent in zip(*steps):  # [B, ...]
        step.add_(sent * weight.to(step.dtype))
    current.spikes = None


def sections(snn):
    """`before, reads`: for every op that fires, the ops between it and the neurons before, and what they read.

    before: op name -> entries, in order. reads: op name -> the nodes of inputs and of neurons that they read.
    """
    before, reads, known = {}, {}, set(snn.inputs_nodes)
    for name in snn.neurons():
        wanted, entries = set(snn.ops[name].inputs), []
        for entry in reversed(snn.ops.values()):
            if entry.out in wanted - known:
                entries.insert(0, entry)
                wanted.update(entry.inputs)
        before[name], reads[name] = entries, wanted & known
        known.add(snn.ops[name].out)
    return before, reads


def decoded_steps(neuron, current, added):
    """The activation [B, ...] that a neuron decodes to, for its current plus a constant `added` at every step."""
    timesteps, in_float32 = current.timesteps, neuron.membrane_type(current.timesteps) == torch.float32
    takes = neuron.spike_type == torch.uint8 and in_float32 and current.data.dtype == torch.float32
    if not (takes and can_count(current.data) and current.spikes is None):
        return neuron(shifted(current, added) if added.any() else current).to_float()
    numbers = timesteps, neuron.listen, neuron.most_spikes(timesteps), neuron.reset_mode == "subtraction"
    rows = 1 if current.constant else timesteps
    counts = count_spikes(current.data, rows, added, neuron.Vthr, neuron.initial_potential, *numbers)
    return decode(counts, neuron.scale_factor, timesteps)


def at_rest(value):
    """No spike at all: the first sample of a node's value, with zeros in the place of counts."""
    if isinstance(value, PackedCounts):
        value = value.unpack()
    if isinstance(value, SpikeTensor):
        return SpikeTensor.like(torch.zeros_like(value.data[:1]), value.timesteps, value.scale_factor)
    return value[:1]


def calibration_images(loader, device, samples, qnet, timesteps):
    """The first `samples` images of `loader` as a list of chunks, one tuple of inputs [B, ...] per chunk.

    `MOST_BYTES` limits their number, though never below 16 images. One thread works on one chunk at a time.
    """
    chunks, seen, most = [], 0, samples
    for batch in batches_of(loader):
        inputs = on_device(split_batch(batch)[0], device)
        bytes_per_image = timesteps * qnet.largest_sample(inputs)
        most = min(most, max(16, MOST_BYTES // bytes_per_image))
        inputs = tuple(x[: most - seen] for x in inputs)
        per_chunk = max(1, CHUNK_BYTES // (4 * bytes_per_image))  # a spike takes 1 byte, a float32 current 4
        chunks += zip(*(x.split(per_chunk) for x in inputs))
        seen += len(inputs[0])
        if seen >= most:
            break
    return chunks


def bias_beyond(snn, qnet, name):
    """Bias of the SNN minus bias of the ANN for the neuron of op `name`, per step, in units of its potential.

    The difference comes from rounding, from holding back and from corrections. It is shaped as Vthr, or [C, 1, 1]
    ([N]). With reset to zero it is 0, because a neuron then forgets its potential before the first step.
    """
    op = snn.ops[name].op
    neuron, beyond = op.neuron, torch.zeros_like(op.neuron.Vthr, dtype=torch.float32)
    if neuron.reset_mode != "subtraction" or op.splits_signs:
        return beyond
    for carrier in bias_carriers(snn, snn.ops[name].inputs[0]):
        layer, bias = snn.ops[carrier].op, qnet.ops[carrier].op.bias
        spatial = [1] * layer.spatial
        if layer.bias_q is not None:
            beyond = beyond + layer.bias_q.view(-1, *spatial)
        if bias is not None:
            beyond = beyond - bias.detach().view(-1, *spatial) * (neuron.Vthr / neuron.scale_factor)
    return beyond


def hold_back_neuron(snn, qnet, name, share, moved=0):
    """Start the neuron of op `name` lower; its bias returns the difference over T steps (`current_held_back`).

    Returns the current per step that the bias gets.
    """
    lower, current = held_back(snn, qnet, name, share, moved)
    neuron = snn.ops[name].op.neuron
    if lower.any():
        neuron.initial_potential = neuron.initial_potential - lower
    if current.any():
        add_bias(carrier_of(snn, name), neuron, current)
    return current


def held_back(snn, qnet, name, share, moved=0):
    """`lower, current`: how much lower the neuron of op `name` starts, and the current per step that returns it."""
    current, rounded = current_held_back(snn, qnet, name, share, moved)
    lower = (current - rounded) * snn.timesteps
    is_float = snn.ops[name].op.neuron.initial_potential.is_floating_point()
    return lower if is_float else lower.round().to(torch.int32), current


@torch.no_grad()
def current_held_back(snn, qnet, name, share, moved=0):
    """`extra, missing`: the bias per step that compensates a start `share` * Vthr lower, and the bias's rounding error.

    share: a number, or one per channel in the shape of a sample ([C, 1, 1] or [N]).
    The neuron starts T * (extra - missing) lower, and after T steps its sum is the same as without. A bias is a whole
    number, so share * Vthr / T is rounded. At few bits it can be below 1; then the rounding error of the bias itself
    matters as much (`bias_beyond`), and both are rounded together. Nothing is held back with reset to zero, or where no
    layer has a bias that reaches only this neuron. A neuron that listens for d steps is held back 1 - d / T times as
    much: at d = T no spike is premature. moved: what the bias differs by on purpose, per step.
    """
    neuron, carrier = snn.ops[name].op.neuron, carrier_of(snn, name)
    nothing = torch.zeros_like(neuron.Vthr)
    if carrier is None or neuron.reset_mode != "subtraction":
        return nothing, nothing
    current = share * (1 - neuron.listen / snn.timesteps) * neuron.Vthr / snn.timesteps
    # A repaired layer (error analysis) mixes types: float weights before an integer neuron, or the other way round.
    if has_float_bias(carrier):
        is_float = neuron.initial_potential.is_floating_point()
        return (current if is_float else current.round().to(torch.int32)), nothing
    rounded = torch.where((current > 0) & (current < 1), moved - bias_beyond(snn, qnet, name), 0.0)
    return (current + rounded).round().to(torch.int32), rounded


def correct_means(neuron, each_current, carrier, timesteps, decode):
    """Shift the initial potential and the bias until each channel's mean decoded activation is that of the ANN.

    Without a `carrier` the whole shift goes into the initial potential. With a `carrier`, a layer with a bias, the
    integer part of shift / T is added to that bias at every step, and only the rest goes into the initial potential
    (bias shift of Li et al., A Free Lunch From ANN, ICML 2021). Returns the current per step that the bias gets.
    """
    search = ShiftSearch(neuron, carrier, timesteps, decode)
    search_shifts([search], each_current)
    current = search.shift(search.best)
    if carrier is not None:
        add_bias(carrier, neuron, current)
    return current


def search_shifts(searches, each_current, rounds=4):
    """Run several searches at the same time; every current is computed once for all of them.

    Shifts act through thresholds and rounding, so there are `rounds` rounds behind the first measurement.
    """
    for _ in range(rounds + 1):
        added = [search.shift(search.total) for search in searches]

        def sums(current, target, added=added):
            return [search.sums(current, target, each) for search, each in zip(searches, added)], len(target)

        of_chunks, images = zip(*each_current(sums))
        for search, parts in zip(searches, zip(*of_chunks)):
            search.update(*(sum(part) / sum(images) for part in zip(*parts)))


class ShiftSearch:
    """The search for the shift of a neuron at which its mean decoded activations are those of the ANN.

    A round measures the mean difference per channel, converts it to units of membrane potential and adds it to the
    total shift. Each channel keeps the shift with the smallest difference.

    neuron: its initial potential is set by every `shift`. decode: `decoded_steps` or its like. carrier: the layer whose
    bias takes a part of the shift, or None. held: a current per step that the bias does not have yet, for a trial
    (`CorrectionImages.best_shares`); a trial also measures the squared error.
    total, best: the shift to measure next, and the best one so far. error: the mean squared error at `best`.
    """

    def __init__(self, neuron, carrier, timesteps, decode, held=None):
        self.neuron, self.carrier, self.timesteps = neuron, carrier, timesteps
        self.decode, self.held = decode, held
        self.initial = neuron.initial_potential.float()
        self.per_activation = timesteps * neuron.Vthr / neuron.scale_factor  # total potential per unit of activation
        self.total = self.best = self.error = torch.zeros_like(self.initial)
        self.nearest = torch.full_like(self.initial, torch.inf)

    def shift(self, total):
        """Set the initial potential for a shift of `total`, and return the current to add at every step."""
        current = total / self.timesteps if self.carrier is not None else torch.zeros_like(total)
        current = current if self.carrier is None or has_float_bias(self.carrier) else current.trunc()
        potential = self.initial + total - current * self.timesteps
        is_integer = not self.neuron.initial_potential.is_floating_point()
        self.neuron.initial_potential = potential.round().to(torch.int32) if is_integer else potential.float()
        return current

    def sums(self, current, target, added):
        """Over the images of a chunk: the sum of ANN activation minus decoded rate, and of its square.

        [C, 1, 1] or [N]; means over the places of a channel. The square is left out if this is no trial. added: the
        current of the shift.
        """
        added = added if self.held is None else added + self.held
        difference = target - self.decode(self.neuron, current, added)
        measured = [difference] if self.held is None else [difference, difference.square()]
        return [over_places(each).sum(0) for each in measured]

    def update(self, difference, error=None):
        """Note the mean difference and, for a trial, the squared error that were measured at `total`, and move on."""
        is_nearer = difference.abs() < self.nearest
        self.nearest = torch.where(is_nearer, difference.abs(), self.nearest)
        self.best = torch.where(is_nearer, self.total, self.best)
        self.error = self.error if error is None else torch.where(is_nearer, error, self.error)
        self.total = self.total + difference * self.per_activation


def some_places(values):
    """Every n-th row and column of maps [..., H, W] with more than `MOST_PLACES` places; a view.

    n is odd: an even one would meet only every second output of a transposed convolution of stride 2.
    """
    places = values.shape[2] * values.shape[3] if values.dim() == 4 else 1
    stride = math.ceil(math.sqrt(places / MOST_PLACES)) // 2 * 2 + 1
    return values[..., ::stride, ::stride] if stride > 1 else values


def at_some_places(current):
    """A Current at `some_places`; the same one if these are all."""
    data = some_places(current.data)
    if data is current.data:
        return current
    spikes = None if current.spikes is None else (some_places(current.spikes[0]), current.spikes[1])
    return Current(data, current.timesteps, current.constant, spikes)


def over_places(values):
    """The mean over height and width, [B, C, 1, 1]; values [B, N] are unchanged."""
    return values.mean([2, 3], keepdim=True) if values.dim() == 4 else values


def carrier_of(snn, name):
    """The layer whose bias can shift the neuron of op `name`, or None.

    None for a pair of signs, too: one bias would shift both neurons in opposite directions.
    """
    entry = snn.ops[name]
    return None if entry.op.splits_signs else bias_carrier(snn, entry.inputs[0])


def bias_carrier(snn, node):
    """The first layer whose bias reaches the current of a node unchanged (`bias_carriers`), or None."""
    return next((snn.ops[name].op for name in bias_carriers(snn, node)), None)


def bias_carriers(snn, node):
    """Names of the ops whose bias reaches the current of a node unchanged, and reaches no other node."""
    name = snn.writer(node)
    if name is None or snn.only_reader(node) is None:
        return []
    op, in_nodes = snn.ops[name].op, snn.ops[name].inputs
    if op.neuron is not None:
        return []
    if op.carries_bias:
        before = snn.writer(in_nodes[0])
        reads_spikes = before is not None and snn.ops[before].op.spiking
        return [name] if reads_spikes else []  # a layer that reads the image adds its bias in float
    if not op.adds:
        return []
    plain = [node for node, weight in zip(in_nodes, op.branch_weights) if weight is None]
    return [name for node in plain for name in bias_carriers(snn, node)]


def has_float_bias(layer):
    """Whether a converted layer has a float bias: its weights are floats, or it computes the image's current."""
    return (layer.weight_q if layer.bias_q is None else layer.bias_q).is_floating_point()


def add_bias(layer, neuron, current):
    """Add a current per step, [C, 1, 1] or a scalar, to a converted layer's bias, and to the bound of the neuron."""
    if layer.has_weights:
        current = current.flatten()  # [C_out], as its bias
    before = current.new_zeros(layer.output_channels) if layer.bias_q is None else layer.bias_q
    layer.bias_q = (before + current).to(torch.float32 if has_float_bias(layer) else torch.int32)
    if neuron.largest_current is not None:
        neuron.largest_current += int(current.abs().max())


def shifted(current, by):
    """The current plus a constant per channel, `by`, at every step."""
    total = current.total()
    return current.like(total + by.to(total.dtype))
