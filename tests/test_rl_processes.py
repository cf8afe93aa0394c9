"""`longact train` in two processes, and generation by a model that is sharded over two."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, GenerationConfig

from longact_kernels.cli import main
from longact_kernels.integrations.generation import generate

OPTIONS = """--length 420 --train_prompts 8 --eval_prompts 3 --per_device_train_batch_size 8 --num_generations 4
    --max_completion_length 6 --save_steps 1 --learning_rate 1e-3 --use_cpu true"""


def arguments(place, name, *more):
    return ["train", "--model", place / "model", "--output_dir", place / name, *OPTIONS.split(), *more]


def in_two_processes(place, name, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return subprocess.run(
        [*map(str, [*command, "longact_kernels.cli", *arguments(place, name, *more)])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    tiny.save(root / "model")
    return root


@pytest.fixture(scope="module")
def done(place):
    return in_two_processes(place, "two", "--max_steps", 2)


def steps(place):
    return [json.loads(line)["step"] for line in (place / "two" / "metrics.jsonl").read_text().splitlines()]


def test_one_process_writes_for_all(place, done):
    assert done.returncode == 0, done.stderr
    assert steps(place) == [1, 2]
    for line in ("held-out accuracy before", "step 2/2", "held-out accuracy after", "report.html"):
        assert done.stdout.count(line) == 1, done.stdout
    assert AutoModelForCausalLM.from_pretrained(place / "two" / "model").num_parameters() > 0


def test_they_share_the_held_out_prompts_out(place, done, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([*map(str, arguments(place, "one", "--max_steps", 1))]) == 0
    alone, shared = (json.loads((place / name / "accuracy_before.json").read_text()) for name in ("one", "two"))
    assert shared == alone and len(shared["completions"]) == 3


def test_they_go_on_together(place, done):
    resumed = in_two_processes(place, "two", "--max_steps", 3, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert steps(place) == [1, 2, 3]
    assert "accuracy before" not in resumed.stdout


def test_bad_input_is_said_once(place):
    refused = in_two_processes(place, "bad", "--density", "2")
    assert refused.stderr.count("longact train: error: density: got 2.0") == 1


PROMPTS = [[5, 9, 7, 20, 33], [8], [40, 41, 42], [5, 9, 7]]
# The tokens that end a completion: those of the four have different lengths.
CONFIG = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=[1, *range(2, 60)])


def _rank(rank, file, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = tiny.model().eval()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    torch.save(generate(model, PROMPTS[rank::2], CONFIG), folder / str(rank))
    torch.distributed.destroy_process_group()


def test_processes_of_a_sharded_model_generate_to_the_end_of_the_last(tmp_path):
    wanted = [generate(tiny.model().eval(), [prompt], CONFIG)[0] for prompt in PROMPTS]
    assert max(map(len, wanted[::2])) != max(map(len, wanted[1::2])), "both would end together anyway"
    torch.multiprocessing.spawn(_rank, (tmp_path / "rendezvous", tmp_path), nprocs=2)
    for rank in (0, 1):
        assert torch.load(tmp_path / str(rank)) == wanted[rank::2]
