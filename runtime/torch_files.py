"""Read files of torch.save: check them for damage first, and never run Python code from the file.

state = read_torch_file("weights.pth")     # raises OtherFile, a ValueError, for a file of another kind
"""

import os
import pickle
import re
import zipfile

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # 8-bit floats can only be stored
ZIP = b"PK\x03\x04"
DOS_FOLDER = 0x10  # the attribute of a folder in zip files; torch.save writes no folders
BEGINNING = 64  # bytes read to recognise a file; the patterns below need at most 23 bytes after blanks
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # magic number of torch.save before PyTorch 1.6
SAVE_STATE = "save a state dict with torch.save(net.state_dict(), path)"
OF_PYTORCH = "take the PyTorch network that it was made of, and torch.save(net.state_dict(), path)"
# Files that users mistake for files of torch.save: the pattern of their first bytes, their kind, and advice.
BEGINNINGS = (
    (rb"version https://git-lfs", "it is a pointer of Git LFS, not the file itself", "fetch that with git lfs pull"),
    (rb"\s*<(!DOCTYPE|!doctype|html|\?xml)", "it is a web page", "download the file itself"),
    (rb"\x89HDF\r\n", "it is an HDF5 file, as Keras writes it", "convert its weights to PyTorch"),
    (rb".{4}\0{4}\{", "it is a safetensors file", "torch.save what safetensors.torch.load_file(path) returns"),
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", "it is an ONNX file", OF_PYTORCH),
    (rb"\x93NUMPY", "it is a .npy file of NumPy", SAVE_STATE),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "it is a compressed file", "unpack it"),
    (rb"\x80[\x02-\x05]", "it is a pickle that torch.save did not write", SAVE_STATE),
)
# The same for zip files, with a pattern for the name of an entry.
ENTRIES = (
    (r".*/constants\.pkl", "it is TorchScript", OF_PYTORCH),
    (r".*/archive_format|serialized_exported_program.*", "it is a program of torch.export", OF_PYTORCH),
    (r".*\.npy", "it is a .npz file of NumPy", SAVE_STATE),
)


class OtherFile(ValueError):
    """Error for a file that is damaged or of another kind. found: its kind or damage. advice: what to do, or None."""

    def __init__(self, found, advice=None):
        super().__init__(found if advice is None else f"{found}: {advice}")
        self.found, self.advice = found, advice


def read_torch_file(path, takes_legacy=True):
    """Load a file of torch.save to the CPU.

    takes_legacy: whether to accept files from before PyTorch 1.6, which have no checksums. Raises OSError, with the
    path and the reason, if the file is missing or unreadable, and OtherFile if it is damaged or of another kind.
    """
    start = beginning_of(path)
    if start.startswith(ZIP):
        check_zip(path)
    elif not (takes_legacy and start.startswith(LEGACY)):
        raise kind_of(start)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OtherFile:  # from the code that rebuilds a network
        raise
    except Exception as error:  # damaged bytes can make torch.load raise anything, even OSError
        raise refused(error) from error


def beginning_of(path):
    """The first bytes of a file. Raises OSError if the path is not a file or cannot be read."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist, name another file")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder, name a file")
    if not os.path.isfile(path):  # reading a pipe could block forever
        raise OSError(f"{path} is a pipe or a device, name a file")
    try:
        with open(path, "rb") as file:
            return file.read(BEGINNING)
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror}), see its permissions") from error


def kind_of(start):
    """The OtherFile error for a file that torch.save did not write. start: its first bytes."""
    if not start:
        return OtherFile("it is empty")
    for beginning, found, advice in BEGINNINGS:
        if re.match(beginning, start, re.DOTALL):
            return OtherFile(found, advice)
    return OtherFile("it is truncated, or not a file of weights or of a network that torch.save wrote")


def check_zip(path):
    """Raise OtherFile unless `path` is a complete zip file of torch.save and every entry matches its checksum.

    torch.load does not check the checksums, so a flipped bit would silently change weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            check_kind([part.filename for part in parts])
            damaged = first_not_stored(parts) or (has_checksums(parts) and archive.testzip())
    except OtherFile:
        raise
    except Exception as error:  # damaged bytes can make zipfile raise anything
        raise OtherFile(f"it is truncated or damaged ({type(error).__name__}: {error})") from error
    if damaged:
        raise OtherFile(f"it is damaged, {damaged!r} in it has changed since it was saved")


def check_kind(names):
    """Raise OtherFile if the names of a zip file's entries show that torch.save did not write it."""
    for pattern, found, advice in ENTRIES:
        if any(re.fullmatch(pattern, name) for name in names):
            raise OtherFile(found, advice)
    if not any(name.endswith("/data.pkl") for name in names):
        raise OtherFile("it is a zip file that torch.save did not write", SAVE_STATE)


def first_not_stored(parts):
    """The name of the first entry that torch.save would not write (compressed, of two sizes, or a folder), or None."""
    odd = (part for part in parts if part.compress_type or part.compress_size != part.file_size)
    folders = (part for part in parts if part.external_attr & DOS_FOLDER)
    return next((part.filename for part in (*odd, *folders)), None)


def has_checksums(parts):
    """Whether the entries have checksums; torch.serialization.set_crc32_options(False) sets all of them to 0."""
    return any(part.CRC for part in parts)


def refused(error):
    """The OtherFile error for an error of torch.load; it names the class or function that was not unpickled."""
    name = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if name is None:
        return OtherFile(f"it is damaged, or holds what torch.load does not take ({type(error).__name__})", SAVE_STATE)
    kind = "a whole network" if name[1].startswith("torch.nn.") else "Python objects"
    return OtherFile(
        f"it holds {kind} ({name[1]}), which are not loaded for safety",
        "save the weights alone, torch.save(net.state_dict(), path)",
    )


def unusual_kind(tensor):
    """The kind of a tensor that cannot be a network's weight, in words; None for a plain tensor."""
    if tensor.is_meta:
        return "meta (without values)"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"sparse ({tensor.layout})" if "sparse" in str(tensor.layout) else str(tensor.layout)
    is_narrow = tensor.is_floating_point() and tensor.dtype not in FLOATS
    return f"{tensor.dtype}" if is_narrow else None
