#!/bin/sh
# rockpool 3.1.0 quantizes biases in other units than the weights and thresholds of the same neurons.
#
# global_quantize and channel_quantize turn a trained network into integers for the chip Xylo. A neuron's weights,
# threshold and bias add up in one membrane potential, so all three have to be multiplied by the same factor. Expected:
# both functions keep bias / threshold of every neuron, up to rounding, and leave the arrays that they are given alone.
# global_quantize multiplies the biases of the output neurons by the factor of the hidden ones. channel_quantize only
# rounds the biases of hidden neurons with one synapse each, and puts the integers of the output biases into the
# caller's array, so that a second call starts from them.
# rockpool/transform/quantize_methods.py of the package
#
# Seen: "bias / threshold: hidden 0.25, output 0.25; global_quantize: hidden 0.252, output 1; channel_quantize: hidden
# 0, output 0.252; its given output bias 1 is 64 now". Exit status 1 where that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rockpool==3.1.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
from rockpool.transform.quantize_methods import channel_quantize, global_quantize


def network():  # 2 inputs, 2 hidden neurons, 1 output neuron
    return {
        "weights_in": np.array([[0.5, -0.25], [0.125, 0.5]]),
        "weights_rec": np.zeros((2, 2)),
        "weights_out": np.array([[2.0], [-1.0]]),
        "threshold": np.array([1.0, 1.0]),
        "threshold_out": np.array([4.0]),
        "bias": np.array([0.25, 0.25]),
        "bias_out": np.array([1.0]),
        **{name: np.array([3.0, 3.0]) for name in ("dash_mem", "dash_syn", "dash_syn_2")},
        **{name: np.array([3.0]) for name in ("dash_mem_out", "dash_syn_out")},
    }


def shares(parameters):
    pairs = (("bias", "threshold"), ("bias_out", "threshold_out"))
    return tuple(float(parameters[bias][0] / parameters[threshold][0]) for bias, threshold in pairs)


given = network()
wanted, of_global = shares(network()), shares(global_quantize(**network()))
of_channel = shares(channel_quantize(**given))
words = ["hidden {:.3g}, output {:.3g}".format(*pair) for pair in (wanted, of_global, of_channel)]
print(f"bias / threshold: {words[0]}; global_quantize: {words[1]}; channel_quantize: {words[2]}; ", end="")
print(f"its given output bias {network()['bias_out'][0]:g} is {given['bias_out'][0]:g} now")
is_as_seen = words[1:] == ["hidden 0.252, output 1", "hidden 0, output 0.252"] and given["bias_out"][0] == 64
sys.exit(not is_as_seen)
PYTHON
