"""`longact train` in two processes, and generation by a model that is sharded over two."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, GenerationConfig

from longact_kernels.cli import main
from longact_kernels.commands.console import Failure
from longact_kernels.commands.train import callbacks, folder
from longact_kernels.commands.train.callbacks import MetricsFile
from longact_kernels.integrations.generation import generate

OPTIONS = """--length 420 --train_prompts 8 --eval_prompts 3 --per_device_train_batch_size 8 --num_generations 4
    --max_completion_length 6 --max_steps 3 --save_steps 1 --learning_rate 1e-3 --use_cpu true"""
FSDP = """
fsdp: true
fsdp_config: {transformer_layer_cls_to_wrap: LlamaDecoderLayer, activation_checkpointing: true}
gradient_checkpointing: false
"""
# accelerate leaves FSDP out on CPUs, where it works as well: processes that look like those of GPUs get it.
AS_ON_GPUS = """
import sys
from accelerate.state import DistributedType, PartialState
init = PartialState.__init__

def init_as_on_gpus(self, *args, **kwargs):
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = init_as_on_gpus
from longact_kernels.cli import main
sys.exit(main(sys.argv[1:]))
"""


def arguments(place, name, *more):
    return ["train", "--model", place / "model", "--output_dir", place / name, *OPTIONS.split(), *more]


def in_two_processes(place, kind, name, *more, program=("-m", "longact_kernels.cli")):
    program = program if kind == "ddp" else [place / "as_on_gpus.py"]
    options = [] if kind == "ddp" else ["--config", place / "fsdp.yaml"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*map(str, [*launcher, *program, *arguments(place, name, *options, *more)])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def place(tmp_path):
    tiny.save(tmp_path / "model")
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    (tmp_path / "as_on_gpus.py").write_text(AS_ON_GPUS)
    return tmp_path


def weights(place, name):
    model = AutoModelForCausalLM.from_pretrained(place / name / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    return model.state_dict()


# One test: its runs take long, and pytest-xdist would have each worker do them.
@pytest.mark.slow
def test_two_processes_are_one_run(place, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([*map(str, arguments(place, "alone", "--max_steps", 1))]) == 0
    alone = json.loads((place / "alone" / "accuracy_before.json").read_text())
    assert len(alone["completions"]) == 3
    trained = {}
    for kind in ("ddp", "fsdp"):
        done = in_two_processes(place, kind, kind)
        assert done.returncode == 0, done.stderr
        for line in ("held-out accuracy before", "step 3/3", "held-out accuracy after", "report.html"):
            assert done.stdout.count(line) == 1, done.stdout
        steps = [json.loads(line)["step"] for line in (place / kind / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3]
        # The processes have shared the held-out prompts out.
        assert json.loads((place / kind / "accuracy_before.json").read_text()) == alone
        trained[kind] = weights(place, kind)

        shutil.rmtree(place / kind / "checkpoint-3")
        shutil.rmtree(place / kind / "model")
        resumed = in_two_processes(place, kind, kind, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert "accuracy before" not in resumed.stdout and "step 3/3" in resumed.stdout
        for name, weight in weights(place, kind).items():
            assert torch.equal(weight, trained[kind][name]), name
    start = tiny.model().state_dict()
    assert any(not torch.equal(weight, start[name].to(weight)) for name, weight in trained["fsdp"].items())
    for name, weight in trained["fsdp"].items():
        torch.testing.assert_close(weight, trained["ddp"][name], rtol=2**-7, atol=1e-5)


def test_bad_input_is_said_once(place):
    refused = in_two_processes(place, "ddp", "bad", "--density", "2")
    assert refused.stderr.count("longact train: error: density: got 2.0") == 1


DELETES_ITS_LOCK = """
import sys
from pathlib import Path
from longact_kernels.cli import main
from longact_kernels.commands.train import callbacks, folder
from longact_kernels.commands.train.callbacks import MetricsFile

lock = Path(sys.argv[sys.argv.index("--output_dir") + 1]) / ".lock"
MetricsFile.on_optimizer_step = lambda self, args, state, control, **_: (
    lock.unlink(missing_ok=True) if state.global_step else None
)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_all_processes_stop_where_the_lock_was_deleted(place):
    (place / "deletes.py").write_text(DELETES_ITS_LOCK)
    stopped = in_two_processes(place, "ddp", "run", program=[place / "deletes.py"])
    said = [line for line in stopped.stderr.splitlines() if line.startswith("longact train: error: ")]
    assert len(said) == 1 and ".lock has been deleted" in said[0], stopped.stderr
    assert "[rank" not in stopped.stderr  # no other process's traceback
    assert "step 1/3" in stopped.stdout and "step 2/3" not in stopped.stdout
    assert (place / "run" / "checkpoint-1").exists() and not (place / "run" / "checkpoint-2").exists()


@pytest.mark.parametrize(
    "error", [Failure("gone"), ValueError("bad"), OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")]
)
def test_what_goes_wrong_in_the_first_process_goes_wrong_in_all(tmp_path, monkeypatch, error):
    sent = []

    def line(*_):
        raise error

    monkeypatch.setattr(callbacks, "append_line", line)
    log = SimpleNamespace(path=tmp_path, record=lambda *_: {})
    step = partial(MetricsFile.on_log, log, None, SimpleNamespace(global_step=1), None, logs={"loss": 1.0})
    monkeypatch.setattr(folder, "broadcast_object_list", lambda found: sent.append(pickle.dumps(found)) or found)
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        step()
    # Another process, which gets what the first one has sent.
    monkeypatch.setattr(folder, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(folder, "broadcast_object_list", lambda found: pickle.loads(sent[0]))
    with pytest.raises(type(error)) as raised:
        step()
    assert str(raised.value) == str(error)


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
