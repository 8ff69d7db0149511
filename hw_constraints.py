"""The limits of a chip, as data and checks on plain numbers. As a script it prints the table of a network:

python3 hw_constraints.py example_net --weight_bitwidth 4
"""

import argparse
import math
import sys
from dataclasses import dataclass, fields

from options import DEFAULT_CHIP, FIELDS, ConversionOptions, QuantizeOptions
from runtime.cli import OneLineParser, run_script
from runtime.flags import add_option, add_options, whole_number
from script_options import BuildOptions, ChipOptions

LARGEST_BITWIDTH = 8  # the widest integer weights that `quantization.check_bitwidth` accepts


@dataclass(frozen=True)
class Hardware:
    """A chip. fan_in_bits: the weight memory of one neuron, in bits.

    A layer uses kernel height * kernel width * in_channels (per group) * weight bits.
    """

    name: str
    fan_in_bits: int

    def largest_in_channels(self, kernel_size, bits):
        """The largest number of input channels (per group) of a k x k convolution: 28 for 3x3 at 4 bits on v1.0."""
        return self.fan_in_bits // (kernel_size * kernel_size * bits)


HARDWARE = {"v1.0": Hardware("v1.0", fan_in_bits=1024)}  # its names stand in `options.CHIPS`, too


@dataclass(frozen=True)
class CoreChip:
    """A chip of cores. axons: inputs of a core. dendrites: neurons of 1-bit weights in a core. cores: of the chip.

    widths: of weights, in bits. A neuron with more inputs joins 2, 4, 8, ... dendrites, and one with b-bit weights b
    times as many. Convolutions are unrolled: a layer reads all of its input in every core.
    """

    name: str
    axons: int
    dendrites: int
    cores: int
    widths: tuple

    def width_of(self, bits):
        """The narrowest weight width of the chip that holds `bits`."""
        return next(width for width in self.widths if width >= bits)

    def cores_of(self, neurons, inputs, bits):
        """The number of cores of a layer of `neurons` neurons that reads `inputs` spikes per step."""
        joined = 2 ** max(0, math.ceil(math.log2(inputs / self.axons)))
        return math.ceil(neurons * joined * self.width_of(bits) / self.dendrites)


PAICORE = CoreChip("paicore", axons=1152, dendrites=512, cores=1008, widths=(1, 2, 4, 8))


def core_table(rows, chip=PAICORE):
    """`table, needed`: table rows, head first, and the number of cores. rows: (layer, neurons, inputs, bits)."""
    table, needed = [("layer", "neurons", "inputs", "bits", "cores")], 0
    for layer, neurons, inputs, bits in rows:
        cores = chip.cores_of(neurons, inputs, bits)
        table.append((layer, neurons, inputs, chip.width_of(bits), cores))
        needed += cores
    return [*table, ("all", "", "", "", f"{needed} of {chip.cores}")], needed


@dataclass(frozen=True)
class Layer:
    """One layer from the view of the chip.

    name: op name. path: module path. kernel_size: (height, width), (1, 1) for a linear layer; if an average pooling is
    folded into the layer, the size of the combined kernel. in_channels: per group.
    role: "first" (reads the real-valued image), "hidden", "pool" (1-bit weights), or "last" (stays ANN).
    has_relu: whether a ReLU, and so a neuron, follows.
    """

    name: str
    path: str
    kernel_size: tuple
    in_channels: int
    role: str
    has_relu: bool

    @property
    def fan_in(self):
        """The number of synapses of one neuron."""
        return self.kernel_size[0] * self.kernel_size[1] * self.in_channels

    @property
    def where(self):
        """The layer's name in messages."""
        return f"{self.name} ({self.path})" if self.path else self.name


def layer_bits(layer, bits):
    """The weight bits of a layer. bits: a number, or op name -> number. An average pooling is a sum and needs 1 bit."""
    if layer.role == "pool":
        return 1
    return bits if isinstance(bits, int) else bits[layer.name]


def largest_bitwidths(layers, hardware):
    """The largest weight bit width that fits, for each of `layers`; 8 for a layer that stays ANN.

    Raises ValueError for a layer that does not fit even with 1 bit.
    """
    for layer in layers:
        if layer.role != "last" and not largest_bitwidth(layer, hardware):
            raise ValueError(
                f"Hardware {hardware.name}: {layer.where} has {layer.fan_in} synapses a neuron, over "
                f"{hardware.fan_in_bits} bits at any bit width: make its kernel or channels smaller, or use groups"
            )
    return [LARGEST_BITWIDTH if layer.role == "last" else largest_bitwidth(layer, hardware) for layer in layers]


def largest_bitwidth(layer, hardware):
    """The largest weight bit width, up to 8, that fits; 0 if not even 1 bit fits."""
    return min(hardware.fan_in_bits // layer.fan_in, LARGEST_BITWIDTH)


def violation(layer, bits, hardware):
    """The rule that a layer breaks, in words, or "" if it fits.

    No rule applies to a layer that stays ANN. The first layer must follow the same rules as all others.
    """
    if layer.role == "last":
        return ""
    if not layer.has_relu and layer.role != "pool":
        return "no ReLU behind it"
    used = layer.fan_in * layer_bits(layer, bits)
    return f"{used} fan-in bits, over {hardware.fan_in_bits}" if used > hardware.fan_in_bits else ""


def violations(layers, bits, hardware):
    """[(layer, the rule in words)] for every layer that breaks a rule."""
    found = [(layer, violation(layer, bits, hardware)) for layer in layers]
    return [(layer, broken) for layer, broken in found if broken]


def hardware_table(layers, bits, hardware):
    """Table rows, head first: the size of each layer, the limit, and the largest bit width that fits."""
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
        fits_up_to = f"{fits} {'bit' if fits == 1 else 'bits'}" if fits else "nothing"
        rows.append((*first, width, layer.fan_in * width, hardware.fan_in_bits, fits_up_to, verdict))
    return rows


def check_hardware(layers, bits, hardware):
    """Raise ValueError for the first layer that breaks a rule of the chip; the message says which change would fit."""
    for layer, broken in violations(layers, bits, hardware):
        fits = largest_bitwidth(layer, hardware)
        advice = f"at most {fits} bits fit" if fits else "make its kernel or channels smaller, or use groups"
        advice = "add one" if not layer.has_relu and layer.role != "pool" else advice
        raise ValueError(f"Hardware {hardware.name}: {layer.where} has {broken}: {advice}")


def hardware_layers(dag, ann_layers=()):
    """The `Layer`s of a network, in order; a folded pooling is part of the layer that follows it.

    Raises ValueError if poolings are folded and the network cannot be converted (`plan_conversion`).
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
    """The role (`Layer.role`) of a layer with weights. ahead: the `LookAhead` of its network."""
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
    """Node -> the folded average pooling whose sums it carries, for all nodes from the pooling to the next weights."""
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
    """Height and width of the kernel that combines `layer`, of `kernel_size`, with the average pooling before it."""
    dilations = getattr(layer, "dilation", (1, 1))
    sides = zip(kernel_size, dilations, pool.stride, pool.kernel_size)
    return tuple((k - 1) * dilation * stride + window for k, dilation, stride, window in sides)


def choose_bitwidths(dag, weight_bitwidth, hardware, ann_layers=()):
    """`weight_bitwidth` itself, or for "auto" a tuple with the largest bit width per layer that `hardware` allows.

    Raises ValueError for "auto" if a layer does not fit even with 1 bit.
    """
    if weight_bitwidth != "auto":
        return weight_bitwidth
    trained = dag.weighted_layers()
    return tuple(largest_bitwidths([x for x in hardware_layers(dag, ann_layers) if x.name in trained], hardware))


def bitwidths_by_name(dag, weight_bitwidth):
    """Op name -> weight bits for every layer with weights. Raises ValueError like `quantization.list_bitwidths`."""
    from quantization import list_bitwidths

    return dict(zip(dag.weighted_layers(), list_bitwidths(dag, weight_bitwidth)))


def parse_args(argv=None):
    parser = OneLineParser(description="Check a network against the limits of a chip.")
    parser.add_argument(
        "net_name",
        help="NAME, torchvision:NAME, timm:NAME, file.py:callable or model.onnx",
    )
    parser.add_argument(
        "--in_channels",
        type=whole_number(1),
        default=None,
        help="channels of the images (those of the network's first layer)",
    )
    parser.add_argument("--num_classes", type=whole_number(1), default=10, help="number of classes (%(default)s)")
    add_options(parser, BuildOptions, ChipOptions, hardware=DEFAULT_CHIP)
    add_option(parser, parser, FIELDS["weight_bitwidth"], 4)
    for each in (*fields(QuantizeOptions), *fields(ConversionOptions)):
        if each.metadata["group"] == "what a layer leaves open":
            add_option(parser, parser, each, each.default)
    parser.add_argument(
        "--debug", action=argparse.BooleanOptionalAction, default=False, help="show the traceback of an error"
    )
    offer_core_chips(parser)
    parser.main_actions.clear()
    return parser.parse_args(argv)


def offer_core_chips(parser):
    """Let --hardware name chips of cores, too; only this script knows the sizes of maps that they need."""
    (action,) = (action for action in parser._actions if action.dest == "hardware")
    action.choices = (*action.choices, PAICORE.name)


def check_cores(dag, layers, bits, shapes):
    """Print the table of cores. Raises ValueError for a network that needs more than a PAICORE has.

    layers: `Layer`s. bits: op name -> weight bits. shapes: node -> shape of a sample. The first layer and those that
    stay ANN are left to the host.
    """
    from spike_dag import format_table

    if find_folded(dag, ()):
        raise ValueError(f"Hardware {PAICORE.name}: cores take spikes and no sums of them: use --avgpool spike")
    rows = []
    for layer in layers:
        if layer.role not in ("hidden", "pool"):
            continue
        entry, width = dag.ops[layer.name], layer_bits(layer, bits)
        if width > PAICORE.widths[-1]:
            raise ValueError(f"Hardware {PAICORE.name}: {layer.where} has float weights, cores take 1 to 8 bits")
        sizes = [math.prod(shapes[node]) for node in (entry.out, entry.inputs[0])]
        rows.append((layer.where, *sizes, width))
    table, needed = core_table(rows)
    print(format_table(table))
    sys.stdout.flush()
    refuse_cores(rows, needed)


def refuse_cores(rows, needed, chip=PAICORE):
    """Raise ValueError if `needed` cores are more than the chip has. rows: as those of `core_table`."""
    if needed > chip.cores:
        most = max(rows, key=lambda row: chip.cores_of(*row[1:]))[0]
        raise ValueError(
            f"Hardware {chip.name}: the network needs {needed} cores, over {chip.cores}, most of them for {most}: make "
            "its maps smaller or its weights narrower"
        )


def main(args):
    import torch

    from ann_parser import parse_ann_model
    from build_network import choose_input, get_net_by_name
    from dag_rewrites import prepare_conversion, replace_activations
    from hw_constraints import bitwidths_by_name, choose_bitwidths, hardware_layers
    from rewrites.gates import replace_gates
    from spike_dag import format_table
    from spike_simulator import node_shapes

    choose_input(args)
    if args.image_size is None:
        raise ValueError(f"{args.net_name} does not say what images it reads, give it --input_shape C,H,W")
    wanted = args.in_channels or args.channels or 1  # some networks ignore the number
    net = get_net_by_name(args.net_name, wanted, args.num_classes, net_args=args.net_args)
    first = next((m.in_channels for m in net.modules() if hasattr(m, "in_channels")), wanted)
    channels = args.in_channels or args.channels or first
    size = (args.image_size, args.image_size) if isinstance(args.image_size, int) else args.image_size
    # at random: on an image of zeros every map looks like a gate
    images = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(0))
    dag = parse_ann_model(net, (images,), takes_gates=args.replace_gates is not None)
    dag, *_ = replace_gates(dag, [(images, None)], len(images))
    dag, _ = replace_activations(dag, args.replace_activations)
    dag = prepare_conversion(dag, args.maxpool, args.signed, args.avgpool)
    layers = hardware_layers(dag, args.ann_layers)
    if args.hardware == PAICORE.name:
        if args.weight_bitwidth == "auto":
            raise ValueError(f"Hardware {PAICORE.name} takes 1 to 8 bits in every layer, give --weight_bitwidth BITS")
        bits = bitwidths_by_name(dag, args.weight_bitwidth)
        check_cores(dag, layers, bits, node_shapes(dag, torch.zeros(1, channels, *size)))
        return
    hardware = HARDWARE[args.hardware]
    bits = bitwidths_by_name(dag, choose_bitwidths(dag, args.weight_bitwidth, hardware, args.ann_layers))
    print(format_table(hardware_table(layers, bits, hardware)))
    sys.stdout.flush()
    check_hardware(layers, bits, hardware)


if __name__ == "__main__":
    run_script(main, parse_args())
