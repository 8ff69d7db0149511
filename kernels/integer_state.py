"""Detect whether the tensors behind a prepared object have changed."""


class IntegerState:
    """An object `made` from a layer's integer tensors, with the versions that the tensors had at that time."""

    def __init__(self, made, *tensors):
        self.made = made
        self.tensors = tensors  # keeps the tensors alive, so that no other tensor can reuse their identity
        self.versions = versions_of(tensors)

    def holds(self, *tensors):
        """Whether the given tensors are the same objects as before, without changes in place."""
        same = len(tensors) == len(self.tensors)
        for mine, theirs in zip(self.tensors, tensors):
            same = same and mine is theirs
        return same and versions_of(tensors) == self.versions


def versions_of(tensors):
    """How often each tensor was changed in place; None for no tensor, and for inference tensors, which do not count."""
    versions = []
    for tensor in tensors:
        versions.append(None if tensor is None or tensor.is_inference() else tensor._version)
    return versions
