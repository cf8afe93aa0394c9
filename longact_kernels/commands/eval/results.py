"""What an evaluation keeps: one file a finished (task, length), and `results.json` with all of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

from longact_kernels.commands.files import NUMBER, read_json, write_json

# What is read of `results.json`, and of the file of a cell.
RESULTS = {"model": {"name": str, "state": str | None}, "cells": [{"task": str, "length?": int, "skipped?": str}]}
SAMPLE = {"document": str, "score": NUMBER}
CELL = {
    "task": str,
    "length?": int,
    "metric": str,
    "samples": ([SAMPLE], lambda samples: bool(samples)),
    "notes": [str],
    "made_with": dict,
}
PACKAGES = ("longact_kernels", "lm_eval", "torch", "transformers")


@dataclass(frozen=True)
class Cell:
    """A task at a length.

    Attributes:
        task: as lm-eval calls it.
        length: tokens of a prompt and its answer together; `None` where the documents have lengths of their own.
        metric: of lm-eval, as the scores are called.
        samples: of each document its lm-eval `document` hash, `score`, `target` and `answer`.
        notes: what a reader of the score must know.
        skipped: why there is no score.
        made_with: settings that another score could come from.
    """

    task: str
    length: int | None
    metric: str = ""
    samples: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str | None = None
    made_with: dict = field(default_factory=dict)

    @property
    def scores(self) -> list[float]:
        return [sample["score"] for sample in self.samples]

    @property
    def score(self) -> float:
        return mean(self.scores)

    @property
    def standard_error(self) -> float:
        """Of the score over other documents of the same kind."""
        return stdev(self.scores) / math.sqrt(len(self.scores)) if len(self.scores) > 1 else math.nan

    def summary(self) -> dict:
        """The cell without its samples, as in `results.json`."""
        place = {"task": self.task, "length": self.length}
        if self.skipped:
            return {**place, "skipped": self.skipped}
        error = self.standard_error
        return {
            **place,
            "metric": self.metric,
            "score": self.score,
            "standard_error": None if math.isnan(error) else error,
            "samples": len(self.samples),
            "notes": self.notes,
            "made_with": self.made_with,
        }


class ResultFolder:
    """The results of one model.

    Args:
        path: need not exist.
        model: `name`, and `state`, which changes with its weights; `None` for an earlier folder, whatever it is of.

    Raises:
        ValueError: the folder holds something else, or no results where there should be some.
    """

    def __init__(self, path: Path, model: dict | None = None):
        self.path = path
        held = self._held()
        if model is None and not held:
            raise ValueError(f"compare: {path} holds no results of longact eval")
        if model is not None and not held and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(
                f"output: {path} exists and holds something else than results of longact eval; name another --output"
            )
        if model is not None and held and held["model"] != model:
            what = "another state of " if held["model"]["name"] == model["name"] else ""
            raise ValueError(
                f"output: {path} holds results of {what}{held['model']['name']}; name another --output, "
                "or delete that folder"
            )
        self.model = model or held["model"]

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder holds results."""
        return (path / "results.json").is_file()

    def _held(self) -> dict:
        return read_json(self.path / "results.json", RESULTS)

    def cells(self) -> list[Cell]:
        """All finished cells, in the order of `results.json`."""
        listed = self._held()["cells"]
        return [self.read(cell["task"], cell.get("length")) for cell in listed if "skipped" not in cell]

    def cell(self, task: str, length: int | None, made_with: dict, compute: Callable[[], Cell]) -> Cell:
        """The cell, computed and kept unless it is there and was made with these settings."""
        if self.file(task, length).is_file():
            held = self.read(task, length)
            if held.made_with == made_with:
                return held
        cell = replace(compute(), made_with=made_with)
        if not cell.skipped:
            write_json(self.file(task, length), vars(cell))
        return cell

    def read(self, task: str, length: int | None) -> Cell:
        file = self.file(task, length)
        try:
            return Cell(**read_json(file, CELL))
        except TypeError as error:
            raise ValueError(
                f"{file} is missing or damaged; restore it, or evaluate again into another folder"
            ) from error

    def file(self, task: str, length: int | None) -> Path:
        return self.path / "samples" / (f"{task}.json" if length is None else f"{task}-{length}.json")

    def write(self, cells: list[Cell]) -> None:
        """Writes `results.json`: these cells, and those of earlier calls that are not among them."""
        held = self._held().get("cells", [])
        listed = {(cell["task"], cell.get("length")): cell for cell in held}
        listed |= {(cell.task, cell.length): cell.summary() for cell in cells}
        versions = {package: version(package) for package in PACKAGES}
        content = {"model": self.model, "versions": versions, "cells": list(listed.values())}
        write_json(self.path / "results.json", content)
