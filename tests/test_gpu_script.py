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

from bench.gpu import __main__ as script
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


def test_dry_run(checkout, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out)],
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
    assert {row["stage"]: row["result"] for row in rows if row["what"] == "stage"} == dict.fromkeys(
        script.STAGES, "passed"
    )
    # Each op has a prediction beside it, and the table printed last has all that is ours.
    timings = [row for row in rows if row["what"] == "timing"]
    predicted = {row["work"] for row in timings if "predicted_us" in row}
    assert predicted == {"channel_stats", "linear_stats", "salient_wgrad", "sparse_adamw"}
    assert all(row["work"] in done.stdout for row in timings)
    assert all(name in done.stdout for name in script.STAGES)
    counts = {row["stage"]: row for row in rows if row["what"] == "counts"}
    assert counts["tests"]["passed"] >= 5 and counts["cuda"]["passed"] > 10
    for picture in ("kernels.png", "steps.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_a_stage_that_hangs_or_fails_is_a_row(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        script.run("facts", tmp_path, True, 0.1, log, threading.Lock())
    (row,) = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["result"].startswith("stopped after") and row["seconds"] < 5


def test_limits_add_up_to_less_than_eight_minutes():
    groups = {}
    for plan in script.STAGES.values():
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
