"""Which device to run on, seeds, and eval mode for a while."""

import math
import random
from contextlib import contextmanager

import numpy as np
import torch


def choose_device(name):
    """`torch.device` for "auto" (the least loaded GPU by GPUtil, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises ValueError for an unknown name, and for a device that this machine does not have.
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
    """The name of the GPU with the lowest load; the first GPU if nvidia-smi does not answer."""
    import GPUtil

    # nvidia-smi numbers all GPUs, torch only those in CUDA_VISIBLE_DEVICES and in another order: compare their UUIDs
    visible = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    index_of = {f"GPU-{each.uuid}": index for index, each in enumerate(visible)}
    loads = {gpu.uuid: gpu.load for gpu in GPUtil.getGPUs() if gpu.uuid in index_of and not math.isnan(gpu.load)}
    return f"cuda:{index_of[min(loads, key=loads.get)] if loads else 0}"


def seed_everything(seed):
    """Seed all random generators: on one machine, with one thread count, the same seed gives the same bits."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def in_eval_mode(net):
    """Within it a network and all of its modules are in eval mode; afterwards each has its own mode again."""
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
