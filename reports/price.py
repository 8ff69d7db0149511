"""What an image costs in a converted network: spikes and synaptic operations."""

from reports.energy import count_operations
from reports.observe import count_spikes
from spike_simulator import node_shapes


def price_of(snn, images):
    """ "spikes" and "synops", synaptic operations, of one image. images: [B, C, H, W], over which they are averaged."""
    counts = {node: count / len(images) for node, count in count_spikes(snn, images)[1].items()}
    fired = {entry.out for entry in snn.ops.values() if entry.op.neuron is not None}
    operations = count_operations(snn, node_shapes(snn, images[:1]), counts, snn.timesteps)
    return {
        "spikes": sum(count.sum().item() for node, count in counts.items() if node in fired),
        "synops": sum(each["synops"] for each in operations.values()),
    }
