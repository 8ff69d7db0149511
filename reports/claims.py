"""What a report may claim: only what a paired test on the same images says, corrected for the number of comparisons.

better = better_ones(results)            # alternatives with significantly more right answers than CONTROL
choose(results)                          # a Choice: none, one that stands out, or several that cannot be told apart
"""

from dataclasses import asdict, dataclass

from options import FLOAT_BITS
from reports.alternatives import CONTROL
from reports.statistics import ALPHA, compare, from_hex, holm, p_in_words, visible_difference


@dataclass(frozen=True)
class Choice:
    """The alternatives that are better than CONTROL. kind: "none", "one" (it is better than all others), "several".

    names: the better ones, the one with most right answers first. p: their corrected p-values. tried: how many were
    compared. visible: points that a difference needs to be seen in 4 of 5 samples of this size.
    """

    kind: str
    names: tuple
    p: tuple
    tried: int
    visible: float
    images: int

    def to_dict(self):
        return asdict(self)


def right_of(result):
    """Which images a measured conversion has right, bool [N]."""
    return from_hex(result["right"], result["images"])


def differences(results):
    """Name -> Paired difference to CONTROL of every other result."""
    control = right_of(results[CONTROL])
    return {name: compare(control, right_of(each)) for name, each in results.items() if name != CONTROL}


def choose(results):
    """The Choice among measured conversions, name -> `alternatives.measure`, CONTROL among them.

    An alternative is better if McNemar's test, corrected by Holm's method for all alternatives, has p < 0.05. It stands
    out if it is also better than each other one, each with p < 0.05.
    """
    found = differences(results)
    corrected = dict(zip(found, holm([each.p for each in found.values()])))
    better = [name for name, each in found.items() if each.points > 0 and corrected[name] < ALPHA]
    better.sort(key=lambda name: (-found[name].points, latency(results[name])))
    kind = "none" if not better else "one" if stands_out(better[0], results) else "several"
    images = results[CONTROL]["images"]
    differing = max([each.lost + each.gained for each in found.values()], default=0)
    p = tuple(corrected[name] for name in better)
    return Choice(kind, tuple(better), p, len(found), visible_difference(differing, images), images)


def latency(result):
    """Timesteps to the answer, if they are known: of equally good alternatives the fastest comes first."""
    return result.get("duration", {}).get("latency", 0)


def stands_out(name, results):
    """Whether one alternative is better than each other one, by a paired test each."""
    right = right_of(results[name])
    others = [compare(right_of(each), right) for other, each in results.items() if other not in (name, CONTROL)]
    return all(each.points > 0 and each.p < ALPHA for each in others)


def recommended(results, choice, must_fit):
    """The flags to recommend: the best of `choice` that does not lose on the test images; None without one.

    Float weights show what rounding costs, but are none for a chip. must_fit: whether the weights have to fit it.
    """
    for name in choice.names:
        result, test = results[name], results[name].get("test")
        if (must_fit and not result.get("fits", True)) or result.get("bits") == FLOAT_BITS:
            continue
        if test is None or test["top1"] >= results[CONTROL]["test"]["top1"]:
            return name
    return None


# ---------------------------------------------------------------------------------------------------------------------
# sentences


def interval_in_words(interval):
    """A 95 % interval of points."""
    return f"95 % interval {interval[0]:+.1f} to {interval[1]:+.1f}"


def loss_in_words(accuracy, timesteps):
    """The sentences about the accuracies of the three networks. accuracy: as `accuracy.accuracy_facts` gives it."""
    ann, snn, images = accuracy["ann"], accuracy["snn"], accuracy["snn"]["images"]
    change = accuracy["differences"]["snn-ann"]
    words = (
        f"The spiking network answers {snn['top1']:.2f} % of {images} test images right, the float ANN "
        f"{ann['top1']:.2f} %: {change['points']:+.2f} points ({interval_in_words(change['interval'])}). "
    )
    p = p_in_words(change["p"])
    p = f"p < {p[1:]}" if p.startswith("<") else f"p = {p}"
    if change["p"] >= ALPHA:
        return [words + f"These images show no difference between the two ({p})."]
    direction = "loses accuracy" if change["points"] < 0 else "gains accuracy"
    sentences = [words + f"So the conversion to {timesteps} timesteps {direction} ({p})."]
    steps = {"the integer weights": "qnet-ann", "the spikes": "snn-qnet"}
    changes = {name: accuracy["differences"][key] for name, key in steps.items()}
    corrected = dict(zip(changes, holm([each["p"] for each in changes.values()])))
    told = [
        f"{name} change it by {each['points']:+.2f} points ({interval_in_words(each['interval'])}"
        + (")" if corrected[name] < ALPHA else ", not significant)")
        for name, each in changes.items()
    ]
    return [sentences[0] + f" Of this, {' and '.join(told)}."]


def layer_in_words(choice, results, paths, words, layers):
    """The sentence about the layer whose rounding costs most. paths: op name -> module path. words: which images.

    layers: how many layers have rounded weights; `choice` compares those that the ANN alone found worth it.
    """
    of = f"{choice.images} {words}"
    tried = f"{choice.tried} of {layers} layers" if choice.tried < layers else f"{layers} layers"
    if choice.kind == "none" and right_of(results[CONTROL]).all():
        return f"No layer's rounding costs an answer on {of}: all of them are answered right."
    if choice.kind == "none":
        return (
            f"No single layer stands out: float weights in any one of {tried} give no significant change on {of} "
            f"(differences under about {choice.visible:.1f} points cannot be seen)."
        )
    found, told = differences(results), []
    for name in choice.names:
        each = found[name]
        told.append(f"{in_place(name, paths)} ({each.points:+.1f} points, {interval_in_words(each.interval)})")
    if choice.kind == "one":
        return f"The worst layer is {told[0]}: that is what float weights in it alone regain, on {of}."
    return (
        f"Float weights in one layer alone help in {', '.join(told)}, on {of}; which of the layers compared costs "
        "most cannot be told from them."
    )


def in_place(name, paths):
    """An op name with its module path, if it has another one."""
    path = paths.get(name, "")
    return f"{name} ({path})" if path not in ("", name) else name


def flags_in_words(choice, results, words, name):
    """The sentence about the other flags. name: the recommended ones (`recommended`), or None."""
    of = f"{choice.images} {words}"
    if choice.kind == "none" and right_of(results[CONTROL]).all():
        return f"No flag can be better on {of}: all of them are answered right as asked for."
    if choice.kind == "none":
        return (
            f"None of {choice.tried} other flags is significantly better on {of} (differences under about "
            f"{choice.visible:.1f} points cannot be seen)."
        )
    found = differences(results)
    told = [f"{flags} ({found[flags].points:+.1f} points)" for flags in choice.names]
    sentence = f"Significantly better on {of}: {', '.join(told)}"
    if len(told) > 1:
        is_best = choice.kind == "one"
        sentence += f"; {choice.names[0]} regains most" if is_best else "; which regains most cannot be told"
    if name is None:
        return sentence + ". None of them both suits the chip and holds its gain on the test images."
    test, before = results[name].get("test"), results[CONTROL].get("test")
    if test is None:
        return sentence + "."
    return (
        sentence
        + f". On {test['images']} test images, {name} has {test['top1']:.1f} % ({before['top1']:.1f} % as asked for)."
    )
