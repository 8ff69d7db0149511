"""The order of the trials, stage by stage, and what the time limit leaves out.

    left_out = search(runner, record, groups, limits, clock)

A trial starts only if its estimate fits into the time that is left. Epochs without labels are halved until they fit
into a fair share of it: that of one among the numbers of timesteps and bits whose turn it is.
A trial that treats average poolings in another way than its preset is left out of the later stages where that way did
not help the conversions alone.
"""

import sys
from dataclasses import dataclass
from itertools import zip_longest

from searching.choice import gain
from searching.trials import CONVERT, LABELS, LEARN, STAGES, Trial, stage_of, with_fewer_epochs

TIME = "time"  # the reason of a trial that would not end in time


@dataclass(frozen=True)
class LeftOut:
    """A trial that was not started, and why; seconds: the estimate, or None where time is not the reason."""

    trial: object
    reason: str
    seconds: float = None


def search(runner, record, groups, limits, clock):
    """Run the trials of all groups, and add each row to the record; returns a list of LeftOut.

    groups: (T, bits) -> trials of `trials.plan`. A line on stderr follows every trial.
    """
    left_out = []
    for stage in STAGES:
        for turn in turns(groups, stage, runner):
            turn = [trial for trial in turn if not is_done(trial, record, limits)]
            for place, trial in enumerate(turn):
                reason = useless(trial, record, runner)
                if reason:
                    left_out.append(LeftOut(trial, reason))
                    continue
                fitting, seconds = fitted(trial, runner, record, limits, clock, len(turn) - place)
                if fitting is not trial:
                    left_out.append(LeftOut(trial, TIME, seconds))
                if fitting is not None:
                    record.add(runner.run(fitting, rivals_in(record), limits, clock))
                    print(line_of(record.rows[fitting.key()], runner, clock), file=sys.stderr)
    return left_out


def is_done(trial, record, limits):
    """Whether a trial was measured or refused; one that was over a limit counts only while it still is."""
    row = record.rows.get(trial.key())
    return row is not None and (not row.over_limit or bool(limits.over(row)))


def turns(groups, stage, runner):
    """Lists of the trials of a stage: the first of every group, then the second of every group, and so on."""
    of_stage = [[t for t in trials if stage_of(runner.shared.args(t)) == stage] for trials in groups.values()]
    return [[trial for trial in trials if trial is not None] for trials in zip_longest(*of_stage)]


def useless(trial, record, runner):
    """Why a trial is not worth its time, or "": labels that cannot be used, poolings that did not help."""
    args = runner.shared.args(trial)
    stage = stage_of(args)
    if stage == LABELS and runner.images.train is None:
        return "it trains with labels, and it is not known which images of these data are held out"
    own_choice = trial.flags.get("avgpool")
    if own_choice and stage not in (CONVERT, LEARN) and not poolings_help(own_choice, trial, record, runner):
        return f"--avgpool {own_choice} did not help the conversions without epochs"
    return ""


def poolings_help(choice, trial, record, runner):
    """Whether the best conversion alone with this `--avgpool` is better than the best with another, for T and bits.

    Those that listen count only if all do. Where one of the two was not measured, it may help.
    """
    of_trial = [row for row in record.rows.values() if (row.timesteps, row.bits) == (trial.timesteps, trial.bits)]
    measured = [(row, runner.shared.args(Trial(row.timesteps, row.bits, row.flags))) for row in of_trial if row.hits]
    alone = [(row, args) for row, args in measured if stage_of(args) in (CONVERT, LEARN)]
    alone = [(row, args) for row, args in alone if not row.listens] or alone
    own = [gain(row, runner.ann_hits) for row, args in alone if args.avgpool == choice]
    others = [gain(row, runner.ann_hits) for row, args in alone if args.avgpool != choice]
    return not own or not others or max(own) > max(others)


def fitted(trial, runner, record, limits, clock, sharing=1):
    """`trial, seconds`: the trial, or one with fewer epochs that fits, or None; the full estimate.

    sharing: how many trials share the time that is left. A trial whose epochs cannot be halved may take all of it.
    """
    full = None
    while trial is not None and clock.left() > 0:
        args = runner.shared.args(trial)
        seconds = runner.estimate(args, clock.left())
        full = seconds if full is None else full
        fewer = with_fewer_epochs(trial, args)
        if seconds <= clock.left() / (1 if fewer is None else sharing):
            return (None if is_done(trial, record, limits) else trial), full
        trial = fewer
    return None, full


def rivals_in(record):
    """A function: row -> the complete rows of the same T, weight bits and kind, listening or not."""

    def rivals(row):
        kind = row.timesteps, row.bits, row.listens
        rows = [each for each in record.rows.values() if each.is_complete]
        return [each for each in rows if (each.timesteps, each.bits, each.listens) == kind]

    return rivals


def line_of(row, runner, clock):
    """A line on a trial that just ended."""
    seconds = sum(cost[2] for cost in row.costs)
    what = f"T={row.timesteps}, {row.bits} bits, {row.name()}"
    if row.refused:
        return f"{what}: left out, {row.refused}"
    share = 100 * sum(row.hits) / len(row.hits)
    stopped = f", stopped, {row.worse} is better" if row.worse else ""
    left = f"{max(0.0, clock.left()) / 60:.1f} of {clock.minutes:g} minutes left"
    points = f"{gain(row, runner.ann_hits):+.2f} against the float network"
    return f"{what}: {share:.2f} % of {len(row.hits)} images ({points}){stopped}; {seconds:.0f} s, {left}"
