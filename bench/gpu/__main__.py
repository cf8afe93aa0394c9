"""`python -m bench.gpu --out FOLDER`: tests, sanitizers and timings on this machine's GPU, in stages (docs/gpu.md).

Each stage has a process and a time limit of its own; none stops the next.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.gpu import report
from bench.gpu.stage import ROOT, Stage, results


class Plan(NamedTuple):
    """A stage of the script.

    Args:
        seconds: its limit.
        group: stages of one group run at the same time; those that measure run alone.
        interpreted: whether its dry run takes Triton's interpreter for the GPU.
        default: whether it runs without being asked for.
    """

    seconds: int
    group: int
    interpreted: bool = False
    default: bool = True


STAGES = {
    "facts": Plan(20, 1),
    "compile": Plan(50, 2),
    "tests": Plan(115, 3),
    "cuda": Plan(115, 3, interpreted=True),
    "sanitize": Plan(115, 3, interpreted=True),
    "kernels": Plan(110, 4, interpreted=True),
    "steps": Plan(120, 5),
    "tune": Plan(25, 6),
    "trials": Plan(120, 7, interpreted=True, default=False),
}
DEFAULT = [name for name, plan in STAGES.items() if plan.default]
SECONDS = 455  # of all stages together
PICTURES = 20  # seconds for drawing, at most
PATIENCE = 4  # how many times as long a dry run may take: its machine may be busy


def environment(name: str, folder: Path, dry: bool) -> dict[str, str]:
    """A stage's: it finds the package in this checkout, wherever it is started from."""
    path = [str(Path(__file__).parent / "checkout"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
    env |= {"KINETO_LOG_LEVEL": "99", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if name == "tune":
        env["LONGACT_TUNE"] = str(folder / "tune.json")
    if dry:
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if dry and STAGES[name].interpreted:
        env["TRITON_INTERPRET"] = "1"
    else:
        env.pop("TRITON_INTERPRET", None)
    return env


def run(name: str, folder: Path, dry: bool, seconds: float, log, lock: threading.Lock) -> None:
    """Runs a stage, ends it with all that it started once its time is up, and adds the row that says how it went."""
    command = [sys.executable, "-m", "bench.gpu.stage", name, str(folder), str(seconds), *["--dry-run"] * dry]
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(name, folder, dry), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    stop = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    stop.start()
    for line in process.stdout:
        with lock:
            log.write(f"[{name}] {line}")
            log.flush()
    status = process.wait()
    stop.cancel()
    took = time.monotonic() - began
    ended = {0: "passed", -signal.SIGKILL: f"stopped after {seconds:.0f} s"}.get(status, f"failed ({status})")
    Stage(name, folder, dry, seconds).row("stage", result=ended, seconds=round(took, 1))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, at most 8 files")
    parser.add_argument("--stages", default=",".join(DEFAULT), help=f"some of {', '.join(STAGES)}")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes: tries the script itself")
    args = parser.parse_args(argv)
    names = args.stages.split(",")
    if unknown := set(names) - set(STAGES):
        parser.error(f"--stages: got {', '.join(sorted(unknown))}, needed some of {', '.join(STAGES)}")
    if not args.dry_run and not has_gpu():
        print("make gpu: torch sees no GPU here; --dry-run tries the script on a CPU", file=sys.stderr)
        return 2
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results(folder).unlink(missing_ok=True)
    began, factor, lock = time.monotonic(), PATIENCE if args.dry_run else 1, threading.Lock()
    with open(folder / "log.txt", "w") as log, ThreadPoolExecutor() as pool:
        for group in sorted({STAGES[name].group for name in names}):
            left = SECONDS * factor - (time.monotonic() - began)
            together = [name for name in names if STAGES[name].group == group]
            runs = [
                pool.submit(run, name, folder, args.dry_run, min(left, STAGES[name].seconds * factor), log, lock)
                for name in together
            ]
            for done in runs:
                done.result()
            rows = report.read(folder)
            report.write(folder, rows)
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-m", "bench.gpu.pictures", str(folder)], cwd=ROOT, timeout=PICTURES * factor)
    print(report.short(rows))
    return 0 if all(row["result"] == "passed" for row in rows if row["what"] == "stage") else 1


if __name__ == "__main__":
    sys.exit(main())
