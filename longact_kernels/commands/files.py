"""Files that the commands leave for one another."""

import json
import os
from pathlib import Path


def read_json(path: Path) -> dict:
    """The content of a file; empty if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole: an interrupted run leaves none that is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def read_metrics(path: Path) -> list[dict]:
    """The records of a `metrics.jsonl`; none if there is no file. A last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
