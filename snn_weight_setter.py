"""From a quantised ANN to a spiking network: integer weights, thresholds and scales.

    snn = trans_ann2snn_weight(qnet, train_val_loader, device, timesteps, weight_bitwidth)

1. `plan_conversion` decides which ops work on spikes, which on currents, which stay ANN, and where neurons stand.
2. `pool_activations` runs calibration images and pools the inputs and outputs of every layer.
3. `SpikeSetter` walks the graph once: unit, integer weights and biases, Vthr and scale of every neuron.
4. `spike_correction.correct_spikes` shifts biases and initial potentials until the mean rates are the ANN's.

Units: a spike train with scale lambda stands for the activation lambda * mean_t(spike); one unit of membrane
potential stands for `unit` activation. A layer with integer weights W_q = W * s_w reads spikes of scale lambda_in in
the unit lambda_in / s_w, so a neuron that shall reach lambda_out at a spike every step has the threshold
Vthr = lambda_out / unit = lambda_out * s_w / lambda_in.
"""

import copy
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from batches import batches_of, first_batch, on_device, reusable, split_batch
from dag_rewrites import check_avgpool, is_trained, prepare_conversion, readers, writer
from hw_constraints import Layer, largest_bitwidths
from quantization import (
    FLOAT_BITS,
    as_dag,
    largest_integer,
    list_bitwidths,
    quantize_layer,
    round_layer,
    sampling_stride,
    set_bitwidths,
)
from runtime.ranges import check_option
from spike_correction import correct_spikes
from spike_layers import (
    RESET_MODES,
    ConcatOp,
    IFNeuron,
    SignedReLU,
    SoftmaxOp,
    SpikeAdd,
    SpikeAvgPool2d,
    SpikeBatchNorm,
    SpikeMaxPool2d,
    SpikePad,
    SpikeReLU,
    ViewOp,
    WeightedLayer,
    concat_scales,
)

MOST_SAMPLES = 1_000_000  # pooled elements a layer

# What the value of a node is in the converted network.
ANALOG = "activations"  # of the image, of layers that stay ANN, and behind the last spiking layer
CURRENT = "currents"  # what flows into a neuron
SPIKES = "spikes"

THRESHOLDS = ("quantile", "max", "mse")
GRANULARITIES = ("layer", "channel")
LEAST_SHARE = 1 / 16  # of its layer's lambda that a channel's can be, so that integers beside it stay meaningful
CORRECTIONS = ("potential", "bias", "none")
LARGEST_SUM = 255  # spikes in the window of a folded pooling: what uint8 holds
LARGEST_INTEGER = 2**20  # of thresholds, biases and weights of branches: sums of them stay exact in float32
LARGEST_INT32 = 2**30  # of any integer of a converted network, so that the sum of two does not overflow
LEAST_RATIO = 0.75  # of a branch's value and the unit beside it: below, its integer weight 1 is a third too large
BELOW_A_TIE = 1 - 2**-12  # some 2,000 last bits of a float32
SAME_UNIT = 1 + 1e-5  # per-channel units within this factor are one
SAME_LAMBDA = 1.02  # per-channel lambdas within this factor count as one, so that integer weights stay as they are


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
    """The spiking network of a quantised one; `qnet` is not changed. A plain nn.Module is parsed first.

    loader: images without random augmentation, of which the first `calibration_samples` are used; batches as
    `batches.split_batch` takes them, with labels, which are not read, or without. For a network with several inputs, a
    tuple of them stands in the place of the images.
    timesteps: T, steps per image. weight_bitwidth: 1 to 8, one number or one for each layer with weights, or 32 for
    float weights (thresholds then are floats too).
    reset_mode: "subtraction" (u -= Vthr) or "zero" (u = 0). initial_potential: u before the first step as a share of
    Vthr; default 0.5 for subtraction, which halves the expected error (Bu et al., Optimized Potential Initialization,
    AAAI 2022), and 0 for zero. listen: d, steps of input that every layer integrates before its T firing steps; at
    d = T no spike comes too early or too late, and with reset by subtraction the network equals its quantised ANN
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
        entry["op"].levels = None  # spikes need none
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


def check_conversion(
    timesteps,
    reset_mode="subtraction",
    listen=0,
    threshold="quantile",
    quantile=0.999,
    granularity="layer",
    correction="potential",
    calibration_samples=1000,
    avgpool="spike",
    hold_back=0.25,
    initial_potential=None,
):
    """Raise ValueError for options of `trans_ann2snn_weight` that are out of range."""
    timesteps = check_option("timesteps", timesteps)
    if reset_mode not in RESET_MODES:
        raise ValueError(f"unknown reset mode '{reset_mode}', use one of {', '.join(RESET_MODES)}")
    if check_option("listen", listen) > timesteps:
        raise ValueError(f"listen {listen}: use 0 to {timesteps}, the timesteps")
    if threshold not in THRESHOLDS:
        raise ValueError(f"unknown threshold '{threshold}', use one of {', '.join(THRESHOLDS)}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity '{granularity}', use one of {', '.join(GRANULARITIES)}")
    if correction not in CORRECTIONS:
        raise ValueError(f"unknown correction '{correction}', use one of {', '.join(CORRECTIONS)}")
    check_option("quantile", quantile)
    check_option("hold_back", hold_back, ", a share of Vthr")
    if initial_potential is not None:
        check_option("initial_potential", initial_potential, ", a share of Vthr")
    check_option("calibration_samples", calibration_samples)
    check_avgpool(avgpool)


# ---------------------------------------------------------------------------------------------------------------------
# 1. The plan


@dataclass
class Plan:
    """kinds: node -> ANALOG, CURRENT or SPIKES. firing: names of the ops that get a neuron.

    folded: names of the average poolings of spikes that the layers behind them sum, without a neuron.
    """

    kinds: dict
    firing: list = field(default_factory=list)
    folded: list = field(default_factory=list)


RELUS = (SpikeReLU, SignedReLU)
# what flows into a neuron passes these on the way: each is a weighted sum
LINEAR_OPS = (SpikeAdd, ConcatOp, ViewOp, SpikePad, SpikeBatchNorm, SpikeAvgPool2d)


def plan_conversion(dag, ann_layers=()):
    """Which values become currents and spikes, and which ops fire.

    What stands before the first convolution or linear layer that feeds a ReLU, what stands behind the last neuron
    (pooling, the final linear layer, softmax) and `ann_layers` (op names, module paths or their beginnings) stay ANN.
    Raises ValueError for a convolution without a ReLU behind it, unless it is the network's last layer, for max pooling
    whose mode is not chosen, and for what else cannot be expressed in spikes.
    """
    stays_ann = find_ann_layers(dag, ann_layers)
    feeds_relu, leads_to_relu = look_ahead(dag, stays_ann)
    needs_spikes = look_for_synapses(dag, stays_ann)
    plan = Plan(dict.fromkeys(dag.inputs_nodes, ANALOG))
    for name, entry in dag.ops.items():
        op, (out,) = entry["op"], entry["out_nodes"]
        inputs = [plan.kinds[node] for node in entry["in_nodes"]]
        ahead = feeds_relu[out], leads_to_relu[out]
        if name in stays_ann:
            kind = plan_ann(dag, name, inputs)
        elif is_trained(op):
            kind = plan_weighted(dag, name, inputs[0], *ahead)
        elif isinstance(op, SoftmaxOp):
            kind = plan_softmax(dag, name, inputs, leads_to_relu[out])
        elif isinstance(op, RELUS):
            kind = SPIKES if inputs[0] == CURRENT else inputs[0]
        elif isinstance(op, SpikeMaxPool2d):
            kind = plan_max_pool(dag, name, inputs[0], leads_to_relu[out])
        elif isinstance(op, SpikeBatchNorm):
            kind = plan_batch_norm(dag, name, inputs[0], *ahead)
        elif isinstance(op, SpikeAdd):
            kind = plan_add(dag, name, inputs, *ahead, needs_spikes[out])
        elif isinstance(op, ConcatOp):
            kind = plan_concat(dag, name, inputs, *ahead)
        elif isinstance(op, (SpikeAvgPool2d, SpikePad, ViewOp)):
            kind = plan_pass(inputs[0], leads_to_relu[out])
        else:
            raise NotImplementedError(f"{dag.where(name)}: a {type(op).__name__} cannot be converted")
        plan.kinds[out] = kind
        if kind == SPIKES and fires(op, inputs):
            plan.firing.append(name)
    plan.folded = folded_poolings(dag, plan.kinds)
    plan.firing = [name for name in plan.firing if name not in plan.folded]
    check_outputs(dag, plan)
    if not plan.firing:
        raise ValueError("the network has no convolution or linear layer with a ReLU behind it, nothing can spike")
    return plan


def fires(op, inputs):
    """Whether a neuron stands at an op whose output is spikes."""
    return CURRENT in inputs if isinstance(op, RELUS) else isinstance(op, (SpikeAvgPool2d, SpikeAdd))


def folded_poolings(dag, kinds):
    """Names of the average poolings marked as `folded` that can be; kinds: node -> what its value is (`Plan`).

    Such a pooling reads spikes, and only convolutions and linear layers that make currents read it, through views and
    paddings at most. Its windows do not overlap, so that every weight of the folded kernel is one of the layer's and
    keeps its bit width, and hold at most `LARGEST_SUM` inputs. Any other one keeps its neuron.
    """
    return [
        name
        for name, entry in dag.ops.items()
        if isinstance(entry["op"], SpikeAvgPool2d)
        and entry["op"].folded
        and all(kinds[node] == SPIKES for node in (*entry["in_nodes"], *entry["out_nodes"]))
        and all(step >= size for step, size in zip(entry["op"].stride, entry["op"].kernel_size))
        and entry["op"].window <= LARGEST_SUM
        and feeds_synapses_alone(dag, kinds, entry["out_nodes"][0])
    ]


def feeds_synapses_alone(dag, kinds, node):
    """Whether all that reads a node are layers with trained weights that make currents, or lead to such alone."""
    names = readers(dag, node)
    return bool(names) and node not in dag.outputs_nodes and all(is_synapse(dag, kinds, name) for name in names)


def is_synapse(dag, kinds, name):
    """Whether an op weighs spikes, or hands them on to ops that do."""
    op, (out,) = dag.ops[name]["op"], dag.ops[name]["out_nodes"]
    if is_trained(op):
        return kinds[out] == CURRENT
    passes = isinstance(op, (ViewOp, SpikePad, SpikeReLU)) and kinds[out] == SPIKES
    return passes and feeds_synapses_alone(dag, kinds, out)


def find_ann_layers(dag, names):
    """Names of the ops that `names` (op names, module paths or their beginnings) mean. Raises ValueError for others."""
    found = set()
    for wanted in names:
        paths = {name: entry["path"] for name, entry in dag.ops.items()}
        matches = {n for n, path in paths.items() if n == wanted or path == wanted or path.startswith(wanted + ".")}
        if not matches:
            known = ", ".join(sorted({path for path in paths.values() if path})[:10]) or ", ".join(list(paths)[:10])
            raise ValueError(f"no layer {wanted} to leave as ANN, the network has {known}")
        found |= matches
    return found


def look_ahead(dag, stays_ann=()):
    """Two maps over nodes: whether the value reaches a neuron as a current, and whether any neuron lies behind it."""
    feeds_relu, leads_to_relu = defaultdict(bool), defaultdict(bool)
    for name, entry in reversed(dag.ops.items()):
        (out,), spikes = entry["out_nodes"], name not in stays_ann
        is_relu = spikes and isinstance(entry["op"], RELUS)
        passes = spikes and isinstance(entry["op"], LINEAR_OPS)
        for node in entry["in_nodes"]:
            feeds_relu[node] |= is_relu or (passes and feeds_relu[out])
            leads_to_relu[node] |= is_relu or leads_to_relu[out]
    return feeds_relu, leads_to_relu


def look_for_synapses(dag, stays_ann=()):
    """A map over nodes: whether a convolution or linear layer reads the value, so that it has to be spikes."""
    needs_spikes = defaultdict(bool)
    for name, entry in reversed(dag.ops.items()):
        (out,), op = entry["out_nodes"], entry["op"]
        if name in stays_ann:
            continue
        for node in entry["in_nodes"]:
            passes = isinstance(op, (*LINEAR_OPS, SpikeMaxPool2d))
            needs_spikes[node] |= is_trained(op) or (passes and needs_spikes[out])
    return needs_spikes


def plan_ann(dag, name, inputs):
    """A layer that stays ANN on request: it reads activations, decoded where it has to."""
    if CURRENT in inputs:
        raise ValueError(f"{dag.where(name)} cannot stay ANN alone, name the layer before it up to the ReLU too")
    return ANALOG


def plan_weighted(dag, name, input, feeds_relu, leads_to_relu):
    """A convolution or linear layer: a current for a neuron, or the network's last layer, which stays ANN."""
    where, is_split = dag.where(name), any(isinstance(entry["op"], SignedReLU) for entry in dag.ops.values())
    if input == CURRENT:
        split = "" if is_split else ", or split what it reads by sign (--signed pair)"
        raise ValueError(f"{where} has no ReLU before it: add one{split}")
    if feeds_relu:
        return CURRENT
    if leads_to_relu or (weighted_behind(dag, name) and dag.ops[name]["op"].weight.dim() == 4):
        pool = max_pool_behind(dag, dag.ops[name]["out_nodes"][0])
        if pool is not None:
            raise ValueError(
                f"{where} has no ReLU behind it, and {dag.where(pool)} pools its values, which may be negative: put a "
                "ReLU before the pooling, or next behind it"
            )
        split = "" if is_split else " split its output by sign (--signed pair),"
        raise ValueError(
            f"{where} has no ReLU behind it: add one (only the network's last layer goes without),{split} or leave it "
            "ANN (--ann_layers)"
        )
    return ANALOG


def max_pool_behind(dag, node):
    """Name of a max pooling that values reach without a ReLU, or None: their signs cannot be split before it."""
    for name in readers(dag, node):
        op, (out,) = dag.ops[name]["op"], dag.ops[name]["out_nodes"]
        if isinstance(op, SpikeMaxPool2d):
            return name
        found = max_pool_behind(dag, out) if isinstance(op, LINEAR_OPS) else None
        if found is not None:
            return found
    return None


def hardware_layers(dag, ann_layers=()):
    """The layers of a network as `hw_constraints.Layer`, in order; a folded pooling is part of the layer behind it.

    Raises ValueError, where poolings are to be folded, for a network that cannot be converted (`plan_conversion`).
    """
    stays_ann = find_ann_layers(dag, ann_layers)
    feeds_relu, leads_to_relu = look_ahead(dag, stays_ann)
    layers, from_image, folded = [], set(dag.inputs_nodes), find_folded(dag, ann_layers)
    for name, entry in dag.ops.items():
        op, (out,) = entry["op"], entry["out_nodes"]
        is_first = all(node in from_image for node in entry["in_nodes"])
        if is_first and not isinstance(op, RELUS):
            from_image.add(out)
        if not isinstance(op, WeightedLayer) or op in folded.values():
            continue
        if name in stays_ann:
            role = "last"
        elif isinstance(op, SpikeAvgPool2d):
            role = "pool" if leads_to_relu[out] else "last"
        elif not feeds_relu[out] and not leads_to_relu[out] and not weighted_behind(dag, name):
            role = "last"
        else:
            role = "first" if is_first else "hidden"
        kernel_size = tuple(op.weight.shape[2:]) or (1, 1)
        in_channels = len(op.rows(op.weight)[0]) // (kernel_size[0] * kernel_size[1])
        if entry["in_nodes"][0] in folded:
            kernel_size = folded_kernel_size(kernel_size, op, folded[entry["in_nodes"][0]])
        layers.append(Layer(name, entry["path"], kernel_size, in_channels, role, feeds_relu[out]))
    return layers


def find_folded(dag, ann_layers):
    """Node -> the folded average pooling whose sums it holds, from the pooling to the layers that weigh them."""
    marked = any(isinstance(entry["op"], SpikeAvgPool2d) and entry["op"].folded for entry in dag.ops.values())
    names, found = plan_conversion(dag, ann_layers).folded if marked else (), {}
    for name, entry in dag.ops.items():
        (out,), node = entry["out_nodes"], entry["in_nodes"][0]
        if name in names:
            found[out] = entry["op"]
        elif node in found and not is_trained(entry["op"]):
            found[out] = found[node]
    return found


def folded_kernel_size(kernel_size, layer, pool):
    """Height and width of the kernel that `layer`, of `kernel_size`, and the average pooling before it make."""
    dilations = getattr(layer, "dilation", (1, 1))
    sides = zip(kernel_size, dilations, pool.stride, pool.kernel_size)
    return tuple((k - 1) * dilation * stride + window for k, dilation, stride, window in sides)


def choose_bitwidths(dag, weight_bitwidth, hardware, ann_layers=()):
    """`weight_bitwidth` itself, or for "auto" the largest width of every layer with weights that `hardware` allows."""
    if weight_bitwidth != "auto":
        return weight_bitwidth
    trained = dag.weighted_layers()
    return tuple(largest_bitwidths([x for x in hardware_layers(dag, ann_layers) if x.name in trained], hardware))


def bitwidths_by_name(dag, weight_bitwidth):
    """Op name -> weight bits of every layer with weights. Raises ValueError as `set_bitwidths` does."""
    return dict(zip(dag.weighted_layers(), list_bitwidths(dag, weight_bitwidth)))


def weighted_behind(dag, name):
    """Whether a trained layer reads what op `name` sends, directly or through others."""
    reached = set(dag.ops[name]["out_nodes"])
    for entry in dag.ops.values():
        if reached.isdisjoint(entry["in_nodes"]):
            continue
        if is_trained(entry["op"]):
            return True
        reached.update(entry["out_nodes"])
    return False


def plan_softmax(dag, name, inputs, leads_to_relu):
    """Softmax stays ANN, behind the last layer."""
    if leads_to_relu or CURRENT in inputs:
        raise ValueError(f"{dag.where(name)}: softmax is supported behind the last layer only")
    return ANALOG


def plan_max_pool(dag, name, input, leads_to_relu):
    """Max pooling of spikes in the chosen mode, or of activations."""
    if input == CURRENT:
        raise ValueError(f"{dag.where(name)} pools values that may be negative, put a ReLU before it, or next behind")
    kind = plan_pass(input, leads_to_relu)
    if kind == SPIKES and dag.ops[name]["op"].mode is None:
        raise ValueError(
            f"{dag.where(name)}: choose how spikes are max pooled, --maxpool gate (the largest count passes) or "
            "--maxpool or (any spike passes), or use average pooling in the network"
        )
    return kind


def plan_batch_norm(dag, name, input, feeds_relu, leads_to_relu):
    """A BatchNorm that could not be folded: part of what flows into a neuron, or of what stays ANN."""
    if input == ANALOG or (input == SPIKES and not leads_to_relu):
        return ANALOG
    if feeds_relu:
        return CURRENT
    raise ValueError(
        f"{dag.where(name)}: this BatchNorm cannot be folded into a convolution, put it behind one, or before a ReLU"
    )


def plan_add(dag, name, inputs, feeds_relu, leads_to_relu, needs_spikes):
    """An add of currents and spikes in front of a neuron, of spikes with a neuron of its own, or an ANN add."""
    if set(inputs) == {SPIKES} and (needs_spikes or not feeds_relu):
        return plan_pass(SPIKES, leads_to_relu)
    if CURRENT in inputs or (SPIKES in inputs and feeds_relu):
        return CURRENT
    check_analog(dag, name, inputs, leads_to_relu)
    return ANALOG


def plan_concat(dag, name, inputs, feeds_relu, leads_to_relu):
    """Spikes side by side; with currents among them, currents; or activations."""
    if set(inputs) == {SPIKES}:
        return plan_pass(SPIKES, leads_to_relu)
    if CURRENT in inputs and ANALOG not in inputs and feeds_relu:
        return CURRENT
    check_analog(dag, name, inputs, leads_to_relu)
    return ANALOG


def check_analog(dag, name, inputs, leads_to_relu):
    """Raise ValueError where activations meet spikes or currents that cannot be decoded there."""
    if CURRENT in inputs or (SPIKES in inputs and leads_to_relu):
        images = [holds_image(dag, node) for node in dag.ops[name]["in_nodes"]]
        if any(images):
            others = sorted({kind for kind, image in zip(inputs, images) if not image})
            raise ValueError(
                f"{dag.where(name)} joins the image and {' and '.join(others)}: give the image a convolution and a "
                "ReLU of its own before it"
            )
        raise ValueError(
            f"{dag.where(name)} joins {' and '.join(sorted(set(inputs)))}: put a ReLU behind every layer before it"
        )


def holds_image(dag, node):
    """Whether a node holds the network's input, or what no layer with weights has computed from it."""
    name = writer(dag, node)
    return name is None or (
        not is_trained(dag.ops[name]["op"]) and all(holds_image(dag, read) for read in dag.ops[name]["in_nodes"])
    )


def plan_pass(input, leads_to_relu):
    """An op that keeps the kind of its input; spikes without a neuron behind them are decoded."""
    return ANALOG if input == SPIKES and not leads_to_relu else input


def check_outputs(dag, plan):
    """Raise ValueError where the network returns what flows into a neuron."""
    for node in dag.outputs_nodes:
        if plan.kinds[node] == CURRENT:
            where = dag.where(writer(dag, node))
            raise ValueError(f"{where} is returned by the network and feeds a ReLU too, return what stands behind it")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Statistics


@dataclass
class LayerStatistics:
    """Of one layer's pooled activations: `max_i`, the largest of its inputs, and `max_o`, the scale of its outputs.

    scales: max_o of every channel, [C, 1, 1] ([N] behind a linear layer), or of the layer, a scalar. square_o: the mean
    square of its outputs.
    """

    max_i: float
    max_o: float
    scales: torch.Tensor
    square_o: float


def calibrate(dag, loader, device, samples, choose_scales, granularity="layer"):
    """Op name -> LayerStatistics, from the first `samples` images of `loader`.

    choose_scales(values [N], channels [N], C, largest [C]) gives the scale of every channel, [C]; largest: of all
    activations, of which the values are a sample.
    """
    with pool_activations(dag, samples, granularity == "channel") as (input_pool, output_pool):
        run_samples(dag, loader, device, samples)
        statistics = {}
        for name, pool in output_pool.items():
            outputs = pool.values()
            if not torch.isfinite(outputs).all():
                raise ValueError(f"{dag.where(name)} has NaN or infinite activations, train the network again")
            channels, largest = torch.zeros_like(outputs, dtype=torch.long), pool.largest
            max_o = choose_scales(outputs, channels, 1, largest.max().reshape(1)).squeeze()
            scales = max_o
            if granularity == "channel":
                scales = choose_scales(outputs, pool.channels(), pool.count, largest)
                scales = torch.where(scales > 0, scales, max_o).clamp_min(LEAST_SHARE * max_o)
                scales = scales.view(-1, *[1] * (pool.dim - 2))
            square_o = outputs.double().square().mean().item()
            statistics[name] = LayerStatistics(input_pool[name].largest, max_o.item(), scales.cpu(), square_o)
        return statistics


def use_learnt_scales(snn, statistics):
    """Where activations were quantised in finetuning, lambda_out is what was learnt; returns whether any were.

    Each op keeps its own, also where a concatenation joins them.
    """
    levels = {name: entry["op"].levels for name, entry in snn.ops.items() if entry["op"].levels is not None}
    for name, each in levels.items():
        learnt = each.scale.detach().abs().cpu()
        statistics[name].max_o = learnt.max().item()
        statistics[name].scales = learnt if learnt.dim() else learnt.reshape(1)
    return bool(levels)


@torch.no_grad()
def node_shapes(dag, *inputs):
    """Node -> the shape of one sample, without the batch."""
    values = dict(zip(dag.inputs_nodes, inputs))
    for entry in dag.ops.values():
        values[entry["out_nodes"][0]] = entry["op"](*[values[node] for node in entry["in_nodes"]])
    return {node: tuple(value.shape[1:]) for node, value in values.items()}


@torch.no_grad()
def run_samples(dag, loader, device, samples):
    """Forward the first `samples` images. Raises ValueError where there are none."""
    done = 0
    for batch in batches_of(tqdm(loader, "calibrate", leave=False, delay=1)):
        inputs = on_device(split_batch(batch)[0], device, samples - done)
        dag(*inputs)
        done += len(inputs[0])
        if done >= samples:
            break
    if not done:
        raise ValueError("no images to calibrate on, the data loader is empty")


class Pool:
    """Evenly spaced elements, at most `most`, of the activations of `samples` images.

    with_channels: whether the channel of each is known, too. count, dim: channels, and dimensions, of the tensors that
    they are taken from. largest: the largest of every channel, [C], of all elements.
    """

    def __init__(self, most, samples, with_channels=False):
        self.most, self.samples, self.with_channels = most, samples, with_channels
        self.parts, self.seen, self.stride = [], 0, None
        self.channel_parts, self.count, self.dim, self.largest = [], 1, 0, None

    def add(self, values):
        """Take every `stride`-th element of one more batch [B, C, ...], counted over all batches."""
        size = values[0].numel()
        self.stride = self.stride or sampling_stride(size * self.samples, self.most, size)
        first, self.count, self.dim = -self.seen % self.stride, values.shape[1], values.dim()
        largest = values.amax([d for d in range(values.dim()) if d != 1])  # [C]
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.parts.append(in_memory_order(values)[first :: self.stride].clone())
        self.seen += values.numel()
        if self.with_channels:
            place = torch.arange(first, values.numel(), self.stride)
            run = 1 if is_channels_last(values) else values[0, 0].numel()  # elements of a channel that lie side by side
            self.channel_parts.append((place // run % self.count).to(torch.int32))

    def values(self):
        """The sample, [N]."""
        return torch.cat(self.parts)

    def channels(self):
        """The channel of every element of the sample, [N]."""
        return torch.cat(self.channel_parts).to(self.parts[0].device, torch.long)


class Largest:
    """The largest value of all that was added: one number, where a sample of it would be as large as the outputs'."""

    def __init__(self):
        self.largest = float("-inf")

    def add(self, values):
        """One more batch [B, ...]."""
        self.largest = max(self.largest, values.max().item())


def is_channels_last(values):
    """Whether the channels of a pixel lie side by side in memory."""
    return values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last)


def in_memory_order(values):
    """A tensor as [N], without a copy where it lies in memory without gaps."""
    return (values.permute(0, 2, 3, 1) if is_channels_last(values) else values).reshape(-1)


@contextmanager
def pool_activations(dag, samples, with_channels=False):
    """`input_pool, output_pool`: op name -> Largest, and Pool, filled by the forward passes in the `with`."""
    input_pool, output_pool = ({}, {})
    layers = {n: e["op"] for n, e in dag.ops.items() if not isinstance(e["op"], (ViewOp, ConcatOp, SoftmaxOp))}
    try:
        for name, layer in layers.items():
            input_pool[name] = Largest()
            output_pool[name] = Pool(MOST_SAMPLES, samples, with_channels)
            warp_spike_layer(layer, input_pool[name], output_pool[name])
        yield input_pool, output_pool
    finally:
        for layer in layers.values():
            unwarp_spike_layer(layer)


def warp_spike_layer(layer, input_pool, output_pool):
    """Make `layer.forward` pool its first input and its output; the original is kept as `layer.old_forward`."""
    layer.old_forward = layer.forward

    def forward(*inputs):
        output = layer.old_forward(*inputs)
        input_pool.add(inputs[0])
        output_pool.add(output)
        return output

    layer.forward = forward


def unwarp_spike_layer(layer):
    """Undo `warp_spike_layer`."""
    if "old_forward" in vars(layer):
        del layer.forward, layer.old_forward


def top(values, quantile):
    """A quantile of values [N]."""
    rank = min(len(values), max(1, round(quantile * len(values))))
    return values.kthvalue(rank).values.item()


def positive_top(values, quantile):
    """The same, of the positive values alone where it would be 0: a layer that is seldom active."""
    highest = top(values, quantile)
    is_seldom_active = highest <= 0 and (values > 0).any()
    return top(values[values > 0], quantile) if is_seldom_active else highest


def positive_tops(values, channels, count, quantile):
    """`positive_top` of the values [N] of every channel: [C]; 0 for a channel without values."""
    sizes = channels.bincount(minlength=count).tolist()
    parts = values[channels.argsort(stable=True)].split(sizes) if count > 1 else (values,)
    return torch.tensor([positive_top(part, quantile) if len(part) else 0.0 for part in parts], device=values.device)


def least_error_scales(values, channels, count, timesteps, most=200_000):
    """The lambda of every channel, [C], for which T spikes say best what its activations are.

    values, channels: [N]. Least mean squared error between the activations and clip(round(a T / lambda), 0, T)
    lambda / T, what a neuron with the initial potential Vthr / 2 sends on even input; among 64 shares of the channel's
    maximum, on the first `most` values.
    """
    values, channels = values[:most].clamp_min(0), channels[:most]
    largest = values.new_zeros(count).scatter_reduce_(0, channels, values, "amax")
    least, best = torch.full_like(largest, torch.inf), largest
    for share in torch.logspace(-1.5, 0, 64).tolist():
        steps = (share * largest / timesteps).clamp_min(1e-30)
        step = steps[channels]
        decoded = (values / step).round_().clamp_max_(timesteps).mul_(step)
        error = torch.zeros_like(largest).index_add_(0, channels, decoded.sub_(values).square_())
        best = torch.where(error < least, share * largest, best)
        least = torch.minimum(error, least)
    return best


# ---------------------------------------------------------------------------------------------------------------------
# 3. Integer weights, thresholds, scales


class SpikeSetter:
    """Turns the layers of a planned graph into spiking ones, in one walk along the graph.

    scales: node of spikes -> lambda. units: node of currents -> unit. Both are scalar tensors or broadcastable to a
    sample ([C, 1, 1]). largest: node of currents -> bound of |current| per step, None where currents are not integers.
    All of them, and the network, are on the CPU.
    targets: node of spikes -> the lambda its neuron aims at, before Vthr is rounded. peaks: node of spikes -> the most
    that it holds at a step: 1, or behind a folded pooling the size of its window; `scales` and `targets` are of one.
    keep_integers: the weights were finetuned on the scales that they will have (`weight_scales`).
    """

    def __init__(
        self,
        dag,
        plan,
        statistics,
        shapes,
        timesteps,
        per_channel,
        reset_mode="subtraction",
        initial_potential=0.5,
        keep_integers=False,
    ):
        self.dag, self.plan, self.statistics, self.shapes = dag, plan, statistics, shapes
        self.timesteps, self.per_channel = timesteps, per_channel
        self.reset_mode, self.initial_potential, self.keep_integers = reset_mode, initial_potential, keep_integers
        self.bits = max(layer.weight_bits for layer in dag.weighted_layers().values())  # where no layer gives them
        self.is_float = self.bits == FLOAT_BITS
        self.most = 1 if self.is_float else largest_integer(self.bits)
        self.peaks = self.largest_spikes()
        self.targets = {node: target / self.peaks[node] for node, target in self.spike_targets().items()}
        self.components = self.current_components()
        self.scales, self.units, self.largest = {}, {}, {}

    def convert(self):
        """Walk the graph once, in order."""
        setters = {
            SpikeReLU: self.set_relu,
            SignedReLU: self.set_relu,
            SpikeAvgPool2d: self.set_avg_pool,
            SpikeMaxPool2d: self.set_same,
            SpikeBatchNorm: self.set_batch_norm,
            SpikeAdd: self.set_add,
            ConcatOp: self.set_concat,
            SpikePad: self.set_same,
            ViewOp: self.set_view,
        }
        for name, entry in self.dag.ops.items():
            op, (out,) = entry["op"], entry["out_nodes"]
            if isinstance(op, SpikeAvgPool2d):
                op.folded = name in self.plan.folded
            if self.plan.kinds[out] not in (CURRENT, SPIKES):
                continue
            op.spiking = True
            setter = setters.get(type(op), self.set_weight)
            setter(name, op, entry["in_nodes"], out)

    # lambda_out

    def largest_spikes(self):
        """Node of spikes -> the most that one sample holds there at a step (`peaks`)."""
        peaks = {}
        for name, entry in self.dag.ops.items():
            (out,), op = entry["out_nodes"], entry["op"]
            if self.plan.kinds[out] != SPIKES:
                continue
            passed = 1 if name in self.plan.firing else max(peaks[node] for node in entry["in_nodes"])
            peaks[out] = op.window if name in self.plan.folded else passed
        return peaks

    def spike_targets(self):
        """Node of spikes -> the lambda to aim at, a tensor; spikes that a concatenation joins share the largest.

        Where channels have lambdas of their own they keep them. A ReLU with a ceiling never aims above it, for its
        neuron has to stop there.
        """
        if any(self.statistics[name].scales.dim() for name in self.plan.firing):
            return self.channel_targets()
        targets, groups, ceilings = {}, Groups(), {}
        for name, entry in self.dag.ops.items():
            (out,) = entry["out_nodes"]
            if self.plan.kinds[out] != SPIKES:
                continue
            if name in self.plan.firing:
                targets[out] = torch.tensor(self.statistics[name].max_o)
            else:
                groups.join(out, *entry["in_nodes"])
            ceilings[out] = getattr(entry["op"], "ceiling", None) or float("inf")
        for members in groups.members():
            shared = torch.stack([targets[node] for node in members if node in targets] or [torch.zeros(())]).max()
            targets.update(dict.fromkeys(members, shared))
        return {node: target.clamp_max(ceilings[node]) for node, target in targets.items()}

    def channel_targets(self):
        """Node of spikes -> the lambdas to aim at, by channel, in the shape of a sample: [C, 1, 1] or [N]."""
        targets = {}
        for name, entry in self.dag.ops.items():
            (out,), op, inputs = entry["out_nodes"], entry["op"], [targets.get(node) for node in entry["in_nodes"]]
            if self.plan.kinds[out] != SPIKES:
                continue
            if name in self.plan.firing:
                targets[out] = self.statistics[name].scales.clamp_max(getattr(op, "ceiling", None) or float("inf"))
            elif isinstance(op, ConcatOp):
                shapes = [self.shapes[node] for node in entry["in_nodes"]]
                targets[out] = concat_scales(inputs, shapes, 0) if op.dim == 1 else torch.stack(inputs).amax(0)
            elif isinstance(op, ViewOp):
                spread = inputs[0].expand(self.shapes[entry["in_nodes"][0]]).reshape(self.shapes[out])
                targets[out] = spread.amax((1, 2), keepdim=True) if spread.dim() == 3 else spread
            else:
                targets[out] = inputs[0]
        return targets

    def input_scales(self, node, op):
        """lambda of the spikes that a layer reads: one number, or one per input channel where they differ.

        What a later op sends is not known yet; it counts as the lambda that it aims at.
        """
        scale = self.expected_value(node).float()
        if scale.numel() == 1:
            return scale.squeeze()
        if not self.is_float and scale.max() <= SAME_LAMBDA * scale.min():
            return scale.mean()
        full = scale.expand(self.shapes[node])
        if op.spatial and scale.numel() > len(full):  # several lambdas within a channel
            return scale.mean()
        return (full if not op.spatial else full[:, 0, 0]).contiguous()

    # unit

    def current_components(self):
        """Node of currents -> all nodes of currents that adds join, and that so share a unit."""
        groups = Groups()
        for entry in self.dag.ops.values():
            (out,), op = entry["out_nodes"], entry["op"]
            if self.plan.kinds[out] == CURRENT and (is_trained(op) or isinstance(op, SpikeAdd)):
                groups.join(out, *(n for n in entry["in_nodes"] if isinstance(op, SpikeAdd) and self.shares_unit(n)))
        return {node: set(members) for members in groups.members() for node in members}

    def shares_unit(self, node):
        """Whether the currents of a node can take any unit: those of a layer with weights, or of an add, can."""
        name = writer(self.dag, node)
        if name is None or self.plan.kinds[node] != CURRENT:
            return False
        op = self.dag.ops[name]["op"]
        return is_trained(op) or isinstance(op, SpikeAdd)

    def unit_of(self, node):
        """Activation per unit of membrane for a current; the branches of a neuron share it.

        A branch with weights W and input scale lambda_in has the natural unit lambda_in / s_w, in which its integers
        fill their bit width; of several branches `least_error_unit` chooses. Spikes, and currents with a unit of their
        own, that are added without weights get integer weights; alone, one in which the strongest gets the largest
        integer. A current that comes only from the image has the unit T: input / T per step, Vthr = lambda_out / T. No
        unit is so fine that a threshold, bias or weight leaves the exact integers.
        """
        if node in self.units:
            return self.units[node]
        layers, others = self.branches_of(node)
        if layers:
            natural = torch.stack(torch.broadcast_tensors(*[self.natural_unit(*layer) for layer in layers]))
            unit = natural.amax(0)
            if len(layers) + len(others) > 1 and not self.is_float:
                unit = self.least_error_unit(natural, layers, others)
        elif others:
            unit = self.spike_sum_unit([self.expected_value(n) for n in others])
        else:
            unit = torch.tensor(float(self.timesteps))
        if layers and not self.is_float:
            unit = torch.maximum(unit, self.largest_value(node, layers, others) / LARGEST_INTEGER)
        self.units.update(dict.fromkeys(self.components[node], unit))
        return unit

    def branches_of(self, node):
        """What flows into a current: (layer, the spikes it reads) of weighted layers, and nodes without weights."""
        layers, others, members = [], [], self.components[node]
        for entry in self.dag.ops.values():
            op, in_nodes = entry["op"], entry["in_nodes"]
            if entry["out_nodes"][0] not in members:
                continue
            if isinstance(op, SpikeAdd):
                others += [n for n in in_nodes if n not in members and self.plan.kinds[n] != ANALOG]
            elif self.plan.kinds[in_nodes[0]] == SPIKES:
                layers.append((op, in_nodes[0]))
        return layers, others

    def natural_unit(self, op, node):
        """The unit in which the integers of a layer fill their bit width.

        Where the spikes of its input channels differ, the integers weigh them too, and are chosen anew; but those that
        were finetuned for these spikes stay as they are.
        """
        lambda_in = self.input_scales(node, op)
        if lambda_in.dim() and not self.keep_integers:
            weight = op.weight.detach() * op.input_view(lambda_in)
            return op.output_view(1 / op.per_output(quantize_layer(op, weight, op.weight_bits, self.per_channel)[1]))
        _, s_w = self.integers(op)
        per_weight = op.input_view(lambda_in) / s_w  # what an integer of each weight stands for
        if not per_weight.dim():
            return per_weight
        unit = op.rows(per_weight.expand_as(op.weight)).mean(1)  # [C_out]
        return op.output_view(unit if unit.max() > SAME_UNIT * unit.min() else unit.mean())

    def least_error_unit(self, natural, layers, others):
        """The unit with the least squared error of a neuron's current, between the coarsest and the finest natural one.

        In the coarsest the integers of the finer branches are small, so their weights are rounded again; in a finer one
        the largest weights of the coarser branches are cut off. The error of a weight counts as much as the mean square
        of what it reads; so does that of the whole weight which each of `others`, spikes without weights, gets.
        """
        coarsest, finest = natural.amax(0), natural.amin(0)
        values = [(value, node) for node in others if (value := self.expected_value(node)) is not None]
        shares = torch.logspace(0, (finest / coarsest).min().log2().item(), 9, base=2.0).tolist()
        candidates = [coarsest * share for share in shares]
        for value, _ in values[:1]:
            wholes = (value.max() / coarsest.max()).floor().clamp_min(1)
            candidates += [coarsest * (value.max() / (wholes + k) / coarsest.max()) for k in (0, 1)]
        if values:
            candidates.append(self.unit_within(coarsest, [value for value, _ in values]))
        errors = torch.stack([self.unit_error(unit, layers, values) for unit in candidates])  # [candidates, C_out]
        power = sum(op.weight.detach().square().mean() * self.mean_square(node) for op, node in layers)
        errors[0] = 0.999 * errors[0] - 1e-9 * power  # integers stay where nothing but float32's last bits is gained
        if not coarsest.dim():
            errors = errors.sum(1, keepdim=True)
        best = torch.stack([unit.flatten() for unit in candidates]).gather(0, errors.argmin(0, keepdim=True))
        return best.view(coarsest.shape)

    @staticmethod
    def unit_within(unit, values):
        """The coarsest unit up to `unit` of which every value is at least one whole, so that none has to be refused.

        A value of 0, of a channel that no image excites, can have any.
        """
        for value in values:
            value = torch.where(value > 0, value, torch.inf)
            if unit.dim() == value.dim():
                unit = torch.minimum(unit, value.amin((1, 2), keepdim=True) if value.dim() == 3 else value)
            else:
                unit = unit.clamp_max(value.min())
        return unit

    def unit_error(self, unit, layers, values):
        """Mean squared error of the current in a unit, for every output channel: [C_out]."""
        total = 0.0
        for op, node in layers:
            weight = op.weight.detach()
            per_weight = op.weight_view(unit.flatten() if unit.dim() else unit)
            per_weight = per_weight / op.input_view(self.input_scales(node, op))
            rounded = round_layer(op, weight / per_weight, 1.0, op.weight_bits) * per_weight
            total = total + op.rows((rounded - weight).square()).sum(1) * self.mean_square(node)
        for value, node in values:
            ratio = value / unit
            gain_error = (ratio.round().clamp_min(1) / ratio - 1).square()
            gain_error = gain_error * self.mean_square(node)
            gain_error = torch.where(ratio < LEAST_RATIO, torch.inf, gain_error)  # `branch_weight` refuses it
            gain_error = torch.where(ratio > 0, gain_error, 0.0)  # of what no image excites
            gain_error = gain_error.amax((1, 2)) if gain_error.dim() == 3 else gain_error
            total = total + gain_error
        return total

    def mean_square(self, node):
        """The mean square of the activations of a node."""
        name = writer(self.dag, node)
        while name not in self.statistics:  # what a concatenation, a view holds: of its first input
            name = writer(self.dag, self.dag.ops[name]["in_nodes"][0])
        return self.statistics[name].square_o

    def largest_value(self, node, layers, others):
        """The largest threshold, bias or branch at a current's neuron, in units of activation."""
        members = self.components[node]
        values = [value.max() for value in map(self.expected_value, others) if value is not None]
        for entry in self.dag.ops.values():
            (out,), op = entry["out_nodes"], entry["op"]
            if out in self.targets and not members.isdisjoint(entry["in_nodes"]):
                values.append(self.targets[out].max())
            if out in members and getattr(op, "bias", None) is not None:
                values.append(op.bias.detach().abs().max())
        return torch.stack([value.float() for value in values] or [torch.zeros(())]).max()

    def expected_value(self, node):
        """As `value_of`; for spikes of a later op the lambda that it aims at, for its currents None."""
        if node in self.scales or node in self.units:
            return self.value_of(node)
        return self.targets.get(node)

    def value_of(self, node):
        """The activation that a spike, or a unit of current, stands for."""
        return self.scales[node] if self.plan.kinds[node] == SPIKES else self.units[node]

    def integers(self, op):
        """`W_q, s_w` of a layer: as it was quantised, else (other bit width, not quantised yet) quantised now."""
        weight = op.weight.detach()
        if op.weight_scale is not None:
            weight_q = round_layer(op, weight, op.weight_scale, op.weight_bits)
            if torch.allclose(weight_q / op.weight_scale, weight, rtol=1e-5, atol=0):
                return weight_q, op.weight_scale
        return quantize_layer(op, weight, op.weight_bits, self.per_channel)

    def rounded(self, name, value, least=None):
        """An integer, but for float weights. Raises ValueError where it is out of range (`check_range`)."""
        self.check_range(name, value)
        if self.is_float:
            return value
        value = value.round().to(torch.int32)
        return value if least is None else value.clamp_min(least)

    def check_range(self, name, value):
        """Raise ValueError for a bias, a threshold or a scale of op `name` that is not finite, or is too large."""
        largest = value.abs().max().item()
        if not largest <= (torch.finfo(torch.float32).max if self.is_float else LARGEST_INT32):  # NaN is not either
            raise ValueError(
                f"{self.dag.where(name)} needs a threshold or a bias of {largest:.3g}, beyond the integers of a chip: "
                "its weights or biases are of very different sizes, or not finite, train the network again"
            )

    def largest_of(self, op, in_nodes):
        """The bound of |current| per step that an op sends, None where real numbers flow."""
        largest = self.largest_read(in_nodes)
        return None if largest is None else op.largest_sum(largest)

    def largest_read(self, in_nodes):
        """The bounds of what an op reads at a step, 1 for spikes; None where it reads real numbers."""
        largest = [None if self.plan.kinds[node] == ANALOG else self.largest.get(node, 1) for node in in_nodes]
        return None if self.is_float or None in largest else largest

    # layers

    def set_weight(self, name, op, in_nodes, out):
        """Integer weights and biases of a convolution or linear layer, in the unit of its neuron."""
        unit = self.unit_of(out)
        if not torch.isfinite(op.weight).all():
            raise ValueError(f"{self.dag.where(name)} has NaN or infinite weights, train the network again")
        unit_per_output = unit.flatten() if unit.dim() else unit  # [C_out] or a scalar
        from_image = self.plan.kinds[in_nodes[0]] == ANALOG
        if from_image:
            weight_q, scale = self.integers(op)
            op.weight.data = weight_q / scale  # the image's current is computed with these
        else:
            scale = self.scale_in_unit(op, in_nodes[0], unit)
            weight_q = round_layer(op, op.weight.detach() * scale, 1.0, op.weight_bits)
        op.set_weight_scale(scale)
        bias_q = None if op.bias is None else op.bias.detach() / unit_per_output
        if not self.is_float:
            weight_q = weight_q.to(torch.int8)
            bias_q = None if bias_q is None or from_image else self.rounded(name, bias_q)
        op.set_integers(weight_q, bias_q, op.output_view(unit_per_output))
        op.largest_input = self.peaks.get(in_nodes[0], 1)
        self.largest[out] = self.largest_of(op, in_nodes)

    def scale_in_unit(self, op, node, unit):
        """s_w of a layer that reads the spikes of a node: a spike's value over that of one integer step."""
        per_input = op.input_view(self.input_scales(node, op))
        return per_input / op.weight_view(unit.flatten() if unit.dim() else unit)

    def weight_scales(self):
        """Op name -> s_w that the conversion will give the layers that read spikes."""
        return {
            name: self.scale_in_unit(entry["op"], entry["in_nodes"][0], self.unit_of(entry["out_nodes"][0]))
            for name, entry in self.dag.ops.items()
            if is_trained(entry["op"])
            and self.plan.kinds[entry["in_nodes"][0]] == SPIKES
            and self.plan.kinds[entry["out_nodes"][0]] == CURRENT
        }

    def set_avg_pool(self, name, op, in_nodes, out):
        """Average pooling: ones, s_w = k*k. Spikes get a neuron with a threshold of its own, currents are summed.

        Folded, it sums spikes for the layers behind it, whose weights then weigh units of lambda / (k*k).
        """
        (node,) = in_nodes
        unit = self.value_of(node) / op.window
        op.set_integers(torch.ones_like(op.weight, dtype=torch.int8), None, unit)
        if op.folded:
            self.scales[out] = unit
        elif self.plan.kinds[node] == SPIKES:
            self.set_neuron(name, op, out, unit, self.largest_of(op, in_nodes))
        else:
            self.units[out] = unit
            self.largest[out] = self.largest_of(op, in_nodes)

    def set_relu(self, name, op, in_nodes, out):
        """A neuron where a current flows into a ReLU; spikes pass."""
        (node,) = in_nodes
        if name not in self.plan.firing:
            if getattr(op, "ceiling", None) is not None and self.scales[node].max() * self.peaks[node] > op.ceiling:
                raise ValueError(
                    f"{self.dag.where(name)} cuts off spikes of another neuron, put it behind a convolution"
                )
            self.scales[out] = self.scales[node]
            return
        unit = self.units[node]
        if isinstance(op, SignedReLU) and unit.dim():
            unit = unit.repeat_interleave(2, 0)
        self.set_neuron(name, op, out, unit, self.largest[node])

    def set_batch_norm(self, name, op, in_nodes, out):
        """BatchNorm of currents: its size goes into the unit, its sign becomes the weight, the shift a bias.

        Spikes get an integer weight as large as the threshold behind it needs, up to that of the bit width. A channel
        with next to no weight only has its bias.
        """
        (node,), spatial = in_nodes, [1] * (len(self.shapes[out]) - 1)
        weight, bias = op.weight.detach().view(-1, *spatial), op.bias.detach().view(-1, *spatial)
        size = weight.abs()
        silent = size <= 1e-4 * size.max()
        size = torch.where(silent, size.max().clamp_min(1e-30), size)
        reference = max(self.statistics[name].max_o, 1e-30)
        unit = self.value_of(node) * size
        largest_read = self.largest_read(in_nodes)
        if largest_read is not None:
            # a channel that stays far below one threshold even with all that can flow in sends what its bias alone does
            finest = max(reference, bias.abs().max().item()) / LARGEST_INTEGER
            silent = silent | (unit * largest_read[0] < finest)
            unit = torch.where(silent, unit.clamp_min(finest), unit)
        wanted = (self.most * unit / reference).ceil().clamp(1, self.most)
        integer = torch.ones_like(wanted) if self.is_float else wanted
        unit = unit / integer
        weight_q = torch.where(silent, 0.0, weight.sign()) * integer
        bias_q = bias / unit if largest_read is None else self.rounded(name, bias / unit)
        op.set_integers(weight_q if self.is_float else weight_q.to(torch.int32), bias_q)
        self.units[out] = unit
        self.largest[out] = self.largest_of(op, in_nodes)

    def set_add(self, name, op, in_nodes, out):
        """Integer weights for the inputs that have another unit; a neuron where no ReLU follows."""
        fires = name in self.plan.firing
        unit = self.spike_sum_unit([self.scales[n] for n in in_nodes]) if fires else self.unit_of(out)
        weights = []
        for node in in_nodes:
            weight = None
            if self.plan.kinds[node] == ANALOG:
                weight = 1 / unit
            elif self.plan.kinds[node] == SPIKES or node not in self.components[out]:
                weight = self.branch_weight(name, node, unit)
            weights.append(weight)
        op.set_branch_weights(weights)
        largest = self.largest_of(op, in_nodes)
        if fires:
            self.set_neuron(name, op, out, unit, largest)
        else:
            self.largest[out] = largest

    def branch_weight(self, name, node, unit):
        """The weight of spikes, or of a current with a unit of its own, at a neuron's add."""
        ratio = self.value_of(node) / unit
        if not self.is_float and ratio.min() < LEAST_RATIO:
            raise ValueError(
                f"{self.dag.where(name)} adds values that are finer than a step of the {self.bits}-bit weights "
                "beside them: use more bits, or put a ReLU behind what it adds"
            )
        return self.rounded(name, ratio, least=1)

    def spike_sum_unit(self, scales):
        """The unit of a sum of spikes alone: the strongest gets the largest integer, at few bits 7, the weakest 1."""
        scales = torch.cat([scale.flatten() for scale in scales])
        if self.is_float:
            return scales.max() / self.most
        unit = scales.max() / max(self.most, 7)  # so that 1 bit can tell one input from another
        weakest = torch.where(scales > 0, scales, scales.max()).min()
        return torch.minimum(unit, weakest.clamp_min(scales.max() / LARGEST_INTEGER))

    def set_concat(self, name, op, in_nodes, out):
        """What is joined keeps its lambda or its unit."""
        values = [self.value_of(node).float() for node in in_nodes]
        if op.dim != 1:
            self.check_same_scale(name, torch.stack([value.max() for value in values]))
        joined = concat_scales(values, [self.shapes[node] for node in in_nodes], op.dim - 1)
        if op.dim != 1 and joined is not values[0]:
            joined = joined.mean()  # of next to equal ones
        if self.plan.kinds[out] == SPIKES:
            self.scales[out] = joined
            return
        self.units[out] = joined
        self.largest[out] = self.largest_of(op, in_nodes)

    def set_view(self, name, op, in_nodes, out):
        """The same values in another shape."""
        (node,) = in_nodes
        value = self.value_of(node)
        if value.dim():
            value = value.expand(self.shapes[node]).reshape(self.shapes[out])
            if value.dim() == 3:
                self.check_same_scale(name, (value.flatten(1) / value.flatten(1).mean(1, keepdim=True)).flatten())
                value = value.mean((1, 2), keepdim=True)
        self.pass_on(node, out, value)

    def check_same_scale(self, name, values):
        """Raise ValueError where one channel would hold spikes that stand for different activations."""
        if values.max() > SAME_LAMBDA * values.min():
            raise ValueError(
                f"{self.dag.where(name)} puts spikes of different scales into one channel, join them as channels "
                "(torch.cat along dim=1), or keep the channels of a view"
            )

    def set_same(self, name, op, in_nodes, out):
        """Spikes or currents of the same value: a padding, a max pooling."""
        self.pass_on(in_nodes[0], out, self.value_of(in_nodes[0]))

    def pass_on(self, node, out, value):
        """`value`, the lambda or unit of `node`, is that of `out` too."""
        if self.plan.kinds[out] == SPIKES:
            self.scales[out] = value
        else:
            self.units[out], self.largest[out] = value, self.largest[node]

    def set_neuron(self, name, op, out, unit, largest):
        """Vthr = lambda_out / unit, as an integer of at least 1, and the lambda_out that the rounded one stands for."""
        target = self.targets[out]
        target = target.squeeze() if target.numel() == 1 else target
        if not target.max() > 0:  # no calibration image excites this layer: aim at the scale of its input
            target = (unit.max() * max(largest or 1, 1)).minimum(unit * LARGEST_INT32)
        if largest is None and (self.reset_mode == "zero" or self.initial_potential in (0, 1)):
            # lambda is an activation that some neuron has: its current would meet the threshold, and the last bit of a
            # float sum decide whether a spike comes now or a step later
            target = target * BELOW_A_TIE
        Vthr = target / unit
        self.check_range(name, Vthr)
        if largest is not None:
            is_cut_off = target >= (getattr(op, "ceiling", None) or float("inf"))
            Vthr = torch.where(is_cut_off, Vthr.floor(), Vthr.round()).clamp_min(1).to(torch.int32)
        initial = Vthr * self.initial_potential
        if largest is not None:
            initial = initial.floor().to(torch.int32)
        op.neuron = IFNeuron(Vthr, Vthr * unit, initial, self.reset_mode, None if largest is None else int(largest))
        self.scales[out] = Vthr * unit


class Groups:
    """Disjoint sets that grow together (union-find)."""

    def __init__(self):
        self.parent = {}

    def find(self, item):
        self.parent.setdefault(item, item)
        while self.parent[item] != item:
            item = self.parent[item]
        return item

    def join(self, first, *others):
        for other in others:
            self.parent[self.find(other)] = self.find(first)
        self.find(first)

    def members(self):
        """The sets, as lists."""
        sets = defaultdict(list)
        for item in self.parent:
            sets[self.find(item)].append(item)
        return list(sets.values())
