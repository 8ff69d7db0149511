"""Tables of measured rows as Markdown, and their places in a page of docs/.

A place begins with the line `<!-- table NAME -->` and ends with `<!-- end -->`. All between them is replaced.
"""

import re
import statistics
import sys
from datetime import date

from benchmarks.tables import PLACES, filled_in

PLACE = re.compile(r"^<!-- table (\S+) -->\n(.*?)^<!-- end -->$", flags=re.DOTALL | re.MULTILINE)
MARKER = re.compile(r"^<!-- (table \S+|end) -->$", flags=re.MULTILINE)


def write_tables(path, texts):
    """Replace the tables of a page. texts: name -> Markdown, or None where rows are missing.

    What cannot be replaced stays as it is, and a line on stderr says so. Raises OSError for a page that cannot be read
    or written, and ValueError for markers that do not belong together.
    """
    from runtime.files import check_regular, write_atomically

    check_regular(path)
    with open(path, encoding="utf-8", newline="") as file:
        page = file.read()
    check_markers(path, page)
    places = {found[1] for found in PLACE.finditer(page)}
    for name, text in texts.items():
        if text is None or name not in places:
            reason = "rows are missing in the results" if text is None else f"{path} has no <!-- table {name} -->"
            print(f"table {name} is not written: {reason}", file=sys.stderr)

    def replaced(found):
        text = texts.get(found[1])
        return found[0] if text is None else f"<!-- table {found[1]} -->\n\n{text}\n\n<!-- end -->"

    new = PLACE.sub(replaced, page)
    if new != page:
        write_atomically(path, lambda temporary: save_text(temporary, new))


def save_text(path, text):
    """Write text as it is."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def check_markers(path, page):
    """Raise ValueError unless every beginning of a table is followed by its end, and no two have the same name."""
    open_table, seen = None, set()
    for found in MARKER.finditer(page):
        is_end = found[1] == "end"
        if is_end == (open_table is None) or found[1] in seen:
            line = page.count("\n", 0, found.start()) + 1
            raise ValueError(f"{path}, line {line}: {found[0]} is out of place, each table has one beginning and end")
        open_table = None if is_end else found[1]
        seen |= set() if is_end else {found[1]}
    if open_table:
        raise ValueError(f"{path}: <!-- {open_table} --> has no <!-- end -->, add it behind the table")


# ---------------------------------------------------------------------------------------------------------------------
# Accuracies


def table_of_rows(table, results):
    """A `tables.Table` as Markdown, with what holds for all rows and the command; None if `results` lacks a row.

    results: a `results.Results`.
    """
    steps = sorted({T for line in table.lines for T in line.timesteps})
    runs_of = {line: [results.with_facts(row.facts()) for row in table.rows_of(line)] for line in table.lines}
    runs = [run for runs in runs_of.values() for run in runs]
    if None in runs:
        return None
    lines = [(line, {T: [run for run in runs_of[line] if run["T"] == T] for T in line.timesteps}) for line in runs_of]
    headings = ("network, weight bits", "flags", "ANN", "quantized ANN", *(f"T = {T}" for T in steps))
    rows = [line_cells(line, by_T, steps) for line, by_T in lines]
    said = f"All rows also have `{table.common}`. " if table.common else ""
    seeds = max(len(line.seeds) for line in table.lines)
    said += f"Means and standard deviations of {seeds} seeds. " if seeds > 1 else ""
    command = command_of("accuracy.py", f"--tables {table.name}", table.places())
    return "\n\n".join(
        [markdown([(*headings, "spikes, synaptic operations per image"), *rows]), said + facts_of(runs), command]
    )


def line_cells(line, by_T, steps):
    """The cells of one line. by_T: T -> results of all seeds."""
    first = by_T[line.timesteps[0]]
    points = {T: points_below(runs, "snn_top1") for T, runs in by_T.items()}
    prices = f"T = {line.timesteps[0]}: {price_of(first)}"
    ann, quantized = f"{mean(first, 'ann_top1'):.2f} %", [points_below(runs, "qnet_top1") for runs in by_T.values()]
    each_T = quantized if len(set(quantized)) > 1 else quantized[:1]  # it depends on T where it has T activation levels
    flags = f"`{line.flags}`" if line.flags else "none"
    cells = [points.get(T, "") for T in steps]
    bits = ", ".join(map(str, line.bits)) if isinstance(line.bits, tuple) else line.bits
    return (f"{line.network.title}, {bits}", flags, ann, ", ".join(each_T), *cells, prices)


def points_below(runs, name):
    """The accuracy `name` minus the float network's, in points: the mean over the seeds, and the deviation."""
    points = [run[name] - run["ann_top1"] for run in runs]
    spread = f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else ""
    return f"{statistics.mean(points):+.2f}{spread}"


def price_of(runs):
    """Spikes in thousands, and synaptic operations in millions."""
    return f"{mean(runs, 'spikes') / 1e3:.0f} k, {mean(runs, 'synops') / 1e6:.1f} M"


def mean(runs, name):
    """The mean of a number over the seeds."""
    return statistics.mean(run[name] for run in runs)


# ---------------------------------------------------------------------------------------------------------------------
# Peers


def table_of_peers(table, results):
    """A `tables.PeersTable` as Markdown, with the command; None if `results` lacks a network."""
    rows, found = [("network", "recipe", "ANN", *(f"T = {T}" for T in table.timesteps))], []
    for peer in table.peers():
        wanted = {name: value for name, value in peer.facts("").items() if name != "mode"}
        runs = results.having(wanted)
        if not runs:
            return None
        for run in runs:
            points = [f"{run['snn_top1'][str(T)] - run['ann_top1']:+.2f}" for T in table.timesteps]
            rows.append((peer.title, run["mode"], f"{run['ann_top1']:.2f} %", *points))
        found += runs
    return "\n\n".join([markdown(rows), facts_of(found), command_of("peers.py", "", table.places(), "peers.json")])


def table_of_quantizers(table, results):
    """A `tables.QuantizersTable` as Markdown, with the command; None if `results` lacks a row."""
    rows, found = [("network", "mode", "ANN", *table.bits)], []
    for quantizer in table.quantizers():
        known = results.having({name: getattr(quantizer, name) for name in ("network", "dataset", "test_images")})
        if not known:
            return None
        for mode in dict.fromkeys(run["mode"] for run in known):
            runs = [results.with_facts(quantizer.facts(mode, bits)) for bits in table.bits]
            if None in runs:
                return None
            points = [points_below([run], "quantized_top1") for run in runs]
            rows.append((quantizer.title, mode, f"{runs[0]['ann_top1']:.2f} %", *points))
            found += runs
    said = f"{' and '.join(sorted({run['versions'] for run in found}))}. {facts_of(found)}"
    return "\n\n".join([markdown(rows), said, command_of("quantizers.py", "", table.places(), "quantizers.json")])


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def markdown(rows):
    """Rows of cells as a Markdown table; the first has the headings."""
    lines = [f"| {' | '.join(map(str, row))} |".replace("  |", " |") for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def facts_of(runs):
    """The sentence under a table: what the numbers are, the images, the machines and the dates."""
    images = " or ".join(f"{count:,}" for count in sorted({run["samples"] for run in runs}))
    machines = " and ".join(sorted({run["machine"] for run in runs}))
    days = sorted({run["date"] for run in runs})
    when = " to ".join(in_words(day) for day in dict.fromkeys((days[0], days[-1])))
    return f"Points of top-1 against the ANN, on {images} test images. {machines}, {when}:"


def in_words(day):
    """A date as text, "2026-11-27" as "27 November 2026"."""
    found = date.fromisoformat(day)
    return f"{found.day} {found:%B} {found.year}"


def command_of(script, flags, places, results="accuracy.json"):
    """The command that measures a table and writes it, as a code block. places: names of `tables.PLACES` it needs."""
    needed = "".join(filled_in(f" --{name} {{{name}}}", {name: PLACES[name][1]}) for name in places)
    words = f"$ python3 benchmarks/{script} {flags}{needed} --results {results} --write docs/accuracy.md".split()
    return f"```shell\n{' '.join(words)}\n```"
