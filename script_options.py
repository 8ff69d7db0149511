"""The options of the scripts alone: network, data, chip, files. Like `options.py`, it imports nothing slow.

add_options(parser, *CONVERSION, OutputOptions)     # the flags of a conversion
"""

from dataclasses import dataclass, make_dataclass

from options import (
    CHIPS,
    DEFAULT_CHIP,
    SIDE,
    ConversionOptions,
    Options,
    QuantizeOptions,
    RunOptions,
    SimulatorOptions,
    SpikeFinetuneOptions,
    option,
)
from runtime.ranges import Real, Whole


@dataclass(frozen=True)
class BuildOptions(Options):
    """How the network is built."""

    net_args: object = option(
        None,
        "arguments of a network of your own, width=24,depth=3; in_channels and num_classes are passed where it takes "
        "them",
        "network and data",
        parse="net_args",
        metavar="NAME=VALUE,...",
        default_help="none",
    )
    input_shape: tuple = option(
        None,
        "shape of the images that the network reads, such as 3,32,32",
        "network and data",
        parse="input_shape",
        metavar="C,H,W",
        default_help="by network or data",
        main=True,
    )


@dataclass(frozen=True)
class NetworkOptions(BuildOptions):
    """The trained network."""

    ann_weight: str = option(
        None,
        "file of the trained weights; pretrained stands for those that torchvision or timm has for its networks",
        "network and data",
        metavar="FILE",
        default_help="random weights",
        main=True,
    )
    expect_top1: float = option(
        None,
        "accuracy of the float network in percent, as you measured it; the run stops before the work if it is not "
        "found here",
        "network and data",
        span=Real(0, 100),
        metavar="PERCENT",
        default_help="a warning near chance",
    )


@dataclass(frozen=True)
class DataOptions(Options):
    """The data set and its loaders."""

    dataset: str = option(
        "digits",
        "digits, MNIST, CIFAR10, CIFAR100, COCO, folder, debug0..2, path of a folder, file.py:callable",
        "network and data",
        main=True,
    )
    dataset_root: str = option("./data", "folder that contains the data sets", "network and data")
    num_workers: int = option(0, "processes that load the images", "network and data", span=Whole(0, 64))
    batch_size: int = option(128, "images per training step", "network and data", span=Whole(1))
    test_batch_size: int = option(100, "images per test step", "network and data", span=Whole(1))
    val_share: float = option(
        0.0, "share of the training images kept for validation", "network and data", span=Real(0, 0.9), metavar="SHARE"
    )
    preprocess: str = option(
        "dataset",
        "normalisation of the images: the mean and deviation of the data set (dataset), of ImageNet, with its resizing "
        "of larger files (imagenet), or pixels from 0 to 1 as they are (none)",
        "network and data",
        choices=("dataset", "imagenet", "none"),
        main=True,
    )
    augment: str = option(
        "dataset",
        "shifts and mirrors of the training images: those of the data set, or none, as for digits and text",
        "network and data",
        choices=("dataset", "none"),
    )
    mean: tuple = option(
        None,
        "mean per channel that is subtracted from pixels in 0 to 1, such as 0.485,0.456,0.406",
        "network and data",
        parse="numbers",
        metavar="M,...",
        default_help="by --preprocess",
    )
    std: tuple = option(
        None,
        "deviation per channel that pixels are divided by, such as 0.229,0.224,0.225",
        "network and data",
        parse="deviations",
        metavar="S,...",
        default_help="by --preprocess",
    )
    resize: int = option(
        None,
        "pixels of the shorter side of an image before its centre is cropped, as torchvision's Resize and CenterCrop",
        "network and data",
        span=SIDE,
        metavar="PIXELS",
        default_help="the centre is cropped to the network's shape, then resized",
    )
    crop: int = option(
        None,
        "pixels of each side of the centre crop",
        "network and data",
        span=SIDE,
        metavar="PIXELS",
        default_help="the size of --input_shape",
    )


@dataclass(frozen=True)
class ChipOptions(Options):
    """The chip whose limits the network must meet."""

    hardware: str = option(
        None,
        "chip whose limits the network must meet; a table shows them for each layer",
        "weights",
        choices=CHIPS,
        default_help=f"the limits of {DEFAULT_CHIP} only cause a warning",
        main=True,
    )


@dataclass(frozen=True)
class AnalysisOptions(Options):
    """Scope of an error analysis."""

    analysis_images: int = option(
        128,
        "test images that the error analysis examines; also the number of images that its alternatives are chosen on, "
        "and calibrated on (at most 128)",
        "output",
        span=Whole(2),
        metavar="N",
    )
    sweep: bool = option(False, "also try other weight bits and timesteps, each finetuned and converted anew", "output")
    try_presets: bool = option(
        False, "the error analysis also tries the presets that train, which takes as long as they do", "output"
    )
    compare: tuple = option(
        (),
        "results of other runs that the error analysis shows beside this one: report.json, files of --results, or "
        "those of other tools",
        "output",
        parse="names",
        metavar="FILE.json,...",
        default_help="none",
    )


@dataclass(frozen=True)
class Export:
    """A format that a spiking network can be written in: one flag of ann2snn.py and export.py.

    metavar: FILE... for a file, DIR for a folder. writer: "module:function", a function (snn, path, images) that
    returns a line for the user. packages: modules that it needs, which not every installation has.
    """

    flag: str
    metavar: str
    writer: str
    help: str
    packages: tuple = ()

    def option(self):
        """The field of the flag."""
        return option(None, self.help, "output", metavar=self.metavar, default_help="none")


WITH_ONNX = ("onnx",)
EXPORTS = (
    Export("onnx", "FILE", "export.onnx_file:write_onnx", "ONNX file of all timesteps, for onnxruntime", WITH_ONNX),
    Export("onnx_single", "FILE", "export.onnx_file:write_onnx_single", "the same for GPUs with TF32", WITH_ONNX),
    Export("onnx_step", "FILE", "export.onnx_file:write_onnx_step", "ONNX file of one timestep", WITH_ONNX),
    Export("onnx_ann", "FILE", "export.onnx_ann:write_onnx_ann", "ONNX file of the quantized ANN", WITH_ONNX),
    Export("nir", "FILE", "export.nir_graph:write_nir", "NIR graph, for nirtorch, sinabs and others", ("nir",)),
    Export("c", "DIR", "export.c:write_c", "one C99 file, without floats behind the first layer, and its test"),
    Export("integers", "DIR", "export.integers:write_integers", "all integers as .npy, a manifest and test vectors"),
    Export(
        "safetensors",
        "FILE",
        "export.safetensors:write_safetensors",
        "the network as a file of safetensors, which load_dag reads",
        ("safetensors",),
    ),
    Export("paibox", "DIR", "export.paicore:write_paicore", "configuration of a PAICORE chip", ("paibox",)),
)
ExportOptions = make_dataclass(
    "ExportOptions", [(each.flag, str, each.option()) for each in EXPORTS], bases=(Options,), frozen=True
)


@dataclass(frozen=True)
class OutputOptions(ExportOptions, AnalysisOptions):
    """Files that ann2snn.py writes."""

    save_file: str = option("out_snn.pth", "file for the spiking network", "output", metavar="FILE", main=True)
    results: str = option(
        None, "file for all results, as JSON", "output", metavar="FILE.json", default_help="none", main=True
    )
    report: str = option(
        None,
        "folder for the error analysis that analyse_error.py writes",
        "output",
        metavar="DIR",
        default_help="none",
        main=True,
    )


@dataclass(frozen=True)
class LongRunOptions(Options):
    """What a training of hours needs."""

    resume: bool = option(
        False,
        "go on where a run with the same flags was cut off; its state is in SAVE_FILE.state (analyse_error.py: in "
        "training.state in the folder of the report)",
        "run",
    )
    max_minutes: float = option(
        None,
        "minutes after which no further training batch begins; the run goes on with what it has, and --resume with the "
        "training",
        "run",
        span=Real(0),
        metavar="MINUTES",
        default_help="no limit",
    )
    log: str = option(
        None,
        "folder for a row of numbers an epoch: training.csv, and files of TensorBoard if it is installed",
        "output",
        metavar="DIR",
        default_help="none",
    )


@dataclass(frozen=True)
class QuantizedOptions(LongRunOptions):
    """The same, and the quantized network of an earlier run."""

    qnet: str = option(
        None,
        "file of a finetuned quantized network, which ann2snn.py writes beside SAVE_FILE; it is converted without "
        "finetuning",
        "finetuning",
        metavar="FILE",
        default_help="none",
    )


CONVERSION = (
    NetworkOptions,
    DataOptions,
    ChipOptions,
    QuantizeOptions,
    ConversionOptions,
    SpikeFinetuneOptions,
    SimulatorOptions,
    RunOptions,
    QuantizedOptions,
)
