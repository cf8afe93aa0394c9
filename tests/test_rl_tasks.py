"""The task generators and the reward."""

import random
import re

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from longact_kernels.integrations.generation import encode_prompts
from longact_kernels.rl.rewards import string_match
from longact_kernels.rl.tasks import TASKS, build_dataset

LINE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")
TOKENIZER = tiny.tokenizer()


def dataset(split="train", count=4, seed=0, length=700, needles=None, tokenizer=TOKENIZER):
    return build_dataset(
        "niah_multikey_2", tokenizer, split=split, count=count, seed=seed, length=length, needles=needles
    )


def tokens(row) -> int:
    return len(encode_prompts(TOKENIZER, [row["prompt"]])[0])


@given(st.integers(0, 2**32), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_the_answer_is_the_number_of_the_key_asked_for(seed, needles):
    sample = TASKS["niah_multikey_2"](random.Random(seed), needles)
    pairs = LINE.findall(sample.question)
    assert len(pairs) == needles == len(dict(pairs))
    (asked,) = re.findall(r"What is the special magic number for (\S+) mentioned", sample.question)
    assert sample.answers == [dict(pairs)[asked]]
    assert asked in sample.answer_prefix and sample.answers[0] not in sample.answer_prefix


def test_a_prompt_is_as_long_as_fits_and_no_longer():
    for row in dataset(length=700):
        needles = len(LINE.findall(row["prompt"][0]["content"]))
        longest_needle = len("One of the special magic numbers for cheerful-squirrel is: 1234567.\n")
        assert 700 - longest_needle < tokens(row) <= 700
        assert needles > 1


def test_needles_can_be_counted_out():
    assert [len(LINE.findall(row["prompt"][0]["content"])) for row in dataset(needles=3)] == [3] * 4


def test_a_seed_gives_the_same_prompts_and_more_of_them_change_nothing():
    assert dataset(count=4) == dataset(count=6)[:4]
    assert dataset(seed=1) != dataset(seed=0)


def test_held_out_prompts_are_apart_from_the_training_prompts():
    def numbers(split):
        rows = dataset(split=split, count=20, seed=3)
        return {number for row in rows for _, number in LINE.findall(row["prompt"][0]["content"])}

    assert not numbers("train") & numbers("test")


def test_a_model_without_a_chat_template_gets_text_that_ends_in_the_answers_beginning():
    (row,) = dataset(count=1, tokenizer=tiny.tokenizer(chat=False))
    assert row["prompt"].endswith("mentioned in the provided text is")


def test_a_chat_model_goes_on_with_the_answer_that_the_prompt_began():
    (row,) = dataset(count=1)
    text = TOKENIZER.decode(encode_prompts(TOKENIZER, [row["prompt"]])[0])
    assert text.endswith("mentioned in the provided text is")
    opened = TOKENIZER.decode(encode_prompts(TOKENIZER, [row["prompt"][:1]])[0])
    assert opened.endswith("\na:")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"length": 50}, "length: 50 tokens are too few"), ({"needles": 90}, "90 needle"), ({"needles": 0}, "needles")],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataset(**change)


def test_string_match_is_the_fraction_found_whatever_the_case():
    completions = ["it is ABC.", [{"role": "assistant", "content": "abc and 42"}], ""]
    assert string_match(completions=completions, answers=[["abc"], ["42", "43"], ["x"]], prompts=None) == [1, 0.5, 0]
