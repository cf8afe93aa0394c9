"""LongBench v2 as its authors score it: an answer is generated, and "The correct answer is (X)" extracted from it.

lm-eval's own task, `longbench2`, compares the likelihoods of the four letters. This one, `longbench2_generate`, is a
task for lm-eval with the prompt, the truncation in the middle and the extraction of arXiv 2412.15204
(github.com/THUDM/LongBench), but greedy, where the authors sample at a temperature of 0.1.
"""

import re

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

DATASET = "THUDM/LongBench-v2"
ANSWER_TOKENS = 128
PROMPT = """Please read the following text and answer the question below.

<text>
{context}
</text>

What is the correct answer to this question: {question}
Choices:
(A) {choice_A}
(B) {choice_B}
(C) {choice_C}
(D) {choice_D}

Format your response as follows: "The correct answer is (insert answer here)"."""


def generated_task(name: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
    """The task's configuration for lm-eval.

    Args:
        name: of the task.
        tokenizer: of the model.
        max_length: tokens that the model reads; longer prompts lose their middle.
    """
    room = max_length - ANSWER_TOKENS
    if tokenizer.chat_template:
        empty = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
        )
        room -= len(tokenizer.encode(empty))

    def documents(**metadata) -> dict[str, Dataset]:
        rows = load_dataset(DATASET, split="train")
        prompts = [{"prompt": cut(tokenizer, PROMPT.format(**row), room), "answer": row["answer"]} for row in rows]
        return {"test": Dataset.from_list(prompts)}

    return {
        "task": name,
        "custom_dataset": documents,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "process_results": lambda document, answers: {"acc": float(extract(answers[0]) == document["answer"])},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"do_sample": False, "max_gen_toks": ANSWER_TOKENS, "until": []},
    }


def cut(tokenizer: PreTrainedTokenizerBase, prompt: str, room: int) -> str:
    """A prompt of at most `room` tokens; what is too long loses its middle."""
    ids = tokenizer.encode(prompt)
    if len(ids) <= room:
        return prompt
    return tokenizer.decode(ids[: room // 2] + ids[-(room // 2) :], skip_special_tokens=True)


def extract(answer: str) -> str | None:
    """The letter that an answer names, as LongBench v2 reads it."""
    plain = answer.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", plain) or re.search(r"The correct answer is ([A-D])", plain)
    return found.group(1) if found else None
