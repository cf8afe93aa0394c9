"""Which tasks lm-eval is to run, at which lengths, and how its documents are made the same ones at every call."""

import contextlib
import io
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler import vt_utils
from transformers import PreTrainedTokenizerBase

from longact_kernels.commands.console import did_you_mean
from longact_kernels.commands.eval.data import at_hand, missing
from longact_kernels.commands.eval.longbench2 import generated_task

RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)
GENERATED = "longbench2_generate"
# lm-eval's own seeds; both are set before the documents of each cell are made.
SEED, NUMPY_SEED = 0, 1234
VT_EXAMPLE, VT_ANSWER = 500, 30


def names_of(tasks: str) -> list[str]:
    """The tasks that a comma-separated list names, with `ruler` as its 13.

    Raises:
        ValueError: there is no such task.
    """
    names: list[str] = []
    for name in filter(None, (part.strip() for part in tasks.split(","))):
        names += RULER if name == "ruler" else [name]
    if not names:
        raise ValueError("tasks: none given; name ruler, longbench2, longbench2_generate, or any task of lm-eval")
    index = manager(names).task_index
    for name in names:
        if name != GENERATED and name not in index:
            hint = did_you_mean(name, [*index, GENERATED, "ruler"], "see `lm-eval ls tasks`")
            raise ValueError(f"tasks: lm-eval has no {name!r}{hint}")
    return list(dict.fromkeys(names))


def manager(names: list[str], **metadata) -> TaskManager:
    """lm-eval's task manager; it reads thousands of files unless all names are RULER's and LongBench v2's."""
    root = Path(next(iter(lm_eval_tasks.__path__)))
    near = TaskManager(
        include_defaults=False, include_path=[root / "ruler", root / "longbench2"], metadata=dict(metadata)
    )
    if all(name == GENERATED or name in near.task_index for name in names):
        return near
    return TaskManager(metadata=dict(metadata))


def build(
    name: str, length: int | None, tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path, max_length: int
) -> dict:
    """lm-eval's task dictionary for one task at one length: the same documents at every call.

    Args:
        name: of a task or a group.
        length: tokens of a prompt and its answer together; `None` for tasks with lengths of their own.
        tokenizer, tokenizer_folder: that sizes the documents, and the folder that lm-eval loads it from.
        max_length: tokens that the model reads.

    Raises:
        ValueError, OSError: lm-eval cannot make the documents, or not fetch them.
    """
    spec = generated_task(name, tokenizer, max_length) if name == GENERATED else name
    lengths = {} if length is None else {"max_seq_lengths": [length]}
    # This module draws from a generator of its own, which would go on from where the last cell left it.
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
    with quiet(), at_hand(name):
        random.seed(SEED)
        np.random.seed(NUMPY_SEED)
        loaded = manager([name], tokenizer=str(tokenizer_folder), **lengths).load([spec])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=NUMPY_SEED)
    return loaded


def impossible(name: str, length: int | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str | None:
    """Why a task cannot be had at a length; `None` if nothing is known against it."""
    if length is not None and length > max_length:
        return f"the model reads {max_length:,} tokens at most"
    if name == "ruler_vt" and length is not None and length < (shortest := shortest_vt(tokenizer)):
        needed = f"{shortest:,} tokens" if shortest < math.inf else "a tokenizer that takes fewer tokens"
        return f"lm-eval's ruler_vt would not come to an end; it needs {needed}"
    return missing(name)


def shortest_vt(tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens, or a few more, below which lm-eval would look for a variable-tracking prompt without end.

    It gives its example up to 500 tokens, and goes below ten noise sentences nowhere, in the example below five.
    """
    with quiet():
        random.seed(SEED)
        example, _ = vt_utils.generate_input_output(5, num_chains=1, num_hops=4, is_icl=True)
        prompt, _ = vt_utils.generate_input_output(10, num_chains=1, num_hops=4)
    # Variables' names take more or fewer tokens from draw to draw.
    slack = 40
    if len(tokenizer.encode(example)) + VT_ANSWER + slack > VT_EXAMPLE:
        return math.inf
    return VT_EXAMPLE + len(tokenizer.encode(prompt)) + VT_ANSWER + slack


def documents_lack_answers(tasks: dict[str, Task]) -> bool:
    """Whether RULER made documents that no answer fits: common words at 512 tokens."""
    return any("outputs" in task.eval_docs[0] and not task.eval_docs[0]["outputs"] for task in tasks.values())


@contextlib.contextmanager
def quiet():
    """Keeps lm-eval's prints off the screen."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield
