"""Poolings of every kind and upsampling: the graph against PyTorch, every spike against the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_every_spike_is_reproduced, convert, slow, spikes_and_first_currents
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import simulate
from torch import nn
from tracing import Call, after_conv, trace_and_compare

from ann_parser import parse_ann_model
from runtime.torch_files import OtherFile
from spike_dag import from_dict, load_dag
from spike_simulator import Misfit
from transformer.saved import load_saved_snn, replay, write_saved_snn

TRACED = {
    "scale_factor": (lambda x: F.interpolate(x, scale_factor=2), ["upsample1"]),
    "two scale factors": (lambda x: F.interpolate(x, scale_factor=(2.0, 3.0)), ["upsample1"]),
    "size": (lambda x: F.interpolate(x, size=(16, 24)), ["upsample1"]),
    "size of another map": (lambda x: F.interpolate(F.max_pool2d(x, 4), x.shape[2:]), ["max_pool1", "upsample1"]),
    "nearest-exact": (lambda x: F.interpolate(x, scale_factor=3, mode="nearest-exact"), ["upsample1"]),
    "Upsample": (nn.Upsample(scale_factor=2), ["upsample1"]),
    "Upsample to a size": (nn.Upsample((16, 16)), ["upsample1"]),
    "UpsamplingNearest2d": (nn.UpsamplingNearest2d(scale_factor=2), ["upsample1"]),
    "F.upsample": (lambda x: F.upsample(x, scale_factor=2), ["upsample1"]),
    "no whole factor": (lambda x: F.interpolate(x, scale_factor=1.5), ["gather1"]),
    "smaller": (lambda x: F.interpolate(x, size=(3, 5)), ["gather1"]),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), ["gather1", "avg_pool1"]),
    "bilinear, of one pixel": (
        lambda x: F.interpolate(x.mean((2, 3), True), size=(4, 4), mode="bilinear", align_corners=True),
        ["avg_pool1", "upsample1"],
    ),
    "bilinear to half": (lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"), ["avg_pool1"]),
    "area": (lambda x: F.interpolate(x, size=(4, 2), mode="area"), ["avg_pool1"]),
    "adaptive, enlarged": (nn.AdaptiveAvgPool2d(16), ["upsample1"]),
    "adaptive, same": (nn.AdaptiveAvgPool2d(8), ["view1"]),
    "adaptive, mixed": (nn.AdaptiveAvgPool2d((16, 2)), ["upsample1", "avg_pool1"]),
    "adaptive, overlapping": (nn.AdaptiveAvgPool2d((7, 1)), ["avg_pool1"]),
    "adaptive, uneven": (nn.AdaptiveAvgPool2d((3, None)), ["gather1", "avg_pool1"]),
    "adaptive max": (nn.AdaptiveMaxPool2d((4, 2)), ["max_pool1"]),
    "adaptive max, one side": (nn.AdaptiveMaxPool2d((None, 1)), ["max_pool1"]),
    "adaptive max, uneven": (nn.AdaptiveMaxPool2d((3, 5)), ["gather1", "max_pool1"]),
    "adaptive max, enlarged": (nn.AdaptiveMaxPool2d(16), ["upsample1"]),
    "adaptive max, same": (nn.AdaptiveMaxPool2d(8), ["view1"]),
    "part windows": (nn.AvgPool2d(3, 2, ceil_mode=True), ["gather1", "avg_pool1"]),
    "part windows, padded": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), ["pad1", "gather1", "avg_pool1"]),
    "padding not counted": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), ["gather1", "avg_pool1"]),
    "neither": (nn.AvgPool2d(4, 3, 2, ceil_mode=True, count_include_pad=False), ["gather1", "avg_pool1"]),
    "another divisor": (nn.AvgPool2d(2, divisor_override=3), ["avg_pool1"]),
    "another divisor, padded": (nn.AvgPool2d(3, 2, 1, False, False, 5), ["avg_pool1"]),
    "sum": (lambda x: x.sum((2, 3)), ["avg_pool1", "view1"]),
    "torch.sum": (lambda x: torch.sum(x, dim=[-1, -2], keepdim=True), ["avg_pool1"]),
    "mean over the width": (lambda x: x.mean(-1), ["avg_pool1", "view1"]),
    "mean over the height": (lambda x: torch.mean(x, 2, True), ["avg_pool1"]),
    "mean along axes": (lambda x: x.mean(axis=(2, 3)), ["avg_pool1", "view1"]),
    "ReflectionPad2d": (nn.ReflectionPad2d((1, 2, 0, 3)), ["gather1"]),
    "ReplicationPad2d": (nn.ReplicationPad2d(2), ["gather1"]),
    "CircularPad2d": (nn.CircularPad2d((0, 8, 1, 0)), ["gather1"]),
    "reflected and cropped": (lambda x: F.pad(x, (2, -1, 0, 0), "reflect"), ["gather1"]),
    "conv of circular maps": (nn.Conv2d(4, 2, 3, padding="same", padding_mode="circular"), ["gather1", "conv2"]),
    "amax": (lambda x: x.amax((2, 3)), ["max_pool1", "view1"]),
    "torch.amax": (lambda x: torch.amax(x, -1, True), ["max_pool1"]),
}


def as_module(layer):
    return layer if isinstance(layer, nn.Module) else Call(layer)


@pytest.mark.filterwarnings("ignore:.*nn.functional.upsample:UserWarning", "ignore:.*upsample.*deprecated")
@pytest.mark.parametrize("layer, ops", TRACED.values(), ids=TRACED)
def test_function_is_traced(layer, ops):
    assert list(trace_and_compare(after_conv(as_module(layer))).ops) == ["conv1", *ops]


def between(layer, images):
    """A network with the layer between two convolutions, each with a ReLU."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), layer, nn.Conv2d(4, 6, 1), nn.ReLU())
    net = nn.Sequential(*net, nn.Flatten(), nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 3))
    net(images)
    return net.eval()


LAYERS = {
    "upsampled": nn.Upsample(scale_factor=(2, 3)),
    "gathered": nn.Upsample((5, 9)),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "enlarged": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3)),
    "uneven": nn.AdaptiveAvgPool2d((4, 5)),
    "uneven max": nn.AdaptiveMaxPool2d((4, 5)),
    "adaptive max": nn.AdaptiveMaxPool2d((2, 3)),
    "part windows": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "padding not counted": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "another divisor": nn.AvgPool2d(2, divisor_override=3),
    "reflected": nn.ReflectionPad2d((1, 2, 0, 3)),
    "circular": nn.CircularPad2d(1),
    "sum": Call(lambda x: x.sum((2, 3), keepdim=True)),
    "mean of means": Call(lambda x: x.mean(-1, True).mean(-2, True)),
    "amax": Call(lambda x: x.amax(-1, True)),
}


def few(name):
    """A network with the layer, and images of [2, 6, 6]."""
    torch.manual_seed(0)
    images = torch.rand(6, 2, 6, 6)
    return between(LAYERS[name], images), images


@pytest.mark.parametrize("reset_mode", ["subtraction", slow("zero")])
@pytest.mark.parametrize("avgpool", ["spike", "fold"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_spike(name, avgpool, reset_mode):
    net, images = few(name)
    for bits, per_channel, granularity in ((1, False, "layer"), (4, True, "channel"), (8, False, "channel")):
        options = dict(reset_mode=reset_mode, per_channel=per_channel, granularity=granularity, avgpool=avgpool)
        snn = convert(net, images, 16, bits, maxpool="gate", **options)
        for timesteps in (1, 15, 16):
            assert_every_spike_is_reproduced(snn, images[:3], timesteps)
    listening = convert(net, images, 8, 4, maxpool="or", avgpool=avgpool, reset_mode=reset_mode, listen=4)
    trains, currents = spikes_and_first_currents(listening, images[:3], 8)
    expected = simulate(listening, currents, 8)
    assert all(np.array_equal(trains[layer], expected[layer]) for layer in listening.spiking_layers())


@pytest.mark.parametrize("name", LAYERS)
def test_currents_pass_to_the_neuron_behind(name):
    net, images = few(name)
    net[1], net[2] = net[2], net[1]  # the layer stands before the ReLU
    snn = convert(net, images, 16, 4, maxpool="gate")
    assert_every_spike_is_reproduced(snn, images[:3], 16)
    deeper = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), *net).eval()
    assert_every_spike_is_reproduced(convert(deeper, images, 16, 4, maxpool="gate"), images[:3], 16)


@pytest.mark.parametrize("name", LAYERS)
def test_float_weights_at_many_timesteps_are_the_ann(name):
    net, images = few(name)
    snn = convert(net, images, 256, 32, maxpool="gate", threshold="max")
    expected = net(images)
    assert (snn(images) - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_saved_networks_are_the_same(name, tmp_path):
    net, images = few(name)
    snn = convert(net, images, maxpool="gate")
    torch.save(snn, tmp_path / "snn.pth")
    assert torch.equal(load_dag(tmp_path / "snn.pth")(images), snn(images))
    write_saved_snn(tmp_path / "saved", snn, (images,), {})
    assert replay(tmp_path / "saved").startswith("identical: ")
    assert torch.equal(load_saved_snn(tmp_path / "saved")(images), snn(images))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_poolings_and_sizes_are_traced(data):
    """Kernel, stride, padding, ceil_mode and size drawn at random, sizes of adaptive poolings, paddings of copies."""
    draw = data.draw
    height, width = draw(st.integers(4, 9)), draw(st.integers(4, 9))
    kernel, padding = draw(st.tuples(st.integers(2, 4), st.integers(2, 4))), draw(st.sampled_from([0, 1, (0, 1)]))
    options = dict(ceil_mode=draw(st.booleans()), count_include_pad=draw(st.booleans()))
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    kinds = [nn.AvgPool2d(kernel, draw(st.integers(1, 3)), padding, **options), nn.AdaptiveMaxPool2d(size)]
    kinds += [nn.AdaptiveAvgPool2d(size), nn.Upsample(size), nn.Upsample(size, mode="nearest-exact")]
    pads, mode = draw(st.tuples(*[st.integers(-1, 3)] * 4)), draw(st.sampled_from(["reflect", "replicate", "circular"]))
    kinds += [Call(lambda x: F.pad(x, pads, mode))]
    layer = draw(st.sampled_from(kinds))
    try:
        trace_and_compare(layer, (2, height, width))
    except NotImplementedError as refusal:
        has_parts = isinstance(layer, nn.AvgPool2d) and (options["ceil_mode"] or not options["count_include_pad"])
        assert "copies of pixels" in str(refusal) and (has_parts or isinstance(layer, nn.AdaptiveAvgPool2d))


def test_windows_of_3_and_4_pixels_need_too_many_copies():
    """Sides of 3 windows, of 3, 4 and 3 pixels: 12 copies of pixels for each of them, which makes 36 x 36."""
    layer = nn.AvgPool2d(4, 1, 1, count_include_pad=False)
    with pytest.raises(NotImplementedError, match="so uneven that it needs 1296 copies of pixels"):
        trace_and_compare(layer, (2, 4, 4))


FOR_ONE_SIZE = {
    "an average pooling": nn.AdaptiveAvgPool2d(2),
    "a max pooling": nn.AdaptiveMaxPool2d(2),
    "an upsampling": nn.Upsample((16, 16)),
    "a choice of pixels": nn.Upsample((5, 5)),
}


@pytest.mark.parametrize("name", FOR_ONE_SIZE)
def test_another_image_size_is_refused_with_both_sizes(name):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), FOR_ONE_SIZE[name], nn.Conv2d(4, 2, 1), nn.ReLU())
    images = torch.rand(4, 1, 8, 8)
    dag, snn = parse_ann_model(net, (images,)), convert(net, images, maxpool="or")
    message = rf"{name} was made for an input of \[8, 8\] and gets \[16, 16\]"
    for graph, error in ((dag, ValueError), (snn, Misfit)):
        with pytest.raises(error, match=message):
            graph(torch.rand(4, 1, 16, 16))


def test_whole_factors_fit_any_image_size():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 1))
    dag = parse_ann_model(net, (torch.rand(1, 1, 8, 8),))
    larger = torch.rand(2, 1, 12, 6)
    assert torch.allclose(dag(larger), net(larger), atol=1e-6)


@pytest.mark.parametrize("layer", [nn.Upsample(scale_factor=2), nn.Upsample((12, 10))])
def test_a_batch_norm_folds_through_copies(layer):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), layer, nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        net[2].running_mean.uniform_(-1, 1)
        net[2].weight.uniform_(0.5, 2)
    assert [name for name in trace_and_compare(net).ops if name.startswith("batch_norm")] == []


def test_a_file_with_pixels_beyond_the_input_is_refused():
    net, images = few("gathered")
    data = convert(net, images).to_dict()
    gather = next(op for op in data["ops"] if op["type"] == "SpikeGather")
    gather["config"]["rows"] = (*gather["config"]["rows"][:-1], 6)
    with pytest.raises(OtherFile, match="gather1 rows up to 6: the input has 6"):
        from_dict(data)
