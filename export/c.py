"""A converted network as one file of C99, with integer weights and potentials, and test vectors that it replays.

    write_c(snn, "folder", images)      # snn.c and vectors.bin

    cc -std=c99 -O2 -o snn snn.c && ./snn vectors.bin

The C code has no dependencies but the standard library's memset and memcpy, allocates nothing, and computes with floats
only what the image causes in the first layer and what is read out of the spike counts. Compiled with -DSNN_NO_MAIN it
has no main and no files either, for firmware. It is meant to be read: one function for each type of layer.
"""

import copy
import os

import numpy as np

from export.c_file import firing, source_of
from export.c_layers import write_layer
from export.c_program import Program, canonical_order
from runtime.files import write_folder
from spike_simulator import Stages, count_readers, current_into
from spike_tensor import Current, SpikeTensor
from transformer.saved import simulate_nodes

SOURCE, VECTORS = "snn.c", "vectors.bin"
MAGIC = b"SNN1"
MOST_IN_INT16 = 2**15 - 1
MOST_STEPS = 65535  # spike counts are uint16 in the test vectors


def write_c(snn, path, images=None):
    """Write snn.c and vectors.bin into the folder `path`; returns a line that says so.

    images: the network's input, or a tuple of inputs, [B, ...] each: they give the sizes of all maps, and are the test
    vectors. Raises ValueError, which names the layer, for what C code cannot hold, and OSError for a failed write.
    """
    inputs = check(snn, images)
    snn = copy.deepcopy(snn).cpu()
    values = simulate_nodes(snn, dict(zip(snn.inputs_nodes, inputs)))
    shapes = {node: tuple(value.data.shape[1:]) for node, value in values.items()}
    program = Program(
        snn.timesteps, shapes, any(neuron.listen for neuron in snn.neurons().values()), bits_of_currents(snn)
    )
    nodes = write_network(program, snn, values)
    source = source_of(program, snn, nodes)
    write_folder(path, {SOURCE: source.encode("ascii"), VECTORS: vectors_of(program, snn, nodes, values)})
    place = os.path.join(path, SOURCE)
    return (
        f"C code: {place} ({len(source):,} bytes; {program.weight_bytes:,} bytes of weights, {program.memory():,} of "
        f"memory); cc -std=c99 -O2 -o snn {place} && ./snn {os.path.join(path, VECTORS)}"
    )


def check(snn, images):
    """The inputs as a tuple of float32 tensors. Raises ValueError where there is nothing to write."""
    if not snn.is_spiking():
        raise ValueError("the network is no converted one: it has no neurons to write as C")
    if snn.timesteps > MOST_STEPS:
        raise ValueError(f"the network runs for {snn.timesteps} timesteps, C code for {MOST_STEPS} at most")
    if images is None:
        raise ValueError("C code has fixed sizes, and test vectors: give images, or --input_shape C,H,W")
    images = images if isinstance(images, (tuple, list)) else (images,)
    return tuple(x.detach().cpu().float() for x in images)


def bits_of_currents(snn):
    """16 if these hold the currents of every step, of which vector instructions add twice as many, else 32."""
    largest = max((neuron.largest_current or 0 for neuron in snn.neurons().values()), default=0)
    return 16 if largest <= MOST_IN_INT16 else 32


# ---------------------------------------------------------------------------------------------------------------------
# The network


def write_network(program, snn, values):
    """Write every op; returns node -> Value. values: what the simulator computes, node -> value over all timesteps."""
    stages, nodes = Stages(snn), {}
    for node in snn.inputs_nodes:
        nodes[node] = program.value(f"{node}_input", "f32", program.shapes[node])
    for entry in stages.before:
        nodes[entry.out] = write_layer(program, entry, [nodes[node] for node in entry.inputs])
    later = count_readers(stages.behind, snn.outputs_nodes)
    counted, readers = {}, count_readers(snn.ops.values(), snn.outputs_nodes)
    for entry in stages.between:
        if not entry.op.spiking:
            raise ValueError(
                f"{entry.where} stays ANN between spiking layers, which C code in integers cannot compute: convert "
                "without --ann_layers"
            )
        inputs = [nodes[node] for node in entry.inputs]
        program.part = "current" if all(x.kind == "f32" for x in inputs) else "step"
        y = nodes[entry.out] = write_layer(program, entry, inputs)
        shares = [x.read_once for x in inputs if x.name == y.name]
        y.read_once = all(shares) and readers[entry.out] == 1
        if later[entry.out] and y.kind == "u8":
            counted[entry.out] = decoded(program, entry.name, y, values[entry.out])
    program.part = "readout"
    floats = {node: value for node, value in nodes.items() if value.kind == "f32"} | counted
    for entry in stages.behind:
        floats[entry.out] = write_layer(program, entry, [floats[node] for node in entry.inputs])
    for place, node in enumerate(snn.outputs_nodes):
        y = program.settled(floats[node])
        program.parts["readout"].append((0, f"memcpy(output{place}, {y.name}, sizeof {y.name});"))
        nodes[f"output{place}"] = y
    return nodes


def decoded(program, name, spikes, train):
    """The Value of the activations that spikes stand for, read out of their counts."""
    program.part = "step"
    counts = program.fresh(f"{name}_total")
    program.buffers.append(f"static uint32_t {counts}[{spikes.size}];\n")
    program.ram += 4 * spikes.size
    program.call("count", spikes, spikes.size, counts, start=spikes.start)  # behind its last step it is silent
    program.zero(counts)
    program.part = "readout"
    y = program.value(f"{name}_decoded", "f32", spikes.shape, spikes.order)
    share, period = program.per_element(f"{name}_share", train.scale_factor.float() / program.timesteps, y)
    program.call("decode", counts, spikes.size, share, period, y)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Test vectors


def vectors_of(program, snn, nodes, values):
    """vectors.bin: the number of images, then for each image its floats, first currents, spike counts and output."""
    images = len(values[snn.inputs_nodes[0]])
    parts = [(values[node], canonical_order(values[node].shape[1:]), "<f4") for node in snn.inputs_nodes]
    for name, current in program.firsts.items():
        op, read = snn.ops[name].op, [values[node] for node in snn.ops[name].inputs]
        parts.append((current_into(op, read, snn.timesteps).data, current.order, "<f4"))
    parts += [(values[node].counts(), nodes[node].order, "<u2") for node in firing(snn).values()]
    for place, node in enumerate(snn.outputs_nodes):
        value = values[node]
        value = value.to_float() if isinstance(value, SpikeTensor) else value
        parts.append((value.data if isinstance(value, Current) else value, nodes[f"output{place}"].order, "<f4"))
    arrays = [np.ascontiguousarray(x.flatten(1)[:, order].numpy(), dtype=kind) for x, order, kind in parts]
    head = MAGIC + np.array([images, snn.timesteps], "<i4").tobytes()
    return head + b"".join(array[i].tobytes() for i in range(images) for array in arrays)
