"""What a study consists of: pretraining a model, and training one. Each job is a process of its own."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback
from trl import ModelConfig, get_peft_config

from longact_kernels.commands.console import INTERRUPTED
from longact_kernels.commands.files import METRICS, NUMBER, append_line, read_json, read_lines, write_json, write_whole
from longact_kernels.commands.study.config import Arm, Study
from longact_kernels.commands.study.recall import Recall, make_base
from longact_kernels.commands.train.arguments import parse
from longact_kernels.commands.train.figures import series
from longact_kernels.commands.train.run import Run
from longact_kernels.sparse.projections import find_projections

POINT = {"step": int, "accuracy": NUMBER}
# Of a finished run, for all that compares runs.
RESULT = {
    **{"arm": str, "seed": int, "options": dict, "lora": dict, "learning_rate": NUMBER, "before": NUMBER},
    **{"after": NUMBER, "score": NUMBER, "curve": [[NUMBER]], "reward?": NUMBER, "churn?": NUMBER},
    **{"trained": NUMBER, "moved": NUMBER, "state?": NUMBER, "seconds_per_step?": NUMBER},
    **{"eval?": {str: NUMBER}, "versions": {str: str}},
}


@dataclass(frozen=True)
class StudyFolder:
    """Where a study keeps its files.

    `base/` has the pretrained models, `runs/` a folder and a configuration for each run, `results/` a file for each
    finished one, `logs/` what the processes printed.
    """

    path: Path

    def base(self, recall: Recall, seed: int) -> Path:
        return self.path / "base" / f"{recall.pairs}-pairs-seed-{seed}"

    def run(self, name: str) -> Path:
        return self.path / "runs" / name

    def config(self, name: str) -> Path:
        return self.path / "runs" / f"{name}.yaml"

    def result(self, name: str) -> Path:
        return self.path / "results" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.txt"


@dataclass(frozen=True)
class Pretraining:
    """Makes the model and the prompts of a seed."""

    base: Recall
    folder: StudyFolder
    seed: int

    @property
    def name(self) -> str:
        return f"base-{self.base.pairs}-{self.seed}"

    @property
    def is_done(self) -> bool:
        return self.folder.base(self.base, self.seed).is_dir()

    def check(self) -> None:
        """Nothing to check: the study's file has been."""

    def steps_done(self) -> int:
        return int(self.is_done)

    @property
    def steps(self) -> int:
        return 1

    def __call__(self) -> int:
        make_base(self.folder.base(self.base, self.seed), self.base, self.seed)
        return 0


@dataclass(frozen=True)
class Training:
    """One run of an arm."""

    study: Study
    folder: StudyFolder
    arm_name: str
    seed: int

    @property
    def arm(self) -> Arm:
        return self.study.arms[self.arm_name]

    @property
    def name(self) -> str:
        return f"{self.arm_name}-{self.seed}"

    @property
    def is_done(self) -> bool:
        return self.folder.result(self.name).is_file()

    @property
    def steps(self) -> int:
        return self.study.options["max_steps"]

    def result(self) -> dict:
        """What was seen of the finished run; empty of another."""
        return read_json(self.folder.result(self.name), RESULT)

    def steps_done(self) -> int:
        """How far the run has come, by its metrics."""
        metrics = self.folder.run(self.name) / "metrics.jsonl"
        return self.steps if self.is_done else len(read_lines(metrics, METRICS))

    def options(self) -> dict[str, Any]:
        """Those of `longact train`, as the run's YAML file says them."""
        options = {**self.study.options, **self.arm.options}
        if self.study.setting == "recall":
            base = self.folder.base(self.arm.base, self.seed)
            options |= {
                "model": str(base / "model"),
                "dataset": str(base / "data.jsonl"),
                "max_completion_length": self.arm.base.value_tokens,
            }
        return options | {"seed": self.seed, "output_dir": str(self.folder.run(self.name))}

    def check(self) -> None:
        """Reads the options as `longact train` does, and the result that is there.

        Raises:
            ValueError: they are wrong, or the result is of another study.
        """
        held = self.result()
        if held and (held["options"], held["lora"]) != (self.options(), self.arm.lora):
            raise ValueError(
                f"output: {self.folder.path} has a run {self.name} with other options; name another --output, or "
                f"delete {self.folder.result(self.name)}"
            )
        if self.seed == self.arm.seeds[0]:
            parse(self.write_config())

    def write_config(self) -> list[str]:
        """Writes the run's configuration, and returns the arguments of `longact train`."""
        write_whole(self.folder.config(self.name), yaml.safe_dump(self.options(), sort_keys=False))
        return ["--config", str(self.folder.config(self.name))]

    def __call__(self) -> int:
        """Trains, or goes on with it; called again, evaluates. Returns 0, or 130 after Ctrl-C.

        What training leaves in a process's memory would be held while `longact eval` works: it is for the next process.
        """
        folder = self.folder.run(self.name)
        trained = folder / "trained.json"
        if not trained.is_file():
            run = Run(*parse(self.write_config() + ["--resume"] * (folder / "run.json").is_file()), Console())
            if (found := self.train(run)) is None:
                return INTERRUPTED
            write_json(trained, found)
            if self.study.evaluate is not None:
                return 0
        result = read_json(trained, RESULT)
        if self.study.evaluate is not None:
            result |= self.evaluate(folder)
        write_json(self.folder.result(self.name), result)
        return 0

    def train(self, run: Run) -> dict | None:
        """Trains; returns what was seen, or None if it was stopped."""
        weights = self.weights(run)
        before = [weight.detach().clone() for weight in weights]
        adapter = self.adapter(run)
        curve = Curve(run, self.study.curve_every)
        if self.study.curve_every:
            run.trainer.add_callback(curve)
        with run.interrupt:
            first = run.train()
        if run.interrupt.asked:
            return None
        last = run.evaluate("after")
        trained = count_trained(run)
        if adapter is not None:
            adapter.merge_and_unload()
        run.finish(first, last)
        metrics = read_lines(run.folder.metrics, METRICS)
        summary = read_json(run.folder.path / "summary.json")
        state = summary["salient_state_bytes"] or {}
        return {
            "arm": self.arm_name,
            "seed": self.seed,
            "options": self.options(),
            "lora": self.arm.lora,
            "learning_rate": run.training.learning_rate,
            "before": first.accuracy,
            "after": last.accuracy,
            "score": last.accuracy,
            "curve": [[0, first.accuracy], *curve.points(), [self.steps, last.accuracy]],
            "rewards": series(metrics, "reward")[1],
            "reward": summary["reward"]["last"],
            "churn": summary["churn"],
            "trained": trained,
            "moved": moved(before, weights),
            "state": state["longact"] / state["dense_adamw"] if state else None,
            "seconds_per_step": summary["seconds_per_step"],
            "threads": torch.get_num_threads(),
            "versions": summary["versions"],
        }

    def weights(self, run: Run) -> list[Tensor]:
        """Those that the study is about: of the layers that LongAct trains sparsely, or would by the shared options."""
        if run.longact is not None:
            return [layer.get_parameter("weight") for layer in run.longact.layers.values()]
        found = find_projections(run.model, self.study.options.get("target_modules"))
        return [projection.module.get_parameter("weight") for projection in found]

    def adapter(self, run: Run) -> Any:
        """The LoRA adapters of an arm that has some, put into the run's model, all else of which is frozen."""
        if not self.arm.lora:
            return None
        from peft import get_peft_model

        return get_peft_model(run.model, get_peft_config(ModelConfig(use_peft=True, **self.arm.lora)))

    def evaluate(self, folder: Path) -> dict:
        """Scores of `longact eval`, by task, and their mean as the final score."""
        options = [word for key, value in (self.study.evaluate or {}).items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "longact_kernels.cli", "eval", str(folder / "model")]
        subprocess.run([*command, *options, "--output", str(folder / "eval")], check=True)
        scores = {}
        for cell in read_json(folder / "eval" / "results.json")["cells"]:
            if "skipped" in cell:
                raise ValueError(f"evaluate: {cell['task']}: {cell['skipped']}")
            scores[f"{cell['task']}-{cell['length']}" if cell["length"] else cell["task"]] = cell["score"]
        return {"eval": scores, "score": mean(scores.values())}


class Curve(TrainerCallback):
    """Measures the held-out accuracy now and then while a run trains, and keeps it in the run's folder."""

    def __init__(self, run: Run, every: int):
        self.run, self.every = run, every
        self.path = run.folder.path / "curve.jsonl"

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            accuracy = self.run.evaluate(f"after step {state.global_step}").accuracy
            append_line(self.path, {"step": state.global_step, "accuracy": accuracy})

    def points(self) -> list[list[float]]:
        """Steps and accuracies; of a step that was taken again after a stop, the later one."""
        return [list(point) for point in {one["step"]: one["accuracy"] for one in read_lines(self.path, POINT)}.items()]


def count_trained(run: Run) -> int:
    """How many weights a step trains: of sparse layers those of a set."""
    layers = run.longact.layers.values() if run.longact is not None else ()
    sizes = {id(one.get_parameter("weight")): (one.salient.size, one.salient.dim) for one in layers}
    count = 0
    for p in run.model.parameters():
        if p.requires_grad:
            size, dim = sizes.get(id(p), (p.shape[0], 0))
            count += p.numel() // p.shape[dim] * size
    return count


def moved(before: list[Tensor], after: Iterable[Tensor]) -> float:
    """The share of the weights that differ."""
    changed = sum(int((one != other).sum()) for one, other in zip(before, after, strict=True))
    return changed / sum(one.numel() for one in before)


def jobs_of(study: Study, folder: StudyFolder) -> tuple[list[Pretraining], list[Training]]:
    """What there is to do, done or not: seed by seed, so that arms can be compared early."""
    runs = [
        Training(study, folder, name, seed)
        for seed in study.seeds
        for name, arm in study.arms.items()
        if seed in arm.seeds
    ]
    made = dict.fromkeys((run.arm.base, run.seed) for run in runs) if study.setting == "recall" else {}
    return [Pretraining(base, folder, seed) for base, seed in made], runs


def end_with_the_study() -> None:
    """Where the study was killed and could not tell its processes, they hear of it here, and keep a checkpoint."""
    study = multiprocessing.parent_process()
    if study is not None:
        study.join()
        os.killpg(0, signal.SIGINT)


def work(job: Pretraining | Training, threads: int) -> None:
    """Does a job: the target of its process."""
    # Ctrl-C reaches the study alone, which tells its processes.
    os.setpgrp()
    path = job.folder.log(job.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_the_study, daemon=True).start()
    try:
        status = job()
    except KeyboardInterrupt:
        status = INTERRUPTED
    sys.stdout.flush()
    sys.exit(status)
