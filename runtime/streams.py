"""Standard streams whose failure does not stop the work: closed streams, pipes without a reader, full disks.

with steady_streams() as output:      # `| head -1` cuts the output but does not stop the computation
    work()
output.failure                        # the first error while writing to stdout, or None
"""

import contextlib
import os
import sys


class SteadyStream:
    """A text stream that discards its output after the first failed write and keeps that error as `failure`."""

    def __init__(self, stream):
        self.stream, self.failure = stream, None

    def write(self, text):
        self.attempt(lambda: self.stream.write(printable(text, self.stream)))
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action):
        """Call `action`, unless an earlier one has failed."""
        if self.failure is not None:
            return
        try:
            action()
        except OSError as error:
            self.failure = error
            drop_output(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def printable(text, stream):
    """The text with letters escaped that the stream cannot encode, such as those of a file name not in UTF-8."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def drop_output(stream):
    """Redirect a stream to the null device; otherwise Python would fail when it flushes the buffer at exit."""
    with contextlib.suppress(OSError, ValueError):  # a stream in memory has no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def open_missing_streams():
    """Open the null device in place of a missing stdin, stdout or stderr (`>&-`).

    Otherwise the next opened file would get the file descriptor of stdout, and libraries would print into that file.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:  # os.open returns the lowest free descriptor
        os.set_inheritable(null, True)
    os.close(null)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


@contextlib.contextmanager
def steady_streams():
    """Context in which stdout and stderr are SteadyStreams; yields that of stdout."""
    open_missing_streams()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (each if isinstance(each, SteadyStream) else SteadyStream(each) for each in before)
    output = sys.stdout
    try:
        yield output
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
