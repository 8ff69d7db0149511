"""Presets: what each sets at every T, that a given flag overrides it, and the line that says so."""

import pytest

import analyse_error
import ann2snn
from pipeline import options_by_name
from presets import PRESETS, preset_options
from reports.command import command_of

MANY_STEPS = {
    "weight_bitwidth": 8,
    "finetune_epochs": 0,
    "threshold": "mse",
    "per_channel": "both",
    "correction": "weights",
    "hold_back": "auto",
    "avgpool": "fold",
}
FEW_STEPS = {**MANY_STEPS, "spike_gradient": "time", "calibration_samples": 2500}
FINETUNED = {
    "finetune_epochs": 20,
    "finetune_optimizer": "adam",
    "finetune_lr": 0.01,
    "finetune_distill": 0.5,
    "val_share": 0.0,
    "per_channel": "both",
    "spike_epochs": 10,
    "avgpool": "fold",
}
EXACT = {"weight_bitwidth": 8, "finetune_epochs": 0, "per_channel": "both", "avgpool": "fold"}
LEARNT = {"threshold": "mse", "rounding": "learnt"}
CASES = [
    *(("specification", timesteps, {}) for timesteps in (1, 16, 256)),
    *(
        ("calibrated", timesteps, {**FEW_STEPS, "spike_epochs_unlabelled": epochs})
        for timesteps, epochs in ((1, 20), (4, 20), (5, 16), (8, 10))
    ),
    *(
        ("calibrated", timesteps, {**FEW_STEPS, "spike_epochs_unlabelled": epochs, "spike_lr": lr})
        for timesteps, epochs, lr in ((9, 3, 0.0019), (16, 2, 0.00059), (32, 1, 0.00015))
    ),
    *(("calibrated", timesteps, MANY_STEPS) for timesteps in (33, 64, 256)),
    *(("finetuned", timesteps, {**FINETUNED, "activation_levels": min(timesteps, 8)}) for timesteps in (4, 8, 9, 16)),
    *(
        ("exact", timesteps, {**EXACT, **LEARNT, "activation_levels": timesteps, "listen": timesteps})
        for timesteps in (1, 15)
    ),
    *(("exact", timesteps, {**EXACT, "threshold": "max", "listen": timesteps}) for timesteps in (16, 65536)),
]


def parsed(flags, script=ann2snn):
    return vars(script.parse_args(["example_net", *flags.split()]))


@pytest.mark.parametrize("preset, timesteps, sets", CASES)
def test_a_preset_sets_these_and_nothing_else(preset, timesteps, sets):
    found, defaults = parsed(f"--preset {preset} --timesteps {timesteps}"), parsed(f"--timesteps {timesteps}")
    assert {name: value for name, value in found.items() if name in sets} == sets == preset_options(preset, timesteps)
    others = {name: value for name, value in found.items() if name not in (*sets, "preset")}
    assert others == {name: value for name, value in defaults.items() if name not in (*sets, "preset")}


def test_without_a_preset_it_is_the_specification():
    assert parsed("") == parsed("--preset specification") and list(PRESETS) == [
        "specification",
        "calibrated",
        "finetuned",
        "exact",
    ]


@pytest.mark.parametrize(
    "flags, name, value",
    [
        ("--preset calibrated --weight_bitwidth 4", "weight_bitwidth", 4),
        ("--weight_bitwidth 4 --preset calibrated", "weight_bitwidth", 4),
        ("--preset calibrated --spike_epochs_unlabelled 0", "spike_epochs_unlabelled", 0),
        ("--preset calibrated -e 10", "finetune_epochs", 10),  # the default, but given
        ("--preset calibrated --per_channel none", "per_channel", "none"),
        ("--preset calibrated --timesteps 64 --hold_back 0.25", "hold_back", 0.25),
        ("--preset calibrated --correction potential", "correction", "potential"),
        ("--preset calibrated --weight_bitwidth 5 --timesteps 16", "spike_epochs_unlabelled", 2),
        ("--preset calibrated --weight_bitwidth 4 --timesteps 16", "spike_lr", None),
        ("--preset calibrated --weight_bitwidth 4 --timesteps 16", "spike_epochs_unlabelled", 5),
        ("--preset calibrated --weight_bitwidth 8,2 --timesteps 8", "spike_epochs_unlabelled", 10),
        ("--preset calibrated --weight_bitwidth 4 --timesteps 2", "spike_epochs_unlabelled", 20),
        ("--preset calibrated --weight_bitwidth 4 --timesteps 80", "spike_epochs_unlabelled", 1),
        ("--preset calibrated --weight_bitwidth 4 --timesteps 81", "spike_epochs_unlabelled", 0),
        ("--preset finetuned --activation_levels 16 --timesteps 16", "activation_levels", 16),
        ("--preset finetuned --val_share 0.1", "val_share", 0.1),
        ("--preset exact --listen 3", "listen", 3),
        ("--preset exact --avgpool spike", "avgpool", "spike"),
        ("--preset exact --timesteps 5", "listen", 5),
        ("--preset exact --listen auto", "listen", "auto"),
        ("--preset exact --weight_bitwidth 4", "rounding", "learnt"),
        ("--preset exact --weight_bitwidth 4", "per_channel", "weights"),
        ("--preset exact --weight_bitwidth 4 --rounding nearest", "rounding", "nearest"),
        ("--preset exact --weight_bitwidth 5 --timesteps 16", "rounding", "nearest"),
        ("--preset exact --timesteps 8 --rounding nearest", "activation_levels", None),
        ("--preset exact --timesteps 8 --threshold max", "activation_levels", None),
        ("--preset exact --timesteps 8 --threshold max", "rounding", "learnt"),
        ("--preset exact --weight_bitwidth 4,8", "rounding", "learnt"),  # one layer of few bits is enough
        ("--preset exact --weight_bitwidth 8,4", "per_channel", "weights"),
        ("--preset exact --weight_bitwidth 8,5", "rounding", "nearest"),
        ("--preset exact --weight_bitwidth auto", "rounding", "nearest"),
    ],
)
def test_a_flag_that_is_given_overrides_the_preset(flags, name, value):
    assert parsed(flags)[name] == value


def test_without_finetuning_a_preset_has_no_levels_to_learn():
    assert parsed("--preset finetuned -e 0")["activation_levels"] is None


@pytest.mark.parametrize("preset", ["calibrated", "finetuned", "exact"])
@pytest.mark.parametrize("limit", ["--hardware v1.0", "--weight_bitwidth auto"])
def test_for_a_chip_poolings_keep_their_neurons(preset, limit):
    """A folded pooling of 2x2 would make the 3x3 kernel behind it one of 6x6."""
    assert parsed(f"--preset {preset} {limit}")["avgpool"] == "spike"
    assert parsed(f"--preset {preset} {limit} --avgpool fold")["avgpool"] == "fold"
    args = ann2snn.parse_args(["example_net", *f"--preset {preset} {limit} --timesteps 64".split()])
    assert "avgpool" not in command_of(args, "report")


@pytest.mark.parametrize("script", [ann2snn, analyse_error])
def test_one_line_on_stderr_says_what_a_preset_sets(script, capsys):
    parsed("--preset exact --timesteps 4 --weight_bitwidth 6", script)
    assert capsys.readouterr().err == (
        "preset exact: --finetune_epochs 0 --threshold mse --per_channel both --rounding learnt --activation_levels 4 "
        "--avgpool fold --listen 4\n"
    )
    parsed("--preset specification", script)
    assert capsys.readouterr().err == ""


def test_an_unknown_preset_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--preset best")
    assert end.value.code == 2 and "--preset" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown preset 'best', use one of specification, calibrated"):
        preset_options("best", 4)
    with pytest.raises(ValueError, match="timesteps 0: use a whole number, 1 to 65536"):
        preset_options("exact", 0)


@pytest.mark.parametrize("preset, timesteps, sets", CASES)
def test_the_call_in_python_has_the_same_presets(preset, timesteps, sets):
    options = vars(options_by_name(preset, {"timesteps": timesteps}))
    flags = parsed(f"--preset {preset} --timesteps {timesteps}")
    assert {name: value for name, value in options.items() if name in flags} == {
        name: flags[name] for name in options if name in flags
    }
    assert all(options[name] == value for name, value in sets.items() if name in options)


def test_options_of_the_call_override_its_preset():
    options = options_by_name("calibrated", {"timesteps": 4, "spike_epochs_unlabelled": 1, "weight_bitwidth": 5})
    assert (options.spike_epochs_unlabelled, options.weight_bitwidth, options.threshold) == (1, 5, "mse")
