"""Without the packages that are optional: what needs none of them works, and what does says what to install."""

import os
import subprocess
import sys

import pytest

# As if they were not installed: no finder knows them.
ABSENT = """
import sys
absent = set({names!r})

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *where):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, *where)

sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
"""
TRAINS = """
import torch
from longact_kernels import LongAct, SalientAdamW
model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8), "k_proj": torch.nn.Linear(8, 8)})
longact = LongAct(model, target_modules=lambda path, _: [(0, 8, 4)] if path.endswith("_proj") else None)
optimizer = SalientAdamW(model.parameters(), lr=1e-3)
for _ in range(2):
    optimizer.zero_grad()
    (model["q_proj"](torch.ones(4, 8)) * model["k_proj"](torch.ones(4, 8))).sum().backward()
    optimizer.step()
print("churn", longact.churn)
"""
COMMAND = "from longact_kernels.cli import main; sys.exit(main({words!r}))"


def without(names: list[str], code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ABSENT.format(names=names) + code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_library_needs_torch_alone():
    names = ["triton", "numba", "trl", "transformers", "accelerate", "datasets", "rich", "matplotlib", "yaml"]
    done = without(names, TRAINS)
    assert done.returncode == 0 and "churn" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("absent", "words", "message"),
    [
        ("trl", ["train"], "trl is not installed; run pip install 'transformers>="),
        pytest.param(
            "transformers",
            ["train"],
            "transformers is not installed; run pip install 'transformers>=",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "rich", ["train"], "rich is not installed; run pip install 'transformers>=", marks=pytest.mark.slow
        ),
        pytest.param(
            "accelerate",
            ["train"],
            "accelerate is not installed; run pip install 'transformers>=",
            marks=pytest.mark.slow,
        ),
        ("yaml", ["train"], "yaml is not installed; run pip install 'transformers>="),
        ("rich", ["kernels"], "rich is not installed; run pip install 'transformers>="),
        ("triton", ["kernels"], "triton is not installed; run pip install triton"),
        ("lm_eval", ["eval", "no-such-model"], "lm_eval is not installed; run pip install 'transformers>="),
        ("triton", ["train", "--model", "no-such/model", "--use_cpu", "true"], "could not load 'no-such/model'"),
        ("numba", ["train", "--model", "no-such/model", "--use_cpu", "true"], "could not load 'no-such/model'"),
    ],
)
def test_a_command_says_what_to_install(absent, words, message, tmp_path):
    where = ["--output_dir", str(tmp_path / "run")] if words[0] == "train" else []
    done = without([absent], COMMAND.format(words=words + where))
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith(f"longact {words[0]}: error: ") and message in lines[0]
