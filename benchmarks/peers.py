"""Measure SpikingJelly's conversions of the same networks on the same images: network x mode x timesteps.

    python3 benchmarks/peers.py --networks resnet20:checkpoint/resnet20_cifar10_ann.pth --dataset /path/to/cifar10 \\
        --timesteps 4 8 16 32 --test_images 1000

SpikingJelly keeps float weights and is calibrated on the same 1,000 training images as this toolkit. One simulation
serves every T and two readings of the outputs: the mean over all steps, and ("delayed") the mean from the step that its
`estimate_delay_start` returns, at most three quarters of T. Needs `pip install spikingjelly`, version 2.0 or later.

NETWORK is any form of benchmarks/accuracy.py. Without --networks, the networks of the table in docs/accuracy.md are
measured, as benchmarks/tables.py plans it. What --results has is not measured again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy import (
    add_table_flags,
    check_row,
    conversion_args,
    default_flags,
    evenly_spaced,
    load_images,
    split,
)
from benchmarks.network_forms import title_of
from benchmarks.pages import table_of_peers, write_tables
from benchmarks.results import Results, key_of, where_and_when
from benchmarks.tables import PEERS, Peer, check_places, filled_in
from runtime.cli import OneLineParser, run_script

CALIBRATION_IMAGES = 1000  # the default of --calibration_samples
MOST_DELAYED = 0.75  # latest start of a delayed reading, as a share of T, so that it still has some steps
FORMAT = "ann2snn-peers-1"
NUMBERS = ("ann_top1", "snn_top1", "samples")
READINGS = ("", ", delayed")


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_table_flags(parser)
    args = parser.parse_args(argv)
    args.is_plan = not args.networks
    if args.is_plan and "timesteps" in parser.given:
        parser.error("--timesteps is for --networks, benchmarks/tables.py has those of the table")
    return args


def main(args):
    from runtime.files import check_writable
    from spike_dag import format_table

    check_writable(args.write)
    if args.write and not args.results:
        raise ValueError("--write needs the rows of --results FILE.json")
    results = Results(args.results, FORMAT, Peer.FACTS, NUMBERS)
    check_installed()
    if args.is_plan:
        check_places(PEERS, vars(args))
        peers = PEERS.peers(args.test_images)
    else:
        peers = [
            Peer(text, title_of(text), args.dataset, tuple(args.timesteps), args.test_images) for text in args.networks
        ]
    wanted = [(peer, flags_of(args, peer)) for peer in peers]  # finds every wrong network before the work
    steps = peers[0].timesteps
    rows = [("network", "mode", *(f"T={T}" for T in steps))]
    for peer, flags in wanted:
        runs = measure_network(args, peer, flags, results)
        rows.append((peer.title, "float ANN", *[f"{runs[0]['ann_top1']:.2f}"] * len(steps)))
        for run in runs:
            points = [f"{run['snn_top1'][str(T)] - run['ann_top1']:+.2f}" for T in steps]
            rows.append((peer.title, run["mode"], *points))
    print(format_table(rows))
    if args.write:
        write_tables(args.write, {PEERS.name: table_of_peers(PEERS, results)})


def flags_of(args, peer):
    """The flags that load a network and its data. Raises ValueError for one that cannot be loaded."""
    network, dataset = (filled_in(text, vars(args)) for text in (peer.network, peer.dataset))
    flags = conversion_args(network, 8, "-e 0", 1, 0, dataset)
    check_row(network, flags)
    return flags


def measure_network(args, peer, flags, results):
    """The results of all recipes and readings; those that are missing are measured and added."""
    found, loaded = [], None
    for mode in recipes(None):
        key = key_of(flags, default_flags(), mode=mode, timesteps=peer.timesteps, test_images=peer.test_images)
        runs = [results.with_key(key + reading) for reading in READINGS]
        if None in runs or args.again:
            loaded = loaded or load(flags, peer.test_images)
            runs = new_runs(mode, key, loaded, peer.timesteps)
        for run in runs:
            results.add({**run, **peer.facts(run["mode"])})
            found.append(results.with_key(run["key"]))
    return found


def new_runs(mode, key, loaded, timesteps):
    """The results of one recipe, one for each reading."""
    import torch

    from validate import evaluate

    net, calibration, batches = loaded
    ann = evaluate(net, batches, torch.device("cpu"), torch.nn.CrossEntropyLoss())["top1"]
    samples = sum(len(targets) for _, targets in batches)
    found = []
    for reading, accuracies in measure(net, recipes(calibration)[mode], calibration, batches, timesteps).items():
        by_T = {str(T): top1 for T, top1 in accuracies.items()}
        found.append({"key": key + reading, "mode": mode + reading, "ann_top1": ann, "snn_top1": by_T})
        found[-1] |= {"samples": samples, **where_and_when()}
        print(mode + reading, by_T, file=sys.stderr)
    return found


def check_installed():
    """Raise ValueError if SpikingJelly is missing or too old."""
    try:
        import spikingjelly.activation_based.ann2snn.recipes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"this benchmark needs SpikingJelly 2.0 or later, pip install spikingjelly ({error})"
        ) from error


def load(flags, most):
    """The float network, calibration batches, and [(images, targets)] of `most` test images."""
    from build_network import build_trained_net, choose_input
    from finetuning.on_spikes import first_images

    flags = argparse.Namespace(**vars(flags))  # the caller's go into keys of rows, and stay as they were given
    choose_input(flags)
    test_loader, train_loader, train_val_loader = load_images(flags, {})
    images = train_loader.dataset
    net = build_trained_net(flags.net_name, images.channels, images.num_classes, flags.ann_weight, flags.net_args)
    calibration = [(inputs[0], labels) for inputs, labels in first_images(train_val_loader, CALIBRATION_IMAGES)]
    net = as_modules(net.eval(), images[0][0][None])
    return net, calibration, split(*evenly_spaced(test_loader, most))


def as_modules(net, image):
    """The same network with modules for functions that SpikingJelly does not take: ReLU, pooling, padded shortcuts.

    image: one image [1, C, H, W]. What has no module here stays as it is.
    """
    import copy

    from torch import fx

    graph = fx.symbolic_trace(with_convolutions(copy.deepcopy(net), image))
    values = fx.Interpreter(graph)
    values.garbage_collect_values = False  # sizes are read from the values of all nodes
    values.run(image)
    for node in [each for each in graph.graph.nodes if each.op in ("call_function", "call_method")]:
        module = module_of(node, values.env)
        if module is not None:
            graph.add_submodule(f"of_{node.name}", module)
            with graph.graph.inserting_after(node):
                node.replace_all_uses_with(graph.graph.call_module(f"of_{node.name}", node.args[:1]))
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph.eval()


def module_of(node, values):
    """The module of a node of a function, or None. values: node -> its value for one image."""
    from torch import fx, nn
    from torch.nn import functional as F

    if node.target in (F.relu, "relu", "relu_") or getattr(node.target, "__name__", "") == "relu":
        return nn.ReLU()
    if node.target is F.avg_pool2d:
        args, given = fx.node.map_arg((node.args[1:], node.kwargs), values.__getitem__)
        return nn.AvgPool2d(*args, **given)
    return None


def with_convolutions(net, image):
    """The network with 1x1 convolutions for its modules that take every n-th pixel and pad the channels with zeros.

    These are the shortcuts of option A (He et al., CVPR 2016). A module is replaced if its output stays the same.
    """
    import torch

    seen = {}
    own = {name: module for name, module in net.named_modules() if is_function(module)}
    hooks = [module.register_forward_hook(lambda m, x, y: seen.update({m: (x[0], y)})) for module in own.values()]
    with torch.no_grad():
        net(image)
        for name, module in own.items():
            conv = padding_convolution(*seen[module]) if module in seen else None
            if conv is not None and torch.equal(conv(seen[module][0]), seen[module][1]):
                net.set_submodule(name, conv)
    for hook in hooks:
        hook.remove()
    return net


def is_function(module):
    """Whether a module of the user's own has neither parameters nor modules."""
    return not (type(module).__module__.startswith("torch.") or list(module.children()) or list(module.parameters()))


def padding_convolution(x, y):
    """A convolution that takes every n-th pixel and puts zeros before and behind the channels; None for other shapes.

    x, y: input and output [1, C, H, W] of the module that it stands for.
    """
    import torch
    from torch import nn

    if x.dim() != 4 or y.dim() != 4 or y.shape[1] < x.shape[1] or 0 in y.shape:
        return None
    channels, added = x.shape[1], y.shape[1] - x.shape[1]
    strides = [-(-x.shape[dim] // y.shape[dim]) for dim in (2, 3)]
    conv = nn.Conv2d(channels, y.shape[1], 1, strides, bias=False)
    conv.weight.data.zero_()
    conv.weight.data[added // 2 : added // 2 + channels, :, 0, 0] = torch.eye(channels)
    return conv


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
