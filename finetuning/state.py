"""Keep a training in a file, so that a run that was cut off goes on to the same bits.

state = State("out_snn.pth.state", options, loaders, resume=True)
with Progress(state) as progress:              # the training loops save and restore through it
    ...
    progress.remove_state()                    # the result is written

The file holds plain data: the network's tensors with the full-precision weights behind quantized ones, the optimizer
and its schedules, the position, the random states, and the networks of the stages that have ended. Code that comes
before a stage (tracing, calibration, conversion) is deterministic, so it runs again and the tensors are put into its
result.

Inside an epoch the position is a number of batches. The data loader starts again from the random states of the epoch's
beginning and yields these batches once more, without training, so that shuffles, and the augmentation in its worker
processes, go on as they would have.
"""

import os
import random
import shlex
import sys
import time
import zlib

import numpy as np
import torch
from torch.utils.data import DataLoader

from runtime.files import write_torch
from runtime.interrupts import SIGNALS, Interrupt
from runtime.processes import UNHARMED, ProcessEnded, count, interrupted
from runtime.torch_files import OtherFile, read_torch_file

FORMAT = "training state 1"
SECONDS_BETWEEN = 60  # writes inside an epoch; what a killed run may lose
# A write at an epoch's end may take a twentieth of the time since the last one, so that short epochs of large networks
# do not wait for the disk.
SHARE_OF_WRITING = 20
ADVICE = "give the same network and flags, or leave --resume out"
MOST_NAMED = 3  # differing options that a message lists


class State:
    """The file of a training. One process of several has writes=True; all of them read it.

    options: name -> plain value of everything that the result depends on. loaders: all data loaders of the run, whose
    random generators are kept. resume: whether to read the file, and go on.

    Raises ValueError if there is nothing to resume, for a damaged file, and for one of other options.
    """

    def __init__(self, path, options, loaders=(), resume=False, writes=True):
        self.path, self.options, self.writes = path, options, writes
        self.generators = [g for loader in loaders for g in generators_of(loader)]
        self.done, self.saved, self.at_start = {}, None, None
        self.exists, self.is_frozen = False, False
        self.last, self.cost = time.monotonic(), 0.0
        self.warned = False
        if resume:
            self.saved = read(path, options)
            self.done, self.exists = dict(self.saved["done"]), True
            warn_of_workers(loaders)
        elif os.path.exists(path) and writes:
            print(f"{path} is of an unfinished run, --resume goes on with it; this one begins anew", file=sys.stderr)

    # called by runtime.progress.Progress

    def begin(self, progress, net, trainers):
        """Prepare a stage; returns its last finished epoch, 0 for a new one.

        Raises ValueError if the file's network is another one.
        """
        self.net, self.trainers = net, trainers
        if self.take(progress.stage, net):
            return progress.total
        if self.saved is None or self.saved["stage"] != progress.stage:
            return 0
        if self.saved["batch"] == 0:
            epoch = self.saved["epoch"]
            self.restore(progress)
            return epoch
        return self.saved["epoch"] - 1

    def begin_epoch(self, progress):
        """Note the random states before the loader starts; returns the number of batches that are already done."""
        if self.saved is None or self.saved["stage"] != progress.stage:
            self.at_start = self.randomness()
            return 0
        self.at_start = self.saved["randomness_at_start"]
        self.set_randomness(self.at_start)
        return self.saved["batch"]

    def replay(self, progress, batches, count):
        """Take `count` batches from an epoch that has just begun, and go on behind them."""
        for done in range(count):
            if next(batches, None) is None:
                raise ValueError(f"--resume: {self.path} is at batch {count}, the data loader has {done} now")
        self.restore(progress)

    def save(self, progress, at_end=False, at_once=False):
        """Write the file if it is time to. at_end: an epoch has ended. at_once: whatever the time.

        A disk that is full does not end the training: the former file stays, and a line says so.
        """
        now = time.monotonic() - self.last
        is_due = now >= SECONDS_BETWEEN or at_once or (at_end and now >= SHARE_OF_WRITING * self.cost)
        if not self.writes or self.is_frozen or not is_due:
            return
        inside = progress.batch > 0
        trainers = [plain_state(each) for each in self.trainers]
        self.write(
            {
                **{"stage": progress.stage, "epoch": progress.epoch, "batch": progress.batch},
                **{"sums": progress.plain_sums() if inside else None, "tensors": tensors_of(self.net)},
                **{"trainers": trainers, "randomness_at_start": self.at_start if inside else None},
            }
        )

    def take(self, stage, net):
        """Whether an earlier run has ended a stage; `net` then gets what it has learnt there."""
        if stage not in self.done:
            return False
        put_tensors(net, self.done[stage], f"--resume: {self.path}", ADVICE)
        if self.saved is not None and self.saved["stage"] is None and stage == list(self.done)[-1]:
            self.set_randomness(self.saved["randomness"])
            self.saved = None
        return True

    def keep(self, stage, net):
        """Keep the network of a stage that has ended."""
        if stage not in self.done and not self.is_frozen:
            self.done[stage] = {name: value.clone() for name, value in tensors_of(net).items()}
            if self.writes:
                self.write({"stage": None})

    def freeze(self):
        """Write no more: what follows does not belong to the whole training."""
        self.is_frozen = True

    # files

    def write(self, position):
        """Write the file; a failure is told once."""
        begun = time.monotonic()
        contents = {"format": FORMAT, "options": self.options, "done": self.done, "randomness": self.randomness()}
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            write_torch(self.path, {**contents, **position})
            self.exists = True
        except OSError as error:
            if not self.warned:
                print(f"warning: {error}; the training goes on", file=sys.stderr)
            self.warned = True
        self.last = time.monotonic()
        self.cost = self.last - begun

    def restore(self, progress):
        """Put the file's tensors, optimizer and random states into the running training."""
        saved, self.saved = self.saved, None
        put_tensors(self.net, saved["tensors"], f"--resume: {self.path}", ADVICE)
        for each, values in zip(self.trainers, saved["trainers"]):
            each.load_state_dict(values)
        if saved["sums"] is not None:
            progress.sums, progress.batch = dict(saved["sums"]), saved["batch"]
        self.set_randomness(saved["randomness"])

    def remove(self):
        """Remove the file, because the result is written; a training that the time cut off keeps it."""
        if self.writes and self.exists and not self.is_frozen:
            os.remove(self.path)
            self.exists = False

    # random states

    def randomness(self):
        """The states of all random generators, as plain data."""
        name, keys, *rest = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
            "python": random.getstate(),
            "generators": [each.get_state() for each in self.generators],
        }

    def set_randomness(self, states):
        """Set all random generators. Those of other processes than the first come from its (`processes.shares`)."""
        if not self.writes:
            return
        torch.set_rng_state(states["torch"])
        if states["cuda"]:
            torch.cuda.set_rng_state_all(states["cuda"])
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        random.setstate(states["python"])
        for each, value in zip(self.generators, states["generators"]):
            each.set_state(value)

    # an interrupted run

    def leave(self, kind, error, traceback):
        """Say how to go on after an interrupt, and at an error of the disk."""
        number = SIGNALS.pending
        SIGNALS.reset()
        # a signal may reach the workers of a loader first, whose end is an error
        is_signal = number is not None and error is not None
        if count() > 1 and (is_signal or isinstance(error, (KeyboardInterrupt, ProcessEnded))):
            self.leave_others(error)
        if (is_signal or isinstance(error, KeyboardInterrupt)) and self.exists and self.writes:
            print(f"go on with: {resuming_command()}", file=sys.stderr)
        if is_signal and not isinstance(error, KeyboardInterrupt):
            raise Interrupt(number) from error
        if isinstance(error, ValueError) and not self.done:
            self.remove()  # a training that diverged would do so again
        if isinstance(error, OSError) and self.exists:
            raise OSError(f"{error}; --resume goes on from {self.path}") from error

    def leave_others(self, error):
        """Raise ProcessEnded, with where to go on: torchrun ends all processes by a signal if one of them dies."""
        what = error if isinstance(error, ProcessEnded) else f"{interrupted()}, {UNHARMED}"
        how = f"; --resume goes on from {self.path}" if os.path.exists(self.path) else ""
        raise ProcessEnded(f"{what}{how}") from error


def resuming_command():
    """The command of this run with --resume."""
    words = [word for word in sys.argv if word != "--resume"]
    return f"python3 {shlex.join([*words, '--resume'])}"


def read(path, options):
    """The contents of a state file. Raises ValueError if it is missing, damaged, or of other options."""
    if not os.path.exists(path):
        raise ValueError(f"--resume: there is no {path}, the run ended or has not trained yet: leave --resume out")
    try:
        saved = read_torch_file(path, takes_legacy=False)
    except OtherFile as error:
        raise ValueError(f"--resume: {path} holds no state of a training, {error.found}: leave --resume out") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"--resume: {path} holds no state of a training of this version: leave --resume out")
    check_same(path, saved["options"], options)
    return saved


def check_same(path, saved, options):
    """Raise ValueError, with the differences, unless a file belongs to these options."""
    names = [*saved, *(name for name in options if name not in saved)]
    others = [name for name in names if saved.get(name) != options.get(name)]
    if "weights" in others and len(others) == 1:
        raise ValueError(f"--resume: {path} is of another network, with other weights: leave --resume out")
    if others:
        differences = [f"{name} {saved.get(name)}, not {options.get(name)}" for name in others if name != "weights"]
        more = f" and {len(differences) - MOST_NAMED} more" if len(differences) > MOST_NAMED else ""
        raise ValueError(
            f"--resume: {path} is of a run with {'; '.join(differences[:MOST_NAMED])}{more}: give the same flags, or "
            "leave --resume out"
        )


def checksum(net):
    """A number that differs for other weights (CRC-32 of all parameters and buffers)."""
    total = 0
    for name, value in net.state_dict().items():
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), total)
    return total


def plain(value):
    """A flag as plain data, without a difference between a list and a tuple."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def warn_of_workers(loaders):
    """Say on stderr if worker processes of a loader have random states that no file can hold."""
    if any(getattr(plain_loader(loader), "persistent_workers", False) for loader in loaders):
        print(
            "warning: --resume with persistent_workers in your data loader: their random numbers start again",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Networks, optimizers and loaders as plain data


def attached(net):
    """Name -> tensor of what a network trains outside of its parameters: shadow weights, initial potentials."""
    shadows = {f"{name}.weight_back": getattr(p, "weight_back", None) for name, p in net.named_parameters()}
    starts = {f"{name}.start_share": getattr(each, "start_share", None) for name, each in net.named_modules()}
    return {name: value.detach() for name, value in {**shadows, **starts}.items() if value is not None}


def tensors_of(net):
    """Name -> tensor of everything that a training changes in a network."""
    return {**{name: value.detach() for name, value in net.state_dict().items()}, **attached(net)}


@torch.no_grad()
def put_tensors(net, tensors, file, advice):
    """Put the tensors of `tensors_of` into a network like the one that they are of.

    Parameters keep their memory, which an optimizer knows. Buffers are replaced, because several layers may share one.
    file, advice: words of the ValueError if the network is another one.
    """
    found = tensors_of(net)
    others = set(found) ^ set(tensors) or {n for n, value in found.items() if value.shape != tensors[n].shape}
    if others:
        raise ValueError(f"{file} is of another network, see {sorted(others)[0]}: {advice}")
    kept_in_place = {**{name: p.detach() for name, p in net.named_parameters()}, **attached(net)}
    for name, value in tensors.items():
        if name in kept_in_place:
            kept_in_place[name].copy_(value)
        else:
            owner, _, key = name.rpartition(".")
            net.get_submodule(owner)._buffers[key] = value.to(found[name].device, copy=True)


def plain_state(trainer):
    """The state dict of an optimizer or a schedule, without what its construction makes anew."""
    state = trainer.state_dict()
    if "param_groups" in state:
        return state
    return {key: value for key, value in state.items() if isinstance(value, (bool, int, float, str, list, type(None)))}


def plain_loader(loader):
    """The data loader inside of wrappers of the toolkit (`batches.GroupedLoader`)."""
    while not isinstance(loader, DataLoader) and hasattr(loader, "loader"):
        loader = loader.loader
    return loader


def generators_of(loader):
    """The random generators of a data loader and of its samplers, each once."""
    loader = plain_loader(loader)
    samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    found = [getattr(each, "generator", None) for each in (loader, *samplers)]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
