"""Estimates of seconds, from work that was done before.

Work is a dict, kind -> units: {"conversion": 2500 * 8, "epochs time": 10 * 2500 * 8}. A kind's seconds per unit are
those of the last measurement of this kind, or a multiple of the seconds of one image in the float network.
"""

import time

# Images of the float network that a unit costs before it was measured, rounded up from resnet20 on one core.
PRIORS = {
    "conversion": 2.0,
    "conversion listening": 1.0,
    "windows": 4.0,
    "learnt rounding": 100.0,
    "simulation": 1.0,
    "counting": 1.0,
    "finetuning": 5.0,
    "epochs time": 8.0,
    "epochs tandem": 2.0,
}
MARGIN = 1.2  # an estimate is this many times the last measurement, because other programs take their share
WRITING = 10  # seconds for the table and the figure, at most a tenth of the time limit
TRIALS = 7  # conversions in one: --hold_back auto tries six shares for each channel
BACK = 9  # a backward pass of the ANN in units of timesteps, for the gradient that does not grow with T


class Clock:
    """A time limit. minutes: from `start` on, seconds of `time.monotonic`; the last of them are for the results."""

    def __init__(self, minutes, start=None):
        start = time.monotonic() if start is None else start
        seconds = 60 * minutes
        self.minutes, self.end = minutes, start + seconds - min(WRITING, seconds / 10)

    def left(self):
        """Seconds until the limit."""
        return self.end - time.monotonic()


class Costs:
    """seconds_of_image: seconds of one image in the float network, or None until it is measured."""

    def __init__(self):
        self.seconds_of_image, self.rates = None, {}

    def note(self, kind, units, seconds):
        """Remember what some work cost."""
        if units:
            self.rates[kind] = seconds / units

    def knows(self, kind):
        """Whether this kind of work was measured."""
        return kind in self.rates

    def estimate(self, work):
        """The seconds of some work, kind -> units."""
        return MARGIN * sum(units * self.rate(kind) for kind, units in work.items())

    def rate(self, kind):
        """The seconds of a unit."""
        return self.rates.get(kind, PRIORS[kind] * (self.seconds_of_image or 0.0))


def simulation_kind(args):
    """The kind of work of a simulation: with --listen, spikes are counted in one pass, at any T for about the same."""
    return "counting" if args.listen in (args.timesteps, "auto") else "simulation"


def simulation_units(args, images):
    """The units of simulating some images."""
    return images * (args.timesteps if simulation_kind(args) == "simulation" else BACK)


def conversion_work(args, samples):
    """`kind, units` of a conversion. samples: calibration images that are there."""
    images = min(samples, args.calibration_samples)
    if simulation_kind(args) == "counting":
        return ("windows" if args.listen == "auto" else "conversion listening"), images * BACK
    return "conversion", images * (args.timesteps + (TRIALS if args.hold_back == "auto" else 1) + BACK)


def epochs_work(args, samples, train_images):
    """Kind -> units of the epochs on spikes. train_images: their number."""
    images = min(samples, args.calibration_samples)
    passes = args.spike_epochs_unlabelled * images + args.spike_epochs * train_images
    return passes_work(args, passes) if passes else {}


def passes_work(args, passes):
    """Kind -> units of passing a number of images through an epoch on spikes."""
    kind = f"epochs {gradient_of(args)}"
    return {kind: passes * (args.timesteps if kind == "epochs time" else args.timesteps + BACK)}


def gradient_of(args):
    """The gradient of the epochs on spikes, "time" or "tandem"."""
    from finetuning.on_spikes import MOST_THROUGH_TIME

    return args.spike_gradient or ("time" if args.timesteps <= MOST_THROUGH_TIME else "tandem")


def quantization_work(args, samples, train_images):
    """Kind -> units of quantizing and finetuning the weights."""
    if args.finetune_epochs:
        return {"finetuning": args.finetune_epochs * train_images}
    return {"learnt rounding": min(samples, args.calibration_samples)} if args.rounding == "learnt" else {}
