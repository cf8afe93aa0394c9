"""Stage 5: compute-sanitizer over one small call of each kernel: wild addresses, and races in shared memory."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from bench.gpu.stage import Stage

TOOLS = ("memcheck", "racecheck")
CALLS = [sys.executable, "-m", "bench.gpu.one_call_each"]


def run(stage: Stage) -> int:
    program = shutil.which("compute-sanitizer")
    if stage.dry or program is None:
        why = "dry run" if stage.dry else "compute-sanitizer is not on the PATH"
        stage.row("sanitizer", result=f"calls without the tool: {why}")
        return subprocess.run(CALLS).returncode
    commands = [[program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *CALLS] for tool in TOOLS]
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda c: subprocess.run(c, text=True, capture_output=True), commands))
    for tool, process in zip(TOOLS, done, strict=True):
        print(process.stdout, process.stderr)
        summary = [line for line in process.stdout.splitlines() if "SUMMARY" in line]
        stage.row("sanitizer", tool=tool, result="clean" if process.returncode == 0 else "failed", said=summary[-1:])
    return int(any(process.returncode for process in done))
