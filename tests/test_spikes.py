"""Every spike of the converted networks against the independent integer simulation, and numbers worked out by hand."""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import simulate
from torch import nn

import spike_simulator
import spike_tensor
from ann_parser import parse_ann_model
from build_network import get_net_by_name
from conversion.correction import PackedSpikes
from conversion.plan import plan_conversion
from conversion.statistics import Pool, least_error_scales, pool_activations
from networks.checkpoint import load_weights
from quantization import init_quantize_net
from snn_weight_setter import trans_ann2snn_weight
from spike_layers import SpikeConv2d, SpikeReLU
from spike_neurons import IFNeuron, if_step
from spike_tensor import Current, SpikeTensor, record_firing_ratios


def convert(net, images, timesteps=16, bits=4, **options):
    """The spiking network of a plain one, calibrated on `images`, where these are."""
    dag = parse_ann_model(net, (images[:2],))
    return trans_ann2snn_weight(dag, [(images,)], images.device, timesteps, bits, **options)


@torch.no_grad()
def spikes_and_first_currents(snn, images, timesteps, chunk=None):
    """What the simulator computes: op name -> uint8 [T, B, ...] spikes, and float32 currents caused by the image.

    All images at a time, and all timesteps or `chunk` of them.
    """
    trains, currents = {}, {}

    def watch(name, current, value):
        if snn.ops[name].op.neuron is not None:
            steps = value.data.unflatten(0, (value.timesteps, -1)).to(torch.uint8).cpu().numpy()
            trains[name] = np.concatenate([trains[name], steps]) if name in trains else steps
        elif isinstance(value, Current) and value.constant:
            currents[name] = value.data.cpu().numpy()

    with mock.patch.object(spike_simulator, "cut", lambda dag, inputs, *_: (len(inputs[0]), chunk or timesteps)):
        spike_simulator.simulate(snn, (images,), timesteps, watch=watch)
    return trains, currents


def assert_every_spike_is_reproduced(snn, images, timesteps):
    trains, currents = spikes_and_first_currents(snn, images, timesteps, chunk=max(1, timesteps - 3))
    expected = simulate(copy.deepcopy(snn).cpu(), currents, timesteps)
    assert list(trains) == list(expected) == snn.spiking_layers()
    for name, spikes in trains.items():
        assert np.array_equal(spikes, expected[name]), name
    assert timesteps < 15 or sum(spikes.sum() for spikes in trains.values()) > 0  # few steps may pass in silence


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


def test_firing_ratio_switch_has_one_entry_per_spiking_layer(digits_images):
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    snn = convert(net, digits_images)
    with record_firing_ratios() as ratios:
        assert spike_tensor.firing_ratio_record
        snn(digits_images[:7])
        recorded = list(ratios)
    assert not spike_tensor.firing_ratio_record and spike_tensor.firing_ratios == []
    trains, _ = spikes_and_first_currents(snn, digits_images[:7], 16)
    assert snn.spiking_layers() == ["relu1", "avg_pool1", "relu2", "avg_pool2", "relu3"]  # the view does not count
    assert recorded == pytest.approx([train.mean() for train in trains.values()], rel=1e-5)
    snn(digits_images[:7])
    assert spike_tensor.firing_ratios == []


def test_spike_tensor_decodes_what_is_known_after_each_step():
    spikes = torch.tensor([[1.0], [0.0], [0.0], [1.0], [1.0], [1.0]])  # T=3, B=2
    train = SpikeTensor(spikes, 3, 6.0)
    assert train.to_float().tolist() == [[4.0], [4.0]]
    assert train.to_float_every_step().unflatten(0, (3, 2)).squeeze(-1).tolist() == [[6, 0], [3, 3], [4, 4]]


@pytest.mark.parametrize("timesteps", [1, 255, 256, 700])
def test_counts_of_bytes_do_not_overflow(timesteps):
    spikes = torch.ones(timesteps, 2, 3, dtype=torch.uint8)  # [T, B, N]
    spikes[::7, 1] = 0
    wanted = spikes.sum(0).tolist()
    assert SpikeTensor(spikes.flatten(0, 1), timesteps, 1.0).counts().tolist() == wanted
    sums = SpikeTensor.like(4 * spikes.flatten(0, 1), timesteps, 1.0)  # as a folded pooling makes them
    assert sums.counts().tolist() == [[4 * n for n in row] for row in wanted]


def test_every_step_equals_shorter_simulations(digits_images):
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    snn = convert(net, digits_images)
    curve = snn(digits_images[:9], every_step=True)
    for t in (1, 5, 16):
        assert torch.allclose(curve[t - 1], snn(digits_images[:9], timesteps=t), atol=1e-4)


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


@torch.no_grad()
def activations_of(dag, name, images):
    """The outputs of one op of an ANN, [N]."""
    return pool_activations(dag, [(images, None)], "cpu", len(images))[0][name].values()


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


def first_scale(values, timesteps):
    """The scale of values that are all of one channel."""
    return least_error_scales(values, torch.zeros(len(values), dtype=torch.long), 1, timesteps)


def test_correction_brings_rates_to_the_ann(digits_images):
    """The mean decoded activation of every corrected layer is nearer to the ANN's."""
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    errors = {}
    for correction in ("none", "potential"):
        dag = parse_ann_model(net, (digits_images[:1],))
        snn = convert(net, digits_images, bits=8, timesteps=8, correction=correction)
        trains, _ = spikes_and_first_currents(snn, digits_images, 8)
        scales = {name: neuron.scale_factor for name, neuron in snn.neurons().items()}
        errors[correction] = [
            abs(trains[name].mean() * scales[name].item() - activations_of(dag, name, digits_images).mean().item())
            for name in trains
        ]
    assert sum(errors["potential"]) < 0.5 * sum(errors["none"])


def test_the_source_network_is_not_changed(digits_images):
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    dag = parse_ann_model(net, (digits_images[:1],))
    before = copy.deepcopy(dag.state_dict())
    trans_ann2snn_weight(dag, [(digits_images,)], "cpu", 8, 4)
    assert all(torch.equal(dag.state_dict()[key], value) for key, value in before.items())
    assert not dag.neurons() and not any("forward" in vars(entry["op"]) for entry in dag.ops.values())


def sequential(*layers):
    return parse_ann_model(nn.Sequential(*layers), (torch.zeros(1, 1, 6, 6),))


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
        (dict(threshold="best"), "unknown threshold 'best', use one of quantile, max, mse"),
        (dict(loader=[]), "the data loader is empty"),
    ],
)
def test_impossible_conversions(change, message):
    dag = sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    options = dict(loader=[(torch.rand(4, 1, 6, 6),)], device="cpu", timesteps=4, weight_bitwidth=4) | change
    with pytest.raises(ValueError, match=message):
        trans_ann2snn_weight(dag, **options)


@pytest.mark.parametrize("shape", [(12, 5), (12, 3, 5, 7), (12, 0, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_packed_spikes_are_the_same_in_the_same_order_of_memory(shape, dtype):
    data = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3).to(dtype)
    for each in (data, data.to(memory_format=torch.channels_last)) if len(shape) == 4 else (data,):
        packed = PackedSpikes(SpikeTensor.like(each, 4, torch.tensor(2.0)))
        spikes = packed.unpack()
        assert (
            torch.equal(spikes.data, each)
            and spikes.data.dtype == dtype
            and packed.bits.nbytes == -(-each.numel() // 8)
        )
        assert spikes.data.is_contiguous(memory_format=torch.channels_last) or each.is_contiguous()
        assert (spikes.timesteps, spikes.scale_factor.item()) == (4, 2.0)


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
