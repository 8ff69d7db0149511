"""The range of every option with a number in it, in one table: for the flags and for the calls in Python alike.

check_option("finetune_lr", 0.01)     # the number, or a ValueError that names the option and its range
"""

import math
import numbers
from dataclasses import dataclass


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `least` to `most`; 8.0, and NumPy's numbers, count as 8."""

    least: int
    most: int = 2**31 - 1  # what counters of any library hold

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
    """Numbers from `least` to `most`, without `least` itself where it is `open`; never NaN, and finite."""

    least: float
    most: float = math.inf
    open: bool = False

    def accepts(self, value):
        """The value as a plain number, or None where it is none of these."""
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            return None
        inside = self.least <= value <= self.most and not (self.open and value == self.least)
        return float(value) if inside else None

    def __str__(self):
        if self.most == math.inf:
            return f"a number {'above' if self.open else 'of at least'} {self.least:g}"
        return f"a number {'above' if self.open else 'from'} {self.least:g} to {self.most:g}"


SHARE = Real(0, 1)

RANGES = {
    "timesteps": Whole(1, 65536),
    "listen": Whole(0, 65536),
    "quantile": Real(0, 1, open=True),
    "hold_back": SHARE,
    "initial_potential": SHARE,
    "calibration_samples": Whole(1),
    "activation_levels": Whole(1, 65536),
    "finetune_epochs": Whole(0),
    "finetune_lr": Real(0),
    "finetune_wd": Real(0),
    "finetune_momentum": SHARE,
    "finetune_damping": Real(0),
    "finetune_distill": SHARE,
    "finetune_snn": Whole(0),
    "calibration_epochs": Whole(0),
    "finetune_snn_lr": SHARE,
    "samples": Whole(1),
}


def check_option(name, value, hint=""):
    """The value of option `name` as a plain number. Raises ValueError where it is out of its range (`RANGES`)."""
    number = RANGES[name].accepts(value)
    if number is None:
        raise ValueError(f"{name} {value!r}: use {RANGES[name]}{hint}")
    return number
