"""What all figures share: panels that stand side by side on a PNG and below each other on a phone, colours, rendering.

A Chart has a title, a caption and Panels. A Panel draws on one matplotlib axis, so that it can be drawn twice: all
panels together as one PNG file, and each alone as an SVG in the page, whose colours follow the light or dark mode.
The colours are seaborn's palette for colour-blind readers; markers, line styles and hatches differ without colour.
"""

import io
import re
from collections import Counter
from dataclasses import dataclass, field

import matplotlib

matplotlib.use("Agg")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

# seaborn's palette "colorblind" (a test compares them); importing seaborn for it would take half a second
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9")
INK, SOFT, GRID, PAPER = "#1b1b1e", "#5b5b61", "#dedee2", "#fefefe"  # text, quiet lines, grids, background
VARIABLES = {INK: "--ink", SOFT: "--soft", GRID: "--grid", PAPER: "--paper"}  # names in the page's style
VARIABLES |= {colour: f"--c{i}" for i, colour in enumerate(COLOURS[:8])}
PNG_DPI = 200  # 1600 pixels for 8 inches
PNG_WIDTH = 8  # inches
LARGEST_PNG = 200_000  # bytes in full colour
WIDTH, HEIGHT = 4.4, 3.0  # inches of a panel: 10 points stay readable where 4.4 inches fill a phone of 390 pixels
LEGEND = 0.3  # inches of a legend below a panel
RENDERING = {
    **{"font.size": 10, "axes.titlesize": 10, "hatch.linewidth": 0.6, "svg.fonttype": "none"},
    **{key: INK for key in ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")},
    **{"axes.edgecolor": SOFT, "axes.facecolor": "none", "font.family": "DejaVu Sans"},
}


@dataclass
class Panel:
    """One axis. draw: a function of the axis. width, height: inches. title: over it. legend: its columns, or 0."""

    draw: object
    width: float = WIDTH
    height: float = HEIGHT
    title: str = ""
    legend: int = 0


@dataclass
class Chart:
    """A figure of the report. title: says alone what it shows. columns: panels side by side on the PNG."""

    title: str
    caption: str
    panels: list = field(default_factory=list)
    columns: int = 2


def label(name, path):
    """The name of a layer in figures: op name and module path."""
    text = f"{name} ({path})" if path and path != name else name
    return plain_text(text)


def plain_text(text):
    """A text that matplotlib shows as it is; it would read $...$ as mathematics."""
    return text.replace("$", r"\$")


def luminance(colour):
    """The relative luminance of a colour, 0 (black) to 1 (white), as WCAG 2 defines it."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def readable_on(ground):
    """Black or white, whichever has more contrast on a colour; it is at least 4.58, and AA asks for 4.5."""
    return "#000000" if luminance(ground) > 0.179 else "#ffffff"  # there (L + 0.05) / 0.05 = 1.05 / (L + 0.05)


def bars_height(count):
    """The height, in inches, of a panel with `count` horizontal bars."""
    return 1.2 + 0.3 * count


def prepare(axis):
    """Light grids, no frame."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def fill(figure, axis, panel):
    """Draw a panel on its axis, with its title; and its legend below."""
    prepare(axis)
    panel.draw(axis)
    if panel.title:
        axis.set_title(panel.title, loc="left", fontsize=10)
    if panel.legend:
        legend_below(axis, panel.legend)


def legend_below(axis, columns):
    """A legend under the label of the x axis; as part of the axis it has its place in a grid of panels, too."""
    handles, labels = axis.get_legend_handles_labels()
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.26 * HEIGHT / axis.get_figure().panel_height)}
    axis.legend(handles, labels, ncols=columns, frameon=False, fontsize=8.5, labelcolor=INK, **place)


def draw_panel(panel):
    """A panel alone, as a matplotlib Figure."""
    height = panel.height + (LEGEND if panel.legend else 0)
    figure = Figure(figsize=(panel.width, height), layout="constrained", facecolor="none")
    figure.panel_height = height
    fill(figure, figure.subplots(), panel)
    return figure


def draw_all(chart):
    """All panels of a chart as one matplotlib Figure of PNG_WIDTH inches, with its title."""
    columns = min(chart.columns, len(chart.panels))
    rows = [chart.panels[i : i + columns] for i in range(0, len(chart.panels), columns)]
    heights = [max(panel.height + (LEGEND if panel.legend else 0) for panel in row) for row in rows]
    figure = Figure(figsize=(PNG_WIDTH, 0.4 + sum(heights)), layout="constrained", facecolor=PAPER)
    figure.panel_height = heights[0]
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axis, panel in zip(axes.flat, chart.panels):
        fill(figure, axis, panel)
    for axis in axes.flat[len(chart.panels) :]:
        axis.set_visible(False)
    figure.suptitle(plain_text(chart.title), fontsize=12)
    return figure


def render_png(chart):
    """A chart as the bytes of a PNG file, 1600 pixels wide; the same chart always gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(RENDERING):
        figure = draw_all(chart)
        figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue() if buffer.tell() <= LARGEST_PNG else in_few_colours(buffer)


def in_few_colours(file):
    """The bytes of a PNG file with a palette of 256 colours, which is a third as large."""
    smaller = io.BytesIO()
    Image.open(file).convert("RGB").quantize(256).save(smaller, format="PNG", optimize=True)
    return smaller.getvalue()


def render_svgs(name, chart):
    """Every panel of a chart as SVG text to put into a page, with the page's colours (`VARIABLES`)."""
    svgs = []
    for i, panel in enumerate(chart.panels):
        buffer = io.StringIO()
        with matplotlib.rc_context({**RENDERING, "svg.hashsalt": f"{name} {i}"}):  # the salt fixes the ids
            draw_panel(panel).savefig(buffer, format="svg", dpi=110, metadata={"Date": None}, facecolor="none")
        svgs.append(for_page(buffer.getvalue()))
    return svgs


def for_page(svg):
    """An SVG file as a part of a page: without head, metadata and the ids of groups, in the colours of the page."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d)\d+", r"\1", tag[0]), svg)  # a tenth of a point is enough
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # the page's own style says the same
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r' d="([MLz\d\s.e-]*)"', lambda path: f' d="{short_path(path[1])}"', svg)
    return without_plain_groups(re.sub(r"\s*\n\s*", "\n", svg))


def short_path(path):
    """A path of straight lines, with as few characters: behind M, more pairs of numbers mean lines."""
    return re.sub(r"\s+", " ", re.sub(r"\.0\b", "", path).replace("L", "")).strip()


def without_plain_groups(svg):
    """An SVG text without its groups that have no attributes, which draw nothing."""
    kept, parts = [], []
    for part in re.split(r"(<g\b[^>]*>|</g>)\n?", svg):
        if part.startswith("<g"):
            kept.append(part != "<g>")
        if part == "<g>" or (part == "</g>" and not kept.pop()):
            continue
        parts.append(part)
    return "".join(parts)


def share_styles(page):
    """`page, rules`: a page whose repeated `style` attributes of SVG elements became classes, and these classes."""
    found = Counter(re.findall(r' style="([^"]*)"', page))
    classes = {style: f"s{i}" for i, (style, count) in enumerate(found.items()) if count > 2}
    page = re.sub(r' style="([^"]*)"', lambda m: f' class="{classes[m[1]]}"' if m[1] in classes else m[0], page)
    return page, "".join(f".{name}{{{style}}}" for style, name in classes.items())
