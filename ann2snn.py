"""Quantise and finetune a trained network, convert it into a spiking one, measure all three, save the result.

    python3 ann2snn.py example_net --weight_bitwidth 4 --timesteps 16 --finetune_epochs 30 \\
        --ann_weight checkpoint/example_net_ann.pth --save_file out_snn.pth
"""

import argparse
import platform
import sys
import time

from runtime.cli import OneLineParser, add_conversion_flags, run_script


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net_name", help="network name to convert")
    add_conversion_flags(parser)
    parser.add_argument("--save_file", default="out_snn.pth", help="the output location of the transferred weights")
    parser.add_argument("--results", metavar="FILE.json", help="write all results as JSON")
    return parser.parse_args(argv)


def main(args):
    # imported here, so that --help and a wrong command line answer at once
    import torch
    from torch import nn

    from ann_parser import parse_ann_model
    from build_network import build_trained_net, check_net_name, input_size
    from dag_rewrites import prepare_conversion
    from datasets import DETECTION_DATASETS, check_dataset_name, get_dataset
    from quantization import equalize_channels, quantize_finetune
    from runtime.device import choose_device, seed_everything
    from runtime.files import check_different, check_writable, write_atomically, write_json
    from snn_weight_setter import plan_conversion, trans_ann2snn_weight
    from validate import evaluate

    # everything that can be wrong with the command line is found before the work begins
    check_net_name(args.net_name)
    check_dataset_name(args.dataset)
    check_writable(args.save_file)
    check_writable(args.results)
    check_different(args.save_file, args.results)
    if args.listen > args.timesteps:
        raise ValueError(f"--listen {args.listen} is over --timesteps {args.timesteps}, use 0 to {args.timesteps}")
    device = choose_device(args.device)
    seed_everything(args.seed)
    args.image_size = input_size(args.net_name)
    clock = Stopwatch()

    test_loader, _, train_loader, train_val_loader = get_dataset(args)
    images = train_loader.dataset
    raw_net = build_trained_net(args.net_name, images.channels, images.num_classes, args.ann_weight, args.pretrained)
    clock.lap("data")

    net = parse_ann_model(raw_net, (images[0][0][None],))
    net = prepare_conversion(net, args.maxpool, args.signed)
    plan_conversion(net, args.ann_layers)
    criterion, measure, by_step = nn.CrossEntropyLoss(), evaluate, {"every_step": True}
    if args.dataset in DETECTION_DATASETS:
        from detection import DetectionLoss, check_detects, evaluate_detector

        check_detects(net, args.net_name, images)
        criterion, measure, by_step = DetectionLoss(args.image_size), evaluate_detector, {}
    else:
        check_classifies(net, args.net_name, images)
    check_limits(net, args)

    ann = measure(net, test_loader, device, criterion)
    clock.lap("validate_ann")

    if args.equalize:
        net = equalize_channels(net)
    qnet = quantize_finetune(net, train_loader, criterion, device, args)
    clock.lap("quantize_finetune")
    quantised = measure(qnet, test_loader, device, criterion)
    clock.lap("validate_qnet")

    snn = trans_ann2snn_weight(
        qnet,
        train_val_loader,
        device,
        args.timesteps,
        args.weight_bitwidth,
        reset_mode=args.reset_mode,
        initial_potential=args.initial_potential,
        listen=args.listen,
        threshold=args.threshold,
        quantile=args.quantile,
        correction=args.correction,
        per_channel=args.weight_granularity == "channel",
        ann_layers=args.ann_layers,
        calibration_samples=args.calibration_samples,
    )
    snn.set_engine(args.engine, args.memory_budget)
    clock.lap("trans_ann2snn_weight")
    spiking = measure(snn, test_loader, device, criterion, args.timesteps, **by_step)
    clock.lap("validate_snn")

    print_results(args, ann, quantised, spiking)
    print_layers(snn, spiking["firing_rate"])
    steps = snn.duration()
    print(
        f"timesteps: {steps['firing']} of firing, {steps['interval']} between images, {steps['latency']} to the answer"
    )
    write_atomically(args.save_file, lambda path: torch.save(snn.cpu(), path))
    print(f"Save the SNN in {args.save_file}")
    if args.results:
        write_json(args.results, collect_results(args, ann, quantised, spiking, steps, clock.seconds))


def check_classifies(net, net_name, images):
    """Raise ValueError unless the network's output is one row of class scores an image."""
    import torch

    with torch.no_grad():
        output = net(images[0][0][None])
    shapes = [tuple(value.shape) for value in (output if isinstance(output, tuple) else (output,))]
    if shapes != [(1, images.num_classes)]:
        wanted = f"[B, {images.num_classes}], one score for each class of the data set"
        raise ValueError(f"{net_name} returns {', '.join(map(str, shapes))} for one image, it has to return {wanted}")


def check_limits(net, args):
    """Hardware limits: an error, with the table, for a chip asked for by name; else one line of warning."""
    from hw_constraints import HARDWARE, check_hardware, hardware_table, violations
    from snn_weight_setter import hardware_layers
    from spike_dag import format_table

    bits, layers = args.weight_bitwidth, hardware_layers(net, args.ann_layers)
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
        limits = f"Hardware {hardware.name} at {bits} bits ({names}), see hw_constraints.py"
        print(f"warning: {count} {limits}", file=sys.stderr)


class Stopwatch:
    """Seconds by stage."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, stage):
        """The time since the last lap belongs to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.last, 3)
        self.last = now


def print_results(args, ann, quantised, spiking):
    """The three accuracies, or mean average precisions."""
    from spike_dag import format_table

    weights = "float weights" if args.weight_bitwidth == 32 else f"{args.weight_bitwidth}-bit weights"
    print(f"{args.net_name} on {args.dataset}: {weights}, {args.timesteps} timesteps, reset by {args.reset_mode}")
    columns = {"mAP": "map", "mAP@0.5": "map50"} if "map" in ann else {"top-1 %": "top1"}
    rows = [("", *columns, "loss")]
    results = {"ANN": ann, "quantised ANN": quantised, f"SNN, T={args.timesteps}": spiking}
    for name, result in results.items():
        digits = 4 if "map" in ann else 2
        numbers = [f"{result[key]:.{digits}f}" for key in columns.values()]
        rows.append((name, *numbers, f"{result['loss']:.4f}"))
    print(format_table(rows))


def print_layers(snn, firing_rate):
    """What the chip needs to know of each spiking layer."""
    from spike_dag import format_table

    rows = [("spiking layer", "module path", "Vthr", "lambda", "spikes per neuron and step")]
    for name, neuron in snn.neurons().items():
        threshold, scale = neuron.Vthr.float(), neuron.scale_factor.float()
        rows.append((name, snn.ops[name]["path"], span(threshold), span(scale), f"{firing_rate[name]:.4f}"))
    print(format_table(rows))


def span(values):
    """A tensor of one or more numbers, in words."""
    least, most = values.min().item(), values.max().item()
    return f"{least:.4g}" if least == most else f"{least:.4g}..{most:.4g}"


def collect_results(args, ann, quantised, spiking, duration, seconds):
    """What `--results` holds."""
    import numpy
    import torch

    flags = {key: value for key, value in vars(args).items() if key not in ("debug", "results")}
    accuracies = {"ann": ann, "qnet": quantised, "snn": spiking}
    return {
        "net": args.net_name,
        **{key: getattr(args, key) for key in ("dataset", "weight_bitwidth", "timesteps", "reset_mode", "seed")},
        **{
            f"{name}_{key}": result[key]
            for key in ("top1", "top5", "map", "map50", "loss")
            for name, result in accuracies.items()
            if key in result
        },
        "samples": spiking["samples"],
        **by_timestep(spiking),
        "firing_rate": spiking["firing_rate"],
        "duration": duration,
        "seconds": seconds,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "flags": flags,
    }


def by_timestep(spiking):
    """The accuracy after every step, where it was measured."""
    if "top1_by_timestep" not in spiking:
        return {}
    return {"snn_top1_by_timestep": {str(t): top1 for t, top1 in enumerate(spiking["top1_by_timestep"], start=1)}}


if __name__ == "__main__":
    run_script(main, parse_args())
