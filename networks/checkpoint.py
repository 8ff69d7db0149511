"""Load trained weights from a file."""

import os

import torch

from runtime.torch_files import OtherFile, read_torch_file, unusual_kind


def load_weights(net, path):
    """Load the state dict in the file `path` into `net`, and return `net`.

    The file may also hold the state dict under the key "state_dict", the format of train_ann.py.

    Raises OSError if the file is missing or unreadable. Raises ValueError, with the name of the first wrong tensor, if
    the file is damaged or of another kind, does not fit the network, or has NaN or infinite weights. After an error
    `net` is unchanged.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint {path}, train one with train_ann.py or name another file")
    try:
        state = read_torch_file(path)
    except OtherFile as error:
        advice = "" if error.advice else ", save it with torch.save(net.state_dict(), path)"
        raise ValueError(f"the checkpoint {path} cannot be read: {error}{advice}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    check_weights_fit(net, state, path)
    net.load_state_dict(state)
    return net


def check_weights_fit(net, state, path):
    """Raise ValueError, with the name of the first wrong tensor, unless `state` fits `net` and is finite."""
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"the checkpoint {path} holds no state dict, save it with torch.save(net.state_dict(), path)")
    expected = net.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"the checkpoint {path} lacks the tensor {name} {list(tensor.shape)} of the network")
        if kind := unusual_kind(state[name]):
            raise ValueError(f"the checkpoint {path} holds {name} as a {kind} tensor, save it as plain floating point")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"the checkpoint {path} does not fit the network: {name} is {list(state[name].shape)} in the file and "
                f"{list(tensor.shape)} in the network, use the network and the data set it was trained with"
            )
        if tensor.is_floating_point() and not state[name].is_floating_point():
            raise ValueError(f"the checkpoint {path} holds {name} as {state[name].dtype}, save it as floating point")
        if not torch.isfinite(state[name].to(tensor.dtype)).all():
            raise ValueError(f"the checkpoint {path} has NaN or infinite values in {name}, train it again")
    unknown = sorted(set(state) - set(expected), key=str)
    if unknown:
        raise ValueError(f"the checkpoint {path} holds the tensor {unknown[0]}, which the network does not have")
