"""Stage 3: the tests of the ops, several at a time; they run on the GPU where there is one."""

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from bench.gpu.stage import ROOT, Stage

REPORTING = 12  # seconds that pytest gets to say what failed before its stage is stopped
OWN_STAGE = "test_cuda.py"
USES_OPS = re.compile(
    r"^\s*(from longact_kernels\.(ops|functional)\b|from longact_kernels import .*\b(ops|functional)\b)", re.M
)
HEAVY = re.compile(r"^\s*(import|from) (trl|datasets)\b", re.M)


def modules() -> list[Path]:
    """The test modules that test ops, wherever in tests/ they are, and need neither trl nor datasets."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        source = path.read_text()
        if path.name != OWN_STAGE and USES_OPS.search(source) and not HEAVY.search(source):
            found.append(path)
    return found


def run(stage: Stage) -> int:
    # A dry run collects everything but runs little of it: the suite it is part of runs the rest.
    how = ["-n", "1", "-k", "is_an_error"] if stage.dry else ["-n", "8"]
    return pytest(stage, modules(), *how)


def pytest(stage: Stage, paths: list[Path], *options: str) -> int:
    """Runs tests, with a row for each that fails and one with the counts."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--durations=10",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
    ]
    process = subprocess.Popen(
        [*command, *options, *map(str, paths)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    stop = threading.Timer(max(1, stage.seconds - REPORTING), process.send_signal, (signal.SIGINT,))
    stop.start()
    last = ""
    for line in process.stdout:
        print(line, end="")
        if line.startswith(("FAILED ", "ERROR ")):
            stage.row("test", failed=line.strip()[:300])
        last = line.strip() or last
    counts = {outcome: int(n) for n, outcome in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    stage.row("counts", **counts)
    stop.cancel()
    return process.wait()
