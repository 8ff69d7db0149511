"""The charts of a report, in its order.

charts = draw_charts(result, samples)     # name -> Chart; result, samples: the fields of an `analysis.Analysis`
render_png(charts["accuracy"]), render_svgs("accuracy", charts["accuracy"])
"""

from reports.drawing import label, render_png, render_svgs
from reports.layer_figures import density_chart, error_chart, neurons_chart, rates_chart, weights_chart
from reports.network_figures import (
    accuracy_chart,
    changes_chart,
    classes_chart,
    operations_chart,
    pareto_chart,
    sweep_chart,
)

__all__ = ["draw_charts", "render_png", "render_svgs"]


def draw_charts(result, samples):
    """Name -> Chart, in the order of the report."""
    images, layers, tried = result["analysis_images"], result["layers"], result["alternatives"]
    charts = {"accuracy": accuracy_chart(result["accuracy"])}
    # with a single spiking layer no layer reads spikes as currents: there are no operations to compare
    if any(each["test"]["synops"] for each in tried.values()):
        charts["pareto"] = pareto_chart(tried, result["compare"], result["ann_of_analysis"]["top1"], images)
    charts |= {
        "alternatives": alternatives_chart(result),
        "error_parts": error_chart(layers, images),
        "firing_rate": rates_chart(layers, result["samples"]),
        "density": density_chart(samples["pairs"], layers, images),
        "weights": weights_chart(samples["weights"], result["shown_layer"]),
        "neurons": neurons_chart(samples["neurons"], layers),
        "operations": operations_chart(result["operations"]),
    }
    if result["classes"]:
        charts["classes"] = classes_chart(result["classes"])
    if result["repaired"]:
        charts["repaired_layers"] = repairs_chart(result)
    if result["sweep"]:
        validation = result["validation"]
        charts["sweep"] = sweep_chart(result["sweep"], validation["images"], validation["words"])
    return charts


def alternatives_chart(result):
    """Other flags against the conversion as asked for."""
    caption = (
        f"Change of accuracy by other flags, on {on_which(result)}, with paired 95 % intervals, not corrected for "
        "their number. A filled point's interval leaves out zero."
    )
    return changes_chart(result["alternatives"], "What other flags change", caption)


def repairs_chart(result):
    """Float weights in one layer against the conversion as asked for."""
    caption = (
        f"Change of accuracy where one layer alone keeps its float weights, on {on_which(result)}, with paired 95 % "
        "intervals, not corrected for their number. A layer whose interval lies right of zero loses by rounding."
    )
    names = {name: label(name, each["path"]) for name, each in result["operations"].items()}
    return changes_chart(result["repaired"], "What float weights in a single layer change", caption, names)


def on_which(result):
    """The validation images in words."""
    return f"{result['validation']['images']} {result['validation']['words']}"
