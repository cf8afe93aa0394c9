"""`longact perturb`: the paper's causal test. Which query and key channels can a model do without?"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import mean
from typing import NamedTuple

import torch
from matplotlib import rc_context
from rich.console import Console
from rich.table import Table
from torch import Tensor

from longact_kernels.commands.console import progress_bar
from longact_kernels.commands.inspect.channels import (
    Part,
    Statistics,
    bounds,
    hooked,
    measure,
    pool,
    salient,
)
from longact_kernels.commands.inspect.subject import load
from longact_kernels.commands.page import png
from longact_kernels.commands.perturb.figures import perturbation
from longact_kernels.commands.train.evaluate import Evaluation, evaluate
from longact_kernels.sparse.figures import LIGHT
from longact_kernels.tasks import TASKS, build_dataset


class Arm(NamedTuple):
    """One way to perturb the model: the channels to clamp, bool [n]; `seed` of random ones."""

    channels: str
    seed: int | None
    clamped: Tensor

    @property
    def name(self) -> str:
        return self.channels if self.seed is None else f"{self.channels} (seed {self.seed})"


class Perturbation:
    """A model with its top, random or bottom channels clamped: perplexity of texts, accuracy at a task."""

    def __init__(self, arguments: argparse.Namespace, console: Console):
        self.arguments = arguments
        self.console = console
        self.subject = load(self.arguments, "perturb", console)
        length, answer = self.arguments.task_length, self.arguments.max_completion_length
        if length + answer > self.subject.context:
            raise ValueError(
                f"task_length: got {length}, which with max_completion_length {answer} is more than the "
                f"{self.subject.context} tokens that the model reads"
            )
        with console.status("making prompts"):
            self.prompts = build_dataset(
                self.arguments.task,
                self.subject.tokenizer,
                split="perturb",
                count=self.arguments.prompts,
                seed=0,
                length=self.arguments.task_length,
                argument="task_length",
            )

    def run(self) -> None:
        arguments, subject = self.arguments, self.subject
        arms = 3 + len(arguments.seeds)
        texts = sum(ids.numel() for text in subject.texts.values() for ids in text[self.half :])
        chosen_by = sum(ids.numel() for text in subject.texts.values() for ids in text[: self.half])
        found: list[dict] = []
        with progress_bar(self.console) as bar:
            total = chosen_by + arms * (texts + arguments.prompts * self.prompt_cost)
            row = bar.add_task("perturbing", total=total, note="choosing channels")
            advance = partial(bar.advance, row)
            statistics = self.statistics(advance)
            for arm in self.arms(getattr(statistics, arguments.statistic)):
                with hooked(subject.parts, Clamp(arm.clamped, statistics, subject.parts, arguments.mean)):
                    bar.update(row, note=f"{arm.name}: perplexity")
                    nll = self.losses(advance)
                    bar.update(row, note=f"{arm.name}: {arguments.task}")
                    answers = self.answer(advance)
                found.append(record(arm, nll, answers))
                # After every arm: what an interrupt leaves is still of use.
                subject.write("perturb.json", self.results(found))
                if not self.console.is_terminal:
                    self.console.print(
                        f"{arm.name}: perplexity {perplexity(nll):,.1f}, accuracy {answers.accuracy:.3f}"
                    )
        with rc_context(LIGHT):
            (subject.folder / "perturb.png").write_bytes(png(perturbation(self.results(found))))
        self.console.print(summary(self.results(found)))
        self.console.print(subject.folder, soft_wrap=True, markup=False)

    @property
    def half(self) -> int:
        """How many sequences of each domain the channels are chosen by; the perplexity is that of the others."""
        return self.arguments.batches // 2

    @property
    def prompt_cost(self) -> int:
        """What a prompt counts in the progress: tokens that are generated take longer than those that are read."""
        return self.arguments.task_length + 8 * self.arguments.max_completion_length

    def statistics(self, advance: Callable[[int], None]) -> Statistics:
        found = []
        for text in self.subject.texts.values():
            for ids in text[: self.half]:
                found += measure(self.subject.model, self.subject.parts, ids)
                advance(len(ids))
        return pool(found)

    def arms(self, saliency: Tensor) -> Iterator[Arm]:
        parts, density = self.subject.parts, self.subject.density
        yield Arm("none", None, torch.zeros(len(saliency), dtype=torch.bool))
        yield Arm("bottom", None, salient(-saliency, parts, density))
        for seed in self.arguments.seeds:
            draw = torch.rand(len(saliency), generator=torch.Generator().manual_seed(seed))
            yield Arm("random", seed, salient(draw, parts, density))
        yield Arm("top", None, salient(saliency, parts, density))

    def losses(self, advance: Callable[[int], None]) -> dict[str, list[float]]:
        """Of each domain, the losses of its sequences."""
        found: dict[str, list[float]] = {}
        for name, text in self.subject.texts.items():
            found[name] = []
            for ids in text[self.half :]:
                found[name].append(self.loss(ids))
                advance(len(ids))
        return found

    @torch.no_grad()
    def loss(self, ids: Tensor) -> float:
        """Mean negative log-likelihood of a token of one sequence [T]."""
        ids = ids[None].to(self.subject.model.device)
        return self.subject.model(input_ids=ids, labels=ids, use_cache=False).loss.item()

    def answer(self, advance: Callable[[int], None]) -> Evaluation:
        model, tokenizer = self.subject.model, self.subject.tokenizer
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return evaluate(
            model,
            tokenizer,
            self.prompts,
            TASKS[self.arguments.task].reward,
            max_completion_length=self.arguments.max_completion_length,
            eos_token_id=[end for end in {*ends, tokenizer.eos_token_id} if end is not None],
            batch_size=self.arguments.batch_size,
            advance=lambda count: advance(count * self.prompt_cost),
        )

    def results(self, found: list[dict]) -> dict:
        arguments = self.arguments
        names = ("model", "statistic", "mean", "length", "batches", "task", "task_length", "max_completion_length")
        return {name: getattr(arguments, name) for name in names} | {"arms": found}


class Clamp:
    """A hook of `hooked` that puts a mean in the place of some channels.

    Args:
        clamped: bool [n], the channels.
        statistics: with the means, fp32 [n].
        mean: "global", over all channels of a part, or "channel", each channel's own.
    """

    def __init__(self, clamped: Tensor, statistics: Statistics, parts: list[Part], mean: str):
        self.rows, self.values = [], []
        for part, (start, end) in zip(parts, bounds(parts), strict=True):
            own = statistics.mean[start:end]
            self.rows.append(part.rows[clamped[start:end]])
            self.values.append((own if mean == "channel" else own.mean().expand(end - start))[clamped[start:end]])

    def __call__(self, i: int, output: Tensor) -> Tensor:
        rows, values = self.rows[i].to(output.device), self.values[i].to(output)
        return output.index_copy(-1, rows, values.expand(*output.shape[:-1], -1))


def record(arm: Arm, nll: dict[str, list[float]], answers: Evaluation) -> dict:
    """What came of an arm; `nll` has the losses of each domain's sequences."""
    return {
        "channels": arm.channels,
        "seed": arm.seed,
        "perplexity": perplexity(nll),
        "perplexity of domains": {name: perplexity({name: values}) for name, values in nll.items()},
        "nll": nll,
        "accuracy": answers.accuracy,
        "accuracy standard error": answers.standard_error,
        "rewards": answers.rewards,
    }


def perplexity(nll: dict[str, list[float]]) -> float:
    return math.exp(mean(value for values in nll.values() for value in values))


def summary(results: dict) -> Table:
    """All arms, for the terminal."""
    table = Table(
        title=f"{results['model']}: query and key channels clamped, by {results['statistic']}, to the "
        f"{results['mean']} mean; accuracy at {results['task']}",
        title_justify="left",
    )
    arms = results["arms"]
    for column in ("channels", "perplexity", *arms[0]["nll"], "accuracy"):
        table.add_column(column, justify="left" if column == "channels" else "right")
    for arm in arms:
        table.add_row(
            arm["channels"] if arm["seed"] is None else f"random, {arm['seed']}",
            *(f"{value:,.1f}" for value in (arm["perplexity"], *arm["perplexity of domains"].values())),
            f"{arm['accuracy']:.3f} ± {arm['accuracy standard error']:.3f}",
        )
    return table
