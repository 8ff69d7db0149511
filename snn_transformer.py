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

What `save_snn` has written is simulated again, bit for bit, by

    python3 snn_transformer.py replay saved
"""

import argparse
import contextlib
import sys

from runtime.cli import OneLineParser, run_script

MOST_STATUS_BYTES = 2**28  # of inputs that are kept for the calibration
LR = 0.001  # at 0.01, 9 blocks of a trained ResNet-20 at 4 bits fall from 68 to 10 % in 5 steps; at this, they gain


class SNNTransformer:
    """Turns a contiguous stretch of a network into spikes; the rest stays as it is.

    full_net: any nn.Module; it is never changed, the transformer works on a copy, on its device. layers: names of
    modules ("layer1", "layer2.0"), or the modules, of one contiguous stretch. What runs inside of them is converted,
    with the operations that the forward around them makes in between (adds, concatenations, functional ReLUs) and the
    functional ReLUs directly behind. Everything else may be any Python code, with any inputs and outputs. The stretch
    runs in float32, also where the rest runs under autocast.

    timesteps: T. weight_bitwidth: 1 to 8, one number or one for each layer, or 32 for float weights. lr, momentum,
    weight_decay: of `optimizer`, which trains the whole network; the defaults suit one that is trained already, and
    longer gradients are cut (`quantization.LONGEST_GRADIENT`). damping: pull of the stretch's weights towards
    integers, a share of lr (`dampen`). per_channel: a weight scale per output channel. calibration_samples: the newest
    inputs that calibration sees.
    conversion: what `trans_ann2snn_weight` takes else (reset_mode, listen, threshold, quantile, granularity,
    correction, hold_back, initial_potential, maxpool, signed, avgpool, ann_layers). example_inputs: a tuple of
    arguments of the network, with which the stretch is traced at once, so that `optimizer` exists before the first
    `inference_get_status`; without it, that call traces it.

    Raises ValueError for layers that the network lacks, and, when it traces, for a list with a gap, which it names, and
    for what cannot be converted; NotImplementedError for a function in the stretch that cannot be traced.
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
        from transformer.stretch import module_paths

        weight_bitwidth = plain_bitwidths(weight_bitwidth)
        check_options(conversion)
        check_values(timesteps, calibration_samples, damping, conversion)
        timesteps, calibration_samples = int(timesteps), int(calibration_samples)  # also of NumPy's numbers
        self.layers = module_paths(full_net, layers)
        self.net = copy_of(full_net)
        self.timesteps, self.bits, self.per_channel, self.damping = timesteps, weight_bitwidth, per_channel, damping
        self.sgd_options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.calibration_samples, self.conversion = calibration_samples, conversion
        self.status = Status(calibration_samples)
        self.stretch = self.model = self.sgd = self.snn = None
        self.steps, self.has_stepped = 0, False
        if not self.net.training:  # as it comes from a validation; modules that alone are in eval mode stay frozen
            self.net.train()
        if example_inputs is not None:
            self.trace(as_arguments(example_inputs), {})

    # 2. Training

    @property
    def optimizer(self):
        """A QuantSGD of all parameters, which quantizes the stretch's weights again after each step."""
        if self.sgd is None:
            raise ValueError(
                "the optimizer exists once the network is traced: call inference_get_status first, or pass "
                "example_inputs=(inputs,) to SNNTransformer"
            )
        return self.sgd

    def inference_get_status(self, *inputs, **named_inputs):
        """The network's output in training mode, with b-bit weights in the stretch; keeps the inputs for calibration.

        Arguments and output are those of the network. Gradients of before the last `optimizer.step()` are cleared, so
        that the loop needs no zero_grad; without a step in between they add up. BatchNorms of the stretch are folded
        into its weights, and it has no dropout. Under `torch.no_grad()` the network runs in eval mode: this gathers the
        status of a network that is not to be trained, and leaves it as it is.
        """
        import torch

        if self.stretch is None:
            self.trace(inputs, named_inputs)
        if self.has_stepped:
            self.optimizer.zero_grad()
            self.has_stepped = False
        self.status.keep(inputs, named_inputs)
        self.snn = None
        with contextlib.nullcontext() if torch.is_grad_enabled() else in_eval_mode(self.net):
            return self.model(*inputs, **named_inputs)

    def trace(self, args, kwargs):
        """Find the stretch in a run of the network, quantize it, and make the optimizer."""
        from conversion.plan import plan_conversion
        from dag_rewrites import prepare_conversion
        from quantization import init_quantize_net
        from transformer.stretch import SplicedNet, StretchSGD, cut_out

        with in_eval_mode(self.net):
            stretch, dag = cut_out(self.net, self.layers, args, kwargs)
        choices = {name: self.conversion[name] for name in GRAPH_OPTIONS if name in self.conversion}
        dag = prepare_conversion(dag, **choices)
        plan_conversion(dag, self.conversion.get("ann_layers", ()))
        init_quantize_net(dag, self.bits, self.per_channel)
        self.model = SplicedNet(self.net, stretch, dag)
        parameters = [*(p for p in self.net.parameters() if p.requires_grad), *dag.trained_parameters()]
        group = {"params": parameters}  # as a group they may be none, of a network that is not to be trained
        self.sgd = StretchSGD([group], self.before_step, self.after_step, **self.sgd_options)
        self.stretch = stretch

    @property
    def dag(self):
        """The stretch as an ANN with quantized weights, a SpikeDAGModule."""
        return self.model.part

    def before_step(self):
        """The pull towards the integers; the gradients of what is frozen go, and long ones are cut."""
        import torch

        from quantization import LONGEST_GRADIENT, dampen, forget_frozen

        forget_frozen(self.dag)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, LONGEST_GRADIENT)
        dampen(self.dag, self.damping)

    def after_step(self):
        """The weights of the stretch, quantized again.

        Their scales are chosen anew after 1, 2, 4, 8, ... steps, so that they follow the weights, and the integers have
        half of all steps or more to settle on fixed scales.
        """
        from quantization import choose_scales, quantize_layers

        self.steps, self.has_stepped, self.snn = self.steps + 1, True, None
        if self.steps & (self.steps - 1) == 0:
            choose_scales(self.dag, self.per_channel)
        quantize_layers(self.dag)

    # 3. The spiking network

    def generate_ann_snn(self):
        """The network with a spiking stretch: an nn.Module in eval mode with the arguments and outputs of `full_net`.

        The stretch's real-valued inputs flow into its first layers as constant currents, and its outputs are decoded,
        lambda * mean_t(spike). It is calibrated on the inputs that `inference_get_status` kept, run anew through the
        network as it is now, in eval mode. Raises ValueError where there are none, and where the weights diverged.
        """
        import copy

        from transformer.stretch import SplicedNet

        self.check_has_status()
        if self.snn is None:
            self.snn = self.convert()
        return SplicedNet(copy.deepcopy(self.net), self.stretch, copy.deepcopy(self.snn)).eval()

    def convert(self):
        """The spiking stretch, a SpikeDAGModule."""
        from ann_parser import autocast_off
        from snn_weight_setter import trans_ann2snn_weight

        loader = [(inputs,) for inputs in self.stretch_inputs()]
        device = loader[0][0][0].device
        with autocast_off():
            return trans_ann2snn_weight(
                self.dag,
                loader,
                device,
                self.timesteps,
                self.bits,
                per_channel=self.per_channel,
                calibration_samples=self.calibration_samples,
                **self.conversion,
            )

    def stretch_inputs(self):
        """What the stretch reads in eval mode, a tuple of tensors for each kept call of the network."""
        import torch

        from transformer.stretch import run_spliced

        found = []

        def part(*inputs):
            found.append(inputs)
            return self.dag(*inputs)

        with torch.no_grad(), in_eval_mode(self.net), in_eval_mode(self.dag):
            for args, kwargs in self.status.calls:
                run_spliced(self.net, self.stretch, part, args, kwargs)
        return found

    def check_has_status(self):
        """Raise ValueError before the first `inference_get_status`."""
        if not self.status.calls:
            raise ValueError("there is nothing to calibrate on, call inference_get_status with some inputs first")

    # 4. For the next stage

    def save_snn(self, directory, samples=4):
        """Write the spiking stretch into a folder, with test vectors of the first `samples` kept inputs, 1 or more.

        manifest.json holds its ops, shapes, bit width, integer weights, Vthr, scales, T, reset mode, and the sha256 of
        every file (`transformer.saved`). An earlier result in `directory` is replaced; nothing is left half-written.
        Raises OSError where the folder cannot be written, or holds something else.
        """
        import copy

        from ann_parser import autocast_off
        from options import check_option
        from transformer.saved import check_target, write_saved_snn

        samples = check_option("samples", samples)
        check_target(directory)
        self.check_has_status()
        if self.snn is None:
            self.snn = self.convert()
        inputs = first_samples(self.stretch_inputs(), samples)
        with autocast_off():
            write_saved_snn(directory, copy.deepcopy(self.snn), inputs, self.details())

    def details(self):
        """What the manifest tells beside the network itself."""
        import platform

        import torch

        return {
            "reset_mode": self.conversion.get("reset_mode", "subtraction"),
            "weight_bitwidth": self.bits,
            "layers": list(self.layers),
            "duration": self.snn.duration(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }


CONVERSION_OPTIONS = (
    "reset_mode",
    "initial_potential",
    "listen",
    "threshold",
    "quantile",
    "granularity",
    "correction",
    "hold_back",
    "maxpool",
    "signed",
    "avgpool",
    "ann_layers",
)
GRAPH_OPTIONS = ("maxpool", "signed", "avgpool")  # of `prepare_conversion`


def check_options(options):
    """Raise TypeError for an option that the conversion does not have."""
    unknown = [name for name in options if name not in CONVERSION_OPTIONS]
    if unknown:
        raise TypeError(f"SNNTransformer has no option {unknown[0]}, it has {', '.join(CONVERSION_OPTIONS)}")


def check_values(timesteps, calibration_samples, damping, conversion):
    """Raise ValueError for values that the conversion, at the end of a training, would not take."""
    from conversion.options import check_conversion

    elsewhere = ("maxpool", "signed", "ann_layers")  # checked when the stretch is traced
    options = {name: value for name, value in conversion.items() if name not in elsewhere}
    check_conversion(timesteps, calibration_samples=calibration_samples, **options)
    if not damping >= 0:
        raise ValueError(f"damping {damping}: use 0 or more")


def plain_bitwidths(weight_bitwidth):
    """A bit width, or a list of them, as plain integers. Raises ValueError for anything else."""
    from quantization import check_bitwidth

    is_list = hasattr(weight_bitwidth, "__len__") and not isinstance(weight_bitwidth, str)
    for bits in weight_bitwidth if is_list else [weight_bitwidth]:
        check_bitwidth(bits)
    return [int(bits) for bits in weight_bitwidth] if is_list else int(weight_bitwidth)


def as_arguments(value):
    """Positional arguments: a tuple as it is, anything else as the only one."""
    return value if isinstance(value, tuple) else (value,)


def first_samples(calls, samples):
    """The first `samples` inputs of the stretch, of as many calls as needed; fewer where fewer were kept.

    calls: a tuple of tensors [B, ...] each. Calls with samples of another shape than the first are left out.
    """
    import torch

    shapes = [x.shape[1:] for x in calls[0]]
    alike = [inputs for inputs in calls if [x.shape[1:] for x in inputs] == shapes]
    return [torch.cat(columns)[:samples] for columns in zip(*alike)]


class Status:
    """The newest inputs of the network, as many as the calibration sees, within `MOST_STATUS_BYTES`."""

    def __init__(self, samples):
        self.samples, self.calls, self.sizes = samples, [], []

    def keep(self, args, kwargs):
        """Keep copies of the arguments of one more call; the oldest ones go where others suffice."""
        import torch
        from torch.utils._pytree import tree_map

        def copy_of(value):
            return value.detach().clone() if isinstance(value, torch.Tensor) else value

        args, kwargs = tree_map(copy_of, (args, kwargs))
        self.calls.append((args, kwargs))
        self.sizes.append(size_of((args, kwargs)))
        while len(self.calls) > 1 and not self.needs_oldest():
            del self.calls[0], self.sizes[0]

    def needs_oldest(self):
        """Whether the calls behind the oldest are too few, and all of them not too large."""
        samples, memory = (sum(column) for column in zip(*self.sizes))
        return samples - self.sizes[0][0] < self.samples and memory <= MOST_STATUS_BYTES


def size_of(arguments):
    """Samples and bytes of the arguments of a call; the first tensor has the batch in front."""
    from transformer.stretch import tensors_in

    tensors = tensors_in(arguments)
    memory = sum(x.numel() * x.element_size() for x in tensors)
    return (len(tensors[0]) if tensors and tensors[0].dim() else 1), memory


@contextlib.contextmanager
def in_eval_mode(net):
    """Within it, a module and all inside are in eval mode; afterwards in the mode that each had."""
    modes = {module: module.training for module in net.modules()}
    try:
        net.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


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
