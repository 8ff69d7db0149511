"""The steps from a command line to a spiking network that ann2snn.py and analyse_error.py share.

check_command_line(args)                            what can be wrong is found before the work begins
net, args = load_network(args, images)              the trained network as a graph that can be converted
qnet = quantize_finetune(net, ...)                  quantization.py
snn = convert(qnet, train_val_loader, device, args) the spiking network
snn = finetune_on_spikes(snn, qnet, net, ...)       finetuning/on_spikes.py
"""

import platform
import sys
import time

import numpy
import torch

from ann_parser import parse_ann_model
from build_network import build_trained_net, check_net_name
from conversion.plan import plan_conversion
from dag_rewrites import prepare_conversion
from datasets import DETECTION_DATASETS, check_dataset_name
from detection.boxes import DetectionLoss, check_detects, evaluate_detector
from finetuning.levels import quantize_activations
from hw_constraints import (
    HARDWARE,
    bitwidths_by_name,
    check_hardware,
    choose_bitwidths,
    hardware_layers,
    hardware_table,
    violations,
)
from quantization import weights_in_words
from runtime.packages import REPORT_PACKAGES, check_packages
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import format_table
from validate import evaluate

CLASSIFIER_FLAGS = ("report", "finetune_snn", "calibration_epochs", "finetune_distill")


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
    raw_net = build_trained_net(args.net_name, images.channels, images.num_classes, args.ann_weight, args.pretrained)
    net = parse_ann_model(raw_net, (images[0][0][None],))
    net = prepare_conversion(net, args.maxpool, args.signed, args.avgpool)
    plan_conversion(net, args.ann_layers)
    hardware = HARDWARE[args.hardware or "v1.0"]
    bits = choose_bitwidths(net, args.weight_bitwidth, hardware, args.ann_layers)
    args = type(args)(**{**vars(args), "weight_bitwidth": bits})
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


def with_levels(net, loader, device, args):
    """The network that `quantize_finetune` is to train: with `--activation_levels` its activations have levels."""
    if args.activation_levels is None:
        return net
    options = args.activation_levels, args.ann_layers, args.calibration_samples, args.granularity
    return quantize_activations(net, loader, device, *options)


def convert(qnet, loader, device, args, **changes):
    """The spiking network of `qnet` by the flags; `changes`: arguments of `trans_ann2snn_weight` to use instead."""
    options = {
        "timesteps": args.timesteps,
        "weight_bitwidth": args.weight_bitwidth,
        "reset_mode": args.reset_mode,
        "initial_potential": args.initial_potential,
        "listen": args.listen,
        "threshold": args.threshold,
        "quantile": args.quantile,
        "granularity": args.granularity,
        "correction": args.correction,
        "hold_back": args.hold_back,
        "per_channel": args.weight_granularity == "channel",
        "avgpool": args.avgpool,
        "ann_layers": args.ann_layers,
        "calibration_samples": args.calibration_samples,
    }
    snn = trans_ann2snn_weight(qnet, loader, device, **{**options, **changes})
    snn.set_engine(args.engine, args.memory_budget)
    return snn


class Stopwatch:
    """Seconds by stage."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, stage):
        """The time since the last lap belongs to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.last, 3)
        self.last = now


def accuracy_table(args, ann, quantized, spiking):
    """The three accuracies, or mean average precisions, in words."""
    weights = weights_in_words(args.weight_bitwidth)
    title = f"{args.net_name} on {args.dataset}: {weights}, {args.timesteps} timesteps, reset by {args.reset_mode}"
    columns = {"mAP": "map", "mAP@0.5": "map50"} if "map" in ann else {"top-1 %": "top1"}
    digits = 4 if "map" in ann else 2
    rows = [("", *columns, "loss")]
    results = {"ANN": ann, "quantized ANN": quantized, f"SNN, T={args.timesteps}": spiking}
    for name, result in results.items():
        numbers = [f"{result[key]:.{digits}f}" for key in columns.values()]
        rows.append((name, *numbers, f"{result['loss']:.4f}"))
    return f"{title}\n{format_table(rows)}"


def versions():
    """Versions of what a result depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
