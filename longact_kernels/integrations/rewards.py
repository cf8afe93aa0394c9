"""Rewards as a trainer gets them: what a function returns is looked at, and named where it is none."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any


def checked(reward: Callable) -> Callable:
    """A reward function whose return value is looked at.

    Raises:
        ValueError: it did not return one finite number, NaN or None for each completion; the message names it.
    """
    name = name_of(reward)

    def look(returned: Any, completions: list) -> list[float | None]:
        try:
            values = returned.tolist() if hasattr(returned, "tolist") else list(returned)
        except TypeError:
            raise ValueError(f"reward: {name} returned {returned!r}, needed a list, a number a completion") from None
        if not isinstance(values, list) or len(values) != len(completions):
            count = len(values) if isinstance(values, list) else 1
            raise ValueError(
                f"reward: {name} returned {count} value{'' if count == 1 else 's'} for {len(completions)} completions"
            )
        for i, value in enumerate(values):
            fits = value is None or isinstance(value, numbers.Real) or (hasattr(value, "item") and value.numel() == 1)
            if not fits or (value is not None and math.isinf(value)):
                raise ValueError(
                    f"reward: {name} returned {value!r} for completion {i}, needed a finite number, or None for what "
                    "it cannot score"
                )
        return [None if value is None else float(value) for value in values]

    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None)):  # noqa: B004

        @functools.wraps(reward)
        async def call(*args, **kwargs):
            return look(await reward(*args, **kwargs), kwargs["completions"])
    else:

        @functools.wraps(reward)
        def call(*args, **kwargs):
            return look(reward(*args, **kwargs), kwargs["completions"])

    return call


def missing(value: float | None) -> bool:
    """Whether a reward says that there is none."""
    return value is None or math.isnan(value)


def none_at_all(names: list[str], count: int) -> ValueError:
    """The error for a batch without a single reward."""
    return ValueError(
        f"reward: {' and '.join(names)} returned None or NaN for all of {count} completions; needed a number for some "
        "(are the columns that it reads in the data set?)"
    )


def name_of(reward: Any) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
