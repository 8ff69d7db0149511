"""The choice of the device, random seeds, and temporary eval mode."""

import math
import random
from contextlib import contextmanager

import numpy as np
import torch


def choose_device(name):
    """The `torch.device` for "auto" (the least loaded GPU by GPUtil, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises ValueError for an unknown name or a GPU that torch does not see.
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
    """The name of the GPU with the lowest load, such as "cuda:1"; the first GPU if nvidia-smi does not answer."""
    import GPUtil

    # nvidia-smi numbers all GPUs; torch numbers those in CUDA_VISIBLE_DEVICES, in another order. So compare UUIDs.
    visible = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    index_of = {f"GPU-{each.uuid}": index for index, each in enumerate(visible)}
    loads = {gpu.uuid: gpu.load for gpu in GPUtil.getGPUs() if gpu.uuid in index_of and not math.isnan(gpu.load)}
    return f"cuda:{index_of[min(loads, key=loads.get)] if loads else 0}"


def seed_everything(seed):
    """Seed all random generators. With the same machine and thread count, the same seed gives the same bits."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def in_eval_mode(net):
    """Context in which a network and all its modules are in eval mode; afterwards each module has its old mode."""
    modes = {module: module.training for module in net.modules()}
    try:
        if any(modes.values()):  # setting what is set takes half a millisecond, a batch of a small network fifteen
            net.eval()
        yield
    finally:
        for module, mode in modes.items():
            if module.training != mode:
                module.training = mode
