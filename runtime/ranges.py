"""Ranges of numbers, shared by the flags and the Python calls.

check_number("finetune_lr", 0.01, Real(0))     # the number, or a ValueError that names it and its range
"""

import math
import numbers
from dataclasses import dataclass

LEAST_ERROR = ("mse", "spikes")  # rules that search for the lambda of least squared error
THRESHOLDS = ("max", *LEAST_ERROR)  # rules by which lambda is chosen, besides a quantile


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `least` to `most`, of any numeric type: 8.0 and NumPy's 8 count as 8."""

    least: int
    most: int = 2**31 - 1  # 32-bit counters of any library can hold it

    def accepts(self, value):
        """The value as a plain number, or None where it is none of these."""
        is_whole = isinstance(value, numbers.Real) and not isinstance(value, bool)
        is_whole = is_whole and math.isfinite(value) and value == int(value)
        return int(value) if is_whole and self.least <= value <= self.most else None

    def __str__(self):
        span = f"{self.least} or more" if self.most == Whole(0).most else f"{self.least} to {self.most}"
        return f"a whole number, {span}"


@dataclass(frozen=True)
class Real:
    """Finite numbers from `least` to `most`; if `open`, without `least` itself. word: a word that is allowed, too."""

    least: float
    most: float = math.inf
    open: bool = False
    word: str = ""

    def accepts(self, value):
        """The value as a plain number, or the word; None where it is none of these."""
        if self.word and isinstance(value, str) and value == self.word:
            return value
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            return None
        inside = self.least <= value <= self.most and not (self.open and value == self.least)
        return float(value) if inside else None

    def __str__(self):
        bound = "above" if self.open else "of at least" if self.most == math.inf else "from"
        upper = "" if self.most == math.inf else f" to {self.most:g}"
        return f"a number {bound} {self.least:g}{upper}{f' or {self.word}' if self.word else ''}"


def check_number(name, value, span, hint=""):
    """The value as a plain number. Raises ValueError, with `name` and the range, if it is not in `span`."""
    number = span.accepts(value)
    if number is None:
        raise ValueError(f"{name} {value!r}: use {span}{hint}")
    return number
