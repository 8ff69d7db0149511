"""Per-channel thresholds, bit widths by layer, and finetuning on spikes: numbers, and every spike afterwards."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    CHOICES,
    MODELS,
    assert_every_spike_is_reproduced,
    convert,
    prepared,
    slow,
    small_model,
    spikes_and_first_currents,
)
from torch import nn

import ann2snn
from build_network import get_net_by_name
from finetuning.on_spikes import (
    GRADIENTS,
    MOST_THROUGH_TIME,
    decoded_rates,
    finetune_on_spikes,
    finetune_spikes,
    groups_by_width,
    set_integers,
    shadow_weights,
    tandem_forward,
)
from networks.checkpoint import load_weights
from quantization import distillation_loss, groups_of, init_quantize_net, largest_integer
from runtime.cli import run_script
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import load_dag
from spike_layers import SpikeLinear
from spike_neurons import IFNeuron
from spike_tensor import Current


def test_bit_widths_by_layer(tmp_path):
    net, images = small_model("dense")
    layers = prepared(net, images).weighted_layers()
    widths = [2, 3, 4, 5, 6, 7, 8][: len(layers)] + [4] * (len(layers) - 7)
    snn = convert(net, images, 8, widths, **CHOICES)
    for op, bits in zip(snn.weighted_layers().values(), widths):
        assert op.weight_bits == bits
        if op.spiking:
            assert op.weight_q.abs().max() <= largest_integer(bits)
    assert_every_spike_is_reproduced(snn, images[:3], 8)
    torch.save(snn, tmp_path / "snn.pth")
    assert [op.weight_bits for op in load_dag(tmp_path / "snn.pth").weighted_layers().values()] == widths


def test_bit_widths_that_do_not_fit_are_refused():
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match=r"2 weight bit widths for .* layers, give one for each of conv1"):
        convert(net, images, 8, (4, 4))
    count = len(prepared(net, images).weighted_layers())
    with pytest.raises(ValueError, match=r"float weights .32. in all layers or in none"):
        convert(net, images, 8, [32] + [8] * (count - 1))
    with pytest.raises(ValueError, match="weight bit width 9"):
        convert(net, images, 8, [9] * count)


class Triangle(torch.autograd.Function):
    """A spike at u >= Vthr, and the surrogate gradient max(0, 1 - |u / Vthr - 1|) / Vthr."""

    @staticmethod
    def forward(ctx, membrane, Vthr):
        ctx.save_for_backward(membrane, Vthr)
        return (membrane >= Vthr).to(membrane.dtype)

    @staticmethod
    def backward(ctx, gradient):
        membrane, Vthr = ctx.saved_tensors
        return gradient * (1 - (membrane / Vthr - 1).abs()).clamp_min(0) / Vthr, None


@pytest.mark.parametrize("listen", [0, 2, 5])
@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_through_time_are_those_of_the_steps_in_turn(per_channel, reset_mode, listen):
    """Autograd follows u and the spikes step by step, the reset included; ours is one function of all steps."""
    torch.manual_seed(0)
    steps, weights = 4 * torch.randn(5, 3, 4, 2, 2, dtype=torch.float64), torch.randn(5, 3, 4, 2, 2).double()
    Vthr = torch.tensor([2.0, 3.0, 4.0, 5.0]).view(4, 1, 1) if per_channel else torch.tensor(3.0)
    neuron = IFNeuron(Vthr, 1.0, 0.5 * Vthr, reset_mode, largest_current=30, listen=listen)
    neuron.learns, steps = True, steps.requires_grad_()
    spikes = neuron.unroll(Current(steps.flatten(0, 1), 5), torch.float64).unflatten(0, (5, 3))
    (found,) = torch.autograd.grad((spikes * weights).sum(), steps)
    start = (0.5 * Vthr).double().requires_grad_()
    membrane, expected = start + steps[:listen].sum(0), []
    for t in range(5):
        membrane = membrane + steps[t + listen] if t + listen < 5 else membrane
        spike = Triangle.apply(membrane, Vthr.double())
        membrane = membrane - Vthr * spike if reset_mode == "subtraction" else membrane * (1 - spike)
        expected.append(spike)
    assert torch.equal(spikes.detach(), torch.stack(expected).float()) and 0 < spikes.mean() < 1
    wanted, of_start = torch.autograd.grad((torch.stack(expected) * weights).sum(), [steps, start])
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9) and wanted.abs().max() > 0.1
    share = neuron.learn_start()
    learnt = neuron.unroll(Current(steps.flatten(0, 1).detach(), 5), torch.float64).unflatten(0, (5, 3))
    (found,) = torch.autograd.grad((learnt * weights).sum(), share)
    assert torch.equal(learnt, spikes)
    assert torch.allclose(found, (of_start * Vthr).float(), rtol=1e-5) and found.abs().min() > 1e-3


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_initial_potentials_are_learnt_through_time(gradient):
    """Integers behind the first layer, a real number in the first; the tandem gradient leaves them as they are."""
    net, images = small_model("shortcuts")
    snn = convert(net, images, 4, 8, **CHOICES)
    tuned = finetune_spikes(snn, [(images, None)], "cpu", 4, lr=0.05, teacher=prepared(net, images), gradient=gradient)
    for name, neuron in tuned.neurons().items():
        before = snn.neurons()[name].initial_potential
        assert neuron.initial_potential.dtype == before.dtype and neuron.start_share is None
        moved = (neuron.initial_potential - before).abs() / neuron.Vthr
        assert moved.max() <= 4 * 0.05 + 1e-6 + 0.5 / neuron.Vthr.min()  # 4 steps of Adam, and the rounding
        assert moved.any() == (gradient == "time")
    assert_every_spike_is_reproduced(tuned, images[:3], 4)


@pytest.mark.parametrize("forward", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("listen", [0, slow(3), slow(8)])
@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_of_finetuning_is_the_spiking_network(name, listen, forward):
    """Outputs and decoded rates of every layer are those of the simulation, and every weight has a gradient."""
    net, images = small_model(name)
    snn = convert(net, images, 8, 8, listen=listen, **CHOICES)
    layers = shadow_weights(snn)
    expected, trains = snn(images), spikes_and_first_currents(snn, images, 8)[0]
    outputs, activations = forward(snn, (images,))
    assert torch.allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    for layer, decoded in activations:
        if snn.ops[layer]["op"].neuron is not None:
            scale = snn.ops[layer]["op"].neuron.scale_factor
            counts = torch.from_numpy(trains[layer].astype(np.float32).sum(0))
            assert torch.allclose(decoded, counts * (scale / 8), rtol=1e-5, atol=1e-6)
    outputs.square().sum().backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0 for layer in layers)


def test_the_gradient_is_that_of_the_clipped_ann():
    """One neuron by hand: w = 0.5, x = 0.8; decoded 0.4 of lambda = 1; d decoded / d w = x, and 0 above lambda."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([0.5, 5.0]).view(2, 1, 1, 1)
    net[3].weight.data.fill_(1.0)
    images = torch.full((4, 1, 1, 1), 0.8)
    snn = convert(net, images, 10, 32, threshold="max", granularity="channel", correction="none")
    neuron = snn.neurons()["relu1"]
    neuron.scale_factor, neuron.Vthr = torch.ones(2, 1, 1), torch.full((2, 1, 1), 1.0) / snn.ops["conv1"]["op"].unit
    shadow_weights(snn)
    outputs, _ = tandem_forward(snn, (images,))
    assert torch.allclose(outputs, torch.full((4, 1), 1.4))  # 0.4, and 1 that is cut off from 4
    outputs.sum().backward()
    assert torch.allclose(snn.ops["conv1"]["op"].weight.grad.flatten(), torch.tensor([4 * 0.8, 0.0]))


@pytest.mark.parametrize(("reset_mode", "expected"), [("subtraction", 0.8 + 1.08), ("zero", 0.8 + 1.224)])
def test_the_gradient_through_time_is_that_worked_out_by_hand(reset_mode, expected):
    """Vthr = 1, u[0] = 0.5, 0.3 a step: u = 0.8, then 1.1; the triangles are 0.8 and 0.9 high there.

    d u[2] = 1 + 1 - 0.8 for subtraction (2 without a spike, less what a spike would take off), 1 + 1 - 0.8 * 0.8 for
    zero; d spikes = 0.8 + 0.9 d u[2].
    """
    neuron = IFNeuron(1.0, 1.0, 0.5, reset_mode)
    neuron.learns = True
    current = torch.tensor([[0.3]], requires_grad=True)
    spikes = neuron(Current(current, 2, constant=True))
    assert spikes.data.flatten().tolist() == [0.0, 1.0]
    spikes.data.sum().backward()
    assert current.grad.item() == pytest.approx(expected)


def test_the_gradient_is_chosen_by_the_timesteps_unless_named(digits_images):
    """Through time at few timesteps, in tandem at many."""
    images = digits_images[:16]
    for timesteps, chosen in ((MOST_THROUGH_TIME, "time"), (MOST_THROUGH_TIME + 1, "tandem")):
        ann, qnet, snn = example_of_digits(images, 8, timesteps)
        tuned = {
            gradient: finetuned_loss(images, snn, ann, qnet=qnet, gradient=gradient)[0].state_dict()
            for gradient in (None, *GRADIENTS)
        }
        for gradient in GRADIENTS:
            same = all(torch.equal(value, tuned[None][key]) for key, value in tuned[gradient].items())
            assert same == (gradient == chosen)
    with pytest.raises(ValueError, match="unknown gradient 'rate', use one of time, tandem"):
        finetuned_loss(images, snn, ann, gradient="rate")


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("granularity", [slow("layer"), "channel"])
@pytest.mark.parametrize("name", MODELS)
def test_finetuning_keeps_integers_and_every_spike(name, granularity, gradient):
    net, images = small_model(name)
    ann = prepared(net, images)
    snn = convert(net, images, 8, 4, granularity=granularity, **CHOICES)
    before = {k: v.clone() for k, v in snn.state_dict().items()}
    loader = [(images, torch.zeros(len(images), dtype=torch.long))]
    tuned = finetune_spikes(snn, loader, "cpu", 8, lr=0.05, teacher=ann, gradient=gradient)
    assert all(torch.equal(v, before[k]) for k, v in snn.state_dict().items())  # the input is not changed
    changed = 0
    for layer, op in tuned.weighted_layers().items():
        if op.spiking:
            changed += (op.weight_q != snn.ops[layer]["op"].weight_q).sum().item()
            assert op.weight_q.dtype == torch.int8 and op.weight_q.abs().max() <= 7
    assert changed
    assert {n: x.Vthr.tolist() for n, x in tuned.neurons().items()} == {
        n: x.Vthr.tolist() for n, x in snn.neurons().items()
    }
    assert_every_spike_is_reproduced(tuned, images[:3], 8)


def example_of_digits(images, bits, timesteps):
    """The trained example_net, quantized without finetuning, and converted: `ann, qnet, snn`."""
    ann = prepared(load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth"), images)
    qnet = copy.deepcopy(ann)
    init_quantize_net(qnet, bits)
    return ann, qnet, trans_ann2snn_weight(qnet, [(images, None)], "cpu", timesteps, bits, threshold="mse")


def finetuned_loss(images, snn, ann, **options):
    """`tuned, loss`: after 5 epochs without labels, and how far the outputs then are from the ANN's."""
    loader = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in images.split(16)]
    tuned = finetune_spikes(snn, loader, "cpu", 5, teacher=ann, **options)
    with torch.no_grad():
        return tuned, distillation_loss(tuned(images), ann(images)).item()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("bits", "timesteps"), [slow(2, 8), (4, 2)])
def test_finetuning_without_labels_brings_digits_nearer_to_the_teacher(digits_images, bits, timesteps, gradient):
    ann, qnet, snn = example_of_digits(digits_images, bits, timesteps)
    with torch.no_grad():
        before = distillation_loss(snn(digits_images), ann(digits_images)).item()
    assert finetuned_loss(digits_images, snn, ann, qnet=qnet, gradient=gradient)[1] < 0.7 * before


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_full_precision_weights_start_as_the_integers_that_were_converted(bits, granularity):
    """Between the float weights and the middle of the interval of their integer, and not in its middle alone."""
    net, images = small_model("dense")
    qnet = prepared(net, images)
    init_quantize_net(qnet, bits)
    snn = trans_ann2snn_weight(qnet, [(images, None)], "cpu", 8, bits, granularity=granularity)
    before = {name: op.weight_q.clone() for name, op in snn.weighted_layers().items() if op.spiking}
    rates = decoded_rates(snn, (images,))
    layers = shadow_weights(snn, qnet)
    assert all(torch.equal(snn.ops[name]["op"].weight_q, weight_q) for name, weight_q in before.items())
    assert all(torch.equal(value, rates[layer]) for layer, value in decoded_rates(snn, (images,)).items())
    for name, layer in snn.weighted_layers().items():
        shadow, full = layer.weight.weight_back, qnet.ops[name]["op"].weight.weight_back
        assert torch.all((shadow - full) * (shadow - layer.weight) <= 1e-7)
        assert bits == 32 or not torch.allclose(shadow, layer.weight, rtol=1e-4)
    assert len(layers) == len(qnet.weighted_layers())


def test_full_precision_weights_let_few_images_move_few_bits(digits_images):
    """At a learning rate that does not reach the next integer from the middle of an interval, many others do."""
    ann, qnet, snn = example_of_digits(digits_images, 4, 4)
    losses, moved = [], []
    for start in (None, qnet):
        tuned, loss = finetuned_loss(digits_images, snn, ann, lr=0.0015, qnet=start)
        losses.append(loss)
        moved.append((tuned.ops["conv3"]["op"].weight_q != snn.ops["conv3"]["op"].weight_q).sum().item())
    assert moved[0] == 0 and moved[1] > 50
    assert losses[1] < 0.7 * losses[0]


def test_the_learning_rate_is_a_share_of_the_weights():
    layer = SpikeLinear(3, 2)
    layer.weight.data = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    layer.weight.weight_back = layer.weight.detach().clone()
    (group,) = groups_of([layer], 0.01)
    assert group["lr"] == pytest.approx(0.01 * (25 / 6) ** 0.5)
    assert [p is q for p, q in zip(group["params"], (layer.weight, layer.bias))] == [True, True]
    layer.weight.weight_back.zero_()
    layer.set_weight_scale(torch.tensor(4.0))
    assert groups_of([layer], 0.01)[0]["lr"] == pytest.approx(0.01 / 4)  # all integers are 0: their step counts


def test_wide_layers_learn_more_slowly_without_labels():
    """288 inputs learn at the full rate, 4 * 288 at half of it, relative to the RMS of the weights."""
    layers = [SpikeLinear(inputs, 2) for inputs in (3, 288, 1152)]
    for layer in layers:
        layer.weight.weight_back = torch.full_like(layer.weight, 2.0)
    assert [group["lr"] for group in groups_by_width(layers, 0.01)] == pytest.approx([0.02, 0.02, 0.01])


@pytest.mark.parametrize(("lr", "keeps"), [(1.0, False), (0.001, True)])
def test_epochs_without_labels_are_kept_if_they_help_images_held_out(digits_images, lr, keeps, capsys):
    """At a learning rate of 1 every step throws the weights over: the network stays as it was converted."""
    ann, qnet, snn = example_of_digits(digits_images, 4, 4)
    batches = [(part, None) for part in digits_images[:160].split(16)]
    args = SimpleNamespace(spike_epochs_unlabelled=1, spike_lr=lr, spike_gradient="tandem", calibration_samples=320)
    tuned = finetune_on_spikes(snn, qnet, ann, None, batches * 2, None, "cpu", args)
    assert (tuned is snn) != keeps
    line = "moved away from the float network's"
    assert (line in capsys.readouterr().err) != keeps


@pytest.mark.parametrize(("with_labels", "lr"), [(True, 0.01), (False, 0.0075)])
def test_the_learning_rate_of_four_timesteps(digits_images, with_labels, lr):
    ann, qnet, snn = example_of_digits(digits_images, 4, 4)
    batches = [(digits_images[:16], torch.arange(16) % 10)]
    criterion = nn.CrossEntropyLoss() if with_labels else None

    def first_weights(**options):
        tuned = finetune_spikes(snn, batches, "cpu", 1, teacher=ann, qnet=qnet, criterion=criterion, **options)
        return next(iter(tuned.weighted_layers().values())).weight.weight_back

    assert torch.equal(first_weights(), first_weights(lr=lr))
    assert not torch.equal(first_weights(), first_weights(lr=1.1 * lr))


def test_float_weights_start_as_they_are(digits_images):
    """Their scale, the lambda of what they read, is no interval to stay in."""
    _, qnet, _ = example_of_digits(digits_images, 32, 8)
    snn = trans_ann2snn_weight(qnet, [(digits_images, None)], "cpu", 8, 32, granularity="channel")
    with torch.no_grad():
        before = snn(digits_images)
        shadow_weights(snn, qnet)
        assert torch.allclose(snn(digits_images), before, rtol=1e-4, atol=1e-4)


def test_a_second_finetuning_goes_on_from_the_weights_of_the_first(digits_images):
    ann, qnet, snn = example_of_digits(digits_images, 4, 4)
    first, _ = finetuned_loss(digits_images, snn, ann, qnet=qnet)
    shadows = {name: op.weight.weight_back.clone() for name, op in first.weighted_layers().items()}
    assert any((shadows[n] - op.weight.weight_back).abs().max() > 0.01 for n, op in qnet.weighted_layers().items())
    second = copy.deepcopy(first)
    shadow_weights(second, first)
    for name, layer in second.weighted_layers().items():
        step = (1 / layer.weight_scale).max()
        assert (layer.weight.weight_back - shadows[name]).abs().max() <= 0.0101 * step  # off the edge, at most
        assert torch.equal(layer.weight, first.ops[name]["op"].weight)


def test_a_qnet_with_other_layers_is_refused():
    net, images = small_model("dense")
    snn, qnet = convert(net, images, 8, 4, **CHOICES), prepared(*small_model("shortcuts"))
    with pytest.raises(ValueError, match=r"the quantized network has no layer .* of this shape, give the one that was"):
        finetune_spikes(snn, [(images, None)], "cpu", 1, teacher=qnet, qnet=qnet)


def test_rounding_again_changes_nothing():
    net, images = small_model("dense")
    snn = convert(net, images, 8, 4, granularity="channel", correction="bias", **CHOICES)
    rates = decoded_rates(snn, (images,))
    layers = shadow_weights(snn)
    set_integers(layers)
    assert all(torch.equal(value, rates[layer]) for layer, value in decoded_rates(snn, (images,)).items())


def test_finetuning_needs_something_to_learn_and_says_when_it_diverges():
    net, images = small_model("shortcuts")
    snn, loader = convert(net, images, 4, 8), [(images, torch.zeros(len(images), dtype=torch.long))]
    with pytest.raises(ValueError, match="needs a criterion, for labels, or a teacher"):
        finetune_spikes(snn, loader, "cpu", 1)
    with pytest.raises(ValueError, match=r"finetuning on spikes diverged in epoch .*, lower its learning rate"):
        finetune_spikes(snn, loader, "cpu", 1, criterion=lambda outputs, labels: outputs.sum() * float("nan"))


def test_command_line(tmp_path, capsys):
    argv = f"example_net --ann_weight checkpoint/example_net_ann.pth -e 0 --timesteps 4 --save_file {tmp_path}/snn.pth"
    argv = f"{argv} --calibration_samples 200 --threshold mse --granularity channel".split()
    auto = [*argv, "--weight_bitwidth", "auto", "--hardware", "v1.0", "--calibration_epochs", "1"]
    run_script(ann2snn.main, ann2snn.parse_args(auto))
    printed = capsys.readouterr().out
    assert "8,8,7,8-bit weights" in printed and float(printed.split("SNN, T=4")[1].split()[0]) > 90
    snn = load_dag(tmp_path / "snn.pth")
    assert [op.weight_bits for op in snn.weighted_layers().values()] == [8, 8, 7, 8]
    for wrong, message in (("4,4", "2 weight bit widths for 4 layers"), ("4,4,4,9", "9 is not a whole number from 1")):
        with pytest.raises(SystemExit) as end:
            run_script(ann2snn.main, ann2snn.parse_args([*argv, "--weight_bitwidth", wrong]))
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_finetuning_a_layer_whose_bias_is_a_correction(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.Flatten()]
    net, images = nn.Sequential(*layers, nn.Linear(36, 3)), torch.rand(8, 2, 7, 7)
    snn = convert(net, images, 8, 4, correction="bias")
    assert snn.ops["conv2"]["op"].bias is None and snn.ops["conv2"]["op"].bias_q is not None
    loader = [(images, torch.zeros(len(images), dtype=torch.long))]
    tuned = finetune_spikes(snn, loader, "cpu", 2, teacher=prepared(net, images))
    assert_every_spike_is_reproduced(tuned, images[:3], 8)
    torch.save(tuned, tmp_path / "snn.pth")
    assert torch.equal(load_dag(tmp_path / "snn.pth")(images), tuned(images))
