#!/bin/sh
# torchvision 0.29.1 resizes the same bytes to other pixels on a processor without AVX2.
#
# Expected: `torchvision.transforms.v2.functional.resize` of uint8 images gives the same uint8 images on every CPU, as
# all of it is rounded to whole numbers in the end. It computes on bytes only where PyTorch reports AVX2 or AVX512. On
# other processors (by its source those of ARM, too; not run there) it computes on floats and rounds, which makes some
# pixels one brighter or darker. torch 2.14.1 itself, `torch.nn.functional.interpolate(bytes, antialias=True)`, gives
# the same bytes with and without AVX2. Networks that were calibrated on one processor thus see other inputs on the
# next one. https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.v2.functional.resize.html
#
# Needs an x86 processor with AVX2; ATEN_CPU_CAPABILITY=default stands for one without. No differences by PyTorch's own
# function. Seen: "torchvision differs by 1 in 26.5 % of the pixels, torch in 0.0 %". Exit status 1 where that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy
cd "$folder"
cat > resize.py <<'PYTHON'
import sys

import torch
from torchvision.transforms.v2.functional import resize

torch.manual_seed(0)
images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
by_torchvision = resize(images, [48, 48], antialias=True)
by_torch = torch.nn.functional.interpolate(images, (48, 48), mode="bilinear", antialias=True)
torch.save((torch.backends.cpu.get_cpu_capability(), by_torchvision, by_torch), sys.argv[1])
PYTHON
"$folder/venv/bin/python" resize.py with.pt
ATEN_CPU_CAPABILITY=default "$folder/venv/bin/python" resize.py without.pt
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

(with_avx, *first), (without_avx, *second) = torch.load("with.pt"), torch.load("without.pt")
if with_avx not in ("AVX2", "AVX512") or without_avx != "DEFAULT":
    sys.exit(f"this needs a processor with AVX2, found {with_avx} and {without_avx}")
steps = [(one.int() - other.int()).abs() for one, other in zip(first, second)]
shares = [100 * (each > 0).double().mean().item() for each in steps]
print(f"torchvision differs by {steps[0].max()} in {shares[0]:.1f} % of the pixels, torch in {shares[1]:.1f} %")
sys.exit(not (steps[0].max() == 1 and shares[0] > 0 and shares[1] == 0))
PYTHON
