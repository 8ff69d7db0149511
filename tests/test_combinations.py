"""Layers of different kinds together: each network is traced, converted, saved, and every spike is reproduced."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CHOICES,
    Function,
    assert_every_spike_is_reproduced,
    conv,
    convert,
    prepared,
    spikes_and_first_currents,
    with_statistics,
)
from reference import quantized_ann, simulate
from torch import nn
from tracing import Call

from spike_dag import from_dict

ACTIVATIONS = {
    "leaky": lambda: nn.LeakyReLU(0.1),
    "a BatchNorm behind relu": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
    "hardtanh": lambda: nn.Hardtanh(inplace=True),
    "a map behind relu": lambda: nn.Sequential(nn.ReLU(), Call(lambda x: x + torch.linspace(-1, 1, 144).view(4, 6, 6))),
}
BEHIND = {
    "a max pooling of rows": lambda x: F.max_pool1d(x.flatten(2), 2).unsqueeze(2),
    "a max pooling of padded maps": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1),
    "a sum with its mirror image": lambda x: x + x.flip(3),
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "a stack of its channels": lambda x: torch.stack(list(x.unbind(1))[::-1], 1) + x,
    "joins of a slice": lambda x: torch.cat([x[:, 2:], F.relu(x), x], 1),
}


def chain(activation, behind):
    """A convolution, an activation, a function and a convolution that reads it."""
    torch.manual_seed(0)
    layers = [conv(2, 4), ACTIVATIONS[activation](), Call(BEHIND[behind]), nn.LazyConv2d(4, 3, padding=1), nn.ReLU()]
    net, images = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)), torch.randn(6, 2, 6, 6)
    net(images)
    return with_statistics(net, seed=3), images


def outputs_of(net, images):
    """All outputs of a network side by side, [B, N]."""
    with torch.no_grad():
        outputs = net(*images) if isinstance(images, tuple) else net(images)
    return torch.cat([x.flatten(1) for x in (outputs if isinstance(outputs, tuple) else (outputs,))], 1)


def assert_converts(net, images, most=0.05):
    """The graph is the network, float weights at many timesteps are near it, and every spike is reproduced."""
    expected = outputs_of(net, images)
    assert (outputs_of(prepared(net, images), images) - expected).abs().max() <= 1e-4 * expected.abs().max()
    exact = outputs_of(convert(net, images, 128, 32, **CHOICES, threshold="max"), images)
    assert (exact - expected).abs().max() <= most * expected.abs().max()
    for bits, more in ((4, dict(per_channel="both")), (8, dict(reset_mode="zero", avgpool="fold"))):
        snn = convert(net, images, 16, bits, **CHOICES, **more)
        assert_every_spike_is_reproduced(snn, images[:2], 15)
        assert torch.equal(outputs_of(from_dict(snn.to_dict()), images), outputs_of(snn, images))


def assert_listening_is_the_quantized_ann(net, images):
    snn = convert(net, images, 7, 4, listen=7, **CHOICES)
    trains, currents = spikes_and_first_currents(snn, images[:2], 7)
    from_image = {name for name, neuron in snn.neurons().items() if neuron.largest_current is None}
    counts = quantized_ann(snn, {name: trains[name] for name in from_image}, 7)
    expected = simulate(snn, currents, 7)
    for layer, train in trains.items():
        assert np.array_equal(train, expected[layer]), layer
        assert np.array_equal(train.astype(np.int64).sum(0), counts[layer]), layer


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_and_what_is_behind_it(activation, behind):
    net, images = chain(activation, behind)
    assert_converts(net, images)
    assert_listening_is_the_quantized_ann(net, images)


def test_a_difference_of_currents_is_saved():
    def function(self, x):
        x = F.leaky_relu(self.a(x), 0.1)
        return self.fc((self.b(x) - self.c(x)).relu().mean((2, 3)))

    torch.manual_seed(0)
    net, images = (
        Function(function, a=conv(2, 4), b=conv(4, 4), c=conv(4, 4), fc=nn.Linear(4, 3)),
        torch.randn(8, 2, 8, 8),
    )
    assert_converts(net.eval(), images)


@pytest.mark.parametrize("seed", [3, 4])
def test_a_batch_norm_of_a_leaky_relu_is_added_to_convolutions(seed):
    """As in RepVGG: a factor of either sign for each channel, however small, beside the weights of other branches."""

    def function(self, x):
        x = F.leaky_relu(self.first(x), 0.1)
        return self.fc(F.relu(self.a(x) + self.b(x) + self.norm(x)).flatten(1))

    torch.manual_seed(0)
    layers = dict(first=conv(2, 4), a=conv(4, 4), b=conv(4, 4, 1), norm=nn.BatchNorm2d(4), fc=nn.Linear(144, 3))
    net, images = with_statistics(Function(function, **layers), seed=seed), torch.randn(6, 2, 6, 6)
    assert_converts(net, images)
    both = outputs_of(convert(net, images, 256, 8, **CHOICES, threshold="max"), images), outputs_of(net, images)
    assert torch.corrcoef(torch.stack([each.flatten() for each in both]))[0, 1] >= 0.99
