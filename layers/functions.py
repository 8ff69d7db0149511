"""Functions that spikes cannot compute, such as sigmoid or exp: they stay ANN behind the last layer with weights."""

import inspect
from numbers import Real

import torch
import torch.nn.functional as F

from layers.base import ANALOG, CURRENT, SpikeLayer
from runtime.rules import Rule, one_of, several

# Activation functions: inside of a network, a ReLU can take their place (`dag_rewrites.replace_activations`).
ACTIVATIONS = (
    *("sigmoid", "tanh", "silu", "gelu", "elu", "selu", "celu", "mish", "hardswish", "hardsigmoid"),
    *("softplus", "softsign", "logsigmoid", "tanhshrink", "hardshrink", "softshrink"),
)
# Other functions of each value, or of each sample: `normalize` and `softmin` read whole rows.
OTHERS = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "pow", "reciprocal"),
    *("erf", "sin", "cos", "atan", "sinh", "cosh", "logit", "round", "floor", "ceil", "trunc", "sign", "nan_to_num"),
    *("normalize", "softmin"),
)
ROUNDINGS = ("round", "floor", "ceil", "trunc")
WITHOUT_OWN = ("sigmoid", "tanh")  # these two are deprecated in torch.nn.functional
NO_SETTINGS = ("inplace", "out", "_stacklevel")  # arguments that do not change the result

SETTING = Rule(
    lambda value: value is None or isinstance(value, (bool, Real)) or (isinstance(value, str) and len(value) < 20),
    "None, a number or a short word",
)
SETTINGS = Rule(
    lambda value: isinstance(value, dict) and all(isinstance(k, str) and SETTING.holds(v) for k, v in value.items()),
    f"a dictionary, for each name {SETTING.words}",
)


def function_called(name):
    """The torch function of a name in `ACTIVATIONS` or `OTHERS`."""
    home = F if hasattr(F, name) and name not in WITHOUT_OWN else torch
    return getattr(home, name)


def spellings():
    """Every spelling of every function -> its name, and whether it overwrites its input."""
    found = {torch.special.expit: ("sigmoid", False)}
    for name in (*ACTIVATIONS, *OTHERS):
        for spelling in (name, f"__{name}__", f"{name}_", f"__i{name}__"):
            homes = [home for home in (F, torch, torch.Tensor, torch.special) if hasattr(home, spelling)]
            in_place = spelling in (f"{name}_", f"__i{name}__")
            found.update((getattr(home, spelling), (name, in_place)) for home in homes)
    return found


def by_name(name, input, args, settings):
    """The arguments of a call, by position and by name: all by name if the function has a signature."""
    try:
        bound = inspect.signature(function_called(name)).bind(input, *args, **settings)
    except (ValueError, TypeError):  # a function written in C++ has no signature
        return args, settings
    (_, *rest) = bound.arguments.items()
    return (), dict(rest)


SPELLINGS = spellings()


class FunctionOp(SpikeLayer):
    """A function of the fixed table above, by its name. It stands behind the last layer with weights and stays ANN.

    args, settings: its arguments behind the input, by position and by name.
    """

    fields = {  # noqa: RUF012
        "name": one_of(*ACTIVATIONS, *OTHERS),
        "args": several(SETTING, 0, 8),
        "settings": SETTINGS,
    }
    is_measured = False
    stays_behind = True

    def __init__(self, name, args=(), settings=None):
        super().__init__()
        self.name, self.args, self.settings = name, tuple(args), dict(settings or {})

    @property
    def any_shape(self):
        """Whether a line is rounded as the map that it is stored as."""
        return self.name in ROUNDINGS

    @property
    def is_activation(self):
        """Whether a ReLU can take its place inside of a network."""
        return self.name in ACTIVATIONS

    @classmethod
    def traced(cls, trace, function, input, *args, **settings):
        name, in_place = SPELLINGS[function]
        return cls.record(trace, function, name, input, in_place, *args, **settings)

    @classmethod
    def record(cls, trace, function, name, input, in_place=False, *args, **settings):
        """Record a call of the function `name`; `in_place`: it overwrites its input.

        Raises NotImplementedError for arguments other than numbers and words.
        """
        args, settings = by_name(name, input, args, settings)
        in_place = in_place or settings.get("inplace", False)
        settings = {key: value for key, value in settings.items() if key not in NO_SETTINGS}
        if not all(map(SETTING.holds, args)) or not SETTINGS.holds(settings):
            trace.refuse(function, "its arguments must be numbers")
        op = cls(name, args, settings)
        output = trace.value_of(op, input, op.checked(trace, function, input))
        if in_place:
            return trace.record_in_place(name, op, [input], input.copy_(output))
        return trace.record(name, op, [input], output)

    @classmethod
    def contradiction(cls, config):
        """The error of the function for these arguments, or None."""
        if any(name in config["settings"] for name in NO_SETTINGS):
            return "settings: use those that change the result"
        try:
            cls(**config)(torch.zeros(1, 1, 1, 1))
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            return f"settings: {str(error).splitlines()[0]}"
        return None

    def checked(self, trace, function, input):
        """The result. Raises NotImplementedError if it mixes images or changes the type."""
        output = self.activation(input)
        if output.dtype != input.dtype or output.shape != input.shape:
            trace.refuse(function, f"the type must stay {input.dtype}")
        alone = self.activation(input[:1])
        if not torch.allclose(output[:1], alone, rtol=1e-4, atol=1e-6, equal_nan=True):
            trace.refuse(function, "it must work on each image alone, along dim=1 and not the batch")
        return output

    def activation(self, x):
        return function_called(self.name)(x, *self.args, **self.settings)

    def plan(self, place):
        """ANALOG of the image, and behind the last layer with weights. Raises ValueError elsewhere."""
        if place.is_image() or not (CURRENT in place.reads or place.has_weights_behind()):
            return ANALOG
        if not place.has_weights_behind():
            raise ValueError(f"{place.where} reads values that feed a ReLU too, apply it outside of the network")
        how = "use it only behind the last layer"
        if self.is_activation:
            how = "put a ReLU in its place (--replace_activations relu) and finetune"
        elif self.name in ROUNDINGS:
            how = "write the rounding of an activation as round(clamp(x / s, 0, n)) * s, to n + 1 levels"
        raise ValueError(
            f"{place.where}: spikes cannot compute {self.name} inside of a network: {how}, or leave it ANN together "
            "with the layer before it (--ann_layers)"
        )

    def misfit(self, reads):
        return "it has no place for neurons"

    def extra_repr(self):
        settings = [f"{key}={value}" for key, value in self.settings.items() if value is not None]
        return ", ".join([self.name, *map(str, self.args), *settings])
