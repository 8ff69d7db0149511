"""Show where a conversion loses accuracy and which options regain it: figures, report.json and report.html.

    python3 analyse_error.py --load checkpoint/example_net_ann.pth example_net --finetune_epochs 10

It quantizes, finetunes and converts like ann2snn.py with the same flags. Then it examines every layer on some test
images, gives one layer at a time float weights, tries other flags, and writes the report to `analysis/<network>`.
"""

import argparse
import os
from functools import partial

from command_line import add_conversion_flags, parse_conversion
from runtime.cli import OneLineParser, run_script
from script_options import AnalysisOptions


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "net_name",
        help="NAME, torchvision:NAME, timm:NAME, file.py:callable or model.onnx",
    )
    load = parser.add_argument("--load", dest="ann_weight", metavar="FILE", help="same as --ann_weight")
    out = parser.add_argument("--out", metavar="DIR", help="folder for the report (analysis/<network>)")
    parser.main_actions.update({action: action.help for action in (load, out)})
    add_conversion_flags(parser, AnalysisOptions)
    return parse_conversion(parser, argv)


def main(args):
    # imported here so that --help and errors in the command line appear at once
    from build_network import choose_input
    from datasets import DETECTION_DATASETS, get_dataset
    from finetuning.long_runs import open_progress
    from pipeline import accuracy_table, check_command_line, choose_measure, load_network, make
    from reports.analysis import analyse, summary_rows, write_report
    from reports.compare import read_runs
    from runtime.device import choose_device, seed_everything
    from runtime.files import check_folder
    from runtime.packages import REPORT_PACKAGES, check_packages
    from spike_dag import format_table

    if args.dataset in DETECTION_DATASETS:
        raise ValueError(f"the analysis is for classifiers, --dataset {args.dataset} has boxes: choose another")
    check_command_line(args)
    check_packages("analyse_error.py", *REPORT_PACKAGES)
    folder = f"analysis/{safe_name(args.net_name)}" if args.out is None else args.out
    check_folder(folder)
    read_runs(args.compare)
    device = choose_device(args.device)
    seed_everything(args.seed)
    choose_input(args)

    loaders = test_loader, _, train_loader, train_val_loader = get_dataset(args)
    net, args = load_network(args, train_loader, train_val_loader)
    criterion, evaluate = choose_measure(args)
    measure = partial(evaluate, loader=test_loader, device=device, criterion=criterion, keep_answers=True)
    trained_on = train_loader, train_val_loader
    with open_progress(args, os.path.join(folder, "training.state"), net, trained_on) as progress:
        made = make(args, net, trained_on, criterion, device, measure, progress=progress)
        analysis = analyse(args, made, loaders, device)
        write_report(folder, analysis)
        progress.remove_state()

    print(accuracy_table(args, made.accuracies))
    print(format_table(summary_rows(analysis.result)))
    print("\n".join(analysis.result["verdict"]))
    print(f"Save the report in {folder}/report.html")
    print(f"next: {analysis.result['next']['command']}  # {analysis.result['next']['reason']}")


def safe_name(net_name):
    """A network's name in a form that suits a file name: torchvision:resnet18 -> torchvision_resnet18."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in net_name)


if __name__ == "__main__":
    run_script(main, parse_args)
