"""LongAct in verl 0.9: its FSDP engine, with LongAct on the model where the optimizer's options ask for it.

verl imports this module by the entry point `longact` of the group `verl.plugins`, or by
`VERL_USE_EXTERNAL_MODULES=longact_kernels.integrations.verl`, in each of its processes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from verl.workers.config.optimizer import build_optimizer
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import FSDPEngineWithLMHead

from longact_kernels import LongAct, LongActConfig
from longact_kernels.integrations.common import connect, metrics_of
from longact_kernels.sparse.config import make_config

OPTIONS = "override_optimizer_config"


# Under a vendor's name an engine goes before verl's own, which has none.
@EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cuda", vendor=["nvidia", "amd"])
class LongActEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine of language models; with LongAct if `optim.override_optimizer_config.longact` has its options.

    Without them it is verl's own engine. With them the optimizer is the one that verl's other options name:
    `SalientAdamW` of `optimizer_impl=longact_kernels`, or a stock one, which gets attached.

    Args:
        model_config, engine_config, optimizer_config, checkpoint_config: as of verl's engine.

    Attributes:
        longact: the controller, once the model is there; None where nobody asked for LongAct.

    Raises:
        ValueError: for options that do not go with LongAct, before a model is loaded.
    """

    longact: LongAct | None = None

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any):
        self._longact_config = None if engine_config.forward_only else longact_config(optimizer_config)
        if self._longact_config is not None:
            check(engine_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_optimizer(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        if self._longact_config is None:
            return super()._build_optimizer(module)
        # Here the weights are sharded; before, they are on the meta device but for those of rank 0.
        self.longact = LongAct(module, self._longact_config, sequence_group=self.ulysses_parallel_group)
        override = self.optimizer_config.override_optimizer_config
        others = {name: value for name, value in override.items() if name != "longact"}
        optimizer = build_optimizer(
            module.parameters(), replace(self.optimizer_config, override_optimizer_config=others)
        )
        connect(self.longact, optimizer)
        return optimizer

    def optimizer_step(self) -> float:
        if self.longact is not None:
            self.longact.mask_gradients()  # before they are clipped
        return super().optimizer_step()

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        outputs = super().train_batch(data, loss_function)
        if self.longact is not None and self.is_mp_src_rank_with_outputs():
            outputs["metrics"] |= {f"longact/{name}": [value] for name, value in metrics_of(self.longact).items()}
        return outputs


def longact_config(optimizer_config: Any) -> LongActConfig | None:
    """LongAct's options among those of an optimizer; None if there are none.

    Raises:
        ValueError, TypeError: for options that do not exist or do not fit.
    """
    override = optimizer_config.override_optimizer_config or {}
    if "longact" not in override:
        if optimizer_config.optimizer_impl.partition(".")[0] == "longact_kernels":
            raise ValueError(
                f"{OPTIONS}: has no longact, without which {optimizer_config.optimizer} trains densely; needed its "
                f"options, such as {OPTIONS}={{longact:{{density:0.3}}}}, or optimizer_impl=torch.optim"
            )
        return None
    if not isinstance(override["longact"], Mapping):
        raise ValueError(
            f"{OPTIONS}.longact: got {override['longact']!r}, needed LongAct's options by name, {{}} for its defaults"
        )
    return make_config(dict(override["longact"]))


def check(engine_config: Any) -> None:
    """Whether LongAct goes with an engine's options.

    Raises:
        ValueError: it does not.
    """
    if engine_config.strategy != "fsdp2":
        raise ValueError(
            f"strategy: got {engine_config.strategy!r}, whose flat weights LongAct cannot train; needed 'fsdp2'"
        )
    if engine_config.offload_policy:
        raise ValueError(
            "offload_policy: got True, which keeps weights on the CPU and activations on the GPU; needed False, with "
            "param_offload=True and optimizer_offload=True where memory is short"
        )
