"""From a quantized ANN to a spiking network: integer weights, thresholds and scales.

    snn = trans_ann2snn_weight(qnet, train_val_loader, device, timesteps, weight_bitwidth)

1. `plan_conversion` decides which ops work on spikes, which on currents, which stay ANN, and where neurons stand.
2. `pool_activations` runs calibration images and pools the inputs and outputs of every layer.
3. `SpikeSetter` walks the graph once: unit, integer weights and biases, Vthr and scale of every neuron.
4. `conversion.correction.correct_spikes` shifts biases and initial potentials until the mean rates are the ANN's.

Units: a spike train with scale lambda stands for the activation lambda * mean_t(spike); one unit of membrane
potential stands for `unit` activation. A layer with integer weights W_q = W * s_w reads spikes of scale lambda_in in
the unit lambda_in / s_w, so a neuron that shall reach lambda_out at a spike every step has the threshold
Vthr = lambda_out / unit = lambda_out * s_w / lambda_in.
"""

import copy

from conversion.correction import correct_spikes
from conversion.integers import SpikeSetter
from conversion.options import check_conversion
from conversion.plan import plan_conversion
from conversion.statistics import calibrate, least_error_scales, positive_tops, use_learnt_scales
from dag_rewrites import prepare_conversion
from quantization import as_dag, set_bitwidths
from runtime.batches import first_batch, on_device, reusable, split_batch
from spike_simulator import node_shapes


def trans_ann2snn_weight(
    qnet,
    loader,
    device,
    timesteps,
    weight_bitwidth,
    *,
    reset_mode="subtraction",
    initial_potential=None,
    listen=0,
    threshold="quantile",
    quantile=0.999,
    granularity="layer",
    correction="potential",
    hold_back=0.25,
    per_channel=False,
    maxpool=None,
    signed=None,
    avgpool="spike",
    ann_layers=(),
    calibration_samples=1000,
):
    """The spiking network of a quantized one; `qnet` is not changed. A plain nn.Module is parsed first.

    loader: images without random augmentation, of which the first `calibration_samples` are used; batches as
    `batches.split_batch` takes them, with labels, which are not read, or without. For a network with several inputs, a
    tuple of them stands in the place of the images.
    timesteps: T, steps per image. weight_bitwidth: 1 to 8, one number or one for each layer with weights, or 32 for
    float weights (thresholds then are floats too).
    reset_mode: "subtraction" (u -= Vthr) or "zero" (u = 0). initial_potential: u before the first step as a share of
    Vthr; default 0.5 for subtraction, which halves the expected error (Bu et al., Optimized Potential Initialization,
    AAAI 2022), and 0 for zero. listen: d, steps of input that every layer integrates before its T firing steps; at
    d = T no spike comes too early or too late, and with reset by subtraction the network equals its quantized ANN
    exactly (a skip has to wait as long as the layers beside it). threshold: lambda_out of a layer is the `quantile` of
    its activations ("quantile"; Rueckauer et al., Frontiers in Neuroscience 2017), their maximum ("max"), or the value
    with the least squared error after T spikes ("mse", `least_error_scales`). granularity: one lambda a "layer", or one
    a "channel", whose integer Vthr then differ, and whose spikes the next layer's weights weigh accordingly (weights
    that were finetuned to few bits are then rounded again). correction: mean rates are corrected per channel against
    the ANN by the initial "potential", by the "bias" with the rest in the potential, or not at all ("none";
    `correct_spikes`). hold_back: with a correction and reset by subtraction, the share of Vthr by which potentials
    start lower, which a bias makes up for over the T steps, so that fewer spikes come too early (times 1 - d / T with
    `listen`: at d = T none do).
    per_channel: the weights have a scale per output channel. maxpool: "gate" or "or" (`SpikeMaxPool2d`). signed: "pair"
    splits values without a ReLU by sign (`split_signs`). avgpool: an average pooling of spikes has a neuron and a Vthr
    of its own ("spike"), or is folded into the convolution or linear layer behind it ("fold", where it can be,
    `folded_poolings`), without neuron, spikes or rounding. ann_layers: layers that stay ANN, by op name or module path.

    Raises ValueError for values out of range, for layers that cannot be converted (`plan_conversion`), for a network
    that is spiking already, and for numbers that are not finite or leave the integers of a chip, by layer.
    """
    check_conversion(
        timesteps,
        reset_mode,
        listen,
        threshold,
        quantile,
        granularity,
        correction,
        calibration_samples,
        avgpool,
        hold_back,
        initial_potential,
    )
    timesteps, listen, calibration_samples = int(timesteps), int(listen), int(calibration_samples)  # also of NumPy's
    if initial_potential is None:
        initial_potential = 0.5 if reset_mode == "subtraction" else 0.0
    loader = reusable(loader, calibration_samples)
    qnet = prepare_conversion(as_dag(qnet, loader), maxpool, signed, avgpool).to(device).eval()
    plan = plan_conversion(qnet, ann_layers)
    snn = copy.deepcopy(qnet)
    set_bitwidths(snn, weight_bitwidth)

    def choose_scales(values, channels, count, largest):
        if threshold == "mse":
            return least_error_scales(values, channels, count, timesteps)
        return largest if threshold == "max" else positive_tops(values, channels, count, quantile)

    statistics = calibrate(snn, loader, device, calibration_samples, choose_scales, granularity)
    learnt = use_learnt_scales(snn, statistics)
    for entry in snn.ops.values():
        entry.op.levels = None  # spikes need none
    shapes = node_shapes(snn, *on_device(split_batch(first_batch(loader))[0], device, 1))
    snn.cpu()  # integers are chosen there
    setter = SpikeSetter(snn, plan, statistics, shapes, timesteps, per_channel, reset_mode, initial_potential, learnt)
    setter.convert()
    snn.to(device)
    snn.timesteps = timesteps
    for neuron in snn.neurons().values():
        neuron.listen = listen
    if correction != "none":
        correct_spikes(snn, qnet, loader, device, calibration_samples, correction == "bias", hold_back)
    return snn
