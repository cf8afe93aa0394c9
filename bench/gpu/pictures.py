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
    size = (4.2 * len(works), 3.4 * len(models))
    figure, panels = plt.subplots(len(models), len(works), figsize=size, squeeze=False, layout="constrained")
    for i, model in enumerate(models):
        for j, work in enumerate(works):
            panel = panels[i][j]
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if (row["model"], row["work"]) == (model, work):
                    lines.setdefault(row["contender"], []).append((row["tokens"], row["device_us"]))
                    if "predicted_us" in row:
                        lines.setdefault("ours, predicted", []).append((row["tokens"], row["predicted_us"]))
            for name, points in lines.items():
                style = "--" if "predicted" in name else "-"
                panel.plot(*zip(*sorted(points), strict=True), style, marker="o", label=name)
            panel.set(title=f"{model}: {work}", xlabel="tokens", ylabel="device µs", xscale="log", yscale="log")
            tokens = sorted({x for points in lines.values() for x, _ in points})
            panel.set_xticks(tokens, [f"{x:,}" for x in tokens])
            panel.minorticks_off()
            panel.legend(fontsize="x-small")
    figure.suptitle(device)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def steps(rows: list[report.Row], device: str, path: Path) -> None:
    """Milliseconds and peak memory of whole steps."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(2, len(models), figsize=(5 * len(models), 6), squeeze=False, layout="constrained")
    for j, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        names = [row["contender"] for row in own]
        for panel, figures, unit in (
            (panels[0][j], [row["ms"] for row in own], "ms a step"),
            (panels[1][j], [row["peak_bytes"] / 2**30 for row in own], "GiB at the peak"),
        ):
            panel.bar_label(panel.barh(names, figures), fmt="%.1f", fontsize="small")
            panel.set(title=model, xlabel=unit)
            panel.margins(x=0.15)
            panel.invert_yaxis()
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
