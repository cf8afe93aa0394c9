"""RULER's variable tracking: which variables hold a value, through a chain of assignments in the text."""

import random

from longact_kernels.tasks.sample import Sample, Setting
from longact_kernels.tasks.words import codes

HOPS = 4


def variable_tracking(rng: random.Random, size: int, setting: Setting) -> Sample:
    """One value, handed on by `HOPS` assignments that stand in order in `size` pieces of the haystack."""
    assert setting.haystack is not None
    variables = [code.upper() for code in codes(rng, HOPS + 1, 5)]
    value = str(rng.randint(10_000, 99_999))
    held = [value, *(f"VAR {variable}" for variable in variables)]
    chain = [f"VAR {variable} = {what}" for variable, what in zip(variables, held, strict=False)]
    text = setting.haystack.hide(rng, size, chain)
    question = (
        "The following text hides assignments of variables, in which a variable takes over the value of another. "
        f"Keep track of who holds what.\n{text}\n"
        f"Which variables hold the value {value}? Name all {len(variables)} of them."
    )
    return Sample(question, variables, f"The {len(variables)} variables that hold the value {value} are")
