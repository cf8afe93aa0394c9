"""Rewards, in the form that TRL calls: `reward(completions, <columns of the data set>, **rest) -> list[float]`."""


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, given as a string or as a list of chat messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def string_match(completions: list, answers: list[list[str]], **_) -> list[float]:
    """Fraction of the wanted strings that a completion contains, upper and lower case alike (RULER's score)."""
    rewards = []
    for completion, wanted in zip(completions, answers, strict=True):
        text = completion_text(completion).lower()
        rewards.append(sum(answer.lower() in text for answer in wanted) / len(wanted))
    return rewards
