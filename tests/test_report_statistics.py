"""Intervals, tests and claims of the report: against counting by hand, and what they say where nothing differs."""

import json
from itertools import combinations
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ann_parser import parse_ann_model
from build_network import get_net_by_name
from dag_rewrites import prepare_conversion
from datasets import get_dataset
from networks.checkpoint import load_weights
from pipeline import convert_by_options, options_by_name
from quantization import quantize_finetune
from reports.accuracy import accuracy_facts, class_facts, fewest_timesteps, first_to_stay
from reports.alternatives import CONTROL
from reports.claims import choose, flags_in_words, layer_in_words, loss_in_words, recommended
from reports.compare import Run, compare_runs, read_runs, runs_in_words
from reports.statistics import (
    Z,
    compare,
    fisher,
    from_hex,
    holm,
    mcnemar,
    p_in_words,
    paired_interval,
    to_hex,
    unpaired_interval,
    visible_difference,
    wilson,
)
from runtime.device import seed_everything
from validate import evaluate

# ---------------------------------------------------------------------------------------------------------------------
# intervals and tests


@pytest.mark.parametrize("right, images", [(0, 10), (10, 10), (355, 359), (54, 128), (9003, 10000)])
def test_wilson_is_the_formula(right, images):
    share = right / images
    centre = (share + Z**2 / (2 * images)) / (1 + Z**2 / images)
    reach = Z * (share * (1 - share) / images + Z**2 / (4 * images**2)) ** 0.5 / (1 + Z**2 / images)
    assert wilson(right, images) == pytest.approx((100 * (centre - reach), 100 * (centre + reach)), abs=1e-9)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_counted(lost, gained):
    """Mid-p: outcomes of fair coins that are rarer on one side, and half of those as rare; twice for both sides."""
    n, fewer = lost + gained, min(lost, gained)
    tail = sum(comb(n, k) for k in range(fewer)) + comb(n, fewer) / 2
    assert mcnemar(lost, gained) == pytest.approx(min(1.0, 2 * tail / 2**n))
    assert mcnemar(gained, lost) == mcnemar(lost, gained)
    if lost != gained:  # mid-p is the exact test's p-value without one of the two tails' own probability
        exact = stats.binomtest(lost, n, 0.5).pvalue
        assert mcnemar(lost, gained) == pytest.approx(exact - stats.binom.pmf(lost, n, 0.5), abs=1e-9)


def test_five_of_five_are_the_fewest_that_a_claim_needs():
    assert mcnemar(0, 5) == pytest.approx(1 / 32) and mcnemar(0, 4) == pytest.approx(1 / 16)
    assert (mcnemar(0, 0), mcnemar(3, 3)) == (1.0, 1.0)
    assert [p_in_words(p) for p in (1.7e-65, 0.0123, 0.0496, 1.0)] == ["<0.001", "0.012", "0.0496", "1"]


@pytest.mark.parametrize("lost, gained, images", [(0.08, 0.02, 60), (0.02, 0.02, 128), (0.2, 0.1, 40)])
def test_the_paired_interval_holds_the_difference_in_95_of_100_samples(lost, gained, images):
    """All samples are counted, with their probabilities."""
    covered = 0.0
    for b in range(images + 1):
        of_b = comb(images, b) * lost**b * (1 - lost) ** (images - b)
        if of_b < 1e-9:
            continue
        share = gained / (1 - lost)  # of the images that are not lost
        for c in range(images - b + 1):
            low, high = paired_interval(b, c, images)
            if low <= 100 * (gained - lost) <= high:
                covered += of_b * comb(images - b, c) * share**c * (1 - share) ** (images - b - c)
    assert 0.94 < covered < 0.995


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test(p_values):
    """A hypothesis counts where every set of hypotheses that holds it does, by Bonferroni's test of that set."""
    for i, corrected in enumerate(holm(p_values)):
        sets = [each for k in range(1, 7) for each in combinations(range(len(p_values)), k) if i in each]
        closed = max(min(1.0, len(each) * min(p_values[j] for j in each)) for each in sets)
        assert corrected == pytest.approx(closed)


def test_a_visible_difference_is_seen_in_four_of_five_samples():
    images, differing = 500, 0.1
    points = visible_difference(differing * images, images) / 100
    lost = (differing - points) / 2 / differing
    n = int(differing * images)
    power = sum(comb(n, b) * lost**b * (1 - lost) ** (n - b) for b in range(n + 1) if mcnemar(b, n - b) < 0.05)
    assert 0.7 < power < 0.92
    assert visible_difference(0, 100) == 5


def test_compare_by_hand():
    first, second = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool), np.array([1, 0, 0, 0, 1, 0, 1, 0], bool)
    found = compare(first, second)
    assert (found.lost, found.gained, found.images, found.points) == (2, 1, 8, -12.5)
    assert found.p == mcnemar(2, 1) and found.interval == paired_interval(2, 1, 8)
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(first, second[:3])


def test_unpaired_differences():
    low, high = unpaired_interval((90, 100), (80, 100))
    assert low < -10 < high and low == pytest.approx(-20.0, abs=0.3) and high == pytest.approx(0.2, abs=0.3)
    assert fisher((90, 100), (80, 100)) == pytest.approx(0.073, abs=0.001)
    tables = [comb(170, k) / comb(200, 100) * comb(30, 100 - k) for k in range(70, 101)]  # k of 100 right in the first
    as_rare = sum(p for p in tables if p <= tables[90 - 70] * (1 + 1e-7))
    assert fisher((90, 100), (80, 100)) == pytest.approx(as_rare, abs=1e-9)


def test_newcombe_by_hand():
    """The example of the paper (Newcombe, Statistics in Medicine 1998): 56 of 70 against 48 of 80."""
    low, high = unpaired_interval((48, 80), (56, 70))
    assert (low, high) == (pytest.approx(5.24, abs=0.005), pytest.approx(33.39, abs=0.005))


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_answers_survive_as_text(right):
    assert from_hex(to_hex(right), len(right)).tolist() == right
    with pytest.raises(ValueError, match="do not hold"):
        from_hex(to_hex(right), len(right) + 8)


# ---------------------------------------------------------------------------------------------------------------------
# accuracy


def answers(targets, classes):
    """The result of `validate.evaluate` with answers. classes: [N], or [T, N] after every step."""
    targets, classes = torch.tensor(targets), torch.tensor(classes)
    right = (torch.atleast_2d(classes) == targets).bool()
    top1 = (100 * right.double().mean(1)).tolist()
    kept = {"classes": torch.atleast_2d(classes)[-1], "targets": targets, "right": right}
    return {"samples": len(targets), "top1_by_timestep": top1, "top1": top1[-1], "loss": 0.5, "answers": kept}


ANN, QNET, SNN = [0, 1, 2, 0], [0, 1, 2, 1], [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]]
ANSWERS = {"ann": answers([0, 1, 2, 0], ANN), "qnet": answers([0, 1, 2, 0], QNET), "snn": answers([0, 1, 2, 0], SNN)}


def test_accuracies_by_hand():
    facts = accuracy_facts(ANSWERS)
    assert [facts[kind]["top1"] for kind in ("ann", "qnet", "snn")] == [100, 75, 50]
    assert facts["by_timestep"] == {1: 50, 2: 75, 3: 50} and facts["bands"][2] == list(wilson(3, 4))
    change = facts["differences"]["snn-ann"]
    assert (change["points"], change["lost"], change["gained"]) == (-50, 2, 0) and facts["paired"]
    assert from_hex(facts["right"]["snn"], 4).tolist() == [True, True, False, False]


def test_a_shuffled_loader_gives_no_pairs():
    shuffled = {**ANSWERS, "snn": answers([1, 0, 2, 0], [[1, 0, 2, 0]])}
    facts = accuracy_facts(shuffled)
    assert not facts["paired"] and "lost" not in facts["differences"]["snn-ann"]
    assert class_facts(shuffled, None) is None


def test_classes_by_hand():
    facts = class_facts(ANSWERS, ("cat", "dog", "owl"))
    assert facts["confusion"]["snn"] == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert [row["snn"]["top1"] for row in facts["classes"]] == [50, 100, 0]
    assert [row["change"]["points"] for row in facts["classes"]] == [-50, 0, -100]
    assert facts["names"] == ["cat", "dog", "owl"]


def test_fewest_timesteps():
    assert [first_to_stay(np.array(x, bool)) for x in ([1, 1], [0, 1, 0, 1], [1, 0])] == [1, 4, None]
    ann, snn = np.ones(400, bool), np.ones((5, 400), bool)
    snn[0, :40], snn[1, :4], snn[2, :5], snn[3, :2] = False, False, False, False
    assert fewest_timesteps(ann, snn) == {"measured": 4, "sure": 5}
    assert fewest_timesteps(ann[:40], snn[:, :40]) == {"measured": 5, "sure": None}


def test_answers_of_a_single_score():
    scores = torch.tensor([[0.2], [-0.1], [3.0]])
    loader = [(scores, torch.tensor([[1.0], [1.0], [1.0]]))]
    result = evaluate(torch.nn.Identity(), loader, "cpu", torch.nn.BCEWithLogitsLoss(), keep_answers=True)
    kept = result["answers"]
    assert kept["classes"].tolist() == [1, 0, 1] and kept["targets"].tolist() == [1, 1, 1]
    assert kept["right"].tolist() == [[True, False, True]] and result["top1"] == pytest.approx(200 / 3)


# ---------------------------------------------------------------------------------------------------------------------
# claims


def measured(right, **more):
    right = np.asarray(right, bool)
    return {"right": to_hex(right), "images": len(right), "top1": 100 * right.mean(), **more}


def first_right(count, images=100):
    return np.arange(images) < count


def test_one_that_stands_out_and_several_that_do_not():
    results = {CONTROL: measured(first_right(70)), "a": measured(first_right(90)), "b": measured(first_right(71))}
    choice = choose(results)
    assert (choice.kind, choice.names, choice.tried) == ("one", ("a",), 2)
    results["c"] = measured(first_right(89))
    assert (choose(results).kind, choose(results).names) == ("several", ("a", "c"))
    assert choose({CONTROL: results[CONTROL], "b": results["b"]}).kind == "none"


def test_many_comparisons_need_more():
    """5 of 5 images are significant alone, and not among two alternatives."""
    results = {CONTROL: measured(first_right(70)), "a": measured(first_right(75))}
    assert choose(results).kind == "one"
    assert choose({**results, "b": results[CONTROL]}).kind == "none"


def test_what_is_recommended_did_not_lose_on_the_test_images():
    def tried(count, test, **more):
        return measured(first_right(count), test={"top1": test, "images": 50}, **more)

    results = {CONTROL: tried(70, 80.0), "a": tried(95, 79.0), "b": tried(90, 85.0, fits=False), "c": tried(85, 81.0)}
    choice = choose(results)
    assert choice.names == ("a", "b", "c")
    assert recommended(results, choice, must_fit=False) == "b" and recommended(results, choice, must_fit=True) == "c"
    sentence = flags_in_words(choice, results, "validation images", "c")
    assert (
        sentence.endswith("On 50 test images, c has 81.0 % (80.0 % as asked for).") and "a (+25.0 points)" in sentence
    )
    results["c"]["bits"] = 32
    assert recommended(results, choice, must_fit=True) is None
    assert "None of them" in flags_in_words(choice, results, "validation images", None)


def test_sentences_say_how_many_images_and_no_more_than_the_test():
    none = {CONTROL: measured(first_right(70)), "conv1": measured(first_right(72)), "conv2": measured(first_right(71))}
    sentence = layer_in_words(choose(none), none, {}, "validation images", 9)
    assert sentence.startswith("No single layer stands out: float weights in any one of 2 of 9 layers")
    assert "100 validation images" in sentence and "(differences under about 5.0 points" in sentence
    one = {**none, "conv2": measured(first_right(90))}
    sentence = layer_in_words(choose(one), one, {"conv2": "features.3"}, "validation images", 2)
    assert sentence.startswith("The worst layer is conv2 (features.3) (+20.0 points, 95 % interval +")
    several = {**one, "conv1": measured(first_right(89))}
    sentence = layer_in_words(choose(several), several, {}, "validation images", 2)
    assert "conv2 (+20.0" in sentence and "conv1 (+19.0" in sentence and sentence.endswith("cannot be told from them.")
    full = {CONTROL: measured(first_right(100)), "conv1": measured(first_right(99))}
    assert "all of them are answered right" in layer_in_words(choose(full), full, {}, "images", 1)
    assert "all of them are answered right" in flags_in_words(choose(full), full, "images", None)


def test_the_loss_is_claimed_only_where_it_is_seen():
    (sentence,) = loss_in_words(accuracy_facts(ANSWERS), 3)
    assert "50.00 % of 4 test images" in sentence and "show no difference" in sentence and "p = 0.25" in sentence
    targets, wrong = [0] * 200, [0] * 180 + [1] * 20
    found = {"ann": answers(targets, targets), "qnet": answers(targets, wrong), "snn": answers(targets, [wrong])}
    (sentence,) = loss_in_words(accuracy_facts(found), 4)
    assert "loses accuracy" in sentence and "the integer weights change it by -10.00 points" in sentence
    assert "the spikes change it by +0.00 points (95 % interval -1.4 to +1.4, not significant)" in sentence


# ---------------------------------------------------------------------------------------------------------------------
# other runs


def accuracy_of(right):
    share = {"top1": 100 * float(np.mean(right)), "images": len(right)}
    return {"snn": share, "right": {"snn": to_hex(right)}, "labels": "abc"}


def test_runs_are_read_and_compared(tmp_path):
    report = {"net": "net", "samples": 100, "flags": {"timesteps": 8}, "accuracy": accuracy_of(first_right(80))}
    report["operations"] = {"conv1": {"synops": 5.0}, "conv2": {"synops": 7.0}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    results = {"net": "net", "snn_top1": 90.0, "samples": 100, "timesteps": 4}
    (tmp_path / "results.json").write_text(json.dumps(results))
    others = [{"name": "other", "top1": 50, "samples": 100, "synops": 3}, {"top1": 90.0, "samples": 1000}]
    (tmp_path / "o.json").write_text(json.dumps(others))
    runs = read_runs([str(tmp_path / name) for name in ("report.json", "results.json", "o.json")])
    assert [run.name for run in runs] == [f"net ({tmp_path.name})", "net (results.json)", "other", "o.json"]
    assert [(run.top1, run.synops, run.timesteps) for run in runs[:3]] == [(80, 12, 8), (90, None, 4), (50, 3, None)]
    rows = compare_runs(runs, accuracy_of(first_right(90)), "this", 8, 20.0)
    assert [row["change"] and row["change"]["paired"] for row in rows] == [None, True, False, False, False]
    paired = compare(first_right(90), first_right(80))
    assert rows[1]["change"]["points"] == -10 and rows[1]["change"]["p"] == pytest.approx(3 * paired.p)
    assert runs_in_words(rows) == (
        f"Different from this run: net ({tmp_path.name}) (-10.00 points), other (-40.00 points)."
    )
    assert runs_in_words(compare_runs(runs[1:2], accuracy_of(first_right(90)), "this", 8, 1.0)).startswith("No run")


@pytest.mark.parametrize(
    "text, words",
    [
        ("no JSON", ["is no JSON", '"top1"']),
        ("3", ["holds int"]),
        ('{"name": "x", "samples": 3}', ["no number top1"]),
        ('{"name": "x", "top1": "90", "samples": 3}', ["no number top1"]),
        ('{"top1": 101, "samples": 3}', ["top1 101"]),
        ('{"top1": 90, "samples": 0}', ["0 samples"]),
        ('{"top1": 90, "samples": 10, "synops": -1}', ["synops -1"]),
        ("[]", ["holds no run"]),
        ("[" * 100_000, ["is no JSON"]),
        ('{"samples": 8, "accuracy": {"snn": {"top1": 50}}, "operations": [1]}', ["damaged report.json"]),
        ('{"samples": 8, "accuracy": {"snn": {"top1": 50}, "right": {"snn": "ff00"}}}', ["2 bytes do not hold"]),
        ('{"samples": 8, "accuracy": {"snn": {"top1": 50}, "right": {"snn": 3}}}', ["damaged report.json"]),
        ('{"samples": 8, "accuracy": {"snn": {"top1": 50}, "right": {"snn": "ff"}}}', ["8 right answers, top1 says 4"]),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json") as error:
        read_runs([str(tmp_path / "x.json")])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    with pytest.raises(OSError, match=r"cannot read .*none\.json"):
        read_runs([str(tmp_path / "none.json")])


# ---------------------------------------------------------------------------------------------------------------------
# where nothing differs


def other_seed(net, seed, bits):
    """The answers of one run of example_net on the digits: quantized and finetuned for an epoch, and converted."""
    loaders = get_dataset(SimpleNamespace(dataset="digits", seed=seed))
    options = {"weight_bitwidth": bits, "timesteps": 8, "finetune_epochs": 1, "calibration_samples": 128, "seed": seed}
    args = options_by_name("specification", options)
    seed_everything(seed)
    qnet = quantize_finetune(net, loaders[2], torch.nn.CrossEntropyLoss(), "cpu", args)
    snn = convert_by_options(qnet, loaders[3], "cpu", args)
    return evaluate(snn, loaders[0], "cpu", torch.nn.CrossEntropyLoss(), 8, every_step=True, keep_answers=True)


@pytest.mark.slow
def test_two_seeds_of_one_network_are_no_different_to_a_report():
    """20 pairs of runs: the claims about flags, layers, runs and the loss of 18 or more say that nothing stands out."""
    net = load_weights(get_net_by_name("example_net"), ROOT / "checkpoint/example_net_ann.pth")
    net = prepare_conversion(parse_ann_model(net, (torch.zeros(1, 1, 32, 32),))).eval()
    runs = [other_seed(net, seed, 4) for seed in range(21)]
    rights = [run["answers"]["right"][-1].numpy() for run in runs]
    assert len({to_hex(right) for right in rights}) > 5  # the seeds do differ
    claimed = {"flags": 0, "layers": 0, "runs": 0, "loss": 0}
    for i in range(20):
        pair = {CONTROL: measured(rights[i]), "--seed 1": measured(rights[i + 1])}
        layers = {CONTROL: pair[CONTROL], **{f"conv{k}": measured(rights[(i + k) % 21]) for k in range(1, 5)}}
        accuracy = accuracy_facts({"ann": runs[i], "qnet": runs[i], "snn": runs[i + 1]})
        other = Run("other", runs[i]["top1"], len(rights[i]), 8, 1.0, to_hex(rights[i]), accuracy["labels"])
        rows = compare_runs([other], accuracy, "this", 8, 1.0)
        claimed["flags"] += choose(pair).kind != "none"
        claimed["layers"] += choose(layers).kind != "none"
        claimed["runs"] += not runs_in_words(rows).startswith("No run")
        claimed["loss"] += "show no difference" not in loss_in_words(accuracy, 8)[0]
    assert max(claimed.values()) <= 2, claimed
