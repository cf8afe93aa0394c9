"""What many tests share: tiny random models, a command line that is refused, the lack of a network."""

import os
import random
from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import settings

# The models are tiny: threads would only wait for one another.
torch.set_num_threads(1)

# The same numbers at every run: a failure is one that anybody can repeat. Another seed asks whether they were lucky;
# hypothesis then draws anew too (`--hypothesis-seed` repeats its examples).
SEED = int(os.environ.get("LONGACT_TEST_SEED", "0"))
settings.register_profile("repeatable", derandomize=SEED == 0, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whichever tests ran before it."""
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)


SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def tiny_model(family: str = "Llama", **changes) -> torch.nn.Module:
    """A randomly initialised causal LM in training mode, the same one at every call; heads of 10 channels."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{**SHAPE, "head_dim": 10, "attn_implementation": "eager", **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        # Biases start at zero, where a mistake in them would not show.
        torch.nn.init.normal_(p, std=0.2)
    return model.train()


@pytest.fixture(params=["Llama", "Qwen2", "Qwen3"])
def model(request):
    """A tiny model of each architecture: plain, with q/k bias, with q/k norm."""
    return tiny_model(request.param)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs `longact` with words that it has to refuse, and returns the one line that it says."""
    from longact_kernels.cli import main

    def run(command: str, *words) -> str:
        assert main([command, *map(str, words)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"longact {command}: error: "), lines
        return lines[0]

    return run


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def backward(model: torch.nn.Module, ids: torch.Tensor, **inputs) -> torch.Tensor:
    """One forward and backward; the loss is a sum, so that gradients of micro-batches add up to the batch's."""
    logits = model(input_ids=ids, **inputs).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    return loss.detach()
