"""Generation that reads every distinct prompt once, against transformers' own."""

import pytest
import tiny
import torch
from transformers import GenerationConfig

from longact_kernels.integrations.generation import generate

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
