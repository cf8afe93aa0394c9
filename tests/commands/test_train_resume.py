"""A run that was stopped and goes on, against one that was never stopped."""

import json
import os
import shlex
import signal
import sys
import types

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from longact_kernels.commands.console import INTERRUPTED
from longact_kernels.commands.train import command
from longact_kernels.commands.train.arguments import parse
from longact_kernels.commands.train.resuming import changes_of, options_of

STEPS = 4
# 2 steps go once through the prompts: stops are in the first pass, at its end, and in the second.
STOPPED_IN = {"lagged compact": 3, "current full": 2, "16-bit dense": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"))


def arguments(folder, output, *more):
    options = {"model": folder, "output_dir": output, "max_steps": STEPS, "gradient_accumulation_steps": 2}
    options |= tiny.SHORT_RUN | {"eval_prompts": 3, "reward": "reward_of_this_test:reward"}
    return [str(word) for key, value in options.items() for word in (f"--{key}", value)] + list(more)


def rewarding(patch, stop_in_step=None):
    """Makes the reward 1 where most bytes are even: half of the time. SIGINT comes in a step if asked."""

    stopped = []

    def reward(completions, trainer_state=None, **_):
        # The evaluations have no state; a step that takes other prompts calls again.
        if trainer_state is not None and trainer_state.global_step + 1 == stop_in_step and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        texts = [completion[0]["content"] for completion in completions]
        return [float(sum(ord(c) % 2 == 0 for c in text) > len(text) / 2) for text in texts]

    patch.setitem(sys.modules, "reward_of_this_test", types.SimpleNamespace(reward=reward))


@pytest.fixture(scope="module", params=STOPPED_IN)
def runs(request, folder, tmp_path_factory):
    """Folders of a run that went through and of one that Ctrl-C stopped, and the second's output until then."""
    more = {
        "lagged compact": ["--state", "compact", "--refresh_every", "3"],
        "current full": ["--selection", "current", "--statistic", "l2"],
        "16-bit dense": ["--no-longact", "--moments", "bfloat16", "--stochastic_rounding"],
    }[request.param]
    step = STOPPED_IN[request.param]
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        rewarding(patch)
        assert command.main(arguments(folder, root / "whole", *more)) == 0
        rewarding(patch, step)
        printed = []
        patch.setattr("rich.console.Console.print", lambda self, *text, **_: printed.extend(map(str, text)))
        assert command.main(arguments(folder, root / "stopped", *more)) == INTERRUPTED
        rewarding(patch)
        shown = shlex.split(printed[-1])
        assert shown[:2] == ["longact", "train"]
        assert [path.name for path in (root / "stopped").glob("checkpoint-*")].count(f"checkpoint-{step}") == 1
        assert not (root / "stopped" / f"checkpoint-{step + 1}").exists()
        assert command.main(shown[2:]) == 0
    return root / "whole", root / "stopped"


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_optimizer_and_schedule_are_the_same_bit_for_bit(runs, name):
    whole, stopped = (torch.load(run / f"checkpoint-{STEPS}" / name, weights_only=True) for run in runs)
    assert_same(whole, stopped, name)


def test_the_optimizer_keeps_what_was_asked_for(runs):
    asked = json.loads((runs[0] / "run.json").read_text())
    states = torch.load(runs[0] / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"].values()
    assert {state["exp_avg"].dtype for state in states} == {getattr(torch, asked["moments"])}
    assert all(("master" in state) != asked["stochastic_rounding"] for state in states)


def test_the_random_states_are_the_same(runs):
    whole, stopped = (torch.load(run / f"checkpoint-{STEPS}" / "rng_state.pth", weights_only=False) for run in runs)
    assert_same(whole["cpu"], stopped["cpu"])
    assert whole["python"] == stopped["python"]


def test_the_weights_are_the_same_and_moved(runs, folder):
    whole, stopped = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert_same(whole, stopped)
    untrained = load_file(folder / "model.safetensors")
    assert whole.keys() == untrained.keys()
    assert any(not torch.equal(whole[name].float(), untrained[name].to(torch.bfloat16).float()) for name in whole)


def test_the_metrics_are_one_run_s(runs):
    def records(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [
            {k: v for k, v in line.items() if "seconds" not in k and "per_second" not in k and "time" not in k}
            for line in lines
        ]

    whole, stopped = map(records, runs)
    assert [record["step"] for record in whole] == list(range(1, STEPS + 1))
    assert whole == stopped
    # Among the steps are some that had to take other prompts.
    assert any(record["dynamic_sampling/replaced"] for record in whole)
    assert (runs[0] / "accuracy_before.json").read_text() == (runs[1] / "accuracy_before.json").read_text()


def test_the_model_is_an_ordinary_checkpoint(runs):
    for run in runs:
        model = AutoModelForCausalLM.from_pretrained(run / "model")
        assert type(model).__name__ == "LlamaForCausalLM"
        assert AutoTokenizer.from_pretrained(run / "model")("x")["input_ids"]
        for name in ("model", f"checkpoint-{STEPS}"):
            for path in (run / name).glob("*"):
                assert path.name in ("optimizer.pt", "run.json") or b"longact" not in path.read_bytes().lower(), path


def test_a_finished_run_resumes_to_the_same_report(runs, folder, monkeypatch):
    rewarding(monkeypatch)
    run = runs[0]
    kept = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "summary.json", "model/model.safetensors")}
    held = json.loads((run / "run.json").read_text())
    sets = ["--selection", held["selection"], "--statistic", held["statistic"]]
    sets += ["--refresh_every", str(held["refresh_every"])]
    more = ["--state", held["state"], *(sets if held["longact"] else ["--no-longact"])]
    more += ["--moments", held["moments"], "--stochastic_rounding", str(held["stochastic_rounding"])]
    assert command.main(arguments(folder, run, *more, "--resume")) == 0
    assert not (run / f"checkpoint-{STEPS + 1}").exists()
    assert kept == {name: (run / name).read_bytes() for name in kept}


def test_a_run_goes_on_where_there_is_no_gpu_and_nobody_said_use_cpu(tmp_path):
    arguments, training = parse(["--output_dir", str(tmp_path), "--max_steps", "2"])
    options = {**arguments.what_is_trained(), "processes": 1, "grpo_config": options_of(training)}
    assert changes_of({**options, "changes": []}, options, 1, tmp_path, 1) == []
