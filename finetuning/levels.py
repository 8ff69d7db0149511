"""Quantize the ANN's activations to L + 1 levels, so that finetuning sees the resolution of L timesteps of spikes.

    net = quantize_activations(net, loader, device, levels)
    qnet = quantize_finetune(net, ...)         # trains weights and lambdas together
    snn = trans_ann2snn_weight(qnet, ...)      # uses these lambdas

A neuron with evenly arriving input of activation a and u[0] = Vthr / 2 sends clip(floor(a T / lambda + 1/2), 0, T)
spikes in T timesteps. The ANN's ReLU therefore becomes lambda / L * clip(floor(a L / lambda + 1/2), 0, L)
(quantization clip-floor-shift; Bu et al., Optimal ANN-SNN Conversion, ICLR 2022).

Layers whose currents meet in one neuron, as in a residual block, share one integer unit after the conversion. Their
weights are finetuned with the scales that follow from this unit (`ScalesOfConversion`), so that the conversion does not
round them again.
"""

import copy

import torch

from conversion.lambdas import mixed_channels
from conversion.plan import plan_conversion
from conversion.statistics import calibrate, use_learnt_scales
from conversion.units import Units
from conversion.windows import stretch_scales, windows_of
from options import TIMESTEPS, check_option
from quantization import as_dag
from runtime.batches import loader_for, reusable
from runtime.ranges import check_number
from spike_neurons import ClipFloorShift


def quantize_activations(net, loader, device, levels, ann_layers=(), calibration_samples=1000, per_channel=False):
    """A copy of `net` in which every op that will fire returns activations in `levels` steps from 0 to lambda.

    per_channel: one lambda per channel instead of one per layer. The initial lambdas minimise the
    squared error on the first `calibration_samples` images of `loader`; finetuning learns them with the weights. Where
    the network itself rounds (`rewrites.roundings`), its own lambda stays; with levels None, its levels stay too, and
    no other op gets any.

    Raises ValueError for fewer than 1 level, for a converted network, and for a network that cannot be converted
    (`plan_conversion`).
    """
    levels = None if levels is None else check_number("activation_levels", levels, TIMESTEPS)
    calibration_samples = check_option("calibration_samples", calibration_samples)
    loader = reusable(loader_for(net, loader), calibration_samples)
    net = as_dag(net, loader).to(device).eval()

    plan = plan_conversion(net, ann_layers)
    own = own_levels(net)
    steps = max(own.values(), default=1) if levels is None else levels
    statistics, shapes = calibrate(net, plan, loader, device, calibration_samples, "mse", steps, per_channel)
    mixed = mixed_channels(net, plan, shapes)
    for name in plan.firing:
        op, scale = net.ops[name].op, statistics[name].scales
        scale = scale.max() if net.ops[name].out in mixed else scale
        if name in own:
            op.levels.levels = own[name] if levels is None else levels
        elif levels is not None and scale.max() > 0:  # a layer that is never active is left unchanged
            op.levels = ClipFloorShift(levels, scale.clamp_max(op.ceiling or float("inf"))).to(device)
    net.scales_of_conversion = ScalesOfConversion(plan, statistics, shapes, steps)
    return net


def own_levels(net):
    """Op name -> number of levels, for every op of a traced network that rounds its activations."""
    return {name: entry.op.levels.levels for name, entry in net.ops.items() if entry.op.levels is not None}


def own_levels_in_words(net):
    """One line on the levels that a traced network was trained with, or None if it does not round."""
    found = own_levels(net).values()
    if not found:
        return None
    several, steps = min(found) < max(found), max(found)
    levels = f"{min(found)} to {steps}" if several else f"{steps}"
    said = f"activations: {levels} levels in {len(found)} layers, the network's own, which are kept"
    return said if several else f"{said}; with --timesteps {steps} --listen {steps} the spikes are these levels"


class ScalesOfConversion:
    """Called with a network and `per_channel`; returns op name -> the weight scale that the conversion will use.

    keep_integers: take the integers of the quantized network, of which a lambda that was learnt since moves the scales;
    without it, scales are chosen anew, for the least error of float weights.
    plan, statistics, shapes, levels: arguments of `Units`.
    """

    def __init__(self, plan, statistics, shapes, levels):
        self.plan, self.statistics, self.shapes, self.levels = plan, statistics, shapes, levels

    @torch.no_grad()
    def __call__(self, net, per_channel, keep_integers=False):
        net = copy.deepcopy(net).cpu()
        use_learnt_scales(net, self.statistics)
        windows = windows_of(net, self.plan, TIMESTEPS.most)
        longest = max(windows.values(), default=1)
        stretch_scales(self.statistics, windows, longest)  # of no effect where all ops have the same levels
        known = net, self.plan, self.statistics, self.shapes, self.levels, per_channel
        return Units(*known, keep_integers).weight_scales()
