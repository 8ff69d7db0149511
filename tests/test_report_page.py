"""The page of a report: one file without a network, everything escaped, readable by a screen reader and in the dark."""

import copy
import json
import re
from argparse import Namespace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import seaborn
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

import ann2snn
from datasets import get_dataset
from options import defaults
from pipeline import options_by_name
from reports.analysis import next_command
from reports.command import command_of, command_with
from reports.drawing import (
    COLOURS,
    VARIABLES,
    Chart,
    Panel,
    draw_panel,
    luminance,
    readable_on,
    render_png,
    render_svgs,
    share_styles,
)
from reports.html import in_html, report_page
from reports.layers import saturation
from reports.network_figures import sweep_chart
from reports.presets import other_presets, preset_namespace
from reports.samples import validation_sample
from reports.style import STYLE
from reports.tables import short, table
from script_options import CONVERSION, AnalysisOptions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The report of a debug network beside another tool's result. folder, result, page."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "other.json").write_text('{"name": "other", "top1": 75, "samples": 32, "timesteps": 4, "synops": 90}')
    argv = f"debug_net1 --dataset debug0 -e 0 --timesteps 4 --analysis_images 8 --save_file {folder}/snn.pth"
    ann2snn.main(ann2snn.parse_args(f"{argv} --report {folder}/report --compare {folder}/other.json".split()))
    result = json.loads((folder / "report/report.json").read_text())
    return Namespace(folder=folder / "report", result=result, page=(folder / "report/report.html").read_text())


class Page(HTMLParser):
    """Every address in a page, its tags with attributes, and its headings in order."""

    def __init__(self, text):
        super().__init__()
        self.found, self.tags, self.headings = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        self.tags.append((tag, known))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.found += [
            known[name] for name in ("src", "href", "xlink:href", "srcset", "action", "data") if name in known
        ]

    def all(self, tag):
        return [known for name, known in self.tags if name == tag]


def test_the_page_is_one_file_that_needs_no_network(run):
    page = Page(run.page)
    assert page.found and all(re.match("#|data:image/png;base64,", found) for found in page.found)
    assert not re.search(r"@import|url\((?!#)", run.page) and 'name="viewport"' in run.page
    assert set(re.findall(r"https?:[^\"' ]*", run.page)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    files = list(run.folder.iterdir())
    assert max(file.stat().st_size for file in files) < 300_000
    pictures = [file for file in files if file.suffix == ".png"]
    assert len(pictures) >= 11 and {Image.open(file).width for file in pictures} == {1600}


def test_the_page_answers_first_what_a_user_asks(run):
    first = re.sub("<[^>]*>", " ", run.page.split("<nav")[0].split("<body>")[1])
    assert "debug_net1 on debug0: a spiking network" in first and "Accuracy on 32 test images" in first
    for words in ("95 % interval", "Timesteps within 1 point", "Energy against the ANN", "Hardware v1.0", "Try next"):
        assert words in first
    code = re.search("<code>(.*?)</code>", run.page)[1]
    assert re.sub("<[^>]*>", "", code) == escape(run.result["next"]["command"])
    assert escape(run.result["verdict"][0]) in first
    assert "standard deviation" not in run.page


def test_headings_links_and_regions_are_in_order(run):
    page = Page(run.page)
    assert page.headings.count(1) == 1 and page.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:]))
    ids = [known["id"] for _, known in page.tags if "id" in known]
    assert len(set(ids)) == len(ids)
    sections = [
        found for found in page.found if found.startswith("#") and f'href="{found}">' in run.page.split("</nav>")[0]
    ]
    assert len(sections) >= 10 and {found[1:] for found in page.found if found.startswith("#")} <= set(ids)
    assert len(page.all("main")) == 1 and page.all("html")[0]["lang"] == "en"


def test_figures_are_named_and_tables_can_be_reached(run):
    page = Page(run.page)
    figures = [known for known in page.all("div") if known.get("role") == "img"]
    assert len(figures) == len(page.all("figure")) >= 11 and all(len(known["aria-label"]) > 40 for known in figures)
    assert all(known.get("aria-hidden") == "true" for known in page.all("svg"))
    regions = [known for known in page.all("div") if known.get("role") == "region"]
    assert len(regions) == len(page.all("table")) >= 10
    assert all(known["tabindex"] == "0" and known["aria-label"] for known in regions)
    assert {known["scope"] for known in page.all("th")} == {"col", "row"}
    labels = [known["aria-label"] for known in regions]
    about_images = [label for label in labels if not re.search("Limits of|All flags|Runs compared", label)]
    assert all(re.search(r"\d+ [\w ]*images", label) for label in about_images)  # the size beside the numbers


def contrast(first, second):
    """WCAG's ratio of two colours."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_both_modes_are_readable():
    light, dark = (dict(re.findall(r"(--[\w]+): (#\w{6})", part)) for part in STYLE.split("prefers-color-scheme")[:2])
    assert set(light) == set(dark) >= set(VARIABLES.values())
    for colours in (light, dark):
        for text in ("--ink", "--soft", "--link"):
            assert min(contrast(colours[text], colours[ground]) for ground in ("--paper", "--box")) >= 4.5
        assert contrast(colours["--ink"], colours["--grid"]) >= 4.5  # where a table fades out on the right
    lines = ("--c0", "--c2", "--c3", "--line")
    assert min(contrast(colours[line], colours["--paper"]) for colours in (light, dark) for line in lines) >= 3
    assert tuple(map(to_hex, seaborn.color_palette("colorblind"))) == COLOURS
    for colour, variable in VARIABLES.items():
        assert light[variable] == colour, "a figure alone and in the page have the same colours"


def test_luminance_and_text_on_colours():
    assert [luminance(colour) for colour in ("#000000", "#ffffff")] == [0, pytest.approx(1)]
    assert luminance("#777777") == pytest.approx(0.1845, abs=1e-4)  # the known grey of 4.48 : 1 on white
    for share in np.linspace(0, 1, 101):
        ground = colormaps["Blues"](share)
        assert contrast(readable_on(ground), ground) >= 4.5


def test_flags_are_not_broken_at_their_hyphens():
    assert in_html("try --listen 8 & go") == 'try <span class="flag">--listen</span> 8 &amp; go'
    assert in_html("a--b <x>") == "a--b &lt;x&gt;" and ".flag { white-space: nowrap; }" in STYLE


def test_everything_that_a_user_names_is_escaped(run):
    result = copy.deepcopy(run.result)
    attack = '<img src="http://example.com/x"> & "quoted"'
    result["net"] = result["flags"]["dataset"] = result["flags"]["ann_weight"] = attack
    result["flags"]["extra"] = [attack]
    result["verdict"] = [attack] * 3
    for rows in (result["layers"], result["operations"]):
        rows[attack] = {**next(iter(rows.values())), "path": attack, "ann_mac": 1.0}
    result["layers"][attack]["saturated"] = [{"name": attack, "share": 0.5}]
    result["alternatives"][attack] = {**result["alternatives"]["as asked for"], "note": attack}
    result["repaired"][attack] = result["repaired"]["as asked for"]
    result["compare"][1]["name"] = result["next"]["command"] = result["next"]["reason"] = attack
    result["classes"]["names"] = [attack] * 2
    result["hardware"]["name"] = result["hardware"]["rows"][1][1] = attack
    result["hardware"]["over"] = [attack]
    chart = Chart(attack, attack, [])
    page = report_page(result, {"accuracy": ([], chart)})
    assert "img" not in [tag for tag, _ in Page(page).tags] and not Page(page).all("svg")
    assert "<img" not in page and page.count(escape(attack)) >= 25


def test_a_long_name_stays_text_in_a_figure():
    chart = Chart("a $x$", "", [Panel(lambda axis: axis.plot([1, 2], label="b"), title="title", legend=1)])
    (svg,) = render_svgs("one", chart)
    assert svg.startswith('<svg viewBox="') and "var(--ink)" in svg and "<metadata" not in svg and ">title<" in svg
    assert render_svgs("one", chart) == [svg] and render_png(chart) == render_png(chart)
    assert draw_panel(chart.panels[0]).axes[0].get_legend().get_texts()[0].get_text() == "b"


def test_styles_are_shared():
    page, rules = share_styles('<a style="x: 1"/><a style="x: 1"/><a style="x: 1"/><a style="y: 2"/>')
    assert page == '<a class="s0"/><a class="s0"/><a class="s0"/><a style="y: 2"/>' and rules == ".s0{x: 1}"


def test_a_sweep_is_drawn_cell_by_cell():
    chart = sweep_chart({2: {4: 10.0, 8: 20.0}, 4: {4: 30.0, 8: 99.5}}, 12, "validation images")
    (axis,) = draw_panel(chart.panels[0]).axes
    assert [text.get_text() for text in axis.texts] == ["10.0", "20.0", "30.0", "99.5"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("timesteps", "weight bits")
    assert "12 validation images" in chart.caption


def test_a_table_keeps_its_first_column_and_sorts():
    text = table([("name", "points"), ("a", "+1.5"), ("b", "-2")], "Points on 3 images")
    assert '<th scope="row">a</th><td class=number>+1.5</td>' in text and 'class="sorts"' in text
    assert "position: sticky" in STYLE and 'aria-label="Points on 3 images"' in text


def test_texts_are_left_aligned_and_empty_columns_left_out():
    text = table(
        [("layer", "module path", "note", "p"), ("a", "0", "", "<0.001"), ("b", "3.conv", "", "1")], "of 3 images"
    )
    assert "<td>0</td>" in text and "note" not in text and "<td class=number>&lt;0.001</td>" in text
    assert [short(value) for value in (0.050772, 985.0, 19390.0, 232400.0)] == ["0.05077", "985", "19,390", "232,400"]


def test_saturated_and_silent_neurons_by_hand():
    saturated = torch.zeros(3, 2, 2)
    saturated[1], saturated[2, 0, 0] = 1.0, 0.1
    spikes = torch.tensor([0.0, 0, 1, 1]).view(1, 2, 2).expand(3, 2, 2)
    found = saturation(saturated, spikes)
    assert found["saturated"] == [{"name": "channel 1", "share": 1.0}]
    assert found["silent_share"] == 0.5 and found["saturated_share"] == pytest.approx(4.1 / 12)
    assert saturation(torch.tensor([0.0, 0.5]), torch.ones(2))["saturated"] == [{"name": "neuron 1", "share": 0.5}]


# ---------------------------------------------------------------------------------------------------------------------
# the command to copy, presets, validation images


def flags_of(*argv):
    return ann2snn.parse_args(["example_net", *argv])


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--weight_bitwidth 8,4,4,4 --timesteps 8 --listen auto --ann_layers conv1,fc",
        "--preset exact --weight_bitwidth 4 --threshold 0.99",
        "--preset calibrated --timesteps 4 --hold_back 0.5 --no-sweep",
        "--input_shape 3,32,32 --mean 0.5,0.25,0.5 --net_args width=8,name=small --equalize",
        "--dataset a$b/c --compare x.json --analysis_images 400",
    ],
)
def test_the_command_repeats_the_run(argv, capsys):
    args = flags_of(*argv.split())
    words = command_of(args, "next").split()
    again = ann2snn.parse_args([word.strip("'") for word in words[2:]])
    expected = {**vars(args), "report": "next", "compare": ()}
    assert vars(again) == expected
    if not argv:
        assert words == ["python3", "ann2snn.py", "example_net", "--report", "next"]


def test_the_command_of_other_flags(capsys):
    args = flags_of("--timesteps", "8", "-e", "0")
    again = ann2snn.parse_args(command_with(args, "--timesteps 16", "next").split()[2:])
    assert (again.timesteps, again.finetune_epochs) == (16, 0)
    preset = ann2snn.parse_args(command_with(args, "--preset exact", "next").split()[2:])
    assert (preset.preset, preset.listen, preset.weight_bitwidth, preset.timesteps) == ("exact", 8, 8, 8)


def test_what_to_try_next_without_anything_better():
    tried = {"as asked for": {}}
    commands = [
        next_command(flags_of(*argv.split()), tried, None, samples)["command"]
        for argv, samples in (("", 10_000), ("--try_presets", 10_000), ("--try_presets", 359), ("--try_presets", 200))
    ]
    assert [command.removeprefix("python3 ann2snn.py example_net ") for command in commands] == [
        "--try_presets --report next_report",
        "--analysis_images 512 --try_presets --report next_report",
        "--analysis_images 179 --try_presets --report next_report",
        "--seed 1 --try_presets --report next_report",
    ]


def test_presets_stand_for_their_options():
    flags = ("--per_channel", "both", "--maxpool", "or", "--hold_back", "0.5", "--avgpool", "spike")
    args = flags_of("--timesteps", "8", *flags)
    assert other_presets(args) == {"calibrated": True, "finetuned": True, "exact": True}
    args.timesteps = 64
    assert other_presets(args)["exact"] is False
    assert other_presets(args)["calibrated"] is False
    options = preset_namespace(args, "calibrated")
    own = options_by_name("calibrated", {"timesteps": 64})
    assert options.maxpool == "or" and options.avgpool == "fold"
    kept = {"maxpool", "timesteps"}
    assert all(getattr(options, name) == value for name, value in vars(own).items() if name not in kept)
    assert set(vars(options)) >= set(defaults(*CONVERSION, AnalysisOptions))


def samples_of(**flags):
    plain = {"dataset": "digits", "finetune_epochs": 0, "spike_epochs": 0, "seed": 0, "try_presets": False}
    args = Namespace(**{**plain, **flags})
    loaders = get_dataset(args)
    return loaders, validation_sample(loaders, 100, args, "cpu")


def test_flags_are_chosen_on_images_that_did_not_calibrate():
    loaders, sample = samples_of(calibration_samples=1000)
    calibration = torch.stack([loaders[3].dataset[i][0] for i in range(1000)]).flatten(1)
    assert len(sample) == 100 and sample.words == "training images that calibrated nothing"
    assert torch.cdist(sample.images.flatten(1), calibration).min() > 0
    assert "finetuning has seen them" in samples_of(calibration_samples=1000, finetune_epochs=1)[1].words
    loaders, sample = samples_of(calibration_samples=1438)
    assert sample.words == "test images apart from the others"
    _, sample = samples_of(calibration_samples=1000, try_presets=True)
    assert sample.words == "test images apart from the others"  # presets that train have seen the training images
    _, sample = samples_of(calibration_samples=10, val_share=0.2)
    assert sample.words == "validation images (--val_share)"
