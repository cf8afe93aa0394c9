"""What a study leaves: a CSV of all runs, a table of the arms, pictures, and a page with all of it."""

import csv
import io
import math
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from longact_kernels.commands.files import write_json, write_whole
from longact_kernels.commands.page import both_styles, document, pairs, picture, table
from longact_kernels.commands.study.config import DENSE, Study
from longact_kernels.commands.study.estimates import Comparison, Estimate, compare, estimate
from longact_kernels.commands.study.figures import draw

COLUMNS = ["arm", "seed", "learning_rate", "before", "after", "score", "reward", "churn", "trained", "moved", "state"]
COLUMNS += ["seconds_per_step"]
MEANINGS = {
    "score": "final score: mean over seeds ± half of the 95% confidence interval",
    "gain": "the same of score minus held-out accuracy before training",
    "minus": "mean difference over the same seeds ± half of its 95% confidence interval; p of the paired t-test, and "
    "of the exact sign-flip test (never below 2 / 2ⁿ with n seeds); not corrected for the number of comparisons",
    "churn": "1 - Jaccard overlap of a salient set with the one before, mean over layers and steps",
    "rate": "learning rate",
    "trained": "weights that a step trains, of the whole model",
    "moved": "share of the weights that differ from those before training: of the layers that the arm trains sparsely, "
    "and otherwise of those that the study's options name",
    "state": "bytes of optimizer state of the layers trained sparsely, as a share of dense AdamW's",
    "s/step": "median time of a training step, on one of the processes side by side",
}


@dataclass(frozen=True)
class Row:
    """An arm in numbers; comparisons are None with itself, or without seeds in common."""

    arm: str
    score: Estimate
    gain: Estimate
    against: dict[str, Comparison | None]
    learning_rate: float
    churn: float | None
    trained: float
    moved: float
    state: float | None
    seconds_per_step: float | None


def rows_of(study: Study, results: list[dict]) -> list[Row]:
    """One row an arm with results, in the order of the study."""
    by_arm = {name: {one["seed"]: one for one in results if one["arm"] == name} for name in study.arms}
    methods = list(dict.fromkeys((DENSE, study.reference)))
    rows = []
    for name, found in by_arm.items():
        if not found:
            continue
        beside = {method: study.beside(study.arms[name], method) for method in methods}
        rows.append(
            Row(
                name,
                estimate([one["score"] for one in found.values()]),
                estimate([one["after"] - one["before"] for one in found.values()]),
                {method: None if one == name else against(found, by_arm[one]) for method, one in beside.items()},
                **{of.name: mean_of(found, of.name) for of in fields(Row)[4:]},
            )
        )
    return rows


def mean_of(found: dict[int, dict], key: str) -> Any:
    """The mean over the runs that have a value; None where none has."""
    values = [one[key] for one in found.values() if one.get(key) is not None]
    return mean(values) if values else None


def against(found: dict[int, dict], others: dict[int, dict]) -> Comparison | None:
    seeds = sorted(found.keys() & others.keys())
    return (
        compare([found[seed]["score"] for seed in seeds], [others[seed]["score"] for seed in seeds]) if seeds else None
    )


def write_results(study: Study, folder: Path, results: list[dict], console: Console) -> None:
    """Writes `runs.csv`, `study.json`, `tables.md`, pictures, `report.html`; shows the tables."""
    rows = rows_of(study, results)
    write_csv(folder / "runs.csv", results)
    about = versions(results)
    write_json(folder / "study.json", {"arms": [as_dict(row) for row in rows], "versions": about})
    images = both_styles(lambda: draw(study, results))
    for name, (light, _) in images.items():
        write_whole(folder / f"{name}.png", light)
    write_whole(folder / "report.html", page(study, rows, images, about))
    write_whole(
        folder / "tables.md", "\n".join(as_markdown([part(row) for row in rows]) for part in (outcomes, comparisons))
    )
    console.print(shown(f"{study.name}: means ± 95% confidence intervals", [outcomes(row) for row in rows]))
    console.print(shown("Differences over the same seeds", [comparisons(row) for row in rows]))
    for name in ("runs.csv", *(f"{name}.png" for name in images), "report.html"):
        console.print(folder / name, soft_wrap=True, markup=False)


def versions(results: list[dict]) -> dict[str, str]:
    """What the runs ran on; all there is, where they differ."""
    names = dict.fromkeys(name for one in results for name in one["versions"])
    return {name: ", ".join(dict.fromkeys(one["versions"].get(name, "-") for one in results)) for name in names}


def write_csv(path: Path, results: list[dict]) -> None:
    """One line a run; the scores of `longact eval` behind the other columns."""
    tasks = list(dict.fromkeys(task for one in results for task in (one.get("eval") or {})))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*COLUMNS, *tasks])
    for one in results:
        scores = one.get("eval") or {}
        writer.writerow([*(one.get(key) for key in COLUMNS), *(scores.get(task) for task in tasks)])
    write_whole(path, text.getvalue())


def as_dict(row: Row) -> dict:
    """A row as plain data, without what is not known."""
    plain = {**vars(row), "score": vars(row.score), "gain": vars(row.gain)}
    plain["against"] = {
        name: {**vars(one), "difference": vars(one.difference)} for name, one in row.against.items() if one
    }
    return plain


def outcomes(row: Row) -> dict[str, str]:
    """What came of an arm, and what it did, by column."""
    return {
        "arm": row.arm,
        "seeds": str(row.score.count),
        "score": interval(row.score),
        "gain": interval(row.gain, signed=True),
        "rate": f"{row.learning_rate:g}",
        "churn": "-" if row.churn is None else f"{row.churn:.2f}",
        "trained": f"{row.trained:.0f}",
        "moved": f"{row.moved:.2f}",
        "state": "-" if row.state is None else f"{row.state:.2f}",
        "s/step": "-" if row.seconds_per_step is None else f"{row.seconds_per_step:.2f}",
    }


def comparisons(row: Row) -> dict[str, str]:
    """An arm against the others, by column."""
    cells = {"arm": row.arm}
    for i, (name, one) in enumerate(row.against.items()):
        # Columns of a table have names of their own.
        cells[f"minus {name}"] = interval(one.difference, signed=True) if one else "-"
        cells[f"p t, flip{' ' * i}"] = f"{p_value(one.p_t)}, {p_value(one.p_sign_flip)}" if one else "-"
    return cells


def interval(one: Estimate, signed: bool = False) -> str:
    mean = f"{one.mean:+.3f}" if signed else f"{one.mean:.3f}"
    return mean if math.isnan(one.half_width) else f"{mean} ± {one.half_width:.3f}"


def p_value(p: float) -> str:
    return "-" if math.isnan(p) else f"{p:.3f}" if p >= 0.0005 else "<0.001"


def shown(title: str, lines: list[dict[str, str]]) -> Table:
    """A table for the terminal."""
    made = Table(*lines[0], title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for line in lines:
        made.add_row(*line.values())
    return made


def as_markdown(lines: list[dict[str, str]]) -> str:
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def as_html(lines: list[dict[str, str]]) -> str:
    return table(list(lines[0]), [[escape(cell) for cell in line.values()] for line in lines], "numbers")


def page(study: Study, rows: list[Row], images: dict[str, tuple[bytes, bytes]], about: dict) -> str:
    """The study as one HTML page that needs nothing else."""
    titles = {
        "scores": "Final score by arm: runs, mean, 95% confidence interval",
        "curves": "Held-out accuracy gained while training: means, 95% confidence bands",
        "lengths": "Differences from dense by length of the prompt: means, 95% confidence intervals",
    }
    figures = "".join(picture(name, titles[name], *both) for name, both in images.items())
    arms = {
        name: ", ".join(f"{key} {value}" for key, value in {**arm.options, **arm.lora}.items()) or "-"
        for name, arm in study.arms.items()
    }
    parts = {"evaluate": study.evaluate or {}, "base": {}}
    if study.setting == "recall":
        bases = [vars(arm.base) for arm in study.arms.values()]
        parts["base"] = bases[0] | {"pairs": ", ".join(dict.fromkeys(str(base["pairs"]) for base in bases))}
    options = study.options | {f"{part}: {key}": value for part, own in parts.items() for key, value in own.items()}
    return document(
        study.name,
        f"{sum(row.score.count for row in rows)} runs of {study.options['max_steps']} steps, setting {study.setting}",
        figures,
        f"<h2>Arms</h2>{as_html([outcomes(row) for row in rows])}{as_html([comparisons(row) for row in rows])}"
        f"{table(['column', 'meaning'], pairs(MEANINGS))}"
        f"<h2>In what the arms differ</h2>{table(['arm', 'options'], pairs(arms))}"
        f"<h2>What they share</h2>{table(['option', 'value'], pairs(options))}"
        f"<h2>Versions</h2>{table(['what', 'version'], pairs(about))}",
    )
