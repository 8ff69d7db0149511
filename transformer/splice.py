"""Run a network with another module in place of a stretch of it.

outputs = SplicedNet(net, stretch, dag)(inputs)     # net(inputs), with `dag` computing the stretch
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ann_parser import RECORDING_FUNCTIONS, SHAPE_QUESTIONS, Trace, as_float32, as_tuple, autocast_off
from runtime.device import in_eval_mode
from transformer.stretch import CallCounter, values_in_order


class SplicedNet(nn.Module):
    """`net` with its stretch computed by the module `part`; arguments and outputs are those of `net`.

    The replaced layers of `net` stay in eval mode, also while the rest trains.
    """

    def __init__(self, net, stretch, part):
        super().__init__()
        self.net, self.stretch, self.part = net, stretch, part
        self.freeze_replaced()

    def freeze_replaced(self):
        """Put the replaced layers into eval mode, so that their BatchNorms count no batches."""
        for layer in self.stretch.layers:
            self.net.get_submodule(layer).eval()

    def train(self, mode=True):
        super().train(mode)
        self.freeze_replaced()
        return self

    def forward(self, *args, **kwargs):
        return run_spliced(self.net, self.stretch, self.part, args, kwargs)


@torch.no_grad()
def inputs_of_stretch(net, stretch, part, calls):
    """The inputs that the stretch gets in eval mode, a tuple of tensors for each `args, kwargs` in `calls`."""
    found = []

    def recorded(*inputs):
        found.append(inputs)
        return part(*inputs)

    with in_eval_mode(net), in_eval_mode(part):
        for args, kwargs in calls:
            run_spliced(net, stretch, recorded, args, kwargs)
    return found


def run_spliced(net, stretch, part, args, kwargs):
    """`net(*args, **kwargs)`, with `part(*inputs)` computing the outputs of the stretch."""
    splice = Splice(stretch, part)
    with splice.counter.follow(net), splice:
        output = net(*args, **kwargs)
    if splice.outputs is None:
        raise ValueError(f"the network did not run {stretch}, which it ran when it was traced")
    return output


class Splice(TorchFunctionMode):
    """Replaces the calls of a stretch in a run of the network.

    The call that brings the last missing input makes `part` compute all outputs. A value inside the stretch becomes a
    tensor on the meta device: it has a shape but no values, so that no call outside can read it unnoticed.
    """

    def __init__(self, stretch, part):
        super().__init__()
        self.stretch, self.part, self.counter = stretch, part, CallCounter()
        self.inputs, self.outputs, self.early = {}, None, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in SHAPE_QUESTIONS:
            return function(*args, **kwargs)
        key = self.counter.key(function)
        leaves, spec = tree_flatten((args, kwargs))
        call = self.stretch.calls.get(key)
        if call is None:
            self.check_outside(key, leaves)
            return function(*args, **kwargs)
        self.inputs.update({number: leaves[position] for position, number in call.inputs.items()})
        shape = shape_of_result(function, leaves, spec)
        if self.outputs is None and len(self.inputs) == self.stretch.num_inputs:
            self.compute()
        return shape if call.output is None else self.output(call.output, shape)

    def check_outside(self, key, leaves):
        """Raise ValueError where a call outside the stretch reads a value inside, which it did not when traced."""
        if any(isinstance(x, torch.Tensor) and x.device.type == "meta" for x in leaves):
            raise ValueError(
                f"{key[1]} in {key[0] or 'the forward of the network'} reads a value from inside of {self.stretch}, "
                "which it did not when the network was traced: the path must not change, or name this layer too"
            )

    def compute(self):
        """All outputs, from all inputs."""
        with autocast_off():  # in bfloat16, the currents of spikes would no longer be whole numbers
            outputs = as_tuple(self.part(*map(as_float32, values_in_order(self.inputs))))
        for number, placeholder in self.early.items():
            placeholder.copy_(outputs[number])  # the network holds the placeholder
        self.outputs = [self.early.get(number, value) for number, value in enumerate(outputs)]

    def output(self, number, shape):
        """An output, or a placeholder that gets its values once all inputs are there."""
        if self.outputs is not None:
            return self.outputs[number]
        self.early[number] = torch.empty_like(shape, device=self.inputs[0].device)
        return self.early[number]


@torch.no_grad()
def shape_of_result(function, leaves, spec):
    """The result of a call as a tensor with a shape but without values."""
    leaves = [as_float32(x.to("meta")) if isinstance(x, torch.Tensor) else x for x in leaves]
    args, kwargs = tree_unflatten(leaves, spec)
    return args[0] if function in RECORDING_FUNCTIONS[Trace.record_nothing] else function(*args, **kwargs)
