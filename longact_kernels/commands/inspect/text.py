"""The texts that an analysis reads: a domain each."""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longact_kernels.tasks import TASKS, Setting

PIECE = 1 << 20  # characters of a file that are read at a time: an analysis needs only the beginning of a large one


class Domain(NamedTuple):
    """Text of one kind: its name, where it comes from, and its pieces one after the other."""

    name: str
    source: str
    pieces: Callable[[], Iterator[str]]


STDLIB = Path(os.__file__).parent


def load_domains(paths: list[str]) -> list[Domain]:
    """A domain a path, or the three that need no file and no network.

    Args:
        paths: files, or folders whose text files count as one text, in the order of their names.

    Raises:
        ValueError: a path that is not there, or a folder without text.
    """
    if not paths:
        return [
            Domain("documentation", "the language reference in Python's pydoc_data.topics", documentation),
            Domain("code", "the modules of Python's standard library", lambda: read(sorted(STDLIB.glob("[a-z]*.py")))),
            Domain("needles", "RULER's niah_multikey_2: lines that each name a magic number", needles),
        ]
    return [from_path(path, alone=[Path(p).stem for p in paths].count(Path(path).stem) == 1) for path in paths]


def documentation() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def needles() -> Iterator[str]:
    make = TASKS["niah_multikey_2"].make
    return (make(random.Random(f"analysis/{i}"), 500, Setting(length=0)).question for i in itertools.count())


def from_path(name: str, alone: bool) -> Domain:
    """The domain of a file or folder; called by its whole path if another has the same last name."""
    path = Path(name)
    if not path.exists():
        raise ValueError(f"text: found no file or folder {name}")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not any(True for _ in read(files)):
        raise ValueError(f"text: {name} holds no text; needed a UTF-8 text file, or a folder with some")
    return Domain(path.resolve().stem if alone else name, name, lambda: read(files))


def read(files: list[Path]) -> Iterator[str]:
    """The text of files, in pieces; a file that is not UTF-8 text ends where it stops being so."""
    for path in files:
        try:
            with path.open(encoding="utf-8") as file:
                while piece := file.read(PIECE):
                    yield piece
        except UnicodeDecodeError:
            continue


def sequences(domain: Domain, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Tensor:
    """The first tokens of a domain as int64 [count, length]; each row begins as the tokenizer begins a text.

    Raises:
        ValueError: the domain has too few tokens.
    """
    begin = tokenizer("")["input_ids"]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    needed = count * (length - len(begin))
    found: list[int] = []
    for piece in domain.pieces():
        found += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(found) >= needed:
            rows = torch.tensor(found[:needed]).view(count, -1)
            return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, -1), rows], dim=1)
    raise ValueError(
        f"text: {domain.name} ({domain.source}) has {len(found):,} tokens, needed {needed:,} for {count} sequences of "
        f"{length:,}; give more text, or lower batches or length"
    )
