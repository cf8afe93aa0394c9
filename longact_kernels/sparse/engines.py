"""Engines that keep weights or gradients in a form where rows cannot be told: refused, each by its name."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

REMEDY = "use FSDP2 (torch.distributed.fsdp.fully_shard), or DistributedDataParallel"


def engine_of(module: nn.Module) -> str | None:
    """The engine that trains a layer's weight in another form than the layer's own, known by the marks it leaves."""
    weight = getattr(module, "weight", None)
    taken = isinstance(weight, torch.Tensor) and not isinstance(module._parameters.get("weight"), nn.Parameter)
    if getattr(weight, "_fsdp_flattened", False) or (taken and getattr(module, "_is_fsdp_managed_module", False)):
        return "FSDP1 (FullyShardedDataParallel), which flattens weights"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3, which flattens weights"
    if hasattr(weight, "_hp_mapping"):
        return "DeepSpeed ZeRO, whose optimizer steps flat copies of weights"
    if hasattr(weight, "main_grad"):
        return "Megatron's DistributedDataParallel, which keeps gradients elsewhere"
    return None


def refuse(name: str, module: nn.Module, error: type[Exception]) -> None:
    """Raises an error, which names the engine, if one trains the layer of that name."""
    if (engine := engine_of(module)) is not None:
        raise error(f"LongAct: {name} is trained by {engine}: it would train densely; {REMEDY}")


def refuse_join() -> None:
    """Raises RuntimeError inside `DistributedDataParallel.join()`, where ranks without inputs skip our collectives."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and ddp._join_config.enable and not ddp._join_config.throw_on_early_termination:
        raise RuntimeError(
            "LongAct: inside DistributedDataParallel.join() ranks that have run out of inputs take no steps, and the "
            "others would wait for their statistics for ever; give all ranks as many batches "
            "(DistributedSampler(drop_last=True)), or use join(throw_on_early_termination=True)"
        )
