"""The validation loop with each of its metrics."""

import pytest
import torch
from torch import nn

from ann_parser import parse_ann_model
from snn_weight_setter import trans_ann2snn_weight
from validate import evaluate, validate


class MeanOutput:
    """A metric of its own: the mean output after every timestep, and what it was given."""

    def __init__(self, every_step):
        self.every_step, self.shapes = every_step, []

    def measure_batch(self, inputs, outputs, targets):
        self.shapes.append((inputs[0].shape[0], *(tuple(x.shape) for x in outputs)))
        return {"loss": 0.0, "mean": outputs[0].double().mean((1, 2))}

    def summary(self):
        return {"batches": len(self.shapes)}


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.rand(10, 1, 4, 4)


@pytest.fixture
def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3), nn.ReLU())


@pytest.fixture
def loader(images):
    return [(images[:7], torch.zeros(7)), (images[7:], torch.zeros(3))]


def test_a_metric_gets_the_outputs_of_an_ann_as_one_timestep(net, loader, images):
    metric = MeanOutput(every_step=True)
    result = validate(net, loader, "cpu", metric)
    assert metric.shapes == [(7, (1, 7, 3)), (3, (1, 3, 3))]
    assert (result["samples"], result["batches"]) == (10, 2) and "firing_rate" not in result
    assert result["mean"] == [pytest.approx(net(images).mean().item(), rel=1e-6)]


def test_a_metric_gets_the_outputs_of_an_snn_after_every_timestep_it_asks_for(net, loader, images):
    snn = trans_ann2snn_weight(parse_ann_model(net, (images,)), [(images, None)], "cpu", 4, 8)
    every, last = MeanOutput(every_step=True), MeanOutput(every_step=False)
    by_timestep, at_the_end = validate(snn, loader, "cpu", every, 4), validate(snn, loader, "cpu", last, 4)
    assert every.shapes == [(7, (4, 7, 3)), (3, (4, 3, 3))] and last.shapes == [(7, (1, 7, 3)), (3, (1, 3, 3))]
    assert by_timestep["mean"][-1:] == pytest.approx(at_the_end["mean"]) and at_the_end["mean"][0] > 0
    assert list(by_timestep["firing_rate"]) == snn.spiking_layers()
    assert by_timestep["firing_rate"] == at_the_end["firing_rate"]


def test_top1_of_an_ann_has_one_timestep(net, loader):
    result = evaluate(net, loader, "cpu", nn.CrossEntropyLoss(), every_step=True)
    assert result["top1_by_timestep"] == [result["top1"]]
