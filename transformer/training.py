"""Train a network whose stretch has quantized weights."""

import torch

from quantization import (
    LONGEST_GRADIENT,
    QuantSGD,
    choose_scales,
    dampen,
    forget_frozen,
    init_quantize_net,
    quantize_layers,
)


class StretchTrainer:
    """The optimizer of a SplicedNet, and its steps before and after: the stretch's weights stay quantized.

    options: a `ConversionOptions`, of which bits and scales of the weights are used. damping: pull of these weights
    towards integers (`dampen`). after: called after each step. sgd_options: lr, momentum, weight_decay.
    """

    def __init__(self, model, options, after, damping, **sgd_options):
        self.stretch, self.per_channel = model.part, options.weights_per_channel
        self.damping, self.after = damping, after
        init_quantize_net(self.stretch, options.weight_bitwidth, self.per_channel)
        parameters = [*(p for p in model.net.parameters() if p.requires_grad), *self.stretch.trained_parameters()]
        group = {"params": parameters}  # unlike a list, a group may be empty: all parameters of a network can be frozen
        self.optimizer = StretchSGD([group], self.before_step, self.after_step, **sgd_options)
        self.steps, self.has_stepped = 0, False

    def clear_used_gradients(self):
        """Clear the gradients from before the last step, so that a training loop needs no zero_grad."""
        if self.has_stepped:
            self.optimizer.zero_grad()
            self.has_stepped = False

    def before_step(self):
        """Drop the gradients of frozen parameters, clip the rest, and add the pull towards integers."""
        forget_frozen(self.stretch)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, LONGEST_GRADIENT)
        dampen(self.stretch, self.damping)

    def after_step(self):
        """Quantize the stretch's weights again.

        Their scales are chosen again after steps 1, 2, 4, 8, ...: so the scales follow the weights, and the integers
        settle on fixed scales in the second half of the training or longer.
        """
        self.steps, self.has_stepped = self.steps + 1, True
        if self.steps & (self.steps - 1) == 0:  # a power of two
            choose_scales(self.stretch, self.per_channel)
        quantize_layers(self.stretch)
        self.after()


class StretchSGD(QuantSGD):
    """QuantSGD that calls `before()` and `after()` around a step.

    Hooks of torch.optim do not do: once a torch.optim.SGD was made anywhere in the process, they run a second time,
    around the plain SGD step inside `QuantSGD.step`.
    """

    def __init__(self, parameters, before, after, **options):
        super().__init__(parameters, **options)
        self.before, self.after = before, after

    def step(self, closure=None):
        self.before()
        loss = super().step(closure)
        self.after()
        return loss
