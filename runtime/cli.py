"""Shared code of the command-line scripts: a parser with one-line errors, and exit statuses. Imports nothing slow.

Exit status 0 means success, 1 a traceback, 2 an error that the user can correct, 128 and the signal's number an
interrupted run: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
"""

import argparse
import difflib
import sys

from runtime.failures import in_one_line, squeeze
from runtime.interrupts import INTERRUPTED, signals_as_interrupts
from runtime.processes import UNHARMED, ProcessEnded, fails_first, first_speaks, interrupted, say_last, started
from runtime.streams import steady_streams


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that answers a wrong command line with `error: WHAT, WHERE, what to do` and exit status 2.

    given: the dest of each option that the command line named. main_actions: action -> short help of the options that
    `--help` shows; `--help-all` shows every option. If main_actions is empty, `--help` shows every option too.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.given, self.main_actions, self.shows_all = set(), {}, False

    def parse_known_args(self, args=None, namespace=None):
        with steady_streams():
            return super().parse_known_args(args, namespace)

    def _get_values(self, action, arg_strings):
        if action.option_strings and arg_strings == ["--"]:  # argparse reads --timesteps=-- as an empty list
            raise argparse.ArgumentError(action, "'--' is no value, write one behind the flag")
        self.given.add(action.dest)
        return super()._get_values(action, arg_strings)

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(action, error.message + did_you_mean(value, action.choices)) from error

    def format_help(self):
        """The help of all flags, or only of the main ones."""
        full = {action: action.help for action in self._actions}
        try:
            if self.main_actions and not self.shows_all:
                for action in full:
                    if action.option_strings:
                        action.help = self.main_actions.get(action, argparse.SUPPRESS)
            return super().format_help()
        finally:
            for action, text in full.items():
                action.help = text

    def exit(self, status=0, message=None):
        check_printed(sys.stdout)
        super().exit(status, message)

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            flags = [flag for action in shown for flag in action.option_strings]
            unknown = next((word for word in message.split()[2:] if word.startswith("-")), "")
            message += did_you_mean(unknown.partition("=")[0], flags)
        exit_with_error(f"{message}, see {self.prog} --help")


class HelpAll(argparse.Action):
    """The action of `--help-all`: print the help of all flags and exit."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, help="show all flags and exit", default=argparse.SUPPRESS)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def did_you_mean(word, known):
    """ ", did you mean ...?" for a word that resembles a known one, otherwise ""."""
    close = difflib.get_close_matches(str(word), [str(each) for each in known or ()], 1)
    return f", did you mean {close[0]}?" if close else ""


def exit_with_error(message):
    """Print a one-line error on stderr and exit with status 2."""
    say_last(f"error: {squeeze(message)}")
    sys.exit(2)


def check_printed(output):
    """Exit with an error if writing to stdout, a SteadyStream, failed. A pipe that its reader closed is no error."""
    output.flush()
    failure = output.failure
    if failure is not None and not isinstance(failure, BrokenPipeError):
        exit_with_error(f"cannot print on stdout ({failure.strerror}), all files are written, send it to another place")


def run_script(main, args, shared=False):
    """Call `main(args)`. Errors that the user can cause become one line and status 2; --debug shows the traceback.

    args: the flags, or the function that parses them, which then is silent in all processes but the first.
    shared: whether the script shares its work between processes that torchrun starts. A closed stdout, or a pipe
    without a reader, does not stop the work. A full disk behind stdout is an error at the end.
    """
    with steady_streams() as output, first_speaks(), signals_as_interrupts():
        try:
            if not shared:
                check_alone()
            args = args() if callable(args) else args
            main(args)
        except KeyboardInterrupt as interrupt:
            say_last(f"{interrupted()}, {UNHARMED}")
            sys.exit(getattr(interrupt, "status", INTERRUPTED))
        except ProcessEnded as error:
            say_last(f"error: {error}")
            sys.exit(1)
        except Exception as error:
            line = None if getattr(args, "debug", False) else in_one_line(error, args)
            if line is None and fails_first():
                raise
            if line is None:
                sys.exit(1)
            exit_with_error(line)
        check_printed(output)


def check_alone():
    """Raise ValueError if torchrun started several processes: each would repeat the work and write the same files."""
    if started() > 1:
        raise ValueError(f"started as one of {started()} processes (WORLD_SIZE), start it without torchrun")
