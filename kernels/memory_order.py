"""Tensors in the order in which they lie in memory, channels last where there are channels and space."""

import torch


def order(tensor):
    """Channels last where there are channels and space."""
    return torch.channels_last if tensor.dim() == 4 else torch.contiguous_format


def flat(tensor, like, steps):
    """A tensor as [steps, N], in the memory order of `like`; no copy where it is in that order."""
    if not tensor.numel():
        return tensor.reshape(0, 0)
    tensor = tensor.contiguous(memory_format=order(like))
    if like.dim() == 4:
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(steps, -1)


def per_neuron(values, like):
    """Values broadcastable to a sample of `like`, as float32 in memory order; they repeat over the neurons."""
    values, shape = values.to(like.device, torch.float32), like.shape[1:]
    is_per_channel = values.dim() == len(shape) == 3 and values.numel() == len(values)
    if values.numel() > 1 and not is_per_channel:
        values = values.expand(shape)
        values = values.permute(1, 2, 0) if values.dim() == 3 else values
    return values.flatten().contiguous()


def is_channels_last(steps):
    """Whether steps [T, B, C, H, W] lie in memory as [T, B, H, W, C]."""
    return steps.dim() == 5 and steps[0].is_contiguous(memory_format=torch.channels_last)


def in_memory_order(steps, last):
    """Steps [T, B, ...], or with channels `last` [T, B, H, W, C], without gaps."""
    return (steps.movedim(2, -1) if last else steps).contiguous()


def in_usual_order(steps, last):
    """The inverse of `in_memory_order`, without a copy."""
    return steps.movedim(-1, 2) if last else steps


def each_neuron(values, sample, last):
    """Values broadcastable to a sample's shape, as one for every neuron in memory order: float32 [N]."""
    values = values.to(torch.float32).expand(sample)
    return (values.movedim(0, -1) if last else values).flatten().contiguous()
