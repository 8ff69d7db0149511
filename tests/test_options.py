"""Options: ranges in the dataclasses and on the command line, former names, help, hints, warnings, docs/flags.md."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ann2snn
from options import (
    ConversionOptions,
    QuantizeOptions,
    SpikeFinetuneOptions,
    checked,
)
from runtime.ranges import Whole
from script_options import CONVERSION, EXPORTS, OutputOptions
from snn_weight_setter import trans_ann2snn_weight

ROOT = Path(__file__).parents[1]
CLASSES = (*CONVERSION, OutputOptions)
FIELDS = {each.name: (each, cls) for cls in CLASSES for each in dataclasses.fields(cls)}
RANGES = {name: (each.metadata["span"], cls) for name, (each, cls) in FIELDS.items() if "span" in each.metadata}
CHOICES = {name: (each.metadata["choices"], cls) for name, (each, cls) in FIELDS.items() if "choices" in each.metadata}
SPECIFIED = {  # the flags of the specification
    *("ann_weight", "dataset", "dataset_root", "num_workers", "save_file", "batch_size", "test_batch_size"),
    *("timesteps", "reset_mode", "weight_bitwidth"),
    *("finetune_lr", "finetune_epochs", "finetune_wd", "finetune_momentum", "finetune_nesterov"),
}


def parsed(*flags):
    """The namespace of ann2snn.py for these flags."""
    return ann2snn.parse_args(["debug_net0", *flags])


def refused(capsys, *flags):
    """The one line with which ann2snn.py refuses flags."""
    with pytest.raises(SystemExit) as end:
        parsed(*flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ")
    return line


def made(cls, **options):
    """A dataclass with these options; listening needs as many timesteps."""
    return cls(**({"timesteps": 65536} if "listen" in options else {}), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Ranges


def step(span, value):
    """The nearest number above `value` that a range can hold."""
    return value + 1 if isinstance(span, Whole) else math.nextafter(value, math.inf)


def below(span):
    """The largest number under a range."""
    if isinstance(span, Whole):
        return span.least - 1
    return span.least if span.open else math.nextafter(span.least, -math.inf)


@pytest.mark.parametrize("name", RANGES)
def test_a_number_may_be_at_its_limits_and_not_beyond(name):
    span, cls = RANGES[name]
    least = step(span, span.least) if getattr(span, "open", False) else span.least
    accepted = [least] if span.most == math.inf else [least, span.most]
    for value in accepted:
        assert getattr(made(cls, **{name: value}), name) == value == checked(FIELDS[name][0], value)
    beyond = [below(span)] if span.most == math.inf else [below(span), step(span, span.most)]
    for value in [*beyond, math.nan, math.inf, "8", True]:
        with pytest.raises(ValueError, match=f"^{name} .*: use {span}".replace("(", r"\(")):
            made(cls, **{name: value})


def test_a_share_may_be_chosen_by_error(capsys):
    assert ConversionOptions(hold_back="auto").hold_back == "auto" == parsed("--hold_back", "auto").hold_back
    with pytest.raises(ValueError, match="hold_back 'best': use a number from 0 to 1 or auto, a share of Vthr"):
        ConversionOptions(hold_back="best")
    assert "best: use a number from 0 to 1 or auto" in refused(capsys, "--hold_back", "best")


@pytest.mark.parametrize("name", RANGES)
def test_the_flag_has_the_range_of_the_field(name, capsys):
    span = RANGES[name][0]
    most = 2**20 if span.most in (math.inf, 2**31 - 1) else span.most
    pad = ["--timesteps", "65536"] if name == "listen" else []
    for value in (span.least, most):
        if not (getattr(span, "open", False) and value == span.least):
            assert getattr(parsed(*pad, f"--{name}", str(value)), name) == value
    capsys.readouterr()
    for value in (below(span), "nan", "x", ""):
        line = refused(capsys, f"--{name}={value}")
        assert f"--{name}" in line and f"{value}: use {span}" in line


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_its_words(name, capsys):
    choices, cls = CHOICES[name]
    for choice in choices:
        assert getattr(cls(**{name: choice}), name) == choice == getattr(parsed(f"--{name}", choice), name)
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"unknown .*'nonsense'.*, use "):
        cls(**{name: "nonsense"})
    line = refused(capsys, f"--{name}", "nonsense")
    assert f"--{name}" in line and all(choice in line for choice in choices)


@pytest.mark.parametrize("value", [0.999, 1, 1.0, 1e-9, np.float32(0.5), "max", "mse"])
def test_a_threshold_is_a_quantile_or_a_word(value):
    assert ConversionOptions(threshold=value).threshold == value
    text = str(value)
    assert parsed("--threshold", text).threshold == (text if isinstance(value, str) else float(text))


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, math.nan, "best", None, True])
def test_another_threshold_is_refused(value, capsys):
    with pytest.raises(
        ValueError, match=r"unknown threshold 'best', use one of|quantile .*: use a number above 0 to 1"
    ):
        ConversionOptions(threshold=value)
    assert f"{value}" in refused(capsys, "--threshold", str(value))


def test_numbers_of_every_type_become_plain_ones():
    options = ConversionOptions(timesteps=np.int64(8), listen=8.0, hold_back=np.float32(0.5), calibration_samples=9.0)
    found = options.timesteps, options.listen, options.hold_back, options.calibration_samples
    assert found == (8, 8, 0.5, 9) and [type(value) for value in found] == [int, int, float, int]


def test_listening_takes_at_most_the_timesteps():
    assert ConversionOptions(timesteps=4, listen=4).listen == 4
    with pytest.raises(ValueError, match=r"^listen 5: use 0 to 4, the timesteps$"):
        ConversionOptions(timesteps=4, listen=5)


def test_options_do_not_change():
    options = QuantizeOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.finetune_lr = 1.0
    assert dataclasses.replace(options, finetune_epochs=3.0).finetune_epochs == 3


def test_every_field_has_a_help_a_group_and_a_flag():
    args = vars(parsed())
    for name, (each, _) in FIELDS.items():
        assert each.metadata["help"] and each.metadata["group"] and args[name] == each.default
    assert set(args) - set(FIELDS) == {"net_name", "preset"}
    assert set(FIELDS) >= SPECIFIED


# ---------------------------------------------------------------------------------------------------------------------
# Former names


@pytest.mark.parametrize(
    "old, new",
    [
        ("--quantile 0.99", "--threshold 0.99"),
        ("--threshold quantile", "--threshold 0.999"),
        ("--threshold quantile --quantile 0.9", "--threshold 0.9"),
        ("--quantile 0.9 --threshold quantile", "--threshold 0.9"),
        ("--threshold mse --quantile 0.9", "--threshold mse"),
        ("--quantile 0.9 --threshold max", "--threshold max"),
        ("--granularity channel", "--per_channel spikes"),
        ("--weight_granularity channel", "--per_channel weights"),
        ("--granularity channel --weight_granularity channel", "--per_channel both"),
        ("--granularity layer", "--per_channel none"),
        ("--granularity channel --weight_granularity layer", "--per_channel spikes"),
        ("--finetune_snn 3", "--spike_epochs 3"),
        ("--calibration_epochs 4", "--spike_epochs_unlabelled 4"),
        ("--calibration_epochs 4 --finetune_snn_lr 0.01", "--spike_epochs_unlabelled 4 --spike_lr 0.01"),
        ("--finetune_snn 1 --finetune_snn_gradient time", "--spike_epochs 1 --spike_gradient time"),
        ("--pretrained", "--ann_weight pretrained"),
        ("--pretrained --ann_weight a.pth", "--ann_weight a.pth"),
        ("-e 3", "--finetune_epochs 3"),
        ("--preset exact --granularity layer", "--preset exact --per_channel weights"),
        ("--preset exact --weight_granularity layer", "--preset exact --per_channel spikes"),
        ("--preset calibrated --quantile 0.99", "--preset calibrated --threshold 0.99"),
        ("--preset calibrated --calibration_epochs 3", "--preset calibrated --spike_epochs_unlabelled 3"),
    ],
)
def test_former_flags_say_the_same(old, new):
    assert vars(parsed(*old.split())) == vars(parsed(*new.split()))


@pytest.mark.parametrize("flag", ["--finetune_snn", "--calibration_epochs", "--finetune_snn_lr", "--quantile"])
def test_former_flags_have_their_ranges_and_are_named_in_errors(flag, capsys):
    line = refused(capsys, flag, "-1")
    assert flag in line and "-1: use a" in line


@pytest.mark.parametrize(
    "old, new",
    [
        ({"quantile": 0.99}, {"threshold": 0.99}),
        ({"threshold": "quantile", "quantile": 0.99}, {"threshold": 0.99}),
        ({"threshold": "quantile"}, {}),
        ({"threshold": "max", "quantile": 0.99}, {"threshold": "max"}),
        ({"granularity": "channel"}, {"per_channel": "spikes"}),
        ({"per_channel": True}, {"per_channel": "weights"}),
        ({"per_channel": False}, {"per_channel": "none"}),
        ({"per_channel": True, "granularity": "channel"}, {"per_channel": "both"}),
        ({"per_channel": True, "granularity": "layer"}, {"per_channel": "weights"}),
    ],
)
def test_former_keywords_of_the_conversion_say_the_same(old, new):
    assert ConversionOptions.from_keywords(16, 4, old) == ConversionOptions(timesteps=16, weight_bitwidth=4, **new)


def test_an_unknown_keyword_of_the_conversion_is_named_with_the_known_ones():
    with pytest.raises(TypeError, match=r"has no option bits, it has .*reset_mode.*calibration_samples"):
        trans_ann2snn_weight(None, None, "cpu", 8, 4, bits=4)


@pytest.mark.parametrize("name, value", [("quantile", 2), ("granularity", "row"), ("per_channel", "some")])
def test_former_keywords_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        ConversionOptions.from_keywords(16, 4, {name: value})


def test_namespaces_with_former_names_are_understood():
    old = {"finetune_lr": 0.1, "finetune_epochs": 2, "finetune_wd": 0, "finetune_momentum": 0.5, "weight_bitwidth": 2}
    options = QuantizeOptions.of(SimpleNamespace(**old, weight_granularity="channel"))
    assert options == QuantizeOptions(**old, per_channel="weights") and options.weights_per_channel
    assert not QuantizeOptions.of(SimpleNamespace(**old)).weights_per_channel
    with pytest.raises(ValueError, match="unknown weight_granularity 'row', use layer or channel"):
        QuantizeOptions.of(SimpleNamespace(**old, weight_granularity="row"))
    spikes = SimpleNamespace(finetune_snn=1, calibration_epochs=2, finetune_snn_lr=0.1, finetune_snn_gradient="time")
    assert dataclasses.astuple(SpikeFinetuneOptions.of(spikes)) == (1, 2, 0.1, "time")


# ---------------------------------------------------------------------------------------------------------------------
# Help and hints


def help_of(script, flag, columns="100"):
    """The lines that `python3 SCRIPT FLAG` prints."""
    run = subprocess.run(
        [sys.executable, script, flag],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": columns},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.splitlines()


def flags_in(lines):
    """The flags that a help explains."""
    words = [line.replace(",", "").split() for line in lines if line.startswith("  -")]
    return {word for line in words for word in line if word.startswith("--")}


@pytest.mark.parametrize("script", ["ann2snn.py", "analyse_error.py"])
def test_help_is_short_and_help_all_has_every_flag(script):
    short, full = help_of(script, "--help"), help_of(script, "--help-all")
    assert len(short) <= 66 and max(map(len, short)) <= 120
    assert {"--dataset", "--timesteps", "--weight_bitwidth", "--preset", "--help-all"} <= flags_in(short)
    assert ("--ann_weight" if script == "ann2snn.py" else "--load") in flags_in(short)
    assert flags_in(short) < flags_in(full)
    written = {"save_file", "results", "report", *(each.flag for each in EXPORTS)}  # by ann2snn.py alone
    known = {name for name in FIELDS if script == "ann2snn.py" or name not in written}
    assert {f"--{name}" for name in known} <= flags_in(full)
    assert not {"--quantile", "--granularity", "--finetune_snn", "--pretrained"} & flags_in(full)


@pytest.mark.parametrize("script", ["ann2snn", "analyse_error", "train_ann", "hw_constraints", "benchmarks.accuracy"])
def test_help_loads_no_torch(script):
    text = f"import sys\nimport {script} as script\nsys.argv = ['x', '--help']\n"
    text += "try:\n    script.parse_args()\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    "wrong, right",
    [
        (["--timestep_s", "4"], "--timesteps"),
        (["--tmesteps", "4"], "--timesteps"),
        (["--tmesteps=4"], "--timesteps"),
        (["--weight_bits", "4"], "--weight_bitwidth"),
        (["--reset_mode", "subtract"], "subtraction"),
        (["--preset", "calibrate"], "calibrated"),
        (["--correction", "potentials"], "potential"),
    ],
)
def test_a_mistyped_flag_or_choice_has_a_hint(wrong, right, capsys):
    line = refused(capsys, *wrong)
    assert f"did you mean {right}?" in line and line.endswith("see " + line.split("see ")[-1])


@pytest.mark.parametrize("wrong", [["--zzzzzz"], ["--reset_mode", "hard"]])
def test_what_is_near_to_nothing_has_no_hint(wrong, capsys):
    assert "did you mean" not in refused(capsys, *wrong)


@pytest.mark.parametrize("name, right", [("exmaple_net", "example_net"), ("debugnet0", "debug_net0")])
def test_a_mistyped_network_has_a_hint(name, right):
    from build_network import check_net_name

    with pytest.raises(ValueError, match=f"unknown network '{name}', .*did you mean {right}"):
        check_net_name(name)


# ---------------------------------------------------------------------------------------------------------------------
# Flags without effect


def warnings_of(capsys, flags):
    """The flags that are said to have no effect."""
    parsed(*flags.split())
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("preset ")]
    assert all(line.startswith("warning: --") and " has no effect" in line for line in lines)
    return [line.split()[1].removeprefix("--") for line in lines]


@pytest.mark.parametrize(
    "flags, without_effect",
    [
        ("--pretrained --ann_weight a.pth", ["pretrained"]),
        ("-e 0 --finetune_lr 0.1", ["finetune_lr"]),
        ("-e 0 --finetune_distill 0.5 --finetune_optimizer sgd", ["finetune_optimizer", "finetune_distill"]),
        ("--finetune_optimizer adam --finetune_damping 0.1", ["finetune_damping"]),
        ("--finetune_optimizer adam --finetune_wd 0 --finetune_nesterov", ["finetune_wd", "finetune_nesterov"]),
        ("--correction none --hold_back 0.5", ["hold_back"]),
        ("--reset_mode zero --hold_back 0.5", ["hold_back"]),
        ("--activation_levels 4 --threshold mse", ["threshold"]),
        ("--activation_levels 4 --quantile 0.9", ["threshold"]),
        ("--threshold mse --quantile 0.9", ["quantile"]),
        ("--spike_lr 0.1", ["spike_lr"]),
        ("--finetune_snn_gradient time", ["spike_gradient"]),
        ("--listen 16 --hold_back 0.5", ["hold_back"]),
        ("--listen 16 --correction weights", ["correction"]),
        ("-e 0 --val_share 0.1", ["val_share"]),
        ("--sweep", ["sweep"]),
        ("--analysis_images 9", ["analysis_images"]),
        ("--dataset digits --dataset_root data", ["dataset_root"]),
        ("-e 0 --finetune_lr 0.01", ["finetune_lr"]),  # given, though it is the default
        ("--preset calibrated --finetune_lr 0.1", ["finetune_lr"]),
    ],
)
def test_a_flag_without_effect_is_said_so(flags, without_effect, capsys):
    assert sorted(warnings_of(capsys, flags)) == sorted(without_effect)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "-e 0",
        "--hold_back 0.5 --finetune_lr 0.1 --finetune_damping 0 --threshold mse",
        "--spike_epochs 1 --spike_lr 0.1",
        "--spike_epochs_unlabelled 1 --spike_gradient time",
        "--report out --sweep --analysis_images 9",
        "--dataset MNIST --dataset_root data",
        "--activation_levels 4",
        "--listen 8 --hold_back 0.5",
        "-e 0 --spike_epochs 1 --val_share 0.1",
        *(f"--preset {name}" for name in ("specification", "calibrated", "finetuned", "exact")),
    ],
)
def test_flags_with_an_effect_are_not_warned_about(flags, capsys):
    assert warnings_of(capsys, flags) == []


# ---------------------------------------------------------------------------------------------------------------------
# docs/flags.md


def test_the_list_of_flags_is_what_the_dataclasses_say():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import write_flags
    finally:
        sys.path.remove(str(ROOT / "tools"))
    written = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert written == write_flags.page(), "run python3 tools/write_flags.py"
    for name in FIELDS:
        assert f"`--{name}`" in written
