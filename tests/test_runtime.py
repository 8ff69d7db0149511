"""What a run does when the world around it fails: streams, disks, signals, memory, workers, packages, odd flags."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import analyse_error
import ann2snn
import hw_constraints
import train_ann
from reports.analysis import Analysis, write_report
from runtime.cli import run_script
from runtime.failures import in_one_line, squeeze
from runtime.files import check_room, check_writable, write_atomically, write_folder
from runtime.memory import trim_of_glibc
from runtime.packages import check_packages

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
DEBUG = [sys.executable, "ann2snn.py", "debug_net0", "--dataset", "debug0", "-e", "0", "--save_file"]

# a script as the others are, whose work is one file
WORK = """
import sys
from tqdm import tqdm
from runtime.cli import OneLineParser, run_script
from runtime.files import write_json

def main(args):
    print("begins", flush=True)
    for step in tqdm(range(3), "work", disable=False):
        print("warning: step", step, file=sys.stderr)
    write_json(args.file, {"done": True})
    print("saved", chr(0xDCFF))

parser = OneLineParser()
parser.add_argument("file")
parser.add_argument("--debug", action="store_true")
run_script(main, parser.parse_args())
"""


def python(script, *arguments, **options):
    """A Python process that runs the text of a script in the repository's root."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options)


def refused(capsys, main, args):
    """The one line on stderr with which a script ends."""
    with pytest.raises(SystemExit) as end:
        run_script(main, args)
    line = capsys.readouterr().err.strip()
    assert end.value.code == 2 and line.startswith("error: ") and "\n" not in line
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Streams


@pytest.mark.parametrize(
    "redirection",
    ["", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "| true", "2>&1 | true", "2>&1 >&- | true"],
)
def test_a_closed_stream_does_not_stop_the_work(tmp_path, redirection):
    (tmp_path / "work.py").write_text(WORK)
    command = f"set -o pipefail; {sys.executable} {tmp_path}/work.py {tmp_path}/out.json {redirection}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0 and "Error" not in run.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == {"done": True}
    if redirection in ("", "2>&-"):
        assert run.stdout == "begins\nsaved \\udcff\n"


def test_a_full_stdout_is_one_line_after_the_work(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    command = f"{sys.executable} {tmp_path}/work.py {tmp_path}/out.json >/dev/full 2>{tmp_path}/errors"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT)
    assert run.returncode == 2 and (tmp_path / "out.json").exists()
    line = (tmp_path / "errors").read_text().splitlines()[-1]
    assert line.startswith("error: cannot print on stdout (No space left on device)")


@pytest.mark.parametrize("redirection, status", [("| true", 0), (">&-", 0), (">/dev/full", 2)])
def test_help_that_cannot_be_printed(redirection, status):
    command = f"set -o pipefail; {sys.executable} ann2snn.py --help {redirection}"
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == status and run.stderr.count("\n") == (status == 2)


@pytest.mark.slow
def test_a_conversion_is_saved_before_it_is_printed(tmp_path):
    save, results = tmp_path / "snn.pth", tmp_path / "results.json"
    read, write = os.pipe()
    os.close(read)  # nobody reads
    command = [*DEBUG, str(save), "--results", str(results)]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (0, "") and save.exists() and results.exists()


def test_the_work_is_saved_where_printing_fails(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise BrokenPipeError

    save = tmp_path / "snn.pth"
    monkeypatch.setattr(ann2snn, "print_layers", fail)
    with pytest.raises(BrokenPipeError):  # main itself, as a library calls it
        ann2snn.main(ann2snn.parse_args([*DEBUG[2:], str(save)]))
    assert save.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Full disks; a limit on the size of files fails in the same calls as a full disk


def limited(size):
    """What a child process does first: no file of it may be larger than `size`."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


TOO_LARGE = """
import sys, torch
from runtime.files import *

def fails(write, *arguments):
    try:
        write(path, *arguments)
    except OSError as error:
        print(error)

path = sys.argv[1]
fails(write_json, list(range(9999)))
fails(write_torch, torch.zeros(9999))
fails(write_atomically, lambda temporary: torch.save(torch.zeros(9999), temporary))
"""


@pytest.mark.slow
def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    run = python(TOO_LARGE, tmp_path / "file", preexec_fn=limited(5000))
    lines = run.stdout.splitlines()
    assert len(lines) == 3, run.stderr
    for line in lines:
        assert line.startswith(f"cannot write {tmp_path}/file (") and line.endswith("or name another place")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_report_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path):
    (tmp_path / "report.html").write_text("old")
    call = "write_folder(sys.argv[1], {'a.png': b'1', 'report.html': bytes(9999)})"
    run = python(f"import sys\nfrom runtime.files import *\n{call}", tmp_path, preexec_fn=limited(5000))
    assert run.stderr.splitlines()[-1].startswith(f"OSError: cannot write {tmp_path}/report.html (File too large)")
    assert os.listdir(tmp_path) == ["report.html"] and (tmp_path / "report.html").read_text() == "old"


@pytest.mark.slow
@pytest.mark.parametrize("limit, words", [(1000, ["File too large"]), (50, ["it needs", "ulimit -f"])])
def test_a_network_that_does_not_fit_is_one_line(tmp_path, limit, words):
    save = tmp_path / "snn.pth"
    save.write_text("old")
    options = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True}
    run = subprocess.run([*DEBUG, str(save)], preexec_fn=limited(limit), **options)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.startswith(f"error: cannot write {save}")
    assert run.stderr.count("\n") == 1 and all(word in run.stderr for word in words)
    assert os.listdir(tmp_path) == ["snn.pth"] and save.read_text() == "old"


def test_an_error_of_the_results_says_that_the_network_is_written(tmp_path, capsys, monkeypatch):
    def fail_for_results(source, target, replace=os.replace):
        if target == str(results):
            raise OSError(28, "No space left on device")
        replace(source, target)

    save, results = tmp_path / "snn.pth", tmp_path / "results.json"
    monkeypatch.setattr("runtime.files.os.replace", fail_for_results)
    line = refused(capsys, ann2snn.main, ann2snn.parse_args([*DEBUG[2:], str(save), "--results", str(results)]))
    assert line == (
        f"error: cannot write {results} (No space left on device), free some room or name another place; "
        f"written before: {save}"
    )
    assert os.listdir(tmp_path) == ["snn.pth"]


def test_a_folder_that_could_not_be_filled_does_not_stay(tmp_path):
    call = "write_folder(sys.argv[1], {'report.html': bytes(9999)})"
    run = python(f"import sys\nfrom runtime.files import *\n{call}", tmp_path / "report", preexec_fn=limited(5000))
    assert "report/report.html (File too large)" in run.stderr and os.listdir(tmp_path) == []


def test_a_report_may_name_a_file_whose_name_is_no_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.figures.draw_charts", lambda *args: {})
    monkeypatch.setattr("reports.html.report_page", lambda *args: "<p>/data/\udcff.pth</p>")
    write_report(str(tmp_path), Analysis({"name": "\udcff", "seconds": {"conversion": {}, "estimate": 1.0}}, {}))
    assert (tmp_path / "report.html").read_text() == "<p>/data/\\udcff.pth</p>"
    assert json.loads((tmp_path / "report.json").read_text())["name"] == "\udcff"


def test_room_is_looked_for(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    monkeypatch.setattr("runtime.files.shutil.disk_usage", lambda folder: SimpleNamespace(free=3 * 2**20))
    check_room(path, 3 * 2**20)
    with pytest.raises(
        OSError, match=f"cannot write {path}, it needs 4,194,304 bytes and {tmp_path} has 3,145,728 left"
    ):
        check_room(path, 4 * 2**20)


# ---------------------------------------------------------------------------------------------------------------------
# Signals, and what killed processes leave

STOPPED = """
import os, signal, sys
from types import SimpleNamespace
from runtime.cli import run_script
from runtime.files import write_atomically

def write(temporary):
    open(temporary, "w").write("half")
    os.kill(os.getpid(), int(sys.argv[2]))

def main(args):
    write_atomically(sys.argv[1], write)

run_script(main, SimpleNamespace(debug=False))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_as_an_interrupt_does(tmp_path, number):
    (tmp_path / "file").write_text("old")
    # whoever runs the tests may ignore signals, as nohup does
    run = python(STOPPED, tmp_path / "file", int(number), preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    assert (run.returncode, run.stderr) == (128 + number, "interrupted, no result is half-written\n")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_run_under_nohup_goes_on(tmp_path):
    run = python(STOPPED, tmp_path / "file", 1, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (run.returncode, run.stderr) == (0, "") and (tmp_path / "file").read_text() == "half"


@pytest.mark.slow
def test_a_training_that_is_terminated_keeps_its_last_epoch(tmp_path):
    command = [sys.executable, "train_ann.py", "debug_net0", "--dataset", "debug0", "--epochs", "1000000"]
    save = [*command, "--save_file", str(tmp_path / "ann.pth")]
    run = subprocess.Popen(save, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if line.startswith("epoch 3/"):
            break
    run.terminate()
    assert run.communicate(timeout=60)[1].splitlines()[-1] == "interrupted, no result is half-written"
    assert run.returncode == 143 and sorted(os.listdir(tmp_path)) == ["ann.pth.part", "ann.pth.state"]
    assert torch.load(tmp_path / "ann.pth.part", weights_only=True)["epochs"] >= 2


def dead_process():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path):
    path, dead = tmp_path / "snn.pth", dead_process()
    running = subprocess.Popen(["sleep", "60"])
    stays = [f"snn.pth.{running.pid}.tmp", f"snn.pth.{dead}.tmp.old", f"xsnn.pth.{dead}.tmp", "snn.pth.0.tmp"]
    stays += [f"snn.pth.0{dead}.tmp", "snn.pth.tmp", f"snnxpth.{dead}.tmp", "snn.pth.9999999999.tmp", "snn.pth.-1.tmp"]
    stays += ["snn.pth.1.tmp"]  # init runs
    try:
        for name in [*stays, f"snn.pth.{dead}.tmp", f"snn.pth.{os.getpid()}.tmp"]:
            (tmp_path / name).write_text("half")
        check_writable(str(path))
        write_atomically(str(path), lambda temporary: Path(temporary).write_text("new"))
    finally:
        running.kill()
        running.wait()
    assert sorted(os.listdir(tmp_path)) == sorted([*stays, "snn.pth"])


def test_a_folder_that_a_dead_process_left_in_a_report_is_removed(tmp_path):
    for name in (f"new.{dead_process()}.tmp", f"new.{os.getpid()}.tmp", "new.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_text("half")
    write_folder(str(tmp_path), {"a.png": b"whole"})
    assert sorted(os.listdir(tmp_path)) == ["a.png", "new.tmp"]


def test_a_link_or_a_pipe_with_such_a_name_stays(tmp_path):
    (tmp_path / "precious").write_text("1")
    link, pipe = tmp_path / f"file.{dead_process()}.tmp", tmp_path / f"file.{dead_process()}.tmp"
    link.symlink_to(tmp_path / "precious")
    os.mkfifo(pipe)
    check_writable(str(tmp_path / "file"))
    assert link.is_symlink() and pipe.is_fifo() and (tmp_path / "precious").read_text() == "1"


# ---------------------------------------------------------------------------------------------------------------------
# Memory, workers, packages


def failing(error):
    def main(args):
        raise error

    return main


def caused(error, cause):
    error.__cause__ = cause
    return error


NO_MEMORY = {
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 274877906816 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "windows": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": MemoryError(),
    "fork": OSError(12, "Cannot allocate memory"),
    "wrapped": caused(ValueError("net cannot run on images"), RuntimeError("CUDA out of memory. Tried ...")),
}


@pytest.mark.parametrize("name", NO_MEMORY)
def test_out_of_memory_names_the_flags_that_help(capsys, name):
    line = refused(capsys, failing(NO_MEMORY[name]), ann2snn.parse_args(["debug_net0"]))
    assert line.startswith("error: out of memory") and "\n" not in line
    flags = ["--test_batch_size", "--batch_size", "--memory_budget", "--calibration_samples"]
    assert all(flag in line for flag in flags)
    assert ("--device cpu" in line) == (name in ("gpu", "cublas", "wrapped"))
    sizes = {"cpu": "274877906816 bytes", "gpu": "2.00 GiB"}
    assert sizes.get(name, "memory") in line


@pytest.mark.parametrize("classes", [2147483647, 2**30])
def test_classes_that_no_memory_holds(capsys, classes):
    args = hw_constraints.parse_args(["debug_net0", "--num_classes", str(classes)])
    line = refused(capsys, failing(NO_MEMORY["cpu"]) if classes == 2**30 else hw_constraints.main, args)
    assert "out of memory" in line and "--num_classes" in line and "--batch_size" not in line


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run_script(failing(RuntimeError("shapes do not match")), ann2snn.parse_args(["debug_net0"]))
    with pytest.raises(MemoryError):
        run_script(failing(MemoryError()), ann2snn.parse_args(["debug_net0", "--debug"]))


class Failing(Dataset):
    """Raises an error, or ends the process, at every image."""

    def __init__(self, error=None):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.error is None:
            os._exit(3)
        raise self.error


@pytest.mark.parametrize(
    "error, words",
    [
        (None, "exited unexpectedly"),
        (
            OSError("cannot read the image a.png (cut), repair or remove it"),
            "error: cannot read the image a.png (cut), ",
        ),
        (KeyError("label"), "error: 'label', in a worker of --num_workers 1"),
    ],
)
def test_a_worker_that_fails_is_one_line(capsys, error, words):
    def main(args):
        list(DataLoader(Failing(error), num_workers=1))

    line = refused(capsys, main, ann2snn.parse_args(["debug_net0", "--num_workers", "1"]))
    assert words in line and "Traceback" not in line and "File " not in line


@pytest.mark.parametrize("package", ["seaborn", "matplotlib"])
@pytest.mark.parametrize("script, flag", [(ann2snn, "--report"), (analyse_error, "analyse_error.py")])
def test_packages_of_a_report_are_looked_for_before_the_work(tmp_path, capsys, monkeypatch, package, script, flag):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("datasets.get_dataset", failing(AssertionError("the work has begun")))
    argv = ["debug_net0", "--dataset", "debug0"]
    argv += ["--report", str(tmp_path / "report")] if script is ann2snn else ["--out", str(tmp_path / "report")]
    line = refused(capsys, script.main, script.parse_args(argv))
    assert line == f"error: {flag} needs {package}, which is missing: pip install {package}"
    assert os.listdir(tmp_path) == []


def test_any_other_package_that_is_missing_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    line = refused(capsys, train_ann.main, train_ann.parse_args(["debug_net0"]))
    assert line.endswith("pip install scikit-learn") and "sklearn" in line
    with pytest.raises(ValueError, match="this needs scikit-learn, which is missing: pip install scikit-learn"):
        check_packages("this", "json", "sklearn")


# ---------------------------------------------------------------------------------------------------------------------
# Odd flags, long values


ODD_VALUES = [
    ["--timesteps=--"],
    ["-e=--"],
    ["-e--"],
    ["--time=--"],
    ["--ann_weight=--"],
    ["--ann_layers=--"],
    ["--reset_mode=--"],
    ["--equalize=--"],
    ["--timesteps="],
    ["--timesteps"],
    ["--reset_mode="],
    ["--memory_budget="],
    ["--weight_bitwidth=,"],
    ["--weight_bitwidth="],
    ["--dataset="],
    ["--ann_weight="],
    ["--save_file="],
    ["--results="],
    ["--report="],
    ["--device=x"],
    ["--", "--timesteps=--"],
    ["--timesteps", "--"],
    ["--timesteps=" + "9" * 5000],
    ["--finetune_lr=" + "x" * 5000],
    ["--dataset=" + "x" * 5000],
    ["--dataset=" + "x " * 2500],
    ["--save_file=/nowhere/" + "x" * 5000],
    ["--ann_layers=" + "x" * 5000],
    ["--" + "x" * 5000],
    ["y" * 5000],
]


@pytest.mark.parametrize("argv", ODD_VALUES)
def test_odd_values_are_one_short_line(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_script(ann2snn.main, ann2snn.parse_args(["debug_net0", "--dataset", "debug0", "-e", "0", *argv]))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 2100
    assert os.listdir(tmp_path) == []


def test_what_is_too_long_is_cut_in_the_middle():
    assert squeeze("a  b\nc") == "a b c"
    path = "/" + "d" * 240 + "/" + "f" * 250  # as long as a file name may be, in a folder of such a name
    assert squeeze(f"no {path}, name another") == f"no {path}, name another"
    assert squeeze("x" * 5000 + " y") == "x" * 250 + "..." + "x" * 250 + " y"
    assert len(squeeze("x " * 5000)) == 2003


def test_only_what_a_user_can_cause_is_said_in_one_line():
    args = SimpleNamespace()
    caught = (
        "Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ..."
    )
    assert in_one_line(MemoryError(caught), args).startswith("out of memory")
    assert in_one_line(ValueError("a"), args) == "a" and in_one_line(RuntimeError("a"), args) is None
    assert in_one_line(MemoryError(), args) == "out of memory: free some memory"


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, said",
    [
        ("analyse_error.py", "started as one of 2 processes (WORLD_SIZE), start it without torchrun"),
        ("ann2snn.py", "one of 2 processes (WORLD_SIZE) does not find the others, start it with torchrun"),
    ],
)
def test_one_of_several_processes_is_refused(script, said, tmp_path):
    """analyse_error.py would do all of the work in every one of them; ann2snn.py shares it if torchrun started them."""
    command = [sys.executable, script, "debug_net0", "--dataset", "debug0", "-e", "0"]
    command += ["--out" if script == "analyse_error.py" else "--save_file", str(tmp_path / "snn.pth")]
    run = subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, "WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert run.returncode == 2 and not os.listdir(tmp_path)
    assert run.stderr.startswith(f"error: {said}") and run.stderr.count("\n") == 1


FREED = """
from runtime.memory import give_back
def used():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
blocks = [bytearray(100_000) for _ in range(2000)]  # 191 MB, in blocks that glibc takes from its heap
blocks = blocks[-1:]  # the one at the end of the heap
before = used()
give_back()
print(before - used())
"""


@pytest.mark.skipif(trim_of_glibc() is None or not Path("/proc/self/statm").exists(), reason="needs glibc on Linux")
def test_freed_memory_goes_back_to_the_system():
    run = subprocess.run([sys.executable, "-c", FREED], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0 and float(run.stdout) > 150, run.stderr
