"""NETWORK of the benchmarks: any form of a network that ann2snn.py takes, its weights, and flags of its own.

resnet20:checkpoint/resnet20_cifar10_ann.pth              NAME:FILE
path/to/net.py:Net:weights.pth --preprocess imagenet      code, weights, and flags of ann2snn.py
package.module:callable --net_args width=24               code that has its weights
timm:resnet18 --ann_weight pretrained                     a network of torchvision or timm
model.onnx
"""

import os
import shlex

FLAGS = " --"  # where the flags begin; a path before them may have blanks
ENDS_OF_WEIGHTS = (".pt", ".pth", ".th", ".ckpt", ".safetensors", ".tar", ".bin")
PACKAGES = ("torchvision", "timm")


def split_network(text):
    """`name, file, flags` of a NETWORK: file is None where the weights come with the network or by a flag.

    Raises ValueError for text of another form.
    """
    network, separator, own = text.partition(FLAGS)
    try:
        flags = shlex.split(separator + own)
    except ValueError as error:
        raise ValueError(f"network '{text}': {error}, look at its quotes") from error
    network = network.strip()
    name, colon, file = network.rpartition(":")
    if not colon or is_whole(name, file):
        return network, None, flags
    return name, file, flags


def is_whole(name, last):
    """Whether `name:last` is a network, and not a network and the file of its weights."""
    from build_network import NETWORKS

    if name in PACKAGES or last.endswith(".onnx"):
        return True
    if name in NETWORKS or ":" in name or last.endswith(ENDS_OF_WEIGHTS):
        return False
    return name.endswith(".py") or not os.path.exists(last)


def check_has_weights(network, flags):
    """Raise ValueError for a network that would start from random weights. flags: as `conversion_args` parses them."""
    from build_network import NETWORKS
    from networks.file import is_outside

    name = flags.net_name
    has_own = (is_outside(name) and not name.startswith("timm:")) or getattr(NETWORKS.get(name), "has_weights", False)
    if flags.ann_weight is None and not has_own:
        raise ValueError(f"network '{network}' has no weights, write it as NAME:FILE")


def title_of(text):
    """The name of a NETWORK in tables: without its weights, its folder, and what it comes from."""
    name, _, _ = split_network(text)
    return os.path.basename(name.rpartition(":")[2])
