"""The presets as alternatives to a conversion: the options that each stands for, and the training that some do."""

from argparse import Namespace
from dataclasses import fields

import torch

from dag_rewrites import prepare_conversion
from finetuning.on_spikes import finetune_on_spikes
from options import ConversionOptions, QuantizeOptions, SpikeFinetuneOptions, defaults
from pipeline import Networks, convert_by_options, quantize
from presets import PRESETS, preset_options
from runtime.device import seed_everything

LEFT_OPEN = "what a layer leaves open"  # help group of options that a network may need; all but avgpool stay
OPTIONS = (QuantizeOptions, ConversionOptions, SpikeFinetuneOptions)


def preset_namespace(args, name):
    """The options of a run with `--preset name`: timesteps, network, data and what layers leave open as in `args`.

    Average poolings are those of the preset.
    """
    kept = {each.name for cls in OPTIONS for each in fields(cls) if is_left_open(each)}
    kept |= {"timesteps", "equalize"}  # the networks at hand are equalized, or not
    plain = {key: value for key, value in defaults(*OPTIONS).items() if key not in kept}
    chosen = preset_options(name, args.timesteps, hardware=args.hardware)
    return Namespace(**{**vars(args), **plain, **chosen, "preset": name})


def is_left_open(each):
    """Whether an option of `OPTIONS` says what a layer leaves open, and no preset chooses it."""
    return each.metadata["group"] == LEFT_OPEN and each.name != "avgpool"


def other_presets(args):
    """Name -> whether it trains, for every preset but that of `args`."""
    names = [name for name in PRESETS if name != getattr(args, "preset", "specification")]
    return {name: trains(preset_namespace(args, name)) for name in names}


def trains(args):
    """Whether a run trains: on labels, on its own spikes, or the rounding of its weights."""
    return bool(args.finetune_epochs or args.spike_epochs or args.spike_epochs_unlabelled or args.rounding == "learnt")


def conversion_changes(args):
    """The conversion options of `args`, but those that `load_network` has applied, and the calibration images."""
    names = [each.name for each in fields(ConversionOptions) if not is_left_open(each)]
    return {name: getattr(args, name) for name in names if name != "calibration_samples"}


def train_preset(args, net, train_loader, calibration_loader, device):
    """The spiking network of a preset that trains, made as `pipeline.make` makes it; `net` does not change."""
    criterion, made = torch.nn.CrossEntropyLoss(), Networks(prepare_conversion(net, avgpool=args.avgpool))
    seed_everything(args.seed)
    args.equalize = False  # `net` is what equalizing gave
    quantize(args, made, (train_loader, calibration_loader), criterion, device)
    made.snn = convert_by_options(made.qnet, calibration_loader, device, args)
    networks = made.snn, made.qnet, made.ann
    return finetune_on_spikes(*networks, train_loader, calibration_loader, criterion, device, args).to(device).eval()
