"""Prompts of a task, as long as asked and no longer."""

import random
from collections.abc import Callable
from functools import cache

from longact_kernels.integrations.prompts import Prompt, encode_prompts
from longact_kernels.tasks.catalogue import TASKS, Task
from longact_kernels.tasks.documents import library, read_questions
from longact_kernels.tasks.haystack import read_haystack
from longact_kernels.tasks.sample import Sample, Setting


def build_dataset(
    task: str,
    tokenizer,
    *,
    split: str,
    count: int,
    seed: int,
    length: int,
    argument: str = "length",
    first: int = 0,
    needles: int | None = None,
    haystack: str | None = None,
    documents: str | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Draws `count` prompts of a task; rows of `{"prompt": ..., "answers": [str, ...]}`.

    The splits never share a random stream, whatever the seeds, and a sample depends on its own index only: a larger
    `count` extends a data set without changing what was there.

    Args:
        task: a name in `TASKS`.
        tokenizer: the model's tokenizer, which counts the tokens.
        split: any name, such as `"train"` or `"test"`; questions over documents are divided between the two.
        count: number of prompts.
        seed: of the data set.
        length: maximum number of tokens of a prompt.
        argument: the option that sets the length, for the messages.
        first: index of the first sample.
        needles: exact number of needles, where they fill the prompt; `None` takes as many as fit into `length`.
        haystack: of `read_haystack`.
        documents: of `read_questions`.
        advance: called after each prompt.

    Raises:
        ValueError: unknown task, an argument that the task has no use for or lacks, or `length` is too short.
    """
    check_task(task, needles=needles, haystack=haystack, documents=documents)
    made = TASKS[task]
    setting = Setting(
        length,
        read_haystack(haystack or "noise") if made.haystack and not documents else None,
        library(read_questions(documents), split) if documents else None,
    )
    rows = []
    for index in range(first, first + count):
        rows.append(build(made, tokenizer, f"{task}/{split}/{seed}/{index}", setting, needles, argument))
        advance()
    return rows


def check_task(task: str, *, needles: int | None, haystack: str | None, documents: str | None) -> None:
    """Whether there is such a task, and it takes these arguments; those of `build_dataset`.

    Raises:
        ValueError: it is not so.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, needed one of {', '.join(TASKS)}")
    made = TASKS[task]
    if needles is not None and made.fill != "needles":
        raise ValueError(f"needles: got {needles}, but prompts of {task} are made of {made.fill}; leave it out")
    if needles is not None and needles < 1:
        raise ValueError(f"needles: got {needles}, needed at least 1")
    if haystack is not None and not made.haystack:
        raise ValueError(f"haystack: got {haystack!r}, but prompts of {task} are made of {made.fill}; leave it out")
    if documents is not None and not made.documents:
        raise ValueError(f"documents: got {documents!r}, but {task} asks no questions about documents; leave it out")
    if haystack is not None and documents is not None:
        raise ValueError(
            f"haystack: got {haystack!r} and documents {documents!r}; {task} takes one of them, leave the other out"
        )
    if haystack is None and made.haystack == "prose":
        raise ValueError(
            f"haystack: {task} hides its needles in a text; name a text file, a folder of text files, a Hub data set, "
            "or noise"
        )
    if documents is None and made.documents and not made.haystack:
        raise ValueError(
            f"documents: {task} asks questions about documents; name a JSON Lines file or a Hub data set with "
            "question, answer and context"
        )


def build(task: Task, tokenizer, stream: str, setting: Setting, size: int | None, argument: str) -> dict:
    """One row: the sample of a random stream in the largest size that fits, or in the size given."""

    def draw(n: int) -> tuple[Prompt, list[str]]:
        sample = task.make(random.Random(stream), n, setting)
        return format_prompt(sample, tokenizer), sample.answers

    @cache
    def tokens(n: int) -> int:
        return len(encode_prompts(tokenizer, [draw(n)[0]])[0])

    least = size or task.least
    if tokens(least) > setting.length:
        shortest, remedy = (f"with needles {size} a", " or lower needles") if size else ("the shortest", "")
        raise ValueError(
            f"{argument}: got {setting.length}, but {shortest} prompt of this task takes {tokens(least)} tokens; "
            f"raise {argument}{remedy}"
        )
    prompt, answers = draw(size or largest(tokens, setting.length, least, task.most(setting)))
    return {"prompt": prompt, "answers": answers}


def format_prompt(sample: Sample, tokenizer) -> Prompt:
    """The prompt, with the answer begun: messages for a chat model, plain text for any other."""
    if tokenizer.chat_template:
        begun = {"role": "assistant", "content": sample.answer_prefix}
        return [{"role": "user", "content": sample.question}, begun]
    return f"{sample.question} {sample.answer_prefix}"


def largest(tokens: Callable[[int], int], length: int, least: int, most: int) -> int:
    """The greatest n from `least` to `most` whose `tokens(n)`, which grow with n, are within `length`.

    Tokens grow about in proportion to n, so a few interpolations find it: each call makes and reads a whole prompt.
    """
    low, high = least, min(least + 8, most)
    while tokens(high) <= length:
        if high == most:
            return most
        pace = max((tokens(high) - tokens(low)) / (high - low), 0.1)
        # A little too far, so as to have it between two sizes soon.
        low, high = high, min(high + 1 + int(1.02 * (length - tokens(high)) / pace), most)
    while high - low > 1:
        share = (length - tokens(low)) / (tokens(high) - tokens(low))
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if tokens(middle) <= length else (low, middle)
    return low
