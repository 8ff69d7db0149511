"""What a chip can hold, as data and checks on plain numbers; also a script that prints the table of a network:

python3 hw_constraints.py example_net --weight_bitwidth 4
"""

import argparse
import sys
from dataclasses import dataclass, fields

from options import FIELDS, ChipOptions, ConversionOptions
from runtime.cli import OneLineParser, run_script
from runtime.flags import add_option, add_options, whole_number

LARGEST_BITWIDTH = 8


@dataclass(frozen=True)
class Hardware:
    """fan_in_bits: weight memory of one neuron, kernel height * width * in_channels (of a group) * weight bits."""

    name: str
    fan_in_bits: int

    def largest_in_channels(self, kernel_size, bits):
        """The most input channels (per group) of a k x k convolution: 28 for 3x3 at 4 bits on v1.0."""
        return self.fan_in_bits // (kernel_size * kernel_size * bits)


HARDWARE = {"v1.0": Hardware("v1.0", fan_in_bits=1024)}


@dataclass(frozen=True)
class Layer:
    """One layer as the chip sees it. kernel_size: (height, width), (1, 1) for a linear layer. in_channels: per group.

    With an average pooling folded into it, the kernel is the one that both make.
    role: "first" (reads the real-valued image), "hidden", "pool" (weights of one bit), or "last" (stays ANN).
    has_relu: whether a ReLU, and so a neuron, stands behind it.
    """

    name: str
    path: str
    kernel_size: tuple
    in_channels: int
    role: str
    has_relu: bool

    @property
    def fan_in(self):
        """Synapses of one neuron."""
        return self.kernel_size[0] * self.kernel_size[1] * self.in_channels

    @property
    def where(self):
        """The layer as messages name it."""
        return f"{self.name} ({self.path})" if self.path else self.name


def layer_bits(layer, bits):
    """The weight bits of a layer: `bits`, a number or op name -> number; 1 for an average pooling, a sum."""
    if layer.role == "pool":
        return 1
    return bits if isinstance(bits, int) else bits[layer.name]


def largest_bitwidths(layers, hardware):
    """The largest weight bit width that fits each of `layers`; 8 for one that stays ANN.

    Raises ValueError for a layer that does not even fit with 1 bit.
    """
    for layer in layers:
        if layer.role != "last" and not largest_bitwidth(layer, hardware):
            raise ValueError(
                f"Hardware {hardware.name}: {layer.where} has {layer.fan_in} synapses a neuron, over "
                f"{hardware.fan_in_bits} bits at any bit width: make its kernel or channels smaller, or use groups"
            )
    return [LARGEST_BITWIDTH if layer.role == "last" else largest_bitwidth(layer, hardware) for layer in layers]


def largest_bitwidth(layer, hardware):
    """The largest weight bit width up to 8 that fits; 0 where not even 1 bit does."""
    return min(hardware.fan_in_bits // layer.fan_in, LARGEST_BITWIDTH)


def violation(layer, bits, hardware):
    """What rule a layer breaks, in words, or "" where it fits.

    The final layer is not converted, so no rule applies to it; the first layer is a convolution like the others.
    """
    if layer.role == "last":
        return ""
    if not layer.has_relu and layer.role != "pool":
        return "no ReLU behind it"
    used = layer.fan_in * layer_bits(layer, bits)
    return f"{used} fan-in bits, over {hardware.fan_in_bits}" if used > hardware.fan_in_bits else ""


def violations(layers, bits, hardware):
    """(layer, what it breaks) of every layer that breaks a rule."""
    found = [(layer, violation(layer, bits, hardware)) for layer in layers]
    return [(layer, broken) for layer, broken in found if broken]


def hardware_table(layers, bits, hardware):
    """Rows: what each layer has, the limit, and the largest bit width that fits."""
    rows = [("layer", "module path", "role", "kernel", "in_channels", "bits", "fan-in bits", "limit", "fits up to", "")]
    for layer in layers:
        kernel = "{}x{}".format(*layer.kernel_size)
        first = (layer.name, layer.path, layer.role, kernel, layer.in_channels)
        if layer.role == "last":
            rows.append((*first, "-", "-", "-", "-", "stays ANN"))
            continue
        width = layer_bits(layer, bits)
        fits = largest_bitwidth(layer, hardware)
        verdict = violation(layer, bits, hardware) or "ok"
        fits_up_to = f"{fits} bits" if fits else "nothing"
        rows.append((*first, width, layer.fan_in * width, hardware.fan_in_bits, fits_up_to, verdict))
    return rows


def check_hardware(layers, bits, hardware):
    """Raise ValueError that names the first layer over a limit of the chip, and what would fit."""
    for layer, broken in violations(layers, bits, hardware):
        fits = largest_bitwidth(layer, hardware)
        advice = f"at most {fits} bits fit" if fits else "make its kernel or channels smaller, or use groups"
        advice = "add one" if not layer.has_relu and layer.role != "pool" else advice
        raise ValueError(f"Hardware {hardware.name}: {layer.where} has {broken}: {advice}")


def hardware_layers(dag, ann_layers=()):
    """The layers of a network as `hw_constraints.Layer`, in order; a folded pooling is part of the layer behind it.

    Raises ValueError, where poolings are to be folded, for a network that cannot be converted (`plan_conversion`).
    """
    from conversion.plan import LookAhead, find_ann_layers

    ahead = LookAhead(dag, find_ann_layers(dag, ann_layers))
    layers, from_image, folded = [], set(dag.inputs_nodes), find_folded(dag, ann_layers)
    for entry in dag.ops.values():
        op, is_first = entry.op, from_image.issuperset(entry.inputs)
        if is_first and not op.rectifies:
            from_image.add(entry.out)
        if not op.has_weights or op in folded.values():
            continue
        kernel_size = tuple(op.weight.shape[2:]) or (1, 1)
        in_channels = len(op.rows(op.weight)[0]) // (kernel_size[0] * kernel_size[1])
        if entry.inputs[0] in folded:
            kernel_size = folded_kernel_size(kernel_size, op, folded[entry.inputs[0]])
        role, has_relu = role_of(entry, ahead, is_first), ahead.feeds_neuron[entry.out]
        layers.append(Layer(entry.name, entry.path, kernel_size, in_channels, role, has_relu))
    return layers


def role_of(entry, ahead, is_first):
    """The role of a layer with weights (`Layer`); ahead: what lies behind it."""
    from conversion.plan import has_weights_behind

    feeds_neuron, before_neuron = ahead.feeds_neuron[entry.out], ahead.before_neuron[entry.out]
    if entry.name in ahead.stays_ann:
        return "last"
    if not entry.op.is_trained:
        return "pool" if before_neuron else "last"
    if not feeds_neuron and not before_neuron and not has_weights_behind(ahead.dag, entry.name):
        return "last"
    return "first" if is_first else "hidden"


def find_folded(dag, ann_layers):
    """Node -> the folded average pooling whose sums it holds, from the pooling to the layers that weigh them."""
    from conversion.plan import plan_conversion

    marked = any(entry.op.folded for entry in dag.ops.values())
    names, found = plan_conversion(dag, ann_layers).folded if marked else (), {}
    for name, entry in dag.ops.items():
        if name in names:
            found[entry.out] = entry.op
        elif entry.inputs[0] in found and not entry.op.is_trained:
            found[entry.out] = found[entry.inputs[0]]
    return found


def folded_kernel_size(kernel_size, layer, pool):
    """Height and width of the kernel that `layer`, of `kernel_size`, and the average pooling before it make."""
    dilations = getattr(layer, "dilation", (1, 1))
    sides = zip(kernel_size, dilations, pool.stride, pool.kernel_size)
    return tuple((k - 1) * dilation * stride + window for k, dilation, stride, window in sides)


def choose_bitwidths(dag, weight_bitwidth, hardware, ann_layers=()):
    """`weight_bitwidth` itself, or for "auto" the largest width of every layer with weights that `hardware` allows."""
    if weight_bitwidth != "auto":
        return weight_bitwidth
    trained = dag.weighted_layers()
    return tuple(largest_bitwidths([x for x in hardware_layers(dag, ann_layers) if x.name in trained], hardware))


def bitwidths_by_name(dag, weight_bitwidth):
    """Op name -> weight bits of every layer with weights. Raises ValueError as `set_bitwidths` does."""
    from quantization import list_bitwidths

    return dict(zip(dag.weighted_layers(), list_bitwidths(dag, weight_bitwidth)))


def parse_args(argv=None):
    parser = OneLineParser(description="Check a network against the limits of a chip.")
    parser.add_argument("net_name", help="network name to check")
    parser.add_argument(
        "--in_channels", type=whole_number(1), default=None, help="channels of the images (1 or what the net takes)"
    )
    parser.add_argument("--num_classes", type=whole_number(1), default=10, help="classes (%(default)s)")
    add_options(parser, ChipOptions, hardware="v1.0")
    add_option(parser, parser, FIELDS["weight_bitwidth"], 4)
    for each in fields(ConversionOptions):
        if each.metadata["group"] == "what a layer leaves open":
            add_option(parser, parser, each, each.default)
    parser.add_argument("--debug", action=argparse.BooleanOptionalAction, default=False, help="show tracebacks")
    parser.main_actions.clear()
    return parser.parse_args(argv)


def default_channels(net_name):
    """Colour images for torchvision's networks, grey ones for others, which may change it."""
    from build_network import TORCHVISION

    return 3 if net_name.startswith(TORCHVISION) else 1


def main(args):
    import torch

    from ann_parser import parse_ann_model
    from build_network import get_net_by_name, input_size
    from dag_rewrites import prepare_conversion
    from hw_constraints import bitwidths_by_name, choose_bitwidths, hardware_layers
    from spike_dag import format_table

    size = input_size(args.net_name)
    wanted = args.in_channels or default_channels(args.net_name)
    net = get_net_by_name(args.net_name, wanted, args.num_classes)
    channels = args.in_channels or next((m.in_channels for m in net.modules() if hasattr(m, "in_channels")), wanted)
    dag = parse_ann_model(net, (torch.zeros(1, channels, size, size),))
    dag = prepare_conversion(dag, args.maxpool, args.signed, args.avgpool)
    hardware, layers = HARDWARE[args.hardware], hardware_layers(dag, args.ann_layers)
    bits = bitwidths_by_name(dag, choose_bitwidths(dag, args.weight_bitwidth, hardware, args.ann_layers))
    print(format_table(hardware_table(layers, bits, hardware)))
    sys.stdout.flush()
    check_hardware(layers, bits, hardware)


if __name__ == "__main__":
    run_script(main, parse_args())
