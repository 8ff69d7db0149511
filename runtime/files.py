"""Write files so that a failure leaves the old file unchanged."""

import contextlib
import io
import json
import os
import re
import shutil
from errno import EDQUOT, EFBIG, ENOSPC

WRITE_ADVICE = {ENOSPC: "free some room or ", EDQUOT: "free some room or ", EFBIG: "raise `ulimit -f` or "}
# On a full disk torch.save raises a RuntimeError without the reason; its message contains one of these.
TORCH_WRITER = re.compile("PytorchStreamWriter|inline_container|unexpected pos")


def check_writable(path):
    """Raise OSError unless a file can be created beside `path`; called before the work whose result it will hold.

    Also removes half-written files that ended processes left beside `path`.
    """
    if path is None:
        return
    if not path:
        raise OSError("cannot write to an empty file name, name a file")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(f"cannot write {path}, it is a device or a pipe, name a file")
    if os.path.isdir(path):
        raise OSError(f"cannot write {path}, it is a folder, name a file")
    target = os.path.realpath(path) if os.path.islink(path) else path  # keep a link, replace its file
    folder = os.path.dirname(target) or "."
    if not os.path.isdir(folder):
        raise OSError(f"cannot write {path}, there is no folder {folder}, create it first")
    remove_stale(target)
    try:
        temporary = temporary_beside(target)
        open(temporary, "xb").close()
        os.remove(temporary)
    except OSError as error:
        raise OSError(f"cannot write {path}, the folder {folder} refuses new files ({error.strerror})") from error


def check_regular(path):
    """Raise OSError for a pipe, a socket or a device, because reading one may block forever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is not a regular file")


def check_room(path, size):
    """Raise OSError unless `path` has room for a file of `size` bytes; called before the work."""
    folder = os.path.dirname(os.path.realpath(path))
    free, limit = shutil.disk_usage(folder).free, largest_file()
    if size > free:
        raise OSError(f"cannot write {path}, it needs {size:,} bytes and {folder} has {free:,} left, free some")
    if size > limit:
        raise OSError(f"cannot write {path}, it needs {size:,} bytes, over the {limit:,} that `ulimit -f` allows")


def largest_file():
    """The size limit for files of this process (`ulimit -f`), in bytes; infinity without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return float("inf")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def check_different(*paths):
    """Raise ValueError if two of the paths are the same file. A path may be None."""
    targets = [os.path.realpath(path) for path in paths if path]
    if len(set(targets)) < len(targets):
        raise ValueError(f"two results would be written to the same file {targets[0]}, name another")


def check_folder(path):
    """Raise OSError unless `path` is a folder that accepts new files, or a folder that can be created."""
    if path is None:
        return
    if not path:
        raise OSError("cannot write to an empty folder name, name a folder")
    existing = os.path.abspath(path)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise OSError(f"cannot write into {path}, {existing} is a file, name a folder")
    remove_stale(os.path.join(existing, "check"))
    remove_stale(os.path.join(existing, "new"))
    try:
        temporary = temporary_beside(os.path.join(existing, "check"))
        os.mkdir(temporary)
        os.rmdir(temporary)
    except OSError as error:
        raise OSError(f"cannot write into {path}, {existing} refuses new files ({error.strerror})") from error


def temporary_beside(path):
    """The temporary name under which a file is written before it is renamed to `path`."""
    return f"{path}.{os.getpid()}.tmp"


def remove_stale(path):
    """Remove temporary files and folders of `path` that ended processes left, for example after a kill or power loss.

    A file with this process's own id is stale too, because in containers every run has the same id. If several machines
    share a folder, a process of another machine counts as ended; that process then fails, and the file stays complete.
    """
    folder, name = os.path.split(os.path.abspath(path))
    pattern = re.compile(re.escape(name) + r"\.([1-9][0-9]{0,9})\.tmp")
    with contextlib.suppress(OSError):  # if the folder cannot be listed, the later write reports it
        for entry in os.scandir(folder):
            match = pattern.fullmatch(entry.name)
            if match and not is_running(int(match[1])):
                remove(entry)


def is_running(number):
    """Whether another process has this process id."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process, or too large an id: keep the file
        return True
    return True


def remove(entry):
    """Remove a file, or a folder with its contents; links and pipes stay, because this program creates none."""
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    elif entry.is_file(follow_symlinks=False):
        with contextlib.suppress(OSError):
            os.remove(entry.path)


@contextlib.contextmanager
def naming(path):
    """Context in which a failed write, as on a full disk, raises an OSError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        reason, advice = error.strerror or str(error), WRITE_ADVICE.get(error.errno, "")
        raise OSError(f"cannot write {path} ({reason}), {advice}name another place") from error
    except RuntimeError as error:
        if not TORCH_WRITER.search(str(error)):
            raise
        raise OSError(
            f"cannot write {path} (the disk is full, or failed), {WRITE_ADVICE[ENOSPC]}name another place"
        ) from error


@contextlib.contextmanager
def after_writing(*paths):
    """Context in which the message of an OSError or ValueError also lists the files already written."""
    try:
        yield
    except (OSError, ValueError) as error:
        written = " and ".join(path for path in paths if path)
        if not written:
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{error}; written before: {written}") from error


def write_atomically(path, write):
    """Call `write(temporary_path)`, then rename: `path` is always the old file or the complete new one.

    The temporary file is in the folder of `path`. Raises OSError, with `path`, if the folder refuses files or the disk
    is full.
    """
    check_writable(path)
    target = os.path.realpath(path)  # keep a link, replace its file
    temporary = temporary_beside(target)
    try:
        with naming(path):
            write(temporary)
            os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_torch(path, value):
    """Write `value` like torch.save, but through memory. Raises OSError if the file cannot be written.

    Because of the detour a failed write has a reason, which torch.save does not give, and the file does not contain its
    own name.
    """
    import torch

    contents = io.BytesIO()
    torch.save(value, contents)

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(contents.getbuffer())

    write_atomically(path, write)


def write_json(path, value):
    """Write `value` as indented JSON. Raises ValueError for NaN or infinite numbers, OSError for a failed write."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text + "\n")

    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:  # JSON has no NaN; other programs would reject the whole file
        raise ValueError(f"cannot write {path}, one of the results is NaN or infinite ({error})") from error
    write_atomically(path, write)


def write_folder(path, files):
    """Write `files`, name -> bytes, into the folder `path`; its other files stay.

    The files are first written into a new folder inside `path`, then moved up one by one, so none is ever half-written.
    Raises OSError, with the file's name, if one cannot be written.
    """
    check_folder(path)
    path = os.path.realpath(path)
    for name in files:
        if os.path.isdir(os.path.join(path, name)):
            raise OSError(f"cannot write {os.path.join(path, name)}, it is a folder, move it away")
    is_new = not os.path.exists(path)
    new = os.path.join(path, "new")  # inside `path`, which may be a mount: a rename cannot leave a mount
    remove_stale(new)
    temporary = temporary_beside(new)
    try:
        with naming(path):
            os.makedirs(temporary)
        for name, contents in files.items():
            with naming(os.path.join(path, name)), open(os.path.join(temporary, name), "wb") as file:
                file.write(contents)
        for name in files:
            with naming(os.path.join(path, name)):
                os.replace(os.path.join(temporary, name), os.path.join(path, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # fails if the files were written
                os.rmdir(path)
