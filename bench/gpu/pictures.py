"""`python -m bench.gpu.pictures FOLDER`: the rows as two pictures."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from bench.gpu import report


def kernels(rows: list[report.Row], device: str, path: Path) -> None:
    """A panel for each op of one layer: device time of its contenders against tokens, by model."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    across = len(works) if len(models) > 1 else 3
    down = -(-len(models) * len(works) // across)
    size = (4.6 * across, 3.4 * down)
    figure, panels = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for empty in panels.flat[len(models) * len(works) :]:
        empty.set_axis_off()
    for i, model in enumerate(models):
        for j, work in enumerate(works):
            panel = panels.flat[i * len(works) + j]
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if (row["model"], row["work"]) == (model, work):
                    lines.setdefault(row["contender"], []).append((row["tokens"], row["device_us"]))
                    if "predicted_us" in row:
                        lines.setdefault("ours, predicted", []).append((row["tokens"], row["predicted_us"]))
            tokens = sorted({x for points in lines.values() for x, _ in points})
            panel.set(title=f"{model}: {work}")
            if len(tokens) == 1:
                bars(panel, {name: points[0][1] for name, points in lines.items()}, "%.0f")
                panel.set(xlabel=f"device µs, {tokens[0]:,} tokens")
                continue
            for name, points in lines.items():
                style = "--" if "predicted" in name else "-"
                panel.plot(*zip(*sorted(points), strict=True), style, marker="o", label=name)
            panel.set(xlabel="tokens", ylabel="device µs", xscale="log", yscale="log")
            panel.set_xticks(tokens, [f"{x:,}" for x in tokens])
            panel.minorticks_off()
            panel.legend(fontsize="x-small")
    figure.suptitle(device)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(panel, figures: dict[str, float], form: str) -> None:
    """A bar for each contender: ours in another colour, predictions pale."""
    colours = ["C1" if name.startswith(("ours", "LongAct")) else "C0" for name in figures]
    drawn = panel.barh(list(figures), list(figures.values()), color=colours)
    for bar, name in zip(drawn, figures, strict=True):
        bar.set_alpha(0.4 if "predicted" in name else 1)
    panel.bar_label(drawn, fmt=form, fontsize="small", padding=2)
    panel.margins(x=0.15)
    panel.invert_yaxis()


def steps(rows: list[report.Row], device: str, path: Path) -> None:
    """Milliseconds and peak memory of whole steps."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(2, len(models), figsize=(2 + 5 * len(models), 6), squeeze=False, layout="constrained")
    for j, model in enumerate(models):
        own = {row["contender"]: row for row in rows if row["model"] == model}
        for panel, unit, figures in (
            (panels[0][j], "ms a step", {name: row["ms"] for name, row in own.items()}),
            (panels[1][j], "GiB at the peak", {name: row["peak_bytes"] / 2**30 for name, row in own.items()}),
        ):
            bars(panel, figures, "%.1f")
            panel.set(title=model, xlabel=unit)
    figure.suptitle(device)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder: Path) -> None:
    rows = report.read(folder)
    timings = [row for row in rows if row["what"] == "timing"]
    points = {(row["work"], row["model"]): set() for row in timings}
    for row in timings:
        points[row["work"], row["model"]].add(row["tokens"])
    per_layer = {work for (work, _), tokens in points.items() if len(tokens) == max(map(len, points.values()))}
    if timings:
        kernels([row for row in timings if row["work"] in per_layer], report.device(rows), folder / "kernels.png")
    if whole := [row for row in rows if row["what"] == "step"]:
        steps(whole, report.device(rows), folder / "steps.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
