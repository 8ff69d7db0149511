"""Preprocessing: size, channels and normalisation by the flags, as torchvision computes them, and stored."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import python
from PIL import Image
from torchvision import transforms

from build_network import get_net_by_name
from datasets import get_dataset
from inputs.image_files import centre_crop, resize_bytes
from inputs.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from snn_weight_setter import trans_ann2snn_weight
from spike_dag import from_dict, load_dag


def loaders(dataset, **options):
    return get_dataset(SimpleNamespace(dataset=str(dataset), **options))


def images_of(loader):
    return torch.cat([images for images, _ in loader])


@pytest.fixture
def photos(tmp_path):
    """Two classes of random images of 40x30 pixels, 3 training and 2 test images each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 2)):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def by_torchvision(root, *steps):
    """The test images as a user's own loop reads them."""
    transform = transforms.Compose([*steps[:-1], transforms.ToTensor(), *steps[-1:]])
    files = sorted((root / "test").glob("*/*"))
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])


def same(loader, expected):
    return torch.allclose(images_of(loader), expected, atol=1e-5)


def test_none_is_what_to_tensor_gives(photos):
    own = by_torchvision(photos, transforms.Normalize(0, 1))
    assert same(loaders(photos, image_size=None, preprocess="none")[0], own)
    assert own.min() == 0 and own.max() == 1


def test_mean_and_std_are_those_of_normalize(photos):
    own = by_torchvision(photos, transforms.Normalize((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    options = {"image_size": None, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    assert same(loaders(photos, **options)[0], own)
    grey = by_torchvision(photos, transforms.Normalize(0.5, 0.25))
    assert same(loaders(photos, image_size=None, mean=(0.5,), std=(0.25,))[0], grey)


def test_resize_and_crop_are_those_of_torchvision(photos):
    own = by_torchvision(
        photos, transforms.Resize(20), transforms.CenterCrop(16), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    )
    options = {"resize": 20, "crop": 16, "preprocess": "imagenet"}
    assert same(loaders(photos, image_size=None, **options)[0], own)
    assert same(loaders(photos, image_size=(16, 16), **{**options, "crop": None})[0], own)


def test_imagenet_resizes_files_of_another_size_alone(photos):
    steps = transforms.Resize(32), transforms.CenterCrop(28)  # 28 * 256 / 224 = 32
    own = by_torchvision(photos, *steps, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    assert same(loaders(photos, image_size=28, preprocess="imagenet")[0], own)
    own = by_torchvision(photos, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    assert same(loaders(photos, image_size=(30, 40), preprocess="imagenet")[0], own)


def test_data_sets_in_memory_are_resized_and_cropped_too():
    plain = loaders("debug2", image_size=None, preprocess="none")[0].dataset
    cropped = loaders("debug2", image_size=None, preprocess="none", resize=6, crop=4)[0].dataset
    assert torch.equal(cropped[3][0], plain[3][0][:, 1:5, 1:5])
    three = loaders("debug2", image_size=None, channels=3)[0].dataset
    assert three.channels == 3 and torch.equal(three[0][0], plain[0][0].expand(3, -1, -1))
    one = loaders("debug2", image_size=None, channels=1)[0].dataset
    assert torch.equal(one[0][0], plain[0][0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mean": (0.1, 0.2)}, "--mean has 2 values and the images 3 channels, give one for each"),
        ({"crop": 8, "image_size": 16}, r"--crop 8: the network takes images of \(16, 16\), leave one of them out"),
        ({"resize": 8, "image_size": 16}, "--resize 8 is below the image's 16 pixels, use at least that"),
    ],
)
def test_what_does_not_fit_is_refused(photos, options, message):
    with pytest.raises(ValueError, match=message):
        loaders(photos, **{"image_size": None, **options})


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="the images have 2 channels and the network takes 3, use another --dataset"):
        loaders("debug1", image_size=None, channels=3)


def test_the_saved_network_reads_an_image_as_the_loader_does(photos, tmp_path):
    test, *_, train_val = loaders(photos, image_size=32, preprocess="imagenet")
    snn = trans_ann2snn_weight(get_net_by_name("example_net", 3, 2), train_val, "cpu", 4, 4)
    snn.preprocessing = test.dataset.preprocessing.to_dict()
    torch.save(snn, tmp_path / "snn.pth")
    again = Preprocessing.from_dict(load_dag(tmp_path / "snn.pth").preprocessing)
    assert again == test.dataset.preprocessing and again.classes == ("ant", "bee") and again.resize == 37
    read = torch.cat([again.read(str(file)) for file in sorted((photos / "test").glob("*/*"))])
    assert torch.equal(read, images_of(test))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_shape": [3, 0, 8]}, r"preprocessing input_shape \[3, 0, 8\]: use 3 times a whole number"),
        ({"std": [1.0, 0.0, 1.0]}, "preprocessing std"),
        ({"mean": [0.0]}, "preprocessing mean has 1 values for 3 channels"),
        ({"mean": None}, "preprocessing has one of mean and std, not both"),
        ({"classes": [1]}, "preprocessing classes"),
        ({"code": "x"}, "preprocessing 'code' is no field of it"),
    ],
)
def test_a_file_with_impossible_preprocessing_is_refused(photos, change, message):
    test, *_, train_val = loaders(photos, image_size=32)
    data = trans_ann2snn_weight(get_net_by_name("example_net", 3, 2), train_val, "cpu", 4, 4).to_dict()
    data["preprocessing"] = {**test.dataset.preprocessing.to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        from_dict(data)


def test_it_is_said_in_one_line():
    facts = (3, 8, 8), (0.5, 0.5, 0.5), (0.1, 0.2, 0.3)
    assert Preprocessing(*facts).in_words() == (
        "images: 3x8x8, cropped to the centre and resized; mean 0.5, std (0.1, 0.2, 0.3)"
    )
    assert Preprocessing(*facts, resize=9).in_words().startswith("images: 3x8x8, shorter side 9, centre crop; mean")
    assert Preprocessing((1, 8, 8)).in_words() == "images: 1x8x8, prepared by the user's own code"
    with pytest.raises(ValueError, match="the user's own code, use --mean and --std"):
        Preprocessing((1, 8, 8)).read("image.png")


RESIZED = """
import sys
import torch, pipeline
from inputs.image_files import centre_crop, resize_bytes

print("torchvision" in sys.modules)
pixels = torch.load(sys.argv[1])
torch.save((resize_bytes(pixels, (21, 32)), centre_crop(pixels, (12, 13), 14)), sys.argv[2])
"""


@pytest.mark.slow
def test_images_are_resized_alike_on_every_processor(tmp_path, monkeypatch):
    """torchvision's function would give others without AVX2, and needs seconds to import."""
    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    pixels = torch.randint(0, 256, (9, 3, 8, 11), dtype=torch.uint8)
    torch.save(pixels, before)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    run = python("-c", RESIZED, before, after)
    assert run.stdout == "False\n", run.stderr
    resized, cropped = torch.load(after)
    assert torch.equal(resized, resize_bytes(pixels, (21, 32)))
    assert torch.equal(cropped, centre_crop(pixels, (12, 13), 14))


@pytest.mark.parametrize("shape, side", [((8, 11), 14), ((9, 8), 5), ((37, 23), 23), ((10, 10), 7)])
def test_the_shorter_side_is_that_of_torchvision(shape, side):
    """Sizes are those of torchvision, and pixels differ from its float arithmetic by 1 at most."""
    pixels = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
    expected = transforms.functional.resize(pixels.float(), [side], antialias=True)
    expected = transforms.functional.center_crop(expected, [4, 5])
    assert (centre_crop(pixels, (4, 5), side) - expected).abs().max() <= 1
