"""The pictures of a study."""

from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from longact_kernels.commands.study.config import DENSE, Study
from longact_kernels.commands.study.estimates import estimate

ACROSS = 3
MARKS = "osD^vP"
WIDTH = 8.0


def found_arms(study: Study, results: list[dict]) -> dict[str, list[dict]]:
    """Results by arm, in the order of the study."""
    arms = {name: [one for one in results if one["arm"] == name] for name in study.arms}
    return {name: found for name, found in arms.items() if found}


def draw(study: Study, results: list[dict]) -> list[tuple[str, Figure]]:
    """All there is to draw, by name."""
    drawn = [("scores", scores(study, results)), ("curves", curves(study, results))]
    if len({arm.base.pairs for arm in study.arms.values()}) > 1:
        drawn.append(("lengths", lengths(study, results)))
    return drawn


def scores(study: Study, results: list[dict]) -> Figure:
    """By arm the final scores, and their differences from dense over the same seeds, with 95% confidence intervals."""
    arms = found_arms(study, results)
    figure = Figure(figsize=(WIDTH, 1.6 + 0.34 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (name, found) in enumerate(arms.items()):
        colour = "C3" if study.arms[name].method == DENSE else "C0"
        dots(left, place, [one["score"] for one in found], colour)
        if differences := from_dense(study, arms, name):
            dots(right, place, differences, colour)
    if study.evaluate is None:
        before = estimate([one["before"] for one in results]).mean
        left.axvline(before, color="0.5", ls="--", lw=1)
        left.annotate("before", (before, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color="0.5")
    right.axvline(0, color="C3", ls=":", lw=1)
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    what = "held-out accuracy" if study.evaluate is None else "score"
    left.set_xlabel(f"{what} after {study.options['max_steps']} steps")
    right.set_xlabel("difference from dense, same seeds")
    figure.supxlabel("diamonds: means, bars: their 95% confidence intervals, dots: runs", fontsize=10)
    for axes in (left, right):
        # Of two runs, the interval may be wider than all there is to see.
        places = np.concatenate([one.get_xdata() for one in axes.lines if one.get_marker() == "o"])
        margin = 0.1 * np.ptp(places) + 0.005
        axes.set_xlim(min(places) - margin, max(places) + margin)
        axes.grid(False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def from_dense(study: Study, arms: dict[str, list[dict]], name: str) -> list[float]:
    """An arm's final scores minus those of dense training with the same seeds."""
    dense = {one["seed"]: one["score"] for one in arms.get(study.beside(study.arms[name], DENSE), [])}
    return [one["score"] - dense[one["seed"]] for one in arms[name] if one["seed"] in dense]


def lengths(study: Study, results: list[dict]) -> Figure:
    """By length of the prompt each method's final score, and its difference from dense over the same seeds."""
    arms = found_arms(study, results)
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    methods = list(dict.fromkeys(study.arms[name].method for name in arms))
    for i, method in enumerate(methods):
        own = [name for name in arms if study.arms[name].method == method]
        style = {
            "color": "C3" if method == DENSE else f"C{i + (i >= 3)}",
            "marker": MARKS[i % len(MARKS)],
            "capsize": 4,
        }
        # Beside one another where they would hide each other.
        places = [study.arms[name].base.prompt_tokens * 1.04 ** (i - len(methods) / 2) for name in own]
        for axes, values in (
            (left, [[one["score"] for one in arms[name]] for name in own]),
            (right, [from_dense(study, arms, name) for name in own]),
        ):
            found = [(place, estimate(one)) for place, one in zip(places, values, strict=True) if one]
            if found and (axes is left or method != DENSE):
                x, middles = zip(*found, strict=True)
                widths = np.nan_to_num([one.half_width for one in middles])
                axes.errorbar(x, [one.mean for one in middles], yerr=widths, label=method, lw=1.6, ms=5, **style)
    right.axhline(0, color="C3", ls=":", lw=1)
    ticks = sorted({arm.base.prompt_tokens for arm in study.arms.values()})
    for axes, title in ((left, f"score after {study.options['max_steps']} steps"), (right, "difference from dense")):
        axes.set_xscale("log")
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set_ylabel(title)
    left.legend(fontsize=9)
    figure.supxlabel("tokens of a prompt (bars: 95% confidence intervals over seeds)", fontsize=10)
    return figure


def dots(axes, place: int, values: list[float], colour: str) -> None:
    """Values on a line, and their mean with its 95% confidence interval."""
    spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(1)
    axes.plot(values, place + spread, "o", ms=3.5, color=colour, alpha=0.6, mew=0)
    middle = estimate(values)
    axes.errorbar(
        middle.mean, place, xerr=np.nan_to_num(middle.half_width), fmt="D", ms=5, capsize=4, lw=2, color=colour
    )


def curves(study: Study, results: list[dict]) -> Figure:
    """Held-out accuracy gained by step, a panel an arm, beside it dense with the same seeds; 95% confidence bands."""
    arms = found_arms(study, results)
    shown = {name: found for name, found in arms.items() if study.arms[name].method != DENSE} or arms
    down = -(-len(shown) // ACROSS)
    figure = Figure(figsize=(WIDTH, 0.8 + 2.1 * down), layout="constrained")
    panels = figure.subplots(down, ACROSS, sharex=True, sharey=True, squeeze=False)
    for axes, (name, found) in zip(panels.flat, shown.items(), strict=False):
        seeds = {one["seed"] for one in found}
        line(axes, found, "C0", "-")
        # Above, where it is dotted: an arm that is as dense training is shows through.
        dense = arms.get(study.beside(study.arms[name], DENSE), [])
        line(axes, [one for one in dense if one["seed"] in seeds], "C3", ":")
        axes.set_title(f"{name}, {len(seeds)} seeds", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.tick_params(labelbottom=True)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("training step (blue: the arm; dotted red: dense, same seeds; bands: 95% confidence)", fontsize=10)
    figure.supylabel("held-out accuracy gained", fontsize=10)
    return figure


def line(axes, found: list[dict], colour: str, style: str) -> None:
    by_step = defaultdict(list)
    for one in found:
        for step, accuracy in one["curve"]:
            by_step[step].append(accuracy - one["before"])
    middles = [estimate(values) for values in by_step.values()]
    means = np.array([one.mean for one in middles])
    widths = np.nan_to_num([one.half_width for one in middles])
    axes.plot(list(by_step), means, style, color=colour, lw=1.6)
    axes.fill_between(list(by_step), means - widths, means + widths, color=colour, alpha=0.18, lw=0)
