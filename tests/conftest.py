"""The fixtures of several test files.

How the shared parts relate: reference.py computes spikes and operations on its own, in NumPy integers, and imports
nothing of the toolkit. helpers.py builds and converts small networks, and asserts their spikes against the reference;
tracing.py does so for the tracer's tests, onnx_models.py for the importer's, export_helpers.py for those of the
exports. All are imported by name. Fixtures are here where several files use them, else in the file that does. No test
file imports another one.
"""

# ruff: noqa: E402 (torch reads the environment when it is imported)

import os
from types import SimpleNamespace

import pytest

# Idle threads sleep. Otherwise they spin on a core that another thread or process needs: on a busy machine of two
# cores, tests with two threads took about three times as much processor time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No progress bars. They appear after a second of work, on a busy machine therefore in what tests compare.
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from build_network import get_net_by_name
from datasets import get_dataset

# so that their failures show values, as those of the tests do
pytest.register_assert_rewrite("helpers", "export_helpers", "tracing", "onnx_models")
from helpers import with_random_norms

torch.set_num_threads(1)  # most networks here are so small that a second thread costs more than it saves


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or behind others."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def two_threads():
    """Threads share the batch of a simulation: for tests of spikes, in files that ask for it by `pytestmark`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits_loaders():
    """test, val, train and train+val loaders of the digits at 32x32."""
    return get_dataset(SimpleNamespace(dataset="digits", batch_size=128, test_batch_size=100))


@pytest.fixture(scope="session")
def digits_images(digits_loaders):
    """200 calibration images, [200, 1, 32, 32]."""
    batches = [images for images, _ in digits_loaders[3]]
    return torch.cat(batches)[:200]


@pytest.fixture(scope="module")
def resnet():
    """resnet20 with statistics, and 3 images of 8x8."""
    torch.manual_seed(0)
    return with_random_norms(get_net_by_name("resnet20", 3, 10)), torch.randn(3, 3, 8, 8)
