"""README.md and docs/ say what is there: files, flags, links and headings exist, examples run as they are printed."""

import argparse
import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [
    *("ann2snn.py", "analyse_error.py", "search.py", "train_ann.py", "hw_constraints.py"),
    *sorted(
        f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py") if "def parse_args" in path.read_text()
    ),
]
LARGEST_README, LARGEST_EXAMPLE = 250, 25  # lines

# the specification's chapters and arguments
CHAPTERS = (
    *("Requirements", "Updating", "Constraints", "Hardware v1.0", "Usage", "Example Network", "DebugNet"),
    *("Self-defined network", "dataset", "Weight quantization", "Transform quantized ANN to SNN", "Save the SNN"),
    *("Error Analysis", "Details of Modules", "SNNTransformer"),
)
MODULE_CHAPTERS = ("validation", "ANN parser", "SpikeDAGModule", "quantize_finetune", "snn_weight_setter.py")
ARGUMENTS = (
    *("net_name", "--ann_weight", "--dataset", "--num_workers", "--save_file", "--batch_size", "--test_batch_size"),
    *("--timesteps", "--reset_mode", "--weight_bitwidth", "--finetune_lr", "--finetune_epochs", "--finetune_wd"),
    "--finetune_momentum",
)

# what a reader writes or downloads, in words that look like files of the repository
READERS_FILES = {
    *("example.py", "train2017/", "val2017/", "file.py", "layers.py", "path/net.py", "path/data.py"),
    *("job.sh", "resnet.py", "path/to/net.py", "path/to/data.py", "path/to/file.py", "my_project/net.py"),
}

# of torchrun and of SLURM
OTHERS_FLAGS = {
    *("--standalone", "--nnodes", "--nproc_per_node", "--rdzv_id", "--rdzv_backend", "--rdzv_endpoint"),
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time"),
}

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_blocks(text):
    """A page without its fenced code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text):
    """`language, code` of every fenced code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def code_spans(text):
    """Every `span` of a page, which may go on in the next line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(text))]


def code_of(page):
    """All that a page sets as code: its spans, and the lines of its blocks."""
    text = page.read_text(encoding="utf-8")
    return code_spans(text) + [line for _, code in blocks(text) for line in code.splitlines()]


def flags_in(code):
    """The long flags in a piece of code."""
    return set(re.findall(r"(?<![\w-])--\w[\w-]*", code))


@cache
def flags_of(script):
    """The flags that a script's parser knows, hidden ones too."""
    module, found = importlib.import_module(script.removesuffix(".py").replace("/", ".")), set()
    add_action = argparse._ActionsContainer._add_action

    def add_and_note(container, action):
        found.update(action.option_strings)
        return add_action(container, action)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(argparse._ActionsContainer, "_add_action", add_and_note)
        with contextlib.suppress(SystemExit):  # a network is missing; the flags are known by then
            module.parse_args([])
    assert "--help" in found, script
    return found


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(page):
    """The headings of a page, in order."""
    return re.findall(r"^#+ +(.+)$", without_blocks(page.read_text(encoding="utf-8")), flags=re.MULTILINE)


# ---------------------------------------------------------------------------------------------------------------------
# Shape


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= LARGEST_README


def test_the_chapters_of_the_specification_are_there():
    assert [chapter for chapter in CHAPTERS if chapter not in headings(README)] == []
    assert [chapter for chapter in MODULE_CHAPTERS if chapter not in headings(ROOT / "docs/modules.md")] == []


def test_the_arguments_of_the_specification_are_explained():
    rows = " ".join(line.split("|")[1] for line in README.read_text(encoding="utf-8").splitlines() if line[:2] == "| ")
    assert [argument for argument in ARGUMENTS if f"`{argument}`" not in rows] == []


def test_every_page_is_linked_from_the_readme():
    text = README.read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


# ---------------------------------------------------------------------------------------------------------------------
# What pages name exists


@by_page
def test_flags_exist(page):
    known = set().union(OTHERS_FLAGS, *(flags_of(script) for script in SCRIPTS))
    assert sorted(set().union(*(flags_in(code) for code in code_of(page))) - known) == []


@by_page
def test_commands_give_scripts_their_own_flags(page):
    unknown = []
    for code in code_of(page):
        found = re.search(r"python3 ([\w/]+\.py)\b", code)
        if not found or found[1] not in SCRIPTS:
            continue
        known = flags_of(found[1]) | (flags_of("ann2snn.py") if found[1] == "benchmarks/accuracy.py" else set())
        unknown += [f"{found[1]} {flag}" for flag in sorted(flags_in(code) - known)]
    assert unknown == []


def paths_in(code):
    """The words of a piece of code that name files or folders of the repository, placeholders left out."""
    folders = [entry.name for entry in ROOT.iterdir() if entry.is_dir()]
    words = re.findall(r"(?<![\w/.<*-])[\w.-]+(?:/[\w.-]+)*/?(?![\w/<*(])", code)
    for word in words:
        is_file = re.search(r"\.(py|md|sh|svg)$", word) and "path/to" not in word
        is_folder = word.endswith("/") or ("/" in word and word.split("/")[0] in folders)
        if (is_file or is_folder) and word not in READERS_FILES:
            yield word


@by_page
def test_paths_exist(page):
    named = {path for code in code_of(page) for path in paths_in(code)}
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_paths_are_found():
    assert list(paths_in("python3 ann2snn.py --ann_weight checkpoint/a.pth --dataset /path/to/cifar10")) == [
        "ann2snn.py",
        "checkpoint/a.pth",
    ]
    assert list(paths_in("`kernels/`, `docs/none.md`, train/<class>, weights/*.npy, out.pth")) == [
        "kernels/",
        "docs/none.md",
    ]


@by_page
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in map(slug, headings(path))):
            broken.append(target)
    assert broken == []


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def run_example(code, folder):
    """What a printed example prints, run in `folder` with the repository on its path."""
    file = folder / "example.py"
    file.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, file], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def example_of(page, first_lines):
    """The only example of a page that begins with these lines."""
    (code,) = (code for _, code in blocks(page.read_text(encoding="utf-8")) if code.startswith(first_lines))
    return code


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path):
    code = example_of(README, "import torch\nfrom sklearn")
    assert sum(1 for line in code.splitlines() if line.strip()) <= LARGEST_EXAMPLE
    out = run_example(code, tmp_path)
    found = re.search(r"ANN ([\d.]+) %, quantized ([\d.]+) %, SNN ([\d.]+) %", out)
    ann, quantized, spiking = map(float, found.groups())
    assert 90 < ann <= 100 and 90 < quantized <= 100 and quantized - 3 < spiking <= 100


@pytest.mark.slow
def test_the_example_of_the_transformer_runs(tmp_path):
    out = run_example(example_of(ROOT / "docs/transformer.md", "import torch\nfrom sklearn"), tmp_path)
    ann, spiking = map(float, re.search(r"ANN ([\d.]+) %, with a spiking backbone ([\d.]+) %", out).groups())
    assert 90 < ann <= 100 and ann - 3 < spiking <= 100
    command = [sys.executable, ROOT / "snn_transformer.py", "replay", tmp_path / "saved"]
    replay = subprocess.run(command, capture_output=True, text=True)
    assert replay.returncode == 0 and replay.stdout.startswith("identical: "), replay.stderr
