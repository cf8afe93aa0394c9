"""Pictures of what a controller knows of its layers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

LIGHT = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}
# A picture has at least as many dots across as the widest layer has channels, of this many inches.
MAP_INCHES = 9


def report_figure(report: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draws what `LongAct.report()` returns: the maps of `draw_saliency`, and below them churn and overlap by layer."""
    kinds = by_kind(report)
    lines = [line for line in ("churn", "overlap") if any(np.isfinite(layer[line]) for layer in report.values())]
    heights = [max(1.6, 0.085 * len(layers)) + 0.6 for layers in kinds.values()] + [2.2] * len(lines)
    with rc_context(LIGHT):
        figure = Figure(figsize=(11, sum(heights)), layout="constrained")
        figure.dpi = max(figure.dpi, max(len(layer["saliency"]) for layer in report.values()) / MAP_INCHES)
        panels = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
        for axes, (kind, layers) in zip(panels, kinds.items(), strict=False):
            draw_saliency(axes, kind, layers)
        titles = {
            "churn": "churn: 1 - Jaccard overlap of a set with the one before",
            "overlap": "Jaccard overlap of a set with the first one",
        }
        for axes, line in zip(panels[len(kinds) :], lines, strict=True):
            for kind, layers in kinds.items():
                axes.plot([layer[line] for layer in layers], "o-", ms=4, label=kind)
            axes.set(title=titles[line], xlabel="layer", ylim=(0, 1.03))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(frameon=False, ncols=len(kinds))
    return figure


def by_kind(report: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The layers of a report by the last part of their name, such as q_proj."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, layer in report.items():
        kinds.setdefault(name.removesuffix(".linear").rpartition(".")[2], []).append(layer)
    return kinds


def draw_saliency(axes: Axes, kind: str, layers: list[Mapping[str, Any]]) -> None:
    """Layers × channels of one kind of projection: the salient set in colour, the rest in grey, by magnitude.

    Args:
        axes: where.
        kind: their name.
        layers: of each its `saliency` [channels] and its `salient` set; lines stand between the `heads`, if given.
    """
    values = np.full((len(layers), max(len(layer["saliency"]) for layer in layers)), np.nan)
    salient = np.zeros(values.shape, dtype=bool)
    for i, layer in enumerate(layers):
        values[i, : len(layer["saliency"])] = layer["saliency"]
        salient[i, np.asarray(layer["salient"])] = True
    low, high = np.nanpercentile(values, [0.5, 99.5]).clip(1e-6)
    look: dict[str, Any] = {
        "aspect": "auto",
        "interpolation": "nearest",
        "norm": LogNorm(low, max(high, 1.01 * low), clip=True),
    }
    axes.imshow(np.ma.masked_invalid(values), cmap="Greys", alpha=0.4, **look)
    image = axes.imshow(np.ma.masked_where(~salient, values), cmap="plasma", **look)
    edges = np.cumsum(layers[0].get("heads", []))[:-1] - 0.5
    axes.vlines(edges, -0.5, len(layers) - 0.5, color="black", lw=0.5)
    axes.set(title=kind, xlabel="channel", ylabel="layer")
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, label="magnitude", format="{x:.3g}")
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
