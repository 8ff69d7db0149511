"""The simulator: timesteps, memory, bounds of currents, and what is known after each step."""

import pytest
import torch
from helpers import CHOICES, MODELS, conv, convert, small_model, spikes_and_first_currents
from torch import nn

import spike_simulator
import spike_tensor
from build_network import get_net_by_name
from networks.checkpoint import load_weights
from spike_simulator import bound_currents
from spike_tensor import SpikeTensor, record_firing_ratios

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("budget", [None, 2**20, 2**12, 1])
@pytest.mark.parametrize("every_step", [False, True])
def test_memory_budget_cuts_the_work_not_the_result(budget, every_step):
    net, images = small_model("shortcuts")
    snn = convert(net, images, 20, 4)
    expected = snn(images, every_step=every_step)
    snn.set_engine("auto", budget)
    parts, steps = spike_simulator.cut(snn, (images,), 20)
    assert (parts * steps * 4 * 49 * spike_bytes(snn, images) <= (budget or 2**40)) or (parts, steps) == (1, 1)
    assert torch.allclose(snn(images, every_step=every_step), expected, atol=1e-5)


@pytest.mark.parametrize("listen, bytes_per_value, steps, simulated", [(0, 16, 1, 20), (3, 24, 20, 20), (20, 16, 1, 1)])
def test_the_least_memory_is_that_of_one_image_on_each_thread(listen, bytes_per_value, steps, simulated):
    """simulated: the steps that a simulation cuts, 1 where it counts spikes in one pass."""
    net, images = small_model("shortcuts")
    snn = convert(net, images, 20, 4, listen=listen)
    per_step = torch.get_num_threads() * bytes_per_value * snn.largest_sample((images,))
    least = spike_simulator.least_memory(snn, (images,))
    assert least == steps * per_step
    snn.set_engine("auto", 1)
    smallest = spike_simulator.cut(snn, (images,), simulated)
    for budget in (least, 3 * least):
        snn.set_engine("auto", budget)
        parts, at_a_time = spike_simulator.cut(snn, (images,), simulated)
        assert parts * at_a_time * per_step <= budget
        assert ((parts, at_a_time) == smallest) == (budget == least)


def spike_bytes(snn, images):
    """Working set per element of the largest layer, in shares of a sample with four channels."""
    return spike_simulator.BYTES_PER_CURRENT * snn.largest_sample((images,)) / (4 * 49)


def test_biases_that_change_reach_the_packed_weights():
    net, images = small_model("upwards")
    snn = convert(net, images, 16, 8, maxpool="gate")
    layer = snn.ops["conv2"]["op"]
    spikes = torch.randint(0, 2, (2, 10, 6, 6), dtype=torch.uint8)
    before, added = layer.current_of(spikes), 0
    for _ in range(10):
        layer.bias_q = layer.bias_q + 1
        layer.bias_q = layer.bias_q + 2  # may lie where the first one lay
        added += 3
        assert torch.equal(layer.current_of(spikes), before + added)
    layer.bias_q += 4
    assert torch.equal(layer.current_of(spikes), before + added + 4)


def test_a_network_converts_and_runs_in_inference_mode():
    net, images = small_model("upwards")
    expected = convert(net, images, 16, 8, maxpool="gate")(images)
    with torch.inference_mode():
        assert torch.equal(convert(net, images, 16, 8, maxpool="gate")(images), expected)


def test_simulations_that_overlap_give_the_threads_back():
    threads = torch.get_num_threads()
    first, second = spike_simulator.one_thread_per_operator, spike_simulator.one_thread_per_operator
    assert first.__enter__() == second.__enter__() == threads
    first.__exit__()
    assert torch.get_num_threads() == 1
    second.__exit__()
    assert torch.get_num_threads() == threads


def test_no_timesteps_are_refused():
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match="timesteps 0: use a whole number, 1 to 65536"):
        convert(net, images, 16, 8)(images, timesteps=0)


def test_weights_that_are_loaded_reach_the_simulation():
    """Integers packed for one network are not used for another."""
    images = torch.rand(4, 2, 7, 7)
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layers = [conv(2, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 3)]
        nets.append(convert(nn.Sequential(*layers), images, 16, 8))
    first, second = nets
    assert not torch.equal(first(images), second(images))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(images), second(images))


def test_an_empty_batch_is_refused():
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match="the batch is empty"):
        convert(net, images, 16, 8)(images[:0])


@pytest.mark.parametrize("correction", ["none", "bias"])
@pytest.mark.parametrize("name", MODELS)
def test_bounds_of_currents_are_those_of_the_conversion(name, correction):
    net, images = small_model(name)
    snn = convert(net, images, 8, 8, correction=correction, **CHOICES)
    bounds = {layer: neuron.largest_current for layer, neuron in snn.neurons().items()}
    bound_currents(snn)
    assert bounds == {layer: neuron.largest_current for layer, neuron in snn.neurons().items()}
    for layer, neuron in snn.neurons().items():
        if neuron.largest_current is not None:
            assert neuron.largest_current >= largest_current_of(snn, layer, images)


def largest_current_of(snn, layer, images):
    """The largest |current| that flows into the neurons of op `layer`."""
    seen = []

    def watch(name, current, spikes):
        if name == layer:
            seen.append(current.total().abs().max().item())

    with torch.no_grad():
        spike_simulator.simulate(snn, (images,), snn.timesteps, watch=watch)
    return max(seen)


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
    later = train.to_float_every_step(torch.tensor([[2.0], [3.0]]), steps_before=3)
    assert later.flatten().tolist() == pytest.approx([4.5, 4.5, 3.6, 4.8, 4, 5])


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
