"""The accuracies of the three networks on the same test images, with intervals, paired differences and classes."""

import hashlib

import numpy as np

from reports.statistics import compare, fisher, to_hex, unpaired_interval, wilson

POINTS = 1.0  # "within one point of the ANN"
KINDS = ("ann", "qnet", "snn")
DIFFERENCES = (("qnet", "ann"), ("snn", "qnet"), ("snn", "ann"))
MOST_CLASSES = 100  # with more, a confusion matrix has cells smaller than a pixel


def accuracy_facts(accuracies):
    """The entry "accuracy" of a report: top-1 with intervals, paired differences, accuracy after every timestep.

    accuracies: kind ("ann", "qnet", "snn") -> the result of `validate.evaluate` with answers.
    """
    images = accuracies["snn"]["samples"]
    right = {kind: accuracies[kind]["answers"]["right"].numpy() for kind in KINDS}  # bool [T or 1, N]
    measured = {kind: {key: accuracies[kind][key] for key in ("top1", "loss")} for kind in KINDS}
    facts = {kind: {**share(right[kind][-1]), **measured[kind]} for kind in KINDS}
    steps = {t: each for t, each in enumerate(right["snn"], start=1)}
    facts["by_timestep"] = {t: accuracies["snn"]["top1_by_timestep"][t - 1] for t in steps}
    facts["bands"] = {t: list(wilson(int(each.sum()), images)) for t, each in steps.items()}
    facts["paired"] = are_paired(accuracies)
    facts["differences"] = {f"{a}-{b}": difference(right[b][-1], right[a][-1], facts["paired"]) for a, b in DIFFERENCES}
    facts["fewest_timesteps"] = fewest_timesteps(right["ann"][-1], right["snn"], facts["paired"])
    facts["right"] = {kind: to_hex(right[kind][-1]) for kind in KINDS}
    facts["labels"] = fingerprint(accuracies["snn"]["answers"]["targets"])
    return facts


def share(right):
    """top1 in percent, its 95 % interval, and the number of images. right: bool [N]."""
    return {
        "top1": 100 * float(right.mean()),
        "interval": list(wilson(int(right.sum()), len(right))),
        "images": len(right),
    }


def are_paired(accuracies):
    """Whether the three networks saw the images in the same order. A loader of the user's may shuffle them."""
    first, *others = (accuracies[kind]["answers"]["targets"] for kind in KINDS)
    return all(first.equal(other) for other in others)


def fingerprint(targets):
    """A short text that is the same for two runs on the same test labels in the same order."""
    return hashlib.sha256(targets.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def difference(first, second, paired=True):
    """`statistics.compare` of two networks as a dict; without pairs, intervals and test for different images.

    first, second: bool [N]. The difference is second minus first.
    """
    if paired:
        return compare(first, second).to_dict()
    counts = [(int(each.sum()), len(each)) for each in (first, second)]
    points = 100 * (second.mean() - first.mean())
    return {"points": float(points), "interval": list(unpaired_interval(*counts)), "images": 0, "p": fisher(*counts)}


def fewest_timesteps(ann, snn, paired=True):
    """The fewest timesteps from which on the SNN stays within POINTS of the ANN; None where it never does.

    ann: bool [N]. snn: bool [T, N], after every timestep. "measured": by the measured accuracy. "sure": by the lower
    end of the 95 % interval of the difference.
    """
    differences = [difference(ann, each, paired) for each in snn]
    limits = {"measured": [x["points"] for x in differences], "sure": [x["interval"][0] for x in differences]}
    return {name: first_to_stay(np.array(values) >= -POINTS) for name, values in limits.items()}


def first_to_stay(holds):
    """The first timestep, counted from 1, from which on `holds`, bool [T], is true to the end; None without one."""
    if not holds[-1]:
        return None
    broken = np.nonzero(~holds)[0]
    return int(broken[-1]) + 2 if len(broken) else 1


def class_facts(accuracies, names):
    """Accuracy of every class and confusion of ANN and SNN on the test images; None for more than MOST_CLASSES.

    names: of the classes, or None. The confusion is [true class][answer], a count of images.
    """
    targets = accuracies["snn"]["answers"]["targets"].numpy()
    answers = {kind: accuracies[kind]["answers"]["classes"].numpy() for kind in ("ann", "snn")}
    count = 1 + int(max(targets.max(), *(each.max() for each in answers.values())))
    count = max(count, len(names or ()))
    if count > MOST_CLASSES or not are_paired(accuracies):
        return None
    facts = {"names": [str(name) for name in (names or range(count))], "confusion": {}, "classes": []}
    for kind, classes in answers.items():
        matrix = np.zeros((count, count), dtype=int)
        np.add.at(matrix, (targets, classes), 1)
        facts["confusion"][kind] = matrix.tolist()
    for label in range(count):
        mine = targets == label
        if mine.any():
            right = {kind: answers[kind][mine] == label for kind in answers}
            change = compare(right["ann"], right["snn"]).to_dict()
            facts["classes"].append({"class": label, **{k: share(v) for k, v in right.items()}, "change": change})
    return facts
