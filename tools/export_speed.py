"""Compare the processor time of an ONNX file in onnxruntime with that of the simulator, and their spike counts.

    OMP_NUM_THREADS=1 python3 tools/onnx_speed.py out_snn.pth --batch 16

The images are noise. The two run in turn on one thread, and the least of several times counts, so that other work on
the machine matters little.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from export.onnx_file import write_onnx
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="file of a spiking network that knows the shape of its images")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    snn = load_dag(args.network).eval()
    images = torch.rand(args.batch, *snn.preprocessing["input_shape"], generator=torch.Generator().manual_seed(0))
    counts = own_counts(snn, images)
    feeds, names = {"image": images.numpy()}, [f"count_{name}" for name in counts]
    with tempfile.TemporaryDirectory() as folder:
        files = {pairs: f"{folder}/{pairs}.onnx" for pairs in (True, False)}
        for pairs, path in files.items():
            write_onnx(snn, path, images, pairs=pairs)
        sessions = [session_of(path) for path in files.values()]
    for session in sessions:
        found = session.run(names, feeds)
        other = sum(int(np.sum(a != b.numpy())) for a, b in zip(found, counts.values()))
        print(f"{other} of {sum(each.size for each in found):,} counts differ")
    with torch.no_grad():
        own, *theirs = least_seconds(
            [lambda: snn(images), *(lambda session=each: session.run(["logits"], feeds) for each in sessions)]
        )
    print(f"onnxruntime / simulator: {theirs[0] / own:.2f}, and {theirs[1] / own:.2f} with pairs=False")


if __name__ == "__main__":
    main()
