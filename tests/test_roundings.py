"""Networks that round their own activations: their levels and lambdas are found, kept, and those of the spikes."""

import warnings

import pytest
import torch
from helpers import assert_every_spike_is_reproduced
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ann2snn
from ann_parser import parse_ann_model
from finetuning.levels import own_levels, own_levels_in_words
from networks.onnx_import import load_onnx
from pipeline import convert_network
from rewrites.roundings import without_levels
from spike_dag import load_dag
from spike_layers import FunctionOp, SpikeAdd


class Floor(torch.autograd.Function):
    """floor, with the gradient of its input."""

    @staticmethod
    def forward(ctx, x):
        return x.floor()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class ClipFloorShift(nn.Module):
    """The activation of QCFS networks (Bu et al., ICLR 2022)."""

    def __init__(self, levels, scale):
        super().__init__()
        self.levels, self.scale = levels, nn.Parameter(torch.tensor([scale]))

    def forward(self, x):
        x = torch.clamp(x / self.scale, 0, 1)
        return Floor.apply(x * self.levels + 0.5) / self.levels * self.scale


class LearnedSteps(nn.Module):
    """The activation of LSQ (Esser et al., ICLR 2020), whose rounding hands its gradient straight through."""

    def __init__(self, levels, scale):
        super().__init__()
        self.levels, self.step = levels, nn.Parameter(torch.tensor(scale / levels))

    def forward(self, x):
        x = torch.clamp(x / self.step, 0, self.levels)
        return ((x.round() - x).detach() + x) * self.step


class AroundAll(LearnedSteps):
    """The same, with the straight-through gradient around clamp and factors."""

    def forward(self, x):
        return x + (torch.clamp(x / self.step, 0, self.levels).round() * self.step - x).detach()


class RoundedFirst(LearnedSteps):
    """The same, rounded before it is clipped."""

    def forward(self, x):
        x = x / self.step
        return torch.clamp(x + (torch.round(x) - x).detach(), 0, self.levels) * self.step


class FlooredFirst(LearnedSteps):
    def forward(self, x):
        return torch.clamp(torch.floor(x / self.step + 0.5), 0, self.levels) * self.step


class OfUnits(nn.Module):
    """The activation of DoReFa (Zhou et al., 2016) for values from 0 to 1, times `scale`."""

    def __init__(self, levels, scale):
        super().__init__()
        self.levels, self.scale = levels, scale

    def forward(self, x):
        return (torch.clamp(x, 0, 1) * self.levels).round() / self.levels * self.scale


class Minimum(nn.Module):
    """ReLU and minimum with a learnt bound, then rounding."""

    def __init__(self, levels, scale):
        super().__init__()
        self.levels, self.bound = levels, nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return torch.round(torch.min(x.relu(), self.bound) * (self.levels / self.bound)) * (self.bound / self.levels)


KINDS = (ClipFloorShift, LearnedSteps, AroundAll, RoundedFirst, FlooredFirst, OfUnits, Minimum)


class Net(nn.Module):
    """Convolutions with a BatchNorm, a shortcut and a pooling between rounded activations."""

    def __init__(self, kind, levels=4, scale=0.75):
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), kind(levels, scale)
        self.conv2, self.act2 = nn.Conv2d(6, 6, 3, padding=1), kind(levels, 2 * scale)
        self.conv3, self.act3 = nn.Conv2d(6, 4, 3), kind(levels, scale)
        self.fc = nn.Linear(4 * 16, 3)

    def forward(self, x):  # [B, 2, 8, 8]
        x = self.act1(self.norm1(self.conv1(x)))
        x = self.act2(x + self.conv2(x))
        x = self.act3(self.conv3(x))  # [B, 4, 6, 6]
        return self.fc(nn.functional.avg_pool2d(x, 3, 1).flatten(1))  # [B, 64]


def network(kind, levels=4, scale=0.75, seed=0):
    """A network in eval mode, whose activations use all levels, and 16 images."""
    torch.manual_seed(seed)
    net, images = Net(kind, levels, scale), torch.rand(16, 2, 8, 8)
    for conv in (net.conv1, net.conv2, net.conv3):
        nn.init.normal_(conv.weight, std=1.5 * conv.weight[0].numel() ** -0.5)
    net.train()(images)
    return net.eval(), images


def data(images):
    return torch.utils.data.TensorDataset(images, torch.arange(len(images)) % 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_has_the_networks_levels(kind):
    net, images = network(kind)
    dag = parse_ann_model(net, images[:2])
    assert list(own_levels(dag).values()) == [4, 4, 4]
    assert not any(isinstance(entry.op, FunctionOp) for entry in dag.ops.values())
    assert sum(isinstance(entry.op, SpikeAdd) for entry in dag.ops.values()) == 1  # that of the shortcut alone
    with torch.no_grad():
        found, expected = dag(images), net(images)
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()  # single activations may be a level off
        assert ((found - expected).abs() < 1e-5).float().mean() > 0.9
        assert (without_levels(dag)(images) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_spikes_are_the_networks_levels(kind):
    """With float weights and layers that listen, T spikes at most: the outputs are those of the network."""
    net, images = network(kind)
    options = {"timesteps": 4, "listen": 4, "weight_bitwidth": 32, "finetune_epochs": 0, "correction": "none"}
    made = convert_network(net, data(images), avgpool="fold", device="cpu", **options)
    with torch.no_grad():
        assert ((made.snn(images) - net(images)).abs() < 1e-5).float().mean() > 0.9
        assert torch.allclose(made.snn(images), made.qnet(images), atol=1e-5)


@pytest.mark.parametrize("kind", [ClipFloorShift, RoundedFirst])
@pytest.mark.parametrize("options", [{}, {"preset": "calibrated", "spike_epochs_unlabelled": 1}])
def test_every_spike(kind, options):
    net, images = network(kind)
    options = {"timesteps": 4, "weight_bitwidth": 4, "finetune_epochs": 0, "device": "cpu", **options}
    snn = convert_network(net, data(images), **options).snn
    assert_every_spike_is_reproduced(snn, images, 4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Minimum])
def test_an_onnx_file_has_the_levels_too(kind, tmp_path):
    net, images = network(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.14 says that dynamo=False will go
        torch.onnx.export(net, (images[:2],), str(tmp_path / "net.onnx"), dynamo=False, opset_version=17)
    dag = parse_ann_model(load_onnx(str(tmp_path / "net.onnx")), images[:2])
    assert list(own_levels(dag).values()) == [4, 4, 4]
    with torch.no_grad():
        assert ((dag(images) - net(images)).abs() < 1e-5).float().mean() > 0.9


def test_lambda_is_the_networks_own():
    """In units of its own clamp, from 0 to 1, up to a whole Vthr; no threshold has a say in it."""
    net, images = network(ClipFloorShift)
    made = convert_network(
        net, data(images), timesteps=4, weight_bitwidth=8, finetune_epochs=0, threshold=0.5, device="cpu"
    )
    lambdas = [neuron.scale_factor.max().item() for name, neuron in made.snn.neurons().items() if "relu" in name]
    assert lambdas == pytest.approx([1, 1, 1], abs=0.02)


def test_other_levels_keep_lambda_and_finetuning_learns_it():
    net, images = network(LearnedSteps)
    options = {"timesteps": 8, "device": "cpu", "activation_levels": 8, "finetune_lr": 0.01}
    made = convert_network(net, data(images), finetune_epochs=0, rounding="learnt", **options)
    assert own_levels(made.ann) == {"relu1": 4, "relu2": 4, "relu3": 4}
    found = own_levels(made.qnet)
    assert found.items() >= {"relu1": 8, "relu2": 8, "relu3": 8}.items() and set(found.values()) == {8}
    made = convert_network(net, data(images), finetune_epochs=2, **{**options, "activation_levels": None})
    assert own_levels(made.qnet) == own_levels(made.ann)
    moved = [made.qnet.ops[name].op.levels.scale.item() for name in ("relu1", "relu2", "relu3")]
    assert all(scale != 4 and 3 < scale < 5 for scale in moved)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 20), st.floats(0.05, 8), st.integers(0, 100))
def test_any_levels_and_any_lambda(kind, levels, scale, seed):
    net, images = network(kind, levels, scale, seed)
    dag = parse_ann_model(net, images[:2])
    assert list(own_levels(dag).values()) == [levels] * 3
    with torch.no_grad():
        assert ((dag(images) - net(images)).abs() < 1e-4 * max(1, scale)).float().mean() > 0.8


class Other(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv1, self.conv2, self.function = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3), function

    def forward(self, x):
        return self.conv2(self.function(self.conv1(x))).mean((2, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.floor(x.clamp(0, 1) * 4) / 4,  # not to the nearest
        lambda x: torch.round(x.relu() * 4) / 4,  # without a largest level
        lambda x: torch.round((x * 4).clamp(-4, 4)) / 4,  # of values of either sign
        lambda x: torch.round(x.clamp(0, 1) * 3.5) / 3.5,  # the last level is cut off
        lambda x: torch.round(x.clamp(0, 1), decimals=1),
        lambda x: torch.ceil(x.clamp(0, 1) * 4 - 0.5) / 4,
    ],
)
def test_other_roundings_are_refused_by_name(function):
    images = torch.rand(4, 2, 8, 8)
    said = (
        r"^(floor|round|ceil)1: spikes cannot compute \1 inside of a network: write the rounding of an activation as "
    )
    with pytest.raises(
        ValueError, match=said + r"round\(clamp\(x / s, 0, n\)\) \* s, to n \+ 1 levels, or leave it ANN"
    ):
        convert_network(Other(function), data(images), finetune_epochs=0, device="cpu")


def test_a_value_that_is_read_unrounded_too_stays():
    net = Other(lambda x: torch.round(x.clamp(0, 1) * 4) / 4 + x.clamp(0, 1))
    clipped = Other(lambda x: (lambda y: torch.round(y * 4) / 4 + y)(x.clamp(0, 1)))
    assert own_levels(parse_ann_model(net, torch.rand(2, 2, 8, 8))) == {"relu1": 4}
    assert own_levels(parse_ann_model(clipped, torch.rand(2, 2, 8, 8))) == {}


def test_a_rounding_behind_the_last_layer_stays():
    class Rounded(nn.Sequential):
        def forward(self, x):
            return torch.round(4 * super().forward(x))

    net = Rounded(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3))
    dag = parse_ann_model(net, torch.rand(2, 2, 8, 8))
    assert own_levels(dag) == {} and any(isinstance(entry.op, FunctionOp) for entry in dag.ops.values())


class Between(nn.Module):
    """A network with a rounded activation, and functions before and behind it."""

    def __init__(self, before=nn.Identity(), behind=nn.Identity(), inside=None, levels=(4, 4)):  # noqa: B008
        super().__init__()
        self.before, self.behind, self.inside = before, behind, inside or ClipFloorShift(levels[0], 0.75)
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 3, 3)
        self.last = ClipFloorShift(levels[1], 0.75)

    def forward(self, x):  # [B, 2, 8, 8]
        x = self.last(self.conv2(self.inside(self.conv1(self.before(x)))))
        return self.behind(self.conv3(x).mean((2, 3)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "options",
    [
        {"before": Function(lambda x: torch.round(x.clamp(0, 1) * 255) / 255)},
        {"before": Function(lambda x: torch.round(x * 255).clamp(0, 255) / 255)},
        {"before": Function(lambda x: torch.round(x * 255) / 255)},
        {"behind": Function(lambda x: torch.round((x * 20).clamp(0, 4)))},
        {"behind": Function(lambda x: torch.round(x * 20))},
    ],
)
def test_roundings_of_images_and_of_outputs_are_computed(options):
    torch.manual_seed(0)
    net, images = Between(**options).eval(), torch.rand(8, 2, 8, 8)
    made = convert_network(net, data(images), timesteps=4, finetune_epochs=0, weight_bitwidth=8, device="cpu", listen=4)
    assert list(own_levels(made.ann).values()) == [4, 4]
    with torch.no_grad():
        assert ((made.ann(images) - net(images)).abs() < 1e-5).float().mean() > 0.9
        outputs = made.snn(images)
    assert "behind" not in options or torch.equal(outputs, outputs.round())


def test_another_rounding_beside_it_is_still_refused_by_name():
    net = Between(inside=Function(lambda x: torch.round(x.relu() * 4) / 4))
    with pytest.raises(ValueError, match=r"^round1 \(inside\): spikes cannot compute round inside of a network"):
        convert_network(net, data(torch.rand(8, 2, 8, 8)), finetune_epochs=0, device="cpu")


def test_an_ann_layer_goes_on_rounding(tmp_path):
    torch.manual_seed(0)
    net, images = Between().eval(), torch.rand(8, 2, 8, 8)
    options = {"timesteps": 4, "finetune_epochs": 0, "weight_bitwidth": 32, "device": "cpu", "correction": "none"}
    snn = convert_network(net, data(images), ann_layers=("conv1", "inside"), listen=4, **options).snn
    assert snn.spiking_layers() == ["relu2"] and own_levels(snn) == {"relu1": 4}
    torch.save(snn, tmp_path / "snn.pth")
    with torch.no_grad():
        for each in (snn, load_dag(str(tmp_path / "snn.pth"))):
            assert ((each(images) - net(images)).abs() < 1e-5).float().mean() > 0.9


def test_different_levels_are_said_without_a_number_of_timesteps():
    dag = parse_ann_model(Between(levels=(2, 4)), torch.rand(2, 2, 8, 8))
    assert own_levels_in_words(dag) == "activations: 2 to 4 levels in 2 layers, the network's own, which are kept"


@pytest.mark.parametrize("levels, are_kept", [(65536, True), (65537, False)])
def test_more_levels_than_a_network_can_have_are_refused(levels, are_kept):
    net = Between(inside=Function(lambda x: torch.round(x.clamp(0, levels))))
    dag = parse_ann_model(net, torch.rand(2, 2, 8, 8))
    assert (levels in own_levels(dag).values()) == are_kept


@pytest.mark.parametrize("kind", [ClipFloorShift, LearnedSteps, RoundedFirst])
def test_layers_of_one_dimension(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 6, 3), kind(4, 0.75), nn.Conv1d(6, 4, 3), kind(4, 0.75), nn.Flatten(), nn.Linear(16, 3)
    )
    images = torch.rand(8, 2, 8)
    made = convert_network(net, data(images), timesteps=4, finetune_epochs=0, weight_bitwidth=8, device="cpu", listen=4)
    assert list(own_levels(made.ann).values()) == [4, 4]
    with torch.no_grad():
        assert ((made.ann(images) - net(images)).abs() < 1e-5).float().mean() > 0.9


class Wrapped:
    """A weight with more than its values, as the quantized ones of Brevitas."""

    def __init__(self, value):
        self.value, self.shape = value, value.shape

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*[x.value if isinstance(x, cls) else x for x in args], **(kwargs or {}))


def test_weights_that_are_no_tensors_are_refused_with_what_to_give():
    class Layer(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, Wrapped(self.weight), self.bias)

    net = nn.Sequential(Layer(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 6), nn.Flatten())
    assert net(torch.rand(2, 2, 8, 8)).shape == (2, 3)
    said = "^torch.nn.functional.conv2d in 0 cannot be converted: its weights are of the type Wrapped, give "
    with pytest.raises(NotImplementedError, match=said):
        parse_ann_model(net, torch.rand(2, 2, 8, 8))


def test_fake_quantization_is_refused_with_what_to_write():
    net = Other(lambda x: torch.fake_quantize_per_tensor_affine(x.relu(), 0.1, 0, 0, 15))
    said = (
        "^torch.fake_quantize_per_tensor_affine in the network's forward cannot be converted: leave fake quantization"
    )
    with pytest.raises(NotImplementedError, match=said):
        parse_ann_model(net, torch.rand(2, 2, 8, 8))


def test_the_command_says_that_levels_are_kept(tmp_path, monkeypatch, capsys):
    """A network and data in a file of the user's own, whose float accuracy is that of the rounded network."""
    net, images = network(ClipFloorShift)
    with torch.no_grad():
        classes = net(images).argmax(1)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    torch.save((images, classes), tmp_path / "data.pth")
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from tests.test_roundings import ClipFloorShift, Net\n"
        "def net():\n    return Net(ClipFloorShift)\n"
        "def data():\n"
        "    both = torch.utils.data.TensorDataset(*torch.load('data.pth', weights_only=True))\n"
        "    both.classes = ['a', 'b', 'c']\n"
        "    return both, both\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = "mine.py:net --dataset mine.py:data --ann_weight net.pth -e 0 --weight_bitwidth 8 --avgpool fold"
    ann2snn.main(ann2snn.parse_args([*flags.split(), "--timesteps", "4", "--listen", "4", "--expect_top1", "100"]))
    assert (
        "activations: 4 levels in 3 layers, the network's own, which are kept; with --timesteps 4 --listen 4 the "
        "spikes are these levels\n"
    ) in capsys.readouterr().err
    snn = load_dag("out_snn.pth")
    assert (snn(images) - net(images)).abs().max() < 0.2 * net(images).abs().max()  # 8-bit weights
