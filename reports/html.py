"""Write the report as one HTML page that opens from disk, needs no internet, and fits a phone.

All names that come from a user or a neural network are escaped.
"""

import base64
from html import escape

from quantization import weights_in_words
from reports.errors import PARTS

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2rem; }
.verdict { border-left: 4px solid #0173b2; padding: 0.1rem 1rem; background: #f4f7fa; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.7rem 0.25rem 0; text-align: left; white-space: nowrap; }
td.number, th.number { text-align: right; }
th { border-bottom: 2px solid #999; vertical-align: bottom; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; min-width: 34rem; height: auto; display: block; }
@media (min-width: 38rem) { img { min-width: 0; } }
figcaption, .note { font-size: 0.85rem; color: #444; }
details { margin: 0.8rem 0; }
"""


def report_page(result, pictures):
    """The page as text. result: that of an `analysis.Analysis`. pictures: name -> (PNG bytes, caption)."""
    title = f"{result['net']} on {result['flags']['dataset']}"
    sections = [
        f"<h1>Error analysis: {escape(title)}</h1>",
        f"<p>{escape(what_was_converted(result))}</p>",
        '<div class="verdict">' + "".join(f"<p>{escape(sentence)}</p>" for sentence in result["verdict"]) + "</div>",
        section("Accuracy", top1_table(result), picture(pictures, "accuracy"), picture(pictures, "sweep")),
        section(
            "Options that regain accuracy",
            picture(pictures, "alternatives"),
            alternatives_table(result),
            picture(pictures, "repaired_layers"),
        ),
        section("Layers", picture(pictures, "error_parts"), layer_table(result), PARTS_NOTE),
        section("Spikes", *(picture(pictures, name) for name in ("firing_rate", "density", "neurons"))),
        section("Weights", picture(pictures, "weights")),
        section("Energy and latency", energy(result), picture(pictures, "operations"), operations_table(result)),
        section(f"Hardware {result['hardware']['name']}", hardware(result)),
        section("How it was made", flags_table(result)),
    ]
    return page(title, "\n".join(sections))


def page(title, body):
    """An HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(title, *parts):
    """A heading and the parts under it."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(part for part in parts if part)


def picture(pictures, name):
    """A figure with its caption and the image embedded in the page; empty if the picture does not exist."""
    if name not in pictures:
        return ""
    png, caption = pictures[name]
    data = base64.b64encode(png).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="scroll">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'


def table(rows):
    """A table of rows of cells; the first row is the head, and columns of numbers are right-aligned."""
    numeric = [all(looks_numeric(row[i]) for row in rows[1:]) for i in range(len(rows[0]))]

    def line(row, tag):
        cells = (f"<{tag}{' class=number' * right}>{escape(str(cell))}</{tag}>" for cell, right in zip(row, numeric))
        return "<tr>" + "".join(cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table>\n{line(rows[0], "th")}\n{body}\n</table></div>'


def looks_numeric(cell):
    """Whether a cell is a number, or a placeholder for one."""
    text = str(cell).replace(",", "").replace("...", "")
    return text in ("", "-", "float") or text.lstrip("+-")[:1].isdigit()


def what_was_converted(result):
    """The network and its conversion in one paragraph."""
    flags = result["flags"]
    weights = flags["ann_weight"] or "random or built-in weights"
    return (
        f"{result['net']} ({weights}) with {weights_in_words(flags['weight_bitwidth'])}, finetuned for "
        f"{flags['finetune_epochs']} epochs ({flags['spike_epochs']} more on its spikes), converted for "
        f"{flags['timesteps']} timesteps with reset by {flags['reset_mode']}. The accuracies are measured on "
        f"{result['samples']} test images, the results for layers and alternatives on {result['analysis_images']} of "
        "them."
    )


# ---------------------------------------------------------------------------------------------------------------------
# tables


def top1_table(result):
    """Top-1 and loss of the three networks."""
    names = {"ann": "float ANN", "qnet": "quantized ANN", "snn": f"SNN, T={result['flags']['timesteps']}"}
    rows = [("network", "top-1 %", "loss")]
    for key, name in names.items():
        rows.append((name, f"{result['accuracy'][key]['top1']:.2f}", f"{result['accuracy'][key]['loss']:.4f}"))
    return table(rows)


def alternatives_table(result):
    """A row for every alternative conversion."""
    rows = [("flags", "error %", "top-1 %", "loss", "same class as ANN %", "steps between images", "to the answer", "")]
    for flags, each in result["alternatives"].items():
        numbers = (f"{each['error']:.2f}", f"{each['top1']:.2f}", f"{each['loss']:.4f}", f"{each['same_class']:.1f}")
        rows.append((flags, *numbers, each["duration"]["interval"], each["duration"]["latency"], each["note"]))
    return table(rows)


def layer_table(result):
    """A row for every layer of neurons."""
    head = ("layer", "module path", "Vthr", "lambda", "spikes per neuron and step", "RMS activation", "RMS error")
    rows = [(*head, *PARTS.values(), "membrane bits seen", "at most")]
    for name, each in result["layers"].items():
        spans = range_in_words(each["Vthr"]), range_in_words(each["lambda"])
        first = (name, each["path"], *spans, f"{each['firing_rate']:.4f}")
        errors = (f"{each['rms_activation']:.4f}", f"{each['rms_error']:.4f}")
        parts = (f"{each['rms_of_parts'][part]:.4f}" for part in PARTS)
        rows.append((*first, *errors, *parts, each["bits_observed"] or "float", each["bits_bound"] or "float"))
    return table(rows)


PARTS_NOTE = (
    '<p class="note">RMS over all neurons and images, in units of activation. For each neuron the parts add up to the '
    "error; their RMS values do not. Membrane bits: the width of two's complement integers that hold every potential "
    "that occurred, or every potential that any input could cause.</p>"
)


def energy(result):
    """Joules per image with the constants of the estimate, and the latency."""
    rows = [("arithmetic", "pJ per accumulate", "pJ per MAC", "ANN, J per image", "SNN, J per image", "SNN / ANN")]
    for name, each in result["energy"].items():
        ratio = f"{each['snn'] / each['ann']:.2f}" if each["ann"] else "-"
        joules = f"{each['ann']:.3g}", f"{each['snn']:.3g}"
        rows.append((name, each["pj_per_ac"], each["pj_per_mac"], *joules, ratio))
    steps = result["duration"]
    note = (
        "This estimate covers arithmetic only, without memory, communication and leakage. Its constants are for 45 nm "
        "(Horowitz, Computing's Energy Problem, ISSCC 2014). The SNN accumulates once per spike and synapse, adds "
        "biases (and the image's current) at every step, and multiplies in layers that read the image or stay ANN. "
        f"Timesteps per image: every layer fires for {steps['firing']}, the next image starts after "
        f"{steps['interval']}, the answer is ready after {steps['latency']}."
    )
    return table(rows) + f'<p class="note">{escape(note)}</p>'


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
    return table(rows)


def hardware(result):
    """The chip's limits, layer by layer, and the width of the membrane potential."""
    bounds = [each["bits_bound"] for each in result["layers"].values() if each["bits_bound"]]
    seen = [each["bits_observed"] for each in result["layers"].values() if each["bits_observed"]]
    note = f"Hardware {result['hardware']['name']} specifies no width of the membrane potential"
    if bounds:
        note += f"; this network needs {max(seen)} bits for all potentials that occurred, {max(bounds)} for any input"
    return table(result["hardware"]["rows"]) + f'<p class="note">{escape(note)}.</p>'


def flags_table(result):
    """Seed, versions and all flags."""
    rows = [("flag", "value"), ("seed", result["seed"])]
    rows += [(f"version of {name}", version) for name, version in result["versions"].items()]
    rows += [(f"--{name}" if name != "net_name" else name, value) for name, value in sorted(result["flags"].items())]
    return f"<details><summary>Seed, versions and all flags</summary>{table(rows)}</details>"


def range_in_words(values):
    """`least...largest` of a pair, or one number if both are equal."""
    least, most = values
    return f"{least:.4g}" if least == most else f"{least:.4g}...{most:.4g}"
