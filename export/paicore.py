"""A converted network for the chip PAICORE: PAIBox 1.3 simulates it, maps it to cores and writes their configuration.

    write_paicore(snn, "folder", images)

PAIBox is an optional package under the GPL; nothing here depends on it. The first layer reads the real-valued image, so
it stays on the host, which sends its spikes; so do the layers behind the last spikes. What is written was simulated by
PAIBox before: every spike of every layer equals that of the simulator here.
"""

import contextlib
import copy
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from export.nir_graph import of_one_input, one_sample
from export.paicore_layers import core_layers, core_rows, rows_in_bits
from hw_constraints import core_table, refuse_cores
from runtime.files import check_folder, write_folder
from runtime.packages import check_packages
from spike_dag import format_table
from spike_simulator import simulate

SIMULATED = 2  # images that PAIBox simulates before anything is written


def write_paicore(snn, path, images=None):
    """Write the configuration of PAICORE's cores into the folder `path`, and return a line that says so.

    images: [B, C, H, W], also as a tuple of one; the first two are simulated by PAIBox. None for random ones, if the
    network knows their shape. The table of cores is printed first. Raises ValueError if paibox is missing, for what the
    chip cannot hold (the layer is named), and if PAIBox's simulation sends another spike; OSError if the folder refuses
    files. The folder is written whole or not at all.
    """
    check_packages("--paibox", "paibox")
    check_folder(path)
    import paibox

    snn = copy.deepcopy(snn).cpu().eval()
    if len(snn.inputs_nodes) > 1:
        raise ValueError(f"the network has {len(snn.inputs_nodes)} inputs, export a network of one to PAICORE")
    images = torch.rand_like(one_sample(snn, None)) if images is None else of_one_input(images)
    images = images[:SIMULATED].cpu().float()
    trains = spike_trains(snn, images)
    hosts, layers = core_layers(snn, trains)
    check_cores(hosts, layers)
    network = Mapped(paibox, hosts, layers)
    steps = network.compare(trains, snn.timesteps)
    files, info = network.files()
    files["host.json"] = json.dumps(network.host(snn.timesteps), indent=2).encode()
    write_folder(path, files)
    size, cores = sum(map(len, files.values())), info["n_core_occupied"]
    return (
        f"PAIBox: {len(layers)} layers on {cores} cores, {size:,} bytes in {path}; {steps:,} neurons and steps "
        "simulated alike; host.json says what the host sends"
    )


def check_cores(hosts, layers):
    """Print the table of cores. Raises ValueError if the layers need more than the chip has."""
    rows = core_rows(hosts, layers)
    table, needed = core_table(rows)
    print(format_table(table))
    refuse_cores(rows, needed)


def spike_trains(snn, images):
    """Op name -> spikes [T, B, ...] of every layer, uint8."""
    trains = {}

    def watch(name, current, value):
        if snn.ops[name].op.neuron is not None:
            steps = value.data.unflatten(0, (value.timesteps, -1)).to(torch.uint8).numpy()
            trains[name] = np.concatenate([trains[name], steps]) if name in trains else steps

    with torch.no_grad():
        simulate(snn, (images,), snn.timesteps, watch=watch)
    return trains


class Mapped:
    """A network of PAIBox. hosts: op name -> shape of the layers on the host. layers: `paicore_layers.CoreLayer`s.

    A layer of depth d reads what the layers of depth d - 1 sent in the step before, so that its T steps begin with
    step d. Spikes that skip a layer wait in neurons that only pass them on.
    """

    def __init__(self, paibox, hosts, layers):
        self.pb, self.hosts, self.layers = paibox, hosts, layers
        self.network = paibox.Network()
        self.inputs = {name: self.own(f"host_{name}", paibox.InputProj(None, shape)) for name, shape in hosts.items()}
        self.neurons, self.starts, self.passed = dict(self.inputs), {}, {}
        for layer in layers:
            self.add(layer)

    def own(self, name, node):
        """Make a node a member of the network."""
        setattr(self.network, name, node)
        return node

    def add(self, layer):
        """The neurons of a layer, its synapses, and the input that gives them their first potentials."""
        pb, reset = self.pb, None if layer.subtracts else 0  # a Python number: NumPy's 0 would mean subtraction
        options = {"reset_v": reset, "tick_wait_start": layer.depth}
        if layer.bias.any():
            neurons = pb.LIF(layer.shape, layer.Vthr, bias=layer.bias, **options)
        else:
            neurons = pb.IF(layer.shape, layer.Vthr, **options)
        self.neurons[layer.name] = self.own(f"neurons_{layer.name}", neurons)
        for i, synapse in enumerate(layer.synapses):
            source = self.delayed(synapse.source, layer)
            self.own(f"synapses_{layer.name}_{i}", self.connect(synapse, source, neurons))
        rows = rows_in_bits(layer.initial_potential, layer.bits)
        if len(rows):
            start = self.starts[layer.name] = self.own(f"start_{layer.name}", pb.InputProj(None, (len(rows),)))
            both = pb.FullConn(start, neurons, rows, conn_type=pb.SynConnType.All2All)
            self.own(f"offsets_{layer.name}", both)

    def connect(self, synapse, source, neurons):
        """The synapses of one branch of a layer."""
        if synapse.kind == "full":
            return self.pb.FullConn(source, neurons, synapse.weight, conn_type=self.pb.SynConnType.All2All)
        options = {"stride": synapse.stride, "padding": synapse.padding, "groups": synapse.groups}
        return self.pb.Conv2d(source, neurons, synapse.weight, **options)

    def delayed(self, name, layer):
        """The neurons that send the spikes of layer `name` just before `layer` reads them."""
        node = self.neurons[name]
        for depth in range(self.depth_of(name) + 1, layer.depth):
            if (name, depth) not in self.passed:
                passing = self.pb.BypassNeuron(self.neurons[name].shape_out, tick_wait_start=depth)
                self.own(f"pass_{name}_{depth}", passing)
                one = self.pb.FullConn(node, passing, conn_type=self.pb.SynConnType.One2One)
                self.own(f"wires_{name}_{depth}", one)
                self.passed[name, depth] = passing
            node = self.passed[name, depth]
        return node

    def depth_of(self, name):
        return next((layer.depth for layer in self.layers if layer.name == name), 0)

    # simulation

    def compare(self, trains, timesteps):
        """Simulate every image; the number of compared spikes. Raises ValueError for the first layer that differs."""
        probes = {layer.name: self.pb.Probe(self.neurons[layer.name], "spike") for layer in self.layers}
        simulator, compared = self.pb.Simulator(self.network), 0
        for probe in probes.values():
            simulator.add_probe(probe)
        for image in range(len(next(iter(trains.values()))[0])):
            simulator.reset()
            self.run(simulator, trains, timesteps, image)
            for layer in self.layers:
                found = np.stack(simulator.data[probes[layer.name]])[layer.depth - 1 :][:timesteps]
                expected = trains[layer.name][:, image]
                wrong = int((found.reshape(expected.shape) != expected).sum())
                if wrong:
                    raise ValueError(f"{layer.where} sends {wrong} other spikes when PAIBox simulates it, report this")
                compared += expected.size
        return compared

    def run(self, simulator, trains, timesteps, image):
        """Simulate one image, step by step: the host's spikes, and each layer's first potentials in its first step."""
        depths = {layer.name: layer.depth for layer in self.layers}
        for step in range(1, timesteps + max(depths.values())):
            for name, node in self.inputs.items():
                train = trains[name][:, image]
                node.input = train[step - 1].copy() if step <= timesteps else np.zeros_like(train[0])
            for name, node in self.starts.items():
                node.input = np.full(node.num_out, step == depths[name], np.uint8)
            simulator.run(1)

    # the chip

    def files(self):
        """`files, info`: name -> bytes of what PAIBox exports, and its `GraphInfo`, with the numbers of cores."""
        mapper = self.pb.Mapper()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it tells its steps
            mapper.build(self.network)
            info = mapper.compile()
            mapper.export(write_to_file=True, fp=folder, format="bin")
            files = {name: Path(folder, name).read_bytes() for name in sorted(os.listdir(folder))}
        mapper.clear()
        return files, info

    def host(self, timesteps):
        """What the host has to send and to read, as plain data."""
        return {
            "timesteps": timesteps,
            "spikes": {node.name: name for name, node in self.inputs.items()},
            "first_potentials": {
                node.name: {"layer": name, "rows": node.num_out, "step": self.depth_of(name)}
                for name, node in self.starts.items()
            },
            "layers": {self.neurons[layer.name].name: layer.as_dict() for layer in self.layers},
        }
