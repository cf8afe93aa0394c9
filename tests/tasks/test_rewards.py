"""The rewards, and finding the user's own."""

import pytest

from longact_kernels.tasks.rewards import load_reward, string_match, string_match_any

COMPLETIONS = ["it is ABC.", [{"role": "assistant", "content": "abc and 42"}], ""]
ANSWERS = [["abc"], ["42", "43"], ["x"]]


def test_string_match_is_the_fraction_found_whatever_the_case():
    assert string_match(completions=COMPLETIONS, answers=ANSWERS, prompts=None) == [1, 0.5, 0]


def test_one_of_several_answers_will_do():
    assert string_match_any(completions=COMPLETIONS, answers=ANSWERS, prompts=None) == [1, 1, 0]


def test_a_reward_of_the_users_own_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def short(completions, **_): return [-len(c) for c in completions]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert load_reward("my_own_rewards:short")(completions=["ab"]) == [-2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "reward: got 'short', needed module:function"),
        ("no_such_module:short", "reward: cannot import no_such_module: ModuleNotFoundError"),
        ("json:short", "reward: there is no function 'short' in json"),
        ("json:__name__", "there is no function '__name__'"),
        ("json:JSONDecoder", "JSONDecoder in json is a class, needed a plain function"),
        ("asyncio:sleep", "sleep in asyncio is async, needed a plain function"),
    ],
)
def test_a_reward_that_is_not_there(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)
