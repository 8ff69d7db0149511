"""SNNTransformer: training, calibration, options, and the order of the four steps."""

import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DETECTOR_STRETCH, ROOT, Detector, inputs_of_detector, with_random_norms, with_status
from torch import nn

from snn_transformer import SNNTransformer
from transformer import status as status_module
from transformer.saved import read_manifest


def snapshot(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_training_quantizes_the_stretch_and_leaves_the_network():
    torch.manual_seed(0)
    net = with_random_norms(Detector())
    before, modes = snapshot(net), [module.training for module in net.modules()]
    transformer = SNNTransformer(net, DETECTOR_STRETCH, weight_bitwidth=3, lr=0.1, momentum=0.0)
    first = None
    for step in range(4):
        result, _ = transformer.inference_get_status(*inputs_of_detector())
        loss = result["logits"].square().mean()
        loss.backward()
        transformer.optimizer.step()
        first = loss.item() if step == 0 else first
        for layer in transformer.dag.weighted_layers().values():
            integers = layer.weight * layer.weight_scale
            assert torch.allclose(integers, integers.round(), atol=1e-4) and integers.abs().max() <= 3.001
            assert not torch.equal(layer.weight, layer.weight.weight_back)
    assert loss < 0.9 * first
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    trained = transformer.net.state_dict()
    assert not torch.equal(trained["head.weight"], before["head.weight"])
    assert not torch.equal(trained["stem.0.weight"], before["stem.0.weight"])
    assert torch.equal(trained["conv1.weight"], before["conv1.weight"])  # in `dag` now
    assert trained["stem.1.num_batches_tracked"] == 4 and trained["norm1.num_batches_tracked"] == 0


def test_the_first_step_is_plain_sgd_on_the_shadow_weights():
    torch.optim.SGD([torch.zeros(1)], 0.1)  # makes torch call the hooks of step() in super().step() as well
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)),
        torch.rand(3, 1, 2, 2),
    )
    options = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "damping": 0.0}
    transformer = SNNTransformer(net, ["0", "1"], example_inputs=x, weight_bitwidth=2, **options)
    quantized = copy.deepcopy(net)
    quantized[0].weight.data = transformer.dag.conv1.weight.detach().clone()
    assert quantized[0].weight.unique().numel() <= 3
    for each in (transformer.inference_get_status(x), quantized(x)):
        each.square().mean().backward()
    transformer.optimizer.step()
    shadow = transformer.dag.conv1.weight.weight_back
    assert torch.allclose(shadow, net[0].weight - 0.5 * quantized[0].weight.grad)
    assert torch.allclose(transformer.net[3].weight, net[3].weight - 0.5 * quantized[3].weight.grad)


def test_one_steep_batch_moves_no_weight_far():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)), torch.rand(3, 1, 2, 2)
    transformer = SNNTransformer(net, ["0", "1"], example_inputs=x, lr=0.1, weight_decay=0.0, damping=0.0)
    before = [p.detach().clone() for p in transformer.net[3].parameters()]
    (1e6 * transformer.inference_get_status(x)).square().sum().backward()
    transformer.optimizer.step()
    moved = [(p - old).norm() for p, old in zip(transformer.net[3].parameters(), before, strict=True)]
    assert 0 < torch.stack(moved).norm() <= 0.1 * 1.001  # lr times the longest gradient


def trained_network():
    """Convolutions with BatchNorms, trained on noisy patterns, and images and labels to go on with."""

    def block(C_in, C_out):
        return [nn.Conv2d(C_in, C_out, 3, padding=1), nn.BatchNorm2d(C_out), nn.ReLU()]

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(*block(1, 4), nn.AvgPool2d(2)),
        nn.Sequential(*block(4, 12), *block(12, 12), *block(12, 12)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)),
    )
    labels = torch.arange(600) % 5
    images = torch.randn(5, 1, 8, 8)[labels] + 0.7 * torch.randn(600, 1, 8, 8)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for batch in range(36):
        part = slice(batch % 12 * 32, batch % 12 * 32 + 32)
        optimizer.zero_grad()
        F.cross_entropy(net(images[part]), labels[part]).backward()
        optimizer.step()
    return net, images, labels


def test_default_steps_leave_a_trained_network_as_good_as_it_is():
    net, images, labels = trained_network()

    def accuracy(net):
        with torch.no_grad():
            return (net.eval()(images[384:]).argmax(1) == labels[384:]).float().mean().item()

    transformer = SNNTransformer(net, ["1"], example_inputs=images[:2])
    with torch.no_grad():
        transformer.inference_get_status(images[:384])
    reached = {0: accuracy(transformer.generate_ann_snn())}
    assert accuracy(net) > 0.9 and reached[0] > 0.85
    for step in range(1, 51):
        part = slice(step % 12 * 32, step % 12 * 32 + 32)
        F.cross_entropy(transformer.inference_get_status(images[part]), labels[part]).backward()
        transformer.optimizer.step()
        if step in (5, 50):
            reached[step] = accuracy(transformer.generate_ann_snn())
    assert reached[5] > reached[0] - 0.03 and reached[50] > reached[0] - 0.01, reached


def test_gradients_are_cleared_after_a_step_and_add_up_without():
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)), torch.rand(3, 1, 2, 2)
    transformer = SNNTransformer(net, ["0", "1"], example_inputs=x, lr=0.0)
    grads = []
    for stepping in (False, False, True, False):
        transformer.inference_get_status(x).sum().backward()
        grads.append(transformer.net[3].weight.grad.clone())
        if stepping:
            transformer.optimizer.step()
    assert torch.allclose(grads[1], 2 * grads[0]) and torch.allclose(grads[2], 3 * grads[0])
    assert torch.allclose(grads[3], grads[0])
    transformer.optimizer.zero_grad()
    assert transformer.net[3].weight.grad is None


def test_modules_that_alone_are_in_eval_mode_stay_frozen():
    net = Detector().train()
    net.stem.eval()
    transformer = SNNTransformer(net, DETECTOR_STRETCH)
    transformer.inference_get_status(*inputs_of_detector())
    assert transformer.net.training and not transformer.net.stem[1].training
    assert transformer.net.state_dict()["stem.1.num_batches_tracked"] == 0


@pytest.mark.parametrize("frozen", ["conv and norm", "conv", "norm", "all"])
def test_frozen_parameters_of_the_stretch_stay_as_they_are(frozen):
    torch.manual_seed(0)
    net = with_random_norms(
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU())
    )
    modules = {"conv and norm": net[:2], "conv": net[3], "norm": net[1], "all": net}
    modules[frozen].requires_grad_(False)
    x = torch.rand(3, 1, 2, 2)
    transformer = SNNTransformer(net, ["0", "1", "2", "3", "4"], example_inputs=x, lr=0.5)
    layers = list(transformer.dag.weighted_layers().values())
    before = [(layer.weight.weight_back.clone(), layer.bias.detach().clone()) for layer in layers]
    for _ in range(2):
        transformer.inference_get_status(x).square().sum().backward()
        transformer.optimizer.step()
    stays = [
        torch.equal(layer.weight.weight_back, weight) and torch.equal(layer.bias, bias)
        for layer, (weight, bias) in zip(layers, before, strict=True)
    ]
    # a layer with a BatchNorm folded into it is frozen where both were
    assert (
        stays
        == {"conv and norm": [True, False], "conv": [False, True], "norm": [False, False], "all": [True, True]}[frozen]
    )
    transformer.generate_ann_snn()


def test_calibration_sees_the_newest_inputs_in_eval_mode():
    net = Detector()
    transformer = SNNTransformer(net, DETECTOR_STRETCH, calibration_samples=5)
    for scale in (1.0, 2.0, 3.0):
        images, options = inputs_of_detector()
        transformer.inference_get_status({"pixels": images["pixels"] * scale}, options)
        images["pixels"].zero_()  # the user's buffer, used again
    kept = transformer.stretch_inputs()
    with torch.no_grad():
        expected = copy.deepcopy(transformer.net).eval().stem(inputs_of_detector()[0]["pixels"] * 3.0)
    assert len(kept) == 2 and torch.allclose(kept[1][0], expected, atol=1e-6)
    assert transformer.net.stem.training


def test_memory_of_the_status_is_bounded(monkeypatch):
    monkeypatch.setattr(status_module, "MOST_STATUS_BYTES", 3000)
    status = status_module.Status(1000)
    for value in range(5):
        status.keep((torch.full((2, 100), float(value)),), {})  # 800 bytes
    assert [args[0][0, 0].item() for args, _ in status.calls] == [2.0, 3.0, 4.0]


def test_a_generated_network_does_not_follow_later_training():
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)), torch.rand(3, 1, 2, 2)
    transformer = with_status(net, ["0", "1"], x, lr=1.0)
    ann_snn = transformer.generate_ann_snn()
    with torch.no_grad():
        first = ann_snn(x)
    transformer.inference_get_status(x).sum().backward()
    transformer.optimizer.step()
    with torch.no_grad():
        assert torch.equal(ann_snn(x), first) and torch.equal(copy.deepcopy(ann_snn)(x), first)
        assert not torch.equal(transformer.generate_ann_snn()(x), first)
    assert isinstance(ann_snn, nn.Module) and not ann_snn.training


def test_options_reach_the_conversion():
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)), torch.rand(3, 1, 2, 2)
    transformer = with_status(net, ["0", "1"], x, timesteps=6, listen=2, reset_mode="zero", initial_potential=0.25)
    transformer.generate_ann_snn()
    (neuron,) = transformer.snn.neurons().values()
    assert (neuron.listen, neuron.reset_mode, transformer.snn.timesteps) == (2, "zero", 6)
    with pytest.raises(TypeError, match="has no option bits"):
        SNNTransformer(net, ["0", "1"], bits=3)
    with pytest.raises(ValueError, match="weight bit width 9"):
        SNNTransformer(net, ["0", "1"], weight_bitwidth=9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"timesteps": 0}, "timesteps 0: use a whole number, 1 to 65536"),
        ({"timesteps": 4.5}, "timesteps 4.5: use a whole number"),
        ({"timesteps": 4, "listen": 9}, "listen 9: use 0 to 4, the timesteps"),
        ({"reset_mode": "none"}, "unknown reset mode 'none'"),
        ({"threshold": "x"}, "unknown threshold 'x'"),
        ({"quantile": 2}, "quantile 2: use a number above 0 to 1"),
        ({"quantile": "x"}, "quantile 'x': use a number above 0 to 1"),
        ({"hold_back": "x"}, "hold_back 'x': use a number from 0 to 1"),
        ({"hold_back": -0.5}, "hold_back -0.5: use a number from 0 to 1"),
        ({"initial_potential": 7}, "initial_potential 7: use a number from 0 to 1"),
        ({"initial_potential": "x"}, "initial_potential 'x': use a number from 0 to 1"),
        ({"granularity": "x"}, "unknown granularity 'x'"),
        ({"correction": "x"}, "unknown correction 'x'"),
        ({"calibration_samples": 0}, "calibration_samples 0: use a whole number, 1 or more"),
        ({"damping": -1}, "damping -1: use 0 or more"),
        ({"weight_bitwidth": 4.0}, "weight bit width 4.0: use 1 to 8"),
        ({"weight_bitwidth": None}, "weight bit width None: use 1 to 8"),
        ({"weight_bitwidth": "4"}, "weight bit width '4': use 1 to 8"),
        ({"weight_bitwidth": True}, "weight bit width True: use 1 to 8"),
        ({"weight_bitwidth": [4, "2"]}, "weight bit width '2': use 1 to 8"),
    ],
)
def test_options_are_checked_before_any_training(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SNNTransformer(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), ["0", "1"], **options)


def test_numbers_may_be_those_of_numpy(tmp_path):
    net, x = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.rand(3, 1, 2, 2)
    for bits in (np.int64(3), np.array([3])):
        transformer = with_status(net, ["0", "1"], x, timesteps=np.int64(4), weight_bitwidth=bits)
        transformer.save_snn(tmp_path / "saved")
    assert read_manifest(tmp_path / "saved")["weight_bitwidth"] == [3]


def test_steps_in_the_wrong_order_say_what_to_do(tmp_path):
    transformer = SNNTransformer(Detector(), DETECTOR_STRETCH)
    with pytest.raises(ValueError, match="call inference_get_status first"):
        _ = transformer.optimizer
    for step in (transformer.generate_ann_snn, lambda: transformer.save_snn(tmp_path / "saved")):
        with pytest.raises(ValueError, match="nothing to calibrate on, call inference_get_status"):
            step()


def test_help_loads_no_torch():
    code = "import snn_transformer, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
