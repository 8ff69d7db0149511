"""Compare the loss and the cost of conversions: networks x weight bits x timesteps x methods, as a table and JSON.

    python3 benchmarks/accuracy.py --networks resnet20:checkpoint/resnet20_cifar10_ann.pth --dataset /path/to/cifar10 \\
        --bits 8 --timesteps 4 8 16 --methods "mse: --threshold mse" "listen: --threshold mse --listen T" \\
        --test_images 2000 --results accuracy.json

A network is NAME:FILE or any other form that ann2snn.py takes, with flags of its own behind it:
"path/to/net.py:Net:weights.pth --preprocess imagenet". A method is a name and flags of ann2snn.py, in which T means the
number of timesteps. The default methods are `METHODS`. Each conversion is measured on evenly spaced test images. Its
price is the timesteps from image to image and to the answer, and the spikes and synaptic operations per image. With
several `--seeds` the table shows mean and spread. Rows that differ only in options after the finetuning share the
finetuned network. Without loader workers, each row is the same as in a run of its own.

A row that `--results` has is not measured again, so a run that was cut off goes on where it stopped; `--keep` does the
same for finetuned networks. The tables of docs/accuracy.md are planned in benchmarks/tables.py:

    python3 benchmarks/accuracy.py --tables digits without_labels --cifar10 /path/to/cifar10 --results accuracy.json \\
        --keep finetuned --write docs/accuracy.md
"""

import argparse
import statistics
import sys
import time
from dataclasses import fields
from functools import partial
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import tables
from benchmarks.network_forms import check_has_weights, split_network, title_of
from benchmarks.pages import table_of_rows, write_tables
from benchmarks.results import Kept, Results, key_of, where_and_when
from benchmarks.tables import PLACES, Row, check_places, filled_in
from command_line import add_conversion_flags, parse_conversion
from options import ConversionOptions, SimulatorOptions, SpikeFinetuneOptions
from runtime.cli import OneLineParser, did_you_mean, run_script
from runtime.flags import bitwidths, whole_number
from script_options import DataOptions

METHODS = {
    "quantile": "-e 0",
    "mse": "-e 0 --threshold mse",
    "channel": "-e 0 --threshold mse --per_channel both",
    "calibrated": "-e 0 --threshold mse --per_channel both --spike_epochs_unlabelled 10",
    "listen": "-e 0 --threshold mse --per_channel both --listen T",
}
TEST_BATCH = 100  # images that are simulated at a time
MOST_LOADERS = 3  # data sets in memory; CIFAR-10 takes 184 MB for each seed and normalisation
OBSERVED = 20  # images for which synaptic operations are counted
# Flags on which the loaders depend.
DATA_FLAGS = (*(each.name for each in fields(DataOptions)), "image_size", "channels", "seed")
FORMAT = "ann2snn-accuracy-1"
NUMBERS = ("ann_top1", "qnet_top1", "snn_top1", "samples", "interval", "latency", "spikes", "synops")
ACCURACIES = ("ANN %", "SNN %", "points", "agree %")
HEADINGS = ("network", "bits", "method", "T", *ACCURACIES, "interval", "latency", "spikes", "synops")


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
    parser.add_argument("--tables", nargs="+", metavar="TABLE", help="tables of the plan, or all that have their data")
    parser.add_argument("--keep", metavar="DIR", help="folder for finetuned networks, which are then reused (none)")
    args = parser.parse_args(argv)
    chosen = [name for name in ("networks", "tables", "write") if getattr(args, name)]
    if not chosen or chosen[:2] == ["networks", "tables"]:
        parser.error("say what to measure, --networks or --tables")
    fixed = sorted(parser.given & {"bits", "methods", "seeds", "timesteps", "dataset"})
    if args.tables and fixed:
        parser.error(f"--{fixed[0]} is for --networks, benchmarks/tables.py has that of --tables")
    return args


def add_table_flags(parser, has_timesteps=True):
    """Add the flags for networks, timesteps, images and results, which the comparisons with others also have."""
    parser.add_argument("--networks", nargs="+", metavar="NETWORK", help="NAME:FILE, or another form and flags")
    if has_timesteps:
        parser.add_argument(
            "--timesteps", nargs="+", type=whole_number(1), default=[4, 8, 16, 32], help="T (4 8 16 32)"
        )
    parser.add_argument("--dataset", default="digits", help="data set, as in ann2snn.py (%(default)s)")
    parser.add_argument("--test_images", type=whole_number(1), default=None, help="number of test images (all)")
    parser.add_argument("--results", metavar="FILE.json", help="file for all numbers, as JSON; what it has is kept")
    parser.add_argument("--again", action="store_true", help="measure again what --results has")
    parser.add_argument("--write", metavar="FILE.md", help="write the tables of the plan into their places in a page")
    for name, (what, shown) in PLACES.items():
        parser.add_argument(f"--{name}", metavar=shown.rpartition("/")[2], help=what)
    parser.add_argument(
        "--debug", action=argparse.BooleanOptionalAction, default=False, help="show the traceback of an error"
    )


def main(args):
    from runtime.files import check_writable
    from spike_dag import format_table

    check_writable(args.write)
    if args.write and not args.results:
        raise ValueError("--write needs the rows of --results FILE.json")
    results = Results(args.results, FORMAT, Row.FACTS, NUMBERS)
    chosen = chosen_tables(args)
    rows = [row for table in chosen for row in table.rows(args.test_images)] if args.tables else rows_of_networks(args)
    if rows:
        measure_rows(args, rows, results)
        print(format_table([HEADINGS, *summaries(rows, results)]))
    if args.write:
        write_tables(args.write, {table.name: table_of_rows(table, results) for table in chosen})


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def chosen_tables(args):
    """The `tables.Table`s to measure and to write; all of them, to write, without --tables.

    Raises ValueError for an unknown table and for missing data.
    """
    if not args.tables:
        return list(tables.TABLES.values())
    named = [name for name in args.tables if name != "all"]
    for name in named:
        if name not in tables.TABLES:
            known = ", ".join(tables.TABLES)
            raise ValueError(f"no table {name}, there are {known}{did_you_mean(name, tables.TABLES)}")
        check_places(tables.TABLES[name], vars(args))
    takes_all = "all" in args.tables
    return [table for table in tables.TABLES.values() if table.name in named or (takes_all and has_data(args, table))]


def has_data(args, table):
    """Whether the data of a table are given; if not, a line on stderr says so."""
    try:
        check_places(table, vars(args))
    except ValueError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False
    return True


def rows_of_networks(args):
    """The `tables.Row`s of --networks x --bits x --methods x --timesteps x --seeds."""
    methods = METHODS if args.methods is None else named_methods(args.methods)
    return [
        Row(network, title_of(network), args.dataset, bits, method, flags, T, seed, args.test_images)
        for network in args.networks or ()
        for bits in args.bits
        for method, flags in methods.items()
        for T in args.timesteps
        for seed in args.seeds
    ]


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
    return name.strip(), flags.strip()


def measure_rows(args, rows, results):
    """Measure the rows that `results` lacks, and add each to it."""
    kept, loaders, done = Kept(args.keep), {}, set()
    wanted = [(row, *flags_and_key(args, row)) for row in rows]  # finds every wrong row before the work
    for _, group in groupby(wanted, lambda each: (each[0].network, each[0].bits)):
        finetuned = {}
        for row, flags, key in group:
            run = results.with_key(key)
            if run is None or (args.again and key not in done):
                run = measure(args, flags, loaders, finetuned, kept, row.test_images)
            named = {"network": row.network, "bits": row.bits, "method": row.method}
            results.add({**run, **named, **row.facts(), "key": key})
            done.add(key)
            print(*summary_of(row, [run]), file=sys.stderr)


def flags_and_key(args, row):
    """`flags, key` of a row: the flags of its conversion, and what its numbers depend on, as one text."""
    network, dataset = (filled_in(text, vars(args)) for text in (row.network, row.dataset))
    flags = conversion_args(network, row.bits, row.flags, row.T, row.seed, dataset)
    check_row(network, flags)
    return flags, key_of(flags, default_flags(), test_images=row.test_images, format=FORMAT)


def check_row(network, flags):
    """Raise ValueError for a network without weights, a wrong line of flags, and a data set of detectors."""
    from datasets import DETECTION_DATASETS
    from pipeline import check_command_line

    check_has_weights(network, flags)
    check_command_line(flags)
    if flags.dataset in DETECTION_DATASETS:
        raise ValueError(f"--dataset {flags.dataset} is for detectors, this table compares classifiers")


def default_flags():
    """Name -> default of every flag of a conversion."""
    parser = OneLineParser(prog="benchmarks/accuracy.py")
    add_conversion_flags(parser)
    return vars(parse_conversion(parser, [], speaks=False))


def conversion_args(network, bits, flags, timesteps, seed, dataset):
    """The flags of one conversion, parsed as in ann2snn.py. Raises ValueError for a network of no known form.

    network: NETWORK of the command line. flags: those of the method; they override the network's.
    """
    parser = OneLineParser(prog="a network or method of benchmarks/accuracy.py")
    add_conversion_flags(parser)
    name, file, own = split_network(network)
    given = [str(timesteps) if word == "T" else word for word in flags.split()]
    widths = bits if isinstance(bits, (int, str)) else ",".join(map(str, bits))
    given = ["--dataset", dataset, *own, *given, "--timesteps", str(timesteps), "--seed", str(seed)]
    given += ["--ann_weight", file] if file else []
    found = parse_conversion(parser, [*given, "--weight_bitwidth", str(widths)], speaks=False)
    found.net_name = name
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def measure(args, flags, loaders, finetuned, kept=None, test_images=None):
    """Make and measure one conversion; returns accuracies in percent, its price, and seconds.

    flags: those of ann2snn.py. loaders, finetuned: caches of loaders and finetuned networks, to which this call adds.
    kept: a `results.Kept`, or None to keep nothing. test_images: their number, that of `args` if None.
    """

    from build_network import choose_input
    from finetuning.on_spikes import finetune_on_spikes
    from pipeline import choose_measure, convert_by_options
    from reports.price import price_of
    from runtime.device import choose_device

    device = choose_device(flags.device)
    choose_input(flags)
    test_loader, *of_training = load_images(flags, loaders)
    criterion, evaluate = choose_measure(flags)
    flags, made, state = finetune(flags, of_training, criterion, device, finetuned, kept or Kept(None))
    start = time.perf_counter()
    snn = convert_by_options(made.qnet, of_training[1], device, flags)
    snn = finetune_on_spikes(snn, made.qnet, made.ann, *of_training, criterion, device, flags)
    seconds = state["seconds"] + time.perf_counter() - start
    batches = split(*evenly_spaced(test_loader, test_images or args.test_images))
    top1 = partial(evaluate, loader=batches, device=device, criterion=criterion)
    return {
        "T": flags.timesteps,
        "seed": flags.seed,
        **accuracies(made, snn, flags.timesteps, top1),
        **{name: snn.duration()[name] for name in ("interval", "latency")},
        **price_of(snn, observed(batches).to(device)),
        "conversion_seconds": seconds,
        "finetuned_on": state["machine"],
        **where_and_when(device),
    }


def accuracies(made, snn, timesteps, evaluate):
    """Top-1 of the three networks and the share of images with the float ANN's class, in percent; number of images.

    evaluate: called with a network, and T. made: a `pipeline.Networks`, which keeps what the float and the quantized
    network answer for the next T.
    """
    spiking = evaluate(snn, timesteps=timesteps, keep_answers=True)
    if not made.accuracies or made.accuracies["ann"]["samples"] != spiking["samples"]:
        made.accuracies = {"ann": evaluate(made.ann, keep_answers=True), "qnet": evaluate(made.qnet)}
    of_ann, of_snn = (each["answers"]["classes"] for each in (made.accuracies["ann"], spiking))
    return {
        **{f"{name}_top1": each["top1"] for name, each in (*made.accuracies.items(), ("snn", spiking))},
        "agreement": 100 * (of_ann == of_snn).double().mean().item(),
        "samples": spiking["samples"],
    }


def split(images, targets):
    """Batches of images and labels."""
    return list(zip(images.split(TEST_BATCH), targets.split(TEST_BATCH)))


def observed(batches):
    """Evenly spaced images of all batches, about OBSERVED, [B, C, H, W]."""
    import torch

    images = torch.cat([images for images, _ in batches])
    return images[:: max(1, len(images) // OBSERVED)]


def load_images(flags, loaders):
    """The loaders of test, training and calibration images, with their random states as when they were made."""
    from datasets import get_dataset
    from runtime.device import seed_everything

    key = str([getattr(flags, name) for name in DATA_FLAGS])
    if key not in loaders:
        if len(loaders) == MOST_LOADERS:
            del loaders[next(iter(loaders))]  # the oldest
        seed_everything(flags.seed)
        found = get_dataset(flags)
        loaders[key] = found, random_state(found[2:])
    (test_loader, _, *of_training), state = loaders[key]
    set_random_state(of_training, state)
    return test_loader, *of_training


def finetune(flags, loaders, criterion, device, finetuned, kept):
    """`flags, networks, state`: weight bits as numbers, a `pipeline.Networks`, the finetuning's seconds and machine.

    finetuned: cache of finetuned networks in memory. kept: a `results.Kept`, those in files.
    """
    from pipeline import Networks, load_network, quantize

    key, name = key_of(without(flags, after_finetuning()), default_flags()), flags.net_name
    net, flags = load_network(flags, *loaders)
    if key not in finetuned:
        found = kept.load(name, key)
        if found is None:
            made, start = Networks(net.to(device)), time.perf_counter()
            quantize(flags, made, loaders, criterion, device)
            state = {"random": random_state(loaders), "seconds": time.perf_counter() - start}
            state |= {"machine": where_and_when(device)["machine"]}
            kept.save(name, key, made.qnet.cpu(), state)
        else:
            made, state = Networks(equalized(net, flags).to(device), found[0]), found[1]
        made.qnet = made.qnet.to(device)
        finetuned[key] = made, state
    made, state = finetuned[key]
    set_random_state(loaders, state["random"])  # what follows runs as if it were the only conversion
    return flags, made, state


def equalized(net, flags):
    """The float network as `pipeline.quantize` leaves it."""
    from dag_rewrites import equalize_channels

    return equalize_channels(net) if flags.equalize else net


def without(flags, names):
    """A namespace without some of its attributes."""
    return argparse.Namespace(**{name: value for name, value in vars(flags).items() if name not in names})


def random_state(loaders):
    """The states of PyTorch's random generator and of those of some loaders, None for a loader without one."""
    import torch

    generators = map(generator_of, loaders)
    return [torch.get_rng_state(), *(each if each is None else each.get_state() for each in generators)]


def set_random_state(loaders, states):
    """Restore a `random_state`."""
    import torch

    torch.set_rng_state(states[0])
    for loader, state in zip(loaders, states[1:]):
        if state is not None:
            generator_of(loader).set_state(state)


def generator_of(loader):
    """The random generator of a loader, or None: a loader of the user's own may have none."""
    return getattr(getattr(loader, "loader", loader), "generator", None)


def evenly_spaced(loader, most):
    """`most` evenly spaced images [N, C, H, W] and labels [N] of a loader; all of them if `most` is None."""
    import torch

    images, targets = (torch.cat(parts) for parts in zip(*loader))
    kept = torch.linspace(0, len(images) - 1, min(most or len(images), len(images))).long()
    return images[kept], targets[kept]


def summaries(rows, results):
    """The cells of the printed table: a line for each row, of all its seeds."""
    for _, group in groupby(rows, lambda row: {**row.facts(), "seed": 0}):
        same = list(group)
        yield summary_of(same[0], [results.with_facts(row.facts()) for row in same])


def summary_of(row, runs):
    """The cells of one line. runs: the results of all seeds."""
    return row.title, row.bits, row.method, row.T, *summary(runs)


def summary(runs):
    """The cells of a row: means over the seeds, and the standard deviation of the loss in points."""
    averaged = "ann_top1", "snn_top1", "interval", "latency", "spikes", "synops"
    mean = {name: statistics.mean(run[name] for run in runs) for name in averaged}
    points = [run["snn_top1"] - run["ann_top1"] for run in runs]
    spread = f" +- {statistics.stdev(points):.2f}" if len(runs) > 1 else ""
    prices = (f"{mean['spikes'] / 1e3:.1f}k", f"{mean['synops'] / 1e6:.2f}M")
    accuracies = f"{mean['ann_top1']:.2f}", f"{mean['snn_top1']:.2f}", f"{statistics.mean(points):+.2f}{spread}"
    agreements = [run["agreement"] for run in runs if "agreement" in run]  # rows of earlier versions have none
    agreement = f"{statistics.mean(agreements):.2f}" if agreements else "-"
    return (*accuracies, agreement, int(mean["interval"]), int(mean["latency"]), *prices)


if __name__ == "__main__":
    run_script(main, parse_args())
