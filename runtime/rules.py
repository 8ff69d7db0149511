"""Rules for the fields of a saved network: a check of the value, and a description of the allowed values.

A rule never raises an error, whatever the value, because a file may come from anyone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from runtime.torch_files import FLOATS, unusual_kind


@dataclass(frozen=True)
class Rule:
    """holds: value -> whether a field may have it. words: the allowed values in words."""

    holds: Callable
    words: str


def whole(least, most):
    def holds(value):
        return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most

    return Rule(holds, f"a whole number, {least} to {most}")


def instance(kind, words):
    return Rule(lambda value: isinstance(value, kind), words)


def one_of(*choices):
    """A rule that allows one of the given strings."""
    return Rule(lambda value: isinstance(value, str) and value in choices, ", ".join(map(repr, choices)))


def either(*rules):
    return Rule(lambda value: any(rule.holds(value) for rule in rules), " or ".join(rule.words for rule in rules))


def several(rule, least, most):
    """A rule for a tuple or list of `least` to `most` values that each follow `rule`."""

    def holds(value):
        return isinstance(value, (tuple, list)) and least <= len(value) <= most and all(map(rule.holds, value))

    count = least if least == most else f"{least} to {most}"
    return Rule(holds, f"{count} times {rule.words}")


def pair(rule):
    """A rule for one value, or one for height and one for width, that follow `rule`."""
    return Rule(either(rule, several(rule, 2, 2)).holds, f"{rule.words}, or two of them")


def tensor(*dtypes, positive=False):
    """A rule for a plain tensor of one of these types with finite values; its storage must hold every element.

    A small storage with stride 0 could claim any number of elements.
    """

    def holds(value):
        is_plain = isinstance(value, torch.Tensor) and unusual_kind(value) is None and value.dtype in dtypes
        if not is_plain or not value.numel() or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            return False
        return bool(torch.isfinite(value).all()) and not (positive and not bool((value > 0).all()))

    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Rule(holds, f"a tensor of {'positive' if positive else 'finite'} numbers ({names})")


NONE = Rule(lambda value: value is None, "None")
BOOL = instance(bool, "True or False")
TEXT = instance(str, "a string")
NAMES = Rule(several(TEXT, 0, 2**31).holds, "a tuple of strings")
DICT = instance(dict, "a dictionary")
NUMBER = Rule(
    lambda value: isinstance(value, Real) and not isinstance(value, bool) and -3e38 <= value <= 3e38, "a number"
)
POSITIVE = Rule(
    lambda value: isinstance(value, Real) and not isinstance(value, bool) and 0 < value <= 3e38, "a positive number"
)
STEPS = whole(1, 65536)
CHANNELS = whole(1, 2**31 - 1)
SIZE = pair(whole(1, 65536))  # size or stride of a window
PADDING = pair(whole(0, 4096))  # with a larger padding the zeros alone would fill the memory
DIM = whole(1, 8)
WEIGHTS = tensor(*FLOATS)
INTEGERS = tensor(torch.int8, torch.int32, *FLOATS)  # with 32-bit weights these are floats
POTENTIALS = tensor(torch.int32, *FLOATS)
