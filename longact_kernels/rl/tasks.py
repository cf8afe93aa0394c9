"""Synthetic long-context tasks: seeded, of any length, with the answer known.

A task is a function `make(rng, needles) -> Sample`. `build_dataset` draws samples from it so that a prompt, counted by
the model's own tokenizer, is as long as asked and no longer.
"""

import bisect
import random
from collections.abc import Callable
from dataclasses import dataclass

from longact_kernels.integrations.generation import Prompt, encode_prompts

ADJECTIVES = (  # noqa: SIM905
    "amber ancient bitter blank blue bold brave breezy bright broad calm careful cheerful clever cloudy cold "
    "curious damp dapper deep distant dizzy eager early faded fancy fierce fluffy frosty gentle glossy golden "
    "graceful grand green handy happy hasty heavy hidden hollow humble icy jolly keen kind late lazy lively "
    "lonely loud lucky mellow misty modest narrow nimble noisy odd orange pale patient plain polite proud purple "
    "quick quiet rapid rare rough round royal rusty salty sandy shiny silent silver sleepy slim smooth soft solid "
    "spare steady stormy sturdy sunny swift tall tame tart tidy tiny tough vast velvet warm wild wise witty "
    "wooden yellow young zesty "
).split()
NOUNS = (  # noqa: SIM905
    "acorn anchor apple arrow badge banjo basket beach bell berry bridge broom bucket cabin camel candle canoe "
    "canyon carpet castle cedar cello chair cherry circle cliff clock cloud comet coral cottage cradle cricket "
    "crown desert diamond dragon drum eagle engine falcon feather fiddle forest fossil fountain garden garlic "
    "glacier goose guitar hammer harbor hazel hedge helmet heron honey island ivory jacket jungle kettle kitten "
    "ladder lantern lemon lily lizard maple marble meadow mirror monkey moth mountain needle oasis ocean olive "
    "orchard otter paddle palace panda parrot pebble pencil pepper pigeon pillow planet pocket pony prairie "
    "pumpkin rabbit raven ribbon river rocket saddle salmon shadow shovel spider spoon squirrel stable statue "
    "summit teapot temple thunder ticket tiger tunnel turtle valley violin walnut whistle willow window wizard "
).split()


@dataclass(frozen=True)
class Sample:
    """One question: what the user says, the strings that a right answer contains, and how the answer begins."""

    question: str
    answers: list[str]
    answer_prefix: str


def niah_multikey_2(rng: random.Random, needles: int) -> Sample:
    """A needle in a haystack of needles: RULER's `niah_multikey_2` (https://arxiv.org/abs/2404.06654).

    Every line names the magic number of another key; one of them is asked for.
    """
    keys = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), needles)
    names = [f"{ADJECTIVES[key // len(NOUNS)]}-{NOUNS[key % len(NOUNS)]}" for key in keys]
    numbers = [str(rng.randint(1_000_000, 9_999_999)) for _ in names]
    asked = rng.randrange(needles)
    haystack = "\n".join(
        f"One of the special magic numbers for {name} is: {number}."
        for name, number in zip(names, numbers, strict=True)
    )
    question = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the number afterwards.\n{haystack}\n"
        f"What is the special magic number for {names[asked]} mentioned in the provided text?"
    )
    prefix = f"The special magic number for {names[asked]} mentioned in the provided text is"
    return Sample(question, [numbers[asked]], prefix)


TASKS: dict[str, Callable[[random.Random, int], Sample]] = {"niah_multikey_2": niah_multikey_2}


def format_prompt(sample: Sample, tokenizer) -> Prompt:
    """The prompt, with the answer begun: messages for a chat model, plain text for any other."""
    if tokenizer.chat_template:
        begun = {"role": "assistant", "content": sample.answer_prefix}
        return [{"role": "user", "content": sample.question}, begun]
    return f"{sample.question} {sample.answer_prefix}"


def build_dataset(
    task: str, tokenizer, *, split: str, count: int, seed: int, length: int, needles: int | None = None
) -> list[dict]:
    """Draws `count` prompts of a task; rows of `{"prompt": ..., "answers": [str, ...]}`.

    The splits never share a random stream, whatever the seeds, and a sample depends on its own index only: a larger
    `count` extends a data set without changing what was there.

    Args:
        task: a name in `TASKS`.
        tokenizer: the model's tokenizer.
        split: any name, such as `"train"` or `"test"`.
        count: number of prompts.
        seed: of the data set.
        length: greatest number of tokens of a prompt.
        needles: exact number of needles; `None` takes as many as fit into `length`.

    Raises:
        ValueError: unknown task, or `length` is too short for the needles.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, known tasks are {', '.join(TASKS)}")

    if needles is not None and needles < 1:
        raise ValueError(f"needles: got {needles}, needed at least 1")

    rows = []
    for index in range(count):

        def draw(n: int, stream: str = f"{task}/{split}/{seed}/{index}") -> tuple[Prompt, list[str]]:
            sample = TASKS[task](random.Random(stream), n)
            return format_prompt(sample, tokenizer), sample.answers

        def tokens(n: int, draw=draw) -> int:
            return len(encode_prompts(tokenizer, [draw(n)[0]])[0])

        shortest = tokens(needles or 1)
        if shortest > length:
            raise ValueError(
                f"length: {length} tokens are too few for {needles or 1} needle(s) of task {task}, "
                f"which take {shortest}; raise length" + (" or lower needles" if needles else "")
            )
        prompt, answers = draw(needles or most(tokens, length))
        rows.append({"prompt": prompt, "answers": answers})
    return rows


def most(tokens: Callable[[int], int], length: int) -> int:
    """The greatest n of at least 1 whose `tokens(n)`, which grow with n, are within `length`."""
    above = 2
    while tokens(above) <= length:
        above *= 2
    return bisect.bisect_right(range(above), length, lo=above // 2, key=tokens) - 1
