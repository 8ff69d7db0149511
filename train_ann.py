"""Train a network of build_network.py from scratch and save its weights.

    python3 train_ann.py example_net --epochs 60 --save_file checkpoint/example_net_ann.pth

The checkpoint holds the state dict under "state_dict", with the network, data set, seed and number of epochs. It is
written at the end. Until then every epoch is saved to FILE.part, whose weights --ann_weight reads, and the training to
FILE.state, from which --resume goes on.
"""

import argparse
import contextlib
import copy
import os
import sys

from options import RunOptions
from runtime.cli import OneLineParser, run_script
from runtime.flags import add_options, real_number, whole_number
from script_options import BuildOptions, DataOptions, LongRunOptions


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "net_name",
        help="NAME, torchvision:NAME, timm:NAME, file.py:callable or model.onnx",
    )
    add_options(parser, BuildOptions, DataOptions, val_share=0.1)
    parser.add_argument("--epochs", type=whole_number(1), default=60, help="passes over the training images")
    parser.add_argument("--lr", type=real_number(0), default=0.1, help="peak learning rate (%(default)s)")
    parser.add_argument("--wd", type=real_number(0), default=5e-4, help="weight decay (%(default)s)")
    parser.add_argument("--momentum", type=real_number(0, 1), default=0.9, help="Nesterov momentum (%(default)s)")
    parser.add_argument("--label_smoothing", type=real_number(0, 1), default=0.0, help="label smoothing (%(default)s)")
    parser.add_argument("--ann_weight", default=None, help="weights to start from (default: random ones)")
    parser.add_argument(
        "--average",
        type=whole_number(0),
        default=0,
        metavar="CYCLES",
        help="save the mean of the trained weights and those of --ann_weight, which count CYCLES times (%(default)s)",
    )
    parser.add_argument(
        "--teacher", metavar="NET:FILE", default=None, help="trained network whose outputs are a second target"
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; faster with AMX and on recent GPUs")
    parser.add_argument(
        "--compile", action="store_true", help="train with torch.compile, which needs a C++ compiler on a CPU"
    )
    parser.add_argument("--save_file", default=None, help="checkpoint to write (checkpoint/<net_name>_ann.pth)")
    add_options(parser, RunOptions, LongRunOptions)
    parser.main_actions.clear()  # --help shows all of them
    return parser.parse_args(argv)


def main(args):
    import torch

    from build_network import choose_input
    from datasets import check_dataset_name, get_dataset
    from finetuning.long_runs import open_progress
    from runtime.device import seed_everything
    from runtime.processes import in_turn, is_first, join, leave, start_alike

    save_file = args.save_file or f"checkpoint/{args.net_name}_ann.pth"
    choose_input(args)
    check_dataset_name(args.dataset)
    check_flags(args)
    device = join(args.device)
    check_files(save_file)
    seed_everything(args.seed)
    test_loader, val_loader, train_loader, _ = loaders = in_turn(lambda: get_dataset(args))
    net = load_network(args, train_loader.dataset)
    start_alike(net)
    start = copy.deepcopy(net.state_dict()) if args.average else None
    check_files(save_file, 2 * sum(each.numel() * each.element_size() for each in net.parameters()))  # with its .part
    net.to(device, memory_format=torch.channels_last)
    teacher = load_teacher(args, train_loader.dataset, device)
    criterion, measure, in_words = choose_measure(args, device)
    with open_progress(args, f"{save_file}.state", net, loaders, is_first()) as progress:
        for epoch, loss in train(args, net, teacher, criterion, train_loader, device, progress):
            validated = progress.validated = measure(net, val_loader, criterion) if len(val_loader.dataset) else None
            of_validation = f"  validation {in_words(validated)}" if validated else ""
            print(f"epoch {epoch}/{args.epochs}  training loss {loss:.4f}{of_validation}", file=sys.stderr)
            save(unfinished(save_file), net, args, epoch)
        if not leave():
            return
        if args.average:
            average_weights(net, start, args.average, train_loader, device)
        save(save_file, net, args, progress.epoch)
        progress.remove_state()
    with contextlib.suppress(FileNotFoundError):  # no epoch has ended
        os.remove(unfinished(save_file))
    result = measure(net, test_loader)
    print(f"test {in_words(result)} of {result['samples']} images, loss {result['loss']:.4f}\nsaved {save_file}")


def check_files(save_file, size=0):
    """Raise OSError if the checkpoint or that of an epoch cannot be written, or there is no room for `size` bytes."""
    from runtime.files import check_room, check_writable
    from runtime.processes import is_first

    if is_first():
        check_writable(save_file)
        check_writable(unfinished(save_file))
        check_room(save_file, size)


def unfinished(save_file):
    """The file to which every epoch is saved until the training ends."""
    return f"{save_file}.part"


def load_network(args, images):
    """The network to train, with the weights of --ann_weight. Raises ValueError if it does not suit the images.

    images: the training set. Raises OSError if the weights cannot be read.
    """
    from build_network import check_runs, get_net_by_name
    from datasets import DETECTION_DATASETS
    from detection.boxes import check_detects
    from networks.checkpoint import load_weights
    from pipeline import check_classifies

    net = get_net_by_name(args.net_name, images.channels, images.num_classes, net_args=args.net_args)
    if args.ann_weight is not None:
        load_weights(net, args.ann_weight)
    # both checks run in eval mode; train_epoch sets its own
    check_runs(net, args.net_name, images[0][0])
    check_outputs = check_detects if args.dataset in DETECTION_DATASETS else check_classifies
    check_outputs(net, args.net_name, images)
    return net


def load_teacher(args, images, device):
    """The trained network of --teacher on a device, or None. Raises ValueError if it does not suit the images."""
    import torch

    from build_network import build_trained_net
    from pipeline import check_classifies

    if args.teacher is None:
        return None
    name, file = network_and_file(args.teacher)
    teacher = build_trained_net(name, images.channels, images.num_classes, file).eval()
    check_classifies(teacher, name, images)
    teacher.to(device, memory_format=torch.channels_last)
    return torch.compile(teacher) if args.compile else teacher


def choose_measure(args, device):
    """`criterion, measure, in_words`: the training loss, `measure(net, loader)`, and a function that prints its result.

    `measure` computes the loss without label smoothing unless it is called with the criterion.
    """
    from torch import nn

    from datasets import DETECTION_DATASETS
    from detection.boxes import DetectionLoss, evaluate_detector
    from validate import evaluate

    if args.dataset in DETECTION_DATASETS:
        criterion, evaluate, in_words = DetectionLoss(args.image_size), evaluate_detector, map_in_words
        plain = criterion
    else:
        criterion, in_words = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing), top1_in_words
        plain = nn.CrossEntropyLoss()

    def measure(net, loader, criterion=plain):
        return evaluate(net, loader, device, criterion)

    return criterion, measure, in_words


def train(args, net, teacher, criterion, loader, device, progress):
    """Train a network in place; yields `epoch, mean loss` after every epoch that is left, counted from 1."""
    import torch

    trained = torch.compile(net) if args.compile else net  # the same parameters

    optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum, weight_decay=args.wd, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, args.epochs * len(loader), pct_start=0.2, cycle_momentum=False
    )
    for epoch in progress.epochs("train", args.epochs, net, optimizer, schedule):
        name = f"epoch {epoch}"
        of_epoch = optimizer, schedule, device, args.bf16, name, teacher, progress
        yield epoch, train_epoch(trained, loader, criterion, *of_epoch)


def save(path, net, args, epochs):
    """Write the state dict, with the network, data set, seed and number of epochs; the first process does."""
    from datasets import DATASETS, DETECTION_DATASETS
    from runtime.files import write_torch
    from runtime.processes import is_first

    if not is_first():
        return
    known = (*DATASETS, *DETECTION_DATASETS)
    dataset = args.dataset if args.dataset in known else "folder"  # keeps paths of this machine out of the file
    details = {"net": args.net_name, "dataset": dataset, "seed": args.seed, "epochs": epochs}
    write_torch(path, {"state_dict": net.state_dict(), **details})


def average_weights(net, other, cycles, loader, device):
    """Average the weights with another state dict, and estimate the BatchNorm statistics anew.

    other: the mean of `cycles` trainings, so it counts `cycles` times. This is stochastic weight averaging over cycles
    of the learning rate (Izmailov et al., UAI 2018).
    """
    import torch
    from torch.optim.swa_utils import update_bn

    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                value.lerp_(other[name].to(value), cycles / (cycles + 1))
    update_bn(loader, net, device)


def check_flags(args):
    """Raise ValueError for a flag without one that it needs, and for a classifier's flag with a detection data set."""
    from datasets import DETECTION_DATASETS

    if args.average and not args.ann_weight:
        raise ValueError("--average needs the weights to average with, name them by --ann_weight")
    if args.teacher is not None:
        network_and_file(args.teacher)
    for flag in ("teacher", "label_smoothing"):
        if args.dataset in DETECTION_DATASETS and getattr(args, flag) not in (None, 0):
            raise ValueError(f"--{flag} is for classifiers, leave it out for the detectors of --dataset {args.dataset}")


def network_and_file(text):
    """Split `NET:FILE`; names from outside contain a colon, and files may. Raises ValueError for another text."""
    from build_network import NETWORKS

    name, _, file = text.partition(":")
    is_outside = name in ("torchvision", "timm") or name.endswith(".py")
    if is_outside or (name not in NETWORKS and ":" in file):  # torchvision:NAME, file.py:NAME, package.module:NAME
        second, _, file = file.partition(":")
        name = f"{name}:{second}"
    if not name.partition(":")[0] or name.endswith(":") or not file:
        raise ValueError(f"--teacher '{text}' is no network with a file of its weights, use NET:FILE")
    return name, file


def top1_in_words(result):
    """The accuracy of a classifier as text."""
    return f"top-1 {result['top1']:.2f} %"


def map_in_words(result):
    """The mean average precision of a detector as text."""
    return f"mAP {result['map']:.3f}, mAP@0.5 {result['map50']:.3f}"


def train_epoch(net, loader, criterion, optimizer, schedule, device, bf16, name, teacher, progress):
    """Train for one pass over the images; returns the mean loss. Raises ValueError if it is not finite."""
    import torch

    from quantization import distillation_loss
    from runtime.processes import average_buffers, average_gradients

    net.train()
    for inputs, targets in progress.batches(loader, name):
        inputs, targets = inputs.to(device, memory_format=torch.channels_last), targets.to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = net(inputs)
            loss = criterion(outputs, targets)
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(inputs).float()
                loss = 0.1 * loss + 0.9 * distillation_loss(outputs.float(), wanted)
        loss.backward()
        average_gradients(net.parameters(), len(inputs))
        optimizer.step()
        schedule.step()
        progress.count(loss, len(inputs), outputs, targets)
    average_buffers(net)
    mean = progress.loss
    if not (mean < float("inf") and all(torch.isfinite(p).all() for p in net.parameters())):
        raise ValueError(f"training diverged in {name} (loss {mean}), lower --lr")
    return mean


if __name__ == "__main__":
    run_script(main, parse_args, shared=True)
