"""Show what a saved network consists of: its layers, their integers, thresholds, and the memory that a chip needs.

python3 show.py out_snn.pth
"""

import argparse
import math

from options import FLOAT_BITS
from runtime.cli import OneLineParser, run_script
from runtime.flags import PARSERS

HEADINGS = ("layer", "module path", "kind", "output", "weights", "bits", "Vthr", "neurons", "u bits")
MOST_NAMED = 10  # classes
SIGN = 1  # bit of the sign of a membrane potential


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="file of a network, as ann2snn.py saves it")
    parser.add_argument(
        "--input_shape",
        type=PARSERS["input_shape"],
        metavar="C,H,W",
        help="shape of an input, for a file that does not hold it",
    )
    parser.add_argument(
        "--debug", action=argparse.BooleanOptionalAction, default=False, help="show the traceback of an error"
    )
    return parser.parse_args(argv)


def main(args):
    from inputs.preprocessing import Preprocessing
    from spike_dag import format_table, load_dag

    net = load_dag(args.network)
    known = None if net.preprocessing is None else Preprocessing.from_dict(net.preprocessing)
    shape = args.input_shape or (known.shape if known else None)
    shapes = shapes_of(net, shape)
    rows = [layer_row(entry, shapes, net.timesteps) for entry in net.ops.values()]
    print(format_table([HEADINGS, *rows]))
    print(summary(net, shapes))
    if known is not None:
        print(known.in_words())
        if known.classes:
            print(f"classes: {len(known.classes)}, {', '.join(known.classes[:MOST_NAMED])}")


def shapes_of(net, shape):
    """Node -> shape of a sample, empty if the shape of the image is not known. Raises Misfit for a wrong shape."""
    import torch

    from spike_simulator import node_shapes

    if shape is None:
        return {}
    with torch.no_grad():
        return node_shapes(net.eval(), *[torch.zeros(1, *shape) for _ in net.inputs_nodes])


def layer_row(entry, shapes, timesteps):
    """One layer as a row of the table. u bits: those that hold every membrane potential."""
    from spike_dag import span

    op, neuron = entry.op, entry.op.neuron
    weight = getattr(op, "weight_q", None)
    weights = "" if weight is None else f"{weight.numel():,} in {span(weight)}"
    if weight is None and op.is_trained:
        weights = f"{op.weight.numel():,}, stays ANN"
    bits = getattr(op, "weight_bits", None) if op.is_trained else None
    return (
        entry.name,
        entry.path,
        type(op).__name__,
        "x".join(map(str, shapes.get(entry.out, ()))),
        weights,
        "" if bits is None else bits,
        "" if neuron is None else span(neuron.Vthr),
        "" if neuron is None or not shapes else f"{count_neurons(entry, shapes):,}",
        "" if neuron is None else potential_bits(neuron, timesteps) or "float",
    )


def potential_bits(neuron, timesteps):
    """Bits that hold every membrane potential within `timesteps` steps, with the sign; None for float currents."""
    if neuron.largest_current is None:
        return None
    largest = neuron.largest_current * timesteps + neuron.initial_potential.abs().max().item()
    return math.ceil(math.log2(largest + 1)) + SIGN


def count_neurons(entry, shapes):
    """Number of neurons of a layer that fires."""
    return math.prod(shapes[entry.out])


def summary(net, shapes):
    """The sums over the network, in one line each."""
    layers = net.weighted_layers().values()
    weights = sum(layer.weight.numel() for layer in layers)
    packed = sum(layer.weight.numel() * (layer.weight_bits or FLOAT_BITS) for layer in layers) / 8
    lines = [f"weights: {weights:,}, {packed / 1024:,.1f} KiB packed to their bits"]
    firing = [net.ops[name] for name in net.neurons()]
    if not firing:
        return "\n".join([*lines, "not converted: no neurons"])
    if shapes:
        sizes = [(count_neurons(entry, shapes), potential_bits(entry.op.neuron, net.timesteps)) for entry in firing]
        memory = sum(count * (bits or FLOAT_BITS) for count, bits in sizes) / 8
        lines.append(f"neurons: {sum(count for count, _ in sizes):,}, {memory / 1024:,.1f} KiB of membrane potentials")
    resets = sorted({entry.op.neuron.reset_mode for entry in firing})
    steps = net.duration()
    lines.append(
        f"timesteps: {net.timesteps}, the next image starts after {steps['interval']}, the answer is ready after "
        f"{steps['latency']}; reset by {' and '.join(resets)}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, parse_args())
