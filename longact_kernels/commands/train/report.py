"""What a run leaves to look at: `summary.json`, pictures, one self-contained `report.html`, a table on the screen."""

import base64
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
from longact_kernels.commands.train.arguments import TrainArguments
from longact_kernels.commands.train.evaluate import Evaluation
from longact_kernels.commands.train.figures import DARK, LIGHT, draw

PACKAGES = ("longact_kernels", "torch", "triton", "transformers", "trl", "accelerate", "datasets", "numba")
TITLES = {
    "reward": "Reward by step",
    "churn": "Churn: how much of the salient sets changes from step to step",
    "saliency": "Channel magnitudes at the last refresh: salient channels in colour, the others in grey",
}
EXAMPLES = 5
STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --dim: #5b6570; --paper: #fff; --line: #dde1e6; --good: #11734b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #d7dce2; --dim: #98a2ad; --paper: #16191d; --line: #343a41; --good: #58c492 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 60rem; padding: 1rem }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.dim { color: var(--dim) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
.card b { display: block; font-size: 1.15rem } .card span { color: var(--dim); font-size: .85rem }
/* Pictures of many panels are wider than a phone: their letters would be too small else. */
img { max-width: 100%; height: auto } .saliency img { min-width: 48rem } .scores img, .curves img { min-width: 36rem }
.wide { overflow-x: auto; margin-bottom: 1rem }
table { border-collapse: collapse; font-size: .9rem }
td, th { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td:last-child { overflow-wrap: anywhere }
.numbers td, .numbers th { white-space: nowrap; font-variant-numeric: tabular-nums }
.numbers :is(td, th):first-child { position: sticky; left: 0; background: var(--paper) }
.right { color: var(--good) }
"""


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
    rewards = [record["reward"] for record in metrics if "reward" in record]
    seconds = [record["seconds_per_step"] for record in metrics]
    tokens = [record["tokens_per_second"] for record in metrics]
    # A single step's reward is a few prompts' luck: both ends are means over a fifth of the run.
    ends = max(1, len(rewards) // 5)
    churn = [record["churn"] for record in metrics if "churn" in record]
    return {
        "model": arguments.model,
        "task": arguments.subject,
        "parameters": model.num_parameters(),
        "steps": metrics[-1]["step"] if metrics else 0,
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
        "tokens_per_second": fmean(tokens, seconds) if metrics else None,
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
    accuracy, reward, state = summary["accuracy"], summary["reward"], summary["salient_state_bytes"]
    lines = [
        (
            f"held-out accuracy, {accuracy['prompts']} prompts",
            f"{accuracy['before']:.3f} ± {accuracy['before_standard_error']:.3f} → "
            f"{accuracy['after']:.3f} ± {accuracy['after_standard_error']:.3f}",
        )
    ]
    if summary["steps"]:
        ends = reward["steps_at_each_end"]
        lines += [
            (
                f"mean reward, first → last {ends} of {reward['steps']} sampled batches",
                f"{reward['first']:.3f} → {reward['last']:.3f}",
            ),
            ("time of a step, median", f"{summary['seconds_per_step']:.1f} s"),
            ("tokens read and written", f"{summary['tokens_per_second']:,.0f} a second"),
        ]
    if state:
        ours, dense = state["longact"], state["dense_adamw"]
        lines.append(
            (
                "optimizer state of the q/k weights",
                f"{ours / 1e6:,.1f} MB, {ours / dense:.2f} of dense AdamW's {dense / 1e6:,.1f} MB",
            )
        )
    if summary["churn"] is not None:
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
    saliency: dict[str, tuple[Tensor, Tensor]],
    rows: list[dict],
    before: Evaluation,
    after: Evaluation,
) -> None:
    """Writes `summary.json`, the pictures and `report.html` into a run's folder."""
    write_json(folder / "summary.json", summary)
    light = dict(draw(LIGHT, metrics, saliency, before, after))
    dark = dict(draw(DARK, metrics, saliency, before, after))
    for name, image in light.items():
        write_whole(folder / f"{name}.png", image)
    figures = "".join(picture(name, TITLES[name], light[name], dark[name]) for name in light)
    write_whole(folder / "report.html", page(summary, figures, rows, before, after))


def picture(name: str, title: str, light: bytes, dark: bytes) -> str:
    """A picture under its title, in the colours that the reader's screen has."""
    return (
        f"<h2>{title}</h2><div class='wide {name}'><picture>"
        f"<source media='(prefers-color-scheme: dark)' srcset='{data_uri(dark)}'>"
        f"<img alt='{title}' src='{data_uri(light)}'></picture></div>"
    )


def data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def page(summary: dict, figures: str, rows: list[dict], before: Evaluation, after: Evaluation) -> str:
    """The report as one HTML page that needs nothing else."""
    title = f"{summary['model']} on {summary['task']}"
    method = "LongAct" if summary["arguments"]["longact"] else "dense training"
    cards = "".join(f"<div class=card><span>{escape(k)}</span><b>{escape(v)}</b></div>" for k, v in headline(summary))
    # Answers that training changed come first: the others say little.
    changed = sorted(range(len(rows)), key=lambda i: before.rewards[i] == after.rewards[i])[:EXAMPLES]
    answers = [
        [
            question_of(rows[i]["prompt"]),
            escape(", ".join(rows[i].get("answers", []))),
            *(
                f"<span class='{'right' if e.rewards[i] == 1 else ''}'>{escape(e.completions[i].strip())}</span>"
                for e in (before, after)
            ),
        ]
        for i in changed
    ]
    options = {**summary["arguments"], **summary["grpo_config"]}
    for change in summary["changes"]:
        name, step = change["option"], change["step"]
        options[name] = f"{options.get(name, change['to'])} ({change['from']} up to step {step})"
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1><p class=dim>{method}, {summary['steps']} steps, "
        f"{summary['parameters']:,} parameters</p>"
        f"<div class=cards>{cards}</div>{figures}"
        "<h2>Held-out answers, those that changed first</h2>"
        f"{table(['question', 'wanted', 'before', 'after'], answers)}"
        f"<h2>Configuration</h2>{table(['option', 'value'], pairs(options))}"
        f"<h2>Versions</h2>{table(['what', 'version'], pairs(summary['versions']))}"
        "</html>\n"
    )


def question_of(prompt: str | list[dict]) -> str:
    """The last line that the user wrote, which in every task is the question."""
    text = prompt if isinstance(prompt, str) else next(m["content"] for m in prompt if m["role"] == "user")
    return escape(text.splitlines()[-1])


def pairs(values: dict) -> list[list[str]]:
    """The rows of a table of keys and values."""
    return [[escape(key), escape(str(value))] for key, value in values.items()]


def table(header: list[str], rows: list[list[str]], kind: str = "") -> str:
    """An HTML table; the cells are HTML already. Those of kind `numbers` are not broken into lines."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide {kind}'><table><tr>{head}</tr>{body}</table></div>"
