"""The text of snn.c: its head, constants, buffers, functions, and the tables of its main."""

from export.c_functions import STRUCTS, functions
from export.c_main import MAIN
from export.c_program import Value, in_comment

BODY = """\
/* Take an image: compute the currents of the first layers, and set all neurons to their initial potentials. */
void snn_start({images})
{{
{copies}
{current}
{reset}
}}

/* Timestep t, from 0 to SNN_STEPS - 1. */
void snn_step(int t)
{{
    (void)t;
{step}
}}

/* The network's output, behind the last step. */
void snn_read({outputs})
{{
{readout}
}}

/* All steps of an image. */
void snn_run({images}, {outputs})
{{
    snn_start({images_given});
    for (int t = 0; t < SNN_STEPS; t++)
        snn_step(t);
    snn_read({outputs_given});
}}
"""

HEAD = """\
/* A spiking network of integrate-and-fire neurons. C99, no dependencies, no allocation.

   snn_run(image0, .., output0, ..) is all that a program needs. Or, step by step:
   snn_start(image0, ..), snn_step(t) for t = 0 .. SNN_STEPS - 1, snn_read(output0, ..).

{sizes}
   Weights: {weights} bytes. Memory: {memory} bytes.
   Timesteps: {timesteps}, and until the last layer has fired, where layers listen before they fire: {end}.
   Maps are [rows][columns][channels]. With -DSNN_NO_MAIN there is no main, and no stdio.
*/
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SNN_STEPS {end}
#define SNN_TIMESTEPS {timesteps}

void snn_start({images});
void snn_step(int t);
void snn_read({outputs});
void snn_run({images}, {outputs});
"""


def source_of(program, snn, nodes):
    """The text of snn.c. nodes: node -> Value, and "output0" .. -> those that are read out."""
    inputs = [nodes[node] for node in snn.inputs_nodes]
    outputs = [nodes[f"output{place}"] for place in range(len(snn.outputs_nodes))]
    words = parameters(inputs, outputs)
    body = BODY.format(
        copies="\n".join(f"    memcpy({x.name}, image{i}, sizeof {x.name});" for i, x in enumerate(inputs)),
        **{part: program.text_of(part) for part in program.parts},
        **words,
    )
    parts = (
        HEAD.format(
            sizes=sizes(inputs, outputs),
            weights=program.weight_bytes,
            memory=program.memory(),
            timesteps=program.timesteps,
            end=program.end,
            **words,
        ),
        f"typedef int{program.current_bits}_t current_t; /* of one step, with its weights */\n",
        STRUCTS,
        buffers(program),
        "".join(program.constants),
        functions(program.functions),
        body,
        f"#ifndef SNN_NO_MAIN\n{tables(program, snn, nodes, inputs, outputs)}{MAIN}#endif\n",
    )
    return "\n".join(parts)


def parameters(inputs, outputs):
    """The parameters and arguments of the functions, as text."""
    images, results = ([f"{name}{i}" for i in range(len(n))] for name, n in (("image", inputs), ("output", outputs)))
    return {
        "images": ", ".join(f"const float *{name}" for name in images),
        "outputs": ", ".join(f"float *{name}" for name in results),
        "images_given": ", ".join(images),
        "outputs_given": ", ".join(results),
    }


def sizes(inputs, outputs):
    """A line for each input and output."""
    named = [(f"image{i}", x) for i, x in enumerate(inputs)] + [(f"output{i}", x) for i, x in enumerate(outputs)]
    return "".join(f"   {name}: float [{x.size}], {in_words(x)}\n" for name, x in named)


def in_words(x):
    """The extents of a Value in memory."""
    shape = (*x.shape[1:], x.shape[0]) if len(x.shape) == 3 else x.shape
    return "".join(f"[{extent}]" for extent in shape)


def buffers(program):
    """The static arrays; that of the currents is shared, each part for as long as it is read."""
    lines, (length, places) = [*program.buffers], program.layout()
    if length:
        lines.append(f"static current_t currents[{length}]; /* of all layers, each while it is read */\n")
        for (name, (size, *_)), start in zip(program.currents.items(), places):
            lines.append(f"#define {name} (currents + {start}) /* [{size}] */\n")
    if program.row:
        lines.append(f"static current_t row[{program.row}]; /* the weights of one input channel */\n")
    if program.places:
        lines.append(f"static struct spike fired[{program.places}]; /* the neurons of one input channel that fire */\n")
    return "".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# What main knows of the network


def firing(snn):
    """Op name -> node, of every layer that fires."""
    return {name: entry.out for name, entry in snn.ops.items() if entry.op.neuron is not None}


def tables(program, snn, nodes, inputs, outputs):
    """Buffers of main, and its tables of inputs, first currents, layers and outputs."""
    images = [Value(f"images{i}", "f32", x.shape, x.order) for i, x in enumerate(inputs)]
    results = [Value(f"results{i}", "f32", x.shape, x.order) for i, x in enumerate(outputs)]
    parts = {
        "images": [(x.name, x) for x in images],
        "firsts": program.firsts.items(),
        "layers": [(name, nodes[node]) for name, node in firing(snn).items()],
        "results": [(x.name, x) for x in results],
    }
    rooms = "".join(f"static float {x.name}[{x.size}];\n" for x in (*images, *results))
    rows = ",\n".join(f"{name}[] = {{\n{rows_of(values)}    {{NULL, NULL, 0}},\n}}" for name, values in parts.items())
    given, read = (", ".join(x.name for x in values) for values in (images, results))
    return f"""\
#include <stdio.h>
#include <stdlib.h>

{rooms}static struct part {{
    const char *name;
    void *data;
    int size;
}} {rows};
#define START() snn_start({given})
#define READ() snn_read({read})

"""


def rows_of(values):
    return "".join(f'    {{"{in_comment(name)}", {x.name}, {x.size}}},\n' for name, x in values)
