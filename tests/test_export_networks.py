"""Networks of build_network.py in every format: the debug networks, and a U-Net.

Each is compared spike for spike where the format can hold it, and refused with the layer's name elsewhere.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from export_helpers import (
    assert_same_in_c,
    assert_same_in_nir,
    assert_same_in_onnx,
    assert_same_step_in_onnx,
    needs_compiler,
    needs_nir,
    needs_onnxruntime,
    needs_paibox,
    simulate_cores,
)
from helpers import convert, with_random_norms

from build_network import get_net_by_name
from export.formats import write_exports
from export.nir_graph import write_nir
from export.onnx_ann import write_onnx_ann
from export.paicore import Mapped, spike_trains
from export.paicore_layers import core_layers
from script_options import EXPORTS

DEBUG = {"debug_net0": (1, 6, 6), "debug_net1": (1, 6, 6), "debug_net2": (2, 4, 4), "debug_net3": (1, 6, 6)}
ON_CORES = [name for name in DEBUG if name not in ("debug_net0", "debug_net3")]
TIMESTEPS = 5  # odd: the last step of an ONNX file stands alone


@pytest.fixture(scope="module")
def snns():
    """Function from the name of a network to `snn, images`; each is converted once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            shape = DEBUG.get(name, (3, 32, 32))
            net = get_net_by_name(name, shape[0], 2)
            images = torch.rand(8, *shape)
            net = net.eval() if name in DEBUG else with_random_norms(net)
            made[name] = convert(net, images, TIMESTEPS, correction="none"), images
        return made[name]

    return get


@needs_onnxruntime
@pytest.mark.parametrize("name", DEBUG)
def test_debug_networks_in_onnx(snns, name, tmp_path):
    snn, images = snns(name)
    assert_same_in_onnx(snn, images, str(tmp_path / "snn.onnx"))
    assert_same_step_in_onnx(snn, images, str(tmp_path / "step.onnx"))


@needs_onnxruntime
@pytest.mark.parametrize("name", DEBUG)
def test_debug_networks_as_quantized_anns(name, tmp_path):
    torch.manual_seed(0)
    images = torch.rand(8, *DEBUG[name])
    net = get_net_by_name(name, DEBUG[name][0], 2).eval()
    snn = convert(net, images, TIMESTEPS, correction="none", listen=TIMESTEPS)
    assert_same_in_onnx(snn, images, str(tmp_path / "ann.onnx"), write=write_onnx_ann)


@needs_compiler
@pytest.mark.parametrize("name", DEBUG)
def test_debug_networks_in_c(snns, name, tmp_path):
    assert_same_in_c(*snns(name), tmp_path)


@needs_nir
@pytest.mark.parametrize("name", DEBUG)
def test_debug_networks_in_nir(snns, name, tmp_path):
    assert_same_in_nir(*snns(name), tmp_path / "net.nir")


@pytest.mark.parametrize("name", ON_CORES)
def test_debug_networks_on_cores(snns, name):
    snn, images = snns(name)
    trains = spike_trains(snn, images)
    hosts, layers = core_layers(snn, trains)
    found = simulate_cores(layers, {host: trains[host] for host in hosts}, TIMESTEPS)
    assert all((found[layer.name] == trains[layer.name]).all() for layer in layers)


@needs_paibox
@pytest.mark.parametrize("name", ON_CORES)
def test_debug_networks_in_paibox(snns, name):
    snn, images = snns(name)
    trains = spike_trains(snn, images[:2])
    paibox = importlib.import_module("paibox")
    hosts, layers = core_layers(snn, trains)
    assert Mapped(paibox, hosts, layers).compare(trains, TIMESTEPS) == sum(trains[each.name].size for each in layers)


@needs_onnxruntime
def test_the_unet_in_onnx(snns, tmp_path):
    snn, images = snns("unet_small")
    assert_same_in_onnx(snn, images[:2], str(tmp_path / "snn.onnx"), reference=False)


@needs_compiler
def test_the_unet_in_c(snns, tmp_path):
    snn, images = snns("unet_small")
    assert_same_in_c(snn, images[:1], tmp_path, "-O1")


@pytest.mark.parametrize(
    "name, message",
    [
        ("unet_small", "conv_transpose1 (up2) does not fit PAICORE: cores do not compute transposed convolutions"),
        ("debug_net3", "concat1 does not fit PAICORE: cores do not compute concatenations"),
        ("debug_net0", "no layer is left for the cores: all neurons read the image"),
    ],
)
def test_what_cores_do_not_hold_is_refused_by_name(snns, name, message):
    snn, images = snns(name)
    with pytest.raises(ValueError) as error:
        core_layers(snn, spike_trains(snn, images[:1]))
    assert str(error.value) == message


@needs_nir
def test_what_nir_does_not_hold_is_refused_by_name(snns, tmp_path):
    snn, images = snns("unet_small")
    message = r"^conv_transpose1 \(up2\) cannot be written: NIR has no node for transposed convolutions$"
    with pytest.raises(ValueError, match=message):
        write_nir(snn, str(tmp_path / "net.nir"), images)
    assert not (tmp_path / "net.nir").exists()


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.flag)
def test_every_flag_writes_its_file(snns, export, tmp_path, capsys):
    """As the scripts do: images come as a tuple, one for each input."""
    if any(importlib.util.find_spec(package) is None for package in export.packages):
        pytest.skip(f"needs {export.packages}")
    snn, images = snns("debug_net1")
    path = tmp_path / "written"
    flags = {each.flag: None for each in EXPORTS} | {export.flag: str(path)}
    write_exports(SimpleNamespace(**flags), snn, (images,))
    assert path.is_dir() if export.metavar == "DIR" else path.stat().st_size > 0
    assert str(path) in capsys.readouterr().out
