"""The shape of the code, read from its source: which file may import which, how long files, classes and functions are.

The rules stand in docs/modules.md. Late imports, in functions, count like all others: they would hide an arrow.
"""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_README = 600, 200, 40, 250  # lines

# From the ground up: a file imports only what stands in a line above its own, or beside it in its own folder.
FLOORS = (
    ("runtime",),
    ("options",),
    ("script_options", "presets"),
    ("command_line",),
    ("kernels",),
    ("spike_tensor",),
    ("spike_simulator", "spike_neurons"),
    ("layers",),
    ("spike_layers",),
    ("dag_checks",),
    ("spike_dag",),
    ("rewrites",),
    ("dag_rewrites",),
    ("ann_parser",),
    ("quantization",),
    ("conversion",),
    ("snn_weight_setter", "hw_constraints"),
    ("networks", "inputs", "validate"),
    ("build_network", "detection", "finetuning", "transformer"),
    ("datasets",),
    ("pipeline", "snn_transformer"),
    ("reports", "export"),
    ("searching",),
    ("ann2snn", "analyse_error", "search", "train_ann", "predict", "show"),
    ("benchmarks", "tools"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Folders that hold the parts of one step: only that step, and what stands above it, imports from them.
STEPS = {
    "rewrites": "dag_rewrites",
    "layers": "spike_layers",
    "conversion": "snn_weight_setter",
    "transformer": "snn_transformer",
}
# Late imports that run against the floors, each with its reason.
SCRIPTS_OF_THEIR_OWN = {
    ("hw_constraints", "build_network"),  # hw_constraints.py is a script, too: it builds the network that it checks
    ("quantization", "ann_parser"),  # a plain nn.Module is parsed first, wherever it comes in
}


def sources():
    """Path -> syntax tree of every Python file of the project but its tests."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    paths = [Path(name) for name in listed] or [path.relative_to(ROOT) for path in ROOT.glob("*.py")]
    return {path: ast.parse((ROOT / path).read_text()) for path in paths if (ROOT / path).exists()}


SOURCES = sources()
CODE = {path: tree for path, tree in SOURCES.items() if path.parts[0] != "tests"}


def room(path):
    """A file's place in FLOORS: its folder, or its own name."""
    return path.parts[0].removesuffix(".py")


def modules_read(tree):
    """`(line, module)` of every module that a file imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.lineno, node.module))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return found


def imported(tree):
    """`(line, module)` of every module of the project that a file imports."""
    return [(line, name) for line, name in modules_read(tree) if name.split(".")[0] in FLOOR_OF]


def arrows():
    """`(file, line, room, imported room)` of every import between two rooms."""
    for path, tree in CODE.items():
        for line, module in imported(tree):
            if module.split(".")[0] != room(path):
                yield path, line, room(path), module.split(".")[0]


def test_every_file_has_a_floor():
    assert {room(path) for path in CODE} == set(FLOOR_OF)


def test_imports_go_down():
    """No circle, no arrow up, no late import that hides one."""
    climbs = [
        f"{path}:{line} imports {target}"
        for path, line, source, target in arrows()
        if FLOOR_OF[target] >= FLOOR_OF[source] and (source, target) not in SCRIPTS_OF_THEIR_OWN
    ]
    assert not climbs, "\n".join(climbs)
    assert len(list(arrows())) > 100  # the imports were found at all


def test_parts_of_a_step_are_imported_by_it_and_what_stands_above():
    reached = [
        f"{path}:{line} imports {target}"
        for path, line, source, target in arrows()
        if target in STEPS
        and source != STEPS[target]
        and FLOOR_OF[source] < FLOOR_OF[STEPS[target]]
        and (source, target) not in SCRIPTS_OF_THEIR_OWN
    ]
    assert not reached, "\n".join(reached)


def test_no_file_imports_itself_in_a_circle_within_its_folder():
    for folder in {path.parts[0] for path in CODE if len(path.parts) > 1}:
        graph = {
            ".".join(path.with_suffix("").parts): {module for _, module in imported(tree) if module.startswith(folder)}
            for path, tree in CODE.items()
            if path.parts[0] == folder
        }
        while graph:  # take away what imports nothing that is left
            free = {name for name, read in graph.items() if not read & set(graph) - {name}}
            assert free, f"{folder}: {', '.join(sorted(graph))} import each other"
            graph = {name: read for name, read in graph.items() if name not in free}


def test_no_test_file_imports_another_one():
    """What several share is in helpers.py, and in the other files that tests/conftest.py names."""
    tests = {path: tree for path, tree in SOURCES.items() if path.parts[0] == "tests"}
    shared = [
        f"{path}:{line} imports {module}"
        for path, tree in tests.items()
        for line, module in modules_read(tree)
        if module.split(".")[-1].startswith("test_")
    ]
    assert not shared, "\n".join(shared)
    assert len(tests) > 50  # they were found at all


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_classes_and_functions_are_short(path):
    """Triton's kernels excepted, whose arguments alone fill a screen."""
    assert len((ROOT / path).read_text().splitlines()) <= MAX_FILE
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            if any(ast.unparse(each) == "triton.jit" for each in node.decorator_list):
                continue
            first = min([each.lineno for each in node.decorator_list] + [node.lineno])
            most = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
            assert node.end_lineno - first + 1 <= most, f"{path}:{node.lineno} {node.name}"


def test_nobody_patches_a_forward_or_takes_a_neuron_away():
    """Whoever wants to see something of a run passes a `watch`."""
    for path, tree in CODE.items():
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                assert not (isinstance(target, ast.Attribute) and target.attr == "forward"), f"{path}:{node.lineno}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README
