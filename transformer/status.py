"""The inputs that SNNTransformer keeps for its calibration."""

import torch
from torch.utils._pytree import tree_map

from transformer.stretch import tensors_in

MOST_STATUS_BYTES = 2**28  # 256 MiB: 1,000 inputs of 224x224 RGB pixels would take 574 MiB of a GPU's memory


class Status:
    """The newest inputs of a network: as many samples as the calibration needs, within `MOST_STATUS_BYTES`.

    calls: `args, kwargs` of each call that is kept, oldest first. sizes: its samples and bytes.
    """

    def __init__(self, samples):
        self.samples, self.calls, self.sizes = samples, [], []

    def keep(self, args, kwargs):
        """Keep a copy of the arguments of another call; drop the oldest calls that are no longer needed."""

        def copy_of_tensor(value):
            return value.detach().clone() if isinstance(value, torch.Tensor) else value

        args, kwargs = tree_map(copy_of_tensor, (args, kwargs))
        self.calls.append((args, kwargs))
        self.sizes.append(size_of((args, kwargs)))
        while len(self.calls) > 1 and not self.needs_oldest():
            del self.calls[0], self.sizes[0]

    def needs_oldest(self):
        """Whether the later calls have too few samples, and all calls together are within the memory bound."""
        samples, memory = (sum(column) for column in zip(*self.sizes))
        return samples - self.sizes[0][0] < self.samples and memory <= MOST_STATUS_BYTES


def size_of(arguments):
    """`samples, bytes` of a call's arguments; the first dimension of the first tensor is the batch."""
    tensors = tensors_in(arguments)
    memory = sum(x.numel() * x.element_size() for x in tensors)
    return (len(tensors[0]) if tensors and tensors[0].dim() else 1), memory


def first_samples(calls, samples):
    """The first `samples` inputs of the stretch over several calls, as a list of tensors [samples, ...]; or fewer.

    calls: a tuple of tensors [B, ...] each. Calls whose samples differ in shape from those of the first are left out.
    """
    shapes = [x.shape[1:] for x in calls[0]]
    alike = [inputs for inputs in calls if [x.shape[1:] for x in inputs] == shapes]
    return [torch.cat(columns)[:samples] for columns in zip(*alike)]
