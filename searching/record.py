"""The file of a search: a line of JSON with what was searched, then one for every trial.

record = Record("search/resnet20/trials.jsonl", identity)
record.add(row)                     # one line, written at once
record.rows["--timesteps 8 ..."]    # by the trial's key

A line that a killed run left without its end is dropped, so at most the running trial is lost.
"""

import json
import os
from dataclasses import dataclass, field

from runtime.files import check_regular, check_writable, naming

FORMAT = "ann2snn-search-2"  # 1: presets did not fold average poolings, so its rows mean other conversions


@dataclass
class Row:
    """One trial.

    key: `Trial.key`. timesteps, bits: T, and weight bits as text. flags: those of the trial. preset: the preset's name,
    or "". hits: for every image held out that it saw, in their order, whether its class was right.
    listens: whether an image takes more than T steps. interval, latency: steps from image to image, and to the answer.
    spikes, synops: spikes and synaptic operations per image. worse: flags of the better trial where it was stopped.
    refused: why it could not be converted, or is over a limit that the user gave (over_limit).
    costs: [kind, units, seconds] of its parts.
    """

    key: str
    timesteps: int
    bits: str
    flags: dict
    preset: str = ""
    hits: list = field(default_factory=list)
    listens: bool = False
    interval: int = 0
    latency: int = 0
    spikes: float = 0.0
    synops: float = 0.0
    worse: str = ""
    refused: str = ""
    over_limit: bool = False
    costs: list = field(default_factory=list)

    @property
    def is_complete(self):
        """Whether it was measured and not stopped."""
        return not self.worse and not self.refused

    def name(self):
        """The trial's own flags in one line."""
        return " ".join(f"--{name} {value}" for name, value in self.flags.items())

    def to_line(self):
        """The row as a line of JSON; the hits are a string of 0 and 1."""
        return json.dumps({**vars(self), "hits": "".join(str(int(hit)) for hit in self.hits)}) + "\n"

    @classmethod
    def from_dict(cls, found):
        """The row of a line. Raises TypeError, KeyError or ValueError for another dictionary."""
        return cls(**{**found, "hits": [bool(int(letter)) for letter in found["hits"]]})


class Record:
    """The rows of a search, in a file. identity: plain data that every search of this file has to share.

    Raises ValueError for a file of another search, of another format, or a damaged one, and OSError for one that cannot
    be written.
    """

    def __init__(self, path, identity):
        check_writable(path)
        check_regular(path)
        self.path, self.rows = path, {}
        lines = read_lines(path)
        if not lines:
            self.append(json.dumps({"format": FORMAT, **identity}) + "\n", "w")
            return
        try:
            head, *rows = (json.loads(line) for line in lines)
            self.rows = {row.key: row for row in map(Row.from_dict, rows)}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}), move it away or name another --out") from error
        check_identity(path, head, {"format": FORMAT, **json.loads(json.dumps(identity))})
        cut_unfinished(path)

    def add(self, row):
        """Add a Row, in memory and in the file."""
        self.rows[row.key] = row
        self.append(row.to_line(), "a")

    def append(self, line, mode):
        """Write a line and wait until the disk has it."""
        with naming(self.path), open(self.path, mode, encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read_lines(path):
    """The complete lines of a file, or [] if there is none. Raises ValueError for a file that is no text."""
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            return [line for line in file if line.endswith("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged (it is no text), move it away or name another --out") from error


def cut_unfinished(path):
    """Remove what stands behind the last end of a line."""
    with open(path, "rb+") as file:
        contents = file.read()
        file.truncate(contents.rfind(b"\n") + 1)


def check_identity(path, found, wanted):
    """Raise ValueError if a file is of another search, with what differs."""
    if not isinstance(found, dict) or found.get("format") != wanted["format"]:
        raise ValueError(f"{path} is no file of a search of this version, move it away or name another --out")
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        raise ValueError(
            f"{path} is of a search with other {' and '.join(different)}, name another --out or move it away"
        )
