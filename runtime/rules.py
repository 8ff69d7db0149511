"""Rules: what one field of a saved network may hold, and in words which values those are.

A rule never fails on a value, whatever it is: files come from strangers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from runtime.torch_files import FLOATS, unusual_kind


@dataclass(frozen=True)
class Rule:
    """Whether a field may hold a value, and in words which ones."""

    holds: Callable
    words: str


def whole(least, most):
    def holds(value):
        return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most

    return Rule(holds, f"a whole number, {least} to {most}")


def instance(kind, words):
    return Rule(lambda value: isinstance(value, kind), words)


def one_of(*choices):
    """One of these strings."""
    return Rule(lambda value: isinstance(value, str) and value in choices, ", ".join(map(repr, choices)))


def either(*rules):
    return Rule(lambda value: any(rule.holds(value) for rule in rules), " or ".join(rule.words for rule in rules))


def several(rule, least, most):
    """A tuple or list of `least` to `most` such values."""

    def holds(value):
        return isinstance(value, (tuple, list)) and least <= len(value) <= most and all(map(rule.holds, value))

    count = least if least == most else f"{least} to {most}"
    return Rule(holds, f"{count} times {rule.words}")


def pair(rule):
    """One value for height and width, or two."""
    return Rule(either(rule, several(rule, 2, 2)).holds, f"{rule.words}, or two of them")


def tensor(*dtypes, positive=False):
    """A tensor of one of these types with finite values, which lie in memory as often as it says."""

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
POSITIVE = Rule(
    lambda value: isinstance(value, Real) and not isinstance(value, bool) and 0 < value <= 3e38, "a positive number"
)
STEPS = whole(1, 65536)
CHANNELS = whole(1, 2**31 - 1)
SIZE = pair(whole(1, 65536))  # of a window, and between windows
PADDING = pair(whole(0, 4096))  # beyond it, zeros alone would fill the memory
DIM = whole(1, 8)
WEIGHTS = tensor(*FLOATS)
INTEGERS = tensor(torch.int8, torch.int32, *FLOATS)  # floats at 32 bits
POTENTIALS = tensor(torch.int32, *FLOATS)
