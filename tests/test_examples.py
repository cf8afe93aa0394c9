"""The scripts in examples/ and the code in docs/loops.md run as they stand on a tiny model, the notebook on SmolLM2."""

import re
import runpy
from functools import partial
from pathlib import Path

import pandas
import pytest
import tiny
import torch
from accelerate import Accelerator
from models import tiny_model, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.integrations.trainer import LongActCallback, LongActTrainerMixin

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loops.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script as from the command line, in an empty folder; returns what it prints."""
    folder = tiny.save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def script(name: str) -> str:
        monkeypatch.setattr("sys.argv", [name, str(folder)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def assert_some_rows_moved(folder: Path) -> None:
    weights = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype="bfloat16").model.layers[0].self_attn.q_proj.weight
        for name in ("model", "trained")
    ]
    rows = (weights[0] != weights[1]).any(1)
    assert rows.any() and not rows.all()


def test_every_script_has_a_test():
    source = Path(__file__).read_text()
    assert all(f'run("{path.name}")' in source for path in EXAMPLES.glob("*.py"))


def test_plain_loop(run, tmp_path):
    assert len(run("plain_loop.py").splitlines()) == 5
    assert (tmp_path / "saliency.png").stat().st_size > 10_000
    assert_some_rows_moved(tmp_path)


def test_train_sft(run, tmp_path):
    assert run("train_sft.py").count("'churn'") == 4
    assert_some_rows_moved(tmp_path)


def test_train_grpo(run):
    assert run("train_grpo.py").count("'reward'") == 3


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES.glob("*.py") if path.stem != "functional_kernels"])
def test_a_model_that_cannot_be_had_is_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.argv", [name, "no-such-user/no-such-model"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert str(ended.value).startswith("model: could not load") and "\n" not in str(ended.value)


def test_massive_values(run):
    assert [line.split()[0] for line in run("massive_values.py").splitlines()] == [
        f"model.layers.{i}.self_attn.{kind}_proj" for i in (0, 1) for kind in "qk"
    ]


def test_functional_kernels(run):
    assert run("functional_kernels.py") == "152 of 512 rows moved, just the salient ones: True\n"


@pytest.mark.slow
def test_the_notebook(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `docs`")
    notebook = pytest.importorskip("nbformat").read(EXAMPLES / "getting_started.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in code) >= 5  # it is kept with what it prints
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "state of the query and key weights" in printed and "0.30 of dense" in printed


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone, for the block about several."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("i", range(len(BLOCKS)))
def test_the_blocks_of_the_page_on_loops(i, tmp_path, request):
    if "DistributedDataParallel" in BLOCKS[i]:
        request.getfixturevalue("group")
    model = tiny_model()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    dataset = [{"input_ids": row, "labels": row} for row in tokens(16)]
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    given = (Accelerator, LongAct, LongActCallback, LongActTrainerMixin, SalientAdamW, Trainer)
    names = {thing.__name__: thing for thing in given}
    batches = [tokens(4, seed=seed) for seed in range(4)]
    exec(BLOCKS[i], {**names, "model": model, "batches": batches, "dataset": dataset, "args": args, "torch": torch})
    assert (model.model.layers[0].self_attn.q_proj.weight != before).any()


def test_what_verl_reads(tmp_path, monkeypatch):
    tiny.save(tmp_path / "model")
    words = ["data.py", "data", "model", "--length", "600", "--train", "3", "--test", "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", words)
    runpy.run_path(str(EXAMPLES / "verl" / "data.py"), run_name="__main__")
    rows = pandas.read_parquet(tmp_path / "data" / "train.parquet")
    assert len(rows) == 3 and len(pandas.read_parquet(tmp_path / "data" / "test.parquet")) == 2
    (message,) = rows["prompt"][0]
    wanted = rows["reward_model"][0]["ground_truth"]
    assert message["role"] == "user" and wanted[0] in message["content"]
    reward = runpy.run_path(str(EXAMPLES / "verl" / "reward.py"))["compute_score"]
    score = partial(reward, rows["data_source"][0], ground_truth=wanted, extra_info={})
    assert score(solution_str=f"It is {wanted[0]}.") == 1 and score(solution_str="It is nothing.") == 0
