"""Triton, if it is installed; PyTorch's builds for GPUs include it."""

from contextlib import nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch's builds for CPUs do not include it
    triton = tl = None


def on_its_gpu(tensor):
    """Context in which Triton launches on the tensor's GPU, even if another GPU is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
