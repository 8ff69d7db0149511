"""The figure of a search: accuracy against steps per image, and against synaptic operations."""

from reports.figures import COLOURS, new_figure, render
from searching.choice import gain, pareto_front

__all__ = ["draw_front", "render"]
MARKERS = "osD^vP*X"


def draw_front(rows, ann_hits, limits):
    """A Figure with two panels: points of top-1 against the float network, over steps and over synaptic operations.

    Filled markers are on the Pareto front, open ones are not; a line joins the best at each price. Colours and markers
    stand for weight bits.
    """
    figure, axes = new_figure(9, 4, columns=2, sharey=True)
    rows = [row for row in rows if row.is_complete and row.hits and not limits.over(row)]
    front = {row.key for row in pareto_front(rows, ann_hits, limits)}
    panels = {"interval": "steps from image to image (log2)", "synops": "synaptic operations per image"}
    for axis, (name, title) in zip(axes[0], panels.items()):
        for index, bits in enumerate(sorted({row.bits for row in rows})):
            same = [row for row in rows if row.bits == bits]
            draw_rows(axis, same, name, ann_hits, front, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
        axis.axhline(0, color="0.2", linestyle=":", linewidth=1)
        axis.set_xlabel(title)
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].xaxis.set_major_formatter("{x:g}")
    axes[0, 1].set_xscale("log")
    axes[0, 0].set_ylabel("points of top-1 against the float network")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


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
