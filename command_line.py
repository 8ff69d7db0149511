"""The command line of a conversion: presets, former flags, and flags without effect. Imports nothing slow.

parser = OneLineParser(...)
add_conversion_flags(parser)
args = parse_conversion(parser, argv)
"""

import argparse
import os
import sys

from options import GROUPS, check_threshold, joined_per_channel
from presets import PRESETS, preset_options
from runtime.flags import add_help_all, add_options, number_in
from runtime.ranges import THRESHOLDS, Real
from runtime.user_code import names_code
from script_options import CONVERSION

WITH_SGD_ALONE = ("finetune_wd", "finetune_momentum", "finetune_nesterov", "finetune_damping")
WITH_EPOCHS = ("finetune_lr", "finetune_optimizer", "finetune_distill", *WITH_SGD_ALONE)
WITHOUT_FILES = ("digits", "debug0", "debug1", "debug2")  # data sets that do not read --dataset_root


def add_conversion_flags(parser, *more):
    """Add the flags of every conversion option, and those of the dataclasses `more`, to a OneLineParser."""
    preset = parser.add_argument_group("preset")
    action = preset.add_argument(
        "--preset",
        choices=PRESETS,
        default="specification",
        help="specification (the defaults below), calibrated (images without labels, minutes), finetuned (labels), "
        "exact (T more steps per image). Any flag overrides it (%(default)s)",
    )
    parser.main_actions[action] = action.help
    add_help_all(parser)
    add_options(parser, *CONVERSION, *more, groups=[title for title in GROUPS if title != "preset"])
    add_former_flags(parser)


def add_former_flags(parser):
    """Add the former flags, which still work; the help does not show them."""
    hidden = {"help": argparse.SUPPRESS, "default": None}
    parser.add_argument("--quantile", type=number_in(Real(0, 1, open=True)), **hidden)
    parser.add_argument("--granularity", choices=("layer", "channel"), **hidden)
    parser.add_argument("--weight_granularity", choices=("layer", "channel"), **hidden)
    parser.add_argument("--pretrained", action="store_true", help=argparse.SUPPRESS)


def parse_conversion(parser, argv=None, speaks=True):
    """The parsed flags under their current names, with the preset filled in.

    speaks: whether to print on stderr which options the preset sets and which flags have no effect.
    """
    args = parser.parse_args(argv)
    unused = settle_former_flags(args, parser.given)
    fill_in_preset(args, parser.given, speaks)
    if args.qnet is not None:
        args.given = sorted(parser.given)  # what its file may not contradict
    if speaks:
        for flag, reason in [*unused, *without_effect(args, parser.given)]:
            print(f"warning: --{flag} has no effect: {reason}", file=sys.stderr)
    return args


def settle_former_flags(args, given):
    """Move the values of former flags to the current ones, and add these to `given`.

    Returns `(flag, reason)` for each former flag without effect.
    """
    unused = []
    if args.pretrained and args.ann_weight not in (None, "pretrained"):
        unused.append(("pretrained", "--ann_weight names the weights"))
    elif args.pretrained:
        args.ann_weight = "pretrained"
    if args.quantile is not None:
        if args.threshold in THRESHOLDS:
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
    """`per_channel` from --granularity and --weight_granularity.

    If only one of them is given, the other half comes from --per_channel or else from the preset.
    """
    chosen = args.per_channel
    if "per_channel" not in given:
        chosen = of_preset(args, given).get("per_channel", chosen)
    halves = {"weights": args.weight_granularity, "spikes": args.granularity}
    said = [halves[half] or ("channel" if chosen in (half, "both") else "layer") for half in halves]
    return joined_per_channel(*said)


def of_preset(args, given):
    """Option -> value of the preset, for the weight bits that were given, and the chip."""
    bits = {"bits": args.weight_bitwidth} if "weight_bitwidth" in given else {}
    return preset_options(args.preset, args.timesteps, hardware=args.hardware, **bits)


def fill_in_preset(args, given, speaks):
    """Set the options of `args.preset` that the command line did not give."""
    chosen = of_preset(args, given)
    chosen = {name: value for name, value in chosen.items() if name not in given}
    merged = {**vars(args), **chosen}
    if not merged["finetune_epochs"] and (merged["rounding"] != "learnt" or "threshold" in given):
        chosen.pop("activation_levels", None)  # nothing learns lambdas, or a flag chooses them
    for name, value in chosen.items():
        setattr(args, name, value)
    if chosen and speaks:
        print(f"preset {args.preset}:", *(f"--{name} {value}" for name, value in chosen.items()), file=sys.stderr)


def without_effect(args, given):
    """`(flag, reason)` for every given flag that has no effect in combination with the others."""
    found = {}

    def note(reason, *names):
        for name in names:
            if name in given:
                found.setdefault(name, reason)

    if args.qnet is not None:
        note("the network of --qnet is finetuned already", "finetune_epochs", *WITH_EPOCHS, "rounding")
    elif not args.finetune_epochs:
        note("--finetune_epochs is 0", *WITH_EPOCHS)
        if not args.spike_epochs:
            note("nothing is trained on labels", "val_share")
    elif args.rounding == "learnt":
        note("it needs --finetune_epochs 0", "rounding")
    if args.finetune_optimizer == "adam":
        note("--finetune_optimizer adam does not use it", *WITH_SGD_ALONE)
    if args.correction == "none":
        note("--correction is none", "hold_back")
    if args.reset_mode == "zero":
        note("it needs --reset_mode subtraction", "hold_back")
    if args.listen in (args.timesteps, "auto"):
        fits = ["correction"] if args.correction == "weights" else []
        note("no spike is premature with --listen T or auto", "hold_back", *fits)
    if args.activation_levels is not None:
        note("--activation_levels learns lambda", "threshold")
    if not (args.spike_epochs or args.spike_epochs_unlabelled):
        note("there are no --spike_epochs", "spike_lr", "spike_gradient")
    if getattr(args, "report", "") is None:
        note("there is no --report", "analysis_images", "sweep", "try_presets", "compare")
    if args.dataset in WITHOUT_FILES or os.path.isdir(args.dataset) or names_code(args.dataset):
        note(f"--dataset {args.dataset} does not need it", "dataset_root")
    if names_code(args.dataset) or args.dataset == "COCO":
        own = "preprocess", "augment", "mean", "std", "resize", "crop"
        note(f"{args.dataset} prepares its own images", *own)
    if args.mean is not None and args.std is not None and args.preprocess != "imagenet":
        note("--mean and --std are given", "preprocess")
    return list(found.items())
