"""Layers of one dimension, as in networks of sounds: the layers of two dimensions compute them on maps of one row.

A network's values [B, C, L] are called lines here. The tracer records the map [B, C, 1, L] of a line instead, so that
convolutions, BatchNorms and ReLUs stand next to each other in the graph. A view stands only where something else reads
the line.
"""

from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn

from layers.joining import SpikePad, ViewOp
from layers.pooling import SpikeAvgPool2d, SpikeMaxPool2d, dims_of
from layers.pooling import record_interpolate as pooling_interpolate
from layers.resampling import PADDINGS, record_padding
from layers.weighted import SpikeConv2d, SpikeConvTranspose2d


class Lines:
    """The lines [B, C, L] of a `Trace` whose nodes hold maps [B, C, 1, L].

    ids: of these tensors. maps: node of [B, C, L] -> node of the view to [B, C, 1, L]; flat: the other way round.
    """

    def __init__(self, trace):
        self.trace = trace
        self.ids, self.maps, self.flat = set(), {}, {}

    def note(self, line, node):
        """Note that `node` holds the map of a line."""
        self.trace.names[id(line)] = node
        self.trace.shapes[node] = (line.shape[1], 1, line.shape[2])
        self.trace.kept.append(line)
        self.ids.add(id(line))

    def forget(self, tensor):
        """Note that the node of a tensor has the tensor's own shape."""
        self.ids.discard(id(tensor))

    def map_of(self, line):
        """The map [B, C, 1, L] of a tensor [B, C, L], with its node; a view is recorded if there is none yet."""
        node, above = self.trace.stored_node(line), line.unsqueeze(2)
        if id(line) not in self.ids:
            if node not in self.maps:
                self.trace.record("view", ViewOp(above.shape[1:]), [line], above)
                self.maps[node] = self.trace.stored_node(above)
            node = self.maps[node]
        self.trace.remember(above, node)
        return above

    def flat_node(self, line):
        """The node of shape [B, C, L] of a line; a view is recorded if there is none yet."""
        node = self.trace.stored_node(line)
        if node not in self.flat:
            above = self.map_of(line)
            below = self.trace.record("view", ViewOp(line.shape[1:]), [above], above.squeeze(2))
            self.flat[node] = self.trace.stored_node(below)
        return self.flat[node]

    def nodes_read(self, op, inputs):
        """`nodes, sends_line` of an op: the nodes that it reads, and whether its output is the map of a line."""
        if not op.any_shape or self.ids.isdisjoint(map(id, inputs)):
            return [self.trace.node_of(x) for x in inputs], False
        maps = [self.map_of(x) for x in inputs]
        return [self.trace.stored_node(x) for x in maps], op.activation(*maps).dim() > op.activation(*inputs).dim()

    def along(self, recorder, function, line, *args, **kwargs):
        """Let the recorder of a function of [B, C, H, W] record it for a line; its output, a line."""
        above = recorder(self.trace, function, self.map_of(line), *args, **kwargs)
        below = above.squeeze(2)
        self.note(below, self.trace.stored_node(above))
        return below


def check_line(trace, function, input):
    """Raise NotImplementedError unless the input is [B, C, L]."""
    if input.dim() != 3:
        trace.refuse(function, f"the input must be [B, C, L], not {list(input.shape)}")


def of_maps(function, original):
    """A function of [B, C, H, W] that messages name as the original, of [B, C, L]."""
    return wraps(original)(lambda *args, **kwargs: function(*args, **kwargs))


def beside(first, value):
    """(first, value) for a number, or for a tuple of one; None and () stay."""
    if value is None or value == ():
        return None
    return (first, *value) if isinstance(value, (tuple, list)) else (first, value)


def weight_of_maps(weight):
    """The weight [C_out, C_in, k] of a layer of lines as [C_out, C_in, 1, k]; a parameter stays one."""
    above = weight.detach().unsqueeze(2)
    return nn.Parameter(above, weight.requires_grad) if isinstance(weight, nn.Parameter) else above


def record_conv(trace, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    check_line(trace, function, input)
    trace.refuse_traced_weights(function, weight, bias)
    padding = padding if isinstance(padding, str) else beside(0, padding)
    sizes = beside(1, stride), padding, beside(1, dilation), groups
    conv = of_maps(F.conv2d, function)
    return trace.lines.along(SpikeConv2d.traced, conv, input, weight_of_maps(weight), bias, *sizes)


def record_conv_transpose(
    trace, function, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    check_line(trace, function, input)
    trace.refuse_traced_weights(function, weight, bias)
    sizes = beside(1, stride), beside(0, padding), beside(0, output_padding), groups, beside(1, dilation)
    conv = of_maps(F.conv_transpose2d, function)
    return trace.lines.along(SpikeConvTranspose2d.traced, conv, input, weight_of_maps(weight), bias, *sizes)


def record_avg_pool(trace, function, input, kernel_size, stride=None, padding=0, *options, **named):
    check_line(trace, function, input)
    sizes = beside(1, kernel_size), beside(1, stride), beside(0, padding)
    return trace.lines.along(SpikeAvgPool2d.traced, of_maps(F.avg_pool2d, function), input, *sizes, *options, **named)


def record_max_pool(
    trace, function, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    check_line(trace, function, input)
    sizes = beside(1, kernel_size), beside(1, stride), beside(0, padding), beside(1, dilation)
    return trace.lines.along(SpikeMaxPool2d.traced, of_maps(F.max_pool2d, function), input, *sizes, ceil_mode)


def record_adaptive_avg_pool(trace, function, input, output_size):
    check_line(trace, function, input)
    pool = of_maps(F.adaptive_avg_pool2d, function)
    return trace.lines.along(SpikeAvgPool2d.traced_adaptive, pool, input, beside(1, output_size))


def record_adaptive_max_pool(trace, function, input, output_size, return_indices=False):
    check_line(trace, function, input)
    pool = of_maps(F.adaptive_max_pool2d, function)
    return trace.lines.along(SpikeMaxPool2d.traced_adaptive, pool, input, beside(1, output_size))


def record_interpolate(trace, function, input, size=None, scale_factor=None, mode="nearest", *args, **options):
    """Record an interpolation of lines or maps."""
    record = pooling_interpolate
    if input.dim() != 3:
        return record(trace, function, input, size, scale_factor, mode, *args, **options)
    mode = "bilinear" if mode == "linear" else mode
    return trace.lines.along(record, function, input, beside(1, size), beside(1, scale_factor), mode, *args, **options)


def record_pad(trace, function, input, pad, mode="constant", value=None):
    """Record a padding of lines or maps."""
    is_line = input.dim() == 3 and len(pad) == 2
    if mode in PADDINGS:
        record, options = record_padding, ([*pad, 0, 0] if is_line else [*pad], mode)
    else:
        record, options = SpikePad.traced, (pad, mode, value)
    if is_line:
        return trace.lines.along(record, function, input, *options)
    return record(trace, function, input, *options)


def of_lines_too(recorder):
    """A recorder of a function that takes the same arguments for lines and maps, such as batch_norm."""

    def record(trace, function, input, *args, **kwargs):
        if input.dim() == 3:
            return trace.lines.along(recorder, function, input, *args, **kwargs)
        return recorder(trace, function, input, *args, **kwargs)

    return record


def reduction(recorder):
    """A recorder of a mean, sum or maximum over the length of lines, or over height and width of maps."""

    def record(trace, function, input, dim=None, keepdim=False, **named):
        if input.dim() != 3 or [d % 3 for d in dims_of(named.get("axis", dim))] != [2]:
            return recorder(trace, function, input, dim, keepdim, **named)
        named.pop("axis", None)
        if keepdim:
            return trace.lines.along(recorder, function, input, 3, True, **named)
        reduced = recorder(trace, function, trace.lines.map_of(input), 3, True, **named)  # [B, C, 1, 1]
        return ViewOp.traced(trace, torch.Tensor.flatten, reduced, 1)

    return record
