"""Classify images with a saved spiking network.

    python3 predict.py out_snn.pth cat.jpg dog.png
    python3 predict.py out_snn.pth photos/          # all images of a folder

The file of the network holds how its images are read: shape, normalisation, class names. The flags override it.
"""

import argparse
import os

from options import TIMESTEPS, RunOptions
from runtime.cli import OneLineParser, run_script
from runtime.flags import PARSERS, add_options, number_in, whole_number


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="file of a spiking network, as ann2snn.py saves it")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=whole_number(1), default=3, help="classes to print per image (%(default)s)")
    parser.add_argument("--timesteps", type=number_in(TIMESTEPS), help="timesteps per image (those of the conversion)")
    parser.add_argument(
        "--input_shape", type=PARSERS["input_shape"], metavar="C,H,W", help="channels, height, width of an input"
    )
    parser.add_argument(
        "--mean", type=PARSERS["numbers"], metavar="M,...", help="mean per channel, for pixels in 0 to 1"
    )
    parser.add_argument("--std", type=PARSERS["deviations"], metavar="S,...", help="deviation per channel")
    parser.add_argument("--resize", type=whole_number(1), metavar="PIXELS", help="shorter side before the centre crop")
    add_options(parser, RunOptions)
    parser.main_actions.clear()  # --help shows all of them
    return parser.parse_args(argv)


def main(args):
    from runtime.device import choose_device
    from spike_dag import format_table, load_dag

    device, files = choose_device(args.device), list_images(args.images)
    snn = load_dag(args.network).to(device).eval()
    preprocessing = preprocessing_of(snn, args)
    rows = [("image", *(f"class {rank}" for rank in range(1, args.top + 1)))]
    for file in files:
        outputs = snn(preprocessing.read(file).to(device), **({"timesteps": args.timesteps} if args.timesteps else {}))
        rows.append((file, *best_classes(first_row(outputs), preprocessing.classes, args.top)))
    print(format_table(rows))


def list_images(paths):
    """The image files among `paths`, and those in the folders among them, in order.

    Raises OSError for a missing file, and ValueError for a folder without images.
    """
    from inputs.image_files import is_image_file

    files = []
    for path in paths:
        if os.path.isdir(path):
            found = sorted(entry.path for entry in os.scandir(path) if is_image_file(entry))
            if not found:
                raise ValueError(f"no images in the folder {path}")
            files += found
        elif os.path.exists(path):
            files.append(path)
        else:
            raise FileNotFoundError(f"no image {path}")
    return files


def preprocessing_of(snn, args):
    """The Preprocessing in the network's file, changed by the flags. Raises ValueError for what neither says."""
    from inputs.preprocessing import Preprocessing

    known = Preprocessing(()) if snn.preprocessing is None else Preprocessing.from_dict(snn.preprocessing)
    shape = args.input_shape or known.shape
    if not shape:
        raise ValueError(f"{args.network} does not hold the shape of its images, give --input_shape C,H,W")
    statistics = [given or stored for given, stored in ((args.mean, known.mean), (args.std, known.std))]
    if None in statistics:
        raise ValueError(f"{args.network} does not hold the normalisation of its images, give --mean and --std")
    if any(len(values) not in (1, shape[0]) for values in statistics):
        raise ValueError(f"--mean and --std need 1 or {shape[0]} values, one for each channel")
    mean, std = (values * (shape[0] // len(values)) for values in statistics)
    return Preprocessing(shape, mean, std, args.resize or known.resize, known.classes)


def first_row(outputs):
    """The scores [classes] of one image. Raises ValueError for a network that does not classify."""
    scores = outputs[0] if isinstance(outputs, tuple) else outputs  # [1, classes]
    if scores.dim() != 2:
        raise ValueError(f"the network returns {list(scores.shape)}, predict.py is for classifiers: [1, classes]")
    return scores[0]


def best_classes(scores, classes, most):
    """Texts "name share" of the `most` best classes; the shares are the softmax of the scores."""
    best = scores.softmax(0).topk(min(most, len(scores)))
    names = classes if len(classes) == len(scores) else range(len(scores))
    return [f"{names[i]} {100 * share:.1f} %" for i, share in zip(best.indices.tolist(), best.values.tolist())]


if __name__ == "__main__":
    run_script(main, parse_args())
