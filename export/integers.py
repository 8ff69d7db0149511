"""A whole converted network as plain integers: manifest.json, .npy files, test vectors, and a table of its layers.

    write_integers(snn, "folder", images)      # python3 snn_transformer.py replay folder

The folder is that of `SNNTransformer.save_snn` (`transformer.saved`), with layers.csv in it.
"""

import copy
import csv
import io
import os

from spike_simulator import node_shapes
from spike_tensor import SpikeTensor
from transformer.saved import simulate_nodes, write_saved_snn

HEAD = (
    *("layer", "path", "type", "shape", "bits", "range", "Vthr", "scale", "u0"),
    *("reset", "listen", "window", "synapses", "neurons"),
)


def write_integers(snn, path, images=None):
    """Write the folder `path`, whole or not at all; returns a line that says so.

    images: the network's input, or a tuple of inputs, [B, ...] each, of the test vectors. Raises ValueError for a
    network that is not converted, or without images, and OSError where the folder cannot be written.
    """
    if not snn.is_spiking():
        raise ValueError("the network is no converted one: it has no neurons to write")
    if images is None:
        raise ValueError("a folder of integers holds test vectors: give images, or --input_shape C,H,W")
    inputs = images if isinstance(images, (tuple, list)) else (images,)
    snn = copy.deepcopy(snn).cpu()
    inputs = tuple(x.detach().cpu().float() for x in inputs)
    neurons = [*snn.neurons().values()]
    bits = {name: layer.weight_bits for name, layer in snn.weighted_layers().items()}
    details = {
        "reset_mode": neurons[0].reset_mode,
        "weight_bitwidth": bits,
        "layers": [entry.path for entry in snn.ops.values() if entry.path],
    }
    write_saved_snn(path, snn, inputs, details, table_of(snn, inputs))
    size = sum(os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(path) for name in names)
    return f"integers: {path} ({size:,} bytes); python3 snn_transformer.py replay {path}"


def table_of(snn, inputs):
    """layers.csv as text: one row for every op that has integers or neurons."""
    first = tuple(x[:1] for x in inputs)
    shapes, values = node_shapes(snn, *first), simulate_nodes(snn, dict(zip(snn.inputs_nodes, first)))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEAD)
    for entry in snn.ops.values():
        row = row_of(entry, shapes, values)
        if row is not None:
            writer.writerow(row)
    return file.getvalue()


def row_of(entry, shapes, values):
    """The row of an op, or None for one without weights and neurons."""
    op, neuron = entry.op, entry.op.neuron
    weight = getattr(op, "weight_q", None)
    if neuron is None and not op.has_weights and weight is None and not op.adds:
        return None
    shape = shapes[entry.out]
    cells = [entry.name, entry.path, type(op).__name__, "x".join(map(str, shape))]
    cells += [getattr(op, "weight_bits", None) if op.is_trained else None, None if weight is None else span(weight)]
    if neuron is None:
        cells += [None] * 6
    else:
        numbers = (neuron.Vthr, neuron.scale_factor, neuron.initial_potential)
        cells += [*map(span, numbers), neuron.reset_mode, neuron.listen, neuron.window]
    count = 1
    for extent in shape:
        count *= extent
    return [*cells, synapses(entry, shapes, values), 0 if neuron is None else count]


def synapses(entry, shapes, values):
    """The synapses of a layer: those of its kernels, or one for each of the spikes that it adds."""
    op = entry.op
    if op.has_weights:
        return round(op.synapses(shapes[entry.inputs[0]]))
    if not op.adds:
        return 0
    return sum(values[node].data[0].numel() for node in entry.inputs if isinstance(values[node], SpikeTensor))


def span(values):
    """The range of a tensor, "least..most", or one number if all are equal; floats to the last digit."""
    least, most = values.min().item(), values.max().item()
    return f"{least:.9g}" if least == most else f"{least:.9g}..{most:.9g}"
