"""Layers that listen before they fire: every spike, and at d = T the quantized ANN itself."""

import numpy as np
import pytest
import torch
from helpers import MODELS, convert, slow, small_model, spikes_and_first_currents
from reference import quantized_ann, simulate

import ann2snn
from runtime.cli import run_script
from spike_dag import load_dag
from spike_neurons import IFNeuron
from spike_tensor import Current


@pytest.mark.parametrize("listen", [slow(1), 3, slow(8)])
@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", MODELS)
def test_every_spike(name, reset_mode, listen):
    net, images = small_model(name)
    snn = convert(net, images, 8, 6, listen=listen, reset_mode=reset_mode, maxpool="gate", signed="pair")
    for engine, timesteps in (("auto", 8), ("auto", 3), ("reference", 8)):
        snn.set_engine(engine)
        trains, currents = spikes_and_first_currents(snn, images[:3], timesteps)
        expected = simulate(snn, currents, timesteps)
        assert all(np.array_equal(trains[layer], expected[layer]) for layer in snn.spiking_layers())


@pytest.mark.parametrize("timesteps", [slow(1), 4, slow(7)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_listening_to_everything_is_the_quantized_ann(name, bits, timesteps):
    """The spike counts of every layer are those of an integer ANN that knows no time."""
    net, images = small_model(name)
    snn = convert(net, images, timesteps, bits, listen=timesteps, maxpool="gate", signed="pair")
    trains, _ = spikes_and_first_currents(snn, images, timesteps)
    from_image = {name for name, neuron in snn.neurons().items() if neuron.largest_current is None}
    counts = quantized_ann(snn, {name: trains[name] for name in from_image}, timesteps)
    assert set(counts) == set(trains) and len(counts) > len(from_image)
    for layer, train in trains.items():
        assert np.array_equal(train.astype(np.int64).sum(0), counts[layer]), layer


def test_three_steps_by_hand():
    """u = 1, Vthr = 4, currents 3, -9, 6: firing at once sends a spike that the sum, 1, does not bear out."""
    spikes = {}
    for listen in (0, 1, 2, 3):
        neuron = IFNeuron(torch.tensor(4), 1.0, torch.tensor(1), "subtraction", largest_current=9, listen=listen)
        spikes[listen] = neuron(Current(torch.tensor([[3.0], [-9.0], [6.0]]), 3)).data.flatten().tolist()
    assert spikes == {0: [1, 0, 0], 1: [0, 0, 0], 2: [0, 0, 0], 3: [0, 0, 0]}
    late = IFNeuron(torch.tensor(4), 1.0, torch.tensor(0), "subtraction", largest_current=9, listen=2)
    assert late(Current(torch.tensor([[5.0], [4.0], [3.0]]), 3)).data.flatten().tolist() == [1, 1, 1]


def test_duration_counts_the_longest_path(tmp_path):
    net, images = small_model("shortcuts")
    assert convert(net, images, 8, 8).duration() == {"firing": 8, "interval": 8, "latency": 8}
    snn = convert(net, images, 8, 8, listen=3)
    neurons = ["relu1", "relu2", "relu3", "add4", "relu4", "relu5"]
    assert snn.spiking_layers() == neurons
    assert snn.duration() == {"firing": 8, "interval": 11, "latency": 8 + 3 * len(neurons)}
    torch.save(snn, tmp_path / "snn.pth")
    loaded = load_dag(tmp_path / "snn.pth")
    assert loaded.duration() == snn.duration() and torch.equal(loaded(images), snn(images))


def test_duration_waits_for_what_stays_ann():
    net, images = small_model("shortcuts")
    snn = convert(net, images, 8, 8, ann_layers=("linear1", "relu5"))
    assert snn.duration()["latency"] == 8
    snn = convert(net, images, 8, 8, ann_layers=("a", "add1", "relu2"))
    assert snn.duration() == {"firing": 8, "interval": 8, "latency": 16}


def test_impossible_listening_is_refused(tmp_path, capsys):
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match="listen 9: use 0 to 8"):
        convert(net, images, 8, 8, listen=9)
    argv = f"debug_net0 --dataset debug0 -e 0 --timesteps 4 --listen 5 --save_file {tmp_path}/snn.pth".split()
    with pytest.raises(SystemExit) as end:
        run_script(ann2snn.main, ann2snn.parse_args(argv))
    assert end.value.code == 2 and "--listen 5 is over --timesteps 4" in capsys.readouterr().err
