"""What benchmarks measured, so that nothing is measured twice: rows in a JSON file, finetuned networks in a folder.

A row has a key, a hash of everything on which its numbers depend: the contents of the network's files, all flags that
differ from their defaults, the data, T, the seed, and the number of images. The machine and the versions of packages
are recorded, but are not part of the key, and neither is the version of this toolkit.
"""

import hashlib
import json
import os
import platform
import re
import sys
from datetime import date
from functools import cache

from runtime.files import check_folder, check_writable, write_json, write_torch
from runtime.hashes import contents

KEY_LETTERS = 16  # of a key in the name of a file, 64 bits
# Flags that do not change a row: where it runs, what it prints, and a preset, whose options are filled in.
WITHOUT_INFLUENCE = ("debug", "device", "preset", "expect_top1", "memory_budget")


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def key_of(flags, defaults, **more):
    """The key of flags, a namespace as ann2snn.py parses it, as hexadecimal text.

    defaults: name -> default, of flags that count where they differ; so an option that is added later changes no key.
    more: what else counts. Raises OSError for a file that cannot be read.
    """
    given = {name: value for name, value in vars(flags).items() if name not in WITHOUT_INFLUENCE}
    given = {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}
    given |= {name: contents(given[name]) for name in ("net_name", "ann_weight", "dataset") if given.get(name)}
    return hashlib.sha256(json.dumps({**given, **more}, sort_keys=True, default=str).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Rows


class Results:
    """Measured rows in a JSON file, or in memory if `path` is None.

    A row is a dict of plain data with "key". kind: the name of the format, with its version. facts: names of what
    identifies a row, such as network and T; a new row takes the place of one with the same facts. numbers: names of
    numbers, or of dicts of numbers, that each row has. `add` writes the file anew, completely or not at all.
    """

    def __init__(self, path, kind, facts, numbers):
        check_writable(path)
        self.path, self.kind, self.facts, self.numbers = path, kind, facts, numbers
        self.rows = self.read()

    def read(self):
        """The rows in the file. Raises ValueError for a damaged file or one of another format."""
        if self.path is None or not os.path.exists(self.path) or not os.path.getsize(self.path):
            return []
        try:
            with open(self.path, encoding="utf-8") as file:
                found = json.load(file)
        except ValueError as error:  # of the decoder of letters, too
            raise self.refused(f"it is damaged: {error}") from error
        if not isinstance(found, dict) or found.get("format") != self.kind:
            raise self.refused(f"it is not of the format {self.kind}")
        rows = found.get("runs")
        if not isinstance(rows, list) or not all(map(self.is_complete, rows)):
            raise self.refused("a row in it lacks a part")
        return rows

    def refused(self, reason):
        """The ValueError for a file that holds no results."""
        return ValueError(f"{self.path} holds no results ({reason}), move it away or name another file")

    def is_complete(self, row):
        """Whether a row has its key, all its facts and numbers."""
        if not isinstance(row, dict) or not {"key", *self.facts, *self.numbers} <= set(row):
            return False
        values = [row[name] for name in self.numbers]
        values = [each for value in values for each in (value.values() if isinstance(value, dict) else [value])]
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)

    def with_key(self, key):
        """A row with this key, or None."""
        return next((row for row in self.rows if row["key"] == key), None)

    def with_facts(self, facts):
        """The row with these facts, or None. facts: name -> value."""
        wanted = self.identity(facts)
        return next((row for row in self.rows if self.identity(row) == wanted), None)

    def having(self, facts):
        """The rows with some facts, in their order. facts: name -> value, of a part of the facts."""
        wanted = json.dumps(list(facts.values()))
        return [row for row in self.rows if json.dumps([row[name] for name in facts]) == wanted]

    def identity(self, row):
        """A row's facts as text, the same before and after JSON."""
        return json.dumps([row[name] for name in self.facts])

    def add(self, row):
        """Add a row and write the file, with rows that other runs wrote into it since."""
        row = json.loads(json.dumps(row))  # as the file has it
        if row in self.rows:
            return
        self.rows = [each for each in self.read() or self.rows if self.identity(each) != self.identity(row)] + [row]
        if self.path is not None:
            write_json(self.path, {"format": self.kind, "runs": self.rows})


@cache
def machine(device="cpu"):
    """Processor or GPU, threads, and version of torch, in words; without the machine's own name."""
    import torch

    version = f"torch {torch.__version__.partition('+')[0]}"  # without the build, +cpu or +cu130
    if str(device).startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, {version}"
    threads = torch.get_num_threads()
    counted = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {counted}, {version}"


def processor():
    """The name of the processor, or of its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # Linux; platform.processor() says x86_64 there
            found = re.search(r"^model name\s*:\s*(.+?)\s*$", file.read(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def where_and_when(device="cpu"):
    """The machine and the date of a measurement, as entries of its row."""
    return {"machine": machine(str(device)), "date": date.today().isoformat()}


# ---------------------------------------------------------------------------------------------------------------------
# Finetuned networks


class Kept:
    """Finetuned networks in a folder, or nowhere if `folder` is None.

    `NAME-KEY.pth` is the network, `torch.load` reads it; `NAME-KEY.state.pth` has the state of the random generators
    after the finetuning, so that what follows is as in one run, its seconds and its machine.
    """

    def __init__(self, folder):
        check_folder(folder)
        self.folder = folder

    def path(self, name, key, end=".pth"):
        """The file of a network."""
        readable = re.sub(r"[^\w.-]+", "_", os.path.basename(name))
        return os.path.join(self.folder, f"{readable}-{key[:KEY_LETTERS]}{end}")

    def load(self, name, key):
        """`(qnet, state)`, or None if they were not kept. Raises ValueError or OSError for a damaged file."""
        from runtime.torch_files import read_torch_file
        from spike_dag import load_dag

        paths = [self.path(name, key, end) for end in (".pth", ".state.pth")] if self.folder else [""]
        if not all(map(os.path.exists, paths)):
            return None
        try:
            found = load_dag(paths[0]), read_torch_file(paths[1])
        except ValueError as error:
            raise ValueError(f"one of {' and '.join(paths)} is damaged, remove them ({error})") from error
        print(f"finetuned before: {paths[0]}", file=sys.stderr)
        return found

    def save(self, name, key, qnet, state):
        """Keep a network, and plain data and tensors beside it."""
        if self.folder is None:
            return
        os.makedirs(self.folder, exist_ok=True)
        write_torch(self.path(name, key, ".state.pth"), state)  # first: the network stands for both
        write_torch(self.path(name, key), qnet)
