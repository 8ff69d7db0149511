"""Draw a data set in the COCO format: circles, squares and triangles on noise, laid out as COCO is downloaded.

    python3 tools/draw_shapes.py data/shapes --train 600 --val 200
    python3 train_ann.py yolo_tiny --dataset COCO --dataset_root data/shapes

As in COCO, category ids have gaps, some images have no object, and some have a crowd. The same seed draws the same
images.
"""

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from runtime.cli import OneLineParser, run_script
from runtime.flags import whole_number

CATEGORIES = {"circle": 1, "square": 3, "triangle": 7}  # name -> id
CROWDED = 0.04  # share of images with a crowd
NUMBERS = {0: 0.05, 1: 0.3, 2: 0.3, 3: 0.2, 4: 0.15}  # objects per image -> probability


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where train2017/, val2017/ and annotations/ go; new, or empty")
    parser.add_argument("--train", type=whole_number(1), default=600, help="training images (%(default)s)")
    parser.add_argument("--val", type=whole_number(1), default=200, help="validation images (%(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of the drawings (%(default)s)")
    parser.add_argument("--debug", action=argparse.BooleanOptionalAction, default=False, help="show tracebacks")
    return parser.parse_args(argv)


def main(args):
    import numpy as np

    if os.path.isdir(args.folder) and os.listdir(args.folder):
        raise OSError(f"{args.folder} is not empty, name a new folder")
    rng, first = np.random.default_rng(args.seed), 1
    for split, number in (("train2017", args.train), ("val2017", args.val)):
        draw_split(args.folder, split, range(first, first + number), rng)
        first += number
    print(f"drew {args.train} training and {args.val} validation images in {args.folder}")


def draw_split(folder, split, ids, rng):
    """The images of one split, and their annotations."""
    os.makedirs(os.path.join(folder, split))
    os.makedirs(os.path.join(folder, "annotations"), exist_ok=True)
    images, annotations = [], []
    for image_id in ids:
        picture, objects = draw_image(rng)
        name = f"{image_id:012d}.jpg"
        picture.save(os.path.join(folder, split, name), quality=92)
        images.append({"id": image_id, "file_name": name, "width": picture.width, "height": picture.height})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    categories = [{"id": number, "name": name, "supercategory": "shape"} for name, number in CATEGORIES.items()]
    info = {"description": "drawn shapes", "year": 2026, "version": "1.0"}
    data = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    with open(os.path.join(folder, "annotations", f"instances_{split}.json"), "w", encoding="utf-8") as file:
        json.dump(data, file)


def draw_image(rng):
    """A PIL image and the annotations of its objects: none to four, and rarely a crowd of small circles."""
    import numpy as np
    from PIL import Image, ImageDraw

    width, height = (int(n) for n in rng.integers(96, 161, 2))
    noise = rng.integers(0, 256, (height, width, 3)) * 0.2 + rng.integers(40, 160, 3) * 0.8
    picture = Image.fromarray(noise.astype(np.uint8))
    draw, boxes, objects = ImageDraw.Draw(picture), [], []
    if rng.random() < CROWDED:
        box = place(rng, width, height, 40, boxes)
        objects.append(draw_crowd(draw, rng, box, width, height))
    for _ in range(rng.choice(list(NUMBERS), p=list(NUMBERS.values()))):
        box = place(rng, width, height, int(rng.integers(20, 61)), boxes)
        if box is not None:
            objects.append(draw_shape(draw, rng, box))
    return picture, objects


def place(rng, width, height, side, boxes):
    """A free square (left, top, side), which is added to `boxes`; None if 20 random places overlap others."""
    for _ in range(20):
        left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
        apart = (left + side < x or x + s < left or top + side < y or y + s < top for x, y, s in boxes)
        if all(apart):
            boxes.append((left, top, side))
            return left, top, side
    return None


def draw_shape(draw, rng, box):
    """Draw a shape in a random dark or light colour; returns its annotation."""
    left, top, side = box
    name = str(rng.choice(list(CATEGORIES)))
    colour = tuple(int(c) for c in rng.choice([rng.integers(0, 60, 3), rng.integers(190, 256, 3)]))
    corners = {
        "square": [(left, top), (left + side, top), (left + side, top + side), (left, top + side)],
        "triangle": [(left + side / 2, top), (left + side, top + side), (left, top + side)],
    }
    if name == "circle":
        draw.ellipse([left, top, left + side, top + side], fill=colour)
        outline = [left + side / 2, top, left + side, top + side / 2, left + side / 2, top + side, left, top + side / 2]
    else:
        draw.polygon(corners[name], fill=colour)
        outline = [coordinate for corner in corners[name] for coordinate in corner]
    return annotation(CATEGORIES[name], [left, top, side, side], [outline], iscrowd=0)


def draw_crowd(draw, rng, box, width, height):
    """Draw a square full of small circles; returns its annotation: a crowd, with COCO's run-length mask by columns."""
    left, top, side = box
    for _ in range(12):
        x, y = left + int(rng.integers(0, side - 8)), top + int(rng.integers(0, side - 8))
        draw.ellipse([x, y, x + 8, y + 8], fill=(250, 250, 250))
    counts = [left * height + top]
    for _ in range(side - 1):
        counts += [side, height - side]
    counts += [side, height * width - sum(counts) - side]
    return annotation(CATEGORIES["circle"], [left, top, side, side], {"counts": counts, "size": [height, width]}, 1)


def annotation(category, box, segmentation, iscrowd):
    """An object in COCO's format; the box is left, top, width, height."""
    area = float(box[2] * box[3])
    return {"category_id": category, "bbox": box, "area": area, "segmentation": segmentation, "iscrowd": iscrowd}


if __name__ == "__main__":
    run_script(main, parse_args())
