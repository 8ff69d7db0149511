"""Every option is one field here: its default, range, help text and help group.

The flags, their help, docs/flags.md, the checks of the Python calls and the report all come from these fields. Making a
dataclass checks its values, so the code below the calls can trust them. This module imports nothing slow.

    options = ConversionOptions(timesteps=8, threshold="mse")
    options = QuantizeOptions.of(args)              # from any namespace; missing attributes get the defaults
"""

from dataclasses import MISSING, dataclass, field, fields

from runtime.ranges import THRESHOLDS, Real, Whole, check_number

FLOAT_BITS = 32
TIMESTEPS = Whole(1, 65536)
SHARE = Real(0, 1)
SHARE_OR_AUTO = Real(0, 1, word="auto")
EPOCHS = Whole(0)
SIDE = Whole(1, 65536)  # pixels
CHIPS = ("v1.0",)  # names of `hw_constraints.HARDWARE`
DEFAULT_CHIP = "v1.0"  # whose limits warn where no chip is named
# Levels of activations from which their maximum is the best lambda: what clipping takes away is missing in the sum of
# many inputs, while the errors of rounding are of both signs and average out.
MANY_LEVELS = 16
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
    """A dataclass field for one option. Most options need only a few of these details:

    span: the allowed range of a number. choices: the allowed strings. separator: joins the choices in messages.
    word: the name of the choice in messages. hint: text that messages add to the range. parse: the function of
    `runtime.flags` that reads the flag. short: a one-letter flag. old: former flags. old_names: former attributes.
    metavar: the placeholder of the value in the help. main: whether the short --help shows the option.
    default_help: the default in words. check: a function that returns the value's plain form or raises ValueError.
    """
    return field(default=default, metadata={"help": help, "group": group, **details})


@dataclass(frozen=True)
class Options:
    """Base class that checks every field; a value out of range raises ValueError."""

    def __post_init__(self):
        for each in fields(self):
            object.__setattr__(self, each.name, checked(each, getattr(self, each.name)))

    @classmethod
    def of(cls, namespace, **changes):
        """The options from a namespace's attributes, former names included; missing attributes get the defaults.

        changes: values that override the namespace's. Raises ValueError for a value out of range.
        """
        known = {}
        for each in fields(cls):
            for name in (each.name, *each.metadata.get("old_names", ())):
                if hasattr(namespace, name):
                    known[each.name] = getattr(namespace, name)
                    break
        return cls(**{**with_former_names(cls, vars(namespace), known), **changes})


def with_former_names(cls, given, known):
    """`known`, with `per_channel` filled in from the two granularities that namespaces of earlier versions have."""
    names = {each.name for each in fields(cls)}
    if "per_channel" in names and "per_channel" not in known:
        known["per_channel"] = joined_per_channel(
            given.get("weight_granularity", "layer"), given.get("granularity", "layer")
        )
    return known


def joined_per_channel(of_weights, of_spikes):
    """The `per_channel` value for two granularities, each "layer" or "channel". Raises ValueError for other values."""
    for name, value in (("weight_granularity", of_weights), ("granularity", of_spikes)):
        if value not in ("layer", "channel"):
            raise ValueError(f"unknown {name} '{value}', use layer or channel")
    return PER_CHANNEL[(of_weights == "channel") + 2 * (of_spikes == "channel")]


def checked(each, value):
    """The value of a field in its plain form. Raises ValueError, with the field's name, if it is not allowed."""
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
    """The value of option `name` in its plain form. Raises ValueError if it is not allowed."""
    return checked(FIELDS[name], value)


def check_threshold(value):
    """One of `THRESHOLDS` or a quantile of the activations, above 0 and up to 1. Raises ValueError for other values."""
    if value in THRESHOLDS:
        return value
    if value == "quantile":
        return QUANTILE
    if isinstance(value, str):
        raise ValueError(f"unknown threshold '{value}', use one of {', '.join(('quantile', *THRESHOLDS))}")
    return check_number("quantile", value, Real(0, 1, open=True))


def check_listen(value):
    """A number of steps, or "auto". Raises ValueError for other values."""
    if value == "auto":
        return value
    if isinstance(value, str):
        raise ValueError(f"unknown listen '{value}', use a number of steps or auto")
    return check_number("listen", value, Whole(0, TIMESTEPS.most))


def check_per_channel(value):
    """One of PER_CHANNEL; True means "weights", False "none". Raises ValueError for other values."""
    value = PER_CHANNEL[value] if isinstance(value, bool) else value
    if value not in PER_CHANNEL:
        raise ValueError(f"unknown per_channel '{value}', use one of {', '.join(PER_CHANNEL)}")
    return value


QUANTILE = 0.999
PER_CHANNEL = ("none", "weights", "spikes", "both")


# ---------------------------------------------------------------------------------------------------------------------
# Options of the Python calls


@dataclass(frozen=True)
class WeightOptions(Options):
    """Options on which quantization and conversion must agree."""

    weight_bitwidth: object = option(
        4,
        "weight bits, 1 to 8, or 32 for float weights; 8,4,4,4 sets them layer by layer, auto uses the most that the "
        "hardware allows in each layer",
        "weights",
        parse="bitwidths",
        main=True,
    )
    per_channel: str = option(
        "none",
        "scales, and so Vthr, per channel instead of per layer: for the weights (quantization), the spikes (lambda) or "
        "both. Use both for few timesteps, with 8-bit weights or --activation_levels. Otherwise low-bit weights are "
        "rounded a second time",
        "weights",
        choices=PER_CHANNEL,
        check=check_per_channel,
        main=True,
    )

    @property
    def weights_per_channel(self):
        """Whether each output channel has its own weight scale."""
        return self.per_channel in ("weights", "both")

    @property
    def spikes_per_channel(self):
        """Whether each channel has its own lambda."""
        return self.per_channel in ("spikes", "both")


@dataclass(frozen=True)
class QuantizeOptions(WeightOptions):
    """Options of `quantization.quantize_finetune` and of the steps before it."""

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
        "sgd (its learning rate falls in two steps) or adam (its learning rate follows a cosine); at few bits, deep "
        "networks learn several times faster with adam, small networks learn better with sgd",
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
        "strength that pulls weights towards integers; it grows over the finetune epochs to this value (sgd; Nagel et "
        "al., ICML 2022)",
        "finetuning",
        span=Real(0),
    )
    finetune_distill: float = option(
        0.0,
        "share of the loss that compares outputs with the float network's, not with labels (Hinton et al., 2014)",
        "finetuning",
        span=SHARE,
        metavar="SHARE",
    )
    activation_levels: int = option(
        None,
        "finetune with activations of L levels, the resolution of L timesteps of evenly spaced spikes, and learn every "
        "lambda (Bu et al., ICLR 2022); --threshold then has no effect",
        "finetuning",
        span=TIMESTEPS,
        metavar="L",
        default_help="float activations",
    )
    replace_activations: str = option(
        None,
        "put ReLUs in the place of activation functions inside the network that spikes cannot compute: SiLU, GELU, "
        "tanh and others. The network is then another one and has to be finetuned",
        "what a layer leaves open",
        choices=("relu",),
        word="activation function",
        default_help="such a network is refused",
    )
    replace_gates: str = option(
        None,
        "put constants in the place of gates, as of squeeze-and-excitation: the mean of each channel's factors over "
        "--calibration_samples images. The network is then another one and has to be finetuned",
        "what a layer leaves open",
        choices=("mean",),
        word="replacement of gates",
        default_help="such a network is refused",
    )
    rounding: str = option(
        "nearest",
        "how weights become integers without finetuning: each to the nearest one (nearest), or layer by layer so that "
        "the layer's output on calibration images stays that of the float network, with biases and the lambdas of "
        "--activation_levels (learnt; no labels, minutes). Needs --finetune_epochs 0",
        "weights",
        choices=("nearest", "learnt"),
    )
    equalize: bool = option(
        False,
        "rescale the channels, without changing the output, so that one weight scale suits the whole layer; helps "
        "without finetuning",
        "weights",
    )


@dataclass(frozen=True)
class ConversionOptions(WeightOptions):
    """Options of `snn_weight_setter.trans_ann2snn_weight`."""

    timesteps: int = option(16, "timesteps per image, T", "conversion", span=TIMESTEPS, main=True)
    reset_mode: str = option(
        "subtraction",
        "how a spike resets the membrane potential: subtract Vthr, or set it to 0",
        "conversion",
        choices=("zero", "subtraction"),
        word="reset mode",
        main=True,
    )
    threshold: object = option(
        QUANTILE,
        "how Vthr is chosen: by a quantile of the activations (a number up to 1), by their maximum (max), by the "
        "least squared error after T timesteps (mse), or by the same with room for spikes that come unevenly (spikes)",
        "conversion",
        parse="threshold",
        check=check_threshold,
        metavar="{QUANTILE,max,mse,spikes}",
        main=True,
    )
    listen: object = option(
        0,
        "steps for which every layer integrates its input before it fires for T steps. With D = T no spike is early or "
        "late: the SNN equals, exactly, the ANN with the same integers and T activation levels. The price: one image "
        "takes T + D steps, and each layer delays the answer by D more. auto chooses windows of at most T steps in "
        "which each layer fires, and lets the layers behind it listen for as long: as exact, with less delay",
        "conversion",
        parse="listening",
        check=check_listen,
        metavar="{D,auto}",
        main=True,
    )
    correction: str = option(
        "potential",
        "correction that matches each channel's mean firing rate to the ANN on calibration images: shift the initial "
        "potentials (potential), or the biases and, for the rest, the potentials (bias), or nothing (none); weights "
        "first fits the weights of each layer to the spikes that arrive, by least squares, and then shifts potentials",
        "conversion",
        choices=("potential", "bias", "weights", "none"),
    )
    hold_back: object = option(
        0.25,
        "start each neuron this share of Vthr lower and return it through the bias over T steps, which prevents "
        "premature spikes; auto chooses the share of least squared error for each channel, on the spikes that arrive. "
        "Needs --correction and reset by subtraction. Use 0 if the network will run with another T",
        "conversion",
        span=SHARE_OR_AUTO,
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
        1000, "training images used for calibration, without labels", "conversion", span=Whole(1), metavar="N"
    )
    maxpool: str = option(
        None,
        "max pooling of spikes: the largest spike count of a window passes (gate), or any spike, for chips without "
        "counters (or)",
        "what a layer leaves open",
        choices=("gate", "or"),
        word="max pooling",
        default_help="gate",
        main=True,
    )
    avgpool: str = option(
        "spike",
        "average pooling of spikes: a layer with its own neurons and Vthr (spike), or part of the next layer (fold)",
        "what a layer leaves open",
        choices=("spike", "fold"),
        word="average pooling",
        main=True,
    )
    signed: str = option(
        None,
        "feed a layer that reads values without a ReLU with relu(x) and relu(-x) instead; MobileNetV2 needs it",
        "what a layer leaves open",
        choices=("pair",),
        word="choice",
        hint=" for signed values",
        default_help="an error where a network needs it",
        main=True,
    )
    ann_layers: tuple = option(
        (),
        "layers that stay ANN, by module path (layer1 means all layers in it) or op name, separated by commas; their "
        "weights are quantized like all others",
        "what a layer leaves open",
        parse="names",
        metavar="NAMES",
        default_help="none",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.listens_to_windows:
            self.check_windows()
        elif self.listen > self.timesteps:
            raise ValueError(f"listen {self.listen}: use 0 to {self.timesteps}, the timesteps")

    @property
    def listens_to_windows(self):
        """Whether every layer listens until the windows of the layers before it are over (`conversion.windows`)."""
        return self.listen == "auto"

    @property
    def hears_all(self):
        """Whether every layer receives all of its spikes before it fires, so that none is early or late."""
        return self.listens_to_windows or self.listen == self.timesteps

    def check_windows(self):
        """Raise ValueError for options under which a window does not hold all of a layer's spikes."""
        if self.reset_mode != "subtraction":
            raise ValueError("listen auto needs reset_mode subtraction, reset to zero loses what was heard")
        if self.weight_bitwidth == FLOAT_BITS:
            raise ValueError(f"listen auto needs integer weights of 1 to 8 bits, not {FLOAT_BITS}")

    @property
    def start(self):
        """The membrane potential before the first step, as a share of Vthr.

        A start of 0.5 halves the expected error (Bu et al., Optimized Potential Initialization, AAAI 2022). Reset to
        zero discards the potential above Vthr, so it does better with a lower start, 0.
        """
        if self.initial_potential is not None:
            return self.initial_potential
        return 0.5 if self.reset_mode == "subtraction" else 0.0

    @classmethod
    def from_keywords(cls, timesteps, weight_bitwidth, keywords, caller="trans_ann2snn_weight"):
        """The options from the keywords of `trans_ann2snn_weight`, former keywords included.

        Raises TypeError, with the name of `caller`, for an unknown keyword, and ValueError for a value out of range.
        """
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
    """Options of `finetuning.on_spikes.finetune_on_spikes`, which trains the converted network on its own spikes."""

    spike_epochs: int = option(
        0,
        "epochs of finetuning the converted network on its own spikes, with labels and the ANN's outputs",
        "finetuning",
        span=EPOCHS,
        old=("--finetune_snn",),
        old_names=("finetune_snn",),
        metavar="EPOCHS",
    )
    spike_epochs_unlabelled: int = option(
        0,
        "epochs of finetuning the converted network on the calibration images, with the ANN's outputs and activations "
        "but without labels; 10 suit few timesteps",
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
        default_help="0.02 / sqrt(T) with labels, 0.03 / T without",
    )
    spike_gradient: str = option(
        None,
        "gradient of --spike_epochs and --spike_epochs_unlabelled: through every timestep with a surrogate (time), or "
        "back through the ANN evaluated on spike rates (tandem); the cost of tandem does not grow with T",
        "finetuning",
        choices=("time", "tandem"),
        word="gradient",
        old=("--finetune_snn_gradient",),
        old_names=("finetune_snn_gradient",),
        default_help="time up to T = 4, else tandem",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Options of the scripts and of `pipeline.convert_network`; those of the scripts alone stand in script_options.py


@dataclass(frozen=True)
class RunOptions(Options):
    """Seed, device and tracebacks."""

    seed: int = option(
        0, "random seed: the same seed, machine and thread count give the same bits", "run", span=Whole(0), main=True
    )
    device: str = option("auto", "auto (the least loaded GPU, else the CPU), cpu, cuda, cuda:N", "run", main=True)
    debug: bool = option(False, "show the traceback of an error", "run")


@dataclass(frozen=True)
class SimulatorOptions(Options):
    """Engine and memory of the simulation."""

    engine: str = option(
        "auto",
        "simulate in the fastest exact way on this machine (auto), or entirely in float64 with plain PyTorch "
        "(reference)",
        "run",
        choices=("auto", "reference"),
    )
    memory_budget: int = option(
        None,
        "memory that a simulation uses at a time, such as 512M or 2G",
        "run",
        parse="memory_size",
        metavar="SIZE",
        default_help="the size of the cache, or a quarter of a GPU's free memory",
    )


FIELDS = {
    each.name: each
    for cls in (QuantizeOptions, ConversionOptions, SpikeFinetuneOptions, SimulatorOptions, RunOptions)
    for each in fields(cls)
}


def defaults(*classes):
    """Option -> default for all fields of the given dataclasses."""
    return {each.name: each.default for cls in classes for each in fields(cls) if each.default is not MISSING}
