"""Associative recall: a small model that half knows it, and prompts to go on with.

A prompt lists pairs, each a key and the value that belongs to it, and ends with one of the keys; the answer is its
value: `k07 v31 v02 k55 v18 v40 ... ? k07` → `v31 v02`. What finds the value are the attention's queries and keys.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ("<pad>", "<eos>", "?")
PAD, EOS, ASK = range(3)
VALUES = 64
FIRST_KEY = len(SPECIAL)
FEWEST_PAIRS = 4
CHECK_EVERY = 10
CHECKED_ON = 512
PRETRAINING, CHECKING, DATA = range(3)  # each has random numbers of its own


@dataclass(frozen=True)
class Recall:
    """The task, the model and its pretraining.

    Attributes:
        pairs: in a prompt.
        keys: that there are, at least as many as pairs.
        value_tokens: of a value.
        layers, hidden_size, heads, key_value_heads, head_dim: of the model, a Qwen3.
        stop_at: greedy accuracy on prompts of `pairs` at which pretraining ends.
        learning_rate, batch_size, most_steps: of pretraining.
        prompts: to train on and to hold out.

    Raises:
        ValueError: one is out of range.
    """

    pairs: int = 32
    keys: int = 64
    value_tokens: int = 2
    layers: int = 2
    hidden_size: int = 64
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 16
    stop_at: float = 0.5
    learning_rate: float = 5e-3
    batch_size: int = 64
    most_steps: int = 3000
    prompts: int = 4096

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"base: got {name} {value}, needed more than 0")
        if not FEWEST_PAIRS <= self.pairs <= self.keys:
            raise ValueError(
                f"base: got pairs {self.pairs}, needed {FEWEST_PAIRS} to {self.keys}, the number of keys; for longer "
                "prompts raise keys"
            )
        if self.stop_at >= 1:
            raise ValueError(f"base: got stop_at {self.stop_at}, needed an accuracy below 1")

    @property
    def first_value(self) -> int:
        return FIRST_KEY + self.keys

    @property
    def prompt_tokens(self) -> int:
        return self.pairs * (1 + self.value_tokens) + 2


def make_base(folder: Path, recall: Recall, seed: int) -> None:
    """Writes a pretrained model, `folder/model`, and prompts with their answers, `folder/data.jsonl`.

    The folder appears whole, when all is done.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model, log = pretrain(recall, seed)
    words = tokenizer(recall)
    model.save_pretrained(unfinished / "model")
    words.save_pretrained(unfinished / "model")
    (unfinished / "pretraining.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    ids = sequences(recall, recall.prompts, recall.pairs, 1, generator_of(seed, DATA))
    texts = ([words.decode(part) for part in row.split([recall.prompt_tokens, recall.value_tokens])] for row in ids)
    rows = (json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in texts)
    (unfinished / "data.jsonl").write_text("".join(rows))
    unfinished.rename(folder)


def tokenizer(recall: Recall) -> PreTrainedTokenizerFast:
    """One token a word."""
    words = [*SPECIAL, *(f"k{i:02}" for i in range(recall.keys)), *(f"v{i:02}" for i in range(VALUES))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, eos, _ = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=eos, padding_side="left")


def small_qwen3(recall: Recall, seed: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=recall.first_value + VALUES,
        hidden_size=recall.hidden_size,
        intermediate_size=2 * recall.hidden_size,
        num_hidden_layers=recall.layers,
        num_attention_heads=recall.heads,
        num_key_value_heads=recall.key_value_heads,
        head_dim=recall.head_dim,
        max_position_embeddings=max(1024, recall.prompt_tokens + recall.value_tokens),
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def generator_of(seed: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(3 * seed + purpose)


def sequences(recall: Recall, rows: int, pairs: int, asked: int, generator: torch.Generator) -> Tensor:
    """Pairs with distinct keys, then some of them `asked` for, each with its answer; int64 [rows, tokens]."""
    keys = torch.rand(rows, recall.keys, generator=generator).argsort(1)[:, :pairs, None] + FIRST_KEY
    first = recall.first_value
    values = torch.randint(first, first + VALUES, (rows, pairs, recall.value_tokens), generator=generator)
    known = torch.cat([keys, values], 2)
    which = torch.rand(rows, pairs, generator=generator).argsort(1)[:, :asked, None]
    questions = F.pad(known.take_along_dim(which, 1), (1, 0), value=ASK)
    return torch.cat([known.flatten(1), questions.flatten(1)], 1)


def pretrain(recall: Recall, seed: int) -> tuple[Qwen3ForCausalLM, list[dict]]:
    """A model trained on the task's own sequences, to predict the answers, until it answers the share `stop_at`.

    It begins with few pairs, and gets more whenever it answers those.

    Returns:
        The model, and what was seen: records of `step`, `pairs` and greedy `accuracy` on prompts of the full size.

    Raises:
        ValueError: it does not get there.
    """
    model = small_qwen3(recall, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recall.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    data = generator_of(seed, PRETRAINING)
    checked = sequences(recall, CHECKED_ON, recall.pairs, 1, generator_of(seed, CHECKING))
    most, known, log = FEWEST_PAIRS, 0.0, []
    for step in range(1, recall.most_steps + 1):
        pairs = int(torch.randint(2, most + 1, (), generator=data))
        ids = sequences(recall, recall.batch_size, pairs, min(pairs, 16), data)
        place = torch.arange(ids.shape[1]) - pairs * (1 + recall.value_tokens)
        answers = (place >= 0) & (place % (2 + recall.value_tokens) >= 2)
        logits = model(ids).logits[:, :-1][:, answers[1:]]
        F.cross_entropy(logits.flatten(0, 1), ids[:, answers].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = recall.learning_rate * min(1, step / 50)
        optimizer.step()
        optimizer.zero_grad()
        known = 0.9 * known + 0.1 * (logits.argmax(-1) == ids[:, answers]).float().mean().item()
        if known > 0.85 and most < recall.pairs:
            most, known = min(most + max(4, recall.pairs // 8), recall.pairs), 0.5
        # Long before it has seen such prompts, it cannot answer them, and asking takes more time than a step.
        due = step % CHECK_EVERY == 0 and 2 * most >= recall.pairs
        if due or step == recall.most_steps:
            log.append({"step": step, "pairs": most, "accuracy": accuracy(model, checked, recall.value_tokens)})
            if log[-1]["accuracy"] >= recall.stop_at:
                return model, log
    raise ValueError(
        f"base: accuracy {log[-1]['accuracy']:.3f} after most_steps {recall.most_steps}, needed stop_at "
        f"{recall.stop_at}; take a larger model, fewer pairs, more steps, or another seed"
    )


@torch.no_grad()
def accuracy(model: Qwen3ForCausalLM, ids: Tensor, value_tokens: int) -> float:
    """The share of sequences whose last tokens, the answer, the model would choose itself."""
    chosen = model(ids).logits[:, -value_tokens - 1 : -1].argmax(-1)
    return (chosen == ids[:, -value_tokens:]).all(1).float().mean().item()
