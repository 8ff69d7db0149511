"""Plain data with tensors in it as a file of safetensors, which holds no code.

    write_tensor_file(path, data, what)     # dicts, lists, names, numbers, tensors
    data = read_tensor_file(path)           # the same, with tuples for lists

The tensors lie in the file under the path of their place in the data ("ops.3.tensors.weight_q"); the rest is JSON in
the file's metadata, whose values have to be strings, with a sha256 of everything.
"""

import hashlib
import json
import re

import torch

from runtime.files import write_atomically
from runtime.packages import check_packages
from runtime.torch_files import SAFETENSORS, OtherFile, beginning_of

TENSOR, DTYPE = "__tensor__", "__dtype__"


def is_tensor_file(path):
    """Whether a file begins as one of safetensors. Raises OSError if it cannot be read."""
    return bool(re.match(SAFETENSORS, beginning_of(path), re.DOTALL))


def write_tensor_file(path, data, what):
    """Write plain data. what: the flag that needs the package, for a ValueError where it is missing."""
    check_packages(what, "safetensors")
    from safetensors.torch import save

    tensors = {}
    text = json.dumps(without_tensors(data, "", tensors))
    metadata = {"format": "pt", "data": text, "sha256": hash_of(text, tensors)}
    contents = save(tensors, metadata)

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(contents)

    write_atomically(path, write)


def without_tensors(value, place, tensors):
    """A value for JSON; its tensors go into the dict `tensors`.

    They become C-contiguous and own their memory: safetensors writes other arrays in a wrong order, or refuses them. A
    tensor with its channels last says so, because sums of floats depend on the order in memory.
    """
    if isinstance(value, torch.Tensor):
        tensors[place] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        is_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        return {TENSOR: place, "channels_last": is_last and not value.is_contiguous()}
    if isinstance(value, torch.dtype):
        return {DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {key: without_tensors(item, f"{place}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_tensors(item, f"{place}.{i}".lstrip("."), tensors) for i, item in enumerate(value)]
    return value


def read_tensor_file(path):
    """The data in a file of `write_tensor_file`.

    Raises OSError if it cannot be read, OtherFile for a file that is damaged or holds something else, and ValueError,
    with the package to install, if safetensors is missing.
    """
    check_packages(f"{path} is a safetensors file and", "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, KeyError, OSError) as error:  # KeyError: a type of numbers that torch lacks
        raise OtherFile(f"it is a safetensors file, truncated or damaged ({type(error).__name__}: {error})") from error
    if "data" not in metadata:
        raise OtherFile("it is a safetensors file of weights, without a network")
    expected = {"format": "pt", "data": metadata["data"], "sha256": hash_of(metadata["data"], tensors)}
    if metadata != expected:
        raise OtherFile("it is damaged, its sha256 is another")
    try:
        return with_tensors(json.loads(metadata["data"]), tensors)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise OtherFile(f"it is damaged ({type(error).__name__}: {error})") from error


def with_tensors(value, tensors):
    """The inverse of `without_tensors`; lists become tuples."""
    if isinstance(value, list):
        return tuple(with_tensors(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        tensor = tensors[value[TENSOR]]
        return tensor.contiguous(memory_format=torch.channels_last) if value["channels_last"] else tensor
    if DTYPE in value:
        dtype = getattr(torch, value[DTYPE])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value[DTYPE]} is no type of numbers")
        return dtype
    return {key: with_tensors(item, tensors) for key, item in value.items()}


def hash_of(text, tensors):
    """sha256 of the JSON text and of all tensors, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        digest.update(tensors[key].contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
