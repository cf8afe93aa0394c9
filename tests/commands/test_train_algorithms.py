"""The algorithms' presets: what they set, what overrules them, and that each trains, with and without LongAct."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console
from transformers import TrainerCallback
from trl import GRPOConfig

from longact_kernels.commands.train.algorithms import ALGORITHMS
from longact_kernels.commands.train.arguments import parse
from longact_kernels.commands.train.evaluate import Evaluation
from longact_kernels.commands.train.figures import draw
from longact_kernels.commands.train.report import headline, summarize
from longact_kernels.commands.train.run import Run

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model"))


class Losses(TrainerCallback):
    def __init__(self):
        self.records = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.records.append(dict(logs))


def value_of(name, arguments, training):
    return getattr(arguments if hasattr(arguments, name) else training, name)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_preset_is_what_a_run_starts_from(algorithm):
    parsed = parse(["--algorithm", algorithm, "--use_cpu", "True"])
    assert {name: value_of(name, *parsed) for name in ALGORITHMS[algorithm]} == ALGORITHMS[algorithm]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_file_overrules_a_preset_and_the_command_line_both(algorithm, tmp_path):
    numbers = {name: value for name, value in ALGORITHMS[algorithm].items() if not isinstance(value, str)}
    (tmp_path / "c.yaml").write_text("".join(f"{name}: 1\n" for name in numbers) + f"algorithm: {algorithm}\n")
    line = ["--config", str(tmp_path / "c.yaml"), "--use_cpu", "True"]
    assert all(value_of(name, *parse(line)) == 1 for name in numbers)
    for name in numbers:
        parsed = parse([*line, f"--{name}", "0"])
        assert value_of(name, *parsed) == 0
        assert all(value_of(other, *parsed) == 1 for other in numbers if other != name)


def test_the_task_says_how_long_answers_are_unless_the_user_does():
    assert parse(["--task", "vt", "--use_cpu", "True"])[1].max_completion_length == 30
    assert parse(["--task", "vt", "--use_cpu", "True", "--max_completion_length", "7"])[1].max_completion_length == 7


@pytest.mark.parametrize("longact", [True, False])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_trains(algorithm, longact, folder, tmp_path, monkeypatch):
    # Rewards that always vary, and every batch used twice, so that ratios leave 1.
    monkeypatch.setattr("longact_kernels.commands.train.run.reward_of", lambda arguments: share_of_letters)
    options = {
        "algorithm": algorithm,
        "model": folder,
        "output_dir": tmp_path / "run",
        "length": 360,
        "train_prompts": 4,
        "eval_prompts": 1,
        "max_steps": 3,
        "num_iterations": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
    }
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    run = Run(*parse(words if longact else [*words, "--no-longact"]), Console(quiet=True))
    losses = Losses()
    run.trainer.add_callback(losses)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()

    trainer, preset = run.trainer, ALGORITHMS[algorithm]
    assert trainer.loss_type == preset["loss_type"]
    assert trainer.importance_sampling_level == preset.get("importance_sampling_level", "token")
    assert trainer.beta == preset["beta"] and (trainer.ref_model is not None) == (preset["beta"] > 0)
    assert trainer.reward_func_names == ["share_of_letters"] + ["soft_overlong_punishment_reward"] * (
        algorithm == "dapo"
    )
    steps = [record for record in losses.records if "loss" in record]
    # The second step is on the completions of the first.
    written = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]
    assert [(record["step"], "reward" in record) for record in written] == [(1, True), (2, False), (3, True)]
    summary = summarize(run.arguments, run.training, run.model, written, *[Evaluation([1.0], ["a"])] * 2, None)
    assert summary["steps"] == 3 and summary["reward"]["steps"] == 2 and len(headline(summary)) >= 4
    assert dict(draw(written, [], {}, *[Evaluation([1.0], ["a"])] * 2, "accuracy"))["reward"].axes
    assert len(steps) == 3 and all(torch.tensor(record["grad_norm"]).isfinite() for record in steps)
    assert ("dynamic_sampling/rounds" in steps[0]) == (algorithm == "dapo")
    assert ("churn" in steps[2]) == longact
    moved = {name: (p != before[name]).flatten(1).any(1) for name, p in run.model.named_parameters() if p.ndim == 2}
    assert all(rows.any() for rows in moved.values())
    for name in moved:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            assert moved[name].all() != longact


def share_of_letters(completions, **_):
    return [sum(c.isalpha() for c in completion[0]["content"]) / 5 for completion in completions]


def test_the_documentation_has_the_presets():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", DOCS.read_text(), flags=re.MULTILINE)
    shown = {name: dict(re.findall(r"`(\w+): ([^`]*)`", what)) for name, what in rows if name in ALGORITHMS}
    assert shown == {
        algorithm: {name: str(value) for name, value in preset.items()} for algorithm, preset in ALGORITHMS.items()
    }


def test_a_reporter_gets_the_logs(folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {
        "model": folder,
        "output_dir": tmp_path / "run",
        "length": 360,
        "train_prompts": 2,
        "eval_prompts": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 3,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "tensorboard",
    }
    run = Run(
        *parse([str(word) for key, value in options.items() for word in (f"--{key}", value)]), Console(quiet=True)
    )
    run.train()
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("train/reward")] == [1, 2]
    assert "train/churn" in accumulator.Tags()["scalars"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report_to", "wandb"], "report_to: wandb is not installed; run pip install wandb"),
        (["--report_to", "trackio"], "report_to: trackio is not installed"),
        (["--use_vllm", "True"], "use_vllm: vllm is not installed"),
        (["--scale_rewards", "batch"], "dynamic_sampling_rounds: needs advantages that depend on their group alone"),
    ],
)
def test_what_an_option_needs_is_looked_for_first(words, message, folder, tmp_path, monkeypatch):
    # Whatever happens to be installed here.
    monkeypatch.setattr("longact_kernels.commands.train.run.find_spec", lambda package: None)
    line = ["--model", str(folder), "--output_dir", str(tmp_path / "run"), "--use_cpu", "True", "--length", "360"]
    line += ["--train_prompts", "1", "--eval_prompts", "1"]
    with pytest.raises(ValueError, match=message):
        Run(*parse([*line, *words]), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_every_grpo_field_of_a_preset_exists():
    ours = {"overlong_share", "dynamic_sampling_rounds"}
    fields = GRPOConfig.__dataclass_fields__.keys()
    assert all(preset.keys() - ours <= fields for preset in ALGORITHMS.values())
