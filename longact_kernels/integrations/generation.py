"""Generating completions and scoring them, with every distinct prompt read once."""

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """Generates one completion for each prompt, reading equal prompts once.

    The same tokens as `model.generate` on the left-padded batch. A group of G completions shares its prompt, so this
    reads 1/G of what that call reads: with long prompts, most of the time of a rollout. Processes that share a sharded
    model go on together until the last of them has finished, and so call this equally often.

    Args:
        model: leaves its training flag as it is; set `eval()` before where dropout matters.
        prompts: token ids.
        config: `pad_token_id` and `eos_token_id` must be set.

    Returns:
        Token ids of the completions, each up to and with its first end-of-sequence token.
    """
    length = max(map(len, prompts))
    ids = torch.tensor([[config.pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids, mask = ids.to(model.device), mask.to(model.device)
    cache, _ = read_prompts(model, ids, mask)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, generation_config=config)
    return [trim(completion, config.eos_token_id) for completion in out[:, length:].tolist()]


def score(model: PreTrainedModel, ids: Tensor, mask: Tensor, completion_length: int) -> ModelOutput:
    """The model's fused LM head on the completions of a batch, reading equal prompts once, also for backward.

    Args:
        model: with TRL's fused LM head.
        ids: prompts, left-padded, and behind them completions, right-padded: int64 [B, P + C].
        mask: 1 on tokens, 0 on padding; [B, P + C].
        completion_length: C.

    Returns:
        As the fused LM head on the whole batch, but of the completions only: `log_probs` [B, C], ...
    """
    prompt = ids.shape[1] - completion_length
    cache, logits = read_prompts(model, ids[:, :prompt], mask[:, :prompt])
    # From the prompt's last token on: it predicts the completion's first.
    labels = ids.masked_fill(mask == 0, -100)[:, prompt - 1 :]
    labels[:, 0] = -100
    outputs = model(
        input_ids=ids[:, prompt - 1 :],
        attention_mask=mask,
        position_ids=positions(mask)[:, prompt - 1 :],
        past_key_values=cache,
        labels=labels,
        fused_lm_head=True,
    )
    # LongAct takes its statistics in backward, which would pass by the queries of the prompt in the last layer.
    outputs.log_probs = outputs.log_probs + 0 * logits.sum()
    return outputs


def read_prompts(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """Reads all but the last token of left-padded prompts [B, P], equal prompts once.

    Returns:
        The keys and values, of B sequences, and the logits that came last, one row a distinct prompt (empty for P = 1).
    """
    cache = DynamicCache(config=model.config)
    logits = torch.zeros(0, device=ids.device)
    if ids.shape[1] > 1:
        distinct, row = torch.unique(torch.stack([ids, mask], dim=-1), dim=0, return_inverse=True)
        mask = distinct[:, :-1, 1]
        logits = model(
            input_ids=distinct[:, :-1, 0],
            attention_mask=mask,
            position_ids=positions(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        cache.batch_select_indices(row)
    return cache, logits


def positions(mask: Tensor) -> Tensor:
    """Each token's place in its sequence, padding not counted."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def trim(completion: list[int], eos_token_id: int | list[int]) -> list[int]:
    """Cuts a completion after its first end-of-sequence token."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    first = next((i for i, token in enumerate(completion) if token in ends), len(completion))
    return completion[: first + 1]
