"""Generation that reads every distinct prompt once, against transformers' own."""

import pytest
import tiny
import torch
from transformers import GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from longact_kernels.integrations.generation import generate, score

EOS = 1


def reference(model, prompt, config):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()
    return out[: out.index(EOS) + 1] if EOS in out else out


@pytest.mark.parametrize("prompts", [[[5, 9, 7]], [[5, 9, 7, 20, 33], [8], [5, 9, 7, 20, 33], [40, 41, 42]]])
def test_the_tokens_are_those_of_each_prompt_alone(prompts):
    model = tiny.model().eval()
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=EOS)
    assert generate(model, prompts, config) == [reference(model, prompt, config) for prompt in prompts]


def test_a_completion_ends_with_its_first_end_of_sequence():
    model = tiny.model().eval()
    free = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=EOS)
    (first,) = generate(model, [[5, 9, 7]], free)
    ending = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=[EOS, first[2]])
    (ended,) = generate(model, [[5, 9, 7]], ending)
    assert ended == first[: first.index(first[2]) + 1]


def test_equal_prompts_are_sampled_independently():
    torch.manual_seed(0)
    config = GenerationConfig(max_new_tokens=8, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=EOS)
    assert len(set(map(tuple, generate(tiny.model().eval(), [[5, 9]] * 6, config)))) == 6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_and_gradients_are_those_of_the_padded_batch(attention):
    pad, long = [0] * 3, [5, 9, 7, 20, 33]
    short = [*pad, 40, 41]
    completions = torch.tensor([[7, 8, 1], [9, 1, 0], [7, 8, 9], [50, 51, 1]])
    prompts = torch.tensor([long, short, long, long])
    ids = torch.cat([prompts, completions], dim=1)
    mask = (ids != 0).long()
    weight = torch.randn(completions.shape, generator=torch.Generator().manual_seed(0)) * mask[:, 5:]

    def run(shared):
        model = tiny.model()
        model.set_attn_implementation(attention)
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        if shared:
            out = score(model, ids, mask, 3)
        else:
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :5] = -100
            out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        log_probs, entropy = out.log_probs[:, -3:], out.entropy[:, -3:]
        (log_probs * weight).sum().backward()
        return log_probs * mask[:, 5:], entropy * mask[:, 5:], {n: p.grad for n, p in model.named_parameters()}

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
