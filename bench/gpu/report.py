"""The rows of all stages as tables: all of them in report.md, and a short one to print last."""

import json
from pathlib import Path

from bench.gpu.stage import results

Row = dict


def read(folder: Path) -> list[Row]:
    path = results(folder)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(folder: Path, rows: list[Row]) -> None:
    parts = [f"# {device(rows)}", stages(rows), *failures(rows), facts(rows)]
    for work in dict.fromkeys(row["work"] for row in rows if row["what"] == "timing"):
        parts += [f"## {work}", timings([row for row in rows if row["what"] == "timing" and row["work"] == work])]
    if steps := [row for row in rows if row["what"] == "step"]:
        parts += ["## Training steps", training(steps)]
    (folder / "report.md").write_text("\n\n".join(filter(None, parts)) + "\n")


def short(rows: list[Row]) -> str:
    """What is to be seen without opening a file."""
    parts = [device(rows), stages(rows), *failures(rows)[:12], facts(rows)]
    ours = [row for row in rows if row["what"] == "timing" and row["contender"].startswith("ours")]
    parts += [timings(ours)] if ours else []
    steps = [row for row in rows if row["what"] == "step"]
    parts += [training(steps)] if steps else []
    return "\n\n".join(filter(None, parts))


def device(rows: list[Row]) -> str:
    about = next((row for row in rows if row["what"] == "machine"), None)
    if about is None:
        return "GPU script"
    return f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {str(about['commit'])[:10]}"


def stages(rows: list[Row]) -> str:
    ran = [row for row in rows if row["what"] == "stage"]
    counts = {row["stage"]: row for row in rows if row["what"] in ("counts", "variants")}
    shown = ("passed", "failed", "skipped", "error", "errors", "compiled")
    cells = []
    for row in ran:
        said = [f"{n} {name}" for name, n in counts.get(row["stage"], {}).items() if name in shown]
        cells.append((row["stage"], row["result"], f"{row['seconds']:.0f} s", ", ".join(said)))
    return table(("stage", "result", "time", ""), cells)


def failures(rows: list[Row]) -> list[str]:
    """A line for each failed test, error and sanitizer's finding."""
    found = [f"- {row['failed']}" for row in rows if row["what"] == "test"]
    found += [
        f"- {row['stage']}: {row.get('label', '')} {row['error']}"
        for row in rows
        if "error" in row and "what" in row and isinstance(row["error"], str)
    ]
    found += [
        f"- sanitizer {row.get('tool', '')}: {row['result']} {row.get('said', '')}"
        for row in rows
        if row["what"] == "sanitizer"
    ]
    return ["\n".join(found)] if found else []


def facts(rows: list[Row]) -> str:
    found = next((row for row in rows if row["what"] == "ceilings"), None)
    if found is None:
        return ""
    return (
        f"Measured ceilings: copy {found['bytes_per_second'] / 1e12:.2f} TB/s, bf16 product "
        f"{found['flops'] / 1e12:.0f} TFLOP/s, {found['host_us_of_a_launch']:.1f} µs of host a launch."
    )


def timings(rows: list[Row]) -> str:
    """Device and host time; the ratio is of device times, to the work's first contender in the same rounds."""
    cells = []
    for row in rows:
        predicted = f"{row['predicted_us']:.0f}" if "predicted_us" in row else ""
        notes = ", ".join(f"{row[name]} {name}" for name in ("launches", "host_copies", "waits") if name in row)
        case = f"{row['model']}, {row['tokens']}"
        figures = (f"{row['device_us']:.1f}", f"{row['host_us']:.1f}", f"{row['ratio']:.2f}", predicted, notes)
        cells.append((row["work"], case, row["contender"], *figures))
    return table(("work", "model, tokens", "", "device µs", "host µs", "ratio", "predicted µs", ""), cells)


def training(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        figures = (f"{row['ms']:.1f}", f"{row['update_ms']:.1f}", f"{row['peak_bytes'] / 2**30:.1f}")
        cells.append((f"{row['model']}, {row['tokens']}", row["contender"], *figures))
    return table(("model, tokens", "", "step ms", "update ms", "peak GiB"), cells)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, its columns aligned."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in (head, rule, *rows)
    )
