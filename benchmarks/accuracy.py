"""Compare the loss and the cost of conversions: networks x weight bits x timesteps x methods, as a table and JSON.

    python3 benchmarks/accuracy.py --networks resnet20:checkpoint/resnet20_cifar10_ann.pth --dataset /path/to/cifar10 \\
        --bits 8 --timesteps 4 8 16 --methods "mse: --threshold mse" "listen: --threshold mse --listen T" \\
        --test_images 2000 --results accuracy.json

A method is a name and flags of ann2snn.py, in which T means the number of timesteps. The default methods are `METHODS`.
Each conversion is measured on evenly spaced test images. Its price is the timesteps from image to image and to the
answer, and the spikes and synaptic operations per image. With several `--seeds` the table shows mean and spread.
Rows that differ only in options after the finetuning share the finetuned network. Without loader workers, each row is
the same as in a run of its own.
"""

import argparse
import statistics
import sys
import time
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command_line import add_conversion_flags, parse_conversion
from options import ConversionOptions, SimulatorOptions, SpikeFinetuneOptions
from runtime.cli import OneLineParser, run_script
from runtime.flags import bitwidths, whole_number

METHODS = {
    "quantile": "-e 0",
    "mse": "-e 0 --threshold mse",
    "channel": "-e 0 --threshold mse --per_channel both",
    "calibrated": "-e 0 --threshold mse --per_channel both --spike_epochs_unlabelled 10",
    "listen": "-e 0 --threshold mse --per_channel both --listen T",
}
OBSERVED = 20  # images for which synaptic operations are counted
DATA_FLAGS = (  # flags on which the loaders depend
    "dataset",
    "dataset_root",
    "image_size",
    "batch_size",
    "test_batch_size",
    "num_workers",
    "val_share",
    "seed",
)


def after_finetuning():
    """Names of the options that do not affect the finetuning; conversions that differ only in these share it."""
    names = {each.name for cls in (SpikeFinetuneOptions, SimulatorOptions) for each in fields(cls)}
    of_conversion = {each.name for each in fields(ConversionOptions) if each.metadata["group"] == "conversion"}
    return names | (of_conversion - {"calibration_samples"})  # calibration sets the initial activation levels


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_table_flags(parser)
    parser.add_argument("--bits", nargs="+", type=bitwidths, default=[8], help="weight bit widths (8)")
    parser.add_argument("--methods", nargs="+", default=None, metavar="NAME: FLAGS", help="flags of ann2snn.py by name")
    parser.add_argument("--seeds", nargs="+", type=whole_number(0), default=[0], help="seeds (0)")
    return parser.parse_args(argv)


def add_table_flags(parser):
    """Add the flags for networks, timesteps, images and results, which benchmarks/peers.py also has."""
    parser.add_argument("--networks", nargs="+", required=True, metavar="NAME:FILE", help="names and trained weights")
    parser.add_argument("--timesteps", nargs="+", type=whole_number(1), default=[4, 8, 16, 32], help="T (4 8 16 32)")
    parser.add_argument("--dataset", default="digits", help="data set, as in ann2snn.py (%(default)s)")
    parser.add_argument("--test_images", type=whole_number(1), default=None, help="number of test images (all)")
    parser.add_argument("--results", metavar="FILE.json", help="file for all numbers, as JSON")
    parser.add_argument(
        "--debug", action=argparse.BooleanOptionalAction, default=False, help="show the traceback of an error"
    )


def main(args):
    from runtime.files import check_writable, write_json
    from spike_dag import format_table

    check_writable(args.results)
    methods = METHODS if args.methods is None else named_methods(args.methods)
    rows = [("network", "bits", "method", "T", "ANN %", "SNN %", "points", "interval", "latency", "spikes", "synops")]
    found, loaders = [], {}
    for network in args.networks:
        for bits in args.bits:
            finetuned = {}
            for method, flags in methods.items():
                for timesteps in args.timesteps:
                    of_seeds = [
                        conversion_args(network, bits, flags, timesteps, seed, args.dataset) for seed in args.seeds
                    ]
                    runs = [measure(args, each, loaders, finetuned) for each in of_seeds]
                    found += [{"network": network, "bits": bits, "method": method, **run} for run in runs]
                    rows.append((network.split(":")[0], bits, method, timesteps, *summary(runs)))
                    print(*rows[-1], file=sys.stderr)
                    if args.results:
                        write_json(args.results, {"dataset": args.dataset, "methods": methods, "runs": found})
    print(format_table(rows))


def named_methods(texts):
    """Name -> flags of the methods to compare. Raises ValueError if two methods have the same name."""
    methods = {}
    for name, flags in map(named_flags, texts):
        if name in methods:
            raise ValueError(f"two methods are named '{name}', give each its own name")
        methods[name] = flags
    return methods


def named_flags(text):
    """Split "name: flags" into `name, flags`. Raises ValueError for text without a colon."""
    name, colon, flags = text.partition(":")
    if not colon:
        raise ValueError(f"method '{text}' has no name, write it as \"name: flags\"")
    return name.strip(), flags


def conversion_args(network, bits, flags, timesteps, seed, dataset):
    """The flags of one conversion, parsed as in ann2snn.py. Raises ValueError for a network without a file."""
    parser = OneLineParser(prog="a method of benchmarks/accuracy.py")
    add_conversion_flags(parser)
    name, colon, file = network.rpartition(":")
    if not colon or name == "torchvision":
        raise ValueError(f"network '{network}' has no weights, write it as NAME:FILE")
    given = [word.replace("T", str(timesteps)) if word == "T" else word for word in flags.split()]
    given += ["--timesteps", str(timesteps), "--seed", str(seed), "--dataset", dataset, "--ann_weight", file]
    widths = bits if isinstance(bits, (int, str)) else ",".join(map(str, bits))
    found = parse_conversion(parser, [*given, "--weight_bitwidth", str(widths)], speaks=False)
    found.net_name = name
    return found


def measure(args, flags, loaders, finetuned):
    """Make and measure one conversion; returns accuracies in percent, its price, and seconds.

    flags: those of ann2snn.py. loaders, finetuned: caches of loaders and finetuned networks, to which this call adds.
    """
    import torch

    from build_network import input_size
    from finetuning.on_spikes import finetune_on_spikes
    from pipeline import check_command_line, choose_measure, convert_by_options
    from runtime.device import choose_device

    check_command_line(flags)
    device = choose_device(flags.device)
    flags.image_size = input_size(flags.net_name)
    test_loader, train_loader, train_val_loader = load_images(flags, loaders)
    criterion, evaluate = choose_measure(flags)
    flags, net, qnet, finetuning_seconds = finetune(
        flags, (train_loader, train_val_loader), criterion, device, finetuned
    )
    start = time.perf_counter()
    snn = convert_by_options(qnet, train_val_loader, device, flags)
    snn = finetune_on_spikes(snn, qnet, net, train_loader, train_val_loader, criterion, device, flags)
    seconds = finetuning_seconds + time.perf_counter() - start
    images, targets = evenly_spaced(test_loader, args.test_images)
    batches = list(zip(images.split(100), targets.split(100)))
    spiking = evaluate(snn, batches, device, criterion, flags.timesteps)
    steps = snn.duration()
    return {
        "T": flags.timesteps,
        "seed": flags.seed,
        "ann_top1": evaluate(net, batches, device, criterion)["top1"],
        "qnet_top1": evaluate(qnet, batches, device, criterion)["top1"],
        "snn_top1": spiking["top1"],
        "samples": len(images),
        "interval": steps["interval"],
        "latency": steps["latency"],
        **price(snn, images[:: max(1, len(images) // OBSERVED)].to(device), torch),
        "conversion_seconds": seconds,
    }


def load_images(flags, loaders):
    """The loaders of test, training and calibration images, with their random states as when they were made."""
    from datasets import DETECTION_DATASETS, get_dataset
    from runtime.device import seed_everything

    if flags.dataset in DETECTION_DATASETS:
        raise ValueError(f"--dataset {flags.dataset} is for detectors, this table compares classifiers")
    key = str([getattr(flags, name) for name in DATA_FLAGS])
    if key not in loaders:
        seed_everything(flags.seed)
        found = get_dataset(flags)
        loaders[key] = found, random_state(found[2])
    (test_loader, _, train_loader, train_val_loader), state = loaders[key]
    set_random_state(train_loader, state)
    return test_loader, train_loader, train_val_loader


def finetune(flags, loaders, criterion, device, finetuned):
    """`flags, net, qnet, seconds`; flags has the weight bits as numbers. finetuned: cache of finetuned networks."""
    from pipeline import Networks, load_network, quantize

    key = str(sorted((name, str(value)) for name, value in vars(flags).items() if name not in after_finetuning()))
    net, flags = load_network(flags, loaders[0].dataset)
    made, start = Networks(net.to(device)), time.perf_counter()
    if key not in finetuned:
        quantize(flags, made, loaders, criterion, device)
        finetuned[key] = made, time.perf_counter() - start, random_state(loaders[0])
    made, seconds, state = finetuned[key]
    set_random_state(loaders[0], state)  # the next steps run as if this conversion were the only one
    return flags, made.ann, made.qnet, seconds


def random_state(loader):
    """The states of PyTorch's random generator and of the loader's."""
    import torch

    return torch.get_rng_state(), loader.generator.get_state()


def set_random_state(loader, state):
    """Restore a `random_state`."""
    import torch

    torch.set_rng_state(state[0])
    loader.generator.set_state(state[1])


def evenly_spaced(loader, most):
    """`most` evenly spaced images [N, C, H, W] and labels [N] of a loader; all of them if `most` is None."""
    import torch

    images, targets = (torch.cat(parts) for parts in zip(*loader))
    kept = torch.linspace(0, len(images) - 1, min(most or len(images), len(images))).long()
    return images[kept], targets[kept]


def price(snn, images, torch):
    """Spikes and synaptic operations per image. images: [B, C, H, W]."""
    from reports.energy import count_operations
    from reports.observe import observe
    from spike_simulator import node_shapes

    seen = observe(snn, images)
    ann = {"spikes": 0.0, "synops": 0.0}
    counts = {node: count.mean(0) for node, count in seen.counts.items()}
    fired = {entry.out for entry in snn.ops.values() if entry.op.neuron is not None}
    ann["spikes"] = sum(count.sum().item() for node, count in counts.items() if node in fired)
    operations = count_operations(snn, node_shapes(snn, images[:1]), counts, snn.timesteps)
    ann["synops"] = sum(each["synops"] for each in operations.values())
    return ann


def summary(runs):
    """The cells of a row: means over the seeds, and the standard deviation of the loss in points."""
    mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    points = [run["snn_top1"] - run["ann_top1"] for run in runs]
    spread = f" +- {statistics.stdev(points):.2f}" if len(runs) > 1 else ""
    prices = (f"{mean['spikes'] / 1e3:.1f}k", f"{mean['synops'] / 1e6:.2f}M")
    accuracies = f"{mean['ann_top1']:.2f}", f"{mean['snn_top1']:.2f}", f"{statistics.mean(points):+.2f}{spread}"
    return (*accuracies, int(mean["interval"]), int(mean["latency"]), *prices)


if __name__ == "__main__":
    run_script(main, parse_args())
