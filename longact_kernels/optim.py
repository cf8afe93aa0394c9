"""`SalientAdamW`: AdamW that reads and writes only the salient channels of salient weights."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from longact_kernels import ops
from longact_kernels.functional import Axis
from longact_kernels.modules import SalientChannels, salient_weights
from longact_kernels.saliency import LongAct
from longact_kernels.shards import is_sharded, local, local_channels, zeros_by_channel
from longact_kernels.warning import LongActWarning

State = Literal["full", "compact"]

# 16-bit gradients are widened for the fp32 masters this many elements at a time, so that the copies stay small.
CHUNK_NUMEL = 2**26
HALF = (torch.float16, torch.bfloat16)


class SalientAdamW(Optimizer):
    """`torch.optim.AdamW` on ordinary parameters, and AdamW on the salient rows of salient weights.

    For each row i in the set of a salient weight, with a step count τ of its own (a row that enters late, or comes
    back, gets the bias correction of its own history)::

        τ += 1;  m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²
        W = (1 − lr·weight_decay)·W − lr · (m / (1−β1^τ)) / (sqrt(v / (1−β2^τ)) + eps)

    All other rows keep W, m, v and τ bit for bit. With every row in the set it equals `torch.optim.AdamW`. Along
    columns read "column" for "row".

    Args:
        params: parameters or parameter groups; which of them are salient is read from the model's layers.
        lr: learning rate, a float or a 0-dim tensor.
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        longact: the controller whose sets `step` refreshes; found by itself if not given.
        state: "full" keeps moments of all rows; "compact" of the current set only: those of rows that stay are carried
            over at a refresh, those of rows that leave are dropped.
        master_weights: keep an fp32 copy of 16-bit parameters (of salient weights the rows with moments) and apply
            updates to it: an update far below a weight's last 16-bit digit would else be lost to rounding. The moments
            are then fp32 too.
        stochastic_rounding: without a master, round updated 16-bit parameters up or down with odds that make the mean
            exact, the same at every run.
        moments: dtype of the moments of salient weights, and of all others too where it is bf16: half the bytes,
            rounded stochastically.
        foreach, fused, capturable: how ordinary parameters are stepped, as in `torch.optim.AdamW`.

    Raises:
        ValueError: for an argument out of range, or a `longact` whose weights are not among `params`.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over its scale, and what overflowed, as attributes

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
        stochastic_rounding: bool = False,
        moments: torch.dtype = torch.float32,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ):
        for argument, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{argument}: got {value}, needed a number of at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, needed two numbers of at least 0 and below 1")
        if state not in get_args(State):
            raise ValueError(f"state: got {state!r}, needed one of {', '.join(map(repr, get_args(State)))}")
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments: got {moments}, needed torch.float32 or torch.bfloat16")
        if stochastic_rounding and master_weights:
            raise ValueError(
                "stochastic_rounding: with masters nothing is lost to rounding; needed master_weights=False"
            )
        self.compact = state == "compact"
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.moments = moments
        self._warned = False
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        super().__init__(params, defaults)
        if longact is not None and longact not in self._controllers(salient_weights()):
            raise ValueError("longact: none of its projections' weights is among the parameters given")

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own leaves out what a subclass adds.
        options = ("compact", "master_weights", "stochastic_rounding", "moments", "_warned")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in options}}

    def _controllers(self, salient: dict[int, SalientChannels]) -> list[LongAct]:
        """Those of this optimizer's salient weights."""
        return list(dict.fromkeys(salient[id(p)].owner for p in _params(self.param_groups) if id(p) in salient))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step, then refreshes the salient sets on schedule.

        Raises:
            RuntimeError: if a weight that was stepped as a salient one is none any more.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        salient = salient_weights()
        controllers = self._controllers(salient)
        if any(longact.idle for longact in controllers) and all(group["lr"] == 0 for group in self.param_groups):
            # How torch.distributed.checkpoint makes the state of a new optimizer, to load a saved one into it.
            self._make_states(salient)
            return loss
        for longact in controllers:
            longact.mask_gradients()
        grad_scale, found_inf = self._scaling(controllers)
        for group in self.param_groups:
            plain: list[Tensor] = []
            whole: list[Tensor] = []
            sparse: list[tuple[Tensor, SalientChannels]] = []
            for p in group["params"]:
                channels = salient.get(id(p))
                if channels is not None and (p.grad is not None or channels.grad is not None):
                    sparse.append((p, channels))
                elif p.grad is not None:
                    (whole if self._by_kernel(p) else plain).append(p)
            self._step_plain(group, plain, grad_scale, found_inf)
            self._step_whole(group, whole, grad_scale, found_inf)
            self._step_salient(group, sparse, grad_scale, found_inf)
        for longact in controllers:
            longact.advance()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As every optimizer's; clears compact gradients too."""
        super().zero_grad(set_to_none)
        for longact in self._controllers(salient_weights()):
            longact.zero_grad()

    def _scaling(self, controllers: list[LongAct]) -> tuple[Tensor | None, Tensor | None]:
        """The scale that gradients carry, and whether any overflowed, as GradScaler left them here."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        compact = [longact.grads for longact in controllers if longact.grads is not None]
        if found_inf is not None and compact:
            if grad_scale is None:
                raise RuntimeError(
                    "grad: GradScaler.unscale_() cannot see compact gradients; leave unscaling to GradScaler.step(), "
                    "or use LongAct(grad='full')"
                )
            for grads in compact:
                # Never above 1, which is all that torch's fused AdamW looks for.
                found_inf = torch.maximum(found_inf, (~grads.isfinite().all()).to(found_inf))
        return grad_scale, found_inf

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in HALF

    def _by_kernel(self, p: Tensor) -> bool:
        """Whether an ordinary parameter needs what torch's AdamW lacks."""
        return self.moments == torch.bfloat16 or (self.stochastic_rounding and p.dtype in HALF)

    def _make_states(self, salient: dict[int, SalientChannels]) -> None:
        """Makes the state of all parameters with a gradient, but for that of sets which are not chosen yet."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or self.state[p]:
                    continue
                if id(p) not in salient and not self._by_kernel(p):
                    self.state[p].update(self._new_plain_state(group, p))
                elif id(p) not in salient or not self.compact:
                    self.state[p].update(self._new_state(p, p.detach(), salient[id(p)].dim if id(p) in salient else 0))

    # Ordinary parameters: torch's own AdamW

    def _new_plain_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        state = {"master": p.detach().float()} if self._has_master(p) else {}
        like = state.get("master", p)
        state["step"] = torch.zeros((), device=p.device if group["fused"] or group["capturable"] else "cpu")
        state["exp_avg"] = torch.zeros_like(like, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(like, memory_format=torch.preserve_format)
        return state

    def _step_plain(
        self, group: dict[str, Any], params: list[Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if params and found_inf is not None and not group["fused"]:
            # Only the fused form reads the scaler's tensors on the device.
            if found_inf.item():
                return
            found_inf = None
        entries = []
        for p in params:
            state = self.state[p]
            if not state:
                state.update(self._new_plain_state(group, p))
            elif state["step"].ndim:
                raise RuntimeError(
                    f"SalientAdamW: a weight of shape {list(p.shape)} was stepped as a salient one and is an ordinary "
                    "one now; after LongAct.restore(), go on with a new optimizer: "
                    "torch.optim.AdamW(...).load_state_dict(optimizer.adamw_state_dict())"
                )
            entries.append((p, state))
        beta1, beta2 = group["betas"]
        for chunk in _chunks(entries):
            targets = [state.get("master", p) for p, state in chunk]
            grads = [p.grad.float() if "master" in state else p.grad for p, state in chunk]
            if grad_scale is not None and not group["fused"]:
                grads = [grad / grad_scale for grad in grads]
            adamw(
                targets,
                grads,
                [state["exp_avg"] for _, state in chunk],
                [state["exp_avg_sq"] for _, state in chunk],
                [],
                [state["step"] for _, state in chunk],
                foreach=group["foreach"],
                capturable=group["capturable"],
                fused=group["fused"],
                grad_scale=grad_scale if group["fused"] else None,
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

    # The kernel: salient weights, and ordinary parameters as matrices whose rows are all in the set

    def _step_whole(
        self, group: dict[str, Any], params: list[Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        entries = []
        for p in params:
            state = self.state[p]
            if not state:
                state.update(self._new_state(p, p.detach()))
            weight, grad = _matrix(p), _matrix(p.grad)
            matrices = {name: local(tensor) if name == "step" else _matrix(tensor) for name, tensor in state.items()}
            entries.append((weight, grad, torch.arange(len(weight), device=p.device), matrices))
        self._run(group, entries, "rows", False, grad_scale, found_inf)

    def _step_salient(
        self,
        group: dict[str, Any],
        params: list[tuple[Any, SalientChannels]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        self._follow_sets(params)
        entries = defaultdict(list)
        for p, salient in params:
            weight, rows, state = p.detach(), salient.rows, self.state[p]
            grad = p.grad if salient.grad is None else salient.grad
            if is_sharded(p):
                weight, grad, rows = local(weight), local(grad), local_channels(p, rows, salient.dim)
                state = {name: local(tensor) for name, tensor in state.items()}
            entries[_AXES[salient.dim]].append((weight, grad, rows, state))
        for axis, of_axis in entries.items():
            self._run(group, of_axis, axis, self.compact, grad_scale, found_inf)

    def _run(
        self,
        group: dict[str, Any],
        entries: list[tuple[Any, Any, Any, dict[str, Tensor]]],
        axis: str,
        compact: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Steps weights by their gradients in the given rows (or columns), those of a kind in one launch."""
        launches = defaultdict(list)
        for entry in entries:
            weight, grad, *_, state = entry
            launches[weight.device, weight.dtype, grad.dtype, state["exp_avg"].dtype].append(entry)
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        for (device, dtype, _, moments), launch in launches.items():
            weights, grads, rows, states = (list(column) for column in zip(*launch, strict=True))
            masters = [state["master"] for state in states if "master" in state]
            watched = None
            if dtype in HALF and not masters and not self.stochastic_rounding and not self._warned and lr > 0:
                watched = weights[0].clone()
            ops.sparse_adamw_(
                weights,
                grads,
                rows,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                masters,
                lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64, device=device),
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
                compact,
                group["maximize"],
                axis,
                grad_scale,
                found_inf,
                0 if self.stochastic_rounding or moments == torch.bfloat16 else None,
            )
            if watched is not None:
                self._warn_if_lost(watched, weights[0], grads[0], found_inf)

    def _warn_if_lost(self, before: Tensor, after: Tensor, grad: Tensor, found_inf: Tensor | None) -> None:
        """Looks once at what a first update did to a 16-bit weight without a master."""
        if found_inf is not None and found_inf.item():
            return
        self._warned = True
        if torch.equal(before, after) and grad.any():
            warnings.warn(
                f"the update of {after.dtype} weights rounds to nothing at this learning rate; use "
                "master_weights=True or stochastic_rounding=True",
                LongActWarning,
                stacklevel=5,
            )

    def _new_state(self, p: Tensor, kept: Tensor, dim: int = 0) -> dict[str, Tensor]:
        """State for some of a parameter's rows (or columns), or for all."""
        rows = kept if kept.ndim > 1 else kept.view(1, -1)
        state = {
            "step": zeros_by_channel(rows, dim, torch.int32),
            "exp_avg": torch.zeros_like(kept, dtype=self.moments, memory_format=torch.contiguous_format),
            "exp_avg_sq": torch.zeros_like(kept, dtype=self.moments, memory_format=torch.contiguous_format),
        }
        if self._has_master(p):
            state["master"] = kept.float().contiguous()
        return state

    def _follow_sets(self, params: list[tuple[Any, SalientChannels]]) -> None:
        """Makes the salient weights' state, and moves compact state over to the channels that are salient now."""
        moved = defaultdict(list)
        for p, salient in params:
            state, rows, dim = self.state[p], salient.rows, salient.dim
            assert rows is not None
            if self.compact and is_sharded(p):
                raise ValueError(
                    "state: 'compact' would keep a slot for every salient channel on every rank of a sharded weight; "
                    "use state='full'"
                )
            if not state:
                kept = p.detach().index_select(dim, rows.clamp(min=0)) if self.compact else p.detach()
                state.update(self._new_state(p, kept, dim))
                if self.compact:
                    state["rows"] = rows
            elif self.compact and len(state["rows"]) != len(rows):
                # All channels' state, as it comes from torch's AdamW.
                for name in _KEPT & state.keys():
                    along = 0 if name == "step" else dim
                    state[name] = state[name].index_select(along, rows.clamp(min=0))
                state["rows"] = rows
            elif self.compact and state["rows"] is not rows:
                moved[dim].append((p, state, rows))
        for dim, entries in moved.items():
            states = [[state[name] for name in sorted(_KEPT & state.keys())] for _, state, _ in entries]
            # Values of 32 bits are what `carry_` moves.
            wide = [[own.float() if own.dtype == torch.bfloat16 else own for own in layer] for layer in states]
            old, new = [state["rows"] for _, state, _ in entries], [rows for *_, rows in entries]
            stays = ops.carry_(wide, old, new, _AXES[dim])
            for own, carried in zip(itertools.chain(*states), itertools.chain(*wide), strict=True):
                if carried is not own:
                    own.copy_(carried)
            for (p, state, rows), kept in zip(entries, stays, strict=True):
                state["rows"] = rows
                if "master" in state:
                    fresh = p.detach().index_select(dim, rows.clamp(min=0)).float()
                    state["master"] = torch.where(kept.unsqueeze(1 - dim), state["master"], fresh)

    # What is kept

    def salient_state_bytes(self) -> tuple[int, int]:
        """Bytes of state kept for the salient weights, and what dense AdamW with the same dtypes would keep."""
        ours = dense = 0
        salient = salient_weights()
        for p in _params(self.param_groups):
            if id(p) in salient:
                ours += sum(value.nbytes for value in self.state.get(p, {}).values())
                dense += p.numel() * (2 * self.moments.itemsize + 4 * self._has_master(p))
        return ours, dense

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's; it also holds the salient sets and the statistics of a refresh period under way."""
        saved = super().state_dict()
        state = dict(saved["state"])
        salient = salient_weights()
        for p, i in zip(_params(self.param_groups), _params(saved["param_groups"]), strict=True):
            if i in state and id(p) in salient:
                state[i] = {**state[i], **salient[id(p)].owner.state_for(salient[id(p)])}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, in the dtypes that it was saved in; or a checkpoint of `torch.optim.AdamW`.

        From the latter, every channel starts with the moments and the step count that its parameter has there.

        Raises:
            ValueError: if the groups differ, or the state of a salient weight is of another size or kind; nothing is
                loaded then.
        """
        salient = salient_weights()
        # Groups that differ are for Optimizer.load_state_dict to explain.
        ids = zip(_params(self.param_groups), _params(state_dict["param_groups"]), strict=False)
        pairs = [(p, state_dict["state"][i]) for p, i in ids if i in state_dict["state"]]
        if any("max_exp_avg_sq" in state for _, state in pairs):
            raise ValueError("load_state_dict: saved with amsgrad=True, which SalientAdamW does not have")
        # A dense run's has no salient sets, but masters or steps of rows.
        foreign = not any("salient_steps" in state or "master" in state or state["step"].ndim for _, state in pairs)
        for p, state in pairs:
            if id(p) in salient and not foreign:
                salient[id(p)].owner.check_state_for(salient[id(p)], state)
                if ("rows" in state) != self.compact:
                    ours, theirs = ("compact", "full") if self.compact else ("full", "compact")
                    raise ValueError(
                        f"load_state_dict: {salient[id(p)].name} was saved with state={theirs!r}, this optimizer has "
                        f"state={ours!r}"
                    )
        super().load_state_dict({**state_dict, "param_groups": self._completed(state_dict["param_groups"])})
        for p, state in pairs:
            # Optimizer.load_state_dict casts state to the parameter's dtype: fp32 moments of bf16 weights get rounded.
            state = {
                name: value if name == "step" and value.ndim == 0 else value.to(p.device)
                for name, value in state.items()
            }
            if foreign:
                state = self._adopt(p, state, salient.get(id(p)))
            elif id(p) in salient:
                salient[id(p)].owner.load_state_for(salient[id(p)], state)
            self.state[p] = {name: value for name, value in state.items() if not name.startswith("salient_")}

    def _completed(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved groups with the options that only this optimizer has, and without those that only torch's AdamW has."""
        return [
            # Once it has loaded something, torch's Optimizer has its own options among the defaults.
            _extras({**self.defaults, **group})
            for group in groups
        ]

    def _adopt(self, p: Tensor, state: dict[str, Any], salient: SalientChannels | None) -> dict[str, Tensor]:
        """State of torch's AdamW as this optimizer keeps it: for salient weights that of every channel."""
        if salient is None and not self._by_kernel(p):
            if self._has_master(p):
                moments = {name: state[name].float() for name in ("exp_avg", "exp_avg_sq")}
                return {"step": state["step"], **moments, "master": p.detach().float()}
            return state
        dim = 0 if salient is None else salient.dim
        adopted = self._new_state(p, p.detach(), dim)
        adopted["step"].fill_(int(state["step"]))
        for name in ("exp_avg", "exp_avg_sq"):
            adopted[name].copy_(state[name])
        if salient is not None and self.compact:
            adopted["rows"] = torch.arange(p.shape[dim], device=p.device)
        return adopted

    @torch.no_grad()
    def adamw_state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.AdamW` loads it, to go on densely.

        That counts the steps of a parameter, not of its rows: those of a row become the parameter's largest, and its
        moments are scaled so that their bias-corrected values stay. Rows without state get none (zero moments).
        """
        saved = super().state_dict()
        salient = salient_weights()
        state = {}
        for group in self.param_groups:
            betas = group["betas"]
            for p in group["params"]:
                if not (own := self.state.get(p)):
                    continue
                dim = salient[id(p)].dim if id(p) in salient else 0
                state[p] = own if own["step"].ndim == 0 else _of_parameter(p, own, dim, betas)
        ids = dict(zip(_params(self.param_groups), _params(saved["param_groups"]), strict=True))
        names = ("step", "exp_avg", "exp_avg_sq")
        adamw_only = dict(amsgrad=False, differentiable=False, decoupled_weight_decay=True)
        return {
            "state": {ids[p]: {name: own[name] for name in names} for p, own in state.items()},
            "param_groups": [{**group, **adamw_only} for group in saved["param_groups"]],
        }


_AXES: tuple[Axis, Axis] = ("rows", "columns")
_KEPT = {"step", "exp_avg", "exp_avg_sq", "master"}


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


def _extras(group: dict[str, Any]) -> dict[str, Any]:
    """What a saved group holds besides an optimizer's options: its parameters, and what schedulers put there."""
    torchs = ("amsgrad", "differentiable", "decoupled_weight_decay")
    return {name: value for name, value in group.items() if name not in torchs}


def _matrix(p: Tensor) -> Tensor:
    """This rank's part of a parameter as a matrix, a view."""
    p = local(p.detach())
    return p.view(len(p), math.prod(p.shape[1:])) if p.ndim > 1 else p.view(1, -1)


def _params(groups: list[dict[str, Any]]) -> Iterator[Any]:
    for group in groups:
        yield from group["params"]


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
