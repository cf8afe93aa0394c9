"""Imports go one way (CONTRIBUTING.md), and the package imports where its optional companions are absent."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up.
LAYERS = [
    {"warning"},
    {"csrc_triton", "reference"},
    {"cpu"},
    {"ops"},
    {"functional"},
    {"sparse"},
    {"optim"},
    {"compiled"},
    {"integrations"},
    {"tasks"},
    {"commands"},
    {"cli"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
HEAVY = {"transformers", "trl", "verl", "accelerate", "datasets", "rich", "matplotlib", "yaml", "lm_eval"}


def imports_of(path: Path) -> set[str]:
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources():
    for path in sorted((ROOT / "longact_kernels").rglob("*.py")):
        yield path.relative_to(ROOT / "longact_kernels").parts[0].removesuffix(".py"), path
    for path in sorted((ROOT / "csrc_triton").rglob("*.py")):
        yield "csrc_triton", path


@pytest.mark.parametrize(
    ("layer", "path"), [(a, b) for a, b in sources() if a != "__init__"], ids=lambda x: str(x)[-40:]
)
def test_imports_go_down_only(layer, path):
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == "longact_kernels":
            target = rest.partition(".")[0]
            # `from longact_kernels import LongAct`: the public names stand on top of the library.
            target = target if target in LEVEL else "optim"
            assert LEVEL[target] <= LEVEL[layer], f"{layer} imports {target}"
        elif top == "csrc_triton":
            pytest.fail("csrc_triton is imported as longact_kernels.csrc_triton")
        elif layer == "csrc_triton":
            assert top == "triton" or top in sys.stdlib_module_names, f"device code imports {name}"
        elif top in HEAVY:
            assert LEVEL[layer] >= LEVEL["integrations"] or (path.name, top) == ("figures.py", "matplotlib"), (
                f"{layer} imports {name}"
            )


def test_no_files_import_one_another_in_a_circle():
    """What only the type checker reads counts too."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for _, path in sources()}
    files = {name.removesuffix(".__init__").replace("csrc_triton", "longact_kernels.csrc_triton"): path
             for name, path in files.items()}  # fmt: skip
    waiting = {}
    for name, path in files.items():
        named = imports_of(path)
        modules = {one if one in files else one.rpartition(".")[0] for one in named}
        # A package's own names come from below it.
        waiting[name] = {one for one in modules & files.keys() if one != name}
    while free := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"in circles, or behind one: {sorted(waiting)}"


def test_imports_without_companions():
    blocked = ["triton", "transformers", "trl", "numba", "rich", "matplotlib", "datasets", "accelerate"]
    code = f"""
import sys
for name in {blocked}: sys.modules[name] = None
import torch
from longact_kernels import LongAct, SalientAdamW
model = torch.nn.Module()
model.head_dim = 4
model.q_proj = torch.nn.Linear(3, 8)
longact = LongAct(model)
optimizer = SalientAdamW(model.parameters(), longact=longact)
model.q_proj(torch.randn(2, 5, 3)).sum().backward()
optimizer.step()
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
