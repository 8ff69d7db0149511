"""Several processes share a run: the parts of batches, their gradients, what is measured, and how a run ends.

`across` forks processes that meet by gloo; the slow tests start ann2snn.py and train_ann.py with torchrun.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ann_parser import parse_ann_model
from datasets import get_dataset
from finetuning.on_spikes import finetune_spikes
from inputs.user_data import UserLoader
from quantization import quantize_finetune
from runtime import processes
from runtime.batches import GroupedLoader
from runtime.processes import ProcessEnded, average_gradients, exchange, from_first, numbered, own_batches, shares
from snn_weight_setter import trans_ann2snn_weight
from validate import evaluate

WEIGHTS = "checkpoint/example_net_ann.pth"


def across(count, work):
    """The results of `work()` in `count` processes that share a run, in their order. An error there fails the test.

    The result of a process that was killed is "killed".
    """
    context, store = multiprocessing.get_context("fork"), torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]

    def one(rank):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "TORCHELASTIC_USE_AGENT_STORE": True}
        os.environ.update({key: str(value) for key, value in environment.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
        torch.set_num_threads(1)  # threads do not survive a fork
        try:
            processes.join("cpu")
            answer = pickle.dumps((work(), None))
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
        pipes[rank][1].send_bytes(answer)

    workers = [context.Process(target=one, args=(rank,)) for rank in range(count)]
    for worker in workers:
        worker.start()
    answers = []
    for worker, (receiver, _) in zip(workers, pipes):
        while worker.is_alive() and not receiver.poll(0.02):
            pass
        answers.append(pickle.loads(receiver.recv_bytes()) if receiver.poll() else ("killed", None))
    for worker in workers:
        worker.kill()
    errors = [error for _, error in answers if error]
    assert not errors, errors[0]
    return [result for result, _ in answers]


# ---------------------------------------------------------------------------------------------------------------------
# Parts of batches


@given(st.integers(0, 40), st.integers(2, 9))
def test_parts_make_up_a_batch(size, count):
    """A batch with fewer samples than processes is computed by all alike."""
    batch, parts = list(range(size)), []
    for rank in range(count):
        with mock.patch.dict(processes.GROUP, {"rank": rank, "count": count}):
            parts.append(batch[processes.part_of(size)])
    if size < count:
        assert parts == [batch] * count
    else:
        assert [each for part in parts for each in part] == batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


class Noted(Dataset):
    """20 samples that are their own numbers, and the numbers that were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 20

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor([float(index)]), index


def stream():
    """Batches that only one process can read: another would find other ones."""
    generator = torch.Generator().manual_seed(os.getpid())
    return ((torch.rand(size, 1, generator=generator), [0] * size) for size in (5, 5, 5, 1))


PAIRS = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20.0)[:, None], torch.arange(20))
LOADERS = {
    "in order": lambda: DataLoader(Noted(), 6),
    "shuffled": lambda: DataLoader(Noted(), 6, shuffle=True),
    "with a generator": lambda: DataLoader(Noted(), 7, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "with workers": lambda: DataLoader(Noted(), 6, num_workers=1),
    "the user's": lambda: UserLoader(DataLoader(Noted(), 6, shuffle=True), None),
    "several inputs": lambda: GroupedLoader(DataLoader(PAIRS, 6, shuffle=True), ("a", "b")),
    "a list": lambda: [(torch.arange(6.0)[:, None], [0] * 6), (torch.arange(6.0, 7)[:, None], [1])],
    "dicts": lambda: [{"image": torch.arange(6.0)[:, None], "label": torch.arange(6)}],
    "a stream": stream,
}


def first_input(batch):
    """The numbers of a batch, and of its labels where they are the same."""
    if isinstance(batch, dict):
        assert torch.equal(batch["image"][:, 0].long(), batch["label"])
        return batch["image"][:, 0].tolist()
    inputs, labels = batch[0], batch[1]
    assert len(labels) == len(inputs[0] if isinstance(inputs, (tuple, list)) else inputs)
    return (inputs[0] if isinstance(inputs, (tuple, list)) else inputs)[:, 0].tolist()


def read_shares(name):
    torch.manual_seed(os.getpid())  # the order is the first process's
    loader, plain = LOADERS[name](), LOADERS[name]()
    dataset = getattr(loader, "dataset", None)
    found = [[first_input(batch) for batch in shares(loader)] for _ in range(2)]
    own = [(number, first_input(batch)) for number, batch in numbered(own_batches(plain))]
    return found, own, dataset.read if isinstance(dataset, Noted) and not loader.num_workers else None


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_is_shared(name):
    """Both passes hold every sample once, the second in another order if it shuffles; each process reads its own."""
    (found, own, read), (other, other_own, other_read) = across(2, lambda: read_shares(name))
    passes = [[a if a == b else a + b for a, b in zip(*both)] for both in zip(found, other)]
    sizes = {"with a generator": [7, 7, 6], "a list": [6, 1], "dicts": [6], "a stream": [5, 5, 5, 1]}.get(name)
    assert [len(batch) for batch in passes[0]] == (sizes or [6, 6, 6, 2])
    if name != "a stream":
        total = range(20) if name not in ("a list", "dicts") else range(sum(sizes))
        assert all(sorted(number for batch in each for number in batch) == list(total) for each in passes)
        assert (passes[0] != passes[1]) == (name in ("shuffled", "with a generator", "the user's", "several inputs"))
    merged = dict(own) | dict(other_own)
    assert sorted(merged) == list(range(len(own) + len(other_own)))
    assert [len(merged[number]) for number in sorted(merged)] == (sizes or [6, 6, 6, 2])
    if read:
        assert set(read[: len(read) // 2]) & set(other_read[: len(other_read) // 2]) == set()


def test_the_order_is_that_of_one_process():
    def order():
        loader = DataLoader(Noted(), 6, shuffle=True, generator=torch.Generator().manual_seed(3))
        return [first_input(batch) for _ in range(2) for batch in shares(loader)]

    alone, (a, b) = order(), across(2, order)
    assert [x + y for x, y in zip(a, b)] == alone


def test_random_numbers_differ_between_processes_and_come_again():
    """So that augmentations are not the same in every part, and a run gives the same twice."""

    def draw():
        torch.manual_seed(0)
        loader = DataLoader(Noted(), 6, shuffle=True, generator=torch.Generator().manual_seed(3))
        return [torch.rand(1).item() for _ in range(2) for batch in shares(loader)]

    (a, b), again = across(2, draw), across(2, draw)
    assert not set(a) & set(b) and [a, b] == again


# ---------------------------------------------------------------------------------------------------------------------
# Values


class Marked(nn.Module):
    """Losses of samples: of a weight, of one more where a sample is marked, of none that is frozen or unused."""

    def __init__(self):
        super().__init__()
        self.weight, self.marked, self.frozen, self.unused = (nn.Parameter(torch.ones(3)) for _ in range(4))
        self.frozen.requires_grad_(False)

    def forward(self, x, mark):  # [B, 3], [B]
        losses = (x @ (self.weight * self.frozen)).square()
        return losses + mark * (x @ self.marked) if mark.any() else losses


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("size", [1, 6, 7])
def test_gradients_are_those_of_the_whole_batch(count, size):
    images, mark = torch.randn(size, 3), torch.arange(size) == size - 1

    def gradients():
        net = Marked()
        for part, marks in shares([(images, mark)]):
            net(part, marks).mean().backward()
            average_gradients(net.parameters(), len(part))
        return [p.grad for p in net.parameters()]

    expected, found = gradients(), across(count, gradients)
    for weight, marked, *others in found:
        assert torch.allclose(weight, expected[0]) and torch.allclose(marked, expected[1])
        assert torch.equal(weight, found[0][0]) and torch.equal(marked, found[0][1]) and others == [None, None]


def test_values_go_round():
    def work():
        rank = processes.rank()
        processes.start_alike(net := nn.Linear(2, 2))
        norm = nn.BatchNorm1d(2)
        norm.running_mean.fill_(rank)
        processes.average_buffers(norm)
        return exchange(rank), processes.sums(rank, 1), from_first(lambda: rank), net.weight, norm.running_mean.tolist()

    results = across(3, work)
    for found in results:
        assert found[:3] == ([0, 1, 2], [3.0, 3.0], 0) and torch.equal(found[3], results[0][3])
        assert found[4] == [1.0, 1.0]


def test_one_process_is_given_back_what_it_gives():
    loader, net = [1], nn.Linear(1, 1)
    assert shares(loader) is loader and own_batches(loader) is loader and from_first(lambda: net) is net
    assert processes.sums(3, 0.5) == [3, 0.5] and processes.is_first() and processes.leave()
    processes.average_gradients(net.parameters(), 1)
    assert net.weight.grad is None and not torch.distributed.is_initialized()


def test_weights_that_differ_end_the_run():
    def work():
        with pytest.raises(ValueError) as error:
            processes.check_alike(nn.Linear(1, 1).requires_grad_(processes.rank() < 0))
        return str(error.value)

    def start():
        torch.manual_seed(os.getpid())
        return work()

    assert (
        across(2, start)
        == ["the weights differ between the processes, start all of them on processors of one kind"] * 2
    )


@pytest.mark.parametrize("silent", [False, True])
def test_the_last_line_is_one_write(silent, monkeypatch):
    """torchrun writes on the same stream at that moment, and without a buffer each write goes out alone."""
    written = []
    stream = SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stderr", stream)
    if silent:
        monkeypatch.setitem(processes.SPEAKERS, "stderr", stream)
    processes.say_last("error: no")
    assert list(filter(None, written)) == ["\nerror: no\n" if silent else "error: no\n"]


def test_a_process_that_has_ended_is_noticed():
    def work():
        if processes.rank():
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(ProcessEnded, match="another process of the run ended"):
            exchange(1)
        return processes.fails_first(), processes.fails_first()

    assert across(2, work) == [(True, False), "killed"]


# ---------------------------------------------------------------------------------------------------------------------
# Steps of the pipeline


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes of `across`: the order in which floats are added depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small():
    """A traced network for the digits, and loaders of them: training without augmentation, test, calibration."""
    torch.manual_seed(0)
    args = {"dataset": "digits", "image_size": 8, "augment": "none", "test_batch_size": 70}
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 10)
    )

    def loaders(batch_size):
        test, _, train, calibration = get_dataset(SimpleNamespace(batch_size=batch_size, **args))
        return train, test, calibration

    return parse_ann_model(net, (torch.zeros(1, 1, 8, 8),)), loaders


@pytest.mark.parametrize("count, batch_size", [(2, 128), (3, 100)])
def test_training_and_measuring_are_those_of_one_process(small, count, batch_size):
    """The training without augmentation but for the order in which floats are added, the measurement bit for bit."""
    net, loaders = small
    criterion, args = nn.CrossEntropyLoss(), SimpleNamespace(finetune_epochs=1, weight_bitwidth=8)

    def work():
        train, test, calibration = loaders(batch_size)
        qnet = quantize_finetune(net, train, criterion, "cpu", args)
        snn = from_first(lambda: trans_ann2snn_weight(net, calibration, "cpu", 8, 4))
        result = evaluate(snn, test, "cpu", criterion, 8, every_step=True)
        trained = finetune_spikes(snn, calibration, "cpu", 1, teacher=net, qnet=None)
        weights = [layer.weight for layer in (*qnet.weighted_layers().values(), *trained.weighted_layers().values())]
        shadows = [layer.weight.weight_back for layer in qnet.weighted_layers().values()]
        return shadows, [w.detach() for w in weights], result, [n.Vthr for n in snn.neurons().values()]

    shadows, _, result, thresholds = work()
    found = across(count, work)
    for other in found:
        assert all(torch.equal(a, b) for a, b in zip(other[1], found[0][1]))
        assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(other[0], shadows))
        assert other[2] == result and all(torch.equal(a, b) for a, b in zip(other[3], thresholds))


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(count, *arguments):
    """The command of a run in one process, or of torchrun in several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    return [sys.executable, *torchrun * (count > 1), *map(str, arguments)]


def start(count, *arguments):
    """The end of a run in the repository's root."""
    return subprocess.run(
        command(count, *arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def lines_of(stderr):
    """What a run itself said on stderr, without bars and the report of torchrun."""
    return [line for line in re.split(r"[\r\n]", stderr) if re.match("error|warning|interrupted|preset|epoch", line)]


LEAVES = """
import os, torch
from runtime import processes

started = len(os.listdir("/proc/self/task"))
processes.join("cpu")
torch.optim.SGD([torch.ones(1, requires_grad=True)])  # imports most of torch, which then knows the group
together = len(os.listdir("/proc/self/task"))
first = processes.leave()
ended = len(os.listdir("/proc/self/task")) == started
print(f"rank {0 if first else 1}: {together > started}, {ended}\\n", end="", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_no_thread_of_the_group_is_left_at_the_end(tmp_path):
    """One that Python's end meets aborts the process now and then, after its work is done."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    run = start(2, script)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["rank 0: True, True", "rank 1: True, True"]


@pytest.mark.slow  # test_runtime.py asserts the same line of another script, without torchrun
def test_other_scripts_run_in_one_process():
    run = start(2, "show.py", "none.pth")
    assert run.returncode and lines_of(run.stderr) == [
        "error: started as one of 2 processes (WORLD_SIZE), start it without torchrun"
    ]


CONVERT = ["ann2snn.py", "example_net", "--ann_weight", WEIGHTS, "--device", "cpu"]


@pytest.mark.slow
def test_the_report_needs_one_process(tmp_path):
    run = start(2, *CONVERT, "--report", str(tmp_path / "report"))
    assert run.returncode and lines_of(run.stderr) == [
        "error: --report is for a run of one process, this one has 2: leave it out, and give --report in a second run "
        "with --qnet"
    ]


@pytest.mark.slow
def test_without_training_the_result_is_that_of_one_process(tmp_path):
    """The file byte for byte, with thresholds and weights, and every figure."""
    printed, files, results = [], [], []
    for count in (1, 2, 3):
        file, numbers = tmp_path / "snn.pth", tmp_path / "results.json"
        run = start(count, *CONVERT, "-e", "0", "--save_file", file, "--results", numbers)
        assert run.returncode == 0, run.stderr
        printed.append(run.stdout)
        files.append(file.read_bytes())
        results.append({key: value for key, value in json.loads(numbers.read_text()).items() if key != "seconds"})
    assert printed[0] == printed[1] == printed[2] and "SNN, T=16      98.33" in printed[0]
    assert files[0] == files[1] == files[2] and results[0] == results[1] == results[2]


@pytest.mark.slow
@pytest.mark.parametrize("count, batch_size", [(2, 128), (3, 100)])
def test_the_accuracy_after_training_is_that_of_one_process(count, batch_size, tmp_path):
    """Within 1 point, of which 360 images make 3.6: another seed moves it as much. All processes end alike."""
    flags = ["-e", "2", "--spike_epochs", "1", "--activation_levels", "8", "--timesteps", "8"]
    top1 = []
    for number in (1, count):
        numbers = tmp_path / "results.json"
        own = [*flags, "--batch_size", batch_size, "--results", numbers, "--save_file", tmp_path / "snn.pth"]
        run = start(number, *CONVERT, *own)
        assert run.returncode == 0, run.stderr
        top1.append([json.loads(numbers.read_text())[f"{name}_top1"] for name in ("ann", "qnet", "snn")])
    assert top1[0][0] == top1[1][0] and min(top1[0]) > 96
    assert all(abs(one - several) < 1 for one, several in zip(*top1))
    assert not (tmp_path / "snn.pth.state").exists()


@pytest.mark.slow
def test_train_ann(tmp_path):
    """The same number of steps, whose BatchNorms see half of a batch each; a teacher and averaged weights too."""
    file = tmp_path / "ann.pth"
    own = ["--epochs", "2", "--val_share", "0.1", "--average", "1", "--save_file", file, "--device", "cpu"]
    run = start(2, "train_ann.py", "example_net", "--lr", "0.01", "--ann_weight", WEIGHTS, *own)
    assert run.returncode == 0, run.stderr
    assert len([line for line in lines_of(run.stderr) if line.startswith("epoch")]) == 2
    assert float(re.search(r"test top-1 ([\d.]+) %", run.stdout)[1]) > 95 and run.stdout.count("saved") == 1
    assert torch.load(file, weights_only=True)["epochs"] == 2 and os.listdir(tmp_path) == ["ann.pth"]


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_run_goes_on_behind_a_process_that_died(dies, tmp_path):
    """One line names the state; with --resume the result is that of a run that nothing cut off, byte for byte."""
    file, state = tmp_path / "snn.pth", tmp_path / "snn.pth.state"
    flags = [*CONVERT, "-e", "8", "--save_file"]
    with (tmp_path / "stderr").open("w+") as stderr:
        run = subprocess.Popen(command(2, *flags, file), cwd=ROOT, env=ENVIRONMENT, stderr=stderr)
        while not state.exists() and run.poll() is None:
            time.sleep(0.05)
        os.kill(children(run.pid)[dies], signal.SIGKILL)
        run.wait()
    said = lines_of((tmp_path / "stderr").read_text())
    how = f"no result is half-written; --resume goes on from {state}"
    assert len(said) == 1 and said[0].endswith(how) and "another process" in said[0]
    assert run.returncode == 1 and sorted(os.listdir(tmp_path)) == ["snn.pth.state", "stderr"]
    resumed = start(2, *flags, file, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole = start(2, *flags, tmp_path / "whole.pth")
    assert whole.returncode == 0 and file.read_bytes() == (tmp_path / "whole.pth").read_bytes()
    assert not state.exists()


def children(parent):
    """Rank -> process id of the processes that torchrun started."""
    found = {}
    for number in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            names = dict(x.split("=", 1) for x in Path(f"/proc/{number}/environ").read_text().split("\0") if "=" in x)
            if int(fields[1]) == parent and "RANK" in names:
                found[int(names["RANK"])] = int(number)
    return found
