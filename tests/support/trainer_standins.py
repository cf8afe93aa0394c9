"""Plug-in points of other trainers, with names and signatures as of the versions in docs/trainers.md."""

from dataclasses import dataclass, field
from types import ModuleType

import torch
from transformers import Trainer


# Axolotl 0.19.0: axolotl.integrations.base, axolotl.core.trainers.base
class BasePlugin:
    def get_trainer_cls(self, cfg):
        return None


class AxolotlTrainer(Trainer):
    def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)


# ms-swift 4.6.0: swift.optimizers, swift.trainers
class OptimizerCallback:
    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer

    def create_optimizer(self, model=None):
        return Trainer.create_optimizer(self.trainer, **({} if model is None else {"model": model}))


optimizers_map = {"default": OptimizerCallback}


class SwiftTrainer(Trainer):
    def __init__(self, *args, optimizer="default", **kwargs):
        super().__init__(*args, **kwargs)
        self.optimizer_callback = optimizers_map[optimizer](self.args, self)

    def create_optimizer(self, model=None):
        self.optimizer = self.optimizer_callback.create_optimizer(model=model)
        return self.optimizer


# LLaMA-Factory 0.9.5: llamafactory.v1.plugins.trainer_plugins.optimizer
class OptimizerPlugin:
    registry: dict = {}  # noqa: RUF012

    def __init__(self, name):
        self.name = name

    def register(self, method="__call__"):
        def decorator(function):
            self.registry[self.name] = function
            return function

        return decorator

    def __call__(self, *args):
        return self.registry[self.name](*args)


# torchtitan 0.3.0: torchtitan.components.optimizer
@dataclass(kw_only=True, slots=True)
class ParamGroupConfig:
    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict = field(default_factory=dict)


class OptimizersContainer(torch.optim.Optimizer):
    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list = field(default_factory=list)

    @staticmethod
    def _resolve_optimizer_factory(name):
        return {"AdamW": torch.optim.AdamW}[name]

    def __init__(self, config, *, model_parts):
        self.optimizers = []
        for part in model_parts:
            names, params = zip(*part.named_parameters(), strict=True)
            for group in config.param_groups:
                made = {"params": list(params), "param_names": list(names), **group.optimizer_kwargs}
                self.optimizers.append(self._resolve_optimizer_factory(group.optimizer_name)([made]))
        super().__init__([p for part in model_parts for p in part.parameters()], {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        """Flat, by the names of parameters; a new optimizer first takes a step without gradients, at a rate of 0."""
        flat = {}
        for optimizer in self.optimizers:
            make_state(optimizer)
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                for i, name in zip(group["params"], group["param_names"], strict=True):
                    flat |= {f"state.{name}.{key}": value for key, value in saved["state"].get(i, {}).items()}
                    options = group.keys() - {"params", "param_names"}
                    flat |= {f"param_groups.{name}.{key}": group[key] for key in options}
        return flat

    def load_state_dict(self, flat):
        """Takes what goes by the names that an optimizer's own state has."""
        for optimizer in self.optimizers:
            make_state(optimizer)
            state, groups, i = {}, [], 0
            for group in optimizer.param_groups:
                first = group["param_names"][0]
                options = {key: flat[f"param_groups.{first}.{key}"] for key in group.keys() - {"params", "param_names"}}
                groups.append({"params": [*range(i, i + len(group["params"]))], **options})
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    state[i] = {key: flat[f"state.{name}.{key}"] for key in optimizer.state[p]}
                    i += 1
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def make_state(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.state or any(p.grad is not None for p in params):
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for p in params:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()


def modules() -> dict[str, ModuleType]:
    """For `sys.modules`."""
    held = {
        "axolotl.integrations.base": [BasePlugin],
        "axolotl.core.trainers.base": [AxolotlTrainer],
        "swift.optimizers": [OptimizerCallback],
        "llamafactory.v1.plugins.trainer_plugins.optimizer": [OptimizerPlugin],
        "torchtitan.components.optimizer": [OptimizersContainer, ParamGroupConfig],
    }
    made = {}
    for path, classes in held.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:i]), ModuleType(parts[i - 1])).__path__ = []
        vars(made[path]).update({cls.__name__: cls for cls in classes})
    made["swift.optimizers"].optimizers_map = optimizers_map
    return made
