"""The pictures of a run."""

import io
from collections.abc import Iterator

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from longact_kernels.commands.train.evaluate import Evaluation
from longact_kernels.sparse.figures import LIGHT, by_kind, draw_saliency

INK, PAPER = "#d7dce2", "#16191d"
DARK = {
    **LIGHT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}


def draw(style: dict, metrics: list[dict], saliency: dict, before: Evaluation, after: Evaluation) -> Iterator[tuple]:
    """Yields each picture's name and PNG bytes, in the colours of a style (`LIGHT` or `DARK`)."""
    with rc_context(style):
        yield "reward", png(reward_figure(metrics, before, after))
        if any("churn" in record for record in metrics):
            yield "churn", png(churn_figure(metrics))
        if saliency:
            yield "saliency", png(saliency_figure(saliency))


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def reward_figure(metrics: list[dict], before: Evaluation, after: Evaluation) -> Figure:
    """Reward of the sampled completions by step, and the held-out accuracy at both ends."""
    figure = Figure(figsize=(7.5, 3.6))
    axes = figure.subplots()
    sampled = [(record["step"], record["reward"]) for record in metrics if "reward" in record]
    axes.plot(*zip(*sampled, strict=True) if sampled else ([], []), "o-", ms=4, label="sampled while training")
    ends = [0, metrics[-1]["step"] if metrics else 0]
    axes.errorbar(
        ends,
        [before.accuracy, after.accuracy],
        yerr=[before.standard_error, after.standard_error],
        fmt="D--",
        capsize=4,
        lw=1.2,
        label="greedy on held-out prompts (± standard error)",
    )
    axes.set(xlabel="step", ylabel="mean reward")
    # Rewards of the user's own, and punishments, may leave the range of the others.
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0) if low < -0.1 else 0, max(high, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def churn_figure(metrics: list[dict]) -> Figure:
    """Mean churn of the salient sets by step."""
    figure = Figure(figsize=(7.5, 3.0))
    axes = figure.subplots()
    known = [record for record in metrics if "churn" in record]
    axes.plot([record["step"] for record in known], [record["churn"] for record in known], "o-", ms=4, color="C2")
    axes.set(xlabel="step", ylabel="churn (1 - Jaccard)")
    axes.set_ylim(bottom=0)
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
