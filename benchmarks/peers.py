"""Measure SpikingJelly's conversions of the same networks on the same images: network x mode x timesteps.

    python3 benchmarks/peers.py --networks resnet20:checkpoint/resnet20_cifar10_ann.pth --dataset /path/to/cifar10 \\
        --timesteps 4 8 16 32 --test_images 1000

SpikingJelly keeps float weights and is calibrated on the same 1,000 training images as this toolkit. One simulation
serves every T and two readings of the outputs: the mean over all steps, and ("delayed") the mean from the step that its
`estimate_delay_start` returns, at most three quarters of T. Needs `pip install spikingjelly`, version 2.0 or later.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy import add_table_flags, conversion_args, evenly_spaced
from runtime.cli import OneLineParser, run_script

CALIBRATION_IMAGES = 1000  # the default of --calibration_samples
MOST_DELAYED = 0.75  # latest start of a delayed reading, as a share of T, so that it still has some steps


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_table_flags(parser)
    return parser.parse_args(argv)


def main(args):
    import torch

    from runtime.files import check_writable, write_json
    from spike_dag import format_table
    from validate import evaluate

    check_writable(args.results)
    check_installed()
    rows, found = [("network", "mode", *(f"T={T}" for T in args.timesteps))], []
    for network in args.networks:
        net, calibration, batches = load(args, network)
        ann = evaluate(net, batches, torch.device("cpu"), torch.nn.CrossEntropyLoss())["top1"]
        rows.append((network.split(":")[0], "float ANN", *[f"{ann:.2f}"] * len(args.timesteps)))
        for mode, recipe in recipes(calibration).items():
            for reading, accuracies in measure(net, recipe, calibration, batches, args.timesteps).items():
                found.append({"network": network, "mode": mode + reading, "ann_top1": ann, "snn_top1": accuracies})
                points = [f"{accuracies[T] - ann:+.2f}" for T in args.timesteps]
                rows.append((network.split(":")[0], mode + reading, *points))
                print(*rows[-1], file=sys.stderr)
                if args.results:
                    write_json(args.results, {"dataset": args.dataset, "runs": found})
    print(format_table(rows))


def check_installed():
    """Raise ValueError if SpikingJelly is missing or too old."""
    try:
        import spikingjelly.activation_based.ann2snn.recipes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"this benchmark needs SpikingJelly 2.0 or later, pip install spikingjelly ({error})"
        ) from error


def load(args, network):
    """The float network, calibration batches, and [(images, targets)] of the test set."""
    import torch

    from build_network import build_trained_net, input_size
    from datasets import get_dataset
    from finetuning.on_spikes import first_images
    from runtime.device import seed_everything

    flags = conversion_args(network, 8, "-e 0", 1, 0, args.dataset)
    flags.image_size = input_size(flags.net_name)
    seed_everything(0)
    test_loader, _, train_loader, train_val_loader = get_dataset(flags)
    images = train_loader.dataset
    net = build_trained_net(flags.net_name, images.channels, images.num_classes, flags.ann_weight).eval()
    test_images, targets = evenly_spaced(test_loader, args.test_images)
    calibration = first_images(train_val_loader, CALIBRATION_IMAGES)
    return net, calibration, list(zip(torch.split(test_images, 100), torch.split(targets, 100)))


def recipes(calibration):
    """Name -> recipe, for SpikingJelly's recipes for convolutional networks. calibration: batches of images."""
    from spikingjelly.activation_based.ann2snn.recipes import LocalThresholdBalancingRecipe, RateCodingRecipe

    return {
        "99.9 %": RateCodingRecipe(calibration, mode="99.9%"),
        "99.9 % per channel, Vthr / 2": RateCodingRecipe(
            calibration, mode="99.9%", channel_wise=True, half_threshold=True
        ),
        "LTB": LocalThresholdBalancingRecipe(calibration),
    }


def measure(net, recipe, calibration, batches, timesteps):
    """Reading of the outputs ("" or ", delayed") -> {T: top-1 in percent}."""
    import copy

    import torch
    from spikingjelly.activation_based.ann2snn import Converter
    from spikingjelly.activation_based.ann2snn.delay import estimate_delay_start
    from spikingjelly.activation_based.functional import reset_net, set_step_mode

    snn = Converter(recipe, device="cpu").convert(copy.deepcopy(net)).eval()
    delay = estimate_delay_start(snn, calibration, "cpu", max(timesteps), 4)
    set_step_mode(snn, "s")
    hits = {reading: dict.fromkeys(timesteps, 0) for reading in ("", ", delayed")}
    for images, targets in batches:
        reset_net(snn)
        with torch.no_grad():
            outputs = torch.stack([snn(images) for _ in range(max(timesteps))]).cumsum(0)  # [T, B, classes]
        for T in timesteps:
            start = min(delay, int(MOST_DELAYED * T))
            late = outputs[T - 1] - (outputs[start - 1] if start else 0)
            for reading, output in (("", outputs[T - 1]), (", delayed", late)):
                hits[reading][T] += (output.argmax(1) == targets).sum().item()
    images = sum(len(targets) for _, targets in batches)
    return {reading: {T: 100 * hit / images for T, hit in counts.items()} for reading, counts in hits.items()}


if __name__ == "__main__":
    run_script(main, parse_args())
