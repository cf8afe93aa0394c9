"""Generation by transformers, with every distinct prompt read once."""

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], **template_kwargs) -> list[list[int]]:
    """Token ids of prompts as the model reads them: plain texts, or lists of chat messages.

    Where the last message is the assistant's, it is the beginning of the answer, and generation continues it.
    """
    if isinstance(prompts[0], str):
        return tokenizer(prompts)["input_ids"]
    begun = prompts[0][-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=not begun,
        continue_final_message=begun,
        return_dict=True,
        **template_kwargs,
    )["input_ids"]


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """Generates one completion for each prompt, reading equal prompts once.

    The same tokens as `model.generate` on the left-padded batch. A group of G completions shares its prompt, so this
    reads 1/G of what that call reads: with long prompts, most of the time of a rollout.

    Args:
        model: leaves its training flag as it is; set `eval()` before where dropout matters.
        prompts: token ids; equal prompts share one reading.
        config: `pad_token_id` and `eos_token_id` must be set.

    Returns:
        Token ids of the completions, each up to and with its first end-of-sequence token.
    """
    distinct = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    length = max(map(len, distinct))
    ids = torch.full((len(distinct), length), config.pad_token_id, device=model.device)
    mask = torch.zeros_like(ids)
    for prompt, i in distinct.items():
        ids[i, length - len(prompt) :] = torch.tensor(prompt)
        mask[i, length - len(prompt) :] = 1

    # All tokens but the last, which `generate` needs for itself.
    cache = DynamicCache(config=model.config)
    if length > 1:
        model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask[:, :-1].cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    row = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=model.device)
    cache.batch_select_indices(row)
    out = model.generate(input_ids=ids[row], attention_mask=mask[row], past_key_values=cache, generation_config=config)[
        :, length:
    ]
    return [trim(completion, config.eos_token_id) for completion in out.tolist()]


def trim(completion: list[int], eos_token_id: int | list[int]) -> list[int]:
    """Cuts a completion after its first end-of-sequence token."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    first = next((i for i, token in enumerate(completion) if token in ends), len(completion))
    return completion[: first + 1]
