"""Every spike of whole networks against the independent integer simulation, and numbers worked out by hand."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_every_spike_is_reproduced, convert, sequential, spikes_and_first_currents
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ann_parser import parse_ann_model
from build_network import get_net_by_name
from networks.checkpoint import load_weights
from snn_weight_setter import trans_ann2snn_weight
from spike_layers import SpikeConv2d
from spike_neurons import IFNeuron, if_step
from spike_tensor import Current

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_every_spike_of_example_net_on_digits(digits_images, reset_mode, engine):
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    snn = convert(net, digits_images, reset_mode=reset_mode)
    snn.set_engine(engine)
    assert_every_spike_is_reproduced(snn, digits_images[:20], 16)


@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name, channels, size", [("0", 1, 6), ("1", 1, 6), ("2", 2, 4), ("3", 1, 6)])
def test_every_spike_of_the_debug_networks(name, channels, size, reset_mode):
    images = torch.randint(0, 2, (30, channels, size, size), generator=torch.Generator().manual_seed(1)).float()
    snn = convert(get_net_by_name(f"debug_net{name}", channels, 2), images, reset_mode=reset_mode)
    for timesteps in (1, 2, 15, 16):
        assert_every_spike_is_reproduced(snn, images, timesteps)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_spike_of_random_convolutions(data):
    """Kernel, stride, padding, dilation, groups, bias, bits, scales per channel, reset and T drawn at random."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    groups = draw(st.sampled_from([1, 2, 4]))
    shape = dict(kernel_size=draw(st.sampled_from([1, 2, 3, (3, 1), 5])), stride=draw(st.sampled_from([1, 2, (2, 1)])))
    shape |= dict(padding=draw(st.sampled_from([0, 1, (2, 0)])), dilation=draw(st.sampled_from([1, 2])), groups=groups)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, bias=draw(st.booleans()), **shape), nn.ReLU()]
    if draw(st.booleans()):
        pool = nn.AvgPool2d(draw(st.sampled_from([2, 3])), draw(st.sampled_from([1, 2])), 1)
        layers.insert(2, pool)
    size = draw(st.integers(19, 21))
    features = nn.Sequential(*layers)(torch.zeros(1, 2, size, size)).flatten(1).shape[1]
    layers += [nn.Flatten(), nn.Linear(features, 5), nn.ReLU(), nn.Linear(5, 3)]
    bits, per_channel = draw(st.integers(1, 8)), draw(st.booleans())
    images = torch.rand(draw(st.integers(1, 4)), 2, size, size)
    reset_mode = draw(st.sampled_from(["zero", "subtraction"]))
    snn = convert(nn.Sequential(*layers), images, bits=bits, per_channel=per_channel, reset_mode=reset_mode)
    assert_every_spike_is_reproduced(snn, images, draw(st.sampled_from([1, 2, 15, 16, 100])))


class Branches(nn.Module):
    """Adds before and after the ReLU, a downsample shortcut, an identity, the same tensor twice, two linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.main = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.behind = nn.Conv2d(8, 4, 3)
        self.fc1, self.fc2 = nn.Linear(4 * 16, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        y = torch.relu(self.main(x) + self.shortcut(x))
        y = torch.relu(self.main(y) + x)
        y = torch.cat([y + x, x + x], dim=1)
        y = torch.relu(self.behind(y)).flatten(1)
        return self.fc2(torch.relu(self.fc1(y)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_spike_of_a_network_of_branches(bits):
    torch.manual_seed(0)
    images = torch.rand(5, 1, 6, 6)
    snn = convert(Branches(), images, bits=bits)
    assert_every_spike_is_reproduced(snn, images, 16)
    assert all(not neuron.Vthr.is_floating_point() for neuron in list(snn.neurons().values())[1:])


def test_branches_agree_with_the_ann_at_many_timesteps():
    torch.manual_seed(0)
    images = torch.rand(20, 1, 6, 6)
    net = Branches()
    error = []
    for bits, timesteps in ((8, 8), (8, 512), (32, 512)):
        snn = convert(net, images, timesteps, bits, threshold="max")
        error.append((snn(images) - net(images)).abs().mean().item())
    assert error[2] < 2e-4 and error[1] < 2e-3 < error[0]


def test_hand_worked_spikes_of_debug_net0():
    """Vthr = 6/4 with T = 4 and images of ones in the left column: currents worked out on paper."""
    image = torch.zeros(1, 1, 6, 6)
    image[:, :, :, 0] = 1  # left column: every window at x = 0 sees 3, all others 0
    snn = convert(get_net_by_name("debug_net0", 1, 2), image, timesteps=4, threshold="max", correction="none")
    (neuron,) = snn.neurons().values()
    assert neuron.Vthr.item() == 3 / 4 and neuron.scale_factor.item() == 3  # the largest activation, over T
    trains, _ = spikes_and_first_currents(snn, image, 4)
    expected = np.zeros((4, 1, 2, 4, 4))
    expected[:, 0, 0, :, 0] = 1  # current 3/4 = Vthr at every step: fires at every step; the other channel never
    assert np.array_equal(trains["relu1"], expected)
    assert snn(image).tolist() == [[12.0, 0.0]]  # four windows of activation 3


def test_hand_worked_spikes_of_the_residual():
    """debug_net2 on one bright pixel at T = 4: r = 1 there, relu(conv2(r) + r) = 1 on the cross around it."""
    image = torch.zeros(1, 2, 4, 4)
    image[0, 0, 1, 1] = 1
    snn = convert(get_net_by_name("debug_net2", 2, 2), image, timesteps=4, threshold="max", correction="none")
    first, second = snn.neurons().values()
    assert first.Vthr.item() == 1 / 4 and first.scale_factor.item() == 1
    assert snn.ops["conv2"]["op"].weight_q[0, 0, 0, 1].item() == 7 and second.Vthr.item() == 7  # 1 in units of 1/7
    assert snn.ops["add1"]["op"].branch_weight1.item() == 7  # the identity in the same unit
    trains, _ = spikes_and_first_currents(snn, image, 4)
    cross = np.zeros((2, 4, 4))
    cross[0, [0, 1, 1, 1, 2], [1, 0, 1, 2, 1]] = 1
    assert np.array_equal(trains["relu2"], np.broadcast_to(cross, (4, 1, 2, 4, 4)))
    assert snn(image).tolist() == [[5.0, 0.0]]


def test_average_pooling_becomes_a_depthwise_convolution_of_ones():
    images = torch.rand(10, 1, 6, 6)
    snn = convert(get_net_by_name("debug_net1", 1, 2), images)
    for name, neuron in list(snn.neurons().items())[1:3]:
        pool = snn.ops[name]["op"]
        assert isinstance(pool, SpikeConv2d) and pool.groups == pool.in_channels == 2
        assert pool.weight_q.flatten().tolist() == [1] * 8
        assert neuron.Vthr.item() >= 1 and not neuron.Vthr.is_floating_point()


def test_if_step_by_hand():
    u = torch.tensor([0.0, 3.0, 4.0, 9.0, -2.0])
    membrane, spike = if_step(u, torch.ones(5), torch.tensor(4.0), "subtraction")
    assert membrane.tolist() == [1, 0, 1, 6, -1] and spike.tolist() == [0, 1, 1, 1, 0]
    membrane, spike = if_step(u, torch.ones(5), torch.tensor(4.0), "zero")
    assert membrane.tolist() == [1, 0, 0, 0, -1] and spike.tolist() == [0, 1, 1, 1, 0]


def test_large_potentials_stay_exact():
    """Beyond 2^24 float32 loses integers; the neuron then works in float64."""
    neuron = IFNeuron(torch.tensor(3), torch.tensor(1.0), torch.tensor(0), "subtraction", largest_current=2**23 + 1)
    current = Current(torch.full((4, 1), 2.0**23 + 1), 4)
    assert neuron.membrane_type(4) == torch.float64 and neuron.membrane_type(1) == torch.float32
    assert neuron(current).data.flatten().tolist() == [1, 1, 1, 1]
    assert Current(torch.tensor([[2**24 + 1]], dtype=torch.int32), 1).total().item() == 2**24 + 1
    with pytest.raises(ValueError, match="reset mode 'hard'"):
        IFNeuron(torch.tensor(3), torch.tensor(1.0), torch.tensor(0), "hard")


def test_the_source_network_is_not_changed(digits_images):
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    dag = parse_ann_model(net, (digits_images[:1],))
    before = copy.deepcopy(dag.state_dict())
    trans_ann2snn_weight(dag, [(digits_images,)], "cpu", 8, 4)
    assert all(torch.equal(dag.state_dict()[key], value) for key, value in before.items())
    assert not dag.neurons() and not any("forward" in vars(entry["op"]) for entry in dag.ops.values())


def test_nan_weights_are_refused_by_name():
    dag = sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    dag.ops["conv1"]["op"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"conv1 \(0\) has NaN"):
        trans_ann2snn_weight(dag, [(torch.rand(4, 1, 6, 6),)], "cpu", 4, 4)


def test_a_silent_layer_converts():
    dag = sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    dag.ops["conv1"]["op"].weight.data.fill_(-1.0)
    snn = trans_ann2snn_weight(dag, [(torch.rand(4, 1, 6, 6),)], "cpu", 4, 4)
    assert torch.equal(snn(torch.rand(3, 1, 6, 6)), dag.ops["linear1"]["op"].bias.expand(3, 2))


def test_float_weights_keep_float_thresholds():
    torch.manual_seed(0)
    images = torch.rand(20, 1, 6, 6)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    snn = convert(net, images, 1024, 32, threshold="max")
    assert (snn(images) - net(images)).abs().max() < 0.01
    assert snn.neurons()["relu2"].Vthr.is_floating_point()
