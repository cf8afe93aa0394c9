"""The README is short, and the code that it shows runs when pasted."""

import re
from pathlib import Path

import tiny
from transformers import AutoModelForCausalLM

from longact_kernels import SalientLinear

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120


def test_library_use(tmp_path):
    """As it stands, but for the model: a tiny one in place of SmolLM2."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "model.train()" in code
    folder = tiny.save(tmp_path / "model")
    names: dict = {}
    exec(code.replace('"smollm2"', repr(str(folder))), names)
    model = names["model"]
    assert not any(isinstance(module, SalientLinear) for module in model.modules())
    before = dict(AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").named_parameters())
    for name, p in model.named_parameters():
        rows_moved = (p != before[name]).flatten(1).any(1) if p.ndim > 1 else p != before[name]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            assert rows_moved.any() and not rows_moved.all(), name
    assert any((p != before[name]).any() for name, p in model.named_parameters() if "mlp" in name)
