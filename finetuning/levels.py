"""Activations of T + 1 levels in the ANN, so that finetuning sees what T timesteps of spikes can say.

    net = quantize_activations(net, loader, device, levels)
    qnet = quantize_finetune(net, ...)         # trains weights and lambdas together
    snn = trans_ann2snn_weight(qnet, ...)      # aims at these lambdas

A neuron that gets the sum of T steps of current, u[0] = Vthr / 2 included, sends clip(floor(a T / lambda + 1/2), 0, T)
spikes if they arrive evenly; so the ANN's ReLU becomes lambda / L * clip(floor(a L / lambda + 1/2), 0, L)
(quantization clip-floor-shift; Bu et al., Optimal ANN-SNN Conversion, ICLR 2022).

Layers whose currents meet in one neuron, as a residual block's do, will share one integer unit: they are finetuned on
the weight scales that follow from it (`ScalesOfConversion`), so that no weight is rounded again afterwards.
"""

import copy

import torch

from conversion.plan import plan_conversion
from conversion.statistics import calibrate, use_learnt_scales
from conversion.units import Units
from options import check_option
from quantization import as_dag
from runtime.batches import reusable
from spike_neurons import ClipFloorShift


def quantize_activations(net, loader, device, levels, ann_layers=(), calibration_samples=1000, granularity="layer"):
    """A copy of `net` in which every op that is to fire returns activations of `levels` steps up to a lambda.

    granularity: one lambda a "layer", or one a "channel". The lambdas start at the least squared error on the first
    `calibration_samples` images of `loader` and are learnt with the weights. Raises ValueError for fewer than 1 level,
    for a converted network, and for what cannot be converted (`plan_conversion`).
    """
    levels = check_option("activation_levels", levels)
    calibration_samples = check_option("calibration_samples", calibration_samples)
    loader = reusable(loader, calibration_samples)
    net = as_dag(net, loader).to(device).eval()

    per_channel = granularity == "channel"
    statistics, shapes = calibrate(net, loader, device, calibration_samples, "mse", levels, per_channel)
    plan = plan_conversion(net, ann_layers)
    for name in plan.firing:
        op, scale = net.ops[name].op, statistics[name].scales
        if scale.max() > 0:  # a layer that is never active stays as it is
            op.levels = ClipFloorShift(levels, scale.clamp_max(op.ceiling or float("inf"))).to(device)
    net.scales_of_conversion = ScalesOfConversion(plan, statistics, shapes, levels)
    return net


class ScalesOfConversion:
    """Called with a network and `per_channel`: op name -> the weight scale that its conversion will have.

    plan, statistics, shapes: what `Units` need to know of the network.
    """

    def __init__(self, plan, statistics, shapes, levels):
        self.plan, self.statistics, self.shapes, self.levels = plan, statistics, shapes, levels

    @torch.no_grad()
    def __call__(self, net, per_channel):
        net = copy.deepcopy(net).cpu()
        use_learnt_scales(net, self.statistics)
        return Units(net, self.plan, self.statistics, self.shapes, self.levels, per_channel).weight_scales()
