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
# Pairs of tensors of which a weight is computed: the ends of their names, and the function.
MERGES = (
    ("weight_v", "weight_g", lambda v, g: of_norm(v, g)),
    ("parametrizations.weight.original1", "parametrizations.weight.original0", lambda v, g: of_norm(v, g)),
    ("weight_orig", "weight_mask", lambda weight, mask: weight * mask),
)


class Ambiguous(ValueError):
    """Error for several weights that fit a network, none of them by a usual name."""


@dataclass
class Fit:
    """Tensors of a file under the names of a network.

    path: the keys of the dicts around them. removed, added: the prefix of the file's names that the network lacks, and
    the other way round. tensors: name -> tensor of the whole dict. names: name in the network -> name in the dict.
    expected: the network's state dict. merged: the weights that were computed of two tensors. others: Fits that were
    not chosen.
    """

    path: tuple
    removed: str
    added: str
    tensors: dict
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
        """The place in the file in words, such as `"state_dict"` or `"state_dict" with the prefix "teacher."`."""
        place = " > ".join(f'"{key}"' for key in self.path)
        prefix = f'the prefix "{self.removed}"' if self.removed else ""
        return f"{place} with {prefix}" if place and prefix else place or prefix or "no key"


def find_fits(saved, expected):
    """All Fits of what a file holds, best first. expected: the network's state dict."""
    fits = [fit for path, tensors in dicts_of_tensors(saved) for fit in fits_of(path, tensors, expected)]
    return sorted(fits, key=lambda fit: (-fit.shaped, -len(fit.names), len(fit.removed) + len(fit.added)))


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
            raise Ambiguous(f"under {first.where()} and under {rival.where()}")
    first.others = [fit for fit in whole if fit is not first and fit not in rivals]
    return first


def has_same_values(fit, other):
    """Whether two Fits have equal tensors."""
    pairs = [(fit.tensors[fit.names[name]], other.tensors[other.names.get(name, name)]) for name in fit.names]
    return fit.names.keys() == other.names.keys() and all(
        not unusual_kind(a) and not unusual_kind(b) and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
    )


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


def fits_of(path, tensors, expected):
    """A Fit of one dict of tensors for every pair of prefixes; one without names if no name fits."""
    tensors, merged = merge(tensors, expected)
    own, there = plain_names(expected), plain_names(tensors)
    pairs = defaultdict(dict)  # (prefix removed, prefix added) -> name in the network -> name in the file
    for short, name in there.items():
        for prefix, rest in cuts(short):
            if rest in own:
                pairs[prefix, ""][own[rest]] = name
    for short, name in own.items():
        for prefix, rest in cuts(short):
            if prefix and rest in there:
                pairs["", prefix][name] = there[rest]
    pairs = pairs or {("", ""): {}}
    return [Fit(path, removed, added, tensors, names, expected, merged) for (removed, added), names in pairs.items()]


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
    return f"{', '.join(sorted(parts)) or 'wrappers'} taken out of names"


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are computed


def merge(tensors, expected):
    """`tensors, merged`: the tensors with the weights that pairs of them stand for, and the names of these.

    These pairs are of weight normalisation and of pruning. A network that has them itself keeps them.
    """
    tensors, merged = dict(tensors), []
    for value, factor, function in MERGES:
        if any(name.endswith(factor) for name in expected):
            continue
        for name in [name for name in tensors if name.endswith(f".{value}") or name == value]:
            start = name.removesuffix(value)
            a, b = tensors[name], tensors.get(start + factor)
            if b is not None and not unusual_kind(a) and not unusual_kind(b) and can_scale(a, b):
                del tensors[name], tensors[start + factor]
                tensors[f"{start}weight"] = function(a.detach(), b.detach())
                merged.append(f"{start}weight")
    return tensors, merged


def can_scale(values, factor):
    """Whether a tensor has, in each dimension, the extent of `values` or 1, or is a scalar."""
    extents = zip(factor.shape, values.shape)
    return not factor.dim() or (factor.dim() == values.dim() and all(own in (1, other) for own, other in extents))


def of_norm(v, g):
    """The weight of direction v and norm g; g has extent 1 in the dimensions over which the norm is taken."""
    over = [i for i in range(v.dim()) if not g.dim() or g.shape[i] == 1]
    norm = torch.linalg.vector_norm(v, dim=over, keepdim=True) if over else v.abs()
    return v * (g / norm)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors beside the weights


def sort_extras(fit):
    """`harmless, foreign`: the names of the dict that the network lacks: of training, and of another network."""
    used = {*fit.names.values()}
    used.update(name for other in fit.others for name in other.names.values() if is_average_of(fit, other))
    modules = {module for name in fit.names.values() for module in ancestors(name)}
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

    modules: those of the network, by their names in the file.
    """
    *path, last = name.split(".")
    tensor = fit.tensors[name]
    if last in COUNTERS and tensor.numel() == 1:
        return True
    if any(module in modules for module in ancestors(name)):
        return False
    if any(re.fullmatch(OF_TRAINING, part) for part in path or [last]):
        return True
    is_outside = bool(fit.removed) and not name.startswith(fit.removed)
    return is_outside and tensor.dim() <= 1 and last not in PARAMETERS
