"""The pictures of a run."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from longact_kernels.commands.train.evaluate import Evaluation
from longact_kernels.sparse.figures import by_kind, draw_saliency

WIDTH = 7.5
# What is drawn of the logs, where it is in them, besides reward and churn: key and label.
CURVES = {
    "loss": "loss",
    "entropy": "entropy of a token",
    "grad_norm": "gradient norm",
    "completions/mean_length": "completion length in tokens",
}


def draw(
    metrics: list[dict], details: list[dict], saliency: dict, before: Evaluation, after: Evaluation, measure: str
) -> Iterator[tuple[str, Figure]]:
    """Yields the name of each picture, and the picture.

    Args:
        metrics, details: of the run's files of those names.
        saliency: of `RunFolder.saliency`.
        before, after: the evaluations.
        measure: what they are called, "accuracy" or "reward".
    """
    yield "reward", reward_figure(metrics, before, after, measure)
    if any(key in record for record in metrics for key in CURVES):
        yield "training", curves_figure({"": metrics}, CURVES)
    if any("churn" in record for record in metrics):
        yield "churn", churn_figure(metrics, details)
    if saliency:
        yield "saliency", saliency_figure(saliency)


def reward_figure(metrics: list[dict], before: Evaluation, after: Evaluation, measure: str) -> Figure:
    """Reward of the sampled completions by step, and the held-out accuracy or reward at both ends."""
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    axes.plot(*series(metrics, "reward"), "o-", ms=4, label="sampled while training")
    axes.errorbar(
        [0, metrics[-1]["step"] if metrics else 0],
        [before.accuracy, after.accuracy],
        yerr=[before.standard_error, after.standard_error],
        fmt="D--",
        capsize=4,
        lw=1.2,
        label="greedy on held-out prompts (± standard error)",
    )
    axes.set(xlabel="step", ylabel="mean reward")
    if measure == "accuracy":
        # Punishments may leave the range of the rewards.
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0) if low < -0.1 else 0, max(high, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def series(metrics: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, where the log has it."""
    known = [record for record in metrics if record.get(key) is not None]
    return [record["step"] for record in known], [record[key] for record in known]


def curves_figure(runs: dict[str, list[dict]], labels: dict[str, str]) -> Figure:
    """A panel for each key of the logs that some run has, by step; the runs in colours of their own."""
    keys = [key for key in labels if any(record.get(key) is not None for log in runs.values() for record in log)]
    down = -(-len(keys) // 2)
    figure = Figure(figsize=(WIDTH, 2.3 * down + 0.25 * len(runs)), layout="constrained")
    panels = figure.subplots(down, 2, squeeze=False).flat
    for axes, key in zip(panels, keys, strict=False):
        for i, (name, metrics) in enumerate(runs.items()):
            # A line that another one hides shows through its gaps.
            axes.plot(*series(metrics, key), ls=("-", "--", "-.", ":")[i % 4], marker="o", ms=2.5, lw=1.4, label=name)
        axes.set_title(labels[key], fontsize=10)
        axes.set_xlabel("step", fontsize=10)
        axes.margins(y=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in list(figure.axes)[len(keys) :]:
        axes.set_axis_off()
    if len(runs) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=1, frameon=False)
    return figure


def churn_figure(metrics: list[dict], details: Sequence[dict] = ()) -> Figure:
    """Mean churn of the salient sets by step, and below it that of every layer."""
    logged = [record for record in details if record.get("churn")]
    kinds = by_kind({name: {"name": name} for name in logged[-1]["churn"]}) if logged else {}
    layers = max(map(len, kinds.values()), default=0)
    heights = [2.2] + [0.9 + max(1.0, 0.06 * layers)] * len(kinds)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0])
    panels[0].plot(*series(metrics, "churn"), "o-", ms=4, color="C2")
    panels[0].set(xlabel="step", ylabel="churn, mean\n(1 - Jaccard)")
    panels[0].set_ylim(0, 1.1 * panels[0].get_ylim()[1])
    steps = [record["step"] for record in logged]
    values = {
        kind: np.array([[record["churn"].get(one["name"], np.nan) for record in logged] for one in found])
        for kind, found in kinds.items()
    }
    highest = max((float(np.nanmax(found)) for found in values.values()), default=0.0)
    for axes, (kind, found) in zip(panels[1:], values.items(), strict=True):
        edges = np.array([*steps, steps[-1] + 1]) - 0.5
        image = axes.pcolormesh(edges, np.arange(len(found) + 1) - 0.5, found, vmin=0, vmax=max(highest, 0.01))
        axes.set(title=kind, xlabel="step", ylabel="layer")
        axes.invert_yaxis()
        axes.grid(False)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.colorbar(image, ax=axes, pad=0.01, label="churn")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def saliency_figure(saliency: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Layers × channels of each kind of projection: the salient set in colour, the rest in grey, by magnitude."""
    kinds = by_kind({name: {"saliency": values, "salient": rows} for name, (values, rows) in saliency.items()})
    layers = max(map(len, kinds.values()))
    figure = Figure(figsize=(11, 1.2 + len(kinds) * max(1.6, 0.085 * layers)), layout="constrained")
    for axes, (kind, found) in zip(figure.subplots(len(kinds), squeeze=False)[:, 0], kinds.items(), strict=True):
        draw_saliency(axes, kind, found)
    return figure
