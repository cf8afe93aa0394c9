"""Files that the commands leave for one another."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from longact_kernels.warning import LongActWarning

NUMBER = int | float
POSITIVE = (NUMBER, lambda number: number > 0)
# What is read of the lines of a run's files; see `check_shape`.
METRICS = {
    "step": int,
    "seconds_per_step": NUMBER,
    "tokens_per_second": NUMBER,
    **dict.fromkeys(("reward?", "churn?", "loss?", "entropy?", "grad_norm?", "completions/mean_length?"), NUMBER),
}
SAMPLE = {"step": int, "reward": NUMBER, "question": str, "completion": str}
DETAILS = {"step": int, "churn?": {str: NUMBER}, "sample?": SAMPLE}


def check_shape(value: Any, shape: Any, name: str = "it") -> None:
    """Whether JSON is of a shape.

    Args:
        shape: a type, or `(type, fits)`; `[of]` for a list; `{str: of}` for an object with any keys; an object with
            these keys, of which those that end in "?" may be missing or null.

    Raises:
        ValueError: it is not; the message names the part.
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        if str in shape:
            shape = dict.fromkeys(value, shape[str])
        for key, of in shape.items():
            if key in value or not key.endswith("?"):
                check_shape(value.get(key), of, key)
            elif value.get(key := key[:-1]) is not None:
                check_shape(value[key], of, key)
    elif isinstance(shape, list) and isinstance(value, list):
        for one in value:
            check_shape(one, shape[0], name)
    elif isinstance(shape, tuple):
        check_shape(value, shape[0], name)
        if not shape[1](value):
            raise ValueError(f"{name}: got {str(value)[:40]!r}")
    elif isinstance(shape, dict | list) or not isinstance(value, shape):
        raise ValueError(f"{name}: got {str(value)[:40]!r}")
    elif isinstance(value, int) and abs(value) > 2**63:
        raise ValueError(f"{name}: got a number of more than 64 bits")


def read_json(path: Path, shape: Any = dict) -> dict:
    """The content of a file; empty if there is no such file.

    Raises:
        ValueError: it is no JSON object of this shape; see `check_shape`.
    """
    if not path.is_file():
        return {}
    try:
        if not isinstance(content := json.loads(path.read_bytes()), dict):
            raise ValueError(f"needed an object, got a {type(content).__name__}")
        check_shape(content, shape)
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


def read_lines(path: Path, shape: Any) -> list[dict]:
    """The records of a file of JSON lines; none if there is no file. What is no such line is left out, with a warning.

    A last line without its end was cut off when the run was: it is left out in silence.
    """
    records = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            check_shape(record, shape)
            records.append(record)
        except (ValueError, RecursionError) as error:
            warnings.warn(f"{path}: line {number} is damaged ({error}), and left out", LongActWarning, stacklevel=2)
    return records
