"""The units of currents: branches that meet in a neuron, thresholds per channel, and the integers that follow."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CHOICES,
    MODELS,
    Function,
    assert_every_spike_is_reproduced,
    conv,
    convert,
    slow,
    small_model,
    spikes_and_first_currents,
)
from reference import simulate
from torch import nn

from spike_layers import SpikeAdd


def test_add_of_a_branch_that_has_its_own_unit():
    """A concatenation of currents meets a convolution in an add: it gets an integer weight."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
            self.fc = nn.Linear(4 * 25, 2)

        def forward(self, x):
            x = F.relu(self.a(x))
            x = torch.cat([self.b(x), x], 1) + self.c(x)
            return self.fc(F.relu(x).flatten(1))

    torch.manual_seed(0)
    net, images = Net(), torch.rand(4, 1, 7, 7)
    snn = convert(net, images, bits=8)
    add = next(entry["op"] for entry in snn.ops.values() if isinstance(entry["op"], SpikeAdd))
    assert add.branch_weight0 is not None and add.branch_weight0.numel() == 4 and add.branch_weight1 is None
    assert_every_spike_is_reproduced(snn, images, 16)


def relative_error(net, images, timesteps=512, **options):
    """Of the SNN's outputs, against the ANN's, both centred per class."""
    snn = convert(net, images, timesteps, **options)
    with torch.no_grad():
        expected, actual = (y - y.mean(0) for y in (net.eval()(images), snn(images)))
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_branches_of_next_to_nothing_stay_exact():
    """Weights that are tiny beside a bias or a residual would need thresholds beyond the exact integers."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 8, 8)
    residual = Function(
        lambda s, x: s.fc(F.relu((h := F.relu(s.c1(x))) + s.c2(h)).flatten(1)),
        c1=conv(3, 8),
        c2=conv(8, 8),
        fc=nn.Linear(512, 10),
    )
    for factor in (1e-4, 1e-9):
        for parameter in residual.c2.parameters():
            parameter.mul_(factor)
        assert relative_error(residual, images, bits=8, threshold="max", correction="none") < 0.05
    chain = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    chain[2].weight[3] *= 1e-9
    chain[2].bias[3] = 0.3
    assert relative_error(chain, images, bits=8, threshold="max", correction="none", per_channel=True) < 0.05
    chain[2].weight *= 1e-7
    snn = convert(chain, images, 16, 8)
    assert all((neuron.Vthr > 0).all() for neuron in snn.neurons().values())
    assert_every_spike_is_reproduced(snn, images[:2], 16)


def test_an_identity_beside_coarse_weights_has_a_whole_weight():
    """At 4 bits the unit moves so that the skip is a whole number of it: its gain is exact."""
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu((h := F.relu(s.c1(x))) + s.c2(h)).flatten(1)),
        c1=conv(3, 8),
        c2=conv(8, 8, groups=8),
        fc=nn.Linear(512, 10),
    )
    net.c2.weight.data *= 1.7
    images = torch.randn(16, 3, 8, 8)
    snn = convert(net, images, 64, 4)
    unit, scale = snn.ops["conv2"]["op"].unit, snn.ops["relu1"]["op"].neuron.scale_factor
    weight = snn.ops["add1"]["op"].branch_weight0
    assert 1 < weight.item() < 20 and weight.item() * unit.item() == pytest.approx(scale.item(), rel=1e-5)


def test_values_finer_than_the_weights_beside_them_are_refused():
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu(s.a(h := F.relu(s.c1(x))) + F.avg_pool2d(s.b(h), 2)).flatten(1)),
        c1=conv(3, 8),
        a=conv(8, 8, stride=2),
        b=conv(8, 8),
        fc=nn.Linear(128, 10),
    )
    with pytest.raises(ValueError, match="add1 adds values that are finer than a step of the 4-bit weights"):
        convert(net, torch.randn(4, 3, 8, 8), bits=4)


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("reader", ["add", "convolution"])
def test_a_shortcut_joined_with_itself_has_a_scale_for_every_channel(reader, bits):
    torch.manual_seed(0)
    net = Function(
        lambda s, x: (
            s.fc(F.relu(s.b(h := F.relu(s.a(x))) + torch.cat([h, h], 1)).flatten(1))
            if reader == "add"
            else s.fc(F.relu(s.c(torch.cat([h := F.relu(s.a(x)), h], 1))).flatten(1))
        ),
        a=conv(3, 4),
        b=conv(4, 8),
        c=conv(8, 8),
        fc=nn.Linear(512, 10),
    )
    net.a.weight.data *= torch.tensor([1.0, 2, 4, 8]).view(4, 1, 1, 1)
    images = torch.randn(4, 3, 8, 8)
    snn = convert(net, images, 32, bits, granularity="channel")
    assert snn.ops["relu1"]["op"].neuron.scale_factor.numel() == 4
    if bits != 32:
        assert_every_spike_is_reproduced(snn, images, 32)
    assert relative_error(net, images, bits=32, granularity="channel", threshold="max") < 0.02


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_sums_of_spikes_alone_convert_at_few_bits(bits, granularity):
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu((y := (h := F.relu(s.a(x))) + F.relu(s.b(h))) + F.relu(s.d(y))).flatten(1)),
        a=conv(1, 6),
        b=conv(6, 6),
        d=conv(6, 6, 1),
        fc=nn.Linear(384, 10),
    )
    net.b.weight.data *= torch.logspace(-2, 0, 6).view(6, 1, 1, 1)
    images = torch.rand(4, 1, 8, 8)
    assert_every_spike_is_reproduced(convert(net, images, 8, bits, granularity=granularity), images, 8)


def test_spikes_of_different_scales_do_not_share_a_channel():
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu(s.c2(torch.cat([F.relu6(s.a(x)), F.relu(s.b(x))], s.dim))).flatten(1)),
        a=conv(3, 8),
        b=conv(3, 8),
        c2=conv(8, 4),
        fc=nn.Linear(4 * 16 * 8, 10),
    )
    net.a.weight.data *= 10
    net.b.weight.data *= 100
    net.dim, images = 2, torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"concat1 puts spikes of different scales into one channel.*dim=1"):
        convert(net, images, bits=8)
    net.dim, net.c2 = 1, conv(16, 8)
    assert relative_error(net, images, bits=8, threshold="max", correction="none") < 0.05


def test_a_skip_with_a_scale_per_channel_at_a_scalar_threshold():
    """48 channels do not divide the chunks in which the compiled neurons work."""
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(
            F.relu(s.c2(h := F.relu(s.c1(x))) + torch.cat([F.relu6(s.a(h)), F.relu(s.b(h))], 1)).flatten(1)
        ),
        c1=conv(3, 8),
        a=conv(8, 24),
        b=conv(8, 24),
        c2=conv(8, 48),
        fc=nn.Linear(48 * 64, 10),
    )
    for layer, factor in ((net.a, 10), (net.b, 100), (net.c2, 30)):
        layer.weight.data *= factor
    images = torch.randn(4, 3, 8, 8)
    snn = convert(net, images, 16, 8, threshold="max")
    assert snn.ops["add1"]["op"].branch_weight1.numel() == 48 and snn.ops["relu4"]["op"].neuron.Vthr.numel() == 1
    assert_every_spike_is_reproduced(snn, images, 16)


def test_one_bit_weights_are_never_zero():
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3))
    snn = convert(net, torch.rand(8, 2, 7, 7), 16, 1)
    assert set(snn.ops["conv2"]["op"].weight_q.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [4, 8])
def test_a_ceiling_holds_after_rounding(seed, bits):
    torch.manual_seed(seed)
    layers = [conv(2, 4), nn.ReLU6(), conv(4, 4), nn.ReLU6(), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 49, 3)]
    net = nn.Sequential(*layers)
    net[2].weight.data *= 40
    snn = convert(net, torch.rand(8, 2, 7, 7), 16, bits)
    assert snn.ops["relu2"]["op"].neuron.scale_factor <= 6


def test_a_branch_may_come_later_than_the_layer_it_joins():
    """relu(a(x) + x + c(relu(b(x)))): the spikes that c reads are of a later op than a, whose unit they share."""
    torch.manual_seed(0)
    net = Function(
        lambda s, x: s.fc(F.relu(s.a(h := F.relu(s.i(x))) + h + s.c(F.relu(s.b(h)))).flatten(1)),
        i=conv(3, 4),
        a=conv(4, 4),
        b=conv(4, 4),
        c=conv(4, 4),
        fc=nn.Linear(256, 5),
    )
    images = torch.randn(4, 3, 8, 8)
    for bits in (4, 8):
        assert_every_spike_is_reproduced(convert(net, images, 8, bits), images, 8)
    assert relative_error(net, images, bits=8, threshold="max", correction="none") < 0.05


@pytest.mark.parametrize("listen", [0, 16])
@pytest.mark.parametrize("name", MODELS)
def test_every_spike_with_a_threshold_per_channel(name, listen):
    net, images = small_model(name)
    for bits, per_channel in ((4, True), (8, False)):
        options = dict(granularity="channel", threshold="mse", per_channel=per_channel, listen=listen, **CHOICES)
        snn = convert(net, images, 16, bits, **options)
        assert any(neuron.Vthr.unique().numel() > 1 for neuron in snn.neurons().values())
        kinds = {neuron.Vthr.dtype for neuron in snn.neurons().values() if neuron.largest_current is not None}
        assert kinds == {torch.int32}
        trains, currents = spikes_and_first_currents(snn, images[:3], 16)
        expected = simulate(snn, currents, 16)
        assert all(np.array_equal(trains[layer], expected[layer]) for layer in snn.spiking_layers())


@pytest.mark.parametrize("threshold", ["quantile", slow("max"), "mse"])
@pytest.mark.parametrize("name", MODELS)
def test_thresholds_per_channel_at_many_timesteps_are_the_ann(name, threshold):
    net, images = small_model(name)
    snn = convert(net, images, 1024, 32, threshold=threshold, quantile=1.0, granularity="channel", **CHOICES)
    with torch.no_grad():
        assert torch.corrcoef(torch.stack([snn(images).flatten(), net(images).flatten()]))[0, 1] >= 0.99


def test_a_weak_channel_gets_a_threshold_of_its_own():
    """Two channels, one 8 times as strong: each reaches its own maximum with a spike at every step."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(2, 2))
    net[0].weight.data = torch.tensor([1.0, 8.0]).view(2, 1, 1, 1)
    images = torch.linspace(0, 1, 50).view(50, 1, 1, 1)
    channels = convert(net, images, 16, 8, granularity="channel", threshold="max").neurons()["relu1"]
    layer = convert(net, images, 16, 8, threshold="max").neurons()["relu1"]
    assert torch.allclose(channels.scale_factor.flatten(), torch.tensor([1.0, 8.0]), rtol=0.02)
    assert layer.scale_factor.item() == pytest.approx(8.0, rel=0.02)
