"""Two models on the same documents: the difference of their scores, with a confidence interval."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from longact_kernels.commands.eval.results import Cell

RESAMPLES = 9999
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A score of model B minus that of model A.

    Attributes:
        task: `None` for the mean over tasks.
        length: as `Cell.length`.
        a, b: mean scores over the documents that both answered.
        low, high: ends of the confidence interval of `b - a`; `nan` for a single document.
        samples: documents that both answered.
    """

    task: str | None
    length: int | None
    a: float
    b: float
    low: float
    high: float
    samples: int

    @property
    def difference(self) -> float:
        return self.b - self.a


def interval(differences: list[np.ndarray]) -> tuple[float, float]:
    """Ends of the 95% confidence interval of a mean of means, by the paired percentile bootstrap.

    Args:
        differences: one array a task, of each document's score of B minus that of A: resampling differences keeps the
            pairs together, and tasks are resampled each on its own.
    """
    if min(map(len, differences)) < 2:
        return np.nan, np.nan
    result = bootstrap(
        differences,
        lambda *resampled, axis: sum(values.mean(axis=axis) for values in resampled) / len(resampled),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        batch=500,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(result.low), float(result.high)


def compare(a: list[Cell], b: list[Cell]) -> list[Difference]:
    """Differences of all cells that both models have, and for each length with several tasks that of the mean.

    Raises:
        ValueError: nothing is in both, or a task's documents are not the same ones.
    """
    paired = {}
    other = {(cell.task, cell.length): cell for cell in b if not cell.skipped}
    for cell in a:
        if not cell.skipped and (cell.task, cell.length) in other:
            paired[cell.task, cell.length] = pair(cell, other[cell.task, cell.length])
    if not paired:
        raise ValueError("compare: the two results have no task and length in common")
    found = [difference(task, length, [scores]) for (task, length), scores in paired.items()]
    for length in dict.fromkeys(length for _, length in paired):
        tasks = [scores for (_, other_length), scores in paired.items() if other_length == length]
        if len(tasks) > 1:
            found.append(difference(None, length, tasks))
    return found


def pair(a: Cell, b: Cell) -> np.ndarray:
    """Scores of both models on the documents that both answered: [2, documents]."""
    other = {sample["document"]: sample["score"] for sample in b.samples}
    scores = [(sample["score"], other[sample["document"]]) for sample in a.samples if sample["document"] in other]
    if not scores:
        where = a.task if a.length is None else f"{a.task} at {a.length}"
        raise ValueError(
            f"compare: the two models answered different documents of {where}, which depend on the tokenizer; run "
            "`longact eval --compare A B` on the models, which gives both the same documents"
        )
    return np.array(scores).T


def difference(task: str | None, length: int | None, tasks: list[np.ndarray]) -> Difference:
    a, b = (float(np.mean([scores[i].mean() for scores in tasks])) for i in range(2))
    low, high = interval([scores[1] - scores[0] for scores in tasks])
    return Difference(task, length, a, b, low, high, sum(scores.shape[1] for scores in tasks))
