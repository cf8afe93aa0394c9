"""What the plug-in touches of verl 0.9.1, where verl is not installed: names, signatures and order of calls are verl's.

The engine trains on one process and without FSDP. A batch is a list of sequences of token ids; it is packed, and padded
behind to a multiple of eight tokens whose positions begin again, as verl's `pad_to_length` does.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


@dataclass
class FSDPOptimizerConfig:
    lr: float = 1e-2
    weight_decay: float = 0.01
    betas: Any = (0.9, 0.999)
    clip_grad: float = 1.0
    optimizer: str = "AdamW"
    optimizer_impl: str = "torch.optim"
    override_optimizer_config: dict | None = None


def build_optimizer(parameters, config):
    arguments = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": config.betas}
    arguments |= config.override_optimizer_config or {}
    return getattr(importlib.import_module(config.optimizer_impl), config.optimizer)(parameters, **arguments)


class EngineRegistry:
    engines: dict = {}  # noqa: RUF012

    @classmethod
    def register(cls, model_type, backend, device="cuda", vendor=None):
        def decorator(engine):
            cls.engines |= {(model_type, one, device, maker): engine for one in backend for maker in vendor}
            return engine

        return decorator


class FSDPEngineWithLMHead:
    def __init__(self, model_config, engine_config, optimizer_config, checkpoint_config):
        self.engine_config, self.optimizer_config = engine_config, optimizer_config
        self.module = model_config  # verl has a path there
        self.ulysses_parallel_group = None

    def initialize(self):
        self.optimizer = self._build_optimizer(self.module)

    def _build_optimizer(self, module):
        return build_optimizer(module.parameters(), self.optimizer_config)

    def is_mp_src_rank_with_outputs(self):
        return True

    def prepare_model_inputs(self, micro_batch):
        ids = torch.cat(micro_batch)
        places = [torch.arange(len(sequence)) for sequence in micro_batch]
        pad_size = -len(ids) % 8
        ids, places = torch.cat((ids, ids.new_zeros(pad_size))), [*places, torch.arange(pad_size)]
        inputs = {"input_ids": ids[None], "attention_mask": None, "position_ids": torch.cat(places)[None]}
        return inputs, {"pad_size": pad_size}

    def train_batch(self, data, loss_function):
        self.optimizer.zero_grad()
        inputs, outputs = self.prepare_model_inputs(data)
        logits = self.module(**inputs, use_cache=False).logits[0]
        loss_function(logits[: len(logits) - outputs["pad_size"]], torch.cat(data)).backward()
        return {"metrics": {"grad_norm": self.optimizer_step()}}

    def optimizer_step(self):
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.optimizer_config.clip_grad)
        self.optimizer.step()
        return norm.item()


def engine_config(**options):
    default = {"strategy": "fsdp2", "forward_only": False, "offload_policy": False}
    return SimpleNamespace(**default | options)


def modules() -> dict[str, ModuleType]:
    """For `sys.modules`."""
    held = {
        "verl": {},
        "verl.workers": {},
        "verl.workers.config": {},
        "verl.workers.config.optimizer": {"build_optimizer": build_optimizer},
        "verl.workers.engine": {"EngineRegistry": EngineRegistry},
        "verl.workers.engine.fsdp": {"FSDPEngineWithLMHead": FSDPEngineWithLMHead},
    }
    made = {}
    for name, names in held.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(names, __path__=[])
    return made
