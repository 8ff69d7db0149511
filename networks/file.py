"""Networks from outside: `path/to/file.py:callable`, `package.module:callable`, `timm:NAME`, `model.onnx`."""

import copy
import os

from torch import nn

from runtime.cli import did_you_mean
from runtime.packages import check_packages
from runtime.user_code import load_code, names_code

ONNX, TIMM, TORCHVISION = ".onnx", "timm:", "torchvision:"
FORMS = "torchvision:NAME, timm:NAME, path/to/file.py:callable, package.module:callable, or model.onnx"
SHAPE_NAMES = ("input_shape", "image_size", "img_size", "input_size")  # where a user's network may say what it takes


def is_outside(name):
    """Whether a network's name has one of the forms of this file."""
    return not name.startswith(TORCHVISION) and (name.startswith(TIMM) or name.endswith(ONNX) or names_code(name))


def check_outside(name):
    """Raise ValueError or OSError unless the network is there; code of the user is imported but not called."""
    if name.startswith(TIMM):
        timm = load_timm()
        known = timm.list_models()
        if not timm.is_model(name.removeprefix(TIMM)):
            short = name.removeprefix(TIMM)
            raise ValueError(f"timm has no network '{short}', see timm.list_models(){did_you_mean(short, known)}")
    elif name.endswith(ONNX):
        if not os.path.isfile(name):
            raise FileNotFoundError(f"no file {name}, name an ONNX file or another network")
    else:
        load_code(name)


def load_timm():
    """The package timm. Raises ValueError if it is missing."""
    check_packages("timm:NAME", "timm")
    import timm

    return timm


def outside_network(name, in_channels, num_classes, pretrained=False, net_args=None):
    """The network as an nn.Module. Raises ValueError or OSError if it cannot be built.

    in_channels, num_classes: for a callable that takes them by these names. net_args: more arguments for it.
    """
    net_args = dict(net_args or {})
    if name.startswith(TIMM):
        return timm_network(name.removeprefix(TIMM), in_channels, num_classes, pretrained, net_args)
    if pretrained:
        raise ValueError(f"--ann_weight pretrained is for torchvision:NAME and timm:NAME, name the file for {name}")
    if name.endswith(ONNX):
        if net_args:
            raise ValueError(f"--net_args are for callables, {name} takes none")
        from networks.onnx_import import load_onnx

        return load_onnx(name)
    code = load_code(name)
    if isinstance(code.target, nn.Module):
        net = copy.deepcopy(code.target)
    elif callable(code.target):
        net = code.call(net_args, {"in_channels": in_channels, "num_classes": num_classes})
    else:
        raise ValueError(f"{name} is a {type(code.target).__name__}, name a class or function that makes a network")
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name} returns a {type(net).__name__}, it has to return a torch.nn.Module")
    return net


def timm_network(name, in_channels, num_classes, pretrained, net_args):
    """A network of timm. Raises ValueError if timm refuses the arguments, OSError if its weights cannot be loaded."""
    timm = load_timm()
    try:
        return timm.create_model(name, pretrained=pretrained, in_chans=in_channels, num_classes=num_classes, **net_args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"timm cannot make {name}: {str(error).splitlines()[0]}") from error
    except OSError as error:  # of the hub, with a message of many lines
        raise OSError(
            f"the weights of timm:{name} cannot be downloaded ({type(error).__name__}), name a file with --ann_weight"
        ) from error


def outside_shape(name):
    """(C, H, W) that the network says it takes, with None where it says nothing."""
    if name.startswith(TIMM):
        config = load_timm().get_pretrained_cfg(name.removeprefix(TIMM))
        return tuple(config.input_size) if config is not None else (None, None, None)
    if name.endswith(ONNX):
        from networks.onnx_import import load_onnx

        shape = load_onnx(name).input_shape or ()
        return tuple(shape) if len(shape) == 3 else (None, None, None)
    target = load_code(name).target
    said = next((getattr(target, each) for each in SHAPE_NAMES if hasattr(target, each)), None)
    return as_shape(said)


def as_shape(value):
    """A side, (H, W) or (C, H, W) as (C, H, W), with None for what is not said."""
    if isinstance(value, int) and value > 0:
        return None, value, value
    if isinstance(value, (tuple, list)) and len(value) in (2, 3) and all(isinstance(x, int) and x > 0 for x in value):
        return (None, *value)[-3:]
    return None, None, None
