"""The steps from a trained network to a spiking one, for the scripts and as one call in Python.

    result = convert_network(net, train_loader, test_loader, weight_bitwidth=4, timesteps=16)
    result.ann_top1, result.qnet_top1, result.snn_top1; result.snn(images)

The scripts go the same way: check_command_line, load_network, make, accuracy_table.
"""

import copy
import platform
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy
import torch

from ann_parser import parse_ann_model
from build_network import build_trained_net, check_net_name
from conversion.plan import plan_conversion
from dag_rewrites import equalize_channels, prepare_conversion
from datasets import DETECTION_DATASETS, check_dataset_name
from detection.boxes import DetectionLoss, check_detects, evaluate_detector
from finetuning.levels import quantize_activations
from finetuning.on_spikes import finetune_on_spikes
from hw_constraints import (
    HARDWARE,
    bitwidths_by_name,
    check_hardware,
    choose_bitwidths,
    hardware_layers,
    hardware_table,
    violations,
)
from options import (
    ConversionOptions,
    QuantizeOptions,
    RunOptions,
    SimulatorOptions,
    SpikeFinetuneOptions,
    defaults,
    preset_options,
)
from quantization import as_dag, quantize_finetune, weights_in_words
from runtime.batches import reusable
from runtime.device import choose_device, seed_everything
from runtime.packages import REPORT_PACKAGES, check_packages
from snn_weight_setter import convert
from spike_dag import format_table
from validate import evaluate

CLASSIFIER_FLAGS = ("report", "spike_epochs", "spike_epochs_unlabelled", "finetune_distill")


@dataclass
class Networks:
    """What a conversion makes. ann, qnet, snn: the float, the quantized and the spiking network.

    seconds: by stage. accuracies: of the three, as `validate.evaluate` returns them, where they were measured.
    """

    ann: torch.nn.Module
    qnet: torch.nn.Module = None
    snn: torch.nn.Module = None
    seconds: dict = field(default_factory=dict)
    accuracies: dict = field(default_factory=dict)

    @property
    def ann_top1(self):
        """Top-1 accuracy of the float network, percent."""
        return self.accuracies["ann"]["top1"]

    @property
    def qnet_top1(self):
        """Top-1 accuracy of the quantized network, percent."""
        return self.accuracies["qnet"]["top1"]

    @property
    def snn_top1(self):
        """Top-1 accuracy of the spiking network after all timesteps, percent."""
        return self.accuracies["snn"]["top1"]

    @property
    def snn_top1_by_timestep(self):
        """Top-1 accuracy of the spiking network after step 1, 2, ... T, percent."""
        return self.accuracies["snn"]["top1_by_timestep"]


# ---------------------------------------------------------------------------------------------------------------------
# One call


def convert_network(net, train_loader, test_loader=None, *, criterion=None, preset="specification", **options):
    """The Networks of a plain nn.Module, with the command line's defaults.

    train_loader: images and labels to finetune and to calibrate on. test_loader: what the three networks are measured
    on, in percent: `result.ann_top1`, `qnet_top1`, `snn_top1`, and the list `snn_top1_by_timestep`; None measures
    nothing. criterion: of the finetuning, cross entropy by default. preset: a name of `options.PRESETS`. options:
    fields of the dataclasses in `options.py`, as weight_bitwidth=4, timesteps=16, finetune_epochs=10, threshold="mse",
    device="cpu". `net` is not changed.

    Raises TypeError for an unknown option, and ValueError for values out of range and for networks that cannot be
    converted.
    """
    args = options_by_name(preset, options)
    device, criterion = choose_device(args.device), criterion or torch.nn.CrossEntropyLoss()
    seed_everything(args.seed)
    train_loader = reusable(train_loader)
    graph = prepare_conversion(as_dag(net, train_loader), args.maxpool, args.signed, args.avgpool)
    args.weight_bitwidth = choose_bitwidths(graph, args.weight_bitwidth, HARDWARE["v1.0"], args.ann_layers)

    def measure(network, **details):
        return None if test_loader is None else evaluate(network, test_loader, device, criterion, **details)

    return make(args, graph, (train_loader, train_loader), criterion, device, measure)


def options_by_name(preset, options):
    """A namespace of all options of a conversion. Raises TypeError for a name that none has."""
    classes = (QuantizeOptions, ConversionOptions, SpikeFinetuneOptions, SimulatorOptions, RunOptions)
    known = defaults(*classes)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"convert_network has no option {unknown[0]}, it has {', '.join(known)}")
    timesteps = options.get("timesteps", known["timesteps"])
    args = SimpleNamespace(**{**known, **preset_options(preset, timesteps), **options})
    for cls in classes:
        cls.of(args)  # raises ValueError for values out of range
    return args


def make(args, net, loaders, criterion, device, measure, clock=None):
    """The Networks of a traced network `net` that is ready to be quantized (`load_network`).

    loaders: of the training images, and of those that calibrate. measure: called as `validate.evaluate` without loader,
    device and criterion, for each of the three networks; it may return None. clock: a Stopwatch that is
    running, or None to start one.
    """
    train_loader, calibration_loader = loaders
    clock, made = clock or Stopwatch(), Networks(net)
    made.accuracies["ann"] = measure(net)
    clock.lap("validate_ann")
    quantize(args, made, loaders, criterion, device)
    clock.lap("quantize_finetune")
    made.accuracies["qnet"] = measure(made.qnet)
    clock.lap("validate_qnet")
    made.snn = convert_by_options(made.qnet, calibration_loader, device, args)
    clock.lap("trans_ann2snn_weight")
    networks = made.snn, made.qnet, made.ann
    made.snn = finetune_on_spikes(*networks, train_loader, calibration_loader, criterion, device, args)
    clock.lap("finetune_on_spikes")
    made.accuracies["snn"] = measure(made.snn, timesteps=args.timesteps, every_step=True)
    clock.lap("validate_snn")
    made.seconds = clock.seconds
    made.accuracies = {name: result for name, result in made.accuracies.items() if result is not None}
    return made


def quantize(args, made, loaders, criterion, device):
    """Set `made.qnet`, quantized and finetuned; equalize `made.ann` before it where that is asked for."""
    train_loader, calibration_loader = loaders
    if args.equalize:
        made.ann = equalize_channels(made.ann)
    leveled = with_levels(made.ann, calibration_loader, device, args)
    made.qnet = quantize_finetune(leveled, train_loader, criterion, device, args)


def with_levels(net, loader, device, args):
    """The network that `quantize_finetune` is to train: with `--activation_levels` its activations have levels."""
    if args.activation_levels is None:
        return net
    granularity = "channel" if QuantizeOptions.of(args).spikes_per_channel else "layer"
    options = args.activation_levels, args.ann_layers, args.calibration_samples, granularity
    return quantize_activations(net, loader, device, *options)


def convert_by_options(qnet, loader, device, args, **changes):
    """The spiking network of `qnet` by the flags; changes: options of the conversion to use instead.

    Max pooling and signs were settled when the network was loaded.
    """
    options = ConversionOptions.of(args, **{"maxpool": None, "signed": None, **changes})
    snn = convert(qnet, loader, device, options)
    snn.set_engine(args.engine, args.memory_budget)
    return snn


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts check and load


def check_command_line(args):
    """Raise ValueError for a network, a data set or a combination of flags that cannot work."""
    check_net_name(args.net_name)
    check_dataset_name(args.dataset)
    for flag in CLASSIFIER_FLAGS:
        if args.dataset in DETECTION_DATASETS and getattr(args, flag, None):
            raise ValueError(f"--{flag} is for classifiers, leave it out for the detectors of --dataset {args.dataset}")
    if getattr(args, "report", None):
        check_packages("--report", *REPORT_PACKAGES)
    if args.listen > args.timesteps:
        raise ValueError(f"--listen {args.listen} is over --timesteps {args.timesteps}, use 0 to {args.timesteps}")
    if args.activation_levels is not None and not args.finetune_epochs:
        raise ValueError("--activation_levels learns with finetuning, give it --finetune_epochs or leave it out")


def load_network(args, images):
    """`net, args`: the trained network as a SpikeDAGModule, ready to be quantized, and `args` with its weight bits.

    images: the training set.

    Raises OSError or ValueError for weights that do not fit, layers that cannot be converted, an output that is no row
    of class scores (for a detector, no maps of boxes), and limits of a chip asked for by name.
    """
    raw_net = build_trained_net(args.net_name, images.channels, images.num_classes, args.ann_weight)
    net = parse_ann_model(raw_net, (images[0][0][None],))
    net = prepare_conversion(net, args.maxpool, args.signed, args.avgpool)
    plan_conversion(net, args.ann_layers)
    args = copy.copy(args)
    hardware = HARDWARE[args.hardware or "v1.0"]
    args.weight_bitwidth = choose_bitwidths(net, args.weight_bitwidth, hardware, args.ann_layers)
    check_outputs = check_detects if args.dataset in DETECTION_DATASETS else check_classifies
    check_outputs(net, args.net_name, images)
    check_limits(net, args)
    return net, args


def choose_measure(args):
    """`criterion, measure`: the loss, and `validate.evaluate` or what measures detectors, with its arguments."""
    if args.dataset in DETECTION_DATASETS:
        return DetectionLoss(args.image_size), evaluate_detector
    return torch.nn.CrossEntropyLoss(), evaluate


@torch.no_grad()
def check_classifies(net, net_name, images):
    """Raise ValueError unless the network's output is one row of class scores an image."""
    output = net(images[0][0][None])
    shapes = [tuple(value.shape) for value in (output if isinstance(output, tuple) else (output,))]
    if shapes != [(1, images.num_classes)]:
        wanted = f"[B, {images.num_classes}], one score for each class of the data set"
        raise ValueError(f"{net_name} returns {', '.join(map(str, shapes))} for one image, it has to return {wanted}")


def check_limits(net, args):
    """Hardware limits: an error, with the table, for a chip asked for by name; else one line of warning."""
    layers, bits = hardware_layers(net, args.ann_layers), bitwidths_by_name(net, args.weight_bitwidth)
    if args.hardware:
        hardware = HARDWARE[args.hardware]
        print(format_table(hardware_table(layers, bits, hardware)), flush=True)
        check_hardware(layers, bits, hardware)
        return
    hardware = HARDWARE["v1.0"]
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
    """Seconds by stage."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, stage):
        """The time since the last lap belongs to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.last, 3)
        self.last = now


def accuracy_table(args, accuracies):
    """The three accuracies (`Networks.accuracies`), or mean average precisions, in words."""
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
    """Versions of what a result depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
