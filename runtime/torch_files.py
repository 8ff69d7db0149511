"""Read files of torch.save: check them for damage first, and never run Python code from the file.

state = read_torch_file("weights.pth")     # raises OtherFile, a ValueError, for a file of another kind
state = read_weights_file("weights.pth")   # the same for files of torch.save and of safetensors
"""

import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict

import torch

from runtime.packages import check_packages

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # 8-bit floats can only be stored
ZIP = b"PK\x03\x04"
DOS_FOLDER = 0x10  # the attribute of a folder in zip files; torch.save writes no folders
BEGINNING = 512  # bytes read to recognise a file; a tar archive has its name behind 257 bytes
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # magic number of torch.save before PyTorch 1.6
SAVE_STATE = "save a state dict with torch.save(net.state_dict(), path)"
OF_PYTORCH = "take the PyTorch network that it was made of, and torch.save(net.state_dict(), path)"
OF_ONNX = f"give it as the network, it has its own weights, or {OF_PYTORCH}"
SAFETENSORS = rb".{4}\0{4}\{"  # the length of a header, and the header in JSON
# Files that users mistake for files of torch.save: the pattern of their first bytes, their kind, and advice.
BEGINNINGS = (
    (rb"version https://git-lfs", "it is a pointer of Git LFS, not the file itself", "fetch that with git lfs pull"),
    (rb"\s*<(!DOCTYPE|!doctype|html|\?xml)", "it is a web page", "download the file itself"),
    (rb"\x89HDF\r\n", "it is an HDF5 file, as Keras writes it", "convert its weights to PyTorch"),
    (SAFETENSORS, "it is a safetensors file", "torch.save what safetensors.torch.load_file(path) returns"),
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", "it is an ONNX file", OF_ONNX),
    (rb".{4}TFL3", "it is a TensorFlow Lite file", "convert its weights to PyTorch"),
    (rb"GGUF", "it is a GGUF file", "convert its weights to PyTorch"),
    (rb".{257}ustar", "it is a tar archive", "unpack it"),
    (rb"\x93NUMPY", "it is a .npy file of NumPy", SAVE_STATE),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "it is a compressed file", "unpack it"),
    (rb"\s*\{\s*\"", "it is a JSON file", SAVE_STATE),
    (rb"\x80[\x02-\x05]", "it is a pickle that torch.save did not write", SAVE_STATE),
)
# The same for zip files, with a pattern for the name of an entry.
ENTRIES = (
    (r".*/constants\.pkl", "it is TorchScript", OF_PYTORCH),
    (r".*/archive_format|serialized_exported_program.*", "it is a program of torch.export", OF_PYTORCH),
    (r".*\.npy", "it is a .npz file of NumPy", SAVE_STATE),
    (r"model\.weights\.h5", "it is a Keras file", "convert its weights to PyTorch"),
    (r".*\.(pth|pt|bin|safetensors)", "it is a zip file with a file of weights in it", "unpack it"),
)
# Classes that hold settings or numbers, which training scripts save beside weights. They are loaded without contents.
LEFT_OUT = (
    *("argparse.Namespace", "types.SimpleNamespace", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "builtins.list", "builtins.dict", "builtins.float", "builtins.int"),
    *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
)
# Dicts of other classes, and those that are made by a call. They are loaded as plain dicts.
DICTS = (
    *("easydict.EasyDict", "yacs.config.CfgNode", "lightning_fabric.utilities.data.AttributeDict"),
    *("lightning.fabric.utilities.data.AttributeDict", "pytorch_lightning.utilities.parsing.AttributeDict"),
)
CALLED_DICTS = ("collections.defaultdict",)
NETWORK_MODULES = r"torch\.(nn\.(?!modules\.loss\.|parameter\.)|fx\.)"  # what a pickled network is made of


class OtherFile(ValueError):
    """Error for a file that is damaged or of another kind. found: its kind or damage. advice: what to do, or None."""

    def __init__(self, found, advice=None):
        super().__init__(found if advice is None else f"{found}: {advice}")
        self.found, self.advice = found, advice


class LeftOut:
    """Stands for an object that is not loaded, whatever the file does with it. It keeps and runs nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def empty_dict(*args):
    """Stands for a class of dicts that is called with arguments of its own."""
    return {}


def inert():
    """What `torch.load` takes for the classes above: `(replacement, name)` each. None of them runs code of a file."""
    replacements = ((LeftOut, LEFT_OUT), (OrderedDict, DICTS), (empty_dict, CALLED_DICTS))
    return [(replacement, name) for replacement, names in replacements for name in names]


def read_weights_file(path):
    """Load a file of torch.save or of safetensors to the CPU. Its contents decide, not the end of its name.

    Raises like `read_torch_file`, and ValueError, with the package to install, if safetensors is missing.
    """
    if not re.match(SAFETENSORS, beginning_of(path), re.DOTALL):
        return read_torch_file(path)
    check_packages(f"{path} is a safetensors file and", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError, OSError) as error:  # KeyError: a type of numbers that torch lacks
        raise OtherFile(f"it is a safetensors file, truncated or damaged ({type(error).__name__}: {error})") from error


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
        # torch.load gets the file, not its path: by the end of a name it would choose another reader
        with open(path, "rb") as file, torch.serialization.safe_globals(inert()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OtherFile:  # from the code that rebuilds a network
        raise
    except Exception as error:  # damaged bytes can make torch.load raise anything, even OSError
        raise refused(error, path) from error


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


def refused(error, path):
    """The OtherFile error for an error of torch.load; it names the class or function that was not unpickled."""
    name = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if name is None:
        return OtherFile(f"it is damaged, or holds what torch.load does not take ({type(error).__name__})", SAVE_STATE)
    is_network = any(re.match(NETWORK_MODULES, each) for each in (name[1], *pickled_names(path)))
    kind, verb = ("a whole network", "is") if is_network else ("Python objects", "are")
    return OtherFile(
        f"it holds {kind} ({name[1]}), which {verb} not loaded for safety",
        "save the weights alone, torch.save(net.state_dict(), path)",
    )


def pickled_names(path):
    """The classes and functions that a file of torch.save names, read without running any of it."""
    names = []
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                    return global_names(archive.open(pickled))
            file.seek(0)
            for _ in range(4):  # the magic number, the protocol, the system, and what was saved
                names += global_names(file)
    except Exception:  # damaged bytes can make pickletools raise anything; names found so far will do
        pass
    return names


def global_names(file):
    """The names in one pickle, of protocol 2 as torch.save writes it."""
    return [arg.replace(" ", ".") for opcode, arg, _ in pickletools.genops(file) if opcode.name == "GLOBAL"]


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
