"""Layers that only rearrange values: traced, on spikes and currents, saved, and as parts of public networks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Function,
    assert_every_spike_is_reproduced,
    conv,
    convert,
    spikes_and_first_currents,
    with_statistics,
)
from reference import simulate
from torch import nn
from tracing import after_conv, trace_and_compare

from ann_parser import parse_ann_model
from spike_dag import from_dict, load_dag
from spike_layers import ConcatOp, IndexOp, PermuteOp, SliceOp, SpikePad, SpikeReLU, ViewOp
from spike_tensor import SpikeTensor
from transformer.saved import load_saved_snn, replay, write_saved_snn

# how it is written -> the ops that it becomes
WRITTEN = {
    "x[:, :2]": (lambda x: x[:, :2], [SliceOp]),
    "x[:, -1:]": (lambda x: x[:, -1:], [SliceOp]),
    "x[:, ::3, 1:8:2]": (lambda x: x[:, ::3, 1:8:2], [SliceOp]),
    "x[..., ::2, 1::2]": (lambda x: x[..., ::2, 1::2], [SliceOp]),
    "x[:, :, 1:-1, -3:]": (lambda x: x[:, :, 1:-1, -3:], [SliceOp]),
    "x[:]": (lambda x: x[:] + x[...], ["SpikeAdd"]),
    "x[:, 1]": (lambda x: x[:, 1], [SliceOp, ViewOp]),
    "x[:, -1, None]": (lambda x: x[:, -1, None], [SliceOp, ViewOp]),
    "x[:, None]": (lambda x: x[:, None], [ViewOp]),
    "x[:, tensor(1)]": (lambda x: x[:, torch.tensor(1)], [SliceOp, ViewOp]),
    "x[..., 1, 2:5, None]": (lambda x: x[..., 1, 2:5, None], [SliceOp, ViewOp]),
    "x[:, [2, 0, 1]]": (lambda x: x[:, [2, 0, 1]], [IndexOp]),
    "x[:, 1:3, [-1, 0]]": (lambda x: x[:, 1:3, [-1, 0]], [SliceOp, IndexOp]),
    "x[:, mask]": (lambda x: x[:, torch.tensor([True, False, True, True])], [IndexOp]),
    "narrow": (lambda x: x.narrow(1, 1, 2), [SliceOp]),
    "narrow from the end": (lambda x: torch.narrow(x, 2, -3, 2), [SliceOp]),
    "select": (lambda x: x.select(1, -1), [SliceOp, ViewOp]),
    "index_select": (lambda x: x.index_select(1, torch.tensor([3, 3, 0])), [IndexOp]),
    "chunk": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), [SliceOp, SliceOp, ConcatOp]),
    "a part of a split": (lambda x: torch.split(x, [1, 3], dim=1)[1], [SliceOp]),
    "split_with_sizes": (lambda x: x.split_with_sizes([1, 3], 1)[0], [SliceOp]),
    "tensor_split": (lambda x: x.tensor_split(3, 1)[0], [SliceOp]),
    "unbind": (lambda x: x.unbind(2)[3], [SliceOp, ViewOp]),
    "stack": (lambda x: torch.stack([x, x], 2).flatten(1, 2), [ViewOp, ViewOp, ConcatOp, ViewOp]),
    "pad of channels": (lambda x: F.pad(x, (1, 2, 0, -1, 2, 0)), [SpikePad]),
    "pad of features": (lambda x: F.pad(x.flatten(1), (3, 4)), [ViewOp, SpikePad]),
    "pad of rows": (lambda x: F.pad(x.flatten(2), (3, 4, 1, 1)), [ViewOp, SpikePad]),
    "ZeroPad2d": (nn.ZeroPad2d((1, 2, 0, 3)), [SpikePad]),
    "zeros beside channels": (
        lambda x: torch.cat([x.new_zeros(len(x), 1, 8, 8), x, torch.zeros_like(x)], 1),
        [SpikePad],
    ),
    "zeros between channels": (lambda x: torch.cat([x, torch.zeros_like(x), x], 1), [SpikePad, ConcatOp]),
    "permute": (lambda x: x.permute(0, 2, 3, 1), [PermuteOp]),
    "permute and flatten": (lambda x: x.permute(0, 2, 3, 1).reshape(len(x), -1), [PermuteOp, ViewOp]),
    "permute of nothing": (lambda x: x.permute(0, 1, 2, 3) + x, ["SpikeAdd"]),
    "transpose and swapaxes": (lambda x: x.transpose(1, 2).swapaxes(-1, -2), [PermuteOp, PermuteOp]),
    "movedim": (lambda x: torch.movedim(x, 1, -1), [PermuteOp]),
    "mT": (lambda x: x.mT, [PermuteOp]),
    "flip": (lambda x: x.flip(1, 3), [SliceOp]),
    "flip by name": (lambda x: torch.flip(x, dims=[-1]), [SliceOp]),
    "fliplr": (lambda x: torch.fliplr(x), [SliceOp]),
    "roll": (lambda x: x.roll((1, -2), (1, 3)), [IndexOp, IndexOp]),
    "repeat": (lambda x: x.repeat(1, 2, 1, 3), [IndexOp, IndexOp]),
    "tile": (lambda x: torch.tile(x, (1, 2, 1, 1)), [IndexOp]),
    "expand": (lambda x: x[:, :1].expand(-1, 5, -1, -1), [SliceOp, IndexOp]),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=2), [IndexOp]),
    "shuffle of views": (
        lambda x: x.view(len(x), 2, 2, 8, 8).transpose(1, 2).contiguous().view(len(x), -1, 8, 8),
        [ViewOp, PermuteOp, ViewOp],
    ),
    "ChannelShuffle": (nn.ChannelShuffle(2), [PermuteOp]),
    "PixelShuffle": (nn.PixelShuffle(2), [PermuteOp]),
    "PixelUnshuffle": (nn.PixelUnshuffle(2), [PermuteOp]),
    "parts changed in place": (
        lambda x: torch.cat([F.relu_(part) if i else part for i, part in enumerate(x.chunk(2, 1))], 1),
        [SliceOp, SliceOp, SpikeReLU, ConcatOp],
    ),
}


@pytest.mark.parametrize("function, ops", WRITTEN.values(), ids=WRITTEN)
def test_rearrangement_is_traced(function, ops):
    dag = trace_and_compare(after_conv(function))
    names = [op if isinstance(op, str) else op.__name__ for op in ops]
    assert [type(entry.op).__name__ for entry in dag.ops.values()][1:] == names


def test_a_whole_that_is_changed_through_its_part_is_refused():
    def function(x):
        F.relu_(x[:, :2])
        return x + x

    with pytest.raises(NotImplementedError, match="shares its memory"):
        parse_ann_model(after_conv(function), (torch.randn(2, 3, 8, 8),))


def test_slices_from_an_edge_take_images_of_any_size():
    x = torch.randn(2, 3, 12, 10)
    for function in (lambda x: x[:, :, ::2, 1::2], lambda x: x[:, :, 1:-1], nn.PixelUnshuffle(2), lambda x: x.flip(2)):
        net = after_conv(function)
        dag = parse_ann_model(net, (torch.randn(2, 3, 8, 8),))
        assert torch.allclose(dag(x), net(x), atol=1e-6)


@pytest.mark.parametrize("function", [lambda x: x[:, :, :4], lambda x: x.chunk(2, 3)[0], lambda x: x.roll(1, 2)])
def test_places_that_belong_to_the_traced_size_refuse_another(function):
    dag = parse_ann_model(after_conv(function), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(ValueError, match=r"(slice1|select1) .* for an extent of 8 and get 12"):
        dag(torch.randn(2, 3, 12, 12))


def option_a(self, x):
    """The shortcut of the CIFAR ResNets with option A, and one written with torch.cat."""
    x = F.relu(self.norm0(self.first(x)))  # [B, 4, 8, 8]
    y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
    x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))  # [B, 8, 4, 4]
    y, short = self.conv3(x), x[..., 1::2, 1::2]
    x = F.relu(torch.cat([torch.zeros_like(short), short], 1) + y)  # [B, 16, 2, 2]
    return self.fc(x.flatten(1))


def shuffled(self, x):
    """Half of the channels pass each block, as in ShuffleNet."""
    x = F.relu(self.first(x))
    for layer in (self.conv1, self.conv2):
        a, b = x.chunk(2, 1)
        x = torch.cat([a, F.relu(layer(b))], 1)
        x = x.view(len(x), 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
    x = F.avg_pool2d(F.channel_shuffle(x, 2), 2)
    return self.fc(x.permute(0, 2, 3, 1).flatten(1))


def rearranged_currents(self, x):
    """ReLUs behind slices, paddings and permutations of currents; values of either sign that are split by sign."""
    a, b, c = F.pixel_unshuffle(self.first(x), 2).split([4, 8, 4], 1)  # [B, 16, 4, 4] together
    x = F.relu(F.pad(b[:, [6, 0, 3, 3]], (1, 0, 0, 0, 0, 2))[..., :4])  # [B, 6, 4, 4]
    y = self.conv1(x)  # [B, 6, 4, 4]
    y = F.relu(y.flip(1, 2) + x)
    z = F.relu(torch.cat([a, c.mT, self.conv2(y).roll(1, 1)], 1).transpose(1, 3))
    return self.fc(z.transpose(1, 3).flatten(1))


def focus(self, x):
    """The slices of the image of YOLOv5, a pyramid that is taken apart and put together, halves of the rows."""
    x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
    x = F.relu(self.first(x))  # [B, 4, 4, 4]
    top, bottom = F.max_pool2d(self.conv1(x).relu(), 2).unbind(2)
    x = torch.stack([bottom, top], 2).repeat(1, 1, 2, 2)  # [B, 4, 4, 4]
    x = torch.cat([x[:, :, :, 3:], x[:, :, :, :3]], 3)
    return self.fc(self.conv2(x).relu().flatten(1))


def layers_of(name):
    if name == "option_a":
        return dict(
            first=conv(3, 4, bias=False), norm0=nn.BatchNorm2d(4), conv1=conv(4, 8, stride=2), norm1=nn.BatchNorm2d(8),
            conv2=conv(8, 8), norm2=nn.BatchNorm2d(8), conv3=conv(8, 16, stride=2), fc=nn.Linear(64, 3),
        )  # fmt: skip
    if name == "shuffled":
        return dict(first=conv(3, 4), conv1=conv(2, 2), conv2=conv(2, 2), fc=nn.Linear(64, 3))
    if name == "currents":
        return dict(first=conv(3, 4), conv1=conv(6, 6), conv2=conv(6, 4), fc=nn.Linear(192, 3))
    return dict(first=conv(12, 4), conv1=conv(4, 4), conv2=conv(4, 4), fc=nn.Linear(64, 3))


NETS = {"option_a": option_a, "shuffled": shuffled, "currents": rearranged_currents, "focus": focus}
CHOICES = dict(maxpool="gate", signed="pair")


def small_net(name):
    torch.manual_seed(2)
    net = with_statistics(Function(NETS[name], **layers_of(name)), seed=2)
    return net, torch.rand(8, 3, 8, 8)


@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", NETS)
def test_every_spike_of_rearranged_values(name, reset_mode):
    net, images = small_net(name)
    for bits, per_channel in ((1, "none"), (4, "weights"), (8, "both")):
        snn = convert(net, images, 16, bits, per_channel=per_channel, reset_mode=reset_mode, **CHOICES)
        for timesteps in (1, 15, 16):
            assert_every_spike_is_reproduced(snn, images[:3], timesteps)


@pytest.mark.parametrize("listen", [3, 16])
@pytest.mark.parametrize("name", NETS)
def test_every_spike_of_listening_layers(name, listen):
    net, images = small_net(name)
    snn = convert(net, images, 16, 8, listen=listen, **CHOICES)
    trains, currents = spikes_and_first_currents(snn, images[:3], 16)
    expected = simulate(snn, currents, 16)
    assert all(np.array_equal(trains[name], expected[name]) and trains[name].any() for name in snn.spiking_layers())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("per_channel", ["none", "both"])
def test_float_weights_at_many_timesteps_are_the_ann(name, per_channel):
    net, images = small_net(name)
    snn = convert(net, images, 1024, 32, threshold="max", per_channel=per_channel, **CHOICES)
    expected = net(images)
    assert (snn(images) - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("avgpool", ["spike", "fold"])
@pytest.mark.parametrize("name", NETS)
def test_eight_bits_follow_the_ann(name, avgpool):
    net, images = small_net(name)
    snn = convert(net, images, 256, 8, threshold="max", per_channel="weights", avgpool=avgpool, **CHOICES)
    assert_every_spike_is_reproduced(snn, images[:2], 16)
    with torch.no_grad():
        assert torch.corrcoef(torch.stack([snn(images).flatten(), net(images).flatten()]))[0, 1] >= 0.99


@pytest.mark.parametrize("name", NETS)
def test_both_engines_and_any_memory_agree(name):
    net, images = small_net(name)
    snn = convert(net, images, **CHOICES)
    expected = snn(images)
    snn.set_engine("auto", memory_budget=2**14)
    assert torch.allclose(snn(images), expected, atol=1e-5)  # the last layer sums floats
    snn.set_engine("reference")
    assert torch.allclose(snn(images), expected, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_saved_networks_load_and_replay(name, tmp_path):
    net, images = small_net(name)
    snn = convert(net, images, **CHOICES)
    torch.save(snn, tmp_path / "snn.pth")
    assert torch.equal(load_dag(tmp_path / "snn.pth")(images), snn(images))
    write_saved_snn(tmp_path / "saved", snn, (images,), {})
    assert replay(tmp_path / "saved").startswith("identical: ")
    assert torch.equal(load_saved_snn(tmp_path / "saved")(images), snn(images))
