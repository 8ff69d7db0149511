"""The options of a conversion and what they may be."""

from dag_rewrites import check_avgpool
from runtime.ranges import check_option
from spike_neurons import RESET_MODES

THRESHOLDS = ("quantile", "max", "mse")

GRANULARITIES = ("layer", "channel")

CORRECTIONS = ("potential", "bias", "none")


def check_conversion(
    timesteps,
    reset_mode="subtraction",
    listen=0,
    threshold="quantile",
    quantile=0.999,
    granularity="layer",
    correction="potential",
    calibration_samples=1000,
    avgpool="spike",
    hold_back=0.25,
    initial_potential=None,
):
    """Raise ValueError for options of `trans_ann2snn_weight` that are out of range."""
    timesteps = check_option("timesteps", timesteps)
    if reset_mode not in RESET_MODES:
        raise ValueError(f"unknown reset mode '{reset_mode}', use one of {', '.join(RESET_MODES)}")
    if check_option("listen", listen) > timesteps:
        raise ValueError(f"listen {listen}: use 0 to {timesteps}, the timesteps")
    if threshold not in THRESHOLDS:
        raise ValueError(f"unknown threshold '{threshold}', use one of {', '.join(THRESHOLDS)}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity '{granularity}', use one of {', '.join(GRANULARITIES)}")
    if correction not in CORRECTIONS:
        raise ValueError(f"unknown correction '{correction}', use one of {', '.join(CORRECTIONS)}")
    check_option("quantile", quantile)
    check_option("hold_back", hold_back, ", a share of Vthr")
    if initial_potential is not None:
        check_option("initial_potential", initial_potential, ", a share of Vthr")
    check_option("calibration_samples", calibration_samples)
    check_avgpool(avgpool)
