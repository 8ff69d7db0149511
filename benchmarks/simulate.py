"""Time a spiking network with T timesteps against T passes of its ANN and against SpikingJelly's conversion.

    python3 benchmarks/simulate.py --networks resnet20 vgg9_bn --timesteps 16 32 --save_file simulate.json

All contenders take turns, so that changes in the machine's speed affect all of them. A ratio is computed within each
round; the table shows the median over the rounds. "with accuracy" is `validate.evaluate`, what ann2snn.py runs: with
the accuracy after every step, and firing rates. SpikingJelly (single-step and multi-step, each with its IFNode) takes
part if it is installed. `--special` adds thresholds per channel, `--listen T` and folded poolings, whose fast path
differs; `--memory` adds the peak memory of a process that only simulates.
"""

import argparse
import copy
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.cli import OneLineParser, run_script
from runtime.flags import whole_number

ANN = "ANN"
SAME_OUTPUTS = 1e-4  # share of an output: the engines may add the floats of the last layer in another order


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "vgg9_bn", "example_net"], help="%(default)s")
    parser.add_argument("--timesteps", nargs="+", type=whole_number(1), default=[16, 32], help="%(default)s")
    parser.add_argument("--batch", nargs="+", type=whole_number(1), default=[100], help="images (%(default)s)")
    parser.add_argument("--bits", type=whole_number(1, 8), default=8, help="weight bits (%(default)s)")
    parser.add_argument("--rounds", type=whole_number(1), default=5, help="turns of every contender (%(default)s)")
    parser.add_argument("--threads", type=whole_number(1), default=None, help="CPU threads (all cores)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (%(default)s)")
    parser.add_argument(
        "--reference", action=argparse.BooleanOptionalAction, default=True, help="time --engine reference too"
    )
    parser.add_argument(
        "--special", action="store_true", help="time --per_channel spikes, --listen T and --avgpool fold too"
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=False, help="peak memory too")
    parser.add_argument("--save_file", default=None, help="write the results as JSON")
    parser.add_argument(
        "--peak_memory", action="store_true", help="only simulate the first case, and print the peak memory in MB"
    )
    parser.add_argument(
        "--conversion", action="store_true", help="only time conversions, on --images, against the ANN's pass"
    )
    parser.add_argument("--images", type=whole_number(1), default=1000, help="of --conversion (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def main(args):
    import torch

    from runtime.device import choose_device
    from runtime.files import check_writable, write_json
    from spike_dag import format_table

    check_writable(args.save_file)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    if args.peak_memory:
        simulate_once(args.networks[0], args.timesteps[0], args.batch[0], device)
        return
    if args.conversion:
        print(format_table(time_conversions(args.networks, args.timesteps[0], args.images, device, args.rounds)))
        return
    results = {"machine": describe_machine(device), "rows": []}
    cases = [(net, T, B) for net in args.networks for T in args.timesteps for B in args.batch]
    for net, timesteps, batch in cases:
        case = net, timesteps, batch, device
        rows = time_contenders(*case, args.rounds, args.reference, args.special, bits=args.bits)
        if args.memory:
            add_memory(rows, net, timesteps, batch, device)
        results["rows"] += rows
        print(f"{net}, T={timesteps}, batch {batch}: done", file=sys.stderr)
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    columns = list(results["rows"][0])
    print(format_table([columns] + [[row[column] for column in columns] for row in results["rows"]]))
    if args.save_file:
        write_json(args.save_file, results)


def time_contenders(net_name, timesteps, batch, device, rounds, with_reference, with_special=False, bits=8):
    """One row for each contender on one network."""
    import torch

    contenders = build_contenders(net_name, timesteps, batch, device, with_reference, bits)
    if with_special:
        contenders |= special_contenders(net_name, timesteps, batch, device, bits)
    seconds = {name: [] for name in contenders}
    with torch.no_grad():
        for run in contenders.values():  # a first run, not counted, compiles and chooses kernels
            timed(run, device)
        for _ in range(rounds):
            for name, run in contenders.items():
                seconds[name].append(timed(run, device))
    return [summarise(name, net_name, timesteps, batch, seconds) for name in contenders]


def timed(run, device):
    """Seconds of one call."""
    import torch

    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def summarise(name, net_name, timesteps, batch, seconds):
    """The table row of one contender; ratios are medians over the rounds."""

    def ratio(other, factor=1):
        return statistics.median(theirs / (mine * factor) for theirs, mine in zip(seconds[other], seconds[name]))

    peers = [other for other in seconds if other.startswith("SpikingJelly")]
    faster_peer = min(peers, key=lambda peer: statistics.median(seconds[peer]), default=None)
    steps = 1 if name.startswith(ANN) else timesteps
    return {
        "network": net_name,
        "T": timesteps,
        "batch": batch,
        "contender": name,
        "ms": round(1e3 * statistics.median(seconds[name]), 1),
        "images/s": round(batch / statistics.median(seconds[name]), 1),
        "x T x ANN": round(1 / (ratio(ANN) * steps), 3),
        "x SpikingJelly": round(ratio(faster_peer), 2) if faster_peer and steps == timesteps else "-",
    }


def build_contenders(net_name, timesteps, batch, device, with_reference, bits=8):
    """Name -> a function that runs one batch. Raises ValueError where the two engines differ."""
    net, images, snn = build(net_name, timesteps, batch, device, bits)
    contenders = {ANN: lambda: net(images)}
    if device.type == "cuda":
        half = build(net_name, timesteps, batch, device)[0].half()
        contenders["ANN, FP16"] = lambda: half(images.half())
    contenders["this toolkit"] = lambda: snn(images)
    contenders["this toolkit, with accuracy"] = validation(snn, images, timesteps, device)
    if with_reference:
        reference = build(net_name, timesteps, batch, device, bits)[2]
        reference.set_engine("reference")
        contenders["its reference engine"] = lambda: reference(images)
        check_same_outputs(snn, reference, images, net_name)
    return contenders | spikingjelly_contenders(net_name, timesteps, images)


def validation(snn, images, timesteps, device):
    """A function that measures the accuracy at every step, and firing rates, on one batch."""
    import torch

    from validate import evaluate

    loader = [(images, torch.zeros(len(images), dtype=torch.long))]
    return lambda: evaluate(snn, loader, device, torch.nn.CrossEntropyLoss(), timesteps, every_step=True)


def check_same_outputs(snn, reference, images, name):
    """Raise ValueError unless both engines give the same outputs, to within `SAME_OUTPUTS`."""
    import torch

    if not torch.allclose(snn(images), reference(images), rtol=SAME_OUTPUTS, atol=SAME_OUTPUTS):
        raise ValueError(f"{name}: the engines differ, its figures mean nothing")


def special_contenders(net_name, timesteps, batch, device, bits=8):
    """Name -> a function that runs one batch, for the networks of `special_networks`."""
    images, contenders = build(net_name, timesteps, batch, device, bits)[1], {}
    for mode, snn in special_networks(net_name, timesteps, batch, device, bits).items():
        reference = copy.deepcopy(snn)
        reference.set_engine("reference")
        check_same_outputs(snn, reference, images, f"{net_name}, {mode}")
        contenders[f"this toolkit, {mode}"] = lambda snn=snn: snn(images)
    return contenders


def special_networks(net_name, timesteps, batch, device, bits=8):
    """Mode -> spiking network, for each mode that changes the computation of this network."""
    modes = {
        "--per_channel spikes": {"per_channel": "spikes"},
        "--listen T": {"listen": timesteps},
        "--avgpool fold": {"avgpool": "fold"},
    }
    networks = {mode: build(net_name, timesteps, batch, device, bits, **options)[2] for mode, options in modes.items()}
    if not any(getattr(entry["op"], "folded", False) for entry in networks["--avgpool fold"].ops.values()):
        del networks["--avgpool fold"]
    return networks


def build(net_name, timesteps, batch, device, bits=8, **options):
    """`net, images, snn`: a network with random weights, random images [batch, 3, S, S], and the spiking network.

    bits: of the weights. options: of `trans_ann2snn_weight`.
    """
    from ann_parser import parse_ann_model
    from snn_weight_setter import trans_ann2snn_weight

    net, images = random_network(net_name, batch, device)
    dag = parse_ann_model(net, (images[:1],))
    options = {"maxpool": "gate", "correction": "none", **options}
    snn = trans_ann2snn_weight(dag, [(images[:32],)], device, timesteps, bits, **options)
    return net, images, snn


def random_network(net_name, batch, device):
    """`net, images`: a network with random weights, and random images [batch, 3, S, S]."""
    import torch

    from build_network import get_net_by_name, input_size

    torch.manual_seed(0)
    net = get_net_by_name(net_name, 3, 10).eval().to(device, memory_format=torch.channels_last)
    size = input_size(net_name)
    return net, torch.randn(batch, 3, size, size).to(device, memory_format=torch.channels_last)


def spikingjelly_contenders(net_name, timesteps, images):
    """SpikingJelly's rate-coding conversion of the same network, single-step and multi-step; empty if not installed."""
    import torch

    try:
        from spikingjelly.activation_based import functional
        from spikingjelly.activation_based.ann2snn import Converter
        from spikingjelly.activation_based.ann2snn.recipes import RateCodingRecipe
    except ImportError:
        return {}
    device = images.device

    def convert(step_mode):
        net = build(net_name, timesteps, len(images), device)[0]
        snn = Converter(RateCodingRecipe([(images[:32], torch.zeros(32))], mode="99.9%"), device=device).convert(net)
        functional.set_step_mode(snn, step_mode)
        return snn.eval()

    try:
        single, multi = convert("s"), convert("m")
    except ValueError as error:  # SpikingJelly 2.0 takes nn.ReLU, but not a call of F.relu
        print(f"SpikingJelly does not take {net_name} ({error})", file=sys.stderr)
        return {}
    steps = images.expand(timesteps, *images.shape)

    def run_single():
        functional.reset_net(single)
        return sum(single(images) for _ in range(timesteps)) / timesteps

    def run_multi():
        functional.reset_net(multi)
        return multi(steps).mean(0)

    return {"SpikingJelly, single-step": run_single, "SpikingJelly, multi-step": run_multi} | (
        compiled_spikingjelly(convert("m"), steps, functional) if device.type == "cuda" else {}
    )


def compiled_spikingjelly(snn, steps, functional):
    """SpikingJelly's multi-step neurons on each GPU backend that runs on this machine."""
    contenders = {}
    for backend in ("cupy", "triton"):
        try:
            functional.set_backend(snn, backend)
            functional.reset_net(snn)
            snn(steps)
        except (ImportError, AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
            print(f"SpikingJelly's backend {backend} does not run here ({type(error).__name__})", file=sys.stderr)
            continue

        def run(backend=backend):
            functional.set_backend(snn, backend)
            functional.reset_net(snn)
            return snn(steps).mean(0)

        contenders[f"SpikingJelly, {backend}"] = run
    return contenders


def time_conversions(networks, timesteps, images, device, rounds):
    """Table rows: seconds of an ANN pass over the images, and of conversions on them in units of this pass, medians."""
    import torch

    from ann_parser import parse_ann_model
    from snn_weight_setter import trans_ann2snn_weight

    modes = {
        "conversion, in ANN passes": {"correction": "none"},
        f"with correction on spikes, T={timesteps}": {},
        f"--listen T, T={timesteps}": {"listen": timesteps},
    }
    rows = [("network", "ANN pass s", *modes)]
    for name in networks:
        net, inputs = random_network(name, images, device)
        loader = [(batch, None) for batch in inputs.split(100)]
        dag = parse_ann_model(net, (inputs[:1],))

        def convert(options, dag=dag, loader=loader):
            known = {"maxpool": "gate", "signed": "pair", "calibration_samples": images}
            trans_ann2snn_weight(dag, loader, device, timesteps, 8, **known, **options)

        seconds = {mode: [] for mode in ("pass", *modes)}
        for _ in range(rounds + 1):
            with torch.no_grad():
                seconds["pass"].append(timed(lambda net=net, loader=loader: [net(x) for x, _ in loader], device))
            for mode, options in modes.items():
                seconds[mode].append(timed(lambda options=options: convert(options), device))
        one, *others = (statistics.median(times[1:]) for times in seconds.values())
        rows.append((name, f"{one:.2f}", *(f"{other / one:.1f}" for other in others)))
    return rows


def add_memory(rows, net_name, timesteps, batch, device):
    """Add the peak memory in MB of a separate process to the row of this toolkit."""
    command = [sys.executable, __file__, "--peak_memory", "--networks", net_name, "--device", str(device)]
    command += ["--timesteps", str(timesteps), "--batch", str(batch)]
    megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    for row in rows:
        row["peak MB"] = megabytes if row["contender"] == "this toolkit" else "-"


def simulate_once(net_name, timesteps, batch, device):
    """Convert at T = 16, simulate `timesteps` steps twice, and print the peak memory in MB."""
    import torch

    _, images, snn = build(net_name, 16, batch, device)
    with torch.no_grad():
        for _ in range(2):
            snn(images, timesteps=timesteps)
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated(device) // 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def describe_machine(device):
    """Processor, thread count and versions of this machine, as a dict."""
    import torch

    machine = {"CPU": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    machine["python"] = platform.python_version()
    if device.type == "cuda":
        machine["GPU"] = torch.cuda.get_device_name(device)
    for package in ("numba", "spikingjelly"):
        machine[package] = version_of(package)
    return machine


def cpu_name():
    """The processor's name, as /proc/cpuinfo or Python gives it."""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def version_of(package):
    """The version of an installed package, or "missing"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    run_script(main, parse_args())
