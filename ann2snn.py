"""Quantize and finetune a trained network, convert it into a spiking one, measure all three, save the result.

    python3 ann2snn.py example_net --weight_bitwidth 4 --timesteps 16 --finetune_epochs 30 \\
        --ann_weight checkpoint/example_net_ann.pth --save_file out_snn.pth
"""

import argparse
import os

from runtime.cli import OneLineParser, add_analysis_flags, add_conversion_flags, run_script


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net_name", help="network name to convert")
    add_conversion_flags(parser)
    parser.add_argument("--save_file", default="out_snn.pth", help="the output location of the transferred weights")
    parser.add_argument("--results", metavar="FILE.json", help="write all results as JSON")
    parser.add_argument("--report", metavar="DIR", help="write a report of where accuracy is lost, as analyse_error.py")
    add_analysis_flags(parser)
    return parser.parse_args(argv)


def main(args):
    # imported here, so that --help and a wrong command line answer at once
    from build_network import input_size
    from dag_rewrites import equalize_channels
    from datasets import get_dataset
    from finetuning.on_spikes import finetune_on_spikes
    from pipeline import (
        Stopwatch,
        accuracy_table,
        check_command_line,
        choose_measure,
        convert,
        load_network,
        with_levels,
    )
    from quantization import quantize_finetune
    from runtime.device import choose_device, seed_everything
    from runtime.files import (
        after_writing,
        check_different,
        check_folder,
        check_room,
        check_writable,
        write_json,
        write_torch,
    )

    # everything that can be wrong with the command line is found before the work begins
    check_command_line(args)
    check_writable(args.save_file)
    check_writable(args.results)
    check_folder(args.report)
    pages = [os.path.join(args.report, page) for page in ("report.html", "report.json")] if args.report else []
    check_different(args.save_file, args.results, args.report, *pages)
    device = choose_device(args.device)
    seed_everything(args.seed)
    args.image_size = input_size(args.net_name)
    clock = Stopwatch()

    test_loader, _, train_loader, train_val_loader = get_dataset(args)
    net, args = load_network(args, train_loader.dataset)
    check_room(args.save_file, weight_bytes(net))
    clock.lap("data")

    criterion, measure = choose_measure(args)
    ann = measure(net, test_loader, device, criterion)
    clock.lap("validate_ann")

    if args.equalize:
        net = equalize_channels(net)
    qnet = quantize_finetune(with_levels(net, train_val_loader, device, args), train_loader, criterion, device, args)
    clock.lap("quantize_finetune")
    quantized = measure(qnet, test_loader, device, criterion)
    clock.lap("validate_qnet")

    snn = convert(qnet, train_val_loader, device, args)
    clock.lap("trans_ann2snn_weight")
    snn = finetune_on_spikes(snn, qnet, net, train_loader, train_val_loader, criterion, device, args)
    clock.lap("finetune_on_spikes")
    spiking = measure(snn, test_loader, device, criterion, args.timesteps, every_step=True)
    clock.lap("validate_snn")

    # hours of work are saved before anything is printed, for stdout may be closed by now
    steps = snn.duration()
    write_torch(args.save_file, snn.cpu())
    if args.results:
        with after_writing(args.save_file):
            write_json(args.results, collect_results(args, ann, quantized, spiking, steps, clock.seconds))

    print(accuracy_table(args, ann, quantized, spiking))
    print_layers(snn, spiking["firing_rate"])
    print(
        f"timesteps: {steps['firing']} of firing, {steps['interval']} between images, {steps['latency']} to the answer"
    )
    print(f"Save the SNN in {args.save_file}", flush=True)
    if args.report:
        from reports.analysis import analyse, write_report

        loaders, accuracies = (test_loader, train_loader, train_val_loader), (ann, quantized, spiking)
        with after_writing(args.save_file, args.results):
            write_report(args.report, analyse(args, net, qnet, snn.to(device), loaders, device, accuracies))
        print(f"Save the report in {args.report}")


def weight_bytes(net):
    """Bytes of a network's weights, which its file has at least."""
    return sum(parameter.numel() * parameter.element_size() for parameter in net.parameters())


def print_layers(snn, firing_rate):
    """What the chip needs to know of each spiking layer."""
    from spike_dag import format_table

    rows = [("spiking layer", "module path", "Vthr", "lambda", "spikes per neuron and step")]
    for name, neuron in snn.neurons().items():
        threshold, scale = neuron.Vthr.float(), neuron.scale_factor.float()
        rows.append((name, snn.ops[name]["path"], span(threshold), span(scale), f"{firing_rate[name]:.4f}"))
    print(format_table(rows))


def span(values):
    """A tensor of one or more numbers, in words."""
    least, most = values.min().item(), values.max().item()
    return f"{least:.4g}" if least == most else f"{least:.4g}..{most:.4g}"


def collect_results(args, ann, quantized, spiking, duration, seconds):
    """What `--results` holds."""
    from pipeline import versions

    flags = {key: value for key, value in vars(args).items() if key not in ("debug", "results", "report")}
    accuracies = {"ann": ann, "qnet": quantized, "snn": spiking}
    return {
        "net": args.net_name,
        **{key: getattr(args, key) for key in ("dataset", "weight_bitwidth", "timesteps", "reset_mode", "seed")},
        **{
            f"{name}_{key}": result[key]
            for key in ("top1", "top5", "map", "map50", "loss")
            for name, result in accuracies.items()
            if key in result
        },
        "samples": spiking["samples"],
        **by_timestep(spiking),
        "firing_rate": spiking["firing_rate"],
        "duration": duration,
        "seconds": seconds,
        "versions": versions(),
        "flags": flags,
    }


def by_timestep(spiking):
    """The accuracy after every step, where it was measured."""
    if "top1_by_timestep" not in spiking:
        return {}
    return {"snn_top1_by_timestep": {str(t): top1 for t, top1 in enumerate(spiking["top1_by_timestep"], start=1)}}


if __name__ == "__main__":
    run_script(main, parse_args())
