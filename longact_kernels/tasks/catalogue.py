"""All tasks by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from longact_kernels.tasks.counting import COMMON, FEWEST, common_words, frequent_words
from longact_kernels.tasks.needles import among_needles, hidden_in_text
from longact_kernels.tasks.questions import answer_from_documents, key_chain
from longact_kernels.tasks.rewards import string_match, string_match_any
from longact_kernels.tasks.sample import Make, Setting
from longact_kernels.tasks.tracing import variable_tracking
from longact_kernels.tasks.words import NAMES


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        make: makes a sample of it.
        about: what it is, in a few words.
        fill: what fills a prompt up, and a sample's size counts.
        budget: tokens that an answer may take, RULER's.
        haystack: where something is hidden if the user names no haystack: in the "noise", or, "prose", nowhere: the
            user has to name one. None if the task has no haystack.
        documents: whether it asks over the user's documents; a task with a haystack can do without.
        reward: of an answer.
        least, most: the smallest and the largest size.
    """

    make: Make
    about: str
    fill: str
    budget: int
    haystack: Literal["noise", "prose"] | None = None
    documents: bool = False
    reward: Callable[..., list[float]] = string_match
    least: int = 1
    most: Callable[[Setting], int] = lambda setting: 10**9


def among(key: str, value: str) -> Make:
    return lambda rng, size, setting: among_needles(rng, size, setting, key=key, value=value)


def hidden(**what) -> Make:
    return lambda rng, size, setting: hidden_in_text(rng, size, setting, **what)


def documents(setting: Setting) -> int:
    """How many there are to fill a prompt with."""
    return len(setting.library.documents) if setting.library else 10**9


HAY = "pieces of the haystack"
TASKS = {
    "niah_single_1": Task(hidden(), "a number in noise", HAY, 128, "noise"),
    "niah_single_2": Task(hidden(), "a number in prose", HAY, 128, "prose"),
    "niah_single_3": Task(hidden(value="uuid"), "a UUID in prose", HAY, 128, "prose"),
    "niah_multikey_1": Task(hidden(keys=4), "one of 4 numbers in prose", HAY, 128, "prose"),
    "niah_multikey_2": Task(
        among("name", "number"), "one number among numbers", "needles", 128, most=lambda setting: NAMES
    ),
    "niah_multikey_3": Task(among("uuid", "uuid"), "one UUID among UUIDs", "needles", 128),
    "niah_multivalue": Task(hidden(values=4), "the 4 numbers of a key in prose", HAY, 128, "prose"),
    "niah_multiquery": Task(hidden(keys=4, asked=4), "the numbers of 4 keys in prose", HAY, 128, "prose"),
    "vt": Task(variable_tracking, "variables that a chain of assignments gives one value", HAY, 30, "noise"),
    "cwe": Task(
        common_words, "the 10 most common words of a list", "other words", 120, most=lambda setting: NAMES - COMMON
    ),
    "fwe": Task(frequent_words, "the 3 most frequent coded words", "coded words", 50, least=FEWEST),
    "qa": Task(
        answer_from_documents, "a question over your documents", "documents", 32,
        documents=True, reward=string_match_any, most=documents,
    ),
    "key_chain": Task(
        key_chain, "a question at the end of a chain of keys", HAY, 128,
        "noise", documents=True, reward=string_match_any, most=documents,
    ),
}  # fmt: skip
