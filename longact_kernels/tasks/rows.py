"""Rows of the user's own: a file of JSON lines, or a data set on the Hub."""

import json
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi


@cache
def read_rows(source: str, argument: str) -> tuple[dict, ...]:
    """All rows of a file of JSON lines, or of the training split of a data set on the Hub; read once a run.

    Args:
        source: a path, or `user/name` or `user/name:configuration`.
        argument: which names it, for the messages.

    Raises:
        ValueError: it cannot be read, or has no rows; the message is one line.
    """
    path = Path(source)
    rows = read_json_lines(path, argument) if path.exists() else read_from_hub(source, argument)
    if not rows:
        raise ValueError(f"{argument}: {source} has no rows")
    return tuple(rows)


def read_json_lines(path: Path, argument: str) -> list[dict]:
    rows = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for i, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise ValueError(f"{argument}: line {i} of {path} is not a JSON object")
    except json.JSONDecodeError as error:
        raise ValueError(f"{argument}: line {i} of {path} is not valid JSON ({error})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}: cannot read {path}: {error}") from error
    return rows


def read_from_hub(source: str, argument: str) -> list[dict]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        # Asked once: the loader would go on asking for minutes where there is no network.
        HfApi().dataset_info(name, timeout=10)
        return load_dataset(name, configuration or None, split="train").to_list()
    except Exception as error:  # the Hub's client lets through whatever its HTTP library raises
        raise ValueError(
            f"{argument}: found no file {source!r}, and could not load a data set of that name from the Hub "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
