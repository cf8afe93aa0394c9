"""Stage 1: what machine this is, and its ceilings."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from bench.gpu.stage import ROOT, Stage
from bench.race import DEVICE, Turns

PACKAGES = ("torch", "triton", "transformers", "numba", "numpy", "pytest")


def run(stage: Stage) -> None:
    stage.row("machine", **machine())
    # A thousandth of the size in a dry run.
    size, n = (2**20, 128) if stage.dry else (2**30, 8192)
    source, target = (torch.randn(size, device=DEVICE) for _ in range(2))
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    one = torch.zeros((), device=DEVICE)
    turns = Turns({"copy": lambda: target.copy_(source), "product": lambda: a @ b, "launch": lambda: one.add_(1)})
    turns.rounds_in(0, 1, 1)
    for _ in range(10):
        turns()
    stage.row(
        "ceilings",
        bytes_per_second=2 * source.nbytes / turns.median("copy"),
        flops=2 * n**3 / turns.median("product"),
        host_us_of_a_launch=1e6 * turns.host_median("launch"),
    )


def machine() -> dict:
    """Device, versions, driver and commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    facts = {"device": "cpu", "python": platform.python_version(), **versions}
    facts["torch"] = torch.__version__
    if DEVICE == "cuda":
        about = torch.cuda.get_device_properties()
        facts |= {"device": about.name, "multiprocessors": about.multi_processor_count}
        facts |= {"l2_bytes": about.L2_cache_size, "memory_bytes": about.total_memory}
    facts["driver"] = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts["commit"] = said("git", "rev-parse", "HEAD")
    return facts


def said(*command: str) -> str | None:
    """A program's output, None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
