"""Convert part of a network inside your own training script.

    t = SNNTransformer(full_net, ["layer1", "layer2"])
    for inputs, targets in trainloader:
        output = t.inference_get_status(inputs)
        loss = criterion(output, targets)
        loss.backward()
        t.optimizer.step()
    ann_snn = t.generate_ann_snn()
    performance = validator(ann_snn, testloader)
    t.save_snn("saved")

The following command simulates what `save_snn` has written again, and compares every bit:

    python3 snn_transformer.py replay saved
"""

import argparse
import sys

from options import ConversionOptions
from runtime.cli import OneLineParser, run_script

LR = 0.001  # at 0.01, 9 blocks of a trained ResNet-20 at 4 bits fall from 68 to 10 % in 5 steps; at this, they gain


class SNNTransformer:
    """Turns a contiguous stretch of a network into spikes; the rest stays as it is.

    full_net: any nn.Module. It is never changed: the transformer works on a copy, on the same device. layers: names of
    modules ("layer1", "layer2.0"), or the modules themselves, that form one contiguous stretch. Everything that runs
    inside them is converted, together with the operations between them in the surrounding forward (adds,
    concatenations, functional ReLUs) and the functional ReLUs directly behind. The rest may be any Python code, with
    any inputs and outputs. The stretch runs in float32, even if the rest runs under autocast.

    timesteps: T. weight_bitwidth: 1 to 8, one number or one for each layer, or 32 for float weights. lr, momentum,
    weight_decay: of `optimizer`, which trains the whole network; the defaults suit a trained network, and longer
    gradients are clipped (`quantization.LONGEST_GRADIENT`). damping: pull of the stretch's weights towards integers, as
    a share of lr (`dampen`). per_channel: a weight scale per output channel. calibration_samples: how many inputs, the
    newest ones, the calibration uses. conversion: further fields of `options.ConversionOptions` (reset_mode, listen,
    threshold, correction, hold_back, initial_potential, maxpool, signed, avgpool, ann_layers).
    example_inputs: a tuple of arguments of the network. With it the stretch is traced at once, so that `optimizer`
    exists before the first `inference_get_status`; without it that call traces the stretch.

    Raises ValueError for layers that the network lacks and, when it traces, for layers with a gap between them (the
    message names the gap) and for what cannot be converted; NotImplementedError for a function in the stretch that
    cannot be traced.
    """

    def __init__(
        self,
        full_net,
        layers,
        *,
        timesteps=16,
        weight_bitwidth=4,
        lr=LR,
        momentum=0.9,
        weight_decay=1e-4,
        damping=0.05,
        per_channel=False,
        calibration_samples=1000,
        example_inputs=None,
        **conversion,
    ):
        from ann_parser import copy_of
        from transformer.status import Status
        from transformer.stretch import module_paths

        keywords = {"per_channel": per_channel, "calibration_samples": calibration_samples, **conversion}
        self.options = ConversionOptions.from_keywords(
            timesteps, plain_bitwidths(weight_bitwidth), keywords, "SNNTransformer"
        )
        if not damping >= 0:
            raise ValueError(f"damping {damping}: use 0 or more")
        self.layers, self.net = module_paths(full_net, layers), copy_of(full_net)
        self.training_options = {"damping": damping, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.status = Status(self.options.calibration_samples)
        self.stretch = self.model = self.trainer = self.snn = None
        if not self.net.training:  # as after a validation; in a training network, modules in eval mode stay frozen
            self.net.train()
        if example_inputs is not None:
            self.trace(as_arguments(example_inputs), {})

    # 2. Training

    @property
    def optimizer(self):
        """A QuantSGD of all parameters, which quantizes the stretch's weights again after each step."""
        if self.trainer is None:
            raise ValueError(
                "the optimizer exists once the network is traced: call inference_get_status first, or pass "
                "example_inputs=(inputs,) to SNNTransformer"
            )
        return self.trainer.optimizer

    def inference_get_status(self, *inputs, **named_inputs):
        """The network's output in training mode, with b-bit weights in the stretch; keeps the inputs for calibration.

        Arguments and output are those of the network. Gradients from before the last `optimizer.step()` are cleared, so
        `zero_grad` is optional; without a step in between they add up. BatchNorms of the stretch are folded into its
        weights, and its dropout is off. Under `torch.no_grad()` the network runs in eval mode: use this to gather the
        status of a network that is not trained, which then stays as it is.
        """
        import contextlib

        import torch

        from runtime.device import in_eval_mode

        if self.stretch is None:
            self.trace(inputs, named_inputs)
        self.trainer.clear_used_gradients()
        self.status.keep(inputs, named_inputs)
        self.forget_snn()
        with contextlib.nullcontext() if torch.is_grad_enabled() else in_eval_mode(self.net):
            return self.model(*inputs, **named_inputs)

    def trace(self, args, kwargs):
        """Find the stretch in a run of the network, quantize it, and make the optimizer."""
        from conversion.plan import plan_conversion
        from dag_rewrites import prepare_conversion
        from runtime.device import in_eval_mode
        from transformer.splice import SplicedNet
        from transformer.stretch import cut_out
        from transformer.training import StretchTrainer

        with in_eval_mode(self.net):
            stretch, dag = cut_out(self.net, self.layers, args, kwargs)
        dag = prepare_conversion(dag, self.options.maxpool, self.options.signed, self.options.avgpool)
        plan_conversion(dag, self.options.ann_layers)
        self.model = SplicedNet(self.net, stretch, dag)
        self.trainer = StretchTrainer(self.model, self.options, self.forget_snn, **self.training_options)
        self.stretch = stretch

    @property
    def dag(self):
        """The stretch as an ANN with quantized weights, a SpikeDAGModule."""
        return self.model.part

    def forget_snn(self):
        """The next spiking network is converted again: weights or calibration inputs have changed."""
        self.snn = None

    # 3. The spiking network

    def generate_ann_snn(self):
        """The network with a spiking stretch: an nn.Module in eval mode with the arguments and outputs of `full_net`.

        The stretch's real-valued inputs enter its first layers as constant currents; its outputs are decoded spikes,
        lambda * mean_t(spike). The calibration uses the inputs kept by `inference_get_status`, run again through the
        present network in eval mode. Raises ValueError where no inputs were kept, or where the weights diverged.
        """
        import copy

        from transformer.splice import SplicedNet

        snn = copy.deepcopy(self.converted())
        return SplicedNet(copy.deepcopy(self.net), self.stretch, snn).eval()

    def converted(self):
        """The spiking stretch, a SpikeDAGModule; converted again only after changes. Raises ValueError as above."""
        if not self.status.calls:
            raise ValueError("there is nothing to calibrate on, call inference_get_status with some inputs first")
        if self.snn is None:
            self.snn = self.convert()
        return self.snn

    def convert(self):
        """Convert the stretch, calibrated on the kept inputs."""
        from ann_parser import autocast_off
        from snn_weight_setter import convert

        loader = [(inputs,) for inputs in self.stretch_inputs()]
        device = loader[0][0][0].device
        with autocast_off():
            return convert(self.dag, loader, device, self.options)

    def stretch_inputs(self):
        """The inputs that the stretch gets in eval mode, a tuple of tensors for each kept call of the network."""
        from transformer.splice import inputs_of_stretch

        return inputs_of_stretch(self.net, self.stretch, self.dag, self.status.calls)

    # 4. For the next stage

    def save_snn(self, directory, samples=4):
        """Write the spiking stretch into a folder, with test vectors of the first `samples` kept inputs, 1 or more.

        manifest.json holds its ops, shapes, bit width, integer weights, Vthr, scales, T, reset mode, and the sha256 of
        every file (`transformer.saved`). An earlier result in `directory` is replaced; nothing is left half-written.
        Raises OSError where the folder cannot be written, or holds other files.
        """
        import copy

        from ann_parser import autocast_off
        from runtime.ranges import Whole, check_number
        from transformer.saved import check_target, write_saved_snn
        from transformer.status import first_samples

        samples = check_number("samples", samples, Whole(1))
        check_target(directory)
        snn = self.converted()
        inputs = first_samples(self.stretch_inputs(), samples)
        bits, reset_mode = self.options.weight_bitwidth, self.options.reset_mode
        details = {"reset_mode": reset_mode, "weight_bitwidth": bits, "layers": list(self.layers)}
        with autocast_off():
            write_saved_snn(directory, copy.deepcopy(snn), inputs, details)


def plain_bitwidths(weight_bitwidth):
    """A bit width, or a list of them, as plain integers. Raises ValueError for anything else."""
    from quantization import check_bitwidth

    is_list = hasattr(weight_bitwidth, "__len__") and not isinstance(weight_bitwidth, str)
    for bits in weight_bitwidth if is_list else [weight_bitwidth]:
        check_bitwidth(bits)
    return [int(bits) for bits in weight_bitwidth] if is_list else int(weight_bitwidth)


def as_arguments(value):
    """A tuple of positional arguments; a single argument need not be in one."""
    return value if isinstance(value, tuple) else (value,)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    command = commands.add_parser("replay", help="simulate the test vectors of a folder again and compare every bit")
    command.add_argument("directory", help="a folder that SNNTransformer.save_snn has written")
    command.add_argument("--debug", action=argparse.BooleanOptionalAction, default=False, help="show tracebacks")
    return parser.parse_args(argv)


def main(args):
    from transformer.saved import Mismatch, replay

    try:
        print(replay(args.directory))
    except Mismatch as mismatch:
        print(f"error: {mismatch}, the spikes of {args.directory} are not reproduced", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, parse_args())
