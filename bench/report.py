"""One table, one CSV, one JSON and the pictures from what pytest-benchmark stored."""

import csv
import itertools
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import race

PACKAGES = ("torch", "triton", "numba", "numpy", "transformers", "torch-optimi", "peft")
COLUMNS = ("work", "variant", "contender", "milliseconds", "ratio", "bar", "limit", "percent_of_limit", "peak_MiB")


def write_report(raw: Path, folder: Path) -> None:
    """Reads `raw`, prints the table, and writes results.json, results.csv and the pictures into `folder`."""
    stored = json.loads(raw.read_text())
    results = [entry["extra_info"] for entry in stored["benchmarks"]]
    lines = [line for result in results if "medians" in result for line in _lines(result)]
    about = _about(stored)
    (folder / "results.json").write_text(json.dumps({"about": about, "results": results}, indent=1))
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    pictures = _draw(results, about, folder)
    _print(lines, about)
    Console().print(f"written: {', '.join(str(folder / name) for name in ('results.json', 'results.csv', *pictures))}")


def _about(stored: dict) -> dict:
    """Machine, versions and commit."""
    cpu = stored["machine_info"].get("cpu", {})
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": stored["datetime"],
        "device": torch.cuda.get_device_name() if race.DEVICE == "cuda" else cpu.get("brand_raw") or platform.machine(),
        "threads": torch.get_num_threads(),
        "clock": "wall" if race.clock is time.perf_counter else "CPU time",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": stored["commit_info"].get("id"),
        "uncommitted_changes": stored["commit_info"].get("dirty"),
    }


def _machine(about: dict) -> str:
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    return f"{about['device']}, {threads}" + (", CPU time" if about["clock"] != "wall" else "")


def _lines(result: dict) -> list[dict]:
    lines = []
    for name, ratio in result["ratios"].items():
        if name == "limit":
            continue
        of_limit = result["of_limit"].get(name)
        lines.append(
            {
                "work": result["work"],
                "variant": result["variant"],
                "contender": name,
                "milliseconds": round(1e3 * result["medians"][name], 3),
                "ratio": round(ratio, 3),
                "bar": result["bars"].get(name),
                "limit": round(result["ratios"]["limit"], 3) if "limit" in result["ratios"] else None,
                "percent_of_limit": round(100 * of_limit) if of_limit is not None else None,
                "peak_MiB": round(result["peak_bytes"][name] / 2**20, 1),
            }
        )
    return lines


def _print(lines: list[dict], about: dict) -> None:
    table = Table(title=f"{_machine(about)}, commit {str(about['commit'])[:10]}")
    for name, title in zip(
        COLUMNS, ("work", "", "", "ms", "ratio", "bar", "limit", "% of limit", "peak MiB"), strict=True
    ):
        table.add_column(title, justify="left" if name in COLUMNS[:3] else "right", overflow="fold")
    before = None
    for line in lines:
        key = line["work"], line["variant"]
        if before not in (None, key):
            table.add_section()
        cells = ["" if line[name] is None else str(line[name]) for name in COLUMNS]
        if key == before:
            cells[:2] = "", ""
        if line["bar"] is not None:
            cells[4] = f"[{'green' if line['ratio'] <= line['bar'] else 'red'}]{cells[4]}[/]"
        table.add_row(*cells)
        before = key
    console = Console()
    # A file or a pipe has no width of its own.
    Console(width=max(console.width, 140)).print(table)


# Legible on a white page and on a dark one, which a transparent picture may stand on.
GREY = "#7d8590"
COLOURS = ("#2f81f7", "#e5534b", "#57ab5a", "#c69026", "#986ee2")
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.grid", "savefig.transparent"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "grid.color": GREY,
    "grid.alpha": 0.25,
}


def _draw(results: list[dict], about: dict, folder: Path) -> list[str]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for result in results:
        if result.get("curve"):
            title, axis, x = result["curve"]
            for name, seconds in result["medians"].items():
                curves.setdefault((title, axis), {}).setdefault(name, []).append((x, 1e3 * seconds))
        elif "state_bytes" in result:
            for name, size in result["state_bytes"].items():
                points = curves.setdefault(("Optimizer state", "density"), {}).setdefault(name, [])
                points.append((result["density"], size / 2**20))
    pictures = {
        "time_against_density.png": [key for key in curves if key[1] == "density" and key[0] != "Optimizer state"],
        "time_against_size.png": [key for key in curves if key[1] != "density"],
        "memory_against_density.png": [key for key in curves if key[0] == "Optimizer state"],
    }
    # A contender has one colour in all pictures.
    contenders = dict.fromkeys(contender for lines in curves.values() for contender in lines)
    colours = dict(zip(contenders, itertools.cycle(COLOURS)))
    drawn = []
    for name, keys in pictures.items():
        if not keys:
            continue
        with plt.rc_context(STYLE):
            _panels(plt, {key: curves[key] for key in keys}, colours, about, folder / name)
        drawn.append(name)
    return drawn


def _panels(plt, curves: dict, colours: dict[str, str], about: dict, path: Path) -> None:
    """One picture: a panel for each (title, x axis), a line for each contender."""
    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.4), squeeze=False, layout="constrained")
    for panel, (key, lines) in zip(panels[0], curves.items(), strict=True):
        for i, (contender, points) in enumerate(lines.items()):
            # A line that another one hides is thicker, and shows on both sides of it.
            look = {"marker": "o", "color": colours[contender], "lw": 1.5 + 2.5 * (len(lines) - 1 - i) / len(lines)}
            panel.plot(*zip(*sorted(points), strict=True), label=contender, **look)
        panel.set(title=key[0], xlabel=key[1], ylabel="MiB" if key[0] == "Optimizer state" else "milliseconds")
        if key[1] != "density":
            panel.set(xscale="log", yscale="log")
            points = sorted({x for line in lines.values() for x, _ in line})
            panel.set_xticks(points, [f"{x:,}" for x in points], fontsize="x-small")
            panel.minorticks_off()
        else:
            panel.set_ylim(bottom=0)
        panel.legend(fontsize="small", frameon=True, framealpha=0.9)
    figure.suptitle(f"{_machine(about)}, torch {about['versions']['torch']}", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
