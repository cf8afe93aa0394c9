"""RULER's eight needle tasks: magic numbers or UUIDs of keys, hidden in a text or among others of their kind."""

import random
from collections.abc import Callable

from longact_kernels.tasks.sample import Sample, Setting
from longact_kernels.tasks.words import names, number, uuid4

KINDS: dict[str, Callable[[random.Random], str]] = {"number": number, "uuid": uuid4}


def needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def hidden_in_text(
    rng: random.Random,
    size: int,
    setting: Setting,
    *,
    value: str = "number",
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Sample:
    """Needles in `size` pieces of the haystack.

    Args:
        rng, size, setting: of a `Make`.
        value: what is hidden, a name in `KINDS`.
        keys: how many keys have values.
        values: how many values each of them has.
        asked: after how many of them the question asks.
    """
    assert setting.haystack is not None
    found = {key: [KINDS[value](rng) for _ in range(values)] for key in names(rng, keys)}
    lines = [needle(value, key, one) for key, ones in found.items() for one in ones]
    rng.shuffle(lines)
    wanted = rng.sample(list(found), asked)
    text = setting.haystack.hide(rng, size, lines)
    return quiz(value, text, wanted, [one for key in wanted for one in found[key]])


def among_needles(rng: random.Random, size: int, setting: Setting, *, key: str, value: str) -> Sample:
    """A needle in a haystack of `size` needles: each line names another key's value, one of them is asked for."""
    keys = names(rng, size) if key == "name" else [uuid4(rng) for _ in range(size)]
    values = [KINDS[value](rng) for _ in keys]
    asked = rng.randrange(size)
    text = "\n".join(needle(value, one, its) for one, its in zip(keys, values, strict=True))
    return quiz(value, text, [keys[asked]], [values[asked]])


def quiz(kind: str, text: str, keys: list[str], values: list[str]) -> Sample:
    """The prompt around a text with needles."""
    asked = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if len(values) == 1:
        about, them, what, verb, ask = f"A special magic {kind} is", "it", kind, "is", "What is the"
    else:
        about, them, what, verb, ask = f"Some special magic {kind}s are", "them", f"{kind}s", "are", "What are all the"
    question = (
        f"{about} hidden within the following text. Make sure to memorize {them}. "
        f"I will quiz you about the {what} afterwards.\n{text}\n"
        f"{ask} special magic {what} for {asked} mentioned in the provided text?"
    )
    return Sample(question, values, f"The special magic {what} for {asked} mentioned in the provided text {verb}")
