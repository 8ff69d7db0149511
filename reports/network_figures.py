"""The charts of the whole network: accuracy over timesteps and over operations, classes, other flags, operations."""

from functools import partial

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import EngFormatter, LogLocator

from reports.alternatives import CONTROL
from reports.claims import differences
from reports.drawing import COLOURS, INK, PAPER, SOFT, WIDTH, Chart, Panel, bars_height, label, plain_text, readable_on

MOST_CLASSES = 20  # more do not fit a panel; those that change most are shown
MOST_CELLS = 12  # classes up to which a confusion matrix has numbers


def accuracy_chart(accuracy):
    """Accuracy over timesteps with its 95 % band. accuracy: `accuracy.accuracy_facts`."""
    images, T = accuracy["snn"]["images"], len(accuracy["by_timestep"])
    caption = (
        f"Top-1 accuracy after every timestep of one simulation of {images} test images; the shaded bands are 95 % "
        "intervals of each accuracy. The same images give all curves, so their differences are known better than the "
        "bands suggest. The right panel enlarges the last steps."
    )
    whole = Panel(lambda axis: draw_accuracy(axis, accuracy), title="all timesteps", legend=3)
    last = Panel(lambda axis: (draw_accuracy(axis, accuracy), zoom_in(axis, accuracy)), title="last timesteps")
    return Chart(f"Accuracy after each timestep, up to T = {T}", caption, [whole, last] if T > 2 else [whole])


def draw_accuracy(axis, accuracy):
    """The SNN's curve with its band, and the two ANNs as lines."""
    steps = list(accuracy["by_timestep"])
    low, high = zip(*accuracy["bands"].values())
    lines = {"ann": ("float ANN", "-"), "qnet": ("quantized ANN", "--")}
    for (key, (name, style)), colour in zip(lines.items(), COLOURS):
        axis.axhline(accuracy[key]["top1"], color=colour, linestyle=style, label=name)
    axis.axhspan(*accuracy["ann"]["interval"], color=COLOURS[0], alpha=0.12, linewidth=0)
    axis.fill_between(steps, low, high, color=COLOURS[2], alpha=0.2, linewidth=0)
    marker = "o" if len(steps) <= 64 else ""
    axis.plot(steps, list(accuracy["by_timestep"].values()), "-.", color=COLOURS[2], marker=marker, ms=3.5, label="SNN")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="timesteps (each tick doubles)", ylabel="top-1 accuracy (%)")


def zoom_in(axis, accuracy):
    """Show only the second half of the steps, and the range of the bands there."""
    last = len(accuracy["by_timestep"])
    first = max(1, last // 2)
    values = [value for t, band in accuracy["bands"].items() if t >= first for value in band]
    values += accuracy["ann"]["interval"] + [accuracy["qnet"]["top1"]]
    margin = max(0.5, 0.08 * (max(values) - min(values)))
    axis.set_ylim(min(values) - margin, max(values) + margin)
    axis.set_xlim(first * 0.95, max(last * 1.05, first + 1))
    axis.xaxis.set_minor_formatter(lambda value, position: "")
    axis.set_xticks(sorted({first, round((first * last) ** 0.5), last}))


def pareto_chart(tried, runs, ann_top1, images):
    """Accuracy against synaptic operations of all conversions tried, and of the runs to compare with."""
    compared = [row for row in runs[1:] if row["synops"]]
    points = [
        (name, each["test"]["top1"], each["test"]["interval"], each["test"]["synops"]) for name, each in tried.items()
    ]
    points = [point for point in points if point[3] > 0]
    others = [(row["name"], row["top1"], row["interval"], row["synops"]) for row in compared]
    caption = (
        f"Accuracy against synaptic operations for each image, on {images} test images, with 95 % intervals. Up is "
        "more accurate, left is cheaper. Conversions without training are calibrated on fewer images than the run. "
    )
    missing = [row["name"] for row in runs[1:] if not row["synops"]]
    caption += "Open symbols are the runs compared, on their own images. " if others else ""
    caption += f"Without a number of operations, and so not shown: {', '.join(missing)}." if missing else ""
    panel = Panel(lambda axis: draw_pareto(axis, points, others, ann_top1), height=4.4, width=5.0, legend=2)
    return Chart("Accuracy against the work that spikes cause", caption, [panel])


def draw_pareto(axis, points, others, ann_top1):
    """A marker with its interval for each conversion; a legend names them, because labels would cover each other."""
    markers = ["o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h", "*"]
    for i, (name, top1, (low, high), synops) in enumerate([*points, *others]):
        is_own = i < len(points)
        colour = INK if name == CONTROL else COLOURS[i % 8]
        style = {"color": colour, "marker": markers[i % len(markers)], "ms": 7, "mfc": colour if is_own else PAPER}
        error = [[max(0, top1 - low)], [max(0, high - top1)]]
        axis.errorbar(synops, top1, error, **style, linestyle="", elinewidth=1, capsize=2, label=plain_text(name))
    axis.axhline(ann_top1, color=SOFT, linestyle="--", linewidth=1, label="float ANN")
    values = [point[3] for point in (*points, *others)]
    if values and max(values) > 4 * min(values):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_formatter(lambda value, position: "")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.tick_params(axis="x", labelsize=9)
    axis.set(xlabel="synaptic operations for an image", ylabel="top-1 accuracy (%)")


def classes_chart(classes):
    """Accuracy of each class, ANN and SNN, and the confusion of both. classes: `accuracy.class_facts`."""
    rows = sorted(classes["classes"], key=lambda row: abs(row["change"]["points"]), reverse=True)[:MOST_CLASSES]
    rows = sorted(rows, key=lambda row: row["class"])
    panels = [
        Panel(lambda axis: draw_classes(axis, rows, classes["names"]), height=bars_height(len(rows)) + 0.4, legend=2)
    ]
    for kind, title in (("ann", "float ANN"), ("snn", "SNN")):
        matrix = np.array(classes["confusion"][kind])
        draw = partial(draw_confusion, matrix=matrix, names=classes["names"])
        panels.append(Panel(draw, height=WIDTH, title=title))
    images = sum(map(sum, classes["confusion"]["snn"]))
    left_out = f" The {MOST_CLASSES} classes that change most are shown." if len(classes["classes"]) > len(rows) else ""
    caption = (
        f"Accuracy of every class with its 95 % interval, and which class was answered for which, on {images} test "
        f"images. Cells beside the diagonal are errors; the colour of a row adds up to 100 %.{left_out}"
    )
    return Chart("Right and wrong answers by class, ANN and SNN", caption, panels, columns=1 if len(rows) > 30 else 2)


def draw_classes(axis, rows, names):
    """Two points with intervals for each class."""
    y = np.arange(len(rows))[::-1]
    for kind, shift, colour, marker in (("ann", 0.15, COLOURS[0], "o"), ("snn", -0.15, COLOURS[2], "s")):
        top1 = np.array([row[kind]["top1"] for row in rows])
        ends = np.array([row[kind]["interval"] for row in rows])
        error = [(top1 - ends[:, 0]).clip(0), (ends[:, 1] - top1).clip(0)]
        name = {"ann": "float ANN", "snn": "SNN"}[kind]
        axis.errorbar(
            top1, y + shift, xerr=error, color=colour, marker=marker, ms=4, linestyle="", elinewidth=1, label=name
        )
    axis.set_yticks(y, [f"{plain_text(names[row['class']])} ({row['snn']['images']})" for row in rows])
    axis.set(xlabel="right answers (%)", ylabel="class (images)")


def draw_confusion(axis, matrix, names):
    """A confusion matrix as an image, in percent of each row; numbers are counts of images, zeros left out."""
    shares = 100 * matrix / matrix.sum(1, keepdims=True).clip(1)
    axis.grid(False)
    colours = colormaps["Blues"]
    axis.imshow(shares, cmap=colours, vmin=0, vmax=100, interpolation="nearest")
    if len(matrix) <= MOST_CELLS:
        for row, column in zip(*np.nonzero(matrix)):
            colour = readable_on(colours(shares[row, column] / 100))
            axis.text(column, row, matrix[row, column], ha="center", va="center", fontsize=8, color=colour)
    if len(matrix) <= MOST_CLASSES:
        ticks = [plain_text(name)[:12] for name in names]
        axis.set_xticks(range(len(ticks)), ticks, rotation=90 if max(map(len, ticks)) > 2 else 0)
        axis.set_yticks(range(len(ticks)), ticks)
    axis.set(xlabel="answered class", ylabel="true class")


def changes_chart(results, title, caption, names=None):
    """The change of accuracy of each result against CONTROL, with its paired 95 % interval. names: name -> label."""
    found = differences(results)
    labels = [plain_text((names or {}).get(name, name)) for name in found]
    panel = Panel(
        lambda axis: draw_changes(axis, list(found.values()), labels), height=bars_height(len(found)), width=5.0
    )
    return Chart(title, caption, [panel])


def draw_changes(axis, found, labels):
    """A point with its interval for each difference; filled where the interval leaves out zero."""
    for y, each in zip(range(len(found))[::-1], found):
        low, high = each.interval
        is_clear = low > 0 or high < 0
        colour = COLOURS[2] if low > 0 else COLOURS[3] if high < 0 else SOFT
        axis.plot([low, high], [y, y], color=colour, linewidth=2)
        axis.plot(each.points, y, "o" if is_clear else "s", color=colour, mfc=colour if is_clear else PAPER)
    axis.axvline(0, color=INK, linestyle="--", linewidth=1)
    axis.set_yticks(range(len(labels)), labels[::-1])
    axis.set_ylim(-0.7, len(labels) - 0.3)
    axis.set_xlabel("change of accuracy (points)")


def operations_chart(operations):
    """Operations per image of every layer, ANN and SNN, on a logarithmic axis."""
    busy = {name: each for name, each in operations.items() if any(totals(each))}
    caption = (
        "Operations for one image. The ANN multiplies and adds once for each connection; the SNN adds once for each "
        "spike and connection, and multiplies only in layers that read the image or stay ANN."
    )
    panel = Panel(lambda axis: draw_operations(axis, busy), height=bars_height(len(busy)) + 0.5, width=5.0, legend=1)
    return Chart("Operations of each layer, ANN and SNN", caption, [panel])


def draw_operations(axis, busy):
    names = list(busy)[::-1]
    ann, snn = zip(*[totals(busy[name]) for name in names])
    y = np.arange(len(names))
    axis.barh(y + 0.2, ann, 0.38, color=COLOURS[0], label="ANN: multiply-accumulates, adds")
    axis.barh(y - 0.2, snn, 0.38, color=COLOURS[1], hatch="//", edgecolor=PAPER, label="SNN: accumulates (MACs too)")
    axis.set_xscale("log")
    axis.set_xlim(left=10 ** np.floor(np.log10(max(1, min(filter(None, ann + snn))))))
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.set_yticks(y, [label(name, busy[name]["path"]) for name in names])
    axis.set_xlabel("operations for an image")


def totals(operations):
    """`ann, snn`: the sum of a layer's operations in the ANN and in the SNN."""
    return operations["ann_mac"] + operations["ann_ac"], operations["snn_mac"] + operations["snn_ac"]


def sweep_chart(swept, images, words):
    """Accuracy by weight bits and timesteps as a heat map."""
    caption = (
        f"Top-1 accuracy on {images} {words}. Each bit width is finetuned, each cell converted. Neighbouring cells "
        "may differ by chance."
    )
    panel = Panel(lambda axis: draw_sweep(axis, swept), height=1.4 + 0.45 * len(swept), width=5.0)
    return Chart("Accuracy by weight bits and timesteps", caption, [panel])


def draw_sweep(axis, swept):
    import seaborn as sns  # only for this panel: it takes half a second

    bits, steps = list(swept), list(next(iter(swept.values())))
    values = np.array([[swept[b][t] for t in steps] for b in bits], dtype=float)  # None (not converted) becomes NaN
    axis.grid(False)
    sns.heatmap(values, annot=True, fmt=".1f", cmap="cividis", ax=axis, xticklabels=steps, yticklabels=bits, cbar=False)
    axis.set(xlabel="timesteps", ylabel="weight bits")
    axis.tick_params(axis="y", rotation=0)
