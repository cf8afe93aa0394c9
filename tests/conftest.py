"""What all tests share: settings, a model of each architecture, a command line that is refused, no network."""

import os
import random
from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import settings
from models import tiny_model

# The models are tiny: threads would only wait for one another.
torch.set_num_threads(1)

# By default a GPU's library may add 16-bit products up in 16 bits; tests hold ours to sums in fp32.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

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
        capsys.readouterr()  # What the test's own preparations said, such as a progress bar.
        assert main([command, *map(str, words)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"longact {command}: error: "), lines
        return lines[0]

    return run
