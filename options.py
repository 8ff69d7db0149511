"""Every option, once: default, range, help, and the group that it stands in.

Flags, their help, docs/flags.md, the checks of the calls in Python and the report all come from these fields. A value
is checked when its dataclass is made, so what travels below the calls is always sound. Imports nothing slow.

    options = ConversionOptions(timesteps=8, threshold="mse")
    options = QuantizeOptions.of(args)              # of any namespace, with defaults for what it lacks
"""

from dataclasses import MISSING, dataclass, field, fields

from runtime.ranges import Real, Whole, check_number

FLOAT_BITS = 32
TIMESTEPS = Whole(1, 65536)
SHARE = Real(0, 1)
EPOCHS = Whole(0)
GROUPS = (
    "network and data",
    "preset",
    "weights",
    "finetuning",
    "conversion",
    "what a layer leaves open",
    "run",
    "output",
)


def option(default, help, group, **details):
    """A field. Most options need few of the details:

    span: range of its number. choices: its strings. word: what messages call the choice. hint: what they add to the
    range. parse: name of a function of `runtime.flags` that reads the flag. short: a flag of one letter. old: former
    flags, old_names: former attributes. metavar: of its value. main: whether the short --help shows it.
    default_help: its default in words. check: a function that returns its plain form, or raises ValueError.
    """
    return field(default=default, metadata={"help": help, "group": group, **details})


@dataclass(frozen=True)
class Options:
    """The base: checks every field."""

    def __post_init__(self):
        for each in fields(self):
            object.__setattr__(self, each.name, checked(each, getattr(self, each.name)))

    @classmethod
    def of(cls, namespace, **changes):
        """From the attributes of a namespace, also under former names; what it lacks has its default."""
        known = {}
        for each in fields(cls):
            for name in (each.name, *each.metadata.get("old_names", ())):
                if hasattr(namespace, name):
                    known[each.name] = getattr(namespace, name)
                    break
        return cls(**{**with_former_names(cls, vars(namespace), known), **changes})


def with_former_names(cls, given, known):
    """`known` with what namespaces of earlier versions say of scales per channel."""
    names = {each.name for each in fields(cls)}
    if "per_channel" in names and "per_channel" not in known:
        known["per_channel"] = joined_per_channel(
            given.get("weight_granularity", "layer"), given.get("granularity", "layer")
        )
    return known


def joined_per_channel(of_weights, of_spikes):
    """`per_channel` of two granularities, "layer" or "channel" each."""
    for name, value in (("weight_granularity", of_weights), ("granularity", of_spikes)):
        if value not in ("layer", "channel"):
            raise ValueError(f"unknown {name} '{value}', use layer or channel")
    return PER_CHANNEL[(of_weights == "channel") + 2 * (of_spikes == "channel")]


def checked(each, value):
    """The value of a field in its plain form. Raises ValueError, with its name, where it cannot be one."""
    facts = each.metadata
    if value is None and each.default is None:
        return None
    if "check" in facts:
        return facts["check"](value)
    if "span" in facts:
        return check_number(each.name, value, facts["span"], facts.get("hint", ""))
    choices = facts.get("choices")
    if choices is not None and value not in choices:
        known = f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
        known = facts["separator"].join(choices) if "separator" in facts else known
        raise ValueError(f"unknown {facts.get('word', each.name)} '{value}'{facts.get('hint', '')}, use {known}")
    return value


def check_option(name, value):
    """The value of option `name` in its plain form. Raises ValueError where it cannot be one."""
    return checked(FIELDS[name], value)


def check_threshold(value):
    """ "max", "mse", or the quantile, of the activations that no neuron's lambda exceeds."""
    if value in ("max", "mse"):
        return value
    if value == "quantile":
        return QUANTILE
    if isinstance(value, str):
        raise ValueError(f"unknown threshold '{value}', use one of quantile, max, mse")
    return check_number("quantile", value, Real(0, 1, open=True))


def check_per_channel(value):
    """What has a scale per channel; True stands for the weights."""
    value = PER_CHANNEL[value] if isinstance(value, bool) else value
    if value not in PER_CHANNEL:
        raise ValueError(f"unknown per_channel '{value}', use one of {', '.join(PER_CHANNEL)}")
    return value


QUANTILE = 0.999
PER_CHANNEL = ("none", "weights", "spikes", "both")


# ---------------------------------------------------------------------------------------------------------------------
# What the calls in Python take


@dataclass(frozen=True)
class WeightOptions(Options):
    """What quantization and conversion have to agree on."""

    weight_bitwidth: object = option(
        4,
        "weight bits, 1 to 8, or 32 for float weights; 8,4,4,4 gives one for each layer with weights, auto the most "
        "that the hardware allows in each",
        "weights",
        parse="bitwidths",
        main=True,
    )
    per_channel: str = option(
        "none",
        "what has a scale, and so a Vthr, per channel instead of per layer: weights (their quantization), spikes "
        "(lambda), both. Use both for few timesteps, with 8-bit weights or --activation_levels; otherwise weights of "
        "few bits are rounded a second time",
        "weights",
        choices=PER_CHANNEL,
        check=check_per_channel,
        main=True,
    )

    @property
    def weights_per_channel(self):
        """Whether every output channel has a weight scale of its own."""
        return self.per_channel in ("weights", "both")

    @property
    def spikes_per_channel(self):
        """Whether every channel has a lambda of its own."""
        return self.per_channel in ("spikes", "both")


@dataclass(frozen=True)
class QuantizeOptions(WeightOptions):
    """Of `quantization.quantize_finetune`, and of what is done before it."""

    finetune_epochs: int = option(
        10, "finetune epochs, 0 only quantizes", "finetuning", span=EPOCHS, short="-e", main=True
    )
    finetune_lr: float = option(
        0.01,
        "finetune learning rate; with --finetune_optimizer adam relative to the RMS of a layer's weights",
        "finetuning",
        span=Real(0),
    )
    finetune_optimizer: str = option(
        "sgd",
        "sgd, whose learning rate falls in two steps, or adam, whose rate falls along a cosine; deep networks learn "
        "few bits several times faster with adam, small ones better with sgd",
        "finetuning",
        choices=("sgd", "adam"),
        word="finetune optimizer",
        separator=" or ",
    )
    finetune_wd: float = option(1e-4, "finetune weight decay (sgd)", "finetuning", span=Real(0))
    finetune_momentum: float = option(0.9, "finetune momentum (sgd)", "finetuning", span=SHARE)
    finetune_nesterov: bool = option(False, "Nesterov's momentum (sgd)", "finetuning")
    finetune_damping: float = option(
        0.1,
        "strength of the pull of weights towards integers, reached in the last finetune epoch (sgd; Nagel et al., ICML "
        "2022)",
        "finetuning",
        span=Real(0),
    )
    finetune_distill: float = option(
        0.0,
        "share of the loss that asks for the float network's outputs instead of the labels (Hinton et al., 2014)",
        "finetuning",
        span=SHARE,
        metavar="SHARE",
    )
    activation_levels: int = option(
        None,
        "finetune with activations of L levels, as L timesteps of evenly arriving spikes have them, and learn every "
        "lambda (Bu et al., ICLR 2022); --threshold then chooses nothing",
        "finetuning",
        span=TIMESTEPS,
        metavar="L",
        default_help="float activations",
    )
    equalize: bool = option(
        False,
        "scale the channels, with the same output, so that one weight scale serves a layer; helps where nothing is "
        "finetuned",
        "weights",
    )


@dataclass(frozen=True)
class ConversionOptions(WeightOptions):
    """Of `snn_weight_setter.trans_ann2snn_weight`."""

    timesteps: int = option(16, "timesteps per image, T", "conversion", span=TIMESTEPS, main=True)
    reset_mode: str = option(
        "subtraction",
        "what a spike does to the membrane potential: subtract Vthr, or set it to 0",
        "conversion",
        choices=("zero", "subtraction"),
        word="reset mode",
        main=True,
    )
    threshold: object = option(
        QUANTILE,
        "what sets Vthr: a quantile of the activations (a number up to 1), their maximum (max), or the least squared "
        "error after T spikes (mse)",
        "conversion",
        parse="threshold",
        check=check_threshold,
        metavar="{QUANTILE,max,mse}",
        main=True,
    )
    listen: int = option(
        0,
        "steps of input that every layer integrates before it fires for T steps. At D = T no spike is early or late: "
        "the SNN is exactly the ANN of its integers with T activation levels. The price: T + D steps from image to "
        "image, D more per layer until the answer",
        "conversion",
        span=Whole(0, TIMESTEPS.most),
        metavar="D",
        main=True,
    )
    correction: str = option(
        "potential",
        "what is shifted on calibration images until every channel's mean rate is the ANN's: initial potentials, or "
        "biases and the rest in the potentials, or nothing",
        "conversion",
        choices=("potential", "bias", "none"),
    )
    hold_back: float = option(
        0.25,
        "start each neuron this share of Vthr lower and return it through the bias over T steps, which prevents "
        "premature spikes. Needs --correction and reset by subtraction. Use 0 if the network will run with another T",
        "conversion",
        span=SHARE,
        hint=", a share of Vthr",
        metavar="SHARE",
    )
    initial_potential: float = option(
        None,
        "membrane potential before the first step, in Vthr",
        "conversion",
        span=SHARE,
        hint=", a share of Vthr",
        metavar="SHARE",
        default_help="0.5 for subtraction, 0 for zero",
    )
    calibration_samples: int = option(
        1000, "training images that calibration sees, without labels", "conversion", span=Whole(1), metavar="N"
    )
    maxpool: str = option(
        None,
        "max pooling of spikes: the largest spike count of a window passes (gate), or any spike (or)",
        "what a layer leaves open",
        choices=("gate", "or"),
        word="max pooling",
        default_help="no default: a network with max pooling needs a choice",
        main=True,
    )
    avgpool: str = option(
        "spike",
        "average pooling of spikes: a layer with neurons and a Vthr of its own (spike), or folded into the layer "
        "behind it",
        "what a layer leaves open",
        choices=("spike", "fold"),
        word="average pooling",
        main=True,
    )
    signed: str = option(
        None,
        "a layer that reads values without a ReLU reads relu(x) and relu(-x) instead (MobileNetV2 needs it)",
        "what a layer leaves open",
        choices=("pair",),
        word="choice",
        hint=" for signed values",
        default_help="an error where a network needs it",
        main=True,
    )
    ann_layers: tuple = option(
        (),
        "layers that stay ANN, by module path (layer1 means all in it) or op name, separated by commas; their weights "
        "are quantized as all others",
        "what a layer leaves open",
        parse="names",
        metavar="NAMES",
        default_help="none",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.listen > self.timesteps:
            raise ValueError(f"listen {self.listen}: use 0 to {self.timesteps}, the timesteps")

    @property
    def start(self):
        """The membrane potential before the first step, as a share of Vthr.

        One half halves the expected error (Bu et al., Optimized Potential Initialization, AAAI 2022); reset to zero
        loses what is above Vthr, so that a lower start is better there.
        """
        if self.initial_potential is not None:
            return self.initial_potential
        return 0.5 if self.reset_mode == "subtraction" else 0.0

    @classmethod
    def from_keywords(cls, timesteps, weight_bitwidth, keywords, caller="trans_ann2snn_weight"):
        """From the keywords of `trans_ann2snn_weight`, those of earlier versions too. Raises TypeError for others."""
        keywords = dict(keywords)
        quantile, of_spikes = keywords.pop("quantile", None), keywords.pop("granularity", None)
        if quantile is not None:
            quantile = check_number("quantile", quantile, Real(0, 1, open=True))
            if keywords.get("threshold", "quantile") == "quantile":
                keywords["threshold"] = quantile
        if of_spikes is not None:
            of_weights = check_per_channel(keywords.get("per_channel", "none")) in ("weights", "both")
            keywords["per_channel"] = joined_per_channel("channel" if of_weights else "layer", of_spikes)
        known = [each.name for each in fields(cls)]
        unknown = [name for name in keywords if name not in known]
        if unknown:
            raise TypeError(f"{caller} has no option {unknown[0]}, it has {', '.join(known[2:])}")
        return cls(timesteps=timesteps, weight_bitwidth=weight_bitwidth, **keywords)


@dataclass(frozen=True)
class SpikeFinetuneOptions(Options):
    """Of `finetuning.on_spikes.finetune_on_spikes`: after the conversion, on the spikes that the chip will send."""

    spike_epochs: int = option(
        0,
        "epochs that finetune the converted network on its own spikes, by labels and the ANN's outputs",
        "finetuning",
        span=EPOCHS,
        old=("--finetune_snn",),
        old_names=("finetune_snn",),
        metavar="EPOCHS",
    )
    spike_epochs_unlabelled: int = option(
        0,
        "passes over the calibration images that finetune it on the ANN's outputs and activations, without labels; 10 "
        "suit few timesteps",
        "finetuning",
        span=EPOCHS,
        old=("--calibration_epochs",),
        old_names=("calibration_epochs",),
        metavar="EPOCHS",
    )
    spike_lr: float = option(
        None,
        "learning rate of --spike_epochs and --spike_epochs_unlabelled, relative to the RMS of a layer's weights",
        "finetuning",
        span=SHARE,
        old=("--finetune_snn_lr",),
        old_names=("finetune_snn_lr",),
        metavar="LR",
        default_help="0.02 / root of T with labels, 0.03 / T without",
    )
    spike_gradient: str = option(
        None,
        "gradient of these epochs: through every timestep with a surrogate (time), or back through the ANN evaluated "
        "on spike rates (tandem), whose cost does not grow with T",
        "finetuning",
        choices=("time", "tandem"),
        word="gradient",
        old=("--finetune_snn_gradient",),
        old_names=("finetune_snn_gradient",),
        default_help="time up to T = 4, else tandem",
    )


# ---------------------------------------------------------------------------------------------------------------------
# What only the scripts take


@dataclass(frozen=True)
class NetworkOptions(Options):
    """The trained network."""

    ann_weight: str = option(
        None,
        "file of the trained weights, or pretrained for those that torchvision has for torchvision:NAME",
        "network and data",
        metavar="FILE",
        default_help="random weights",
        main=True,
    )


@dataclass(frozen=True)
class DataOptions(Options):
    """Images, and how to load them."""

    dataset: str = option(
        "digits",
        "digits, MNIST, CIFAR10, CIFAR100, COCO, folder, debug0..2, or the path of an image folder",
        "network and data",
        main=True,
    )
    dataset_root: str = option("./data", "folder the data sets are in", "network and data")
    num_workers: int = option(0, "number of workers for dataset", "network and data", span=Whole(0, 64))
    batch_size: int = option(128, "images a training step", "network and data", span=Whole(1))
    test_batch_size: int = option(100, "images a test step", "network and data", span=Whole(1))
    val_share: float = option(
        0.0, "share of the training images kept for validation", "network and data", span=Real(0, 0.9), metavar="SHARE"
    )


@dataclass(frozen=True)
class RunOptions(Options):
    """How to run."""

    seed: int = option(0, "same seed, same machine, same thread count: same bits", "run", span=Whole(0), main=True)
    device: str = option("auto", "auto (the least loaded GPU, else the CPU), cpu, cuda, cuda:N", "run", main=True)
    debug: bool = option(False, "show the traceback of an error", "run")


@dataclass(frozen=True)
class SimulatorOptions(Options):
    """How to simulate."""

    engine: str = option(
        "auto",
        "simulate in the fastest exact way here, or in float64 and plain PyTorch throughout (reference)",
        "run",
        choices=("auto", "reference"),
    )
    memory_budget: int = option(
        None,
        "memory that a simulation works with at a time, as 512M or 2G",
        "run",
        parse="memory_size",
        metavar="SIZE",
        default_help="what the cache holds, or a quarter of a GPU's free memory",
    )


@dataclass(frozen=True)
class ChipOptions(Options):
    """The chip whose limits must hold."""

    hardware: str = option(
        None,
        "chip whose limits must hold; a table per layer shows them",
        "weights",
        choices=("v1.0",),
        default_help="v1.0's limits only warn",
        main=True,
    )


@dataclass(frozen=True)
class AnalysisOptions(Options):
    """What an error analysis looks at."""

    analysis_images: int = option(
        128,
        "test images that an error analysis looks into, and calibrates its alternatives on",
        "output",
        span=Whole(2),
        metavar="N",
    )
    sweep: bool = option(
        False, "analyze other weight bits and timesteps too, each finetuned and converted anew", "output"
    )


@dataclass(frozen=True)
class OutputOptions(AnalysisOptions):
    """What ann2snn.py writes."""

    save_file: str = option(
        "out_snn.pth", "the output location of the transferred weights", "output", metavar="FILE", main=True
    )
    results: str = option(
        None, "write all results as JSON", "output", metavar="FILE.json", default_help="none", main=True
    )
    report: str = option(
        None,
        "write a report of where accuracy is lost, as analyse_error.py",
        "output",
        metavar="DIR",
        default_help="none",
        main=True,
    )


CONVERSION = (
    NetworkOptions,
    DataOptions,
    ChipOptions,
    QuantizeOptions,
    ConversionOptions,
    SpikeFinetuneOptions,
    SimulatorOptions,
    RunOptions,
)
FIELDS = {each.name: each for cls in (*CONVERSION, OutputOptions) for each in fields(cls)}


# ---------------------------------------------------------------------------------------------------------------------
# Presets

MAX_FEW_STEPS = 32  # timesteps; with more, a scale per channel and epochs on spikes gain next to nothing at 8 bits


def calibrated(timesteps):
    """A few images, no labels, minutes."""
    few_steps = {"per_channel": "both", "spike_epochs_unlabelled": 10}
    return {
        **{"weight_bitwidth": 8, "finetune_epochs": 0, "threshold": "mse"},
        **(few_steps if timesteps <= MAX_FEW_STEPS else {"hold_back": 0.0}),
    }


def finetuned(timesteps):
    """Labels; minutes on a GPU, hours on a core. More than 8 levels cost accuracy at 4 bits, also at T = 16."""
    return {
        **{"finetune_epochs": 20, "finetune_optimizer": "adam", "finetune_lr": 0.01, "finetune_distill": 0.5},
        **{"val_share": 0.0, "per_channel": "both", "activation_levels": min(timesteps, 8), "spike_epochs": 10},
    }


def exact(timesteps):
    """No labels; no spike is early or late, for T more steps an image. T steps still round what qnet says."""
    return {
        **{"weight_bitwidth": 8, "finetune_epochs": 0, "threshold": "mse", "per_channel": "both"},
        **{"listen": timesteps},
    }


PRESETS = {
    "specification": lambda timesteps: {},
    "calibrated": calibrated,
    "finetuned": finetuned,
    "exact": exact,
}


def preset_options(name, timesteps):
    """Option -> value of a preset for T timesteps. Raises ValueError for another name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset '{name}', use one of {', '.join(PRESETS)}")
    return PRESETS[name](check_option("timesteps", timesteps))


def defaults(*classes):
    """Option -> default of all fields of some dataclasses."""
    return {each.name: each.default for cls in classes for each in fields(cls) if each.default is not MISSING}
