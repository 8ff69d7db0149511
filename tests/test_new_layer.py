"""A new layer, as a user would add it: one class and one line in the tracer's table, and nothing else.

Its subject is torch.lerp(x, y, 0.5), the average of two activations, which the toolkit does not have.
"""

import numpy as np
import pytest
import torch
from torch import nn

from ann_parser import RECORDING_FUNCTIONS, Trace, parse_ann_model
from layers.base import ANALOG, SPIKES
from layers.joining import SpikeAdd
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import from_dict
from spike_layers import OP_TYPES
from spike_simulator import simulate


class Average(nn.Module):
    """Two convolutions, each with a ReLU, their average, and a convolution behind it."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.behind, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = torch.lerp(self.left(x).relu(), self.right(x).relu(), 0.5)
        return self.fc(self.behind(x).relu().flatten(1))


@pytest.fixture
def average_layer(monkeypatch):
    """The class, and its line in the table; both are gone afterwards."""

    class SpikeAverage(SpikeAdd):
        """The average of two inputs; converted, of spikes, with neurons of its own."""

        @classmethod
        def traced(cls, trace, function, input, other, weight):
            if weight != 0.5:
                trace.refuse(function, "only the average, with weight 0.5, is supported")
            return trace.record("average", cls(), [input, other], function(input, other, weight))

        def activation(self, x, y):
            return (x + y) / 2

        def plan(self, place):
            return SPIKES if set(place.reads) == {SPIKES} and place.before_neuron else ANALOG

        def convert(self, setter, entry):
            halves = [setter.scales[node] / 2 for node in entry.inputs]
            unit = setter.spike_sum_unit(halves)
            self.set_branch_weights([setter.rounded(entry.name, half / unit, least=1) for half in halves])
            setter.set_neuron(entry, unit, setter.largest_of(entry))

    monkeypatch.setitem(RECORDING_FUNCTIONS, SpikeAverage.traced, (torch.lerp,))
    init = Trace.__init__

    def with_average(trace, *args, **options):
        init(trace, *args, **options)
        trace.recorders[torch.lerp] = SpikeAverage.traced

    monkeypatch.setattr(Trace, "__init__", with_average)  # the table was read when the tracer was imported
    yield SpikeAverage
    del OP_TYPES["SpikeAverage"]


@torch.no_grad()
def test_a_new_layer_is_traced_converted_simulated_and_saved(average_layer):
    torch.manual_seed(0)
    net, images, T = Average().eval(), torch.rand(32, 2, 6, 6), 16
    dag = parse_ann_model(net, (images[:1],))
    assert type(dag.ops["average1"].op) is average_layer
    assert torch.allclose(dag(images), net(images), atol=1e-6)

    snn = trans_ann2snn_weight(dag, [(images, None)], "cpu", T, 8, listen=T)
    trains = {}
    outputs = simulate(snn, (images[:4],), T, watch=lambda name, current, value: trains.update({name: value}))
    op = snn.ops["average1"].op
    x, y = (trains[name].data.unflatten(0, (T, -1)).numpy().astype(np.int64) for name in ("relu1", "relu2"))
    weights = [int(weight) for weight in op.branch_weights]
    counts = spikes_of_all_input(weights[0] * x.sum(0) + weights[1] * y.sum(0), op.neuron, T)
    assert weights == pytest.approx(
        [snn.ops[name].op.neuron.scale_factor.item() / 2 / unit_of(op) for name in ("relu1", "relu2")], abs=0.5
    )
    assert (trains["average1"].counts().numpy() == counts).all() and counts.any()
    assert (outputs[0] - net(images[:4])).abs().max() < 0.1  # 16 levels of activations, 8-bit weights

    again = from_dict(snn.to_dict())
    assert torch.equal(again(images[:4]), outputs[0])


def unit_of(op):
    """The activation that one unit of membrane potential stands for."""
    return (op.neuron.scale_factor / op.neuron.Vthr).item()


def spikes_of_all_input(sums, neuron, timesteps):
    """Spikes of neurons that listen to all of their input first: clip(floor((sum + u0) / Vthr), 0, T), integers."""
    return np.clip((sums + neuron.initial_potential.numpy()) // neuron.Vthr.numpy(), 0, timesteps)


def test_it_refuses_another_weight(average_layer):
    class Third(Average):
        def forward(self, x):
            return torch.lerp(self.left(x).relu(), self.right(x).relu(), 0.25)

    with pytest.raises(NotImplementedError, match=r"lerp in .* cannot be converted: only the average"):
        parse_ann_model(Third(), (torch.rand(1, 2, 6, 6),))


def test_without_the_line_it_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"torch\.lerp in the network's forward cannot be converted"):
        parse_ann_model(Average(), (torch.rand(1, 2, 6, 6),))
