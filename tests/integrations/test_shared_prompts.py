"""Shared prompts in TRL's trainer, against TRL's own generation and scores."""

import pytest
import tiny
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from longact_kernels import LongAct
from longact_kernels.integrations.shared_prompts import SharedPromptsMixin
from longact_kernels.integrations.trl import LongActGRPOTrainer

GROUP = 4


class Sharing(SharedPromptsMixin, GRPOTrainer):
    pass


class SharingWithLongAct(SharedPromptsMixin, LongActGRPOTrainer):
    pass


def trainer(kind, folder, model=None, **options):
    return kind(
        model=model or tiny.model(),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2 * GROUP,
            num_generations=GROUP,
            max_completion_length=6,
            temperature=1e-4,  # greedy: the same completions whatever the random numbers
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_steps=1,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a prompt", "another, longer one"] * 8}),
        processing_class=tiny.tokenizer(chat=False),
        **options,
    )


def tokens_read(model):
    """The tokens of every forward, as they are read."""
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return read


def test_completions_and_scores_are_those_of_trl_with_less_read(tmp_path):
    found = []
    for kind in (GRPOTrainer, Sharing):
        made = trainer(kind, tmp_path)
        read = tokens_read(made.model)
        prompts = ("a prompt of some length", "another prompt, and a longer one")
        batch = made._generate_and_score_completions([{"prompt": one} for one in prompts for _ in range(GROUP)])
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["completion_ids"].shape[1]
        scores, *_ = made._get_per_token_logps_and_entropies(made.model, ids, mask, width)
        found.append((ids, scores.masked_fill(batch["completion_mask"] == 0, 0), sum(read)))
    (ids, scores, read), (ours, our_scores, our_read) = found
    assert torch.equal(ours, ids)
    torch.testing.assert_close(our_scores, scores, rtol=1e-4, atol=1e-4)
    assert our_read < read / 2


@pytest.mark.parametrize("share_scoring", [True, False])
def test_the_statistic_over_sequences_can_keep_its_own_prompts(tmp_path, share_scoring):
    model = tiny.model()
    made = trainer(SharingWithLongAct, tmp_path, model, longact=LongAct(model), share_scoring=share_scoring)
    rows = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, out: rows.append(len(out)) if torch.is_grad_enabled() else None
    )
    made.train()
    # Two distinct prompts and then eight completions, or eight whole sequences.
    assert rows == ([2, 2 * GROUP] if share_scoring else [2 * GROUP])
