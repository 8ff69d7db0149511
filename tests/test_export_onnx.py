"""ONNX files: onnxruntime and onnx's reference evaluator count the same spikes in every layer as the simulator.

onnx's reference evaluator (1.23) fails on transposed convolutions with groups; there onnxruntime alone counts.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from export_helpers import (
    CLOSE,
    assert_counts,
    assert_same_in_onnx,
    assert_same_step_in_onnx,
    counts_of,
    loop_of,
    pooling_net,
    runtimes,
)
from helpers import (
    CHOICES,
    MODELS,
    ROOT,
    Function,
    conv,
    convert,
    errors_of,
    python,
    slow,
    small_model,
    with_random_norms,
)
from reference import quantized_ann
from torch import nn

from ann_parser import parse_ann_model
from build_network import get_net_by_name
from export.onnx_ann import write_onnx_ann
from export.onnx_file import FORMAT, write_onnx, write_onnx_step
from export.onnx_graph import EXACT_IN_FLOAT32
from layers.activations import SpikeReLU
from networks.checkpoint import load_weights
from script_options import EXPORTS
from snn_weight_setter import trans_ann2snn_weight

onnxruntime = pytest.importorskip("onnxruntime")

# the script export.py; `import export` is the folder
SPEC = spec_from_file_location("export_script", ROOT / "export.py")
SCRIPT = module_from_spec(SPEC)
SPEC.loader.exec_module(SCRIPT)

POOLINGS = (("gate", "fold", 0), ("or", "spike", 0), ("gate", "spike", 3), ("or", "fold", 3))  # tested as slow
WINDOWS = (("shortcuts", "auto"), ("upwards", 2), ("preactivated", "auto"))  # of `listen`, tested as slow
WITH_GROUPS = ("upwards",)
STAYS_ANN = r"^conv2 \(2\) stays ANN between spiking layers .*: write --onnx, or convert without --ann_layers$"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "snn.onnx")


def rearranged(net, x):
    """Slices, places, a shuffle, an upsampling, paddings that crop, a concatenation."""
    a, b, c = (F.relu(layer(x)) for layer in (net.a, net.b, net.c))
    small = F.interpolate(F.pixel_shuffle(a, 2), scale_factor=0.5)
    places = b[:, [2, 0, 1]].flip(3)
    shuffled = F.channel_shuffle(c, 2)[:, :, 1::2].repeat_interleave(2, 2)
    return net.fc(F.pad(torch.cat([small, places, shuffled], 1), (1, -1, 0, 2)).flatten(1))


# ---------------------------------------------------------------------------------------------------------------------
# Every layer, every neuron


@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", MODELS)
def test_small_networks(name, reset_mode, path):
    net, images = small_model(name)
    correction = "none" if reset_mode == "zero" else "potential"
    snn = convert(net, images, timesteps=5, reset_mode=reset_mode, correction=correction, **CHOICES)
    assert_same_in_onnx(snn, images[:4], path, reference=name not in WITH_GROUPS)
    assert_same_step_in_onnx(snn, images[:3], path, reference=name not in WITH_GROUPS)


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 32}, {"bits": 2, "per_channel": "both"}], ids=str)
def test_weights_of_all_widths(options, path):
    net, images = small_model("shortcuts")
    assert_same_in_onnx(convert(net, images, timesteps=6, correction="none", **options), images[:4], path)


@pytest.mark.parametrize(
    "name, listen",
    [
        *(("shortcuts", 2), ("upwards", "auto"), ("preactivated", 2)),
        *(slow(*each) for each in WINDOWS),
    ],
)
def test_layers_that_listen_or_have_a_window(name, listen, path):
    net, images = small_model(name)
    snn = convert(net, images, timesteps=6, listen=listen, correction="none", **CHOICES)
    assert_same_in_onnx(snn, images[:3], path, reference=name not in WITH_GROUPS)


@pytest.mark.parametrize("listen, timesteps", [(0, 1), (0, 11), (4, 3)])
def test_one_file_runs_for_every_number_of_timesteps(listen, timesteps, path):
    net, images = small_model("constants")
    snn = convert(net, images, timesteps=6, listen=listen, hold_back=0)
    assert_same_in_onnx(snn, images[:3], path, timesteps=timesteps)


@pytest.mark.parametrize(
    "maxpool, avgpool, listen",
    [
        *(("gate", "spike", 0), ("or", "fold", 0), ("gate", "fold", 3), ("or", "spike", 3)),
        *(slow(*each) for each in POOLINGS),
    ],
)
def test_poolings(maxpool, avgpool, listen, path):
    images = torch.rand(4, 2, 8, 8)
    snn = convert(
        pooling_net(), images, timesteps=6, maxpool=maxpool, avgpool=avgpool, listen=listen, correction="none"
    )
    assert_same_in_onnx(snn, images, path)
    if not listen:
        assert_same_step_in_onnx(snn, images, path)


@pytest.mark.parametrize("listen", [0, 3])
@pytest.mark.parametrize("maxpool", ["gate", "or"])
def test_pairs_of_signs(maxpool, listen, path):
    images = torch.rand(4, 2, 8, 8)
    net = pooling_net(signed=True)
    options = {"maxpool": maxpool, "signed": "pair", "listen": listen, "correction": "none"}
    assert_same_in_onnx(convert(net, images, timesteps=6, **options), images, path)


@pytest.mark.parametrize("listen", [0, 6])
def test_rearrangements(listen, path):
    fc = nn.Sequential(nn.Linear(640, 5), nn.ReLU(), nn.Linear(5, 3))
    net, images = Function(rearranged, a=conv(2, 4), b=conv(2, 3), c=conv(2, 4), fc=fc), torch.rand(4, 2, 8, 8)
    assert_same_in_onnx(convert(net, images, timesteps=6, listen=listen, correction="none"), images, path)


@pytest.mark.parametrize("listen", [0, 3])
def test_layers_that_stay_ann_between_spiking_ones(listen, path):
    net = nn.Sequential(
        *(conv(2, 4), nn.ReLU(), conv(4, 4), nn.Sigmoid(), conv(4, 4), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 5), nn.ReLU(), nn.Linear(5, 3), nn.LogSoftmax(1)),
    )
    images = torch.rand(4, 2, 8, 8)
    snn = convert(net, images, timesteps=6, ann_layers=("2", "3"), listen=listen)
    assert_same_in_onnx(snn, images, path)
    message = r"^relu1 \(1\) listens before it fires.*, convert with --listen 0$" if listen else STAYS_ANN
    with pytest.raises(ValueError, match=message):
        write_onnx_step(snn, path, images)


def test_several_inputs_and_outputs(path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.fc = conv(2, 4), conv(3, 4), conv(8, 4), nn.Linear(256, 3)

        def forward(self, x, y):
            x, y = F.relu(self.a(x)), F.relu(self.b(y))
            return self.fc(F.relu(self.c(torch.cat([x, y], 1))).flatten(1)), x

    inputs = torch.rand(4, 2, 8, 8), torch.rand(4, 3, 8, 8)
    dag = parse_ann_model(Two(), tuple(x[:2] for x in inputs))
    snn = trans_ann2snn_weight(dag, [(inputs, torch.zeros(4))], inputs[0].device, 6, 4)
    write_onnx(snn, path, inputs)
    counts, outputs = counts_of(snn, inputs, 6), [each.detach().numpy() for each in snn(*inputs)]
    for runtime in runtimes(path):
        names = ["output_0", "output_1", *(f"count_{name}" for name in counts)]
        first, second, *found = runtime.run(names, dict(zip(snn.inputs_nodes, (x.numpy() for x in inputs))))
        assert_counts(counts, dict(zip(counts, found)))
        assert np.abs(first - outputs[0]).max() < CLOSE and np.abs(second - outputs[1]).max() < CLOSE


def test_potentials_beyond_float32_are_int32(path):
    images = torch.rand(2, 2, 8, 8)
    net = nn.Sequential(
        *(conv(2, 16), nn.ReLU(), nn.Conv2d(16, 16, 5), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 5), nn.ReLU(), nn.Linear(5, 3)),
    )
    snn = convert(net, images, timesteps=8, bits=8, hold_back=0)
    snn.timesteps = 4000  # for which the file has to be exact
    assert_same_in_onnx(snn, images, path, timesteps=5)
    kinds = [each.type.tensor_type.elem_type for each in loop_of(path).input]
    assert onnx.TensorProto.INT32 in kinds
    bounds = [neuron.largest_current for neuron in snn.neurons().values() if neuron.largest_current]
    assert max(bounds) * 4000 > EXACT_IN_FLOAT32
    assert min(bounds) * int(facts_in(path)["largest_timesteps"]) < 2**31
    snn.timesteps = 65536 * 16
    with pytest.raises(ValueError, match=r"^relu2 \(3\): its membrane potentials need more than 32 bits at T=1048576"):
        write_onnx(snn, path, images)


def facts_in(path):
    return {each.key: each.value for each in onnx.load(path).metadata_props}


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "name, size, options",
    [
        ("resnet20", 8, {}),
        ("resnet20", 8, {"listen": 4}),
        ("vgg9_bn", 32, {"avgpool": "fold"}),
        ("mobilenet_small", 16, {}),
        ("inception_small", 8, {}),
        ("unet_small", 32, {}),
    ],
)
def test_networks(name, size, options, bits, path):
    net, images = with_random_norms(get_net_by_name(name, 3, 10)), torch.rand(2, 3, size, size)
    snn = convert(net, images, timesteps=4, bits=bits, **options, **CHOICES)
    assert_same_in_onnx(snn, images, path)


def test_a_network_of_4_bits_is_small(resnet, path):
    net, images = resnet
    snn = convert(net, images, timesteps=4, correction="none")
    assert_same_in_onnx(snn, images, path, reference=False)
    weights = sum(op.weight.numel() for op in snn.weighted_layers().values())
    assert weights / 2 < os.path.getsize(path) < 250_000


@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
def test_the_example_network_on_digits(digits_loaders, digits_images, reset_mode, path):
    net = load_weights(get_net_by_name("example_net"), ROOT / "checkpoint/example_net_ann.pth")
    test_images = next(iter(digits_loaders[0]))[0][:40]
    for bits in (4, 8):
        snn = convert(net, digits_images[:100], timesteps=8, bits=bits, reset_mode=reset_mode)
        assert_same_in_onnx(snn, test_images, path, reference=False)


# ---------------------------------------------------------------------------------------------------------------------
# The quantized ANN


@pytest.mark.parametrize("name, bits", [("dense", 4), ("shortcuts", 8), ("upwards", 8), ("constants", 4)])
def test_the_ann_has_the_counts_of_a_network_that_hears_all_steps(name, bits, path):
    net, images = small_model(name)
    snn = convert(net, images, timesteps=8, bits=bits, listen=8, correction="none", **CHOICES)
    assert_same_in_onnx(snn, images[:4], path, reference=name not in WITH_GROUPS, write=write_onnx_ann)


@pytest.mark.parametrize("timesteps, bits", [(100, 8), (200, 8), (300, 4)])
def test_the_ann_of_many_levels(timesteps, bits, path):
    """Its counts are those of the NumPy reference, from the first layer's own on.

    The codes are uint16 where products of uint8 and int8, which some processors add in 16 bits, could saturate.
    """
    images = torch.rand(4, 2, 8, 8)
    options = {"bits": bits, "listen": timesteps, "avgpool": "fold", "maxpool": "or", "correction": "none"}
    snn = convert(pooling_net(), images, timesteps=timesteps, **options)
    write_onnx_ann(snn, path, images)
    first, *behind = snn.spiking_layers()
    for runtime in runtimes(path):
        start, *found = runtime.run([f"count_{name}" for name in (first, *behind)], {"image": images.numpy()})
        expected = quantized_ann(snn, {name: start[None] for name in ("conv1", first)}, timesteps)
        assert_counts({name: expected[name] for name in behind}, dict(zip(behind, found)))
        assert start.max() == timesteps and np.abs(start - counts_of(snn, images, timesteps)[first]).max() <= 1
    kinds = {each.data_type for each in onnx.load(path).graph.initializer}
    assert (onnx.TensorProto.UINT16 in kinds) == (2 * timesteps * max(integers_in(path)) >= 2**15 or timesteps > 255)


def integers_in(path):
    """The largest value of every tensor of integer weights in a file."""
    found = [each for each in onnx.load(path).graph.initializer if each.name.startswith("integers")]
    return [int(np.abs(onnx.numpy_helper.to_array(each).astype(int)).max()) for each in found]


def test_an_ann_that_does_not_exist_is_refused(path):
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match=r"^relu1 \(first.1\): reset to zero needs time, an ANN holds"):
        write_onnx_ann(convert(net, images, timesteps=4, reset_mode="zero"), path, images)
    net, images = small_model("preactivated")
    with pytest.raises(ValueError, match=r"^relu3.*: floats of the image flow into it beside spikes"):
        write_onnx_ann(convert(net, images, timesteps=4), path, images)
    assert not os.path.exists(path)


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_the_file_says_what_it_holds(path):
    net, images = small_model("shortcuts")
    snn = convert(net, images, timesteps=6, bits=3)
    facts = {"input_shape": [2, 7, 7], "mean": [0.5, 0.4], "std": [0.2, 0.1], "resize": None, "classes": ["a"]}
    snn.preprocessing = facts
    line = write_onnx(snn, path)
    model, facts = onnx.load(path), facts_in(path)
    assert (model.opset_import[0].version, model.ir_version, model.producer_name) == (21, 10, "ann2snn")
    assert facts["format"] == FORMAT and facts["reset_mode"] == "subtraction"
    known = {key: json.loads(value) for key, value in facts.items() if key not in ("format", "reset_mode")}
    assert (known["timesteps"], known["weight_bits"], known["classes"]) == (6, [3], ["a"])
    assert (known["mean"], known["std"]) == ([0.5, 0.4], [0.2, 0.1])
    for name, neuron in snn.neurons().items():
        assert np.allclose(known["scales"][name], neuron.scale_factor.flatten().numpy())
    assert f"{os.path.getsize(path):,} bytes" in line
    kinds = {each.data_type for each in model.graph.initializer if each.name.startswith("integers")}
    assert kinds == {onnx.TensorProto.INT4}
    assert [node.op_type for node in loop_of(path).node].count("DequantizeLinear") == 0
    assert "MatMul" not in {node.op_type for node in [*model.graph.node, *loop_of(path).node]}


def test_the_printed_command_runs(path):
    net, images = small_model("shortcuts")
    line = write_onnx(convert(net, images, timesteps=4), path, images)
    command = shlex.split(line.split("bytes): ")[1])
    assert command[:2] == ["python3", "-c"]
    run = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert run.returncode == 0 and re.match(r"\[array\(\[\[", run.stdout), run.stderr


def test_weights_above_eight_bits_and_layers_without_nodes_are_refused_by_name(path):
    class Other(SpikeReLU):
        """A layer that ONNX files do not know."""

    net, images = small_model("shortcuts")
    snn = convert(net, images, timesteps=4)
    other = Other()
    other.spiking, other.neuron = True, snn.ops["relu2"].op.neuron
    snn.ops["relu2"]["op"] = other
    with pytest.raises(ValueError, match=r"^relu2: ONNX files cannot hold a Other$"):
        write_onnx(snn, path, images)
    assert not os.path.exists(path)


def test_a_network_without_a_shape_needs_images(path):
    net, images = small_model("shortcuts")
    with pytest.raises(ValueError, match="does not hold the shape of its images, give --input_shape"):
        write_onnx(convert(net, images, timesteps=4), path)


def test_a_function_without_an_operator_is_refused_by_name(path):
    net = nn.Sequential(conv(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3), nn.GELU())
    images = torch.rand(4, 2, 8, 8)
    with pytest.raises(ValueError, match=r"^gelu1 \(4\): its function gelu has no operator"):
        write_onnx(convert(net, images, timesteps=4), path, images)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


@pytest.mark.slow
def test_the_scripts_write_the_same_files(tmp_path):
    names = [each.flag for each in EXPORTS if each.flag.startswith("onnx")]
    flags = [word for name in names for word in (f"--{name}", tmp_path / f"{name}.onnx")]
    start = ["ann2snn.py", "example_net", "--ann_weight", "checkpoint/example_net_ann.pth"]
    run = python(*start, "-e", "0", "--timesteps", "4", "--save_file", tmp_path / "snn.pth", *flags)
    assert run.returncode == 0, run.stderr
    files = {name: (tmp_path / f"{name}.onnx").read_bytes() for name in names}
    again = python("export.py", tmp_path / "snn.pth", *flags)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines() == run.stdout.splitlines()[-len(names) :]
    for name in names:
        assert (tmp_path / f"{name}.onnx").read_bytes() == files[name]


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "no format is named, give one of --onnx"),
        (["--onnx", "{0}/no/x.onnx"], "cannot write {0}/no/x.onnx, there is no folder {0}/no, create it first"),
        (["--onnx", "{0}/snn.pth"], "two results would be written to the same file"),
        (["--onnx", "{0}/x.onnx"], "does not hold the shape of its images, give --input_shape C,H,W"),
        (["--onnx", "{0}/x.onnx", "--images", "a.png"], "does not hold how its images are read, leave out --images"),
        (["--onnx", "{0}/x.onnx", "--onnx_ann", "{0}/y.onnx", "--input_shape", "2,7,7"], "written before: {0}/x.onnx"),
    ],
)
def test_mistakes_of_the_command_line(flags, said, tmp_path, capsys):
    net, images = small_model("preactivated")
    torch.save(convert(net, images, timesteps=4, correction="none"), tmp_path / "snn.pth")
    argv = [str(tmp_path / "snn.pth"), *(flag.format(tmp_path) for flag in flags)]
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        SCRIPT.main(SCRIPT.parse_args(argv))
    line = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert said.format(tmp_path) in line and line.count("\n") <= 1
    assert not (tmp_path / "y.onnx").exists()


def test_a_mistake_is_one_line(tmp_path):
    run = python("export.py", tmp_path / "none.pth", "--onnx", tmp_path / "x.onnx")
    (line,) = errors_of(run.stderr)
    assert run.returncode == 2 and line.startswith("error: ") and "none.pth" in line
    assert not os.listdir(tmp_path)
