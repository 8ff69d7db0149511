"""Symmetric quantization of weights to 1..8 bits, and finetuning with full-precision shadow weights.

    qnet = quantize_finetune(raw_net, train_loader, criterion, device, args)

Every weight of qnet is `quantized_w / scale`: an integer divided by the scale of its layer (or output channel).
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
    count_batches,
    first_batch,
    first_output,
    labelled_batch,
    loader_for,
    loss_of,
    memory_format,
    on_device,
    reusable,
    split_batch,
    type_of,
)
from runtime.processes import average_gradients
from runtime.progress import Progress
from spike_dag import SpikeDAGModule

LONGEST_GRADIENT = 1.0  # largest norm, over all parameters, of the gradient of a finetuning step
TEMPERATURE = 4.0  # divides the class scores of teacher and student, which softens their distributions
NEXT_TO_NOTHING = 1e-30  # if no |W| is larger, the weights count as zeros, because their scale could overflow
SILENT = 1e-4  # share of a layer's mean |W|; a channel below it is silent, such as one with a pruned BatchNorm


def check_bitwidth(bits):
    """Raise ValueError unless `bits` is a valid weight bit width: 1 to 8, or 32 for float weights."""
    is_whole = isinstance(bits, Integral) and not isinstance(bits, bool)  # NumPy's integers are Integral too
    if not is_whole or (bits not in range(1, 9) and bits != FLOAT_BITS):
        raise ValueError(f"weight bit width {bits!r}: use 1 to 8, or {FLOAT_BITS} for float weights")


def list_bitwidths(net, weight_bitwidth):
    """A list with the bit width of every layer with weights, in order.

    weight_bitwidth: one number for all layers, or a sequence with one number per layer. Raises ValueError for invalid
    bit widths, for a sequence of the wrong length, and for one that has float weights (32) in some layers only.
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
    """The weight bits in words: "float weights", "4-bit weights" or, layer by layer, "8,4,4,4-bit weights"."""
    widths = [int(bits) for bits in ([weight_bitwidth] if isinstance(weight_bitwidth, Integral) else weight_bitwidth)]
    if set(widths) == {FLOAT_BITS}:
        return "float weights"
    return f"{','.join(map(str, widths))}-bit weights"


def set_bitwidths(net, weight_bitwidth):
    """Set `weight_bits` of every layer with weights. Raises ValueError like `list_bitwidths`."""
    for layer, bits in zip(net.weighted_layers().values(), list_bitwidths(net, weight_bitwidth)):
        layer.weight_bits = int(bits)


def largest_integer(bits):
    """The largest |W_q| at a bit width: 2^(b-1) - 1, and 1 at 1 bit."""
    return max(2 ** (bits - 1) - 1, 1)


def quantize(weight, bits, per_channel=False):
    """`W_q, s_w`: the integer weights and their scale, both float tensors, with W ~ W_q / s_w.

    weight: [C_out, ...]. W_q has the same shape; s_w is a scalar or, with `per_channel`, [C_out, 1, ...].

    2 to 8 bits: s_w maps a share of the largest |W| to 2^(b-1) - 1, and larger weights are clipped. The share is the
    one with the least squared error. 1 bit: W_q is -1 or +1, and 1 / s_w is the mean |W| (Rastegari et al., XNOR-Net,
    ECCV 2016). W_q is 0 in an output channel with almost zero weights, because -1 and +1 would make it as loud as the
    others. 32 bits: W_q is W.

    Quantizing W_q / s_w again gives the same W_q. Raises ValueError for other bit widths.
    """
    check_bitwidth(bits)
    over = tuple(range(1, weight.dim())) if per_channel else tuple(range(weight.dim()))
    magnitude, largest = weight.abs(), largest_integer(bits)
    if bits == FLOAT_BITS:
        scale = torch.ones_like(magnitude.amax(over, keepdim=per_channel))
    elif bits == 1:
        mean = magnitude.mean(over, keepdim=per_channel)
        of_layer = magnitude.mean()  # scale of a silent channel: as loud as the others if finetuning wakes it
        mean = torch.where(mean > SILENT * of_layer, mean, of_layer)
        scale = torch.where(mean > NEXT_TO_NOTHING, 1 / mean, 1.0)
    else:
        scale = largest / least_error_clip(magnitude, largest, per_channel)
    weight_q = round_to_integers(weight, scale, bits)
    if bits == 1:
        weight_q = weight_q * sounding(weight.flatten(1)).view(-1, *[1] * (weight.dim() - 1))
    return weight_q, scale


def sounding(rows):
    """[C_out] with 0 for silent output channels, whose weights are almost zero, and 1 for others. rows: [C_out, N]."""
    means = rows.abs().mean(1)
    return ((means > SILENT * means.mean()) & (means > NEXT_TO_NOTHING)).to(rows.dtype)


def quantize_layer(layer, weight, bits, per_channel=False):
    """`W_q, s_w` of a layer's weight, like `quantize`; with `per_channel`, s_w is broadcastable to the weight."""
    _, scale = quantize(layer.rows(weight), bits, per_channel)
    scale = layer.weight_view(scale.flatten()) if per_channel else scale
    return round_layer(layer, weight, scale, bits), scale


def round_layer(layer, weight, scale, bits):
    """W_q of a layer's weight for a given s_w, like `round_to_integers`; at 1 bit, silent channels are 0."""
    weight_q = round_to_integers(weight, scale, bits)
    return weight_q * layer.weight_view(sounding(layer.rows(weight))) if bits == 1 else weight_q


def round_to_integers(weight, scale, bits):
    """W_q for a given s_w: integers from -(2^(b-1) - 1) to 2^(b-1) - 1; -1 or +1 at 1 bit; W itself at 32 bits."""
    if bits == FLOAT_BITS:
        return weight.clone()
    if bits == 1:
        return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)
    return (weight * scale).round().clamp(-largest_integer(bits), largest_integer(bits))


def least_error_clip(magnitude, largest, per_channel):
    """The |W| that the largest integer represents, a scalar or (`per_channel`) [C_out, 1, ...].

    The candidates are 33 shares of the largest |W|, from 1 down to 0.2 in steps of 0.025. The one with the least
    squared error wins, measured on at most 16,384 weights of the layer (or of each channel). Zero weights give 1.
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
    """The smallest stride that selects at most `most` of `size` elements and has no common factor with `period`.

    A stride of 9 would always select the same tap of 3x3 kernels, a stride of 32 the same column of maps 32 wide.
    """
    stride = -(-size // most)
    while math.gcd(stride, period) > 1:
        stride += 1
    return stride


class ShadowStep:
    """Optimizer mixin: the gradient of a quantized weight moves its shadow `weight.weight_back`, in full precision.

    Parameters without a shadow are updated as usual. `quantize_layers` must follow each step to set the quantized
    weights (straight-through estimator; Courbariaux et al., BinaryConnect, NeurIPS 2015).
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
    """torch.optim.SGD on the shadow weights (`ShadowStep`)."""


class QuantAdam(ShadowStep, torch.optim.Adam):
    """torch.optim.Adam on the shadow weights (`ShadowStep`); on a GPU one fused kernel updates a whole group."""

    def __init__(self, groups):
        super().__init__(groups, fused=groups[0]["params"][0].is_cuda)


def groups_of(layers, lr):
    """Optimizer parameter groups: the learning rate of each layer is `lr` times the RMS of its shadow weights.

    If all of these are 0, it is `lr` times the weight that the integer 1 represents.
    """
    groups = []
    for layer in layers:
        size = layer.weight.weight_back.square().mean().sqrt()
        size = size if size > 0 else (1 / layer.weight_scale).mean()
        if trained := layer.trained_parameters():
            groups.append({"params": trained, "lr": lr * size.item()})
    return groups


def relative_groups(net, lr):
    """Optimizer parameter groups for everything that `net` trains: its layers (`groups_of`), and other parameters.

    The learning rate of another parameter is `lr` times its own RMS, or `lr` if it is 0.
    """
    groups = groups_of(net.weighted_layers().values(), lr)
    grouped = {id(p) for group in groups for p in group["params"]}
    for p in net.trained_parameters():
        if id(p) not in grouped:
            groups.append({"params": [p], "lr": lr * (p.detach().square().mean().sqrt().item() or 1.0)})
    return groups


def init_quantize_net(net, weight_bitwidth, per_channel=False):
    """Copy every weight of convolutions and linear layers to its shadow `weight.weight_back`, then quantize it.

    Raises ValueError for NaN or infinite weights, and for bit widths like `list_bitwidths`.
    """
    set_bitwidths(net, weight_bitwidth)
    for name, layer in net.weighted_layers().items():
        if not torch.isfinite(layer.weight).all():
            raise ValueError(f"{net.where(name)} has NaN or infinite weights, train the network again")
        layer.weight.weight_back = layer.weight.detach().clone()
    choose_scales(net, per_channel)
    quantize_layers(net)


@torch.no_grad()
def choose_scales(net, per_channel=False):
    """Set `layer.weight_scale`, s_w, from the shadow weights. It stays fixed for an epoch, so that training settles.

    Afterwards the weights equal their shadows; `quantize_layers` must follow.
    """
    for layer in net.weighted_layers().values():
        layer.weight.copy_(layer.weight.weight_back)
        layer.set_weight_scale(quantize_layer(layer, layer.weight, layer.weight_bits, per_channel)[1])
    take_scales_of_conversion(net, per_channel)


@torch.no_grad()
def follow_lambdas(net, per_channel=False):
    """Move s_w along with the lambdas that were learnt since it was chosen, as the conversion will.

    The conversion then has no weight to round again. Without activation levels nothing moves.
    `quantize_layers` must follow.
    """
    take_scales_of_conversion(net, per_channel, keep_integers=True)


def take_scales_of_conversion(net, per_channel, keep_integers=False):
    """Set s_w of every layer to that of the conversion, for a network with activation levels (`finetuning.levels`)."""
    if net.scales_of_conversion is not None:
        for name, scale in net.scales_of_conversion(net, per_channel, keep_integers).items():
            layer = net.ops[name].op
            if layer.weight_bits != FLOAT_BITS:
                layer.set_weight_scale(scale.to(layer.weight.device))


@torch.no_grad()
def quantize_layers(net):
    """Set every weight to its quantized shadow, `quantized_w / scale`."""
    for layer in net.weighted_layers().values():
        weight_q = round_layer(layer, layer.weight.weight_back, layer.weight_scale, layer.weight_bits)
        layer.weight.copy_(weight_q / layer.weight_scale)


def dampen(net, strength):
    """Add `strength` times the difference between each shadow and its quantized weight to the gradient.

    This pulls the shadows to the middle of their rounding interval. Otherwise they gather at its edges, and the
    integers flip at every step to the end (Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML
    2022).
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
    progress=None,
):
    """Train one epoch on the quantized weights; returns the mean loss per sample.

    damping: of `dampen`. name: of the epoch, in messages. teacher, distill: of `training_loss`. schedule: learning rate
    schedule that steps with every batch. progress: the Progress whose epoch this is. Raises ValueError if the loss is
    not finite or the loader is empty.
    """
    net.train()
    progress = progress or Progress()
    for batch in progress.batches(train_loader, name):
        inputs, targets = labelled_batch(batch, device)
        inputs = tuple(x.to(memory_format=memory_format(x)) for x in inputs)
        optimizer.zero_grad()
        outputs = net(*inputs)
        loss = training_loss(outputs, inputs, targets, criterion, teacher, distill)
        loss.backward()
        finish_gradients(net, len(inputs[0]))
        if damping:
            dampen(net, damping)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        quantize_layers(net)
        progress.count(loss, len(inputs[0]), outputs, targets)
    return check_converges(net, progress.loss, name)


def finish_gradients(net, samples):
    """Make the gradients those of the whole batch, of which this process has `samples`, and clip them.

    They are clipped to the norm `LONGEST_GRADIENT`, so that a deep network with folded BatchNorms survives its first
    steps (Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, ICML 2013).
    """
    forget_frozen(net)
    average_gradients(net.parameters(), samples)
    torch.nn.utils.clip_grad_norm_(net.parameters(), LONGEST_GRADIENT)


def training_loss(outputs, inputs, targets, criterion, teacher, distill):
    """The loss of a batch: (1 - distill) times the criterion plus `distill` times the distillation loss."""
    loss = loss_of(criterion, outputs, targets)
    if not distill:
        return loss
    with torch.no_grad():
        wanted = teacher(*inputs)
    pair = first_output(outputs, targets), first_output(wanted, targets)
    return loss.lerp(distillation_loss(*pair), distill)


def check_converges(net, mean, name):
    """Return the mean loss of epoch `name`. Raises ValueError if the loss or a parameter is not finite."""
    if not (mean < float("inf") and all(torch.isfinite(p).all() for p in net.parameters())):
        raise ValueError(
            f"finetuning diverged in {name} (loss {mean}), lower --finetune_lr, or --finetune_wd and --finetune_damping"
        )
    return mean


def forget_frozen(net):
    """Delete gradients of parameters that are not trained.

    No optimizer clears these gradients, and they would count in the norm when all gradients are clipped.
    """
    trained = {id(p) for p in net.trained_parameters()}
    for p in net.parameters():
        if id(p) not in trained:
            p.grad = None


def distillation_loss(outputs, wanted, temperature=TEMPERATURE):
    """The softened Kullback-Leibler divergence between outputs and wanted outputs; both [B, classes], or one score [B].

    Hinton et al., Distilling the Knowledge in a Neural Network, NIPS workshop 2014; for few bits Mishra and Marr,
    Apprentice, ICLR 2018.
    """
    if outputs.dim() == 1 or outputs.shape[1] == 1:  # one score against the score 0 of the other class
        outputs, wanted = (F.pad(x.reshape(-1, 1), (1, 0)) for x in (outputs, wanted))
    learnt, wanted = F.log_softmax(outputs / temperature, 1), F.softmax(wanted / temperature, 1)
    return F.kl_div(learnt, wanted, reduction="batchmean") * temperature**2


def quantize_finetune(net, train_loader, criterion, device, args, progress=None):
    """A quantized and finetuned copy of `net`, as a SpikeDAGModule.

    net: a SpikeDAGModule, or a plain nn.Module, which is parsed first on one image of `train_loader`.
    train_loader: batches that `batches.split_batch` accepts; an iterator is kept as a list, because it runs only once.
    args: any namespace; its attributes are fields of `options.QuantizeOptions`, and missing ones get the defaults.
    progress: a `runtime.progress.Progress`, which may keep the training in a file, or None.

    With "sgd" the learning rate falls to a tenth after 50 % and after 75 % of the epochs. With "adam" it is relative to
    the weights of each layer (`relative_groups`), so that layers with large weights after BatchNorm folding take
    equally large steps, and it falls to 0 along a cosine. With 0 epochs the weights are only quantized. Parameters with
    requires_grad=False are quantized but not trained.

    Raises ValueError for NaN weights, invalid bit widths, values out of range, a converted network, a network with
    nothing to train, and a loss that diverges.
    """
    options = QuantizeOptions.of(args)
    train_loader = reusable(loader_for(net, train_loader))
    qnet = as_dag(net, train_loader).to(device, memory_format=torch.channels_last)
    init_quantize_net(qnet, options.weight_bitwidth, options.weights_per_channel)
    if options.finetune_epochs:
        teacher = float_teacher(net, train_loader, device) if options.finetune_distill else None
        finetune(qnet, train_loader, criterion, device, options, teacher, progress or Progress())
    return qnet


def finetune(qnet, train_loader, criterion, device, options, teacher, progress):
    """Train a quantized network in place. options: QuantizeOptions. teacher: the float network, or None."""
    recipe, epochs = choose_recipe(qnet, options, train_loader), options.finetune_epochs
    left = progress.epochs("finetune", epochs, qnet, *recipe.trainers())
    with tqdm(left, "finetune", epochs) as bar:
        for epoch in bar:
            # later, at smaller learning rates, integers settle on scales that only follow the lambdas
            set_scales = choose_scales if epoch <= epochs // 2 else follow_lambdas
            set_scales(qnet, options.weights_per_channel)
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
                progress,
            )
            if recipe.epoch_schedule is not None:
                recipe.epoch_schedule.step()
            bar.set_postfix(loss=f"{loss:.4f}")


@dataclass
class Recipe:
    """The optimizer of a finetuning, its damping in the last epoch, and a schedule per epoch or per batch."""

    optimizer: torch.optim.Optimizer
    damping: float
    epoch_schedule: object = None
    batch_schedule: object = None

    def trainers(self):
        """The optimizer and its schedule, which change during the training."""
        return [each for each in (self.optimizer, self.epoch_schedule, self.batch_schedule) if each is not None]


def choose_recipe(qnet, options, train_loader):
    """The Recipe for `options`. Raises ValueError if all parameters are frozen."""
    trained, epochs = qnet.trained_parameters(), options.finetune_epochs
    if not trained:
        raise ValueError(
            "every parameter of the network is frozen (requires_grad=False): unfreeze what is to be finetuned, or use "
            "0 finetune epochs"
        )
    if options.finetune_optimizer == "adam":
        optimizer = QuantAdam(relative_groups(qnet, options.finetune_lr))
        steps = max(1, epochs * count_batches(train_loader))
        # no damping: the integers settle because the learning rate falls to 0
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
    """A copy of `net` with float weights and activations, as the teacher of `training_loss`."""
    teacher = as_dag(net, loader).eval().to(device, memory_format=torch.channels_last)
    for entry in teacher.ops.values():
        if getattr(entry.op, "levels", None) is not None:
            entry.op.levels = None
    return teacher


def as_dag(net, loader, takes_gates=False):
    """A copy of `net` as a SpikeDAGModule in float32; a plain module is traced on one image of `loader`.

    takes_gates: as of `parse_ann_model`.

    Raises ValueError for a spiking network, which has already been converted.
    """
    if isinstance(net, SpikeDAGModule):
        if net.neurons():
            raise ValueError("the network is a spiking one already, give the network that it was converted from")
        return copy.deepcopy(net).float()
    from ann_parser import parse_ann_model  # late, because ann_parser stands above this module

    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    inputs = on_device(split_batch(first_batch(loader_for(net, loader)))[0], device, 1, type_of(net))
    return parse_ann_model(net, inputs, takes_gates=takes_gates).float()
