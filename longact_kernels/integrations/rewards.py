"""Rewards as a trainer gets them: what a function returns is looked at, and named where it is none."""

import functools
import inspect
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping, Set
from typing import Any

import torch

# What a list can be made of, but of whose items none is the reward of a certain completion.
NO_LISTS = (str, bytes, bytearray, Mapping, Set)


class BadReward(ValueError):
    """A reward function cannot be called as trainers call it, or returned what is no reward."""


def checked(reward: Callable) -> Callable:
    """A reward function whose arguments and return value are looked at; what it raises itself passes as it is.

    Raises:
        BadReward: it does not take what it is given, or did not return one number within fp32's range, NaN or None for
            each completion; the message names it.
    """
    name = name_of(reward)

    def look(returned: Any, completions: list) -> list[float | None]:
        try:
            if isinstance(returned, NO_LISTS):
                raise TypeError
            values = returned.tolist() if hasattr(returned, "tolist") else list(returned)
        except TypeError:
            raise BadReward(
                f"reward: {name} returned {shown(returned)}, needed a list, a number a completion"
            ) from None
        if not isinstance(values, list) or len(values) != len(completions):
            count = len(values) if isinstance(values, list) else 1
            raise BadReward(
                f"reward: {name} returned {count} value{'' if count == 1 else 's'} for {len(completions)} completions"
            )
        numbers_of: list[float | None] = []
        for i, value in enumerate(values):
            try:
                numbers_of.append(None if value is None else number(value))
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise BadReward(
                    f"reward: {name} returned {shown(value)} for completion {i}, needed a finite number within fp32's "
                    "range, or None for what it cannot score"
                ) from None
        return numbers_of

    if is_async(reward):

        @functools.wraps(reward)
        async def call(*args, **kwargs):
            check_call(reward, *args, **kwargs)
            return look(await reward(*args, **kwargs), kwargs["completions"])
    else:

        @functools.wraps(reward)
        def call(*args, **kwargs):
            check_call(reward, *args, **kwargs)
            return look(reward(*args, **kwargs), kwargs["completions"])

    return call


def check_call(reward: Callable, *args, **kwargs) -> None:
    """Whether a reward takes these arguments.

    Raises:
        BadReward: it does not.
    """
    try:
        signature = inspect.signature(reward, follow_wrapped=False)
    except ValueError:  # of C, without one
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BadReward(
            f"reward: {name_of(reward)}{signature} {error}; it is given prompts, completions, completion_ids, the "
            "columns of the data set and more by their names: take **kwargs"
        ) from None


def is_async(reward: Callable) -> bool:
    return any(map(inspect.iscoroutinefunction, (reward, getattr(reward, "__call__", None))))  # noqa: B004


def number(value: Any) -> float:
    """A number, or a tensor or array of one, as a float that fp32 can hold, or NaN; an error for all else."""
    one = value.item() if hasattr(value, "item") else value
    if not isinstance(one, numbers.Real):
        raise TypeError
    if abs(one := float(one)) > torch.finfo(torch.float32).max:
        raise OverflowError
    return one


def shown(value: Any) -> str:
    """A value in a message: in short, on one line."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"a long {type(value).__name__}"  # Python does not print the longest whole numbers


def missing(value: float | None) -> bool:
    """Whether a reward says that there is none."""
    return value is None or math.isnan(value)


def none_at_all(names: list[str], count: int) -> BadReward:
    """The error for a batch without a single reward."""
    return BadReward(
        f"reward: {' and '.join(names)} returned None or NaN for all of {count} completions; needed a number for some "
        "(are the columns that it reads in the data set?)"
    )


def name_of(reward: Any) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
