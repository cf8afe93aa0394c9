"""Files that the commands leave for one another."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longact_kernels.warning import LongActWarning


def read_json(path: Path) -> dict:
    """The content of a file; empty if there is no such file.

    Raises:
        ValueError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        if not isinstance(content := json.loads(path.read_bytes()), dict):
            raise ValueError(f"needed an object, got a {type(content).__name__}")
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or delete it") from error


def write_json(path: Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=1, default=str) + "\n")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path of a file into errors of writing it, which have none where a disk is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def append_line(path: Path, content: dict) -> None:
    """Adds a line of JSON to a file."""
    with naming(path), path.open("a") as file:
        file.write(json.dumps(content) + "\n")


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Writes a file that appears whole, on the disk: an interrupted run, or a full disk, leaves none that is cut off.

    Args:
        path: its folder is made if need be.
        content: of the file, or what writes it into the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with naming(path):
            if callable(content):
                content(unfinished)
            else:
                unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        with suppress(OSError):  # another than the first
            unfinished.unlink(missing_ok=True)


def read_metrics(path: Path) -> list[dict]:
    """The records of a `metrics.jsonl`; none if there is no file. Lines that hold none are left out, with a warning.

    A last line without its end was cut off when the run was: it is left out in silence.
    """
    records = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
            records.append(record)
        except (ValueError, TypeError, KeyError):
            warnings.warn(f"{path}: line {number} is damaged, and left out", LongActWarning, stacklevel=2)
    return records
