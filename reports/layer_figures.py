"""The charts of the layers: parts of the error, firing rates, decoded spikes, weights, potentials and spikes."""

from functools import partial

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from reports.drawing import COLOURS, INK, PAPER, SOFT, Chart, Panel, bars_height, label
from reports.errors import PARTS

HATCHES = ("", "//", "||", "xx", "--", "\\\\", "++")  # straight lines: dots are large in an SVG
MOST_PANELS = 6  # three rows of two: about one screen of a figure
BINS = 48  # edges of a histogram: bins of about 5 pixels in a panel
FINE_BINS = 64  # integers up to this size get two bins each (at most 257 edges), larger ones share 128 bins
MOST_POINTS = 2048  # timesteps of a potential that a panel shows; more are finer than its pixels


def error_chart(layers, images):
    """The parts of every layer's squared error, stacked: positive ones to the right, negative ones to the left."""
    caption = (
        f"How far the decoded spikes of each layer are from the float ANN's activations, on {images} test images: "
        "squared error in percent of the squared activation, split by cause. The diamond is the sum of the parts. A "
        "part to the left of zero cancels others. The glossary explains each cause."
    )
    panel = Panel(
        lambda axis: draw_error_parts(axis, layers), height=bars_height(len(layers)) + 1.2, width=5.0, legend=2
    )
    return Chart("Where each layer's error comes from", caption, [panel])


def draw_error_parts(axis, layers):
    names = list(layers)[::-1]
    right, left = np.zeros(len(names)), np.zeros(len(names))
    for (part, title), colour, hatch in zip(PARTS.items(), COLOURS, HATCHES):
        values = 100 * np.array([layers[name]["parts_of_squared_error"][part] for name in names])
        starts = np.where(values >= 0, right, left)
        axis.barh(range(len(names)), values, left=starts, color=colour, hatch=hatch, edgecolor=PAPER, label=title)
        right, left = right + values.clip(min=0), left + values.clip(max=0)
    totals = [100 * layers[name]["relative_squared_error"] for name in names]
    axis.plot(totals, range(len(names)), "D", color=INK, markersize=4, linestyle="", label="total")
    axis.axvline(0, color=SOFT, linewidth=1)
    axis.set_yticks(range(len(names)), [label(name, layers[name]["path"]) for name in names])
    axis.set_ylim(-0.7, len(names) - 0.3)
    axis.set_xlabel("squared error (% of squared activation)")


def rates_chart(layers, samples):
    """Spikes per neuron and step of every layer, and the shares of silent and saturated neurons."""
    caption = (
        f"Left: spikes for each neuron and timestep, on {samples} test images. Fewer spikes cost less energy, more "
        "spikes represent activations more finely. Right: neurons that never spike, and neurons that spike at every "
        "step (saturated), which cannot represent larger activations."
    )
    height = bars_height(len(layers))
    rates = Panel(lambda axis: draw_rates(axis, layers), height=height, title="firing rate")
    extremes = Panel(lambda axis: draw_extremes(axis, layers), height=height + 0.3, title="silent, saturated", legend=2)
    return Chart("How much each layer spikes", caption, [rates, extremes])


def draw_rates(axis, layers):
    names = list(layers)[::-1]
    rates = [layers[name]["firing_rate"] for name in names]
    bars = axis.barh(range(len(names)), rates, color=COLOURS[0])
    axis.bar_label(bars, [f"{rate:.3f}" for rate in rates], padding=3, fontsize=8, color=INK)
    name_rows(axis, names, layers)
    axis.set_xlabel("spikes per neuron and timestep")
    axis.margins(x=0.2)


def draw_extremes(axis, layers):
    names = list(layers)[::-1]
    y = np.arange(len(names))
    for key, shift, colour, hatch in (
        ("silent_share", 0.2, COLOURS[7], ""),
        ("saturated_share", -0.2, COLOURS[3], "//"),
    ):
        values = [100 * layers[name][key] for name in names]
        axis.barh(y + shift, values, 0.38, color=colour, hatch=hatch, edgecolor=PAPER, label=key.split("_")[0])
    name_rows(axis, names, layers)
    axis.set_xlabel("share of the neurons (%)")


def name_rows(axis, names, layers):
    axis.set_yticks(range(len(names)), [label(name, layers[name]["path"]) for name in names])
    axis.set_ylim(-0.7, len(names) - 0.3)


def chosen(names, important=None):
    """At most MOST_PANELS names: evenly spaced ones, and the important one."""
    names = list(names)
    if len(names) <= MOST_PANELS:
        return names
    picked = {names[i] for i in np.linspace(0, len(names) - 1, MOST_PANELS - 1).round().astype(int)}
    return [name for name in names if name in picked or name == important]


def density_chart(pairs, layers, images):
    """Density of decoded spikes against activations, for at most MOST_PANELS layers."""
    most = max(layers, key=lambda name: layers[name]["relative_squared_error"])
    norm = LogNorm(1, max(2, len(pairs[most][0])))
    panels = []
    for name in chosen(pairs, most):
        draw = partial(draw_density, pair=pairs[name], scale=layers[name]["lambda"][1], norm=norm)
        panels.append(Panel(draw, width=3.4, height=2.9, title=label(name, layers[name]["path"])))
    caption = (
        f"Each dot counts neurons (darker: more), on {images} test images. On the dotted diagonal the decoded spikes "
        "equal the float ANN's activation. The dashed line is lambda, one spike at every step (the largest lambda, if "
        "channels differ); spikes cannot represent larger activations."
        + (f" {len(panels)} of {len(pairs)} layers." if len(panels) < len(pairs) else "")
    )
    return Chart("Decoded spikes against the ANN's activations", caption, panels, columns=3)


def draw_density(axis, pair, scale, norm):
    activations, rates = (values.numpy() for values in pair)
    top = max(activations.max(), rates.max(), 1e-6)
    edges = np.linspace(min(0, activations.min()), top, BINS)
    axis.hist2d(activations, rates, bins=[edges, edges], norm=norm, cmap="viridis_r", rasterized=True)
    axis.plot([0, top], [0, top], color=SOFT, linestyle=":", linewidth=1.2)
    axis.axhline(scale, color=COLOURS[3], linestyle="--", linewidth=1.2)
    axis.set(xlabel="activation of the ANN", ylabel="decoded spikes")


def weights_chart(weights, important):
    """Histograms of integer and float weights, for at most MOST_PANELS layers."""
    panels = []
    for i, name in enumerate(chosen(weights, important)):
        floats, integers = (each.numpy() for each in weights[name])
        draw = partial(draw_weights, floats=floats, integers=integers)
        panels.append(Panel(draw, width=3.4, height=2.6, title=label(name, ""), legend=0 if i else 2))
    caption = "Integer weights (bars) and the float weights before rounding (line), in steps between two integers." + (
        f" {len(panels)} of {len(weights)} layers." if len(panels) < len(weights) else ""
    )
    return Chart("Weights before and after rounding", caption, panels, columns=3)


def draw_weights(axis, floats, integers):
    """Shares per integer step: bars for the integers, a line for the floats with two bins per step."""
    are_integers = np.array_equal(integers, integers.round())
    if are_integers:
        values, counts = np.unique(integers.astype(int), return_counts=True)
        bars = np.zeros(values[-1] - values[0] + 1)
        bars[values - values[0]] = 100 * counts / len(integers)
        edges = np.arange(values[0], values[-1] + 2) - 0.5
        axis.stairs(bars, edges, fill=True, color=COLOURS[0], label="integer", rasterized=len(bars) > FINE_BINS)
        reach = np.ceil(max(np.abs(floats).max(), np.abs(integers).max()) + 0.5)
        edges = np.linspace(-reach, reach, int(4 * reach) + 1 if reach < FINE_BINS else 2 * FINE_BINS + 1)
    else:  # 32 bits: float weights before and after finetuning
        reach = max(np.abs(floats).max(), np.abs(integers).max())
        edges = np.linspace(-reach, reach, BINS)
        axis.hist(integers, edges, weights=np.full(len(integers), 100 / len(integers)), color=COLOURS[0], label="after")
    step = edges[1] - edges[0] if reach >= 1 and are_integers else 1
    shares, _ = np.histogram(floats, edges)
    axis.stairs(100 * shares / len(floats) / step, edges, color=COLOURS[3], linewidth=1.2, label="float")
    axis.set(xlabel="weight (steps)", ylabel="weights (%)")


def neurons_chart(neurons, layers):
    """Membrane potentials of two neurons and a spike raster of all recorded ones, two panels per layer."""
    panels = []
    for i, (name, (potentials, spikes)) in enumerate(neurons.items()):
        potentials, spikes = potentials[:MOST_POINTS].numpy(), spikes[:MOST_POINTS].numpy()
        title = label(name, layers[name]["path"])
        draw = partial(draw_potentials, potentials=potentials, spikes=spikes)
        panels.append(Panel(draw, height=2.7, title=f"{title}: potential", legend=0 if i else 3))
        panels.append(Panel(partial(draw_raster, spikes=spikes), height=2.7, title=f"{title}: spikes"))
    caption = (
        "Membrane potential of two neurons before each reset, and the spikes of up to 24 neurons from the least to the "
        "most active, for one test image. A neuron spikes when its potential reaches the threshold Vthr."
    )
    return Chart("Potentials and spikes of some neurons", caption, panels)


def draw_raster(axis, spikes):
    """Spikes [steps, n] as short lines, all in one path."""
    fired, which = np.nonzero(np.nan_to_num(spikes))
    gap = np.full(len(fired), np.nan)
    x, y = np.stack([fired + 1, fired + 1, gap], 1), np.stack([which + 0.7, which + 1.3, gap], 1)
    axis.plot(x.flatten(), y.flatten(), color=INK, linewidth=1, rasterized=len(fired) > 1000)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="timestep", ylabel="neuron", ylim=(0, spikes.shape[1] + 1), xlim=(0, len(spikes) + 1))


def draw_potentials(axis, potentials, spikes):
    """Membrane potentials before each reset, with marks at spikes, of a moderately and of the most active neuron."""
    steps, last = np.arange(1, len(potentials) + 1), potentials.shape[1] - 1
    styles = {last // 2: ("-", "o", COLOURS[0], "medium"), last: ("--", "s", COLOURS[1], "most active")}
    for neuron, (line, marker, colour, title) in styles.items():
        fired = np.nan_to_num(spikes[:, neuron]) > 0
        axis.plot(steps, potentials[:, neuron], line, color=colour, linewidth=1.2, label=title)
        axis.plot(steps[fired], potentials[fired, neuron], marker, color=colour, markersize=4)
    axis.axhline(1, color=SOFT, linestyle=":", linewidth=1.2, label="threshold")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="timestep", ylabel="potential (Vthr)")
