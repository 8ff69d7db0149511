"""Data loaders: the batch formats that a loader may yield, and the four loaders of a data set.

inputs, labels = split_batch(batch)                             # (tensor, ...), labels or None
loader = loader_for(net, loader)                                # its batches with the inputs of `net` as a tuple
loader = reusable(loader)                                       # a list of its batches if it can run only once
test, val, train, train_val = four_loaders(*four_sets, args)    # for data sets that fetch whole batches
"""

import inspect
from collections.abc import Iterator, Mapping

import torch
from torch.utils.data import DataLoader, Dataset

INPUT_KEYS = ("image", "images", "img", "pixel_values", "input", "inputs", "x", "data")
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")
MOST_NAMED = 6  # number of keys or types that a message lists, so that it stays one short line
FORMS = "(inputs, labels), (inputs, labels, ...), a dict with 'image' and 'label', or inputs alone"


def split_batch(batch):
    """`inputs, labels` of a batch: a tuple of tensors [B, ...], and the unchanged labels or None.

    batch: a tensor; a tuple or list of inputs, labels and anything else; or a mapping with one of `INPUT_KEYS` and one
    of `LABEL_KEYS`. Several inputs form a tuple or list. Raises ValueError for other formats, and for inputs with
    different batch sizes.
    """
    if isinstance(batch, torch.Tensor):
        inputs, labels = batch, None
    elif isinstance(batch, Mapping):
        inputs, labels = by_name(batch, INPUT_KEYS), by_name(batch, LABEL_KEYS)
    elif isinstance(batch, (tuple, list)) and len(batch):
        inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
    else:
        inputs, labels = None, None
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise ValueError(f"a batch of the data loader is {in_words(batch)}, it has to be {FORMS}")
    if len({len(x) if x.dim() else None for x in inputs}) > 1 or not inputs[0].dim():
        shapes = " and ".join(str(list(x.shape)) for x in inputs)
        raise ValueError(f"the inputs of a batch have the shapes {shapes}, the first dimension has to be the batch")
    return inputs, labels


def by_name(batch, keys):
    """The entry of a mapping under the first of `keys` that it contains, else None."""
    return next((batch[key] for key in keys if key in batch and batch[key] is not None), None)


def in_words(batch):
    """A batch in words, for messages: its type, and the first keys or types inside."""
    if isinstance(batch, Mapping):
        keys = ", ".join(map(repr, list(batch)[:MOST_NAMED]))
        return f"a {type(batch).__name__} with {keys or 'nothing in it'}"
    if isinstance(batch, (tuple, list)):
        types = ", ".join(type(item).__name__ for item in batch[:MOST_NAMED])
        return f"a {type(batch).__name__} of {types or 'nothing'}"
    return f"{'an' if type(batch).__name__[0] in 'aeiouAEIOU' else 'a'} {type(batch).__name__}"


# ---------------------------------------------------------------------------------------------------------------------
# Several inputs


def batches_of_dataset(loader, shuffle=False):
    """The loader itself, or one of batches of 100 for a torch Dataset."""
    return DataLoader(loader, 100, shuffle) if isinstance(loader, Dataset) else loader


def loader_for(net, loader):
    """The loader with batches ((a, b, ...), labels, ...) for a network with several inputs; else the loader itself.

    Batches may also be (a, b, ..., labels, ...), as a TensorDataset gives them, or dicts under the names that `forward`
    has for its inputs. Raises ValueError, in the loop over it, for batches with another number of inputs.
    """
    names = input_names(net)
    if len(names) < 2:
        return loader
    if isinstance(loader, Iterator):
        return (group_inputs(batch, names) for batch in loader)
    return GroupedLoader(loader, names)


class GroupedLoader:
    """A loader whose batches have the inputs as a tuple (`group_inputs`). names: those of the inputs."""

    def __init__(self, loader, names):
        self.loader, self.names = loader, names

    def __iter__(self):
        return (group_inputs(batch, self.names) for batch in self.loader)

    def __len__(self):
        return len(self.loader)  # a TypeError for a loader without a length, as from the loader itself


def input_names(net):
    """The names of the inputs that a network needs: those of a graph, or the arguments of `forward` without default.

    It is () where `forward` takes any number, so nothing is known.
    """
    if (nodes := getattr(net, "inputs_nodes", None)) is not None:
        return tuple(nodes)
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that is not written in Python
        return ()
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional and p.default is p.empty)


def group_inputs(batch, names):
    """A batch as ((a, b, ...), labels, ...). Raises ValueError if it has not one input for each of `names`."""
    if isinstance(batch, Mapping) and all(name in batch for name in names):
        batch = (tuple(batch[name] for name in names), by_name(batch, LABEL_KEYS))
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor):
        few = sum(isinstance(x, torch.Tensor) and x.is_floating_point() for x in batch[: len(names)])
        if few == len(names):
            batch = (tuple(batch[:few]), *batch[few:])
    inputs = split_batch(batch)[0]
    if len(inputs) != len(names):
        found = "1 input" if len(inputs) == 1 else f"{len(inputs)} inputs"
        raise ValueError(
            f"a batch of the data loader has {found} and the network takes {len(names)}: give (({', '.join(names)}), "
            f"labels) or ({', '.join(names)}, labels)"
        )
    return batch


def labelled_batch(batch, device, dtype=torch.float32):
    """`inputs, labels` of a batch on a device: a tuple of tensors [B, ...] in `dtype`, and a tensor of labels.

    Raises ValueError if the batch has no labels, labels that are not numbers, or a different number of labels than
    inputs, and for the inputs that `on_device` refuses.
    """
    inputs, labels = split_batch(batch)
    if labels is None:
        raise ValueError(f"a batch of the data loader has no labels, it has to be {FORMS.rsplit(', or', 1)[0]}")
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the labels of a batch are {in_words(labels)}, they have to be numbers") from error
    if labels.dim() and len(labels) != len(inputs[0]):
        raise ValueError(f"a batch has {len(inputs[0])} inputs and {len(labels)} labels, give one label for each input")
    return on_device(inputs, device, dtype=dtype), labels.to(device)


def on_device(inputs, device, most=None, dtype=torch.float32):
    """The first `most` samples of each input [B, ...], or all, on a device and in `dtype`.

    Raises ValueError for NaN or infinite values, and for integers, because only the user knows the input scale that the
    network was trained with.
    """
    for x in inputs:
        if not x.is_floating_point():
            raise ValueError(
                f"the inputs are {x.dtype}, convert them to float and scale them as for the network's training"
            )
        if not torch.isfinite(x).all():
            raise ValueError("an input has NaN or infinite values, look at how the images are read and normalised")
    return tuple(x[:most].to(device, dtype) for x in inputs)


def type_of(net):
    """The floating point type of a network's parameters; float32 if it has none."""
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


def memory_format(inputs):
    """Channels last for [B, C, H, W], because convolutions are faster on it; otherwise the inputs' own order."""
    return torch.channels_last if inputs.dim() == 4 else torch.preserve_format


def first_batch(loader):
    """The first batch of a loader with at least one sample. Raises ValueError if there is none."""
    for batch in batches_of(loader):
        return batch
    raise ValueError("the data loader is empty, give it at least one batch")


def batches_of(loader):
    """The batches of a loader without empty ones, which a filter may produce."""
    return (batch for batch in loader if len(split_batch(batch)[0][0]))


def first_inputs(loader, device, most):
    """The first `most` images of a loader: a tuple of inputs, [B, ...] each. Raises ValueError if there are none."""
    return tuple(torch.cat(each) for each in zip(*inputs_of(loader, device, most)))


def inputs_of(loader, device, most):
    """Yield the inputs of each batch, a tuple of [B, ...], up to `most` images. Raises ValueError if there are none."""
    seen = 0
    for batch in batches_of(loader):
        inputs = on_device(split_batch(batch)[0], device, most - seen)
        seen += len(inputs[0])
        yield inputs
        if seen >= most:
            return
    if not seen:
        raise ValueError("no images to calibrate on, the data loader is empty")


def reusable(loader, samples=None):
    """The loader itself if it can run again, otherwise a list of its batches.

    An iterator can run only once. If `samples` is given, a loader without a length is treated like an iterator, and the
    list ends with the batch that reaches `samples` inputs.
    """
    if not isinstance(loader, Iterator) and (samples is None or has_length(loader)):
        return loader
    batches, seen = [], 0
    for batch in batches_of(loader):
        batches.append(batch)
        seen += len(split_batch(batch)[0][0])
        if samples is not None and seen >= samples:
            break
    return batches


def count_batches(loader):
    """The number of batches of a loader; a loader without a length is iterated once to count them."""
    return len(loader) if has_length(loader) else sum(1 for _ in loader)


def has_length(loader):
    """Whether a loader knows its number of batches; a loader over a stream of data does not."""
    try:
        return len(loader) >= 0
    except TypeError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Labels and outputs


def first_output(outputs, targets=None):
    """The only output, or the first of several whose shape fits the labels; without labels the first of [B] or [B, C].

    Only shapes decide, so that all batches choose alike. Raises ValueError if the labels fit none of several outputs.
    """
    if not isinstance(outputs, (tuple, list)):
        return outputs
    if targets is None:
        return next((x for x in outputs if x.dim() in (1, 2)), outputs[0])
    return outputs[main_output([x.shape for x in outputs], targets)]


def main_output(shapes, targets):
    """The index of the output that the labels are for; see `first_output`. shapes: of one output or several."""
    for i, shape in enumerate(shapes):
        try:
            fit_labels(torch.empty(shape, device="meta"), targets)
        except ValueError:
            if len(shapes) == 1:
                raise
        else:
            return i
    words = " and ".join(str(list(shape)) for shape in shapes)
    raise ValueError(
        f"the network returns {words} and the labels are {list(targets.shape)}, which fit none of these outputs: "
        "return [B, classes] for labels [B], [B, 1] or [B, classes]"
    )


def fit_labels(outputs, targets):
    """The labels in the shape and type that fit the outputs.

    For outputs [B, C] these are classes [B] or class probabilities [B, C]; for one score per sample, [B] or [B, 1],
    labels with the shape and type of the outputs. Raises ValueError, with both shapes, if the labels do not fit.
    """
    is_one_score = outputs.dim() == 1 or (outputs.dim() == 2 and outputs.shape[1] == 1)
    if is_one_score and targets.numel() == len(outputs):
        return targets.reshape(outputs.shape).to(outputs.dtype)
    if outputs.dim() == 2 and not is_one_score:
        if targets.numel() == len(outputs):
            return targets.reshape(-1).long()
        if targets.shape == outputs.shape:
            return targets
    raise ValueError(
        f"the network returns {list(outputs.shape)} and the labels are {list(targets.shape)}: a classifier returns "
        "[B, classes] for labels [B], [B, 1] or [B, classes], or one score [B, 1] for labels of 0 and 1"
    )


def loss_of(criterion, outputs, targets):
    """The loss with the labels unchanged or, if the criterion rejects them, as `fit_labels` returns them.

    With several outputs the criterion gets the tuple or, if it rejects a tuple, the first output that fits the labels.
    Raises ValueError, with both shapes, if the criterion accepts neither form of the labels.
    """
    hint = ""
    if isinstance(outputs, (tuple, list)):
        hint = "; of several outputs the first whose shape fits the labels counts, return the class scores first"
        try:
            return criterion(outputs, targets)
        except (TypeError, AttributeError):  # torch's losses raise one of these for a tuple
            outputs = first_output(outputs, targets)
    is_score = isinstance(outputs, torch.Tensor) and (outputs.dim() == 1 or outputs.shape[1:] == (1,))
    if is_score and targets.numel() == outputs.numel():
        targets = targets.reshape(outputs.shape)  # [B, 1] minus [B] in a squared error would be [B, B]
    try:
        return criterion(outputs, targets)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        fitted = fit_labels(outputs, targets)
        if fitted.dim() == 2 and not fitted.is_floating_point():
            fitted = fitted.to(outputs.dtype)  # one-hot rows of integers
        if fitted.shape == targets.shape and fitted.dtype == targets.dtype:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the criterion does not take outputs {list(outputs.shape)} with labels {list(targets.shape)}: {reason}"
                f"{hint}"
            ) from error
    return loss_of(criterion, outputs, fitted)


# ---------------------------------------------------------------------------------------------------------------------
# The loaders of a data set


def four_loaders(test_set, val_set, train_set, train_val_set, args):
    """`test_loader, val_loader, train_loader, train_val_loader` for data sets whose `__getitems__` returns a batch.

    Only the training loader shuffles. Its workers start anew with every epoch, so that its augmentation depends on the
    loader's generator alone: a training that is resumed (`finetuning.state`) sees the same images. The attributes of
    `args`, with their defaults, are batch_size 128, test_batch_size 100, num_workers 0 and seed 0.
    """
    workers, seed = getattr(args, "num_workers", 0), getattr(args, "seed", 0)
    batch_size, test_batch_size = getattr(args, "batch_size", 128), getattr(args, "test_batch_size", 100)

    def loader(dataset, size, shuffle=False):
        return DataLoader(
            dataset,
            size,
            shuffle=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0 and not shuffle,
            collate_fn=already_a_batch,
            generator=torch.Generator().manual_seed(
                seed
            ),  # one per loader, so that a pass over one does not affect another
        )

    return (
        loader(test_set, test_batch_size),
        loader(val_set, test_batch_size),
        loader(train_set, batch_size, shuffle=True),
        loader(train_val_set, batch_size),
    )


def already_a_batch(batch):
    """`collate_fn` for a data set whose `__getitems__` returns whole batches."""
    return batch


def check_some_train(count, args):
    """Raise ValueError if --val_share leaves no image to train on."""
    if not count:
        raise ValueError(f"--val_share {args.val_share} leaves no image to train on, make it smaller")
