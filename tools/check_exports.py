"""Compare the spike counts of exported networks in foreign programs with those of the simulator, as a Markdown table.

    python3 tools/check_exports.py --cifar10 data/cifar10 --networks example_net resnet20

A cell is the number of neurons whose spike counts differ, over all images but those in which the first layer differs:
its current is a sum of floats, which every program adds in another order. "0 +2": two such images were left out. C is
given the simulator's first currents; "0 (12)": 12 counts differ with its own.
"refused": the format cannot hold the network. "-": the importer cannot (docs/export.md says why), or is not installed.
The digits are the images of example_net and, shrunk, of the debug networks. mobilenet_small and unet_small have no
trained weights: theirs are random, with the BatchNorm statistics of the images.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

from build_network import get_net_by_name
from datasets import get_dataset
from export.c import write_c
from export.nir_graph import write_nir
from export.onnx_file import write_onnx
from export.paicore import write_paicore
from networks.checkpoint import load_weights
from pipeline import convert_network
from runtime.cli import run_script
from tools.check_importer import ROOT, imported_counts, own_counts
from tools.export_speed import session_of

NETWORKS = {  # name -> (checkpoint, data set, shape of the images)
    "example_net": ("example_net_ann", "digits", (1, 32, 32)),
    "vgg9_bn": ("vgg9_bn_cifar10_ann", "cifar10", (3, 32, 32)),
    "resnet20": ("resnet20_cifar10_ann", "cifar10", (3, 32, 32)),
    "mobilenet_small": (None, "cifar10", (3, 32, 32)),
    "unet_small": (None, "cifar10", (3, 32, 32)),
    "debug_net0": (None, "digits", (1, 6, 6)),
    "debug_net1": (None, "digits", (1, 6, 6)),
    "debug_net2": (None, "digits", (2, 4, 4)),
    "debug_net3": (None, "digits", (1, 6, 6)),
}
IMPORTERS = ("nirtorch", "spikingjelly", "sinabs", "snntorch", "norse")
SEVERAL_BRANCHES = ("resnet20", "debug_net2", "debug_net3")  # layers with weights that meet in one neuron
TIMESTEPS, CALIBRATION = 16, 100
REFUSED, NOT_POSSIBLE = "refused", "-"


def loaders(name, cifar10):
    """`calibration images, test images`, [B, C, H, W] each, of a data set."""
    place = cifar10 if name == "cifar10" else name
    test, _, _, calibration = get_dataset(SimpleNamespace(dataset=place, batch_size=CALIBRATION, test_batch_size=100))
    return next(iter(calibration))[0], next(iter(test))[0]


def shaped(images, shape):
    """Digits in the shape of a debug network; all else unchanged."""
    if images.shape[2:] == shape[1:]:
        return images
    small = F.adaptive_avg_pool2d(images, shape[1:])
    return torch.cat([small.roll(i, 0) for i in range(shape[0])], 1)


def trained(name, images):
    """A network with its trained weights, or with random ones and the BatchNorm statistics of `images`."""
    checkpoint, _, shape = NETWORKS[name]
    torch.manual_seed(0)
    net = get_net_by_name(name, shape[0], 2 if name.startswith("debug") else 10)
    if checkpoint:
        return load_weights(net, str(ROOT / f"checkpoint/{checkpoint}.pth"))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches, here of one
    with torch.no_grad():
        net.train()(images)
    return net.eval()


def compared(snn, found, expected):
    """The cell of a table for spike counts, op name -> [B, ...]."""
    is_same = torch.ones(len(next(iter(expected.values()))), dtype=torch.bool)
    for name, neuron in snn.neurons().items():
        if neuron.largest_current is None:  # it hears a sum of floats
            is_same &= (found[name].flatten(1) == expected[name].flatten(1)).all(1)
    wrong = sum(int((found[name][is_same] != expected[name][is_same]).sum()) for name in expected)
    left_out = int((~is_same).sum())
    return f"{wrong} +{left_out}" if left_out else str(wrong)


def in_onnxruntime(snn, images, expected, folder):
    write_onnx(snn, f"{folder}/snn.onnx", images)
    values = session_of(f"{folder}/snn.onnx").run([f"count_{name}" for name in expected], {"image": images.numpy()})
    return compared(snn, dict(zip(expected, map(torch.from_numpy, values))), expected)


def in_reference(snn, images, expected, folder):
    """onnx's evaluator in NumPy, which is slow: one image."""
    from onnx.reference import ReferenceEvaluator

    expected = {name: counts[:1] for name, counts in expected.items()}
    values = ReferenceEvaluator(f"{folder}/snn.onnx").run(
        [f"count_{name}" for name in expected], {"image": images[:1].numpy()}
    )
    return compared(snn, {name: torch.as_tensor(value) for name, value in zip(expected, values)}, expected)


def in_c(snn, images, expected, folder):
    """The C program replays the counts from the first currents on, and says how many differ with its own ones."""
    write_c(snn, f"{folder}/code", images)
    subprocess.run(["cc", "-std=c99", "-O2", "-o", f"{folder}/snn", f"{folder}/code/snn.c"], check=True)
    run = subprocess.run([f"{folder}/snn", f"{folder}/code/vectors.bin"], capture_output=True, text=True)
    own = re.search(r"(\d+) counts differ with currents of this program", run.stdout)
    return "0" if run.returncode == 0 and own[1] == "0" else f"0 ({own[1]})" if own else run.stderr.strip()


def in_importer(importer):
    def run(snn, images, expected, folder):
        path = f"{folder}/{importer}.nir"
        write_nir(snn, path, images)
        found, _ = imported_counts(importer, path, images)
        return compared(snn, found, expected)

    return run


def in_paibox(snn, images, expected, folder):
    """PAIBox compares the spikes of two images in each step; another one is an error."""
    write_paicore(snn, f"{folder}/cores", images)
    return "0"


TOOLS = {
    "onnxruntime": ("onnxruntime", in_onnxruntime),
    "reference evaluator": ("onnx", in_reference),
    "C": (None, in_c),
    **{name: (name, in_importer(name)) for name in IMPORTERS},
    "PAIBox": ("paibox", in_paibox),
}


def is_possible(tool, network, reset_mode):
    """Whether a tool is installed and, as docs/export.md says, can compute the network."""
    package = TOOLS[tool][0]
    installed = shutil.which("cc") if package is None else importlib.util.find_spec(package)
    if tool in ("sinabs", "norse") and network in SEVERAL_BRANCHES:
        return False
    needed = {"snntorch": "subtraction", "norse": "zero"}.get(tool, reset_mode)
    return installed is not None and needed == reset_mode


def row(name, bits, reset_mode, net, calibration, images):
    """The cells of one conversion."""
    loader = [(calibration, torch.zeros(len(calibration)).long())]
    options = {"timesteps": TIMESTEPS, "weight_bitwidth": bits, "reset_mode": reset_mode}
    snn = convert_network(copy.deepcopy(net), loader, **options, finetune_epochs=0, device="cpu").snn.eval()
    expected, cells = own_counts(snn, images), []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for tool, (_, run) in TOOLS.items():
            if not is_possible(tool, name, reset_mode):
                cells.append(NOT_POSSIBLE)
                continue
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # of the tools
                    cells.append(run(snn, images, expected, folder))
            except ValueError as error:
                print(f"{name}, {bits} bits, {reset_mode}, {tool}: {error}", file=sys.stderr)
                cells.append(REFUSED)
    spikes = sum(int(counts.sum()) for counts in expected.values())
    return [name, str(bits), reset_mode, f"{spikes:,}", *cells]


def main(args):
    torch.set_num_threads(1)
    print(f"| network | bits | reset | spikes | {' | '.join(TOOLS)} |", flush=True)
    print("|" + "---|" * (4 + len(TOOLS)))
    for name in args.networks:
        _, dataset, shape = NETWORKS[name]
        if dataset == "cifar10" and not args.cifar10:
            raise ValueError(f"{name} needs --cifar10, the folder of CIFAR-10's images")
        calibration, images = (shaped(each, shape) for each in loaders(dataset, args.cifar10))
        net = trained(name, calibration)
        for bits in (4, 8):
            for reset_mode in ("subtraction", "zero"):
                cells = row(name, bits, reset_mode, net, calibration, images[: args.images])
                print(f"| {' | '.join(cells)} |", flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS], metavar="NAME")
    parser.add_argument("--images", type=int, default=4, help="test images")
    parser.add_argument("--cifar10", help="folder with CIFAR-10's images, as --dataset of ann2snn.py takes it")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args)
