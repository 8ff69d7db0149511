"""The steps from a trained network to a spiking one, for the scripts and as one call in Python.

    result = convert_network(net, train_loader, test_loader, weight_bitwidth=4, timesteps=16)
    result.ann_top1, result.qnet_top1, result.snn_top1; result.snn(images)

The scripts call the same steps: check_command_line, load_network, make, accuracy_table.
"""

import copy
import platform
import sys
import time
import traceback
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy
import torch

from ann_parser import CANNOT_RUN, parse_ann_model
from build_network import build_trained_net, check_net_name
from conversion.plan import plan_conversion
from dag_rewrites import (
    DEFAULT_MAXPOOL,
    equalize_channels,
    prepare_conversion,
    replace_activations,
    replaced_in_words,
)
from datasets import DATASETS, DETECTION_DATASETS, check_dataset_name
from detection.boxes import DetectionLoss, check_detects, evaluate_detector
from finetuning.levels import own_levels, own_levels_in_words, quantize_activations
from finetuning.on_spikes import finetune_on_spikes
from finetuning.rounding import learn_rounding
from finetuning.saved import adopt_options, quantized_from_file
from hw_constraints import (
    HARDWARE,
    bitwidths_by_name,
    check_hardware,
    choose_bitwidths,
    hardware_layers,
    hardware_table,
    violations,
)
from networks.file import is_outside
from options import (
    DEFAULT_CHIP,
    ConversionOptions,
    QuantizeOptions,
    RunOptions,
    SimulatorOptions,
    SpikeFinetuneOptions,
    defaults,
)
from presets import preset_options
from quantization import as_dag, quantize_finetune, weights_in_words
from rewrites.gates import gates_in_words, replace_gates
from runtime.batches import batches_of_dataset, first_inputs, loader_for, reusable
from runtime.cli import did_you_mean
from runtime.device import choose_device, seed_everything
from runtime.flags import memory_in_words
from runtime.memory import give_back
from runtime.packages import REPORT_PACKAGES, check_packages
from runtime.processes import alone, from_first, is_first
from runtime.progress import Progress
from snn_weight_setter import convert
from spike_dag import format_table
from spike_layers import SpikeMaxPool2d
from spike_simulator import least_memory, threads_of
from validate import classes_of, evaluate

CLASSIFIER_FLAGS = ("report", "spike_epochs", "spike_epochs_unlabelled", "finetune_distill", "expect_top1")
TOP1_TOLERANCE = 0.2  # points: another version of a JPEG decoder, or another order of summing, moves a few images
PARTING_IMAGES = 64  # calibration images on which the classes of the three networks are compared
PARTING = 0.1  # share of these images: 6 of 64 also change their class where nothing is wrong
NEAR_CHANCE = 1.5  # times the chance of a guess; a trained network is far above it, unless two classes are hard
LOOK_AT = (
    "look at the normalisation first (--preprocess none, --mean, --std), then at the size of the images "
    "(--input_shape, --resize), the order of the classes, and the weights"
)


@dataclass(repr=False)
class Networks:
    """The result of a conversion. ann, qnet, snn: the float, the quantized and the spiking network.

    seconds: stage -> seconds. accuracies: "ann", "qnet", "snn" -> the result of `validate.evaluate`; a network that was
    not measured has no entry.
    """

    ann: torch.nn.Module
    qnet: torch.nn.Module = None
    snn: torch.nn.Module = None
    seconds: dict = field(default_factory=dict)
    accuracies: dict = field(default_factory=dict)

    def __repr__(self):
        shares = [f"{name} {result['top1']:.2f} %" for name, result in self.accuracies.items() if "top1" in result]
        return f"Networks({', '.join(shares) or 'not measured'})"

    @property
    def ann_top1(self):
        """Top-1 accuracy of the float network, in percent. Raises KeyError if it was not measured."""
        return self.accuracies["ann"]["top1"]

    @property
    def qnet_top1(self):
        """Top-1 accuracy of the quantized network, in percent. Raises KeyError if it was not measured."""
        return self.accuracies["qnet"]["top1"]

    @property
    def snn_top1(self):
        """Top-1 accuracy of the spiking network after all T timesteps, in percent. Raises KeyError if not measured."""
        return self.accuracies["snn"]["top1"]

    @property
    def snn_top1_by_timestep(self):
        """Top-1 accuracies of the spiking network after steps 1 to T, in percent. Raises KeyError if not measured."""
        return self.accuracies["snn"]["top1_by_timestep"]


# ---------------------------------------------------------------------------------------------------------------------
# One call


def convert_network(net, train_loader, test_loader=None, *, criterion=None, preset="specification", **options):
    """Quantize, finetune and convert a plain nn.Module; returns Networks. Options default to those of the command line.

    train_loader: images [B, C, H, W] and labels [B] for finetuning and calibration, or a torch Dataset of such samples.
    test_loader: images and labels on which the three networks are measured, or None to measure nothing. The results are
    `ann_top1`, `qnet_top1`, `snn_top1`, and the list `snn_top1_by_timestep`, in percent.
    criterion: the finetuning loss, by default cross entropy. preset: a name of `presets.PRESETS`. options: fields of
    the dataclasses in `options.py`, such as weight_bitwidth=4, timesteps=16, finetune_epochs=10, threshold="mse" and
    device="cpu". `net` is not changed.

    Raises TypeError for an unknown option, and ValueError for a value out of range or a network that cannot be
    converted.
    """
    args = options_by_name(preset, options)
    device, criterion = choose_device(args.device), criterion or torch.nn.CrossEntropyLoss()
    seed_everything(args.seed)
    check_module(net)
    train_loader = reusable(loader_for(net, batches_of_dataset(train_loader, shuffle=True)))
    test_loader = None if test_loader is None else reusable(loader_for(net, batches_of_dataset(test_loader)))
    graph = as_dag(net, train_loader, takes_gates=args.replace_gates is not None)
    graph, _ = replace_unspikable(graph, train_loader, args)
    graph = prepare_conversion(graph, args.maxpool, args.signed, args.avgpool)
    plan_conversion(graph, args.ann_layers)  # what cannot be converted is refused before the finetuning
    args.weight_bitwidth = choose_bitwidths(graph, args.weight_bitwidth, HARDWARE[DEFAULT_CHIP], args.ann_layers)

    def measure(network, **details):
        return None if test_loader is None else evaluate(network, test_loader, device, criterion, **details)

    return make(args, graph, (train_loader, train_loader), criterion, device, measure)


def check_module(net):
    """Raise ValueError, with what to give instead, for what is no network."""
    if isinstance(net, type):
        raise ValueError(f"the network is the class {net.__name__}, give an instance, {net.__name__}(...)")
    if not isinstance(net, torch.nn.Module):
        raise ValueError(f"the network is a {type(net).__name__}, give a torch.nn.Module with its weights loaded")


def options_by_name(preset, options):
    """A namespace with all options of a conversion, by a preset and the given options.

    Raises TypeError for an unknown option, and ValueError for a value out of range or an unknown preset.
    """
    classes = (QuantizeOptions, ConversionOptions, SpikeFinetuneOptions, SimulatorOptions, RunOptions)
    known = defaults(*classes)
    unknown = [name for name in options if name not in known]
    if unknown:
        close = did_you_mean(unknown[0], known)
        raise TypeError(f"convert_network has no option {unknown[0]}{close or ', it has ' + ', '.join(known)}")
    timesteps = options.get("timesteps", known["timesteps"])
    bits = {"bits": options["weight_bitwidth"]} if "weight_bitwidth" in options else {}
    args = SimpleNamespace(**{**known, **preset_options(preset, timesteps, **bits), **options})
    for cls in classes:
        cls.of(args)  # raises ValueError for values out of range
    return args


def make(args, net, loaders, criterion, device, measure, clock=None, progress=None, keep_qnet=None):
    """Quantize, finetune, convert and measure a traced network that `load_network` prepared; returns Networks.

    loaders: (training images, calibration images). measure: called like `validate.evaluate`, without loader, device and
    criterion, for each of the three networks; it may return None. clock: a running Stopwatch, or None to start one.
    progress: a `runtime.progress.Progress`, through which the trainings run, or None for a plain one. keep_qnet: called
    with the quantized network as soon as there is one, or None.

    Several processes (`runtime.processes`) share the training and the measurement. The conversion takes few images: the
    first process does it for all, so that its thresholds do not depend on the number of processes.
    """
    progress = progress or Progress()
    train_loader, calibration_loader = loaders
    clock, made = clock or Stopwatch(), Networks(net)
    made.accuracies["ann"] = measure(net)
    check_float_accuracy(made.accuracies["ann"], args, train_loader)
    clock.lap("validate_ann")
    give_back()
    quantize(args, made, loaders, criterion, device, progress)
    if keep_qnet is not None:
        keep_qnet(made.qnet)
    clock.lap("quantize_finetune")
    made.accuracies["qnet"] = measure(made.qnet)
    clock.lap("validate_qnet")
    give_back()
    made.snn = from_first(lambda: convert_by_options(made.qnet, calibration_loader, device, args))
    clock.lap("trans_ann2snn_weight")
    networks = made.snn, made.qnet, made.ann
    made.snn = finetune_on_spikes(*networks, train_loader, calibration_loader, criterion, device, args, progress)
    clock.lap("finetune_on_spikes")
    if is_first():
        with alone():
            tell_memory(made.snn, calibration_loader, device)
            tell_where_they_part(made, calibration_loader, device, args)
    made.accuracies["snn"] = measure(made.snn, timesteps=args.timesteps, every_step=True)
    clock.lap("validate_snn")
    made.seconds = clock.seconds
    made.accuracies = {name: result for name, result in made.accuracies.items() if result is not None}
    return made


def tell_memory(snn, loader, device):
    """Say on stderr if the memory budget of a spiking network is less than one image at a time takes."""
    if snn.memory_budget is None:
        return
    needed = least_memory(snn, first_inputs(loader_for(snn, loader), device, 1))
    if needed > snn.memory_budget:
        given, needed, threads = memory_in_words(snn.memory_budget), memory_in_words(needed), threads_of(device)
        images = "one image" if threads == 1 else f"one image on each of {threads} threads"
        print(f"--memory_budget {given} is too small: {images} takes about {needed}", file=sys.stderr)


def tell_where_they_part(made, loader, device, args):
    """Say on stderr which step loses the ANN's classes, if one does, before the long measurement, and what to try.

    The calibration images show it without labels. Detectors have no classes.
    """
    if getattr(args, "dataset", None) in DETECTION_DATASETS:
        return
    inputs = first_inputs(loader_for(made.ann, loader), device, PARTING_IMAGES)
    wanted = classes_of(made.ann, inputs, device)
    if wanted.unique().numel() < 2:  # a network with one class for all images says nothing
        return
    shares = [
        (classes_of(net, inputs, device, steps) == wanted).double().mean().item()
        for net, steps in ((made.qnet, None), (made.snn, args.timesteps))
    ]
    said = where_they_part(*shares, len(wanted), len(made.snn.neurons()), args)
    if said is not None:
        print(said, file=sys.stderr)


def where_they_part(of_qnet, of_snn, images, depth, args):
    """The line for shares of images whose class is the ANN's, or None if nothing is lost.

    of_qnet, of_snn: the quantized network's and the spiking network's share. depth: number of spiking layers.
    """
    agrees = f"agrees with the float one on {{:.0f}} % of {images} calibration images"
    if of_qnet - of_snn > PARTING:
        heard = {0: "without listening", "auto": "with --listen auto"}.get(args.listen, f"with --listen {args.listen}")
        ways = ["more --timesteps"] if args.listen in (args.timesteps, "auto") else ["--preset exact", "--listen auto"]
        return (
            f"the spiking network {agrees.format(100 * of_snn)}, the quantized one on {100 * of_qnet:.0f} %: "
            f"{depth} spiking layers at T={args.timesteps} {heard}; try {' or '.join(ways)}"
        )
    if 1 - of_qnet > PARTING and not args.finetune_epochs:
        weights = weights_in_words(args.weight_bitwidth)
        ways = ["finetuning", "more bits"] + ["--rounding learnt"] * (args.rounding != "learnt")
        return f"the quantized network {agrees.format(100 * of_qnet)}: {weights}; try {' or '.join(ways)}"
    return None


def quantize(args, made, loaders, criterion, device, progress=None):
    """Set `made.qnet` to the quantized and finetuned `made.ann`; with `args.equalize`, equalize `made.ann` first.

    With `args.qnet` it gets the weights of that file instead of a finetuning.
    """
    train_loader, calibration_loader = loaders
    progress = progress or Progress()
    if args.equalize:
        made.ann = equalize_channels(made.ann)
    leveled = from_first(lambda: with_levels(made.ann, calibration_loader, device, args))
    options = QuantizeOptions.of(args)
    if getattr(args, "qnet", None):
        plain = QuantizeOptions.of(args, finetune_epochs=0)
        made.qnet = quantized_from_file(args.qnet, quantize_finetune(leveled, train_loader, criterion, device, plain))
        return
    made.qnet = quantize_finetune(leveled, train_loader, criterion, device, args, progress)
    if options.rounding == "learnt" and not options.finetune_epochs:
        samples, per_channel = args.calibration_samples, options.weights_per_channel
        how = made.qnet, made.ann, calibration_loader, device, samples, per_channel

        def learn():
            made.qnet = from_first(lambda: learn_rounding(*how))

        progress.once("rounding", made.qnet, learn)


def with_levels(net, loader, device, args):
    """The network for `quantize_finetune` to train: `net`, with the activation levels of `args`, or its own, if any."""
    if args.activation_levels is None and not own_levels(net):
        return net
    per_channel = QuantizeOptions.of(args).spikes_per_channel
    options = args.activation_levels, args.ann_layers, args.calibration_samples, per_channel
    return quantize_activations(net, loader, device, *options)


def convert_by_options(qnet, loader, device, args, **changes):
    """Convert `qnet` by the flags into a spiking network. changes: conversion options that override the flags.

    `load_network` has already applied the options for max pooling and signed values.
    """
    options = ConversionOptions.of(args, **{"maxpool": None, "signed": None, **changes})
    snn = convert(qnet, loader, device, options)
    snn.set_engine(args.engine, args.memory_budget)
    return snn


# ---------------------------------------------------------------------------------------------------------------------
# Checks and loading for the scripts


def check_command_line(args):
    """Raise ValueError for an unknown network or data set, or for flags that exclude each other.

    With --qnet, take over the flags that its network was finetuned with.
    """
    check_net_name(args.net_name)
    check_dataset_name(args.dataset)
    if getattr(args, "qnet", None):
        adopt_options(args)
    for flag in CLASSIFIER_FLAGS:
        if args.dataset in DETECTION_DATASETS and getattr(args, flag, None):
            raise ValueError(f"--{flag} is for classifiers, leave it out for the detectors of --dataset {args.dataset}")
    if getattr(args, "report", None):
        check_packages("--report", *REPORT_PACKAGES)
    if args.listen != "auto" and args.listen > args.timesteps:
        raise ValueError(f"--listen {args.listen} is over --timesteps {args.timesteps}, use 0 to {args.timesteps}")
    if args.listen == "auto":
        ConversionOptions.of(args).check_windows()
    learns = args.finetune_epochs or args.rounding == "learnt" or getattr(args, "qnet", None)
    if args.activation_levels is not None and not learns:
        raise ValueError(
            "--activation_levels learns with finetuning, give it --finetune_epochs or --rounding learnt, or leave it "
            "out"
        )


def load_network(args, train_loader, calibration_loader):
    """`net, args`: the trained network as a SpikeDAGModule, ready to quantize, and `args` with weight bits as numbers.

    train_loader: its first image traces the network. calibration_loader: training images without augmentation, for the
    means of gates.

    Raises OSError for a weights file that cannot be read. Raises ValueError for weights that do not fit, layers that
    cannot be converted, an output other than one row of class scores (for detectors: maps of boxes), and a network over
    the limits of the chip that --hardware names.
    """
    name, net_args, images = args.net_name, getattr(args, "net_args", None), train_loader.dataset
    raw_net = build_trained_net(name, images.channels, images.num_classes, args.ann_weight, net_args)
    net = trace(raw_net, images, takes_gates=getattr(args, "replace_gates", None) is not None)
    net, replaced = replace_unspikable(net, calibration_loader, args)
    net = prepare_conversion(net, args.maxpool, args.signed, args.avgpool)
    tell_choices(net, args, images, replaced)
    plan_conversion(net, args.ann_layers)
    args = copy.copy(args)
    hardware = HARDWARE[args.hardware or DEFAULT_CHIP]
    args.weight_bitwidth = choose_bitwidths(net, args.weight_bitwidth, hardware, args.ann_layers)
    check_outputs = check_detects if args.dataset in DETECTION_DATASETS else check_classifies
    check_outputs(net, args.net_name, images)
    check_limits(net, args)
    return net, args


def replace_unspikable(net, loader, args):
    """`net, words`: a traced network with what `args` puts in the place of gates and activation functions.

    loader: images for the means of gates. words: what was replaced, in a line each. Raises ValueError for a network
    without gates, if they are to be replaced, and as `replace_gates`.
    """
    words = []
    if getattr(args, "replace_gates", None) is not None:
        net, spreads, images = replace_gates(net, loader_for(net, loader), args.calibration_samples)
        if not spreads:
            raise ValueError("--replace_gates: the network has no gates, leave it out")
        words.append(gates_in_words(spreads, images))
    net, replaced = replace_activations(net, getattr(args, "replace_activations", None))
    return net, [line for line in (*words, replaced_in_words(replaced)) if line]


def tell_choices(net, args, images, replaced):
    """Print on stderr what the run does to images, to activation functions, and to max poolings without a flag."""
    preprocessing = getattr(images, "preprocessing", None)
    is_choice = any(getattr(args, name, None) is not None for name in ("mean", "std", "resize", "crop", "input_shape"))
    is_choice |= (
        getattr(args, "preprocess", "dataset") != "dataset" or args.dataset not in DATASETS or is_outside(args.net_name)
    )
    if preprocessing is not None and is_choice:
        said = preprocessing.in_words().replace("images:", f"images of {args.dataset}:", 1)
        crop, flip = getattr(images, "crop", 0), getattr(images, "flip", False)
        changes = [f"shifted by up to {crop} pixels"] * (crop > 0) + ["mirrored"] * flip
        training = f"; in training {' and '.join(changes)} (--augment)" if changes and trains(args) else ""
        print(said + training, file=sys.stderr)
    if own_levels(net) and args.activation_levels is None:
        print(own_levels_in_words(net), file=sys.stderr)
    for words in replaced:
        print(f"{words}: another network, whose accuracy needs finetuning", file=sys.stderr)
    if args.maxpool is None and any(isinstance(entry.op, SpikeMaxPool2d) for entry in net.ops.values()):
        print(
            f"max pooling: {DEFAULT_MAXPOOL}, the largest spike count of a window passes, which needs a counter per "
            "input; --maxpool or lets any spike pass",
            file=sys.stderr,
        )


def trains(args):
    """Whether a run trains on the training images."""
    finetunes = args.finetune_epochs and not getattr(args, "qnet", None)
    return bool(finetunes or getattr(args, "spike_epochs", 0))


def check_float_accuracy(result, args, train_loader):
    """Raise ValueError if the float network has not the accuracy of --expect_top1; without it, warn near chance."""
    # another network than the one that the user measured
    is_other = any(getattr(args, name, None) for name in ("replace_activations", "replace_gates"))
    if is_other or result is None or "top1" not in result:
        return
    expected, top1, samples = getattr(args, "expect_top1", None), result["top1"], result["samples"]
    classes = getattr(getattr(train_loader, "dataset", None), "num_classes", None)
    if expected is not None and abs(top1 - expected) > max(TOP1_TOLERANCE, 100 / samples):
        raise ValueError(
            f"the float network has {top1:.2f} % of {samples} test images, --expect_top1 is {expected:g}: {LOOK_AT}"
        )
    has_weights = getattr(args, "ann_weight", None) or is_outside(getattr(args, "net_name", ""))
    if expected is None and has_weights and classes and top1 < NEAR_CHANCE * 100 / classes:
        chance = f"chance is {100 / classes:.3g} %"
        print(f"warning: the float network has {top1:.2f} % ({chance}): {LOOK_AT}", file=sys.stderr)


def trace(raw_net, images, takes_gates=False):
    """The graph of a network, traced with the first of `images`. Raises as `parse_ann_model`.

    An error of the network's own code becomes a ValueError with its file and line.
    """
    image = images[0][0]
    try:
        return parse_ann_model(raw_net, (image[None],), takes_gates=takes_gates)
    except ValueError as error:
        if CANNOT_RUN not in str(error):
            raise
        shape = ",".join(map(str, image.shape))
        raise ValueError(f"{error}; the images are {shape}, --input_shape C,H,W changes them") from error
    except (AttributeError, LookupError, NameError, AssertionError, ArithmeticError) as error:  # of the user's forward
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        raise ValueError(f"the network's forward failed: {reason}") from error


def choose_measure(args):
    """`criterion, measure`: the loss and `validate.evaluate`, or their counterparts for detectors."""
    if args.dataset in DETECTION_DATASETS:
        return DetectionLoss(args.image_size), evaluate_detector
    return torch.nn.CrossEntropyLoss(), evaluate


@torch.no_grad()
def check_classifies(net, net_name, images):
    """Raise ValueError unless the network returns one row of class scores per image, [B, classes]."""
    output = net(images[0][0][None])
    shapes = [tuple(value.shape) for value in (output if isinstance(output, tuple) else (output,))]
    if shapes != [(1, images.num_classes)]:
        wanted = f"[B, {images.num_classes}], one score for each class of the data set"
        raise ValueError(f"{net_name} returns {', '.join(map(str, shapes))} for one image, it has to return {wanted}")


def check_limits(net, args):
    """Check the hardware limits. With --hardware, print the table and raise ValueError; otherwise warn in one line."""
    layers, bits = hardware_layers(net, args.ann_layers), bitwidths_by_name(net, args.weight_bitwidth)
    if args.hardware:
        hardware = HARDWARE[args.hardware]
        print(format_table(hardware_table(layers, bits, hardware)), flush=True)
        check_hardware(layers, bits, hardware)
        return
    hardware = HARDWARE[DEFAULT_CHIP]
    over = violations(layers, bits, hardware)
    if over:
        names = ", ".join(layer.where for layer, _ in over[:3]) + (", ..." if len(over) > 3 else "")
        count = "1 layer exceeds" if len(over) == 1 else f"{len(over)} layers exceed"
        weights = weights_in_words(args.weight_bitwidth)
        limits = f"Hardware {hardware.name} with {weights} ({names}), see hw_constraints.py"
        print(f"warning: {count} {limits}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Results


class Stopwatch:
    """Measures the seconds of each stage. seconds: stage -> seconds."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, stage):
        """Record the seconds since the last lap under `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.last, 3)
        self.last = now


def accuracy_table(args, accuracies):
    """A text table of the three networks' accuracies (`Networks.accuracies`), or mean average precisions."""
    weights = weights_in_words(args.weight_bitwidth)
    title = f"{args.net_name} on {args.dataset}: {weights}, {args.timesteps} timesteps, reset by {args.reset_mode}"
    is_detector = "map" in accuracies["ann"]
    columns = {"mAP": "map", "mAP@0.5": "map50"} if is_detector else {"top-1 %": "top1"}
    digits = 4 if is_detector else 2
    rows = [("", *columns, "loss")]
    names = {"ANN": "ann", "quantized ANN": "qnet", f"SNN, T={args.timesteps}": "snn"}
    for name, kind in names.items():
        result = accuracies[kind]
        numbers = [f"{result[key]:.{digits}f}" for key in columns.values()]
        rows.append((name, *numbers, f"{result['loss']:.4f}"))
    return f"{title}\n{format_table(rows)}"


def versions():
    """The versions of Python and of the packages that affect a result."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
