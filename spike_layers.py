"""The spiking layers. Each computes its ANN function on plain tensors and its spiking function on spikes.

Layers with weights turn spikes into integer currents, and neurons turn currents into spikes:

    spikes 0/1 --SpikeConv2d, SpikeLinear: integer weights--> Current --SpikeAdd--> Current --IFNeuron--> spikes

Neurons stand in every SpikeReLU that reads currents, and in average poolings and adds of spikes. A folded average
pooling has no neuron: it sends the number of spikes in each window, from 0 to the window's size. The input of the first
layer is the real-valued image, the same at every step, so its current is computed once, in float.

    layers/base.py         SpikeLayer: methods and attributes of every layer
    layers/weighted.py     SpikeConv2d, SpikeConvBN, SpikeConvTranspose2d, SpikeLinear
    layers/pooling.py      SpikeAvgPool2d, SpikeMaxPool2d
    layers/resampling.py   SpikeRepeat, SpikeGather: copies of pixels
    layers/lines.py        layers of one dimension, computed on maps of one row
    layers/activations.py  SpikeReLU, SignedReLU, SpikeBatchNorm, SoftmaxOp
    layers/joining.py      SpikeAdd, ConcatOp, SpikePad, ViewOp
"""

from layers.activations import SignedReLU, SoftmaxOp, SpikeBatchNorm, SpikeReLU
from layers.base import ANALOG, CURRENT, OP_TYPES, SPIKES, SpikeLayer
from layers.joining import ConcatOp, SpikeAdd, SpikePad, ViewOp, concat_scales
from layers.pooling import SpikeAvgPool2d, SpikeMaxPool2d
from layers.resampling import SpikeGather, SpikeRepeat
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
    "SpikeGather",
    "SpikeLayer",
    "SpikeLinear",
    "SpikeMaxPool2d",
    "SpikePad",
    "SpikeReLU",
    "SpikeRepeat",
    "ViewOp",
    "WeightedLayer",
    "concat_scales",
]
