"""On a GPU: every spike, the kernel of the neurons, finetuning, and the command line; left out where there is none."""

import json

import pytest
import torch
from helpers import (
    CHOICES,
    MODELS,
    assert_every_spike_is_reproduced,
    assert_learn_alike,
    convert,
    learn,
    learning_inputs,
    neuron_inputs,
    prepared,
    small_model,
    thresholds,
)
from torch import nn

import ann2snn
from finetuning.levels import quantize_activations
from finetuning.on_spikes import GRADIENTS, finetune_spikes
from kernels.memory_order import order
from kernels.neurons import learning_steps, learning_steps_back
from runtime.cli import run_script
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import load_dag
from spike_neurons import IFNeuron, learning_steps_back_in_turn, learning_steps_in_turn
from spike_tensor import Current

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def model(request):
    """A small network and its images, on the GPU."""
    net, images = small_model(request.param)
    return net.cuda(), images.cuda()


every_model = pytest.mark.parametrize("model", MODELS, indirect=True)


@pytest.mark.parametrize("kind", ["steps", "half", "constant", "extra"])
@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (4, 33), (1, 2000)])
def test_compiled_neurons_fire_as_the_plain_ones(shape, granularity, kind):
    for seed, reset_mode in enumerate(("zero", "subtraction")):
        steps, constant, extra, membrane = neuron_inputs(shape, 5, seed, kind)
        given = steps.half() if kind == "half" else constant if steps is None else steps
        neuron = IFNeuron(thresholds(shape, granularity, seed), 1.0, 0, reset_mode, largest_current=30)
        plain, potentials, _ = neuron.run(Current(given.float(), 5, steps is None, extra), membrane.clone())
        extra = None if extra is None else tuple(each.cuda() for each in extra)
        on_gpu = torch.empty_like(membrane, memory_format=order(membrane), device="cuda").copy_(membrane)
        spikes, _, _ = neuron.cuda().run_compiled(Current(given.cuda(), 5, steps is None, extra), on_gpu)
        assert torch.equal(spikes.cpu(), plain) and torch.equal(on_gpu.cpu(), potentials)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("shape", [(1, 3, 5, 7, 6), (4, 2, 1, 3, 3), (16, 4, 33), (5, 1, 2000)])
def test_compiled_neurons_learn_as_the_plain_ones(shape, granularity, subtract):
    for listen in {0, 1, shape[0]}:
        given = *(each.cuda() for each in learning_inputs(shape, granularity, listen)), listen, subtract
        found = learn(learning_steps, learning_steps_back, *given)
        assert_learn_alike(found, learn(learning_steps_in_turn, learning_steps_back_in_turn, *given))


@pytest.mark.parametrize("options", [{}, {"reset_mode": "zero"}, {"granularity": "channel"}, {"listen": 16}], ids=str)
@every_model
def test_every_spike(model, options):
    net, images = model
    for bits, per_channel in ((1, False), (4, True), (8, False)):
        snn = convert(net, images, 16, bits, per_channel=per_channel, **CHOICES, **options)
        for engine in ("auto", "reference"):
            snn.set_engine(engine)
            if "listen" not in options:
                assert_every_spike_is_reproduced(snn, images[:3], 16)
        both = [snn.set_engine(engine) or snn(images) for engine in ("auto", "reference")]
        assert torch.allclose(*both, rtol=1e-5, atol=1e-6)


@every_model
def test_listening_as_long_as_firing_is_the_network_of_levels(model):
    net, images = model
    ann = quantize_activations(prepared(net, images), [(images,)], "cuda", 4)
    snn = convert_dag(ann, images, 4, 32, listen=4, correction="none")
    with torch.no_grad():
        expected = ann(images)
    close = (snn(images) - expected).abs() <= 1e-3 * expected.abs().max()
    assert close.float().mean() >= 0.9  # an activation in the middle of two levels may round to either


def convert_dag(dag, images, timesteps, bits, **options):
    """The spiking network of a prepared one."""
    return trans_ann2snn_weight(dag, [(images,)], images.device, timesteps, bits, **CHOICES, **options)


@pytest.mark.parametrize("gradient", GRADIENTS)
@every_model
def test_every_spike_after_finetuning(model, gradient):
    net, images = model
    snn, labels = convert(net, images, 4, 4, **CHOICES), torch.arange(len(images)) % 3
    snn = finetune_spikes(
        snn, [(images, labels)], "cuda", 3, criterion=nn.CrossEntropyLoss(), teacher=prepared(net, images), lr=0.05,
        gradient=gradient,
    )  # fmt: skip
    assert_every_spike_is_reproduced(snn, images[:3], 4)


def test_command_line(tmp_path, capsys):
    """Finetuned, converted and finetuned again; the saved network is the same on a CPU."""
    saved, results = tmp_path / "snn.pth", tmp_path / "results.json"
    argv = "example_net --device cuda --ann_weight checkpoint/example_net_ann.pth -e 2 --timesteps 4 --finetune_snn 1"
    argv += f" --activation_levels 4 --finetune_distill 0.5 --save_file {saved} --results {results}"
    run_script(ann2snn.main, ann2snn.parse_args(argv.split()))
    top1 = json.loads(results.read_text())["snn_top1"]
    assert top1 > 93 and f"{top1:.2f}" in capsys.readouterr().out
    snn = load_dag(saved)
    images = torch.rand(20, 1, 32, 32)
    with torch.no_grad():
        on_cpu, on_gpu = snn(images), snn.cuda()(images.cuda()).cpu()
    close = (on_cpu - on_gpu).abs() <= 1e-3 * on_cpu.abs().max()
    assert close.float().mean() >= 0.9  # the image's currents differ in float32's last bits, so a spike may


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_is_simulated_as_its_images_are(size):
    net, images = small_model("shortcuts")
    snn = convert(net.cuda(), images.cuda(), 16, 8, **CHOICES)
    whole, parts = snn(images.cuda()), torch.cat([snn(part) for part in images.cuda().split(size)])
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-4)
