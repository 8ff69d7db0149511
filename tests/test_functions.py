"""Functions that spikes cannot compute: ANN behind the last layer, refused inside of a network, or replaced by ReLU."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Function, conv, convert
from torch import nn
from tracing import Call, after_conv, image, largest_difference, trace_and_compare

from ann_parser import parse_ann_model, wrapped_functions
from conversion.plan import plan_conversion
from dag_rewrites import prepare_conversion, replace_activations, replaced_in_words
from layers.functions import ACTIVATIONS, OTHERS, SPELLINGS
from spike_dag import from_dict, load_dag
from spike_layers import FunctionOp, SpikeReLU

AT_THE_END = {
    "Sigmoid": nn.Sigmoid(),
    "sigmoid_": lambda x: x.sigmoid_(),
    "F.sigmoid": lambda x: F.sigmoid(x),
    "expit": lambda x: torch.special.expit(x),
    "Tanh": nn.Tanh(),
    "LogSigmoid": nn.LogSigmoid(),
    "SiLU": nn.SiLU(),
    "SiLU in place": nn.SiLU(inplace=True),
    "silu, in place by position": lambda x: F.silu(x, True),
    "GELU": nn.GELU(),
    "GELU, tanh": nn.GELU(approximate="tanh"),
    "ELU": nn.ELU(0.5),
    "elu_": lambda x: F.elu_(x, 0.3),
    "elu, by position": lambda x: F.elu(x, 0.3, True),
    "SELU": nn.SELU(),
    "CELU": nn.CELU(2.0),
    "Mish": nn.Mish(),
    "Hardswish": nn.Hardswish(),
    "Hardsigmoid": nn.Hardsigmoid(),
    "Softplus": nn.Softplus(2, 10),
    "Softsign": nn.Softsign(),
    "Tanhshrink": nn.Tanhshrink(),
    "Hardshrink": nn.Hardshrink(0.3),
    "Softshrink": nn.Softshrink(0.3),
    "exp": lambda x: x.exp(),
    "x ** 2": lambda x: x**2,
    "normalize": lambda x: F.normalize(x, dim=1),
    "normalize, p": lambda x: F.normalize(x.flatten(1), 1.0),
    "Softmin": nn.Softmin(dim=1),
    "square, log1p": lambda x: torch.log1p(x.square()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("function", AT_THE_END.values(), ids=AT_THE_END)
def test_behind_the_last_layer_it_stays_ann(function, tmp_path):
    last = function if isinstance(function, nn.Module) else Call(function)
    trace_and_compare(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), last))
    torch.manual_seed(0)
    net, images = nn.Sequential(conv(2, 6), nn.ReLU(), conv(6, 4), last).eval(), torch.rand(8, 2, 6, 6)
    snn = convert(net, images, 512, 32, threshold="max")
    with torch.no_grad():
        expected = net(images)
        assert largest_difference(snn(images), expected) <= 0.02 * expected.abs().max()
    (spiking,) = snn.spiking_layers()
    assert spiking == "relu1" and isinstance(list(snn.ops.values())[-1].op, FunctionOp)
    torch.save(snn, tmp_path / "snn.pth")
    assert torch.equal(load_dag(tmp_path / "snn.pth")(images), snn(images))


def test_all_spellings_are_in_the_tracers_table():
    assert {name for name, _ in SPELLINGS.values()} == {*ACTIVATIONS, *OTHERS}
    recorded = {function for function, recorder in wrapped_functions.values() if recorder == FunctionOp.traced}
    assert recorded == set(SPELLINGS)


MIXES_IMAGES = {
    "normalize, batch": (lambda x: F.normalize(x, dim=0), "on each image alone"),
    "softmin, batch": (lambda x: F.softmin(x, dim=0), "on each image alone"),
    "a tensor": (lambda x: torch.pow(x, torch.ones(8)), "its arguments must be numbers"),
    "two activations": (lambda x: torch.pow(x, x), "its arguments must be numbers"),
}


@pytest.mark.parametrize("function, advice", MIXES_IMAGES.values(), ids=MIXES_IMAGES)
def test_what_is_no_function_of_one_image_is_refused(function, advice):
    with pytest.raises(NotImplementedError, match=advice):
        parse_ann_model(after_conv(function), (image(),))


INSIDE = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "hardswish": nn.Hardswish(),
    "elu": nn.ELU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "exp": Call(torch.exp),
    "normalize": Call(F.normalize),
}


@pytest.mark.parametrize("layers", [[], [nn.AvgPool2d(2)]], ids=["directly", "behind a pooling"])
@pytest.mark.parametrize("name", INSIDE)
def test_inside_it_is_refused_by_its_name(name, layers):
    net = nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 4), *layers, INSIDE[name], conv(4, 4), nn.ReLU())
    dag = parse_ann_model(net, (torch.rand(2, 2, 8, 8),))
    how = "--replace_activations relu" if name in ACTIVATIONS else "use it only behind the last layer"
    with pytest.raises(ValueError, match=rf"{name}1 \({2 + len(layers) + 1}\): spikes cannot compute {name} .*{how}"):
        plan_conversion(dag)


def test_between_linear_layers_it_is_refused_too():
    net = nn.Sequential(conv(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"tanh1 \(4\)"):
        plan_conversion(parse_ann_model(net, (torch.rand(2, 2, 8, 8),)))


def test_it_stays_ann_with_the_layer_before_it():
    torch.manual_seed(0)
    net = nn.Sequential(conv(2, 4), nn.SiLU(), conv(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    images = torch.randn(8, 2, 8, 8)
    snn = convert(net, images, 512, 32, ann_layers=("0", "1"), threshold="max")
    assert largest_difference(snn(images), net(images)) < 0.02


def test_a_function_of_the_image_stays_ann():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Tanh(), conv(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    images = torch.randn(8, 2, 8, 8)
    assert largest_difference(convert(net, images, 512, 32, threshold="max")(images), net(images)) < 0.02


def test_values_that_feed_a_relu_too_are_refused():
    net = Function(lambda s, x: (torch.sigmoid(y := s.a(x)), s.b(F.relu(y))), a=conv(2, 4), b=conv(4, 4))
    with pytest.raises(ValueError, match="sigmoid1 reads values that feed a ReLU too"):
        plan_conversion(parse_ann_model(net, (torch.rand(2, 2, 8, 8),)))


def test_gates_are_refused():
    for gate in (lambda x: x * torch.sigmoid(x), lambda x: x * torch.sigmoid(x.mean([2, 3], keepdim=True))):
        with pytest.raises(
            NotImplementedError, match=r"no product or quotient of two activations, .*without gates .* F\.silu"
        ):
            parse_ann_model(after_conv(gate), (image(),))


DAMAGED = {
    "another function": dict(name="system"),
    "another argument": dict(settings={"dim": 1}),
    "in place": dict(settings={"inplace": True}),
    "too many arguments": dict(args=(1, 2, 3)),
    "a list as argument": dict(args=([1],)),
    "settings that are none": dict(settings=3),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(change):
    net = nn.Sequential(conv(2, 4), nn.ReLU(), conv(4, 4), nn.ELU())
    data = convert(net, torch.rand(4, 2, 6, 6)).to_dict()
    data["ops"][-1]["config"].update(change)
    with pytest.raises(ValueError, match=r"elu1"):
        from_dict(data)


# ---------------------------------------------------------------------------------------------------------------------
# ReLU in their place


class Swish(nn.Module):
    """SiLU as a module and as a function, GELU, and a sigmoid at the end."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b, self.c, self.fc = (
            conv(2, 4),
            nn.SiLU(inplace=True),
            conv(4, 4),
            conv(4, 4),
            conv(4, 3),
        )

    def forward(self, x):
        x = self.act(self.a(x))
        x = F.max_pool2d(F.silu(self.b(x)) + x, 2)
        return torch.sigmoid(self.fc(F.gelu(self.c(x))))


class Replaced(Swish):
    """The same with ReLUs."""

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.max_pool2d(F.relu(self.b(x)) + x, 2)
        return torch.sigmoid(self.fc(F.relu(self.c(x))))


def test_activations_are_replaced_by_relu_and_counted():
    torch.manual_seed(0)
    net, images = Swish().eval(), torch.randn(8, 2, 8, 8)
    dag = parse_ann_model(net, (images[:2],))
    before = dag.to_dict()["ops"]
    relus, replaced = replace_activations(dag, "relu")
    assert [each["type"] for each in dag.to_dict()["ops"]] == [each["type"] for each in before]
    assert replaced == {"silu": 2, "gelu": 1} and replaced_in_words(replaced) == "replaced 2 silu and 1 gelu by relu"
    expected = Replaced()
    expected.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert largest_difference(relus(images), expected(images)) < 1e-6
        assert largest_difference(dag(images), net(images)) < 1e-6
    snn = convert_dag(relus, images)
    assert largest_difference(snn(images), expected(images)) < 0.02
    assert sum(isinstance(entry.op, SpikeReLU) for entry in snn.ops.values()) == 3


def convert_dag(dag, images):
    """The spiking network of a traced one, with float weights and many timesteps."""
    from snn_weight_setter import trans_ann2snn_weight

    return trans_ann2snn_weight(prepare_conversion(dag, "gate"), [(images,)], "cpu", 512, 32, threshold="max")


def test_nothing_is_replaced_without_a_wish():
    dag = parse_ann_model(Swish(), (torch.rand(2, 2, 8, 8),))
    same, replaced = replace_activations(dag, None)
    assert not replaced and replaced_in_words(replaced) == "" and list(same.ops) == list(dag.ops)
    with pytest.raises(ValueError, match="unknown activation function 'tanh' to replace others by, use relu"):
        replace_activations(dag, "tanh")
