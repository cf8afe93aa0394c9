"""What the user sees of an evaluation: tables on the screen, and pictures with lengths across and tasks down."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from longact_kernels.commands.eval.compare import Difference
from longact_kernels.commands.eval.results import Cell
from longact_kernels.commands.files import write_whole
from longact_kernels.commands.page import both_styles, document, picture, table

MEAN = "mean of the tasks"


def heading(length: int | None) -> str:
    return "own length" if length is None else f"{length:,}"


def lengths_of(cells: Sequence[Cell | Difference]) -> list[int | None]:
    """Lengths in order; documents' own last."""
    return sorted({cell.length for cell in cells}, key=lambda length: (length is None, length or 0))


def score_rows(cells: list[Cell]) -> list[list[str]]:
    """Scores in percent with their standard errors, a row for each task; the first row has the headings."""
    lengths = lengths_of(cells)
    by_place = {(cell.task, cell.length): cell for cell in cells}
    rows = [["task", *map(heading, lengths)]]
    for task in dict.fromkeys(cell.task for cell in cells):
        rows.append([task, *(shown(by_place.get((task, length))) for length in lengths)])
    means = [[cell.score for cell in cells if cell.length == length and not cell.skipped] for length in lengths]
    if any(len(scores) > 1 for scores in means):
        rows.append([MEAN, *(f"{100 * mean(scores):.1f} ({len(scores)})" if scores else "-" for scores in means)])
    return rows


def as_table(rows: list[list[str]]) -> Table:
    """A table for the screen; the means below a line."""
    made = Table(rows[0][0])
    for name in rows[0][1:]:
        made.add_column(name, justify="right")
    for row in rows[1:]:
        if row[0] == MEAN:
            made.add_section()
        made.add_row(*row)
    return made


def shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.skipped:
        return "-"
    return f"{100 * cell.score:.1f} ± {100 * cell.standard_error:.1f}"


def remarks(cells: list[Cell]) -> list[str]:
    """One line for each reason that cells were left out for, and for each note."""
    places: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        for text in [f"left out: {cell.skipped}"] if cell.skipped else cell.notes:
            places.setdefault(text, {}).setdefault(cell.task, []).append(cell)
    lines = []
    for text, tasks in places.items():
        where = []
        for task, concerned in tasks.items():
            everywhere = len(concerned) == sum(cell.task == task for cell in cells)
            lengths = ", ".join(heading(cell.length) for cell in concerned)
            where.append(task if everywhere else f"{task} at {lengths}")
        lines.append(f"{'; '.join(where)}: {text}")
    counts = [len(cell.samples) for cell in cells if not cell.skipped]
    if counts and min(counts) < 200:
        lines.append(
            f"{min(counts)} documents have a standard error of up to {100 * 0.5 / min(counts) ** 0.5:.0f} points; "
            "take 200 or more for a claim"
        )
    return lines


def comparison_rows(differences: list[Difference]) -> list[list[str]]:
    """Scores of both models in percent, and their difference with its confidence interval; headings first.

    A difference whose interval is on one side of 0 has a star.
    """
    rows = [["task", "length", "A", "B", "B - A", "95% interval", "documents"]]
    for row in differences:
        certain = row.low > 0 or row.high < 0
        rows.append(
            [
                row.task or MEAN,
                heading(row.length),
                f"{100 * row.a:.1f}",
                f"{100 * row.b:.1f}",
                f"{100 * row.difference:+.1f}{'*' if certain else ''}",
                "-" if np.isnan(row.low) else f"{100 * row.low:+.1f} … {100 * row.high:+.1f}",
                str(row.samples),
            ]
        )
    return rows


def write_page(
    folder: Path, name: str, title: str, about: str, rows: list[list[str]], notes: list[str], draw: Callable[[], Figure]
) -> list[Path]:
    """Writes a picture and `report.html` with it, the table and what there is to note; returns their paths."""
    [(light, dark)] = both_styles(lambda: [(name, draw())]).values()
    body = [[escape(cell) for cell in row] for row in rows]
    parts = [table(body[0], body[1:], "numbers"), picture(name, "The same as a picture", light, dark)]
    parts += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"] if notes else []
    write_whole(folder / f"{name}.png", light)
    write_whole(folder / "report.html", document(title, about, *parts))
    return [folder / "report.html", folder / f"{name}.png"]


def draw_scores(title: str, cells: list[Cell]) -> Figure:
    """A heat map of the scores."""
    values = {(cell.task, cell.length): 100 * cell.score for cell in cells if not cell.skipped}
    texts = {(cell.task, cell.length): "-" if cell.skipped else f"{100 * cell.score:.0f}" for cell in cells}
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    return heat_map(title, tasks, lengths_of(cells), values, texts, "score in percent", "viridis", (0, 100))


def draw_comparison(a: str, b: str, differences: list[Difference]) -> Figure:
    """A heat map of the differences, with both scores and the interval in each field."""
    rows = {(row.task or MEAN, row.length): row for row in differences}
    values = {place: 100 * row.difference for place, row in rows.items()}
    texts = {
        place: f"{100 * row.a:.0f} → {100 * row.b:.0f}"
        + ("" if np.isnan(row.low) else f"\n[{100 * row.low:+.0f}, {100 * row.high:+.0f}]")
        for place, row in rows.items()
    }
    widest = max(5.0, *map(abs, values.values()))
    title = f"{a} → {b}, with the difference's 95% interval"
    lengths = lengths_of(differences)
    tasks = [task for task in dict.fromkeys(task for task, _ in rows) if task != MEAN]
    tasks += [MEAN] if any(row.task is None for row in differences) else []
    return heat_map(title, tasks, lengths, values, texts, "difference in points", "RdBu", (-widest, widest))


def heat_map(
    title: str,
    tasks: list[str],
    lengths: list[int | None],
    values: dict[tuple, float],
    texts: dict[tuple, str],
    label: str,
    colours: str,
    limits: tuple[float, float],
) -> Figure:
    """Lengths across, tasks down; fields without a value are grey, and empty where there was nothing to evaluate."""
    grid = np.array([[values.get((task, length), np.nan) for length in lengths] for task in tasks])
    tall = 0.62 if any("\n" in text for text in texts.values()) else 0.42
    figure = Figure(figsize=(3.4 + 1.25 * len(lengths), 1.5 + tall * len(tasks)), layout="constrained")
    axes = figure.subplots()
    axes.grid(False)
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(grid, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    for i, task in enumerate(tasks):
        for j, length in enumerate(lengths):
            text = texts.get((task, length), "")
            red, green, blue, _ = image.cmap(image.norm(grid[i, j])) if (task, length) in values else (0.85,) * 4
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=9.5)
    axes.set_xticks(np.arange(1, len(lengths)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(tasks)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.5, alpha=1)
    axes.set_xticks(range(len(lengths)), [heading(length) for length in lengths])
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("length in tokens")
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0)
    figure.colorbar(image, ax=axes, label=label, pad=0.02)
    figure.suptitle(title, fontsize=11)
    return figure
