"""Views of tensors in their memory order, which is channels last for [B, C, H, W]."""

import torch


def order(tensor):
    """The memory format for a tensor: channels last for [B, C, H, W], else contiguous."""
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def flat(tensor, like, steps):
    """A tensor as [steps, N] in the memory order of `like`; copied only if its own order differs."""
    if not tensor.numel():
        return tensor.reshape(0, 0)
    tensor = tensor.contiguous(memory_format=order(like))
    if like.dim() == 4:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(steps, -1)


def per_neuron(values, like):
    """Values in memory order as float32 [n], where n divides the number of neurons: the kernel repeats them.

    values: broadcastable to a sample of `like`, [B, ...].
    """
    values, shape = values.to(like.device, torch.float32), like.shape[1:]
    is_per_channel = values.dim() == len(shape) == 3 and values.numel() == len(values)
    if values.numel() > 1 and not is_per_channel:
        values = values.expand(shape)
        values = values.permute(1, 2, 0) if values.dim() == 3 else values
    return values.flatten().contiguous()


def is_channels_last(steps):
    """Whether `steps` has the shape [T, B, C, H, W] and the memory order [T, B, H, W, C]."""
    return steps.dim() == 5 and steps[0].is_contiguous(memory_format=torch.channels_last)


def in_memory_order(steps, last):
    """Steps as a contiguous tensor [T, B, ...] or, with `last`, [T, B, H, W, C]."""
    return (steps.movedim(2, -1) if last else steps).contiguous()


def in_usual_order(steps, last):
    """The inverse of `in_memory_order`, as a view."""
    return steps.movedim(-1, 2) if last else steps


def each_neuron(values, sample, last):
    """One value per neuron in memory order, float32 [N].

    values: broadcastable to the shape `sample`. last: whether the memory order is channels last.
    """
    values = values.to(torch.float32).expand(sample)
    return (values.movedim(0, -1) if last else values).flatten().contiguous()
