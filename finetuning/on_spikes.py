"""Finetune a converted network on its own spikes: forward what the chip will send, backward through time or the ANN.

    snn = finetune_spikes(snn, loader, device, epochs=5, teacher=net, qnet=qnet)           # no labels
    snn = finetune_spikes(snn, train_loader, device, epochs=2, criterion=..., qnet=qnet)   # with labels

The error that training sees holds everything that T steps of spikes and b bits of weights cost, spikes that come too
early or too late included. Two gradients lead back:

- "time": through every timestep, with a surrogate for that of a spike (`SpikesThroughTime`; Neftci et al., Surrogate
  Gradient Learning in Spiking Neural Networks, IEEE Signal Processing Magazine 2019). It knows when spikes come, for
  the price of T passes of the ANN and back.
- "tandem": every layer of the ANN is evaluated on the decoded rates that the spiking layers before it really send, and
  its own activation is replaced by the rate that its neurons really send; the gradient passes as if the neurons were
  clip(activation, 0, lambda) (Wu et al., A Tandem Learning Rule for Effective Training and Rapid Inference of Deep
  Spiking Neural Networks, TNNLS 2021). It costs one simulation and one backward pass of the ANN.

Weights stay integers in the unit of their neuron, thresholds stay as they are.
"""

import copy
import sys
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

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
    batches_of,
    count_batches,
    first_output,
    labelled_batch,
    loss_of,
    on_device,
    reusable,
    split_batch,
)
from spike_dag import one_or_all
from spike_simulator import Stages, bound_currents, cut, each_part, run_ops
from spike_tensor import Memory, SpikeTensor

BATCH = 32  # calibration images a step
LR_TIMES_T = 0.03  # learning rate times timesteps, without labels; it is a share of a layer's weights
LR_WITH_LABELS = 0.02  # learning rate times the root of the timesteps, with labels: 0.01 at T = 4, 0.005 at T = 16
MOST_THROUGH_TIME = 4  # timesteps; at 8 the tandem gradient gave resnet20 as much, in half the time
MOST_UNROLLED = {"cpu": 128, "cuda": 512}  # images times timesteps that are kept for one backward pass
INTERVAL = 0.49  # of a step on either side of an integer: what surely rounds to it
TEMPERATURE = 2.0  # softens what the teacher's outputs say


def finetune_spikes(
    snn, loader, device, epochs, *, lr=None, criterion=None, teacher=None, features=1.0, qnet=None, gradient=None
):
    """A copy of a converted network whose weights and biases are finetuned for `epochs` passes over `loader`.

    loader: batches as `batches.split_batch` takes them. Frozen parameters are not moved.
    criterion: loss of the outputs against the labels of `loader`, or None. teacher: the ANN, on `device`, whose outputs
    and (times `features`) activations are learnt, without labels.
    lr: how far a step moves the weights and biases of a layer, relative to the RMS of its weights; falls to 0 along a
    cosine. gradient: "time" or "tandem" (above); by default "time" up to `MOST_THROUGH_TIME` timesteps.
    qnet: the quantized network that was converted. Its weights in full precision (`weight_back`) are moved, so that
    those near the edge of their rounding interval take another integer first (as in AdaRound; Nagel et al., ICML 2020).
    Without it weights start in the middle of their intervals. The copy has such weights, and can be the next `qnet`.

    Raises ValueError for values out of range, where neither criterion nor teacher is given, for a network that is not
    converted, for a qnet with other layers, and where the loss is not finite.
    """
    epochs, lr = check_option("spike_epochs", epochs), check_option("spike_lr", lr)
    if not snn.neurons():
        raise ValueError("the network has no spikes to finetune on, convert it first (trans_ann2snn_weight)")
    if criterion is None and teacher is None:
        raise ValueError("finetuning on spikes needs a criterion, for labels, or a teacher")
    gradient = check_option("spike_gradient", gradient) or ("time" if snn.timesteps <= MOST_THROUGH_TIME else "tandem")
    snn = copy.deepcopy(snn).to(device).eval()
    layers = shadow_weights(snn, qnet)
    parameters = [p for layer in layers for p in layer.trained_parameters()]
    if not parameters:
        raise ValueError("every layer of the network is frozen (requires_grad=False), unfreeze what is to be finetuned")
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(device, torch.float32).eval()
    loader = reusable(loader)
    lr = default_lr(snn.timesteps, criterion is not None) if lr is None else lr
    part_size = max(1, MOST_UNROLLED[torch.device(device).type] // snn.timesteps) if gradient == "time" else sys.maxsize
    how = {"forward": GRADIENTS[gradient], "criterion": criterion, "teacher": teacher, "features": features}
    run_epochs(snn, layers, loader, device, epochs, lr, part_size, how)
    if not all(torch.isfinite(p).all() for p in parameters):
        raise ValueError(f"finetuning on spikes diverged in epoch {epochs}, lower its learning rate")
    bound_currents(snn)
    return snn


def run_epochs(snn, layers, loader, device, epochs, lr, part_size, how):
    """Move the shadow weights of `layers`, and set the integers after every step. how: keywords of `total_loss`."""
    optimizer = QuantAdam(groups_of(layers, lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * count_batches(loader)))
    for epoch in range(1, epochs + 1):
        samples = 0
        for batch in batches_of(tqdm(loader, f"finetune spikes, epoch {epoch}", leave=False, delay=1)):
            inputs, targets = batch_of(batch, device, how["criterion"] is not None)
            samples += len(inputs[0])
            optimizer.zero_grad()
            for part, labels in parts_of(inputs, targets, part_size):
                loss = total_loss(snn, part, labels, **how)
                if not torch.isfinite(loss):
                    raise ValueError(f"finetuning on spikes diverged in epoch {epoch}, lower its learning rate")
                (loss * (len(part[0]) / len(inputs[0]))).backward()
            optimizer.step()
            schedule.step()
            set_integers(layers)
        if not samples:
            raise ValueError("no samples to finetune on, the data loader is empty, or runs only once")


def batch_of(batch, device, with_labels):
    """`inputs, labels` of a batch on a device; without a need for labels they are None."""
    return labelled_batch(batch, device) if with_labels else (on_device(split_batch(batch)[0], device), None)


def parts_of(inputs, targets, size):
    """`inputs, labels` of at most `size` samples at a time."""
    parts = list(zip(*(x.split(size) for x in inputs)))
    return zip(parts, [None] * len(parts) if targets is None else targets.split(size))


def default_lr(timesteps, with_labels):
    """The learning rate, a share of the weights: the more timesteps, the less is there to gain.

    Labels and all training images, thousands of steps, allow a larger one than the outputs of the ANN on a few.
    """
    return LR_WITH_LABELS / timesteps**0.5 if with_labels else LR_TIMES_T / timesteps


def finetune_on_spikes(snn, qnet, ann, train_loader, calibration_loader, criterion, device, args):
    """The converted network after epochs on the outputs of `ann` alone, then epochs on both these and labels.

    args: a namespace with the fields of `options.SpikeFinetuneOptions`, and calibration_samples.
    """
    options = SpikeFinetuneOptions.of(args)
    how = {"lr": options.spike_lr, "teacher": ann, "gradient": options.spike_gradient}
    if options.spike_epochs_unlabelled:
        few = first_images(calibration_loader, args.calibration_samples)
        snn = qnet = finetune_spikes(snn, few, device, options.spike_epochs_unlabelled, qnet=qnet, **how)
    if options.spike_epochs:
        snn = finetune_spikes(snn, train_loader, device, options.spike_epochs, criterion=criterion, qnet=qnet, **how)
    return snn


def first_images(loader, samples):
    """The first `samples` images of a loader, in small batches: many steps on few images."""
    batches, seen = [], 0
    for batch in loader:
        inputs, labels = split_batch(batch)
        few = [x[: samples - seen] for x in inputs]
        batches += parts_of(few, None if labels is None else labels[: samples - seen], BATCH)
        seen += len(inputs[0])
        if seen >= samples:
            break
    return batches


def total_loss(snn, inputs, targets, *, forward, criterion, teacher, features):
    """The loss of one batch, with gradients for weights and biases by `forward`, one of `GRADIENTS`."""
    outputs, activations = forward(snn, inputs)
    loss = 0.0 if criterion is None else loss_of(criterion, outputs, targets)
    if teacher is not None:
        with torch.no_grad():
            wanted, known = ann_forward(teacher, inputs)
        loss = loss + distillation_loss(first_output(outputs), first_output(wanted), TEMPERATURE)
        errors = [relative_error(activation, known[name]) for name, activation in activations]
        loss = loss + features * sum(errors) / max(len(errors), 1)
    return loss


def relative_error(values, wanted):
    """The squared error in shares of the square of what is wanted."""
    return F.mse_loss(values, wanted) * (wanted.numel() / wanted.norm().square().clamp_min(1e-12))


def ann_forward(dag, inputs):
    """The outputs of a network that does not spike, and op name -> what the op returns."""
    returned = {}

    def watch(name, current, activation):
        returned[name] = activation

    return one_or_all(dag.forward_ann(inputs, watch)), returned


def forward_through_time(snn, inputs):
    """The outputs of a converted network and [(op name, decoded rates)], as autograd can follow them through time."""
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
    """While it lasts, autograd follows the simulation to weights and biases."""
    learners = [*snn.weighted_layers().values(), *snn.neurons().values()]
    for each in learners:
        each.learns = True
    try:
        yield
    finally:
        for each in learners:
            each.learns = False


def tandem_forward(snn, inputs):
    """The outputs of a converted network, exactly, with the gradients of the ANN, and [(op name, decoded rates)]."""
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
    """The decoded rates, in place of the activation; the gradient passes as if it were clamped to lambda, if given."""

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
    """Op name -> the activation that its spikes stand for, [B, ...], of neurons and of max poolings.

    The batch is cut as in `spike_simulator.simulate`; on a CPU every thread simulates parts of its own.
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
    """The layers to train; each weight gets a shadow in full precision, and what its integers say as its value.

    The shadows are those of `qnet`, moved to the edge of the interval of their integer where they lie beyond it, or
    else what the integers say. Raises ValueError for a qnet with other layers.
    """
    layers = list(snn.weighted_layers().values())
    for name, layer in snn.weighted_layers().items():
        if layer.weight_scale is None:  # behind the last spikes, of a network that was not quantized before
            layer.set_weight_scale(quantize_layer(layer, layer.weight, layer.weight_bits)[1])
        full = None if qnet is None else full_precision(qnet, name, layer)
        layer.weight.weight_back = layer.weight.detach().clone() if full is None else within_interval(layer, full)
        if layer.spiking and layer.bias_q is not None:
            if layer.bias is None:  # a correction gave it one
                layer.bias = nn.Parameter(torch.zeros(layer.output_channels, device=layer.weight.device))
                layer.frozen -= {"bias"} if "weight" not in layer.frozen else set()
            layer.bias.copy_(layer.bias_q * layer.per_output_unit())  # with what a correction added to it
    set_integers(layers)
    return layers


def full_precision(qnet, name, layer):
    """The shadow weights of op `name` of a quantized network for the converted `layer`, or None where it has none."""
    weight = qnet.ops[name].op.weight if name in qnet.ops else None
    if weight is None or weight.shape != layer.weight.shape:
        raise ValueError(f"the quantized network has no layer {name} of this shape, give the one that was converted")
    shadow = getattr(weight, "weight_back", None)
    return None if shadow is None else shadow.to(layer.weight.device)


def within_interval(layer, full):
    """The weights nearest to `full` that round to the layer's integers; float weights have none, and stay.

    At 1 bit those of the other sign start at what the integer says.
    """
    bits, scale = layer.weight_bits, layer.weight_scale
    if bits == FLOAT_BITS:
        return layer.weight.detach().clone()
    weight_q = round_layer(layer, layer.weight.detach(), scale, bits)
    if bits == 1:
        return torch.where(round_layer(layer, full, scale, bits) == weight_q, full, weight_q / scale)
    largest, endless = largest_integer(bits), torch.inf  # the outermost integers stand for all beyond them
    low = torch.where(weight_q <= -largest, -endless, weight_q - INTERVAL)
    high = torch.where(weight_q >= largest, endless, weight_q + INTERVAL)
    return (full * scale).clamp(low, high) / scale


@torch.no_grad()
def set_integers(layers):
    """Round the shadows to integers, in units that stay as they are; weights and biases become what these say."""
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
