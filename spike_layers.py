"""The spiking layers. Each computes its ANN function on plain tensors and its spiking function on spikes.

Layers with weights turn spikes into integer currents, and neurons turn currents into spikes:

    spikes 0/1 --SpikeConv2d, SpikeLinear: integer weights--> Current --SpikeAdd--> Current --IFNeuron--> spikes

Neurons stand in every SpikeReLU that reads currents, and in average poolings and adds of spikes. A folded average
pooling has no neuron: it sends the number of spikes in each window, from 0 to the window's size. The input of the first
layer is the real-valued image, the same at every step, so its current is computed once, in float.

    layers/base.py         SpikeLayer: methods and attributes of every layer
    layers/weighted.py     SpikeConv2d, SpikeConvBN, SpikeConvTranspose2d, SpikeLinear
    layers/pooling.py      SpikeAvgPool2d, SpikeMaxPool2d
    layers/activations.py  SpikeReLU, SpikeBatchNorm, SoftmaxOp
    layers/affine.py       SpikeAffine, SpikeBiasMap, ImageAffine
    layers/signs.py        SignedReLU, LeakyReLUOp, MergeSigns
    layers/functions.py    FunctionOp
    layers/gates.py        GateOp
    layers/joining.py      SpikeAdd, SpikeSubtract, ConcatOp, SpikePad, ViewOp
    layers/rearranging.py  SliceOp, IndexOp, PermuteOp
    layers/resampling.py   SpikeRepeat, SpikeGather: copies of pixels
    layers/lines.py        layers of one dimension, computed on maps of one row
"""

from layers.activations import SoftmaxOp, SpikeBatchNorm, SpikeReLU
from layers.affine import ImageAffine, SpikeAffine, SpikeBiasMap
from layers.base import ANALOG, CURRENT, OP_TYPES, SPIKES, SpikeLayer
from layers.functions import FunctionOp
from layers.gates import GateOp
from layers.joining import ConcatOp, SpikeAdd, SpikePad, SpikeSubtract, ViewOp, concat_scales
from layers.pooling import SpikeAvgPool2d, SpikeMaxPool2d
from layers.rearranging import IndexOp, PermuteOp, SliceOp
from layers.resampling import SpikeGather, SpikeRepeat
from layers.signs import LeakyReLUOp, MergeSigns, SignedReLU
from layers.weighted import SpikeConv2d, SpikeConvBN, SpikeConvTranspose2d, SpikeLinear, WeightedLayer

__all__ = [
    "ANALOG",
    "CURRENT",
    "OP_TYPES",
    "SPIKES",
    "ConcatOp",
    "FunctionOp",
    "GateOp",
    "ImageAffine",
    "IndexOp",
    "LeakyReLUOp",
    "MergeSigns",
    "PermuteOp",
    "SignedReLU",
    "SliceOp",
    "SoftmaxOp",
    "SpikeAdd",
    "SpikeAffine",
    "SpikeAvgPool2d",
    "SpikeBatchNorm",
    "SpikeBiasMap",
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
    "SpikeSubtract",
    "ViewOp",
    "WeightedLayer",
    "concat_scales",
]
