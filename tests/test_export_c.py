"""C code of converted networks: compiled, it has every spike count of the simulator."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from export_helpers import COMPILER, assert_same_in_c, compiled, needs_compiler, replayed, with_two_inputs
from helpers import MODELS, ROOT, Function, conv, convert, slow, small_model, with_random_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import export.c
from build_network import example_net, resnet20
from export.c import bits_of_currents, write_c
from export.c_functions import FUNCTIONS, NEEDED, TYPES, functions
from export.c_program import Program, pack, separate

SIZE = shutil.which("size")
WRITABLE = [name for name in MODELS if name not in ("preactivated", "bottlenecks")]


@needs_compiler
@pytest.mark.parametrize("bits, reset_mode", [(4, "subtraction"), slow(8, "zero")])
@pytest.mark.parametrize("name", WRITABLE)
def test_every_count_is_the_simulators(tmp_path, name, bits, reset_mode):
    net, images = small_model(name)
    snn = convert(net, images, 8, bits, reset_mode=reset_mode, maxpool="gate", signed="pair")
    assert_same_in_c(snn, images[:3], tmp_path, "-O2")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("options", [{"per_channel": "both"}, {"avgpool": "fold", "maxpool": "or"}, {"listen": 3}])
@pytest.mark.parametrize("name", WRITABLE)
def test_options_of_the_conversion(tmp_path, name, options):
    net, images = small_model(name)
    snn = convert(net, images, 6, 3, **{"maxpool": "gate", "signed": "pair", **options})
    assert_same_in_c(snn, images[:2], tmp_path)


@needs_compiler
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_few_and_odd_bits(tmp_path, bits):
    net, images = small_model("upwards")
    snn = convert(net, images, 8, bits, maxpool="gate")
    assert_same_in_c(snn, images[:2], tmp_path)


@needs_compiler
@pytest.mark.parametrize("reset_mode", ["subtraction", "zero"])
@pytest.mark.parametrize("name", ["dense", "shortcuts", "constants"])
def test_layers_that_listen_for_different_times_and_windows(tmp_path, name, reset_mode):
    """What joins an early and a late layer is delayed; a layer is silent behind its window, and behind its T steps."""
    net, images = small_model(name)
    snn = convert(net, images, 8, 4, reset_mode=reset_mode, maxpool="or", signed="pair")
    generator = torch.Generator().manual_seed(5)
    for neuron in snn.neurons().values():
        neuron.listen = [0, 2, 8, 11][torch.randint(4, (), generator=generator)]
        neuron.window = [None, 3, 8][torch.randint(3, (), generator=generator)]
    assert len({neuron.listen for neuron in snn.neurons().values()}) > 1
    assert_same_in_c(snn, images[:3], tmp_path)


def shuffled(x):
    """Two groups of channels in turn, as in ShuffleNet."""
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def first_and(function, channels=6, out=4):
    """A network of a convolution, `function` on its ReLU, a convolution, and a linear layer."""
    torch.manual_seed(3)
    layers = dict(first=conv(2, 6), conv=conv(channels, 5), fc=nn.Linear(5, out))
    return Function(
        lambda net, x: net.fc(F.relu(net.conv(function(F.relu(net.first(x))))).mean([2, 3])), **layers
    ).eval()


REARRANGEMENTS = {
    "shuffle": (shuffled, 6),
    "flip": (lambda x: x.flip(3), 6),
    "slices": (lambda x: x[:, 1:5, ::2, 1:], 4),
    "index": (lambda x: x[:, [3, 1, 1, 0]], 4),
    "transpose": (lambda x: x.transpose(2, 3), 6),
    "pixels": (lambda x: F.pixel_unshuffle(x, 2), 24),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2), 6),
    "pad and crop": (lambda x: F.pad(x, (-1, 2, 0, 1)), 6),
    "concatenated rows": (lambda x: torch.cat([x, x.flip(2)], 2), 6),
    "concatenated": (lambda x: torch.cat([x[:, :2], x], 1), 8),
    "no map": (lambda x: x.flatten(2).transpose(1, 2).flip(1).reshape(x.shape), 6),
    "uneven pooling": (lambda x: F.adaptive_avg_pool2d(x, 3), 6),
    "maximum over the edge": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), 6),
    "dilated maximum": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), 6),
}


@needs_compiler
@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_rearrangements(tmp_path, name):
    function, channels = REARRANGEMENTS[name]
    images = torch.rand(4, 2, 8, 6, generator=torch.Generator().manual_seed(1))
    snn = convert(first_and(function, channels), images, 6, 4, maxpool="gate")
    assert_same_in_c(snn, images[:2], tmp_path)


CONVOLUTIONS = {
    "grouped": nn.Conv2d(6, 4, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(6, 12, 3, groups=6, stride=2),
    "strided": nn.Conv2d(6, 5, (3, 2), stride=(2, 3), padding=(1, 0)),
    "dilated": nn.Conv2d(6, 5, 3, dilation=(2, 1), padding=2),
    "same": nn.Conv2d(6, 5, (5, 3), padding="same", dilation=(1, 2)),
    "wide padding": nn.Conv2d(6, 17, 3, padding=4),
    "one row": nn.Conv2d(6, 9, (1, 5)),
    "transposed": nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
    "transposed in groups": nn.ConvTranspose2d(6, 4, (3, 2), stride=(1, 2), groups=2, dilation=(2, 1)),
}


@needs_compiler
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(tmp_path, name):
    torch.manual_seed(2)
    layer = CONVOLUTIONS[name]
    channels = layer.out_channels
    net = Function(
        lambda net, x: net.fc(F.relu(net.layer(F.relu(net.first(x)))).mean([2, 3])),
        **dict(first=conv(2, 6), layer=layer, fc=nn.Linear(channels, 3)),
    )
    images = torch.rand(4, 2, 8, 6, generator=torch.Generator().manual_seed(1))
    snn = convert(net.eval(), images, 6, 4)
    assert_same_in_c(snn, images[:2], tmp_path)


@needs_compiler
def test_pairs_of_signs_through_a_maximum_and_a_linear_layer(tmp_path):
    torch.manual_seed(4)
    net = nn.Sequential(
        conv(2, 4),
        nn.LeakyReLU(0.1),
        conv(4, 6),
        nn.PReLU(6),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 8),
        nn.ReLU(),
    )
    net = nn.Sequential(net, nn.Linear(8, 3)).eval()
    images = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    for maxpool in ("gate", "or"):
        assert_same_in_c(convert(net, images, 8, 4, maxpool=maxpool, signed="pair"), images[:2], tmp_path)


@needs_compiler
def test_places_beyond_16_bits(tmp_path):
    images = torch.rand(2, 1, 1, 2**15 + 4)
    net = nn.Sequential(conv(1, 1), nn.ReLU(), conv(1, 1), nn.ReLU(), nn.AvgPool2d((1, 9)), nn.Flatten())
    assert_same_in_c(convert(net, images, 2), images[:1], tmp_path)


@needs_compiler
@pytest.mark.parametrize("most, bits", [(2**15 - 1, 16), (1, 32)])
def test_currents_take_16_bits_where_these_hold_them(monkeypatch, most, bits, tmp_path):
    monkeypatch.setattr(export.c, "MOST_IN_INT16", most)
    net, images = small_model("shortcuts")
    assert_same_in_c(convert(net, images, 6), images[:2], tmp_path)
    assert f"typedef int{bits}_t current_t;" in (tmp_path / "snn.c").read_text()


def test_the_largest_current_decides_on_their_bits():
    net, images = small_model("shortcuts")
    snn = convert(net, images, 6)
    assert bits_of_currents(snn) == 16
    for largest, bits in ((2**15 - 1, 16), (2**15, 32)):
        snn.neurons()["relu2"].largest_current = largest
        assert bits_of_currents(snn) == bits


@needs_compiler
def test_several_inputs_and_outputs(tmp_path):
    assert_same_in_c(*with_two_inputs(), tmp_path)


@needs_compiler
@pytest.mark.parametrize("bits, reset_mode", [(4, "subtraction"), (8, "zero")])
def test_digits_on_the_trained_network(tmp_path, digits_images, bits, reset_mode):
    net = example_net(1, 10)
    net.load_state_dict(torch.load(ROOT / "checkpoint/example_net_ann.pth", weights_only=True)["state_dict"])
    snn = convert(net.eval(), digits_images[:64], 8, bits, reset_mode=reset_mode)
    assert_same_in_c(snn, digits_images[:4], tmp_path)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(SIZE is None, reason="there are no binutils")
def test_size_of_the_object_code(tmp_path):
    """Code and tables of a ResNet-20 with 4-bit weights take at most 0.3 times what the packed weights take."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16)
    snn = convert(with_random_norms(resnet20(3, 10)), images, 4, 4)
    write_c(snn, tmp_path, images)
    weights = sum(op.weight.numel() for op in snn.weighted_layers().values()) / 2  # bytes
    told = int(re.search(r"Weights: (\d+) bytes", (tmp_path / "snn.c").read_text())[1])
    assert 0.95 * weights < told <= weights
    done = subprocess.run(
        [SIZE, compiled(tmp_path, "-O2", "-c", "-DSNN_NO_MAIN")], capture_output=True, text=True, check=True
    )
    code, data, memory = map(int, done.stdout.splitlines()[1].split()[:3])
    assert code + data <= 1.3 * weights
    assert memory <= int(re.search(r"Memory: (\d+) bytes", (tmp_path / "snn.c").read_text())[1]) * 1.01  # alignment
    assert replayed(tmp_path).returncode == 0


@needs_compiler
def test_another_weight_or_count_is_found(tmp_path):
    net, images = small_model("upwards")
    write_c(convert(net, images, 8, 4, maxpool="gate"), tmp_path, images[:2])
    source, vectors = tmp_path / "snn.c", (tmp_path / "vectors.bin").read_bytes()
    text = source.read_text()
    (code,) = re.findall(r"(?<=conv2_codes\[19\] = \{\n    )\d+", text) or [None]
    if code is None:
        code = re.search(r"_codes\[\d+\] = \{\n    (\d+)", text)[1]
    changed = re.sub(rf"(_codes\[\d+\] = {{\n    ){code},", rf"\g<1>{int(code) ^ 15},", text, count=1)
    assert changed != text
    source.write_text(changed)
    done = replayed(tmp_path)
    assert done.returncode == 1 and re.fullmatch(r"error: other spike counts in \w+\n", done.stderr)
    source.write_text(text)
    (tmp_path / "vectors.bin").write_bytes(vectors[:-8])
    done = replayed(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: the vectors end early")
    (tmp_path / "vectors.bin").write_bytes(vectors[:8] + b"\x07\0\0\0" + vectors[12:])
    assert replayed(tmp_path).stderr.startswith("error: no vectors of this network")
    done = subprocess.run([tmp_path / "snn"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: use ")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("name", ["preactivated", "bottlenecks"])
def test_the_images_current_beside_spikes_is_refused(tmp_path, name):
    net, images = small_model(name)
    snn = convert(net, images, 8, 4, maxpool="gate", signed="pair")
    with pytest.raises(ValueError, match=r"^add\d+ adds the image's real-valued current to spikes.*: put a ReLU"):
        write_c(snn, tmp_path / "new", images)
    assert not (tmp_path / "new").exists()


def small_snn(**options):
    net, images = small_model("upwards")
    return convert(net, images, 8, options.pop("bits", 4), maxpool="gate", **options), images


def test_other_refusals(tmp_path):
    snn, images = small_snn()
    with pytest.raises(ValueError, match="give images, or --input_shape"):
        write_c(snn, tmp_path)
    next(iter(snn.neurons().values())).largest_current = 2**30
    with pytest.raises(ValueError, match=r"^relu1.*its potentials may reach 8.59e\+09, more than 32 bits hold"):
        write_c(snn, tmp_path, images)
    snn.timesteps = 65536
    with pytest.raises(ValueError, match="runs for 65536 timesteps"):
        write_c(snn, tmp_path, images)
    floats, images = small_snn(bits=32)
    with pytest.raises(ValueError, match=r"^conv_transpose1 \(up\) has float weights"):
        write_c(floats, tmp_path, images)
    assert not list(tmp_path.iterdir())


def test_a_layer_without_c_code_is_named(tmp_path):
    images = torch.rand(4, 2, 6, 6)
    net = nn.Sequential(conv(2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3), nn.Softmax(1)).eval()
    with pytest.raises(ValueError, match=r"^softmax1 \(4\): SoftmaxOp cannot be written as C"):
        write_c(convert(net, images, 4, 4), tmp_path, images)


def test_a_layer_that_stays_ann_between_spikes_is_named(tmp_path):
    images = torch.rand(4, 2, 6, 6)
    net = nn.Sequential(conv(2, 3), nn.ReLU(), conv(3, 3), nn.ReLU(), conv(3, 3), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(108, 3)).eval()
    snn = convert(net, images, 4, 4, ann_layers=["2"])
    with pytest.raises(ValueError, match=r"^conv2 \(2\) stays ANN between spiking layers.*: convert without"):
        write_c(snn, tmp_path, images)


def test_nothing_is_half_written(tmp_path):
    snn, images = small_snn()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="is a file"):
        write_c(snn, tmp_path / "file", images)
    (tmp_path / "folder" / "vectors.bin").mkdir(parents=True)
    with pytest.raises(OSError, match=r"vectors\.bin, it is a folder"):
        write_c(snn, tmp_path / "folder", images)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["vectors.bin"]


def test_names_of_a_file_cannot_end_a_comment(tmp_path):
    snn, images = small_snn()
    for entry in snn.ops.values():
        entry["path"] = '*/ int evil; /* "\\\n'
    write_c(snn, tmp_path, images[:1])
    text = (tmp_path / "snn.c").read_text()
    assert text.count("*/") == text.count("/*") and "evil" in text
    assert COMPILER is None or replayed(tmp_path).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=50))
@settings(deadline=None)
def test_packed_codes(bits, codes):
    """The lowest bit first, without gaps, and one byte more."""
    codes = np.array(codes, np.uint32) % 2**bits
    packed = pack(codes, bits)
    number = int.from_bytes(packed.tobytes(), "little")
    assert len(packed) == -(-len(codes) * bits // 8) + 1
    assert [number >> bits * k & (2**bits - 1) for k in range(len(codes))] == codes.tolist()


@given(st.lists(st.sampled_from([-1, 1]), min_size=2, max_size=9), st.integers(1, 60))
@settings(deadline=None)
def test_weights_take_as_few_bits_as_their_values(signs, size):
    program, values = Program(4, {}, False), torch.tensor(signs) * size
    _, bits = program.packed("w", values)
    assert bits == 1


@given(st.data())
@settings(deadline=None)
def test_places_chosen_along_each_axis(data):
    """`separate` finds the rows, columns and channels of any choice, with zeros, and refuses one that is none."""
    C, H, W = (data.draw(st.integers(1, 4)) for _ in range(3))
    rows, columns, channels = (
        torch.tensor(data.draw(st.lists(st.integers(-1, extent - 1), min_size=1, max_size=4))) for extent in (H, W, C)
    )
    i, j, k = rows[:, None, None], columns[None, :, None], channels[None, None]
    places = torch.where((i < 0) | (j < 0) | (k < 0), -1, (i * W + j) * C + k)
    written = len(channels), len(rows), len(columns)
    axes = separate(places.flatten(), (C, H, W), written)
    if (places >= 0).any():
        assert [axis.tolist() for axis in axes] == [rows.tolist(), columns.tolist(), channels.tolist()]
    mixed = torch.tensor([0, 3, 1, 2])  # of a map of two rows and two columns
    assert separate(mixed, (1, 2, 2), (1, 2, 2)) is None


@given(st.data())
@settings(deadline=None, max_examples=50)
def test_currents_that_are_alive_together_do_not_share_memory(data):
    program = Program(4, {}, False)
    for number in range(data.draw(st.integers(1, 12))):
        first = data.draw(st.integers(0, 10))
        program.currents[f"x{number}"] = [data.draw(st.integers(1, 9)), first, first + data.draw(st.integers(0, 5))]
    total, starts = program.layout()
    placed = list(zip(starts, program.currents.values()))
    for n, (start, (size, first, last)) in enumerate(placed):
        assert start + size <= total
        for other, (length, begun, ended) in placed[:n]:
            assert start + size <= other or other + length <= start or ended < first or last < begun


def test_every_function_has_its_types():
    for base, text in FUNCTIONS.items():
        name = base + ("_u8_cur" if "_IN_OUT(" in text else "_cur" if "_IN(" in text else "")
        assert re.search(rf"\b{name}\(", functions([name])) and not re.search(r"\b(IN|OUT|WIDE)\b", functions([name]))
    assert set(NEEDED) <= set(FUNCTIONS) and set(TYPES) == {"u8", "i32", "cur", "f32"}


@needs_compiler
def test_the_replay_takes_the_first_currents_of_the_vectors(tmp_path):
    """Other currents by rounding are no error, as sums of floats depend on their order; other currents are."""
    images = torch.rand(2, 1, 5, 5)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.LeakyReLU(0.5), nn.Flatten(), nn.Linear(50, 4), nn.ReLU())
    net = nn.Sequential(*net, nn.Linear(4, 2))
    write_c(convert(net.eval(), images, 8, 4, signed="pair"), tmp_path, images)
    vectors = np.fromfile(tmp_path / "vectors.bin", np.uint8, offset=12)
    currents = vectors[100:500].view(np.float32)  # behind the 25 pixels of the first image: 2 x 50 values
    vectors[100:500] = np.nextafter(currents, np.float32(-9)).view(np.uint8)
    head = (tmp_path / "vectors.bin").read_bytes()[:12]
    (tmp_path / "vectors.bin").write_bytes(head + vectors.tobytes())
    assert "other currents" not in replayed(tmp_path).stderr
    vectors[100:104] = np.frombuffer(np.float32(7).tobytes(), np.uint8)
    (tmp_path / "vectors.bin").write_bytes(head + vectors.tobytes())
    done = replayed(tmp_path)
    assert done.returncode == 1 and re.match(r"error: the image causes other currents in \w+", done.stderr)


@needs_compiler
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_quantized_last_layer_is_packed(tmp_path, per_channel):
    """Its weights are integers over s_w, in the bits of the integers; otherwise they are floats."""
    snn, images = small_snn()
    last = next(op for op in reversed(snn.weighted_layers().values()) if not op.spiking)
    write_c(snn, tmp_path, images[:2])
    assert "connect_f32(" in (tmp_path / "snn.c").read_text()
    scale = 7 / (last.weight.detach().abs().amax(1, keepdim=True) if per_channel else last.weight.detach().abs().max())
    with torch.no_grad():
        last.set_weight_scale(scale)
        last.weight.copy_((last.weight * scale).round() / scale)
    assert_same_in_c(snn, images[:2], tmp_path)
    text = (tmp_path / "snn.c").read_text()
    assert "connect_packed_f32(" in text and "connect_f32(" not in text
    assert re.search(r"linear1_codes, 4, -7, 1\}", text)
