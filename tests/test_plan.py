"""Which layers spike and which stay ANN, and the advice where a network cannot spike."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Function, conv, convert, sequential, with_statistics
from torch import nn
from tracing import Call, image, largest_difference

from ann_parser import parse_ann_model
from conversion.plan import plan_conversion
from snn_weight_setter import trans_ann2snn_weight
from spike_layers import SpikeReLU


def converted(net, x, **options):
    """The outputs of the spiking network with float weights after many steps, and the network's."""
    dag = parse_ann_model(net.eval(), (x[:1],))
    snn = trans_ann2snn_weight(dag, [(x, torch.zeros(len(x)))], "cpu", 256, 32, quantile=1.0, **options)
    with torch.no_grad():
        return snn(x), net(x)


def refusal_of(net, x, **options):
    with pytest.raises(ValueError) as caught:
        converted(net, x, **options)
    return str(caught.value)


@pytest.mark.parametrize("signed", [None, "pair"])
@pytest.mark.parametrize("between", [[], [nn.AvgPool2d(1), nn.ZeroPad2d(1)]], ids=["directly", "behind a padding"])
def test_a_pooling_of_signed_values_is_named_or_gets_pairs(signed, between):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), *between, nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU())
    if signed is None:
        refusal = refusal_of(net, image(8), maxpool="gate")
        assert "conv1 (0) has no ReLU behind it, and max_pool1 " in refusal and "--signed pair" in refusal
        net.insert(1, nn.ReLU())
    actual, expected = converted(net, image(8), signed=signed, maxpool="gate")
    assert largest_difference(actual, expected) < 0.05 * expected.abs().max()


def test_pairs_are_advised_where_they_help_and_not_where_they_are():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU())
    assert "--signed pair" in refusal_of(net, image(8))
    actual, expected = converted(net, image(8), signed="pair")
    assert largest_difference(actual, expected) < 0.05 * expected.abs().max()


@pytest.mark.parametrize("view", [nn.Flatten(), nn.AdaptiveAvgPool2d(3), nn.Unflatten(1, (2, 2))], ids=str)
def test_a_relu_behind_a_view_of_a_pooling_goes_before_both(view):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), view, nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    actual, expected = converted(net, image(8), maxpool="gate")
    assert largest_difference(actual, expected) < 0.05 * expected.abs().max()


class JoinsTheImage(nn.Module):
    """Features beside the image, which comes as it is or through `first`."""

    def __init__(self, first):
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 4, 3, padding=1), first
        self.last = nn.Sequential(nn.Conv2d(7, 4, 1), nn.ReLU())

    def forward(self, x):
        return self.last(torch.cat([F.relu(self.conv(x)), self.first(x)], 1))


def test_an_image_beside_features_needs_a_layer_of_its_own():
    x = image(8).abs()
    refusal = refusal_of(JoinsTheImage(nn.Identity()), x)
    assert "joins the image and spikes" in refusal and "every layer" not in refusal
    actual, expected = converted(JoinsTheImage(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), x)
    assert largest_difference(actual, expected) < 0.05 * expected.abs().max()


class Twice(nn.Module):
    """The output of a layer, read by two others and concatenated."""

    def __init__(self, layer, first, second):
        super().__init__()
        self.layer, self.first, self.second = layer, first, second

    def forward(self, x):
        x = self.layer(x)
        return torch.cat([self.first(x), self.second(x)], 1)


REFUSED = {
    "max pool of signed values": (
        [nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3), nn.ReLU()],
        r"conv1 \(0\) has no ReLU behind it",
    ),
    "max pool beside a relu": (
        [Twice(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(1)), nn.Conv2d(4, 2, 3), nn.ReLU()],
        r"max_pool1 \(0.second\) pools values that may be negative, put a ReLU before it, or next behind",
    ),
    "a factor below 0 before max pooling": (
        [nn.Conv2d(1, 2, 3), nn.ReLU(), Call(torch.neg), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3), nn.ReLU()],
        r"affine1 \(2\) adds constants to spikes or turns their signs, .* put it behind a convolution or linear layer, "
        r"or before a ReLU, or split .*--signed pair",
    ),
    "a difference without a ReLU": (
        [nn.Conv2d(1, 2, 3), nn.ReLU(), Call(lambda x: x - F.avg_pool2d(x, 3, 1, 1)), nn.Conv2d(2, 2, 3), nn.ReLU()],
        r"add1 \(2\) subtracts, its values may be negative: put a ReLU behind it, or split .*--signed pair",
    ),
    "conv reads conv": (
        [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.ReLU()],
        r"conv2 \(2\) has no ReLU behind it: add one .*--signed pair.*--ann_layers",
    ),
    "softmax inside": (
        [nn.Conv2d(1, 2, 3), nn.Softmax(1), nn.Conv2d(2, 2, 3), nn.ReLU()],
        r"conv1 \(0\) has no ReLU behind it",
    ),
}


@pytest.mark.parametrize("layers, message", REFUSED.values(), ids=REFUSED)
def test_refusals_name_op_path_and_advice(layers, message):
    dag = parse_ann_model(with_statistics(nn.Sequential(*layers)), (torch.rand(1, 1, 9, 9),))
    with pytest.raises(ValueError, match=message):
        plan_conversion(dag)


@pytest.mark.parametrize("ann_layers", [("0",), ("3",), ("3", "4"), ("0", "1"), ("conv2",)])
def test_named_layers_stay_ann(ann_layers):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 9, 3)).eval()
    images = torch.rand(6, 1, 9, 9)
    snn = convert(net, images, 512, 8, ann_layers=ann_layers, threshold="max", per_channel=True)
    ann = {"0": "conv1", "1": "relu1", "3": "conv2", "4": "relu2", "conv2": "conv2"}
    for name in ann_layers:
        assert not snn.ops[ann[name]]["op"].spiking
    assert snn.ops["conv3"]["op"].spiking
    with torch.no_grad():
        expected = net(images)
        assert (snn(images) - expected).abs().max() <= 0.05 * expected.abs().max()
        curve = snn(images, every_step=True)
        assert curve.shape == (512, 6, 3) and torch.allclose(curve[-1], snn(images), atol=1e-5)


def test_unknown_ann_layer_is_an_error():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(98, 2))
    with pytest.raises(ValueError, match="no layer head to leave as ANN, the network has 0, 1, 2, 3"):
        convert(net, torch.rand(2, 1, 9, 9), ann_layers=("head",))


def test_two_heads_are_both_last_layers():
    net = Function(
        lambda s, x: (s.a(h := F.relu(s.c1(x))).mean([2, 3]), s.b(h).mean([2, 3])),
        c1=conv(3, 8),
        a=conv(8, 5),
        b=conv(8, 4),
    )
    snn = convert(net, torch.randn(4, 3, 8, 8), 16, 8)
    assert [tuple(y.shape) for y in snn(torch.randn(4, 3, 8, 8))] == [(4, 5), (4, 4)]


def test_a_convolution_without_relu_is_refused_by_name():
    dag = sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"conv1 \(0\) has no ReLU behind it: add one"):
        plan_conversion(dag)
    dag = sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"conv2 \(2\) has no ReLU behind it: add one"):
        plan_conversion(dag)


def test_a_network_that_cannot_spike_is_refused():
    with pytest.raises(ValueError, match="nothing can spike"):
        plan_conversion(sequential(nn.Flatten(), nn.Linear(36, 2)))


def test_relu_of_the_image_stays_ann():
    dag = sequential(nn.ReLU(), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    assert plan_conversion(dag).firing == ["relu2"] and isinstance(dag.ops["relu1"]["op"], SpikeReLU)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(timesteps=0), "timesteps 0: use a whole number, 1 to 65536"),
        (dict(weight_bitwidth=9), "weight bit width 9: use 1 to 8"),
        (dict(reset_mode="hard"), "unknown reset mode 'hard'"),
        (dict(quantile=0.0), "quantile 0.0: use a number above 0 to 1"),
        (dict(threshold="best"), "unknown threshold 'best', use one of quantile, max, mse, spikes"),
        (dict(loader=[]), "the data loader is empty"),
    ],
)
def test_impossible_conversions(change, message):
    dag = sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    options = dict(loader=[(torch.rand(4, 1, 6, 6),)], device="cpu", timesteps=4, weight_bitwidth=4) | change
    with pytest.raises(ValueError, match=message):
        trans_ann2snn_weight(dag, **options)
