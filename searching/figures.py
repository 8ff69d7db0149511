"""The figure of a search: accuracy against steps per image, and against synaptic operations."""

from functools import partial

from reports.drawing import COLOURS, SOFT, Chart, Panel
from searching.choice import gain, pareto_front

MARKERS = "osD^vP*X"


def front_chart(rows, ann_hits, limits):
    """A Chart of two panels: points of top-1 against the float network, over steps and over synaptic operations.

    Filled markers are on the Pareto front, open ones are not; a line joins the best at each price. Colours and markers
    stand for weight bits.
    """
    rows = [row for row in rows if row.is_complete and row.hits and not limits.over(row)]
    front = {row.key for row in pareto_front(rows, ann_hits, limits)}
    prices = {"interval": "steps from image to image (log2)", "synops": "synaptic operations per image"}
    panels = [Panel(partial(draw_prices, rows, name, ann_hits, front, title)) for name, title in prices.items()]
    panels[0].legend = 4
    return Chart("Accuracy of the trials, and what they cost", "", panels)


def draw_prices(rows, name, ann_hits, front, title, axis):
    """One panel. name: the price of a row, on the x axis with `title`."""
    for index, bits in enumerate(sorted({row.bits for row in rows})):
        same = [row for row in rows if row.bits == bits]
        draw_rows(axis, same, name, ann_hits, front, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
    axis.axhline(0, color=SOFT, linestyle=":", linewidth=1)
    axis.set_xlabel(title)
    axis.set_ylabel("points of top-1 against the float ANN")
    axis.set_xscale("log", base=2 if name == "interval" else 10)
    if name == "interval":
        axis.xaxis.set_major_formatter("{x:g}")


def draw_rows(axis, rows, name, ann_hits, front, colour, marker):
    """The trials of one bit width in one panel, and the line of those that are the best up to their price."""
    points = sorted((getattr(row, name), gain(row, ann_hits), row.key in front) for row in rows)
    for on_front in (False, True):
        shown = [(x, y) for x, y, is_on_front in points if is_on_front == on_front]
        face = colour if on_front else "white"
        axis.plot(*zip(*shown or [((), ())]), marker, color=colour, markerfacecolor=face, linestyle="", markersize=6)
    best, line = float("-inf"), []
    for x, y, _ in points:
        if y > best:
            best, line = y, [*line, (x, y)]
    axis.plot(*zip(*line), color=colour, linewidth=1.2, marker="", label=f"{rows[0].bits} bits")
