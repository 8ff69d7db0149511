"""Spike counts without spikes (`kernels.counts_cpu`): those of the neuron itself, for every schedule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion import correction
from conversion.correction import KeptCurrents, decoded_steps, shifted
from kernels.counts_cpu import can_count
from spike_neurons import IFNeuron
from spike_tensor import Current


@given(
    shape=st.sampled_from([(3, 5), (2, 3, 4, 5), (1, 1, 2, 2), (2, 1500)]),
    timesteps=st.integers(1, 9),
    listen=st.integers(0, 9),
    window=st.none() | st.integers(1, 9),
    reset_mode=st.sampled_from(["subtraction", "zero"]),
    constant=st.booleans(),
    per_channel=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_spikes(shape, timesteps, listen, window, reset_mode, constant, per_channel, seed):
    generator = torch.Generator().manual_seed(seed)
    sample = (shape[1], *[1] * (len(shape) - 2)) if per_channel else ()
    rows = 1 if constant else timesteps
    data = torch.randint(-20, 40, (rows * shape[0], *shape[1:]), generator=generator).float()
    Vthr = torch.randint(1, 60, sample, generator=generator, dtype=torch.int32)
    start = torch.randint(-20, 40, sample, generator=generator, dtype=torch.int32)
    added = torch.randint(-3, 4, sample, generator=generator)
    neuron = IFNeuron(Vthr, 0.5, start, reset_mode, 40, listen=min(listen, timesteps), window=window)
    current = Current(data, timesteps, constant)
    expected = neuron(shifted(current, added)).to_float()
    assert torch.equal(decoded_steps(neuron, current, added), expected)


@pytest.mark.skipif(not can_count(torch.zeros(1)), reason="numba is missing")
def test_currents_are_kept_within_the_limit_and_take_what_biases_add(monkeypatch):
    computed = []

    def compute(n):
        computed.append(n)
        return Current(torch.full((2, 4), float(n)), 1)  # 32 bytes

    monkeypatch.setattr(correction, "MOST_KEPT", 64)
    currents = KeptCurrents(compute, [0, 1, 2], is_whole=True)
    for _ in range(2):
        assert [currents.of(n).data[0, 0].item() for n in range(3)] == [0, 1, 2]
    assert computed == [0, 1, 2, 2] and list(currents.kept) == [0, 1]
    currents.add(torch.tensor(5))
    assert [currents.take(n).data[0, 0].item() for n in range(2)] == [5, 6]
    assert not currents.kept
    floats = KeptCurrents(compute, [0], is_whole=False)
    floats.of(0)
    floats.add(torch.tensor(0.5))
    assert not floats.kept  # a sum of floats depends on its order: the layer computes it again
