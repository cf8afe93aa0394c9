"""`accelerate launch … longact train` with the repository's configs, on two processes against one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
OPTIONS = """--eval_prompts 1 --num_generations 4 --max_completion_length 8
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
    # Which of its prompt's completions it is, in whatever process.
    for i, ids in enumerate(prompt_ids, self.accelerator.process_index * len(prompt_ids)):
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


def run(place, name, processes, output, *more):
    """Runs it, and gives what it printed."""
    config = ["--config_file", CONFIGS / f"{name}.yaml", "--num_processes", processes]
    shards = name == "fsdp2" and "--resume" in more  # which one process loads under FSDP alone
    launch = ["-m", "accelerate.commands.launch", *config] if processes > 1 or shards else []
    words = [sys.executable, *launch, "fixed.py", name, "train", "--model", "model", "--output_dir", output]
    words += ["--dataset", "rows.jsonl", *OPTIONS.split(), "--model_init_kwargs", '{"dtype": "float32"}', *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, words)], cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def result(folder):
    """The trained weights, and what was logged of each step."""
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).state_dict(), logs


def train(place, name, processes):
    more = ["--max_steps", 3, "--save_strategy", "no", "--per_device_train_batch_size", 8 // processes]
    run(place, name, processes, f"{name}{processes}", *more)
    return result(place / f"{name}{processes}")


def assert_same(found, expected):
    for key in ("reward", "reward_std", "grad_norm", "churn"):
        columns = [[log[key] for log in logs if key in log] for _, logs in (expected, found)]
        assert len(columns[0]) >= 2 and columns[1] == pytest.approx(columns[0], rel=1e-4), key
    for name, weight in expected[0].items():
        torch.testing.assert_close(found[0][name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_of_accelerate_are_one(place, name):
    one, two = train(place, name, 1), train(place, name, 2)
    start = tiny.model().state_dict()
    assert max((weight - start[name]).abs().max() for name, weight in one[0].items()) > 1e-3
    assert min(log["grad_norm"] for log in one[1]) > 1e-3 and min(log["reward_std"] for log in one[1]) > 0
    assert_same(two, one)


# Shares that stay in parts, and one that shrinks; completions that two steps are on.
PARTS = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2]
TWO = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
WHOLE = ["--per_device_train_batch_size", 8, "--num_iterations", 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "before", "after", "options", "shares"),
    [
        ("ddp", 1, 2, PARTS, "4, 1"),
        ("ddp", 2, 1, TWO, "2, 4"),
        ("ddp", 1, 2, WHOLE, "4, 1"),
        ("fsdp2", 2, 4, TWO, "2, 1"),
        ("fsdp2", 2, 1, TWO, "2, 4"),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(place, kind, before, after, options, shares):
    options = [*options, "--save_steps", 2, "--max_steps", 4, "--refresh_every", 3]
    run(place, kind, before, "whole", *options)
    shutil.copytree(place / "whole", place / "resumed")
    for path in ("checkpoint-4", "model"):
        shutil.rmtree(place / "resumed" / path)
    said = " ".join(run(place, kind, after, "resumed", *options, "--resume").split())
    assert f"going on with processes {after} instead of {before}: a step takes 8 completions as before" in said
    size, steps = shares.split(", ")
    assert f"(per_device_train_batch_size {size}, gradient_accumulation_steps {steps})" in said
    assert_same(result(place / "resumed"), result(place / "whole"))
    changes = json.loads((place / "resumed" / "run.json").read_text())["changes"]
    assert changes == [{"option": "processes", "from": before, "to": after, "step": 2}]
