"""Symmetric quantization of weights to 1..8 bits, and finetuning with full-precision shadow weights.

    qnet = quantize_finetune(raw_net, train_loader, criterion, device, args)

Every weight of qnet is `quantized_w / scale`: integers times one factor a layer, rescaled back.
"""

import copy
import math
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from tqdm import tqdm

from options import FLOAT_BITS, QuantizeOptions
from runtime.batches import (
    batches_of,
    count_batches,
    first_batch,
    first_output,
    labelled_batch,
    loss_of,
    memory_format,
    on_device,
    reusable,
    split_batch,
    type_of,
)
from spike_dag import SpikeDAGModule

LONGEST_GRADIENT = 1.0  # of a step of finetuning, over all parameters
TEMPERATURE = 4.0  # softens outputs that are learnt from
NEXT_TO_NOTHING = 1e-30  # weights that are all smaller count as zeros; 1 over their scale could overflow
SILENT = 1e-4  # of the mean |W| of a layer: a channel below sends next to nothing, as one whose BatchNorm was pruned


def check_bitwidth(bits):
    """Raise ValueError unless `bits` is a weight bit width: 1 to 8, or 32 for float weights."""
    is_whole = isinstance(bits, Integral) and not isinstance(bits, bool)  # NumPy's integers are Integral too
    if not is_whole or (bits not in range(1, 9) and bits != FLOAT_BITS):
        raise ValueError(f"weight bit width {bits!r}: use 1 to 8, or {FLOAT_BITS} for float weights")


def list_bitwidths(net, weight_bitwidth):
    """The bit width of every layer with weights, in order: a number for all of them, or a sequence with one for each.

    Raises ValueError for other bit widths, for a sequence of another length, and for one that mixes floats in.
    """
    layers = net.weighted_layers()
    if getattr(weight_bitwidth, "ndim", None) == 0:
        weight_bitwidth = weight_bitwidth.item()
    is_number = not hasattr(weight_bitwidth, "__iter__") or isinstance(weight_bitwidth, str)
    widths = [weight_bitwidth] * len(layers) if is_number else list(weight_bitwidth)
    for bits in widths:
        check_bitwidth(bits)
    if len(widths) != len(layers):
        names = ", ".join(net.where(name) for name in layers)
        raise ValueError(f"{len(widths)} weight bit widths for {len(layers)} layers, give one for each of {names}")
    if FLOAT_BITS in widths and set(widths) != {FLOAT_BITS}:
        raise ValueError(f"weight bit widths {widths}: float weights ({FLOAT_BITS}) in all layers or in none")
    return widths


def weights_in_words(weight_bitwidth):
    """Weight bits of all layers, or of each: "float weights", "4-bit weights" or "8,4,4,4-bit weights"."""
    widths = [int(bits) for bits in ([weight_bitwidth] if isinstance(weight_bitwidth, Integral) else weight_bitwidth)]
    if set(widths) == {FLOAT_BITS}:
        return "float weights"
    return f"{','.join(map(str, widths))}-bit weights"


def set_bitwidths(net, weight_bitwidth):
    """Give every layer with weights its `weight_bits` (`list_bitwidths`)."""
    for layer, bits in zip(net.weighted_layers().values(), list_bitwidths(net, weight_bitwidth)):
        layer.weight_bits = int(bits)


def largest_integer(bits):
    """The largest |W_q| at a bit width: 2^(b-1) - 1, and 1 at 1 bit."""
    return max(2 ** (bits - 1) - 1, 1)


def quantize(weight, bits, per_channel=False):
    """`W_q, s_w`, float tensors with W ~ W_q / s_w: the integer weights and their scale.

    weight: [C_out, ...]. s_w is a scalar, or [C_out, 1, ...] with `per_channel`. From 2 bits on s_w maps a share of the
    largest |W| to 2^(b-1) - 1 and cuts off what lies above, the share with the least squared error; at 1 bit W_q is -1
    or +1 and 1 / s_w the mean |W| (Rastegari et al., XNOR-Net, ECCV 2016), but 0 in an output channel of next to no
    weights, which 1 bit would make as loud as the others. At 32 bits W_q is W itself. Quantizing W_q / s_w again gives
    the same W_q. Raises ValueError for other bit widths.
    """
    check_bitwidth(bits)
    over = tuple(range(1, weight.dim())) if per_channel else tuple(range(weight.dim()))
    magnitude, largest = weight.abs(), largest_integer(bits)
    if bits == FLOAT_BITS:
        scale = torch.ones_like(magnitude.amax(over, keepdim=per_channel))
    elif bits == 1:
        mean = magnitude.mean(over, keepdim=per_channel)
        of_layer = magnitude.mean()  # the scale of a silent channel: where finetuning wakes it, it is as loud as others
        mean = torch.where(mean > SILENT * of_layer, mean, of_layer)
        scale = torch.where(mean > NEXT_TO_NOTHING, 1 / mean, 1.0)
    else:
        scale = largest / least_error_clip(magnitude, largest, per_channel)
    weight_q = round_to_integers(weight, scale, bits)
    if bits == 1:
        weight_q = weight_q * sounding(weight.flatten(1)).view(-1, *[1] * (weight.dim() - 1))
    return weight_q, scale


def sounding(rows):
    """1 for every output channel, [C_out], with weights to speak of, 0 for one that is silent; rows: [C_out, N]."""
    means = rows.abs().mean(1)
    return ((means > SILENT * means.mean()) & (means > NEXT_TO_NOTHING)).to(rows.dtype)


def quantize_layer(layer, weight, bits, per_channel=False):
    """`W_q, s_w` of a layer's weight, as `quantize`; with `per_channel` s_w is broadcastable to the weight."""
    _, scale = quantize(layer.rows(weight), bits, per_channel)
    scale = layer.weight_view(scale.flatten()) if per_channel else scale
    return round_layer(layer, weight, scale, bits), scale


def round_layer(layer, weight, scale, bits):
    """W_q of a layer's weight for a given s_w: `round_to_integers`, and 0 in the channels that are silent at 1 bit."""
    weight_q = round_to_integers(weight, scale, bits)
    return weight_q * layer.weight_view(sounding(layer.rows(weight))) if bits == 1 else weight_q


def round_to_integers(weight, scale, bits):
    """W_q for a given s_w: within 2^(b-1) - 1 on both sides, -1 or +1 at 1 bit, W itself at 32 bits."""
    if bits == FLOAT_BITS:
        return weight.clone()
    if bits == 1:
        return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)
    return (weight * scale).round().clamp(-largest_integer(bits), largest_integer(bits))


def least_error_clip(magnitude, largest, per_channel):
    """The |W| that the largest integer stands for, chosen among 33 shares of the maximum by squared error.

    Judged on at most 16,384 weights of the layer (or of each channel); a layer of zeros gets 1.
    """
    rows = magnitude.flatten(1) if per_channel else magnitude.reshape(1, -1)  # [rows, N]
    maximum = rows.amax(1, keepdim=True)  # [rows, 1]
    maximum = torch.where(maximum > NEXT_TO_NOTHING, maximum, 1.0)
    sample = rows[:, :: sampling_stride(rows.shape[1], 16_384, rows.shape[1])]
    least_error, best = torch.full_like(maximum, torch.inf), maximum
    for share in torch.linspace(1, 0.2, 33).tolist():
        step = maximum * (share / largest)
        error = ((sample / step).round().clamp_max(largest) * step - sample).square().sum(1, keepdim=True)
        best = torch.where(error < least_error, maximum * share, best)
        least_error = torch.minimum(error, least_error)
    return best.view(-1, *[1] * (magnitude.dim() - 1)) if per_channel else best.squeeze()


def sampling_stride(size, most, period):
    """The least stride that leaves at most `most` of `size` elements and has no factor in common with `period`.

    A stride of 9 would meet the same tap of every 3x3 kernel, one of 32 the same column of every map 32 wide.
    """
    stride = -(-size // most)
    while math.gcd(stride, period) > 1:
        stride += 1
    return stride


class ShadowStep:
    """An optimizer that moves `weight.weight_back`, in full precision, by the gradient of the quantized weight.

    Parameters without `weight_back` are treated as ever. The quantized weights are made anew by `quantize_layers` after
    the step (straight-through estimator; Courbariaux et al., BinaryConnect, NeurIPS 2015).
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shadowed = [p for group in self.param_groups for p in group["params"] if hasattr(p, "weight_back")]
        for p in shadowed:
            p.copy_(p.weight_back)
        super().step()
        for p in shadowed:
            p.weight_back.copy_(p)
        return loss


class QuantSGD(ShadowStep, torch.optim.SGD):
    """torch.optim.SGD on the weights' shadows (`ShadowStep`)."""


class QuantAdam(ShadowStep, torch.optim.Adam):
    """torch.optim.Adam on the weights' shadows (`ShadowStep`); on a GPU each group moves by one kernel."""

    def __init__(self, groups):
        super().__init__(groups, fused=groups[0]["params"][0].is_cuda)


def groups_of(layers, lr):
    """Parameter groups of an optimizer: each layer learns at `lr` times the root mean square of its shadow weights.

    Where these are all 0, at `lr` times the step of an integer.
    """
    groups = []
    for layer in layers:
        size = layer.weight.weight_back.square().mean().sqrt()
        size = size if size > 0 else (1 / layer.weight_scale).mean()
        if trained := layer.trained_parameters():
            groups.append({"params": trained, "lr": lr * size.item()})
    return groups


def relative_groups(net, lr):
    """Parameter groups of all that `net` trains: of its layers (`groups_of`), and of others, each by its own size."""
    groups = groups_of(net.weighted_layers().values(), lr)
    grouped = {id(p) for group in groups for p in group["params"]}
    for p in net.trained_parameters():
        if id(p) not in grouped:
            groups.append({"params": [p], "lr": lr * (p.detach().square().mean().sqrt().item() or 1.0)})
    return groups


def init_quantize_net(net, weight_bitwidth, per_channel=False):
    """Give every weight of the convolutions and linear layers its shadow `weight.weight_back`, and quantize it."""
    set_bitwidths(net, weight_bitwidth)
    for name, layer in net.weighted_layers().items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"{net.where(name)} has NaN or infinite weights, train the network again")
        layer.weight.weight_back = layer.weight.detach().clone()
    choose_scales(net, per_channel)
    quantize_layers(net)


@torch.no_grad()
def choose_scales(net, per_channel=False):
    """Set `layer.weight_scale`, s_w, from the shadow weights; it then stays for an epoch, so that training settles.

    The weights are the shadows then; `quantize_layers` has to follow.
    """
    for layer in net.weighted_layers().values():
        layer.weight.copy_(layer.weight.weight_back)
        layer.set_weight_scale(quantize_layer(layer, layer.weight, layer.weight_bits, per_channel)[1])
    if net.scales_of_conversion is not None:
        for name, scale in net.scales_of_conversion(net, per_channel).items():
            layer = net.ops[name].op
            if layer.weight_bits != FLOAT_BITS:
                layer.set_weight_scale(scale.to(layer.weight.device))


@torch.no_grad()
def quantize_layers(net):
    """Set every weight to its shadow, quantized: `quantized_w / scale`."""
    for layer in net.weighted_layers().values():
        weight_q = round_layer(layer, layer.weight.weight_back, layer.weight_scale, layer.weight_bits)
        layer.weight.copy_(weight_q / layer.weight_scale)


def dampen(net, strength):
    """Add `strength` times the way from each quantized weight to its shadow to the gradient.

    It pulls the shadows to the middle of their rounding interval; without it they gather at its edges, and the integers
    flip at every step up to the last (Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022).
    """
    layers = (layer for layer in net.weighted_layers().values() if layer.weight.grad is not None)
    for layer in layers:
        layer.weight.grad.add_(layer.weight.weight_back - layer.weight.detach(), alpha=strength)


def quantize_train(
    net,
    train_loader,
    criterion,
    optimizer,
    device,
    damping=0.0,
    name="finetune",
    teacher=None,
    distill=0.0,
    schedule=None,
):
    """One epoch on the quantized weights; the mean loss per sample. Raises ValueError where it is not finite.

    `distill`, 0 to 1, is the share of the loss that asks for the outputs of `teacher` instead of the labels. `schedule`
    of the learning rate, if given, steps with every batch. A gradient longer than `LONGEST_GRADIENT` is cut to it, so
    that a deep network whose BatchNorm was folded survives its first steps (Pascanu et al., On the Difficulty of
    Training Recurrent Neural Networks, ICML 2013).
    """
    net.train()
    total, samples = torch.zeros((), device=device), 0
    for batch in batches_of(tqdm(train_loader, name, leave=False, delay=1)):
        inputs, targets = labelled_batch(batch, device)
        inputs = tuple(x.to(memory_format=memory_format(x)) for x in inputs)
        optimizer.zero_grad()
        loss = training_loss(net, inputs, targets, criterion, teacher, distill)
        loss.backward()
        forget_frozen(net)
        torch.nn.utils.clip_grad_norm_(net.parameters(), LONGEST_GRADIENT)
        if damping:
            dampen(net, damping)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        quantize_layers(net)
        total += loss.detach() * len(inputs[0])
        samples += len(inputs[0])
    if not samples:
        raise ValueError("no samples to finetune on, the data loader is empty, or runs only once")
    return check_converges(net, total.item() / samples, name)


def training_loss(net, inputs, targets, criterion, teacher, distill):
    """The loss of a batch, of which a share asks for the teacher's outputs."""
    outputs = net(*inputs)
    loss = loss_of(criterion, outputs, targets)
    if not distill:
        return loss
    with torch.no_grad():
        wanted = teacher(*inputs)
    return loss.lerp(distillation_loss(first_output(outputs), first_output(wanted)), distill)


def check_converges(net, mean, name):
    """The mean loss of epoch `name`. Raises ValueError where it, or a parameter, is not finite."""
    if not (mean < float("inf") and all(torch.isfinite(p).all() for p in net.parameters())):
        raise ValueError(
            f"finetuning diverged in {name} (loss {mean}), lower --finetune_lr, or --finetune_wd and --finetune_damping"
        )
    return mean


def forget_frozen(net):
    """Drop the gradients of what is not trained: no optimizer clears them, and they would count when all are cut."""
    trained = {id(p) for p in net.trained_parameters()}
    for p in net.parameters():
        if id(p) not in trained:
            p.grad = None


def distillation_loss(outputs, wanted, temperature=TEMPERATURE):
    """How far the outputs [B, classes] are from the wanted ones, softened.

    Hinton et al., Distilling the Knowledge in a Neural Network, NIPS workshop 2014; for few bits Mishra and Marr,
    Apprentice, ICLR 2018.
    """
    if outputs.dim() == 1 or outputs.shape[1] == 1:  # one score against the score 0 of the other class
        outputs, wanted = (F.pad(x.reshape(-1, 1), (1, 0)) for x in (outputs, wanted))
    learnt, wanted = F.log_softmax(outputs / temperature, 1), F.softmax(wanted / temperature, 1)
    return F.kl_div(learnt, wanted, reduction="batchmean") * temperature**2


def quantize_finetune(net, train_loader, criterion, device, args):
    """A quantized and finetuned copy of `net`, as a SpikeDAGModule.

    A plain nn.Module is parsed first, on one image of `train_loader`. args: any namespace with finetune_lr,
    finetune_epochs, finetune_wd, finetune_momentum and weight_bitwidth (a number, or one for each layer); the other
    fields of `options.QuantizeOptions` have defaults.

    With "sgd" the learning rate falls to a tenth at 50 % and at 75 % of the epochs. With "adam" it is a share of the
    weights of each layer (`relative_groups`), as large a step for all of them, wherever folded BatchNorms made them
    large, and falls to 0 along a cosine. With no epochs the weights are only quantized.

    train_loader: batches as `batches.split_batch` takes them; an iterator that runs once is kept as a list. Parameters
    with requires_grad=False are quantized, but not trained.

    Raises ValueError for NaN weights, another bit width, values out of range, a converted network, a network with
    nothing to train, or a loss that diverges.
    """
    options = QuantizeOptions.of(args)
    train_loader = reusable(train_loader)
    qnet = as_dag(net, train_loader).to(device, memory_format=torch.channels_last)
    init_quantize_net(qnet, options.weight_bitwidth, options.weights_per_channel)
    if options.finetune_epochs:
        teacher = float_teacher(net, train_loader, device) if options.finetune_distill else None
        finetune(qnet, train_loader, criterion, device, options, teacher)
    return qnet


def finetune(qnet, train_loader, criterion, device, options, teacher):
    """Train a quantized network in place."""
    recipe, epochs = choose_recipe(qnet, options, train_loader), options.finetune_epochs
    with tqdm(range(1, epochs + 1), "finetune") as bar:
        for epoch in bar:
            if epoch <= epochs // 2:  # afterwards, at smaller learning rates, the integers settle on fixed scales
                choose_scales(qnet, options.weights_per_channel)
                quantize_layers(qnet)
            loss = quantize_train(
                qnet,
                train_loader,
                criterion,
                recipe.optimizer,
                device,
                recipe.damping * epoch / epochs,
                f"finetune epoch {epoch}",
                teacher,
                options.finetune_distill,
                recipe.batch_schedule,
            )
            if recipe.epoch_schedule is not None:
                recipe.epoch_schedule.step()
            bar.set_postfix(loss=f"{loss:.4f}")


@dataclass
class Recipe:
    """What weights are finetuned by. damping: reached in the last epoch. One of the schedules is None."""

    optimizer: torch.optim.Optimizer
    damping: float
    epoch_schedule: object = None
    batch_schedule: object = None


def choose_recipe(qnet, options, train_loader):
    """The Recipe that `options` choose. Raises ValueError where all parameters are frozen."""
    trained, epochs = qnet.trained_parameters(), options.finetune_epochs
    if not trained:
        raise ValueError(
            "every parameter of the network is frozen (requires_grad=False): unfreeze what is to be finetuned, or use "
            "0 finetune epochs"
        )
    if options.finetune_optimizer == "adam":
        optimizer = QuantAdam(relative_groups(qnet, options.finetune_lr))
        steps = max(1, epochs * count_batches(train_loader))
        # integers settle by themselves where steps fall to 0
        return Recipe(optimizer, 0.0, batch_schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))
    optimizer = QuantSGD(
        trained,
        options.finetune_lr,
        options.finetune_momentum,
        weight_decay=options.finetune_wd,
        nesterov=options.finetune_nesterov,
    )
    falls = sorted({epochs // 2, epochs * 3 // 4} - {0})
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, gamma=0.1)
    return Recipe(optimizer, options.finetune_damping, epoch_schedule=schedule)


def float_teacher(net, loader, device):
    """A copy of `net` whose weights and activations are floats, to learn from."""
    teacher = as_dag(net, loader).eval().to(device, memory_format=torch.channels_last)
    for entry in teacher.ops.values():
        if getattr(entry.op, "levels", None) is not None:
            entry.op.levels = None
    return teacher


def as_dag(net, loader):
    """A copy of `net` as a SpikeDAGModule in float32; a plain module is traced on one image of `loader`.

    Raises ValueError for a network that was converted: its weights are integers of spikes already.
    """
    if isinstance(net, SpikeDAGModule):
        if net.neurons():
            raise ValueError("the network is a spiking one already, give the network that it was converted from")
        return copy.deepcopy(net).float()
    from ann_parser import parse_ann_model  # a layer above this one

    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    inputs = on_device(split_batch(first_batch(loader))[0], device, 1, type_of(net))
    return parse_ann_model(net, inputs).float()
