"""Calibration: pooled activations, and the scales that are chosen from them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import activations_of, conv, convert
from torch import nn

from ann_parser import parse_ann_model
from build_network import get_net_by_name
from conversion.plan import plan_conversion
from conversion.statistics import Pool, even_steps, least_error_scales, sums_of_errors
from kernels.rounding_errors import can_sum, sum_errors
from networks.checkpoint import load_weights
from quantization import init_quantize_net
from snn_weight_setter import trans_ann2snn_weight


def test_a_layer_that_is_seldom_active_keeps_its_scale():
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3))
    net[0].bias.data -= 0.5
    images = torch.rand(8, 2, 7, 7)
    active = F.relu(net[0](images)).flatten()
    assert active.kthvalue(len(active) // 2).values == 0 < active.max()
    snn = convert(net, images, 16, 32, quantile=0.5)
    assert 0 < snn.ops["relu1"]["op"].neuron.scale_factor <= active.max()


def test_thresholds_follow_the_formula(digits_images):
    """The specification's rules: Vthr = max_o / T for the first layer, Vthr = max_o / max_i * s_w for the others."""
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    dag = parse_ann_model(net, (digits_images[:1],))
    init_quantize_net(dag, 4)
    snn = trans_ann2snn_weight(dag, [(digits_images,)], "cpu", 16, 4, threshold="quantile", correction="none")
    neurons = snn.neurons()
    for name in ("relu1", "relu2"):
        activations = activations_of(dag, name, digits_images)
        max_o = activations.kthvalue(round(0.999 * len(activations))).values.item()
        if name == "relu1":
            assert neurons[name].Vthr.item() == pytest.approx(max_o / 16, rel=0.03)  # pooled from a sample
        else:
            max_i, s_w = neurons["avg_pool1"].scale_factor.item(), snn.ops["conv2"]["op"].weight_scale.item()
            assert abs(neurons[name].Vthr.item() - max_o / max_i * s_w) <= 0.55
            assert neurons[name].scale_factor.item() == pytest.approx(neurons[name].Vthr.item() * max_i / s_w)
    pool = neurons["avg_pool1"]
    assert pool.scale_factor.item() == pytest.approx(pool.Vthr.item() * neurons["relu1"].scale_factor.item() / 4)
    assert neurons["relu1"].initial_potential.item() == pytest.approx(neurons["relu1"].Vthr.item() / 2)
    assert neurons["relu2"].initial_potential.item() == neurons["relu2"].Vthr.item() // 2


def test_pools_are_bounded_and_meet_every_position():
    pool, batches = Pool(1000, samples=100), torch.arange(10_000.0).view(20, 5, 4, 25)
    for batch in batches:
        pool.add(batch)
    values = pool.values()
    assert values.tolist() == list(range(0, 10_000, 11))  # the first number from 10 on without a factor in common
    assert set((values % 100).tolist()) == set(range(100))
    exact = Pool(1000, samples=1)
    exact.add(torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last))
    assert sorted(exact.values().tolist()) == list(range(24))


def test_least_error_scale_against_a_brute_force_search():
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)).square()
    for timesteps in (1, 4, 64):
        errors = {}
        for scale in torch.linspace(0.03, 1, 500).tolist():
            decoded = (values / scale * timesteps).round().clamp_max(timesteps) * scale / timesteps
            errors[scale] = (decoded - values).square().mean().item()
        chosen = first_scale(values, timesteps).item()
        decoded = (values / chosen * timesteps).round().clamp_max(timesteps) * chosen / timesteps
        assert (decoded - values).square().mean().item() <= 1.1 * min(errors.values())
    pair = torch.cat([values, 3 * values]), torch.arange(2).repeat_interleave(5000)  # two channels at once
    assert torch.allclose(least_error_scales(*pair, 2, 4), torch.tensor([1.0, 3.0]) * first_scale(values, 4))
    assert least_error_scales(torch.zeros(10), torch.zeros(10, dtype=torch.long), 1, 4) == 0


@pytest.mark.skipif(not can_sum(torch.zeros(1)), reason="numba is missing or switched off")
@pytest.mark.parametrize("count, steps", [(1, 1), (3, 16), (200, 7.5)])
def test_compiled_errors_equal_those_of_plain_pytorch_to_the_last_bit(count, steps):
    draw = torch.Generator().manual_seed(count)
    values = torch.randn(10_000, generator=draw).clamp_min(0)
    channels = torch.randint(0, count, values.shape, generator=draw)
    sizes = torch.rand(count, 9, generator=draw) / steps + 1e-30
    compiled = sum_errors(values, channels, sizes, steps)
    assert torch.equal(compiled, sums_of_errors(values, channels, sizes, steps))
    wanted = torch.zeros(count, 9, dtype=torch.float64)  # step by step, in float64
    decoded = (values[:, None].double() / sizes[channels]).round().clamp_max(steps) * sizes[channels]
    wanted.index_add_(0, channels, (decoded - values[:, None]).square())
    assert torch.allclose(compiled.double(), wanted, rtol=1e-3)


def first_scale(values, timesteps):
    """The scale of values that are all of one channel."""
    return least_error_scales(values, torch.zeros(len(values), dtype=torch.long), 1, timesteps)


class Residual(nn.Module):
    """A convolution, a block of two with a shortcut, and a linear layer behind the last spikes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = conv(2, 4), conv(4, 4), conv(4, 4)
        self.last = nn.Linear(4 * 49, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.last(F.relu(self.third(F.relu(self.second(x))) + x).flatten(1))


def test_uneven_spikes_count_once_for_every_layer_behind():
    images = torch.rand(8, 2, 7, 7)
    dag = parse_ann_model(Residual(), (images,))
    plan = plan_conversion(dag)
    steps = even_steps(dag, plan, 12)
    assert plan.firing == ["relu1", "relu2", "relu3"]
    assert [steps[name] for name in plan.firing] == [12 / 3**0.5, 12 / 2**0.5, 12]  # 2, 1 and 0 layers behind
    assert even_steps(dag, plan, 1)["relu1"] == 1  # a lambda has one step at least
    snn = trans_ann2snn_weight(dag, [(images,)], "cpu", 12, 8, threshold="spikes", per_channel="none")
    for name in plan.firing:
        wanted = first_scale(activations_of(dag, name, images), steps[name])
        assert snn.neurons()[name].scale_factor.item() == pytest.approx(wanted.item(), rel=0.02)  # Vthr is an integer


@pytest.mark.parametrize("listen", [16, "auto"])
def test_without_uneven_spikes_the_rule_is_that_of_least_error(listen):
    images = torch.rand(8, 2, 7, 7)
    snns = [convert(Residual(), images, 16, 8, threshold=rule, listen=listen) for rule in ("spikes", "mse")]
    for one, other in zip(*(snn.neurons().values() for snn in snns)):
        assert torch.equal(one.scale_factor, other.scale_factor) and torch.equal(one.Vthr, other.Vthr)
    assert torch.equal(snns[0](images), snns[1](images))
