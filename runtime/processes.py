"""Several processes that share one run: `torchrun --nproc_per_node N ann2snn.py ...`.

device = join(args.device)                    # once, at the start
for batch in shares(loader): ...              # training: this process's part of every batch (`Progress.batches`)
average_gradients(parameters, len(inputs))    # ... and one optimizer step with the gradient of the whole batch
for batch in own_batches(loader): ...         # measuring: every count()-th batch, as it is
net = from_first(lambda: convert(...))        # what one process computes for all
leave()                                       # the first process goes on alone

The first process prints, draws bars and writes files. With one process every function returns what it is given: no
process group, the same bits. Gradients are added up here, and not by DistributedDataParallel, because that needs one
backward pass behind one `forward` of a module, the same parameters in it every time, and parts of equal size. The
epochs on spikes make several backward passes, none of them behind `forward`, and parts differ by a sample.
"""

import contextlib
import copy
import hashlib
import os
import sys
from collections.abc import Mapping
from datetime import timedelta

# The first process may convert for long while others wait. One that ends is noticed at once, by its closed connections.
PATIENCE = timedelta(days=1)
KNOCKS = timedelta(seconds=10)  # for a store that may have ended
UNHARMED = "no result is half-written"
GROUP = {}  # "store", "rank", "count" between `join` and `leave`; empty in a run of one process
SPEAKERS = {}  # "stderr": the stream on which a silent process may still say why the run ends


class ProcessEnded(Exception):
    """Another process of the run has ended."""


def started():
    """The number of processes that torchrun started, 1 without it."""
    number = os.environ.get("WORLD_SIZE", "")
    return int(number) if number.isdecimal() and int(number) > 1 else 1


def count():
    """The number of processes that share the work."""
    return GROUP.get("count", 1)


def rank():
    """The number of this process among those that share the work, from 0."""
    return GROUP.get("rank", 0)


def is_first():
    """Whether this process prints and writes files: the first, or the only one."""
    return rank() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Start and end


def own_device(name):
    """The device of this process, one of several, for --device auto, cpu or cuda: each has a GPU of its own.

    Raises ValueError for a GPU by number, and if there are fewer GPUs than processes on this machine.
    """
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise ValueError(f"--device {name} with torchrun: each process has its own GPU, use auto, cuda or cpu")
    found, number = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if number >= found:
        here = os.environ.get("LOCAL_WORLD_SIZE", started())
        raise ValueError(f"torchrun started {here} processes here and torch sees {found} GPUs, start one for each GPU")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def join(name):
    """The device for --device `name`, after this process has met the others that torchrun started, if it did.

    NCCL connects GPUs, gloo everything else. Raises ValueError for a wrong device (`choose_device`, `own_device`), and
    if torchrun's environment is incomplete or the processes do not find each other.
    """
    from runtime.device import choose_device

    if started() == 1:
        return choose_device(name)
    import torch.distributed as dist
    import torch.distributed.nn  # noqa: F401  its functions keep the group that exists when they are defined, if any

    device = own_device(name)
    try:
        store, number, total = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("work", store), rank=number, world_size=total, timeout=PATIENCE
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"one of {started()} processes (WORLD_SIZE) does not find the others, start it with torchrun ({error})"
        ) from error
    GROUP.update(store=store, rank=number, count=total)
    return device


def leave():
    """The end of the work together. Afterwards the first process is a run of one; returns whether this is the first.

    The group's threads end here: one that still works while Python ends can abort the process.
    """
    if not GROUP:
        return True
    import torch.distributed as dist

    first = is_first()
    with noticing_the_end():
        dist.barrier()
    dist.destroy_process_group()
    GROUP.clear()
    return first


@contextlib.contextmanager
def alone():
    """Context in which this process works as a run of one, while others wait for what it computes."""
    before = dict(GROUP)
    GROUP.clear()
    try:
        yield
    finally:
        GROUP.update(before)


@contextlib.contextmanager
def noticing_the_end():
    """Context in which a failed exchange, a RuntimeError of torch, raises ProcessEnded."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessEnded(f"another process of the run ended, {UNHARMED}") from error


@contextlib.contextmanager
def first_speaks():
    """Context in which only the first of the processes that torchrun started prints and draws bars."""
    if started() == 1 or os.environ.get("RANK", "0") == "0":
        yield
        return
    before = sys.stdout, sys.stderr
    SPEAKERS["stderr"] = sys.stderr
    with open(os.devnull, "w") as nothing:
        sys.stdout = sys.stderr = nothing
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            SPEAKERS.clear()


def interrupted():
    """The cause of a signal in words: torchrun sends one to all processes if one of them ends."""
    return "interrupted" if started() == 1 else "interrupted, or another process ended"


def say_last(line):
    """Print why the run ends on stderr; of several processes only the first that fails does."""
    if fails_first():
        start = "\n" if "stderr" in SPEAKERS else ""  # the first process may have left a bar in the line
        # One write, which the launcher, which speaks at the same time, cannot cut: print writes line and end apart.
        print(f"{start}{line}\n", file=SPEAKERS.get("stderr", sys.stderr), end="", flush=True)


def fails_first():
    """Whether no other process of the run has failed; asked once by a process that fails."""
    if started() == 1:
        return True
    import torch.distributed as dist

    try:
        store = GROUP.get("store") or dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=KNOCKS
        )
        return store.add(f"failed {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, KeyError, ValueError):  # no torchrun behind it, or its store has ended, too
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Values


def in_turn(work):
    """The result of `work()`, which may download files: the first process of every machine works before the others."""
    if count() == 1:
        return work()
    import torch.distributed as dist

    is_early = os.environ.get("LOCAL_RANK", "0") == "0"
    result = work() if is_early else None
    with noticing_the_end():
        dist.barrier()
    return result if is_early else work()


def exchange(value):
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * count()
    with noticing_the_end():
        dist.all_gather_object(values, value)
    return values


def sums(*numbers):
    """The sum of each number over all processes, a list of floats; the numbers themselves in a run of one."""
    return list(numbers) if count() == 1 else [sum(each) for each in zip(*exchange([float(x) for x in numbers]))]


def from_first(compute):
    """What `compute()` returns in the first process; others wait for it. A network arrives on the CPU there.

    Values are pickled, networks with everything that they hold, and not as their files have it.
    """
    if count() == 1:
        return compute()
    import torch
    import torch.distributed as dist

    box, value = [None, None], None
    if is_first():
        with alone():
            value = compute()
        is_network = isinstance(value, torch.nn.Module)
        # a copy has no packed weights of the simulator, which cannot be pickled
        box = [type(value), vars(on_cpu(copy.deepcopy(value)))] if is_network else [None, value]
    with noticing_the_end():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return value if is_first() else rebuilt(*box)


def rebuilt(kind, sent):
    """The value that `from_first` sent. kind: the class of a network, of which `sent` has the attributes, or None."""
    if kind is None:
        return sent
    net = kind.__new__(kind)
    vars(net).update(sent)
    return net


def on_cpu(net):
    """A network on the CPU, in place, with the tensors that its parameters carry."""
    for parameter in net.cpu().parameters():
        for name, value in vars(parameter).items():
            setattr(parameter, name, value.cpu())
    return net


def start_alike(net):
    """Give a network the weights that it has in the first process, in place."""
    if count() == 1:
        return
    import torch

    with torch.no_grad():
        for tensor, wanted in zip(tensors_of(net), from_first(lambda: [x.cpu() for x in tensors_of(net)])):
            tensor.copy_(wanted)


def tensors_of(net):
    """The parameters and buffers of a network, as tensors without gradient."""
    return [tensor.detach() for tensor in (*net.parameters(), *net.buffers())]


def check_alike(net):
    """Raise ValueError unless a network has the same parameters in all processes, bit for bit."""
    if count() == 1:
        return
    digest = hashlib.sha256()
    for parameter in net.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    if len(set(exchange(digest.hexdigest()))) > 1:
        raise ValueError("the weights differ between the processes, start all of them on processors of one kind")


def average_gradients(parameters, samples):
    """Make every gradient that over the samples of all processes, in place; nothing in a run of one.

    samples: number of samples of this process's part, of which its gradients are means. A parameter without gradient
    here counts as one with gradient 0, unless no process has one.
    """
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    parameters = list(parameters)
    has = [parameter.grad is not None for parameter in parameters]
    values = [(p.grad if p.grad is not None else torch.zeros_like(p)).detach().flatten() for p in parameters]
    extra = values[0].new_tensor([1.0, *has])  # the samples and, for each parameter, in how many processes it has one
    flat = torch.cat([*values, extra]) * samples
    with noticing_the_end():
        dist.all_reduce(flat)
    *values, extra = flat.split([*(p.numel() for p in parameters), len(extra)])
    anywhere = [True] * len(parameters) if all(has) else (extra[1:] > 0).tolist()
    for parameter, value, is_there in zip(parameters, values, anywhere):
        if is_there:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad.copy_((value / extra[0]).view_as(parameter))


def average_buffers(net):
    """Make the buffers of a network, such as BatchNorm's statistics, the means over all processes, in place."""
    if count() == 1:
        return
    import torch.distributed as dist

    for buffer in net.buffers():
        if buffer.is_floating_point():
            with noticing_the_end():
                dist.all_reduce(buffer)
            buffer /= count()


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def shares(loader):
    """The loader with this process's part of every batch; `--batch_size` is the size of the whole batch.

    Parts differ by one sample at most. Every process computes all of a batch with fewer samples than processes, which
    gives the same gradient. The loader itself in a run of one.
    """
    return loader if count() == 1 else inside(loader, Shares)


def own_batches(loader):
    """The loader with every `count()`-th of its batches, as they are: this process's number is that of the first."""
    return loader if count() == 1 else inside(loader, OwnBatches)


def numbered(batches):
    """Yield `number, batch` for the batches of `own_batches`, with their numbers among all."""
    return ((rank() + count() * k, batch) for k, batch in enumerate(batches))


def inside(loader, split):
    """A loader, or a copy of a wrapper with an attribute `loader`, with `split` applied to the innermost loader."""
    if not hasattr(loader, "loader"):
        return split(loader)
    wrapper = copy.copy(loader)
    wrapper.loader = inside(loader.loader, split)
    return wrapper


class Shares:
    """A loader whose batches are this process's parts of the batches of another.

    Where that is a torch DataLoader over a Dataset, each process reads only its own samples. The batches are those that
    the first process draws. A list is taken to be the same everywhere. From anything else, such as a stream, the first
    process reads and sends batches.
    """

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)  # a TypeError for a loader without a length, as from the loader itself

    def __iter__(self):
        from torch.utils.data import DataLoader, IterableDataset

        loader = self.loader
        is_map = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if is_map and loader.batch_sampler is not None:
            batches, seed = from_first(lambda: drawn(loader))
            self.seed_others(seed)
            return iter(self.reader(batches, seed))
        return iter(self.of_batches(loader if isinstance(loader, (list, tuple)) else sent_batches(loader)))

    def seed_others(self, seed):
        """Let every process but the first draw other random numbers in this pass, for augmentations."""
        from runtime.device import seed_everything

        if not is_first():
            seed_everything(seed + rank())

    def of_indices(self, batches):
        """This process's part of a list of batches, each a list of indices."""
        return [batch[part_of(len(batch))] for batch in batches]

    def of_batches(self, batches):
        """This process's part of batches with data."""
        return (cut(batch, size, part_of(size)) for batch in batches for size in [size_of(batch)])

    def reader(self, batches, seed):
        """A DataLoader like the own one that reads this process's part of a list of batches."""
        import torch

        like, workers = self.loader, self.loader.num_workers
        with_workers = {"prefetch_factor": like.prefetch_factor} if workers else {}
        return torch.utils.data.DataLoader(
            like.dataset,
            batch_sampler=self.of_indices(batches),
            num_workers=workers,
            collate_fn=like.collate_fn,
            pin_memory=like.pin_memory,
            timeout=like.timeout,
            worker_init_fn=like.worker_init_fn,
            multiprocessing_context=like.multiprocessing_context,
            generator=torch.Generator().manual_seed(seed + rank()),  # other numbers in the workers, too
            **with_workers,
        )


class OwnBatches(Shares):
    """A loader with every `count()`-th batch of another, read as in Shares."""

    def __len__(self):
        return len(range(rank(), len(self.loader), count()))

    def seed_others(self, seed):
        """Measuring draws no random numbers."""

    def of_indices(self, batches):
        return batches[rank() :: count()]

    def of_batches(self, batches):
        return (batch for number, batch in enumerate(batches) if number % count() == rank())


def drawn(loader):
    """`batches, seed`: the indices of all batches of a DataLoader's next pass, and a seed, drawn in its own order."""
    import torch

    seed = torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item()
    return [list(batch) for batch in loader.batch_sampler], seed % 2**31  # NumPy takes seeds below 2**32


def sent_batches(loader):
    """The batches that the first process reads, in all processes."""
    batches = iter(loader) if is_first() else None
    while (batch := from_first(lambda: next(batches, None))) is not None:
        yield batch


def part_of(size):
    """The slice of this process's part of a batch; the whole batch if it is smaller than the number of processes."""
    if size < count():
        return slice(size)
    return slice(rank() * size // count(), (rank() + 1) * size // count())


def size_of(value):
    """The number of samples of a batch, the length of the first tensor in it; 0 without one."""
    if hasattr(value, "shape"):
        return len(value) if len(value.shape) else 0
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((size for size in map(size_of, parts) if size), 0)


def cut(value, size, part):
    """A part of a batch of `size` samples: of its tensors, and of lists with an entry for each sample."""
    if hasattr(value, "shape"):
        return value[part] if len(value.shape) and len(value) == size else value
    if isinstance(value, Mapping):
        return {name: cut(each, size, part) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        if len(value) == size and not any(hasattr(each, "shape") for each in value):
            return value[part]
        return tuple(cut(each, size, part) for each in value)
    return value
