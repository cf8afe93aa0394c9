"""The picture of `longact perturb`."""

import numpy as np
from matplotlib.figure import Figure

from longact_kernels.commands.inspect.figures import WIDTH


def perturbation(results: dict) -> Figure:
    """Perplexity and accuracy with nothing, the bottom, random or the top channels clamped."""
    groups: dict[str, list[dict]] = {}
    for arm in results["arms"]:
        groups.setdefault(arm["channels"], []).append(arm)
    labels = [f"{name}, {len(arms)} seeds" if len(arms) > 1 else name for name, arms in groups.items()]
    places = np.arange(len(groups))
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    above, below = figure.subplots(2)

    # In the logarithm, in which the bars are drawn.
    means = [np.exp(np.mean([np.log(arm["perplexity"]) for arm in arms])) for arms in groups.values()]
    above.barh(places, means, color="C0", alpha=0.75)
    for place, mean, arms in zip(places, means, groups.values(), strict=True):
        if len(arms) > 1:
            above.plot([arm["perplexity"] for arm in arms], [place] * len(arms), "o", ms=4, color="0.15")
        highest = max(arm["perplexity"] for arm in arms)
        value = f"{mean:,.0f}" if mean >= 100 else f"{mean:.1f}"
        above.text(1.3 * highest, place, value if len(arms) == 1 else f"geometric mean {value}", va="center")
    dots = "; dots: seeds" if any(len(arms) > 1 for arms in groups.values()) else ""
    above.set(xscale="log", xlabel=f"perplexity (log; lower is better{dots})")
    above.set_xlim(1, 20 * max(means))

    for place, arms in zip(places, groups.values(), strict=True):
        mean = np.mean([arm["accuracy"] for arm in arms])
        error = np.mean([arm["accuracy standard error"] for arm in arms])
        below.barh(place, mean, xerr=error, color="C1", alpha=0.75, capsize=4)
        if len(arms) > 1:
            below.plot([arm["accuracy"] for arm in arms], [place] * len(arms), "o", ms=4, color="0.15")
        below.text(mean + error + 0.015, place, f"{mean:.2f}", va="center")
    prompts = len(results["arms"][0]["rewards"])
    below.set(xlim=(0, 1.1), xlabel=f"accuracy at {results['task']}, {prompts} prompts (± standard error)")
    for axes in (above, below):
        axes.set_yticks(places, labels)
        axes.set_ylabel("channels clamped")
        axes.grid(False, axis="y")
        axes.invert_yaxis()
    return figure
