"""Prompts as a model reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]


def message_text(message: dict) -> str:
    """The text of a chat message, whose content is a string, a list of parts of which some are text, or nothing."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)


def question_of(prompt: Prompt) -> str:
    """The last line of the user's last turn, which in every task is the question; of any turn if the user has none."""
    if not isinstance(prompt, str):
        turns = [message for message in prompt if message.get("role") == "user"] or prompt
        prompt = message_text(turns[-1]) if turns else ""
    return prompt.strip().rpartition("\n")[2]


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
