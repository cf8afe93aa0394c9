"""The wheel, installed outside the checkout, has everything a user needs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

CODE = """
import pathlib, sys
import torch
import longact_kernels
from longact_kernels import ops
assert pathlib.Path(longact_kernels.__file__).is_relative_to(sys.argv[1]), longact_kernels.__file__
if sys.platform == "linux":
    import longact_kernels.csrc_triton.channel_stats as kernels
    assert pathlib.Path(kernels.__file__).is_relative_to(sys.argv[1]), kernels.__file__
y = torch.randn(2, 5, 8)
absmax, _ = ops.channel_stats(y)
assert torch.equal(absmax, y.abs().amax((0, 1)))
assert (pathlib.Path(longact_kernels.__file__).parent / "py.typed").exists()
"""


def test_wheel_runs_a_kernel_outside_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("longact_kernels-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    packages = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "longact_kernels").rglob("__init__.py")}
    installed = {p.parent.relative_to(site).as_posix() for p in site.rglob("__init__.py")}
    assert packages | {"longact_kernels/csrc_triton"} == installed
    subprocess.run([sys.executable, "-c", CODE, site], check=True, cwd=tmp_path, env={"PYTHONPATH": str(site)})
