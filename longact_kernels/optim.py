"""`SalientAdamW`: AdamW that reads and writes only the salient rows of salient weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from longact_kernels import ops
from longact_kernels.modules import SalientChannels, salient_channels
from longact_kernels.saliency import LongAct

State = Literal["full", "compact"]

# 16-bit gradients are widened for the fp32 masters this many elements at a time, so that the copies stay small.
CHUNK_NUMEL = 2**26


class SalientAdamW(Optimizer):
    """`torch.optim.AdamW` on ordinary parameters, and AdamW on the salient rows of salient weights.

    For each row i in the set of a salient weight, with a step count τ of its own (a row that enters late, or comes
    back, gets the bias correction of its own history)::

        τ += 1;  m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²
        W = (1 − lr·weight_decay)·W − lr · (m / (1−β1^τ)) / (sqrt(v / (1−β2^τ)) + eps)

    All other rows keep W, m, v and τ bit for bit. With every row in the set it equals `torch.optim.AdamW`.

    Args:
        params: parameters or parameter groups; which of them are salient is read from the weights themselves.
        lr: learning rate, a float or a 0-dim tensor.
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        longact: the controller whose sets `step` refreshes; found through the weights if not given.
        state: "full" keeps moments of all rows; "compact" of the current set only: those of rows that stay are carried
            over at a refresh, those of rows that leave are dropped.
        master_weights: keep an fp32 copy of 16-bit parameters (of salient weights the rows with moments) and apply
            updates to it: an update far below a weight's last 16-bit digit would else be lost to rounding. The moments
            are then fp32 too.
        foreach, fused: how ordinary parameters are stepped, as in `torch.optim.AdamW`.

    Raises:
        ValueError: for an argument out of range, or a `longact` whose weights are not among `params`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        longact: LongAct | None = None,
        state: State = "full",
        master_weights: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ):
        for argument, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{argument}: got {value}, needed a number of at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, needed two numbers of at least 0 and below 1")
        if state not in get_args(State):
            raise ValueError(f"state: got {state!r}, needed one of {', '.join(map(repr, get_args(State)))}")
        self.compact = state == "compact"
        self.master_weights = master_weights
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, foreach=foreach, fused=fused
        )
        super().__init__(params, defaults)
        if longact is not None and longact not in self._controllers():
            raise ValueError("longact: none of its projections' weights is among the parameters given")

    def _salient(self) -> Iterator[tuple[Tensor, SalientChannels]]:
        for group in self.param_groups:
            for p in group["params"]:
                if (salient := salient_channels(p)) is not None:
                    yield p, salient

    def _controllers(self) -> list[LongAct]:
        return list(dict.fromkeys(salient.owner for _, salient in self._salient()))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step, then refreshes the salient sets on schedule."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        controllers = self._controllers()
        for longact in controllers:
            longact.mask_gradients()
        for group in self.param_groups:
            dense: list[Tensor] = []
            salient: list[Tensor] = []
            for p in group["params"]:
                if p.grad is not None:
                    (dense if salient_channels(p) is None else salient).append(p)
            self._step_dense(group, dense)
            self._step_salient(group, salient)
        for longact in controllers:
            longact.advance()
        return loss

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in (torch.float16, torch.bfloat16)

    def _step_dense(self, group: dict[str, Any], params: list[Any]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                if self._has_master(p):
                    state["master"] = p.detach().float()
                like = state.get("master", p)
                state["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
                state["exp_avg"] = torch.zeros_like(like, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(like, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        for chunk in _chunks(params):
            states = [self.state[p] for p in chunk]
            targets = [state.get("master", p) for state, p in zip(states, chunk, strict=True)]
            adamw(
                targets,
                [p.grad.to(target.dtype) for p, target in zip(chunk, targets, strict=True)],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                foreach=group["foreach"],
                fused=group["fused"],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
            if outdated := [p for p in chunk if "master" in self.state[p]]:
                torch._foreach_copy_(outdated, [self.state[p]["master"] for p in outdated])

    def _step_salient(self, group: dict[str, Any], params: list[Any]) -> None:
        launches = defaultdict(list)
        self._follow_sets(params)
        for p in params:
            launches[p.device, p.dtype, p.grad.dtype].append(p)
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        for (device, *_), weights in launches.items():
            states = [self.state[p] for p in weights]
            ops.sparse_adamw_(
                [p.detach() for p in weights],
                [p.grad for p in weights],
                [p.salient.rows for p in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                [state["master"] for state in states if "master" in state],
                lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64, device=device),
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                self.compact,
                group["maximize"],
            )

    def _follow_sets(self, params: list[Any]) -> None:
        """Makes the salient weights' state, and moves compact state over to the rows that are salient now."""
        moved = []
        for p in params:
            state, rows = self.state[p], p.salient.rows
            if not state:
                kept = p.detach()[rows] if self.compact else p.detach()
                state["step"] = torch.zeros(len(kept), dtype=torch.int32, device=p.device)
                state["exp_avg"] = torch.zeros_like(kept, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(kept, dtype=torch.float32)
                if self._has_master(p):
                    state["master"] = kept.float()
                if self.compact:
                    state["rows"] = rows
            elif self.compact and state["rows"] is not rows:
                moved.append((p, state, rows))
        names = ("step", "exp_avg", "exp_avg_sq", "master")
        states = [[state[name] for name in names if name in state] for _, state, _ in moved]
        stays = ops.carry_(states, [state["rows"] for _, state, _ in moved], [rows for *_, rows in moved])
        for (p, state, rows), kept in zip(moved, stays, strict=True):
            state["rows"] = rows
            if "master" in state:
                state["master"] = torch.where(kept.unsqueeze(1), state["master"], p.detach()[rows].float())

    def salient_state_bytes(self) -> tuple[int, int]:
        """Bytes of state kept for the salient weights, and what dense AdamW with the same masters would keep."""
        ours = dense = 0
        for p, _ in self._salient():
            ours += sum(value.nbytes for value in self.state[p].values())
            dense += p.numel() * 4 * (3 if self._has_master(p) else 2)
        return ours, dense

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's; it also holds the salient sets and the statistics of a refresh period under way."""
        saved = super().state_dict()
        state = dict(saved["state"])
        for p, i in zip(_params(self.param_groups), _params(saved["param_groups"]), strict=True):
            if i in state and (salient := salient_channels(p)) is not None:
                state[i] = {**state[i], **salient.owner.state_for(salient)}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, in the dtypes that it was saved in.

        Raises:
            ValueError: if the groups differ, or the state of a salient weight is of another size or kind; nothing is
                loaded then.
        """
        # Groups that differ are for Optimizer.load_state_dict to explain.
        ids = zip(_params(self.param_groups), _params(state_dict["param_groups"]), strict=False)
        pairs = [(p, state_dict["state"][i]) for p, i in ids if i in state_dict["state"]]
        for p, state in pairs:
            if (salient := salient_channels(p)) is not None:
                salient.owner.check_state_for(salient, state)
                if ("rows" in state) != self.compact:
                    ours, theirs = ("compact", "full") if self.compact else ("full", "compact")
                    raise ValueError(
                        f"load_state_dict: {salient.name} was saved with state={theirs!r}, this optimizer has "
                        f"state={ours!r}"
                    )
        super().load_state_dict(state_dict)
        for p, state in pairs:
            # Optimizer.load_state_dict casts state to the parameter's dtype: fp32 moments of bf16 weights get rounded.
            state = {
                name: value if name == "step" and value.ndim == 0 else value.to(p.device)
                for name, value in state.items()
            }
            if (salient := salient_channels(p)) is not None:
                salient.owner.load_state_for(salient, state)
            self.state[p] = {name: value for name, value in state.items() if not name.startswith("salient_")}


def _params(groups: list[dict[str, Any]]) -> Iterator[Any]:
    for group in groups:
        yield from group["params"]


def _chunks(params: list[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    numel = 0
    for p in params:
        if chunk and numel + p.numel() > CHUNK_NUMEL:
            yield chunk
            chunk, numel = [], 0
        chunk.append(p)
        numel += p.numel()
    if chunk:
        yield chunk
