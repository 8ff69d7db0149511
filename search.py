"""Try presets and options within a time limit, and print the best command for every number of timesteps.

    python3 search.py example_net --ann_weight checkpoint/example_net_ann.pth --timesteps 4 8 16 --minutes 5

Training images that no conversion learns from decide; test images are not read. A flag of ann2snn.py that you give
holds for every trial. `search/<network>` keeps every result: the same command goes on where it stopped.
"""

import argparse
import os
import time

from command_line import add_conversion_flags
from runtime.cli import OneLineParser, run_script
from runtime.flags import bitwidths, number_in, whole_number
from runtime.ranges import Real
from searching.trials import Shared, plan

LONGEST = 7 * 24 * 60  # minutes, a week
OWN = ("net_name", "timesteps", "weight_bitwidth", "minutes", "held_out", "max_synops", "max_latency", "out")
TRIED = ("preset", "per_channel", "finetune_epochs", "threshold", "listen", "avgpool")  # shown by --help-all alone
WITHOUT_INFLUENCE = ("device", "debug", "num_workers", "memory_budget", "expect_top1")  # on what a trial finds


class NotingParser(OneLineParser):
    """A parser that also keeps `words`, option -> the words of the command line that gave it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.words = {}

    def _get_values(self, action, arg_strings):
        value = super()._get_values(action, arg_strings)
        if action.option_strings and action.dest not in OWN:
            flag, text = action.option_strings[-1], " ".join(arg_strings)
            self.words[action.dest] = [f"{flag}={text}"] if text.startswith("-") else [flag, text]
        return value

    def words_given(self, args):
        """`words`, with those of flags that take no value. args: what was parsed."""
        by_dest = {action.dest: action for action in self._actions if action.nargs == 0}
        for dest in self.given & set(by_dest):
            on, off = by_dest[dest].option_strings[0], by_dest[dest].option_strings[-1]
            self.words[dest] = [on if getattr(args, dest) else off]
        return self.words


def parse_args(argv=None):
    parser = NotingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net_name", help="NAME, torchvision:NAME, timm:NAME, file.py:callable or model.onnx")
    own = parser.add_argument_group("search")
    facts = {
        "timesteps": {"nargs": "+", "type": whole_number(1, 65536), "default": [4, 8, 16], "help": "T (4 8 16)"},
        "weight_bitwidth": {"nargs": "+", "type": bits_as_text, "default": ["8"], "help": "weight bits (8)"},
        "minutes": {"type": number_in(Real(0, LONGEST)), "default": 30.0, "help": "time limit (30)"},
        "held_out": {"type": whole_number(1), "default": 5000, "metavar": "N", "help": "images to compare on (5000)"},
        "max_synops": {"type": number_in(Real(0)), "metavar": "N", "help": "most operations per image (any)"},
        "max_latency": {"type": whole_number(1), "metavar": "STEPS", "help": "most steps until the answer (any)"},
        "out": {"metavar": "DIR", "help": "folder for results, figure and commands (search/<network>)"},
    }
    actions = [own.add_argument(f"--{name}", **details) for name, details in facts.items()]
    parser.main_actions.update({action: action.help for action in actions})
    add_conversion_flags(parser)
    shown = parser.main_actions.items()
    parser.main_actions = {action: text for action, text in shown if action.dest not in TRIED}
    args = parser.parse_args(argv)
    args.words, args.start = parser.words_given(args), time.monotonic()
    return args


def bits_as_text(text):
    """An argparse type: weight bits as ann2snn.py takes them, kept as text."""
    bitwidths(text)
    return text


def main(args):
    # imported here so that --help and errors in the command line appear at once
    from build_network import choose_input
    from datasets import DETECTION_DATASETS, get_dataset
    from runtime.device import choose_device, seed_everything
    from runtime.files import check_folder
    from runtime.packages import REPORT_PACKAGES, check_packages
    from searching.choice import Limits
    from searching.costs import Clock
    from searching.order import search
    from searching.pages import commands_of, print_pages, write_pages

    # find every error in the command line before the work begins
    clock, shared = Clock(args.minutes, args.start), Shared(args.net_name, args.words)
    flags = next(iter(groups_of(args, shared).values()))[0]
    first = shared.args(flags)
    if first.dataset in DETECTION_DATASETS:
        raise ValueError(f"the search is for classifiers, --dataset {first.dataset} has boxes: choose another")
    check_packages("search.py", *REPORT_PACKAGES)
    folder = f"search/{safe_name(args.net_name)}" if args.out is None else args.out
    check_folder(folder)
    device = choose_device(first.device)
    seed_everything(first.seed)
    choose_input(first)

    loaders = get_dataset(first)[2:]  # training and calibration images; the test images stay where they are
    record = open_record(folder, args, first)
    runner, groups = prepare(args, shared, first, loaders, device, record)
    limits = Limits(args.max_synops, args.max_latency)
    left_out = search(runner, record, groups, limits, clock)
    results = record, runner.ann_hits, limits
    commands = list(commands_of(*results, runner.shared))
    write_pages(folder, *results, commands)
    print_pages(*results, commands, left_out, clock)
    print(f"Save the search in {folder}")


def groups_of(args, shared, folds=False):
    """(T, bits) -> trials, for every T and weight bits that were asked for."""
    pairs = [
        (timesteps, bits) for timesteps in sorted(set(args.timesteps)) for bits in dict.fromkeys(args.weight_bitwidth)
    ]
    return {pair: plan(shared, *pair, folds) for pair in pairs}


def prepare(args, shared, first, loaders, device, record):
    """`runner, groups`: a `runs.Runner` with measured float network, and the trials with the images that are there."""
    from dataclasses import replace

    from searching.costs import Costs
    from searching.images import split_images
    from searching.runs import Runner

    wanted = max(
        shared.args(trial).calibration_samples for trials in groups_of(args, shared).values() for trial in trials
    )
    images = split_images(loaders, wanted, args.held_out, first.seed)
    runner = Runner(replace(shared, samples=images.samples), loaders, images, device, Costs())
    for row in record.rows.values():
        for kind, units, seconds in row.costs:
            runner.costs.note(kind, units, seconds)
    least = max((len(row.hits) for row in record.rows.values()), default=0)
    runner.measure_float(first, args.minutes, max(args.timesteps), least)
    groups = groups_of(args, runner.shared, runner.can_fold(first))
    return runner, groups


def open_record(folder, args, first):
    """The `record.Record` of a folder."""
    from runtime.hashes import contents
    from searching.record import Record

    os.makedirs(folder, exist_ok=True)
    named = {name: getattr(first, name) for name in ("net_name", "ann_weight", "dataset")}
    identity = {
        **{name: contents(value) for name, value in named.items() if value},
        "flags": {name: words for name, words in args.words.items() if name not in (*named, *WITHOUT_INFLUENCE)},
        "held_out": args.held_out,
    }
    return Record(os.path.join(folder, "trials.jsonl"), identity)


def safe_name(net_name):
    """A network's name in a form that suits a file name: torchvision:resnet18 -> torchvision_resnet18."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in net_name)


if __name__ == "__main__":
    run_script(main, parse_args())
