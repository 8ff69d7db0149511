"""Intervals and tests on counts of right and wrong answers. All functions are pure.

An accuracy is a share of n images. Two networks that answered the same images are compared by the images on which they
differ: `lost`, where only the first is right, and `gained`, where only the second is.
"""

from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE  # the largest p-value of a claim
Z = stats.norm.ppf(1 - ALPHA / 2)
POWER = 0.8  # chance to see a difference of `visible_difference`


def wilson(right, images):
    """The 95 % interval of a share of right answers, in percent (Wilson, JASA 1927)."""
    interval = stats.binomtest(right, images).proportion_ci(CONFIDENCE, method="wilson")
    return 100 * interval.low, 100 * interval.high


def mcnemar(lost, gained):
    """The two-sided mid-p value of McNemar's test (Fagerland, Lydersen and Laake, BMC Med. Res. Meth. 2013).

    Under the null hypothesis each of the `lost + gained` images is lost or gained with the same probability.
    """
    differing, fewer = lost + gained, min(lost, gained)
    if not differing:
        return 1.0
    at_most, equal = stats.binom.cdf(fewer, differing, 0.5), stats.binom.pmf(fewer, differing, 0.5)
    return float(min(1.0, 2 * at_most - equal))


def paired_interval(lost, gained, images):
    """The 95 % interval of a paired difference of accuracies, in points (Bonett and Price, Stat. in Medicine 2012).

    Their adjustment adds one image to each of the two counts, which keeps the interval honest for few images.
    """
    first, second = (lost + 1) / (images + 2), (gained + 1) / (images + 2)
    centre = second - first
    reach = Z * ((first + second - centre**2) / (images + 2)) ** 0.5
    return 100 * max(-1.0, centre - reach), 100 * min(1.0, centre + reach)


def unpaired_interval(first, second):
    """The 95 % interval of the difference of two shares on different images, in points (Newcombe, method 10, 1998).

    first, second: (right, images).
    """
    shares = [100 * right / images for right, images in (first, second)]
    (low1, high1), (low2, high2) = wilson(*first), wilson(*second)
    difference = shares[1] - shares[0]
    below = ((shares[1] - low2) ** 2 + (high1 - shares[0]) ** 2) ** 0.5
    above = ((high2 - shares[1]) ** 2 + (shares[0] - low1) ** 2) ** 0.5
    return difference - below, difference + above


def fisher(first, second):
    """The two-sided p-value of Fisher's exact test for two shares on different images. first, second: as above."""
    table = [[right, images - right] for right, images in (first, second)]
    return float(stats.fisher_exact(table).pvalue)


def p_in_words(p):
    """A p-value with two digits, or three beside `ALPHA`; how far below 0.001 it lies means little."""
    digits = 3 if abs(p - ALPHA) < 0.005 else 2  # 0.0496, which is a claim, would be 0.05
    return "<0.001" if p < 0.001 else f"{p:.{digits}g}"


def holm(p_values):
    """p-values corrected for their number, in their order (Holm, Scandinavian Journal of Statistics 1979)."""
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values, dtype=float)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(raised).clip(max=1)
    return corrected.tolist()


def visible_difference(differing, images):
    """The points by which two networks must differ for McNemar's test to see it in 4 of 5 samples of `images` images.

    differing: images on which two such networks differ; with few of them, at least 5 have to go the same way.
    """
    share = max(differing, 1) / images
    asked = (Z + stats.norm.ppf(POWER)) * (share / images) ** 0.5
    return 100 * max(asked, 5 / images)  # 5 of 5 have p = 0.031, 4 of 4 have 0.0625


@dataclass(frozen=True)
class Paired:
    """The difference of two networks on the same images. points: second minus first. interval: its 95 %, in points.

    lost, gained: images that only the first, only the second has right. p: McNemar's mid-p value, not corrected.
    """

    points: float
    interval: tuple
    lost: int
    gained: int
    images: int
    p: float

    def to_dict(self):
        return asdict(self)


def compare(first, second):
    """The Paired difference of `second` minus `first`, bool [N] each: which images they have right.

    Raises ValueError for different numbers of images.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} answers cannot be paired")
    lost, gained, images = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    interval = paired_interval(lost, gained, images)
    return Paired(100 * (gained - lost) / images, interval, lost, gained, images, mcnemar(lost, gained))


def to_hex(right):
    """bool [N] as text: 4 answers a digit, filled up with zeros."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def from_hex(text, images):
    """bool [N] of `to_hex`. Raises ValueError for a text of another length."""
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    if len(packed) != -(-images // 8):
        raise ValueError(f"{len(packed)} bytes do not hold the answers for {images} images")
    return np.unpackbits(packed, count=images).astype(bool)
