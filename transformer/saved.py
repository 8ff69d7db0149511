"""A converted stretch as a folder for the next stage of a tool chain, with test vectors, and their replay.

    write_saved_snn(folder, snn, inputs, details)      # manifest.json and .npy files
    replay(folder)                                     # simulates the vectors again, bit for bit

manifest.json describes every op with its shapes, integer weights, Vthr and scales. Tensors with more than one element
are .npy files beside it, each with its sha256. The vectors are the inputs, the constant currents of the first layers
(float32), every layer's spikes, and the outputs. Behind the constant currents every operation is integer arithmetic or
a single float32 operation per element, with the same result on every machine. The currents themselves are sums of
floats; a replay compares them to within `CURRENT_TOLERANCE` of the largest.
"""

import hashlib
import json
import math
import os
import platform
import shutil
from contextlib import contextmanager

import numpy as np
import torch

from runtime.files import naming, remove_stale, temporary_beside
from runtime.torch_files import OtherFile
from spike_dag import FORMAT as DAG_FORMAT
from spike_dag import from_dict
from spike_layers import OP_TYPES, SpikeLayer
from spike_simulator import node_shapes, one_thread_per_operator, run_ops
from spike_tensor import Current, Memory, SpikeTensor

FORMAT = "ann2snn-stretch-1"
MANIFEST = "manifest.json"
TABLE = "layers.csv"  # of whole networks (`export.integers`)
ARRAY_FOLDERS = ("weights", "vectors")
# Of the largest value. Another machine adds the products of a convolution in another order; over a few thousand terms
# float32 (epsilon 1.2e-7) then differs by a few 1e-6 at most.
CURRENT_TOLERANCE = 1e-5


class Damaged(ValueError):
    """A file in a folder differs from the one that was saved there; the message names it."""


class Mismatch(Exception):
    """A replay gives other spikes or outputs than the vectors."""


# ---------------------------------------------------------------------------------------------------------------------
# Simulation, every value kept


@torch.no_grad()
def simulate_nodes(snn, known):
    """Node -> its value over all timesteps. known: the same for some nodes, whose values are not computed."""
    values = dict(known)
    entries = [entry for entry in snn.ops.values() if entry.out not in known]
    with one_thread_per_operator:
        run_ops(entries, values, snn.timesteps, Memory(snn.timesteps))
    return values


def make_vectors(snn, inputs):
    """The test vectors for inputs [B, ...], a dict of "constants", "spikes" and "outputs", each node -> array.

    constants: float32 [B, ...], the inputs and every value computed from them before the first spike. spikes: uint8
    [T, B, ...] of every layer that fires. outputs: float32 [B, ...].
    """
    values, nodes = simulate_nodes(snn, dict(zip(snn.inputs_nodes, inputs))), nodes_of_vectors(snn)
    return {
        "constants": {node: tensor_of(values[node]).numpy() for node in nodes["constants"]},
        "spikes": {node: steps_of(values[node], snn.timesteps) for node in nodes["spikes"]},
        "outputs": {node: activation_of(values[node]).numpy() for node in nodes["outputs"]},
    }


def nodes_of_vectors(snn):
    """The nodes of each kind of test vector (`make_vectors`), in the order of computation."""
    nodes = [*snn.inputs_nodes, *(entry.out for entry in snn.ops.values())]
    firing = {entry.out for entry in snn.ops.values() if entry.op.neuron is not None}
    behind = set(snn.outputs_nodes) | nodes_from_spikes(snn)
    return {
        "constants": [node for node in nodes if node not in behind or node in snn.inputs_nodes],
        "spikes": [node for node in nodes if node in firing],
        "outputs": list(snn.outputs_nodes),
    }


def nodes_from_spikes(snn):
    """Nodes of spikes and nodes that depend on spikes."""
    nodes = set()
    for entry in snn.ops.values():
        if entry.op.neuron is not None or not nodes.isdisjoint(entry.inputs):
            nodes.add(entry.out)
    return nodes


def nodes_of_reals(snn):
    """Nodes of real values: inputs, outputs of layers that stay ANN, and currents computed from either."""
    nodes = set(snn.inputs_nodes)
    for entry in snn.ops.values():
        op = entry.op
        if not op.spiking or (op.neuron is None and not nodes.isdisjoint(entry.inputs)):
            nodes.add(entry.out)
    return nodes


def tensor_of(value):
    """The tensor [B, ...] of an activation, or of a current that is the same at every step."""
    return value.data if isinstance(value, Current) else value


def steps_of(spikes, timesteps):
    """uint8 [T, B, ...] of a spike train."""
    return spikes.data.unflatten(0, (timesteps, -1)).to(torch.uint8).numpy()


def activation_of(value):
    """The activation [B, ...]: spikes are decoded."""
    return value.to_float() if isinstance(value, SpikeTensor) else value


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_saved_snn(folder, snn, inputs, details, table=None):
    """Write the whole `folder`, or leave it as it was; an earlier result in it is replaced.

    inputs: a tuple of tensors [B, ...], one for each input of the stretch. details: further entries of the manifest, as
    plain data. table: the text of layers.csv, or None. Raises OSError where the folder cannot be written, or holds
    other files.
    """
    check_target(folder)
    folder = os.path.realpath(folder)  # replaces the folder behind a link, not the link
    snn = snn.cpu()
    inputs = tuple(x.detach().cpu().float() for x in inputs)
    remove_stale(folder)
    temporary = temporary_beside(folder)
    os.makedirs(temporary)
    try:
        with naming(folder):
            if table is not None:
                write_table(temporary, table)
                details = {**details, "table": {"file": TABLE, "sha256": file_hash(os.path.join(temporary, TABLE))}}
            write_contents(temporary, snn, inputs, details)
            put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(folder):
    """Raise OSError unless `folder` is new, empty, or an earlier result, in a folder that exists."""
    if not os.fspath(folder):
        raise OSError("cannot write to an empty folder name, name a folder")
    parent = os.path.dirname(os.path.realpath(folder))
    if not os.path.isdir(parent):
        raise OSError(f"cannot write {folder}, there is no folder {parent}, create it first")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise OSError(f"cannot write {folder}, it is a file, name a folder")
    if os.path.isdir(folder) and os.listdir(folder) and not is_earlier_result(folder):
        raise OSError(f"cannot write {folder}, the folder holds other files, name a new or empty one")
    if not os.access(parent, os.W_OK):
        raise OSError(f"cannot write {folder}, the folder {parent} refuses new files")


def is_earlier_result(folder):
    """Whether a folder contains a manifest of this format and otherwise only layers.csv and `FileWriter`'s .npy files.

    The check is strict because the contents of an earlier result are deleted.
    """
    if not set(os.listdir(folder)) <= {MANIFEST, TABLE, *ARRAY_FOLDERS}:
        return False
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return False
    arrays = [os.path.join(folder, name) for name in ARRAY_FOLDERS if os.path.lexists(os.path.join(folder, name))]
    return all(os.path.isdir(path) and all(name.endswith(".npy") for name in os.listdir(path)) for path in arrays)


def put_in_place(temporary, folder):
    """Rename the finished new folder to `folder`, then delete the old one."""
    old = f"{temporary}.old"
    if os.path.isdir(folder):
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if os.path.isdir(old):
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_table(folder, table):
    with open(os.path.join(folder, TABLE), "w", encoding="utf-8") as file:
        file.write(table)


def write_contents(folder, snn, inputs, details):
    """Write the .npy files, then the manifest."""
    files = FileWriter(folder)
    shapes = node_shapes(snn, *(x[:1] for x in inputs))
    vectors = make_vectors(snn, inputs)
    manifest = {
        "format": FORMAT,
        "timesteps": snn.timesteps,
        **details,
        "duration": snn.duration(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "inputs": [{"node": node, "shape": list(shapes[node])} for node in snn.inputs_nodes],
        "outputs": [{"node": node, "shape": list(shapes[node])} for node in snn.outputs_nodes],
        "ops": [describe_op(op, shapes, files) for op in hardware_dict(snn)["ops"]],
        "vectors": {
            "constants": {node: files.add(f"vectors/{node}", x) for node, x in vectors["constants"].items()},
            "spikes": {node: files.add(f"vectors/{node}", x, packed=True) for node, x in vectors["spikes"].items()},
            "outputs": {node: files.add(f"vectors/{node}.decoded", x) for node, x in vectors["outputs"].items()},
        },
    }
    manifest["sha256"] = hash_of(manifest)
    with open(os.path.join(folder, MANIFEST), "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")


def hardware_dict(snn):
    """`SpikeDAGModule.to_dict()`, without the float weights of layers that read spikes: these use integers only."""
    data, reals = snn.to_dict(), nodes_of_reals(snn)
    for op in data["ops"]:
        del op["frozen"], op["weight_back"]  # needed only for training
        if op["spiking"] and op["in_nodes"][0] not in reals and "weight_q" in op["tensors"]:
            unused = ("weight", "bias", "weight_scale")
            op["tensors"] = {name: tensor for name, tensor in op["tensors"].items() if name not in unused}
        if op["neuron"] is not None:
            op["neuron"] = {key: value for key, value in op["neuron"].items() if key != "spike_type"}
    return data


def describe_op(op, shapes, files):
    """An op's entry in the manifest; its tensors are written to files."""
    shape = {"in_shapes": [list(shapes[n]) for n in op["in_nodes"]], "out_shape": list(shapes[op["out_nodes"][0]])}
    return {key: files.to_json(value, f"weights/{op['name']}") for key, value in op.items()} | shape


class FileWriter:
    """Turns values into plain data for JSON; tensors with more than one element become .npy files below `folder`."""

    def __init__(self, folder):
        self.folder = folder

    def to_json(self, value, name):
        """A value as nested plain data; `from_json` is the inverse. name: of its files."""
        if isinstance(value, dict):
            return {key: self.to_json(item, f"{name}.{key}") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.to_json(item, f"{name}.{i}") for i, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        array = value.detach().cpu().numpy()
        return {"dtype": str(array.dtype), "value": array.item()} if not array.ndim else self.add(name, array)

    def add(self, name, array, packed=False):
        """Write an array, with `packed` as bits (numpy.packbits); returns its entry in the manifest."""
        path = os.path.join(self.folder, f"{name}.npy")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        np.save(path, np.packbits(array) if packed else np.ascontiguousarray(array), allow_pickle=False)
        entry = {"file": f"{name}.npy", "dtype": str(array.dtype), "shape": list(array.shape)}
        return {**entry, **({"packed_bits": True} if packed else {}), "sha256": file_hash(path)}


def file_hash(path):
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def hash_of(manifest):
    """sha256 of a manifest without its entry "sha256"."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_manifest(folder):
    """The manifest of a folder. Raises OSError or ValueError where it is missing, damaged, or of another format."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no {path}, name a folder that SNNTransformer.save_snn has written")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged ({error}), save the network again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Damaged(f"{path} is not a manifest of format {FORMAT}, save the network again")
    if manifest.get("sha256") != hash_of(manifest):
        raise Damaged(f"{path} is damaged, its sha256 is another, save the network again")
    return manifest


def read_array(folder, entry):
    """The array of a manifest's entry. Raises OSError or ValueError where its file is missing or damaged."""
    path = os.path.join(folder, entry["file"])
    if os.path.isabs(entry["file"]) or ".." in entry["file"].split("/"):
        raise Damaged(f"{folder}/{MANIFEST} names the file {entry['file']} outside of the folder, do not trust it")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing, save the network again")
    if file_hash(path) != entry["sha256"]:
        raise Damaged(f"{path} is damaged, its sha256 is another, save the network again")
    array = load_npy(path)
    if entry.get("packed_bits"):
        return unpack(array, path, entry["shape"])
    if str(array.dtype) != entry["dtype"] or list(array.shape) != entry["shape"]:
        raise Damaged(
            f"{path} is damaged: it holds {array.dtype} {list(array.shape)}, the manifest says {entry['dtype']} "
            f"{entry['shape']}, save the network again"
        )
    return array


def load_npy(path):
    """The array in a .npy file. Raises Damaged for another file (NumPy's error would advise to allow pickles)."""
    try:
        # mapped first, so that a header with a huge shape is refused before memory is allocated
        return np.array(np.lib.format.open_memmap(path, mode="r"))
    except (ValueError, TypeError, OverflowError, EOFError) as error:
        raise Damaged(f"{path} is damaged, it holds no array of numbers, save the network again") from error


def unpack(array, path, shape):
    """Spikes [T, B, ...] from their bits (numpy.packbits)."""
    count = math.prod(shape)
    if array.dtype != np.uint8 or array.shape != (-(-count // 8),):
        raise Damaged(f"{path} has the wrong size for spikes of the shape {shape}, save the network again")
    return np.unpackbits(array, count=count).reshape(shape)


def from_json(value, folder):
    """The inverse of `FileWriter.to_json`; lists become tuples."""
    if isinstance(value, list):
        return tuple(from_json(item, folder) for item in value)
    if not isinstance(value, dict):
        return value
    if "sha256" in value:
        return torch.from_numpy(read_array(folder, value))
    if set(value) == {"dtype", "value"}:
        return torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]))
    return {key: from_json(item, folder) for key, item in value.items()}


def load_saved_snn(folder, manifest=None):
    """The spiking network in a folder, a SpikeDAGModule. Raises OSError or ValueError, as `read_manifest` does."""
    manifest = read_manifest(folder) if manifest is None else manifest
    with damage_named(folder):
        ops = [with_float_weights(from_json(op, folder)) for op in manifest["ops"]]
        return from_dict(
            {
                "format": DAG_FORMAT,
                "inputs_nodes": tuple(entry["node"] for entry in manifest["inputs"]),
                "outputs_nodes": tuple(entry["node"] for entry in manifest["outputs"]),
                "timesteps": manifest["timesteps"],
                "training": False,
                "ops": ops,
            }
        )


@contextmanager
def damage_named(folder):
    """Within it every error that wrong entries of a manifest cause becomes Damaged."""
    try:
        yield
    except (Mismatch, Damaged, OSError):
        raise
    except Exception as error:  # wrong entries can raise any error of NumPy and PyTorch
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, OtherFile):
            reason = error.found.removeprefix("damaged network data: ")
        raise Damaged(f"{folder}/{MANIFEST} is damaged ({reason}), save the network again") from error


def with_float_weights(op):
    """An op with float parameters: its module has them, but a layer that reads spikes does not use them."""
    tensors = op["tensors"]
    names = ("weight", "bias") if op["config"].get("bias", True) else ("weight",)  # bias_q alone may be of a correction
    if op["type"] != "SpikeAvgPool2d":
        missing = {n: tensors[f"{n}_q"].float() for n in names if f"{n}_q" in tensors and n not in tensors}
        tensors.update(OP_TYPES.get(op["type"], SpikeLayer).parameters_of(missing))
    if op["type"] == "SpikeAvgPool2d" and "weight_q" in tensors:
        tensors.setdefault("weight", tensors["weight_q"].float())
    return op


# ---------------------------------------------------------------------------------------------------------------------
# Replay


def replay(folder):
    """Simulate the test vectors of a folder again; returns a line that counts the compared values.

    Raises Mismatch where a spike or an output differs, OSError or ValueError where the folder is damaged.
    """
    manifest = read_manifest(folder)
    check_table(folder, manifest)
    with damage_named(folder):
        snn, vectors = load_saved_snn(folder, manifest), read_vectors(folder, manifest)
        check_vectors(snn, vectors)
        return replay_vectors(snn, vectors)


def check_table(folder, manifest):
    """Raise OSError or Damaged if the table that the manifest names is missing or another."""
    if "table" not in manifest:
        return
    path = os.path.join(folder, TABLE)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing, save the network again")
    if manifest["table"] != {"file": TABLE, "sha256": file_hash(path)}:
        raise Damaged(f"{path} is damaged, its sha256 is another, save the network again")


def read_vectors(folder, manifest):
    """The test vectors, as `make_vectors` returns them."""
    kinds = {kind: manifest["vectors"][kind] for kind in ("constants", "spikes", "outputs")}
    return {kind: {n: read_array(folder, entry) for n, entry in nodes.items()} for kind, nodes in kinds.items()}


def check_vectors(snn, vectors):
    """Raise ValueError unless the vectors cover every node of `nodes_of_vectors`, in the right types and shapes."""
    for kind, nodes in nodes_of_vectors(snn).items():
        if set(nodes) != set(vectors[kind]):
            raise ValueError(f"the vectors hold {kind} of {list(vectors[kind])}, not of {nodes}")
        dtype = np.uint8 if kind == "spikes" else np.float32
        for node, array in vectors[kind].items():
            if array.dtype != dtype or not array.size:
                raise ValueError(f"the {kind} of {node} are {array.dtype} {list(array.shape)}")
    if not vectors["spikes"]:
        raise ValueError("nothing in it spikes")
    check_shapes(snn, vectors)


def check_shapes(snn, vectors):
    """Raise ValueError unless all vectors have the same batch size, and the shapes that the network computes."""
    inputs = [torch.from_numpy(vectors["constants"][node]) for node in snn.inputs_nodes]
    snn.largest_sample(inputs)  # raises Misfit where an op cannot take its inputs
    shapes, batch = node_shapes(snn, *(x[:1] for x in inputs)), len(inputs[0])
    for kind, arrays in vectors.items():
        steps = [snn.timesteps] if kind == "spikes" else []
        for node, array in arrays.items():
            expected = [*steps, batch, *shapes[node]]
            if list(array.shape) != expected:
                raise ValueError(f"the {kind} of {node} are {list(array.shape)}, in the network {expected}")


def replay_vectors(snn, vectors):
    """Simulate again and compare; returns the line of `replay`. Raises Mismatch."""
    compare_currents(snn, vectors["constants"])
    values = simulate_nodes(snn, known_values(snn, vectors["constants"]))
    for node, expected in vectors["spikes"].items():
        compare(node, steps_of(values[node], snn.timesteps), expected)
    for node, expected in vectors["outputs"].items():
        compare_output(node, values[node], expected)
    inputs, layers = len(vectors["constants"][snn.inputs_nodes[0]]), len(vectors["spikes"])
    spikes = sum(int(x.sum()) for x in vectors["spikes"].values())
    outputs = sum(x.size for x in vectors["outputs"].values())
    return (
        f"identical: {spikes} spikes of {layers} layers, {outputs} output values ({inputs} inputs, T={snn.timesteps})"
    )


def known_values(snn, constants):
    """The constants in the simulator's types: activations as tensors, currents of spiking ops as Current."""
    spiking = {entry.out for entry in snn.ops.values() if entry.op.spiking}
    tensors = {node: torch.from_numpy(array) for node, array in constants.items()}
    return {n: Current(x, snn.timesteps, constant=True) if n in spiking else x for n, x in tensors.items()}


def compare_currents(snn, constants):
    """Raise Mismatch unless the inputs cause the constants, within `CURRENT_TOLERANCE`."""
    inputs = {node: torch.from_numpy(constants[node]) for node in snn.inputs_nodes}
    values = dict(inputs)
    with torch.no_grad(), one_thread_per_operator:
        run_ops([e for e in snn.ops.values() if e.out in constants], values, snn.timesteps)
    for node, expected in constants.items():
        actual = tensor_of(values[node]).numpy()
        if actual.shape != expected.shape:
            raise Mismatch(f"{node} has the shape {list(actual.shape)}, the vectors {list(expected.shape)}")
        error = np.abs(actual - expected).max(initial=0)
        if not error <= CURRENT_TOLERANCE * np.abs(expected).max(initial=1):
            raise Mismatch(f"{node}: the inputs cause currents that differ by {error:.2g} from the vectors")


def compare_output(node, value, expected):
    """Raise Mismatch unless an output is the same: decoded spikes bit for bit, ANN outputs within CURRENT_TOLERANCE."""
    actual = activation_of(value).numpy()
    is_float = not isinstance(value, SpikeTensor) and actual.shape == expected.shape
    if is_float and np.abs(actual - expected).max(initial=0) <= CURRENT_TOLERANCE * np.abs(expected).max(initial=1):
        return
    compare(node, actual, expected)


def compare(node, actual, expected):
    """Raise Mismatch unless two arrays are equal."""
    if actual.shape != expected.shape:
        raise Mismatch(f"{node} has the shape {list(actual.shape)}, the vectors {list(expected.shape)}")
    different = actual != expected
    if different.any():
        first = "".join(f"[{i}]" for i in np.argwhere(different)[0])
        raise Mismatch(f"{node}: {int(different.sum())} of {different.size} values differ, the first at {first}")
