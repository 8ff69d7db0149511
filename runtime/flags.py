"""Flags: the parsers of their values, and the flags for dataclasses of options (`options.py`). Imports nothing slow.

add_options(parser, ConversionOptions, DataOptions)    # one flag per field
"""

import argparse
import math
import re
from dataclasses import fields

from runtime.cli import HelpAll
from runtime.ranges import THRESHOLDS, Real, Whole
from runtime.user_code import assignments

LARGEST_SIDE = 65536  # channels or pixels of an image
LARGEST = 2**31 - 1  # largest whole number; 32-bit counters of any library can hold it
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def whole_number(least, most=None, also=()):
    """An argparse type: an integer from `least` to `most`, or one of `also`."""
    span = f"{least} or more" if most is None else f"{least} to {most}"
    span += "".join(f", or {extra}" for extra in also)

    def convert(text):
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not (least <= number <= (number if most is None else most) or number in also):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {span}")
        if number > LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is over {LARGEST}")
        return number

    return convert


def number_in(span):
    """An argparse type: a number in a range of `runtime.ranges`, checked as in the Python calls."""

    def convert(text):
        try:
            is_word = text == (getattr(span, "word", "") or None)
            number = text if is_word else span.accepts(int(text) if isinstance(span, Whole) else float(text))
        except (ValueError, OverflowError):
            number = None
        if number is None and isinstance(span, Whole) and span.most == LARGEST and is_over(text, LARGEST):
            raise argparse.ArgumentTypeError(f"{text} is over {LARGEST}")
        if number is None:
            raise argparse.ArgumentTypeError(f"{text}: use {span}")
        return number

    return convert


def is_over(text, most):
    """Whether a text is a whole number above `most`."""
    try:
        return int(text) > most
    except ValueError:
        return False


def bitwidths(text):
    """An argparse type: one number of weight bits for all layers, one per layer ("8,4,4,4"), or "auto"."""
    if text == "auto":
        return text
    widths = tuple(map(whole_number(1, 8, also=(32,)), text.split(",")))
    return widths[0] if len(widths) == 1 or set(widths) == {32} else widths


def real_number(least, most=float("inf")):
    """An argparse type: a number from `least` to `most`."""

    def convert(text):
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")
        return number

    return convert


def memory_size(text):
    """An argparse type: a number of bytes; a suffix K, M or G multiplies it by 1024, 1024^2 or 1024^3."""
    number, factor = text, 1
    if text[-1:].upper() in UNITS:
        number, factor = text[:-1], UNITS[text[-1].upper()]
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a memory size such as 512M or 2G")
    return size


def memory_in_words(size):
    """A number of bytes as `memory_size` reads it, rounded up to two decimals: 1536 is 1.5K."""
    for unit, factor in reversed(UNITS.items()):
        if size >= factor:
            return f"{math.ceil(100 * size / factor) / 100:.10g}{unit}"
    return str(size)


def listening(text):
    """An argparse type: a number of steps from 0 on, or "auto"."""
    return text if text == "auto" else whole_number(0)(text)


def threshold(text):
    """An argparse type: a quantile above 0 and up to 1, or a name; "quantile" means the default quantile."""
    if text in ("quantile", *THRESHOLDS):
        return text
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a quantile above 0 up to 1, or one of {', '.join(THRESHOLDS)}")
    return number


def names(text):
    """An argparse type: names separated by commas."""
    return tuple(name for name in text.split(",") if name)


def numbers(least, open=False):
    """An argparse type: numbers separated by commas, one per channel, each from `least` on, or above it if `open`."""

    def convert(text):
        return tuple(number_in(Real(least, open=open))(part) for part in text.split(","))

    return convert


def input_shape(text):
    """An argparse type: channels, height and width, separated by commas."""
    shape = tuple(whole_number(1, LARGEST_SIDE)(part) for part in text.split(","))
    if len(shape) != 3:
        raise argparse.ArgumentTypeError(f"{text} is not C,H,W such as 3,32,32")
    return shape


def net_args(text):
    """An argparse type: NAME=VALUE pairs, separated by commas."""
    try:
        return assignments(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


PARSERS = {
    "bitwidths": bitwidths,
    "threshold": threshold,
    "listening": listening,
    "names": names,
    "memory_size": memory_size,
    "numbers": numbers(-float("inf")),
    "deviations": numbers(0, open=True),
    "input_shape": input_shape,
    "net_args": net_args,
}


def add_options(parser, *classes, groups=(), **defaults):
    """Add a flag for every field of the dataclasses of options; former names become hidden flags.

    groups: titles of the help groups, in order. defaults: defaults that replace those of the fields.
    """
    by_title = {title: parser.add_argument_group(title) for title in groups}
    for cls in classes:
        for each in fields(cls):
            if f"--{each.name}" not in parser._option_string_actions:  # two dataclasses may share a base class
                group = by_title.get(each.metadata["group"], parser)
                add_option(parser, group, each, defaults.get(each.name, each.default))


def add_option(parser, group, each, default):
    """Add the flag of one field, and its hidden former flags, to a group of the parser."""
    facts = each.metadata
    in_words = facts.get("default_help", "off" if default is False else "%(default)s")
    details = {"default": default, "help": f"{facts['help']} ({in_words})"}
    brief = re.split(r"[;:.] ", facts["help"])[0]
    if isinstance(each.default, bool):
        details["action"] = argparse.BooleanOptionalAction
    elif "span" in facts:
        details["type"] = number_in(facts["span"])
    elif "parse" in facts:
        details["type"] = PARSERS[facts["parse"]]
    elif "choices" in facts:
        details["choices"] = facts["choices"]
    if "metavar" in facts:
        details["metavar"] = facts["metavar"]
    flags = [facts["short"]] if "short" in facts else []
    action = group.add_argument(*flags, f"--{each.name}", **details)
    if facts.get("main"):
        parser.main_actions[action] = f"{brief} ({in_words})"
    hidden = {key: value for key, value in details.items() if key in ("type", "choices", "action")}
    for flag in facts.get("old", ()):
        parser.add_argument(flag, dest=each.name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **hidden)


def add_help_all(parser):
    """Add `--help-all`, and a usage line without the flags, to a OneLineParser."""
    parser.add_argument("--help-all", action=HelpAll)
    parser.main_actions |= {action: action.help for action in parser._actions if action.dest in ("help", "help_all")}
    parser.usage = "%(prog)s net_name [flags]"
