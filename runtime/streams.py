"""Standard streams that never stop the work: closed ones, pipes whose reader has gone, full disks.

with steady_streams() as output:      # a `| head -1` ends what is printed, not what is computed
    work()
output.failure                        # the first error of stdout in the meantime, or None
"""

import contextlib
import os
import sys


class SteadyStream:
    """A text stream that drops its output after the first failed write and keeps the error as `failure`."""

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
    """The text, with escapes for letters that the stream cannot encode, as in a file name that is not UTF-8."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def drop_output(stream):
    """Redirect a stream to the null device, so that Python does not fail at exit when it flushes the buffer."""
    with contextlib.suppress(OSError, ValueError):  # a stream in memory has no number
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def open_missing_streams():
    """Give a process without stdin, stdout or stderr (`>&-`) the null device in their place.

    Otherwise the next file that is opened gets the descriptor of stdout, and libraries print into it.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:  # os.open takes the lowest free number
        os.set_inheritable(null, True)
    os.close(null)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


@contextlib.contextmanager
def steady_streams():
    """Within it stdout and stderr are SteadyStreams; yields the one of stdout."""
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
