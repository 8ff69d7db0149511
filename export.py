"""Write a saved spiking network in other formats.

    python3 export.py out_snn.pth --onnx snn.onnx

docs/export.md describes them.
"""

import argparse

from runtime.cli import OneLineParser, run_script
from runtime.flags import PARSERS, add_options
from script_options import EXPORTS, ExportOptions

SAMPLES = 4  # of noise, where no images are given


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="file of a spiking network, as ann2snn.py saves it")
    parser.add_argument("--images", nargs="+", default=(), metavar="IMAGE", help="image files for test vectors (noise)")
    parser.add_argument(
        "--input_shape",
        type=PARSERS["input_shape"],
        metavar="C,H,W",
        help="shape of an input, for a file that does not hold it",
    )
    add_options(parser, ExportOptions)
    parser.add_argument(
        "--debug", action=argparse.BooleanOptionalAction, default=False, help="show the traceback of an error"
    )
    args = parser.parse_args(argv)
    if all(getattr(args, each.flag) is None for each in EXPORTS):
        parser.error(f"no format is named, give one of {', '.join(f'--{each.flag}' for each in EXPORTS)}")
    return args


def main(args):
    from export.formats import check_exports, write_exports
    from runtime.files import check_different
    from spike_dag import load_dag

    check_different(args.network, *check_exports(args))
    snn = load_dag(args.network)
    if not snn.is_spiking():
        raise ValueError(f"{args.network} holds no spiking network, convert one with ann2snn.py")
    write_exports(args, snn, images_for(snn, args))


def images_for(snn, args):
    """The inputs to write test vectors of, (images,): those of --images, else noise; None if no shape is known.

    The shape is that of --input_shape or of the network's file. Raises OSError for a file that cannot be read,
    ValueError for a network that does not hold how images are read.
    """
    import torch

    from inputs.preprocessing import Preprocessing

    if args.images:
        if snn.preprocessing is None:
            raise ValueError(f"{args.network} does not hold how its images are read, leave out --images")
        preprocessing = Preprocessing.from_dict(snn.preprocessing)
        return (torch.cat([preprocessing.read(file) for file in args.images]),)
    shape = args.input_shape or (snn.preprocessing or {}).get("input_shape")
    if shape is None:
        return None
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(SAMPLES, *shape, generator=generator) for _ in snn.inputs_nodes)


if __name__ == "__main__":
    run_script(main, parse_args())
