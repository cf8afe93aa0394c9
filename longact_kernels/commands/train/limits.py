"""What options may be: values that TRL, transformers and torch would take, or fail on in their depths."""

import json
import math
import re
from collections.abc import Callable
from enum import EnumType
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}

LARGEST = 2**63 - 1  # what torch takes of whole numbers

Limit = tuple[str, Callable[[float], bool]]

COUNT: Limit = ("a whole number of at least 1", lambda x: x >= 1 and x == int(x))
POSITIVE: Limit = ("a finite number above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE: Limit = ("a finite number of at least 0", lambda x: 0 <= x < math.inf)
DECAY: Limit = ("a number of at least 0 and less than 1", lambda x: 0 <= x < 1)
SHARE: Limit = ("a number from 0 to 1", lambda x: 0 <= x <= 1)
LIMITS: dict[str, Limit] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), COUNT
    ),
    **dict.fromkeys(
        ("generation_batch_size", "steps_per_generation", "num_iterations", "max_completion_length"), COUNT
    ),
    **dict.fromkeys(("save_total_limit", "dataloader_prefetch_factor"), COUNT),
    **dict.fromkeys(("temperature", "repetition_penalty", "num_train_epochs"), POSITIVE),
    **dict.fromkeys(("logging_steps", "save_steps", "adam_epsilon", "ddp_timeout"), POSITIVE),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "beta"), NOT_NEGATIVE),
    **dict.fromkeys(
        ("epsilon", "epsilon_high", "delta", "entropy_coef", "dataloader_num_workers", "seed"), NOT_NEGATIVE
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), DECAY),
    **dict.fromkeys(("min_p", "top_entropy_quantile", "ref_model_mixup_alpha", "label_smoothing_factor"), SHARE),
    "num_generations": ("a whole number of at least 2", lambda x: x >= 2 and x == int(x)),
    "max_steps": ("a whole number of at least 1, or -1 for num_train_epochs", lambda x: x >= 1 or x == -1),
    "top_p": ("a number above 0, at most 1", lambda x: 0 < x <= 1),
    "top_k": ("a whole number of at least 0", lambda x: x >= 0),
}


def of_another_type(name: str, value: Any, hint: Any) -> str | None:
    """What is wrong with an option whose value is of another type, is no name that it knows, or no JSON; or None."""
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds: list[Any] = [get_origin(one) or one for one in hints]
    if not any(is_of(value, one) for one in hints):
        if Literal in kinds:
            needed = f"one of {', '.join(get_args(hint))}"
        else:
            needed = " or ".join(KINDS[kind] for kind in kinds if kind in KINDS)
        return f"{name}: got {value!r}, needed {needed}"
    known = [member.value for kind in kinds if isinstance(kind, EnumType) for member in list[Any](kind)]
    if known and value not in known:
        return f"{name}: got {value!r}, needed one of {', '.join(known)}"
    if dict in kinds and isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
        except ValueError as error:
            return f"{name}: got {value!r}, which is no JSON ({error})"
    return None


def is_of(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(value, bool) and hint in (int, float):
        return False
    return isinstance(value, int | float if hint is float else get_origin(hint) or hint)


def check_pattern(name: str, value: Any) -> None:
    """Raises ValueError for what is neither a regular expression nor None."""
    try:
        re.compile(value or "")
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: got {value!r}, needed a regular expression: {error}") from error


def out_of_limits(options: dict[str, Any]) -> str | None:
    """What is wrong with the first option that is; None if none is."""
    for name, (needed, fits) in LIMITS.items():
        value = options.get(name)
        if isinstance(value, int | float) and not (abs(value) <= LARGEST and fits(value)):
            return f"{name}: got {value}, needed {needed}"
    return None
