"""Convolutions whose neurons fire in the same kernel: the spikes of an int64 convolution and of plain neurons."""

import copy

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import Function, assert_every_spike_is_reproduced, conv, convert, with_statistics
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("numba")

import kernels.currents
from kernels import event_convolution, firing_convolution
from kernels.event_convolution import plan_events
from kernels.firing_convolution import FiringConvolution, plan_tiles
from spike_neurons import IFNeuron
from spike_tensor import Current, Memory

if firing_convolution.njit is None or not firing_convolution.usable_instructions():
    pytest.skip("no vector instructions for these kernels, or numba does not compile", allow_module_level=True)

NAMES = {0: "VNNI, 512 bits", 1: "VNNI, 256 bits", 2: "AVX2"}
KINDS = firing_convolution.usable_instructions()
GEOMETRIES = [(1, 1), (2, 1), (2, 2)], [(0, 0), (1, 1), (0, 2)], [(1, 1), (2, 1)]  # strides, paddings, dilations


def draw_integers(generator, least, most, shape, dtype):
    return torch.randint(least, most + 1, tuple(shape), generator=generator, dtype=dtype)


FLOWS = st.sampled_from(["", "bias", "bias extra", "rest", "bias extra rest"])
RESETS = st.sampled_from(["zero", "subtraction"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: NAMES[kind.code])
@settings(max_examples=30, deadline=None)
@given(
    channels=st.sampled_from([(1, 16), (4, 32), (7, 16), (16, 48), (130, 16)]),
    sizes=st.sampled_from([((3, 3), 4, 8), ((1, 1), 5, 4), ((2, 3), 6, 6), ((3, 1), 4, 9)]),
    geometry=st.tuples(*map(st.sampled_from, GEOMETRIES)),
    images=st.integers(1, 3),
    steps=st.sampled_from([(1,), (4,), (3, 2)]),
    largest=st.sampled_from([1, 1, 4, 255]),
    bound=st.sampled_from([1, 7, 127]),
    flows=FLOWS,
    reset_mode=RESETS,
    per_channel=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_neurons_fire_as_behind_an_integer_convolution(
    kind, channels, sizes, geometry, images, steps, largest, bound, flows, reset_mode, per_channel, seed
):
    generator = torch.Generator().manual_seed(seed)
    weight_q, plan = draw_convolution(generator, kind, channels, sizes, geometry, bound, largest)
    assume(plan is not None)
    fires, bias_q = with_bias(generator, weight_q, plan, flows)
    fires.events = None
    Vthr = draw_integers(generator, 1, 400 * largest, (channels[1], 1, 1) if per_channel else (), torch.int32)
    assert_fires(fires, weight_q, bias_q, generator, images, steps, flows, Vthr, reset_mode, rate=1)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from([(8, 16), (24, 48), (16, 144), (40, 272)]),
    sizes=st.sampled_from([((3, 3), 4, 8), ((1, 1), 5, 4), ((1, 3), 5, 8), ((5, 2), 7, 6)]),
    geometry=st.tuples(*map(st.sampled_from, ([(1, 1), (1, 2), (3, 2)], [(0, 0), (1, 1), (0, 2)], [(1, 1), (1, 2)]))),
    images=st.integers(1, 3),
    steps=st.sampled_from([(1,), (3, 2)]),
    rate=st.sampled_from([0, 0.1, 0.5, 1]),
    bound=st.sampled_from([1, 7, 127]),
    flows=FLOWS,
    reset_mode=RESETS,
    per_channel=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_neurons_fire_by_events(
    channels, sizes, geometry, images, steps, rate, bound, flows, reset_mode, per_channel, seed
):
    """As behind an integer convolution, however many inputs spike."""
    generator = torch.Generator().manual_seed(seed)
    weight_q, plan = draw_convolution(generator, KINDS[-1], channels, sizes, geometry, bound, 1)
    assume(plan is not None)
    fires, bias_q = with_bias(generator, weight_q, plan, flows)
    fires.events, fires.run = events_of(weight_q, plan), None  # the other kernel cannot run
    assert fires.events is not None
    Vthr = draw_integers(generator, 1, 400, (channels[1], 1, 1) if per_channel else (), torch.int32)
    assert_fires(fires, weight_q, bias_q, generator, images, steps, flows, Vthr, reset_mode, rate)


def draw_convolution(generator, kind, channels, sizes, geometry, bound, largest):
    """`weight_q, plan`: weights up to `bound`, and the TilePlan with the instructions `kind`, or None."""
    kernel, *size = sizes
    weight_q = draw_integers(generator, -bound, bound, (channels[1], channels[0], *kernel), torch.int8)
    return weight_q, plan_with(kind, weight_q, (*geometry, 1), (channels[0], *size), largest)


def with_bias(generator, weight_q, plan, flows):
    """`fires, bias_q`: the FiringConvolution with a bias if `flows` names one, and the bias or None."""
    bias_q = draw_integers(generator, -50, 50, (len(weight_q),), torch.int32) if "bias" in flows else None
    return FiringConvolution(weight_q, bias_q, plan), bias_q


def assert_fires(fires, weight_q, bias_q, generator, images, steps, flows, Vthr, reset_mode, rate):
    """Assert that spikes and potentials are those of the integer reference and of plain neurons.

    The share `rate` of the inputs is not 0. Each of `steps` is a chunk, which starts from the potentials that the one
    before left.
    """
    plan = fires.plan
    size = plan.sample[1:] if plan.output == plan.out_shape else plan.out_shape[1:]  # a plan may merge rows
    neuron, membrane = IFNeuron(Vthr, 1.0, 0, reset_mode, largest_current=1), None
    for count in steps:
        spikes = draw_spikes(generator, rate, plan.largest, (count * images, plan.sample[0], *size))
        current = convolve(spikes, weight_q, bias_q, *plan.conv)
        membrane = at_rest(images, current) if membrane is None else membrane
        extra, rest = draw_others(generator, flows, current.shape, Vthr.shape)
        total = Current(current + (0 if rest is None else rest), count, False, extra)
        wanted, expected, _ = neuron.run(total, membrane.clone())
        assert fires.fits(extra, rest, Vthr, membrane)
        sent, fired = fires(spikes, extra, rest, Vthr, membrane, reset_mode == "subtraction", count)
        assert torch.equal(sent, wanted) and torch.equal(membrane, expected) and fired == wanted.count_nonzero()


def at_rest(images, current):
    """Membrane potentials of 0 for neurons that a current [T*B, C, H, W] flows into."""
    return torch.zeros(images, *current.shape[1:]).contiguous(memory_format=torch.channels_last)


def draw_spikes(generator, rate, largest, shape):
    """Numbers from 0 to `largest`, of which at most the share `rate` is not 0, uint8."""
    return draw_integers(generator, 0, largest, shape, torch.uint8) * (torch.rand(shape, generator=generator) < rate)


def events_of(weight_q, plan):
    """The Events of a convolution, however many inputs spike; None where they cannot be used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_convolution, "largest_share", lambda plan: 1)  # of all inputs
        return plan_events(weight_q, plan)


def draw_others(generator, flows, shape, weight_shape):
    """`extra, rest`: spikes with a weight, and a current, that flow into the neurons, too, if `flows` names them."""
    extra = rest = None
    if "extra" in flows:
        weight = draw_integers(generator, -9, 30, weight_shape, torch.int32)
        extra = draw_integers(generator, 0, 1, shape, torch.uint8), weight
    if "rest" in flows:
        rest = draw_integers(generator, -90, 90, shape, torch.int32).float()
    return extra, rest


def plan_with(kind, *arguments):
    """A TilePlan with the given instructions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firing_convolution, "usable_instructions", lambda: (kind,))
        return plan_tiles(*arguments)


def convolve(spikes, weight_q, bias_q, stride, padding, dilation):
    """The currents of the integer reference, float32."""
    config = {"stride": stride, "padding": padding, "dilation": dilation, "groups": 1}
    current = reference.convolve(spikes.numpy().astype(np.int64), weight_q.numpy().astype(np.int64), config)
    return torch.from_numpy(current).float() + (0 if bias_q is None else bias_q.view(-1, 1, 1))


def test_sums_of_16_bits_go_to_the_potentials_in_time():
    """With AVX2, products of the largest inputs and weights: one more position of the kernel would overflow."""
    kind = KINDS[-1]
    if kind.product is not None:
        pytest.skip("no AVX2")
    for channels, largest, at_once in ((16, 1, 9), (64, 1, 8), (512, 1, 1), (516, 1, 1), (520, 1, 0), (4, 129, 1)):
        weight_q = torch.full((16, channels, 3, 3), 127, dtype=torch.int8)
        plan = plan_with(kind, weight_q, ((1, 1), (0, 0), (1, 1), 1), (channels, 3, 10), largest)
        assert (0 if plan is None else plan.taps_at_once) == at_once
        if plan is not None:
            spikes = torch.full((1, channels, 3, 10), largest, dtype=torch.uint8)
            membrane = torch.zeros(1, 16, 1, 8).contiguous(memory_format=torch.channels_last)
            Vthr = torch.tensor(2**24 - 1, dtype=torch.int32)
            sent, fired = FiringConvolution(weight_q, None, plan)(spikes, None, None, Vthr, membrane, True, 1)
            assert fired == 0 and not sent.any() and (membrane == 127 * 9 * channels * largest).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("inputs, columns", [(24, 3), (40, 2), (80, 1), (88, 0)])
def test_sums_of_16_bits_hold_the_columns_of_a_kernel(inputs, columns, sign):
    """All inputs spike, and all weights are the largest; one more column would overflow."""
    weight_q = torch.full((16, inputs, 3, 3), sign * 127, dtype=torch.int8)
    plan = plan_tiles(weight_q, ((1, 1), (0, 0), (1, 1), 1), (inputs, 3, 10), 1)
    events = events_of(weight_q, plan)
    assert (0 if events is None else events.columns) == columns
    if events is not None:
        fires = FiringConvolution(weight_q, None, plan)
        fires.events = events
        membrane = torch.zeros(1, 16, 1, 8).contiguous(memory_format=torch.channels_last)
        fires(torch.ones(1, inputs, 3, 10, dtype=torch.uint8), None, None, torch.tensor(2**23), membrane, True, 1)
        assert (membrane == sign * 127 * 9 * inputs).all()


def test_events_pay_where_few_inputs_of_a_wide_layer_spike():
    """The share grows with the layer; narrow layers, counts of spikes and odd numbers of channels have none."""

    def share(channels, inputs=None, largest=1, kind=KINDS[-1]):
        weight_q = torch.ones((channels, inputs or channels, 3, 3), dtype=torch.int8)
        plan = plan_with(kind, weight_q, ((1, 1), (1, 1), (1, 1), 1), (inputs or channels, 8, 8), largest)
        events = plan_events(weight_q, plan)
        return 0 if events is None else events.share

    shares = [share(channels) for channels in (16, 32, 64, 128)]
    assert shares[0] == 0 and sorted(shares) == shares and shares[-1] > 0.1
    assert share(64, 60) == share(64, largest=2) == share(40) == 0
    if len(KINDS) > 1:
        assert share(128, kind=KINDS[0]) < shares[-1]  # instructions for products of spikes and weights
    weight_q = torch.ones((64, 64, 3, 3), dtype=torch.int8)
    events = plan_events(weight_q, plan_with(KINDS[-1], weight_q, ((1, 1), (1, 1), (1, 1), 1), (64, 8, 8), 1))
    spikes = np.zeros(1000, np.uint8)
    spikes[: int(1000 * events.share)] = 1
    assert events.pay(spikes)
    spikes[int(1000 * events.share)] = 1
    assert not events.pay(spikes)


@pytest.mark.parametrize(
    "weight, conv, sample",
    [
        ((16, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 2), (8, 6, 6)),  # groups
        ((12, 8, 3, 3), ((1, 1), (1, 1), (1, 1), 1), (8, 6, 6)),  # 12 channels are no whole vectors
        ((16, 8, 3, 3), ((1, 1), (1, 1), (1, 1), 1), (7, 6, 6)),  # other channels than the input's
        ((16, 8, 3, 3), ((1, 1), (0, 0), (1, 1), 1), (8, 2, 2)),  # an input smaller than the kernel
    ],
)
def test_convolutions_without_a_plan(weight, conv, sample):
    assert plan_tiles(torch.ones(weight, dtype=torch.int8), conv, sample, 1) is None


def residual_network():
    """Two residual blocks, with an identity and with a convolution beside them, wide enough for whole vectors."""
    torch.manual_seed(0)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(x + self.second(F.relu(self.body(x))))
        x = F.relu(self.down(x) + self.shortcut(x))
        return self.fc(x.mean((2, 3)))

    layers = {"first": conv(2, 16), "body": conv(16, 16), "second": conv(16, 16)}
    layers |= {"down": conv(16, 32, stride=2), "shortcut": conv(16, 32, 1, stride=2), "fc": nn.Linear(32, 4)}
    return with_statistics(Function(forward, **layers))


def test_a_network_fires_in_its_convolutions(monkeypatch):
    """The spikes of the reference; a `watch` reads the same currents; other integers are packed anew."""
    calls = []
    fire = FiringConvolution.__call__
    monkeypatch.setattr(FiringConvolution, "__call__", lambda self, *given: calls.append(self) or fire(self, *given))
    net, images = residual_network(), torch.rand(8, 2, 8, 8)
    snn = convert(net, images, 16, 8)
    alone = copy.deepcopy(snn)
    calls.clear()  # those of the correction
    with monkeypatch.context() as patch:
        patch.setattr(kernels.currents, "plan_tiles", lambda *arguments: None)
        expected = alone(images[:5], every_step=True)
    assert not calls
    assert torch.equal(snn(images[:5], every_step=True), expected) and calls
    assert_every_spike_is_reproduced(snn, images[:3], 16)
    layer = next(entry.op for entry in snn.ops.values() if getattr(entry.op, "bias_q", None) is not None)
    with torch.no_grad():
        layer.bias_q += 40
    changed = snn(images[:5])
    assert not torch.equal(changed, expected[-1])
    assert torch.equal(changed, copy.deepcopy(snn)(images[:5]))


def test_a_wide_network_adds_the_weights_of_its_events(monkeypatch):
    """The spikes of the reference, where every second call does."""
    ran = []
    # also on a processor with VNNI, where events never pay in layers of this size
    monkeypatch.setattr(event_convolution, "largest_share", lambda plan: event_convolution.MOST_SHARE)
    for kernel in (event_convolution.Events, FiringConvolution):
        monkeypatch.setattr(kernel, "run", watched(kernel.run, ran, kernel))
    torch.manual_seed(0)
    convs = [layer for inputs in (3, 64, 64) for layer in (conv(inputs, 64), nn.ReLU())]
    snn = convert(
        with_statistics(nn.Sequential(*convs, nn.Flatten(), nn.Linear(2304, 4))), torch.rand(8, 3, 6, 6), 16, 8
    )
    monkeypatch.setattr(event_convolution.Events, "pay", lambda self, spikes: len(ran) % 2 == 0)
    ran.clear()
    assert_every_spike_is_reproduced(snn, torch.rand(3, 3, 6, 6), 16)
    assert set(ran) == {event_convolution.Events, FiringConvolution}


def watched(run, ran, kernel):
    """`run`, which also adds `kernel` to the list `ran`."""
    return lambda *given: ran.append(kernel) or run(*given)


def test_a_pending_current_is_computed_for_whoever_reads_it():
    generator = torch.Generator().manual_seed(0)
    weight_q = draw_integers(generator, -7, 7, (16, 3, 3, 3), torch.int8)
    plan = plan_tiles(weight_q, ((1, 1), (1, 1), (1, 1), 1), (3, 4, 4), 1)
    spikes = draw_integers(generator, 0, 1, (6, 3, 4, 4), torch.uint8)
    current = convolve(spikes, weight_q, None, (1, 1), (1, 1), (1, 1))
    fires = FiringConvolution(weight_q, None, plan)
    pending = firing_convolution.PendingConvolution(fires, spikes, lambda: current)
    doubled = Current(None, 3, pending=pending.plus(current).plus(current))
    extra = draw_integers(generator, 0, 1, current.shape, torch.uint8), torch.tensor(5)
    joined = Current(None, 3, pending=pending).with_spikes(*extra)
    assert pending.shape == current.shape and torch.equal(doubled.data, 3 * current) and doubled.pending is None
    assert torch.equal(joined.total(), current + 5 * extra[0])
    for reset_mode in ("zero", "subtraction"):
        for source in (Current(None, 3, pending=pending.plus(current)), Current(2 * current, 3)):
            neuron = IFNeuron(torch.tensor(20), 1.0, torch.tensor(10), reset_mode, largest_current=1)
            train = neuron(source, Memory(3))
            wanted, _, _ = neuron.run(Current(2 * current, 3), torch.full((2, 16, 4, 4), 10.0))
            assert torch.equal(train.data, wanted)
