"""Measure quantizeml's quantization of the same networks on the same images: network x mode x bits.

    python3 benchmarks/quantizers.py --networks example_net:checkpoint/example_net_cifar10_ann.pth \\
        --dataset /path/to/cifar10

quantizeml is BrainChip's quantizer for the chip Akida. It is calibrated on the same 1,000 training images as this
toolkit and nothing is finetuned. Bits are those of weights and activations: 4/8 has weights of 4 bits and activations
of 8. Needs `pip install quantizeml`, version 1.2.5 or later, which brings TensorFlow.

NETWORK is any form of benchmarks/accuracy.py, whose layers form a chain: convolution, ReLU, average pooling,
flattening, linear. Without --networks, the networks of the table in docs/accuracy.md are measured, as
benchmarks/tables.py plans it. What --results has is not measured again.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy import TEST_BATCH, add_table_flags, default_flags
from benchmarks.keras_form import as_keras, channels_last
from benchmarks.network_forms import title_of
from benchmarks.pages import table_of_quantizers, write_tables
from benchmarks.peers import flags_of, load
from benchmarks.results import Results, key_of, where_and_when
from benchmarks.tables import QUANTIZERS, Quantizer, check_places
from runtime.cli import OneLineParser, run_script

FORMAT = "ann2snn-quantizers-1"
NUMBERS = ("ann_top1", "quantized_top1", "samples")


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_table_flags(parser, has_timesteps=False)
    return parser.parse_args(argv)


def main(args):
    from runtime.files import check_writable
    from spike_dag import format_table

    check_writable(args.write)
    if args.write and not args.results:
        raise ValueError("--write needs the rows of --results FILE.json")
    results = Results(args.results, FORMAT, Quantizer.FACTS, NUMBERS)
    if args.networks:
        networks = [Quantizer(text, title_of(text), args.dataset, args.test_images) for text in args.networks]
    else:
        check_places(QUANTIZERS, vars(args))
        networks = QUANTIZERS.quantizers(args.test_images)
    wanted = [(network, flags_of(args, network)) for network in networks]  # finds every wrong network before the work
    rows = [("network", "mode", "bits", "ANN %", "quantized %", "points")]
    for network, flags in wanted:
        for run in measure_network(args, network, flags, results):
            accuracies = run["ann_top1"], run["quantized_top1"], run["quantized_top1"] - run["ann_top1"]
            rows.append((network.title, run["mode"], run["bits"], *map("{:.2f}".format, accuracies)))
    print(format_table(rows))
    if args.write:
        write_tables(args.write, {QUANTIZERS.name: table_of_quantizers(QUANTIZERS, results)})


def modes(weight_bits):
    """Name -> arguments of quantizeml's `QuantizationParams`, beside the bits.

    By its defaults, activations are scaled per channel, images are unsigned, and the first layer has weights of 8 bits.
    """
    per_tensor = {"per_tensor_activations": True}
    signed = {**per_tensor, "input_dtype": "int8"}
    return {
        "defaults": {},
        "per tensor": per_tensor,
        "per tensor, signed images": signed,
        "per tensor, signed images, first layer too": {**signed, "input_weight_bits": weight_bits},
    }


def measure_network(args, network, flags, results):
    """The results of all modes and bits; those that are missing are measured and added."""
    found, loaded = [], None
    for bits in QUANTIZERS.bits:
        weight_bits, activation_bits = map(int, bits.split("/"))
        for mode, options in modes(weight_bits).items():
            key = key_of(flags, default_flags(), mode=mode, bits=bits, test_images=network.test_images)
            run = results.with_key(key)
            if run is None or args.again:
                loaded = loaded or prepare(flags, network.test_images)
                top1 = measure(*loaded[:3], {"weight_bits": weight_bits, "activation_bits": activation_bits, **options})
                run = {"key": key, "quantized_top1": top1, **loaded[3]}
            results.add({**run, **network.facts(mode, bits)})
            found.append(results.with_key(key))
            print(network.title, mode, bits, run["quantized_top1"], file=sys.stderr)
    return found


def prepare(flags, test_images):
    """The network in Keras, calibration images, test batches, and what every row has, as its accuracy in PyTorch."""
    import torch

    check_installed()
    from validate import evaluate

    net, calibration, batches = load(flags, test_images)
    calibration = torch.cat([images for images, _ in calibration])
    ann = evaluate(net, batches, torch.device("cpu"), torch.nn.CrossEntropyLoss())["top1"]
    samples = sum(len(targets) for _, targets in batches)
    facts = {"ann_top1": ann, "samples": samples, "versions": versions(), **where_and_when()}
    return as_keras(net, calibration[:TEST_BATCH]), calibration, batches, facts


def check_installed():
    """Raise ValueError if quantizeml or TensorFlow is missing; TensorFlow gets as many threads as PyTorch."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors only, it is read during the import
    try:
        import quantizeml.models  # noqa: F401
        import tensorflow as tf
        import tf_keras as keras
        import torch
    except ImportError as error:
        raise ValueError(
            f"this benchmark needs quantizeml 1.2.5 or later and its TensorFlow, pip install quantizeml ({error})"
        ) from error
    tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.disable_interactive_logging()


def versions():
    """The versions of quantizeml and TensorFlow, in words."""
    from importlib.metadata import version

    return f"quantizeml {version('quantizeml')}, TensorFlow {version('tensorflow')}"


def measure(model, calibration, batches, options):
    """Top-1 of a quantized Keras network in percent. options: arguments of quantizeml's `QuantizationParams`."""
    from quantizeml.models import QuantizationParams, quantize

    quantized = quantize(
        model,
        qparams=QuantizationParams(**options),
        samples=channels_last(calibration),
        num_samples=len(calibration),
        batch_size=TEST_BATCH,
    )
    hits = [quantized.predict_on_batch(channels_last(x)).argmax(1) == targets.numpy() for x, targets in batches]
    return 100 * sum(map(sum, hits)).item() / sum(map(len, hits))


if __name__ == "__main__":
    run_script(main, parse_args())
