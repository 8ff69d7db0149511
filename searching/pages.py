"""What a search prints and writes: the table, the commands of the winners, what was left out, and the figure."""

from runtime.files import write_folder
from searching.choice import gain, pareto_front, winners
from searching.order import TIME
from searching.trials import LABELS, Trial, stage_of
from spike_dag import format_table

HEADINGS = ("T", "bits", "flags", "images", "top-1 %", "points", "interval", "latency", "synops", "note")
AFTER_TRAINING = "  # trained without the images held out in the search, and with them here"


def table_of(record, ann_hits, limits):
    """The rows of the printed table, its head first: the most accurate of every T and bit width first."""
    notes = notes_of(record, ann_hits, limits)
    rows = sorted(record.rows.values(), key=lambda row: (row.timesteps, row.bits, -gain(row, ann_hits)))
    return [HEADINGS, *(cells_of(row, ann_hits, notes) for row in rows if row.hits)]


def cells_of(row, ann_hits, notes):
    """The cells of a trial that was measured."""
    share, points = 100 * sum(row.hits) / len(row.hits), gain(row, ann_hits)
    steps = row.timesteps, row.bits, row.name(), len(row.hits), f"{share:.2f}", f"{points:+.2f}"
    return (*steps, row.interval, row.latency, f"{row.synops / 1e6:.2f}M", notes.get(row.key, ""))


def notes_of(record, ann_hits, limits):
    """Key of a row -> whether it won, is on the front, was stopped, or is over a limit."""
    rows = list(record.rows.values())
    notes = {row.key: f"over {limits.over(row)}" for row in rows if limits.over(row)}
    notes |= {row.key: "stopped" for row in rows if row.worse}
    notes |= {row.key: "front" for row in pareto_front(rows, ann_hits, limits)}
    for found in winners(rows, limits).values():
        notes |= {row.key: name for name, row in reversed(found.items())}
    return notes


def commands_of(record, ann_hits, limits, shared):
    """`(title, command)` of the winners: the most accurate for every T and bit width, and that of T steps per image."""
    for (timesteps, bits), found in winners(record.rows.values(), limits).items():
        for name, row in found.items():
            if name == "in T steps" and row is found["most accurate"]:
                continue
            points = f"{gain(row, ann_hits):+.2f} points on {len(row.hits)} images held out"
            steps = f"{row.interval} steps per image, answer after {row.latency}"
            trial = Trial(row.timesteps, row.bits, row.flags, row.preset)
            note = AFTER_TRAINING if stage_of(shared.args(trial)) == LABELS else ""
            yield f"T={timesteps}, {bits} bits, {name}: {points}, {steps}", shared.command(trial) + note


def lines_left_out(left_out, clock):
    """What was not tried, and why, in lines: one for all T that a trial was left out for."""
    together = {}
    for each in left_out:
        together.setdefault((each.reason, each.trial.bits, each.trial.name()), []).append(each)
    lines = []
    for (reason, bits, name), same in together.items():
        steps = ", ".join(f"{each.trial.timesteps}{minutes_of(each)}" for each in same)
        words = "no time left" if reason == TIME else "left out"
        lines.append(f"{words}: {bits} bits, {name}, T = {steps}" + (f": {reason}" if reason != TIME else ""))
    if any(each.reason == TIME for each in left_out):
        lines.append(f"the same command goes on with them, for another {clock.minutes:g} minutes")
    return lines


def minutes_of(left):
    """The estimate of a trial that was left out, in parentheses, or ""."""
    return "" if left.seconds is None else f" ({left.seconds / 60:.1f} min)"


def write_pages(folder, record, ann_hits, limits, commands):
    """Write commands.txt and the figure front.png into a folder, whose other files stay."""
    script = "".join(f"# {title}\n{command}\n" for title, command in commands)
    files = {"commands.txt": script.encode(errors="surrogateescape")}
    if any(row.hits for row in record.rows.values()):
        from reports.drawing import render_png
        from searching.figures import front_chart

        files["front.png"] = render_png(front_chart(list(record.rows.values()), ann_hits, limits))
    write_folder(folder, files)


def print_pages(record, ann_hits, limits, commands, left_out, clock):
    """Print the table, the commands, and what was left out."""
    share = 100 * sum(ann_hits) / len(ann_hits)
    print(format_table(table_of(record, ann_hits, limits)))
    print(f"points: top-1 against the float network ({share:.2f} % of {len(ann_hits)} training images held out)")
    for row in record.rows.values():
        if row.refused:
            print(f"left out: T={row.timesteps}, {row.bits} bits, {row.name()}: {row.refused}")
    print("\n".join([*lines_left_out(left_out, clock), *(f"{title}\n  {command}" for title, command in commands)]))
