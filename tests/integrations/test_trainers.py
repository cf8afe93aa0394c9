"""The code in docs/trainers.md, with stand-ins for the trainers."""

import re
import sys
from pathlib import Path

import pytest
import torch
import trainer_standins
from models import tiny_model, tokens
from transformers import Trainer, TrainingArguments

from longact_kernels import LongAct, SalientAdamW

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
BLOCKS = dict(re.findall(r"^## (\S+).*?```python\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE))


@pytest.fixture
def block(monkeypatch):
    """Runs a section's code; returns its names."""
    for name, module in trainer_standins.modules().items():
        monkeypatch.setitem(sys.modules, name, module)

    def run(section):
        names = {"__name__": "longact_of_the_user"}
        exec(BLOCKS[section], names)
        return names

    return run


def training(tmp_path, **options):
    options |= {"max_steps": 3, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "logging_steps": 1}
    return TrainingArguments(output_dir=str(tmp_path), **options, disable_tqdm=True, save_strategy="no")


def dataset():
    return [{"input_ids": row, "labels": row} for row in tokens(24)]


def assert_some_rows_moved(longact, before):
    for name, layer in longact.layers.items():
        moved = (layer.weight != before[name]).any(1)
        assert moved.any() and not moved.all(), name


def weights_of(model):
    return {name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")}


def test_every_block_has_a_test():
    assert set(BLOCKS) == {"Axolotl", "ms-swift", "LLaMA-Factory", "torchtitan"}


def test_axolotl(block, tmp_path):
    cls = block("Axolotl")["LongActPlugin"]().get_trainer_cls(cfg={})
    assert issubclass(cls, trainer_standins.AxolotlTrainer)
    model = tiny_model()
    before = weights_of(model)
    trainer = cls(model=model, args=training(tmp_path), train_dataset=dataset(), dataset_tags=["mine"])
    trainer.train()
    assert_some_rows_moved(trainer.longact, before)
    assert "churn" in trainer.state.log_history[2]


def test_ms_swift(block, tmp_path):
    block("ms-swift")
    model = tiny_model()
    before = weights_of(model)
    args = training(tmp_path, weight_decay=0.1)
    trainer = trainer_standins.SwiftTrainer(model=model, args=args, train_dataset=dataset(), optimizer="longact")
    trainer.train()
    assert_some_rows_moved(LongAct.of(model), before)
    assert "churn" in trainer.state.log_history[2]
    plain = Trainer(model=tiny_model(), args=args).create_optimizer()
    groups = trainer.optimizer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in plain.param_groups]


def steps(model, optimizer):
    for step in range(3):
        ids = tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_llama_factory(block):
    block("LLaMA-Factory")
    model = tiny_model()
    before = weights_of(model)
    optimizer = trainer_standins.OptimizerPlugin("longact")(model, {"name": "longact", "lr": 1e-2, "density": 0.2})
    steps(model, optimizer)
    assert_some_rows_moved(LongAct.of(model), before)
    assert LongAct.of(model).density == 0.2


def test_torchtitan(block):
    names = block("torchtitan")
    config, ranges = names["optimizer"], names["queries_and_keys"](10, 2)
    # Two key heads of 10 channels, each with two queries' heads before it and a value behind.
    fused = torch.nn.Linear(32, 80)
    assert ranges("layers.0.attention.qkv_linear.wqkv", fused) == [(0, 30, 10), (40, 70, 10)]
    assert ranges("layers.0.attention.wo", fused) is None

    class Layers(torch.nn.Module):
        """A model whose attention is named as torchtitan's."""

        def __init__(self):
            super().__init__()
            self.qkv_linear = torch.nn.ModuleDict({"wqkv": fused})
            self.wo = torch.nn.Linear(80, 32)

        def forward(self, x):
            return self.wo(self.qkv_linear["wqkv"](x).tanh())

    model = Layers()
    before = fused.weight.detach().clone()
    optimizers = type(config)
    config = optimizers(head_size=10, queries=2, param_groups=config.param_groups)
    container = names["LongActOptimizers"](config, model_parts=[model])
    assert isinstance(container.optimizers[0], SalientAdamW)
    for _ in range(3):
        model(torch.randn(2, 5, 32)).square().sum().backward()
        container.step()
        container.zero_grad()
    moved = (fused.weight != before).any(1)
    value = torch.zeros(80, dtype=torch.bool)
    value[30:40] = value[70:80] = True
    assert moved[value].all() and moved[~value].any() and not moved[~value].all()
    assert container.longact[0].steps == 3
