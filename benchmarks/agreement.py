"""Compare a spiking network with many timesteps and float weights with its ANN, layer by layer.

    python3 benchmarks/agreement.py --networks torchvision:resnet18 torchvision:densenet121 --image_size 64
    python3 benchmarks/agreement.py --networks example_net --dataset digits --ann_weight checkpoint/example_net_ann.pth

Prints for every network: the largest output difference between the traced graph and the network, without and with
BatchNorm folding; the least correlation, over all spiking layers, between decoded spikes and activations; and the
percentage of images for which both choose the same class. Without a data set, the images are random.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options import RunOptions
from runtime.cli import OneLineParser, run_script
from runtime.flags import add_options, whole_number
from script_options import DataOptions


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", required=True, help="names of build_network.py or torchvision:NAME")
    parser.add_argument("--timesteps", type=whole_number(1), default=1024, help="T (%(default)s)")
    parser.add_argument("--images", type=whole_number(1), default=4, help="number of images to simulate (%(default)s)")
    parser.add_argument(
        "--image_size", type=whole_number(1), default=None, help="height and width of the images (those of the network)"
    )
    parser.add_argument("--ann_weight", default=None, help="trained weights (random ones)")
    parser.add_argument(
        "--correction",
        choices=["potential", "bias", "none"],
        default="potential",
        help="same as in ann2snn.py; none is far faster (%(default)s)",
    )
    add_options(parser, DataOptions, dataset=None)
    add_options(parser, RunOptions)
    parser.main_actions.clear()  # --help shows all of them
    return parser.parse_args(argv)


def main(args):
    from build_network import input_size
    from runtime.device import choose_device, seed_everything
    from spike_dag import format_table

    device = choose_device(args.device)
    rows = [("network", "spiking layers", "graph", "folded graph", "least correlation", "its layer", "same class %")]
    for name in args.networks:
        seed_everything(args.seed)
        images, calibration, classes = choose_images(args, args.image_size or input_size(name))
        rows.append(measure(name, args, classes, images, calibration, device))
        print(*rows[-1], file=sys.stderr)  # print each row as soon as it is known
    print(format_table(rows))


def choose_images(args, size):
    """`images, calibration, classes`: images to simulate and to calibrate on, [B, C, H, W]; the number of classes."""
    import torch

    from datasets import get_dataset

    if args.dataset is None:
        return torch.randn(args.images, 3, size, size), torch.randn(16, 3, size, size), 1000
    test_loader, _, _, train_val_loader = get_dataset(argparse.Namespace(**{**vars(args), "image_size": size}))
    images = torch.cat([batch for batch, _ in test_loader])[: args.images]
    return images, next(iter(train_val_loader))[0], test_loader.dataset.num_classes


def measure(name, args, classes, images, calibration, device):
    """The table row of one network."""
    import torch

    from ann_parser import parse_ann_model
    from build_network import build_trained_net
    from snn_weight_setter import trans_ann2snn_weight

    net = build_trained_net(name, images.shape[1], classes, args.ann_weight).eval().to(device)
    images, calibration = images.to(device), calibration.to(device)
    graphs = [parse_ann_model(net, (images[:1],), fold=fold) for fold in (False, True)]
    with torch.no_grad():
        expected = net(images)
        differences = [(graph(images) - expected).abs().max().item() for graph in graphs]
        options = dict(maxpool="gate", signed="pair", threshold="max", correction=args.correction)
        samples = len(calibration)
        snn = trans_ann2snn_weight(
            graphs[1], [(calibration,)], device, args.timesteps, 32, calibration_samples=samples, **options
        )
        outputs, correlations = compare(snn, images)
    same = 100 * (outputs.argmax(1) == expected.argmax(1)).double().mean().item()
    worst = min(correlations, key=correlations.get)
    counts = len(correlations), *(f"{difference:.1e}" for difference in differences)
    return (name, *counts, f"{correlations[worst]:.4f}", snn.where(worst), f"{same:.1f}")


def compare(snn, images):
    """`outputs, correlations`: the outputs of the SNN, [B, classes], and op name -> correlation.

    The correlation is that between decoded spikes and the activations of `snn.forward_ann`.
    """
    import torch

    from spike_simulator import simulate

    outputs, decoded, activations = [], {}, {}
    for image in images.split(1):
        counts = {}

        def watch(name, current, spikes, counts=counts):
            if snn.ops[name].op.neuron is not None:
                counts[name] = counts.get(name, 0) + spikes.counts()

        def watch_ann(name, current, activation, counts=counts):
            if name in counts:
                scale = snn.ops[name].op.neuron.scale_factor / snn.timesteps
                decoded.setdefault(name, []).append((counts[name] * scale).flatten())
                activations.setdefault(name, []).append(activation.flatten())

        (output,) = simulate(snn, (image,), snn.timesteps, watch=watch)
        outputs.append(output)
        snn.forward_ann((image,), watch_ann)
    pairs = {name: torch.stack([torch.cat(decoded[name]), torch.cat(activations[name])]) for name in decoded}
    correlations = {name: torch.corrcoef(pair.double())[0, 1].item() for name, pair in pairs.items()}
    return torch.cat(outputs), correlations


if __name__ == "__main__":
    run_script(main, parse_args())
