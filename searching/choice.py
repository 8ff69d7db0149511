"""The choice among trials: paired comparisons on the same images, the winner for every T, and the Pareto front.

Two trials are compared on the images that both saw. Images on which both are right, or both wrong, say nothing; of the
others each is right on some. If these are as good, the split is that of fair coins: the exact test of McNemar
(Psychometrika 1947).
"""

import math
from dataclasses import dataclass

STOPPED = 0.01  # a trial stops if as few wins against the best, or fewer, had this probability were it as good
SURER = 0.1  # a trial that is no preset replaces the best preset if its gain had this probability by chance, at most


def probability_of_wins(wins, losses):
    """The probability of `wins` or more among `wins + losses` fair coins."""
    total = wins + losses
    return sum(math.comb(total, k) for k in range(wins, total + 1)) / 2**total


def wins_and_losses(hits, others):
    """The number of images on which only the first is right, and only the second, among those that both saw."""
    pairs = list(zip(hits, others))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def is_surely_better(hits, others, probability):
    """Whether the first is better than the second, on the images that both saw, by more than chance."""
    wins, losses = wins_and_losses(hits, others)
    return wins > losses and probability_of_wins(wins, losses) <= probability


@dataclass(frozen=True)
class Limits:
    """What the user allows: synaptic operations per image, and steps until the answer; None for any number."""

    synops: float = None
    latency: int = None

    def over(self, row):
        """Which limit a row is over, as text, or ""."""
        if self.latency is not None and row.latency > self.latency:
            return f"--max_latency: {row.latency} steps"
        if self.synops is not None and row.synops > self.synops:
            return f"--max_synops: {row.synops:.3g}"
        return ""


def best_of(rows):
    """The row with the largest share of right classes on the images that all of them saw, or None.

    Of equal ones that with the lower latency, then with fewer synaptic operations, wins.
    """
    most = max((len(row.hits) for row in rows), default=0)
    rows = [row for row in rows if row.hits and len(row.hits) >= most / 2]  # not those that the time limit cut off
    if not rows:
        return None
    common = min(len(row.hits) for row in rows)
    return max(rows, key=lambda row: (sum(row.hits[:common]), -row.latency, -row.synops))


def winner_of(rows, limits):
    """The row to recommend, or None without any.

    It is the best preset, unless others are better by more than chance; then it is the best of these. So noise on the
    images held out does not displace a preset that was measured on many networks.
    """
    rows = [row for row in rows if row.is_complete and not limits.over(row)]
    preset = best_of([row for row in rows if row.preset])
    if preset is None:
        return best_of(rows)
    better = [row for row in rows if is_surely_better(row.hits, preset.hits, SURER)]
    return best_of(better) or preset


def winners(rows, limits):
    """(T, bits) -> {"most accurate": row, "in T steps": row} among rows; those that there are none of are left out."""
    groups = {}
    for row in rows:
        groups.setdefault((row.timesteps, row.bits), []).append(row)
    found = {}
    for group, members in sorted(groups.items()):
        best = winner_of(members, limits)
        plain = winner_of([row for row in members if not row.listens], limits)
        best = plain if plain and best_of([plain, best]) is plain else best  # as accurate, and sooner
        found[group] = {name: row for name, row in (("most accurate", best), ("in T steps", plain)) if row}
    return found


def gain(row, ann_hits):
    """Points of top-1 against the float network on the same images; 0 without any."""
    images = min(len(row.hits), len(ann_hits))
    return 100 * (sum(row.hits[:images]) - sum(ann_hits[:images])) / images if images else 0.0


def pareto_front(rows, ann_hits, limits):
    """The rows that no other beats: in accuracy, steps from image to image, synaptic operations and weight bits."""
    rows = [row for row in rows if row.is_complete and not limits.over(row)]
    prices = [(-gain(row, ann_hits), row.interval, row.synops, bits_of(row)) for row in rows]
    return [
        row
        for row, price in zip(rows, prices)
        if not any(other != price and all(a <= b for a, b in zip(other, price)) for other in prices)
    ]


def bits_of(row):
    """The mean weight bits of a row's layers; those that the chip chooses count as 8."""
    widths = [int(bits) if bits.isdigit() else 8 for bits in row.bits.split(",")]
    return sum(widths) / len(widths)
