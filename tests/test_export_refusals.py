"""What exports refuse, with the layer's name, beyond what the tests of each format hold."""

import pytest
import torch
import torch.nn.functional as F
from export_helpers import needs_nir
from helpers import Function, conv, convert, reading, small_model
from torch import nn

from ann_parser import parse_ann_model
from export.c import write_c
from export.nir_graph import write_nir
from export.onnx_ann import write_onnx_ann
from export.onnx_graph import Builder
from export.paicore import spike_trains
from export.paicore_layers import Currents, Spikes, Unfit, addition, core_layers, integers, of_channels, spikes_of, view
from spike_dag import from_dict

IMAGES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def refusal(write, snn, folder, images=IMAGES):
    """The message of a writer, which leaves nothing behind."""
    with pytest.raises(ValueError) as error:
        write(snn, str(folder / "written"), images)
    assert not list(folder.iterdir())
    return str(error.value)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = conv(1, 4), nn.Linear(256, 3), nn.Linear(256, 2)

    def forward(self, x):
        x = F.relu(self.conv(x)).flatten(1)
        return self.a(x), self.b(x)


@needs_nir
@pytest.mark.parametrize(
    "forward, modules, message",
    [
        (lambda n, x: F.relu(n.a(torch.cat([x, x], 2))), {"a": conv(4, 4)}, "a concatenation along height or width"),
        (lambda n, x: F.relu(n.a(x.reshape(-1, 8, 4, 8))), {"a": conv(8, 4)}, "views other than flattening"),
        (
            lambda n, x: F.relu(n.a(F.pad(x, (0, 0, 0, 0, 0, 1)))),
            {"a": conv(5, 4)},
            "zeros beside channels or features",
        ),
    ],
)
def test_rearrangements_without_a_node_of_nir(forward, modules, message, tmp_path):
    said = refusal(write_nir, convert(reading(forward, **modules), IMAGES, 4), tmp_path)
    assert f"cannot be written: NIR has no node for {message}" in said


@needs_nir
def test_names_and_outputs_that_nir_cannot_hold(tmp_path):
    snn = convert(TwoOutputs(), IMAGES, 4)
    assert "importers of NIR take one output" in refusal(write_nir, snn, tmp_path)
    snn.ops["a/b"] = snn.ops.pop("relu1")
    assert refusal(write_nir, snn, tmp_path) == "a/b: a file of NIR cannot hold a name with '/', rename the layer"


def test_counts_and_thresholds_that_a_quantized_ann_cannot_hold(tmp_path):
    net, images = small_model("shortcuts")
    snn = convert(net, images, 4)
    neuron = snn.neurons()["relu2"]
    Vthr, neuron.Vthr = neuron.Vthr, torch.ones(4, 7, 7, dtype=torch.int32)
    assert "relu2: it has a threshold for every neuron" in refusal(write_onnx_ann, snn, tmp_path, images)
    neuron.Vthr, neuron.largest_current = Vthr, 2**21
    assert "relu2: its sums over T=4 steps are rounded in float32" in refusal(write_onnx_ann, snn, tmp_path, images)
    snn.timesteps = 65536
    assert "its counts go up to 65536, a quantized ANN holds 65535" in refusal(write_onnx_ann, snn, tmp_path, images)


def test_currents_reach_no_export():
    """Conversion and loading refuse them as outputs, so that writers need not."""

    def forward(n, x):
        current = n.a(F.relu(n.first(x)))
        return F.relu(current).flatten(1), current

    with pytest.raises(ValueError, match=r"^conv2 \(a\) is returned by the network and feeds a ReLU too, return what"):
        convert(Function(forward, first=conv(1, 4), a=conv(4, 4)), IMAGES, 4)
    snn = convert(reading(lambda n, x: F.relu(n.a(x)), a=conv(4, 4)), IMAGES, 4)
    data = {**snn.to_dict(), "outputs_nodes": (snn.ops["conv2"].out,)}
    with pytest.raises(ValueError, match=r"the output \w+ is a current, which no neuron turns into spikes$"):
        from_dict(data)


def test_integers_beyond_float32_are_refused():
    with pytest.raises(ValueError, match=r"^integers up to 16777217, over 2\^24, are rounded in float32$"):
        Builder().whole(torch.full((20,), 2**24 + 1))


def test_what_c_code_cannot_hold(tmp_path):
    upwards = nn.Sequential(nn.ConvTranspose2d(1, 4, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 3))
    said = refusal(write_c, convert(upwards, IMAGES, 4), tmp_path)
    assert (
        said
        == "conv_transpose1 (0): a transposed convolution of real values cannot be written as C, take a convolution"
    )
    ann = parse_ann_model(upwards, (IMAGES,))
    assert refusal(write_c, ann, tmp_path) == "the network is no converted one: it has no neurons to write as C"


def test_what_cores_cannot_hold():
    spikes, currents = Spikes("relu1", (4, 2, 2)), Currents([], 0)
    one_weighed = type(
        "Entry", (), {"op": type("Op", (), {"branch_weights": (torch.tensor(3), None), "shape": (2, 8)})}
    )
    for call, message in (
        (lambda: integers(torch.tensor([200])), "its weights are no integers of 8 bits"),
        (lambda: integers(torch.tensor([0.5])), "its weights are no integers of 8 bits"),
        (lambda: spikes_of(currents), "it reads currents, cores read spikes"),
        (lambda: view(None, one_weighed, [spikes]), "its view is no flattening of spikes"),
        (lambda: addition(None, one_weighed, [currents, spikes]), "it weighs currents"),
        (lambda: of_channels(Spikes("relu1", (16,)), torch.tensor(1)), "it adds spikes of a flat layer"),
        (lambda: of_channels(spikes, torch.ones(4, 2, 2)), "it adds spikes of a flat layer, or weighs each element"),
    ):
        with pytest.raises(Unfit, match=message):
            call()


def test_the_images_current_does_not_fit_cores():
    def forward(n, x):
        current = n.a(x)
        return n.fc(F.relu(n.b(F.relu(current)) + current).flatten(1))

    snn = convert(Function(forward, a=conv(1, 4), b=conv(4, 4), fc=nn.Linear(256, 3)), IMAGES, 4)
    with pytest.raises(ValueError, match=r"^add1 .*adds the image's own current, which is no integer$"):
        core_layers(snn, spike_trains(snn, IMAGES[:1]))
