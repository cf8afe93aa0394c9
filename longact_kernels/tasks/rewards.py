"""Rewards, in the form that TRL calls: `reward(completions, <columns of the data set>, **rest) -> list[float]`."""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from longact_kernels.integrations.prompts import message_text
from longact_kernels.integrations.rewards import is_async

Reward = Callable[..., Sequence[float | None]]


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, given as a string or as a list of chat messages."""
    return completion if isinstance(completion, str) else "".join(map(message_text, completion))


def string_match(completions: list, answers: list[list[str]], **_) -> list[float]:
    """Fraction of the wanted strings that a completion contains, upper and lower case alike (RULER's score)."""
    return [sum(found) / len(found) for found in matches(completions, answers)]


def string_match_any(completions: list, answers: list[list[str]], **_) -> list[float]:
    """1 where a completion contains one of the strings, upper and lower case alike (RULER's score for QA), else 0."""
    return [float(any(found)) for found in matches(completions, answers)]


def matches(completions: list, answers: list[list[str]]) -> list[list[bool]]:
    """Which of its answers each completion contains."""
    texts = [completion_text(completion).lower() for completion in completions]
    return [[answer.lower() in text for answer in wanted] for text, wanted in zip(texts, answers, strict=True)]


def load_reward(name: str) -> Reward:
    """The function that `--reward module:function` names; the module may lie in the current folder.

    Raises:
        ValueError: there is no such function, or it is of another kind.
    """
    module, _, function = name.partition(":")
    if not (module and function):
        raise ValueError(f"reward: got {name!r}, needed module:function, such as my_rewards:exact")
    # A command does not look for modules where it is called, as `python -m` does.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"reward: cannot import {module}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"reward: there is no function {function!r} in {module}")
    if inspect.isclass(found) or is_async(found):
        kind = "a class" if inspect.isclass(found) else "async"
        raise ValueError(f"reward: {function} in {module} is {kind}, needed a plain function")
    return found
