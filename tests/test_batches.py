"""What loaders yield and what networks return, in every usual form, from calibration to validation."""

import math
from collections import UserDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ann_parser import parse_ann_model
from finetuning.levels import quantize_activations
from finetuning.on_spikes import finetune_spikes
from quantization import distillation_loss, quantize_finetune
from runtime.batches import count_batches, fit_labels, loss_of, split_batch
from snn_weight_setter import trans_ann2snn_weight
from validate import evaluate, validate_ann, validate_snn

IMAGES = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 3
PARTS = [slice(0, 32), slice(32, 64)]
Sample = namedtuple("Sample", "image label index")

LOADERS = {
    "pairs": lambda: [(IMAGES[p], LABELS[p]) for p in PARTS],
    "lists": lambda: [[IMAGES[p], LABELS[p]] for p in PARTS],
    "triples": lambda: [(IMAGES[p], LABELS[p], torch.arange(32)) for p in PARTS],
    "named tuples": lambda: [Sample(IMAGES[p], LABELS[p], 0) for p in PARTS],
    "dicts": lambda: [{"image": IMAGES[p], "label": LABELS[p]} for p in PARTS],
    "mappings": lambda: [UserDict(pixel_values=IMAGES[p], labels=LABELS[p]) for p in PARTS],
    "lists of labels": lambda: [(IMAGES[p], LABELS[p].tolist()) for p in PARTS],
    "float64": lambda: [(IMAGES[p].double(), LABELS[p]) for p in PARTS],
    "inputs in a tuple": lambda: [((IMAGES[p],), LABELS[p]) for p in PARTS],
    "an iterator": lambda: iter([(IMAGES[p], LABELS[p]) for p in PARTS]),
    "without a length": lambda: Endless(),
    "an unused name": lambda: [{"image": IMAGES[p], "label": None, "target": LABELS[p]} for p in PARTS],
}


class Endless:
    """A loader that can be run through again, without a length."""

    def __iter__(self):
        return iter([(IMAGES[p], LABELS[p]) for p in PARTS])


def small_net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, outputs)).eval()


def flags(**changes):
    options = {"finetune_lr": 0.01, "finetune_epochs": 1, "finetune_wd": 0.0, "finetune_momentum": 0.9}
    return SimpleNamespace(**options | {"weight_bitwidth": 4} | changes)


def weights_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("form", LOADERS)
def test_every_form_of_a_batch_gives_what_pairs_give(form):
    """Finetuning, levels, conversion, finetuning on spikes and accuracies: bit for bit the same."""
    results = []
    for each in ("pairs", form):
        make, criterion = LOADERS[each], nn.CrossEntropyLoss()
        qnet = quantize_finetune(small_net(), make(), criterion, "cpu", flags())
        adam = quantize_finetune(small_net(), make(), criterion, "cpu", flags(finetune_optimizer="adam"))
        leveled = quantize_activations(qnet, make(), "cpu", 4)
        snn = trans_ann2snn_weight(qnet, make(), "cpu", 4, 4)
        tuned = finetune_spikes(snn, make(), "cpu", 1, criterion=criterion)
        accuracies = *validate_ann(qnet, make(), "cpu", criterion), *validate_snn(tuned, make(), "cpu", criterion, 4)
        results.append((weights_of(qnet), weights_of(adam), weights_of(leveled), weights_of(tuned), accuracies))
    for wanted, found in zip(*results):
        assert torch.equal(wanted, found) if isinstance(wanted, torch.Tensor) else wanted == found


@pytest.mark.parametrize(
    "alone",
    [lambda p: IMAGES[p], lambda p: (IMAGES[p],), lambda p: {"images": IMAGES[p]}],
    ids=["bare", "tuple", "dict"],
)
def test_calibration_needs_no_labels_and_everything_else_says_so(alone):
    loader, pairs = [alone(p) for p in PARTS], LOADERS["pairs"]()
    expected = trans_ann2snn_weight(small_net(), pairs, "cpu", 8, 4)(IMAGES)
    snn = trans_ann2snn_weight(small_net(), loader, "cpu", 8, 4)
    assert torch.equal(snn(IMAGES), expected)
    teacher = parse_ann_model(small_net(), (IMAGES[:1],))
    assert finetune_spikes(snn, loader, "cpu", 1, teacher=teacher).timesteps == 8
    for work in (
        lambda: quantize_finetune(small_net(), loader, nn.CrossEntropyLoss(), "cpu", flags()),
        lambda: finetune_spikes(snn, loader, "cpu", 1, criterion=nn.CrossEntropyLoss()),
        lambda: validate_ann(small_net(), loader, "cpu", nn.CrossEntropyLoss()),
    ):
        with pytest.raises(ValueError, match="a batch of the data loader has no labels, it has to be"):
            work()


class TwoInputs(nn.Module):
    """Two images, each through its own convolution, and two outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.fc, self.side = nn.Linear(512, 3), nn.Linear(512, 2)

    def forward(self, x, y):
        both = torch.cat([self.first(x).relu(), self.second(y).relu()], 1).flatten(1)
        return self.fc(both), self.side(both)


def test_several_inputs_and_outputs_from_start_to_end():
    """The first output is trained and measured."""
    torch.manual_seed(0)
    net, pairs = TwoInputs(), [((IMAGES[p], 1 - IMAGES[p]), LABELS[p]) for p in PARTS]

    def criterion(outputs, labels):
        return nn.functional.cross_entropy(outputs[0] if isinstance(outputs, tuple) else outputs, labels)

    qnet = quantize_finetune(net, pairs, criterion, "cpu", flags(weight_bitwidth=8))
    assert not torch.equal(qnet.ops["conv2"]["op"].weight, net.second.weight)
    snn = trans_ann2snn_weight(qnet, pairs, "cpu", 16, 8)
    assert [tuple(x.shape) for x in snn(IMAGES, 1 - IMAGES)] == [(64, 3), (64, 2)]
    for gradient in ("time", "tandem"):
        snn = finetune_spikes(snn, pairs, "cpu", 1, criterion=nn.CrossEntropyLoss(), gradient=gradient)
    scores = snn(IMAGES, 1 - IMAGES)[0]
    top1, loss = validate_snn(snn, pairs, "cpu", nn.CrossEntropyLoss(), 16)
    assert top1 == 100 * (scores.argmax(1) == LABELS).double().mean().item()
    assert loss == pytest.approx(nn.functional.cross_entropy(scores, LABELS).item(), rel=1e-5)


def test_a_plain_loss_and_one_of_all_outputs_agree_on_the_first():
    """In finetuning, distilling, finetuning on spikes and validation."""
    torch.manual_seed(0)
    net, pairs, plain = TwoInputs(), [((IMAGES[p], 1 - IMAGES[p]), LABELS[p]) for p in PARTS], nn.CrossEntropyLoss()

    def of_all(outputs, labels):
        assert isinstance(outputs, tuple)
        return plain(outputs[0], labels)

    results = []
    for criterion in (plain, of_all):
        qnet = quantize_finetune(net, pairs, criterion, "cpu", flags(finetune_distill=0.5))
        snn = trans_ann2snn_weight(qnet, pairs, "cpu", 4, 4)
        teacher = parse_ann_model(net, (IMAGES[:1], IMAGES[:1]))
        for gradient in ("time", "tandem"):
            snn = finetune_spikes(snn, pairs, "cpu", 1, criterion=criterion, teacher=teacher, gradient=gradient)
        curve = evaluate(snn, pairs, "cpu", criterion, 4, every_step=True)
        results.append((weights_of(qnet), weights_of(snn), torch.tensor([curve["loss"], *curve["top1_by_timestep"]])))
    for wanted, found in zip(*results):
        assert torch.equal(wanted, found)


def test_a_spiking_network_is_exact_under_autocast_and_on_half_images():
    snn = converted()
    expected = snn(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(snn(IMAGES), expected)
    halves = IMAGES.to(torch.bfloat16)
    assert torch.equal(snn(halves), snn(halves.float()))


@pytest.mark.parametrize(
    "batch, words",
    [
        (None, "a batch of the data loader is a NoneType"),
        ("text", "a batch of the data loader is a str"),
        ((), "a batch of the data loader is a tuple of nothing"),
        ({"picture": IMAGES}, "a batch of the data loader is a dict with 'picture'"),
        ((np.zeros((4, 1, 8, 8)), LABELS), "a batch of the data loader is a tuple of ndarray, Tensor"),
        (torch.tensor(1.0), "the first dimension has to be the batch"),
        (((IMAGES, IMAGES[:3]), LABELS), r"shapes \[64, 1, 8, 8\] and \[3, 1, 8, 8\]"),
    ],
)
def test_other_batches_are_refused_in_words(batch, words):
    with pytest.raises(ValueError, match=words):
        split_batch(batch)
    with pytest.raises(ValueError, match=words):
        trans_ann2snn_weight(small_net(), [batch], "cpu", 4, 4)


def test_whole_numbers_and_missing_labels_are_refused_in_words():
    bytes_of_images = [((IMAGES * 255).to(torch.uint8), LABELS)]
    with pytest.raises(ValueError, match=r"the inputs are torch.uint8, convert them to float and scale them"):
        trans_ann2snn_weight(small_net(), bytes_of_images, "cpu", 4, 4)
    with pytest.raises(ValueError, match="a batch has 64 inputs and 32 labels, give one label for each input"):
        validate_ann(small_net(), [(IMAGES, LABELS[:32])], "cpu", nn.CrossEntropyLoss())


@pytest.mark.parametrize("empty", [list, lambda: iter([]), Endless], ids=["list", "iterator", "no length"])
def test_empty_loaders_are_refused(empty, monkeypatch):
    monkeypatch.setitem(globals(), "PARTS", [])
    for work in (
        lambda loader: quantize_finetune(parsed(), loader, nn.CrossEntropyLoss(), "cpu", flags()),
        lambda loader: quantize_finetune(small_net(), loader, nn.CrossEntropyLoss(), "cpu", flags()),
        lambda loader: trans_ann2snn_weight(parsed(), loader, "cpu", 4, 4),
        lambda loader: quantize_activations(parsed(), loader, "cpu", 4),
        lambda loader: validate_ann(parsed(), loader, "cpu", nn.CrossEntropyLoss()),
        lambda loader: finetune_spikes(converted(), loader, "cpu", 1, criterion=nn.CrossEntropyLoss()),
    ):
        with pytest.raises(ValueError, match="the data loader is empty"):
            work(empty())


def converted():
    return trans_ann2snn_weight(small_net(), [IMAGES], "cpu", 4, 4)


def parsed():
    return parse_ann_model(small_net(), (torch.zeros(1, 1, 8, 8),))


def test_empty_batches_as_a_filter_leaves_them_change_nothing():
    pairs, empty = LOADERS["pairs"](), (IMAGES[:0], LABELS[:0])
    filtered, criterion = [empty, *pairs, empty], nn.CrossEntropyLoss()
    qnets = [quantize_finetune(small_net(), loader, criterion, "cpu", flags()) for loader in (pairs, filtered)]
    assert torch.equal(*map(weights_of, qnets))
    snns = [trans_ann2snn_weight(qnets[0], loader, "cpu", 4, 4) for loader in (pairs, filtered)]
    assert torch.equal(*[snn(IMAGES) for snn in snns])
    assert finetune_spikes(snns[0], filtered, "cpu", 1, criterion=criterion).timesteps == 4
    assert len({validate_snn(snns[0], loader, "cpu", criterion, 4) for loader in (pairs, filtered)}) == 1


class Once:
    """A loader over a stream: no length, no iterator, and it runs once."""

    def __init__(self):
        self.stream = iter([(IMAGES[p], LABELS[p]) for p in PARTS])

    def __iter__(self):
        yield from self.stream


def test_a_stream_that_runs_once_calibrates_and_is_never_taken_for_trained():
    dag = parsed()
    expected = trans_ann2snn_weight(dag, LOADERS["pairs"](), "cpu", 4, 4)(IMAGES)
    assert torch.equal(trans_ann2snn_weight(dag, Once(), "cpu", 4, 4)(IMAGES), expected)
    for work in (
        lambda: quantize_finetune(dag, Once(), nn.CrossEntropyLoss(), "cpu", flags(finetune_epochs=2)),
        lambda: finetune_spikes(converted(), Once(), "cpu", 1, criterion=nn.CrossEntropyLoss()),
    ):
        with pytest.raises(ValueError, match="empty, or runs only once"):
            work()


@pytest.mark.parametrize("labels", [LABELS.float(), LABELS.float()[:, None]], ids=["[B]", "[B, 1]"])
def test_a_squared_error_of_one_score_compares_each_with_its_own(labels):
    outputs = torch.rand(64, 1)
    wanted = (outputs[:, 0] - LABELS).square().mean()
    assert torch.equal(loss_of(nn.MSELoss(), outputs, labels), wanted)


def test_one_score_learns_from_a_teacher():
    """Softmax of one class is constant; against the score 0 of the other class there is something to learn."""
    outputs, wanted = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [0.0]])
    q = torch.sigmoid(wanted / 4)
    p = torch.sigmoid(outputs / 4)
    expected = 16 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    assert distillation_loss(outputs, wanted).item() == pytest.approx(expected.item(), rel=1e-4)


def test_float64_networks_are_quantized_and_converted_in_float32():
    net = small_net().double()
    qnet = quantize_finetune(net, LOADERS["float64"](), nn.CrossEntropyLoss(), "cpu", flags())
    assert {p.dtype for p in qnet.parameters()} == {torch.float32}
    assert torch.equal(trans_ann2snn_weight(net, LOADERS["pairs"](), "cpu", 4, 4)(IMAGES), converted()(IMAGES))


@pytest.mark.parametrize("labels, kind", [({"boxes": 1}, "a dict with 'boxes'"), (["a"] * 64, "a list of str, str")])
def test_labels_that_are_no_numbers_are_refused_in_words(labels, kind):
    with pytest.raises(ValueError, match=f"the labels of a batch are {kind}"):
        validate_ann(small_net(), [(IMAGES, labels)], "cpu", nn.CrossEntropyLoss())


def test_a_calibration_image_that_is_not_finite_is_what_the_words_name():
    images = IMAGES.clone()
    images[5, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="an input has NaN or infinite values, look at how the images are read"):
        trans_ann2snn_weight(small_net(), [(IMAGES, LABELS), (images, LABELS)], "cpu", 4, 4)


def test_a_loader_without_a_length_is_counted():
    assert count_batches(Endless()) == count_batches(LOADERS["pairs"]()) == 2


class Scores(nn.Module):
    """Returns what it is given: accuracies by hand."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        return self.outputs


HALF = torch.tensor([-2.0, 1.0, -1.0, 3.0])  # signs - + - +


@pytest.mark.parametrize("outputs", [HALF, HALF[:, None]], ids=["[B]", "[B, 1]"])
@pytest.mark.parametrize("labels", [[0, 1, 1, 1], [[0], [1], [1], [1]], [0.0, 1.0, 1.0, 1.0]])
def test_one_score_is_measured_by_its_sign(outputs, labels):
    labels = torch.tensor(labels)
    top1, loss = validate_ann(Scores(outputs), [(torch.zeros(4, 1), labels)], "cpu", nn.BCEWithLogitsLoss())
    expected = nn.functional.binary_cross_entropy_with_logits(HALF, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert top1 == 75.0 and loss == pytest.approx(expected.item(), rel=1e-6)


def test_a_probability_is_measured_by_one_half():
    outputs = torch.tensor([[0.1], [0.4], [0.6], [0.9]])
    labels = torch.tensor([0, 1, 1, 1])
    for criterion in (nn.BCELoss(), nn.functional.binary_cross_entropy):
        assert validate_ann(Scores(outputs), [(torch.zeros(4, 1), labels)], "cpu", criterion)[0] == 75.0


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 2, 0], [[0], [1], [2], [0]], torch.eye(3)[[0, 1, 2, 0]], torch.eye(3, dtype=torch.long)[[0, 1, 2, 0]]],
    ids=["[B]", "[B, 1]", "one-hot", "one-hot, whole"],
)
def test_labels_of_every_usual_form_give_one_accuracy(labels):
    outputs, labels = torch.eye(3)[[0, 1, 2, 2]], torch.as_tensor(labels)
    top1, loss = validate_ann(Scores(outputs), [(torch.zeros(4, 1), labels)], "cpu", nn.CrossEntropyLoss())
    expected = nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 2, 0]))
    assert top1 == 75.0 and loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    "outputs, labels, words",
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), r"returns \[4, 3\] and the labels are \[4, 2\]"),
        (torch.zeros(4, 3, 2, 2), torch.zeros(4), r"returns \[4, 3, 2, 2\] and the labels are \[4\]"),
        (torch.zeros(4, 1), torch.zeros(4, 3), r"returns \[4, 1\] and the labels are \[4, 3\]"),
        (torch.zeros(4, 3), torch.ones(4, 3), "a label names several classes at once"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_both_shapes(outputs, labels, words):
    with pytest.raises(ValueError, match=words):
        validate_ann(Scores(outputs), [(torch.zeros(4, 1), labels)], "cpu", nn.CrossEntropyLoss())


def test_labels_of_a_column_finetune_as_those_of_a_row():
    column = [(images, labels[:, None]) for images, labels in LOADERS["pairs"]()]
    nets = [
        quantize_finetune(small_net(), loader, nn.CrossEntropyLoss(), "cpu", flags())
        for loader in (column, LOADERS["pairs"]())
    ]
    assert torch.equal(*map(weights_of, nets))
    assert fit_labels(torch.zeros(4, 1), torch.ones(4, dtype=torch.long)).shape == (4, 1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_an_image_that_is_not_finite_has_no_score(wrong):
    images = IMAGES.clone()
    images[5, 0, 3, 3] = wrong
    snn = trans_ann2snn_weight(small_net(), LOADERS["pairs"](), "cpu", 4, 4)
    with pytest.raises(ValueError, match="input1_out1 has NaN or infinite values"):
        snn(images)
    for net, timesteps in ((small_net(), None), (snn, 4), (converted(), 4)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            evaluate(net, [(images, LABELS)], "cpu", nn.CrossEntropyLoss(), timesteps)


def test_a_validated_network_is_where_it_was():
    net = small_net().train()
    evaluate(net, LOADERS["pairs"](), "cpu", nn.CrossEntropyLoss())
    assert net.training and {p.device.type for p in net.parameters()} == {"cpu"}
    if torch.cuda.is_available():
        evaluate(net, LOADERS["pairs"](), "cuda", nn.CrossEntropyLoss())
        assert {p.device.type for p in net.parameters()} == {"cpu"}
