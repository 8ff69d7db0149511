"""Time an epoch of finetuning in one process on one core against several processes on as many cores.

    python3 benchmarks/train.py --network vgg9_bn --processes 2 --rounds 5

The contenders take turns, so that changes in the machine's speed affect both; a ratio is computed within each round,
and the table shows the median. Starting the processes does not count. `--device cuda` gives each process a GPU.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.cli import OneLineParser, run_script
from runtime.flags import whole_number

SEED = 0


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="vgg9_bn", help="a network of build_network.py (%(default)s)")
    parser.add_argument("--processes", type=whole_number(2), default=2, help="processes of torchrun (%(default)s)")
    parser.add_argument("--batch_size", type=whole_number(1), default=128, help="images per step (%(default)s)")
    parser.add_argument("--batches", type=whole_number(1), default=8, help="steps of the epoch (%(default)s)")
    parser.add_argument("--rounds", type=whole_number(1), default=5, help="turns of each (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--epoch", action="store_true", help="only train, in this process or those of torchrun")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(args):
    from spike_dag import format_table

    if args.epoch:
        print(epoch_seconds(args))
        return
    counts = (1, args.processes)
    seconds = {count: [] for count in counts}
    for _ in range(args.rounds):
        for count in counts:
            seconds[count].append(run(args, count))
    ratio = statistics.median(one / several for one, several in zip(*seconds.values()))
    rows = [("network", "batch", "processes", "s/epoch", "faster")]
    for count, times in seconds.items():
        faster = "1" if count == 1 else f"{ratio:.2f}"
        rows.append((args.network, args.batch_size, count, f"{statistics.median(times):.2f}", faster))
    print(format_table(rows))


def run(args, count):
    """The seconds of an epoch in `count` processes of one thread each. Raises ValueError if they fail."""
    own = [f"--{name}={getattr(args, name)}" for name in ("network", "batch_size", "batches", "device")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [sys.executable, *torchrun * (count > 1), __file__, "--epoch", *own]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise ValueError(f"{count} processes failed: {ended.stderr.strip().splitlines()[-1]}")
    return float(ended.stdout)


def epoch_seconds(args):
    """The seconds of an epoch of finetuning on random images; an epoch before it compiles and fills caches."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from ann_parser import parse_ann_model
    from build_network import get_net_by_name, input_size
    from quantization import quantize_finetune
    from runtime.processes import join, leave

    device, size = join(args.device), input_size(args.network)
    torch.manual_seed(SEED)
    net = get_net_by_name(args.network, 3, 10).eval()
    images = torch.randn(args.batch_size * args.batches, 3, size, size)
    loader = DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), args.batch_size)
    graph, how = parse_ann_model(net, (images[:1],)), SimpleNamespace(finetune_epochs=1, weight_bitwidth=4)
    for _ in range(2):
        start = time.perf_counter()
        quantize_finetune(graph, loader, torch.nn.CrossEntropyLoss(), device, how)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    leave()
    return seconds


if __name__ == "__main__":
    run_script(main, parse_args, shared=True)
