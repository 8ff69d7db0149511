"""Trainings of hours: what --resume, --log and --max_minutes of a script ask for.

with open_progress(args, "out_snn.pth.state", net, loaders) as progress:
    ...                             # the steps that train get `progress`
    progress.remove_state()         # the result is written
"""

import os
from dataclasses import fields

from finetuning.log import Log
from finetuning.state import State, checksum, plain
from runtime.files import check_folder, check_writable
from runtime.progress import Progress
from script_options import LongRunOptions, OutputOptions

# Flags on which a training does not depend: the files and reports of a run, and former names of other flags.
WITHOUT_INFLUENCE = (
    *(each.name for cls in (LongRunOptions, OutputOptions) for each in fields(cls)),
    *("debug", "memory_budget", "test_batch_size", "expect_top1", "hardware", "preset", "out", "given"),
    *("quantile", "granularity", "weight_granularity", "pretrained"),
)


def open_progress(args, path, net, loaders, writes=True):
    """The Progress of a script's trainings.

    path: the file of the state. net: the network before its training. loaders: all data loaders whose order counts.
    writes: whether this process writes the state and the log and prints; one of several does. Raises OSError if the
    files cannot be written, and ValueError if --resume cannot go on from `path`.
    """
    if writes:
        folder = os.path.dirname(path) or "."
        if os.path.isdir(folder):
            check_writable(path)
        else:  # the first state makes it
            check_folder(folder)
        check_folder(args.log)
    state = State(path, identity(args, net), loaders, args.resume, writes)
    log = Log(args.log, args.resume) if args.log and writes else None
    return Progress(state, log, args.max_minutes, writes)


def identity(args, net):
    """Name -> plain value of the flags that the result depends on, and a checksum of the network's weights."""
    values = {name: plain(value) for name, value in vars(args).items() if name not in WITHOUT_INFLUENCE}
    return {**values, "weights": checksum(net)}
