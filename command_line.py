"""The command line of a conversion: presets, former flags, flags without effect. Imports nothing slow.

parser = OneLineParser(...)
add_conversion_flags(parser)
args = parse_conversion(parser, argv)
"""

import argparse
import os
import sys

from options import CONVERSION, GROUPS, PRESETS, check_threshold, joined_per_channel, preset_options
from runtime.flags import add_help_all, add_options, number_in
from runtime.ranges import Real

WITH_SGD_ALONE = ("finetune_wd", "finetune_momentum", "finetune_nesterov", "finetune_damping")
WITH_EPOCHS = ("finetune_lr", "finetune_optimizer", "finetune_distill", *WITH_SGD_ALONE)
WITHOUT_FILES = ("digits", "debug0", "debug1", "debug2")  # data sets that need no folder


def add_conversion_flags(parser, *more):
    """All options between the trained network and the spiking one, and those of the dataclasses `more`."""
    preset = parser.add_argument_group("preset")
    action = preset.add_argument(
        "--preset",
        choices=PRESETS,
        default="specification",
        help="specification (the defaults below), calibrated (a few images, no labels, minutes), finetuned (labels, "
        "best at few timesteps and bits), exact (no spike is early or late, for T more steps an image). Any flag "
        "overrides it (%(default)s)",
    )
    parser.main_actions[action] = action.help
    add_help_all(parser)
    add_options(parser, *CONVERSION, *more, groups=[title for title in GROUPS if title != "preset"])
    add_former_flags(parser)


def add_former_flags(parser):
    """The hidden flags that others took the place of."""
    hidden = {"help": argparse.SUPPRESS, "default": None}
    parser.add_argument("--quantile", type=number_in(Real(0, 1, open=True)), **hidden)
    parser.add_argument("--granularity", choices=("layer", "channel"), **hidden)
    parser.add_argument("--weight_granularity", choices=("layer", "channel"), **hidden)
    parser.add_argument("--pretrained", action="store_true", help=argparse.SUPPRESS)


def parse_conversion(parser, argv=None, speaks=True):
    """The flags with the preset filled in, under their names of today.

    speaks: say on stderr what the preset sets, and which flags have no effect.
    """
    args = parser.parse_args(argv)
    unused = settle_former_flags(args, parser.given)
    fill_in_preset(args, parser.given, speaks)
    if speaks:
        for flag, reason in [*unused, *without_effect(args, parser.given)]:
            print(f"warning: --{flag} has no effect: {reason}", file=sys.stderr)
    return args


def settle_former_flags(args, given):
    """Put what former flags say into today's; `(flag, reason)` of those that say nothing. Adds to `given`."""
    unused = []
    if args.pretrained and args.ann_weight is None:
        args.ann_weight = "pretrained"
    if args.quantile is not None:
        if args.threshold in ("max", "mse"):
            unused.append(("quantile", f"--threshold {args.threshold} uses none"))
        else:
            args.threshold = args.quantile
            given.add("threshold")
    args.threshold = check_threshold(args.threshold)
    if args.granularity or args.weight_granularity:
        args.per_channel = settle_granularity(args, given)
        given.add("per_channel")
    del args.pretrained, args.quantile, args.granularity, args.weight_granularity
    return unused


def settle_granularity(args, given):
    """`per_channel` where --granularity or --weight_granularity says half of it; else the preset, or its own flag."""
    chosen = args.per_channel
    if "per_channel" not in given:
        chosen = preset_options(args.preset, args.timesteps).get("per_channel", chosen)
    halves = {"weights": args.weight_granularity, "spikes": args.granularity}
    said = [halves[half] or ("channel" if chosen in (half, "both") else "layer") for half in halves]
    return joined_per_channel(*said)


def fill_in_preset(args, given, speaks):
    """The options of `args.preset`, but those that were given."""
    chosen = preset_options(args.preset, args.timesteps)
    chosen = {name: value for name, value in chosen.items() if name not in given}
    if "finetune_epochs" in given and not args.finetune_epochs:
        chosen.pop("activation_levels", None)  # they are learnt with the weights
    for name, value in chosen.items():
        setattr(args, name, value)
    if chosen and speaks:
        print(f"preset {args.preset}:", *(f"--{name} {value}" for name, value in chosen.items()), file=sys.stderr)


def without_effect(args, given):
    """`(flag, reason)` of every flag that was given and changes nothing beside the others."""
    found = {}

    def note(reason, *names):
        for name in names:
            if name in given:
                found.setdefault(name, reason)

    if not args.finetune_epochs:
        note("--finetune_epochs is 0", *WITH_EPOCHS)
        if not args.spike_epochs:
            note("nothing is trained on labels", "val_share")
    if args.finetune_optimizer == "adam":
        note("--finetune_optimizer adam does not use it", *WITH_SGD_ALONE)
    if args.correction == "none":
        note("--correction is none", "hold_back")
    if args.reset_mode == "zero":
        note("it needs --reset_mode subtraction", "hold_back")
    if args.listen == args.timesteps:
        note("no spike is premature with --listen T", "hold_back")
    if args.activation_levels is not None:
        note("--activation_levels learns lambda", "threshold")
    if not (args.spike_epochs or args.spike_epochs_unlabelled):
        note("there are no --spike_epochs", "spike_lr", "spike_gradient")
    if getattr(args, "report", "") is None:
        note("there is no --report", "analysis_images", "sweep")
    if args.dataset in WITHOUT_FILES or os.path.isdir(args.dataset):
        note(f"--dataset {args.dataset} does not need it", "dataset_root")
    return list(found.items())
