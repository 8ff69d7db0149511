from types import SimpleNamespace

import pytest
import torch

from datasets import get_dataset

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def digits_loaders():
    """test, val, train and train+val loaders of the digits at 32x32."""
    return get_dataset(SimpleNamespace(dataset="digits", batch_size=128, test_batch_size=100))


@pytest.fixture(scope="session")
def digits_images(digits_loaders):
    """200 calibration images, [200, 1, 32, 32]."""
    batches = [images for images, _ in digits_loaders[3]]
    return torch.cat(batches)[:200]
