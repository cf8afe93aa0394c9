"""The kernels' own tests once more, with Triton's interpreter in the place of the CPU code.

Triton reads TRITON_INTERPRET when it is imported, so these run in a process of their own. Each module tests the op, and
so whatever the op runs on: the CPU code, the interpreted kernels here, the compiled kernels on a machine with a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MODULES = [
    "test_channel_stats.py",
    "test_dispatch.py",
    "test_linear_stats.py",
    "test_memory_safety.py",
    "test_refresh.py",
    "test_salient_wgrad.py",
    "test_sparse_adamw.py",
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter")
@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module):
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, module]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
