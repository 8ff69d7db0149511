"""Accuracy and loss against plain sums, whatever the batch sizes."""

import pytest
import torch
from torch import nn

import validate
from ann_parser import parse_ann_model
from build_network import get_net_by_name
from networks.checkpoint import load_weights
from snn_weight_setter import trans_ann2snn_weight
from validate import evaluate, validate_ann, validate_snn

CRITERION = nn.CrossEntropyLoss()


def batches(images, labels, *sizes):
    return list(zip(images.split(list(sizes)), labels.split(list(sizes))))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(50, 1, 6, 6, generator=generator), torch.randint(0, 7, (50,), generator=generator)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 7))


def test_every_sample_weighs_the_same(net, data):
    images, labels = data
    outputs = net.eval()(images)
    top1, loss = 100 * (outputs.argmax(1) == labels).float().mean().item(), CRITERION(outputs, labels).item()
    for sizes in ((50,), (30, 20), (49, 1), (1, 2, 47)):
        assert validate_ann(net, batches(images, labels, *sizes), "cpu", CRITERION) == pytest.approx((top1, loss))
    result = evaluate(net, batches(images, labels, 7, 43), "cpu", CRITERION)
    hits = sum(label in row for label, row in zip(labels.tolist(), outputs.topk(5).indices.tolist()))
    assert result["top5"] == pytest.approx(2 * hits) and result["samples"] == 50


def test_training_mode_is_restored(net, data):
    net.train()
    validate_ann(net, batches(*data, 50), "cpu", CRITERION)
    assert net.training and net[2].training


def test_snn_results_do_not_depend_on_batches(net, data):
    images, labels = data
    dag = parse_ann_model(net, (images[:2],))
    snn = trans_ann2snn_weight(dag, [(images,)], "cpu", 8, 4)
    outputs = snn(images)
    expected = 100 * (outputs.argmax(1) == labels).float().mean().item(), CRITERION(outputs, labels).item()
    whole = evaluate(snn, batches(images, labels, 50), "cpu", CRITERION, 8, every_step=True)
    ragged = evaluate(snn, batches(images, labels, 33, 17), "cpu", CRITERION, 8, every_step=True)
    assert (whole["top1"], whole["loss"]) == pytest.approx(expected, rel=1e-4)
    assert validate_snn(snn, batches(images, labels, 33, 17), "cpu", CRITERION, 8) == pytest.approx(expected, rel=1e-4)
    assert ragged["firing_rate"] == pytest.approx(whole["firing_rate"]) and list(whole["firing_rate"]) == ["relu1"]
    assert ragged["top1_by_timestep"] == pytest.approx(whole["top1_by_timestep"])
    assert len(whole["top1_by_timestep"]) == 8 and whole["top1_by_timestep"][-1] == whole["top1"]


def test_fewer_than_five_classes_have_no_top5(data):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    result = evaluate(net, [(data[0], data[1] % 4)], "cpu", CRITERION)
    assert "top5" not in result and 0 <= result["top1"] <= 100


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scores, self.more = nn.Conv2d(1, 4, 3), nn.Linear(64, 7), nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)  # [B, 64]
        return self.scores(x), self.more(x)


@pytest.mark.parametrize("several", [False, True])
def test_an_ann_runs_in_parts_whose_largest_layer_fits(net, data, several, monkeypatch):
    images, labels = data
    dag = parse_ann_model(TwoOutputs() if several else net.eval(), (images[:2],))
    whole, sizes = evaluate(dag, batches(images, labels, 50), "cpu", CRITERION), []
    dag.register_forward_pre_hook(lambda dag, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(validate, "ANN_BYTES", 20 * 64 * 4)  # 20 images: the largest layer is [4, 4, 4] in float32
    assert evaluate(dag, batches(images, labels, 50), "cpu", CRITERION) == pytest.approx(whole)
    assert sizes == [20, 20, 10]


def test_an_empty_loader_is_an_error(net):
    with pytest.raises(ValueError, match="no samples to validate on"):
        validate_ann(net, [], "cpu", CRITERION)


def test_the_pipeline_on_real_digits(digits_loaders):
    """8 bits without finetuning: the spiking network is within 2 points of the ANN on all test images."""
    test_loader, _, _, train_val_loader = digits_loaders
    net = load_weights(get_net_by_name("example_net"), "checkpoint/example_net_ann.pth")
    ann = evaluate(net, test_loader, "cpu", CRITERION)
    dag = parse_ann_model(net, (torch.zeros(1, 1, 32, 32),))
    snn = trans_ann2snn_weight(dag, train_val_loader, "cpu", 16, 8)
    spiking = evaluate(snn, test_loader, "cpu", CRITERION, 16)
    assert ann["top1"] > 98 and spiking["top1"] >= ann["top1"] - 2
    assert min(spiking["firing_rate"].values()) > 0 and max(spiking["firing_rate"].values()) < 0.5


def test_a_frozen_layer_stays_frozen():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    net[1].eval()
    evaluate(net, [(torch.rand(5, 3), torch.zeros(5, dtype=torch.long))], "cpu", nn.CrossEntropyLoss())
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
