"""Training runs side by side: what they came to, how they got there, in what they differ."""

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from longact_kernels.commands.files import METRICS, NUMBER, POSITIVE, read_json, read_lines, write_whole
from longact_kernels.commands.page import both_styles, document, kept, picture, table, value_of
from longact_kernels.commands.train.figures import CURVES, curves_figure
from longact_kernels.commands.train.report import headline
from longact_kernels.commands.train.resuming import read_options

PANELS = {"reward": "reward of sampled completions", **CURVES, "churn": "churn of the salient sets"}
PANELS["seconds_per_step"] = "seconds a step"
# What has to differ between two runs.
OWN = ("output_dir", "run_name", "logging_dir")
# What is shown of a `summary.json`.
ENDS = ("before", "before_standard_error", "after", "after_standard_error")
SUMMARY = {
    "measure": str,
    "accuracy": {"prompts": int, **dict.fromkeys(ENDS, NUMBER)},
    "steps": int,
    "reward": {"steps": int, "steps_at_each_end": int, "first?": NUMBER, "last?": NUMBER},
    "seconds_per_step?": NUMBER,
    "tokens_per_second?": NUMBER,
    "salient_state_bytes?": {"longact": NUMBER, "dense_adamw": POSITIVE},
    "churn?": NUMBER,
    "versions?": {str: str},
}


@dataclass(frozen=True)
class TrainingRun:
    """A run's folder, read.

    Attributes:
        name: its folder's, as far as it takes to tell the runs apart.
        options: of `longact train`, by name.
        metrics: its log.
        summary: of a run that has finished; empty otherwise.
    """

    name: str
    options: dict[str, Any]
    metrics: list[dict]
    summary: dict[str, Any]


def read_runs(folders: list[str]) -> list[TrainingRun]:
    """Reads the runs in some folders.

    Raises:
        ValueError: a folder holds none, or is named twice.
    """
    paths = [Path(os.path.normpath(folder)) for folder in folders]
    for path in paths:
        if not (path / "run.json").is_file():
            raise ValueError(f"RUN: {path} holds no training run: it has no run.json")
        if paths.count(path) > 1:
            raise ValueError(f"RUN: got {path} twice")
    names = [path.resolve().name for path in paths]
    alike = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [read_run(path, name) for path, name in zip(paths, alike, strict=True)]


def read_run(path: Path, name: str) -> TrainingRun:
    options = read_options(path / "run.json")
    options |= options.pop("grpo_config", {})
    summary = read_json(path / "summary.json", SUMMARY)
    return TrainingRun(name, options, read_lines(path / "metrics.jsonl", METRICS), summary)


def differences(runs: list[TrainingRun]) -> dict[str, list[Any]]:
    """The options and versions in which runs differ, with the value of each run; None where it has none."""
    everything = [run.options | run.summary.get("versions", {}) for run in runs]
    names = dict.fromkeys(name for options in everything for name in options if name not in OWN)
    found = {name: [options.get(name) for options in everything] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def outcomes(runs: list[TrainingRun]) -> list[list[str]]:
    """The rows of a table of results, a column a run; of a run that has not finished, how far it is."""
    results = [dict(headline(run.summary)) if run.summary else {} for run in runs]
    names = dict.fromkeys(name for result in results for name in result)
    rows = [["steps", *(str(run.metrics[-1]["step"] if run.metrics else 0) for run in runs)]]
    rows += [["", *("" if run.summary else "not finished" for run in runs)]] if not all(results) else []
    return rows + [[escape(name), *(kept(result.get(name, "-")) for result in results)] for name in names]


def write_comparison(runs: list[TrainingRun], output: str | None) -> Path:
    """Writes the page; returns its path."""
    path = Path(output or f"runs/compare-{'-'.join(run.name.replace('/', '-') for run in runs)}.html")
    names = [escape(run.name) for run in runs]
    logs = {run.name: run.metrics for run in runs}
    logged = any(key in record for log in logs.values() for record in log for key in PANELS)
    images = both_styles(lambda: [("curves", curves_figure(logs, PANELS))] if logged else [])
    differing = [[escape(name), *map(value_of, values)] for name, values in differences(runs).items()]
    page = document(
        " and ".join(run.name for run in runs),
        f"{len(runs)} training runs",
        table(["", *names], outcomes(runs), "texts"),
        *(picture(name, "While training", *both) for name, both in images.items()),
        "<h2>Options in which they differ</h2>",
        table(["option", *names], differing, "texts") if differing else "<p>None.</p>",
    )
    write_whole(path, page)
    return path
