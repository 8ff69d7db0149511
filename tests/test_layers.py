"""Every layer type: the graph against PyTorch, before and after folding, and every spike against the reference."""

import pytest
import torch
from helpers import MODELS, assert_every_spike_is_reproduced, conv, convert, slow, small_model, with_statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ann_parser import parse_ann_model
from quantization import init_quantize_net, quantize_finetune
from spike_dag import load_dag
from spike_layers import SpikeConvBN, SpikeMaxPool2d
from spike_tensor import SpikeTensor
from transformer.saved import load_saved_snn, replay, write_saved_snn


@pytest.mark.parametrize("maxpool", ["gate", slow("or")])
@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", MODELS)
def test_every_spike_of_every_layer(name, reset_mode, maxpool):
    net, images = small_model(name)
    for bits, per_channel in ((1, False), (4, True), (8, False)):
        options = dict(reset_mode=reset_mode, maxpool=maxpool, signed="pair", per_channel=per_channel)
        snn = convert(net, images, 16, bits, **options)
        for timesteps in (1, 15, 16):
            assert_every_spike_is_reproduced(snn, images[:3], timesteps)


@pytest.mark.parametrize("name", MODELS)
def test_float_weights_at_many_timesteps_are_the_ann(name):
    net, images = small_model(name)
    snn = convert(net, images, 1024, 32, maxpool="gate", signed="pair", threshold="max")
    expected = net(images)
    assert (snn(images) - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_eight_bits_follow_the_ann(name):
    net, images = small_model(name)
    snn = convert(net, images, 256, 8, maxpool="gate", signed="pair", threshold="max", per_channel=True)
    with torch.no_grad():
        assert torch.corrcoef(torch.stack([snn(images).flatten(), net(images).flatten()]))[0, 1] >= 0.99


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_spike_of_random_layers(data):
    """Layer type, kernel 1 to 7, stride, padding, groups, bias, bits, reset, T and odd sizes drawn at random."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    size = (draw(st.integers(9, 13)), draw(st.integers(9, 13)))
    kernel = draw(st.sampled_from([1, 2, 3, (1, 3), (5, 2), 7]))
    common = dict(bias=draw(st.booleans()), groups=draw(st.sampled_from([1, 2, 4])))
    stride, padding = draw(st.sampled_from([1, 2, (2, 1)])), draw(st.sampled_from([0, (0, 1)]))
    kind = draw(st.sampled_from(["conv_bn", "transposed", "max_pool", "avg_pool", "pad", "norm_first"]))
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()]
    if kind == "transposed":
        layers += [nn.ConvTranspose2d(4, 8, kernel, stride, padding, **common)]
    elif kind == "norm_first":
        layers += [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, kernel, stride, padding, **common)]
    else:
        if kind == "max_pool":
            layers += [nn.MaxPool2d(draw(st.sampled_from([2, 3, (3, 2)])), stride, ceil_mode=draw(st.booleans()))]
        elif kind == "avg_pool":
            layers += [nn.AvgPool2d(3, stride, padding)]
        elif kind == "pad":
            layers += [nn.ZeroPad2d(draw(st.tuples(*[st.integers(0, 3)] * 4)))]
        layers += [nn.ZeroPad2d(6), nn.Conv2d(4, 8, kernel, stride, padding, **common), nn.BatchNorm2d(8)]
    layers += [draw(st.sampled_from([nn.ReLU(), nn.ReLU6()])), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    net = with_statistics(nn.Sequential(*layers), seed=draw(st.integers(0, 1000)))
    images = torch.rand(draw(st.integers(1, 3)), 1, *size)
    options = dict(
        bits=draw(st.integers(1, 8)),
        per_channel=draw(st.booleans()),
        reset_mode=draw(st.sampled_from(["zero", "subtraction"])),
        maxpool=draw(st.sampled_from(["gate", "or"])),
        correction=draw(st.sampled_from(["potential", "bias", "none"])),
    )
    assert_every_spike_is_reproduced(
        convert(net, images, **options), images, draw(st.sampled_from([1, 2, 15, 16, 100]))
    )


def test_finetuning_works_on_folded_weights():
    from types import SimpleNamespace

    torch.manual_seed(0)
    images = torch.randn(64, 2, 7, 7)
    labels = (images[:, 0].mean((1, 2)) > 0).long()
    net, _ = small_model("shortcuts")
    args = SimpleNamespace(
        finetune_lr=0.05, finetune_epochs=12, finetune_wd=0.0, finetune_momentum=0.9, weight_bitwidth=8
    )
    dag = parse_ann_model(net, (images[:1],))
    assert sum(isinstance(entry["op"], SpikeConvBN) for entry in dag.ops.values()) == 3
    criterion = nn.CrossEntropyLoss()
    loader = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]
    qnet = quantize_finetune(dag, loader, criterion, "cpu", args)
    with torch.no_grad():
        assert criterion(qnet(images), labels) < 0.7 * criterion(net(images), labels)
    layer = qnet.ops["conv2"]["op"]
    integers = layer.weight * layer.weight_scale
    assert torch.allclose(integers, integers.round(), atol=1e-3) and integers.abs().max() <= 127.01


def test_transposed_convolution_quantizes_per_output_channel():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU())
    dag = parse_ann_model(net, (torch.rand(1, 1, 7, 7),))
    layer = dag.ops["conv_transpose1"]["op"]
    with torch.no_grad():
        layer.weight[:2, 1] *= 100  # output channel 1
    init_quantize_net(dag, 8, per_channel=True)
    scales = layer.per_output(layer.weight_scale)
    assert len(scales) == 6 and torch.equal(layer.weight_view(scales), layer.weight_scale)
    assert scales[1] < scales[[0, 2, 3, 4, 5]].min() / 20
    assert torch.equal(layer.rows(layer.weight)[1], layer.weight[:2, 1].flatten())


def spikes(*steps):
    """SpikeTensor of one channel from lists [H, W] per step."""
    return SpikeTensor(torch.tensor(steps, dtype=torch.float32)[:, None], len(steps), 1.0)


def test_max_pooling_by_hand():
    """Three inputs in one window, T = 4: counts 1 1 1 1, 0 1 2 2, 0 0 0 1."""
    train = spikes([[1, 0, 0]], [[0, 1, 0]], [[0, 1, 0]], [[0, 0, 1]])
    for mode, expected in (("gate", [1, 0, 1, 0]), ("or", [1, 1, 1, 1])):
        pool = SpikeMaxPool2d((1, 3), (1, 3), mode=mode)
        assert pool(train).data.flatten().tolist() == expected


def test_relu6_stops_at_its_ceiling():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU6(), nn.Flatten(), nn.Linear(2, 2))
    net[0].weight.data.fill_(10.0)
    images = torch.tensor([[[[0.3, 1.0]]]])
    snn = convert(net, images, 64, 32, threshold="max", correction="none")
    assert snn.neurons()["relu1"].scale_factor.item() == 6
    assert (snn(images) - net(images)).abs().max() < 0.05


def test_converted_layers_of_every_type_can_be_saved(tmp_path):
    for name in MODELS:
        net, images = small_model(name)
        snn = convert(net, images, maxpool="gate", signed="pair")
        torch.save(snn, tmp_path / "snn.pth")
        assert torch.equal(load_dag(tmp_path / "snn.pth")(images), snn(images))


@pytest.mark.parametrize("name", MODELS)
def test_converted_layers_of_every_type_replay(name, tmp_path):
    net, images = small_model(name)
    snn = convert(net, images, maxpool="gate", signed="pair")
    write_saved_snn(tmp_path / "saved", snn, (images,), {})
    assert replay(tmp_path / "saved").startswith("identical: ")
    assert torch.equal(load_saved_snn(tmp_path / "saved")(images), snn(images))


@pytest.mark.parametrize("bias", [False, True])
def test_layers_that_stay_ann_between_spikes_replay(bias, tmp_path):
    torch.manual_seed(0)
    convolutions = [nn.Sequential(nn.Conv2d(c, 4, 3, padding=1, bias=bias), nn.ReLU()) for c in (1, 4, 4, 4)]
    net, images = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(144, 5)), torch.rand(6, 1, 6, 6)
    snn = convert(net, images, 8, 6, ann_layers=("1",))
    write_saved_snn(tmp_path / "saved", snn, (images,), {})
    assert replay(tmp_path / "saved").startswith("identical: ")


def test_large_maps_are_pooled_in_both_modes():
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10)
    )
    images = torch.randn(2, 3, 32, 32)
    for mode in ("gate", "or"):
        assert_every_spike_is_reproduced(convert(net, images, 8, 8, maxpool=mode), images, 8)
