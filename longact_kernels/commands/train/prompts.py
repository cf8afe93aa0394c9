"""The prompts of a run: of a task or of the user's own data set, those to train on and those held out."""

import math
import random
from collections.abc import Callable

from datasets import Dataset
from trl import GRPOConfig

from longact_kernels.commands.train.arguments import DEFAULT_EVAL_PROMPTS, TrainArguments
from longact_kernels.integrations.prompts import encode_prompts
from longact_kernels.tasks import build_dataset
from longact_kernels.tasks.documents import read_questions
from longact_kernels.tasks.haystack import read_haystack
from longact_kernels.tasks.rows import read_rows

Advance = Callable[[], None]
HELD_OUT_SHARE = 5  # of a data set at most one row in so many is held out, if nobody says how many


def read_sources(arguments: TrainArguments) -> int:
    """Reads what the prompts are made from, so that what is wrong with it shows early; returns how many there can be.

    Raises:
        ValueError: it cannot be read, or lacks something.
    """
    if arguments.haystack:
        read_haystack(arguments.haystack)
    if arguments.documents:
        read_questions(arguments.documents)
    return (
        len(own_rows(arguments))
        if arguments.dataset
        else (arguments.eval_prompts or 0) + (arguments.train_prompts or 0)
    )


def make_prompts(
    arguments: TrainArguments, training: GRPOConfig, tokenizer, advance: Advance
) -> tuple[Dataset, list[dict]]:
    """The training set and the held-out rows, each with `prompt` and, where they are known, `answers`.

    With several lengths, the training set has the rows in the order of the steps, and a column `length`.

    Args:
        arguments: what to make them from, how long, how many.
        training: says how many prompts a run takes; its `shuffle_dataset` is turned off where the order matters.
        tokenizer: the model's, which counts the tokens.
        advance: called after each prompt.

    Raises:
        ValueError: prompts do not fit into a length, or are too few.
    """
    make = generated if arguments.dataset is None else from_own
    stages, held_out = make(arguments, tokenizer, advance)
    if len(stages) == 1:
        return Dataset.from_list(stages[0]), held_out
    training.shuffle_dataset = False
    rows = [{**row, "length": length} for length, pool in zip(arguments.stages(), stages, strict=True) for row in pool]
    return Dataset.from_list(rows).select(in_stages([len(pool) for pool in stages], training)), held_out


def generated(arguments: TrainArguments, tokenizer, advance: Advance) -> tuple[list[list[dict]], list[dict]]:
    """Prompts of a task: those of each stage, which share the number of them, and those held out, of the last."""
    assert arguments.task and arguments.train_prompts and arguments.eval_prompts
    task, count = arguments.task, arguments.train_prompts
    lengths = [length for length in arguments.stages() if length is not None]

    def make(split: str, first: int, count: int, length: int) -> list[dict]:
        return build_dataset(
            task,
            tokenizer,
            split=split,
            first=first,
            count=count,
            seed=arguments.task_seed,
            length=length,
            argument="length" if arguments.lengths is None else "lengths",
            needles=arguments.needles,
            haystack=arguments.haystack,
            documents=arguments.documents,
            advance=advance,
        )

    held_out = make("test", 0, arguments.eval_prompts, lengths[-1])
    bounds = [count * i // len(lengths) for i in range(len(lengths) + 1)]
    stages = [make("train", a, b - a, length) for a, b, length in zip(bounds, bounds[1:], lengths, strict=False)]
    return stages, held_out


def from_own(arguments: TrainArguments, tokenizer, advance: Advance) -> tuple[list[list[dict]], list[dict]]:
    """The user's rows: each in the first stage whose length it keeps within; some of them held out."""
    rows = own_rows(arguments)
    random.Random(arguments.task_seed).shuffle(rows)
    lengths = [length or math.inf for length in arguments.stages()]
    stages: list[list[dict]] = [[] for _ in lengths]
    fitting = []
    for row in rows:
        tokens = len(encode_prompts(tokenizer, [row["prompt"]])[0]) if min(lengths) < math.inf else 0
        stage = next((i for i, length in enumerate(lengths) if tokens <= length), None)
        if stage is not None:
            fitting.append((row, stage))
        advance()
    count = arguments.eval_prompts or min(DEFAULT_EVAL_PROMPTS, max(len(fitting) // HELD_OUT_SHARE, 1))
    if len(fitting) <= count:
        raise ValueError(
            f"dataset: {len(fitting)} of the {len(rows)} rows of {arguments.dataset} fit into the length, and {count} "
            "would be held out, which leaves none to train on; give more rows, lower eval_prompts, or raise length"
        )
    # From the other end, so that more of the ones change nothing in the others.
    held_out = [row for row, _ in fitting[:count]]
    for row, stage in fitting[: count - 1 : -1][: arguments.train_prompts]:
        stages[stage].append(row)
    return stages, held_out


def own_rows(arguments: TrainArguments) -> list[dict]:
    """The rows of the user's data set, with the strings that a right answer contains one of as `answers`.

    Raises:
        ValueError: they cannot be read, or lack something.
    """
    rows = [dict(row) for row in read_rows(arguments.dataset, "dataset")]
    for i, row in enumerate(rows, start=1):
        answers = row.get("answers", row.get("answer"))
        if not row.get("prompt") or (answers is None and arguments.reward is None):
            raise ValueError(
                f"dataset: row {i} of {arguments.dataset} has {', '.join(row)}; needed prompt and answer (or "
                "answers, a list); without answers name a reward"
            )
        if answers is not None:
            row["answers"] = [str(one) for one in answers] if isinstance(answers, list) else [str(answers)]
    return rows


def in_stages(pools: list[int], training: GRPOConfig) -> list[int]:
    """The order in which a run takes rows that lie stage by stage, each stage for the same part of its batches.

    Args:
        pools: how many rows each stage has.
        training: of the run; `max_steps` says how long it is.

    Raises:
        ValueError: the run's length is not known, or is too short, or a stage has no rows.
    """
    generations = training.steps_per_generation * training.num_iterations
    batches = math.ceil(training.max_steps * training.gradient_accumulation_steps / generations)
    if batches < len(pools):
        raise ValueError(
            f"lengths: got {len(pools)} stages, which need at least as many generated batches, but max_steps "
            f"{training.max_steps} makes {max(batches, 0)}; raise max_steps, or give fewer lengths"
        )
    if 0 in pools:
        raise ValueError(
            f"lengths: stage {pools.index(0) + 1} has no prompts of its length; leave it out, or give more prompts"
        )
    rng = random.Random(training.seed)
    order: list[int] = []
    for i, count in enumerate(pools):
        wanted = (batches * (i + 1) // len(pools) - batches * i // len(pools)) * (
            training.generation_batch_size // training.num_generations
        )
        stage: list[int] = []
        while len(stage) < wanted:
            stage += rng.sample(range(sum(pools[:i]), sum(pools[:i]) + count), count)
        order += stage[:wanted]
    return order
