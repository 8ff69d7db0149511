"""Compare the processor time of exported files with that of the simulator, and their spike counts, on one thread.

    OMP_NUM_THREADS=1 python3 tools/export_speed.py out_snn.pth --batch 16

The ONNX file runs in onnxruntime on the whole batch, the C code on its first image. Without --images, the images are
noise. All run in turn, and the least of several times counts, so that other work on the machine matters little.
"""

import argparse
import ctypes
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from export.c import write_c
from export.onnx_file import write_onnx
from runtime.cli import run_script
from spike_dag import load_dag
from tools.check_importer import own_counts

ROUNDS = 15


def session_of(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options)


def least_seconds(calls):
    """The least processor time of each call."""
    times = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, seen in zip(calls, times):
            start = time.process_time()
            call()
            seen.append(time.process_time() - start)
    return [min(seen) for seen in times]


def different(session, feeds, counts):
    """`number, all`: the spike counts that differ from those of the simulator, op name -> [B, ...]."""
    found = session.run([f"count_{name}" for name in counts], feeds)
    other = sum(int(np.sum(a != b.numpy())) for a, b in zip(found, counts.values()))
    return other, sum(each.size for each in found)


def compare_onnx(snn, images, folder):
    """Print the time of the ONNX file, of two timesteps in one number and of single ones."""
    feeds, counts = {"image": images.numpy()}, own_counts(snn, images)
    sessions = []
    for pairs in (True, False):
        write_onnx(snn, f"{folder}/snn.onnx", images, pairs=pairs)
        sessions.append(session_of(f"{folder}/snn.onnx"))
        print("{} of {:,} counts of the ONNX file differ".format(*different(sessions[-1], feeds, counts)))
    calls = [lambda session=each: session.run(["logits"], feeds) for each in sessions]
    own, *theirs = least_seconds([lambda: snn(images), *calls])
    print(f"onnxruntime / simulator: {theirs[0] / own:.2f}, and {theirs[1] / own:.2f} with pairs=False")


def compare_c(snn, image, folder, flags):
    """Print the time of the C code on one image, [1, C, H, W]."""
    write_c(snn, f"{folder}/code", image)
    library = f"{folder}/snn.so"
    command = ["cc", "-std=c99", *flags, "-fPIC", "-shared", "-DSNN_NO_MAIN", f"{folder}/code/snn.c"]
    subprocess.run([*command, "-o", library, "-lm"], check=True)
    run = ctypes.CDLL(library).snn_run
    pixels = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())  # [H, W, C]
    with torch.no_grad():
        output = np.empty(snn(image).numel(), np.float32)
    own, theirs = least_seconds([lambda: snn(image), lambda: run(pixels.ctypes, output.ctypes)])
    print(f"C ({' '.join(flags)}) / simulator, one image: {theirs / own:.2f}")


def main(args):
    torch.set_num_threads(1)
    snn = load_dag(args.network).eval()
    if snn.preprocessing is None:
        raise ValueError(f"{args.network} does not hold the shape of its images, convert it by ann2snn.py")
    images = torch.rand(args.batch, *snn.preprocessing["input_shape"], generator=torch.Generator().manual_seed(0))
    if args.images:
        images = torch.from_numpy(np.load(args.images)[: args.batch]).float()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        compare_onnx(snn, images, folder)
        if shutil.which("cc"):
            for flags in (["-O2"], ["-O2", "-march=native"]):
                compare_c(snn, images[:1], folder, flags)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="file of a spiking network that knows the shape of its images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", help="file of normalised images, .npy of [B, C, H, W] (noise)")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args())
