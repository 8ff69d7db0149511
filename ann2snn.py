"""Quantize and finetune a trained network, convert it into a spiking one, measure all three, save the result.

    python3 ann2snn.py example_net --weight_bitwidth 4 --timesteps 16 --finetune_epochs 30 \\
        --ann_weight checkpoint/example_net_ann.pth --save_file out_snn.pth
"""

import argparse
import os
import shlex
import sys
from functools import partial

from command_line import add_conversion_flags, parse_conversion
from runtime.cli import OneLineParser, run_script
from script_options import OutputOptions

# Flags that say nothing about a result.
NOT_OF_RESULT = ("debug", "results", "report", "resume", "max_minutes", "log", "given")


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "net_name",
        help="NAME, torchvision:NAME, timm:NAME, file.py:callable or model.onnx",
    )
    add_conversion_flags(parser, OutputOptions)
    return parse_conversion(parser, argv)


def main(args):
    # imported here so that --help and errors in the command line appear at once
    from build_network import choose_input
    from datasets import get_dataset
    from finetuning.long_runs import open_progress
    from pipeline import Stopwatch, check_command_line, choose_measure, load_network, make
    from runtime.device import seed_everything
    from runtime.files import check_room
    from runtime.processes import in_turn, is_first, join, leave, start_alike

    # find every error in the command line before the work begins
    check_command_line(args)
    device = join(args.device)
    if is_first():
        check_outputs(args)
    seed_everything(args.seed)
    choose_input(args)
    clock = Stopwatch()

    loaders = test_loader, _, train_loader, train_val_loader = in_turn(lambda: get_dataset(args))
    net, args = load_network(args, train_loader, train_val_loader)
    start_alike(net)
    if is_first():
        check_room(args.save_file, weight_bytes(net))
    clock.lap("data")
    criterion, evaluate = choose_measure(args)
    details = {"keep_answers": True} if args.report else {}
    measure = partial(evaluate, loader=test_loader, device=device, criterion=criterion, **details)
    trained_on = train_loader, train_val_loader
    with open_progress(args, f"{args.save_file}.state", net, trained_on, is_first()) as progress:
        made = make(args, net, trained_on, criterion, device, measure, clock, progress, qnet_keeper(args))
        if not leave():
            return
        # save hours of work before printing, because stdout may be closed by now
        save(args, made, train_loader.dataset)
        progress.remove_state()
    print_results(args, made)
    export(args, made, test_loader)
    if args.report:
        report(args, made, loaders, device)


def check_outputs(args):
    """Raise OSError if a result cannot be written or compared, and ValueError if two results have the same file.

    Also ValueError if several processes share the run and it wants the report, which needs every image's answer.
    """
    from export.formats import check_exports
    from finetuning.saved import file_of_qnet, learns_qnet
    from runtime.files import check_different, check_folder, check_writable
    from runtime.processes import started

    if args.report and started() > 1:
        raise ValueError(
            f"--report is for a run of one process, this one has {started()}: leave it out, and give --report in a "
            f"second run with --qnet"
        )
    check_writable(args.save_file)
    check_writable(args.results)
    qnet = file_of_qnet(args.save_file) if learns_qnet(args) else None
    check_writable(qnet)
    check_folder(args.report)
    pages = [os.path.join(args.report, page) for page in ("report.html", "report.json")] if args.report else []
    results = args.save_file, qnet, args.qnet, f"{args.save_file}.state", args.results, args.report
    check_different(*results, *pages, *check_exports(args))
    if args.report and args.compare:
        from reports.compare import read_runs

        read_runs(args.compare)


def qnet_keeper(args):
    """A function that writes the quantized network beside the result; None if this process does not have to."""
    from finetuning.saved import file_of_qnet, learns_qnet, save_qnet
    from runtime.processes import is_first

    writes = learns_qnet(args) and is_first()
    return partial(save_qnet, file_of_qnet(args.save_file), args=args) if writes else None


def weight_bytes(net):
    """Bytes of a network's weights, the least that its file needs."""
    return sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())


def save(args, made, images):
    """Write the spiking network and, with --results, all results as JSON. images: the data set that it takes."""
    from runtime.files import after_writing, write_json, write_torch

    preprocessing = getattr(images, "preprocessing", None)
    made.snn.preprocessing = None if preprocessing is None else preprocessing.to_dict()
    write_torch(args.save_file, made.snn.cpu())
    if args.results:
        with after_writing(args.save_file):
            write_json(args.results, collect_results(args, made))


def print_results(args, made):
    """Print the accuracies, the values of each spiking layer that the chip needs, and the timesteps per image."""
    from finetuning.saved import file_of_qnet, learns_qnet
    from pipeline import accuracy_table

    print(accuracy_table(args, made.accuracies))
    print_layers(made.snn, made.accuracies["snn"]["firing_rate"])
    steps = made.snn.duration()
    fires = "up to " if any(neuron.window is not None for neuron in made.snn.neurons().values()) else ""
    print(
        f"timesteps per image: every layer fires for {fires}{steps['firing']}, the next image starts after "
        f"{steps['interval']}, the answer is ready after {steps['latency']}"
    )
    print(f"Save the SNN in {args.save_file}")
    if learns_qnet(args):
        print(f"Save the quantized ANN in {file_of_qnet(args.save_file)}, for --qnet")
    print_next(args, made)


def print_next(args, made):
    """Print the accuracy after some timesteps, and commands that go on from here."""
    steps = made.accuracies["snn"].get("top1_by_timestep")
    if steps is not None:
        powers = [2**k for k in range(args.timesteps.bit_length()) if 2**k < args.timesteps]
        some = [f"T={t} {steps[t - 1]:.2f}" for t in [*powers, args.timesteps]]
        print(f"top-1 % by timestep: {', '.join(some)}")
    for command, purpose in next_commands(args, made):
        print(f"next: {command}  # {purpose}")
    sys.stdout.flush()


def next_commands(args, made):
    """`(command, purpose)` of what a user may want next."""
    here, file = os.path.dirname(sys.argv[0]), shlex.quote(args.save_file)
    facts = made.snn.preprocessing
    yield f"python3 {os.path.join(here, 'show.py')} {file}", "its layers, integers and memory"
    if facts is not None and "top1" in made.accuracies["snn"]:
        normalisation = " --mean M --std S" if facts["mean"] is None else ""
        yield f"python3 {os.path.join(here, 'predict.py')} {file} IMAGE{normalisation}", "the classes of an image"
    if not args.report:
        yield "the same command with --report DIR", "where it loses accuracy, and what regains it"


def export(args, made, loader):
    """Write the spiking network in the other formats that flags ask for. loader: gives images for test vectors."""
    from export.formats import asked_for, write_exports
    from runtime.batches import loader_for, split_batch
    from runtime.files import after_writing

    if asked_for(args):
        inputs, _ = split_batch(next(iter(loader_for(made.snn, loader))))
        with after_writing(args.save_file, args.results):
            write_exports(args, made.snn, inputs)


def report(args, made, loaders, device):
    """Write the error analysis to `args.report`. loaders: as `get_dataset` returns them."""
    from reports.analysis import analyse, write_report
    from runtime.files import after_writing

    made.snn.to(device)
    with after_writing(args.save_file, args.results):
        write_report(args.report, analyse(args, made, loaders, device))
    print(f"Save the report in {args.report}")


def print_layers(snn, firing_rate):
    """Print Vthr, lambda and firing rate of each spiking layer."""
    from spike_dag import format_table, span

    rows = [("spiking layer", "module path", "Vthr", "lambda", "spikes per neuron and step")]
    for name, neuron in snn.neurons().items():
        threshold, scale = neuron.Vthr.float(), neuron.scale_factor.float()
        rows.append((name, snn.ops[name].path, span(threshold), span(scale), f"{firing_rate[name]:.4f}"))
    print(format_table(rows))


def collect_results(args, made):
    """The dictionary that --results writes as JSON."""
    from pipeline import versions

    flags = {key: value for key, value in vars(args).items() if key not in NOT_OF_RESULT}
    spiking = made.accuracies["snn"]
    return {
        "net": args.net_name,
        **{key: getattr(args, key) for key in ("dataset", "weight_bitwidth", "timesteps", "reset_mode", "seed")},
        **{
            f"{name}_{key}": result[key]
            for key in ("top1", "top5", "map", "map50", "loss")
            for name, result in made.accuracies.items()
            if key in result
        },
        "samples": spiking["samples"],
        "preprocessing": made.snn.preprocessing,
        **by_timestep(spiking),
        "firing_rate": spiking["firing_rate"],
        "duration": made.snn.duration(),
        "seconds": made.seconds,
        "versions": versions(),
        "flags": flags,
    }


def by_timestep(spiking):
    """The accuracy after every timestep, as an entry of the results; empty if it was not measured."""
    if "top1_by_timestep" not in spiking:
        return {}
    return {"snn_top1_by_timestep": {str(t): top1 for t, top1 in enumerate(spiking["top1_by_timestep"], start=1)}}


if __name__ == "__main__":
    run_script(main, parse_args, shared=True)
