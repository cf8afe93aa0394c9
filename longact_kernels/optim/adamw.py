"""`SalientAdamW`: AdamW that reads and writes only the salient channels of salient weights."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import AdamW, adamw

from longact_kernels.functional import Axis
from longact_kernels.ops.dispatch import runs_triton
from longact_kernels.ops.sparse_adamw import AdamWPlan, check_number, check_scalar
from longact_kernels.optim.base import HALF, Entry, SalientOptimizer, State
from longact_kernels.sparse.controller import LongAct
from longact_kernels.sparse.registry import params_of, salient_weights
from longact_kernels.sparse.salient_set import SalientSet
from longact_kernels.sparse.sharding import local
from longact_kernels.warning import LongActWarning

# 16-bit gradients are widened for the fp32 masters this many elements at a time, so that the copies stay small.
CHUNK_NUMEL = 2**26
# Options that only torch's AdamW has.
TORCHS = dict(amsgrad=False, differentiable=False, decoupled_weight_decay=True)


class SalientAdamW(SalientOptimizer):
    """`torch.optim.AdamW` on ordinary parameters, and AdamW on the salient rows of salient weights.

    Each row of a salient weight has its own step count τ, so that a row that enters the set late, or returns to it,
    gets the right bias correction. A step updates each row in the set::

        τ += 1;  m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²
        W = (1 − lr·weight_decay)·W − lr · (m / (1−β1^τ)) / (sqrt(v / (1−β2^τ)) + eps)

    All other rows keep W, m, v and τ bit for bit. With all rows in the set it equals `torch.optim.AdamW`. With
    `axis="columns"`, read "column" for "row".

    Args:
        params: parameters or parameter groups; the optimizer finds out by itself which of them are salient.
        lr: learning rate, a float or a 0-dim tensor.
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        longact: the controller whose sets `step` refreshes; by default it is found by the parameters. False: none is
            needed, and without one this is a dense AdamW.
        state: "full" keeps the moments of all rows; "compact" those of the current set only. At a refresh, rows that
            stay keep their moments, and rows that leave lose them.
        master_weights: keep an fp32 copy of 16-bit parameters (for salient weights, of the rows with moments) and
            update the copy. Otherwise rounding to 16 bits loses small updates. The moments are then fp32 too. If
            something else writes to such a parameter, as `load_state_dict` does, the copy follows. What is written
            through `.data` is not noticed, and the next step overwrites it.
        stochastic_rounding: without an fp32 copy, round updated 16-bit parameters up or down at random, so that the
            mean is exact. Every run rounds the same way.
        moments: dtype of the moments of salient weights. bfloat16 applies to all weights: half the bytes, rounded
            stochastically.
        foreach, fused, capturable: for ordinary parameters, as in `torch.optim.AdamW`.

    Not supported: `amsgrad`, `differentiable`, sparse gradients, and steps inside backward.

    Raises:
        ValueError, RuntimeError: for an argument out of range, or a `longact` whose weights are not among `params`.
    """

    moment_names: ClassVar = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        longact: LongAct | Literal[False] | None = None,
        state: State = "full",
        master_weights: bool = True,
        stochastic_rounding: bool = False,
        moments: torch.dtype = torch.float32,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ):
        defaults: dict[str, Any] = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            maximize=maximize, foreach=foreach, capturable=capturable, fused=fused,
        )  # fmt: skip
        AdamW([torch.zeros(1)], **defaults)  # torch's checks of torch's arguments
        super().__init__(
            params,
            defaults,
            longact=longact,
            state=state,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            moments=moments,
        )

    def _forget(self) -> None:
        super()._forget()
        self._plans: dict[Any, AdamWPlan] = {}
        self._warned = False
        self.updates_lost: Tensor | None = None  # the share of a weight's last update that rounded to nothing

    def _check_group(self, group: dict[str, Any]) -> None:
        try:
            numbers = dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        except (TypeError, ValueError):
            raise ValueError(f"betas: got {group['betas']!r}, needed two numbers") from None
        numbers |= {name: group[name] for name in ("lr", "eps", "weight_decay")}
        for name, value in numbers.items():
            (check_scalar if name == "lr" and isinstance(value, Tensor) else check_number)(name, value)

    # Ordinary parameters: torch's own AdamW

    def new_plain_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        state = {"master": p.detach().float()} if self.has_master(p) else {}
        like = state.get("master", p)
        on_device = _fused(group, p) or group["capturable"]
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        state["step"] = torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")
        for name in self.moment_names:
            state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
        return state

    def _step_plain(
        self, group: dict[str, Any], params: list[Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if not params:
            return
        fused = all(_fused(group, p) for p in params)
        if found_inf is not None and not fused:
            # Only the fused form reads the flag on the device.
            if found_inf.item():
                return
            found_inf = None
        entries = []
        for p in params:
            if p.grad.is_sparse:
                raise RuntimeError("AdamW does not support sparse gradients")
            state = self.state[p]
            if not state:
                state.update(self.new_plain_state(group, p))
            elif state["step"].ndim:
                raise RuntimeError(
                    f"SalientAdamW: a weight of shape {list(p.shape)} was stepped as a salient one and is an ordinary "
                    "one now; after LongAct.restore(), go on with a new optimizer: "
                    "torch.optim.AdamW(...).load_state_dict(optimizer.adamw_state_dict())"
                )
            if fused and state["step"].device != p.device:
                state["step"] = state["step"].to(p.device)
            entries.append((p, state))
        if fused and (masters := [entry for entry in entries if _kernel_masters(*entry)]):
            # Widening, torch's kernel and copying back would move 40 bytes an element where one kernel moves 28.
            whole = [
                Entry(
                    local(p.detach()),
                    local(p.grad).resolve_neg(),
                    None,
                    {name: local(held) for name, held in state.items()},
                )
                for p, state in masters
            ]
            self._run(group, whole, "rows", False, grad_scale, found_inf)
            entries = [entry for entry in entries if not _kernel_masters(*entry)]
        beta1, beta2 = group["betas"]
        for chunk in _chunks(entries):
            targets = [state.get("master", p) for p, state in chunk]
            grads = [p.grad.float() if "master" in state else p.grad for p, state in chunk]
            if grad_scale is not None and not fused:
                grads = [grad / grad_scale for grad in grads]
            adamw(
                targets,
                grads,
                [state["exp_avg"] for _, state in chunk],
                [state["exp_avg_sq"] for _, state in chunk],
                [],
                [state["step"] for _, state in chunk],
                foreach=False if fused else group["foreach"],
                capturable=group["capturable"],
                fused=fused,
                grad_scale=grad_scale if fused else None,
                found_inf=found_inf,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
            if masters := [(local(p), local(state["master"])) for p, state in chunk if "master" in state]:
                # Of sharded parameters the local parts: DTensor has no such operation.
                weights, copies = zip(*masters, strict=True)
                torch._foreach_copy_(weights, copies)

    # The kernel

    def _run(
        self,
        group: dict[str, Any],
        entries: list[Entry],
        axis: Axis,
        compact: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        launches = defaultdict(list)
        for entry in entries:
            weight, grad = entry.weight, entry.grad
            launches[weight.device, weight.dtype, grad.dtype, entry.state["exp_avg"].dtype].append(entry)
        lr, (beta1, beta2) = group["lr"], group["betas"]
        place = next(i for i, one in enumerate(self.param_groups) if one is group)
        for kind, launch in launches.items():
            device, dtype, _, moments = kind
            weights, grads, index, states = (list(column) for column in zip(*launch, strict=True))
            index = index if index[0] is not None else []  # none: whole weights
            masters = [state["master"] for state in states if "master" in state]
            watch = dtype in HALF and not masters and not self.stochastic_rounding
            watched = weights[0].clone() if watch and not group["capturable"] and lr > 0 else None
            held = [
                weights,
                index,
                *([state[name] for state in states] for name in (*self.moment_names, "step")),
                masters,
            ]
            key = (place, kind, axis, compact)
            if (plan := self._plans.get(key)) is None or not plan.fits(*held):
                plan = self._plans[key] = AdamWPlan(*held, compact=compact, axis=axis)
            plan.step(
                grads,
                lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64, device=device),
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                group["maximize"],
                grad_scale,
                found_inf,
                0 if self.stochastic_rounding or moments == torch.bfloat16 else None,
            )
            if watched is not None:
                self._note_lost(watched, weights[0], grads[0], found_inf)

    def _note_lost(self, before: Tensor, after: Tensor, grad: Tensor, found_inf: Tensor | None) -> None:
        """Looks at what an update did to a 16-bit weight without a master; says, once, if it was nothing."""
        asked = grad.count_nonzero().clamp(min=1)
        lost = (1 - (before != after).count_nonzero() / asked).clamp(min=0)
        if found_inf is not None and self.updates_lost is not None:
            lost = torch.where(found_inf == 0, lost, self.updates_lost)
        self.updates_lost = lost
        if self._warned or (found_inf is not None and found_inf.item()):
            return
        self._warned = True
        if torch.equal(before, after) and grad.any():
            warnings.warn(
                f"the update of {after.dtype} weights rounds to nothing at this learning rate; use "
                "master_weights=True or stochastic_rounding=True",
                LongActWarning,
                stacklevel=5,
            )

    # Checkpoints of torch's AdamW

    def completed(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Once it has loaded something, torch's Optimizer has its own options among the defaults.
        return [
            {name: value for name, value in {**self.defaults, **group}.items() if name not in TORCHS}
            for group in groups
        ]

    def _check_foreign(self, p: Tensor, state: dict[str, Tensor]) -> None:
        if "max_exp_avg_sq" in state:
            raise ValueError("load_state_dict: saved with amsgrad=True, which SalientAdamW does not have")
        super()._check_foreign(p, state)

    def adopt(self, p: Tensor, state: dict[str, Tensor], salient: SalientSet | None) -> dict[str, Tensor]:
        if salient is None and not self.by_kernel(p):
            if self.has_master(p):
                moments = {name: state[name].float() for name in self.moment_names}
                return {"step": state["step"], **moments, "master": p.detach().float()}
            return state
        dim = 0 if salient is None else salient.dim
        own = local if salient is not None and self.compact else lambda held: held
        adopted = self.new_state(p, own(p.detach()), dim)
        adopted["step"].fill_(int(state["step"]))
        for name in self.moment_names:
            adopted[name].copy_(own(state[name]))
        if salient is not None and self.compact:
            adopted["rows"] = torch.arange(local(p).shape[dim], device=p.device)
        return adopted

    @torch.no_grad()
    def adamw_state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.AdamW` loads it, to go on densely.

        That counts the steps of a parameter, not of its rows: those of a row become the parameter's largest, and its
        moments are scaled so that their bias-corrected values stay. Rows without state get none (zero moments).
        """
        saved = Optimizer.state_dict(self)
        salient = salient_weights()
        state = {}
        for group in self.param_groups:
            betas = group["betas"]
            for p in group["params"]:
                if not (own := self.state.get(p)):
                    continue
                dim = salient[id(p)][1].salient.dim if id(p) in salient else 0
                state[p] = own if own["step"].ndim == 0 else _of_parameter(p, own, dim, betas)
        ids = dict(zip(params_of(self.param_groups), params_of(saved["param_groups"]), strict=True))
        names = ("step", *self.moment_names)
        return {
            "state": {ids[p]: {name: own[name] for name in names} for p, own in state.items()},
            "param_groups": [{**group, **TORCHS} for group in saved["param_groups"]],
        }


def _kernel_masters(p: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether our kernel steps an ordinary parameter and its master at once: on a GPU, where memory alone counts."""
    tensors = [local(held) for held in (p, p.grad, *state.values()) if held is not None]
    return "master" in state and runs_triton(tensors[0]) and all(tensor.is_contiguous() for tensor in tensors)


def _fused(group: dict[str, Any], p: Tensor) -> bool:
    """Whether a parameter is stepped by torch's fused kernel: on a GPU by default, since it obeys flags there."""
    if group["fused"] is not None or group["foreach"] is not None:
        return bool(group["fused"])
    return p.is_cuda and p.is_floating_point()


def _of_parameter(p: Tensor, state: dict[str, Tensor], dim: int, betas: tuple[float, float]) -> dict[str, Tensor]:
    """State of some channels, each with its own step count, as one of the whole parameter with a common count."""
    tau = state["step"].double()
    common = tau.max()
    whole: dict[str, Tensor] = {"step": common.float().cpu()}
    for name, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True):
        shape = [1] * p.ndim
        shape[dim] = -1
        corrected = (1 - beta**common) / (1 - beta**tau).clamp(min=1 - beta)
        values = (state[name].float() * corrected.float().view(shape)).to(state[name].dtype)
        if "rows" in state:
            filled = state["rows"] >= 0
            values = values.new_zeros(p.shape).index_copy_(
                dim, state["rows"][filled], values.index_select(dim, filled.nonzero().flatten())
            )
        whole[name] = values
    return whole


def _chunks(entries: list[tuple[Any, dict[str, Tensor]]]) -> Iterator[list[tuple[Any, dict[str, Tensor]]]]:
    chunk: list[tuple[Any, dict[str, Tensor]]] = []
    total = 0
    for p, state in entries:
        numel = p.numel()
        if chunk and total + numel > CHUNK_NUMEL:
            yield chunk
            chunk, total = [], 0
        chunk.append((p, state))
        total += numel
    if chunk:
        yield chunk
