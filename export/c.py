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

from export.c_functions import STRUCTS, functions
from export.c_layers import write_layer
from export.c_main import MAIN
from export.c_program import Program, Value, canonical_order, in_comment
from runtime.files import write_folder
from spike_simulator import Stages, count_readers
from spike_tensor import Current, SpikeTensor
from transformer.saved import simulate_nodes

SOURCE, VECTORS = "snn.c", "vectors.bin"
MAGIC = b"SNN1"
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
    program = Program(snn.timesteps, shapes, any(neuron.listen for neuron in snn.neurons().values()))
    nodes = write_network(program, snn, values)
    source = source_of(program, snn, nodes)
    write_folder(path, {SOURCE: source.encode("ascii"), VECTORS: vectors_of(snn, nodes, values)})
    place = os.path.join(path, SOURCE)
    return (
        f"C code: {place} ({len(source):,} bytes; {program.weight_bytes:,} bytes of weights, {ram_of(program):,} of "
        f"memory); cc -std=c99 -O2 -o snn {place} && ./snn {os.path.join(path, VECTORS)}"
    )


def check(snn, images):
    """The inputs as a tuple of float32 tensors. Raises ValueError where there is nothing to write."""
    if not snn.is_spiking():
        raise ValueError("the network is no converted one: it has no neurons to write as C")
    if snn.timesteps > MOST_STEPS:
        raise ValueError(f"the network runs for {snn.timesteps} timesteps, C code for {MOST_STEPS} at most")
    if images is None:
        raise ValueError("C code has fixed sizes, and test vectors: give the network's images, too")
    images = images if isinstance(images, (tuple, list)) else (images,)
    return tuple(x.detach().cpu().float() for x in images)


def ram_of(program):
    """Bytes of memory of the program: all buffers, the currents, and a row of weights."""
    return program.ram + 4 * (program.layout()[0] + program.row)


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
            raise ValueError(f"{entry.where} stays ANN between spiking layers, which C code in integers cannot compute")
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
    last = spikes.start + program.timesteps
    start = f"if (t >= {spikes.start} && t < {last}) " if spikes.start else ""
    program.functions.add("count")
    program.parts["step"].append((0, f"{start}count({spikes.name}, {spikes.size}, {counts});"))
    program.zero(counts)
    program.part = "readout"
    y = program.value(f"{name}_decoded", "f32", spikes.shape, spikes.order)
    share, period = program.per_element(f"{name}_share", train.scale_factor.float() / program.timesteps, y)
    program.call("decode", counts, spikes.size, share, period, y)
    return y


# ---------------------------------------------------------------------------------------------------------------------
# The file


def source_of(program, snn, nodes):
    """The text of snn.c."""
    inputs = [nodes[node] for node in snn.inputs_nodes]
    outputs = [nodes[f"output{place}"] for place in range(len(snn.outputs_nodes))]
    length, places = program.layout()
    if length:
        program.buffers.append(f"static int32_t currents[{length}]; /* of all layers, each while it is read */\n")
        program.buffers += [
            f"#define {name} (currents + {start}) /* [{size}] */\n"
            for (name, (size, *_)), start in zip(program.currents.items(), places)
        ]
    if program.row:
        program.buffers.append(f"static int32_t row[{program.row}]; /* the weights of one input channel */\n")
    parameters = ", ".join(f"const float *image{i}" for i in range(len(inputs)))
    results = ", ".join(f"float *output{i}" for i in range(len(outputs)))
    copies = [f"    memcpy({x.name}, image{i}, sizeof {x.name});" for i, x in enumerate(inputs)]
    given = ", ".join(f"image{i}" for i in range(len(inputs))), ", ".join(f"output{i}" for i in range(len(outputs)))
    return "\n".join(
        [
            head(program, inputs, outputs),
            STRUCTS,
            "".join(program.buffers),
            "".join(program.constants),
            functions(program.functions),
            f"""\
/* Take an image: compute the currents of the first layers, and set all neurons to their initial potentials. */
void snn_start({parameters})
{{
{chr(10).join(copies)}
{program.text_of("current")}
{program.text_of("reset")}
}}

/* Timestep t, from 0 to SNN_STEPS - 1. */
void snn_step(int t)
{{
    (void)t;
{program.text_of("step")}
}}

/* The network's output, behind the last step. */
void snn_read({results})
{{
{program.text_of("readout")}
}}

/* All steps of an image. */
void snn_run({parameters}, {results})
{{
    snn_start({given[0]});
    for (int t = 0; t < SNN_STEPS; t++)
        snn_step(t);
    snn_read({given[1]});
}}
""",
            "#ifndef SNN_NO_MAIN\n" + tables(snn, nodes, inputs, outputs) + MAIN + "#endif\n",
        ]
    )


def head(program, inputs, outputs):
    """The beginning of the file: what it is, its sizes, its functions."""
    sizes = "".join(
        f"   {kind}{i}: float [{x.size}], {in_words(x)}\n"
        for kind, values in (("image", inputs), ("output", outputs))
        for i, x in enumerate(values)
    )
    first = ", ".join(["const float *image0", "..."][: 1 + (len(inputs) > 1)])
    last = ", ".join(["float *output0", "..."][: 1 + (len(outputs) > 1)])
    return f"""\
/* A spiking network of integrate-and-fire neurons. C99, no dependencies, no allocation.

   snn_run({first}, {last}) is all that a program needs. Or, step by step:
   snn_start(image), snn_step(t) for t = 0 .. SNN_STEPS - 1, snn_read(output).

{sizes}
   Weights: {program.weight_bytes} bytes. Memory: {ram_of(program)} bytes. Timesteps: {program.timesteps}; with those in
   which layers only listen: {program.end}.
   Maps are [rows][columns][channels]. With -DSNN_NO_MAIN there is no main, and no stdio.
*/
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SNN_STEPS {program.end}
#define SNN_TIMESTEPS {program.timesteps}

void snn_start({", ".join(f"const float *image{i}" for i in range(len(inputs)))});
void snn_step(int t);
void snn_read({", ".join(f"float *output{i}" for i in range(len(outputs)))});
void snn_run({", ".join(f"const float *image{i}" for i in range(len(inputs)))}, \
{", ".join(f"float *output{i}" for i in range(len(outputs)))});
"""


def in_words(x):
    """The extents of a Value in memory."""
    shape = (*x.shape[1:], x.shape[0]) if len(x.shape) == 3 else x.shape
    return "".join(f"[{extent}]" for extent in shape)


def first_currents(snn, nodes):
    """The nodes of real-valued currents that flow into neurons."""
    read = [(node, entry) for entry in snn.ops.values() if entry.op.spiking for node in entry.inputs]
    into = [node for node, entry in read if nodes[node].kind == "f32" and entry.op.neuron is not None]
    return list(dict.fromkeys(node for node in into if node not in snn.inputs_nodes))


def firing(snn):
    """Op name -> node, of every layer that fires."""
    return {name: entry.out for name, entry in snn.ops.items() if entry.op.neuron is not None}


def tables(snn, nodes, inputs, outputs):
    """What main knows of the network: its inputs, first currents, layers and outputs."""
    firsts = first_currents(snn, nodes)
    results = [Value(f"results{i}", "f32", x.shape, x.order) for i, x in enumerate(outputs)]
    images = [Value(f"images{i}", "f32", x.shape, x.order) for i, x in enumerate(inputs)]
    lines = [f"static float {x.name}[{x.size}];" for x in (*images, *results)]
    lines += ["static struct part { const char *name; void *data; int size; }"]
    tables = {
        "images": [(x.name, x) for x in images],
        "firsts": [(node, nodes[node]) for node in firsts],
        "layers": [(name, nodes[node]) for name, node in firing(snn).items()],
        "results": [(x.name, x) for x in results],
    }
    rows = []
    for table, parts in tables.items():
        text = "".join(f'    {{"{in_comment(name)}", {x.name}, {x.size}}},\n' for name, x in parts)
        rows.append(f"{table}[] = {{\n{text}    {{NULL, NULL, 0}},\n}}")
    given, read = (", ".join(x.name for x in values) for values in (images, results))
    start = f"#define START() snn_start({given})\n#define READ() snn_read({read})\n"
    return (
        "#include <stdio.h>\n#include <stdlib.h>\n\n" + "\n".join(lines) + " " + ", ".join(rows) + ";\n" + start + "\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Test vectors


def vectors_of(snn, nodes, values):
    """vectors.bin: the number of images, then for each image its floats, first currents, spike counts and output."""
    images = len(values[snn.inputs_nodes[0]])
    parts = [(values[node], canonical_order(values[node].shape[1:]), "<f4") for node in snn.inputs_nodes]
    parts += [(values[node].data, nodes[node].order, "<f4") for node in first_currents(snn, nodes)]
    parts += [(values[node].counts(), nodes[node].order, "<u2") for node in firing(snn).values()]
    for place, node in enumerate(snn.outputs_nodes):
        value = values[node]
        value = value.to_float() if isinstance(value, SpikeTensor) else value
        parts.append((value.data if isinstance(value, Current) else value, nodes[f"output{place}"].order, "<f4"))
    arrays = [np.ascontiguousarray(x.flatten(1)[:, order].numpy(), dtype=kind) for x, order, kind in parts]
    head = MAGIC + np.array([images, snn.timesteps], "<i4").tobytes()
    return head + b"".join(array[i].tobytes() for i in range(images) for array in arrays)
