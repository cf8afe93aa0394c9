"""`python -m bench.gpu` on a CPU: all of it with tiny shapes, from a checkout that nothing was installed from."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from bench.gpu import __main__ as script
from bench.gpu import trials
from bench.gpu.compile import Driver
from bench.gpu.models import TINY
from bench.gpu.stage import Stage
from bench.gpu.tests import OWN_STAGE, modules

ROOT = Path(__file__).parent.parent


def test_the_ops_tests_are_collected_where_trl_and_datasets_are_missing():
    names = {path.name for path in modules()}
    kernels = {f"test_{path.stem}.py" for path in (ROOT / "longact_kernels" / "ops").glob("*.py")}
    tested = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert kernels & tested <= names and len(kernels & tested) >= 5
    (cuda,) = (ROOT / "tests").rglob(OWN_STAGE)
    code = f"""
import sys
for name in ("trl", "datasets"): sys.modules[name] = None
import pytest
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *{[*map(str, modules()), str(cuda)]}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources; what is installed here was installed from elsewhere."""
    folder = tmp_path_factory.mktemp("plain") / "checkout"
    folder.mkdir()
    for name in ("bench", "csrc_triton", "longact_kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_a_stage_finds_the_kernels_of_its_own_checkout(checkout):
    code = "import os; from bench.gpu.__main__ import environment; from pathlib import Path; import subprocess, sys\n"
    code += "code = 'import longact_kernels.csrc_triton.channel_stats as kernels; print(kernels.__file__)'\n"
    code += "subprocess.run([sys.executable, '-c', code], env=environment('facts', Path('.'), True), cwd='/')"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == checkout / "csrc_triton" / "channel_stats.py"


# Two of the stages run other tests again, which takes longer than all the rest.
@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([name for name in script.DEFAULT if name not in ("tests", "cuda")], id="some"),
        pytest.param(script.DEFAULT, id="all", marks=pytest.mark.slow),
    ],
)
def test_dry_run(stages, checkout, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run", "--stages", ",".join(stages), "--out", str(out)],
        cwd=checkout,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
    )
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-6000:]
    files = sorted(out.rglob("*"))
    assert len(files) <= 8 and all(path.is_file() for path in files)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["stage"]: row["result"] for row in rows if row["what"] == "stage"} == dict.fromkeys(stages, "passed")
    # Each op has a prediction beside it, and the table printed last has all that is ours.
    timings = [row for row in rows if row["what"] == "timing"]
    predicted = {row["work"] for row in timings if "predicted_us" in row}
    assert predicted == {"channel_stats", "linear_stats", "salient_wgrad", "sparse_adamw"}
    assert all(row["work"] in done.stdout for row in timings)
    assert all(name in done.stdout for name in stages)
    if stages is script.DEFAULT:
        counts = {row["stage"]: row for row in rows if row["what"] == "counts"}
        assert counts["tests"]["passed"] >= 5 and counts["cuda"]["passed"] > 10
    for picture in ("kernels.png", "steps.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_dry_run_of_the_trials(checkout, tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--stages", "trials", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-6000:]
    works = {f"trial of {name}" for name in trials.TRIALS if "gluon" not in name}
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["work"] for row in rows if row["what"] == "timing" and row["contender"].startswith("ours, ")} == works
    assert (tmp_path / "kernels.png").exists()


def test_a_candidate_that_fails_is_a_row_and_stops_no_other(tmp_path, monkeypatch):
    raced = {}
    monkeypatch.setattr(trials, "error_of", lambda job, seconds: "wrong" if job[0] == "pack" else "")
    monkeypatch.setattr(trials, "races", lambda stage, model, tokens, works, predicted: raced.update(works) or 0)
    assert trials.run(Stage("trials", tmp_path, True, 60)) == 1
    (row,) = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["label"].startswith("pack ") and row["error"] == "wrong"
    assert [len(raced[f"trial of {name}"].args[1]) for name in ("pack", "scatter")] == [0, 1]


def test_what_is_wrong_with_a_candidate_is_said():
    assert "KeyError: 'no such'" in trials.error_of(("scatter", "no such"), 300)
    assert trials.error_of(("scatter", "no such"), 0.1).startswith("stopped after")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_a_trial_in_gluon_compiles(monkeypatch):
    compiled, compile_and_run = [], triton.JITFunction.run

    def compile_only(self, *args, warmup, **options):
        compiled.append(compile_and_run(self, *args, warmup=True, **options))

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver("sm_90"))
    trial = trials.trial("linear_stats_gluon")
    trial.CANDIDATES["gluon 128 x 64, 6 stages"](*trial.inputs(TINY, 16, 20))
    assert "wgmma.mma_async" in compiled[0].asm["ptx"]


def test_a_stage_that_hangs_or_fails_is_a_row(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        script.run("facts", tmp_path, True, 0.1, log, threading.Lock())
    (row,) = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["result"].startswith("stopped after") and row["seconds"] < 5


def test_limits_add_up_to_less_than_eight_minutes():
    groups = {}
    for plan in map(script.STAGES.get, script.DEFAULT):
        groups[plan.group] = max(plan.seconds, groups.get(plan.group, 0))
    assert sum(groups.values()) <= script.SECONDS and script.SECONDS + script.PICTURES < 480


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_no_gpu_is_one_line(tmp_path, capsys):
    assert script.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path), "--stages", "facts,kernel"])
    assert "got kernel, needed some of facts" in capsys.readouterr().err
