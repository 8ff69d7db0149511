"""The file of a finetuned quantized network, from which other conversions start (`--qnet FILE`).

save_qnet("out_qnet.pth", qnet, args)
adopt_options(args)                             # bits, granularity and levels are those of the file
qnet = quantized_from_file("out_qnet.pth", net)

The file is one of `spike_dag`: `load_dag` reads it in Python, and trans_ann2snn_weight converts what it returns.
"""

import copy
import os
import sys

from finetuning.state import plain, put_tensors, tensors_of
from options import QuantizeOptions, joined_per_channel
from runtime.files import write_torch
from spike_dag import load_dag

# Flags that decide which quantized network the finetuning makes; the conversion has to go on with them.
OF_NETWORK = ("weight_bitwidth", "activation_levels", "equalize", "replace_activations", "replace_gates", "signed")
WITH_LEVELS = ("avgpool", "ann_layers")  # they decide which ops have activation levels


def file_of_qnet(save_file):
    """The file beside `save_file` for its quantized network: out_snn.pth -> out_qnet.pth, net.pth -> net_qnet.pth."""
    root, end = os.path.splitext(save_file)
    folder, name = os.path.split(root)
    before, is_named, behind = name.rpartition("snn")
    return os.path.join(folder, f"{before}qnet{behind}" if is_named else f"{name}_qnet") + end


def learns_qnet(args):
    """Whether a run trains its quantized network, so that there is something to keep."""
    return args.qnet is None and bool(args.finetune_epochs or args.rounding == "learnt")


def save_qnet(path, qnet, args):
    """Write a quantized network with its full-precision weights and the flags that it depends on."""
    qnet = copy.deepcopy(qnet).cpu()
    names = (*OF_NETWORK, *WITH_LEVELS, "per_channel")
    qnet.quantized_by = {name: plain(getattr(args, name)) for name in names}
    write_torch(path, qnet)


def read_qnet(path):
    """The quantized network of a file. Raises OSError or ValueError for a file without one."""
    qnet = load_dag(path)
    if qnet.neurons():
        raise ValueError(f"--qnet {path} holds a spiking network, give the quantized one, {file_of_qnet(path)}")
    known = qnet.quantized_by
    if isinstance(known, dict):
        known.setdefault("replace_gates", None)  # a file of before this flag
    if not isinstance(known, dict) or not {*OF_NETWORK, *WITH_LEVELS, "per_channel"} <= set(known):
        raise ValueError(f"--qnet {path} holds a network without the flags of its finetuning, ann2snn.py writes them")
    return qnet


def adopt_options(args):
    """Set the flags on which a quantized network depends to those of the file `args.qnet`.

    args.given: names of the flags on the command line. Raises ValueError, with the difference, if one of them has
    another value than the file.
    """
    known, before = read_qnet(args.qnet).quantized_by, copy.copy(vars(args))
    names = OF_NETWORK if known["activation_levels"] is None else (*OF_NETWORK, *WITH_LEVELS)
    for name in names:
        if name in args.given and plain(getattr(args, name)) not in (known[name], "auto"):
            refuse(args, name, known[name])
        value = tuple(known[name]) if isinstance(known[name], list) else known[name]
        setattr(args, name, value)
    args.per_channel = adopted_per_channel(args, known)
    changed = [f"--{name} {plain(value)}" for name, value in vars(args).items() if plain(value) != plain(before[name])]
    if changed:
        print(f"--qnet {args.qnet}:", *changed, file=sys.stderr)


def adopted_per_channel(args, known):
    """`args.per_channel` with the weights' half of the file, and with activation levels the spikes' half, too."""
    wanted, found = (QuantizeOptions(per_channel=each) for each in (args.per_channel, known["per_channel"]))
    has_levels = known["activation_levels"] is not None
    differs = wanted.weights_per_channel != found.weights_per_channel
    differs |= has_levels and wanted.spikes_per_channel != found.spikes_per_channel
    if differs and "per_channel" in args.given:
        refuse(args, "per_channel", known["per_channel"])
    spikes = found.spikes_per_channel if has_levels else wanted.spikes_per_channel
    return joined_per_channel(*("channel" if each else "layer" for each in (found.weights_per_channel, spikes)))


def refuse(args, name, of_file):
    """Raise ValueError for a flag that differs from the file's."""
    raise ValueError(
        f"--qnet {args.qnet} was finetuned with {name} {of_file}, not {plain(getattr(args, name))}: leave --{name} "
        "out, or finetune again"
    )


def quantized_from_file(path, qnet):
    """Put the weights of a file into `qnet`, a network that was quantized with the same flags and not finetuned.

    Raises ValueError if the file is of another network.
    """
    found = tensors_of(read_qnet(path))
    put_tensors(qnet, found, f"--qnet {path}", "give the network and the flags that it was finetuned with")
    return qnet
