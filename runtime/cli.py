"""What the command-line scripts share: flags, one-line errors, exit statuses. Imports nothing slow.

Exit status 0 is success; 1 an interrupted run (Ctrl-C, SIGTERM, SIGHUP), or a traceback; 2 what the user can mend.
"""

import argparse
import contextlib
import os
import signal
import sys

from runtime.failures import in_one_line, squeeze
from runtime.ranges import RANGES, Whole
from runtime.streams import steady_streams

LARGEST = 2**31 - 1  # of whole numbers: what counters of any library hold
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


class OneLineParser(argparse.ArgumentParser):
    """Ends a wrong command line with `error: WHAT, WHERE, what to do` and status 2."""

    def parse_known_args(self, args=None, namespace=None):
        with steady_streams():
            return super().parse_known_args(args, namespace)

    def _get_values(self, action, arg_strings):
        if action.option_strings and arg_strings == ["--"]:  # argparse reads --timesteps=-- as an empty list
            raise argparse.ArgumentError(action, "'--' is no value, write one behind the flag")
        return super()._get_values(action, arg_strings)

    def exit(self, status=0, message=None):
        check_printed(sys.stdout)
        super().exit(status, message)

    def error(self, message):
        exit_with_error(f"{message}, see {self.prog} --help")


def exit_with_error(message):
    """Print one line on stderr and end with status 2: the user's input cannot work."""
    print("error:", squeeze(message), file=sys.stderr)
    sys.exit(2)


def check_printed(output):
    """End with an error where stdout, a SteadyStream, refused what was printed, unless its reader has had enough."""
    output.flush()
    failure = output.failure
    if failure is not None and not isinstance(failure, BrokenPipeError):
        exit_with_error(f"cannot print on stdout ({failure.strerror}), all files are written, send it to another place")


def run_script(main, args):
    """Call `main(args)`; what the user can cause becomes one line and status 2 (`--debug` shows the traceback).

    A stdout that is closed, or whose reader has gone, does not stop the work; one that is full is an error at the end.
    """
    with steady_streams() as output, signals_as_interrupts():
        try:
            check_alone()
            main(args)
        except KeyboardInterrupt:
            print("interrupted, no result is half-written", file=sys.stderr)
            sys.exit(1)
        except Exception as error:
            line = None if args.debug else in_one_line(error, args)
            if line is None:
                raise
            exit_with_error(line)
        check_printed(output)


def check_alone():
    """Raise ValueError in one of several processes of torchrun: each would do all of the work, and write it."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "0", "1"):
        raise ValueError(f"started as one of {processes} processes (WORLD_SIZE), start it without torchrun")


@contextlib.contextmanager
def signals_as_interrupts():
    """Within it SIGTERM and SIGHUP end the run as Ctrl-C does, so that no temporary file stays.

    A signal that is ignored, as nohup does with SIGHUP, stays ignored; threads cannot set handlers, and keep them.
    """

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = {}
    with contextlib.suppress(ValueError):
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def whole_number(least, most=None, also=()):
    """An argparse type: an integer from `least` to `most`, or one of `also`."""
    span = f"{least} or more" if most is None else f"{least} to {most}"
    span += "".join(f", or {extra}" for extra in also)

    def convert(text):
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not (least <= number <= (number if most is None else most) or number in also):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {span}")
        if number > LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is over {LARGEST}")
        return number

    return convert


def option(name):
    """An argparse type: a number in the range of option `name` (`runtime.ranges`), as the calls in Python check it."""
    span = RANGES[name]

    def convert(text):
        try:
            number = span.accepts(int(text) if isinstance(span, Whole) else float(text))
        except (ValueError, OverflowError):
            number = None
        if number is None:
            raise argparse.ArgumentTypeError(f"{text} is not {span}")
        return number

    return convert


def bitwidths(text):
    """An argparse type: weight bits of all layers, of each ("8,4,4,4"), or "auto"."""
    if text == "auto":
        return text
    widths = tuple(map(whole_number(1, 8, also=(32,)), text.split(",")))
    return widths[0] if len(widths) == 1 or set(widths) == {32} else widths


def real_number(least, most=float("inf")):
    """An argparse type: a number from `least` to `most`."""

    def convert(text):
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")
        return number

    return convert


def memory_size(text):
    """An argparse type: bytes, with K, M or G behind the number for powers of 1024."""
    number, factor = text, 1
    if text[-1:].upper() in UNITS:
        number, factor = text[:-1], UNITS[text[-1].upper()]
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a memory size such as 512M or 2G")
    return size


def add_data_flags(parser, dataset="digits", val_share=0.0):
    """--dataset and how to load it. val_share: the default, for scripts that look at validation images."""
    parser.add_argument(
        "--dataset",
        default=dataset,
        help="digits, MNIST, CIFAR10, CIFAR100, COCO, folder, debug0..2, or the path of an image folder (%(default)s)",
    )
    parser.add_argument("--dataset_root", default="./data", help="folder the data sets are in (%(default)s)")
    parser.add_argument("--num_workers", type=whole_number(0, 64), default=0, help="number of workers for dataset")
    parser.add_argument("--batch_size", type=whole_number(1), default=128, help="images a training step (%(default)s)")
    parser.add_argument("--test_batch_size", type=whole_number(1), default=100, help="images a test step (%(default)s)")
    parser.add_argument(
        "--val_share",
        type=real_number(0, 0.9),
        default=val_share,
        help="share of the training images kept for validation (%(default)s)",
    )


def add_run_flags(parser):
    """--seed, --device, --debug: how to run."""
    parser.add_argument(
        "--seed", type=whole_number(0, 2**32 - 1), default=0, help="seed of everything random (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto (the least loaded GPU, else the CPU), cpu, cuda, cuda:N")
    parser.add_argument("--debug", action=argparse.BooleanOptionalAction, default=False, help="show tracebacks")


def add_hardware_flags(parser, default=None):
    """--weight_bitwidth, and --hardware against whose limits it is checked."""
    parser.add_argument(
        "--weight_bitwidth",
        type=bitwidths,
        default=4,
        help="weight quantization bitwidth, 1 to 8, or 32 for float weights (%(default)s); 8,4,4,4 for one a layer, "
        "auto for the most that the hardware allows in each",
    )
    parser.add_argument(
        "--hardware", choices=["v1.0"], default=default, help="chip whose limits must hold; without it they only warn"
    )
    if default:
        parser.add_argument("--debug", action=argparse.BooleanOptionalAction, default=False, help="show tracebacks")


def add_graph_flags(parser):
    """How layers convert that leave a choice."""
    parser.add_argument(
        "--maxpool",
        choices=["gate", "or"],
        default=None,
        help="max pooling of spikes: the largest count of a window passes, or any spike (no default)",
    )
    parser.add_argument(
        "--signed",
        choices=["pair"],
        default=None,
        help="values that another layer reads without a ReLU: as relu(x) and relu(-x); without it an error",
    )
    parser.add_argument(
        "--avgpool",
        choices=["spike", "fold"],
        default="spike",
        help="average pooling of spikes: a layer of its own, or folded into the layer behind it (%(default)s)",
    )
    parser.add_argument(
        "--ann_layers",
        type=lambda text: tuple(name for name in text.split(",") if name),
        default=(),
        help="layers that stay ANN, by module path or op name, separated by commas",
    )


def add_conversion_flags(parser):
    """Everything between the trained network and the spiking one."""
    parser.add_argument("--ann_weight", help="the location of the trained weights")
    parser.add_argument(
        "--pretrained", action="store_true", help="load the weights that torchvision has for a torchvision:NAME"
    )
    add_data_flags(parser)
    add_hardware_flags(parser)
    parser.add_argument(
        "--timesteps", type=option("timesteps"), default=16, help="timesteps per image, T (%(default)s)"
    )
    parser.add_argument(
        "--reset_mode", choices=["zero", "subtraction"], default="subtraction", help="after a spike (%(default)s)"
    )
    parser.add_argument(
        "-e",
        "--finetune_epochs",
        type=option("finetune_epochs"),
        default=10,
        help="finetune epochs, 0 only quantizes (%(default)s)",
    )
    parser.add_argument(
        "--finetune_lr", type=option("finetune_lr"), default=0.01, help="finetune learning rate (%(default)s)"
    )
    parser.add_argument(
        "--finetune_optimizer",
        choices=["sgd", "adam"],
        default="sgd",
        help="sgd, or adam with --finetune_lr as a share of the weights, which learns few bits faster (%(default)s)",
    )
    parser.add_argument(
        "--finetune_wd", type=option("finetune_wd"), default=1e-4, help="finetune weight decay (%(default)s)"
    )
    parser.add_argument(
        "--finetune_momentum", type=option("finetune_momentum"), default=0.9, help="finetune momentum (%(default)s)"
    )
    parser.add_argument(
        "--finetune_nesterov",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Nesterov's momentum for --finetune_optimizer sgd (off)",
    )
    parser.add_argument(
        "--finetune_damping",
        type=option("finetune_damping"),
        default=0.1,
        help="pull of the weights towards integers, reached in the last finetune epoch (%(default)s)",
    )
    parser.add_argument(
        "--finetune_distill",
        type=option("finetune_distill"),
        default=0.0,
        metavar="SHARE",
        help="share of the loss that asks for the float network's outputs instead of the labels (%(default)s)",
    )
    parser.add_argument(
        "--activation_levels",
        type=option("activation_levels"),
        default=None,
        metavar="L",
        help="finetune with activations of L levels, as T = L timesteps have, and learn lambda (float activations)",
    )
    parser.add_argument(
        "--finetune_snn",
        type=option("finetune_snn"),
        default=0,
        metavar="EPOCHS",
        help="epochs that finetune the converted network on its own spikes, by labels and the ANN's outputs "
        "(%(default)s)",
    )
    parser.add_argument(
        "--calibration_epochs",
        type=option("calibration_epochs"),
        default=0,
        metavar="EPOCHS",
        help="passes over the calibration images that finetune it on the ANN's outputs, without labels (%(default)s)",
    )
    parser.add_argument(
        "--finetune_snn_lr",
        type=option("finetune_snn_lr"),
        default=None,
        help="their learning rate, a share of the weights (0.02 / root of T with labels, 0.03 / T without)",
    )
    parser.add_argument(
        "--finetune_snn_gradient",
        choices=["time", "tandem"],
        default=None,
        help="their gradient: through every timestep, or through the ANN on the spikes' rates (time up to T = 4)",
    )
    parser.add_argument(
        "--granularity",
        choices=["layer", "channel"],
        default="layer",
        help="one scale of spikes, and one Vthr, per layer or per channel (%(default)s)",
    )
    parser.add_argument(
        "--weight_granularity",
        choices=["layer", "channel"],
        default="layer",
        help="one weight scale, and so one Vthr, per layer or per output channel (%(default)s)",
    )
    parser.add_argument(
        "--equalize",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="scale channels so that one weight scale serves a layer; helps where nothing is finetuned (off)",
    )
    parser.add_argument(
        "--threshold",
        choices=["quantile", "max", "mse"],
        default="quantile",
        help="what sets Vthr: the --quantile or maximum of the activations, or the least squared error (%(default)s)",
    )
    parser.add_argument(
        "--quantile",
        type=option("quantile"),
        default=0.999,
        help="activation quantile of --threshold quantile (%(default)s)",
    )
    parser.add_argument(
        "--initial_potential",
        type=option("initial_potential"),
        default=None,
        help="membrane potential before the first step, in Vthr (0.5 for subtraction, 0 for zero)",
    )
    parser.add_argument(
        "--listen",
        type=option("listen"),
        default=0,
        metavar="D",
        help="steps of input that every layer integrates before it fires for T steps; at D = T exact (%(default)s)",
    )
    parser.add_argument(
        "--correction",
        choices=["potential", "bias", "none"],
        default="potential",
        help="what is shifted until mean rates are the ANN's: initial potentials, or biases too (%(default)s)",
    )
    parser.add_argument(
        "--hold_back",
        type=option("hold_back"),
        default=0.25,
        help="share of Vthr by which potentials start lower and that a bias makes up for over T steps, so that fewer "
        "spikes come too early; with a correction and reset by subtraction (%(default)s)",
    )
    add_graph_flags(parser)
    parser.add_argument(
        "--calibration_samples",
        type=option("calibration_samples"),
        default=1000,
        help="images that calibration sees (%(default)s)",
    )
    parser.add_argument(
        "--engine",
        choices=["auto", "reference"],
        default="auto",
        help="simulator: the fastest exact way here, or float64 in plain PyTorch throughout (%(default)s)",
    )
    parser.add_argument(
        "--memory_budget",
        type=memory_size,
        default=None,
        metavar="SIZE",
        help="memory that a simulation works with at a time, as 512M or 2G (what the cache holds, at most a quarter "
        "of what is free)",
    )
    add_run_flags(parser)


def add_analysis_flags(parser):
    """What an error analysis looks at."""
    parser.add_argument(
        "--analysis_images",
        type=whole_number(2),
        default=128,
        help="test images that an analysis looks into, and calibrates its alternatives on (%(default)s)",
    )
    parser.add_argument(
        "--sweep",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="analyse other weight bits and timesteps too, each finetuned and converted anew (off)",
    )
