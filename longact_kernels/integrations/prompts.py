"""Prompts as a model reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
