"""The formats that flags ask for (`script_options.EXPORTS`): what is checked before the work, and what writes them."""

import importlib

from runtime.files import after_writing, check_folder, check_writable
from runtime.packages import check_packages
from script_options import EXPORTS

MOST_IMAGES = 8  # of those given, for test vectors


def asked_for(args):
    """`(Export, path)` of every format that the flags in `args` ask for."""
    paths = ((each, getattr(args, each.flag)) for each in EXPORTS)
    return [(each, path) for each, path in paths if path is not None]


def check_exports(args):
    """The paths of the formats asked for. Raises OSError for one that cannot be written, ValueError for a package."""
    for each, path in asked_for(args):
        check_packages(f"--{each.flag}", *each.packages)
        (check_folder if each.metavar == "DIR" else check_writable)(path)
    return [path for _, path in asked_for(args)]


def write_exports(args, snn, images=None):
    """Write every format asked for and print a line for each. images: a tuple of [B, ...] per input, or None.

    Raises ValueError, with the layer's name, for what a format cannot hold, and OSError for a failed write; both name
    the files written before.
    """
    images = None if images is None else tuple(x[:MOST_IMAGES].cpu() for x in images)
    snn = snn.cpu().eval()
    written = []
    for each, path in asked_for(args):
        module, function = each.writer.split(":")
        with after_writing(*written):
            print(getattr(importlib.import_module(module), function)(snn, path, images))
        written.append(path)
