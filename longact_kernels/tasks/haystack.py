"""The text in which needles are hidden: a repeated noise, or the user's own."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from longact_kernels.tasks.rows import read_rows

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LONGEST = 40
TEXT_FILES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Haystack:
    """Pieces of text in their order, and what stands between two of them."""

    pieces: tuple[str, ...]
    between: str

    def passage(self, rng: random.Random, size: int) -> list[str]:
        """`size` consecutive pieces from a random place on; a short haystack comes again."""
        start = rng.randrange(len(self.pieces))
        return [self.pieces[(start + i) % len(self.pieces)] for i in range(size)]

    def hide(self, rng: random.Random, size: int, needles: list[str]) -> str:
        """A passage of `size` pieces with the needles in it."""
        return self.between.join(scatter(rng, self.passage(rng, size), needles))


def scatter(rng: random.Random, pieces: list[str], needles: list[str]) -> list[str]:
    """The pieces with the needles among them, in their order at random depths.

    The draw does not depend on how many pieces there are: a longer text has its needles as deep in proportion.
    """
    text = list(pieces)
    depths = sorted(rng.random() for _ in needles)
    for depth, needle in reversed(list(zip(depths, needles, strict=True))):
        text.insert(int(depth * (len(pieces) + 1)), needle)
    return text


@cache
def read_haystack(source: str) -> Haystack:
    """The haystack that `--haystack` names.

    Args:
        source: `"noise"`; a text file, or one of JSON lines with a field `text`; a folder with such files; or the name
            of a data set on the Hub with a field `text`.

    Raises:
        ValueError: there is no such thing, or no text in it.
    """
    if source == "noise":
        return Haystack((NOISE,), "\n")
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (*TEXT_FILES, ".jsonl"))
        if not files:
            raise ValueError(f"haystack: the folder {source} has no {', '.join(TEXT_FILES)} or .jsonl files in it")
        text = " ".join(text_of(str(file)) for file in files)
    else:
        text = text_of(source)
    if not text.split():
        raise ValueError(f"haystack: {source} has no text in it")
    return Haystack(tuple(sentences(text)), " ")


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, on one line each; what is no prose, such as a table, is cut after `LONGEST` words."""
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        words = sentence.split(" ")
        for i in range(0, len(words), LONGEST):
            yield " ".join(words[i : i + LONGEST])


def text_of(source: str) -> str:
    """The text of a file or a data set."""
    path = Path(source)
    if path.is_file() and path.suffix != ".jsonl":
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"haystack: cannot read {source} as text: {error}") from error
    rows = read_rows(source, "haystack")
    if "text" not in rows[0]:
        raise ValueError(f"haystack: needed a field 'text' in the rows of {source}, which have {', '.join(rows[0])}")
    return " ".join(row["text"] for row in rows)
