"""Where a conversion loses accuracy, and what it would cost to get it back: figures, report.json and report.html.

    python3 analyse_error.py --load checkpoint/example_net_ann.pth example_net --finetune_epochs 10

It quantizes, finetunes and converts as ann2snn.py does with the same flags, looks into every layer on some test images,
repairs layers one at a time, tries other flags, and writes what it found into `analysis/<network>`.
"""

import argparse

from runtime.cli import OneLineParser, add_analysis_flags, add_conversion_flags, run_script


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net_name", help="network name to analyse")
    parser.add_argument("--load", dest="ann_weight", metavar="FILE", help="the location of the trained weights")
    add_conversion_flags(parser)
    parser.add_argument("--out", metavar="DIR", help="the folder to write into (analysis/<network>)")
    add_analysis_flags(parser)
    return parser.parse_args(argv)


def main(args):
    # imported here, so that --help and a wrong command line answer at once
    from torch import nn

    from build_network import input_size
    from dag_rewrites import equalize_channels
    from datasets import DETECTION_DATASETS, get_dataset
    from finetuning.on_spikes import finetune_on_spikes
    from pipeline import accuracy_table, check_command_line, convert, load_network, with_levels
    from quantization import quantize_finetune
    from reports.analysis import analyse, summary_rows, write_report
    from runtime.device import choose_device, seed_everything
    from runtime.files import check_folder
    from runtime.packages import REPORT_PACKAGES, check_packages
    from spike_dag import format_table
    from validate import evaluate

    if args.dataset in DETECTION_DATASETS:
        raise ValueError(f"the analysis is for classifiers, --dataset {args.dataset} has boxes: choose another")
    check_command_line(args)
    check_packages("analyse_error.py", *REPORT_PACKAGES)
    folder = f"analysis/{safe_name(args.net_name)}" if args.out is None else args.out
    check_folder(folder)
    device = choose_device(args.device)
    seed_everything(args.seed)
    args.image_size = input_size(args.net_name)

    test_loader, _, train_loader, train_val_loader = get_dataset(args)
    criterion = nn.CrossEntropyLoss()
    net, args = load_network(args, train_loader.dataset)
    ann = evaluate(net, test_loader, device, criterion)
    if args.equalize:
        net = equalize_channels(net)
    qnet = quantize_finetune(with_levels(net, train_val_loader, device, args), train_loader, criterion, device, args)
    quantized = evaluate(qnet, test_loader, device, criterion)
    snn = convert(qnet, train_val_loader, device, args)
    snn = finetune_on_spikes(snn, qnet, net, train_loader, train_val_loader, criterion, device, args)
    spiking = evaluate(snn, test_loader, device, criterion, args.timesteps, every_step=True)

    loaders, accuracies = (test_loader, train_loader, train_val_loader), (ann, quantized, spiking)
    analysis = analyse(args, net, qnet, snn, loaders, device, accuracies)
    write_report(folder, analysis)

    print(accuracy_table(args, ann, quantized, spiking))
    print(format_table(summary_rows(analysis.result)))
    print("\n".join(analysis.result["verdict"]))
    print(f"Save the report in {folder}/report.html")


def safe_name(net_name):
    """A network's name as part of a file name: torchvision:resnet18 -> torchvision_resnet18."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in net_name)


if __name__ == "__main__":
    run_script(main, parse_args())
