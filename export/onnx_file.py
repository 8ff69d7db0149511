"""A converted network as an ONNX file, for onnxruntime and any other runtime of ONNX.

    write_onnx(snn, "snn.onnx")                   # all timesteps: image -> logits and spike counts
    write_onnx_step(snn, "step.onnx")             # one timestep: image and state -> logits so far and new state

The integers are those of the network: weights of INT4 or INT8, whole thresholds. Counts of spikes are whole, too.
"""

import json
import shlex

import torch

from runtime.files import write_atomically
from runtime.packages import check_packages

FORMAT = "ann2snn-onnx-1"


def write_onnx(snn, path, images=None, pairs=True):
    """Write the spiking network as an ONNX file and return a line for the user.

    images: [B, C, H, W], or a tuple for several inputs, whose shape the file takes with any batch size; by default the
    shape in `snn.preprocessing`. pairs: compute two timesteps in one float32 where they fit (`export.onnx_pairs`). A
    runtime then has to multiply with at least 13 bits, which TF32 and 16-bit types do not have.
    The file's inputs are `image`, float32, and T, with the T of the conversion as its default. The outputs are `logits`
    and count_<layer>, the spike counts of every layer.
    Raises ValueError, with the layer's name, for what the file cannot hold, OSError for a failed write.
    """
    check_packages("--onnx", "onnx")
    written = form_for(snn, pairs)(snn, sample_inputs(snn, images))
    written.write()
    size = write_graph(path, written.graph(), facts_of(snn))
    return f"Save the ONNX file in {path} ({size:,} bytes): {command_for(written, path)}"


def write_onnx_single(snn, path, images=None):
    """`write_onnx` with spikes of 0 and 1, for runtimes that multiply in TF32, as onnxruntime does on GPUs."""
    return write_onnx(snn, path, images, pairs=False)


def form_for(snn, pairs):
    """The class that writes a network through time."""
    from export.onnx_pairs import LoopOverPairs, layers_that_fit
    from export.onnx_time import LoopOverTime, LoopPerLayer, is_timed

    if is_timed(snn):
        return LoopPerLayer
    gains = pairs and not layers_that_fit(snn).isdisjoint(snn.weighted_layers())
    return LoopOverPairs if gains else LoopOverTime


def write_onnx_step(snn, path, images=None):
    """Write one timestep of the network with its state as inputs and outputs, as `write_onnx`.

    Inputs: `image`, `step` (the number of steps done before) and <state>_in; at step 0 the states may hold any values.
    Outputs: `logits`, decoded from all spikes so far, and <state>_out. n_<layer> are the spike counts.
    """
    check_packages("--onnx_step", "onnx")
    from export.onnx_time import OneStep

    written = OneStep(snn, sample_inputs(snn, images))
    written.write()
    size = write_graph(path, written.graph(), facts_of(snn))
    return f"Save one timestep as ONNX in {path} ({size:,} bytes, {len(written.states)} states): call it T times"


def sample_inputs(snn, images):
    """One sample of every input, [1, ...] each, on the network's device. ValueError if its shape is not known."""
    device = next(iter(snn.neurons().values())).Vthr.device
    if images is not None:
        images = images if isinstance(images, tuple) else (images,)
        return tuple(x[:1].to(device).float() for x in images)
    known = snn.preprocessing
    if known is None or len(snn.inputs_nodes) != 1:
        raise ValueError("the network's file does not hold the shape of its images, give --input_shape C,H,W")
    return (torch.zeros(1, *known["input_shape"], device=device),)


def command_for(written, path):
    """A command that runs the file on an empty image."""
    pairs = zip(written.image_names(), written.snn.inputs_nodes)
    shapes = {name: (1, *written.probe.shapes[node]) for name, node in pairs}
    feeds = ", ".join(f"{json.dumps(name)}: np.zeros({shape}, np.float32)" for name, shape in shapes.items())
    session = f"ort.InferenceSession({json.dumps(str(path))})"
    run = f"{session}.run([{json.dumps(written.output_names()[0])}], {{{feeds}}})"
    return f"python3 -c {shlex.quote(f'import numpy as np, onnxruntime as ort; print({run})')}"


def facts_of(snn):
    """What the file says of the network, name -> text; lists are JSON."""
    from export.onnx_time import largest_timesteps

    neurons, known = snn.neurons(), snn.preprocessing or {}
    widths = {entry.op.weight_bits for entry in snn.ops.values() if getattr(entry.op, "weight_bits", None)}
    facts = {
        "format": FORMAT,
        "timesteps": snn.timesteps,
        "largest_timesteps": largest_timesteps(snn),
        "reset_mode": next(iter(neurons.values())).reset_mode,
        "weight_bits": sorted(widths),
        "scales": {name: neuron.scale_factor.flatten().tolist() for name, neuron in neurons.items()},
        "modules": {name: snn.ops[name].path for name in neurons},
        "classes": list(known.get("classes") or ()),
        "mean": known.get("mean"),
        "std": known.get("std"),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def write_graph(path, graph, facts):
    """Write a graph with its facts as an ONNX file and return its size in bytes. Raises OSError for a failed write."""
    import onnx
    from onnx import helper

    from export.onnx_graph import IR_VERSION, OPSET

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="ann2snn")
    model.ir_version = IR_VERSION
    helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    contents = model.SerializeToString()

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(contents)

    write_atomically(path, write)
    return len(contents)
