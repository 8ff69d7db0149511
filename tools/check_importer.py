"""Compare the spikes of an importer of NIR, run by the lines of docs/export.md, with those of the simulator.

    python3 tools/check_importer.py nirtorch

`tools/check_importers.sh` runs it for all importers. Ends with status 1 if a spike differs.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from build_network import get_net_by_name
from datasets import get_dataset
from export.nir_graph import write_nir
from networks.checkpoint import load_weights
from pipeline import convert_network
from spike_simulator import simulate

ROOT = Path(__file__).resolve().parents[1]
HEADINGS = {
    "nirtorch": "nirtorch",
    "spikingjelly": "SpikingJelly",
    "sinabs": "sinabs",
    "snntorch": "snnTorch",
    "norse": "norse",
}
IMAGES, TIMESTEPS = 32, 16
UNSUPPORTED = {  # importer -> pattern of the names of networks, as the page says
    "sinabs": "residual",
    "snntorch": "reset_mode=zero",
    "norse": r"residual|^(?!.*reset_mode=zero)",
}
FILE = "network.nir"  # the name in the page


def lines_of(importer, path):
    """The lines of docs/export.md that read the file `path` and import it, as source code."""
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    chapter = page[page.index("\n## NIR\n") :]
    first = re.search(r"```python3\n(.*?)```", chapter, re.DOTALL)[1]
    own = re.search(rf"\n### {HEADINGS[importer]}\n.*?```python3\n(.*?)```", chapter, re.DOTALL)[1]
    return first.replace(f'"{FILE}"', repr(str(path))) + own


def imported_counts(importer, path, images):
    """`counts, total`: op name -> spike counts [B, ...] of every layer, and the sum of the network's outputs."""
    names = {}
    exec(compile(lines_of(importer, path), "docs/export.md", "exec"), names)
    counts = {name: 0 for name in names["neurons"]}

    def watch(name):
        def add(module, inputs, output):
            spikes = output[0] if isinstance(output, tuple) else output
            if len(spikes) != len(images):  # all steps at once, [B*T, ...]
                spikes = spikes.unflatten(0, (len(images), -1)).sum(1)
            counts[name] = counts[name] + spikes.detach()

        return add

    for name, module in names["neurons"].items():
        module.register_forward_hook(watch(name))
    with torch.no_grad():
        total = names["run"](images)
    return counts, total


def own_counts(snn, images):
    """Op name -> spike counts [B, ...] of every layer."""
    counts = {}

    def watch(name, current, value):
        if snn.ops[name].op.neuron is not None:
            counts[name] = counts.get(name, 0) + value.counts()

    with torch.no_grad():
        simulate(snn, (images,), snn.timesteps, watch=watch)
    return counts


def differences(importer, snn, images, path):
    """Op name -> number of neurons whose spike counts differ."""
    write_nir(snn, path, images)
    found, _ = imported_counts(importer, path, images)
    expected = own_counts(snn, images)
    assert set(found) == set(expected)
    return {name: int((found[name] != expected[name]).sum()) for name in expected}, expected


class Residual(nn.Module):
    """Adds of an identity, the second of spikes of two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.fc = nn.Linear(8 * 64, 10)

    def forward(self, x):  # [B, 1, 16, 16]
        x = torch.relu(self.first(x))
        for a, b in (self.convs[:2], self.convs[2:]):
            x = torch.relu(b(torch.relu(a(x))) + x)
        return self.fc(nn.functional.avg_pool2d(x, 2).flatten(1))


def networks():
    """`name, snn, images` of every network that is compared."""
    test_loader, _, _, calibration_loader = get_dataset(
        SimpleNamespace(dataset="digits", batch_size=128, test_batch_size=IMAGES)
    )
    images = next(iter(test_loader))[0]
    net = load_weights(get_net_by_name("example_net"), str(ROOT / "checkpoint/example_net_ann.pth"))
    fixed = {"timesteps": TIMESTEPS, "finetune_epochs": 0, "device": "cpu"}
    for options in (
        {"weight_bitwidth": 4},
        {"weight_bitwidth": 8},
        {"weight_bitwidth": 4, "avgpool": "fold"},
        {"weight_bitwidth": 4, "reset_mode": "zero"},
    ):
        snn = convert_network(net, calibration_loader, **options, **fixed).snn
        yield "example_net " + " ".join(f"{key}={value}" for key, value in options.items()), snn, images
    torch.manual_seed(0)
    small = images[:, :, ::2, ::2].contiguous()
    loader = [(small, torch.zeros(len(small)).long())]
    for options in ({}, {"reset_mode": "zero"}):
        snn = convert_network(Residual(), loader, **options, **fixed).snn
        name = " ".join(["residual network", *(f"{key}={value}" for key, value in options.items())])
        yield name, snn, small
        for neuron in [*snn.neurons().values()][1:]:
            neuron.initial_potential.fill_(int(neuron.Vthr.max()) + 2)
        yield f"{name}, starting above Vthr", snn, small


def main(importer):
    if importer not in HEADINGS:
        raise SystemExit(f"error: unknown importer {importer}, use one of {', '.join(HEADINGS)}")
    worst = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, snn, images in networks():
            path = os.path.join(folder, FILE)
            if importer in UNSUPPORTED and re.search(UNSUPPORTED[importer], name):
                print(f"{importer}: {name}: not supported")
                continue
            wrong, counts = differences(importer, snn, images, path)
            spikes = int(sum(count.sum() for count in counts.values()))
            print(f"{importer}: {name}: {spikes} spikes of {len(counts)} layers, {sum(wrong.values())} counts differ")
            worst = max(worst, *wrong.values())
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or ["nirtorch"]))
