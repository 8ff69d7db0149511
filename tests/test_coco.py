"""COCO: letterboxing, boxes and categories, the detector's targets, loss and mAP, and the commands that use them."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_reference_agrees, with_random_norms, with_status
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ann2snn
import train_ann
from build_network import get_net_by_name
from datasets import get_dataset
from detection import coco
from detection.boxes import (
    DetectionLoss,
    assign,
    cells,
    describe,
    evaluate_detector,
    find_boxes,
    mean_average_precision,
    to_boxes,
)
from detection.coco import Letterbox, mirror_and_shift, pad_targets, shift
from runtime.cli import run_script
from transformer.saved import make_vectors

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import draw_shapes

TEST, VAL, TRAIN, TRAIN_VAL = range(4)
BLUE, ORANGE = (0, 0, 255), (255, 128, 0)
CATEGORIES = [{"id": 90, "name": "orange"}, {"id": 7, "name": "blue"}]


def box(number, image, category, bbox, iscrowd=0):
    """An annotation in COCO's form."""
    area = bbox[2] * bbox[3]
    segmentation = {"counts": [0, 1, 1], "size": [1, 2]} if iscrowd else [[0, 0, 1, 0, 1, 1]]
    keys = {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": area}
    return {**keys, "iscrowd": iscrowd, "segmentation": segmentation}


def write_coco(root, split, sizes, annotations, **more):
    """The files of one split: plain images of the given (width, height) with their boxes filled, ids 10, 20, ..."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    images = []
    for number, (width, height) in enumerate(sizes, 1):
        picture = Image.new("RGB", (width, height))
        for entry in annotations:
            if entry["image_id"] == 10 * number and len(entry["bbox"]) == 4:
                left, top, w, h = map(int, entry["bbox"])
                picture.paste(BLUE if entry["category_id"] == 7 else ORANGE, (left, top, left + w, top + h))
        picture.save(root / split / f"{number}.png")
        images.append({"id": 10 * number, "file_name": f"{number}.png", "width": width, "height": height})
    data = {"images": images, "annotations": annotations, "categories": CATEGORIES, **more}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))


TRAIN_BOXES = [box(i, 10 * i, 90 if i % 2 else 7, [4, 6, 20, 20]) for i in range(1, 11)]
TRAIN_BOXES.append(box(11, 10, 7, [30, 2, 0, 12]))  # empty
VAL_BOXES = [
    box(1, 10, 7, [10, 20, 40, 30]),
    box(2, 10, 90, [60, 5, 30, 60]),
    box(3, 10, 90, [50, 70, 50, 10], iscrowd=1),
    box(4, 30, 90, [4, 8, 24, 24]),
]


@pytest.fixture
def small(tmp_path):
    """10 training images, and 3 to test on: wide with a crowd, without boxes, tall."""
    write_coco(tmp_path, "train2017", [(48, 40)] * 10, TRAIN_BOXES)
    write_coco(tmp_path, "val2017", [(120, 90), (30, 30), (50, 100)], VAL_BOXES)
    return tmp_path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """24 drawn training images and 8 to test on."""
    folder = tmp_path_factory.mktemp("shapes") / "drawn"
    draw_shapes.main(draw_shapes.parse_args([str(folder), "--train", "24", "--val", "8"]))
    return folder


def loaders(root, **options):
    return get_dataset(SimpleNamespace(dataset="COCO", dataset_root=str(root), **{"image_size": 96, **options}))


def test_images_are_square(shapes):
    with pytest.raises(ValueError, match="COCO makes square images, not 64x96: give --input_shape 3,S,S"):
        loaders(shapes, image_size=(64, 96))
    assert loaders(shapes, image_size=None)[0].dataset[0][0].shape == (3, 96, 96)


def error_of(root):
    with pytest.raises((ValueError, OSError)) as error:
        loaders(root)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Images and boxes


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(8, 640), st.data())
def test_boxes_survive_the_letterbox(width, height, size, data):
    letterbox = Letterbox(width, height, size)
    (inner_width, inner_height), (left, top) = letterbox.inner, letterbox.offset
    assert (
        max(inner_width, inner_height) == size and 0 <= left <= size - inner_width and 0 <= top <= size - inner_height
    )
    x, y = (sorted(data.draw(st.tuples(*[st.floats(0, n, width=32)] * 2))) for n in (width, height))
    boxes = torch.tensor([[x[0], y[0], x[1], y[1]]])
    square = letterbox.to_square(boxes)
    assert (square >= torch.tensor([left, top] * 2) - 1e-3).all()
    assert (square <= torch.tensor([left + inner_width, top + inner_height] * 2) + 1e-3).all()
    precision = 1e-5 * max(width, height) * size * max(1 / inner_width, 1 / inner_height)
    assert torch.allclose(letterbox.to_image(square), boxes, atol=precision + 1e-4)
    assert torch.equal(
        letterbox.to_image(torch.tensor([[-1e6, -1e6, 1e6, 1e6]])), torch.tensor([[0.0, 0.0, width, height]])
    )


def test_a_letterboxed_image_by_hand():
    letterbox = Letterbox(8, 4, 16)
    pixels = letterbox.draw(Image.new("RGB", (8, 4), BLUE))
    assert (letterbox.inner, letterbox.offset) == ((16, 8), (0, 4))
    assert (pixels[:, 4:12] == torch.tensor(BLUE).view(3, 1, 1)).all()
    assert (pixels[:, :4] == coco.GREY).all() and (pixels[:, 12:] == coco.GREY).all()
    assert letterbox.to_square(torch.tensor([[1.0, 2.0, 8.0, 4.0]])).tolist() == [[2, 8, 16, 12]]


def test_classes_crowds_and_images_without_boxes(small):
    images, targets = next(iter(loaders(small)[TEST]))
    dataset = loaders(small)[TEST].dataset
    assert (dataset.classes, dataset.num_classes, dataset.channels) == (("blue", "orange"), 2, 3)
    assert images.shape == (3, 3, 96, 96) and targets.shape == (3, 2, 5)
    # 120 x 90 becomes 96 x 72, 12 pixels from the top; the crowd is no target, and no empty box
    assert torch.allclose(targets[0], torch.tensor([[0.0, 8, 28, 40, 52], [1, 48, 16, 72, 64]]), atol=1e-4)
    assert torch.equal(targets[1], torch.full((2, 5), -1.0))
    assert torch.allclose(targets[2, 0], torch.tensor([1, 24 + 3.84, 7.68, 24 + 26.88, 30.72]), atol=1e-4)
    assert torch.equal(targets[2, 1], torch.full((5,), -1.0))
    assert loaders(small)[TRAIN].dataset.split.targets[0].tolist() == [[1, 4, 6, 24, 26]]
    pixels = images * dataset.std + dataset.mean
    assert torch.allclose(pixels[0, :, 40, 24], torch.tensor(BLUE).float(), atol=1e-3)
    assert torch.allclose(pixels[0, :, 40, 60], torch.tensor(ORANGE).float(), atol=1e-3)


def test_loaders_split_and_shuffle(small):
    test, val, train, train_val = loaders(small, val_share=0.3, batch_size=4)
    assert [len(loader.dataset) for loader in (test, val, train, train_val)] == [3, 3, 7, 10]
    assert sorted(val.dataset.indices + train.dataset.indices) == list(range(10))
    assert train_val.dataset.indices == loaders(small)[TRAIN_VAL].dataset.indices != list(range(10))
    assert train.dataset.augment and not (test.dataset.augment or val.dataset.augment or train_val.dataset.augment)
    assert [len(images) for images, _ in train] == [4, 3]
    first, second = (torch.cat([images for images, _ in loaders(small)[TRAIN_VAL]]) for _ in range(2))
    assert torch.equal(first, second)


def test_a_large_set_stays_on_disk(small, monkeypatch):
    expected = next(iter(loaders(small)[TEST]))
    monkeypatch.setattr(coco, "LARGEST_SPLIT_IN_MEMORY", 0)
    loader = loaders(small)[TEST]
    assert loader.dataset.split.pixels is None
    assert all(torch.equal(a, b) for a, b in zip(next(iter(loader)), expected))


def test_augmented_boxes_stay_on_their_objects():
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pixels[:, 4:12, 2:10] = 255
    targets = torch.tensor([[1.0, 2, 4, 10, 12]])
    moved, boxes = shift(pixels, targets, 3, -2)
    assert boxes.tolist() == [[1, 5, 2, 13, 10]] and (moved[:, 2:10, 5:13] == 255).all()
    assert (
        (moved == 255).sum() == 3 * 64 and (moved[:, -2:] == coco.GREY).all() and (moved[:, :, :3] == coco.GREY).all()
    )
    moved, boxes = shift(pixels, targets, -5, 0)
    assert boxes.tolist() == [[1, 0, 4, 5, 12]]
    assert shift(pixels, targets, -6, 0)[1].tolist() == []  # half of it has left
    torch.manual_seed(0)
    sides = set()
    for _ in range(20):
        moved, boxes = mirror_and_shift(pixels, targets)
        rows, columns = (moved[0] == 255).nonzero(as_tuple=True)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert boxes[0, 1:].tolist() == [int(n) for n in found]
        sides.add(bool(boxes[0, 1] > 12))
    assert sides == {False, True}


def test_padding_of_targets():
    padded = pad_targets([torch.zeros(0, 5), torch.ones(2, 5)])
    assert padded.tolist() == [[[-1] * 5] * 2, [[1] * 5] * 2]
    assert pad_targets([torch.zeros(0, 5)]).shape == (1, 1, 5)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be read


def change_json(root, split, change):
    path = root / "annotations" / f"instances_{split}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_missing_files_are_named(small, tmp_path):
    (small / "annotations" / "instances_val2017.json").rename(small / "annotations" / "moved.json")
    assert error_of(small).startswith(f"no annotations {small}/annotations/instances_val2017.json, put COCO's")
    (small / "annotations" / "moved.json").rename(small / "annotations" / "instances_val2017.json")
    (small / "val2017" / "2.png").unlink()
    assert error_of(small).startswith(f"cannot read the image {small}/val2017/2.png (FileNotFoundError)")
    (small / "val2017" / "2.png").write_bytes((small / "val2017" / "1.png").read_bytes()[:90])
    assert f"{small}/val2017/2.png" in error_of(small)
    (small / "val2017").rename(small / "gone")
    assert error_of(small).startswith(f"no image folder {small}/val2017")


DAMAGES = [
    (lambda d: d.pop("images"), "KeyError: 'images'"),
    (lambda d: d.pop("annotations"), "KeyError: 'annotations'"),
    (lambda d: d["images"][0].pop("width"), "KeyError: 'width'"),
    (lambda d: d["images"][0].update(height=0), "image 10 has no file name or no size"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), "annotation 2 has no box of 4 numbers"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, "4"]), "annotation 2 has no box of 4 numbers"),
    (
        lambda d: d["annotations"][1].update(category_id=8),
        "annotation 2 has no box of 4 numbers, no known category",
    ),
    (lambda d: d["annotations"][1].update(image_id=11), "no known image"),
    (lambda d: d["annotations"][1].pop("iscrowd"), "annotation 2 has no iscrowd"),
    (lambda d: d["annotations"][1].update(area=None), "annotation 2 has an iscrowd that is not 0 or 1, or an area"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, float("inf")]), "annotation 2 has no box of 4 numbers"),
    (lambda d: d["images"][0].update(file_name=5), "image 10 has no file name or no size"),
    (lambda d: d["images"][0].update(width=float("inf")), "image 10 has no file name or no size"),
    (lambda d: d["images"].append({**d["images"][0], "id": 1.5}), "the image id 1.5 is not a whole number"),
    (lambda d: d["categories"].append({"id": 1.5, "name": "x"}), "the category id 1.5 is not a whole number"),
    (lambda d: d["images"][0].update(id=True), "the image id True is not a whole number"),
    (lambda d: d["images"][0].update(id="10"), "the image id '10' is not a whole number"),
    (lambda d: d["images"][0].update(id=[10]), "the image id [10] is not a whole number"),
    (lambda d: d["images"][0].update(id=10.0), "the image id 10.0 is not a whole number"),
    (lambda d: d["images"][0].update(id=10**400), "is not a whole number"),
    (lambda d: d["images"][2].pop("id"), "image number 3 of the file: KeyError: 'id'"),
    (lambda d: d["images"].insert(1, [1]), "image number 2 of the file: TypeError"),
    (lambda d: d["images"][0].update(width=10**400), "image 10 has no file name or no size"),
    (lambda d: d["images"][0].update(width=True), "image 10 has no file name or no size"),
    (lambda d: d["categories"][0].update(id=True), "the category id True is not a whole number"),
    (lambda d: d["categories"][0].update(name=5), "the name of category 90 is 5, not text"),
    (lambda d: d["annotations"][1].update(category_id=True), "annotation 2 has no box of 4 numbers, no known"),
    (lambda d: d["annotations"][1].update(category_id=[7]), "annotation 2 has no box of 4 numbers, no known"),
    (lambda d: d["annotations"][1].update(image_id={"a": 1}), "no known image"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, 10**400]), "annotation 2 has no box of 4 numbers"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, True]), "annotation 2 has no box of 4 numbers"),
    (lambda d: d["annotations"][1].update(bbox=None), "annotation number 2 of the file: TypeError"),
    (lambda d: d["annotations"][1].update(area=1e300), "or an area that is not a number"),
    (lambda d: d["annotations"][2].update(bbox=[]) or d["annotations"][2].pop("id"), "annotation number 3 of"),
    (lambda d: d.update(annotations=None), "TypeError"),
]


@pytest.mark.parametrize("change, message", DAMAGES)
def test_damaged_annotations_are_named(small, change, message):
    change_json(small, "train2017", change)
    error = error_of(small)
    assert (
        error.startswith(f"the annotations {small}/annotations/instances_train2017.json are damaged")
        and message in error
    )


def test_other_unusable_annotations(small):
    path = small / "annotations" / "instances_val2017.json"
    whole = path.read_text()
    for text in (whole[:200], "[1, 2]", "", "\0"):
        path.write_text(text)
        assert error_of(small).startswith(f"the annotations {path} are damaged, or not a COCO file")
    path.write_text(whole)
    change_json(small, "val2017", lambda d: d["categories"].append({"id": 91, "name": "red"}))
    assert "list different categories, use files of the same release" in error_of(small)
    change_json(small, "val2017", lambda d: d.update(images=[], annotations=[]))
    assert error_of(small) == f"{path} lists no images, use another file"


@pytest.mark.parametrize(
    "text", ["[" * 50_000, '{"images": ' * 50_000, '{"images": ' + "[" * 50_000 + "]" * 50_000 + "}"]
)
def test_annotations_that_are_nested_too_deep_are_named(small, text):
    path = small / "annotations" / "instances_train2017.json"
    path.write_text(text)
    assert error_of(small).startswith(f"the annotations {path} are damaged, or not a COCO file (RecursionError")


def test_an_image_that_is_a_pipe_does_not_hang(small):
    (small / "val2017" / "2.png").unlink()
    os.mkfifo(small / "val2017" / "2.png")
    assert error_of(small).startswith(f"cannot read the image {small}/val2017/2.png (OSError)")


def test_missing_pycocotools_is_named(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert error_of(small) == "--dataset COCO needs pycocotools, which is missing: pip install pycocotools"


# ---------------------------------------------------------------------------------------------------------------------
# The detector


def test_cells_and_boxes_by_hand():
    centres, strides = cells([torch.zeros(1, 6, 2, 2), torch.zeros(1, 6, 1, 1)], 16)
    assert centres.tolist() == [[4, 4], [12, 4], [4, 12], [12, 12], [8, 8]] and strides.tolist() == [8, 8, 8, 8, 16]
    unit = float(np.log(np.expm1(0.25)))  # softplus gives 0.25, times two strides: 4 pixels, and 8 at stride 16
    boxes = to_boxes(torch.full((1, 5, 4), unit), centres, strides)
    assert torch.allclose(
        boxes[0, [0, 3, 4]], torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16], [0, 0, 16, 16]]), atol=1e-5
    )


def test_which_cells_are_to_find_a_box():
    maps = [torch.zeros(1, 5, 12, 12), torch.zeros(1, 5, 6, 6)]
    centres, strides = cells(maps, 96)
    targets = torch.tensor([[[0.0, 8, 8, 24, 24], [0, 0, 0, 60, 40], [0, 41, 41, 43, 43], [-1, -1, -1, -1, -1]]])
    index = assign(targets, centres, strides)[0]
    fine, coarse = index[:144].view(12, 12), index[144:].view(6, 6)
    # within 12 pixels of its centre (16, 16), and inside
    assert (fine == 0).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    # a side of 60 is more than 5 strides of 8; cells with their centres within 24 pixels of (30, 20), and inside
    assert (coarse == 1).nonzero().tolist() == [[i, j] for i in range(2) for j in range(3)]
    assert (fine == 2).nonzero().tolist() == [[5, 5]]  # no centre is inside of it, but its own is in that cell
    assert (index >= 0).sum() == 4 + 6 + 1
    nested = torch.tensor([[[0.0, 0, 0, 40, 40], [1, 12, 12, 28, 28]]])
    assert assign(nested, centres, strides)[0][:144].view(12, 12)[2, 2] == 1  # the smaller one


def test_loss_by_hand():
    loss, ln2 = DetectionLoss(16), float(np.log(2))
    targets = torch.tensor([[[0.0, 0, 0, 8, 8]]])
    maps = torch.zeros(1, 5, 2, 2)
    maps[:, :4] = float(np.log(np.expm1(0.25)))
    # one cell is to find the box, and does; every probability is 0.5: 0.25 (1 - p)^2 ln 2, and 0.75 p^2 ln 2 thrice
    assert loss((maps,), targets).item() == pytest.approx(0.25 * ln2 * (0.25 + 3 * 0.75), abs=1e-5)
    maps[:, :4] = float(np.log(np.expm1(0.5)))  # 8 pixels to every side: 16 x 16 around 8 x 8, GIoU 0.25
    assert loss((maps,), targets).item() == pytest.approx(0.625 * ln2 + 0.75, abs=1e-5)
    nothing = torch.full((1, 1, 5), -1.0)
    assert loss((maps,), nothing).item() == pytest.approx(4 * 0.75 * 0.25 * ln2, abs=1e-5)
    maps[:, 4] = -40.0
    assert loss((maps,), nothing).item() == pytest.approx(0, abs=1e-6)


def test_boxes_that_overlap_better_ones_go():
    maps = torch.full((2, 6, 2, 2), -20.0)
    maps[0, :4] = float(np.log(np.expm1(4.0)))  # 64 pixels to every side: all four overlap by more than 0.6
    maps[0, 4] = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    maps[0, 5, 1, 1] = 2.5  # of another class
    (boxes, scores, labels), (none, _, _) = find_boxes((maps,), 16)
    assert labels.tolist() == [0, 1] and torch.allclose(scores, torch.tensor([3.0, 2.5]).sigmoid())
    assert torch.allclose(boxes[0], torch.tensor([-52.0, -60, 76, 68]), atol=1e-4) and len(none) == 0


class Oracle(torch.nn.Module):
    """Returns the maps that say exactly what is in the images of a loader, which it ignores."""

    def __init__(self, loader, classes, shift=0.0):
        super().__init__()
        self.targets = iter([targets for _, targets in loader])
        self.classes, self.shift = classes, shift

    def forward(self, images):
        B, targets = len(images), next(self.targets)
        maps = [torch.zeros(B, 4 + self.classes, side, side) for side in (12, 6)]
        centres, strides = cells(maps, 96)
        index = assign(targets, centres, strides)
        wanted = targets.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, 5))
        boxes = wanted[..., 1:] + self.shift
        sides = torch.cat([centres - boxes[..., :2], boxes[..., 2:] - centres], -1) / (2 * strides[:, None])
        rows = torch.full((B, len(centres), 4 + self.classes), -20.0)
        rows[..., :4] = torch.log(torch.expm1(sides.clamp_min(1e-6)))
        found = (index >= 0).nonzero(as_tuple=True)
        rows[(*found, 4 + wanted[found][:, 0].long())] = 5.0
        fine, coarse = rows.transpose(1, 2).split([144, 36], 2)
        return fine.unflatten(2, (12, 12)), coarse.unflatten(2, (6, 6))


@pytest.mark.parametrize("name", ["small", "shapes"])
def test_perfect_boxes_have_a_map_of_1(name, request):
    root = request.getfixturevalue(name)
    loader = loaders(root, test_batch_size=2)[TEST]
    classes = loader.dataset.num_classes
    result = evaluate_detector(Oracle(loader, classes), loader, "cpu", DetectionLoss(96))
    assert (result["map"], result["map50"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert result["samples"] == len(loader.dataset) and 0 <= result["loss"] < 0.05
    worse = evaluate_detector(Oracle(loader, classes, shift=4.0), loader, "cpu", DetectionLoss(96))
    assert worse["map"] < 0.8 * result["map"]


@pytest.mark.parametrize("ids", [range(4), [5] * 4], ids=["from 0", "equal"])
def test_perfect_boxes_have_a_map_of_1_whatever_the_ids(small, ids):
    change_json(small, "val2017", lambda d: [e.update(id=i) for e, i in zip(d["annotations"], ids, strict=True)])
    loader = loaders(small)[TEST]
    result = evaluate_detector(Oracle(loader, 2), loader, "cpu", DetectionLoss(96))
    assert (result["map"], result["map50"]) == (pytest.approx(1.0), pytest.approx(1.0))


def test_map_by_hand(small):
    dataset = loaders(small)[TEST].dataset
    truth = [(torch.tensor([[28.0, 8, 50, 31], [8, 28, 40, 52]]), torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))]
    rows = describe(dataset, 0, truth)
    assert [row["category_id"] for row in rows] == [90, 7] and {row["image_id"] for row in rows} == {10}
    assert rows[1]["bbox"] == pytest.approx([10, 20, 40, 30], abs=1e-4)
    # blue: found; orange: two to find, one wrong box
    assert mean_average_precision(dataset, rows) == {"map": pytest.approx(0.5), "map50": pytest.approx(0.5)}
    assert mean_average_precision(dataset, []) == {"map": 0.0, "map50": 0.0}
    in_crowd = {"image_id": 10, "category_id": 90, "bbox": [52, 71, 20, 8], "score": 0.99}
    right = {"image_id": 10, "category_id": 90, "bbox": [60, 5, 30, 60], "score": 0.5}
    with_crowd = mean_average_precision(dataset, [in_crowd, right, rows[1]])
    # orange: precision 1 up to a recall of one half, which COCO reads at 51 of 101 points; the crowd's box is ignored
    assert with_crowd["map50"] == pytest.approx((1 + 51 / 101) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Networks and commands


def test_every_spike_of_yolo_tiny():
    torch.manual_seed(0)
    net, images = with_random_norms(get_net_by_name("yolo_tiny", 3, 3)), torch.randn(2, 3, 32, 32)
    transformer = with_status(net, ["backbone"], images, timesteps=3)
    ann_snn = transformer.generate_ann_snn()
    assert transformer.stretch.num_outputs == 2 and len(transformer.snn.neurons()) == 9
    assert_reference_agrees(transformer.snn, make_vectors(transformer.snn, (images,)))
    with torch.no_grad():
        coarse, fine = ann_snn.part(images)  # in the order in which they are computed
        assert all(torch.equal(a, b) for a, b in zip(ann_snn(images), (net.fine_head(fine), net.coarse_head(coarse))))


def run(main, parse_args, line, capsys):
    """Exit status, stdout and the error lines of a command."""
    status = 0
    try:
        run_script(main, parse_args(line.split()))
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, [line for line in err.splitlines() if line.startswith("error:")]


def test_a_detector_is_trained_and_converted_by_command(shapes, tmp_path, capsys):
    data = f"--dataset COCO --dataset_root {shapes} --batch_size 8"
    line = f"yolo_tiny {data} --epochs 2 --lr 0.05 --save_file {tmp_path}/ann.pth"
    status, out, _ = run(train_ann.main, train_ann.parse_args, line, capsys)
    assert status == 0 and re.match(r"test mAP 0\.\d{3}, mAP@0\.5 0\.\d{3} of 8 images, loss \d", out)
    checkpoint = torch.load(tmp_path / "ann.pth", weights_only=True)
    assert (checkpoint["net"], checkpoint["dataset"]) == ("yolo_tiny", "COCO")
    line = f"yolo_tiny {data} -e 1 --timesteps 4 --ann_weight {tmp_path}/ann.pth --save_file {tmp_path}/snn.pth"
    status, out, _ = run(ann2snn.main, ann2snn.parse_args, f"{line} --results {tmp_path}/r.json", capsys)
    assert status == 0 and re.search(r"\n +mAP +mAP@0\.5 +loss\nANN +0\.\d{4} +0\.\d{4} +\d", out)
    results = json.loads((tmp_path / "r.json").read_text())
    numbers = [results[f"{name}_{key}"] for name in ("ann", "qnet", "snn") for key in ("map", "map50")]
    assert all(0 <= number <= 1 for number in numbers) and results["samples"] == 8
    assert len(results["firing_rate"]) == 9 and all(0 < rate < 1 for rate in results["firing_rate"].values())
    assert "snn_top1" not in results and "snn_top1_by_timestep" not in results


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "example_net --dataset COCO --dataset_root {shapes}",
            "example_net returns (1, 3) for one image, a detector has",
        ),
        ("yolo_tiny", "yolo_tiny returns (1, 14, 12, 12), (1, 14, 6, 6) for one image, it has to return [B, 10]"),
        ("yolo_tiny --dataset COCO --dataset_root {tmp}", "no annotations {tmp}/annotations/instances_train2017.json"),
        ("yolo_tiny --dataset COCO --dataset_root {tmp} --finetune_snn 1", "--spike_epochs is for classifiers"),
        ("yolo_tiny --dataset COCO --dataset_root {tmp} --finetune_distill 1", "--finetune_distill is for classifiers"),
    ],
)
def test_what_does_not_fit_is_one_line(shapes, tmp_path, capsys, line, message):
    line = line.format(shapes=shapes, tmp=tmp_path) + f" -e 0 --save_file {tmp_path}/snn.pth"
    status, out, errors = run(ann2snn.main, ann2snn.parse_args, line, capsys)
    assert status == 2 and out == "" and len(errors) == 1 and message.format(tmp=tmp_path) in errors[0]
    assert not (tmp_path / "snn.pth").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "example_net --dataset COCO --dataset_root {shapes}",
            "example_net returns (1, 3) for one image, a detector has",
        ),
        (
            "yolo_tiny --dataset digits",
            "yolo_tiny returns (1, 14, 12, 12), (1, 14, 6, 6) for one image, it has to return",
        ),
        ("example_net --dataset digits --teacher yolo_tiny:{teacher}", "yolo_tiny returns (1, 14, 4, 4), (1, 14"),
        ("yolo_tiny --dataset COCO --dataset_root {tmp} --teacher x:y", "--teacher is for classifiers, leave it out"),
        ("yolo_tiny --dataset COCO --dataset_root {tmp} --label_smoothing 0.1", "--label_smoothing is for classifiers"),
    ],
)
def test_what_cannot_be_trained_is_one_line(shapes, tmp_path, capsys, line, message):
    teacher = tmp_path / "teacher.pth"
    torch.save(get_net_by_name("yolo_tiny", 1, 10).state_dict(), teacher)
    line = line.format(shapes=shapes, tmp=tmp_path, teacher=teacher) + f" --epochs 1 --save_file {tmp_path}/ann.pth"
    status, out, errors = run(train_ann.main, train_ann.parse_args, line, capsys)
    assert status == 2 and out == "" and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "ann.pth").exists()


def test_drawn_shapes_are_the_same_for_a_seed_and_overwrite_nothing(shapes, tmp_path, capsys):
    draw_shapes.main(draw_shapes.parse_args([f"{tmp_path}/again", "--train", "24", "--val", "8"]))
    files = sorted(path.relative_to(shapes) for path in shapes.rglob("*") if path.is_file())
    assert len(files) == 34
    assert all((tmp_path / "again" / name).read_bytes() == (shapes / name).read_bytes() for name in files)
    data = json.loads((shapes / "annotations" / "instances_train2017.json").read_text())
    assert {entry["category_id"] for entry in data["annotations"]} == {1, 3, 7}
    status, _, errors = run(draw_shapes.main, draw_shapes.parse_args, str(shapes), capsys)
    assert status == 2 and errors == [f"error: {shapes} is not empty, name a new folder"]
