"""`longact eval`: one model, two models side by side, or a training run before and after."""

import argparse
import os
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from longact_kernels.commands.console import INTERRUPTED, hide_library_bars, progress_bar
from longact_kernels.commands.eval.compare import Difference, compare
from longact_kernels.commands.eval.evaluate import Subject, quiet_lm_eval
from longact_kernels.commands.eval.report import (
    as_table,
    comparison_rows,
    draw_comparison,
    draw_scores,
    heading,
    remarks,
    score_rows,
    shown,
    write_page,
)
from longact_kernels.commands.eval.results import Cell, ResultFolder
from longact_kernels.commands.eval.tasks import RULER, names_of
from longact_kernels.commands.files import read_json, write_json
from longact_kernels.integrations.transformers import load_config


def run(arguments: argparse.Namespace) -> int:
    """Evaluates what the arguments name; returns the exit status: 0, or 130 after Ctrl-C.

    Raises:
        ValueError: bad input.
    """
    console = Console()
    quiet_lm_eval()
    hide_library_bars()
    try:
        evaluate_all(arguments, console)
        return 0
    except torch.OutOfMemoryError as error:
        raise ValueError(f"batch_size: {arguments.batch_size} does not fit into memory; lower batch_size") from error
    except KeyboardInterrupt:
        console.print("Stopped. Run the same command again to continue.")
        return INTERRUPTED


def evaluate_all(arguments: argparse.Namespace, console: Console) -> None:
    lengths = sorted({*arguments.lengths})
    labels, models, output = what_to_evaluate(arguments)
    places = []
    if not all(ResultFolder.is_one(Path(model)) for model in models):
        places = [
            (task, length) for task in names_of(arguments.tasks) for length in (lengths if task in RULER else [None])
        ]
    for model in models:  # all of them, before one is evaluated
        if not ResultFolder.is_one(Path(model)):
            load_config(model)
    results: list[list[Cell]] = []
    first: Subject | None = None
    for label, model in zip(labels, models, strict=True):
        if ResultFolder.is_one(Path(model)):
            results.append(ResultFolder(Path(model)).cells())
            continue
        with console.status(f"looking at {escape(model)}"):
            subject = Subject(model, output / label if len(models) > 1 else output, arguments.batch_size)
        first = first or subject
        cells = evaluate_subject(subject, places, arguments.limit, first, console)
        subject.unload()
        results.append(cells)
        rows, notes, about = score_rows(cells), remarks(cells), "scores in percent ± standard error"
        draw = partial(draw_scores, model, cells)
        written = write_page(subject.results.path, "scores", model, about, rows, notes, draw)
        written.append(subject.results.path / "results.json")
        if len(models) == 1:
            show(f"{model}: {about}", rows, notes, console)
    if len(models) == 2:
        written = finish_comparison(results, labels, models, output, console)
    for path in written:
        console.print(path, soft_wrap=True, markup=False)


def what_to_evaluate(arguments: argparse.Namespace) -> tuple[list[str], list[str], Path]:
    """Labels, models (or folders of earlier results), and the folder to write to.

    Raises:
        ValueError: none is named, too many are, or a run has no model yet.
    """
    if (arguments.model is None) == (arguments.compare is None):
        raise ValueError("needed either one MODEL or --compare A B; see longact eval --help")
    output = Path(arguments.output) if arguments.output else None
    if arguments.compare:
        a, b = arguments.compare
        labels = [slug(a), slug(b)] if slug(a) != slug(b) else [f"a-{slug(a)}", f"b-{slug(b)}"]
        return labels, [a, b], output or Path("runs/eval") / f"{slug(a)}-vs-{slug(b)}"
    run = Path(arguments.model)
    if not (run / "run.json").is_file():
        return [slug(arguments.model)], [arguments.model], output or Path("runs/eval") / slug(arguments.model)
    if not (run / "model").is_dir():
        raise ValueError(f"model: the training run {run} has not finished; continue it with longact train --resume")
    base = read_json(run / "run.json").get("model")
    if not isinstance(base, str):
        raise ValueError(f"model: {run / 'run.json'} names no model; name the two models with --compare")
    return ["before", "after"], [base, str(run / "model")], output or run / "eval"


def slug(model: str) -> str:
    """A model's last two names, as a folder's name."""
    return re.sub(r"[^\w.-]+", "-", "-".join(Path(os.path.normpath(model)).parts[-2:])).strip("-")


def evaluate_subject(
    subject: Subject, places: list[tuple], limit: int | None, sized_by: Subject, console: Console
) -> list[Cell]:
    """All cells of a model, with a bar over them and one over the answers of the one under way."""
    cells: list[Cell] = []
    # From here on the folder is this model's, so that a call that is stopped can be gone on with.
    subject.results.write(cells)
    with progress_bar(console) as bar:
        all_of_it = bar.add_task(subject.name, total=len(places), note="")
        answers = bar.add_task("answers", total=None, note="")

        def begin(total: int) -> None:
            bar.reset(answers, total=total)

        subject.begin, subject.advance = begin, lambda: bar.advance(answers)
        for task, length in places:
            where = task if length is None else f"{task} at {heading(length)}"
            bar.update(all_of_it, note=where)
            cell = subject.cell(task, length, limit, sized_by)
            cells.append(cell)
            subject.results.write(cells)
            bar.advance(all_of_it)
            outcome = f"left out: {cell.skipped}" if cell.skipped else f"{shown(cell)} ({len(cell.samples)} documents)"
            line = f"{subject.name}  {where}: {outcome}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return cells


def finish_comparison(
    results: list[list[Cell]], labels: list[str], models: list[str], output: Path, console: Console
) -> list[Path]:
    """Shows and writes the comparison; returns what was written."""
    differences: list[Difference] = compare(*results)
    rows, notes = comparison_rows(differences), list(dict.fromkeys(remarks(results[0]) + remarks(results[1])))
    about = f"A = {models[0]}, B = {models[1]}; scores in percent; * the interval does not reach 0"
    show(about, rows, notes, console)
    content = {
        "a": models[0],
        "b": models[1],
        "interval": "95%, paired percentile bootstrap over documents",
        "differences": [{**asdict(row), "difference": row.difference} for row in differences],
    }
    write_json(output / "comparison.json", content)
    draw = partial(draw_comparison, labels[0], labels[1], differences)
    pages = write_page(output, "comparison", f"{labels[0]} and {labels[1]}", about, rows, notes, draw)
    return [*pages, output / "comparison.json"]


def show(about: str, rows: list[list[str]], notes: list[str], console: Console) -> None:
    console.print(f"\n{about}", highlight=False, markup=False, soft_wrap=True)
    console.print(as_table(rows))
    for note in notes:
        console.print(f"• {note}", highlight=False, markup=False)
