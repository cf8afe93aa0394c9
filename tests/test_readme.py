"""The code that the README shows runs as it stands."""

import re
from pathlib import Path

import torch
from models import tiny_model, tokens

from longact_kernels import SalientLinear

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_library_use():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = [{"input_ids": tokens(seed=i), "labels": tokens(seed=i)} for i in range(3)]
    exec(code, {"model": model, "batches": batches, "torch": torch})
    assert not any(isinstance(module, SalientLinear) for module in model.modules())
    for name, p in model.named_parameters():
        rows_moved = (p != before[name]).flatten(1).any(1) if p.ndim > 1 else p != before[name]
        assert rows_moved.any(), name
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            assert not rows_moved.all(), name
