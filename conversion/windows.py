"""Windows: for how many steps each layer fires, and so for how long the layers behind it listen (`--listen auto`).

    net = with_windows(net, loader, device, options)     # activation levels: one window for each layer
    snn = convert(net, loader, device, options)          # takes the windows, and listens for as many steps

A layer that hears all of its input before it fires sends no spike early or late. With `--listen T` it listens for T
steps. It needs only as many as the layers before it fire. So a layer with a window of F steps, whose activations have F
levels, costs F steps of latency. Layers differ in how much coarser levels cost: the windows are chosen by the error
that each layer alone causes.
"""

import copy

import torch
from tqdm import tqdm

from conversion.lambdas import mixed_channels
from conversion.plan import plan_conversion
from conversion.statistics import MOST_SAMPLES, lambdas_of, pool_activations
from options import MANY_LEVELS
from runtime.batches import first_inputs
from spike_neurons import ClipFloorShift
from spike_simulator import IMAGE, CountedPart, Stages, bound_currents, last_of, last_steps
from spike_tensor import Counting

KEPT = 0.95  # share of the classes that the network keeps of those that it has with windows of T steps
# The same for networks with many classes: a change is then often one between near equals.
KEPT_OF_MANY, MANY_CLASSES = 0.88, 100
SEARCH_IMAGES = 256  # calibration images on which classes are compared
ERROR_IMAGES = 16  # calibration images on which the error of a single layer is measured
SEARCH_SAMPLES = 50_000  # activations of a layer from which lambdas are chosen during the search
COARSE = 4  # a layer's error is measured with T / 4 levels, at which it stands out from rounding
SHARES = [k / 16 for k in range(1, 16)]  # windows tried, as a mean share of T
HALVINGS = 40  # of the range of a factor: float64 can hardly tell more apart
AT_A_TIME = 8  # images: the activations of 224x224 pixels then take some 100 MB


@torch.no_grad()
def with_windows(net, loader, device, options):
    """A copy of an ANN in which every op that will fire has as many activation levels as its window has steps.

    net: a SpikeDAGModule, ready to convert; activation levels that it has are replaced. options:
    `options.ConversionOptions`. The windows are the shortest with which the network keeps `KEPT` of the classes that it
    has with T levels; T in all layers if none are short enough.
    """
    net = copy.deepcopy(net).to(device).eval()
    for name in plan_conversion(net, options.ann_layers).firing:
        net.ops[name].op.levels = None
    search = Search(net, loader, device, options)
    search.set_levels(search.windows(), MOST_SAMPLES)
    return net


class Search:
    """Tries windows in a network. inputs: calibration images, a tuple of [B, ...]; timesteps: T."""

    def __init__(self, net, loader, device, options):
        self.net, self.timesteps, samples = net, options.timesteps, options.calibration_samples
        self.per_channel, self.threshold = options.spikes_per_channel, options.threshold
        plan = plan_conversion(net, options.ann_layers)
        self.pools, shapes = pool_activations(net, loader, device, samples, plan.firing, self.per_channel, True)
        self.mixed = mixed_channels(net, plan, shapes)
        self.names = [name for name in plan.firing if self.pools[name].largest.max() > 0]
        self.inputs = first_inputs(loader, device, min(samples, SEARCH_IMAGES))

    def windows(self):
        """Op name -> window, in steps."""
        full = dict.fromkeys(self.names, self.timesteps)
        if self.timesteps == 1 or not self.names:
            return full
        plain = self.classes({})
        most, errors = agreement(self.classes(full), plain), self.errors()
        kept = KEPT if self.outputs({}, 1).shape[1] < MANY_CLASSES else KEPT_OF_MANY
        low, high = 0, len(SHARES)  # the windows of share number `high` suffice; the last number stands for T
        while low < high:
            middle = (low + high) // 2
            suffices = agreement(self.classes(self.of_share(errors, middle)), plain) >= kept * most
            low, high = (low, middle) if suffices else (middle + 1, high)
        return full if high == len(SHARES) else self.of_share(errors, high)

    def of_share(self, errors, number):
        """The windows whose mean is about `SHARES[number]` * T.

        The error of a layer falls with the square of its levels. The least sum of errors at a given sum of steps then
        has windows in proportion to the cube root of the error.
        """
        roots = torch.tensor([errors[name] for name in self.names], dtype=torch.float64).clamp_min(1e-12) ** (1 / 3)
        low, high = 0.0, self.timesteps / roots.min().item()
        for _ in range(HALVINGS):
            factor = (low + high) / 2
            steps = (roots * factor).round().clamp(1, self.timesteps)
            low, high = (factor, high) if steps.mean() < SHARES[number] * self.timesteps else (low, factor)
        return dict(zip(self.names, steps.int().tolist()))

    def errors(self):
        """Op name -> the mean squared error of the outputs that coarse levels in this layer alone cause."""
        wanted, found, coarse = self.outputs({}, ERROR_IMAGES), {}, max(1, self.timesteps // COARSE)
        for name in tqdm(self.names, "windows", leave=False, delay=1):
            found[name] = (self.outputs({name: coarse}, ERROR_IMAGES) - wanted).square().mean().item()
        return found

    def classes(self, windows):
        """The index of the largest output for every image, [B]."""
        return self.outputs(windows, SEARCH_IMAGES).argmax(1)

    def outputs(self, windows, images):
        """The first output for the first `images` images as rows, [B, N]; an op without a window has no levels."""
        self.set_levels(windows, SEARCH_SAMPLES)
        parts = zip(*(x[:images].split(AT_A_TIME) for x in self.inputs))
        found = [self.net.forward_ann(part)[0].flatten(1) for part in parts]
        for name in windows:
            self.net.ops[name].op.levels = None
        return torch.cat(found)

    def set_levels(self, windows, samples):
        """Give each op as many levels as its window has steps, with lambdas chosen from `samples` of its activations.

        With threshold "max" and `MANY_LEVELS` or more, lambda is the largest activation, else that of least error.
        """
        for name, levels in windows.items():
            op = self.net.ops[name].op
            threshold = "max" if self.threshold == "max" and levels >= MANY_LEVELS else "mse"
            _, scale = lambdas_of(self.pools[name], threshold, levels, self.per_channel, samples)
            scale = scale.max() if self.net.ops[name].out in self.mixed else scale
            op.levels = ClipFloorShift(levels, scale.clamp_max(op.ceiling or float("inf")))


def agreement(classes, others):
    """The share of images for which two networks have the same class. classes, others: [B]."""
    return (classes == others).float().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# In the converted network


def windows_of(net, plan, timesteps):
    """Op name -> window, for every op with activation levels that fires: as many steps as levels, at most T."""
    levels = {name: net.ops[name].op.levels for name in plan.firing}
    return {name: min(each.levels, timesteps) for name, each in levels.items() if each is not None}


def stretch_scales(statistics, windows, timesteps):
    """Make the lambdas of windows those of T steps, in place: a spike in a window of F steps stands for lambda / F."""
    for name, window in windows.items():
        statistics[name].max_o *= timesteps / window
        statistics[name].scales = statistics[name].scales * (timesteps / window)


@torch.no_grad()
def listen_to_windows(snn, windows, inputs):
    """Set the windows of all neurons, and let every neuron listen until the windows before it are over, in place.

    Biases would go on flowing for T steps, so the initial potentials take over what they add in T steps. Layers that
    read the image listen for T steps. inputs: one image, [1, ...] each.
    """
    for name, neuron in snn.neurons().items():
        neuron.window = windows.get(name)
    stages = Stages(snn)
    lengths = last_steps(snn, stages, snn.timesteps)
    for name, neuron in snn.neurons().items():
        is_float = neuron.largest_current is None  # the image's current, which never ends
        heard = IMAGE if is_float else last_of([lengths[node] for node in snn.ops[name].inputs])
        neuron.listen = min(heard, snn.timesteps)
    start_with_biases(snn, stages, inputs)


def start_with_biases(snn, stages, inputs):
    """Add the biases of T steps to the initial potentials of all neurons with integer currents, and remove them."""
    counting = Counting(torch.float64)
    CountedPart(snn, stages, [x[:1] for x in inputs], snn.timesteps, counting).run(False)
    for neuron in snn.neurons().values():
        if neuron.largest_current is None:
            continue
        total = snn.timesteps * counting.at_rest[neuron][0]  # [C, ...]
        if total.dim() > 1 and (total == total.flatten(1)[:, :1].view(-1, *[1] * (total.dim() - 1))).all():
            total = total.flatten(1)[:, 0].view(-1, *[1] * (total.dim() - 1))  # [C, 1, 1]: the same at every place
        neuron.initial_potential = neuron.initial_potential + total.to(torch.int32)
    for entry in snn.ops.values():
        bias = getattr(entry.op, "bias_q", None)
        if bias is not None and not bias.is_floating_point():
            entry.op.bias_q = torch.zeros_like(bias)
    bound_currents(snn)
