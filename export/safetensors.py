"""A network as a file of safetensors, which `spike_dag.load_dag` reads as it reads out_snn.pth."""

import os

from runtime.tensor_files import write_tensor_file


def write_safetensors(snn, path, images=None):
    """Write a network, converted or not; returns a line that says so. images: not needed.

    Raises ValueError, with the package to install, if safetensors is missing, and OSError for a failed write.
    """
    _, (data,) = snn.__reduce__()  # what torch.save writes: plain data
    write_tensor_file(path, data, "--safetensors")
    return f"safetensors: {path} ({os.path.getsize(path):,} bytes); load_dag({str(path)!r}) reads it"
