"""Measure which changes regain accuracy: float weights in one layer at a time, and conversions with other flags.

Every variant is converted, corrected and measured with the same numbers of images, and so is the conversion "as asked
for" (CONTROL). The results are therefore comparable, image by image.
"""

import copy
import sys
import time
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from conversion.correction import correct_spikes
from finetuning.levels import own_levels
from options import FLOAT_BITS
from pipeline import convert_by_options, with_levels
from quantization import init_quantize_net, quantize_finetune
from reports.accuracy import share
from reports.energy import count_operations
from reports.observe import count_spikes, spikes_of
from reports.presets import conversion_changes, other_presets, preset_namespace, train_preset
from reports.statistics import to_hex
from runtime.batches import first_inputs
from runtime.device import seed_everything
from spike_simulator import node_shapes

CONTROL = "as asked for"
MOST_TIMESTEPS = 65536
MOST_REPAIRED = 4  # layers that are converted anew with float weights; the ANN alone says which are worth it
NOT_ON_SPIKES = "not finetuned on spikes"
MOST_CALIBRATION = 128  # images that each variant calibrates on: a conversion costs more than its measurement
BATCH = 32  # images at a time, at most


def score_error(outputs, others, expected):
    """RMS difference between class scores `outputs` and `others`, in percent of the standard deviation of `expected`.

    All are [B, classes]. expected: the class scores of the float ANN; the deviation is that over the images.
    """
    variation = (expected - expected.mean(0)).double().square().mean().sqrt()
    return (100 * (outputs - others).double().square().mean().sqrt() / variation.clamp_min(1e-30)).item()


@torch.no_grad()
def measure(net, images, targets, expected, batch=32):
    """Measure a network on images [B, C, H, W] with labels [B]; returns a dict of "error", "loss", "same_class", and:

    top1, interval, images: accuracy in percent, its 95 % interval, the number of images. right: which of them, as
    `statistics.to_hex`. error: `score_error`, in percent. same_class: percentage of images with the class that the
    float ANN chooses. expected: the class scores of the float ANN, [B, classes].
    """
    outputs = torch.cat([net(part) for part in images.split(batch)])
    right = (outputs.argmax(1) == targets).cpu().numpy()
    return {
        "error": score_error(outputs, expected, expected),
        "loss": torch.nn.functional.cross_entropy(outputs, targets).item(),
        **share(right),
        "same_class": 100 * (outputs.argmax(1) == expected.argmax(1)).double().mean().item(),
        "right": to_hex(right),
    }


@torch.no_grad()
def measure_price(snn, shapes, images, targets):
    """Accuracy of a converted network on images [B, ...] with labels [B], and its synaptic operations per image.

    shapes: node -> shape of a sample. Returns top1, interval, images, right, synops.
    """
    outputs, counts = count_spikes(snn, images)
    right = (outputs.argmax(1) == targets).cpu().numpy()
    operations = count_operations(snn, shapes, {node: n / len(images) for node, n in counts.items()}, snn.timesteps)
    return {**share(right), "right": to_hex(right), "synops": sum(each["synops"] for each in operations.values())}


# ---------------------------------------------------------------------------------------------------------------------
# layers


def repair_layers(args, qnet, loader, device, images, targets, expected, names=None):
    """Op name -> `measure` of the conversion with float weights in that layer alone, in the order of the layers.

    The entry CONTROL is the conversion without float weights. Thresholds do not change; the correction is made
    anew for every entry, without fitting weights, because that would change the float ones too. Float weights in all
    layers (32 bits) give an empty dictionary. names: layers to repair, all if None (`layers_worth_repairing`).
    """
    if args.weight_bitwidth == FLOAT_BITS:
        return {}
    samples = calibration_images(args)
    plain = convert_by_options(qnet, loader, device, args, calibration_samples=samples, correction="none")
    scales = input_scales(plain, images[:1])
    results = {}
    chosen = [name for name in qnet.weighted_layers() if names is None or name in names]
    for name in tqdm([None, *chosen], "repair layers", leave=False, delay=1):
        snn, ann = copy.deepcopy(plain), copy.deepcopy(qnet)
        if name is not None:
            repair(snn, ann, name, unrounded_weight(qnet.ops[name].op), scales)
        if args.correction != "none":
            with_bias = args.correction == "bias"
            correct_spikes(snn, ann, loader, device, samples, with_bias, args.hold_back)
        snn.set_engine(args.engine, args.memory_budget)
        results[name or CONTROL] = measure(snn, images, targets, expected)
    return results


def calibration_images(args):
    """How many images each variant calibrates on, and its control, too."""
    return min(args.analysis_images, MOST_CALIBRATION)


@torch.no_grad()
def layers_worth_repairing(args, net, qnet, loader, device, most=MOST_REPAIRED):
    """At most `most` op names: the layers whose float weights bring the quantized ANN closest to the float one.

    The calibration images decide, without spikes, so that the images on which layers are compared have no part in it.
    """
    layers = qnet.weighted_layers()
    if args.weight_bitwidth == FLOAT_BITS or len(layers) <= most:
        return list(layers)
    (images,), ann = first_inputs(loader, device, calibration_images(args)), copy.deepcopy(qnet)
    expected, errors = class_scores(net, images), {}
    for name in layers:
        weight = ann.ops[name].op.weight
        rounded = weight.detach().clone()
        weight.copy_(unrounded_weight(layers[name]))
        errors[name] = score_error(class_scores(ann, images), expected, expected)
        weight.copy_(rounded)
    return sorted(errors, key=errors.get)[:most]


@torch.no_grad()
def class_scores(net, images):
    """The class scores of images, [B, classes]."""
    return torch.cat([net(part) for part in images.split(BATCH)])


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


@dataclass
class Alternative:
    """A conversion with other flags.

    network: to convert. changes: conversion options that differ. note: steps that are left out, such as "not
    finetuned". train: a function () -> spiking network, instead of `network`, where a preset trains.
    """

    network: object = None
    changes: dict = field(default_factory=dict)
    note: str = ""
    train: object = None


def alternatives(args, net, qnet, trained=None):
    """Flags -> Alternative to `args`, CONTROL first.

    trained: a function (namespace) -> spiking network for the presets that train; None leaves them out.
    """
    asked_for = Alternative(qnet, note=NOT_ON_SPIKES if trains_on_spikes(args) else "")
    found = {**other_weights(args, net, qnet), **other_conversions(args, qnet)}
    if trains_on_spikes(args):
        for each in found.values():
            each.note = ", ".join(filter(None, (each.note, NOT_ON_SPIKES)))
    return {CONTROL: asked_for, **found, **presets(args, net, trained)}


def trains_on_spikes(args):
    """Whether the network is finetuned on its own spikes; the alternatives never are."""
    return bool(args.spike_epochs or args.spike_epochs_unlabelled)


def other_weights(args, net, qnet):
    """Flags -> Alternative with other weight bits, or with a scale per channel."""
    bits, found = args.weight_bitwidth, {}
    weights, spikes = args.per_channel in ("weights", "both"), args.per_channel in ("spikes", "both")
    if bits != FLOAT_BITS:
        found[f"--weight_bitwidth {FLOAT_BITS}"] = Alternative(net, {"weight_bitwidth": FLOAT_BITS}, "not finetuned")
    if min([bits] if isinstance(bits, int) else bits) < 8:
        again = requantized(net, 8, weights)
        found["--weight_bitwidth 8"] = Alternative(again, {"weight_bitwidth": 8}, "not finetuned")
    if bits != FLOAT_BITS and not weights:
        again, per_channel = requantized(unquantized(qnet), bits, True), "both" if spikes else "weights"
        note = "rounded anew, not finetuned again" if args.finetune_epochs else ""
        found[f"--per_channel {per_channel}"] = Alternative(again, {"per_channel": per_channel}, note)
    return found


def other_conversions(args, qnet):
    """Flags -> Alternative that converts the same weights in another way."""
    T, weights = args.timesteps, args.per_channel in ("weights", "both")
    is_learnt = args.activation_levels is not None or own_levels(qnet)  # training learnt lambda, no flag chooses it
    changes = []
    if 2 * T <= MOST_TIMESTEPS:
        changes.append(("timesteps", 2 * T))
    if args.listen != T:
        changes.append(("listen", T))
    if args.threshold != "mse" and not is_learnt:
        changes.append(("threshold", "mse"))
    if args.per_channel not in ("spikes", "both") and not is_learnt:
        changes.append(("per_channel", "both" if weights else "spikes"))
    if args.correction == "none":
        changes.append(("correction", "potential"))
    return {f"--{name} {value}": Alternative(qnet, {name: value}) for name, value in changes}


def presets(args, net, trained=None):
    """Flags -> Alternative of every other preset; of those that train only with `trained` (see `alternatives`)."""
    found = {}
    for name, needs_training in other_presets(args).items():
        namespace = preset_namespace(args, name)
        if not needs_training:
            again = requantized(net, namespace.weight_bitwidth, namespace.per_channel in ("weights", "both"))
            found[f"--preset {name}"] = Alternative(again, conversion_changes(namespace))
        elif trained is not None:
            note = f"trained, calibrated on up to {namespace.calibration_samples} images"
            found[f"--preset {name}"] = Alternative(train=lambda namespace=namespace: trained(namespace), note=note)
    return found


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


def try_alternatives(args, net, qnet, loader, device, images, targets, expected, reported=None, train_loader=None):
    """Flags -> `measure`, duration in timesteps and note of every alternative conversion, in the order of the trials.

    reported: the Sample of test images on which `measure_price` gives the entry "test"; None leaves it out.
    train_loader: training images for the presets that train; None leaves these presets out.
    """

    def trained(namespace):
        return train_preset(namespace, net, train_loader, loader, device)

    results, shapes = {}, node_shapes(qnet, images[:1])
    known = alternatives(args, net, qnet, None if train_loader is None else trained)
    for flags, each in tqdm(known.items(), "alternatives", leave=False):
        started = time.process_time()
        options = {"calibration_samples": calibration_images(args), **each.changes}
        snn = each.train() if each.train else try_to_convert(flags, each.network, loader, device, args, **options)
        if snn is None:
            continue
        seconds = time.process_time() - started
        results[flags] = {
            **measure(snn, images, targets, expected),
            **{"duration": snn.duration(), "note": each.note, "cpu_seconds": round(seconds, 2)},
            "bits": each.changes.get("weight_bitwidth", args.weight_bitwidth),
        }
        if reported is not None:
            results[flags]["test"] = measure_price(snn, shapes, reported.images, reported.targets)
    return results


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
            options = {"timesteps": T, "listen": listen, "calibration_samples": calibration_images(args)}
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
