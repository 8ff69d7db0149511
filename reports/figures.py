"""The figures of a report: each function turns plain results into a matplotlib Figure, without opening a window.

The colours are seaborn's palette for colour-blind readers; markers, line styles and hatches differ in print without
colour.
"""

import io

import matplotlib

matplotlib.use("Agg")

import numpy as np
import seaborn as sns
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from reports.errors import PARTS

COLOURS = sns.color_palette("colorblind")
HATCHES = ("", "///", "...", "xxx", "---", "ooo", "\\\\\\")
MOST_PANELS = 12  # four rows of three: about one screen of a figure
PNG_DPI = 110  # 880 pixels for 8 inches, as wide as the text of the page
RENDERING = {"font.size": 10, "svg.hashsalt": "report", "hatch.linewidth": 0.6}  # the salt fixes the ids in SVG files
BINS = 60  # edges of a histogram: bins of about 5 pixels in a panel as wide as a third of the page
FINE_BINS = 64  # integers up to this size get two bins each (at most 257 edges), larger ones share 128 bins


def draw_figures(result, samples):
    """Name -> (Figure, caption), in the order of the report. result, samples: the fields of an `analysis.Analysis`."""
    worst = result["worst_layer"]["name"]
    with matplotlib.rc_context(RENDERING):
        figures = {
            "accuracy": (draw_accuracy(result["accuracy"]), CAPTIONS["accuracy"]),
            "alternatives": (draw_alternatives(result["alternatives"]), CAPTIONS["alternatives"]),
            "error_parts": (draw_error_parts(result["layers"]), CAPTIONS["error_parts"]),
            "firing_rate": (draw_firing_rates(result["layers"]), CAPTIONS["firing_rate"]),
            "density": (draw_densities(samples["pairs"], result["layers"]), CAPTIONS["density"]),
            "weights": (draw_weights(samples["weights"], worst), CAPTIONS["weights"]),
            "neurons": (draw_neurons(samples["neurons"], result["layers"]), CAPTIONS["neurons"]),
            "operations": (draw_operations(result["operations"]), CAPTIONS["operations"]),
        }
        if result["repaired"]:
            figures["repaired_layers"] = draw_repairs(result["repaired"], result["operations"]), CAPTIONS["repaired"]
        if result["sweep"]:
            figures["sweep"] = draw_sweep(result["sweep"], result["analysis_images"]), CAPTIONS["sweep"]
    return figures


CAPTIONS = {
    "accuracy": "Top-1 accuracy after every timestep, from one simulation. The right panel enlarges the last steps.",
    "alternatives": "Conversions with other flags: RMS error of the class scores against the float ANN, in percent of "
    "their standard deviation over the images, and top-1 accuracy.",
    "error_parts": "Mean squared error of every layer of neurons against the float ANN, relative to its mean squared "
    "activation. The diamond is the sum of the parts. A part to the left of zero cancels others.",
    "firing_rate": "Spikes per neuron and timestep. Fewer spikes cost less energy; more spikes represent activations "
    "more finely.",
    "density": "Decoded spikes of T steps against the activation of the float ANN. On the dotted line both agree. The "
    "dashed line is one spike at every step; spikes cannot represent larger activations.",
    "weights": "Integer weights (bars) and the float weights before rounding (line), in integer steps.",
    "neurons": "Membrane potential of two neurons before each reset, and the spikes of up to 24 neurons, for one "
    "test image.",
    "operations": "Operations per image: multiply-accumulates of the ANN, accumulates of the spiking network.",
    "repaired": "Error of the class scores with float weights in one layer only. A point further left of the line "
    "means that rounding this layer costs more.",
    "sweep": "Top-1 accuracy by weight bits and timesteps. Each bit width is finetuned, each cell converted.",
}


def render(figure, file_format):
    """A figure as the bytes of a PNG or SVG file; the same figure always gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if file_format == "svg" else {"Software": None}
    with matplotlib.rc_context(RENDERING):
        if figure.get_layout_engine() is not None:  # lay out once, not for every format
            figure.get_layout_engine().execute(figure)
            figure.set_layout_engine("none")
        figure.savefig(buffer, format=file_format, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()


def new_figure(width, height, rows=1, columns=1, **options):
    """A Figure of `width` x `height` inches and its axes [rows, columns], with light grids and no frames."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


def label(name, path):
    """The name of a layer in figures: op name and module path."""
    text = f"{name} ({path})" if path and path != name else name
    return text.replace("$", r"\$")  # matplotlib would read $...$ as mathematics


def rows_height(count):
    """The height, in inches, of a figure with `count` horizontal bars."""
    return 1.5 + 0.32 * count  # axis and title, and two lines of text per bar


# ---------------------------------------------------------------------------------------------------------------------
# the whole network


def draw_accuracy(accuracy):
    """Accuracy over timesteps. accuracy: result of `analysis.accuracies_of`."""
    steps, top1 = zip(*[(int(t), value) for t, value in accuracy["by_timestep"].items()])
    figure, axes = new_figure(8, 3.8, columns=2, width_ratios=[3, 2])
    for axis in axes[0]:
        axis.axhline(accuracy["ann"]["top1"], color=COLOURS[0], linestyle="-", label="float ANN")
        axis.axhline(accuracy["qnet"]["top1"], color=COLOURS[1], linestyle="--", label="quantized ANN")
        axis.plot(steps, top1, color=COLOURS[2], linestyle="-.", marker="o", markersize=4, label="SNN")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("timesteps (log2)")
    axes[0, 0].set_ylabel("top-1 accuracy (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    zoom_in(axes[0, 1], steps, top1, [accuracy["ann"]["top1"], accuracy["qnet"]["top1"]])
    return figure


def zoom_in(axis, steps, top1, levels):
    """Show only the second half of the steps, and the range of the accuracies there."""
    first = max(1, steps[-1] // 2)
    values = [value for t, value in zip(steps, top1) if t >= first] + levels
    margin = max(0.5, 0.15 * (max(values) - min(values)))
    axis.set_ylim(min(values) - margin, max(values) + margin)
    axis.set_xlim(first * 0.95, max(steps[-1] * 1.05, first + 1))
    axis.xaxis.set_minor_formatter(lambda value, position: "")
    axis.set_xticks(sorted({first, round((first * steps[-1]) ** 0.5), steps[-1]}))
    axis.set_title("last steps", fontsize=10)


def draw_alternatives(tried):
    """The error of every alternative conversion, with its top-1 and latency written beside it."""
    figure, axes = new_figure(8, rows_height(len(tried)))
    axis, names = axes[0, 0], list(tried)[::-1]
    draw_lollipops(axis, names, [tried[name]["error"] for name in names], tried["as asked for"]["error"])
    axis.set_xlabel("error of the class scores (% of their standard deviation)")
    for y, each in enumerate(tried[name] for name in names):
        words = f"{each['error']:.1f} %, top-1 {each['top1']:.1f} %, {each['duration']['latency']} steps"
        write_beside(axis, max(each["error"], tried["as asked for"]["error"]), y, words)
    axis.set_xlim(0, 1.7 * max(each["error"] for each in tried.values()) + 0.1)
    return figure


def draw_repairs(repaired, operations):
    """The error with float weights in one layer only, for each layer."""
    figure, axes = new_figure(8, rows_height(len(repaired)))
    axis = axes[0, 0]
    names = [name for name in repaired if name != "as asked for"][::-1]
    before = repaired["as asked for"]["error"]
    labels = [label(name, operations[name]["path"]) for name in names]
    errors = [repaired[name]["error"] for name in names]
    draw_lollipops(axis, labels, errors, before)
    axis.set_xlabel("error of the class scores (% of their standard deviation)")
    spread = max([abs(error - before) for error in errors] + [0.02 * before, 0.01])
    axis.set_xlim(min(*errors, before) - 0.15 * spread, max(*errors, before) + 0.5 * spread)
    for y, error in enumerate(errors):
        write_beside(axis, max(error, before), y, f"{error:.2f} %")
    return figure


def write_beside(axis, x, y, words):
    """Write words to the right of a point."""
    axis.annotate(words, (x, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)


def draw_lollipops(axis, labels, values, reference):
    """A line from the reference to each value; markers below the reference are filled, markers above it are open."""
    for y, value in enumerate(values):
        better = value < reference
        axis.plot([reference, value], [y, y], color="0.6", linewidth=2, zorder=1)
        face = COLOURS[2] if better else "white"
        axis.plot(value, y, marker="o" if better else "s", color=COLOURS[2 if better else 3], markerfacecolor=face)
    axis.axvline(reference, color="0.2", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(-0.7, len(labels) - 0.3)


def draw_sweep(swept, images):
    """Accuracy by weight bits and timesteps as a heat map."""
    bits, steps = list(swept), list(next(iter(swept.values())))
    values = np.array([[swept[b][t] for t in steps] for b in bits], dtype=float)  # None (not converted) becomes NaN
    figure, axes = new_figure(1.8 + 0.9 * len(steps), 1.5 + 0.5 * len(bits))
    axis = axes[0, 0]
    axis.grid(False)
    bar = {"label": f"top-1 accuracy (%), {images} images"}
    sns.heatmap(
        values, annot=True, fmt=".1f", cmap="cividis", ax=axis, xticklabels=steps, yticklabels=bits, cbar_kws=bar
    )
    axis.set(xlabel="timesteps", ylabel="weight bits")
    axis.tick_params(axis="y", rotation=0)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# layers


def draw_error_parts(layers):
    """The parts of every layer's squared error, stacked: positive ones to the right, negative ones to the left."""
    figure, axes = new_figure(8, rows_height(len(layers)) + 0.8)
    axis, names = axes[0, 0], list(layers)[::-1]
    right, left = np.zeros(len(names)), np.zeros(len(names))
    for (part, title), colour, hatch in zip(PARTS.items(), COLOURS, HATCHES):
        values = 100 * np.array([layers[name]["parts_of_squared_error"][part] for name in names])
        starts = np.where(values >= 0, right, left)
        axis.barh(range(len(names)), values, left=starts, color=colour, hatch=hatch, edgecolor="white", label=title)
        right, left = right + values.clip(min=0), left + values.clip(max=0)
    totals = [100 * layers[name]["relative_squared_error"] for name in names]
    axis.plot(totals, range(len(names)), "D", color="black", markersize=5, linestyle="", label="total")
    axis.axvline(0, color="0.2", linewidth=1)
    axis.set_yticks(range(len(names)), [label(name, layers[name]["path"]) for name in names])
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.set_xlabel("squared error (% of the mean squared activation)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def draw_firing_rates(layers):
    """Spikes per neuron and step of every layer."""
    figure, axes = new_figure(8, rows_height(len(layers)))
    axis, names = axes[0, 0], list(layers)[::-1]
    rates = [layers[name]["firing_rate"] for name in names]
    bars = axis.barh(range(len(names)), rates, color=COLOURS[0])
    axis.bar_label(bars, [f"{rate:.3f}" for rate in rates], padding=3, fontsize=9)
    axis.set_yticks(range(len(names)), [label(name, layers[name]["path"]) for name in names])
    axis.set_xlabel("firing rate (spikes per neuron and timestep)")
    axis.margins(x=0.12)
    axis.set_ylim(-0.7, len(names) - 0.3)
    return figure


def chosen(names, important=None):
    """At most MOST_PANELS names: evenly spaced ones, and the important one."""
    names = list(names)
    if len(names) <= MOST_PANELS:
        return names
    picked = {names[i] for i in np.linspace(0, len(names) - 1, MOST_PANELS - 1).round().astype(int)}
    return [name for name in names if name in picked or name == important]


def panels(count, height, **options):
    """A figure with `count` panels, three in a row, each `height` inches high; unused axes are hidden."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = new_figure(8, 0.6 + height * rows, rows, columns, **options)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes.flat[:count]


def draw_densities(pairs, layers):
    """Density of decoded spikes against activations, for at most MOST_PANELS layers."""
    worst = max(layers, key=lambda name: layers[name]["relative_squared_error"])
    names = chosen(pairs, worst)
    figure, axes = panels(len(names), 2.5)
    norm = LogNorm(1, max(2, len(pairs[worst][0])))
    for axis, name in zip(axes, names):
        activations, rates = (values.numpy() for values in pairs[name])
        top = max(activations.max(), rates.max(), 1e-6)
        edges = np.linspace(min(0, activations.min()), top, BINS)
        shown = axis.hist2d(activations, rates, bins=[edges, edges], norm=norm, cmap="viridis_r", rasterized=True)
        axis.plot([0, top], [0, top], color="black", linestyle=":", linewidth=1)
        axis.axhline(layers[name]["lambda"][1], color=COLOURS[3], linestyle="--", linewidth=1)
        axis.set_title(label(name, layers[name]["path"]), fontsize=9)
    figure.colorbar(shown[3], ax=list(axes), label="neurons", aspect=40)
    figure.supxlabel("activation of the float ANN (its own units)", fontsize=10)
    figure.supylabel("decoded spikes (the same units)", fontsize=10)
    return figure


def draw_weights(weights, worst):
    """Histograms of integer and float weights, for at most MOST_PANELS layers."""
    names = chosen(weights, worst)
    figure, axes = panels(len(names), 2.2)
    for axis, name in zip(axes, names):
        floats, integers = (values.numpy() for values in weights[name])
        draw_weight_histogram(axis, floats, integers)
        axis.set_title(label(name, "") + (" (worst)" if name == worst else ""), fontsize=9)
    axes[0].legend(fontsize=8)
    figure.supxlabel("weight (integer steps)", fontsize=10)
    figure.supylabel("share of the weights in a step (%)", fontsize=10)
    return figure


def draw_weight_histogram(axis, floats, integers):
    """Shares per integer step: bars for the integers, a line for the floats with two bins per step."""
    if np.array_equal(integers, integers.round()):
        values, counts = np.unique(integers, return_counts=True)
        axis.bar(values, 100 * counts / len(integers), width=0.8, color=COLOURS[0], label="integer")
        reach = np.ceil(max(np.abs(floats).max(), np.abs(integers).max()) + 0.5)
        edges = np.linspace(-reach, reach, int(4 * reach) + 1 if reach < FINE_BINS else 2 * FINE_BINS + 1)
    else:  # 32 bits: float weights before and after finetuning
        reach = max(np.abs(floats).max(), np.abs(integers).max())
        edges = np.linspace(-reach, reach, BINS)
        axis.hist(integers, edges, weights=np.full(len(integers), 100 / len(integers)), color=COLOURS[0], label="after")
    step = edges[1] - edges[0] if reach >= 1 and np.array_equal(integers, integers.round()) else 1
    shares, _ = np.histogram(floats, edges)
    axis.stairs(100 * shares / len(floats) / step, edges, color=COLOURS[3], linewidth=1.2, label="float")


def draw_neurons(neurons, layers):
    """Membrane potentials of two neurons and a spike raster of all recorded ones, one row per layer."""
    figure, axes = new_figure(8, 0.5 + 2.3 * len(neurons), len(neurons), 2, sharex="row", width_ratios=[3, 2])
    for (left, right), (name, (potentials, spikes)) in zip(axes, neurons.items()):
        steps = np.arange(1, len(potentials) + 1)
        draw_potentials(left, steps, potentials.numpy(), spikes.numpy())
        fired, which = np.nonzero(np.nan_to_num(spikes.numpy()))
        right.plot(fired + 1, which + 1, "|", color="black", markersize=5)
        right.set_ylim(0, spikes.shape[1] + 1)
        right.set_ylabel("neuron")
        left.set_ylabel("potential (Vthr)")
        left.set_title(label(name, layers[name]["path"]), fontsize=9, loc="left")
        right.set_xlim(0, len(steps) + 1)
    for axis in axes[-1]:
        axis.set_xlabel("timestep")
    labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)  # beside the curves
    return figure


def draw_potentials(axis, steps, potentials, spikes):
    """Membrane potentials before each reset, with marks at spikes, of a moderately and of the most active neuron."""
    last = potentials.shape[1] - 1
    styles = {last // 2: ("-", "o", COLOURS[0], "middle"), last: ("--", "s", COLOURS[1], "most active")}
    for neuron, (line, marker, colour, title) in styles.items():
        fired = np.nan_to_num(spikes[:, neuron]) > 0
        axis.plot(steps, potentials[:, neuron], line, color=colour, linewidth=1.2, label=title)
        axis.plot(steps[fired], potentials[fired, neuron], marker, color=colour, markersize=4)
    axis.axhline(1, color="0.2", linestyle=":", linewidth=1.2, label="threshold")


# ---------------------------------------------------------------------------------------------------------------------
# energy


def draw_operations(operations):
    """Operations per image of every layer, ANN and SNN, on a logarithmic axis."""
    busy = {name: each for name, each in operations.items() if totals(each)[0] or totals(each)[1]}
    figure, axes = new_figure(8, rows_height(len(busy)) + 0.5)
    axis, names = axes[0, 0], list(busy)[::-1]
    ann, snn = zip(*[totals(busy[name]) for name in names])
    y = np.arange(len(names))
    axis.barh(y + 0.2, ann, 0.38, color=COLOURS[0], label="ANN: multiply-accumulates, adds")
    axis.barh(y - 0.2, snn, 0.38, color=COLOURS[1], hatch="///", edgecolor="white", label="SNN: accumulates (MACs too)")
    axis.set_xscale("log")
    axis.set_xlim(left=10 ** np.floor(np.log10(max(1, min(filter(None, ann + snn))))))
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.set_yticks(y, [label(name, busy[name]["path"]) for name in names])
    axis.set_xlabel("operations per image")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def totals(operations):
    """`ann, snn`: the sum of a layer's operations in the ANN and in the SNN."""
    return operations["ann_mac"] + operations["ann_ac"], operations["snn_mac"] + operations["snn_ac"]
