"""Spikes and spike counts in little memory, for the images of a correction: one bit a spike, one byte a count."""

import numpy as np
import torch

from spike_tensor import SpikeTensor


class PackedCounts:
    """A SpikeTensor of spike counts up to `MOST_IN_A_BYTE`, one byte each; `unpack` restores it."""

    def __init__(self, spikes):
        self.timesteps, self.scale_factor, self.dtype = spikes.timesteps, spikes.scale_factor, spikes.data.dtype
        self.bytes = spikes.data.to(torch.uint8)

    def unpack(self):
        """The SpikeTensor that was packed."""
        return SpikeTensor.like(self.bytes.to(self.dtype), self.timesteps, self.scale_factor)


class PackedSpikes:
    """A SpikeTensor of 0 and 1, stored with one bit per spike; `unpack` restores it with the same memory order."""

    def __init__(self, spikes):
        self.timesteps, self.scale_factor, data = spikes.timesteps, spikes.scale_factor, spikes.data
        self.is_channels_last = data.dim() == 4 and data.is_contiguous(memory_format=torch.channels_last)
        data = data.permute(0, 2, 3, 1) if self.is_channels_last else data
        self.shape, self.dtype = data.shape, data.dtype
        self.bits = np.packbits(data.to(torch.uint8).numpy())

    def unpack(self):
        """The SpikeTensor that was packed."""
        bits = np.unpackbits(self.bits, count=self.shape.numel())
        data = torch.from_numpy(bits).view(self.shape).to(self.dtype)
        data = data.permute(0, 3, 1, 2) if self.is_channels_last else data
        return SpikeTensor.like(data, self.timesteps, self.scale_factor)
