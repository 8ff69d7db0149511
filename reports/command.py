"""The command that repeats a run, or one with other flags: what a user copies."""

import shlex
from dataclasses import fields

from options import QuantizeOptions, defaults
from presets import preset_options
from reports.presets import preset_namespace
from script_options import CONVERSION, AnalysisOptions, LongRunOptions

ONCE = {**defaults(LongRunOptions), "compare": ()}  # options of one run, which its repetition does not need


def command_of(args, report, **changes):
    """The ann2snn.py command of `args` with `changes`, option -> value, and with `report`, the folder of its report.

    Flags whose value is the default, or that of the preset, are left out, and so are those of `ONCE`. A quantized
    network (--qnet) stays, unless the changes need another one.
    """
    given = {**vars(args), **ONCE, **changes}
    if {"preset", *(each.name for each in fields(QuantizeOptions))} & set(changes):
        given["qnet"] = None
    preset = given.get("preset", "specification")
    T, bits = given["timesteps"], given["weight_bitwidth"]
    own_bits = preset_options(preset, T).get("weight_bitwidth")
    asked = {} if bits == own_bits else {"bits": bits}  # some presets choose by the bits that the command names
    plain = {**defaults(*CONVERSION, AnalysisOptions), **preset_options(preset, T, hardware=given["hardware"], **asked)}
    words = ["python3", "ann2snn.py", str(given["net_name"])]
    words += ["--preset", preset] if preset != "specification" else []
    for each in (each for cls in (*CONVERSION, AnalysisOptions) for each in fields(cls)):
        value = given.get(each.name, plain[each.name])
        if value != plain[each.name] and f"--{each.name}" not in words:
            words += flag_of(each, value)
    return shlex.join([*words, "--report", report])


def flag_of(each, value):
    """The words of one flag."""
    if isinstance(each.default, bool):
        return [f"--{each.name}" if value else f"--no-{each.name}"]
    if isinstance(value, dict):
        value = ",".join(f"{name}={each}" for name, each in value.items())
    if isinstance(value, (tuple, list)):
        value = ",".join(map(str, value))
    return [f"--{each.name}", str(value)]


def command_with(args, flags, report):
    """The command of an alternative. flags: its name, such as "--timesteps 32" or "--preset exact"."""
    changes = changes_of(flags)
    if "preset" in changes:
        return command_of(preset_namespace(args, changes["preset"]), report, preset=changes["preset"])
    return command_of(args, report, **changes)


def changes_of(flags):
    """Option -> value of `--name value`, as the names of alternatives are; numbers as numbers."""
    name, value = flags.removeprefix("--").split(" ", 1)
    return {name: int(value) if value.isdigit() else value}
