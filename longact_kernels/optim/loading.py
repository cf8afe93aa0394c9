"""Whether a saved state can go on in an optimizer of salient weights: said before any of it is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longact_kernels.sparse import checks, finite
from longact_kernels.sparse.controller import LongAct
from longact_kernels.sparse.layer import SalientLayer
from longact_kernels.sparse.registry import params_of
from longact_kernels.sparse.sharding import local


def check_form(state_dict: Any) -> None:
    """Raises ValueError for what no optimizer's `state_dict` gave."""
    parts = state_dict if isinstance(state_dict, Mapping) else {}
    state, groups = parts.get("state"), parts.get("param_groups")
    grouped = isinstance(groups, (list, tuple)) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups
    )
    if not grouped or not isinstance(state, Mapping) or not all(isinstance(own, Mapping) for own in state.values()):
        raise ValueError(
            f"load_state_dict: got a {type(state_dict).__name__} without a 'state' of dicts and 'param_groups' with "
            "'params'; needed what an optimizer's state_dict() gave"
        )
    if strange := state.keys() - set(params_of(parts["param_groups"])):
        raise ValueError(
            f"load_state_dict: state {min(map(repr, strange))} is of no parameter in 'param_groups', and would be "
            "lost; needed the keys as they were saved (JSON makes strings of numbers)"
        )


def with_tensor_step(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's saved state, its step count as a tensor: old checkpoints of torch have a number."""
    step = state.get("step")
    return {**state, "step": torch.tensor(float(step))} if isinstance(step, (int, float)) else state


def check_numbers(optimizer: Any, what: str, state: dict[str, Any]) -> None:
    """Raises ValueError for a state without moments, or with numbers that no step leaves."""
    if missing := [name for name in ("step", *optimizer.moment_names) if not isinstance(state.get(name), Tensor)]:
        raise ValueError(
            f"load_state_dict: no {', '.join(missing)} for {what}; needed a checkpoint of {type(optimizer).__name__}, "
            "or of torch's optimizer of that kind"
        )
    for name, held in state.items():
        checks.saved_tensor(name, what, held)
    numbers = [name for name in (*optimizer.moment_names, "master") if name in state]
    for name in numbers:
        if not state[name].is_floating_point():
            raise ValueError(f"load_state_dict: {name} of {what} was saved as {state[name].dtype}, needed floats")
    if bad := list(itertools.compress(numbers, finite.nonfinite(state[name] for name in numbers).tolist())):
        raise ValueError(
            f"load_state_dict: NaN or Inf in {', '.join(bad)} of {what}; use a checkpoint from before that"
        )
    count = local(state["step"]).double()
    if not ((count >= 0) & (count < 2**31)).all():
        raise ValueError(
            f"load_state_dict: the step of {what} goes from {count.min():g} to {count.max():g}, needed counts of "
            "at least 0; the checkpoint is damaged"
        )


def check_state(
    optimizer: Any, p: Tensor, state: dict[str, Tensor], salient: tuple[LongAct, SalientLayer] | None
) -> None:
    """Raises ValueError for state of another optimizer of this kind that cannot go on in this one."""
    what = f"a parameter of shape {list(p.shape)}"
    by_kernel, dim, shape = optimizer.by_kernel(p), 0, list(p.shape)
    counts: list[list[int]] = [[1], shape[:1]] if by_kernel else [[]]  # of its steps
    if salient is not None:
        longact, layer = salient
        what, dim, by_kernel = layer.salient.name, layer.salient.dim, True
        longact.check_state_for(layer.salient, state)
        if ("rows" in state) != optimizer.compact:
            ours, theirs = ("compact", "full") if optimizer.compact else ("full", "compact")
            raise ValueError(
                f"load_state_dict: {what} was saved with state={theirs!r}, this optimizer has state={ours!r}"
            )
        if optimizer.compact:
            checks.saved_channels("rows", what, state["rows"], shape[dim])
            shape[dim] = len(state["rows"])
        counts = [[shape[dim]]]
    elif "salient_steps" in state:
        raise ValueError(
            f"load_state_dict: {what} was saved as a salient weight, and is an ordinary one here; needed LongAct "
            "on the model, with the target_modules of the saved run"
        )
    if ("master" in state) != optimizer.has_master(p):
        have, has = ("no", "") if optimizer.has_master(p) else ("an", "no ")
        raise ValueError(
            f"load_state_dict: {what} was saved with {have} fp32 master, this optimizer has {has}one for its "
            f"{p.dtype} weight; use the dtype and the master_weights of the saved run"
        )
    moments = optimizer.moments if by_kernel else torch.float32 if optimizer.has_master(p) else p.dtype
    dtypes = dict.fromkeys(optimizer.moment_names, moments) | ({"master": torch.float32} if "master" in state else {})
    for name, dtype in dtypes.items():
        held = state[name]
        if held.dtype != dtype or list(held.shape) != shape:
            raise ValueError(
                f"load_state_dict: {name} of {what} was saved as {held.dtype} {list(held.shape)}, this optimizer "
                f"keeps {dtype} {shape}; use the model, the dtype and the options of the saved run"
            )
    if list(state["step"].shape) not in counts or (by_kernel and state["step"].dtype != torch.int32):
        raise ValueError(
            f"load_state_dict: the step of {what} was saved as {state['step'].dtype} {list(state['step'].shape)}, "
            f"this optimizer keeps {counts[-1]}; use the options of the saved run"
        )
