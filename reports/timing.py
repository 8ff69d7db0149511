"""The time of a report: measured by stage, and estimated before it starts."""

import time

from runtime.ranges import LEAST_ERROR

# CPU seconds of the figures and the page, on one core of an AMD EPYC; they do not depend on the network
DRAWING = 5.0
WATCHED = 4.0  # a simulation whose spikes are counted, in small batches, in plain ones
CLOSELY = 12.0  # a simulation that is replayed in float64 beside two ANNs, in plain ones
SEARCH = 0.5  # share of a conversion by least error (`LEAST_ERROR`) that does not depend on the number of images


class Clock:
    """Wall and CPU seconds of each stage. cpu, wall: stage -> seconds."""

    def __init__(self):
        self.before = time.process_time()  # of the whole process: loading, conversion, validation
        self.cpu, self.wall = {}, {}
        self.last = self.now()

    def now(self):
        return time.process_time(), time.perf_counter()

    def lap(self, stage):
        """Record the seconds since the last lap under `stage`."""
        now = self.now()
        for store, after, before in zip((self.cpu, self.wall), now, self.last):
            store[stage] = round(after - before, 2)
        self.last = now

    def summary(self, conversion, estimate):
        """The report's entry "seconds". conversion: stage -> wall seconds of the run before the report."""
        return {
            "conversion": conversion,
            "report": self.wall,
            "report_cpu": self.cpu,
            "cpu_before_report": round(self.before, 2),
            "estimate": round(estimate, 1),
        }


def estimate(args, seconds, samples, repaired, alternatives, calibration):
    """Seconds that a report takes, without the training of presets.

    seconds: those of the conversion by stage (`pipeline.Networks`). samples: test images measured there. repaired,
    alternatives: how many conversions of each kind the report makes, on `calibration` images each.
    """
    images = args.analysis_images
    fixed = SEARCH if args.threshold in LEAST_ERROR else 0.0
    share = fixed + (1 - fixed) * min(1.0, calibration / args.calibration_samples)
    convert = seconds["trans_ann2snn_weight"] * share
    simulate = seconds["validate_snn"] * images / samples
    total = repaired * (convert + simulate) + alternatives * (convert + (1 + WATCHED) * simulate)
    if args.sweep:
        total += 6 * (seconds["quantize_finetune"] + 6 * (convert + simulate))  # about 6 bit widths and 6 timesteps
    return DRAWING + CLOSELY * simulate + total
