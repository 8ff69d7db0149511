"""Shared code of the command-line scripts: a parser with one-line errors, and exit statuses. Imports nothing slow.

Exit status 0 means success, 1 a traceback, 2 an error that the user can correct, 128 and the signal's number an
interrupted run: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
"""

import argparse
import difflib
import os
import sys

from runtime.failures import in_one_line, squeeze
from runtime.interrupts import INTERRUPTED, signals_as_interrupts
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
    print("error:", squeeze(message), file=sys.stderr)
    sys.exit(2)


def check_printed(output):
    """Exit with an error if writing to stdout, a SteadyStream, failed. A pipe that its reader closed is no error."""
    output.flush()
    failure = output.failure
    if failure is not None and not isinstance(failure, BrokenPipeError):
        exit_with_error(f"cannot print on stdout ({failure.strerror}), all files are written, send it to another place")


def run_script(main, args):
    """Call `main(args)`. Errors that the user can cause become one line and status 2; --debug shows the traceback.

    A closed stdout, or a pipe without a reader, does not stop the work. A full disk behind stdout is an error at the
    end.
    """
    with steady_streams() as output, signals_as_interrupts():
        try:
            check_alone()
            main(args)
        except KeyboardInterrupt as interrupt:
            print("interrupted, no result is half-written", file=sys.stderr)
            sys.exit(getattr(interrupt, "status", INTERRUPTED))
        except Exception as error:
            line = None if args.debug else in_one_line(error, args)
            if line is None:
                raise
            exit_with_error(line)
        check_printed(output)


def check_alone():
    """Raise ValueError if torchrun started several processes: each would repeat the work and write the same files."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "0", "1"):
        raise ValueError(f"started as one of {processes} processes (WORLD_SIZE), start it without torchrun")
