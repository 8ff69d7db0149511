"""Find the weights of a network in what a training script saved: nested dicts, prefixes, and tensors beside.

    fit = choose_fit(find_fits(saved, net.state_dict()))       # raises Ambiguous if several weights fit
    fit.names                                                  # name in the network -> name in the file

A Fit is a dict of tensors in the file and a rule that maps its names to those of the network. Each dict is tried with
every prefix that its names have beyond names of the network.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from runtime.torch_files import unusual_kind

MAX_DEPTH = 6  # dicts within dicts; training scripts have up to 3, and a file can hold a dict that contains itself
COUNTER = "num_batches_tracked"  # of a BatchNorm; only training with momentum=None reads it
# Modules that torch puts around a network, or around a part of it. The network inside has the names without them.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
AVERAGED = r"(?i)(?<![a-z])(ema|swa|averaged?|shadow)(?![a-z])"  # a word in the key of averaged weights
USUAL = r"(state_?dict|(model|net|network)(_state)?(_?dict)?|module|_orig_mod|backbone|weights?|params?)"
# What stands beside a network while it is trained: a part of its path in the file, and the names of counters.
OF_TRAINING = r"(?i)(.*_)?(criterion|loss(es|_fn|_func|_function)?|metrics?|accuracy|acc|top1|top5|aux\w*)"
COUNTERS = {"total_ops", "total_params", "n_averaged"}  # of the profiler thop, and of torch's AveragedModel
PARAMETERS = {"weight", "bias", "running_mean", "running_var", COUNTER}  # of one dimension, or none


class Ambiguous(ValueError):
    """Error for several weights that fit a network, none of them by a usual name."""


@dataclass(eq=False)
class Fit:
    """Tensors of a file under the names of a network.

    path: the keys of the dicts around them. removed, added: the prefix of the file's names that the network lacks, and
    the other way round; both are of short names. tensors: name -> tensor of the whole dict. short: name in the dict ->
    name without wrappers. names: name in the network -> name in the dict. expected: the network's state dict.
    merged: the weights that were computed of two tensors. others: Fits that were not chosen.
    """

    path: tuple
    removed: str
    added: str
    tensors: dict
    short: dict
    names: dict
    expected: dict
    merged: list
    others: list = field(default_factory=list)

    def __post_init__(self):
        self.shaped = sum(
            shape_of(self.tensors[name]) == shape_of(self.expected[own]) for own, name in self.names.items()
        )

    @property
    def missing(self):
        """The names of the network that the file lacks, without the counters of BatchNorms."""
        return [name for name in self.expected if name not in self.names and not name.endswith(COUNTER)]

    @property
    def is_whole(self):
        """Whether every tensor of the network is there, with its shape."""
        return not self.missing and self.shaped == len(self.names)

    @property
    def parts(self):
        """The keys and the parts of the prefix that lead to the weights."""
        return (*self.path, *self.removed.split(".")[:-1])

    @property
    def is_averaged(self):
        """Whether these are averaged weights (EMA, SWA) by their keys."""
        return any(re.search(AVERAGED, part) for part in self.parts)

    @property
    def rank(self):
        """0 for averaged weights, 1 for weights under usual names, else 2."""
        return 0 if self.is_averaged else 1 if all(re.fullmatch(USUAL, part) for part in self.parts) else 2

    def where(self):
        """The place in the file in words, such as `under "state_dict"` or `with the prefix "teacher."`."""
        place = ["under " + " > ".join(f'"{key}"' for key in self.path)] if self.path else []
        prefix = [f'with the prefix "{self.removed}"'] if self.removed else []
        return " ".join(place + prefix) or "at the top"


def find_fits(saved, expected):
    """All Fits of what a file holds, best first. expected: the network's state dict."""
    own, ends = plain_names(expected), defaultdict(list)
    for short, name in own.items():
        for prefix, rest in cuts(short):
            if prefix:
                ends[rest].append((prefix, name))
    fits = [fit for path, tensors in dicts_of_tensors(saved) for fit in fits_of(path, tensors, expected, own, ends)]
    return sorted(fits, key=lambda fit: (-fit.shaped, -len(fit.names), len(fit.removed + fit.added), -len(fit.tensors)))


def choose_fit(fits):
    """The Fit to load, with those that fit too as its `others`; the best one if none is whole.

    Averaged weights go before others, because training scripts evaluate these, and usual names before unusual ones.
    Raises Ambiguous if the first of this order are several with different values.
    """
    whole = [fit for fit in fits if fit.is_whole]
    if not whole:
        return fits[0]
    best = min(fit.rank for fit in whole)
    first, *rivals = [fit for fit in whole if fit.rank == best]
    for rival in rivals:
        if not has_same_values(first, rival):
            raise Ambiguous(f"{first.where()} and {rival.where()}")
    first.others = [fit for fit in whole if fit is not first and fit not in rivals]
    return first


def has_same_values(fit, other):
    """Whether two Fits have equal tensors."""
    if fit.names.keys() != other.names.keys():
        return False
    pairs = [(fit.tensors[fit.names[name]], other.tensors[other.names[name]]) for name in fit.names]
    if any(unusual_kind(a) or unusual_kind(b) for a, b in pairs):
        return False
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def dicts_of_tensors(saved, path=()):
    """`path, tensors` of every dict within dicts that has tensors under names. path: its keys; tensors: a dict."""
    if not isinstance(saved, dict) or len(path) > MAX_DEPTH:
        return
    tensors = {key: value for key, value in saved.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield path, tensors
    for key, value in saved.items():
        yield from dicts_of_tensors(value, (*path, str(key)))


def shape_of(tensor):
    """The shape of a tensor as a list, or None for a nested tensor, which has none."""
    return None if tensor.is_nested else list(tensor.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def fits_of(path, tensors, expected, own, ends):
    """A Fit of one dict of tensors for every pair of prefixes; one without names if no name fits.

    own: the network's short names -> its names. ends: the end of a short name -> (prefix, name) of the network.
    """
    tensors, merged = merge(tensors, expected)
    there = plain_names(tensors)
    pairs = defaultdict(dict)  # (prefix removed, prefix added) -> name in the network -> name in the file
    for short, name in there.items():
        for prefix, rest in cuts(short):
            if rest in own:
                pairs[prefix, ""][own[rest]] = name
        for prefix, whole in ends.get(short, ()):
            pairs["", prefix][whole] = name
    short = {name: short for short, name in there.items()}
    pairs = pairs or {("", ""): {}}
    return [Fit(path, *prefixes, tensors, short, names, expected, merged) for prefixes, names in pairs.items()]


def cuts(name):
    """`prefix, rest` for every place where a name can be cut behind a dot, the empty prefix first."""
    yield "", name
    for dot in re.finditer(r"\.", name):
        yield name[: dot.end()], name[dot.end() :]


def plain_names(names):
    """Name without the modules that torch puts around -> name. Names stay as they are if two would become the same."""
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in names}
    return plain if len(plain) == len(names) else {name: name for name in names}


def change_of_names(fit):
    """How the file's names differ from the network's, in words, or None."""
    removed = {name.removesuffix(own) for own, name in fit.names.items() if name.endswith(own)}
    if all(name.endswith(own) for own, name in fit.names.items()) and len(removed) == 1:
        prefix = removed.pop()
        return f'prefix "{prefix}" removed' if prefix else None
    if fit.added and all(own.endswith(name) for own, name in fit.names.items()):
        return f'prefix "{fit.added}" added'
    parts = {part for own, name in fit.names.items() for part in name.split(".") if part not in own.split(".")}
    return f"{', '.join(sorted(parts))} taken out of names" if parts else "wrappers added to names"


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are computed


def merge(tensors, expected):
    """`tensors, merged`: the tensors with the weights that pairs of them stand for, and the names of these.

    These pairs are of weight normalisation and of pruning. A network that has them itself keeps them.
    """
    tensors, merged = dict(tensors), []
    for value, factor, function in MERGES:
        starts = [name.removesuffix(value) for name in tensors if name == value or name.endswith(f".{value}")]
        if not starts or any(name.endswith(factor) for name in expected):
            continue
        for start in starts:
            a, b = tensors[start + value], tensors.get(start + factor)
            if b is not None and can_scale(a, b):
                del tensors[start + value], tensors[start + factor]
                tensors[f"{start}weight"] = function(a.detach(), b.detach())
                merged.append(f"{start}weight")
    return tensors, merged


def can_scale(values, factor):
    """Whether both are plain floats, and `factor` is a scalar or has the extent of `values` or 1 in each dimension."""
    if any(unusual_kind(tensor) or not tensor.is_floating_point() for tensor in (values, factor)):
        return False
    extents = zip(factor.shape, values.shape)
    return not factor.dim() or (factor.dim() == values.dim() and all(own in (1, other) for own, other in extents))


def of_norm(v, g):
    """The weight of direction v and norm g; g has extent 1 in the dimensions over which the norm is taken."""
    over = [i for i in range(v.dim()) if not g.dim() or g.shape[i] == 1]
    norm = torch.linalg.vector_norm(v, dim=over, keepdim=True) if over else v.abs()
    return v * (g / norm)


# Weight normalisation in both forms of torch, and pruning: the ends of the names, and the function.
MERGES = (
    ("weight_v", "weight_g", of_norm),
    ("parametrizations.weight.original1", "parametrizations.weight.original0", of_norm),
    ("weight_orig", "weight_mask", torch.mul),
)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors beside the weights


def sort_extras(fit):
    """`harmless, foreign`: the names of the dict that the network lacks: of training, and of another network."""
    used = {*fit.names.values()}
    used.update(name for other in fit.others for name in other.names.values() if is_average_of(fit, other))
    modules = {module for name in fit.names.values() for module in ancestors(fit.short[name])}
    modules -= set(ancestors(fit.removed))
    extras = [name for name in fit.tensors if name not in used]
    harmless = [name for name in extras if is_of_training(name, fit, modules)]
    return harmless, [name for name in extras if name not in harmless]


def is_average_of(fit, other):
    """Whether two Fits are of the same dict, and one of them is the other's average."""
    return fit.path == other.path and fit.is_averaged != other.is_averaged


def ancestors(name):
    """The module of a tensor and the modules around it: "a.b.weight" -> ["a", "a.b"]."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def is_of_training(name, fit, modules):
    """Whether a tensor that the network lacks only served its training. When in doubt it did not.

    modules: those of the network, by their short names in the file.
    """
    short, tensor = fit.short[name], fit.tensors[name]
    *path, last = short.split(".")
    if last in COUNTERS and tensor.numel() == 1:
        return True
    if any(module in modules for module in ancestors(short)):
        return False
    if any(re.fullmatch(OF_TRAINING, part) for part in path or [last]):
        return True
    is_outside = bool(fit.removed) and not short.startswith(fit.removed)
    return is_outside and tensor.dim() <= 1 and last not in PARAMETERS
