"""The pictures of a study."""

from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from longact_kernels.study.config import DENSE, Study
from longact_kernels.study.statistics import estimate

ACROSS = 3
WIDTH = 8.0


def found_arms(study: Study, results: list[dict]) -> dict[str, list[dict]]:
    """Results by arm, in the order of the study."""
    arms = {name: [one for one in results if one["arm"] == name] for name in study.arms}
    return {name: found for name, found in arms.items() if found}


def scores(study: Study, results: list[dict]) -> Figure:
    """The final score of every run, and of every arm the mean with its 95% confidence interval."""
    arms = found_arms(study, results)
    figure = Figure(figsize=(WIDTH, 1.3 + 0.34 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for place, (name, found) in enumerate(arms.items()):
        values = [one["score"] for one in found]
        spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else [0.0]
        axes.plot(values, place + np.asarray(spread), "o", ms=3.5, color="C0", alpha=0.45, mew=0)
        middle = estimate(values)
        axes.errorbar(
            middle.mean, place, xerr=np.nan_to_num(middle.half_width), fmt="D", ms=6, capsize=4, lw=2,
            color="C3" if name == DENSE else "C0",
        )  # fmt: skip
        if name == DENSE:
            axes.axvline(middle.mean, color="C3", ls=":", lw=1)
    before = estimate([one["before"] for one in results]).mean
    if study.evaluate is None:
        axes.axvline(before, color="0.5", ls="--", lw=1)
        axes.annotate("before", (before, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color="0.5")
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    what = "held-out accuracy" if study.evaluate is None else f"score of {study.evaluate['tasks']}"
    axes.set_xlabel(f"{what} after {study.options['max_steps']} steps: runs, mean, 95% confidence interval")
    return figure


def curves(study: Study, results: list[dict]) -> Figure:
    """Held-out accuracy by step, one panel an arm, dense beside it: means over seeds, 95% confidence intervals."""
    arms = found_arms(study, results)
    shown = {name: found for name, found in arms.items() if name != DENSE} or arms
    down = -(-len(shown) // ACROSS)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.1 * down), layout="constrained")
    panels = figure.subplots(down, ACROSS, sharex=True, sharey=True, squeeze=False)
    for axes, (name, found) in zip(panels.flat, shown.items(), strict=False):
        if DENSE in arms:
            line(axes, arms[DENSE], "C3", ":")
        line(axes, found, "C0", "-")
        axes.set_title(name, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("training step (dense: dotted red)", fontsize=10)
    figure.supylabel("held-out accuracy", fontsize=10)
    return figure


def line(axes, found: list[dict], colour: str, style: str) -> None:
    by_step = defaultdict(list)
    for one in found:
        for step, accuracy in one["curve"]:
            by_step[step].append(accuracy)
    middles = [estimate(values) for values in by_step.values()]
    means = np.array([one.mean for one in middles])
    widths = np.nan_to_num([one.half_width for one in middles])
    axes.plot(list(by_step), means, style, color=colour, lw=1.6)
    axes.fill_between(list(by_step), means - widths, means + widths, color=colour, alpha=0.18, lw=0)
