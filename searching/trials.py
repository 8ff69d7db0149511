"""The conversions that a search tries, each as flags of ann2snn.py.

    trials = plan(shared, timesteps=8, bits=8)      # shared: the network, the data, and what the user gave
    args = trials[0].args(shared)                   # as ann2snn.py parses them
    shared.command(trials[0])                       # the command, ready for a shell

A flag that the user gives holds for every trial, over the trial's own; trials that then agree are tried once.
"""

import copy
import os
import shlex
import sys
from dataclasses import dataclass, field, replace

from command_line import add_conversion_flags, parse_conversion
from presets import FEW_BITS, most_epochs, preset_options
from runtime.cli import OneLineParser

# Stages in order of cost: seconds (a conversion), a minute (learnt rounding), minutes (epochs without labels), hours.
CONVERT, LEARN, UNLABELLED, LABELS = "conversion", "learnt rounding", "epochs without labels", "training with labels"
STAGES = (CONVERT, LEARN, UNLABELLED, LABELS)
NO_EPOCHS = {"spike_epochs_unlabelled": "0"}
# What is tried besides the presets, for every T and bit width: the most promising first, so that the others stop early.
WITHOUT_EPOCHS = (
    {"preset": "calibrated", **NO_EPOCHS},
    {"preset": "calibrated", **NO_EPOCHS, "correction": "potential"},
    {"preset": "exact", "threshold": "max"},
    {"preset": "exact", "threshold": "mse"},
    {"preset": "calibrated", **NO_EPOCHS, "threshold": "spikes"},
    {"preset": "calibrated", **NO_EPOCHS, "hold_back": "0.25"},
    {"finetune_epochs": "0", "threshold": "mse"},
    {"finetune_epochs": "0"},
    {"preset": "exact", "listen": "auto"},
)
LEARNT = {"rounding": "learnt"}
WITHOUT_INFLUENCE = ("preset", "debug", "device", "expect_top1", "memory_budget")


@dataclass(frozen=True)
class Trial:
    """One conversion. bits: weight bits as text. flags: option -> text. preset: by `preset_of`."""

    timesteps: int
    bits: str
    flags: dict = field(hash=False)
    preset: str = ""

    def with_flags(self, **flags):
        """The trial with other flags; it is no longer a preset."""
        return replace(self, flags={**self.flags, **flags}, preset="")

    def name(self):
        """The trial's own flags in one line."""
        return " ".join(f"--{name} {value}" for name, value in self.flags.items())

    def key(self):
        """The trial in one line, by which a results file knows it."""
        return f"--timesteps {self.timesteps} --weight_bitwidth {self.bits} {self.name()}"


@dataclass(frozen=True)
class Shared:
    """What all trials share. words: option -> words of the command line, of what the user gave.

    samples: the images that are there for calibration, or None if they are not counted yet.
    """

    net_name: str
    words: dict = field(hash=False)
    samples: int = None

    def args(self, trial):
        """The trial's flags as ann2snn.py parses them. Raises SystemExit, with one line, for flags that are wrong."""
        parser = OneLineParser(prog="search.py")
        add_conversion_flags(parser)
        args = parse_conversion(parser, self.conversion_words(trial), speaks=False)
        args.net_name = self.net_name
        return args

    def conversion_words(self, trial):
        """The flags of the trial as words: its own, then what the user gave, without what has been overridden."""
        flags = {"timesteps": str(trial.timesteps), "weight_bitwidth": trial.bits, **trial.flags}
        own = {name: [f"--{name}", value] for name, value in flags.items() if name not in self.words}
        return [word for words in (*self.words.values(), *own.values()) for word in words]

    def capped(self, trial):
        """The trial with as many calibration images as are there, and still a preset if it was one."""
        wanted = self.args(trial).calibration_samples
        if self.samples is None or wanted <= self.samples or "calibration_samples" in self.words:
            return trial
        return replace(trial, flags={**trial.flags, "calibration_samples": str(self.samples)})

    def command(self, trial):
        """The command that makes this conversion, ready for a shell."""
        script = os.path.join(os.path.dirname(sys.argv[0]), "ann2snn.py")
        return shlex.join(["python3", script, self.net_name, *self.conversion_words(trial)])


def plan(shared, timesteps, bits, folds=False):
    """The trials for T timesteps and weight bits, in order of cost, presets first; no two are the same conversion.

    folds: whether average poolings can be folded, so that each trial is tried with and without. Raises ValueError if
    flags that the user gave contradict each other in every trial.
    """
    from pipeline import check_command_line  # here, because it imports torch

    found = [{"preset": "exact"}, epochs_added({"preset": "exact", "spike_gradient": "tandem"}, timesteps)]
    found += [*WITHOUT_EPOCHS, {"preset": "calibrated"}, {"preset": "calibrated", "spike_gradient": "tandem"}]
    if bits.isdigit() and int(bits) <= FEW_BITS:
        found += [{"preset": "calibrated", **NO_EPOCHS, **LEARNT}, {"preset": "calibrated", **LEARNT}]
    found += [{"preset": "finetuned"}, {"preset": "specification"}]
    trials = [Trial(timesteps, bits, flags) for flags in found]
    if folds:
        trials = [each for trial in trials for each in (trial, with_other_poolings(trial, shared.args(trial)))]
    trials = [replace(each, preset=preset_of(each.flags, shared.args(each))) for each in trials]
    places = {trial.name(): place for place, trial in enumerate(trials)}
    known, wrong = {}, []
    for trial in sorted(trials, key=lambda trial: not trial.preset):  # of two alike, the preset stays
        args = shared.args(trial)
        try:
            check_command_line(args)
        except ValueError as error:  # such as --listen auto with float weights
            wrong.append(error)
            continue
        known.setdefault(conversion_key(args, folds), trial)
    if not known:
        raise wrong[0]

    def rank(trial):
        return STAGES.index(stage_of(shared.args(trial))), not trial.preset, places[trial.name()]

    return [shared.capped(trial) for trial in sorted(known.values(), key=rank)]


def with_other_poolings(trial, args):
    """The trial with average poolings folded if they were not, else with neurons of their own."""
    return replace(trial, flags={**trial.flags, "avgpool": "spike" if args.avgpool == "fold" else "fold"})


def preset_of(flags, args):
    """The preset that a trial is as it stands, or "". args: all flags of the trial, as they are parsed.

    Whether poolings are folded is up to the network, and the number of calibration images up to the data. A preset
    whose other options the user overrides is none.
    """
    if "preset" not in flags or not set(flags) <= {"preset", "avgpool"}:
        return ""
    wanted = preset_options(args.preset, args.timesteps, args.weight_bitwidth, args.hardware)
    others = {name for name in wanted if name not in ("weight_bitwidth", "calibration_samples", "avgpool")}
    return args.preset if all(getattr(args, name) == wanted[name] for name in others) else ""


def epochs_added(flags, timesteps):
    """Flags with the epochs that weights need which were not fitted, and with the images of preset calibrated."""
    samples = preset_options("calibrated", timesteps).get("calibration_samples", 1000)
    epochs = max(1, most_epochs(timesteps))
    return {**flags, "spike_epochs_unlabelled": str(epochs), "calibration_samples": str(samples)}


def conversion_key(args, folds):
    """What the conversion depends on, as text. folds: whether average poolings can be folded."""
    known = copy.copy(vars(args))
    if not folds:
        known["avgpool"] = None
    if args.listen in (args.timesteps, "auto"):
        known["hold_back"] = None  # no spike is premature
    if not (args.spike_epochs or args.spike_epochs_unlabelled):
        known["spike_gradient"] = known["spike_lr"] = None
    return repr(sorted((name, repr(value)) for name, value in known.items() if name not in WITHOUT_INFLUENCE))


def stage_of(args):
    """The stage of a conversion, one of STAGES."""
    if args.finetune_epochs or args.spike_epochs:
        return LABELS
    if args.spike_epochs_unlabelled:
        return UNLABELLED
    return LEARN if args.rounding == "learnt" else CONVERT


def with_fewer_epochs(trial, args):
    """The trial with half its epochs without labels, or None if it has one epoch or trains with labels."""
    epochs = args.spike_epochs_unlabelled // 2
    return trial.with_flags(spike_epochs_unlabelled=str(epochs)) if epochs and stage_of(args) == UNLABELLED else None
