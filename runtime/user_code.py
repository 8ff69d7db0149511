"""Call functions and classes of the user's own, from a file or a package: `path/to/net.py:Net`, `package.module:Net`.

The user's modules may have the names of the toolkit's (`datasets.py`, `layers/`), or of each other (`net.py` in two
folders). Within `modules_of(folder)` an import finds those of that folder; afterwards the toolkit's have their names
back.
"""

import ast
import contextlib
import importlib
import inspect
import os
import re
import sys
import traceback
from dataclasses import dataclass

from runtime.cli import did_you_mean

TOOLKIT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SET_ASIDE = {}  # folder -> {name: module} of the user's modules in it
NAME = re.compile(r"[A-Za-z_][\w.]*$")
MOST_NAMES = 12  # of a file, in one line
FORM = "path/to/file.py:callable or package.module:callable"


@dataclass(frozen=True)
class UserCode:
    """A callable of the user. spec: as the command line names it. folder: the folder in which its imports are found."""

    spec: str
    folder: str
    target: object

    def call(self, given, offered=(), how="give it with --net_args {name}=VALUE"):
        """The result of the callable.

        given: keyword arguments from the user. offered: keyword arguments that it gets where it has a parameter of that
        name. how: what to do about a missing argument, for the message. Raises ValueError, with the user's file and
        line, if the call fails.
        """
        parameters = self.parameters()
        named = {name for name, each in parameters.items() if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
        arguments = {**{name: value for name, value in dict(offered).items() if name in named}, **given}
        self.check_arguments(parameters, named, arguments, how)
        with in_one_line(self.spec, self.folder), modules_of(self.folder):
            return self.target(**arguments)

    def parameters(self):
        """Name -> inspect.Parameter of the callable; empty for a builtin without a signature."""
        try:
            return dict(inspect.signature(self.target).parameters)
        except (TypeError, ValueError):
            return {}

    def check_arguments(self, parameters, named, arguments, how):
        """Raise ValueError for an argument that the callable does not take, and for one that it lacks."""
        takes_any = not parameters or any(each.kind == each.VAR_KEYWORD for each in parameters.values())
        unknown = [name for name in arguments if name not in named]
        if unknown and not takes_any:
            raise ValueError(
                f"{self.spec} has no argument {unknown[0]}, it has {', '.join(sorted(named)) or 'none'}"
                f"{did_you_mean(unknown[0], named)}"
            )
        required = [name for name in named if parameters[name].default is inspect.Parameter.empty]
        missing = sorted(set(required) - set(arguments))
        if missing:
            raise ValueError(f"{self.spec} needs the argument {missing[0]}, {how.format(name=missing[0])}")


def names_code(text):
    """Whether a text has the form `path/to/file.py:callable` or `package.module:callable`."""
    module, colon, name = text.rpartition(":")
    return bool(colon and NAME.match(name)) and (module.endswith(".py") or bool(NAME.match(module)))


def load_code(spec):
    """The UserCode that `spec` names. Raises OSError for a missing file.

    Raises ValueError if the module lacks the name, with the user's file and line if it cannot be imported, and for
    another form of `spec`.
    """
    if not names_code(spec):
        raise ValueError(f"'{spec}' names no code, use {FORM}")
    module_name, _, name = spec.rpartition(":")
    if module_name.endswith(".py"):
        if not os.path.isfile(module_name):
            raise FileNotFoundError(f"no file {module_name}, which {spec} names")
        folder, module_name = package_root(os.path.abspath(module_name))
    else:
        folder = os.getcwd()
    with in_one_line(spec, folder), modules_of(folder):
        module = importlib.import_module(module_name)
    target = module
    for part in name.split("."):
        if not hasattr(target, part):
            known = [each for each in vars(module) if not each.startswith("_") and callable(vars(module)[each])]
            raise ValueError(f"{spec}: there is no {part}{did_you_mean(part, known)}")
        target = getattr(target, part)
    return UserCode(spec, folder, target)


def names_in(path):
    """ " (A, b, ...)": the public functions and classes that a Python file defines, read without running it, or ""."""
    try:
        with open(path, "rb") as file:
            parts = ast.parse(file.read()).body
    except (OSError, SyntaxError, ValueError):
        return ""
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [each.name for each in parts if isinstance(each, kinds) and not each.name.startswith("_")]
    return f" ({', '.join(names[:MOST_NAMES])}{', ...' if len(names) > MOST_NAMES else ''})" if names else ""


def package_root(path):
    """`folder, module`: where to import a file from, and its dotted name, which has the packages that it lies in."""
    folder, file = os.path.split(path)
    names = [file.removesuffix(".py")]
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        names.insert(0, package)
    if names[-1] == "__init__":
        names.pop()
    return folder, ".".join(names)


@contextlib.contextmanager
def modules_of(folder):
    """A context in which imports look into `folder` first, even for names that modules of the toolkit have."""
    tops = shared_names(folder)
    toolkit = modules_named(tops)
    for name in toolkit:
        del sys.modules[name]
    sys.modules.update(SET_ASIDE.get(folder, {}))
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # for imports within functions that run later
        SET_ASIDE[folder] = {**modules_named(tops), **modules_in(folder)}
        for name in SET_ASIDE[folder]:
            del sys.modules[name]
        sys.modules.update(toolkit)


def shared_names(folder):
    """Names of modules that both `folder` and the toolkit have."""
    return set() if folder == TOOLKIT else module_names(folder) & module_names(TOOLKIT)


def module_names(folder):
    """Names of the modules and packages in a folder."""
    entries = list(os.scandir(folder))
    return {entry.name.removesuffix(".py") for entry in entries if entry.name.endswith(".py") or entry.is_dir()}


def modules_in(folder):
    """Name -> module, for all loaded modules that lie in `folder`; none for the toolkit's own folder."""
    if folder == TOOLKIT:
        return {}
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if name != "__main__"}
    return {name: sys.modules[name] for name, file in files.items() if file and is_in(file, folder)}


def is_in(file, folder):
    """Whether a file lies in a folder, or below it, but not among installed packages."""
    path = os.path.abspath(file)
    return path.startswith(folder + os.sep) and "site-packages" not in path


def modules_named(tops):
    """Name -> module, for all loaded modules whose first name is in `tops`."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in tops}


@contextlib.contextmanager
def in_one_line(spec, folder):
    """A context that turns any error of the user's code into a ValueError with the user's file and line."""
    try:
        yield
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if top == spec.partition(":")[0].partition(".")[0] or error.name == spec.rpartition(":")[0]:
            raise ValueError(f"{spec}: there is no module {error.name} in {folder} or among the packages") from error
        raise ValueError(f"{spec} failed: {error}{place_of(error, folder)}") from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and an unguarded script may exit
        reason = f"{type(error).__name__}: {first_line(error)}" if first_line(error) else type(error).__name__
        raise ValueError(f"{spec} failed: {reason}{place_of(error, folder)}") from error


def first_line(error):
    """The first line of an error's message."""
    if isinstance(error, SyntaxError):
        return error.msg  # its text has the line again
    return next(iter(str(error).splitlines()), "")


def place_of(error, folder):
    """ " (FILE, line N)": the innermost line of the user's code that was running, or "" if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if is_in(frame.filename, folder) and frame.filename != __file__]
    return f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""


def assignments(text):
    """A dict from "width=24,name=small,stages=(1, 2)". Values are Python literals, anything else is text.

    Raises ValueError for another form.
    """
    found = {}
    for part in re.split(r",(?=\s*[A-Za-z_]\w*=)", text):
        name, equals, value = part.strip().partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"'{part}' has not the form NAME=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
