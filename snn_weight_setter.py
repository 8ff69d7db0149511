"""The conversion of a quantized ANN to a spiking network: integer weights, thresholds and scales.

    snn = trans_ann2snn_weight(qnet, train_val_loader, device, timesteps, weight_bitwidth)

1. `plan_conversion` decides which ops send spikes, which send currents, which stay ANN, and where neurons stand.
2. `calibrate` runs calibration images, pools the activations of every layer, and chooses a lambda for each.
3. `SpikeSetter` walks the graph once and sets units, integer weights and biases, and Vthr and lambda of every neuron.
4. `correct_spikes` shifts biases and initial potentials until the mean decoded activations equal those of the ANN.

Units: a spike train of scale lambda stands for the activation lambda * mean_t(spike). One unit of membrane potential
stands for `unit` activation. A layer with integer weights W_q = W * s_w that reads spikes of scale lambda_in has
currents in the unit lambda_in / s_w. A neuron that fires at every step sends lambda_out, so its threshold is
Vthr = lambda_out / unit = lambda_out * s_w / lambda_in.
"""

import copy

from conversion.correction import correct_spikes
from conversion.integers import SpikeSetter
from conversion.plan import plan_conversion
from conversion.statistics import calibrate, use_learnt_scales
from conversion.windows import listen_to_windows, stretch_scales, windows_of, with_windows
from dag_rewrites import prepare_conversion
from options import ConversionOptions
from quantization import as_dag, set_bitwidths
from runtime.batches import first_inputs, loader_for, reusable


def trans_ann2snn_weight(qnet, loader, device, timesteps, weight_bitwidth, **options):
    """The spiking network of a quantized one, a SpikeDAGModule. `qnet` is not changed; an nn.Module is parsed first.

    loader: images without random augmentation; the first `calibration_samples` are used. Batches are as
    `runtime.batches.split_batch` takes them; labels are not read. For a network with several inputs, a
    tuple of them stands in the place of the images.
    timesteps: T, steps per image. weight_bitwidth: 1 to 8, one number or one for each layer with weights, or 32 for
    float weights (thresholds then are floats too).
    options: fields of `options.ConversionOptions`, where each is explained: reset_mode, initial_potential, listen,
    threshold, correction, hold_back, per_channel, maxpool, signed, avgpool, ann_layers, calibration_samples. Former
    names work too: `quantile` for a number as threshold, `granularity="channel"` for per_channel="spikes", and
    per_channel=True for "weights".

    Methods: thresholds at a quantile (Rueckauer et al., Frontiers in Neuroscience 2017), initial potentials of half a
    threshold (Bu et al., AAAI 2022).

    Raises TypeError for an unknown option. Raises ValueError for option values out of range, for layers that cannot be
    converted (`plan_conversion`), for a network that is already spiking, and for weights, biases or thresholds that are
    not finite or exceed the integers of a chip; the message names the layer.
    """
    return convert(qnet, loader, device, ConversionOptions.from_keywords(timesteps, weight_bitwidth, options))


def convert(qnet, loader, device, options):
    """As `trans_ann2snn_weight`, with all options as one `options.ConversionOptions`."""
    loader = reusable(loader_for(qnet, loader), options.calibration_samples)
    qnet = prepare_conversion(as_dag(qnet, loader), options.maxpool, options.signed, options.avgpool)
    qnet.to(device).eval()
    plan = plan_conversion(qnet, options.ann_layers)
    if options.listens_to_windows and not windows_of(qnet, plan, options.timesteps):
        qnet = with_windows(qnet, loader, device, options)
    snn = copy.deepcopy(qnet)
    set_bitwidths(snn, options.weight_bitwidth)
    shapes = set_integers(snn, plan, loader, device, options)
    qnet.note_sizes(shapes)
    if options.correction != "none":
        # with windows a bias would go on flowing after the input, and no spike is premature
        with_bias = options.correction == "bias" and not options.listens_to_windows
        hold_back = 0.0 if options.listens_to_windows else options.hold_back
        with_weights = options.correction == "weights" and not options.hears_all
        samples = options.calibration_samples
        correct_spikes(snn, qnet, loader, device, samples, with_bias, hold_back, with_weights)
    return snn


def set_integers(snn, plan, loader, device, options):
    """Make the layers of a planned network spiking, in place: statistics first, then integers, Vthr and lambdas.

    Returns node -> shape of one sample, from the calibration.
    """
    threshold = "mse" if options.threshold == "spikes" and options.hears_all else options.threshold
    known = options.calibration_samples, threshold, options.timesteps, options.spikes_per_channel
    statistics, shapes = calibrate(snn, plan, loader, device, *known)
    windows = windows_of(snn, plan, options.timesteps) if options.listens_to_windows else {}
    learnt = use_learnt_scales(snn, statistics) and not (windows and snn.scales_of_conversion is None)
    stretch_scales(statistics, windows, options.timesteps)
    plan.windows = windows
    for name in plan.firing:
        snn.ops[name].op.levels = None  # spikes have levels of their own
    snn.cpu()  # integers are chosen on the CPU
    SpikeSetter(snn, plan, statistics, shapes, options, learnt).convert()
    snn.to(device)
    snn.timesteps = options.timesteps
    if windows:
        listen_to_windows(snn, windows, first_inputs(loader, device, 1))
        return shapes
    for neuron in snn.neurons().values():
        neuron.listen = options.timesteps if options.listens_to_windows else options.listen
    return shapes
