"""`longact train` as a user types it: what a run leaves behind, and what bad input gets."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from transformers import MambaConfig, MambaForCausalLM

from longact_kernels.cli import main

pytestmark = pytest.mark.usefixtures("no_network")

CONFIG = """
length: 420
train_prompts: 8
eval_prompts: 3
per_device_train_batch_size: 8
num_generations: 4
max_completion_length: 6
max_steps: 3
learning_rate: 1e-3
use_cpu: true
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and a config file in it."""
    root = tmp_path_factory.mktemp("place")
    tiny.save(root / "model")
    (root / "tiny.yaml").write_text(f"model: {root / 'model'}\n{CONFIG}")
    return root


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", "--config", "tiny.yaml", "--max_steps", "2"]) == 0
    return place / "runs" / "tiny"


def test_a_run_leaves_all_that_was_promised(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The command line, 2, overrules the file, 3.
    assert [record["step"] for record in records] == [1, 2]
    assert {"reward", "churn", "tokens_per_second", "seconds_per_step"} <= records[1].keys()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy"]["prompts"] == 3
    assert summary["grpo_config"]["max_steps"] == 2
    assert summary["versions"]["torch"]
    for picture in ("reward", "training", "churn", "saliency"):
        assert (run / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoint-2" / "optimizer.pt").is_file()


def test_the_report_needs_nothing_but_itself(run):
    page = (run / "report.html").read_text()
    assert page.count("<picture>") == 4 == page.count("prefers-color-scheme: dark)' srcset")
    sources = re.findall(r"(?:src|srcset|href)='([^']*)'", page)
    assert len(sources) == 8 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "width=device-width" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--density", "1.5"], "density: got 1.5"),
        (["--density", "much"], "density: got 'much', needed a share above 0"),
        (["--statistic", "max"], "--statistic: got 'max', needed one of absmax, l2; did you mean 'absmax'?"),
        (["--task", "poetry"], "task: got 'poetry', needed one of niah_single_1"),
        (["--length", "20"], "length: got 20, but the shortest prompt of this task takes"),
        (["--desnity", "0.3"], "there is no option '--desnity'; did you mean '--density'?"),
        (["--refresh-evry", "2"], "did you mean '--refresh_every'?"),
        (["--moments", "float16"], "--moments: got 'float16', needed one of float32, bfloat16"),
        (
            ["--stochastic_rounding", "--model_init_kwargs", '{"dtype": "float32"}'],
            "stochastic_rounding: got True, but the weights are float32",
        ),
        (["--optim", "sgd"], "optim: got 'sgd'"),
        (["--num_generations", "3"], "num_generations"),
        (["--model", "no-such-user/no-such-model"], "could not load 'no-such-user/no-such-model'"),
        (["--config", "missing.yaml"], "cannot read missing.yaml"),
        (["--config"], "--config: needed the path"),
        (["--report_to", "tensorboard,wandbb"], "with commas between them; did you mean 'wandb'?"),
        (["--report_to", "wandb", "tensorboard"], "got 'tensorboard', which belongs to no option; put commas"),
        (["--resume"], "holds no run to resume"),
    ],
)
def test_bad_input_gets_one_line(place, tmp_path, monkeypatch, refused, words, message):
    monkeypatch.chdir(tmp_path)
    config = [] if words[0] == "--config" else ["--config", place / "tiny.yaml"]
    assert message in refused("train", *config, "--output_dir", "out", *words)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1e-5", "bad.yaml: there is no option 'learning_rte'; did you mean 'learning_rate'?"),
        ("- a\n- b", "must contain a YAML mapping"),
        ("a: [", "bad.yaml is not valid YAML"),
        ("density: much", "density: got 'much', needed a share above 0"),
        ("algorithm: ppo", "algorithm: got 'ppo', needed one of grpo, dapo"),
        ("train_prompts: [3]", "train_prompts: got [3], needed a whole number"),
        ("task: 3", "task: got 3, needed a text"),
    ],
)
def test_a_bad_config_file_gets_one_line(tmp_path, refused, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    assert message in refused("train", "--config", tmp_path / "bad.yaml")


def test_a_folder_that_is_no_model(place, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    words = ["--config", place / "tiny.yaml", "--output_dir", tmp_path / "out", "--model", tmp_path / "empty"]
    assert "holds no model: it has no config.json" in refused("train", *words)


def test_a_model_without_query_and_key_projections(place, tmp_path, refused):
    MambaForCausalLM(MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1)).save_pretrained(
        tmp_path / "mamba"
    )
    tiny.tokenizer().save_pretrained(tmp_path / "mamba")
    words = ["--config", place / "tiny.yaml", "--output_dir", tmp_path / "out", "--model", tmp_path / "mamba"]
    message = refused("train", *words)
    assert "q_proj" in message and "k_proj" in message and "lm_head" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--density", "1.5"], "density: got 1.5"),
        (["--task", "vt", "--haystack", "no/such.txt"], "haystack: found no file 'no/such.txt'"),
        (["--reward", "no_such_module:f"], "reward: cannot import no_such_module"),
    ],
)
def test_arguments_are_checked_before_a_model_is_looked_for(tmp_path, refused, words, message):
    words = ["--model", "no-such-user/no-such-model", "--output_dir", tmp_path / "out", "--use_cpu", "True", *words]
    assert message in refused("train", *words)


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [[], ["--resume", "--density", "0.5"], ["--resume", "--no-longact"]])
def test_a_folder_with_another_run_is_left_alone(place, run, refused, words):
    held = contents(run)
    message = refused("train", "--config", place / "tiny.yaml", "--output_dir", run, *words)
    assert ("holds another run" if words else "is not empty") in message
    assert contents(run) == held


@pytest.mark.parametrize(
    ("words", "unneeded"),
    [
        (["--help"], {"torch", "numpy", "rich"}),
        (["eval", "--help"], {"torch", "numpy", "rich", "lm_eval"}),
        (["study", "--help"], {"torch", "numpy", "rich", "transformers"}),
        (["kernels", "--help"], {"torch", "numpy", "rich", "triton"}),
        (["inspect", "--help"], {"transformers", "datasets", "matplotlib"}),
        (["perturb", "--help"], {"transformers", "datasets", "matplotlib"}),
        (["train", "--help"], {"peft", "datasets", "matplotlib", "transformers.trainer"}),
    ],
)
def test_help_imports_little(words, unneeded):
    code = f"""
import sys
from longact_kernels.cli import main
try:
    main({words})
finally:
    imported = {{name for name, module in sys.modules.items() if module is not None}}
    assert not imported & {unneeded}, imported & {unneeded}
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0 and "usage: longact" in shown.stdout, shown.stderr


def test_of_all_warnings_it_shows_our_own():
    code = """
import warnings
import longact_kernels
from longact_kernels.commands.console import quiet_libraries
quiet_libraries()
warnings.warn("transformers: all is deprecated")
warnings.warn("numba is missing", longact_kernels.LongActWarning)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == "longact: warning: numba is missing\n"
