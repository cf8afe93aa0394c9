"""Accuracy on held-out prompts by greedy generation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from longact_kernels.integrations.generation import generate
from longact_kernels.integrations.prompts import Prompt, encode_prompts
from longact_kernels.integrations.rewards import checked, missing, name_of, none_at_all
from longact_kernels.tasks.rewards import Reward


@dataclass(frozen=True)
class Evaluation:
    """What a model answered, and how well."""

    rewards: list[float]
    completions: list[str]

    @property
    def accuracy(self) -> float:
        return sum(self.rewards) / len(self.rewards)

    @property
    def standard_error(self) -> float:
        """Of the accuracy over other prompts of the same kind."""
        count = len(self.rewards)
        variance = sum((reward - self.accuracy) ** 2 for reward in self.rewards) / max(count - 1, 1)
        return math.sqrt(variance / count)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    reward: Reward,
    *,
    max_completion_length: int,
    eos_token_id: list[int],
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Answers `rows` greedily; leaves the model's training flag and every random state as they were.

    Args:
        model, tokenizer: what to evaluate.
        rows: with `prompt`, and what else the reward wants.
        reward: called as TRL calls it; None or NaN, for what it cannot score, counts as 0.
        max_completion_length: new tokens at most.
        eos_token_id: the tokens that end an answer.
        batch_size: prompts at a time.
        advance: called with the number of prompts done after each batch.

    Raises:
        BadReward: the reward did not return a number, or None, for each completion, or nothing but None.
    """
    config = GenerationConfig(
        max_new_tokens=max_completion_length,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=eos_token_id,
    )
    rewards: list[float] = []
    completions: list[str] = []
    look, scored = checked(reward), False
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                prompts = [row["prompt"] for row in batch]
                ids = generate(model, encode_prompts(tokenizer, prompts), config)
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                columns = {key: [row[key] for row in batch] for key in batch[0] if key != "prompt"}
                scores = look(
                    prompts=prompts,
                    completions=[in_form_of(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
                    completion_ids=ids,
                    **columns,
                )
                scored |= not all(map(missing, scores))
                rewards += [0.0 if missing(score) else score for score in scores]
                completions += texts
                advance(len(batch))
    finally:
        model.train(was_training)
    if rows and not scored:
        raise none_at_all([name_of(reward)], len(rows))
    return Evaluation(rewards, completions)


def in_form_of(prompt: Prompt, text: str) -> Prompt:
    """A completion as TRL hands it to a reward: a message where the prompt is messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
