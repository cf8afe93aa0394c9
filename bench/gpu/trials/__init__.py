"""Candidates beside the present kernels: what they would gain is predicted, and waits for a measurement (docs/gpu.md).

A trial's file has the `inputs` that a projection gives, a `check` of what comes back for them, `PEERS`, of which the
first is the present kernel, and `CANDIDATES`, which are called alike.
"""

import importlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from bench.gpu.compile import PROCESSES
from bench.gpu.kernels import Contenders, races
from bench.gpu.models import QWEN3_0_6B, SMOLLM2, Model, cases
from bench.gpu.stage import ROOT, Stage
from bench.race import DEVICE

TRIALS = ("pack", "scatter", "scatter_columns", "channel_stats", "linear_stats", "linear_stats_gluon")
CHECKED = [(Model("small", 80, (160, 32), 16, 1), 700)]
if DEVICE == "cuda":
    CHECKED += [(SMOLLM2, 2011), (QWEN3_0_6B, 4099)]


def run(stage: Stage) -> int:
    if stage.dry:  # the first of each; the interpreter knows no Gluon
        jobs = [(name, next(iter(trial(name).CANDIDATES))) for name in TRIALS if "gluon" not in name]
    else:
        jobs = [(name, candidate) for name in TRIALS for candidate in trial(name).CANDIDATES]
    right = {name: [] for name, _ in jobs}
    failed = 0
    with ThreadPoolExecutor(1 if stage.dry else PROCESSES) as pool:
        errors = pool.map(partial(error_of, seconds=stage.seconds / 2), jobs)
        for (name, candidate), error in zip(jobs, errors, strict=True):
            if error:
                failed += 1
                stage.row("candidate", label=f"{name} {candidate}", error=error)
            else:
                right[name].append(candidate)
    for model, tokens in cases(stage.dry):
        works = {f"trial of {name}": partial(contenders, name, right[name], model, tokens) for name in right}
        failed += races(stage, model, tokens, works, {})
    return int(failed > 0)


def trial(name: str) -> Any:
    return importlib.import_module(f"bench.gpu.trials.{name}")


def error_of(job: tuple[str, str], seconds: float) -> str:
    """What is wrong with a candidate: compiled and checked in a process of its own, as it may crash or hang."""
    command = [sys.executable, "-m", "bench.gpu.trials", *job]
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return done.stdout[-500:] if done.returncode else ""


def check(name: str, candidate: str) -> None:
    """Compares a candidate with plain torch, in sizes that its tiles do not divide."""
    for model, tokens in CHECKED:
        for N in model.N:
            given = trial(name).inputs(model, N, tokens)
            trial(name).check(trial(name).CANDIDATES[candidate](*given), *given)


def contenders(name: str, candidates: list[str], model: Model, tokens: int) -> Contenders:
    """Calls of a trial's peers and candidates, each of them for the query and the key projection."""
    given = [trial(name).inputs(model, N, tokens) for N in model.N]

    def both(call: Callable) -> Callable[[], object]:
        return lambda: [call(*tensors) for tensors in given]

    calls = trial(name).PEERS | {f"ours, {candidate}": trial(name).CANDIDATES[candidate] for candidate in candidates}
    return {label: both(call) for label, call in calls.items()}
