"""RULER's common words and frequent words: what occurs most often in the whole text?"""

import math
import random

from longact_kernels.tasks.sample import Sample, Setting
from longact_kernels.tasks.words import codes, names

COMMON = 10
# How often a common and another word occur; the second from `LONG` tokens on.
TIMES, TIMES_LONG = (6, 1), (30, 3)
LONG = 4096
FREQUENT = 3
ALPHA = 2.0
# The fewest coded words at which the third most frequent is ahead of the fourth.
FEWEST = 80


def common_words(rng: random.Random, size: int, setting: Setting) -> Sample:
    """A numbered list in which ten words occur often and `size` others seldom."""
    often, seldom = TIMES if setting.length < LONG else TIMES_LONG
    words = names(rng, COMMON + size)
    entries = words[:COMMON] * often + words[COMMON:] * seldom
    rng.shuffle(entries)
    text = " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1))
    question = (
        "The following numbered list repeats some words more often than others. Notice which ones come most often.\n"
        f"{text}\n"
        f"Which are the {COMMON} most common words of the list?"
    )
    return Sample(question, words[:COMMON], f"The {COMMON} most common words of the list are:")


def frequent_words(rng: random.Random, size: int, setting: Setting) -> Sample:
    """`size` coded words, as often as Zipf's law says; the first is a filler of dots, the next three are asked for."""
    share = 6 / math.pi**2  # of the most frequent: 1 / zeta(ALPHA)
    counts: list[int] = []
    while (count := round(size * share * (len(counts) + 1) ** -ALPHA)) > 0:
        counts.append(count)
    words = ["...", *codes(rng, len(counts) - 1, 6)]
    text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    question = (
        f"The following text is coded. Count how often each coded word occurs; the dots mean nothing.\n"
        f"{' '.join(text)}\n"
        f"Which are the {FREQUENT} most frequent coded words? Answer with the words alone."
    )
    return Sample(question, words[1 : FREQUENT + 1], f"The {FREQUENT} most frequent coded words are:")
