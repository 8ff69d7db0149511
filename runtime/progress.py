"""The epochs and batches of a training: what is left of them, how long it takes, and when it stops.

for epoch in progress.epochs("finetune", 10, net, optimizer, schedule):
    for batch in progress.batches(loader, f"epoch {epoch}"):
        ...
        progress.count(loss, samples, outputs, targets)
    progress.loss                                             # the mean of the epoch

`Progress()` trains from the first batch to the last. With a `finetuning.state.State` it goes on where an earlier run
was cut off, and keeps what the next one needs.
"""

import sys
import time

from tqdm import tqdm

from runtime.batches import batches_of, first_output, has_length
from runtime.interrupts import SIGNALS
from runtime.processes import check_alike, from_first, shares, sums

FIRST = 2  # batches that do not count in the estimate of the time, because they compile kernels and fill caches
SECONDS_OBSERVED = 3  # from which the time left is estimated
WORTH_SAYING = 60  # seconds left; a shorter training needs no estimate


class Progress:
    """Runs the stages of training, one after the other.

    state: a `finetuning.state.State`, which keeps the training in a file, or None. log: a `finetuning.log.Log`, which
    gets a row an epoch, or None. minutes: after this time no further batch begins, None for no limit.
    speaks: whether to print the estimate of the time left, and what a limit cut off.

    stopped: stage -> epochs done of those wanted, in words, for the stages that the limit cut off. validated: the
    result of a validation of the epoch, for the log.
    """

    def __init__(self, state=None, log=None, minutes=None, speaks=True):
        self.state, self.log, self.speaks = state, log, speaks
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.stage, self.trainers, self.stopped = None, (), {}
        self.epoch = self.batch = self.total = self.seen = 0
        self.estimated = True  # there is no stage whose time could be estimated
        self.begin_epoch()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.log is not None:
            self.log.close()
        if self.state is not None:
            self.state.leave(*error)

    def remove_state(self):
        """Remove the file of the state, because the result is written."""
        if self.state is not None:
            self.state.remove()

    def begin_epoch(self):
        """Forget the sums of the last epoch."""
        self.validated = self.began = None
        self.batch = 0
        self.sums = {"loss": 0.0, "samples": 0, "right": 0, "labelled": 0, "seconds": 0.0, "rate": 0.0}

    # stages and epochs

    def epochs(self, stage, count, net, *trainers):
        """Yield the epochs that are left of a stage, from 1 to `count`.

        net: the network to train. trainers: its optimizer first, then schedules; all have a state_dict. Whatever the
        loop's body does behind its batches, belongs to the epoch.
        """
        self.stage, self.total, self.epoch, self.trainers = stage, count, 0, trainers
        self.seen, self.first, self.estimated = 0, None, False  # of the estimate of the time left
        self.begin_epoch()
        if self.state is not None:
            self.epoch = self.state.begin(self, net, trainers)
        while self.epoch < count:
            if self.is_late():
                self.stop()
                return
            self.epoch += 1
            yield self.epoch
            check_alike(net)
            if stage in self.stopped:
                return
            self.end_epoch()
        if self.state is not None:
            self.state.keep(stage, net)

    def once(self, stage, net, work):
        """Call `work()`, which changes `net`, unless an earlier run has done so and its result is kept."""
        if self.state is not None and self.state.take(stage, net):
            return
        work()
        if self.state is not None:
            self.state.keep(stage, net)

    def end_epoch(self):
        """Note a finished epoch in the log and in the state."""
        if self.log is not None:
            self.log.write(self)
        self.begin_epoch()
        if self.state is not None:
            self.state.save(self, at_end=True)

    def is_late(self):
        """Whether the time of the run is over."""
        return self.deadline is not None and from_first(lambda: time.monotonic() >= self.deadline)

    def stop(self):
        """End the stage here, and keep the state as it is now."""
        done = self.epoch - (self.batch > 0) + (self.batch / self.batches_of_epoch if self.batch else 0)
        self.stopped[self.stage] = f"{done:.4g} of {self.total} epochs"
        if self.state is not None:
            self.state.save(self, at_once=True)
            self.state.freeze()
        if self.speaks:
            print(f"{self.stage}: the time is over after {self.stopped[self.stage]}", file=sys.stderr)

    # batches

    def batches(self, loader, words):
        """Yield the batches that are left of the epoch, without empty ones, under a progress bar named `words`."""
        skipped = 0
        if self.state is not None:
            skipped = self.state.begin_epoch(self)
        self.sums["rate"] = self.learning_rate()  # at the start of the epoch, also of one that is resumed
        self.batches_of_epoch = len(loader) if has_length(loader) else float("inf")
        batches = batches_of(tqdm(shares(loader), words, leave=False, delay=1))
        if skipped:
            self.state.replay(self, batches, skipped)
        self.began = time.monotonic()
        SIGNALS.waits = self.state is not None
        for batch in batches:
            yield batch
            self.batch += 1
            self.estimate()
            if self.state is not None:
                self.state.save(self, at_once=SIGNALS.pending is not None)
            SIGNALS.raise_pending()
            if self.batch < self.batches_of_epoch and self.is_late():
                self.stop()
                break
        SIGNALS.waits = False
        SIGNALS.raise_pending()
        self.sums["seconds"] += time.monotonic() - self.began
        self.began = None
        self.add_processes()

    def add_processes(self):
        """Make the sums of the epoch those over all processes, whose seconds are those of this one."""
        names = [name for name in self.sums if name != "seconds"]
        self.sums.update(zip(names, sums(*(self.sums[name] for name in names))))

    def count(self, loss, samples, outputs=None, targets=None):
        """Add a batch to the means of the epoch. loss: a scalar tensor, the mean of `samples`.

        outputs, targets: with a log also the accuracy, if the targets are classes [B] and the outputs [B, C].
        """
        self.sums["loss"] = self.sums["loss"] + loss.detach() * samples
        self.sums["samples"] += samples
        if self.log is None or targets is None or targets.dim() != 1 or targets.is_floating_point():
            return
        scores = first_output(outputs, targets)
        if scores.dim() == 2 and scores.shape[1] > 1:
            self.sums["right"] = self.sums["right"] + (scores.detach().argmax(1) == targets).sum()
            self.sums["labelled"] += samples

    def plain_sums(self):
        """The sums of the epoch up to now as numbers, which makes the CPU wait for a GPU."""
        sums = {key: float(value) for key, value in self.sums.items()}
        return {**sums, "seconds": sums["seconds"] + (time.monotonic() - self.began if self.began else 0.0)}

    def check_samples(self):
        """Raise ValueError if the epoch has had no samples."""
        if not self.sums["samples"]:
            raise ValueError("no samples to finetune on, the data loader is empty, or runs only once")

    @property
    def loss(self):
        """The mean loss per sample of the epoch. Raises ValueError if there were no samples."""
        self.check_samples()
        return float(self.sums["loss"]) / self.sums["samples"]

    def learning_rate(self):
        """The learning rate of the optimizer's first group, 0 without an optimizer."""
        groups = getattr(self.trainers[0], "param_groups", None) if self.trainers else None
        return float(groups[0]["lr"]) if groups else 0.0

    def estimate(self):
        """Print once, after some batches, how long the stage will take, if that is over a minute."""
        if self.estimated or not self.speaks or self.batches_of_epoch == float("inf"):
            return
        self.seen += 1
        now = time.monotonic()
        if self.seen <= FIRST:
            self.first = now
        elif now - self.first >= SECONDS_OBSERVED:
            self.estimated = True
            left = self.batches_of_epoch * (self.total - self.epoch + 1) - self.batch
            seconds = left * (now - self.first) / (self.seen - FIRST)
            if seconds > WORTH_SAYING:
                print(f"{self.stage}: {self.total} epochs, about {in_words(seconds)} left", file=sys.stderr)


def in_words(seconds):
    """A time in minutes, or in hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
