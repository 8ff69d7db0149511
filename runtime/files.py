"""Writing files so that a failure leaves the old file as it was."""

import json
import os


def check_writable(path):
    """Raise OSError unless a file can be created beside `path`; called before the work that fills it."""
    if path is None:
        return
    if not path:
        raise OSError("cannot write to an empty file name, name a file")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(f"cannot write {path}, it is a device or a pipe, name a file")
    if os.path.isdir(path):
        raise OSError(f"cannot write {path}, it is a folder, name a file")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise OSError(f"cannot write {path}, there is no folder {folder}, create it first")
    try:
        temporary = temporary_beside(path)
        open(temporary, "xb").close()
        os.remove(temporary)
    except OSError as error:
        raise OSError(f"cannot write {path}, the folder {folder} refuses new files ({error.strerror})") from error


def check_different(*paths):
    """Raise ValueError where two of the files to write are the same."""
    targets = [os.path.realpath(path) for path in paths if path]
    if len(set(targets)) < len(targets):
        raise ValueError(f"two results would be written to the same file {targets[0]}, name another")


def temporary_beside(path):
    """The name under which `path` is written before it is renamed."""
    return f"{path}.{os.getpid()}.tmp"


def write_atomically(path, write):
    """Call `write(temporary_path)` beside `path`, then rename: `path` is the old file or the whole new one."""
    check_writable(path)
    path = os.path.realpath(path)  # through a link, the file it names is replaced, not the link
    temporary = temporary_beside(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path, value):
    """`value` as indented JSON."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.write("\n")

    write_atomically(path, write)
