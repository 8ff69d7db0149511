"""Activations of few levels: numbers by hand, and the spiking network that equals them."""

from types import SimpleNamespace

import pytest
import torch
from helpers import CHOICES, MODELS, prepared, small_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ann2snn
from finetuning.levels import quantize_activations
from kernels.levels_cpu import njit, round_back_on_cpu, round_on_cpu
from quantization import quantize_finetune, round_to_integers
from reports.observe import node_values
from runtime.cli import run_script
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import from_dict, load_dag
from spike_neurons import ClipFloorShift, round_back_in_turn, round_in_turn, rounds_compiled


def test_levels_and_gradients_by_hand():
    """lambda = 2 in 4 levels of 0.5, with the shift of half a level; LSQ's gradient of lambda, over sqrt(5 x 4)."""
    levels = ClipFloorShift(4, torch.tensor(2.0))
    x = torch.tensor([[-1.0, 0.2, 0.25, 0.6, 3.0]], requires_grad=True)  # 1 image, 5 neurons
    (y,) = levels(x)
    assert y.tolist() == [0, 0, 0.5, 0.5, 2]
    for value, of_x, of_scale in zip(y, [0, 1, 1, 1, 0], [0, -0.1, 0.125, -0.05, 1]):
        grads = torch.autograd.grad(value, (x, levels.scale), retain_graph=True)
        assert grads[0].sum().item() == pytest.approx(of_x)
        assert grads[1].item() == pytest.approx(of_scale / 20**0.5, abs=1e-6)


def test_levels_and_gradients_of_channels():
    """Each channel as if it were alone."""
    torch.manual_seed(0)
    x, scales = torch.randn(2, 3, 2, 2, requires_grad=True), torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    both = ClipFloorShift(4, scales)
    weights = torch.randn(2, 3, 2, 2)
    found = torch.autograd.grad((both(x) * weights).sum(), (x, both.scale))
    for channel, scale in enumerate(scales.flatten()):
        alone, part = ClipFloorShift(4, scale), slice(channel, channel + 1)
        assert torch.equal(alone(x[:, part]), both(x)[:, part])
        wanted = torch.autograd.grad((alone(x[:, part]) * weights[:, part]).sum(), (x, alone.scale))
        assert torch.equal(found[0][:, part], wanted[0][:, part])
        assert torch.allclose(found[1][channel], wanted[1], rtol=1e-5) and wanted[1] != 0


@pytest.mark.skipif(njit is None, reason="numba is missing, or does not compile")
@given(
    st.sampled_from([(1, 1), (3, 7), (5, 3, 4, 6), (130, 2, 1, 1), (2, 1, 33, 33), (3, 8, 64, 64)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 3, 4, 255]),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_kernels_round_as_plain_pytorch(shape, per_channel, channels_last, levels, threads, seed):
    """Activations and their gradients bit for bit; the gradient of lambda but for the order in which floats are added.

    Zeros, infinities and NaN are among the activations.
    """
    torch.manual_seed(seed)
    size = torch.rand(shape[1], *[1] * (len(shape) - 2)) + 0.1 if per_channel else torch.tensor(1.5)
    x, gradient = torch.randn(shape), torch.randn(shape)
    if x.numel() > 6:
        x.view(-1)[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.5])
    if channels_last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert rounds_compiled(x, size)
        assert torch.equal(round_on_cpu(x, size, levels).nan_to_num(7), round_in_turn(x, size, levels).nan_to_num(7))
        gradient.view(-1)[::7] = torch.nan
        of_x, _ = round_back_on_cpu(x, gradient, size, levels)
        assert torch.equal(of_x.nan_to_num(7), round_back_in_turn(x, gradient, size, levels)[0].nan_to_num(7))
        x.nan_to_num_(7)
        gradient.nan_to_num_(0.5)
        expected = round_back_in_turn(x.double(), gradient.double(), size.double(), levels)
        of_x, of_size = round_back_on_cpu(x, gradient, size, levels)
        assert of_size.shape == size.shape and torch.allclose(of_size.double(), expected[1], rtol=1e-3, atol=1e-3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "x, size", [(torch.ones(2, 3, 4), torch.ones(3, 1)), (torch.ones(2, 3).double(), torch.ones(3))]
)
def test_no_kernel_for_lines_and_float64(x, size):
    assert not rounds_compiled(x, size) and torch.equal(ClipFloorShift(4, size)(x), x)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("T", [1, 4, 16])
@pytest.mark.parametrize("name", MODELS)
def test_the_network_that_listens_is_the_network_of_levels(name, T, granularity):
    """Float weights, every step of input heard before the first spike: the same outputs, up to float32."""
    net, images = small_model(name)
    ann = quantize_activations(prepared(net, images), [(images,)], "cpu", T, per_channel=granularity == "channel")
    levels = [entry["op"].levels for entry in ann.ops.values() if entry["op"].levels is not None]
    assert len(levels) >= 3 and all((each.scale.numel() > 1) == (granularity == "channel") for each in levels)
    options = {"listen": T, "correction": "none", "granularity": granularity}
    snn = trans_ann2snn_weight(ann, [(images,)], "cpu", T, 32, **options, **CHOICES)
    assert all(entry["op"].levels is None for entry in snn.ops.values())
    with torch.no_grad():
        expected, float_outputs = ann(images), prepared(net, images)(images)
        assert torch.allclose(snn(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        assert not torch.allclose(expected, float_outputs, rtol=1e-3)


def test_lambdas_are_learnt_and_converted():
    net, images = small_model("shortcuts")
    ann = quantize_activations(prepared(net, images), [(images,)], "cpu", 4)
    before = {name: entry["op"].levels.scale.item() for name, entry in ann.ops.items() if entry["op"].levels}
    flags = SimpleNamespace(
        weight_bitwidth=8, finetune_epochs=4, finetune_lr=0.05, finetune_wd=1e-4, finetune_momentum=0.9
    )
    loader = [(images, torch.arange(len(images)) % 3)]
    qnet = quantize_finetune(ann, loader, nn.CrossEntropyLoss(), "cpu", flags)
    after = {name: qnet.ops[name]["op"].levels.scale.item() for name in before}
    assert all(after[name] != before[name] for name in before)
    assert {name: ann.ops[name]["op"].levels.scale.item() for name in before} == before  # the input is not changed
    again = from_dict(qnet.to_dict())
    assert torch.equal(again(images), qnet(images))
    snn = trans_ann2snn_weight(qnet, loader, "cpu", 4, 8)
    for name, neuron in snn.neurons().items():
        step = neuron.scale_factor / neuron.Vthr  # lambda is what the rounded Vthr stands for
        assert ((neuron.scale_factor - after[name]).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("of_weights", ["layer", "channel"])
@pytest.mark.parametrize("of_lambdas", ["layer", "channel"])
@pytest.mark.parametrize("epochs, lr, optimizer", [(2, 0.01, "sgd"), (9, 0.1, "adam")])
def test_integers_of_finetuning_are_those_of_the_conversion(of_lambdas, of_weights, epochs, lr, optimizer):
    """Layers that meet in one neuron are finetuned in its unit: the conversion rounds no weight again.

    Nor does it where lambdas moved by a tenth and more after the scales were chosen, as with adam here.
    """
    net, images = small_model("shortcuts")
    ann = quantize_activations(prepared(net, images), [(images,)], "cpu", 4, per_channel=of_lambdas == "channel")
    flags = SimpleNamespace(
        weight_bitwidth=4,
        weight_granularity=of_weights,
        finetune_epochs=epochs,
        finetune_lr=lr,
        finetune_optimizer=optimizer,
        finetune_wd=1e-4,
        finetune_momentum=0.9,
    )
    loader = [(images, torch.arange(len(images)) % 3)]
    qnet = quantize_finetune(ann, loader, nn.CrossEntropyLoss(), "cpu", flags)
    options = {"granularity": of_lambdas, "per_channel": of_weights == "channel", "correction": "none"}
    snn = trans_ann2snn_weight(qnet, loader, "cpu", 4, 4, **options)
    for name, layer in snn.weighted_layers().items():
        before = qnet.ops[name]["op"]
        integers = round_to_integers(before.weight.detach(), before.weight_scale, 4)
        if layer.spiking:
            assert torch.equal(layer.weight_q.float(), integers), (name, (layer.weight_q != integers).float().mean())


def test_fewer_levels_than_one_are_refused():
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match="activation_levels 0: use a whole number, 1 to 65536"):
        quantize_activations(prepared(net, images), [(images,)], "cpu", 0)


@pytest.mark.parametrize("listen", [0, 4, "auto"])
def test_a_layer_that_stays_ann_goes_on_rounding(listen, tmp_path):
    net, images = small_model("shortcuts")
    for left_out, rounds in (((), True), (("first",), False)):  # ann_layers of quantize_activations
        ann = quantize_activations(prepared(net, images), [(images,)], "cpu", 4, ann_layers=left_out)
        snn = trans_ann2snn_weight(ann, [(images,)], "cpu", 4, 4, ann_layers=("first",), listen=listen)
        assert "relu1" not in snn.spiking_layers() and snn.spiking_layers()
        torch.save(snn, tmp_path / "snn.pth")
        for each in (snn, load_dag(str(tmp_path / "snn.pth"))):
            assert (len(node_values(each, images)["relu1_out1"].unique()) == 5) == rounds


def test_command_line(tmp_path, capsys):
    argv = f"example_net --ann_weight checkpoint/example_net_ann.pth -e 2 --timesteps 4 --save_file {tmp_path}/snn.pth"
    run_script(ann2snn.main, ann2snn.parse_args([*argv.split(), "--activation_levels", "4"]))
    printed = capsys.readouterr().out
    assert float(printed.split("SNN, T=4")[1].split()[0]) > 93
    assert all(entry["op"].levels is None for entry in load_dag(tmp_path / "snn.pth").ops.values())
