"""The wheel and the sdist have everything that a user and a developer need, and say of themselves what is true."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from longact_kernels import __version__

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


PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True)
    (made,) = folder.glob("longact_kernels-*.whl")
    return made


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        about = email.message_from_bytes(archive.read(f"longact_kernels-{__version__}.dist-info/METADATA"))
    assert about["Version"] == __version__
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == __version__
    assert about["Author"] and about.get_all("Project-URL") and about["License-Expression"] == "Apache-2.0"
    # What an index page shows leads nowhere that is in the repository only.
    page = about.get_payload()
    assert page.startswith("# longact_kernels") and len(page) > 2000
    assert all(re.match("https?:|#", target) for target in re.findall(r"\]\(([^)]*)\)", page))


def test_the_oldest_versions_are_those_that_test_versions_runs_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    users = [line for name in ("rl", "cpu", "study", "demo") for line in extras[name] if "longact_kernels[" not in line]
    lowest = {(needed := Requirement(line)).name: needed.specifier for line in project["dependencies"] + users}
    pinned = [line.partition("#")[0] for line in (ROOT / "constraints-oldest.txt").read_text().splitlines()]
    oldest = {(needed := Requirement(line)).name: needed.specifier for line in pinned if line}
    for name, specifier in lowest.items():
        (floor,) = (one.version for one in specifier if one.operator == ">=")
        (tried,) = (one.version for one in oldest[name])
        assert Version(floor) == Version(tried), name


def test_sdist_has_every_file_of_the_repository(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    listed = subprocess.run(["git", "ls-files"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    there = {path for path in listed.splitlines() if (ROOT / path).exists()}
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {path for path in there - held if not path.startswith(".git")} == set()
    assert not any(name.endswith((".pyc", ".whl")) or "__pycache__" in name for name in held)


def test_wheel_runs_a_kernel_outside_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", site, wheel], check=True)
    packages = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "longact_kernels").rglob("__init__.py")}
    installed = {p.parent.relative_to(site).as_posix() for p in site.rglob("__init__.py")}
    assert packages | {"longact_kernels/csrc_triton"} == installed
    subprocess.run([sys.executable, "-c", CODE, site], check=True, cwd=tmp_path, env={"PYTHONPATH": str(site)})
