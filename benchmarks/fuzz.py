"""Test the toolkit's promises on random networks, files and command lines; broken cases are printed.

    python3 benchmarks/fuzz.py --cases 300 --seed 0

networks: a random network with random options is refused with a message, or keeps these promises. The graph computes
the network's outputs. The fast simulator and the reference send the same spikes. Saving, batch size and memory budget
change nothing. With float weights, 512 steps (or 8192) and listening, outputs are within 1 % of the ANN's.
files: a saved network with flipped bits, without its end, or with an edited field is refused, or is still the same.
lines: a command line ends with status 0, or with status 2 and one line.

Every case has a number: `--only networks:17` runs one case again, with its traceback.
"""

import argparse
import contextlib
import copy
import io
import os
import random
import sys
import tempfile
import traceback
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

REFUSALS = (ValueError, NotImplementedError, OSError)


class Broken(AssertionError):
    """A promise was not kept."""


def promise(kept, words):
    """Raise Broken unless `kept`."""
    if not kept:
        raise Broken(words)


# ---------------------------------------------------------------------------------------------------------------------
# Random networks


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), or without the ReLU behind it."""

    def __init__(self, body, shortcut, has_relu):
        super().__init__()
        self.body, self.shortcut, self.has_relu = body, shortcut, has_relu

    def forward(self, x):
        x = self.body(x) + self.shortcut(x)
        return F.relu(x) if self.has_relu else x


class Joined(nn.Module):
    """Branches side by side, concatenated."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class RandomNet:
    """Builds one network from a `random.Random`; `size` is the side of its square maps, `channels` their number."""

    def __init__(self, rng):
        self.rng, self.channels, self.size = rng, rng.choice([1, 2, 3]), rng.choice([5, 8, 9, 12])

    def build(self):
        """`net, shape of an image`."""
        shape = self.channels, self.size, self.size
        layers = [self.conv_relu()]
        blocks = self.conv_relu, self.conv_relu, self.residual, self.inception, self.pool, self.normed, self.bottleneck
        blocks += self.upwards, self.depthwise
        for _ in range(self.rng.randint(0, 4)):
            layers.append(self.rng.choice(blocks)())
        layers += self.head()
        net = nn.Sequential(*layers)
        for module in net.modules():
            self.randomise(module)
        return net.eval(), shape

    def randomise(self, module):
        """Give a BatchNorm statistics and scales as after a training, and sometimes a dead or negative channel."""
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            module.weight.data.uniform_(0.3, 1.5)
            module.bias.data.normal_(0, 0.2)
            if self.rng.random() < 0.2:
                module.weight.data[self.rng.randrange(len(module.weight))] = self.rng.choice([0.0, 1e-8, -0.5])

    def conv(self, out=None, relu=True, kernel=None, keeps_size=False):
        out, bias = out or self.rng.choice([1, 2, 4, 6, 8]), self.rng.random() < 0.6
        kernel = kernel or self.rng.choice([k for k in (1, 2, 3, 5) if k <= self.size and (k % 2 or not keeps_size)])
        stride = 1 if keeps_size else self.rng.choice([1, 1, 1, 2])
        padding = kernel // 2 if keeps_size else self.rng.choice([0, kernel // 2])
        groups = self.rng.choice([g for g in (1, 1, 2, self.channels) if not self.channels % g and not out % g])
        layers = [nn.Conv2d(self.channels, out, kernel, stride, padding, 1, groups, bias)]
        if self.rng.random() < 0.5:
            layers.append(nn.BatchNorm2d(out))
        if relu:
            layers.append(self.rng.choice([nn.ReLU, nn.ReLU, nn.ReLU6])())
        self.channels, self.size = out, (self.size + 2 * padding - kernel) // stride + 1
        return nn.Sequential(*layers)

    def conv_relu(self):
        return self.conv()

    def residual(self):
        channels = self.channels
        body = nn.Sequential(self.conv(keeps_size=True), self.conv(channels, relu=False, keeps_size=True))
        shortcut = nn.Identity() if self.rng.random() < 0.6 else nn.Conv2d(channels, channels, 1)
        return Residual(body, shortcut, has_relu=True)

    def bottleneck(self):
        """A linear bottleneck: nothing between the add and the next convolution."""
        channels = self.channels
        body = nn.Sequential(self.conv(keeps_size=True), self.conv(channels, relu=False, keeps_size=True))
        shortcut = Residual(body, nn.Identity(), has_relu=False)
        return nn.Sequential(shortcut, self.conv(keeps_size=True))

    def inception(self):
        channels, branches, total = self.channels, [], 0
        for _ in range(self.rng.choice([2, 3])):
            self.channels = channels
            branches.append(self.conv(keeps_size=True))
            total += self.channels
        self.channels = total
        return Joined(branches)

    def pool(self):
        if self.size < 2:
            return nn.Identity()
        kernel = self.rng.choice([k for k in (2, 3) if k <= self.size])
        stride = self.rng.choice([1, kernel])
        self.size = (self.size - kernel) // stride + 1
        kind = self.rng.choice([nn.AvgPool2d, nn.AvgPool2d, nn.MaxPool2d])
        return kind(kernel, stride)

    def normed(self):
        """BatchNorm, ReLU, convolution, ReLU, as in pre-activation networks."""
        return nn.Sequential(nn.BatchNorm2d(self.channels), nn.ReLU(), self.conv(keeps_size=True))

    def upwards(self):
        if self.size > 8:
            return nn.Identity()
        out, self.size, before = self.rng.choice([2, 4]), self.size * 2, self.channels
        self.channels = out
        return nn.Sequential(nn.ConvTranspose2d(before, out, 2, 2), nn.ReLU())

    def depthwise(self):
        conv = nn.Conv2d(self.channels, self.channels, 3, 1, 1, 1, self.channels, False)
        return nn.Sequential(conv, nn.BatchNorm2d(self.channels), nn.ReLU6())

    def head(self):
        layers = []
        if self.rng.random() < 0.3:
            layers.append(nn.AdaptiveAvgPool2d(1))
            self.size = 1
        features = self.channels * self.size**2
        layers.append(nn.Flatten())
        if self.rng.random() < 0.4:
            width = self.rng.choice([1, 5, 16])
            layers += [nn.Linear(features, width, self.rng.random() < 0.7), nn.ReLU()]
            features = width
        layers.append(nn.Dropout(0.2))
        return [*layers, nn.Linear(features, 3, self.rng.random() < 0.7)]


def random_options(rng):
    """`per_channel, options`: scales per channel, and random options of `trans_ann2snn_weight`."""
    T = rng.choice([1, 2, 4, 7, 16, 33])
    per_channel = rng.random() < 0.5
    return per_channel, {
        "timesteps": T,
        "weight_bitwidth": rng.choice([1, 2, 3, 4, 6, 8, 8, 32]),
        "reset_mode": rng.choice(["subtraction", "subtraction", "zero"]),
        "initial_potential": rng.choice([None, None, 0.0, 0.3, 1.0]),
        "listen": rng.choice([0, 0, T, T // 2]),
        "threshold": rng.choice(["quantile", "max", "mse"]),
        "granularity": rng.choice(["layer", "channel"]),
        "correction": rng.choice(["potential", "bias", "none"]),
        "hold_back": rng.choice([0.25, 0.0, 1.0, "auto"]),
        "per_channel": per_channel,
        "maxpool": rng.choice(["gate", "or"]),
        "signed": "pair",
        "avgpool": rng.choice(["spike", "fold"]),
    }


def network_case(seed):
    """One random network with random options."""
    from ann_parser import parse_ann_model
    from dag_rewrites import prepare_conversion
    from quantization import quantize_finetune
    from snn_weight_setter import trans_ann2snn_weight

    rng = random.Random(seed)
    torch.manual_seed(seed)
    net, shape = RandomNet(rng).build()
    images = torch.rand(9, *shape)
    dag = parse_ann_model(net, (images[:1],))
    with torch.no_grad():
        expected = net(images)
        graph, wanted = copy.deepcopy(dag).double()(images.double()), copy.deepcopy(net).double()(images.double())
        # if float32 and float64 differ, large sums nearly cancel, and any other order of adding differs as much
        is_sound = is_near(expected, wanted, 1e-5)
        promise(not is_sound or is_near(graph, wanted, 1e-4), "the graph computes something else than the network")
    per_channel, options = random_options(rng)
    loader = [(images, torch.arange(9) % 3)]
    args = argparse.Namespace(finetune_lr=0.01, finetune_epochs=rng.choice([0, 0, 1]), finetune_wd=0.0)
    args.finetune_momentum, args.weight_bitwidth = 0.9, options["weight_bitwidth"]
    args.weight_granularity = "channel" if per_channel else "layer"
    dag = prepare_conversion(dag, options["maxpool"], options["signed"], options["avgpool"])
    qnet = quantize_finetune(dag, loader, nn.CrossEntropyLoss(), "cpu", args)
    snn = trans_ann2snn_weight(qnet, loader, "cpu", **options)
    check_simulation(snn, images)
    if args.weight_bitwidth == 32 and not args.finetune_epochs:
        check_float_network(dag, loader, expected, options)


def is_near(actual, expected, share):
    """Whether values differ by at most a share of the largest."""
    return (actual - expected).abs().max() <= share * expected.abs().max().clamp_min(1e-12)


@torch.no_grad()
def check_simulation(snn, images):
    """Both simulators, a saved file, another batch size and another memory budget give the same spikes."""
    from finetuning.on_spikes import decoded_rates

    spikes = snn(images)
    promise(spikes.isfinite().all(), "an output is not finite")
    for neuron in snn.neurons().values():
        promise((neuron.Vthr > 0).all() and neuron.scale_factor.isfinite().all(), "a threshold or lambda out of range")
    is_float = max(layer.weight_bits for layer in snn.weighted_layers().values()) == 32
    if not is_float:  # with float weights sums depend on their order, and so may spikes
        rates, reference = decoded_rates(snn, (images,)), copy.deepcopy(snn)
        reference.set_engine("reference")
        promise(equal(decoded_rates(reference, (images,)), rates), "the simulators differ")
        alone = [decoded_rates(snn, (x[None],)) for x in images]
        alone = {name: torch.cat([each[name] for each in alone]) for name in rates}
        promise(equal(alone, rates) or is_tie(snn, alone, rates), "the batch size changes a spike")
        snn.set_engine("auto", memory_budget=2**14)  # 16 KiB: so small that timesteps and images run in parts
        cut = decoded_rates(snn, (images,))
        promise(equal(cut, rates) or is_tie(snn, cut, rates), "the memory budget changes a spike")
        promise(not equal(cut, rates) or is_near(snn(images), spikes, 1e-5), "the memory budget changes the outputs")
        snn.set_engine("auto")
    loaded = through_a_file(snn)
    promise(torch.equal(loaded(images), spikes), "the saved network sends other spikes")


def equal(rates, others):
    """Whether decoded rates, op name -> [B, ...], are the same to the last bit."""
    return all(torch.equal(others[name], rate) for name, rate in rates.items())


def is_tie(snn, rates, others):
    """Whether the first difference is a single neuron that reads the image.

    Its current is a sum of floats, and the last bit may depend on the batch size. In about 1 of 5,000 networks such a
    neuron reaches its threshold by exactly this bit.
    """
    name = next(name for name, rate in rates.items() if not torch.equal(others[name], rate))
    neuron = snn.ops[name]["op"].neuron
    reads_image = neuron is not None and neuron.largest_current is None
    return reads_image and (rates[name] != others[name]).sum() == 1


def through_a_file(snn):
    """The network, saved and loaded."""
    from spike_dag import load_dag

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "snn.pth")
        torch.save(snn, path)
        return load_dag(path)


@torch.no_grad()
def check_float_network(dag, loader, expected, options):
    """With float weights and 512 or 8192 steps, outputs are within 1 % of the ANN's."""
    from snn_weight_setter import trans_ann2snn_weight

    if options["maxpool"] == "or":
        return  # "or" lets every spike of a window pass, which is not the maximum
    choices = {name: options[name] for name in ("maxpool", "signed", "avgpool")}
    for T in (512, 8192):  # the long run is for networks in which large sums nearly cancel
        snn = trans_ann2snn_weight(dag, loader, "cpu", T, 32, threshold="max", listen=T, **choices)
        if is_near(snn(loader[0][0]), expected, 0.01):
            return
    raise Broken("with float weights and 8192 timesteps the outputs are more than 1 % off")


# ---------------------------------------------------------------------------------------------------------------------
# Files


def file_case(seed):
    """A damaged file of a network is refused, or gives the same spikes."""
    from spike_dag import load_dag

    rng = random.Random(seed)
    snn, images = saved_network(seed % 8)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "snn.pth")
        damage = rng.choice([flip_bits, cut_off, edit_field, edit_field])
        damage(rng, snn, path)
        loaded = load_dag(path)
        if damage is edit_field:
            loaded.set_engine("auto")
            loaded(images)  # runs, or is refused
        else:
            promise(torch.equal(loaded(images), snn(images)), "a damaged file sends other spikes")


def saved_network(seed):
    """`snn, images`: a small converted network of random layers; the same seed gives the same network."""
    from ann_parser import parse_ann_model
    from snn_weight_setter import trans_ann2snn_weight

    while True:
        torch.manual_seed(seed)
        net, shape = RandomNet(random.Random(seed)).build()
        images = torch.rand(3, *shape)
        loader = [(images, torch.zeros(3))]
        try:
            dag = parse_ann_model(net, (images[:1],))
            return trans_ann2snn_weight(dag, loader, "cpu", 4, 4, maxpool="gate", signed="pair"), images
        except REFUSALS:
            seed += 1000  # beyond the 8 seeds of `file_case`, so that no two become the same network


def flip_bits(rng, snn, path):
    """Flip some bits of the file."""
    torch.save(snn, path)
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.seek(0)
        file.write(data)


def cut_off(rng, snn, path):
    """Write only the beginning of the file."""
    torch.save(snn, path)
    os.truncate(path, rng.randrange(os.path.getsize(path)))


EDITS = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    10**9,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "conv1",
    (),
    (0, 0),
    [1],
    {},
    b"x",
)


class Edited:
    """Pickles as a network with edited data."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        from spike_dag import from_dict

        return from_dict, (self.data,)


def edit_field(rng, snn, path):
    """Replace one entry of the saved data by another value."""
    data = copy.deepcopy(snn.to_dict())
    places = list(leaves(data))
    holder, key = rng.choice(places)
    value = holder[key]
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        holder[key] = rng.choice([torch.zeros_like(value), value.flatten()[:0], value.double(), value[None], -value])
    else:
        holder[key] = rng.choice(EDITS)
    torch.save(Edited(data), path)


def leaves(data):
    """`holder, key` of every entry of nested dicts and lists; tuples of these become lists."""
    for key, value in list(data.items()) if isinstance(data, dict) else list(enumerate(data)):
        if isinstance(value, tuple) and value and isinstance(value[0], (dict, list, tuple)):
            value = data[key] = list(value)
        yield data, key
        if isinstance(value, (dict, list)):
            yield from leaves(value)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

VALUES = (
    "0",
    "1",
    "2",
    "4",
    "-1",
    "0.5",
    "1e400",
    "nan",
    "",
    " ",
    "--",
    "x" * 300,
    "8,4",
    "auto",
    "2147483648",
    "cpu",
    "[]",
)


def line_case(seed):
    """A command line of ann2snn.py with random flags ends with status 0, or with status 2 and one line."""
    import ann2snn
    from runtime.cli import run_script

    rng = random.Random(seed)
    flags = [action for action in flags_of(ann2snn) if action.option_strings and action.dest not in ("help", "debug")]
    with tempfile.TemporaryDirectory() as folder:
        line = [rng.choice(["debug_net0", "debug_net0", "debug_net9", ""]), "--dataset", "debug0"]
        line += ["-e", "0", "--timesteps", "4", "--save_file", os.path.join(folder, "out.pth")]
        for action in rng.sample(flags, rng.randint(1, 3)):
            line.append(action.option_strings[-1])
            if action.nargs != 0:
                line.append(str(rng.choice([*VALUES, *(action.choices or ())])))
        status, _, err = run_in(folder, lambda: run_script(ann2snn.main, ann2snn.parse_args(line)))
    rest = [x for x in err.splitlines() if x.strip() and not x.startswith("warning:") and "it/s" not in x]
    promise(status in (0, 2), f"status {status} of {line}: {err[-300:]}")
    if status == 2:
        one_line = len(rest) == 1 and rest[0].startswith("error: ") and len(rest[0]) < 1000
        promise(one_line, f"{line} is refused with {err[-500:]!r}")
    promise("Traceback" not in err, f"{line} ends in a traceback")


def flags_of(script):
    """The arguments of a script's parser."""
    from runtime.cli import OneLineParser

    found = []
    parse = OneLineParser.parse_args

    def collect(parser, argv=None):
        found.extend(parser._actions)
        raise StopIteration  # what a script does with its arguments is not wanted

    OneLineParser.parse_args = collect
    try:
        with contextlib.suppress(StopIteration):
            script.parse_args([])
    finally:
        OneLineParser.parse_args = parse
    return found


def run_in(folder, work):
    """`status, stdout, stderr` of a script's work, run in `folder`."""
    out, err, home = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the number of workers
            work()
        status = 0
    except SystemExit as stopped:
        status = stopped.code or 0
    finally:
        os.chdir(home)
    return status, out.getvalue(), err.getvalue()


# ---------------------------------------------------------------------------------------------------------------------

KINDS = {"networks": network_case, "files": file_case, "lines": line_case}
SHARES = {"networks": 0.5, "files": 0.4, "lines": 0.1}  # of all cases


def run_case(kind, seed):
    """The verdict on one case: "kept", "refused: ..." or "BROKEN: ..."."""
    try:
        KINDS[kind](seed)
    except REFUSALS as refusal:
        return f"refused: {refusal}"
    except Exception as error:  # an unexpected kind of error is a broken promise too
        return f"BROKEN: {type(error).__name__}: {str(error)[:300]}"
    return "kept"


def run_cases(seed, count):
    """Kind -> seed -> verdict; `count` cases are divided by `SHARES`, and seeds start at `seed`."""
    verdicts = {}
    for kind, share in SHARES.items():
        seeds = range(seed, seed + round(share * count))
        verdicts[kind] = {s: run_case(kind, s) for s in tqdm(seeds, kind, leave=False, delay=1)}
    return verdicts


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case of each kind (%(default)s)")
    parser.add_argument("--cases", type=int, default=300, help="cases of all kinds (%(default)s)")
    parser.add_argument("--only", metavar="KIND:SEED", help="one case, with its traceback")
    return parser.parse_args(argv)


def main(args):
    if args.only:
        kind, seed = args.only.split(":")
        KINDS[kind](int(seed))
        return
    broken = 0
    for kind, cases in run_cases(args.seed, args.cases).items():
        for seed, verdict in cases.items():
            if verdict.startswith("BROKEN"):
                broken += 1
                print(f"{kind}:{seed}  {verdict}")
        refused = sum(verdict.startswith("refused") for verdict in cases.values())
        print(f"{kind}: {len(cases)} cases, {refused} refused")
    print(f"{broken} broken")
    sys.exit(min(broken, 1))


if __name__ == "__main__":
    try:
        main(parse_args())
    except REFUSALS:
        traceback.print_exc()
        sys.exit(2)
