"""Lays our functions out for the Hugging Face kernels hub: python tools/hub_kernels.py FOLDER

What `longact_kernels.functional` exports, with what it needs, as a package without state that can be imported from any
path, in several versions at once: imports are relative, and the ops have a namespace of their own. The layout follows
https://huggingface.co/docs/kernels/kernel-requirements: `build.toml` and `torch-ext/` for kernel-builder, and `build/`
with the variants, which are Python alone, so that there is nothing to compile.
"""

import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "longact_kernels"
BACKENDS = ("cpu", "cuda", "rocm")
PARTS = ("reference", "cpu", "ops", "csrc_triton")
FILES = ("functional.py", "warning.py")
INIT = '"""The kernels of LongAct (arXiv 2604.14922) as functions; their docstrings give equivalent torch code."""\n\n'
README = """---
library_name: kernels
license: apache-2.0
---

The kernels of LongAct (arXiv 2604.14922) as functions on plain tensors.

    from kernels import get_local_kernel

    longact = get_local_kernel("this folder", trust_remote_code=True)
    absmax, sumsq = longact.channel_stats(y)
"""


def sources() -> dict[str, str]:
    """The files by their path in the package."""
    found = {name: (ROOT / PACKAGE / name).read_text() for name in FILES}
    for part in PARTS:
        folder = ROOT / part if part == "csrc_triton" else ROOT / PACKAGE / part
        found |= {f"{part}/{path.relative_to(folder)}": path.read_text() for path in sorted(folder.rglob("*.py"))}
    exported = re.search(r"__all__ = \[.*?\]", found["functional.py"], re.DOTALL)
    assert exported
    names = ", ".join(re.findall(r'"(\w+)"', exported[0]))
    found["__init__.py"] = f"{INIT}from longact_kernels.functional import {names}\n\n{exported[0]}\n"
    return found


def relocated(path: str, text: str, namespace: str) -> str:
    """A file with relative imports, modules looked up below its own package, and ops in `namespace`."""
    dots = "." * (path.count("/") + 1)
    text = re.sub(rf"^(\s*from ){PACKAGE}(?:\.([\w.]+))? import", rf"\1{dots}\2 import", text, flags=re.MULTILINE)
    text = text.replace(f'f"{PACKAGE}.', "f\"{__package__.partition('.')[0]}.")
    text = re.sub(r"\btorch\.ops\.longact\.", f"torch.ops.{namespace}.", text)
    return re.sub(r'"longact(::|")', rf'"{namespace}\1', text)


def write_package(folder: Path, namespace: str) -> None:
    for path, text in sources().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(relocated(path, text, namespace))


def write_layout(folder: Path) -> None:
    """Writes the repository of the hub."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    digest = hashlib.sha256("".join(map("".join, sources().items())).encode()).hexdigest()[:7]
    name, licence, version = PACKAGE.replace("_", "-"), project["license"].lower(), 1
    write_package(folder / "torch-ext" / PACKAGE, f"_{PACKAGE}_{digest}")
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    (folder / "build.toml").write_text(
        f'[general]\nedition = 5\nname = "{name}"\nversion = {version}\nlicense = "{licence}"\n'
        f"backends = [{backends}]\n\n[torch-noarch]\n"
    )
    (folder / "README.md").write_text(README)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        unique = f"_{PACKAGE}_{backend}_{digest}"
        write_package(variant, unique)
        about = {"name": name, "id": unique, "version": version, "license": licence, "python-depends": []}
        (variant / "metadata.json").write_text(json.dumps(about | {"backend": {"type": backend}}, indent=2) + "\n")


if __name__ == "__main__":
    write_layout(Path(sys.argv[1]))
