"""Write docs/flags.md, the list of all flags, from the dataclasses of options.py.

    python3 tools/write_flags.py

A test asserts that docs/flags.md is up to date.
"""

import os
import sys
from dataclasses import fields

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from options import FIELDS, GROUPS
from presets import PRESETS, preset_options
from script_options import CONVERSION, OutputOptions

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "docs", "flags.md")
OF_PRESETS = """\
`--preset NAME` sets several flags at once; a flag that is given as well overrides it. With `--hardware` or
`--weight_bitwidth auto`, average poolings keep their neurons.
"""
SHOWN_TIMESTEPS = (4, 16, 64)  # presets set different options for few and for many timesteps
FORMER = {  # flags that became values of other flags; renamed flags are in the fields of options.py
    "--quantile Q": "--threshold Q",
    "--threshold quantile": "--threshold 0.999",
    "--weight_granularity channel": "--per_channel weights",
    "--granularity channel": "--per_channel spikes",
    "both of these": "--per_channel both",
    "--pretrained": "--ann_weight pretrained",
}
HEAD = """# All flags

`tools/write_flags.py` writes this page from `options.py` and `script_options.py`. The flags are those of
`ann2snn.py`; `analyse_error.py` has all of them but `--save_file`, `--results`, `--report` and the formats of
[export.py](export.md); it adds `--load FILE` (as `--ann_weight`) and `--out DIR` (the folder of the report,
`analysis/<network>`). Without `--` the names are the keyword arguments of `pipeline.convert_network` (but those of
network, data and files), `quantize_finetune` and `trans_ann2snn_weight`, with the same ranges.
"""


def page():
    """docs/flags.md as a string."""
    parts = [HEAD, presets_in_words()]
    for group in GROUPS:
        rows = [row(each) for each in all_fields() if each.metadata["group"] == group]
        if rows:
            parts.append(f"## {group[0].upper()}{group[1:]}\n\n{table(('flag', 'values', 'default', 'meaning'), rows)}")
    return "\n".join([*parts, former_flags()])


def all_fields():
    """Every field once, in the order of the help."""
    return {each.name: each for cls in (*CONVERSION, OutputOptions) for each in fields(cls)}.values()


def row(each):
    """The table cells of one flag."""
    facts = each.metadata
    flag = " ".join(f"`{name}`" for name in (facts.get("short"), f"--{each.name}") if name)
    return flag, values_of(each), default_of(each), facts["help"]


def values_of(each):
    """The values that a flag accepts, in words."""
    facts = each.metadata
    if isinstance(each.default, bool):
        return f"`--no-{each.name}` switches it off"
    if "choices" in facts:
        return ", ".join(f"`{choice}`" for choice in facts["choices"])
    return str(facts["span"]) if "span" in facts else facts.get("metavar", "").strip("{}").replace(",", ", ")


def default_of(each):
    """The default of a flag, in words."""
    if "default_help" in each.metadata:
        return each.metadata["default_help"]
    if each.default is False:
        return "off"
    return f"`{each.default:g}`" if is_real(each.default) else f"`{each.default}`"


def is_real(value):
    """Whether a default is a float."""
    return isinstance(value, float)


def presets_in_words():
    """The section on presets: the flags that each preset sets for SHOWN_TIMESTEPS."""
    rows = []
    for name in PRESETS:
        for timesteps in SHOWN_TIMESTEPS:
            flags = " ".join(flag_of(key, value, timesteps) for key, value in preset_options(name, timesteps).items())
            cells = f"`{name}`", f"{timesteps}", f"`{flags}`" if flags else "the defaults below"
            if not rows or rows[-1][::2] != cells[::2]:
                rows.append(cells)
    return f"## Presets\n\n{OF_PRESETS}\n{table(('preset', 'from T =', 'sets'), rows)}"


def flag_of(name, value, timesteps):
    """A flag of a preset as a user writes it; `listen` is written as T if it equals the timesteps."""
    value = "T" if name == "listen" and value == timesteps else f"{value:g}" if is_real(value) else value
    return f"--{name} {value}"


def former_flags():
    """The section on former names of flags, which still work."""
    rows = [(f"`{old}`", f"`--{each.name}`") for each in FIELDS.values() for old in each.metadata.get("old", ())]
    rows += [(f"`{old}`" if old.startswith("-") else old, f"`{new}`") for old, new in FORMER.items()]
    return f"## Former names\n\nThey work as before; `--help` does not show them.\n\n{table(('former', 'now'), rows)}"


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def main():
    os.makedirs(os.path.dirname(PATH), exist_ok=True)
    with open(PATH, "w", encoding="utf-8") as file:
        file.write(page())
    print(f"wrote {os.path.relpath(PATH)}")


if __name__ == "__main__":
    main()
