"""A converted network as a quantized ANN without timesteps, in the QuantizeLinear form of ONNX.

A neuron that hears all T steps before it fires sends clip(floor((sum of its currents + u[0]) / Vthr), 0, T) spikes.
That is a quantized ReLU of T + 1 levels: the codes of the activations are the spike counts of the network with
--listen T, and the weights and thresholds are the same integers.
"""

import numpy as np
import torch
from onnx import helper

from export.onnx_file import facts_of, sample_inputs, write_graph
from export.onnx_graph import EXACT_IN_FLOAT32, Value
from export.onnx_nodes import pool_maxima
from export.onnx_time import Spiking, largest_potential
from runtime.packages import check_packages
from spike_simulator import simulate
from spike_tensor import SpikeTensor

MOST_IN_PAIR = 2**15  # of two products: where processors add pairs of 8-bit products in 16 bits, more would saturate
MOST_IN_UINT8, MOST_IN_UINT16 = 255, 65535


class QuantizedAnn(Spiking):
    """All spiking layers as an integer ANN on spike counts, [B, ...]."""

    dequantizes = True

    def __init__(self, snn, inputs):
        super().__init__(snn, inputs)
        self.at_rest = currents_at_rest(snn, inputs)

    def begin(self):
        self.timesteps = self.b.constant(float(self.snn.timesteps))

    def end(self):
        """Nothing is left to do behind the last layer."""

    def pass_maxima(self, entry, counts):
        """The largest count; `or` and `gate` agree on spikes without gaps."""
        return Value(pool_maxima(self.b, entry.op, counts), self.probe.shapes[entry.out])

    def steps(self):
        return []

    def count(self, node, value):
        self.counts[node] = value.name

    def between(self, entry):
        values = [self.values[node] for node in entry.inputs]
        with self.b.into(self.head):
            read = [
                value if value.constant else Value(self.decoded(value.name, node), value.shape, True)
                for node, value in zip(entry.inputs, values)
            ]
            self.analog(entry, read)

    def fire(self, entry, current):
        """The counts of the neurons: floor(n / Vthr) as the nearest whole number of (n + 1/2) / Vthr - 1/2.

        No quotient of whole numbers n is half way between two, so that all ways to round agree.
        """
        b, neuron, T = self.b, entry.op.neuron, self.snn.timesteps
        self.check(entry, current)
        Vthr, start = neuron.Vthr.double(), neuron.initial_potential.double()
        if current.constant:
            total = b.node("Mul", current.name, self.timesteps)
        else:
            total, start = current.name, start + (T - 1) * self.at_rest[entry.name]
        half = 0.5 if neuron.largest_current is not None else 0.0
        shift = alike(start - Vthr / 2 + half)
        shifted = b.node("Add", total, b.constant(shift))
        axis = {"axis": 1} if Vthr.numel() > 1 else {}
        scale, kind = b.constant(Vthr.flatten() if axis else Vthr.reshape(())), self.code_kind()
        zero = b.constant(np.zeros(Vthr.numel() if axis else (), int), kind)
        below = b.node("Min", shifted, b.constant(T * Vthr))  # of floats, as few runtimes have one of uint16
        codes = b.node("QuantizeLinear", below, scale, zero, **axis)
        return Value(b.node("DequantizeLinear", codes, b.constant(1.0)), current.shape)

    def code_kind(self):
        """The type of counts: uint8, or uint16 where products of uint8 and int8 could saturate."""
        layers = (entry.op for entry in self.snn.ops.values() if entry.op.has_weights and hasattr(entry.op, "weight_q"))
        most = max((int(op.weight_q.abs().max()) for op in layers), default=0)
        T = self.snn.timesteps
        return np.uint8 if T <= MOST_IN_UINT8 and 2 * T * most < MOST_IN_PAIR else np.uint16

    def check(self, entry, current):
        """Raise ValueError, with the layer's name, for neurons whose counts the form cannot hold."""
        neuron, T = entry.op.neuron, self.snn.timesteps
        if neuron.reset_mode != "subtraction":
            raise ValueError(f"{entry.where}: reset to zero needs time, an ANN holds --reset_mode subtraction alone")
        if T > MOST_IN_UINT16:
            raise ValueError(f"{entry.where}: its counts go up to {T}, a quantized ANN holds {MOST_IN_UINT16}")
        if neuron.largest_current is None and not current.constant:
            raise ValueError(f"{entry.where}: floats of the image flow into it beside spikes, an ANN cannot hold that")
        per_step, at_start = largest_potential(entry) if neuron.largest_current is not None else (0, 0)
        if 4 * (per_step * T + at_start) >= EXACT_IN_FLOAT32:  # halves, and a sum of two such numbers, are exact
            raise ValueError(f"{entry.where}: its sums over T={T} steps are rounded in float32, use fewer")
        if neuron.Vthr.numel() > 1 and neuron.Vthr.numel() != len(neuron.Vthr):
            raise ValueError(f"{entry.where}: it has a threshold for every neuron, QuantizeLinear one for each channel")

    def graph(self):
        nodes = [*self.head.nodes, *self.tail.nodes]
        return helper.make_graph(nodes, "ann", self.images(), self.results(), self.head.initializers)


def currents_at_rest(snn, inputs):
    """Op name -> float64 current [1, ...] of every layer of neurons while all layers before are silent."""
    found = {}

    def watch(name, current, value):
        if snn.ops[name].op.neuron is None:
            return None
        found[name] = current.total().double()
        return SpikeTensor.like(torch.zeros_like(value.data), value.timesteps, value.scale_factor)

    with torch.no_grad():
        simulate(snn, inputs, 1, watch=watch)
    return {name: value[0] for name, value in found.items()}


def alike(values):
    """Values of a sample as one for each channel where these are equal."""
    if values.dim() < 2:
        return values
    first = values.flatten(1)[:, :1]
    return first.view(-1, *[1] * (values.dim() - 1)) if (values.flatten(1) == first).all() else values


def write_onnx_ann(snn, path, images=None):
    """Write the quantized ANN of a spiking network as an ONNX file and return a line for the user.

    Its activations are the spike counts of the network with --listen T, whatever the network itself listens. Inputs,
    outputs, arguments and errors as `export.onnx_file.write_onnx`; there is no input T. Networks that reset to zero are
    refused.
    """
    check_packages("--onnx_ann", "onnx")
    written = QuantizedAnn(snn, sample_inputs(snn, images))
    written.write()
    size = write_graph(path, written.graph(), facts_of(snn))
    return f"Save the quantized ANN in {path} ({size:,} bytes), run it as any ONNX file"
