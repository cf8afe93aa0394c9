"""The pictures of the analyses, as narrow as a phone shows them."""

from itertools import pairwise

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from longact_kernels.commands.inspect.channels import Part, Statistics, bounds
from longact_kernels.commands.inspect.options import STATISTICS

WIDTH = 7.5
LABELS = {"absmax": "absmax", "l2": "L2"}
KINDS = {"q": "queries", "k": "keys"}
UNITS = {"absmax": "absmax over tokens", "l2": "L2 norm over tokens"}
COLOURS = {"absmax": "C0", "l2": "C1", "absmax with l2": "C2"}


def magnitudes(stats: Statistics, parts: list[Part]) -> Figure:
    """Layers down, the channels of all heads across; absmax beside L2, of queries and of keys."""
    kinds = [kind for kind in KINDS if any(part.kind == kind for part in parts)]
    layers = max(sum(part.kind == kind for part in parts) for kind in kinds)
    panels = [(kind, statistic) for kind in kinds for statistic in STATISTICS]
    height = max(1.5, 0.055 * layers)
    figure = Figure(figsize=(WIDTH, len(panels) * (height + 0.75)), layout="constrained")
    for axes, (kind, statistic) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        mine = [(part, span) for part, span in zip(parts, bounds(parts), strict=True) if part.kind == kind]
        widest = max((part for part, _ in mine), key=lambda part: len(part.rows))
        values = np.full((len(mine), len(widest.rows)), np.nan, dtype=np.float32)
        for row, (_, (start, end)) in zip(values, mine, strict=True):
            row[: end - start] = getattr(stats, statistic)[start:end].numpy()
        low, high = np.nanpercentile(values, [0.5, 99.5]).clip(1e-6)
        image = axes.imshow(
            values,
            aspect="auto",
            cmap="magma",
            norm=LogNorm(low, max(high, 1.01 * low), clip=True),
            extent=(0, values.shape[1], len(values) - 0.5, -0.5),
        )
        edges = np.cumsum([0, *widest.heads])
        axes.vlines(edges[1:-1], -0.5, len(values) - 0.5, color="white", lw=0.6)
        axes.set_xticks([(a + b) / 2 for a, b in pairwise(edges)], [str(i) for i in range(len(widest.heads))])
        every = -(-len(widest.heads) // 16)
        for i, label in enumerate(axes.get_xticklabels()):
            label.set_visible(i % every == 0)
        axes.tick_params(axis="x", length=0)
        axes.set(title=f"{KINDS[kind]}: {UNITS[statistic]}", ylabel="layer")
        axes.set_xlabel(f"head, its {widest.heads[0]} channels side by side")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(False)
        ticks = LogLocator(subs=(1, 2, 5))
        bar = figure.colorbar(image, ax=axes, pad=0.01, ticks=ticks, format="{x:.3g}", label="magnitude (log)")
        bar.minorticks_off()
    return figure


def overlap_by_layer(overlap: dict) -> Figure:
    """By layer: do two batches agree, and do the two statistics?"""
    names = {
        "absmax between batches": ("absmax, two batches", COLOURS["absmax"]),
        "l2 between batches": ("L2, two batches", COLOURS["l2"]),
        "absmax with l2": ("absmax and L2, one batch", COLOURS["absmax with l2"]),
    }
    figure = Figure(figsize=(WIDTH, 0.6 + 2.4 * len(overlap["by layer"])), layout="constrained")
    panels = figure.subplots(len(overlap["by layer"]), sharex=True, squeeze=False)[:, 0]
    for axes, (kind, lines) in zip(panels, overlap["by layer"].items(), strict=True):
        for name, (label, colour) in names.items():
            axes.plot(lines[name], "o-", ms=3, color=colour, label=label)
        axes.axhline(overlap["chance"], color="0.5", ls=":", label="random sets")
        axes.set(ylim=(0, 1), title=KINDS[kind], ylabel="overlap (Jaccard)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("layer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def domains(overlap: dict) -> Figure:
    """Mean overlap of a batch of one text with another batch, of the same text or of another."""
    names = list(overlap["domains"]["absmax"])
    figure = Figure(figsize=(WIDTH, 1.6 + 0.62 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(STATISTICS), sharey=True)
    for axes, statistic in zip(panels, STATISTICS, strict=True):
        values = np.array([[overlap["domains"][statistic][a][b] for b in names] for a in names])
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"sets by {LABELS[statistic]}", fontsize=11)
        axes.grid(False)
    figure.colorbar(image, ax=panels, pad=0.02, label=f"overlap (Jaccard)\nrandom sets: {overlap['chance']:.2f}")
    return figure


def context(found: dict, chance: float) -> Figure:
    """With the length of the context: overlap with the sets of the longest, and magnitudes."""
    figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for marker, (name, results) in zip("os^Dvphx*" * len(found), found.items(), strict=False):
        for statistic, style in (("absmax", "-"), ("l2", "--")):
            look = {"marker": marker, "ls": style, "ms": 5, "color": COLOURS[statistic]}
            above.plot(
                results["lengths"],
                results["overlap with the longest"][statistic],
                label=f"{name}, {LABELS[statistic]}",
                **look,
            )
            key = "mean absmax" if statistic == "absmax" else "mean root mean square"
            below.plot(results["lengths"], results[key], **look)
    above.axhline(chance, color="0.5", ls=":", label="random sets")
    longest = max(results["lengths"][-1] for results in found.values())
    above.set(ylim=(0, 1.03), ylabel=f"overlap (Jaccard) with\nsets of {longest:,} tokens")
    below.set(ylabel="mean over channels of\nabsmax and L2/√tokens")
    below.set_ylim(bottom=0)
    below.set_xlabel("tokens of context")
    below.set_xscale("log", base=2)
    lengths = sorted({length for results in found.values() for length in results["lengths"]})
    below.set_xticks(lengths, [f"{length:,}" for length in lengths])
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure
