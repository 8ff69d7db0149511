"""Measure where a conversion loses accuracy and what it costs, then write the report.

analysis = analyse(args, made, loaders, device)    # made: pipeline.Networks
write_report(folder, analysis)     # report.json, report.html, and every figure as PNG and SVG
"""

import json
from collections import Counter
from dataclasses import dataclass

import torch
from tqdm import tqdm

from conversion.correction import bias_beyond
from hw_constraints import HARDWARE, bitwidths_by_name, hardware_layers, hardware_table
from options import DEFAULT_CHIP, FLOAT_BITS
from pipeline import versions
from quantization import round_to_integers
from reports.alternatives import repair_layers, score_error, sweep, try_alternatives
from reports.energy import count_operations, energy_table, potential_bound, signed_bits
from reports.errors import PARTS, ErrorSums, decoded, initial_share, split_error
from reports.observe import activations_on_spikes, node_values, observe
from runtime.files import write_folder
from spike_simulator import cut, node_shapes

BATCH = 32  # images at a time, at most
MOST_PAIRS = 20_000  # pairs of activation and decoded rate per layer that a figure shows
RASTER_NEURONS = 24  # neurons in a spike raster
SWEPT_BITS = (2, 3, 4, 6, 8)  # weight bits of a sweep, besides those asked for
MOST_SWEPT_TIMESTEPS = 6  # numbers of timesteps in a sweep, besides the one asked for


@dataclass
class Analysis:
    """result: numbers and names, the content of report.json. samples: figure -> the tensors that it shows."""

    result: dict
    samples: dict


def analyse(args, made, loaders, device):
    """The Analysis of a conversion.

    made: its `pipeline.Networks`, with the SNN measured at every step. loaders: (test images, training images,
    calibration images).
    """
    net, qnet, snn = (each.to(device).eval() for each in (made.ann, made.qnet, made.snn))
    accuracies = [made.accuracies[kind] for kind in ("ann", "qnet", "snn")]
    images, targets = choose_images(loaders[0].dataset, args.analysis_images, args.seed, device)
    expected = scores(net, images)
    share = initial_share(args.initial_potential, args.reset_mode)
    looked = look_into_layers(net, qnet, snn, images, share, args.correction != "none")
    operations = count_operations(snn, node_shapes(qnet, images[:1]), looked.spikes, snn.timesteps)
    result = {
        **what_was_run(args),
        "samples": accuracies[2]["samples"],
        "analysis_images": len(images),
        "accuracy": accuracies_of(accuracies),
        "output_error": output_errors(qnet, snn, images, expected),
        "layers": layer_rows(snn, looked, accuracies[2]["firing_rate"]),
        "operations": {name: {"path": snn.ops[name].path, **each} for name, each in operations.items()},
        "energy": energy_table(operations),
        "duration": snn.duration(),
        **measure_changes(args, net, qnet, loaders[1:], device, images, targets, expected),
        "hardware": hardware_rows(net, args),
    }
    result["worst_layer"] = worst_layer(result, snn)
    result["verdict"] = verdict(result)
    neurons = watch_neurons(snn, images[:1], choose_layers(snn, result["worst_layer"]["name"]))
    samples = {
        "pairs": looked.pairs,
        "weights": weight_samples(net, snn if on_spikes(result) else qnet),
        "neurons": neurons,
    }
    return Analysis(result, samples)


def what_was_run(args):
    """The network, all flags, the versions and the seed of the run."""
    flags = {key: value for key, value in vars(args).items() if key != "debug"}
    return {"net": args.net_name, "flags": flags, "versions": versions(), "seed": args.seed}


def measure_changes(args, net, qnet, loaders, device, images, targets, expected):
    """The results of float weights in single layers, of other flags and, with --sweep, of other bits and timesteps."""
    train_loader, calibration_loader = loaders
    known = calibration_loader, device, images, targets
    repaired = repair_layers(args, qnet, *known, expected)
    tried = try_alternatives(args, net, qnet, *known, expected)
    swept = sweep(args, net, train_loader, *known, *swept_values(args)) if args.sweep else {}
    return {"repaired": repaired, "alternatives": tried, "sweep": swept}


def choose_images(dataset, most, seed, device):
    """At most `most` images [B, ...] of a data set and their labels [B].

    They are chosen at random, because the first images of a data set may all have the same class.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    images, targets = zip(*[dataset[i] for i in sorted(order[:most].tolist())])
    return torch.stack(images).to(device), torch.tensor([int(target) for target in targets], device=device)


@torch.no_grad()
def scores(net, images):
    """The class scores of images, [B, classes]."""
    return torch.cat([net(part) for part in images.split(BATCH)])


# ---------------------------------------------------------------------------------------------------------------------
# layers


class LookedInto:
    """Sums over images. errors: op name -> ErrorSums. pairs: op name -> (activations [N], decoded rates [N]).

    lowest, highest: op name -> extreme membrane potential. spikes: node -> mean spike counts over T steps, [...].
    """

    def __init__(self, names):
        self.errors = {name: ErrorSums() for name in names}
        self.pairs = {name: ([], []) for name in names}
        self.lowest, self.highest = dict.fromkeys(names, float("inf")), dict.fromkeys(names, float("-inf"))
        self.spikes = Counter()

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
            **looked.errors[name].summary(),
            "potential": [low, high],
            # the first layer has real-valued potentials, so its number of bits is up to the chip
            "bits_observed": None if bound is None else signed_bits(low, high),
            "bits_bound": None if bound is None else signed_bits(-bound, bound),
        }
    return rows


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


# ---------------------------------------------------------------------------------------------------------------------
# the whole network


def accuracies_of(accuracies):
    """The accuracies of the three networks, and that of the SNN after every timestep."""
    ann, quantized, spiking = accuracies
    names = {"ann": ann, "qnet": quantized, "snn": spiking}
    curve = dict(enumerate(spiking["top1_by_timestep"], start=1))
    return {name: {key: each[key] for key in ("top1", "loss")} for name, each in names.items()} | {"by_timestep": curve}


def output_errors(qnet, snn, images, expected):
    """The `score_error` caused by quantized weights, by the conversion to spikes, and by both together."""
    quantized, spiking = scores(qnet, images), scores(snn, images)
    pairs = {"weights": (quantized, expected), "spikes": (spiking, quantized), "both": (spiking, expected)}
    return {name: score_error(*pair, expected) for name, pair in pairs.items()}


def hardware_rows(net, args):
    """The table of `hw_constraints` as lists, its head first."""
    hardware = HARDWARE[args.hardware or DEFAULT_CHIP]
    rows = hardware_table(hardware_layers(net, args.ann_layers), bitwidths_by_name(net, args.weight_bitwidth), hardware)
    return {"name": hardware.name, "rows": [list(row) for row in rows]}


def swept_values(args):
    """`bits, timesteps` of a sweep: those asked for, SWEPT_BITS, and powers of two up to twice the timesteps."""
    bits, timesteps = args.weight_bitwidth, args.timesteps
    steps = [2**k for k in range(1, 18) if 2**k <= 2 * timesteps][-MOST_SWEPT_TIMESTEPS:]
    return sorted({*SWEPT_BITS, *([bits] if bits in range(1, 9) else [])}), sorted({*steps, timesteps})


def worst_layer(result, snn):
    """The layer that regains most with float weights; if no weights are rounded, the layer with the largest error."""
    repaired = dict(result["repaired"])
    before = repaired.pop("as asked for", None)
    if repaired:
        name = min(repaired, key=lambda each: repaired[each]["error"])
        return {"name": name, "path": snn.ops[name].path, "before": before, "after": repaired[name]}
    name = max(result["layers"], key=lambda each: result["layers"][each]["relative_squared_error"])
    return {"name": name, "path": snn.ops[name].path, "before": None, "after": None}


def verdict(result):
    """Three sentences: the main cause of the loss, the worst layer, and the flags that regain most."""
    sentences = [verdict_on_layer(result), verdict_on_flags(result)]
    before = "Before finetuning on spikes: " if on_spikes(result) else ""
    return [verdict_on_loss(result), *(before + sentence for sentence in sentences)]


def verdict_on_loss(result):
    """The sentence that compares the loss by the weights with the loss by the spikes."""
    top1 = {name: result["accuracy"][name]["top1"] for name in ("ann", "qnet", "snn")}
    error = result["output_error"]
    spikes = "the conversion with its finetuning" if on_spikes(result) else "the conversion"
    dominant = (
        "the weights cause more of the error" if error["weights"] >= error["spikes"] else f"{spikes} causes more of it"
    )
    if max(error["weights"], error["spikes"]) < 0.05:  # percent; prints as 0.0
        dominant = "neither changes the class scores"
    return (
        f"Top-1 is {top1['ann']:.2f} % for the float ANN, {top1['qnet']:.2f} % for the quantized ANN and "
        f"{top1['snn']:.2f} % for the spiking network ({top1['snn'] - top1['ann']:+.2f} points against the float ANN, "
        f"on {result['samples']} test images). The quantized, finetuned weights change the class scores by "
        f"{error['weights']:.1f} % of their standard deviation, {spikes} by {error['spikes']:.1f} %: {dominant}."
    )


def on_spikes(result):
    """Whether the network was finetuned on its own spikes; repaired and alternative conversions never are."""
    return bool(result["flags"].get("spike_epochs") or result["flags"].get("spike_epochs_unlabelled"))


def verdict_on_layer(result):
    """The sentence about the worst layer and the error that float weights in it remove."""
    worst = result["worst_layer"]
    where = f"{worst['name']} ({worst['path']})" if worst["path"] not in ("", worst["name"]) else worst["name"]
    if worst["after"] is None:
        error = 100 * result["layers"][worst["name"]]["relative_squared_error"] ** 0.5
        return f"The weights are not rounded. The neurons of {where} have the largest error, {error:.1f} %."
    before, after = worst["before"], worst["after"]
    if after["error"] >= before["error"]:
        return (
            f"No single layer is to blame: float weights in any one layer do not lower the error of "
            f"{before['error']:.1f} % (best: {where}, {after['error']:.1f} %)."
        )
    return (
        f"The worst layer is {where}: float weights in this layer alone lower the error of the class scores from "
        f"{before['error']:.1f} % to {after['error']:.1f} % (top-1 {before['top1']:.1f} % before, "
        f"{after['top1']:.1f} % after, on {result['analysis_images']} images)."
    )


def verdict_on_flags(result):
    """The sentence about the alternative that regains most, and the best one with the same weight bits."""
    tried = dict(result["alternatives"])
    before = tried.pop("as asked for")
    best = min(tried, key=lambda flags: tried[flags]["error"], default=None)
    if best is None or tried[best]["error"] >= before["error"]:
        return f"None of the {len(tried)} alternatives lowers the error of {before['error']:.1f} %."
    sentence = f"Of {len(tried)} alternatives, {regained(best, before, tried[best])}"
    same_bits = {flags: each for flags, each in tried.items() if not flags.startswith("--weight_bitwidth")}
    second = min(same_bits, key=lambda flags: same_bits[flags]["error"], default=best)
    if second != best and same_bits[second]["error"] < before["error"]:
        sentence += f"; with the same weight bits, {regained(second, before, same_bits[second])}"
    return sentence + "."


def regained(flags, before, after):
    """The gain and the price of an alternative, in words."""
    words = f"{flags} regains most: it lowers the error from {before['error']:.1f} % to {after['error']:.1f} %, "
    words += f"with top-1 {before['top1']:.1f} % before and {after['top1']:.1f} % after"
    if after["duration"] != before["duration"]:
        words += (
            f", and the answer takes {after['duration']['latency']} steps instead of {before['duration']['latency']}"
        )
    return words + (f" ({after['note']})" if after["note"] else "")


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_report(folder, analysis):
    """Write report.json, report.html and the figures as PNG and SVG into a folder, whose other files stay.

    Raises OSError if a file cannot be written.
    """
    from reports.figures import draw_figures, render
    from reports.html import report_page

    figures = draw_figures(analysis.result, analysis.samples)
    files, pictures = {}, {}
    for name, (figure, caption) in tqdm(figures.items(), "draw", leave=False, delay=1):
        png, svg = render(figure, "png"), render(figure, "svg")
        files[f"{name}.png"], files[f"{name}.svg"] = png, svg
        pictures[name] = png, caption
    page = report_page(analysis.result, pictures)
    files["report.html"] = page.encode(errors="backslashreplace")  # a file name in the flags may not be UTF-8
    files["report.json"] = (json.dumps(analysis.result, indent=2) + "\n").encode()
    write_folder(folder, files)


def summary_rows(result):
    """Rows of a short table: the error of every layer of neurons, in percent, and its largest part."""
    rows = [("spiking layer", "module path", "spikes per neuron and step", "error %", "largest part")]
    for name, layer in result["layers"].items():
        largest = max(PARTS, key=lambda part: layer["rms_of_parts"][part])
        error = 100 * layer["relative_squared_error"] ** 0.5
        in_words = PARTS[largest] if layer["rms_of_parts"][largest] else "-"
        rows.append((name, layer["path"], f"{layer['firing_rate']:.4f}", f"{error:.1f}", in_words))
    return rows
