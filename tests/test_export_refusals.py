"""What exports refuse, with the layer's name, beyond what the tests of each format hold."""

from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import torch.nn.functional as F
from export_helpers import assert_same_in_nir, assert_same_in_onnx, needs_nir, needs_onnxruntime
from helpers import ROOT, Function, conv, convert, reading, small_model
from torch import nn

from ann_parser import parse_ann_model
from export.c import write_c
from export.nir_graph import nir_graph, write_nir
from export.onnx_ann import write_onnx_ann
from export.onnx_file import write_onnx
from export.paicore import spike_trains
from export.paicore_layers import Currents, Spikes, Unfit, addition, core_layers, of_channels
from spike_dag import from_dict, load_dag

IMAGES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def refusal(write, snn, folder, images=IMAGES):
    """The message of a writer, which leaves nothing behind."""
    with pytest.raises(ValueError) as error:
        write(snn, str(folder / "written"), images)
    assert not list(folder.iterdir())
    return str(error.value)


def three_layers(activation):
    """Two convolutions, each with an activation, and a linear layer."""
    return nn.Sequential(
        *(conv(1, 4), activation, conv(4, 4), nn.ReLU(), nn.Flatten()),
        nn.Linear(256, 3),
    )


def edited(snn, name, **changes):
    """The network of a file in which fields of one op, or its tensors, have other values."""
    data = snn.to_dict()
    (op,) = (op for op in data["ops"] if op["name"] == name)
    for key, value in changes.items():
        fields = op["tensors"] if isinstance(value, torch.Tensor) else op
        fields[key] = value
    return from_dict(data)


def with_a_bias_map(factor=1.0):
    """A converted network with a bias for every element behind a convolution of small weights."""
    layer = conv(4, 4)
    layer.weight.data.mul_(factor)
    places = nn.Parameter(torch.rand(4, 8, 8) + 1)
    return convert(reading(lambda n, x: F.relu(n.a(x) + n.places), a=layer, places=places), IMAGES, 4)


# ---------------------------------------------------------------------------------------------------------------------
# NIR


NO_NODE = {
    "a concatenation along height or width": (lambda n, x: F.relu(n.a(torch.cat([x, x], 2))), {"a": conv(4, 4)}),
    "views other than flattening": (lambda n, x: F.relu(n.a(x.reshape(-1, 8, 4, 8))), {"a": conv(8, 4)}),
    "zeros beside channels or features": (
        lambda n, x: F.relu(n.a(F.pad(x, (0, 0, 0, 0, 0, 1)))),
        {"a": conv(5, 4)},
    ),
    "slices": (lambda n, x: F.relu(n.a(x[:, 1:3])), {"a": conv(2, 4)}),
    "an index": (lambda n, x: F.relu(n.a(x[:, [1, 3]])), {"a": conv(2, 4)}),
    "another order of dimensions": (lambda n, x: F.relu(n.a(x.transpose(2, 3))), {"a": conv(4, 4)}),
    "repeated pixels": (lambda n, x: F.relu(n.a(F.interpolate(x, scale_factor=2))), {"a": conv(4, 4)}),
    "gathered pixels": (lambda n, x: F.relu(n.a(F.interpolate(x, size=(5, 5)))), {"a": conv(4, 4)}),
    "a kernel of 1 x 2 with this padding and stride": (lambda n, x: F.relu(n.a(x)), {"a": nn.Conv2d(4, 4, (1, 2))}),
}


@needs_nir
@pytest.mark.parametrize("message", NO_NODE)
def test_layers_without_a_node_of_nir(message, tmp_path):
    forward, modules = NO_NODE[message]
    said = refusal(write_nir, convert(reading(forward, **modules), IMAGES, 4), tmp_path)
    assert said.endswith(f" cannot be written: NIR has no node for {message}")


ON_THE_IMAGE = [
    (
        lambda n, x: x * n.places,
        {"places": nn.Parameter(torch.rand(1, 8, 8))},
        "affine1 (0)",
        "a factor for every element",
    ),
    (lambda n, x: F.relu(x - 0.5), {}, "relu1 (0)", "a ReLU without neurons"),
    (lambda n, x: F.leaky_relu(x - 0.5), {}, "leaky_relu1 (0)", "a LeakyReLU or PReLU"),
    (lambda n, x: x.sqrt(), {}, "sqrt1 (0)", "this function"),
]


@needs_nir
@pytest.mark.parametrize("forward, modules, where, message", ON_THE_IMAGE)
def test_what_stays_ann_before_the_first_spikes_without_a_node_of_nir(forward, modules, where, message, tmp_path):
    net = nn.Sequential(Function(forward, **modules), conv(1, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    said = refusal(write_nir, convert(net, IMAGES, 4), tmp_path)
    assert said.startswith(f"{where} cannot be written: NIR has no node for {message}")
    assert said.endswith(", and this layer stays ANN")


@needs_nir
@pytest.mark.parametrize("activation, op", [(nn.ReLU(), "relu1"), (nn.LeakyReLU(), "leaky_relu1")])
def test_an_activation_without_neurons_is_no_node_of_nir(activation, op, tmp_path):
    snn = convert(three_layers(activation), IMAGES, 4, ann_layers=("0", "1"), signed="pair")
    assert refusal(write_nir, snn, tmp_path) == (
        f"{op} (1) cannot be written: NIR has no node for a ReLU without neurons, and this layer stays ANN"
    )


@needs_nir
@pytest.mark.parametrize(
    "forward, factors, where",
    [
        (lambda n, x: x * n.factors, torch.rand(4, 1), "affine1 (0)"),
        (lambda n, x: x + x, None, "view1"),
        (lambda n, x: torch.cat([x, x], 1)[:, :4], None, "concat1 (0)"),
    ],
)
def test_samples_of_two_dimensions_have_no_convolution_in_nir(forward, factors, where, tmp_path):
    images = torch.rand(8, 4, 16)
    modules = {} if factors is None else {"factors": nn.Parameter(factors)}
    net = nn.Sequential(Function(forward, **modules), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    said = refusal(write_nir, convert(net, images, 4), tmp_path, images)
    assert said.startswith(f"{where} ")
    assert said.endswith("NIR has no node for samples of 2 dimensions, and this layer stays ANN")


@needs_nir
@pytest.mark.parametrize(
    "last",
    [
        Function(lambda n, x: n.a(x) + n.b(x), a=nn.Linear(256, 3), b=nn.Linear(256, 3)),
        Function(lambda n, x: torch.cat([n.a(x), x], 1), a=nn.Linear(256, 3)),
        nn.Sequential(nn.Linear(256, 3), nn.LeakyReLU()),
    ],
    ids=["sum", "concatenation", "pairs of signs"],
)
def test_what_nir_cannot_hold_behind_the_last_spikes_stays_outside(last, tmp_path):
    net = nn.Sequential(conv(1, 4), nn.ReLU(), nn.Flatten(), last)
    snn = convert(net, IMAGES, 4, signed="pair")
    graph = nir_graph(snn, IMAGES)
    assert graph.metadata["readout"] == 0 and (snn.spiking_layers()[-1], "output") in graph.edges
    assert_same_in_nir(snn, IMAGES, tmp_path / "net.nir")


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = conv(1, 4), nn.Linear(256, 3), nn.Linear(256, 2)

    def forward(self, x):
        x = F.relu(self.conv(x)).flatten(1)
        return self.a(x), self.b(x)


@needs_nir
def test_names_and_outputs_that_nir_cannot_hold(tmp_path):
    snn = convert(TwoOutputs(), IMAGES, 4)
    assert "importers of NIR take one output" in refusal(write_nir, snn, tmp_path)
    snn.ops["a/b"] = snn.ops.pop("relu1")
    assert refusal(write_nir, snn, tmp_path) == "a/b: a file of NIR cannot hold a name with '/', rename the layer"


# ---------------------------------------------------------------------------------------------------------------------
# Many timesteps, large integers


def test_the_most_timesteps_that_formats_hold(tmp_path):
    snn = convert(three_layers(nn.ReLU()), IMAGES, 65536, 8, correction="none", hold_back=0)
    said = refusal(write_onnx_ann, snn, tmp_path)
    assert said == "relu1 (1): its counts go up to 65536, a quantized ANN holds 65535"
    assert refusal(write_c, snn, tmp_path) == "the network runs for 65536 timesteps, C code for 65535 at most"


@needs_nir
def test_potentials_beyond_the_floats_of_nir(tmp_path):
    snn = convert(three_layers(nn.ReLU()), IMAGES, 65536, 8, correction="none", hold_back=0)
    said = refusal(write_nir, snn, tmp_path)
    assert said == "relu2 (3): its potentials exceed 2^24, beyond the float32 of NIR's importers"


def test_sums_and_thresholds_that_a_quantized_ann_cannot_hold(tmp_path):
    said = refusal(write_onnx_ann, with_a_bias_map(1e-9), tmp_path)
    assert said == "relu2: its sums over T=4 steps are rounded in float32, use fewer"
    net, images = small_model("shortcuts")
    snn = convert(net, images, 4)
    snn.neurons()["relu2"].Vthr = torch.ones(4, 7, 7, dtype=torch.int32)  # no conversion makes it
    assert "relu2: it has a threshold for every neuron" in refusal(write_onnx_ann, snn, tmp_path, images)


def test_integers_beyond_float32_are_refused(tmp_path):
    """In an edited file: conversion makes smaller ones."""
    snn = edited(with_a_bias_map(), "bias_map1", bias_q=torch.full((4, 8, 8), 2**24 + 1, dtype=torch.int32))
    said = refusal(write_onnx, snn, tmp_path)
    assert said == "bias_map1: integers up to 16777217, over 2^24, are rounded in float32"


# ---------------------------------------------------------------------------------------------------------------------
# C


def test_what_c_code_cannot_hold(tmp_path):
    upwards = nn.Sequential(nn.ConvTranspose2d(1, 4, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 3))
    said = refusal(write_c, convert(upwards, IMAGES, 4), tmp_path)
    wanted = "conv_transpose1 (0): a transposed convolution of real values cannot be written as C, take a convolution"
    assert said == wanted
    ann = parse_ann_model(upwards, (IMAGES,))
    assert refusal(write_c, ann, tmp_path) == "the network is no converted one: it has no neurons to write as C"


@pytest.mark.parametrize("activation", [nn.LeakyReLU(), nn.PReLU(4)], ids=["LeakyReLU", "PReLU"])
def test_signs_of_real_values_are_not_written_as_c(activation, tmp_path):
    snn = convert(three_layers(activation), IMAGES, 4, signed="pair", ann_layers=("0", "1"))
    assert refusal(write_c, snn, tmp_path).endswith(
        "(1) splits real values by sign, which C code cannot: let it spike, convert without --ann_layers"
    )


def test_a_layer_that_reads_currents_is_not_written_as_c(tmp_path):
    """In an edited file: conversion refuses a layer without a ReLU before it."""
    net = reading(lambda n, x: F.relu(n.b(F.relu(n.a(x)))), a=conv(4, 4), b=conv(4, 4))
    snn = convert(net, IMAGES, 4)
    snn = edited(snn, "conv3", in_nodes=(snn.ops["conv2"].out,))
    assert refusal(write_c, snn, tmp_path) == "conv3 (b) reads currents, which C code cannot: put a ReLU before it"


def with_activation_levels():
    """A network whose file has activation levels in a layer that stays ANN; conversion leaves none."""
    snn = convert(three_layers(nn.ReLU()), IMAGES, 4, ann_layers=("0", "1"))
    data = snn.to_dict()
    data["ops"][1]["levels"], data["ops"][1]["tensors"]["levels.scale"] = 4, torch.tensor(0.5)
    return from_dict(data)


def test_activation_levels_are_not_written_as_c(tmp_path):
    said = refusal(write_c, with_activation_levels(), tmp_path)
    assert said == "relu1 (1) rounds its activations to levels, which C code cannot: take it out of --ann_layers"


@needs_onnxruntime
def test_activation_levels_in_onnx(tmp_path):
    snn = with_activation_levels()
    assert len(snn.ops["relu1"].op(snn.ops["conv1"].op(IMAGES)).unique()) == 5
    assert_same_in_onnx(snn, IMAGES, str(tmp_path / "snn.onnx"))


# ---------------------------------------------------------------------------------------------------------------------
# PAICORE


def unfit(snn):
    """Why PAICORE does not hold a network, with the layer."""
    with pytest.raises(ValueError) as error:
        core_layers(snn, spike_trains(snn, IMAGES[:1]))
    return str(error.value)


def flat_skip(n, x):
    x = F.relu(n.a(x.flatten(1)))
    return F.relu(n.b(x) + x)


BEYOND = [
    ("max_pool1", "cores do not compute max pooling", lambda n, x: F.relu(n.a(F.max_pool2d(x, 2)))),
    ("pad1", "cores do not compute padding apart from a convolution", lambda n, x: F.relu(n.a(F.pad(x, (1, 0, 0, 0))))),
    ("batch_norm1 (norm)", "cores do not compute a BatchNorm", lambda n, x: F.relu(n.norm(x + F.relu(n.a(x))))),
    ("leaky_relu1", "cores do not compute pairs of signs", lambda n, x: F.relu(n.b(F.leaky_relu(n.a(x))))),
    ("add1", "cores do not compute a difference of spikes", lambda n, x: F.relu(x - F.relu(n.a(x)))),
    ("affine1", "cores do not compute a factor that was not", lambda n, x: F.relu((x + F.relu(n.a(x))) * n.factors)),
    ("slice1", "cores do not compute slices", lambda n, x: F.relu(n.a(x[:, :, 2:]))),
    ("select1", "cores do not compute an index", lambda n, x: F.relu(n.a(x[:, [1, 3, 0, 2]]))),
    ("permute1", "cores do not compute another order of dimensions", lambda n, x: F.relu(n.a(x.transpose(2, 3)))),
    ("upsample1", "cores do not compute repeated pixels", lambda n, x: F.relu(n.a(F.interpolate(x, scale_factor=2)))),
    ("gather1", "cores do not compute gathered pixels", lambda n, x: F.relu(n.a(F.interpolate(x, size=(5, 5))))),
    ("view1", "its view is no flattening of spikes", lambda n, x: F.relu(n.a(x.reshape(-1, 4, 4, 16)))),
    ("view1", "its view is no flattening of spikes", lambda n, x: F.relu(n.a(x).flatten(1))),
    ("avg_pool1", "it reads currents, cores read spikes", lambda n, x: F.relu(F.avg_pool2d(n.a(x), 2))),
    ("add1", "its weights are no integers of 8 bits", lambda n, x: F.relu(0.001 * n.a(x) + x)),
]


@pytest.mark.parametrize("where, message, forward", BEYOND)
def test_what_cores_do_not_compute(where, message, forward):
    norm, factors = nn.BatchNorm2d(4).eval(), nn.Parameter(torch.rand(4, 1, 1))
    norm.bias.data.fill_(0.1)
    net = reading(forward, a=conv(4, 4), b=conv(4, 4), norm=norm, factors=factors)
    assert unfit(convert(net, IMAGES, 4, signed="pair", maxpool="gate")).startswith(
        f"{where} does not fit PAICORE: {message}"
    )


@pytest.mark.parametrize("options", [{"padding": 2, "dilation": 2}, {"padding": "same"}], ids=str)
def test_paddings_and_dilations_that_cores_do_not_compute(options):
    net = reading(lambda n, x: F.relu(n.a(x)), a=nn.Conv2d(4, 4, 3, **options))
    assert unfit(convert(net, IMAGES, 4)) == (
        "conv2 (a) does not fit PAICORE: PAIBox takes no dilation and no padding in words"
    )


def test_float_weights_do_not_fit_cores():
    net = reading(lambda n, x: F.relu(n.a(x)), a=conv(4, 4))
    assert unfit(convert(net, IMAGES, 4, 32)) == "conv2 (a) does not fit PAICORE: its weights are no integers of 8 bits"


def test_spikes_of_flat_layers_are_not_added_on_cores():
    net = reading(flat_skip, a=nn.Linear(256, 16), b=nn.Linear(16, 16))
    assert unfit(convert(net, IMAGES, 4)) == (
        "add1 does not fit PAICORE: it adds spikes of a flat layer, or weighs each element"
    )


def test_sums_that_no_conversion_makes_do_not_fit_cores():
    spikes, currents = Spikes("relu1", (4, 2, 2)), Currents([], 0)
    one_weighed = type("Entry", (), {"op": type("Op", (), {"branch_weights": (torch.tensor(3), None)})})
    with pytest.raises(Unfit, match="it weighs currents"):
        addition(None, one_weighed, [currents, spikes])
    with pytest.raises(Unfit, match="it adds spikes of a flat layer, or weighs each element"):
        of_channels(spikes, torch.ones(4, 2, 2))


def test_the_images_current_does_not_fit_cores():
    def forward(n, x):
        current = n.a(x)
        return n.fc(F.relu(n.b(F.relu(current)) + current).flatten(1))

    snn = convert(Function(forward, a=conv(1, 4), b=conv(4, 4), fc=nn.Linear(256, 3)), IMAGES, 4)
    assert unfit(snn).startswith("add1 ") and unfit(snn).endswith("or that of an ANN layer, to spikes")


# ---------------------------------------------------------------------------------------------------------------------
# All formats


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


def test_the_script_exports_spiking_networks_alone(tmp_path):
    spec = spec_from_file_location("export_script", ROOT / "export.py")  # `import export` is the folder
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "ann.pth"
    torch.save(parse_ann_model(three_layers(nn.ReLU()), (IMAGES,)), path)
    assert not load_dag(path).is_spiking()
    with pytest.raises(ValueError) as error:
        script.main(script.parse_args([str(path), "--c", str(tmp_path / "code")]))
    assert str(error.value) == f"{path} holds no spiking network, convert one with ann2snn.py"
    assert [each.name for each in tmp_path.iterdir()] == ["ann.pth"]
