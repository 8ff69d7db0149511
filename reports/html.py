"""Write the report as one HTML page that opens from disk, needs no internet, and fits a phone.

All names that come from a user or a neural network are escaped. `reports/style.py` has the style and the script.
"""

import re
from html import escape

from quantization import weights_in_words
from reports import tables
from reports.drawing import share_styles
from reports.glossary import GLOSSARY
from reports.style import SCRIPT, STYLE
from reports.tables import table


def report_page(result, pictures):
    """The page as text. result: that of an `analysis.Analysis`. pictures: name -> (SVG texts, Chart)."""
    title = f"{result['net']} on {result['flags']['dataset']}"
    sections = [
        section(
            "Accuracy", picture(pictures, "accuracy"), tables.differences_table(result), picture(pictures, "sweep")
        ),
        section("Accuracy and cost", picture(pictures, "pareto"), comparison(result)),
        section(
            "What would regain accuracy",
            paragraphs(result["verdict"][1:]),
            picture(pictures, "alternatives"),
            tables.alternatives_table(result),
            picture(pictures, "repaired_layers"),
            tables.repairs_table(result),
        ),
        section("Classes", picture(pictures, "classes"), tables.classes_table(result)),
        section("Layers", picture(pictures, "error_parts"), tables.layer_table(result)),
        section(
            "Spikes", *(picture(pictures, name) for name in ("firing_rate", "density", "neurons")), saturated(result)
        ),
        section("Weights", picture(pictures, "weights")),
        section("Energy and latency", tables.energy_table(result), picture(pictures, "operations"), operations(result)),
        section(f"Hardware {result['hardware']['name']}", tables.hardware_table(result)),
        section("Glossary", glossary()),
        section("How it was made", seconds(result), tables.flags_table(result)),
    ]
    sections = [each for each in sections if each]
    body, rules = share_styles("\n".join(sections))
    return page(title, first_screen(result, title), body, STYLE + rules)


def page(title, first, body, style):
    """An HTML document with a list of its sections between the first screen and the rest."""
    heads = re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', body)
    links = "".join(f'<li><a href="#{name}">{words}</a></li>' for name, words in heads)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: report</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{first}\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n{body}\n</main>\n<script>{SCRIPT}</script>\n'
        "</body>\n</html>\n"
    )


def section(title, *parts):
    """A heading and the parts under it; nothing where all parts are empty."""
    parts = [part for part in parts if part]
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(title)}</h2>\n'
        + "\n".join(parts)
        + "\n</section>"
        if parts
        else ""
    )


def paragraphs(sentences):
    return "".join(f"<p>{in_html(sentence)}</p>" for sentence in sentences)


def in_html(text):
    """An escaped text whose flags stay whole: a browser would break a line behind their hyphens."""
    return re.sub(r"(?<![\w-])--\w+", lambda flag: f'<span class="flag">{flag[0]}</span>', escape(text))


def picture(pictures, name):
    """A chart as a figure of its panels, which stand below each other on a phone; empty if the chart does not exist."""
    if name not in pictures:
        return ""
    svgs, chart = pictures[name]
    kind = "single" if len(svgs) == 1 else "narrow" if chart.columns > 2 else ""
    panels = "".join(f"<div>{svg}</div>" for svg in svgs)
    described = escape(f"{chart.title}. {chart.caption}", quote=True)
    return (
        f'<figure>\n<h3>{escape(chart.title)}</h3>\n<div class="panels {kind}" role="img" aria-label="{described}">'
        f"{panels}</div>\n<figcaption>{escape(chart.caption)}</figcaption>\n</figure>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# the first screen


def first_screen(result, title):
    """What a user asks first: accuracy, timesteps, energy, chip, and what to try next."""
    answers = (timesteps_answer, energy_answer, chip_answer)
    return (
        f"<h1>{escape(title)}: a spiking network</h1>\n"
        f'<p class="note">{escape(what_was_converted(result))}</p>\n'
        f"{tables.top1_table(result)}\n{paragraphs(result['verdict'][:1])}\n"
        f'<div class="answers">{"".join(answer(*each(result)) for each in answers)}</div>\n{next_step(result)}'
    )


def answer(title, big, words):
    """A box with one number in large letters."""
    return (
        f'<div class="answer"><h2>{escape(title)}</h2><p class="big">{escape(big)}</p>'
        f'<p class="note">{in_html(words)}</p></div>'
    )


def what_was_converted(result):
    """The network and its conversion in one sentence."""
    flags = result["flags"]
    weights = flags["ann_weight"] or "random or built-in weights"
    epochs = f", finetuned for {flags['finetune_epochs']} epochs" if flags["finetune_epochs"] else ""
    later = flags["spike_epochs"] + flags["spike_epochs_unlabelled"]
    epochs += f", {later} more on its spikes" if later else ""
    preset = f" Preset {flags['preset']}." if flags.get("preset", "specification") != "specification" else ""
    return (
        f"{result['net']} ({weights}), {weights_in_words(flags['weight_bitwidth'])}{epochs}, T = {flags['timesteps']} "
        f"timesteps, reset by {flags['reset_mode']}.{preset}"
    )


def timesteps_answer(result):
    """The fewest timesteps within a point of the ANN."""
    fewest, images, T = result["accuracy"]["fewest_timesteps"], result["samples"], result["flags"]["timesteps"]
    title = "Timesteps within 1 point of the ANN"
    if fewest["measured"] is None:
        return title, f"more than T = {T}", f"measured on {images} test images"
    sure = f"the 95 % interval agrees from T = {fewest['sure']} on"
    if fewest["sure"] is None:
        sure = f"more images are needed to be sure, the 95 % interval is too wide up to T = {T}"
    return title, f"T = {fewest['measured']}", f"as measured on {images} test images; {sure}"


def energy_answer(result):
    """The energy of the SNN in shares of the ANN's."""
    ratios = {name: each["snn"] / each["ann"] for name, each in result["energy"].items() if each["ann"]}
    if not ratios:
        return "Energy against the ANN", "-", "no operations"
    name, *others = sorted(ratios, key=lambda name: name != "INT8")
    more = "".join(f", {ratios[other]:.2f} x in {other}" for other in others)
    images = result["analysis_images"]
    words = f"arithmetic in {name}{more}; an estimate without memory and communication, from {images} test images"
    return "Energy against the ANN", f"{ratios[name]:.2f} x", words


def chip_answer(result):
    """Whether the network fits the chip."""
    hardware = result["hardware"]
    asked = "the chip asked for" if hardware["is_asked_for"] else "the default chip (--hardware takes another)"
    if not hardware["over"]:
        return f"Hardware {hardware['name']}", "fits", f"every layer is within the limits of {asked}"
    over = hardware["over"]
    names = ", ".join(over[:3]) + (", ..." if len(over) > 3 else "")
    layers = "1 layer exceeds" if len(over) == 1 else f"{len(over)} layers exceed"
    return f"Hardware {hardware['name']}", "does not fit", f"{layers} the limits of {asked}: {names}"


def next_step(result):
    """The command to try next, to copy."""
    step = result["next"]
    return (
        '<div class="next"><h2>Try next</h2>'
        f'<div class="copy"><code>{in_html(step["command"])}</code><button type="button">Copy</button></div>'
        f'<p class="note">{in_html(step["reason"][:1].upper() + step["reason"][1:])}.</p></div>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# parts of sections


def comparison(result):
    """The table of the runs compared, if there are any."""
    return tables.runs_table(result) if len(result["compare"]) > 1 else ""


def saturated(result):
    """The saturated channels of every layer, by name."""
    rows = [("layer", "module path", "channels that spike at every step, with their share of neurons and images")]
    for name, layer in result["layers"].items():
        if layer["saturated"]:
            told = ", ".join(f"{each['name']} ({100 * each['share']:.0f} %)" for each in layer["saturated"])
            rows.append((name, layer["path"], told))
    images = f"{result['analysis_images']} test images"
    if len(rows) == 1:
        return f'<p class="note">No channel is saturated in 5 % or more of its neurons and images ({images}).</p>'
    return table(rows, f"Saturated channels, {images}: those of 5 % or more, at most five for each layer")


def operations(result):
    """Operations and what the numbers leave out."""
    steps = result["duration"]
    note = (
        "The estimate covers arithmetic only, without memory, communication and leakage. Its constants are for 45 nm "
        "(Horowitz, Computing's Energy Problem, ISSCC 2014). The SNN accumulates once per spike and synapse, adds "
        "biases (and the image's current) at every step, and multiplies in layers that read the image or stay ANN. "
        f"Timesteps for an image: every layer fires for {steps['firing']}, the next image starts after "
        f"{steps['interval']}, the answer is ready after {steps['latency']}."
    )
    return tables.operations_table(result) + f'<p class="note">{escape(note)}</p>'


def glossary():
    """The words of the report as a list."""
    rows = "".join(f"<dt>{escape(word)}</dt><dd>{escape(words)}</dd>" for word, words in GLOSSARY.items())
    return f"<dl>{rows}</dl>"


def seconds(result):
    """How long the report took."""
    times = result["seconds"]
    used, conversion = sum(times["report_cpu"].values()), sum(times["conversion"].values())
    words = (
        f"The conversion and its measurement took {conversion:.0f} s, this report {used:.0f} s of CPU time (estimated "
        f"before: {times['estimate']:.0f} s). report.json has all numbers of this page."
    )
    return f"<p>{escape(words)}</p>"
