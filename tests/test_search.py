"""search.py: its trials, the choice among them, the images held out, its file, the time limit, and whole searches."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ann2snn
import search
from build_network import choose_input
from datasets import ImageDataset, get_dataset
from pipeline import Networks, convert_by_options, load_network, quantize
from runtime.cli import run_script
from searching import order
from searching.choice import (
    SURER,
    Limits,
    is_surely_better,
    pareto_front,
    probability_of_wins,
    winner_of,
    winners,
)
from searching.costs import Clock, Costs
from searching.images import split_images
from searching.record import Record, Row
from searching.trials import (
    LABELS,
    LEARN,
    STAGES,
    UNLABELLED,
    Shared,
    Trial,
    epochs_added,
    plan,
    stage_of,
    with_fewer_epochs,
)

ROOT = Path(__file__).parents[1]
WEIGHTS = f"{ROOT}/checkpoint/example_net_ann.pth"
# Flags that leave conversions without epochs, of a second each
QUICK = "-e 0 --spike_epochs 0 --spike_epochs_unlabelled 0 --avgpool spike --calibration_samples 60 --held_out 120"
COMMAND = ["example_net", "--ann_weight", WEIGHTS, *QUICK.split(), "--timesteps", "2", "--device", "cpu"]


def row(hits, preset="", listens=False, **facts):
    """A measured row; hits as text."""
    found = {"timesteps": 4, "bits": "8", "flags": {}, "interval": 8 if listens else 4, "latency": 4, "synops": 1.0}
    return Row("", **{**found, **facts}, preset=preset, listens=listens, hits=[letter == "1" for letter in hits])


# ---------------------------------------------------------------------------------------------------------------------
# Trials


def test_trials_are_all_different_in_order_of_cost_and_hold_every_preset():
    shared = Shared("example_net", {})
    trials = plan(shared, 4, "8", folds=True)
    stages = [STAGES.index(stage_of(shared.args(trial))) for trial in trials]
    assert stages == sorted(stages) and len({trial.key() for trial in trials}) == len(trials)
    assert {trial.preset for trial in trials} == {"", "specification", "calibrated", "exact", "finetuned"}
    by_name = {trial.name(): shared.args(trial) for trial in trials}
    assert stage_of(by_name["--preset exact"]) == LEARN and by_name["--preset exact"].listen == 4
    assert stage_of(by_name["--preset calibrated"]) == UNLABELLED and stage_of(by_name["--preset finetuned"]) == LABELS
    assert {args.avgpool for args in by_name.values()} == {"spike", "fold"}
    assert all(args.timesteps == 4 and args.weight_bitwidth == 8 for args in by_name.values())


def test_a_flag_that_is_given_holds_for_every_trial_and_leaves_no_two_alike():
    free = plan(Shared("example_net", {}), 4, "8")
    args = search.parse_args(
        ["example_net", "--listen", "0", "-e", "0", "--no-equalize", "--mean=-0.5", "--pretrained"]
    )
    shared = Shared("example_net", args.words)
    assert args.words["mean"] == ["--mean=-0.5"] and args.words["equalize"] == ["--no-equalize"]
    trials = plan(shared, 4, "8")
    assert len(trials) < len(free)
    assert {trial.preset for trial in trials} == {"", "calibrated", "specification"}  # exact has to listen
    for trial in trials:
        found = ann2snn.parse_args(shared.command(trial).split()[2:])
        assert (found.listen, found.finetune_epochs, found.mean, found.ann_weight) == (0, 0, (-0.5,), "pretrained")


def test_few_bits_learn_to_round_and_few_images_bound_the_calibration():
    shared = Shared("example_net", {}, samples=300)
    assert any("rounding" in trial.flags for trial in plan(shared, 8, "4"))
    assert not any("rounding" in trial.flags for trial in plan(shared, 8, "8"))
    trials = plan(shared, 8, "8")
    assert {shared.args(trial).calibration_samples for trial in trials} == {300}
    assert next(trial for trial in trials if trial.preset == "calibrated").flags["calibration_samples"] == "300"


def test_listening_trains_as_many_epochs_as_weights_that_nothing_was_fitted_to():
    for T, epochs, samples in ((2, 20, 2500), (4, 20, 2500), (16, 5, 2500), (64, 1, 1000), (128, 1, 1000)):
        added = {"spike_epochs_unlabelled": str(epochs), "calibration_samples": str(samples)}
        assert epochs_added({"listen": str(T)}, T) == {"listen": str(T), **added}


def test_many_timesteps_need_no_epochs_and_keep_the_preset():
    trials = plan(Shared("example_net", {}), 64, "8")
    assert sum(trial.preset == "calibrated" for trial in trials) == 1


def test_poolings_that_can_be_folded_are_tried_both_ways_and_others_once():
    shared = Shared("example_net", {})
    both = {trial.name(): shared.args(trial).avgpool for trial in plan(shared, 16, "8", folds=True)}
    assert both["--preset exact"] == "fold" and both["--preset exact --avgpool spike"] == "spike"
    assert both["--preset specification"] == "spike" and both["--preset specification --avgpool fold"] == "fold"
    assert not any("avgpool" in trial.flags for trial in plan(shared, 16, "8"))
    kept = plan(Shared("example_net", {"avgpool": ["--avgpool", "spike"]}), 16, "8", folds=True)
    assert len(kept) == len(both) / 2


@pytest.mark.parametrize(
    "folded, spiking, tried",
    [
        ("1110", "1100", {"--preset calibrated"}),
        ("1000", "1100", {"--preset calibrated", "--preset calibrated -"}),
        ("", "1100", {"--preset calibrated", "--preset calibrated -"}),
    ],
)
@pytest.mark.parametrize("listens", [False, True])
def test_epochs_go_on_with_the_poolings_that_did_better_without(folded, spiking, tried, listens):
    alone = {"preset": "calibrated", "spike_epochs_unlabelled": "0"}
    rows = [
        row(folded, flags=alone, listens=listens),
        row(spiking, flags={**alone, "avgpool": "spike"}, listens=listens),
        row("1111", flags={"preset": "calibrated"}),  # it was trained, so it says nothing of the others
    ]
    if not listens:
        rows.append(row("1111", flags={"preset": "exact"}, listens=True))  # nor does one that listens
    record = SimpleNamespace(rows=dict(enumerate(rows)))
    runner = SimpleNamespace(shared=Shared("example_net", {}), ann_hits=[True] * 4)
    own = {"--preset calibrated": {}, "--preset calibrated -": {"avgpool": "spike"}}
    trials = {name: Trial(4, "8", {"preset": "calibrated", **flags}) for name, flags in own.items()}
    reasons = {name: order.useless(trial, record, runner) for name, trial in trials.items()}
    assert {name for name, reason in reasons.items() if not reason} == tried
    assert set(reasons.values()) <= {"", "--avgpool spike did not help the conversions without epochs"}


# ---------------------------------------------------------------------------------------------------------------------
# Choice


@given(st.integers(0, 9), st.integers(0, 9))
def test_probability_of_wins_is_that_of_all_throws_of_coins(wins, losses):
    if wins + losses > 12:
        return
    throws = [sum(coins) for coins in product((0, 1), repeat=wins + losses)]
    assert probability_of_wins(wins, losses) == pytest.approx(sum(each >= wins for each in throws) / len(throws))


def test_noise_does_not_displace_a_preset_and_a_sure_gain_does():
    preset = row("1" * 80 + "0" * 20, preset="calibrated")
    noise = row("1" * 82 + "0" * 18)
    surely = row("1" * 90 + "0" * 10)
    assert winner_of([noise, preset], Limits()) is preset
    assert winner_of([noise, preset, surely], Limits()) is surely
    assert winner_of([noise, row("1" * 79 + "0" * 21)], Limits()) is noise  # without a preset, the most accurate
    assert winner_of([row("1" * 100, worse="--preset exact"), preset], Limits()) is preset  # it was stopped


@settings(max_examples=50)
@given(st.lists(st.text("01", min_size=40, max_size=40), min_size=2, max_size=6))
def test_the_winner_is_never_less_accurate_than_the_best_preset(shares):
    rows = [row(hits, preset="exact" if index % 2 else "") for index, hits in enumerate(shares)]
    best = max(sum(each.hits) for each in rows if each.preset)
    winner = winner_of(rows, Limits())
    assert sum(winner.hits) >= best
    presets = [each for each in rows if each.preset and sum(each.hits) == best]
    assert winner.preset or any(is_surely_better(winner.hits, each.hits, SURER) for each in presets)


def test_as_accurate_and_sooner_wins_and_limits_hold():
    listening = row("1110", preset="exact", listens=True, latency=80)
    plain = row("1110", preset="calibrated", synops=2.0)
    found = winners([listening, plain], Limits())[4, "8"]
    assert found == {"most accurate": plain, "in T steps": plain}
    better = row("1111", preset="exact", listens=True, latency=80)
    assert winners([better, plain], Limits())[4, "8"] == {"most accurate": better, "in T steps": plain}
    assert winners([better, plain], Limits(latency=79))[4, "8"] == {"most accurate": plain, "in T steps": plain}
    assert winners([better, plain], Limits(synops=1.5))[4, "8"] == {"most accurate": better}


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=8))
def test_the_front_is_what_no_other_beats(facts):
    rows = [
        row("1" * hits + "0" * (4 - hits), interval=steps, synops=float(synops), bits=str(bits + 1))
        for hits, steps, synops, bits in facts
    ]

    def beats(a, b):
        pairs = [(b.hits.count(True), a.hits.count(True)), (a.interval, b.interval), (a.synops, b.synops)]
        pairs.append((int(a.bits), int(b.bits)))
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    expected = [each for each in rows if not any(beats(other, each) for other in rows)]
    assert pareto_front(rows, [True] * 4, Limits()) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Images


def pixels(images):
    """The images as a set of bytes."""
    return {image.numpy().tobytes() for image in images}


def test_images_held_out_are_no_calibration_training_or_test_images():
    args = SimpleNamespace(dataset="digits", image_size=8, augment="none", seed=0)
    test, _, train, calibration = get_dataset(args)
    found = split_images((train, calibration), 500, 200, 0)
    assert found.samples == 500 and len(found.labels) == len(found.images) == 200
    first = torch.cat([images for images, _ in calibration])[:500]
    assert torch.equal(torch.cat([images for images, _ in found.calibration]), first)  # those of ann2snn.py
    held = pixels(found.images)
    for others in (found.calibration, found.train, test):
        assert not held & set().union(*(pixels(images) for images, _ in others))
    assert len(found.train.dataset) == len(train.dataset) - 200


def test_few_images_leave_a_quarter_to_compare_on():
    found = split_images(get_dataset(SimpleNamespace(dataset="debug0", image_size=6))[2:], 2500, 5000, 0)
    assert (found.samples, len(found.labels)) == (48, 16)


def test_without_an_order_nothing_trains_with_labels():
    images = [(torch.rand(8, 1, 4, 4), torch.arange(8) % 2)]
    found = split_images((images, WithDataset(images)), 4, 2, 0)
    assert found.train is None and found.samples == 4 and len(found.labels) == 2
    with pytest.raises(ValueError, match="3 training images are too few to hold some out, 4 are the least"):
        split_images((images, WithDataset([(images[0][0][:3], images[0][1][:3])])), 4, 2, 0)
    with pytest.raises(ValueError, match="the data loader is empty"):
        split_images((images, WithDataset([])), 4, 2, 0)


class WithDataset(list):
    """Batches with a data set of unknown order."""

    dataset = ()


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_a_record_keeps_complete_lines_and_refuses_other_searches(tmp_path):
    path = tmp_path / "trials.jsonl"
    record = Record(path, {"network": "a"})
    first = row("101", preset="exact", flags={"preset": "exact"})
    first.key = "first"
    record.add(first)
    with open(path, "a") as file:
        file.write('{"key": "cut o')  # as a killed run leaves it
    again = Record(path, {"network": "a"})
    assert again.rows == {"first": first}
    second = row("1")
    second.key = "second"
    again.add(second)
    assert list(Record(path, {"network": "a"}).rows) == ["first", "second"]
    with pytest.raises(ValueError, match=r"trials.jsonl is of a search with other network, name another --out"):
        Record(path, {"network": "b"})
    path.write_text('{"format": "other"}\n')
    with pytest.raises(ValueError, match="is no file of a search"):
        Record(path, {"network": "a"})
    for damaged in (b'{"a"\n', b"\xff\n", path.read_bytes() + b'{"key": 1}\n'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            Record(path, {"network": "a"})


# ---------------------------------------------------------------------------------------------------------------------
# The time limit


def test_estimates_are_those_of_the_last_measurement_with_a_margin():
    costs = Costs()
    costs.seconds_of_image = 0.5
    assert costs.estimate({"simulation": 10}) == pytest.approx(1.2 * 10 * 0.5)
    costs.note("simulation", 100, 20)
    assert costs.estimate({"simulation": 10}) == pytest.approx(1.2 * 2)


class StubRunner:
    """A runner whose epochs take 10 seconds each, on a clock that goes on by them."""

    def __init__(self, clock):
        self.shared, self.clock, self.ann_hits, self.started = Shared("example_net", {}), clock, [True], []
        self.images = SimpleNamespace(train=None)

    def estimate(self, args, left):
        return 1 + 10 * args.spike_epochs_unlabelled

    def run(self, trial, rivals, limits, clock):
        args = self.shared.args(trial)
        assert self.estimate(args, 0) <= clock.left()
        self.clock.now += self.estimate(args, 0)
        self.started.append(trial)
        return Row(
            trial.key(), trial.timesteps, trial.bits, trial.flags, trial.preset, hits=[True], costs=[["a", 1, 2]]
        )


class StubClock:
    minutes, now = 1, 0

    def left(self):
        return 100 - self.now


def test_nothing_starts_that_would_not_end_in_time_and_epochs_are_halved(tmp_path, capsys):
    clock = StubClock()
    runner, record = StubRunner(clock), Record(tmp_path / "trials.jsonl", {})
    groups = {(2, "8"): plan(runner.shared, 2, "8")}
    left_out = order.search(runner, record, groups, Limits(), clock)
    assert 0 <= clock.left() < 11
    late = {each.trial.name(): each.seconds for each in left_out if each.reason == order.TIME}
    assert late["--preset calibrated"] == 201
    assert any(trial.flags.get("spike_epochs_unlabelled") == "5" for trial in runner.started)
    assert {each.trial.preset for each in left_out if "labels" in each.reason} == {"finetuned", "specification"}
    assert "T=2, 8 bits, --preset exact: 100.00 % of 1 images" in capsys.readouterr().err
    started, clock.now = list(runner.started), -1000  # the same command again, with more time
    assert all(each.reason != order.TIME for each in order.search(runner, record, groups, Limits(), clock))
    again = runner.started[len(started) :]
    assert not {trial.key() for trial in again} & {trial.key() for trial in started}
    assert "calibrated" in {trial.preset for trial in again}


def test_numbers_of_timesteps_share_the_time(tmp_path):
    clock = StubClock()
    runner, record = StubRunner(clock), Record(tmp_path / "trials.jsonl", {})
    groups = {(T, "8"): plan(runner.shared, T, "8") for T in (2, 4, 8)}
    order.search(runner, record, groups, Limits(), clock)
    trials = [(each.timesteps, runner.shared.args(each)) for each in runner.started]
    epochs = [(T, args.preset, args.spike_epochs_unlabelled) for T, args in trials if args.spike_epochs_unlabelled]
    # of about 77 seconds each gets a third; alone, T=2 would have taken 51 for 5 epochs
    assert epochs[:3] == [(2, "calibrated", 2), (4, "calibrated", 2), (8, "calibrated", 2)]


def test_halves_end_at_one_epoch_and_the_clock_leaves_time_to_write():
    shared = Shared("example_net", {})
    trial, epochs = Trial(8, "8", {"preset": "calibrated"}, "calibrated"), []
    while trial is not None:
        epochs.append(shared.args(trial).spike_epochs_unlabelled)
        trial = with_fewer_epochs(trial, shared.args(trial))
    assert epochs == [10, 5, 2, 1]
    assert 53 < Clock(1, start=time.monotonic()).left() <= 54 and Clock(0).left() <= 0


# ---------------------------------------------------------------------------------------------------------------------
# Whole searches


def run_search(*argv):
    search.main(search.parse_args([*COMMAND, *argv]))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()][1:]


def test_the_winners_command_gives_the_accuracy_that_was_recorded(tmp_path, capsys, monkeypatch):
    """And no test image is read: the largest set of images is the training set, from which all images come."""
    read, getitems = set(), ImageDataset.__getitems__

    def noted(self, indices):
        read.add(len(self))
        return getitems(self, indices)

    monkeypatch.setattr(ImageDataset, "__getitems__", noted)
    run_search("--minutes", "90", "--out", f"{tmp_path}", "--listen", "0")
    assert read == {1438}  # 359 are test images
    printed = capsys.readouterr().out
    commands = [line.split() for line in (tmp_path / "commands.txt").read_text().splitlines() if line[0] != "#"]
    assert all(" ".join(command) in printed for command in commands)
    assert {path.name for path in tmp_path.iterdir()} == {"front.png", "trials.jsonl", "commands.txt"}
    for command in commands:
        args = ann2snn.parse_args(command[2:])
        choose_input(args)
        loaders = get_dataset(args)[2:]
        net, args = load_network(args, *loaders)
        made = Networks(net)
        quantize(args, made, loaders, torch.nn.CrossEntropyLoss(), "cpu")
        snn = convert_by_options(made.qnet, loaders[1], "cpu", args)
        images, labels = (torch.cat(parts)[60:180] for parts in zip(*loaders[1]))
        hits = (snn(images).argmax(1) == labels).tolist()
        assert "".join(str(int(hit)) for hit in hits) in {each["hits"] for each in rows_of(tmp_path)}
    run_search("--minutes", "0", "--out", f"{tmp_path}", "--listen", "0")  # prints what is there
    assert capsys.readouterr().out.splitlines()[:3] == printed.splitlines()[:3]


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_stopped(tmp_path, capsys):
    own = ["--out", str(tmp_path), "--listen", "0", "--minutes", "90"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    file, silent = tmp_path / "trials.jsonl", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen([sys.executable, "search.py", *COMMAND, *own], cwd=ROOT, env=environment, **silent)
    while killed.poll() is None and not (file.exists() and file.read_text().count("\n") >= 2):
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    before = [line for line in file.read_text().splitlines(True) if line.endswith("\n")]
    run_search(*own)
    after = file.read_text().splitlines(True)
    assert after[: len(before)] == before and len(after) > len(before)
    keys = [each["key"] for each in rows_of(tmp_path)]
    assert len(set(keys)) == len(keys)
    printed = capsys.readouterr().out
    assert "most accurate" in printed and "no time left" not in printed


def test_rows_over_a_limit_are_left_out_and_say_so(tmp_path, capsys):
    run_search("--minutes", "90", "--out", f"{tmp_path}", "--max_latency", "2", "--listen", "2")
    printed = capsys.readouterr().out
    assert "--max_latency: 12 steps" in printed and "python3" not in printed
    assert all(each["refused"] and not each["hits"] for each in rows_of(tmp_path))
    refused = [SimpleNamespace(key=lambda each=each: each["key"]) for each in rows_of(tmp_path)]
    record = SimpleNamespace(rows={each["key"]: Row.from_dict(each) for each in rows_of(tmp_path)})
    assert all(order.is_done(each, record, Limits(latency=2)) for each in refused)
    assert not any(order.is_done(each, record, Limits()) for each in refused)  # tried again without the limit


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nonet"], "unknown network 'nonet'"),
        (["example_net", "--timesteps", "0"], "0 is not a whole number from 1 to 65536"),
        (["example_net", "--weight_bitwidth", "4", "9"], "9 is not a whole number from 1 to 8"),
        (["example_net", "--minutes", "-1"], "use a number from 0 to 10080"),
        (["example_net", "--listen", "9", "--timesteps", "4"], "--listen 9 is over --timesteps 4, use 0 to 4"),
        (["yolo_tiny", "--dataset", "COCO"], "the search is for classifiers, --dataset COCO has boxes"),
        (["example_net", "--out", f"{ROOT}/search.py"], "search.py is a file, name a folder"),
        (["example_net", "--preset", "exakt"], "did you mean exact?"),
    ],
)
def test_a_wrong_line_ends_in_one_error(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(search.main, search.parse_args(argv))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith("error: ") and message in error


def test_the_help_is_short(capsys):
    with pytest.raises(SystemExit):
        search.parse_args(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 66
