"""Networks for the tests of the tracer, and what is asserted of a traced network."""

import torch
import torch.nn.functional as F
from torch import nn

from ann_parser import parse_ann_model

TRACED_BATCH, OTHER_BATCHES = 2, (1, 3, 5)


class Call(nn.Module):
    """A module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class BasicBlock(nn.Module):
    """A residual block with in-place operations, as in ResNet."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        out = self.relu(self.conv1(x))
        out = self.conv2(out)
        out += x
        return self.relu(out)


class SmallResNet(nn.Module):
    """Changes its own input in place, and ends in a dropout."""

    def __init__(self, last=F.log_softmax):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(BasicBlock(4), BasicBlock(4))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 5)
        self.last = last

    def forward(self, x):
        x = self.conv1(x.relu_())
        x = F.relu(x, inplace=True)
        x = self.layer1(x)
        x = self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return self.last(self.fc(x), dim=1)


def after_conv(function):
    """A convolution [B, 3, 8, 8] -> [B, 4, 8, 8], and a function of its output."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Call(function))


def image(batch=TRACED_BATCH, channels=3, size=8):
    return torch.randn(batch, channels, size, size)


def largest_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def trace_and_compare(net, sample_shape=(3, 8, 8)):
    """The graph of the network, which computes the same at batch sizes other than the traced one."""
    dag = parse_ann_model(net, (torch.randn(TRACED_BATCH, *sample_shape),))
    net.eval()
    with torch.no_grad():
        for batch in OTHER_BATCHES:
            x = torch.randn(batch, *sample_shape)
            expected = net(x.clone())
            assert largest_difference(dag(x), expected) <= 1e-5 * max(1.0, expected.abs().max().item())
    return dag


def iadd(x):
    y = F.relu(x)
    x += y
    return x + y


def snapshot(net):
    """Weights, and training flags by module."""
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return weights, {path: module.training for path, module in net.named_modules()}


def assert_unchanged(net, before):
    weights, training = snapshot(net)
    assert training == before[1]
    assert list(weights) == list(before[0])
    assert all(torch.equal(weights[name], before[0][name]) for name in weights)


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x):
        r = F.relu(self.conv1(x), inplace=True)
        x = self.conv2(r)
        x += r
        x = F.avg_pool2d(F.relu_(x), 2)
        return self.fc(torch.flatten(x, 1))
