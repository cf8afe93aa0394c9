"""What `longact train` refuses before it loads a model: one line, exit status 2, no folder left."""

import importlib
import signal
import subprocess
import sys
import time

import pytest
import tiny

from longact_kernels.cli import main
from longact_kernels.commands.train.limits import LIMITS, out_of_limits

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("place") / "model [/v2]")


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr("longact_kernels.commands.train.run.load_model", lambda *_, **__: pytest.fail("it was loaded"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *((["--learning_rate", value], f"learning_rate: got {float(value)}") for value in ("-1", "nan", "inf")),
        (["--adam_beta2", "1.5"], "adam_beta2: got 1.5"),
        (["--temperature", "0"], "temperature: got 0.0, needed a finite number above 0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size: got 0"),
        *((["--max_steps", value], f"max_steps: got {value}") for value in ("0", "-5")),
        (["--length", "100000000"], "length: got 100000000, with"),
        (["--lengths", "420,2040"], "reads 2048 tokens; needed at most 1920"),
        (["--output_dir", "/proc/nowhere/run"], "output_dir: cannot write in /proc"),
        (["--no-longact", "--density", "0.5"], "density: got it beside --no-longact"),
        (["--no-longact", "--density=0.5"], "density: got it beside --no-longact"),
        (["--resume_from_checkpoint", "x"], "resume_from_checkpoint: longact train continues a run with --resume"),
        (["--ignore_data_skip", "true"], "ignore_data_skip: longact train continues a run with --resume"),
    ],
)
def test_it_is_refused_before_the_model_is_loaded(model, tmp_path, monkeypatch, refused, no_weights, words, message):
    monkeypatch.chdir(tmp_path)
    before = time.perf_counter()
    more = ["--max_steps", 2] * (words[0] == "--lengths")
    assert message in refused("train", "--model", model, "--use_cpu", "true", "--output_dir", "a/b", *more, *words)
    assert time.perf_counter() - before < 60
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_refuses_what_is_no_number_of_its_kind(name):
    assert all(name in str(out_of_limits({name: value})) for value in (float("nan"), float("inf"), -2))
    assert out_of_limits({name: None}) is out_of_limits({}) is None


def test_defaults_are_within_the_limits():
    from longact_kernels.commands.train.arguments import parse

    assert out_of_limits(vars(parse(["--use_cpu", "true"])[1])) is None


VALUES = {
    "learning_rate": ("1e-6", "null"),
    "seed": ("3", "null"),
    "max_steps": ("3", "true"),
    "save_steps": ("0.5", "2024-01-01"),
    "gradient_accumulation_steps": ("2", "1.5"),
    "gradient_checkpointing": ("false", "[1]"),
    "report_to": ("[none]", "3"),
    "run_name": ("'3'", "3"),
    "lr_scheduler_type": ("cosine", "{a: 1}"),
    "save_strategy": ("steps", "often"),
    "optim": ("adamw_torch_fused", "adamv"),
    "reward_weights": ("[1.0]", "1.0"),
    "generation_kwargs": ("'{\"top_k\": 1}'", "'{'"),
    "logging_steps": ("1", "1" + "0" * 400),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_a_file_are_of_the_options_types(tmp_path, name):
    from longact_kernels.commands.train.arguments import parse

    words = ["--config", str(tmp_path / "run.yaml"), "--use_cpu", "true"]
    right, wrong = VALUES[name]
    (tmp_path / "run.yaml").write_text(f"{name}: {right}")
    parse(words)
    (tmp_path / "run.yaml").write_text(f"{name}: {wrong}")
    with pytest.raises(ValueError, match=f"{name}: got .*(needed|no JSON)"):
        parse(words)


def test_a_refused_command_leaves_nothing_that_refuses_the_corrected_one(model, tmp_path, refused):
    words = [
        "--model",
        model,
        "--use_cpu",
        "true",
        "--output_dir",
        tmp_path / "a" / "run",
        "--max_completion_length",
        6,
    ]
    # These come as far as the trainer.
    for more in (["--num_generations", "3"], ["--per_device_train_batch_size", "8", "--sync_ref_model", "true"]):
        refused("train", *words, *more, "--reward", "no_such_module:f")
        assert not any(tmp_path.iterdir())
    sizes = "--length 420 --train_prompts 4 --eval_prompts 1 --per_device_train_batch_size 4 --num_generations 4"
    assert main(["train", *map(str, words), *sizes.split(), "--max_steps", "1"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "eval", "inspect", "study"])
def test_ctrl_c_while_libraries_are_imported_is_quiet(command, monkeypatch):
    """It comes with some line of `-X importtime`, one for each import: when that is depends on the machine's load."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [sys.executable, "-X", "importtime", "-m", "longact_kernels.cli", command, "no-such-model"]
    lines = subprocess.run(words, capture_output=True, text=True).stderr.splitlines()
    begun = next(i for i, line in enumerate(lines) if line.endswith("longact_kernels.commands.parsers"))
    # Whoever starts the tests in the background has it ignored, and so would what they start.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for share in (0.02, 0.2, 0.5, 0.8, 0.95, 1.0):
            with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                said = []
                for line in process.stderr:
                    said.append(line)
                    if len(said) == begun + int(share * (len(lines) - begun)):
                        process.send_signal(signal.SIGINT)
                out = process.stdout.read()
            said = "".join(line for line in said if not line.startswith("import time:"))
            assert "Traceback" not in out + said and "Interrupt" not in out + said, (share, said)
            assert process.returncode in (130, 2), (share, said)
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(
    ("parameters", "returned"),
    [
        *(
            ("**_", returned)
            for returned in ("1.0", "None", "[1.0]", "{'a': 1, 'b': 2}", "[10**400] * 2", "[None] * 2")
        ),
        ("answers", "[1.0] * 2"),
        ("trainer_state=None, **_", "[1.0] * 2 if trainer_state is None else 3"),  # shows in training only
    ],
)
def test_a_reward_that_is_none_is_one_line(model, tmp_path, monkeypatch, refused, parameters, returned):
    (tmp_path / "rewards_of_mine.py").write_text(f"def exact(completions, {parameters}):\n    return {returned}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards_of_mine", raising=False)
    importlib.invalidate_caches()
    words = ["--model", model, "--use_cpu", "true", "--eval_prompts", "2", "--max_completion_length", "6"]
    more = ["--output_dir", "run", "--length", "420", "--train_prompts", "4", "--max_steps", "1"]
    assert "reward: exact" in refused("train", *words, *more, "--reward", "rewards_of_mine:exact")
    assert (tmp_path / "run").exists() == ("trainer_state" in parameters)
