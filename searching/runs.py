"""Make and measure one trial: quantize (or take what was quantized before), convert, train, race on held-out images.

runner = Runner(shared, loaders, images, device, costs)
row = runner.run(trial, rivals, limits, clock)
"""

import contextlib
import copy
import io
import time
from functools import partial

import torch

from conversion.plan import plan_conversion
from dag_rewrites import prepare_conversion
from finetuning.levels import own_levels
from finetuning.on_spikes import finetune_on_spikes, finetune_spikes
from options import QuantizeOptions
from pipeline import Networks, convert_by_options, load_network, quantize
from quantization import quantize_finetune
from reports.price import price_of
from runtime.batches import first_output
from runtime.device import seed_everything
from searching.choice import STOPPED, best_of, is_surely_better
from searching.costs import (
    BACK,
    conversion_work,
    epochs_work,
    gradient_of,
    passes_work,
    quantization_work,
    simulation_kind,
    simulation_units,
)
from searching.record import Row
from validate import measured_on

FIRST_RUNG = 250  # images held out that every trial sees; each further rung doubles them
AT_A_TIME = 100  # images that are simulated at a time
OBSERVED = 20  # images for which spikes and synaptic operations are counted
PROBED, PROBED_AGAIN = 32, 3  # images on which an epoch's cost is tried out, and batches of them the second time
LONG_PROBE = 10  # seconds; if the first time takes longer, starting is no large part of it
SHORT_PROBE, SHARE_OF_PROBE = 3, 10  # seconds at least, and one part in so many of the time that is left at most
SHARE_OF_TRIAL = 20  # the simulation of one trial takes at most one part in so many of the time limit
MAX_KEPT = 6  # quantized networks in memory
# Options on which the traced network depends.
OF_NETWORK = ("signed", "avgpool", "maxpool", "replace_activations", "replace_gates", "ann_layers")


class Runner:
    """Runs trials. loaders: (training images, calibration images); images: SearchImages. No test image is here."""

    def __init__(self, shared, loaders, images, device, costs):
        self.shared, self.loaders, self.images, self.device, self.costs = shared, loaders, images, device, costs
        self.networks, self.quantized, self.ann_hits = {}, {}, []

    # -----------------------------------------------------------------------------------------------------------------
    # Networks

    def network(self, args):
        """`net, args` of `pipeline.load_network`, once for the same options; what it says is said once."""
        of_gates = ("calibration_samples",) if args.replace_gates else ()
        key = repr([getattr(args, name) for name in (*OF_NETWORK, "weight_bitwidth", *of_gates)])
        if key not in self.networks:
            hush = contextlib.redirect_stderr(io.StringIO()) if self.networks else contextlib.nullcontext()
            with hush:
                net, loaded = load_network(args, self.loaders[0], self.images.calibration)
            self.networks[key] = net.to(self.device), loaded.weight_bitwidth
        net, bits = self.networks[key]
        args = copy.copy(args)
        args.weight_bitwidth = bits
        return net, args

    def weights(self, args):
        """The `pipeline.Networks` with float and quantized weights, quantized once for the same options."""
        key = self.weights_key(args)
        if key not in self.quantized:
            if len(self.quantized) == MAX_KEPT:
                del self.quantized[next(iter(self.quantized))]  # the oldest
            made = Networks(self.network(args)[0])
            loaders = self.images.train, self.images.calibration
            quantize(args, made, loaders, torch.nn.CrossEntropyLoss(), self.device)
            self.quantized[key] = made
        return self.quantized[key]

    def weights_key(self, args):
        """What quantized weights depend on, as text."""
        options = QuantizeOptions.of(args)
        known = {**vars(options), "weights_per_channel": options.weights_per_channel}
        known |= {name: getattr(args, name) for name in OF_NETWORK}
        if options.activation_levels is None and not own_levels(self.network(args)[0]):
            del known["per_channel"]  # scales of spikes are the conversion's
        if options.activation_levels is not None or options.rounding == "learnt" or args.replace_gates:
            known["calibration_samples"] = args.calibration_samples
        return repr(known)

    # -----------------------------------------------------------------------------------------------------------------
    # Costs

    def estimate(self, args, left):
        """The seconds that a trial will take, with every image held out that it may see.

        left: seconds until the time limit. Work that was not measured yet is tried out if there is time for it.
        """
        work = self.work(args)
        for kind in work:
            tried = self.costs.estimate({kind: PROBED * (1 + PROBED_AGAIN) * (args.timesteps + BACK)})
            if kind in PROBES and not self.costs.knows(kind) and max(tried, SHORT_PROBE) < left / SHARE_OF_PROBE:
                PROBES[kind](self, args)
        return self.costs.estimate(work)

    def work(self, args):
        """Kind -> units of the work of a trial."""
        samples, train = self.images.samples, self.train_images()
        kind, units = conversion_work(args, samples)
        work = {kind: units, **epochs_work(args, samples, train)}
        if self.weights_key(args) not in self.quantized:
            work |= quantization_work(args, samples, train)
        kind = simulation_kind(args)
        return {**work, kind: work.get(kind, 0) + simulation_units(args, len(self.images.labels))}

    def train_images(self):
        """The number of images that training with labels has."""
        return len(self.images.train.dataset) if self.images.train is not None else 0

    def timed(self, costs, kind, units, act):
        """`act()`, whose seconds go into the costs."""
        start = time.perf_counter()
        result = act()
        seconds = time.perf_counter() - start
        self.costs.note(kind, units, seconds)
        costs.append([kind, units, round(seconds, 3)])
        return result

    def probe_epochs(self, args):
        """Measure an epoch on spikes with a few images. The first time also compiles, so the second one counts."""
        _, args = self.network(args)
        plain = copy.copy(args)
        plain.finetune_epochs, plain.activation_levels, plain.rounding = 0, None, "nearest"
        made, few = self.weights(plain), [(self.images.calibration[0][0][:PROBED], None)]
        snn = convert_by_options(made.qnet, few, self.device, plain, correction="none")
        how = {"teacher": made.ann, "qnet": made.qnet, "gradient": gradient_of(args)}
        for batches in (few, few * PROBED_AGAIN):
            (kind, units), *_ = passes_work(args, len(batches) * len(few[0][0])).items()
            self.timed([], kind, units, partial(finetune_spikes, snn, batches, self.device, 1, **how))
            if self.costs.rate(kind) * units > LONG_PROBE:
                return

    def probe_finetuning(self, args):
        """Measure finetuning with two batches; the second time counts."""
        net, args = self.network(args)
        args.finetune_epochs, args.activation_levels = 1, None
        few = [self.images.calibration[0]]
        for _ in range(2):
            train = partial(quantize_finetune, net, few, torch.nn.CrossEntropyLoss(), self.device, args)
            self.timed([], "finetuning", len(few[0][0]), train)

    # -----------------------------------------------------------------------------------------------------------------
    # Trials

    def measure_float(self, args, minutes, timesteps, least=0):
        """Measure the float network, and keep as many images held out as many trials can see in time.

        minutes: the time limit. timesteps: the largest T. least: images that earlier trials saw.
        """
        net, _ = self.network(args)
        for _ in range(2):  # the first time also prepares the operators
            start = time.perf_counter()
            few = self.hits(net, 0, AT_A_TIME)
            self.costs.seconds_of_image = (time.perf_counter() - start) / len(few)
        seconds = self.costs.estimate({"simulation": timesteps})
        self.images.keep(max(FIRST_RUNG, least, int(60 * minutes / SHARE_OF_TRIAL / max(seconds, 1e-9))))
        self.ann_hits = self.hits(net, 0, len(self.images.labels))

    def can_fold(self, args):
        """Whether the network has average poolings that can be folded."""
        net, args = self.network(args)
        return bool(plan_conversion(prepare_conversion(net, avgpool="fold"), args.ann_layers).folded)

    @torch.no_grad()
    def hits(self, net, start, end, timesteps=None):
        """Whether a network's class is right, for the images held out from `start` to before `end`, as a list."""
        found, known = [], {} if timesteps is None else {"timesteps": timesteps}
        with measured_on(net, self.device):
            pairs = zip(*(x[start:end].split(AT_A_TIME) for x in (self.images.images, self.images.labels)))
            for images, labels in pairs:
                scores = first_output(net(images.to(self.device), **known))
                found += (scores.argmax(1).cpu() == labels).tolist()
        return found

    def run(self, trial, rivals, limits, clock):
        """The `record.Row` of a trial. rivals: rows of the same T, bits and kind, that were measured before."""
        row = Row(trial.key(), trial.timesteps, trial.bits, trial.flags, trial.preset)
        try:
            snn, args = self.convert(trial, row, limits)
        except ValueError as error:
            row.refused = str(error)
        if not row.refused:
            row.hits, row.worse = self.race(snn, args, row, rivals(row), clock)
        return row

    def convert(self, trial, row, limits):
        """`snn, args` of a trial; sets the row's price, and `refused` if it is over a limit."""
        args = self.shared.args(trial)
        seed_everything(args.seed)
        _, args = self.network(args)
        samples, train = self.images.samples, self.train_images()
        work = quantization_work(args, samples, train) if self.weights_key(args) not in self.quantized else {}
        kind, units = next(iter(work.items()), ("", 0))
        made = self.timed(row.costs, kind, units, partial(self.weights, args))
        converted = partial(convert_by_options, made.qnet, self.images.calibration, self.device, args)
        snn = self.timed(row.costs, *conversion_work(args, samples), converted)
        self.set_price(row, snn, limits)
        epochs = epochs_work(args, samples, train)
        if epochs and not row.refused:
            loaders = self.images.train, self.images.calibration
            networks = snn, made.qnet, made.ann
            train = partial(finetune_on_spikes, *networks, *loaders, torch.nn.CrossEntropyLoss(), self.device, args)
            snn = self.timed(row.costs, *next(iter(epochs.items())), train)
            self.set_price(row, snn, limits)
        return snn, args

    def set_price(self, row, snn, limits):
        """Set the steps and operations per image of a row, and `refused` if they are over a limit."""
        duration = snn.duration()
        row.interval, row.latency = duration["interval"], duration["latency"]
        row.listens = row.interval > row.timesteps
        spikes = price_of(snn, self.images.images[:OBSERVED].to(self.device))
        row.spikes, row.synops = spikes["spikes"], spikes["synops"]
        row.refused = limits.over(row)
        row.over_limit = bool(row.refused)

    def race(self, snn, args, row, rivals, clock):
        """`hits, worse`: simulate rung by rung until the best rival is surely better, or the time is over."""
        hits, end, total, best = [], FIRST_RUNG, len(self.images.labels), best_of(rivals)
        while True:
            start, end = len(hits), min(end, total)
            units = simulation_units(args, end - start)
            act = partial(self.hits, snn, start, end, args.timesteps)
            hits += self.timed(row.costs, simulation_kind(args), units, act)
            if best is not None and is_surely_better(best.hits, hits, STOPPED):
                return hits, best.name()
            if end == total or clock.left() < self.costs.estimate({simulation_kind(args): units}):
                return hits, ""
            end *= 2


PROBES = {
    "epochs time": Runner.probe_epochs,
    "epochs tandem": Runner.probe_epochs,
    "finetuning": Runner.probe_finetuning,
}
