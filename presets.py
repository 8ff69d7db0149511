"""What `--preset` contains: one function for each word, and rules that fill in what depends on T and the weight bits.

docs/accuracy.md has the measurements behind them. This module imports nothing slow.

    preset_options("calibrated", timesteps=8)       # option -> value
"""

from options import MANY_LEVELS, check_option

MAX_EPOCH_STEPS = 80  # epochs times timesteps: a pass through time costs T of the ANN, so this bounds the minutes
# A fit of the weights leaves little to learn at many steps. Behind it resnet20 gained nothing at T = 16 by more epochs
# than these; at T = 4 and 8, where a wider network gains, all epochs are trained (docs/accuracy.md).
MAX_FITTED_EPOCH_STEPS = 32
# Learning rate times T^2 behind the fit: at T = 16 an epoch led resnet20 away from the ANN at 0.0019, the default, and
# nearer to it at 0.0006. At T = 8 less than the default gained nothing.
FITTED_LR_TIMES_T2 = 0.15
FEW_STEPS = 8  # timesteps up to which training behind the fit is the same as without it
FEW_BITS = 4  # weights of as many bits or fewer lose much by rounding to the nearest
POOLINGS = {"avgpool": "fold"}  # a pooling with its own neurons is one more layer that rounds and delays spikes
MAX_EPOCHS = 20  # more passes over the same few images teach these images


def calibrated(timesteps, bits):
    """Options that need a few images, no labels and minutes of computing.

    The weights are fitted to the spikes that arrive, and epochs learn what one least squares for each layer cannot.
    """
    is_coarse = has_few_bits(bits)
    trains_fully = is_coarse or timesteps <= FEW_STEPS
    epochs = most_epochs(timesteps, MAX_EPOCH_STEPS if trains_fully else MAX_FITTED_EPOCH_STEPS)
    training = {"calibration_samples": 2500, "spike_epochs_unlabelled": epochs, "spike_gradient": "time"}
    if not trains_fully:
        training["spike_lr"] = float(f"{FITTED_LR_TIMES_T2 / timesteps**2:.2g}")
    return {
        **{"weight_bitwidth": 8, "finetune_epochs": 0, "threshold": "mse", "per_channel": "both"},
        **{"correction": "weights", "hold_back": "auto"},
        **POOLINGS,
        **(training if epochs else {}),
    }


def most_epochs(timesteps, epoch_steps=MAX_EPOCH_STEPS):
    """Epochs without labels that take at most `epoch_steps` epochs times T; 0 if one takes more."""
    return min(MAX_EPOCHS, epoch_steps // timesteps)


def has_few_bits(bits):
    """Whether weights of some layer have at most `FEW_BITS`. bits: an option weight_bitwidth."""
    widths = [] if bits == "auto" else [bits] if isinstance(bits, int) else bits
    return any(width <= FEW_BITS for width in widths)


def finetuned(timesteps, bits):
    """Options that need labels, and minutes on a GPU or hours on one CPU core.

    The activations have at most 8 levels, because more cost accuracy at 4 bits, even at T = 16.
    """
    return {
        **{"finetune_epochs": 20, "finetune_optimizer": "adam", "finetune_lr": 0.01, "finetune_distill": 0.5},
        **{"val_share": 0.0, "per_channel": "both", "activation_levels": min(timesteps, 8), "spike_epochs": 10},
        **POOLINGS,
    }


def exact(timesteps, bits):
    """Options without labels under which no spike is early or late, at the price of T more steps per image.

    The activations of the quantized ANN are still rounded to T levels. Where these are few, weights and lambdas are
    learnt on rounded activations, so that each layer makes up for the errors before it. Few bits have to be rounded
    with care, and a scale per channel of the spikes would round them a second time.
    """
    is_coarse = has_few_bits(bits)
    if is_coarse or timesteps < MANY_LEVELS:
        scales = {"threshold": "mse", "per_channel": "weights" if is_coarse else "both", "rounding": "learnt"}
    else:
        scales = {"threshold": "max", "per_channel": "both"}
    levels = {"activation_levels": timesteps} if timesteps < MANY_LEVELS else {}
    return {**{"weight_bitwidth": 8, "finetune_epochs": 0}, **scales, **levels, **POOLINGS, "listen": timesteps}


PRESETS = {
    "specification": lambda timesteps, bits: {},
    "calibrated": calibrated,
    "finetuned": finetuned,
    "exact": exact,
}


def preset_options(name, timesteps, bits=8, hardware=None):
    """Option -> value of a preset for T timesteps and weight bits.

    bits: the weight bits that are asked for; the presets choose others only where it is one number. hardware: the chip
    whose limits the network has to keep, or None. For it, as for "auto" bits, poolings keep their neurons: a folded one
    makes the kernel behind it larger. Raises ValueError for an unknown preset or number of timesteps.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset '{name}', use one of {', '.join(PRESETS)}")
    chosen = PRESETS[name](check_option("timesteps", timesteps), bits)
    is_limited = hardware is not None or bits == "auto"
    return {key: value for key, value in chosen.items() if not (is_limited and key in POOLINGS)}
