"""Data sets: what the four loaders hold, in which order, and what they say about missing or damaged files."""

import os
import shutil
import socket
import struct
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ann2snn
import datasets
import train_ann
from inputs.image_files import FolderPixels, read_image

TEST, VAL, TRAIN, TRAIN_VAL = range(4)
COLOURS = {"ant": (255, 0, 51), "bee": (0, 102, 255), "cat": (204, 255, 0)}


def loaders(dataset, **options):
    return datasets.get_dataset(SimpleNamespace(dataset=str(dataset), **{"val_share": 0.1, **options}))


def contents(loader):
    """All images and labels of a loader, in order."""
    images, labels = zip(*loader)
    return torch.cat(images), torch.cat(labels)


def pixels_of(loader):
    """All images of a loader in order, on the scale of pixels."""
    return contents(loader)[0] * loader.dataset.std + loader.dataset.mean


def sorted_rows(images):
    """The images as a sorted list of tuples: a multiset to compare."""
    return sorted(map(tuple, images.flatten(1).tolist()))


def same_batches(first, second):
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


def random_image(size, seed, channels=3):
    shape = (size[1], size[0], channels)[: 3 if channels > 1 else 2]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def colour_folder(tmp_path):
    """Three classes of plain colour, 4 training and 2 test images each, of several sizes, plus a file to skip."""
    for split, number in (("train", 4), ("test", 2)):
        for name, colour in reversed(COLOURS.items()):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (9 + i, 12), colour).save(folder / f"{i}.{'PNG' if i else 'bmp'}")
            (folder / "notes.txt").write_text("no image")
    return tmp_path


@pytest.fixture
def random_folder(tmp_path):
    """Two classes of random images, 7 training and 3 test images each."""
    for split, number in (("train", 7), ("test", 3)):
        for label, name in enumerate(("left", "right")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                random_image((16, 16), [number, label, i]).save(folder / f"{i}.png")
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# digits


def test_digits_has_fixed_sizes_in_the_order_test_val_train_train_val():
    assert [len(loader.dataset) for loader in loaders("digits", image_size=8)] == [359, 143, 1295, 1438]
    assert [len(loader.dataset) for loader in loaders("digits", image_size=8, seed=5, val_share=0.25)[1:3]] == [
        359,
        1079,
    ]


def test_without_a_share_every_training_image_trains():
    sizes = [len(loader.dataset) for loader in datasets.get_dataset(SimpleNamespace(dataset="digits", image_size=8))]
    assert sizes == [359, 0, 1438, 1438]
    assert ann2snn.parse_args(["debug_net0"]).val_share == 0
    assert train_ann.parse_args(["debug_net0"]).val_share == 0.1  # it prints the validation accuracy


def test_digits_splits_are_disjoint_and_cover_all_images():
    from sklearn.datasets import load_digits

    expected = (load_digits().images * 255 / 16).round().reshape(-1, 64)
    test, val, train, train_val = loaders("digits", image_size=8)
    split = torch.cat([pixels_of(test), pixels_of(val), train.dataset.pixels]).round()
    assert sorted_rows(split) == sorted(map(tuple, expected.tolist()))
    assert sorted_rows(pixels_of(train_val).round()) == sorted_rows(split[len(test.dataset) :])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.9])
def test_stratified_split_takes_the_share_of_every_class(share):
    labels = torch.arange(1000).remainder(7).square().remainder(5)
    first, second = datasets.stratified_split(labels, share)
    assert sorted(torch.cat([first, second]).tolist()) == list(range(1000))
    members, taken = labels.bincount(minlength=5), labels[second].bincount(minlength=5)
    assert taken.tolist() == [round(share * n) for n in members.tolist()]
    assert torch.equal(second, datasets.stratified_split(labels.clone(), share)[1])


def test_every_split_of_digits_is_stratified():
    test, val, _, train_val = loaders("digits", image_size=8)
    per_class = [contents(loader)[1].bincount(minlength=10) for loader in (test, val, train_val)]
    assert torch.equal(per_class[0], ((per_class[0] + per_class[2]) * 0.2).round().long())
    assert torch.equal(per_class[1], (per_class[2] * 0.1).round().long())


@pytest.mark.parametrize("options, size", [({}, 32), ({"image_size": 8}, 8), ({"image_size": 6}, 6)])
def test_digits_have_the_image_size_of_args(options, size):
    for loader in loaders("digits", **options):
        images, labels = next(iter(loader))
        assert images.shape == (len(labels), 1, size, size) and images.dtype == torch.float32
        assert (labels.dtype, loader.dataset.channels, loader.dataset.num_classes) == (torch.int64, 1, 10)


def test_one_item_is_an_image_and_its_label():
    dataset = loaders("digits", image_size=8)[TEST].dataset
    images, labels = dataset.__getitems__([3, 4])
    image, label = dataset[4]
    assert torch.equal(image, images[1]) and image.shape == (1, 8, 8) and label == labels[1]


@pytest.mark.parametrize("which", [TEST, VAL, TRAIN_VAL])
def test_loaders_but_train_are_never_augmented(which):
    loader = loaders("digits", image_size=8)[which]
    assert same_batches(loader, loader)
    assert torch.allclose(pixels_of(loader), loader.dataset.pixels.float(), atol=1e-3)


def test_train_is_shuffled_and_augmented_and_keeps_its_labels():
    train = loaders("digits", image_size=8)[TRAIN]
    (first, first_labels), (second, second_labels) = contents(train), contents(train)
    assert not torch.equal(first_labels, second_labels)
    assert (
        first_labels.bincount().tolist()
        == second_labels.bincount().tolist()
        == train.dataset.labels.bincount().tolist()
    )
    stored = set(sorted_rows(train.dataset.pixels))
    for epoch in (first, second):
        pixels = (epoch * train.dataset.std + train.dataset.mean).round()
        assert sum(row in stored for row in sorted_rows(pixels)) < 0.2 * len(stored)


def test_same_seed_gives_the_same_training_batches():
    def epoch(seed):
        torch.manual_seed(seed)
        return list(loaders("digits", image_size=8, seed=seed)[TRAIN])

    assert same_batches(epoch(1), epoch(1))
    assert not same_batches(epoch(1), epoch(2))


@pytest.mark.parametrize("which", [TEST, VAL, TRAIN_VAL])
def test_a_pass_over_another_loader_leaves_the_training_batches_as_they_are(which):
    quiet, busy = loaders("digits", image_size=8), loaders("digits", image_size=8)
    contents(busy[which])
    torch.manual_seed(0)
    first = contents(quiet[TRAIN])
    torch.manual_seed(0)
    second = contents(busy[TRAIN])
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_train_val_is_in_a_fixed_shuffled_order():
    same = [contents(loaders("digits", image_size=8, seed=3)[TRAIN_VAL]) for _ in range(2)]
    other = contents(loaders("digits", image_size=8, seed=4)[TRAIN_VAL])
    assert same_batches([same[0]], [same[1]])
    assert not torch.equal(same[0][1], other[1])
    assert same[0][1][:200].bincount(minlength=10).min() >= 10  # a calibration prefix holds every class
    assert sorted_rows(same[0][0]) == sorted_rows(other[0])


def test_no_sample_is_dropped_for_a_ragged_last_batch():
    test, val, train, train_val = loaders("digits", image_size=8, batch_size=256, test_batch_size=60)
    sizes = [[len(labels) for _, labels in loader] for loader in (test, val, train, train_val)]
    assert sizes == [[60] * 5 + [59], [60, 60, 23], [256] * 5 + [15], [256] * 5 + [158]]


def test_digits_are_normalised_by_what_their_training_pixels_say():
    images = datasets.digits(None, 32)
    pixels = images.train_images.double() / 255
    assert images.mean == (round(pixels.mean().item(), 4),) and images.std == (round(pixels.std().item(), 4),)
    normalised = contents(loaders("digits")[TRAIN_VAL])[0].double()
    assert abs(normalised.mean()) < 1e-3 and abs(normalised.std() - 1) < 1e-3


def test_workers_give_the_same_batches():
    assert same_batches(loaders("debug0", num_workers=1)[TEST], loaders("debug0")[TEST])


# ---------------------------------------------------------------------------------------------------------------------
# augmentation


@pytest.mark.parametrize("padding", [1, 2])
def test_random_crop_is_a_shift_that_brings_in_zeros(padding):
    torch.manual_seed(0)
    B, C, H, W = 300, 2, 5, 6
    batch = torch.randint(1, 256, (B, C, H, W), dtype=torch.uint8)
    cropped = datasets.random_crop(batch, padding)
    assert cropped.shape == batch.shape and cropped.dtype == torch.uint8
    seen = set()
    for image, result in zip(batch, cropped):
        offsets = []
        for dy in range(-padding, padding + 1):
            for dx in range(-padding, padding + 1):
                shifted = torch.zeros_like(image)
                for y in range(max(0, -dy), min(H, H - dy)):
                    for x in range(max(0, -dx), min(W, W - dx)):
                        shifted[:, y, x] = image[:, y + dy, x + dx]
                offsets += [(dy, dx)] * torch.equal(shifted, result)
        assert len(offsets) == 1
        seen.update(offsets)
    assert len(seen) == (2 * padding + 1) ** 2


def test_a_data_set_is_added_by_one_entry(monkeypatch):
    def stairs(root, image_size):
        pixels = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4) + torch.arange(40, dtype=torch.uint8).view(
            -1, 1, 1, 1
        )
        labels = torch.arange(40) % 2
        return datasets.Images(pixels, labels, pixels[:8], labels[:8], ("even", "odd"), (0.0,), (1 / 255,), flip=True)

    monkeypatch.setitem(datasets.DATASETS, "stairs", stairs)
    test, _, train, _ = loaders("stairs", val_share=0.0)
    assert test.dataset.classes == ("even", "odd") and len(train.dataset) == 40
    assert torch.equal(contents(test)[0].flatten(), (torch.arange(16) + torch.arange(8)[:, None]).flatten().float())
    images = contents(train)[0][:, 0]
    rising = images[:, 0, 0] < images[:, 0, 3]
    assert 0 < rising.sum() < 40  # some images are mirrored, some are not
    plain = torch.where(rising[:, None, None], images, images.flip(-1))
    assert sorted_rows(plain) == sorted_rows(train.dataset.pixels)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unknown data set 'stairs'"):
        loaders("stairs")


# ---------------------------------------------------------------------------------------------------------------------
# image folders


def test_folder_has_sorted_classes_and_their_images(colour_folder):
    test, val, train, train_val = loaders("folder", dataset_root=str(colour_folder), image_size=8)
    assert [len(loader.dataset) for loader in (test, val, train, train_val)] == [6, 0, 12, 12]
    assert test.dataset.classes == ("ant", "bee", "cat") and test.dataset.channels == 3
    assert contents(test)[1].tolist() == [0, 0, 1, 1, 2, 2]
    for loader in (test, train_val):
        expected = torch.tensor(list(COLOURS.values()))[contents(loader)[1]]
        assert torch.allclose(pixels_of(loader), expected[:, :, None, None].expand(-1, -1, 8, 8).float(), atol=1e-3)


@pytest.mark.parametrize("size", [8, 16, 20])
def test_folder_path_can_be_the_data_set(random_folder, size):
    by_name = loaders("folder", dataset_root=str(random_folder), image_size=size)
    by_path = loaders(random_folder, image_size=size)
    assert contents(by_path[TEST])[0].shape == (6, 3, size, size)
    assert all(same_batches(by_name[which], by_path[which]) for which in (TEST, VAL, TRAIN_VAL))


def test_folder_keeps_the_pixels_of_images_of_the_right_size(random_folder):
    stored = [
        np.array(Image.open(random_folder / "test" / name / f"{i}.png")) for name in ("left", "right") for i in range(3)
    ]
    pixels = pixels_of(loaders(random_folder, image_size=16)[TEST])
    assert torch.allclose(pixels, torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2).float(), atol=1e-3)


def test_folder_is_normalised_by_its_training_images(random_folder):
    *_, train, train_val = loaders(random_folder, image_size=16)
    images = contents(train_val)[0].double()
    assert images.mean((0, 2, 3)).abs().max() < 1e-3 and (images.std((0, 2, 3)) - 1).abs().max() < 1e-3
    torch.manual_seed(0)
    assert not same_batches([contents(train)], [contents(train)])  # augmented


@pytest.mark.parametrize("size, box", [((24, 8), (8, 0, 16, 8)), ((8, 24), (0, 8, 8, 16))])
def test_an_image_is_cut_to_the_square_at_its_centre(tmp_path, size, box):
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 128, 255), box)
    image.save(tmp_path / "wide.png")
    pixels = read_image(str(tmp_path / "wide.png"), 8)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.tensor([0, 128, 255]).view(3, 1, 1).expand(3, 8, 8).to(torch.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_kind_of_grey_or_transparent_image_becomes_rgb(tmp_path, mode):
    grey = np.array([[0, 0, 255, 255]] * 4, dtype=np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "grey.png")
    pixels = read_image(str(tmp_path / "grey.png"), 4)
    assert torch.equal(pixels, torch.from_numpy(grey).expand(3, 4, 4))


def test_sixteen_bit_grey_keeps_its_middle_tones(tmp_path):
    grey = np.arange(16, dtype=np.uint16).reshape(4, 4) * 17
    Image.fromarray(grey * 257).save(tmp_path / "deep.png")
    pixels = read_image(str(tmp_path / "deep.png"), 4).int()
    assert (pixels - torch.from_numpy(grey.astype(np.int32))).abs().max() <= 1  # 65535 / 255 = 257, rounded either way


def test_a_folder_too_large_for_memory_gives_the_same_batches(random_folder, monkeypatch):
    def batches():
        torch.manual_seed(0)
        return [list(loader) for loader in loaders(random_folder, image_size=16, val_share=0.3)]

    in_memory = batches()
    monkeypatch.setattr(datasets, "LARGEST_SET_IN_MEMORY", 0)
    assert isinstance(loaders(random_folder, image_size=16)[TRAIN].dataset.pixels, FolderPixels)
    lazy = batches()
    assert [len(batch) for batch in lazy] == [1, 1, 1, 1]
    assert all(same_batches(a, b) for a, b in zip(in_memory, lazy))


# ---------------------------------------------------------------------------------------------------------------------
# debug sets


@pytest.mark.parametrize("name, shape", [("debug0", (1, 6, 6)), ("debug1", (2, 4, 4)), ("debug2", (1, 6, 6))])
def test_debug_sets_are_binary_images_of_two_classes(name, shape):
    test, _, _, train_val = loaders(name)
    assert (len(test.dataset), len(train_val.dataset)) == (32, 64)
    for loader in (test, train_val):
        images, labels = contents(loader)
        assert images.shape[1:] == shape and images.unique().tolist() == [0.0, 1.0]
        assert labels.bincount().tolist() == [len(labels) // 2] * 2
    assert same_batches(test, loaders(name, seed=1)[TEST])


def test_debug0_classes_differ_in_the_columns_that_hold_pixels():
    images, labels = contents(loaders("debug0")[TEST])
    left, right = images[..., :2].sum((1, 2, 3)), images[..., 4:].sum((1, 2, 3))
    assert torch.equal(left == 0, labels == 1) and torch.equal(right == 0, labels == 0)


def test_debug1_classes_differ_in_the_channel_that_is_full():
    images, labels = contents(loaders("debug1")[TEST])
    assert torch.equal(images.mean((2, 3)) == 1, torch.stack([labels == 0, labels == 1], 1))


def test_debug2_classes_differ_in_the_direction_of_their_stripes():
    images, labels = contents(loaders("debug2")[TEST])
    vertical = (images == images[:, :, :1]).all(3).all(2).flatten()
    horizontal = (images == images[..., :1]).all(3).all(2).flatten()
    assert torch.equal(vertical, labels == 0) and torch.equal(horizontal, labels == 1)


# ---------------------------------------------------------------------------------------------------------------------
# MNIST and CIFAR


def write_idx(file, array):
    """A file in MNIST's format."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    file.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    """Files of MNIST's layout with 20 training and 10 test images, image i all of grey level i."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, number in (("train", 20), ("t10k", 10)):
        write_idx(raw / f"{split}-images-idx3-ubyte", np.arange(number)[:, None, None].repeat(28, 1).repeat(28, 2))
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(number) % 10)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    """Downloads end at a proxy that refuses connections."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)


def test_mnist_is_read_from_its_files(mnist_root):
    test, _, _, train_val = loaders("MNIST", dataset_root=str(mnist_root))
    assert contents(test)[1].tolist() == list(range(10)) and len(train_val.dataset) == 20
    expected = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 32, 32)
    assert torch.allclose(pixels_of(test), expected, atol=1e-3)


@pytest.mark.parametrize("kept_bytes", [0, 3, 100])
def test_a_damaged_mnist_file_is_named_by_its_folder(mnist_root, offline, kept_bytes):
    file = mnist_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises((OSError, ValueError), match="MNIST") as error:
        loaders("MNIST", dataset_root=str(mnist_root))
    assert str(mnist_root) in str(error.value)


@pytest.mark.parametrize(
    "name, files",
    [("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python"), ("MNIST", "train-images-idx3-ubyte")],
)
def test_offline_a_missing_data_set_is_named_with_the_files_it_needs(tmp_path, offline, name, files):
    with pytest.raises(OSError, match=name) as error:
        loaders(name, dataset_root=str(tmp_path))
    assert str(tmp_path) in str(error.value) and files in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# errors


def test_an_unknown_data_set_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="unknown data set 'nope'") as error:
        loaders("nope")
    assert all(name in str(error.value) for name in datasets.DATASETS)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match=f"no image folder {tmp_path}/nowhere, expected"):
        loaders("folder", dataset_root=f"{tmp_path}/nowhere")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is empty"):
        loaders(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/train is empty"):
        loaders(tmp_path)


def take_place_as_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # the path of a socket has at most 107 letters


@pytest.mark.parametrize("take_place", [os.mkfifo, os.mkdir, take_place_as_socket])
def test_what_is_no_file_in_an_image_folder_is_passed_over(random_folder, monkeypatch, take_place):
    monkeypatch.chdir(random_folder)
    take_place(str(random_folder / "train" / "left" / "a.png"))
    (random_folder / "train" / "left" / "b.png").symlink_to("a.png")
    (random_folder / "train" / "left" / "c.png").symlink_to("0.png")
    assert len(loaders(random_folder, image_size=8)[TRAIN_VAL].dataset) == 15  # of 14 images and a link to one


def test_an_image_that_is_gone_or_turns_into_a_pipe_is_named(random_folder, monkeypatch):
    gone = random_folder / "train" / "left" / "gone.png"
    gone.symlink_to("nothing.png")
    with pytest.raises(OSError, match=f"cannot read the image {gone}"):
        loaders(random_folder, image_size=8)
    gone.unlink()
    os.mkfifo(gone)
    with pytest.raises(OSError, match=f"cannot read the image {gone} .*not a regular file"):
        read_image(str(gone), 8)


def test_without_test_images_a_fifth_of_each_class_is_kept_for_them(random_folder, capsys):
    shutil.rmtree(random_folder / "test")
    expected = "has no test images, one in five of each class is kept for the test"
    test, _, _, train_val = loaders(random_folder, image_size=None, val_share=0.0)
    assert capsys.readouterr().err == f"{random_folder}/train {expected}\n"
    assert (len(test.dataset), len(train_val.dataset)) == (2, 12)
    for split in random_folder.glob("train/*"):
        split.rename(random_folder / split.name)
    (random_folder / "train").rmdir()
    again = loaders(random_folder, image_size=None, val_share=0.0)
    assert capsys.readouterr().err == f"{random_folder} {expected}\n"
    assert same_batches(test, again[TEST]) and same_batches(train_val, again[TRAIN_VAL])
    assert not set(sorted_rows(contents(test)[0])) & set(sorted_rows(contents(train_val)[0]))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_folder_of_test_images_may_be_called_val(random_folder, name):
    expected = contents(loaders(random_folder, image_size=8)[TEST])
    (random_folder / "test").rename(random_folder / name)
    assert all(torch.equal(a, b) for a, b in zip(contents(loaders(random_folder, image_size=8)[TEST]), expected))


def test_grey_files_have_one_channel_unless_the_network_takes_three(tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(2):
                random_image((9, 7), [len(split), ord(label), i], channels=1).save(
                    tmp_path / split / label / f"{i}.png"
                )
    test = loaders(tmp_path, image_size=None, val_share=0.0)[TEST]
    stored = [np.array(Image.open(tmp_path / "test" / label / f"{i}.png")) for label in "ab" for i in range(2)]
    assert torch.allclose(pixels_of(test)[:, 0], torch.from_numpy(np.stack(stored)).float(), atol=1e-3)
    assert test.dataset.channels == 1 and test.dataset.preprocessing.shape == (1, 7, 9)
    three = loaders(tmp_path, image_size=None, val_share=0.0, channels=3)[TEST]
    assert torch.allclose(pixels_of(three), pixels_of(test).expand(-1, 3, -1, -1), atol=1e-3)


def test_files_of_several_sizes_need_a_size(colour_folder):
    with pytest.raises(ValueError, match="have several sizes, choose one: --input_shape 3,H,W or --crop PIXELS"):
        loaders(colour_folder, image_size=None)
    assert loaders(colour_folder, image_size=None, crop=8)[TEST].dataset[0][0].shape == (3, 8, 8)


def test_a_class_without_images_is_named(random_folder):
    (random_folder / "train" / "middle").mkdir()
    (random_folder / "train" / "middle" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=f"no images in {random_folder}/train/middle"):
        loaders(random_folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_in_one_split_only_is_named(random_folder, split):
    (random_folder / split / "extra").mkdir()
    random_image((8, 8), 0).save(random_folder / split / "extra" / "0.png")
    with pytest.raises(ValueError, match=rf"{random_folder}/train and .*/test hold different classes \(extra\)"):
        loaders(random_folder)


def test_a_val_share_that_leaves_no_training_image_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        random_image((8, 8), 0).save(tmp_path / split / "only" / "0.png")
    with pytest.raises(ValueError, match="val_share"):
        loaders(tmp_path, val_share=0.9)


def write_text(file):
    file.write_text("no image")


def write_nothing(file):
    file.write_bytes(b"")


def write_half(file):
    random_image((32, 32), 0).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def write_wrong_chunk(file):
    """A PNG whose first chunk of pixels seems to end early, so that pixels are read as the next chunk's name."""
    random_image((32, 32), 0).save(file)
    data = file.read_bytes()
    at = data.index(b"IDAT")
    file.write_bytes(data[: at - 4] + struct.pack(">I", 100) + data[at:])


def write_wrong_number(file):
    file.write_bytes(b"P6 4 x4 255\n" + bytes(48))


def write_huge_size(file):
    """A BMP header that claims 60,000 x 60,000 pixels, beyond what Pillow agrees to decode."""
    header = struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
    file.write_bytes(b"BM" + header)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    "suffix, damage",
    [
        ("jpg", write_text),
        ("png", write_nothing),
        ("jpg", write_half),
        ("png", write_half),
        ("png", write_wrong_chunk),
        ("ppm", write_wrong_number),
        ("bmp", write_huge_size),
    ],
)
def test_a_damaged_image_is_named(random_folder, monkeypatch, suffix, damage, in_memory):
    if not in_memory:
        monkeypatch.setattr(datasets, "LARGEST_SET_IN_MEMORY", 0)
    file = random_folder / "train" / "right" / f"damaged.{suffix}"
    damage(file)
    with pytest.raises((OSError, ValueError), match=f"cannot read the image {file}"):
        loaders(random_folder, image_size=8)
