"""Draw the panels of dashboard.json from what a Prometheus has, as Grafana would."""

import json
import time

import matplotlib

matplotlib.use("Agg")
from helpers.repository import TEMPLATES  # noqa: E402
from matplotlib import pyplot  # noqa: E402

PANELS = json.loads((TEMPLATES / "dashboard.json").read_text("utf-8"))["panels"]
UNITS = {"reqps": "1/s", "s": "s", "percentunit": "share", "short": ""}


def draw(prometheus, path, seconds):
    """Write a picture of the last seconds: the panels that are curves, three in a row."""
    curves = [panel for panel in PANELS if panel["type"] == "timeseries"]
    rows = -(-len(curves) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(15, 2.6 * rows), layout="constrained")
    end = time.time()
    for axis, panel in zip(axes.flat, curves):
        for target in panel["targets"]:
            found = prometheus.get(
                "query_range", query=target["expr"], start=end - seconds, end=end, step=1
            )
            for series in found["result"]:
                label = target["legendFormat"]
                for name, value in series["metric"].items():
                    label = label.replace("{{" + name + "}}", value)
                times = [float(moment) - end for moment, _ in series["values"]]
                values = [float(value) for _, value in series["values"]]
                axis.plot(times, values, label=label)
        axis.set_title(panel["title"], fontsize=10, loc="left", fontweight="bold")
        axis.set_ylabel(UNITS[panel["fieldConfig"]["defaults"]["unit"]], fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if any(line.get_label() for line in axis.lines):
            axis.legend(fontsize=7, loc="upper left", frameon=False)
    for axis in list(axes.flat)[len(curves) :]:
        axis.remove()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)
