"""`accelerate launch … longact train` with the repository's configs, on two processes against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
OPTIONS = """--eval_prompts 1 --num_generations 4 --max_completion_length 8 --max_steps 3 --save_strategy no
    --learning_rate 1e-3 --adam_epsilon 1e-3 --lr_scheduler_type constant --use_cpu true --bf16 false
    --reward fixed:share_of_letters --dynamic_sampling_rounds 0 --gradient_checkpointing false"""
# Sampling that depends on the prompt and the completion's number alone, and a reward that differs among completions.
FIXED = """
import sys
import zlib
import torch
from accelerate.state import DistributedType, PartialState
from longact_kernels.commands.train.trainer import DriverTrainer

def share_of_letters(completions, **_):
    return [sum("a" <= c <= "z" for c in text) / 8 for text in completions]

def completions(self, prompt_ids, *args, **kwargs):
    drawn = []
    for i, ids in enumerate(prompt_ids):
        generator = torch.Generator().manual_seed(zlib.crc32(repr((ids, i % 4)).encode()))
        drawn.append(torch.randint(2, 250, (4 + i % 4,), generator=generator).tolist() + [1])
    return drawn, None

DriverTrainer._generate_single_turn = completions
init = PartialState.__init__

def init_as_on_gpus(self, *args, **kwargs):  # accelerate leaves FSDP out on CPUs, where it works as well
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

if __name__ == "__main__":
    if sys.argv.pop(1) == "fsdp2":
        PartialState.__init__ = init_as_on_gpus
    from longact_kernels.cli import main
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"a prompt of its own, {i}", "answer": "none"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "fixed.py").write_text(FIXED)
    return tmp_path


def train(place, name, processes):
    """The trained weights, and what was logged of each step."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{name}.yaml", "--num_processes", "2"]
    words = [sys.executable, *(launch if processes == 2 else []), "fixed.py", name, "train", "--model", "model"]
    words += ["--output_dir", f"{name}{processes}", "--dataset", "rows.jsonl", *OPTIONS.split()]
    words += ["--per_device_train_batch_size", 8 // processes, "--model_init_kwargs", '{"dtype": "float32"}']
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, words)], cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    folder = place / f"{name}{processes}"
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).state_dict(), logs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_of_accelerate_are_one(place, name):
    one, one_logs = train(place, name, 1)
    two, two_logs = train(place, name, 2)
    start = tiny.model().state_dict()
    moved = max((weight - start[name]).abs().max() for name, weight in one.items())
    assert moved > 1e-3
    for key in ("reward", "reward_std", "grad_norm", "churn"):
        columns = [[log[key] for log in logs if key in log] for logs in (one_logs, two_logs)]
        assert len(columns[0]) >= 2 and columns[1] == pytest.approx(columns[0], rel=1e-4), key
    assert min(log["grad_norm"] for log in one_logs) > 1e-3 and min(log["reward_std"] for log in one_logs) > 0
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
