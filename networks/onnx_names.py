"""Module paths for the nodes of an ONNX graph: those of the exported PyTorch network, as far as the file tells them."""

import re
from collections import Counter

SCOPES = "pkg.torch.onnx.name_scopes"  # where torch.onnx's newer exporter writes the modules of a node
LONGEST_NAME = 80  # letters


def module_paths(protos):
    """One module path per node, all different.

    A layer is named after its weight ("layer1.conv.weight"), else after the module that it was called in. That module
    must belong to the node alone; the name of the node follows otherwise.
    """
    scopes = [scope_of(proto) for proto in protos]
    crowded = Counter(parent for scope in scopes for parent in {scope, *parents_of(scope)})
    taken, paths = set(), []
    for proto, scope in zip(protos, scopes):
        path = scope if scope and crowded[scope] == 1 else ".".join(filter(None, [scope, leaf_of(proto)]))
        number = 2
        while path in taken:
            path, number = f"{path.removesuffix(f'_{number - 1}')}_{number}", number + 1
        taken.add(path)
        paths.append(path)
    return paths


def parents_of(scope):
    """The paths above a path: "a.b.c" -> "a", "a.b"."""
    parts = scope.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def scope_of(proto):
    """The path of the module that a node was exported from, "" if the file does not tell."""
    weights = [name.removesuffix(".weight") for name in proto.input[1:2] if name.endswith(".weight")]
    if weights:
        return clean(weights[0])
    scopes = next((entry.value for entry in getattr(proto, "metadata_props", ()) if entry.key == SCOPES), "")
    found = re.findall(r"'([^']*)'", scopes)
    if found:
        return clean(found[-2]) if len(found) > 1 else ""
    path, above = "", None
    for part in proto.name.strip("/").split("/")[:-1]:
        # an exporter writes "layer1/layer1.0": a module in a Sequential has the path of that one, too
        is_in_sequential = above is not None and part.startswith(f"{above}.")
        path = path.removesuffix(above) + part if is_in_sequential else f"{path}.{part}".strip(".")
        above = part
    return clean(path)


def leaf_of(proto):
    """The name of a node within its module."""
    last = proto.name.strip("/").split("/")[-1]
    return clean(last.replace(".", "_")) or clean(proto.op_type)


def clean(path):
    """A path of letters, digits and underscores. A part never has the name of an attribute such as "weight"."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII)[:LONGEST_NAME] for part in path.split(".")]
    return ".".join(part for part in parts if part)


def place(root, path, module, make):
    """Make `module` the submodule `path` of `root`; `make()` makes the modules between them that do not exist yet."""
    *parents, name = path.split(".")
    for part in parents:
        part = free_name(root, part)
        if part not in root._modules:
            root.add_module(part, make())
        root = root._modules[part]
    name = free_name(root, name)
    while name in root._modules:
        name += "_"
    root.add_module(name, module)


def free_name(module, name):
    """The name, with underscores behind it as long as it is an attribute of the module that is no submodule."""
    while hasattr(module, name) and name not in module._modules:
        name += "_"
    return name
