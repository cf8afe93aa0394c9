"""What a run leaves to look at: `summary.json`, pictures, one self-contained `report.html`, a table on the screen."""

import dataclasses
import platform
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, mean, median

from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig

from longact_kernels.commands.files import write_json, write_whole
from longact_kernels.commands.page import both_styles, cards, document, pairs, picture, table
from longact_kernels.commands.train.arguments import TrainArguments
from longact_kernels.commands.train.evaluate import Evaluation
from longact_kernels.commands.train.figures import draw, series
from longact_kernels.integrations.prompts import question_of

PACKAGES = ("longact_kernels", "torch", "triton", "transformers", "trl", "accelerate", "datasets", "numba")
TITLES = {
    "reward": "Reward by step",
    "training": "Loss, entropy, gradient norm and completion length by step",
    "churn": "Churn: how much of the salient sets changes from step to step, and in which layers",
    "saliency": "Channel magnitudes at the last refresh: salient channels in colour, the others in grey",
}
EXAMPLES = 5
SAMPLES = 8


def summarize(
    arguments: TrainArguments,
    training: GRPOConfig,
    model: PreTrainedModel,
    metrics: list[dict],
    before: Evaluation,
    after: Evaluation,
    state_bytes: tuple[int, int] | None,
) -> dict:
    """All figures of a run, as plain data; `state_bytes` are ours and dense AdamW's, `None` for a dense run."""
    rewards = series(metrics, "reward")[1]
    seconds = [record["seconds_per_step"] for record in metrics]
    tokens = [record["tokens_per_second"] for record in metrics]
    # A single step's reward is a few prompts' luck: both ends are means over a fifth of the run.
    ends = max(1, len(rewards) // 5)
    churn = series(metrics, "churn")[1]
    return {
        "model": arguments.model,
        "task": arguments.subject,
        "parameters": model.num_parameters(),
        "steps": metrics[-1]["step"] if metrics else 0,
        "measure": arguments.measure,
        "accuracy": {
            "prompts": len(before.rewards),
            "before": before.accuracy,
            "before_standard_error": before.standard_error,
            "after": after.accuracy,
            "after_standard_error": after.standard_error,
        },
        "reward": {
            "steps": len(rewards),
            "steps_at_each_end": ends,
            "first": mean(rewards[:ends]) if rewards else None,
            "last": mean(rewards[-ends:]) if rewards else None,
        },
        "seconds_per_step": median(seconds) if metrics else None,
        "tokens_per_second": fmean(tokens, seconds if any(seconds) else None) if metrics else None,
        "salient_state_bytes": dict(zip(("longact", "dense_adamw"), state_bytes, strict=True)) if state_bytes else None,
        "churn": mean(churn) if churn else None,
        "arguments": arguments.what_is_trained(),
        "grpo_config": changed(training),
        "versions": {**installed(), "python": platform.python_version(), "platform": platform.platform()},
    }


def changed(training: GRPOConfig) -> dict:
    """The fields that were given a value of their own; where TRL computes a default, the computed one too."""
    values = {field.name: getattr(training, field.name) for field in dataclasses.fields(training)}
    return {
        field.name: values[field.name]
        for field in dataclasses.fields(training)
        if values[field.name] != field.default
        and field.default_factory is dataclasses.MISSING
        and not dataclasses.is_dataclass(values[field.name])
    }


def installed() -> dict[str, str]:
    """Versions of the packages that a run's result may depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def headline(summary: dict) -> list[tuple[str, str]]:
    """The few figures that matter, with their names."""
    accuracy, reward, state = summary["accuracy"], summary["reward"], summary.get("salient_state_bytes")
    lines = [
        (
            f"held-out {summary['measure']}, {accuracy['prompts']} prompts",
            f"{accuracy['before']:.3f} ± {accuracy['before_standard_error']:.3f} → "
            f"{accuracy['after']:.3f} ± {accuracy['after_standard_error']:.3f}",
        )
    ]
    if reward.get("first") is not None and reward.get("last") is not None:
        ends = reward["steps_at_each_end"]
        lines.append(
            (
                f"mean reward, first → last {ends} of {reward['steps']} sampled batches",
                f"{reward['first']:.3f} → {reward['last']:.3f}",
            )
        )
    if summary.get("seconds_per_step") is not None:
        lines.append(("time of a step, median", f"{summary['seconds_per_step']:.1f} s"))
    if summary.get("tokens_per_second") is not None:
        lines.append(("tokens read and written", f"{summary['tokens_per_second']:,.0f} a second"))
    if state:
        ours, dense = state["longact"], state["dense_adamw"]
        lines.append(
            (
                "optimizer state of the salient weights",
                f"{ours / 1e6:,.1f} MB, {ours / dense:.2f} of dense AdamW's {dense / 1e6:,.1f} MB",
            )
        )
    if summary.get("churn") is not None:
        lines.append(("churn of the salient sets, mean", f"{summary['churn']:.3f}"))
    return lines


def summary_table(summary: dict) -> Table:
    """The headline figures as a table for the terminal."""
    method = f"LongAct, density {summary['arguments']['density']}" if summary["arguments"]["longact"] else "dense"
    title = Text(f"{summary['model']} · {summary['task']} · {method}")
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in headline(summary):
        table.add_row(name, value)
    return table


def write_report(
    folder: Path,
    summary: dict,
    metrics: list[dict],
    details: list[dict],
    saliency: dict[str, tuple[Tensor, Tensor]],
    rows: list[dict],
    before: Evaluation,
    after: Evaluation,
) -> None:
    """Writes `summary.json`, the pictures and `report.html` into a run's folder."""
    write_json(folder / "summary.json", summary)
    images = both_styles(lambda: draw(metrics, details, saliency, before, after, summary["measure"]))
    for name, (light, _) in images.items():
        write_whole(folder / f"{name}.png", light)
    figures = "".join(picture(name, TITLES[name], *both) for name, both in images.items())
    write_whole(folder / "report.html", page(summary, figures, details, rows, before, after))


def page(
    summary: dict, figures: str, details: list[dict], rows: list[dict], before: Evaluation, after: Evaluation
) -> str:
    """The report as one HTML page that needs nothing else."""
    method = "LongAct" if summary["arguments"]["longact"] else "dense training"
    options = {**summary["arguments"], **summary["grpo_config"]}
    for change in summary["changes"]:
        name, step = change["option"], change["step"]
        options[name] = f"{options.get(name, change['to'])} ({change['from']} up to step {step})"
    samples = [record["sample"] for record in details if record.get("sample")]
    return document(
        f"{summary['model']} on {summary['task']}",
        f"{method}, {summary['steps']} steps, {summary['parameters']:,} parameters",
        cards(headline(summary)),
        figures,
        "<h2>Held-out answers, those that changed first</h2>",
        table(["question", "wanted", "before", "after"], answers(summary["measure"], rows, before, after), "texts"),
        "<h2>Completions sampled while training</h2>" if samples else "",
        table(["step", "reward", "question", "completion"], sampled(samples), "texts") if samples else "",
        f"<h2>Configuration</h2>{table(['option', 'value'], pairs(options))}",
        f"<h2>Versions</h2>{table(['what', 'version'], pairs(summary['versions']))}",
    )


def answers(measure: str, rows: list[dict], before: Evaluation, after: Evaluation) -> list[list[str]]:
    """The rows of a table of answers; those that training changed come first: the others say little."""
    changed = sorted(range(len(rows)), key=lambda i: before.rewards[i] == after.rewards[i])[:EXAMPLES]

    def answer(evaluation: Evaluation, i: int) -> str:
        reward, text = evaluation.rewards[i], escape(evaluation.completions[i].strip())
        if measure == "reward":
            return f"{text} <span class='dim number'>({reward:.3g})</span>"
        return f"<span class='{'right' if reward == 1 else ''}'>{text}</span>"

    return [
        [
            escape(question_of(rows[i]["prompt"])),
            escape(", ".join(map(str, rows[i].get("answers") or []))),
            answer(before, i),
            answer(after, i),
        ]
        for i in changed
    ]


def sampled(samples: list[dict]) -> list[list[str]]:
    """The rows of a table of completions: some from the beginning of training to its end."""
    count = min(SAMPLES, len(samples))
    chosen = [samples[i * (len(samples) - 1) // max(count - 1, 1)] for i in range(count)]
    return [
        [str(one["step"]), f"{one['reward']:.3g}", escape(one["question"]), escape(one["completion"])] for one in chosen
    ]
