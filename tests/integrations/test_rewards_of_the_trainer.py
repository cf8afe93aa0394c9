"""What reward functions return: one line that names the function, where it is no reward."""

import functools

import numpy
import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from tiny import model, tokenizer
from trl import GRPOConfig

from longact_kernels.integrations.rewards import BadReward, checked
from longact_kernels.integrations.trl import LongActGRPOTrainer

NAN, INF = float("nan"), float("inf")
WRONG = [
    ([1.0], r"returned 1 value for 8 completions"),
    ([0.0] * 9, r"returned 9 values for 8 completions"),
    ([], r"returned 0 values for 8 completions"),
    (1.0, r"returned 1\.0, needed a list"),
    (None, r"returned None, needed a list"),
    (torch.tensor(1.0), r"returned 1 value for 8 completions"),
    (["1"] * 8, r"returned '1' for completion 0"),
    ([0.0] * 7 + [INF], r"returned inf for completion 7"),
    ([[0.0]] * 8, r"returned \[0\.0\] for completion 0"),
    (torch.zeros(8, 2), r"returned \[0\.0, 0\.0\] for completion 0"),
    (numpy.zeros((8, 1)), r"returned \[0\.0\] for completion 0"),
    *((of, r"returned .*, needed a list") for of in ("abcdefgh", b"abcdefgh", dict.fromkeys(range(8)), set(range(8)))),
    *(
        ([of] * 8, r"returned .* for completion 0, needed a finite number within")
        for of in (1j, numpy.complex64(1), torch.tensor(1j), numpy.zeros(2), 10**400, 10**5000, 1e39, -1e39, -INF)
    ),
]


@pytest.mark.parametrize(("returned", "says"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_what_is_no_reward_names_the_function(returned, says):
    def exact(completions, **_):
        return returned

    with pytest.raises(BadReward, match=rf"reward: exact {says}") as raised:
        checked(exact)(completions=["a"] * 8)
    assert "\n" not in str(raised.value)


def test_what_is_one_passes():
    numpys = [numpy.int64(1), numpy.array(0.5), numpy.bool_(True), None]
    for returned in (numpys, [1, 0.5, True, None], torch.tensor([1.0, 0.5, 1.0, NAN]), (1, 0.5, 1, torch.tensor(NAN))):
        values = checked(lambda completions, returned=returned: returned)(completions=["a"] * 4)
        assert values[:3] == [1.0, 0.5, 1.0] and (values[3] is None or values[3] != values[3])


def test_a_function_that_does_not_take_its_arguments_is_named_and_what_one_raises_is_its_own():
    def exact(completions, answers):
        return [0.0]

    with pytest.raises(
        BadReward, match=r"reward: exact\(completions, answers\) missing a required argument: 'answers'"
    ):
        checked(exact)(completions=["a"])
    with pytest.raises(BadReward, match=r"exact.* got an unexpected keyword argument 'log_extra'.*take \*\*kwargs"):
        checked(exact)(completions=["a"], answers=["a"], log_extra=None)

    def raising(completions, **_):
        raise TypeError("its own")

    with pytest.raises(TypeError, match="its own"):
        checked(raising)(completions=["a"])
    wrapped = functools.wraps(exact)(lambda completions, **_: [1.0])
    assert checked(wrapped)(completions=["a"], log_extra=None) == [1.0]


def trainer(tmp_path, *rewards):
    data = Dataset.from_list([{"prompt": "abc"}, {"prompt": "de"}] * 4)
    args = GRPOConfig(
        str(tmp_path), max_steps=1, num_generations=4, per_device_train_batch_size=8, max_completion_length=4,
        report_to="none", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return LongActGRPOTrainer(
        model=model(), reward_funcs=list(rewards), args=args, train_dataset=data, processing_class=tokenizer()
    )


@pytest.mark.parametrize("value", [None, NAN])
def test_a_batch_without_a_single_reward(tmp_path, value):
    def nothing(completions, **_):
        return [value] * len(completions)

    def useless(completions, **_):
        return [None] * len(completions)

    with pytest.raises(ValueError, match="reward: nothing and useless returned None or NaN for all of 8 completions"):
        trainer(tmp_path, nothing, useless).train()


def test_of_several_functions_some_may_not_apply(tmp_path):
    made = trainer(tmp_path, lambda completions, **_: [None] * 8, lambda completions, **_: [0.0, 1.0] * 4)
    made.train()
    logged = made.state.log_history[0]
    assert {"completions/empty_ratio", "frac_reward_zero_std"} <= logged.keys()
    assert 0 <= logged["completions/empty_ratio"] <= 1 and logged["frac_reward_zero_std"] == 0
