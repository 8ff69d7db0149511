"""Signals that end a run: at once, or at the end of the training step that they arrive in.

with signals_as_interrupts():     # SIGINT, SIGTERM and SIGHUP raise Interrupt
    SIGNALS.waits = True          # from here on the first one only sets SIGNALS.pending
    ...
    SIGNALS.raise_pending()
"""

import contextlib
import signal

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C
DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interrupt(KeyboardInterrupt):
    """A signal ended the run. status: the exit status that a shell expects, 128 and the number of the signal."""

    def __init__(self, number):
        super().__init__()
        self.status = 128 + number


class Signals:
    """waits: whether a signal waits for `raise_pending`. pending: the number of the one that does, or None."""

    def __init__(self):
        self.waits, self.pending = False, None

    def receive(self, number, frame):
        """The handler. A second signal does not wait."""
        if self.waits and self.pending is None:
            self.pending = number
        else:
            raise Interrupt(number)

    def raise_pending(self):
        """Raise Interrupt if a signal waits."""
        if self.pending is not None:
            raise Interrupt(self.pending)

    def reset(self):
        """Let signals interrupt at once again."""
        self.waits, self.pending = False, None


SIGNALS = Signals()


@contextlib.contextmanager
def signals_as_interrupts():
    """Context in which SIGINT (Ctrl-C), SIGTERM and SIGHUP raise Interrupt, so that no temporary file is left.

    A signal that is already ignored, such as SIGHUP under nohup, stays ignored. Outside the main thread nothing
    changes, because only the main thread can set handlers.
    """
    before = {}
    with contextlib.suppress(ValueError):
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in DEFAULTS:
                before[number] = signal.signal(number, SIGNALS.receive)
    try:
        yield
    finally:
        SIGNALS.reset()
        for number, handler in before.items():
            signal.signal(number, handler)
