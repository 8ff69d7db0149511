"""Measure where a conversion loses accuracy and what it costs, then write the report.

analysis = analyse(args, made, loaders, device)    # made: pipeline.Networks, measured with answers
write_report(folder, analysis)     # report.html, report.json, and every figure as PNG
"""

import json
import sys
from dataclasses import dataclass, field

from tqdm import tqdm

from hw_constraints import HARDWARE, bitwidths_by_name, hardware_layers, hardware_table, violations
from options import DEFAULT_CHIP, FLOAT_BITS
from pipeline import versions
from reports.accuracy import accuracy_facts, class_facts, share
from reports.alternatives import (
    CONTROL,
    alternatives,
    calibration_images,
    class_scores,
    layers_worth_repairing,
    repair_layers,
    score_error,
    sweep,
    trains_on_spikes,
    try_alternatives,
)
from reports.claims import choose, flags_in_words, layer_in_words, loss_in_words, recommended
from reports.command import command_of, command_with
from reports.compare import compare_runs, read_runs, runs_in_words
from reports.energy import count_operations, energy_table
from reports.errors import PARTS, initial_share
from reports.layers import choose_layers, layer_rows, look_into_layers, watch_neurons, weight_samples
from reports.samples import reported_sample, validation_sample
from reports.timing import Clock, estimate
from runtime.files import write_folder
from script_options import EXPORTS
from spike_simulator import node_shapes

SWEPT_BITS = (2, 3, 4, 6, 8)  # weight bits of a sweep, besides those asked for
MOST_SWEPT_TIMESTEPS = 6  # numbers of timesteps in a sweep, besides the one asked for
# flags of files, which change nothing in a report
FILES = ("report", "results", "save_file", "out", "debug", "resume", "log", *(each.flag for each in EXPORTS))
NEXT_FOLDER = "next_report"
MORE_IMAGES = 4  # times the images: differences half as large become visible


@dataclass
class Analysis:
    """result: numbers and names, the content of report.json. samples: figure -> the tensors that it shows.

    clock: measures the stages of the report; `write_report` adds its own.
    """

    result: dict
    samples: dict
    clock: Clock = field(default_factory=Clock)


def analyse(args, made, loaders, device):
    """The Analysis of a conversion.

    made: its `pipeline.Networks`, measured with `keep_answers`, the SNN at every step. loaders: (test, validation,
    training, calibration images) as `datasets.get_dataset` returns them.
    """
    clock = Clock()
    net, qnet, snn = (each.to(device).eval() for each in (made.ann, made.qnet, made.snn))
    runs = read_runs(args.compare)
    reported, chosen_on = choose_samples(args, net, loaders, device)
    expected_seconds = tell_estimate(args, made, net, qnet)
    looked, layers = look(args, made, reported, device)
    clock.lap("layers")
    operations = count_operations(snn, node_shapes(qnet, reported.images[:1]), looked.spikes, snn.timesteps)
    accuracy = accuracy_facts(made.accuracies)
    result = {
        **what_was_run(args),
        "samples": made.accuracies["snn"]["samples"],
        "analysis_images": len(reported),
        "validation": chosen_on.facts(),
        "calibration_images": calibration_images(args),
        "ann_of_analysis": share((reported.expected.argmax(1) == reported.targets).cpu().numpy()),
        "accuracy": accuracy,
        "classes": class_facts(made.accuracies, getattr(loaders[0].dataset, "classes", None)),
        "output_error": output_errors(qnet, snn, reported),
        "layers": layers,
        "operations": {name: {"path": snn.ops[name].path, **each} for name, each in operations.items()},
        "energy": energy_table(operations),
        "duration": snn.duration(),
        **measure_changes(args, net, qnet, loaders, device, chosen_on, reported, clock),
        "hardware": hardware_rows(net, args),
    }
    synops = sum(each["synops"] for each in operations.values())
    result["compare"] = compare_runs(runs, accuracy, f"this run, T={args.timesteps}", args.timesteps, synops)
    conclude(args, net, result)
    result["seconds"] = clock.summary(made.seconds, expected_seconds)
    neurons = watch_neurons(snn, reported.images[:1], choose_layers(snn, result["shown_layer"]))
    weights = weight_samples(net, snn if trains_on_spikes(args) else qnet)
    return Analysis(result, {"pairs": looked.pairs, "weights": weights, "neurons": neurons}, clock)


def choose_samples(args, net, loaders, device):
    """`reported, chosen_on`: the Samples of test and of validation images, with the float network's class scores."""
    reported = reported_sample(loaders, args.analysis_images, args.seed, device)
    chosen_on = validation_sample(loaders, args.analysis_images, args, device)
    for sample in (reported, chosen_on):
        sample.expected = class_scores(net, sample.images)
    return reported, chosen_on


def tell_estimate(args, made, net, qnet):
    """Print on stderr about how long the report takes, and return the seconds."""
    layers = len(qnet.weighted_layers()) if args.weight_bitwidth != FLOAT_BITS else 0
    repaired, tried = min(layers, 4) + 1, len(alternatives(args, net, qnet))
    samples = made.accuracies["snn"]["samples"]
    seconds = estimate(args, made.seconds, samples, repaired, tried, calibration_images(args))
    more = ", and the training of the presets" if args.try_presets else ""
    print(f"report: about {seconds:.0f} s{more}, for {repaired + tried} conversions and the figures", file=sys.stderr)
    return seconds


def look(args, made, reported, device):
    """`looked, rows`: the LookedInto of all neurons on the reported images, and the report's values of every layer."""
    share = initial_share(args.initial_potential, args.reset_mode)
    networks, is_corrected = (made.ann, made.qnet, made.snn), args.correction != "none"
    looked = look_into_layers(*networks, reported.images, share, is_corrected)
    return looked, layer_rows(made.snn, looked, made.accuracies["snn"]["firing_rate"])


def what_was_run(args):
    """The network, all flags, the versions and the seed of the run."""
    flags = {key: value for key, value in vars(args).items() if key not in FILES}
    return {"net": args.net_name, "flags": flags, "versions": versions(), "seed": args.seed}


def measure_changes(args, net, qnet, loaders, device, chosen_on, reported, clock):
    """The results of float weights in single layers, of other flags and, with --sweep, of other bits and timesteps."""
    _, _, train_loader, calibration_loader = loaders
    known = calibration_loader, device, chosen_on.images, chosen_on.targets
    names = layers_worth_repairing(args, net, qnet, calibration_loader, device)
    repaired = repair_layers(args, qnet, *known, chosen_on.expected, names)
    clock.lap("repaired layers")
    training = train_loader if args.try_presets else None
    tried = try_alternatives(args, net, qnet, *known, chosen_on.expected, reported, training)
    note_what_fits(args, net, tried)
    clock.lap("alternatives")
    swept = sweep(args, net, train_loader, *known, *swept_values(args)) if args.sweep else {}
    clock.lap("sweep")
    return {"repaired": repaired, "alternatives": tried, "sweep": swept}


def note_what_fits(args, net, tried):
    """Set "fits" of every alternative: whether its weights meet the limits of the chip."""
    hardware, layers = HARDWARE[args.hardware or DEFAULT_CHIP], hardware_layers(net, args.ann_layers)
    for each in tried.values():
        each["fits"] = not violations(layers, bitwidths_by_name(net, each["bits"]), hardware)


def output_errors(qnet, snn, sample):
    """The `score_error` caused by quantized weights, by the conversion to spikes, and by both together."""
    expected, quantized, spiking = (
        sample.expected,
        *(class_scores(each, sample.images) for each in (qnet, snn)),
    )
    pairs = {"weights": (quantized, expected), "spikes": (spiking, quantized), "both": (spiking, expected)}
    return {name: score_error(*pair, expected) for name, pair in pairs.items()}


def hardware_rows(net, args):
    """The table of `hw_constraints` as lists, its head first, and the names of the layers over the limits."""
    hardware = HARDWARE[args.hardware or DEFAULT_CHIP]
    layers, bits = hardware_layers(net, args.ann_layers), bitwidths_by_name(net, args.weight_bitwidth)
    rows = [list(row) for row in hardware_table(layers, bits, hardware)]
    over = [layer.where for layer, _ in violations(layers, bits, hardware)]
    return {"name": hardware.name, "is_asked_for": args.hardware is not None, "rows": rows, "over": over}


def swept_values(args):
    """`bits, timesteps` of a sweep: those asked for, SWEPT_BITS, and powers of two up to twice the timesteps."""
    bits, timesteps = args.weight_bitwidth, args.timesteps
    steps = [2**k for k in range(1, 18) if 2**k <= 2 * timesteps][-MOST_SWEPT_TIMESTEPS:]
    return sorted({*SWEPT_BITS, *([bits] if bits in range(1, 9) else [])}), sorted({*steps, timesteps})


# ---------------------------------------------------------------------------------------------------------------------
# conclusions


def conclude(args, net, result):
    """Add what the numbers say: "claims", "verdict", "shown_layer", "worst_layer" and "next"."""
    layer = choose(result["repaired"]) if result["repaired"] else None
    flags = choose(result["alternatives"])
    name = recommended(result["alternatives"], flags, must_fit=args.hardware is not None)
    result["claims"] = {"layer": layer and layer.to_dict(), "flags": flags.to_dict(), "recommended": name}
    result["shown_layer"] = shown_layer(result)
    result["worst_layer"] = layer.names[0] if layer is not None and layer.kind == "one" else None
    result["verdict"] = verdict(result, layer, flags, name, len(net.weighted_layers()))
    result["next"] = next_command(args, result["alternatives"], name, result["samples"])


def shown_layer(result):
    """The layer that figures show closely: that of least error with float weights, or else that of largest error."""
    repaired = {name: each["error"] for name, each in result["repaired"].items() if name != CONTROL}
    if repaired:
        return min(repaired, key=repaired.get)
    return max(result["layers"], key=lambda each: result["layers"][each]["relative_squared_error"])


def verdict(result, layer, flags, name, layers):
    """The sentences about the loss, the layers and the flags. layer, flags: `claims.Choice`s, layer None at 32 bits."""
    words = result["validation"]["words"]
    before = "Before finetuning on spikes: " if finetuned_on_spikes(result) else ""
    paths = {op: each["path"] for op, each in result["operations"].items()}
    of_layer = "The weights are not rounded, so no layer loses by it."
    if layer is not None:
        of_layer = before + layer_in_words(layer, result["repaired"], paths, words, layers)
    sentences = loss_in_words(result["accuracy"], result["flags"]["timesteps"])
    sentences += [of_layer, before + flags_in_words(flags, result["alternatives"], words, name)]
    return sentences + ([runs_in_words(result["compare"])] if len(result["compare"]) > 1 else [])


def finetuned_on_spikes(result):
    """Whether the network was finetuned on its own spikes; repaired and alternative conversions never are."""
    return bool(result["flags"].get("spike_epochs") or result["flags"].get("spike_epochs_unlabelled"))


def next_command(args, tried, name, samples):
    """The command to try next and why. name: the recommended flags, or None. samples: all test images."""
    if name is not None:
        test = tried[name]["test"]
        control, loses_fit = tried[CONTROL]["test"], tried[CONTROL]["fits"] and not tried[name]["fits"]
        fits = ", but it exceeds the limits of the chip" if loses_fit else ""
        reason = (
            f"{name} is significantly better on validation images, and has {test['top1']:.1f} % of {test['images']} "
            f"test images right ({control['top1']:.1f} % as asked for){fits}"
        )
        return {"command": command_with(args, name, NEXT_FOLDER), "reason": reason}
    if not args.try_presets:
        command = command_of(args, NEXT_FOLDER, try_presets=True)
        return {"command": command, "reason": "no flag tried so far is significantly better; this tries the presets"}
    images = min(MORE_IMAGES * args.analysis_images, samples // 2)  # half reports, and half may have to choose
    if images > args.analysis_images:
        command = command_of(args, NEXT_FOLDER, analysis_images=images)
        reason = "nothing tried is significantly better; more images show smaller differences"
        return {"command": command, "reason": reason}
    command = command_of(args, NEXT_FOLDER, seed=args.seed + 1)
    reason = "nothing tried is significantly better on as many images as there are; another seed shows what chance does"
    return {"command": command, "reason": reason}


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_report(folder, analysis):
    """Write report.html, report.json and the figures as PNG into a folder, whose other files stay.

    Raises OSError if a file cannot be written.
    """
    from reports.figures import draw_charts, render_png, render_svgs
    from reports.html import report_page

    result, clock = analysis.result, analysis.clock
    clock.lap("neurons")
    files, pictures = {}, {}
    for name, chart in tqdm(draw_charts(result, analysis.samples).items(), "draw", leave=False, delay=1):
        files[f"{name}.png"] = render_png(chart)
        pictures[name] = render_svgs(name, chart), chart
    clock.lap("figures")
    result["seconds"] = clock.summary(result["seconds"]["conversion"], result["seconds"]["estimate"])
    page = report_page(result, pictures)
    files["report.html"] = page.encode(errors="backslashreplace")  # a file name in the flags may not be UTF-8
    files["report.json"] = (json.dumps(result, indent=1) + "\n").encode()
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
