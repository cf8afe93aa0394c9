"""Which of a study's learning rates is best for each arm, from runs with seeds of their own."""

from pathlib import Path
from statistics import mean

from rich.console import Console

from longact_kernels.commands.files import write_whole
from longact_kernels.commands.study.config import Study
from longact_kernels.commands.study.report import as_markdown, shown, write_csv


def means_of(study: Study, results: list[dict]) -> dict[str, dict[float, float]]:
    """By arm and learning rate the mean held-out accuracy after training, over the seeds that have been run."""
    found: dict[str, dict[float, list[float]]] = {name: {} for name in study.arms}
    for name, rates in found.items():
        for rate in study.learning_rates:
            arm = study.tuned_name(name, rate)
            if values := [one["after"] for one in results if one["arm"] == arm]:
                rates[rate] = values
    return {name: {rate: mean(values) for rate, values in rates.items()} for name, rates in found.items() if rates}


def best_of(means: dict[float, float]) -> list[float]:
    """The rates with the highest mean, the lowest first: more than one where they tie."""
    return sorted(rate for rate, value in means.items() if value == max(means.values()))


def choose_rates(study: Study, results: list[dict]) -> dict[str, float]:
    """For each arm the learning rate with the highest mean; of those that tie, the lowest."""
    return {name: best_of(means)[0] for name, means in means_of(study, results).items()}


def line(study: Study, name: str, means: dict[float, float]) -> dict[str, str]:
    """An arm's means by rate, and what was chosen, by column."""
    best = best_of(means)
    at_edge = best[0] in (study.learning_rates[0], study.learning_rates[-1])
    remarks = [f"tie with {rate:g}" for rate in best[1:]] + ["edge of the list"] * at_edge
    cells = {f"{rate:g}": f"{means[rate]:.3f}" if rate in means else "-" for rate in study.learning_rates}
    return {"arm": name, **cells, "best": f"{best[0]:g}", "remark": ", ".join(remarks) or "-"}


def write_tuning(study: Study, folder: Path, results: list[dict], console: Console) -> None:
    """Writes `tuning.csv`, with all runs, and `tuning.md`, with the means and what was chosen; shows the latter."""
    write_csv(folder / "tuning.csv", results)
    lines = [line(study, name, means) for name, means in means_of(study, results).items()]
    write_whole(folder / "tuning.md", as_markdown(lines))
    seeds = ", ".join(map(str, study.tuning_seeds))
    console.print(shown(f"Held-out accuracy by learning rate, means over the seeds {seeds}", lines))
