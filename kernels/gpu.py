"""Triton, where PyTorch brings it along."""

from contextlib import nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with PyTorch's builds for GPUs
    triton = tl = None


def on_its_gpu(tensor):
    """A context in which Triton launches on the GPU of a tensor, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
