"""The spiking layers: each computes its ANN function on plain tensors and its spiking function on spikes.

Weighted layers turn spikes into integer currents, neurons turn currents into spikes:

    spikes 0/1 --SpikeConv2d, SpikeLinear: integer weights--> Current --SpikeAdd--> Current --IFNeuron--> spikes

A neuron stands where a ReLU stands (inside SpikeReLU), and behind an average pooling or an add of spikes. A folded
average pooling has none: what it hands on is how many spikes each of its windows holds, 0 to its size.
The first layer's input is a constant current, the real-valued image; its own current is computed once, in float.

    layers/base.py         SpikeLayer: what every layer has, and what is to be said of a new one
    layers/weighted.py     SpikeConv2d, SpikeConvBN, SpikeConvTranspose2d, SpikeLinear
    layers/pooling.py      SpikeAvgPool2d, SpikeMaxPool2d
    layers/activations.py  SpikeReLU, SignedReLU, SpikeBatchNorm, SoftmaxOp
    layers/joining.py      SpikeAdd, ConcatOp, SpikePad, ViewOp
"""

from layers.activations import SignedReLU, SoftmaxOp, SpikeBatchNorm, SpikeReLU
from layers.base import ANALOG, CURRENT, OP_TYPES, SPIKES, SpikeLayer
from layers.joining import ConcatOp, SpikeAdd, SpikePad, ViewOp, concat_scales
from layers.pooling import SpikeAvgPool2d, SpikeMaxPool2d
from layers.weighted import SpikeConv2d, SpikeConvBN, SpikeConvTranspose2d, SpikeLinear, WeightedLayer

__all__ = [
    "ANALOG",
    "CURRENT",
    "OP_TYPES",
    "SPIKES",
    "ConcatOp",
    "SignedReLU",
    "SoftmaxOp",
    "SpikeAdd",
    "SpikeAvgPool2d",
    "SpikeBatchNorm",
    "SpikeConv2d",
    "SpikeConvBN",
    "SpikeConvTranspose2d",
    "SpikeLayer",
    "SpikeLinear",
    "SpikeMaxPool2d",
    "SpikePad",
    "SpikeReLU",
    "ViewOp",
    "WeightedLayer",
    "concat_scales",
]
