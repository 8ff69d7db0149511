"""Finetune a converted network on its own spikes: forward as on the chip, backward through time or through the ANN.

    snn = finetune_spikes(snn, loader, device, epochs=5, teacher=net, qnet=qnet)           # no labels
    snn = finetune_spikes(snn, train_loader, device, epochs=2, criterion=..., qnet=qnet)   # with labels

The training error includes every loss caused by T timesteps and b-bit weights, premature and late spikes too. There are
two gradients:

- "time": through every timestep, with a surrogate for the derivative of a spike (`SpikesThroughTime`; Neftci et al.,
  Surrogate Gradient Learning in Spiking Neural Networks, IEEE Signal Processing Magazine 2019). It takes the times of
  the spikes into account and costs as much as T forward and backward passes of the ANN.
- "tandem": through the ANN, evaluated on spike rates. Each layer reads the decoded rates of the spiking layers before
  it, and the decoded rate of its own neurons replaces its activation. The gradient is that of clip(activation, 0,
  lambda) (Wu et al., A Tandem Learning Rule for Effective Training and Rapid Inference of Deep Spiking Neural Networks,
  TNNLS 2021). It costs one simulation and one backward pass of the ANN.

Weights stay integers in the unit of their neuron, and thresholds do not change. Initial potentials are learnt through
time. (A rate does not tell them from a bias, so "tandem" leaves them as they are.)
"""

import copy
import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from conversion.units import LARGEST_INTEGER
from options import FLOAT_BITS, SpikeFinetuneOptions, check_option
from quantization import (
    QuantAdam,
    distillation_loss,
    groups_of,
    largest_integer,
    quantize_layer,
    round_layer,
)
from runtime.batches import (
    count_batches,
    first_output,
    labelled_batch,
    loader_for,
    loss_of,
    on_device,
    reusable,
    split_batch,
)
from runtime.processes import average_gradients, from_first
from runtime.progress import Progress
from spike_dag import one_or_all
from spike_simulator import Stages, bound_currents, cut, each_part, run_ops
from spike_tensor import Memory, SpikeTensor

CALIBRATION_BATCH = 32  # calibration images per step; small, because many steps must come from few images
LR_TIMES_T = 0.03  # learning rate without labels, times T; relative to the RMS of a layer's weights
LR_WITH_LABELS = 0.02  # learning rate with labels, times sqrt(T): 0.01 at T = 4, 0.005 at T = 16
MOST_THROUGH_TIME = 4  # timesteps; at T = 8 the tandem gradient gave resnet20 the same accuracy in half the time
MOST_UNROLLED = {"cpu": 128, "cuda": 512}  # images times timesteps in one backward pass, which bounds its memory
WIDE = 288  # inputs of a neuron, those of 32 channels at 3x3, up to which a layer learns at the full rate
START_SHARE = 0.1  # of the rate of weights, for initial potentials: at the full rate they gained nothing
HELD_OUT = 10  # every tenth batch of the calibration images tells whether epochs without labels helped
INTERVAL = 0.49  # distance from an integer, in integer steps; just below 1/2, so that it surely rounds to the integer
SPIKES_TEMPERATURE = 2.0  # divides the class scores of teacher and student, which softens their distributions


def finetune_spikes(
    snn,
    loader,
    device,
    epochs,
    *,
    lr=None,
    criterion=None,
    teacher=None,
    features=1.0,
    qnet=None,
    gradient=None,
    progress=None,
):
    """A copy of a converted network with weights and biases finetuned for `epochs` passes over `loader`.

    loader: batches that `batches.split_batch` accepts. Frozen parameters do not change.
    criterion: loss between the outputs and the labels of `loader`, or None to train without labels.
    teacher: the ANN whose outputs and (with weight `features`) activations are targets, or None.
    lr: learning rate, relative to the RMS of a layer's weights; it falls to 0 along a cosine.
    gradient: "time", which learns initial potentials too, or "tandem"; by default "time" up to `MOST_THROUGH_TIME`.
    qnet: the quantized network that was converted, for `shadow_weights`. The returned copy has full-precision weights
    too, so it can be the `qnet` of another call. progress: a `runtime.progress.Progress`, or None for a plain one.

    Raises ValueError for values out of range, if neither criterion nor teacher is given, for a network that is not
    converted or entirely frozen, for a qnet with other layers, and for a loss that is not finite.
    """
    epochs, lr = check_option("spike_epochs", epochs), check_option("spike_lr", lr)
    check_trains(snn, criterion, teacher)
    gradient = check_option("spike_gradient", gradient) or ("time" if snn.timesteps <= MOST_THROUGH_TIME else "tandem")
    snn = learning_copy(snn, qnet, device, gradient)
    teacher = None if teacher is None else copy.deepcopy(teacher).to(device, torch.float32).eval()
    loader = reusable(loader_for(snn, loader))
    lr = default_lr(snn.timesteps, criterion is not None) if lr is None else lr
    how = {"forward": GRADIENTS[gradient], "criterion": criterion, "teacher": teacher, "features": features}
    run_epochs(snn, loader, device, epochs, lr, how, progress or Progress())
    return finished(snn)


def check_trains(snn, criterion, teacher):
    """Raise ValueError for a network without spikes, or without anything to learn from."""
    if not snn.neurons():
        raise ValueError("the network has no spikes to finetune on, convert it first (trans_ann2snn_weight)")
    if criterion is None and teacher is None:
        raise ValueError("finetuning on spikes needs a criterion, for labels, or a teacher")


def learning_copy(snn, qnet, device, gradient):
    """A copy of a converted network with `shadow_weights` and, for the gradient "time", initial potentials to learn.

    Raises ValueError if every layer is frozen.
    """
    snn = copy.deepcopy(snn).to(device).eval()
    if not any(layer.trained_parameters() for layer in shadow_weights(snn, qnet)):
        raise ValueError("every layer of the network is frozen (requires_grad=False), unfreeze what is to be finetuned")
    for neuron in snn.neurons().values():
        if gradient == "time":
            neuron.learn_start()
    return snn


def finished(snn):
    """The network after training: the initial potentials are integers alone, and the bounds of the currents fit."""
    for neuron in snn.neurons().values():
        neuron.start_share = None
    bound_currents(snn)
    return snn


def run_epochs(snn, loader, device, epochs, lr, how, progress):
    """Train shadow weights, and the initial potentials if they learn, and set integers at every step.

    how: keywords of `total_loss`. Raises ValueError if the loss or a parameter is not finite.
    """
    layers, part_size = list(snn.weighted_layers().values()), images_per_pass(how["forward"], snn.timesteps, device)
    starts = [neuron.start_share for neuron in snn.neurons().values() if neuron.start_share is not None]
    of_starts = [{"params": starts, "lr": START_SHARE * lr}] if starts else []  # a share of Vthr
    groups = groups_of(layers, lr) if how["criterion"] is not None else groups_by_width(layers, lr)
    optimizer = QuantAdam([*groups, *of_starts])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * count_batches(loader)))
    stage = "spike_epochs_unlabelled" if how["criterion"] is None else "spike_epochs"
    for epoch in progress.epochs(stage, epochs, snn, optimizer, schedule):
        for batch in progress.batches(loader, f"finetune spikes, epoch {epoch}"):
            inputs, targets = batch_of(batch, device, how["criterion"] is not None)
            optimizer.zero_grad()
            for part, labels in parts_of(inputs, targets, part_size):
                loss, outputs = total_loss(snn, part, labels, **how)
                if not torch.isfinite(loss):
                    raise ValueError(f"finetuning on spikes diverged in epoch {epoch}, lower its learning rate")
                (loss * (len(part[0]) / len(inputs[0]))).backward()
                progress.count(loss, len(part[0]), outputs, labels)
            average_gradients((p for group in optimizer.param_groups for p in group["params"]), len(inputs[0]))
            optimizer.step()
            schedule.step()
            set_integers(layers)
            for neuron in snn.neurons().values():
                neuron.set_start()
        progress.check_samples()
    if not all(torch.isfinite(p).all() for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"finetuning on spikes diverged in epoch {epochs}, lower its learning rate")


def groups_by_width(layers, lr):
    """As `groups_of`, with a lower rate for layers with many inputs.

    Adam moves every weight by about the same, so that the sum of N weighted inputs moves by sqrt(N) times as much as a
    weight, relative to its size. On a few images without labels the wide layers of a VGG then forget what they knew.
    """
    shares = [min(1.0, (WIDE / layer.rows(layer.weight).shape[1]) ** 0.5) for layer in layers]
    return [group for layer, share in zip(layers, shares) for group in groups_of([layer], lr * share)]


def images_per_pass(forward, timesteps, device):
    """The most images per backward pass; a batch has one optimizer step all the same. forward: one of `GRADIENTS`."""
    if forward is not forward_through_time:
        return sys.maxsize
    return max(1, MOST_UNROLLED[torch.device(device).type] // timesteps)


def batch_of(batch, device, with_labels):
    """`inputs, labels` of a batch on a device; labels is None unless `with_labels`."""
    return labelled_batch(batch, device) if with_labels else (on_device(split_batch(batch)[0], device), None)


def parts_of(inputs, targets, size):
    """Split a batch into pairs `inputs, labels` of at most `size` samples."""
    parts = list(zip(*(x.split(size) for x in inputs)))
    return zip(parts, [None] * len(parts) if targets is None else targets.split(size))


def default_lr(timesteps, with_labels):
    """The default learning rate, relative to the RMS of a layer's weights.

    It falls with T, because more timesteps leave less to gain. With labels it is larger, because thousands of steps on
    all training images allow more than training on a few images.
    """
    return LR_WITH_LABELS / timesteps**0.5 if with_labels else LR_TIMES_T / timesteps


def finetune_on_spikes(snn, qnet, ann, train_loader, calibration_loader, criterion, device, args, progress=None):
    """The converted network after epochs on the ANN's outputs alone, then epochs on labels and the ANN's outputs.

    args: a namespace with the fields of `options.SpikeFinetuneOptions`, and calibration_samples. progress: as of
    `finetune_spikes`, which raises the same errors.
    """
    options = SpikeFinetuneOptions.of(args)
    how = {"lr": options.spike_lr, "teacher": ann, "gradient": options.spike_gradient, "progress": progress}
    if options.spike_epochs_unlabelled:
        few = from_first(lambda: first_images(loader_for(snn, calibration_loader), args.calibration_samples))
        kept_out, learnt_from = few[HELD_OUT - 1 :: HELD_OUT], [b for i, b in enumerate(few, 1) if i % HELD_OUT]
        trained = finetune_spikes(snn, learnt_from, device, options.spike_epochs_unlabelled, qnet=qnet, **how)
        if from_first(lambda: is_nearer(trained, snn, ann, kept_out, device)):
            snn = qnet = trained
    if options.spike_epochs:
        snn = finetune_spikes(snn, train_loader, device, options.spike_epochs, criterion=criterion, qnet=qnet, **how)
    return snn


def is_nearer(trained, snn, ann, batches, device):
    """Whether training brought the outputs nearer to the ANN's on images held out; if not, says so on stderr.

    batches: as of `first_images`; without any there is nothing to compare, and the trained network counts as nearer.
    """
    if not batches:
        return True
    before, after = (distance(each, ann, batches, device) for each in (snn, trained))
    if after <= before:
        return True
    print(
        "epochs without labels: the outputs for images held out moved away from the float network's "
        f"({before:.3g} to {after:.3g}), the network stays as it was converted",
        file=sys.stderr,
    )
    return False


@torch.no_grad()
def distance(snn, ann, batches, device):
    """The mean distillation loss of a converted network's outputs against the ANN's."""
    total = samples = 0
    ann = copy.deepcopy(ann).to(device, torch.float32).eval()
    for batch in batches:
        inputs, _ = batch_of(batch, device, False)
        pair = first_output(snn(*inputs)), first_output(ann(*inputs))
        total, samples = total + len(inputs[0]) * distillation_loss(*pair, SPIKES_TEMPERATURE), samples + len(inputs[0])
    return (total / samples).item()


def first_images(loader, samples):
    """The first `samples` images of a loader, in batches of `CALIBRATION_BATCH`."""
    batches, seen = [], 0
    for batch in loader:
        inputs, labels = split_batch(batch)
        few = [x[: samples - seen] for x in inputs]
        batches += parts_of(few, None if labels is None else labels[: samples - seen], CALIBRATION_BATCH)
        seen += len(inputs[0])
        if seen >= samples:
            break
    return batches


def total_loss(snn, inputs, targets, *, forward, criterion, teacher, features):
    """`loss, outputs` of one batch, differentiable in weights and biases. forward: one of `GRADIENTS`."""
    outputs, activations = forward(snn, inputs)
    loss = 0.0 if criterion is None else loss_of(criterion, outputs, targets)
    if teacher is not None:
        with torch.no_grad():
            wanted, known = ann_forward(teacher, inputs)
        pair = first_output(outputs, targets), first_output(wanted, targets)
        loss = loss + distillation_loss(*pair, SPIKES_TEMPERATURE)
        errors = [relative_error(activation, known[name]) for name, activation in activations]
        loss = loss + features * sum(errors) / max(len(errors), 1)
    return loss, outputs


def relative_error(values, wanted):
    """The squared error relative to the mean square of `wanted`."""
    return F.mse_loss(values, wanted) * (wanted.numel() / wanted.norm().square().clamp_min(1e-12))


def ann_forward(dag, inputs):
    """The outputs of an ANN, and op name -> the op's activation."""
    returned = {}

    def watch(name, current, activation):
        returned[name] = activation

    return one_or_all(dag.forward_ann(inputs, watch)), returned


def forward_through_time(snn, inputs):
    """The outputs of a converted network and [(op name, decoded rates)], differentiable through time."""
    stages, values, rates = Stages(snn), dict(zip(snn.inputs_nodes, inputs)), []

    def watch(name, current, spikes):
        if snn.ops[name].op.neuron is not None:
            rates.append((name, spikes.to_float()))

    with learning(snn):
        run_ops(stages.before, values)
        run_ops(stages.between, values, snn.timesteps, Memory(snn.timesteps), watch)
        run_ops(stages.behind, values)
    return one_or_all([values[node] for node in snn.outputs_nodes]), rates


@contextmanager
def learning(snn):
    """Context in which the simulation is differentiable in weights and biases."""
    learners = [*snn.weighted_layers().values(), *snn.neurons().values()]
    for each in learners:
        each.learns = True
    try:
        yield
    finally:
        for each in learners:
            each.learns = False


def tandem_forward(snn, inputs):
    """The exact outputs of a converted network and [(op name, decoded rates)], with the gradients of the ANN."""
    rates, sent = decoded_rates(snn, inputs), []

    def watch(name, current, activation):
        if name not in rates:
            return None
        neuron = snn.ops[name].op.neuron
        value = SentInstead.apply(activation, rates[name], None if neuron is None else neuron.scale_factor)
        sent.append((name, value))
        return value

    return one_or_all(snn.forward_ann(inputs, watch)), sent


GRADIENTS = {"time": forward_through_time, "tandem": tandem_forward}


class SentInstead(torch.autograd.Function):
    """Replaces an activation by decoded rates; the gradient is that of the activation, clamped to lambda if given."""

    @staticmethod
    def forward(ctx, activation, rates, scale):
        if scale is not None:
            ctx.save_for_backward(activation <= scale)
        return rates.view_as(rates)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient, None, None


@torch.no_grad()
def decoded_rates(snn, inputs):
    """Op name -> decoded spikes, in units of activation [B, ...], for neurons and max poolings.

    The batch is split as in `spike_simulator.simulate`; on a CPU each thread simulates its own parts.
    """
    stages = Stages(snn)
    images, _ = cut(snn, inputs, snn.timesteps, stages)

    def work(part):
        values, rates = dict(zip(snn.inputs_nodes, part)), {}

        def watch(name, current, spikes):
            op = snn.ops[name].op
            if isinstance(spikes, SpikeTensor) and (op.neuron is not None or op.selects):
                rates[name] = spikes.to_float()

        run_ops(stages.before, values)
        run_ops(stages.between, values, snn.timesteps, Memory(snn.timesteps), watch)
        return rates

    parts = each_part(work, list(zip(*(x.split(images) for x in inputs))))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def shadow_weights(snn, qnet=None):
    """The layers to train; each weight gets a full-precision shadow, and the value that its integers represent.

    The shadows are those of `qnet`, its full-precision weights (`weight_back`), clamped to the rounding interval of
    their integer. So weights near the edge of their interval change their integer first (as in AdaRound; Nagel et al.,
    ICML 2020). Without `qnet` they are the values that the integers represent, in the middle. Raises ValueError for a
    qnet with other layers.
    """
    layers = list(snn.weighted_layers().values())
    for name, layer in snn.weighted_layers().items():
        if layer.weight_scale is None:  # a layer after the last spikes, never quantized
            layer.set_weight_scale(quantize_layer(layer, layer.weight, layer.weight_bits)[1])
        full = None if qnet is None else full_precision(qnet, name, layer)
        layer.weight.weight_back = layer.weight.detach().clone() if full is None else within_interval(layer, full)
        if layer.spiking and layer.bias_q is not None:
            if layer.bias is None:  # the correction added bias_q
                layer.bias = nn.Parameter(torch.zeros(layer.output_channels, device=layer.weight.device))
                layer.frozen -= {"bias"} if "weight" not in layer.frozen else set()
            layer.bias.copy_(layer.bias_q * layer.per_output_unit())  # includes the correction
    set_integers(layers)
    return layers


def full_precision(qnet, name, layer):
    """The shadow weights of op `name` in a quantized network, or None if it has none.

    layer: the converted layer. Raises ValueError if `qnet` has no such layer of the same shape.
    """
    weight = qnet.ops[name].op.weight if name in qnet.ops else None
    if weight is None or weight.shape != layer.weight.shape:
        raise ValueError(f"the quantized network has no layer {name} of this shape, give the one that was converted")
    shadow = getattr(weight, "weight_back", None)
    return None if shadow is None else shadow.to(layer.weight.device)


def within_interval(layer, full):
    """The weights nearest to `full` that round to the layer's integers; at 32 bits, the layer's own weights.

    At 1 bit, a weight of the wrong sign becomes the value of its integer.
    """
    bits, scale = layer.weight_bits, layer.weight_scale
    if bits == FLOAT_BITS:
        return layer.weight.detach().clone()
    weight_q = round_layer(layer, layer.weight.detach(), scale, bits)
    if bits == 1:
        return torch.where(round_layer(layer, full, scale, bits) == weight_q, full, weight_q / scale)
    largest, endless = largest_integer(bits), torch.inf  # the outermost integers include all larger weights
    low = torch.where(weight_q <= -largest, -endless, weight_q - INTERVAL)
    high = torch.where(weight_q >= largest, endless, weight_q + INTERVAL)
    return (full * scale).clamp(low, high) / scale


@torch.no_grad()
def set_integers(layers):
    """Round the shadows to integers in unchanged units, and set weights to the values of the integers."""
    for layer in layers:
        bits, scale, shadow = layer.weight_bits, layer.weight_scale, layer.weight.weight_back
        weight_q = shadow * scale if bits == FLOAT_BITS else round_layer(layer, shadow, scale, bits)
        layer.weight.copy_(weight_q / scale)
        if not layer.spiking:
            continue
        bias_q = None if layer.bias_q is None else (layer.bias / layer.per_output_unit())
        if bits != FLOAT_BITS:
            weight_q = weight_q.to(torch.int8)
            bias_q = None if bias_q is None else bias_q.round().clamp(-LARGEST_INTEGER, LARGEST_INTEGER).to(torch.int32)
        layer.set_integers(weight_q, bias_q, layer.unit)
