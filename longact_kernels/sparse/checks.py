"""Whether layers can be trained sparsely: before they are swapped, once a step, and when a state is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longact_kernels.reference.channels import check_channels
from longact_kernels.sparse.config import LongActConfig, difference
from longact_kernels.sparse.layer import SalientLayer
from longact_kernels.sparse.projections import Projection
from longact_kernels.sparse.registry import ids_of
from longact_kernels.sparse.salient_set import SalientSet
from longact_kernels.sparse.sharding import is_sharded
from longact_kernels.sparse.tensor_parallel import wrapped_forward
from longact_kernels.warning import LongActWarning

# What checkpoints of 0.1 lack.
SINCE_0_1 = ("salient_options", "salient_before", "salient_first", "salient_times")


def projections(found: list[Projection], config: LongActConfig) -> None:
    """What our forward, our kernels, one buffer for all layers and the options need of the layers.

    Raises:
        ValueError: if a layer lacks it; the message names the layer.
    """
    if not any(one.module.get_parameter("weight").requires_grad for one in found):
        raise ValueError(
            f"model: none of the {len(found)} layers to train sparsely requires a gradient (the first is "
            f"{found[0].name}); unfreeze their weights with requires_grad_(True), or train without LongAct: adapters "
            "beside frozen weights have no rows to choose from"
        )
    remedy = "load the model on one device, without device_map or offloading, and use FSDP2 where a GPU is too small"
    if len(devices := {str(one.module.get_parameter("weight").device) for one in found}) > 1:
        raise ValueError(f"model: the layers to train sparsely lie on {' and '.join(sorted(devices))}; {remedy}")
    for one in found:
        if any(head.kind == "other" for head in one.heads) and (config.site != "projection" or config.pair_rope):
            name, value = ("pair_rope", True) if config.pair_rope else ("site", config.site)
            raise ValueError(
                f"{name}: {value!r} is about queries and keys, and {one.name} makes neither; leave it out of "
                f"target_modules, or leave {name} out"
            )
        weight = one.module.get_parameter("weight")
        if "forward" in vars(one.module) and wrapped_forward(one.module) is None:
            raise ValueError(f"model: {one.name} has a forward of its own in place of its class's; {remedy}")
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"model: the weight of {one.name} is {weight.dtype}; needed float32, bfloat16 or float16, such as "
                "model.float()"
            )
        if not is_sharded(weight) and weight.shape[1] > 1 and weight.stride(1) != 1:
            raise ValueError(
                f"model: the weight of {one.name} has strides {tuple(weight.stride())}; needed rows contiguous: "
                "layer.weight.data = layer.weight.data.contiguous()"
            )


def in_place(model: nn.Module, layers: Mapping[str, SalientLayer]) -> None:
    """Raises RuntimeError if something has been put in the place of a layer, such as an adapter."""
    modules: dict[str, Any] = {"": model}

    def find(name: str) -> Any:
        """`get_submodule`, which takes long for every layer of a large model at every step."""
        if name not in modules:
            path, _, own = name.rpartition(".")
            modules[name] = getattr(find(path), own, None)
        return modules[name]

    for name, layer in layers.items():
        found = find(name)
        if found is not layer:
            what = "gone" if found is None else f"a {type(found).__module__}.{type(found).__name__} now"
            raise RuntimeError(
                f"LongAct: {name} is {what}, so that its weight would not be trained sparsely; put adapters on "
                "other layers, before LongAct is made (they train densely beside it), or train without LongAct"
            )


def apart(layers: Mapping[str, SalientLayer]) -> None:
    """Raises RuntimeError if two layers have come to share a weight."""
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(layer.weight), name)
        if other != name:
            raise RuntimeError(
                f"LongAct: {name} shares its weight with {other} now; needed a weight each, since each has a set of "
                "its own"
            )


def trained(layers: Mapping[str, SalientLayer], optimizer: torch.optim.Optimizer) -> None:
    """Warns of a layer that has another weight now than the one that an optimizer about to step holds."""
    ids = ids_of(optimizer)
    for name, layer in layers.items():
        old, new = layer.salient.passes.weight, layer.weight
        if old is not None and old is not new and new.requires_grad and id(old) in ids and id(new) not in ids:
            warnings.warn(
                f"LongAct: {name} has another weight than the one that this {type(optimizer).__name__} holds, and does "
                "not train unless another optimizer has it; make the optimizer after the weight is put in, or write "
                "into the old one: layer.weight.data.copy_(...)",
                LongActWarning,
                stacklevel=3,
            )


def saved_tensor(name: str, what: str, value: Any) -> None:
    """Raises ValueError for what of a saved state is no tensor with its values in memory."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        kind = (
            f"a {value.layout} tensor on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        )
        raise ValueError(
            f"load_state_dict: {name} of {what} is {kind}, needed a dense tensor; the checkpoint is damaged"
        )


def saved_channels(name: str, what: str, value: Tensor, channels: int) -> None:
    """Raises ValueError for what of a saved state is no ascending set of so many channels."""
    try:
        check_channels(name, [value], [channels])
    except IndexError as error:
        raise ValueError(f"load_state_dict: {what}: {error}; the checkpoint is damaged") from error


def saved_set(salient: SalientSet, config: LongActConfig, own: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Raises ValueError for a saved state that has no salient set, one of another size or kind, or one that is none.

    Args:
        salient: the layer's set.
        config: with its density.
        own: what would be saved of it now.
        state: as it was saved.
    """
    if "salient_steps" not in state or "salient_rows" not in state:
        raise ValueError(
            f"load_state_dict: no salient set for {salient.name}; needed a state dict that SalientAdamW saved "
            "while LongAct was on the model"
        )
    for name, value in state.items():
        if name.startswith("salient_"):
            saved_tensor(name, salient.name, value)
    if (saved := state["salient_rows"].numel()) != salient.size:
        raise ValueError(
            f"load_state_dict: {salient.name} was saved with {saved} salient {salient.axis}, this LongAct keeps "
            f"{salient.size}; use the density and scope of the saved run"
        )
    if differs := difference(config, state.get("salient_options", torch.empty(0)).flatten().tolist()):
        raise ValueError(f"load_state_dict: {salient.name} was saved with {differs}; use that of the saved run")
    for name, ours in own.items():
        if name not in state and name in SINCE_0_1:
            continue
        held = state.get(name)
        if held is None or held.shape != ours.shape or held.dtype != ours.dtype:
            got = "none" if held is None else f"{held.dtype} {list(held.shape)}"
            raise ValueError(
                f"load_state_dict: {name} of {salient.name}: got {got}, needed {ours.dtype} {list(ours.shape)}; use "
                "the options of the saved run"
            )
    for name in ("salient_steps", "salient_times"):
        if name in state and state[name] < 0:
            raise ValueError(
                f"load_state_dict: {name} of {salient.name} is {int(state[name])}, needed a count of at least 0; "
                "the checkpoint is damaged"
            )
    channels = salient.channels.stop - salient.channels.start
    saved_channels("salient_rows", salient.name, state["salient_rows"], channels)
