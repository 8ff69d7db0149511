"""Layers that only rearrange values: traced, on spikes and currents, saved, and as parts of public networks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import (
    Function,
    assert_every_spike_is_reproduced,
    conv,
    convert,
    slow,
    spikes_and_first_currents,
    with_statistics,
)
from reference import simulate
from torch import nn
from tracing import after_conv, trace_and_compare

from ann_parser import parse_ann_model
from conversion.plan import plan_conversion
from dag_rewrites import prepare_conversion
from hw_constraints import hardware_layers
from spike_dag import from_dict, load_dag
from spike_layers import SPIKES, ConcatOp, IndexOp, PermuteOp, SliceOp, SpikePad, SpikeReLU, ViewOp
from spike_tensor import SpikeTensor
from transformer.saved import load_saved_snn, replay, write_saved_snn
from transformer.stretch import cut_out

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


@pytest.mark.parametrize("reset_mode", ["subtraction", slow("zero")])
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


def spikes_of(shape, scale):
    data = torch.randint(0, 2, (4 * 2, *shape), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return SpikeTensor.like(data, 4, scale)


# ops on [B, 6, 4, 8], and whether channels stay last in memory
IN_MEMORY = {
    "slice": (SliceOp([(1, None, 2, None), (None, None, 1, None), (None, None, -1, None)]), True),
    "padding": (SpikePad([1, 0, 0, 2, 3, 1]), True),
    "places": (IndexOp(1, 6, [5, 0, 0, 2]), True),
    "places of rows": (IndexOp(2, 4, [3, 0]), True),
    "channel shuffle": (PermuteOp([2, 1, 3, 4], [(3, None), (None,), (None,)], [2, 1, 1]), True),
    "pixel unshuffle": (PermuteOp([1, 3, 5, 2, 4], [(None,), (None, 2), (None, 2)], [3, 1, 1]), True),
    "pixel shuffle": (PermuteOp([1, 4, 2, 5, 3], [(None, 3, 1), (None,), (None,)], [1, 2, 2]), True),
    "permutation": (PermuteOp([3, 1, 2]), False),
    "view": (ViewOp([2, 3, 4, 8]), False),
}


@pytest.mark.parametrize("op, stays_last", IN_MEMORY.values(), ids=IN_MEMORY)
@pytest.mark.parametrize("per_channel", [False, True])
def test_scales_follow_their_spikes(op, stays_last, per_channel):
    """A lambda per channel, rearranged, decodes rearranged spikes to the rearranged activations, exactly."""
    torch.manual_seed(0)
    spikes = spikes_of((6, 4, 8), torch.rand(6, 1, 1) + 0.5 if per_channel else 1.5)
    sent = op(spikes)
    assert torch.equal(sent.to_float(), op(spikes.to_float()))
    assert torch.equal(sent.data, op(spikes.data)) and sent.data.dtype == torch.uint8
    if stays_last:
        rows = sent.data.contiguous(memory_format=torch.channels_last)
        assert rows.stride() == sent.data.stride() or sent.data.stride(1) == 1 or isinstance(op, SliceOp)


def test_a_shuffle_of_views_keeps_channels_last():
    spikes = spikes_of((6, 4, 8), 1.0)
    apart, swapped, together = ViewOp([2, 3, 4, 8]), PermuteOp([2, 1, 3, 4]), ViewOp([6, 4, 8])
    shuffled = together(swapped(apart(spikes))).data
    assert shuffled.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(shuffled, F.channel_shuffle(spikes.data, 2))


def test_new_channels_get_the_lambda_beside_them():
    scale = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    assert SpikePad([0, 0, 0, 0, 2, 1]).carried(scale, (3, 4, 4)).flatten().tolist() == [1, 1, 1, 2, 3, 3]
    assert SpikePad([0, 0, 0, 0, -1, 1]).carried(scale, (3, 4, 4)).flatten().tolist() == [2, 3, 3]


WILD = {
    "slices": (SliceOp, [((0, None, 0, None),), ((1, None, -1, None),), ((None, None, 1, 0),), ((1, 2),), 3, ()]),
    "index": (IndexOp, [(0, 6), (-1,), (), (0.5,), "01"]),
    "dims": (PermuteOp, [(1, 1, 2), (0, 1, 2), (2, 3), (1, 2, 9)]),
    "split": (PermuteOp, [((None,), (None,)), ((None, None), (None,), (1,)), ((0,), (1,), (1,)), ((2,) * 9,)]),
    "merge": (PermuteOp, [(1, 1), (3, 1), (0, 3), (-1, 4)]),
    "pads": (SpikePad, [(1, 2, 3), (4096,) * 6, (5000, 0), (0.5, 0), ()]),
}
TAME = {
    SliceOp: {"slices": ((1, None, 2, None),)},
    IndexOp: {"dim": 1, "size": 6, "index": (1, 5)},
    PermuteOp: {"dims": (3, 1, 2), "split": ((None,),) * 3, "merge": (1, 1, 1)},
    SpikePad: {"pads": (0, 0, 0, 0, 1, 1)},
}


@pytest.mark.parametrize("field, kind, value", [(f, kind, value) for f, (kind, vs) in WILD.items() for value in vs])
def test_files_with_wild_places_are_refused(field, kind, value):
    dag = parse_ann_model(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU()), (torch.rand(1, 3, 4, 8),))
    dag.add_op("last1", kind(**TAME[kind]), ["relu1_out1"], ["last1_out1"])
    data = dag.to_dict()
    assert torch.equal(from_dict(data).relu1(torch.ones(1)), torch.ones(1))
    data["ops"][-1]["config"][field] = value
    with pytest.raises(ValueError, match=r"damaged network data: last1 (index|slices?|split|merge|pads|dims) "):
        from_dict(data)


MIXING = {
    "spikes": lambda self, x: F.pixel_shuffle(F.relu(self.b(F.relu(self.a(x)))), 2),
    "currents": lambda self, x: F.relu(F.pixel_shuffle(self.b(F.relu(self.a(x))), 2)),
    "a sum": lambda self, x: F.max_pool2d(F.relu(self.b(F.relu(self.a(x))) + self.c(x)).transpose(1, 2), 2),
    "features": lambda self, x: F.relu(self.d(F.relu(self.b(F.relu(self.a(x)))).flatten(1))).unflatten(1, (2, 8, 8)),
}


@pytest.mark.parametrize("per_channel", ["none", "weights", "spikes", "both"])
@pytest.mark.parametrize("function", MIXING.values(), ids=MIXING)
def test_channels_that_become_one_share_one_scale(function, per_channel):
    torch.manual_seed(0)
    layers = dict(a=conv(3, 8), b=conv(8, 8), c=conv(3, 8), d=nn.Linear(512, 128))
    channels = function(Function(function, **layers), torch.rand(1, 3, 8, 8)).shape[1]
    net = nn.Sequential(Function(function, **layers), conv(channels, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net, images = nn.Sequential(*net, nn.Flatten(), nn.Linear(4, 3)), torch.rand(4, 3, 8, 8)
    snn = convert(net, images, 512, 8, per_channel=per_channel, threshold="max", maxpool="gate")
    assert_every_spike_is_reproduced(snn, images[:2], 16)
    with torch.no_grad():
        expected = net(images)
        assert (snn(images) - expected).abs().max() <= 0.03 * expected.abs().max()


def test_channels_of_different_scales_are_refused_where_they_become_one():
    def function(self, x):
        x = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        return self.fc(F.relu(self.c(F.pixel_shuffle(x, 2))).flatten(1))

    net = Function(function, a=conv(3, 2), b=conv(3, 2), c=conv(1, 2), fc=nn.Linear(512, 3))
    with pytest.raises(ValueError, match=r"conv3 \(c\) reads channels that hold values of different scales"):
        convert(net, torch.rand(4, 3, 8, 8), per_channel="both")


class OptionA(nn.Module):
    """A block of the public ResNet-20 for CIFAR: convolutions with BatchNorm, shortcut option A."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, bias=False), nn.BatchNorm2d(outputs)
        self.added = (outputs - inputs) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added), "constant", 0)
        return F.relu(y + x)


@pytest.mark.slow
def test_resnet20_with_option_a_folds_its_norms_and_converts():
    torch.manual_seed(0)
    sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    blocks = [OptionA(*size) for size in sizes]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    net = nn.Sequential(conv(3, 16, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks, *head)
    with torch.no_grad():
        net.train()(torch.rand(64, 3, 32, 32))  # statistics of its own
    net, images = net.eval(), torch.rand(4, 3, 32, 32)
    dag = parse_ann_model(net, (images[:1],))
    kinds = [type(entry.op).__name__ for entry in dag.ops.values()]
    assert kinds.count("SpikeConvBN") == 19 and "SpikeBatchNorm" not in kinds
    assert kinds.count("SliceOp") == kinds.count("SpikePad") == 2
    snn = convert(net, images, 8, 8, per_channel="both", threshold="mse")
    assert_every_spike_is_reproduced(snn, images[:1], 8)
    layers = hardware_layers(prepare_conversion(dag))
    assert [layer.role for layer in layers] == ["first", *["hidden"] * 18, "last", "last"]  # pooling, linear


def test_shufflenet_of_torchvision_traces_and_plans():
    net = torchvision.models.shufflenet_v2_x0_5().eval()
    dag = prepare_conversion(parse_ann_model(net, (torch.rand(1, 3, 64, 64),)), "gate", "pair")
    plan = plan_conversion(dag)
    moved = [entry.out for entry in dag.ops.values() if isinstance(entry.op, (SliceOp, PermuteOp))]
    assert {plan.kinds[node] for node in moved} == {SPIKES}
    assert len(plan.firing) == sum(entry.op.rectifies for entry in dag.ops.values())


def test_a_max_pooling_moves_behind_the_relu_of_its_channels():
    net = nn.Sequential(conv(3, 8), nn.MaxPool2d(2), nn.ChannelShuffle(2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    dag = prepare_conversion(parse_ann_model(net, (torch.rand(1, 3, 8, 8),)), "or")
    assert list(dag.ops) == ["conv1", "relu1", "max_pool1", "permute1", "view1", "linear1"]
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(dag(x), net(x))


def test_a_stretch_holds_slices_and_refuses_to_end_in_parts():
    net, images = small_net("shuffled")
    net = nn.Sequential(net, nn.Linear(3, 3))
    stretch, dag = cut_out(net, ["0"], (images,), {})
    assert [type(entry.op).__name__ for entry in dag.ops.values()].count("SliceOp") == 4
    assert stretch.num_inputs == 1
    ends = nn.Sequential(conv(3, 4), nn.ReLU(), Function(lambda self, x: x.chunk(2, 1)))
    net = Function(lambda self, x: torch.cat(self.inner(x), 1), inner=ends)
    with pytest.raises(NotImplementedError, match=r"ends in .*chunk, which returns several tensors"):
        cut_out(net, ["inner"], (images,), {})
