"""Results of other runs beside those of a report: files of this tool, or of another tool in a small JSON form.

    {"name": "another tool", "top1": 91.3, "samples": 10000, "timesteps": 8, "synops": 1250000.0}

top1 is in percent and samples the number of test images; timesteps and synops (synaptic operations per image) may be
missing, and then the run has no place in the plot over operations. A file may hold a list of such objects. Files of
`--results` and report.json are read as they are. Two reports on the same test images are compared image by image.
"""

import json
import math
import os
from dataclasses import asdict, dataclass

import numpy as np

from reports.accuracy import difference
from reports.statistics import ALPHA, from_hex, holm, wilson

FORM = 'an object with "name", "top1" and "samples"'
DAMAGED = "is a damaged report.json"


@dataclass
class Run:
    """One run. top1 in percent of `images` test images. right: `statistics.to_hex`. labels: `accuracy.fingerprint`."""

    name: str
    top1: float
    images: int
    timesteps: int = None
    synops: float = None
    right: str = None
    labels: str = None

    @property
    def hits(self):
        """The number of right answers."""
        return round(self.top1 * self.images / 100)


def read_runs(paths):
    """The Runs of some files. Raises OSError for a file that cannot be read, ValueError for another content."""
    runs = []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except OSError as error:
            raise OSError(f"cannot read {path} ({error.strerror}), which --compare names") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON ({error}), --compare takes {FORM}") from error
        if found == []:
            raise ValueError(f"{path} holds no run, --compare takes {FORM}")
        for each in found if isinstance(found, list) else [found]:
            runs.append(run_of(each, path))
    return runs


def run_of(found, path):
    """The Run of one object of a file. Raises ValueError, with the file, for missing or impossible values."""
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, --compare takes {FORM}")
    try:
        known = of_report(found, path) or of_results(found, path) or of_other_tool(found, path)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} {DAMAGED} ({type(error).__name__}: {error}), write it again") from error
    for key in ("top1", "samples"):
        if not is_number(known[key]):
            raise ValueError(f"{path} has no number {key}, --compare takes {FORM}")
    top1, images = known["top1"], known.pop("samples")
    if not 0 <= top1 <= 100 or images < 1 or images != int(images):
        raise ValueError(f"{path} has top1 {top1} of {images} samples, give percent and a whole number of images")
    for key in ("timesteps", "synops"):
        if known[key] is not None and not (is_number(known[key]) and known[key] > 0):
            raise ValueError(f"{path} has {key} {known[key]!r}, give a number above 0 or leave it out")
    run = Run(**{**known, "name": str(known["name"]), "images": int(images)})
    check_answers(run, path)
    return run


def check_answers(run, path):
    """Raise ValueError if the answers of a report do not belong to its number of images."""
    if run.right is None:
        return
    try:
        hits = int(from_hex(run.right, run.images).sum())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} {DAMAGED} (answers: {error}), write it again") from error
    if hits != run.hits:
        raise ValueError(f"{path} {DAMAGED} ({hits} right answers, top1 says {run.hits}), write it again")


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def of_report(found, path):
    """The values of a report.json with intervals; None for another file."""
    accuracy = found.get("accuracy")
    if not isinstance(accuracy, dict) or not isinstance(accuracy.get("snn"), dict):
        return None
    operations = found.get("operations", {}).values()
    return {
        **{"name": named(found, path), "top1": accuracy["snn"].get("top1"), "samples": found.get("samples")},
        **{"timesteps": found.get("flags", {}).get("timesteps"), "labels": accuracy.get("labels")},
        **{"synops": sum(each["synops"] for each in operations) or None},
        **{"right": accuracy.get("right", {}).get("snn")},
    }


def of_results(found, path):
    """The values of a file of --results; None for another file."""
    if "snn_top1" not in found:
        return None
    known = {"name": named(found, path), "top1": found["snn_top1"], "samples": found.get("samples")}
    return {**known, "timesteps": found.get("timesteps"), "synops": None}


def of_other_tool(found, path):
    """The values of the small form."""
    known = {key: found.get(key) for key in ("top1", "samples", "timesteps", "synops")}
    return {"name": found.get("name") or os.path.basename(path), **known}


def named(found, path):
    """A name for a run of this tool: the network, and the file or its folder, which tell runs of one network apart."""
    name, folder = os.path.basename(path), os.path.basename(os.path.dirname(os.path.abspath(path)))
    return f"{found.get('net', 'network')} ({folder if name == 'report.json' else name})"


def compare_runs(runs, accuracy, name, timesteps, synops):
    """Rows of the comparison as dicts, this run first, each with its 95 % interval and difference to this run.

    accuracy: as `accuracy.accuracy_facts` gives it. "p" is corrected for the number of runs (Holm); "paired" says
    whether both have answered the same images.
    """
    own = accuracy["snn"]
    mine = Run(name, own["top1"], own["images"], timesteps, synops, accuracy["right"]["snn"], accuracy["labels"])
    changes = [against(mine, each) for each in runs]
    rows = [{**facts(mine), "change": None}]
    for each, change, p in zip(runs, changes, holm([change["p"] for change in changes])):
        rows.append({**facts(each), "change": {**change, "p": p}})
    return rows


def facts(run):
    """A Run as a dict with its 95 % interval."""
    return {**asdict(run), "interval": list(wilson(run.hits, run.images))}


def against(mine, other):
    """The difference of another run minus this one, paired where both answered the same images."""
    is_same = None not in (mine.labels, other.right) and (mine.labels, mine.images) == (other.labels, other.images)
    rights = [from_hex(run.right, run.images) for run in (mine, other)] if is_same else None
    if rights is None:
        rights = [np.arange(run.images) < run.hits for run in (mine, other)]
    return {**difference(*rights, paired=is_same), "paired": is_same}


def runs_in_words(rows):
    """The sentence about the runs compared; it names those that differ from this one, p < 0.05 after correction."""
    told = [f"{row['name']} ({row['change']['points']:+.2f} points)" for row in rows[1:] if row["change"]["p"] < ALPHA]
    return f"Different from this run: {', '.join(told)}." if told else "No run compared differs significantly."
