"""Writing files so that a failure leaves the old file as it was."""

import json
import os
import shutil


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
    target = os.path.realpath(path) if os.path.islink(path) else path  # the file that a link names is replaced
    folder = os.path.dirname(target) or "."
    if not os.path.isdir(folder):
        raise OSError(f"cannot write {path}, there is no folder {folder}, create it first")
    try:
        temporary = temporary_beside(target)
        open(temporary, "xb").close()
        os.remove(temporary)
    except OSError as error:
        raise OSError(f"cannot write {path}, the folder {folder} refuses new files ({error.strerror})") from error


def check_different(*paths):
    """Raise ValueError where two of the files to write are the same."""
    targets = [os.path.realpath(path) for path in paths if path]
    if len(set(targets)) < len(targets):
        raise ValueError(f"two results would be written to the same file {targets[0]}, name another")


def check_folder(path):
    """Raise OSError unless `path` is a folder that takes new files, or one that can be created."""
    if path is None:
        return
    if not path:
        raise OSError("cannot write to an empty folder name, name a folder")
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise OSError(f"cannot write into {path}, {existing} is a file, name a folder")
    try:
        temporary = temporary_beside(os.path.join(existing, "check"))
        os.mkdir(temporary)
        os.rmdir(temporary)
    except OSError as error:
        raise OSError(f"cannot write into {path}, {existing} refuses new files ({error.strerror})") from error


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


def write_folder(path, files):
    """Write `files`, name -> bytes, into the folder `path`; what else is in it stays.

    All are written into a folder inside of it first, then moved up one by one, so that none is ever half-written.
    """
    check_folder(path)
    path = os.path.realpath(path)
    for name in files:
        if os.path.isdir(os.path.join(path, name)):
            raise OSError(f"cannot write {os.path.join(path, name)}, it is a folder, move it away")
    temporary = temporary_beside(os.path.join(path, "new"))  # inside: `path` may be a mount of its own
    try:
        os.makedirs(temporary)
        for name, contents in files.items():
            with open(os.path.join(temporary, name), "wb") as file:
                file.write(contents)
        for name in files:
            os.replace(os.path.join(temporary, name), os.path.join(path, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
