"""What a data loader may yield, in one place: inputs with labels, with more beside them, by name, or inputs alone.

inputs, labels = split_batch(batch)         # (tensor, ...), labels or None
loader = reusable(loader)                   # of a stream that runs once, what it yields
"""

from collections.abc import Iterator, Mapping

import torch

INPUT_KEYS = ("image", "images", "img", "pixel_values", "input", "inputs", "x", "data")
LABEL_KEYS = ("label", "labels", "target", "targets", "y", "class")
FORMS = "(inputs, labels), (inputs, labels, ...), a dict with 'image' and 'label', or inputs alone"


def split_batch(batch):
    """`inputs, labels` of a batch: a tuple of tensors [B, ...], and what stands for labels, None where nothing does.

    batch: a tensor; a tuple or list of inputs, labels and anything else; or a mapping with one of `INPUT_KEYS` and of
    `LABEL_KEYS`. The inputs of a network with several are a tuple or list. Raises ValueError for another form.
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
    """The entry of a mapping under the first of `keys` that it has, else None."""
    return next((batch[key] for key in keys if key in batch and batch[key] is not None), None)


def in_words(batch):
    """What a batch is, for messages: its type, and the keys or types inside."""
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(repr, list(batch)[:6])) or 'nothing in it'}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(item).__name__ for item in batch[:6]) or 'nothing'}"
    return f"a {type(batch).__name__}"


def labelled_batch(batch, device, dtype=torch.float32):
    """`inputs, labels` of a batch on a device, the inputs in `dtype`.

    Raises ValueError where it has no labels, or not one for each input.
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
    """The first `most` samples of every input on a device, in `dtype`.

    Raises ValueError for whole numbers: how they are scaled, only the network's training knows.
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
    """The type of a network's parameters, float32 of one without."""
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


def memory_format(inputs):
    """Channels last where there are channels: the convolutions are faster on it."""
    return torch.channels_last if inputs.dim() == 4 else torch.preserve_format


def first_batch(loader):
    """The first batch, of one sample or more, of a loader. Raises ValueError where there is none."""
    for batch in batches_of(loader):
        return batch
    raise ValueError("the data loader is empty, give it at least one batch")


def batches_of(loader):
    """The batches of a loader but empty ones, as a filter leaves them."""
    return (batch for batch in loader if len(split_batch(batch)[0][0]))


def reusable(loader, samples=None):
    """The loader itself, or a list of what one that may run only once yields, of `samples` inputs at least.

    Such are iterators, and where `samples` are enough, for which nothing is drawn anew, loaders without a length.
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
    """Batches of a pass over a loader, also of one without a length."""
    return len(loader) if has_length(loader) else sum(1 for _ in loader)


def has_length(loader):
    """Whether a loader knows how many batches it has: one over a stream of data does not."""
    try:
        return len(loader) >= 0
    except TypeError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Labels and what a network returns


def first_output(outputs):
    """The output that is measured: of several the first."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def fit_labels(outputs, targets):
    """The labels in the form that belongs to outputs [B, C]: classes [B], or shares [B, C]; as outputs of one score.

    Raises ValueError that names both shapes where they do not fit.
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
    """The loss, of the labels as they come, or else in the form that belongs to the outputs (`fit_labels`).

    Of several outputs the criterion gets all, or the first where it takes no tuple. Raises ValueError that names both
    shapes where it takes neither.
    """
    if isinstance(outputs, (tuple, list)):
        try:
            return criterion(outputs, targets)
        except (TypeError, AttributeError):  # what torch's losses say of a tuple
            outputs = first_output(outputs)
    is_score = isinstance(outputs, torch.Tensor) and (outputs.dim() == 1 or outputs.shape[1:] == (1,))
    if is_score and targets.numel() == outputs.numel():
        targets = targets.reshape(outputs.shape)  # a squared error of [B, 1] and [B] would be one of [B, B]
    try:
        return criterion(outputs, targets)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        fitted = fit_labels(outputs, targets)
        if fitted.dim() == 2 and not fitted.is_floating_point():
            fitted = fitted.to(outputs.dtype)  # a row of whole numbers that says one class
        if fitted.shape == targets.shape and fitted.dtype == targets.dtype:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the criterion does not take outputs {list(outputs.shape)} with labels {list(targets.shape)}: {reason}"
            ) from error
    return loss_of(criterion, outputs, fitted)
