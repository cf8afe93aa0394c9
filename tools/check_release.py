"""Checks what `python -m build` has made: python tools/check_release.py dist [arguments of pytest]

The wheel and the sdist are installed on their own, outside the checkout; the sdist's tests run where it is unpacked.
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder}: needed one {pattern}, found {len(found)}")
    return found[0]


def installed(package: Path, site: Path) -> None:
    """Installs a package alone, and asks its command for the version."""
    subprocess.run([*PIP, "install", "--no-deps", "--no-build-isolation", "--target", site, package], check=True)
    command = [sys.executable, "-m", "longact_kernels.cli", "--version"]
    said = subprocess.run(command, check=True, cwd=site, capture_output=True, text=True).stdout
    if said.split()[-1] != package.name.split("-")[1].removesuffix(".tar.gz"):
        sys.exit(f"{package.name}: its command says {said.strip()}")


def test(sdist: Path, place: Path, arguments: list[str]) -> None:
    """Runs the tests of an sdist, as a developer would, in an environment that shares this one's packages."""
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    root = place / sdist.name.removesuffix(".tar.gz")
    venv.create(root / ".venv")
    python = root / ".venv" / "bin" / "python"
    site = only(root / ".venv" / "lib", "python3*") / "site-packages"
    (site / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    editable = [python, "-m", *PIP[2:], "install", "--no-deps", "--no-build-isolation", "--ignore-installed", "-e", "."]
    subprocess.run(editable, check=True, cwd=root)
    subprocess.run([python, "-m", "pytest", "-q", *(arguments or ["-n", "2", "-m", "not slow"])], check=True, cwd=root)


def main(dist: Path, arguments: list[str]) -> None:
    sdist = only(dist, "longact_kernels-*.tar.gz").resolve()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        installed(only(dist, "longact_kernels-*.whl").resolve(), place / "of-wheel")
        installed(sdist, place / "of-sdist")
        test(sdist, place, arguments)
    print(f"{dist}: ready")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
