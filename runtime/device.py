"""Which device to run on, and seeds."""

import random

import numpy as np
import torch


def choose_device(name):
    """`torch.device` for "auto" (the least loaded GPU by GPUtil, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises ValueError for a name that torch does not know or a device that this machine does not have.
    """
    if name == "auto":
        return torch.device(least_loaded_gpu() if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown --device '{name}', use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here, use --device cpu")
    return device


def least_loaded_gpu():
    """The name of the GPU with the lowest load; the first one where nvidia-smi gives no answer."""
    import GPUtil

    ids = GPUtil.getAvailable(order="load", limit=1, maxLoad=1.0, maxMemory=1.0)
    return f"cuda:{ids[0]}" if ids and ids[0] < torch.cuda.device_count() else "cuda:0"


def seed_everything(seed):
    """Same seed, same machine, same thread count: same bits."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
