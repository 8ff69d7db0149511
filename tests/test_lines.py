"""Layers of one dimension: the graph against PyTorch, every spike against the reference."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_every_spike_is_reproduced, convert, with_statistics
from torch import nn
from tracing import Call, iadd, trace_and_compare

from ann_parser import parse_ann_model
from dag_rewrites import equalize_channels
from spike_dag import load_dag
from transformer.saved import load_saved_snn, replay, write_saved_snn

TRACED = {
    "Conv1d": (nn.Conv1d(4, 6, 3, 2, 1, 2, 2), ["conv2", "view2"]),
    "same padding": (nn.Conv1d(4, 4, 4, padding="same", dilation=2), ["conv2", "view2"]),
    "conv1d": (lambda x: F.conv1d(x, torch.ones(2, 4, 3), torch.ones(2), 2), ["conv2", "view2"]),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), ["conv_transpose1", "view2"]),
    "BatchNorm1d": (nn.BatchNorm1d(4), ["batch_norm1", "view2"]),
    "ReLU, in place": (nn.ReLU(inplace=True), ["relu1", "view2"]),
    "adds in place": (iadd, ["relu1", "add1", "add2", "view2"]),
    "contiguous": (lambda x: F.relu(x.contiguous()), ["relu1", "view2"]),
    "AvgPool1d": (nn.AvgPool1d(2), ["avg_pool1", "view2"]),
    "AvgPool1d, parts": (nn.AvgPool1d(3, 2, 1, True, False), ["gather1", "avg_pool1", "view2"]),
    "MaxPool1d": (nn.MaxPool1d(3, 2, 1, ceil_mode=True), ["max_pool1", "view2"]),
    "torch.max_pool1d": (lambda x: torch.max_pool1d(x, 2), ["max_pool1", "view2"]),
    "AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(2), ["avg_pool1", "view2"]),
    "AdaptiveAvgPool1d, uneven": (nn.AdaptiveAvgPool1d(3), ["gather1", "avg_pool1", "view2"]),
    "AdaptiveMaxPool1d": (nn.AdaptiveMaxPool1d(4), ["max_pool1", "view2"]),
    "ZeroPad1d": (nn.ZeroPad1d((1, 2)), ["pad1", "view2"]),
    "ReflectionPad1d": (nn.ReflectionPad1d((1, 2)), ["gather1", "view2"]),
    "conv of circular lines": (nn.Conv1d(4, 2, 3, padding=1, padding_mode="circular"), ["gather1", "conv2", "view2"]),
    "Upsample": (nn.Upsample(scale_factor=2), ["upsample1", "view2"]),
    "Upsample to a size": (nn.Upsample(20), ["gather1", "view2"]),
    "Upsample, linear": (nn.Upsample(scale_factor=2, mode="linear"), ["gather1", "avg_pool1", "view2"]),
    "mean": (lambda x: x.mean(-1), ["avg_pool1", "view2"]),
    "mean, kept": (lambda x: x.mean(2, keepdim=True), ["avg_pool1", "view2"]),
    "mean of means": (
        lambda x: x.unflatten(2, (2, 4)).mean(-1).mean(-1),
        ["view2", "avg_pool1", "view3", "view4", "avg_pool2", "view5"],
    ),
    "sum": (lambda x: x.sum(axis=2), ["avg_pool1", "view2"]),
    "amax": (lambda x: x.amax(-1), ["max_pool1", "view2"]),
    "cat of channels": (lambda x: torch.cat([x, x.relu()], 1), ["relu1", "concat1", "view2"]),
    "cat of lengths": (lambda x: torch.cat([x, x], 2), ["view2", "concat1"]),
    "flatten": (nn.Flatten(), ["view2"]),
    "unsqueeze": (lambda x: x.unsqueeze(2), ["view2"]),
    "softmax": (nn.Softmax(1), ["view2", "softmax1"]),
}


@pytest.mark.parametrize("layer, ops", TRACED.values(), ids=TRACED)
def test_function_is_traced(layer, ops):
    net = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), layer if isinstance(layer, nn.Module) else Call(layer))
    trace_and_compare(net, (3, 8))
    assert list(parse_ann_model(net, (torch.rand(2, 3, 8),), fold=False).ops) == ["view1", "conv1", *ops]


REFUSED = {
    "a map": (nn.Sequential(nn.Unflatten(2, (2, 4)), Call(lambda x: F.avg_pool1d(x, 2))), "avg_pool1d", "[B, C, L]"),
    "padded with ones": (nn.ConstantPad1d(1, 1.0), "pad", "only zeros and copies"),
    "indices": (nn.MaxPool1d(2, return_indices=True), "max_pool1d", "indices of the maxima"),
    "mean over channels": (lambda x: x.mean(1), "mean", "only over height and width"),
    "weights of the input": (lambda x: F.conv1d(x, x), "conv1d", "must not be computed from the input"),
    "LPPool1d": (nn.LPPool1d(2, 2), "lp_pool1d", "no powers of its input"),
}


@pytest.mark.parametrize("layer, function, advice", REFUSED.values(), ids=REFUSED)
def test_function_is_refused_by_its_own_name(layer, function, advice):
    net = nn.Sequential(nn.Conv1d(3, 4, 1), layer if isinstance(layer, nn.Module) else Call(layer))
    with pytest.raises(NotImplementedError) as caught:
        parse_ann_model(net, (torch.rand(2, 3, 8),))
    assert [part for part in (function, " in 1", advice) if part not in str(caught.value)] == []


def test_a_line_read_after_a_change_in_place_is_refused():
    net = nn.Sequential(nn.Conv1d(3, 4, 1), Call(lambda x: [x.view(-1, 4, 8), x.relu_()][0].relu()))
    with pytest.raises(NotImplementedError, match="shares its memory"):
        parse_ann_model(net, (torch.rand(2, 3, 8),))


def test_frozen_weights_stay_frozen():
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 3))
    for parameter in net[:2].parameters():
        parameter.requires_grad_(False)
    dag = parse_ann_model(net, (torch.rand(2, 3, 8),))
    assert dag.ops["conv1"].op.frozen == {"weight", "bias"} and not dag.ops["conv2"].op.frozen
    assert len(dag.trained_parameters()) == 2


class Sound(nn.Module):
    """What networks of sounds do: strided convolutions, blocks with a skip, branches, a global pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.norm0 = nn.Conv1d(2, 4, 5, 2, 2, bias=False), nn.BatchNorm1d(4)
        self.block = nn.Sequential(nn.Conv1d(4, 4, 3, padding=2, dilation=2), nn.BatchNorm1d(4), nn.ReLU())
        self.back, self.norm1 = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.wide, self.norm2 = nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)
        self.up, self.down = nn.ConvTranspose1d(6, 4, 3, 2), nn.Conv1d(4, 6, 2, 2)
        self.mix, self.fc1, self.fc2 = nn.Conv1d(10, 6, 1), nn.Linear(18, 7), nn.Linear(7, 3)

    def forward(self, x):  # [B, 2, 24]
        x = F.max_pool1d(F.relu(self.norm0(self.first(x))), 2)  # [B, 4, 6]
        x = F.relu(self.norm1(self.back(self.block(x))) + x)
        y = F.relu(self.norm2(self.wide(F.pad(x, (1, 1)))))  # [B, 6, 6]
        y = F.relu(self.down(F.avg_pool1d(F.relu(self.up(y)), 2)))  # [B, 6, 3]
        x = torch.cat([F.avg_pool1d(x, 2), y], 1)  # [B, 10, 3]
        x = F.interpolate(F.relu(self.mix(x)), scale_factor=2)  # [B, 6, 6]
        x = F.adaptive_avg_pool1d(x, 3)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Preactivated(nn.Module):
    """BatchNorms before ReLUs, of spikes and of the image's own current, and a mean over the length."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):  # [B, 2, 24]
        x = self.first(x)
        x = x + self.convs[1](F.relu(self.norms[1](self.convs[0](F.relu(self.norms[0](x))))))
        return self.fc2(F.relu(self.fc1(F.relu(self.norms[2](x)).mean(-1))))


class Lengths(nn.Module):
    """Lines that are joined along the length, which layers of maps do not read as they are."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(2, 4, 5, padding=2)
        self.behind, self.fc = nn.Conv1d(4, 6, 3, 2), nn.Linear(6, 3)

    def forward(self, x):  # [B, 2, 24]
        x = torch.cat([self.left(x), self.right(x)], 2).relu()
        return self.fc(F.relu(self.behind(x)).amax(2))


NETWORKS = {"sound": Sound, "preactivated": Preactivated, "lengths": Lengths}


def few(name):
    """A network of lines, and lines of [2, 24]."""
    torch.manual_seed(2)
    return with_statistics(NETWORKS[name]()), torch.rand(8, 2, 24)


@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_spike(name, reset_mode):
    net, lines = few(name)
    for bits, avgpool, granularity in ((1, "spike", "layer"), (4, "fold", "layer"), (8, "spike", "channel")):
        if name == "lengths" and granularity == "channel":
            continue  # the scales of a channel may differ along the length, which is refused
        options = dict(reset_mode=reset_mode, avgpool=avgpool, granularity=granularity, maxpool="gate")
        snn = convert(net, lines, 16, bits, **options)
        for timesteps in (1, 15, 16):
            assert_every_spike_is_reproduced(snn, lines[:3], timesteps)


@pytest.mark.parametrize("name", NETWORKS)
def test_float_weights_at_many_timesteps_are_the_ann(name):
    net, lines = few(name)
    expected = net(lines)
    assert (trace_and_compare(net, (2, 24))(lines) - expected).abs().max() <= 1e-5
    snn = convert(net, lines, 1024, 32, maxpool="gate", threshold="max")
    assert (snn(lines) - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_networks_are_the_same(name, tmp_path):
    net, lines = few(name)
    snn = convert(net, lines, maxpool="or", listen=2)
    torch.save(snn, tmp_path / "snn.pth")
    assert torch.equal(load_dag(tmp_path / "snn.pth")(lines), snn(lines))
    write_saved_snn(tmp_path / "saved", snn, (lines,), {})
    assert replay(tmp_path / "saved").startswith("identical: ")
    assert torch.equal(load_saved_snn(tmp_path / "saved")(lines), snn(lines))


def test_batch_norms_of_lines_fold_as_those_of_maps():
    net, lines = few("sound")
    dag = parse_ann_model(net, (lines,))
    assert [name for name in dag.ops if name.startswith("batch_norm")] == []
    assert [name for name in dag.ops if name.startswith("view")] == ["view1", "view2"]  # the input's, and flatten
    equal = equalize_channels(dag)
    assert torch.allclose(equal(lines), net(lines), atol=1e-4)
    assert not torch.equal(equal.ops["conv2"].op.weight, dag.ops["conv2"].op.weight)


def test_features_are_no_lines():
    net = with_statistics(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    assert list(trace_and_compare(net, (8,)).ops) == ["linear1", "relu1", "linear2"]


def test_another_length_is_refused():
    net, lines = few("sound")
    with pytest.raises(ValueError, match=r"gets \[2, 30\]: give images of the size"):
        parse_ann_model(net, (lines,))(torch.rand(2, 2, 30))
