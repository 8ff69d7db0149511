"""The neurons of a converted network on some images: errors, potentials, spikes, saturation, and a few of them closely.

looked = look_into_layers(net, qnet, snn, images, share)
rows = layer_rows(snn, looked, firing_rate, len(images))
"""

from collections import Counter

import torch
from tqdm import tqdm

from conversion.correction import bias_beyond
from options import FLOAT_BITS
from quantization import round_to_integers
from reports.energy import potential_bound, signed_bits
from reports.errors import ErrorSums, decoded, split_error
from reports.observe import activations_on_spikes, node_values, observe
from spike_simulator import cut

BATCH = 32  # images at a time, at most
MOST_PAIRS = 20_000  # pairs of activation and decoded rate per layer that a figure shows
RASTER_NEURONS = 24  # neurons in a spike raster
MOST_NAMED = 5  # saturated channels that a report names for each layer
WORTH_NAMING = 0.05  # share of a channel's neurons and images that are saturated


class LookedInto:
    """Sums over images. errors: op name -> ErrorSums. pairs: op name -> (activations [N], decoded rates [N]).

    lowest, highest: op name -> extreme membrane potential. spikes: node -> mean spike counts over T steps, [...].
    saturated: op name -> share of the images on which each neuron spikes at every step, [...].
    """

    def __init__(self, names):
        self.errors = {name: ErrorSums() for name in names}
        self.pairs = {name: ([], []) for name in names}
        self.lowest, self.highest = dict.fromkeys(names, float("inf")), dict.fromkeys(names, float("-inf"))
        self.spikes, self.saturated = Counter(), Counter()

    def note_potentials(self, name, potentials, spikes):
        """Update the extremes with one timestep of one layer (`on_step` of `observe`)."""
        self.lowest[name] = min(self.lowest[name], potentials.min().item())
        self.highest[name] = max(self.highest[name], potentials.max().item())


@torch.no_grad()
def look_into_layers(net, qnet, snn, images, share, is_corrected=True):
    """The LookedInto of every layer of neurons on images [B, ...].

    share: the initial potential before its correction, as a share of Vthr. is_corrected: whether the conversion moved
    current between the initial potentials and the biases.
    """
    looked = LookedInto(snn.neurons())
    moved = {name: bias_beyond(snn, qnet, name) * snn.timesteps if is_corrected else 0 for name in snn.neurons()}
    size = max(1, min(BATCH, cut(snn, (images,), snn.timesteps)[0]))
    for part in tqdm(images.split(size), "look into layers", leave=False, delay=1):
        seen = observe(snn, part, looked.note_potentials)
        activations, quantized = node_values(net, part), node_values(qnet, part)
        on_spikes = activations_on_spikes(qnet, seen, part, snn.timesteps)
        for name, neuron in snn.neurons().items():
            out = snn.ops[name].out
            known = activations[out], quantized[out], on_spikes[out], seen.currents[name], seen.counts[out]
            parts = split_error(*known, neuron, snn.timesteps, share, moved[name])
            looked.errors[name].add(parts, activations[out])
            add_pairs(looked.pairs[name], activations[out], decoded(seen.counts[out], neuron, snn.timesteps), images)
            full = seen.counts[out] >= neuron.most_spikes(snn.timesteps)
            looked.saturated[name] = looked.saturated[name] + full.double().sum(0) / len(images)
        for node, counts in seen.counts.items():
            looked.spikes[node] = looked.spikes[node] + counts.sum(0) / len(images)
    looked.pairs = {name: tuple(torch.cat(values) for values in pairs) for name, pairs in looked.pairs.items()}
    return looked


def add_pairs(pairs, activations, rates, images):
    """Append evenly spaced values of both to `pairs`, so that all images together give about MOST_PAIRS pairs."""
    stride = (
        max(1, activations[0].numel() * len(images) // MOST_PAIRS) | 1
    )  # odd, so that it visits every column of a map
    for store, values in zip(pairs, (activations, rates)):
        store.append(values.reshape(-1)[::stride].float().cpu())


def layer_rows(snn, looked, firing_rate):
    """Op name -> the report's values for a layer of neurons."""
    rows = {}
    for name, neuron in snn.neurons().items():
        bound = potential_bound(neuron, snn.timesteps)
        low, high = looked.lowest[name], looked.highest[name]
        rows[name] = {
            "path": snn.ops[name].path,
            "Vthr": [neuron.Vthr.min().item(), neuron.Vthr.max().item()],
            "lambda": [neuron.scale_factor.min().item(), neuron.scale_factor.max().item()],
            "firing_rate": firing_rate[name],
            **saturation(looked.saturated[name], looked.spikes[snn.ops[name].out]),
            **looked.errors[name].summary(),
            "potential": [low, high],
            # the first layer has real-valued potentials, so its number of bits is up to the chip
            "bits_observed": None if bound is None else signed_bits(low, high),
            "bits_bound": None if bound is None else signed_bits(-bound, bound),
        }
    return rows


def saturation(saturated, spikes):
    """The report's values about neurons that spike at every step, or never. Both arguments: of every neuron, [...].

    saturated: share of the images. spikes: mean count. "saturated" names channels (neurons of a linear layer), those
    first that are saturated most often, with their share of neurons and images.
    """
    by_channel = saturated.flatten(1).mean(1) if saturated.dim() > 1 else saturated
    kind = "channel" if saturated.dim() > 1 else "neuron"
    most = by_channel.argsort(descending=True, stable=True)[:MOST_NAMED].tolist()
    named = [(f"{kind} {index}", by_channel[index].item()) for index in most if by_channel[index] >= WORTH_NAMING]
    return {
        "saturated_share": saturated.double().mean().item(),
        "silent_share": (spikes == 0).double().mean().item(),
        "saturated": [{"name": name, "share": share} for name, share in named],
    }


def neuron_behind(snn, name):
    """The first layer of neurons that op `name` feeds, or None."""
    reached = {snn.ops[name].out}
    names = list(snn.ops)
    for each in names[names.index(name) :]:
        entry = snn.ops[each]
        if each == name or not reached.isdisjoint(entry.inputs):
            if entry.op.neuron is not None:
                return each
            reached.add(entry.out)
    return None


def choose_layers(snn, worst):
    """The first layer of neurons, that behind the worst layer, and the last one, each once."""
    names = list(snn.neurons())
    middle = neuron_behind(snn, worst) or names[len(names) // 2]
    return sorted({names[0], middle, names[-1]}, key=names.index)


@torch.no_grad()
def watch_neurons(snn, image, names):
    """Op name -> (potentials in Vthr, spikes) of n neurons on one image, both [steps, n]; NaN spikes while listening.

    The neurons are evenly spaced among the active ones, from the least to the most active.
    """
    counts = observe(snn, image).counts
    chosen = {name: spread(counts[snn.ops[name].out].flatten(), RASTER_NEURONS) for name in names}
    watched = {name: ([], []) for name in names}

    def on_step(name, potentials, spikes):
        if name in watched:
            potentials = (potentials / snn.ops[name].op.neuron.Vthr).flatten()
            spikes = torch.full_like(potentials, torch.nan) if spikes is None else spikes.flatten()
            for store, values in zip(watched[name], (potentials, spikes)):
                store.append(values[chosen[name]].cpu())

    observe(snn, image, on_step)
    return {name: tuple(torch.stack(values) for values in pair) for name, pair in watched.items()}


def spread(counts, most):
    """Indices of at most `most` neurons, evenly spaced among the active neurons sorted by their spike counts."""
    order = counts.argsort(stable=True)
    active = order[counts[order] > 0]
    active = active if len(active) else order
    return active[torch.linspace(0, len(active) - 1, min(most, len(active)), device=active.device).long()]


def weight_samples(net, qnet):
    """Op name -> (float, integer weights), each [N] in integer steps; at 32 bits, before and after finetuning."""
    samples = {}
    for name, layer in qnet.weighted_layers().items():
        before, after = net.ops[name].op.weight.detach(), layer.weight.detach()
        bits = layer.weight_bits
        scale = torch.ones(()) if bits == FLOAT_BITS or layer.weight_scale is None else layer.weight_scale.cpu()
        before, after = before.cpu(), round_to_integers(after.cpu(), scale, bits)
        samples[name] = (before * scale).flatten(), after.flatten()
    return samples
