"""Whether tensors are still those that something was prepared from."""


class IntegerState:
    """What was `made` of the tensors that are a layer's integers, and how often these were changed in place then."""

    def __init__(self, made, *tensors):
        self.made = made
        self.tensors = tensors  # kept, so that no other tensor takes their place in memory
        self.versions = versions_of(tensors)

    def holds(self, *tensors):
        """Whether these are still the tensors, unchanged."""
        same = len(tensors) == len(self.tensors)
        for mine, theirs in zip(self.tensors, tensors):
            same = same and mine is theirs
        return same and versions_of(tensors) == self.versions


def versions_of(tensors):
    """How often each tensor was changed in place."""
    versions = []
    for tensor in tensors:
        versions.append(None if tensor is None or tensor.is_inference() else tensor._version)
    return versions
