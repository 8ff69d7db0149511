"""The tables of the page. Each names its images; it scrolls inside its box, with its first column in place."""

from html import escape

from reports.alternatives import CONTROL
from reports.claims import differences
from reports.errors import PARTS
from reports.statistics import holm, p_in_words

TEXTS = ("module path", "note")  # columns of text, even where it starts with a digit
MICRO = 1e6  # microjoules in a joule


def table(rows, caption, sorts=True):
    """A table of rows of cells; the first row is the head, and columns of numbers are right-aligned.

    Columns that are empty below their head are left out.
    """
    filled = [i for i in range(len(rows[0])) if len(rows) == 1 or any(row[i] != "" for row in rows[1:])]
    rows = [[row[i] for i in filled] for row in rows]
    numeric = [name not in TEXTS and all(looks_numeric(row[i]) for row in rows[1:]) for i, name in enumerate(rows[0])]

    def line(row, tag):
        cells = []
        for i, (cell, right) in enumerate(zip(row, numeric)):
            kind = "th" if tag == "th" or i == 0 else "td"
            scope = f' scope="{"col" if tag == "th" else "row"}"' if kind == "th" else ""
            cells.append(f"<{kind}{scope}{' class=number' if right and i else ''}>{escape(str(cell))}</{kind}>")
        return "<tr>" + "".join(cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows[1:])
    kind = ' class="sorts"' if sorts and len(rows) > 2 else ""
    named = escape(caption, quote=True)
    return (
        f'<p class="caption">{escape(caption)}</p>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{named}"><table{kind} aria-label="{named}">\n'
        f"<thead>{line(rows[0], 'th')}</thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def looks_numeric(cell):
    """Whether a cell is a number, or a placeholder for one."""
    text = str(cell).replace(",", "").replace("...", "")
    return text in ("", "-", "float") or text.lstrip("+-<")[:1].isdigit()


def span(interval, form=".1f"):
    """An interval as "low to high"."""
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def top1_table(result):
    """Top-1 of the three networks with intervals, and the paired difference to the ANN."""
    accuracy = result["accuracy"]
    names = {"ann": "float ANN", "qnet": "quantized ANN", "snn": f"SNN, T = {result['flags']['timesteps']}"}
    rows = [("network", "top-1 %", "95 % interval")]
    for key, name in names.items():
        rows.append((name, f"{accuracy[key]['top1']:.2f}", span(accuracy[key]["interval"])))
    return table(rows, f"Accuracy on {result['samples']} test images", sorts=False)


def differences_table(result):
    """The paired differences of the three networks."""
    names = {"qnet-ann": "quantized ANN minus ANN", "snn-qnet": "SNN minus quantized ANN", "snn-ann": "SNN minus ANN"}
    rows = [("difference", "points", "95 % interval", "only the first right", "only the second right", "p")]
    for key, name in names.items():
        each = result["accuracy"]["differences"][key]
        counts = (each.get("gained", "-"), each.get("lost", "-"))
        rows.append((name, f"{each['points']:+.2f}", span(each["interval"], "+.2f"), *counts, p_in_words(each["p"])))
    paired = result["accuracy"]["paired"]
    test = "McNemar's test, mid-p" if paired else "the loader shuffles: unpaired intervals, Fisher's exact test"
    return table(rows, f"Differences on the same {result['samples']} test images ({test})", sorts=False)


def on_which(result):
    return f"{result['validation']['images']} {result['validation']['words']}"


def changes(results):
    """Name -> cells "points", "95 % interval", "p" of the difference to CONTROL; p is corrected by Holm's method."""
    found = differences(results)
    corrected = holm([each.p for each in found.values()])
    cells = {
        name: (f"{each.points:+.1f}", span(each.interval, "+.1f"), p_in_words(p))
        for (name, each), p in zip(found.items(), corrected)
    }
    return {CONTROL: ("-", "-", "-"), **cells}


def alternatives_table(result):
    """A row for every alternative conversion, on validation images."""
    head = ("top-1 %", "change, points", "95 % interval", "p", "score error %", "answers as the ANN %")
    rows = [("flags", *head, "steps between images", "steps to the answer", "fits the chip", "CPU s", "note")]
    cells = changes(result["alternatives"])
    for flags, each in result["alternatives"].items():
        numbers = f"{each['top1']:.1f}", *cells[flags], f"{each['error']:.1f}", f"{each['same_class']:.1f}"
        cost = each["duration"]["interval"], each["duration"]["latency"], "yes" if each["fits"] else "no"
        rows.append((flags, *numbers, *cost, f"{each['cpu_seconds']:.1f}", each["note"]))
    own = f"calibrated on {result['calibration_images']} images each, unless noted"
    listed = table(rows, f"Other flags on {on_which(result)}, {own}; p for all of them (McNemar, Holm)")
    return listed + reported_table(result)


def reported_table(result):
    """The same conversions on test images, with their synaptic operations."""
    rows = [("flags", "top-1 %", "95 % interval", "synaptic operations")]
    ann = result["ann_of_analysis"]
    rows.append(("float ANN", f"{ann['top1']:.1f}", span(ann["interval"]), "-"))
    for flags, each in result["alternatives"].items():
        test = each["test"]
        rows.append((flags, f"{test['top1']:.1f}", span(test["interval"]), f"{test['synops']:,.0f}"))
    missing = [name for name in ("specification", "calibrated", "finetuned", "exact") if not was_tried(result, name)]
    note = (
        f'<p class="note">Presets that train are tried with --try_presets; not tried: {", ".join(missing)}.</p>'
        if missing
        else ""
    )
    return table(rows, f"The same conversions on {result['analysis_images']} test images") + note


def was_tried(result, preset):
    """Whether a preset is among the alternatives, or the one asked for."""
    return f"--preset {preset}" in result["alternatives"] or result["flags"].get("preset") == preset


def repairs_table(result):
    """A row for every layer that was given float weights alone."""
    if not result["repaired"]:
        return ""
    cells, paths = changes(result["repaired"]), result["operations"]
    rows = [("float weights in", "module path", "top-1 %", "change, points", "95 % interval", "p", "score error %")]
    for name, each in result["repaired"].items():
        path = paths[name]["path"] if name in paths else ""
        rows.append((name, path, f"{each['top1']:.1f}", *cells[name], f"{each['error']:.1f}"))
    return table(rows, f"Float weights in one layer, on {on_which(result)}; p for all of them (McNemar, Holm)")


def classes_table(result):
    """The accuracy of every class."""
    if not result["classes"]:
        return ""
    found, names = result["classes"]["classes"], result["classes"]["names"]
    corrected = holm([each["change"]["p"] for each in found])
    rows = [("class", "images", "ANN %", "SNN %", "change, points", "95 % interval", "p")]
    for each, p in zip(found, corrected):
        change = each["change"]
        numbers = f"{each['ann']['top1']:.1f}", f"{each['snn']['top1']:.1f}", f"{change['points']:+.1f}"
        rows.append((names[each["class"]], change["images"], *numbers, span(change["interval"], "+.1f"), p_in_words(p)))
    return table(rows, f"Accuracy by class on {result['samples']} test images; p for all classes (McNemar, Holm)")


def layer_table(result):
    """A row for every layer of neurons."""
    head = ("layer", "module path", "Vthr", "lambda", "spikes per neuron and step", "RMS activation", "RMS error")
    rows = [(*head, *PARTS.values(), "silent %", "saturated %", "membrane bits seen", "at most")]
    for name, each in result["layers"].items():
        spans = range_in_words(each["Vthr"]), range_in_words(each["lambda"])
        first = (name, each["path"], *spans, f"{each['firing_rate']:.4f}")
        errors = (f"{each['rms_activation']:.4f}", f"{each['rms_error']:.4f}")
        parts = (f"{each['rms_of_parts'][part]:.4f}" for part in PARTS)
        shares = f"{100 * each['silent_share']:.1f}", f"{100 * each['saturated_share']:.2f}"
        bits = each["bits_observed"] or "float", each["bits_bound"] or "float"
        rows.append((*first, *errors, *parts, *shares, *bits))
    note = (
        '<p class="note">RMS (root mean square) over all neurons and images, in units of activation. For each neuron '
        "the parts add up to the error; their RMS values do not. Membrane bits: the width of two's complement integers "
        "that hold every potential that occurred, or every potential that any input could cause. Firing rates are "
        f"those of all {result['samples']} test images.</p>"
    )
    return table(rows, f"Layers of neurons, on {result['analysis_images']} test images") + note


def runs_table(result):
    """A row for every run compared."""
    rows = [
        ("run", "top-1 %", "95 % interval", "images", "T", "synaptic operations", "minus this run", "95 %", "p", "by")
    ]
    for row in result["compare"]:
        change = row["change"]
        synops = f"{row['synops']:,.0f}" if row["synops"] else "-"
        first = (
            row["name"],
            f"{row['top1']:.2f}",
            span(row["interval"]),
            row["images"],
            row["timesteps"] or "-",
            synops,
        )
        if change is None:
            rows.append((*first, "-", "-", "-", ""))
            continue
        by = "the same images" if change["paired"] else "different images"
        rows.append((*first, f"{change['points']:+.2f}", span(change["interval"], "+.2f"), p_in_words(change["p"]), by))
    return table(rows, "Runs compared, each on the images that the table names; p for all of them (Holm)")


def energy_table(result):
    """Microjoules per image with the constants of the estimate."""
    rows = [("arithmetic", "pJ per accumulate", "pJ per MAC", "ANN, µJ per image", "SNN, µJ per image", "SNN / ANN")]
    for name, each in result["energy"].items():
        ratio = f"{each['snn'] / each['ann']:.2f}" if each["ann"] else "-"
        joules = (f"{MICRO * each[kind]:.3g}" for kind in ("ann", "snn"))
        rows.append((name, each["pj_per_ac"], each["pj_per_mac"], *joules, ratio))
    return table(rows, f"Energy of the arithmetic, from {result['analysis_images']} test images", sorts=False)


def operations_table(result):
    """Operations per image, a row for every layer."""
    keys = ("ann_mac", "ann_ac", "synops", "snn_ac", "snn_mac")
    head = ("ANN MACs", "ANN adds", "synaptic operations", "all SNN accumulates", "SNN MACs")
    rows = [("layer", "module path", *head)]
    operations = result["operations"]
    for name, each in operations.items():
        if any(each[key] for key in keys):
            rows.append((name, each["path"], *(f"{each[key]:,.0f}" for key in keys)))
    rows.append(("all", "", *(f"{sum(each[key] for each in operations.values()):,.0f}" for key in keys)))
    return table(rows, f"Operations for an image, from {result['analysis_images']} test images", sorts=False)


def hardware_table(result):
    """The chip's limits, layer by layer, and the width of the membrane potential."""
    bounds = [each["bits_bound"] for each in result["layers"].values() if each["bits_bound"]]
    seen = [each["bits_observed"] for each in result["layers"].values() if each["bits_observed"]]
    name, rows = result["hardware"]["name"], result["hardware"]["rows"]
    note = f"Hardware {name} specifies no width of the membrane potential"
    if bounds:
        note += f"; this network needs {max(seen)} bits for all potentials that occurred, {max(bounds)} for any input"
    rows = [[*rows[0][:-1], "verdict"], *rows[1:]]
    return table(rows, f"Limits of Hardware {name} for each layer") + f'<p class="note">{escape(note)}.</p>'


def flags_table(result):
    """Seed, versions and all flags."""
    rows = [("flag", "value"), ("seed", result["seed"])]
    rows += [(f"version of {name}", version) for name, version in result["versions"].items()]
    rows += [(f"--{name}" if name != "net_name" else name, value) for name, value in sorted(result["flags"].items())]
    return f"<details><summary>Seed, versions and all flags</summary>{table(rows, 'All flags', sorts=False)}</details>"


def range_in_words(values):
    """`least...largest` of a pair, or one number if both are equal."""
    least, most = values
    return short(least) if least == most else f"{short(least)}...{short(most)}"


def short(value):
    """A number with four digits, or all digits of a large one."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
