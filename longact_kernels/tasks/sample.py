"""What a task is given, and what it makes."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from longact_kernels.tasks.documents import Library
from longact_kernels.tasks.haystack import Haystack


@dataclass(frozen=True)
class Sample:
    """One question: what the user says, the strings that a right answer contains, and how the answer begins.

    The question itself is the last line of what the user says.
    """

    question: str
    answers: list[str]
    answer_prefix: str


@dataclass(frozen=True)
class Setting:
    """What all samples of a data set share.

    Attributes:
        length: maximum number of tokens of a prompt.
        haystack: the text in which something is hidden; None for tasks without.
        library: the questions and documents that the user gave; None if none.
    """

    length: int
    haystack: Haystack | None = None
    library: Library | None = None


# A seeded sample of some size: the number of the pieces that fill the prompt, whatever they are.
Make = Callable[[random.Random, int, Setting], Sample]
