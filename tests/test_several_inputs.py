"""Networks with several inputs and several outputs: from the loader to the spikes."""

import functools
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_every_spike_is_reproduced
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from finetuning.on_spikes import finetune_spikes
from pipeline import convert_network
from quantization import quantize_finetune
from runtime.batches import first_output, input_names, loader_for
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import load_dag
from validate import evaluate

generator = torch.Generator().manual_seed(0)
IMAGES, CODES = torch.rand(96, 1, 4, 4, generator=generator), torch.rand(96, 5, generator=generator)
LABELS = (IMAGES.mean((1, 2, 3)) > 0.5).long() + (CODES[:, 0] > 0.5).long()  # both inputs are needed for it
PLAIN = nn.CrossEntropyLoss()
SGD = SimpleNamespace(finetune_lr=0.01, finetune_epochs=1, finetune_wd=0.0, finetune_momentum=0.9, weight_bitwidth=8)


class TwoInputs(nn.Module):
    """A convolution of an image and a linear layer of a code; what it returns is chosen by `outputs`."""

    def __init__(self, outputs="scores"):
        super().__init__()
        self.of_image, self.of_code = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(5, 8)
        self.scores, self.value, self.map = nn.Linear(72, 3), nn.Linear(8, 2), nn.Conv2d(4, 1, 1)
        self.outputs = outputs.split()

    def forward(self, image, code):  # [B, 1, 4, 4], [B, 5]
        maps, codes = self.of_image(image).relu(), self.of_code(code).relu()
        if self.outputs == ["scores"]:
            return self.scores(torch.cat([maps.flatten(1), codes], 1))
        every = {
            "scores": self.scores(torch.cat([maps.flatten(1), codes], 1)),
            "value": self.value(codes),
            "map": self.map(maps),
        }
        return tuple(every[name] for name in self.outputs)


@functools.cache
def trained(outputs="scores"):
    """A network that has learnt the labels from the scores. Nothing may change it."""
    torch.manual_seed(0)
    net = TwoInputs(outputs)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(100):
        optimizer.zero_grad()
        returned = net(IMAGES, CODES)
        PLAIN(returned if outputs == "scores" else returned[net.outputs.index("scores")], LABELS).backward()
        optimizer.step()
    return net.eval()


PARTS = [slice(i, i + 32) for i in range(0, 96, 32)]
PAIRS = [((IMAGES[p], CODES[p]), LABELS[p]) for p in PARTS]
NAMED = [{"code": CODES[p], "label": LABELS[p], "image": IMAGES[p]} for p in PARTS]
LOADERS = {
    "pairs": lambda: PAIRS,
    "lists": lambda: [[[IMAGES[p], CODES[p]], LABELS[p], "a name"] for p in PARTS],
    "TensorDataset": lambda: DataLoader(TensorDataset(IMAGES, CODES, LABELS), 32),
    "flat, with an index": lambda: [(IMAGES[p], CODES[p], LABELS[p], torch.arange(32)) for p in PARTS],
    "iterator": lambda: iter(DataLoader(TensorDataset(IMAGES, CODES, LABELS), 32)),
    "generator": lambda: ((IMAGES[p], CODES[p], LABELS[p]) for p in PARTS),
}


@functools.cache
def converted(kind):
    """The network on batches of a form."""
    make_loader = {**LOADERS, "dicts": lambda: NAMED}[kind]
    options = {"timesteps": 8, "weight_bitwidth": 4, "finetune_epochs": 1, "device": "cpu"}
    return convert_network(trained(), make_loader(), make_loader(), **options)


@pytest.mark.parametrize("kind", [*LOADERS, "dicts"])
def test_every_form_of_batches_gives_the_same_networks(kind):
    net, expected, found = trained(), converted("pairs"), converted(kind)
    assert found.accuracies == expected.accuracies
    assert torch.equal(found.snn(IMAGES, CODES), expected.snn(IMAGES, CODES))
    wanted = {"ann": net, "qnet": expected.qnet, "snn": expected.snn}
    for name, network in wanted.items():
        hits = (network(IMAGES, CODES).argmax(1) == LABELS).double().mean().item()
        assert found.accuracies[name]["top1"] == pytest.approx(100 * hits)
    assert found.ann_top1 > 95 and found.snn_top1 > 80  # 3 classes, the largest has half of the samples


@functools.cache
def call_by_call(kind):
    """What the converted network returns, and how right it is, after one call after the other."""
    loader = LOADERS[kind]
    qnet = quantize_finetune(trained(), loader(), PLAIN, "cpu", SGD)
    snn = trans_ann2snn_weight(qnet, loader(), "cpu", 8, 8)
    snn = finetune_spikes(snn, loader(), "cpu", 1, criterion=PLAIN, qnet=qnet)
    curve = evaluate(snn, loader(), "cpu", PLAIN, 8, every_step=True)
    return curve["top1_by_timestep"], curve["loss"], snn(IMAGES, CODES).tolist()


@pytest.mark.parametrize("kind", ["TensorDataset", "flat, with an index", "iterator"])
def test_each_call_of_its_own(kind):
    """The calls that get a graph, which no longer knows the names of the arguments."""
    assert call_by_call(kind) == call_by_call("pairs")


@pytest.mark.parametrize("mode", ["subtraction", "zero"])
@pytest.mark.parametrize("listen", [0, 8])
def test_every_spike_of_two_inputs(tmp_path, mode, listen):
    """Against the integer reference, in chunks of time, under a memory budget, and after saving and loading."""
    snn = trans_ann2snn_weight(trained("scores value"), PAIRS, "cpu", 8, 4, reset_mode=mode, listen=listen)
    if not listen:
        assert_every_spike_is_reproduced(snn, (IMAGES[:7], CODES[:7]), 8)
    expected = snn(IMAGES, CODES)
    assert [list(x.shape) for x in expected] == [[96, 3], [96, 2]]
    torch.save(snn, tmp_path / "snn.pth")
    loaded = load_dag(tmp_path / "snn.pth")
    assert all(torch.equal(a, b) for a, b in zip(loaded(IMAGES, CODES), expected))
    for choice in (("auto", 3000), ("reference", None)):  # the float layer behind the last spikes adds in another order
        loaded.set_engine(*choice)
        for a, b in zip(loaded(IMAGES, CODES), expected):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Several outputs


@pytest.mark.parametrize("outputs", ["scores value", "map scores value", "scores map"])
def test_the_first_output_that_fits_the_labels_counts(outputs):
    net = trained(outputs)
    made = convert_network(
        net,
        PAIRS,
        PAIRS,
        timesteps=8,
        finetune_epochs=1,
        spike_epochs=1,
        spike_epochs_unlabelled=1,
        finetune_distill=0.5,
        device="cpu",
    )
    index = outputs.split().index("scores")
    for name, network in {"ann": net, "qnet": made.qnet, "snn": made.snn}.items():
        hits = (network(IMAGES, CODES)[index].argmax(1) == LABELS).double().mean().item()
        assert made.accuracies[name]["top1"] == pytest.approx(100 * hits)
    assert made.ann_top1 > 95 and made.snn_top1 > 80


def test_a_criterion_of_all_outputs_gets_the_tuple():
    seen = set()

    def criterion(outputs, labels):
        seen.add(tuple(len(x.shape) for x in outputs))
        return PLAIN(outputs[1], labels) + outputs[0].square().mean()

    made = convert_network(
        trained("map scores"), PAIRS, PAIRS, criterion=criterion, timesteps=4, finetune_epochs=1, device="cpu"
    )
    scores = made.snn(IMAGES, CODES)
    assert seen == {(4, 2)}
    loss = PLAIN(scores[1], LABELS) + scores[0].square().mean()
    assert made.accuracies["snn"]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_without_labels_the_first_rows_count():
    maps, rows = torch.zeros(2, 1, 4, 4), torch.zeros(2, 3)
    assert first_output((maps, rows)) is rows and first_output((rows, maps)) is rows
    assert first_output((maps, maps[:1])) is maps and first_output(maps) is maps


@pytest.mark.parametrize(
    "outputs, message",
    [
        ("map", r"the network returns \[32, 1, 4, 4\] and the labels are \[32\]"),
        ("map map", r"returns \[32, 1, 4, 4\] and \[32, 1, 4, 4\] and the labels are \[32\], which fit none of these"),
        ("value scores", r"outputs \[32, 2\] with labels \[32\]: .* return the class scores first"),
    ],
)
def test_outputs_without_class_scores_are_refused(outputs, message):
    net = TwoInputs(outputs)
    with pytest.raises(ValueError, match=message) as refusal:
        evaluate(net, PAIRS, "cpu", PLAIN)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=message):
        convert_network(net, PAIRS, None, timesteps=4, finetune_epochs=1, device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Other numbers of inputs


@pytest.mark.parametrize(
    "batch, message",
    [
        ((IMAGES, LABELS), r"has 1 input and the network takes 2: give \(\(image, code\), labels\) or \(image, code, "),
        (((IMAGES, CODES, CODES), LABELS), r"has 3 inputs and the network takes 2"),
        (IMAGES, r"has 1 input and the network takes 2"),
        ({"image": IMAGES, "label": LABELS}, r"has 1 input and the network takes 2"),
        ({"pictures": IMAGES}, r"is a dict with 'pictures', it has to be"),
    ],
)
def test_batches_with_another_number_of_inputs_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        convert_network(TwoInputs(), [batch], timesteps=4, device="cpu")


def test_the_loader_of_one_input_is_left_alone():
    class WithOption(nn.Linear):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    for net in (nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 3)), WithOption(5, 3), nn.DataParallel(TwoInputs())):
        assert loader_for(net, PAIRS) is PAIRS
    assert input_names(TwoInputs()) == ("image", "code")
