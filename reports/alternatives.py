"""Measure which changes regain accuracy: float weights in one layer at a time, and conversions with other flags.

Every variant is converted, corrected and measured with the same numbers of images, and so is the conversion "as asked
for". The results are therefore comparable.
"""

import copy
import sys

import torch
from tqdm import tqdm

from conversion.correction import correct_spikes
from options import FLOAT_BITS
from pipeline import convert_by_options, with_levels
from quantization import init_quantize_net, quantize_finetune
from reports.observe import spikes_of
from runtime.device import seed_everything

MOST_TIMESTEPS = 65536
NOT_ON_SPIKES = "not finetuned on spikes"


def score_error(outputs, others, expected):
    """RMS difference between class scores `outputs` and `others`, in percent of the standard deviation of `expected`.

    All are [B, classes]. expected: the class scores of the float ANN; the deviation is that over the images.
    """
    variation = (expected - expected.mean(0)).double().square().mean().sqrt()
    return (100 * (outputs - others).double().square().mean().sqrt() / variation.clamp_min(1e-30)).item()


@torch.no_grad()
def measure(net, images, targets, expected, batch=32):
    """Measure a network on images [B, C, H, W] with labels [B]; returns "error", "loss", "top1" and "same_class".

    error: `score_error`, in percent. top1: accuracy in percent. same_class: percentage of images with the class that
    the float ANN chooses. expected: the class scores of the float ANN, [B, classes].
    """
    outputs = torch.cat([net(part) for part in images.split(batch)])
    return {
        "error": score_error(outputs, expected, expected),
        "loss": torch.nn.functional.cross_entropy(outputs, targets).item(),
        "top1": 100 * (outputs.argmax(1) == targets).double().mean().item(),
        "same_class": 100 * (outputs.argmax(1) == expected.argmax(1)).double().mean().item(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# layers


def repair_layers(args, qnet, loader, device, images, targets, expected):
    """Op name -> `measure` of the conversion with float weights in that layer alone, smallest error first.

    The entry "as asked for" is the conversion without float weights. Thresholds do not change; the correction is made
    anew for every entry. Float weights in all layers (32 bits) give an empty dictionary.
    """
    if args.weight_bitwidth == FLOAT_BITS:
        return {}
    plain = convert_by_options(qnet, loader, device, args, calibration_samples=args.analysis_images, correction="none")
    scales = input_scales(plain, images[:1])
    results = {}
    for name in tqdm([None, *qnet.weighted_layers()], "repair layers", leave=False, delay=1):
        snn, ann = copy.deepcopy(plain), copy.deepcopy(qnet)
        if name is not None:
            repair(snn, ann, name, unrounded_weight(qnet.ops[name].op), scales)
        if args.correction != "none":
            with_bias = args.correction == "bias"
            correct_spikes(snn, ann, loader, device, args.analysis_images, with_bias, args.hold_back)
        snn.set_engine(args.engine, args.memory_budget)
        results[name or "as asked for"] = measure(snn, images, targets, expected)
    return dict(sorted(results.items(), key=lambda item: item[1]["error"]))


def unrounded_weight(layer):
    """The layer's weights before rounding: the shadow weights of `quantize_finetune`."""
    return getattr(layer.weight, "weight_back", layer.weight).detach()


@torch.no_grad()
def repair(snn, ann, name, weight, scales):
    """Give layer `name` of a spiking network and of its ANN float weights, and a float bias in the neuron's unit."""
    layer = snn.ops[name].op
    layer.weight.copy_(weight)
    ann.ops[name].op.weight.copy_(weight)
    node = snn.ops[name].inputs[0]
    if not layer.spiking or node not in scales:
        return  # it reads activations and uses its float weights directly
    unit = layer.unit.flatten() if layer.unit.numel() > 1 else layer.unit.squeeze()  # [C_out] or a scalar
    per_weight = layer.weight_view(unit) / layer.input_view(per_input(scales[node], layer))
    bias = None if layer.bias is None else layer.bias / unit
    layer.set_integers(snap(weight / per_weight), bias, layer.unit)


def snap(weight):
    """Round weights that are within 1e-4 of an integer.

    Sums of integers can equal a threshold exactly, and the rounding errors of float weights must not prevent that. 1e-4
    exceeds the rounding error of float32, which is 8e-6 at 127.
    """
    return torch.where((weight - weight.round()).abs() < 1e-4, weight.round(), weight)


def per_input(scale, layer):
    """The lambda of the spikes that a layer reads: a scalar, or [C_in] with one per input channel.

    scale: (lambda, shape of a sample), as in `input_scales`.
    """
    scale, shape = scale
    if scale.numel() == 1:
        return scale.squeeze()
    full = scale.expand(shape)
    return full.flatten(1).mean(1) if layer.spatial else full.flatten()


@torch.no_grad()
def input_scales(snn, image):
    """Node -> (lambda, shape of a sample) for every node of spikes."""
    return {node: (spikes.scale_factor, spikes.data.shape[1:]) for node, spikes in spikes_of(snn, image).items()}


# ---------------------------------------------------------------------------------------------------------------------
# flags


def alternatives(args, net, qnet):
    """Flags -> (network to convert, changed options, note) for the alternatives to `args`.

    The note says which steps an alternative leaves out, such as "not finetuned".
    """
    bits, T = args.weight_bitwidth, args.timesteps
    weights, spikes = args.per_channel in ("weights", "both"), args.per_channel in ("spikes", "both")
    asked_for = qnet, {}, NOT_ON_SPIKES if args.spike_epochs or args.spike_epochs_unlabelled else ""
    found = {}
    if bits != FLOAT_BITS:
        found[f"--weight_bitwidth {FLOAT_BITS}"] = net, {"weight_bitwidth": FLOAT_BITS}, "not finetuned"
    if min([bits] if isinstance(bits, int) else bits) < 8:
        found["--weight_bitwidth 8"] = requantized(net, 8, weights), {"weight_bitwidth": 8}, "not finetuned"
    if bits != FLOAT_BITS and not weights:
        again, per_channel = requantized(unquantized(qnet), bits, True), "both" if spikes else "weights"
        found[f"--per_channel {per_channel}"] = again, {"per_channel": per_channel}, "rounded anew, not finetuned again"
    if 2 * T <= MOST_TIMESTEPS:
        found[f"--timesteps {2 * T}"] = qnet, {"timesteps": 2 * T}, ""
    if args.listen != T:
        found[f"--listen {T}"] = qnet, {"listen": T}, ""
    is_learnt = args.activation_levels is not None  # finetuning learnt lambda, so no flag chooses it
    if args.threshold != "mse" and not is_learnt:
        found["--threshold mse"] = qnet, {"threshold": "mse"}, ""
    if not spikes and not is_learnt:
        per_channel = "both" if weights else "spikes"
        found[f"--per_channel {per_channel}"] = qnet, {"per_channel": per_channel}, ""
    if args.correction == "none":
        found["--correction potential"] = qnet, {"correction": "potential"}, ""
    if args.spike_epochs or args.spike_epochs_unlabelled:
        later = {flags: ", ".join(filter(None, (note, NOT_ON_SPIKES))) for flags, (*_, note) in found.items()}
        found = {flags: (*found[flags][:2], note) for flags, note in later.items()}
    return {"as asked for": asked_for, **found}


def requantized(net, bits, per_channel):
    """A copy of a network with weights quantized to `bits`, not finetuned; one scale per output channel or layer."""
    net = copy.deepcopy(net)
    init_quantize_net(net, bits, per_channel)
    return net


@torch.no_grad()
def unquantized(qnet):
    """A copy of a quantized network with the weights before rounding (`unrounded_weight`)."""
    net = copy.deepcopy(qnet)
    for name, layer in net.weighted_layers().items():
        layer.weight.copy_(unrounded_weight(qnet.ops[name].op))
    return net


def try_alternatives(args, net, qnet, loader, device, images, targets, expected):
    """Flags -> `measure`, duration in timesteps and note of every alternative conversion, smallest error first."""
    results = {}
    for flags, (network, changes, note) in tqdm(alternatives(args, net, qnet).items(), "alternatives", leave=False):
        options = {"calibration_samples": args.analysis_images, **changes}
        snn = try_to_convert(flags, network, loader, device, args, **options)
        if snn is None:
            continue
        duration = snn.duration()
        results[flags] = {**measure(snn, images, targets, expected), "duration": duration, "note": note}
    return dict(sorted(results.items(), key=lambda item: item[1]["error"]))


# ---------------------------------------------------------------------------------------------------------------------
# weight bits and timesteps


def sweep(args, net, train_loader, loader, device, images, targets, bit_widths, timesteps):
    """bits -> {T: top-1 in percent}; each bit width is finetuned by the flags, and each cell converted separately.

    A cell that cannot be converted is None.
    """
    expected = torch.cat([net(part) for part in images.split(32)]).detach()
    criterion, results = torch.nn.CrossEntropyLoss(), {}
    for bits in tqdm(bit_widths, "sweep", leave=False):
        with_bits = type(args)(**{**vars(args), "weight_bitwidth": bits})
        seed_everything(args.seed)  # each cell equals a separate run with its flags
        leveled = with_levels(net, loader, device, with_bits)
        qnet = quantize_finetune(leveled, train_loader, criterion, device, with_bits)
        results[bits] = {}
        for T in timesteps:
            listen = args.listen if args.listen == "auto" else min(args.listen, T)
            options = {"timesteps": T, "listen": listen, "calibration_samples": args.analysis_images}
            flags = f"--weight_bitwidth {bits} --timesteps {T}"
            snn = try_to_convert(flags, qnet, loader, device, with_bits, **options)
            results[bits][T] = None if snn is None else measure(snn, images, targets, expected)["top1"]
    return results


def try_to_convert(flags, network, loader, device, args, **options):
    """Like `pipeline.convert_by_options`; if the conversion fails, print one line with the reason and return None."""
    try:
        return convert_by_options(network, loader, device, args, **options)
    except ValueError as error:
        print(f"warning: {flags} is not tried, {error}", file=sys.stderr)
        return None
