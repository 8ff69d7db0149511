#!/bin/sh
# torch 2.14.1: destroy_process_group does not end a gloo group's threads if an optimizer was made while it existed.
#
# Making the first optimizer imports torch.distributed.nn.functional, ten of whose functions have `group=group.WORLD` as
# a default. Python evaluates it then, so from there on these functions own the group. destroy_process_group takes it
# out of torch's own tables, raises nothing, and the group's threads work on until the process ends. Expected: no thread
# of the group is left, as where the optimizer is made, or torch.distributed.nn imported, before init_process_group.
# It matters at the end of a process: a gloo thread that frees a tensor while Python ends is aborted, and the process
# with it ("terminate called without an active exception"), now and then and after its work is done.
# https://docs.pytorch.org/docs/stable/distributed.html#shutdown
#
# Seen: "optimizer before the group: 0 threads left, after it: 3". Exit status 1 where that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cat > "$folder/left.py" <<'PYTHON'
"""Print how many threads more than before a process has when it has left a group. Linux lists them in /proc."""
import os
import sys

import torch
import torch.distributed as dist


def threads():
    return len(os.listdir("/proc/self/task"))


def make_optimizer():
    torch.optim.SGD([torch.ones(1, requires_grad=True)])


torch.set_num_threads(1)
if sys.argv[1] == "before":
    make_optimizer()
start = threads()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
assert threads() > start
if sys.argv[1] == "after":
    make_optimizer()
dist.destroy_process_group()
assert not dist.is_initialized()
print(threads() - start)
PYTHON
before=$("$folder/venv/bin/python" "$folder/left.py" before)
after=$("$folder/venv/bin/python" "$folder/left.py" after)
echo "optimizer before the group: $before threads left, after it: $after"
test "$before" -eq 0 && test "$after" -gt 0
