"""The layout for the Hugging Face kernels hub: loaded from its folder as that library does, beside our own package."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from longact_kernels import functional

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "tools" / "hub_kernels.py", folder], check=True, cwd=folder)
    return folder


def load(variant: Path):
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels(layout):
    return load(layout / "build" / "torch-cpu")


def test_functions_agree_with_torch(kernels):
    y = torch.randn(2, 5, 8)
    absmax, sumsq = kernels.channel_stats(y)
    assert torch.equal(absmax, y.abs().amax((0, 1)))
    torch.testing.assert_close(sumsq, y.square().sum(1))
    rows = kernels.select(absmax, 4, 1)
    assert rows.tolist() == [absmax[:4].argmax(), 4 + absmax[4:].argmax()]
    dy, x, weight = torch.randn(10, 8), torch.randn(10, 16), torch.randn(8, 16)
    wanted = torch.zeros(8, 16).index_copy(0, rows.long(), (dy.T @ x)[rows])
    torch.testing.assert_close(kernels.salient_wgrad(dy, x, rows), wanted)
    grad = torch.randn(2, 16)
    state = [[torch.zeros_like(weight)], [torch.zeros_like(weight)], [torch.zeros(8, dtype=torch.int32)], []]
    plain = torch.nn.Parameter(weight[rows].clone())
    plain.grad = grad.clone()
    torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1).step()
    kernels.sparse_adamw_([weight], [grad], [rows], *state, torch.tensor(1e-2), 0.9, 0.999, 1e-8, 0.1)
    torch.testing.assert_close(weight[rows], plain.detach())


def test_it_is_functions_and_shares_nothing_with_the_package(kernels, layout):
    assert kernels.__all__ == functional.__all__
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(kernels).values())
    loaded = [module for name, module in sys.modules.items() if name.startswith(kernels.__name__)]
    assert len(loaded) > 10 and all(str(layout) in module.__file__ for module in loaded)
    others = {name for module in loaded for name, value in vars(module).items() if value is functional}
    assert not others
    assert hasattr(getattr(torch.ops, kernels.__name__), "channel_stats")


def test_variants_have_names_of_their_own(layout):
    names = set()
    for variant in (layout / "build").iterdir():
        about = json.loads((variant / "metadata.json").read_text())
        assert variant.name == f"torch-{about['backend']['type']}"
        names.add(about["id"])
        for path in variant.rglob("*.py"):
            code = path.read_text()
            compile(code, path, "exec")
            assert "from longact_kernels" not in code and "import longact_kernels" not in code
    assert len(names) == 3
    build = tomllib.loads((layout / "build.toml").read_text())
    assert "torch-noarch" in build and build["general"]["name"] == "longact-kernels"
    assert (layout / "torch-ext" / "longact_kernels" / "__init__.py").is_file()


def test_the_hubs_own_library_loads_it(layout):
    library = pytest.importorskip("kernels")
    module = library.get_local_kernel(layout, backend="cpu", trust_remote_code=True)
    y = torch.randn(3, 4)
    assert torch.equal(module.channel_stats(y[None])[0], y.abs().amax(0))
