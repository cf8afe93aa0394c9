"""Generation that reads every distinct prompt once, against transformers' own."""

import pytest
import tiny
import torch
from transformers import GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from longact_kernels import LongAct
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


# Two prompts, one three times and one padded on the left; completions, one padded on the right.
PROMPTS = torch.tensor([[5, 9, 7, 20, 33], [0, 0, 0, 40, 41], [5, 9, 7, 20, 33], [5, 9, 7, 20, 33]])
COMPLETIONS = torch.tensor([[7, 8, 1], [9, 1, 0], [7, 8, 9], [50, 51, 1]])
IDS = torch.cat([PROMPTS, COMPLETIONS], dim=1)
MASK = (IDS != 0).long()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_and_gradients_are_those_of_the_padded_batch(attention):
    weight = torch.randn(COMPLETIONS.shape, generator=torch.Generator().manual_seed(0)) * MASK[:, 5:]

    def run(shared):
        model = tiny.model()
        model.set_attn_implementation(attention)
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        if shared:
            out = score(model, IDS, MASK, 3)
        else:
            labels = IDS.masked_fill(MASK == 0, -100)
            labels[:, :5] = -100
            out = model(input_ids=IDS, attention_mask=MASK, labels=labels, fused_lm_head=True)
        log_probs, entropy = out.log_probs[:, -3:], out.entropy[:, -3:]
        (log_probs * weight).sum().backward()
        return log_probs * MASK[:, 5:], entropy * MASK[:, 5:], {n: p.grad for n, p in model.named_parameters()}

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_statistics_cover_every_token_and_no_padding():
    model = tiny.model().train()
    longact = LongAct(model)
    add_fused_lm_head(model)
    score(model, IDS, MASK, 3).log_probs.sum().backward()
    longact.refresh()

    plain = tiny.model()
    seen = {}
    for name in longact.layers:
        plain.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        plain(input_ids=IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0))
    padding_shows = False
    for name, out in seen.items():
        magnitude = out.abs().masked_fill(MASK.unsqueeze(-1) == 0, 0)
        torch.testing.assert_close(longact.saliency(name), magnitude.amax((0, 1)))
        padding_shows |= bool((out.abs() > magnitude.amax((0, 1))).any())
    assert padding_shows
