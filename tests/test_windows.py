"""Spike counts in one pass, where every layer hears everything before it fires, and windows of `--listen auto`."""

import numpy as np
import pytest
import torch
from helpers import MODELS, convert, prepared, slow, small_model, spikes_and_first_currents
from hypothesis import given
from hypothesis import strategies as st
from reference import simulate

import ann2snn
import conversion.correction
import spike_simulator
from conversion.plan import plan_conversion
from conversion.windows import SHARES, Search, windows_of, with_windows
from options import ConversionOptions
from runtime.cli import run_script
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import load_dag
from spike_neurons import IFNeuron
from spike_simulator import IMAGE, Stages, counting_of, last_of, last_steps
from spike_tensor import Current, record_firing_ratios

CHOICES = {"maxpool": "gate", "signed": "pair"}


def counts_at_once(snn, images, timesteps):
    return counting_of(snn, Stages(snn), (images,), timesteps) is not None


def adds_image_to_spikes(snn):
    """Whether a neuron reads spikes and the image's real-valued current: floats, whose sum needs the steps."""
    lengths = last_steps(snn, Stages(snn), snn.timesteps)
    floats = [name for name, neuron in snn.neurons().items() if neuron.largest_current is None]
    return any(last_of([lengths[node] for node in snn.ops[name].inputs]) != IMAGE for name in floats)


def step_by_step(monkeypatch, module=spike_simulator):
    monkeypatch.setattr(module, "counting_of", lambda *args: None)


def outputs_and_rates(snn, images, timesteps):
    with record_firing_ratios() as ratios:
        outputs = snn(images, timesteps=timesteps, every_step=True)
        return outputs, list(ratios), snn(images, timesteps=timesteps)


@pytest.mark.parametrize("timesteps", [1, 5, 300])  # 300 counts do not fit into a byte
@pytest.mark.parametrize("per_channel", ["none", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_one_pass_gives_the_counts_of_all_steps(name, per_channel, timesteps, monkeypatch):
    net, images = small_model(name)
    options = CHOICES | {"maxpool": "or" if per_channel == "both" else "gate"}
    snn = convert(net, images, timesteps, 4, listen=timesteps, per_channel=per_channel, **options)
    assert counts_at_once(snn, images, timesteps) != adds_image_to_spikes(snn)
    outputs, rates, last = outputs_and_rates(snn, images, timesteps)
    step_by_step(monkeypatch)
    expected, expected_rates, expected_last = outputs_and_rates(snn, images, timesteps)
    assert torch.equal(outputs, expected) and torch.equal(last, expected_last)
    # the same spikes; the layer behind them adds floats, on some processors in another order for a larger batch
    torch.testing.assert_close(last, outputs[-1], rtol=1e-6, atol=1e-6)
    assert rates == pytest.approx(expected_rates, rel=1e-6)


@pytest.mark.parametrize("correction", ["potential", "bias"])
@pytest.mark.parametrize("name", MODELS)
def test_a_correction_by_counts_is_that_of_all_steps(name, correction, monkeypatch):
    net, images = small_model(name)
    found = convert(net, images, 6, 4, listen=6, correction=correction, **CHOICES).state_dict()
    step_by_step(monkeypatch, conversion.correction)
    expected = convert(net, images, 6, 4, listen=6, correction=correction, **CHOICES).state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():  # the potential of float currents is a sum of floats in another order
        assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-5 if value.is_floating_point() else 0), key


def test_what_needs_steps_gets_steps():
    net, images = small_model("shortcuts")
    exact = {"listen": 4, **CHOICES}
    assert counts_at_once(convert(net, images, 4, 4, **exact), images, 4)
    assert counts_at_once(convert(net, images, 4, 4, **exact), images, 3)  # fewer steps than it listens for
    assert not counts_at_once(convert(net, images, 4, 4, **exact), images, 5)
    assert not counts_at_once(convert(net, images, 4, 4, listen=3), images, 4)
    assert not counts_at_once(convert(net, images, 4, 4, reset_mode="zero", **exact), images, 4)
    assert not counts_at_once(convert(net, images, 4, 32, **exact), images, 4)
    assert not counts_at_once(convert(net, images, 4, 4, ann_layers=("a", "add1", "relu2"), **exact), images, 4)
    snn = convert(net, images, 4, 4, **exact)
    snn.set_engine("reference")
    assert not counts_at_once(snn, images, 4)


def test_a_window_by_hand():
    """u = 11, Vthr = 2: five spikes, of which a window of 3 steps takes three."""
    fired = {}
    for window in (None, 3, 9):
        known = {"largest_current": 9, "listen": 1, "window": window}
        neuron = IFNeuron(torch.tensor(2), 1.0, torch.tensor(1), "subtraction", **known)
        current = Current(torch.tensor([[10.0], *[[0.0]] * 5]), 6)
        fired[window] = neuron(current).data.flatten().tolist()
    assert fired == {None: [1, 1, 1, 1, 1, 0], 3: [1, 1, 1, 0, 0, 0], 9: [1, 1, 1, 1, 1, 0]}


@pytest.mark.parametrize("per_channel", ["none", "both"])
@pytest.mark.parametrize("bits", [8, slow(2)])
@pytest.mark.parametrize("name", MODELS)
def test_every_spike_of_windows(name, bits, per_channel, tmp_path, monkeypatch):
    """Step by step, in one pass and in integers of NumPy: the same spikes, none of them outside of a window."""
    net, images = small_model(name)
    snn = convert(net, images, 9, bits, listen="auto", per_channel=per_channel, **CHOICES)
    torch.save(snn, tmp_path / "snn.pth")
    snn = load_dag(tmp_path / "snn.pth")
    assert counts_at_once(snn, images, 9) != adds_image_to_spikes(snn)
    trains, currents = spikes_and_first_currents(snn, images, 9)
    expected = simulate(snn, currents, 9)
    for layer, neuron in snn.neurons().items():
        assert np.array_equal(trains[layer], expected[layer])
        assert not trains[layer][neuron.most_spikes(9) :].any()
        falls = np.diff(trains[layer].astype(int), axis=0)
        assert (falls <= 0).all(), layer  # no gap: every spike comes as early as it can
    outputs = snn(images, every_step=True)
    step_by_step(monkeypatch)
    assert torch.equal(outputs, snn(images, every_step=True))


def test_windows_cost_less_than_listening_to_everything():
    net, images = small_model("shortcuts")
    snn = convert(net, images, 16, 8, listen="auto")
    windows = [neuron.window for neuron in snn.neurons().values()]
    assert all(1 <= window <= 16 for window in windows) and min(windows) < 16
    assert snn.duration()["latency"] < convert(net, images, 16, 8, listen=16).duration()["latency"]
    assert snn.duration()["firing"] == max(windows)
    biases = [entry.op.bias_q for entry in snn.ops.values() if getattr(entry.op, "bias_q", None) is not None]
    assert not any(bias.any() for bias in biases if not bias.is_floating_point())


def test_as_many_levels_as_the_window_has_steps():
    net, images = small_model("shortcuts")
    net = prepared(net, images)
    options = ConversionOptions(timesteps=12, weight_bitwidth=8, listen="auto")
    with_levels = with_windows(net, [(images, None)], "cpu", options)
    windows = windows_of(with_levels, plan_conversion(with_levels), 12)
    snn = trans_ann2snn_weight(with_levels, [(images, None)], "cpu", 12, 8, listen="auto")
    assert {name: neuron.window for name, neuron in snn.neurons().items()} == windows
    assert windows == {name: entry.op.levels.levels for name, entry in with_levels.ops.items() if entry.op.levels}
    assert all(entry.op.levels is None for entry in net.ops.values())  # the network itself stays as it was


def test_where_no_window_keeps_the_classes_all_have_t_steps(monkeypatch):
    net, images = small_model("shortcuts")
    monkeypatch.setattr(
        Search, "classes", lambda self, windows: torch.arange(4) + (set(windows.values()) - {7} != set())
    )
    snn = convert(net, images, 7, 8, listen="auto")
    assert {neuron.window for neuron in snn.neurons().values()} <= {7, None}
    assert snn.duration()["latency"] == convert(net, images, 7, 8, listen=7).duration()["latency"]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.integers(2, 64), st.integers(0, len(SHARES) - 1))
def test_windows_share_the_steps_by_the_cube_root_of_their_errors(errors, timesteps, number):
    search = Search.__new__(Search)
    search.names, search.timesteps = [f"op{i}" for i in range(len(errors))], timesteps
    windows = search.of_share(dict(zip(search.names, errors)), number)
    assert all(1 <= window <= timesteps for window in windows.values())
    order = sorted(search.names, key=lambda name: errors[int(name[2:])])
    assert [windows[name] for name in order] == sorted(windows.values())


def test_what_listens_to_no_windows_is_refused(tmp_path, capsys):
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match="listen auto needs reset_mode subtraction"):
        convert(net, images, 4, 4, listen="auto", reset_mode="zero")
    with pytest.raises(ValueError, match="listen auto needs integer weights of 1 to 8 bits"):
        convert(net, images, 4, 32, listen="auto")
    with pytest.raises(ValueError, match="unknown listen 'all', use a number of steps or auto"):
        convert(net, images, 4, 4, listen="all")
    argv = f"debug_net0 --dataset debug0 -e 0 --listen auto --reset_mode zero --save_file {tmp_path}/snn.pth".split()
    with pytest.raises(SystemExit) as end:
        run_script(ann2snn.main, ann2snn.parse_args(argv))
    assert end.value.code == 2 and "listen auto needs reset_mode subtraction" in capsys.readouterr().err
