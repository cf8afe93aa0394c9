"""The code in docs/trainers.md, with stand-ins for the trainers."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import trainer_standins
from models import tiny_model, tokens
from ranks import on_ranks
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
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


class TitanAttention(torch.nn.Module):
    """Two key heads of 10 channels, each with two queries' heads before it and a value behind; torchtitan's names."""

    def __init__(self):
        super().__init__()
        self.qkv_linear = torch.nn.ModuleDict({"wqkv": torch.nn.Linear(32, 80)})
        self.wo = torch.nn.Linear(80, 32)

    def forward(self, x):
        return self.wo(self.qkv_linear["wqkv"](x).tanh())


VALUES = [*range(30, 40), *range(70, 80)]


def titan_optimizers(names, model, **options):
    """The container of the page, with this model's heads and a larger rate."""
    config = type(names["optimizer"])
    (group,) = names["optimizer"].param_groups
    kwargs = {**group.optimizer_kwargs, "lr": 1e-2, "eps": 1e-2, **options}
    groups = [
        trainer_standins.ParamGroupConfig(pattern=".*", optimizer_name=group.optimizer_name, optimizer_kwargs=kwargs)
    ]
    return names["LongActOptimizers"](config(head_size=10, queries=2, param_groups=groups), model_parts=[model])


def test_torchtitan(block):
    names = block("torchtitan")
    ranges = names["queries_and_keys"](10, 2)
    model = TitanAttention()
    fused = model.qkv_linear["wqkv"]
    assert ranges("layers.0.attention.qkv_linear.wqkv", fused) == [(0, 30, 10), (40, 70, 10)]
    assert ranges("layers.0.attention.wo", fused) is None

    before = fused.weight.detach().clone()
    container = titan_optimizers(names, model)
    assert isinstance(container.optimizers[0], SalientAdamW)
    for _ in range(3):
        model(torch.randn(2, 5, 32)).square().sum().backward()
        container.step()
        container.zero_grad()
    moved = (fused.weight != before).any(1)
    value = torch.zeros(80, dtype=torch.bool)
    value[VALUES] = True
    assert moved[value].all() and moved[~value].any() and not moved[~value].all()
    assert container.longact[0].steps == 3


# Its checkpoints: saved by two ranks, gone on with by two and by one

TITAN_FORMS = {"full": {}, "compact": {"state": "compact"}}


def titan_run(form):
    """A model that is made on the meta device, as torchtitan makes it, and its optimizers."""
    names = {"__name__": "longact_of_the_user"}
    exec(BLOCKS["torchtitan"], names)
    with torch.device("meta"):
        model = TitanAttention()
    if dist.is_initialized():
        fully_shard(model)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        whole = torch.randn(p.shape, generator=generator) / 4
        own = distribute_tensor(whole, p.device_mesh, p.placements) if dist.is_initialized() else whole
        p.data.copy_(own)
    # Sets that change in every step, so that those of a checkpoint count.
    names["LongAct"] = partial(LongAct, refresh_every=2)
    return model, titan_optimizers(names, model, **TITAN_FORMS[form])


def titan_train(model, container, steps):
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for step in steps:
        x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(step)).chunk(size)[rank]
        (size * model(x).square().mean(-1).sum()).backward()
        container.step()
        container.zero_grad()
    weights = [p.full_tensor() if dist.is_initialized() else p for p in model.parameters()]
    return [weight.detach() for weight in weights], list(container.longact[0].sets.values())


def titan_ranks(rank, folder):
    sys.modules |= trainer_standins.modules()
    for form in TITAN_FORMS:
        model, container = titan_run(form)
        titan_train(model, container, range(3))
        dcp.save({"model": model.state_dict(), "optimizer": container.state_dict()}, checkpoint_id=f"{folder}/{form}")
    return titan_resumed(folder)


def titan_resumed(folder):
    found = {}
    for form in TITAN_FORMS:
        model, container = titan_run(form)
        saved = {"model": model.state_dict(), "optimizer": container.state_dict()}
        for p in model.parameters():
            p.data.zero_()
        dcp.load(saved, checkpoint_id=f"{folder}/{form}")
        model.load_state_dict(saved["model"])
        container.load_state_dict(saved["optimizer"])
        found[form] = titan_train(model, container, range(3, 7))
    return found


def test_torchtitans_checkpoints_go_on(block, tmp_path):
    block("torchtitan")
    for found in (*on_ranks(2, titan_ranks, str(tmp_path)), titan_resumed(str(tmp_path))):
        for form in TITAN_FORMS:
            model, container = titan_run(form)
            weights, sets = titan_train(model, container, range(7))
            for index, expected in zip(found[form][1], sets, strict=True):
                assert torch.equal(index, expected), form
            torch.testing.assert_close(found[form][0], weights, rtol=1e-4, atol=1e-6, msg=lambda m, f=form: f"{f}: {m}")
