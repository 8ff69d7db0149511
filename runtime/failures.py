"""Turn an error into one line for the user that says what failed, where, and what to do."""

import errno
import re

from runtime.packages import PIP_NAMES

LONGEST_WORD = 500  # letters; longer than a file name (255 letters) with its folder, far shorter than a screen
LONGEST_LINE = 2000  # letters; 25 lines of a terminal with 80 columns
MEMORY_FLAGS = (  # flags that determine how much memory a run needs, in order of their share
    "test_batch_size",
    "batch_size",
    "memory_budget",
    "calibration_samples",
    "analysis_images",
    "num_classes",
    "in_channels",
)
NO_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate memory|cannot allocate memory|bad_alloc|ALLOC_FAILED"
    "|storage size calculation overflowed",
    re.IGNORECASE,
)
FROM_A_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.")


def in_one_line(error, args):
    """The message for an error, or None for a bug of the program, which needs a traceback.

    args: the script's flags, to which the message may refer.
    """
    if any(map(is_out_of_memory, causes(error))):
        return out_of_memory(error, args)
    if "DataLoader worker" in str(error):
        return worker_failed(str(error), args)
    if isinstance(error, ImportError):
        name = (error.name or "").split(".")[0]
        return f"{error}: pip install {PIP_NAMES.get(name, name) or '-r requirements.txt'}"
    if isinstance(error, (ValueError, NotImplementedError, OSError)):
        return str(error)
    return None


def causes(error):
    """Yield the error and the chain of errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__


def is_out_of_memory(error):
    """Whether the CPU or a GPU ran out of memory; torch reports this as a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error))))


def out_of_memory(error, args):
    """The message: the size that could not be allocated, if known, and the flags of the script that save memory."""
    said = " ".join(str(each) for each in causes(error))
    size = re.search(r"tried to allocate ([\d.]+ ?\w+)", said, re.IGNORECASE)
    what = f"out of memory{f', {size[1]} more were needed' if size else ''}"
    flags = [f"--{name}" for name in MEMORY_FLAGS if hasattr(args, name)]
    advice = [f"use smaller values of {', '.join(flags)}"] if flags else []
    advice += ["--device cpu"] if getattr(args, "device", "cpu") != "cpu" and "cuda" in said.lower() else []
    return f"{what}: {' or '.join(advice) or 'free some memory'}"


def worker_failed(message, args):
    """The message for a data loader worker: the error that it raised, or that it ended."""
    workers = f"a worker of --num_workers {getattr(args, 'num_workers', 1)}"
    raised = FROM_A_WORKER.search(message)
    if not raised:
        return f"{workers} ended ({message}), it may lack memory: use fewer workers, or --num_workers 0"
    # the worker's traceback ends in "builtins.OSError: reason"; only the reason is for the user
    reason = re.split(rf"^[\w.]*\b{raised[1]}: ?", message, flags=re.MULTILINE)[-1]
    return f"{reason.strip() or raised[1]}, in {workers}"


def shorten(text, most):
    """The text; if it has more than `most` letters, "..." replaces its middle."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def squeeze(message):
    """A message as one line; long words, such as a value of thousands of letters, and a long line are shortened."""
    return shorten(" ".join(shorten(word, LONGEST_WORD) for word in str(message).split()), LONGEST_LINE)
