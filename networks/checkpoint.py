"""Load trained weights from a file.

net = load_weights(net, path)            # prints a line if the file is more than a plain state dict
found = find_weights(net, path)          # or look first: found.note says what was unwrapped
net.load_state_dict(found.state)
"""

import difflib
import os
import sys
from dataclasses import dataclass

import torch

from networks.unwrap import COUNTER, Ambiguous, change_of_names, choose_fit, find_fits, shape_of, sort_extras
from runtime.torch_files import OtherFile, read_weights_file, unusual_kind

HOW_TO_SAVE = "save it with torch.save(net.state_dict(), path)"
PLAIN = ((), ("state_dict",))  # the keys around the weights in plain files; the second form is that of train_ann.py
MOST_NAMED = 3  # names that a line lists


@dataclass
class FoundWeights:
    """Weights that fit a network. state: the network's names -> tensors. note: what was unwrapped, in a line, or ""."""

    state: dict
    note: str


def load_weights(net, path):
    """Load the weights in the file `path` into `net`, and return `net`.

    Prints a line to stderr that says what was unwrapped, unless the file holds a plain state dict. See `find_weights`
    for the forms of files and the errors. After an error `net` is unchanged.
    """
    found = find_weights(net, path)
    net.load_state_dict(found.state)
    if found.note:
        print(found.note, file=sys.stderr)
    return net


def find_weights(net, path):
    """The weights for `net` in the file `path`, as FoundWeights. `net` is not changed.

    The file is one of torch.save or of safetensors. The state dict may lie in dicts under any keys, its names may have
    prefixes that the network lacks, and what only served the training may lie beside it.

    Raises OSError if the file is missing or unreadable. Raises ValueError, with the name of the first wrong tensor, if
    the file is damaged or of another kind, holds the weights of another network, several that fit equally, or NaN or
    infinite weights.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint {path}, name the file of the trained weights")
    try:
        saved = read_weights_file(path)
    except OtherFile as error:
        advice = "" if error.advice else f", {HOW_TO_SAVE}"
        raise ValueError(f"the checkpoint {path} cannot be read: {error}{advice}") from error
    expected = net.state_dict()
    fits = find_fits(saved, expected)
    check_holds_weights(saved, fits, path)
    try:
        fit = choose_fit(fits)
    except Ambiguous as error:
        raise ValueError(f"the checkpoint {path} holds weights that fit {error}, save those to use alone") from error
    check_fit(fit, path)
    harmless, foreign = sort_extras(fit)
    check_no_other_network(fit, foreign, path)
    state = {name: fit.tensors[fit.names[name]] if name in fit.names else expected[name] for name in expected}
    return FoundWeights(state, note_of(fit, harmless, path))


def note_of(fit, harmless, path):
    """What was unwrapped, in a line; "" for a plain file. harmless: the names of tensors that were ignored."""
    counters = sum(name not in fit.names for name in fit.expected)
    others = " and ".join(other.where() for other in fit.others)
    notes = (
        f"not those {others}, which fit too" if others else None,
        change_of_names(fit),
        f"{counters} {COUNTER} missing (not needed)" if counters else None,
        counted(fit.merged, "weight") + " computed of two tensors" + listed(fit.merged) if fit.merged else None,
        counted(harmless, "extra tensor") + " ignored" + listed(harmless) if harmless else None,
    )
    notes = [note for note in notes if note]
    if not notes and fit.path in PLAIN:
        return ""
    place = [f"weights under {' > '.join(map(repr_of_key, fit.path))}"] if fit.path else []
    return f"checkpoint {path}: {', '.join(place + notes)}"


def repr_of_key(key):
    """A key in double quotes."""
    return f'"{key}"'


def counted(names, what):
    """The number of names in words: "1 weight", "2 weights"."""
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def listed(names):
    """The first names in brackets."""
    return f" ({', '.join(names[:MOST_NAMED])}{', ...' if len(names) > MOST_NAMED else ''})"


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_holds_weights(saved, fits, path):
    """Raise ValueError for a file without a dict of tensors, and for the state of an optimizer alone."""
    if isinstance(saved, dict) and "param_groups" in saved and not any(fit.names for fit in fits):
        raise ValueError(f"the checkpoint {path} holds the state of an optimizer and no weights, {HOW_TO_SAVE}")
    if not fits:
        raise ValueError(f"the checkpoint {path} holds no state dict, {HOW_TO_SAVE}")


def check_fit(fit, path):
    """Raise ValueError, with the name of the first wrong tensor, unless a Fit is whole and finite."""
    for name, tensor in fit.expected.items():
        if name in fit.names:
            check_tensor(fit.names[name], fit.tensors[fit.names[name]], tensor, path)
        elif not name.endswith(COUNTER):
            raise ValueError(
                f"the checkpoint {path} lacks the tensor {name} {shape_of(tensor)} of the network{nearest(name, fit)}"
            )


def nearest(name, fit):
    """What the file has instead of a tensor that it lacks, in words."""
    unused = [there for there in fit.tensors if there not in fit.names.values()]
    wanted = fit.removed + name.removeprefix(fit.added)
    module, _, last = wanted.rpartition(".")
    computed = (f"{wanted}_orig", f"{module}.parametrizations.{last}.", f"parametrizations.{wanted}.")
    for there in unused:
        if fit.short[there].startswith(computed):
            how = "undo the parametrization before saving (torch.nn.utils.parametrize.remove_parametrizations)"
            return f", it has {there}, of which that is computed: {how}"
    close = difflib.get_close_matches(wanted, unused, n=1)
    if close:
        return f", the nearest name in it is {close[0]} {shape_of(fit.tensors[close[0]])}"
    return f", it has others{listed(unused)}" if unused else ""


def check_tensor(name, tensor, expected, path):
    """Raise ValueError unless a tensor can be loaded into the network's tensor `expected`. name: that in the file."""
    if kind := unusual_kind(tensor):
        raise ValueError(f"the checkpoint {path} holds {name} as a {kind} tensor, save it as plain floating point")
    if tensor.shape != expected.shape:
        raise ValueError(
            f"the checkpoint {path} does not fit the network: {name} is {list(tensor.shape)} in the file and "
            f"{list(expected.shape)} in the network, use the network and the data set it was trained with"
        )
    if expected.is_floating_point() and not tensor.is_floating_point():
        raise ValueError(f"the checkpoint {path} holds {name} as {tensor.dtype}, save it as floating point")
    if not torch.isfinite(tensor.to(expected.dtype)).all():
        raise ValueError(f"the checkpoint {path} has NaN or infinite values in {name}, train it again")


def check_no_other_network(fit, foreign, path):
    """Raise ValueError if the file holds tensors of another network. foreign: their names."""
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise ValueError(
            f"the checkpoint {path} holds the tensor {foreign[0]} {shape_of(fit.tensors[foreign[0]])}{more}, which the "
            "network does not have, so it is of another network: use the one it was trained with"
        )
