"""What any optimizer of salient weights does: mask, split, step, join; compact state; checkpoints."""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from longact_kernels import ops
from longact_kernels.functional import Axis
from longact_kernels.optim import loading
from longact_kernels.sparse import finite, gradients
from longact_kernels.sparse.controller import LongAct
from longact_kernels.sparse.layer import SalientLayer
from longact_kernels.sparse.registry import controllers as all_controllers
from longact_kernels.sparse.registry import ids_of, params_of, salient_weights
from longact_kernels.sparse.salient_set import SalientSet
from longact_kernels.sparse.sharding import LocalSets, assembled, bounds, is_sharded, local, spread, zeros_by_channel

State = Literal["full", "compact"]
Salient = dict[int, tuple[LongAct, SalientLayer]]

HALF = (torch.float16, torch.bfloat16)
AXES: tuple[Axis, Axis] = ("rows", "columns")


class Entry(NamedTuple):
    """A weight of which some channels are stepped; None for all of it."""

    weight: Tensor
    grad: Tensor
    channels: Tensor | None
    state: dict[str, Tensor]


class SalientOptimizer(Optimizer, ABC):
    """An optimizer that steps salient weights in their salient channels, and all other parameters wholly.

    A subclass says what state a parameter has (`moment_names`), and how parameters and channels are stepped.

    Args:
        params, defaults: as of `torch.optim.Optimizer`.
        longact, state, master_weights, stochastic_rounding, moments: as of `SalientAdamW`.
    """

    moment_names: ClassVar[tuple[str, ...]]
    steps_salient_weights = True
    _step_supports_amp_scaling = True  # GradScaler hands over its scale, and what overflowed, as attributes
    _options = ("compact", "master_weights", "stochastic_rounding", "moments", "may_be_dense")

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        longact: LongAct | Literal[False] | None,
        state: State,
        master_weights: bool,
        stochastic_rounding: bool,
        moments: torch.dtype,
    ):
        if state not in get_args(State):
            raise ValueError(f"state: got {state!r}, needed one of {', '.join(map(repr, get_args(State)))}")
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments: got {moments}, needed torch.float32 or torch.bfloat16")
        for name, value in (("master_weights", master_weights), ("stochastic_rounding", stochastic_rounding)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: got a {type(value).__name__}, needed True or False")
        if stochastic_rounding and master_weights:
            raise ValueError(
                "stochastic_rounding: with masters nothing is lost to rounding; needed master_weights=False"
            )
        if longact is not None and longact is not False and not isinstance(longact, LongAct):
            raise TypeError(
                f"longact: got a {type(longact).__name__}, needed a LongAct, None to find it by the parameters, or "
                "False to train densely"
            )
        self.compact = state == "compact"
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.moments = moments
        self.may_be_dense = longact is False
        self._known: weakref.WeakSet[LongAct] = weakref.WeakSet()  # whose weights it has held
        self._forget()
        super().__init__(params, defaults)
        self._known.update(self._controllers(salient_weights()))
        if isinstance(longact, LongAct):
            longact.check()
            longact.check_trains()
            if longact not in self._known:
                raise ValueError("longact: none of its projections' weights is among the parameters given")

    def _forget(self) -> None:
        self._followed: dict[Any, int] = {}  # by weight, the version of its set that its compact state belongs to
        self._versions: dict[Any, tuple[int, int]] = {}  # by weight with a master, what our last step left
        self._local: LocalSets | None = None  # what of the sets of sharded weights lies here

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own leaves out what a subclass adds.
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = weakref.WeakSet()
        self._forget()

    def _controllers(self, salient: Salient) -> list[LongAct]:
        """Those of this optimizer's salient weights."""
        return list(dict.fromkeys(salient[id(p)][0] for p in params_of(self.param_groups) if id(p) in salient))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step, and refreshes the salient sets on schedule.

        Raises:
            RuntimeError: if a weight that was stepped as a salient one is none any more; inside a backward pass.
            FloatingPointError: for bad numbers, as the controllers' `nonfinite` says; no weight has changed then.
        """
        salient = salient_weights()
        controllers = self._controllers(salient)
        self._known.update(controllers)
        if not (self.may_be_dense or self._known):
            self._check_beside()
        for longact in [longact for longact in self._known if longact.layers]:
            longact.begin_step(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._find_local_sets(salient)
        if any(longact.idle for longact in controllers) and self._only_makes_states():
            self._make_states(salient)
            return loss
        self._check_groups(self.param_groups)
        for longact in controllers:
            longact.prepare_step()
        self._find_local_sets(salient)
        work = [self._split(group, salient) for group in self.param_groups]
        grad_scale, found_inf = self._scaling(controllers, [grad for one in work for grad in one.grads])
        for one in work:  # before any weight changes: what does not fit is said here
            self._follow_sets([(p, *salient[id(p)]) for p, *_ in one.sparse])
        for one in work:
            self._follow_weights(one.params)
        for group, (plain, whole, sparse) in zip(self.param_groups, work, strict=True):
            self._step_plain(group, plain, grad_scale, found_inf)
            self._step_whole(group, whole, grad_scale, found_inf)
            self._step_salient(group, sparse, grad_scale, found_inf)
        for p in (p for one in work for p in one.params if self.has_master(p)):
            self._versions[p] = p._version, local(p).data_ptr()
        for longact in controllers:
            longact.end_step(self, found_inf)
        return loss

    def _check_beside(self) -> None:
        """Raises RuntimeError if no parameter is of a model that LongAct is on: all would train densely."""
        ids = ids_of(self)
        here = [longact for longact in all_controllers() if longact.layers]
        self.may_be_dense = any(id(p) in ids for longact in here for p in longact.model.parameters())
        if not self.may_be_dense:
            for longact in here:
                longact.check_trains()  # an adapter around its model may be what this optimizer trains
            raise RuntimeError(
                f"{type(self).__name__}: there is no LongAct on the model of its parameters, and it would train all of "
                "them densely; make LongAct(model) before the first step, or pass longact=False where that is meant"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer; clears compact gradients too."""
        super().zero_grad(set_to_none)
        salient = salient_weights()
        ids = ids_of(self)
        for longact in self._controllers(salient):
            longact.zero_grad(ids)

    def _only_makes_states(self) -> bool:
        """Whether this is how torch.distributed.checkpoint makes a new optimizer's state, to load a saved one into it.

        No rank that others wait for: at a learning rate of 0 one that was fed nothing may be in a true step.
        """
        params = [p for p in params_of(self.param_groups) if p.requires_grad]
        return all(group["lr"] == 0 for group in self.param_groups) and not any(
            p.grad is None or local(p.grad).any() for p in params
        )

    # Split

    def _split(self, group: dict[str, Any], salient: Salient) -> _Work:
        """The parameters of a group that have a gradient: those that torch steps, and those that a kernel does."""
        work = _Work([], [], [])
        for p in group["params"]:
            if (found := salient.get(id(p))) is None:
                if p.grad is not None:
                    (work.whole if self.by_kernel(p) else work.plain).append(p)
                continue
            grad = gradients.compact_grad(found[1])
            grad = p.grad if grad is None else grad
            if grad is not None and found[1].salient.chosen:
                work.sparse.append((p, grad, found[1].salient))
        return work

    def _scaling(self, controllers: list[LongAct], grads: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The scale that gradients carry, and a flag that the step must change nothing."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None:
            # GradScaler looks at gradients itself, but for compact ones.
            compact = [grad for longact in controllers if longact.compact for grad in longact.compact.present()]
            if not isinstance(found_inf, Tensor):
                raise RuntimeError(
                    "grad: GradScaler sees no gradients at all, since all that train are compact; leave a parameter "
                    "beside them unfrozen, such as the norms, train in bfloat16, or use LongAct(grad='full')"
                )
            if compact and grad_scale is None:
                raise RuntimeError(
                    "grad: GradScaler.unscale_() cannot see compact gradients; leave unscaling to GradScaler.step(), "
                    "or use LongAct(grad='full')"
                )
            if compact:
                # Never above 1, which is all that torch's fused AdamW looks for.
                found_inf = torch.maximum(found_inf, finite.nonfinite(compact).any().to(found_inf))
            grads = []
        for longact in controllers:
            bad = longact.verdict(grads, self._name_of)
            if bad is not None:
                bad = bad.to(torch.float32)
                found_inf = bad if found_inf is None else torch.maximum(found_inf, bad.to(found_inf))
            grads = []
        return grad_scale, found_inf

    def _name_of(self, i: int) -> str:
        """The name of the parameter that the i-th gradient of a step belongs to."""
        salient = salient_weights()
        work = [self._split(group, salient) for group in self.param_groups]
        p = [p for one in work for p in one.params][i]
        return self._controllers(salient)[0].name_of(p)

    def has_master(self, p: Tensor) -> bool:
        """Whether a parameter's updates are applied to an fp32 copy."""
        return self.master_weights and p.dtype in HALF

    def by_kernel(self, p: Tensor) -> bool:
        """Whether an ordinary parameter needs what torch's optimizer lacks."""
        return self.moments == torch.bfloat16 or (self.stochastic_rounding and p.dtype in HALF)

    # Step

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Raises ValueError, naming the group, for a hyperparameter that no step can be taken with."""
        for i, group in enumerate(groups):
            try:
                self._check_group(group)
            except ValueError as error:
                raise ValueError(f"param_groups[{i}]: {error}") from None

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a hyperparameter that no step can be taken with: schedules write them at any time."""

    @abstractmethod
    def _step_plain(
        self, group: dict[str, Any], params: list[Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Steps ordinary parameters as torch's optimizer does.

        Args:
            grad_scale: of one element: gradients are to be divided by it.
            found_inf: of one element: where it is not zero, nothing changes.
        """

    @abstractmethod
    def _run(
        self,
        group: dict[str, Any],
        entries: list[Entry],
        axis: Axis,
        compact: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Steps weights by their gradients in the given rows (or columns), those of a kind in one launch.

        Args:
            entries: channels may begin with some of -1, which stand for none. A gradient has the weight's shape, or
                holds those channels only.
            compact: whether states hold those channels only.
            grad_scale, found_inf: as of `_step_plain`. Step counts of channels are this method's to raise.
        """

    def _step_whole(
        self, group: dict[str, Any], params: list[Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Ordinary parameters by the kernel: as matrices whose rows are all in the set."""
        entries, copies = [], []
        for p in params:
            if not p.numel():
                continue
            state, like = self.state[p], local(p.detach())
            if not torch.ops.aten.is_non_overlapping_and_dense(like):
                # Its elements do not fill their memory: a copy is stepped.
                like = like.contiguous()
                copies.append((p, like))
            if not state:
                state.update(self.new_state(p, p.detach() if is_sharded(p) else like))
            state = {name: local(held) if name == "step" else matrix(held, like) for name, held in state.items()}
            weight = matrix(like, like)
            index = torch.arange(len(weight), device=p.device)
            entries.append(Entry(weight, matrix(local(p.grad).resolve_neg(), like), index, state))
        self._run(group, entries, "rows", False, grad_scale, found_inf)
        for p, stepped in copies:
            p.copy_(stepped)

    def _step_salient(
        self,
        group: dict[str, Any],
        params: list[tuple[Any, Tensor, SalientSet]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        entries = defaultdict(list)
        for p, grad, salient in params:
            state = {name: local(tensor) for name, tensor in self.state[p].items()}
            entry = Entry(local(p.detach()), local(grad).resolve_neg(), self._index(p, salient), state)
            entries[AXES[salient.dim]].append(entry)
        for axis, of_axis in entries.items():
            self._run(group, of_axis, axis, self.compact, grad_scale, found_inf)

    def _find_local_sets(self, salient: Salient) -> None:
        """Looks up which channels of the sets lie on this rank: of sharded weights, a part."""
        sharded = [p for p in params_of(self.param_groups) if id(p) in salient and is_sharded(p)]
        weights = [(p, salient[id(p)][1].salient) for p in sharded]
        if weights and (self._local is None or not self._local.fits(weights)):
            self._local = LocalSets(weights)
        if weights and self._local is not None:
            self._local.follow(always=_capturing(sharded[0]))

    def _index(self, p: Any, salient: SalientSet) -> Tensor:
        """A set's channels, as this rank counts those of the weight."""
        return salient.index if self._local is None or not is_sharded(p) else self._local.of[p]

    # State

    def new_state(self, p: Tensor, kept: Tensor, dim: int = 0) -> dict[str, Tensor]:
        """State for some of a parameter's rows (or columns), or for all."""
        if in_order := kept.is_contiguous() or (kept.ndim == 2 and kept.stride(1) == 1):
            rows = kept if kept.ndim > 1 else kept.view(1, -1)
            state = {"step": zeros_by_channel(rows, dim, torch.int32)}
        else:
            # In the order of its own memory, all of it is one row.
            state = {"step": torch.zeros(1, dtype=torch.int32, device=kept.device)}
        order = torch.contiguous_format if in_order else torch.preserve_format
        for name in self.moment_names:
            state[name] = torch.zeros_like(kept, dtype=self.moments, memory_format=order)
        if self.has_master(p):
            master = kept.float()
            state["master"] = master.contiguous() if in_order else master
        return state

    def _make_states(self, salient: Salient) -> None:
        """Makes the state of all parameters with a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or self.state[p]:
                    continue
                if id(p) not in salient and not self.by_kernel(p):
                    self.state[p].update(self.new_plain_state(group, p))
                elif id(p) not in salient:
                    self.state[p].update(self.new_state(p, p.detach()))
                else:
                    self._make_salient_state(p, *salient[id(p)])

    def _make_salient_state(self, p: Any, longact: LongAct, layer: SalientLayer) -> None:
        state, salient = self.state[p], layer.salient
        if self.compact:
            index = self._index(p, salient)
            kept = local(p.detach()).index_select(salient.dim, index.clamp(min=0))
            state.update(self.new_state(p, kept, salient.dim), rows=index.clone())
        else:
            state.update(self.new_state(p, p.detach(), salient.dim))
        # Under the names that `state_dict` has beside them: torch.distributed.checkpoint loads what it finds here.
        state.update(longact.kept_for(salient))

    def _channels_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a state has for each channel."""
        return {name: state[name] for name in ("step", *self.moment_names, "master") if name in state}

    @abstractmethod
    def new_plain_state(self, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
        """State of an ordinary parameter as torch's optimizer keeps it; needs a tensor `step`."""

    def _follow_sets(self, params: list[tuple[Any, LongAct, SalientLayer]]) -> None:
        """Makes the salient weights' state, and moves compact state over to the channels that are salient now."""
        moved = defaultdict(list)
        for p, longact, layer in params:
            salient = layer.salient
            state, index, dim = self.state[p], self._index(p, salient), salient.dim
            like = local(p) if self.compact else p
            if (state and state[self.moment_names[0]].shape[1 - dim] != like.shape[1 - dim]) or (
                state and not self.compact and len(state["step"]) != p.shape[dim]
            ):
                raise RuntimeError(
                    f"state: that of {salient.name} was kept along {AXES[1 - dim]}, its LongAct now takes {AXES[dim]}; "
                    "go on with a new optimizer"
                )
            if not state:
                self._make_salient_state(p, longact, layer)
            elif self.compact and len(state["rows"]) != len(index):
                self._resize(p, salient)
            elif self.compact and (self._followed.get(p) != salient.version or _capturing(p)):
                moved[dim].append((p, state, index))
            self._followed[p] = salient.version
        for dim, entries in moved.items():
            states = [list(self._channels_of(state).values()) for _, state, _ in entries]
            # Values of 32 bits are what `carry_` moves.
            wide = [[own.float() if own.dtype == torch.bfloat16 else own for own in layer] for layer in states]
            old, new = [state["rows"] for _, state, _ in entries], [index for *_, index in entries]
            stays = ops.carry_(wide, old, new, AXES[dim])
            for own, carried in zip(itertools.chain(*states), itertools.chain(*wide), strict=True):
                if carried is not own:
                    own.copy_(carried)
            torch._foreach_copy_(old, new)
            chosen = torch._foreach_clamp_min(new, 0)
            for (p, state, _), kept, rows in zip(entries, stays, chosen, strict=True):
                if "master" not in state:
                    continue
                master, weight = state["master"], local(p.detach())
                if not kept.is_cpu:
                    torch.where(kept.unsqueeze(1 - dim), master, weight.index_select(dim, rows), out=master)
                elif len(came := (~kept).nonzero().flatten()):  # the host may look there, and copy these alone
                    master.index_copy_(dim, came, weight.index_select(dim, rows[came]).float())

    def _follow_weights(self, params: list[Any]) -> None:
        """Takes what somebody else has written to a weight over into its master: a checkpoint, an average, a bound."""
        for p in params:
            known = self._versions.get(p)
            if known is None or known == (p._version, local(p).data_ptr()):
                continue
            state, weight = self.state[p], p.detach()
            if self.compact and "rows" in state:
                weight = local(weight)
                dim = 0 if state["master"].shape[1] == weight.shape[1] else 1
                weight = weight.index_select(dim, state["rows"].clamp(min=0))
            master = state["master"]
            master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight.float()))

    def _resize(self, p: Any, salient: SalientSet) -> None:
        """Compact state of a set of another size, as of another density or of all channels, for the set of now."""
        state, weight, dim = self.state[p], local(p.detach()), salient.dim
        index, old = self._index(p, salient), state.pop("rows")
        filled = (old >= 0).nonzero().flatten()
        fresh = self.new_state(p, weight.index_select(dim, index.clamp(min=0)), dim)
        for name, held in self._channels_of(state).items():
            along = 0 if name == "step" else dim
            shape = list(held.shape)
            shape[along] = weight.shape[dim]
            whole = weight.float() if name == "master" else held.new_zeros(shape)
            whole = whole.index_copy(along, old[filled], held.index_select(along, filled))
            fresh[name].copy_(_taken(whole, index, along))
        state.update(fresh, rows=index.clone())

    # What is kept

    def salient_state_bytes(self) -> tuple[int, int]:
        """Bytes of this rank's state for salient weights, and of a dense optimizer's with the same dtypes."""
        ours = dense = 0
        salient = salient_weights()
        for p in params_of(self.param_groups):
            if id(p) in salient and (p.requires_grad or p in self.state):  # of frozen ones neither keeps any
                state = self.state.get(p, {})
                ours += sum(local(state[name]).nbytes for name in state if not name.startswith("salient_"))
                dense += local(p).numel() * (len(self.moment_names) * self.moments.itemsize + 4 * self.has_master(p))
        return ours, dense

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with the salient sets and the statistics since the last refresh."""
        salient = salient_weights()
        for longact in self._controllers(salient):
            longact.settle()
        saved = super().state_dict()
        state = dict(saved["state"])
        for p, i in zip(params_of(self.param_groups), params_of(saved["param_groups"]), strict=True):
            if i in state and id(p) in salient:
                longact, layer = salient[id(p)]
                held = self._spread(p, longact, layer) if self.compact and is_sharded(p) else state[i]
                state[i] = {**held, **longact.state_for(layer.salient)}
        return {**saved, "state": state}

    @torch.no_grad()
    def _spread(self, p: Any, longact: LongAct, layer: SalientLayer) -> dict[str, Tensor]:
        """Compact state of a sharded weight as that of the whole set: all ranks make it together."""
        self._find_local_sets(salient_weights())
        self._follow_sets([(p, longact, layer)])
        salient, state = layer.salient, self.state[p]
        filled = (state["rows"] >= 0).nonzero().flatten()
        places = torch.searchsorted(salient.index, state["rows"][filled] + bounds(p, salient.dim)[0])
        spread_state = {"rows": salient.index.clone()}
        for name, held in self._channels_of(state).items():
            dim = 0 if name == "step" else salient.dim
            spread_state[name] = spread(held.index_select(dim, filled), places, salient.size, dim, p, salient.dim)
        return spread_state

    def _gathered(self, p: Any, state: dict[str, Tensor], salient: SalientSet) -> dict[str, Tensor]:
        """This rank's part of what `_spread` gave, or of compact state of a whole weight."""
        (start, count), rows = bounds(p, salient.dim), assembled(state["rows"])
        here = ((rows >= start) & (rows < start + count)).nonzero().flatten()
        slots = rows.new_full((salient.most(start, start + count),), -1)
        slots[len(slots) - len(here) :] = here
        part = {**state, "rows": torch.where(slots < 0, -1, rows[slots.clamp(min=0)] - start)}
        for name, held in self._channels_of(state).items():
            held, dim = assembled(held), 0 if name == "step" else salient.dim
            if held.ndim > 1:
                held = held.narrow(1 - dim, *bounds(p, 1 - dim))
            part[name] = _taken(held, slots, dim)
        return part

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, in the dtypes that it was saved in; or a checkpoint of torch's optimizer.

        From the latter, every channel starts with the moments and the step count that its parameter has there.

        Raises:
            ValueError: if the groups differ, or a state is of another size, kind, dtype or option, damaged, or holds
                NaN or Inf; nothing is loaded then.
        """
        salient = salient_weights()
        loading.check_form(state_dict)
        completed = self.completed(state_dict["param_groups"])
        self._check_groups(completed)
        # Groups that differ are for Optimizer.load_state_dict to explain.
        ids = zip(params_of(self.param_groups), params_of(state_dict["param_groups"]), strict=False)
        pairs = [(p, loading.with_tensor_step(state_dict["state"][i])) for p, i in ids if i in state_dict["state"]]
        for p, state in pairs:
            what = salient[id(p)][1].salient.name if id(p) in salient else f"a parameter of shape {list(p.shape)}"
            loading.check_numbers(self, what, state)
        # A dense run's has no salient sets, but masters or steps of rows.
        foreign = not any("salient_steps" in state or "master" in state or state["step"].ndim for _, state in pairs)
        for p, state in pairs:
            if foreign:
                self._check_foreign(p, state)
            else:
                loading.check_state(self, p, state, salient.get(id(p)))
        loaded = {}
        for p, state in pairs:
            # Optimizer.load_state_dict casts state to the parameter's dtype: fp32 moments of bf16 weights get rounded.
            state = {
                name: value if name == "step" and value.ndim == 0 else value.to(p.device)
                for name, value in state.items()
            }
            if foreign:
                state = self.adopt(p, state, salient[id(p)][1].salient if id(p) in salient else None)
            elif "rows" in state and is_sharded(p):
                state = self._gathered(p, state, salient[id(p)][1].salient)
            loaded[p] = state
        # From here on nothing can fail.
        super().load_state_dict({**state_dict, "param_groups": completed})
        for p, state in loaded.items():
            if not foreign and id(p) in salient:
                salient[id(p)][0].load_state_for(salient[id(p)][1].salient, state)
            self.state[p] = state
        self._forget()

    def _check_foreign(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Raises ValueError for state of torch's optimizer that is none of this parameter's."""
        for name in self.moment_names:
            if state[name].shape != p.shape:
                raise ValueError(
                    f"load_state_dict: {name} of a parameter of shape {list(p.shape)} was saved as "
                    f"{list(state[name].shape)}; needed a checkpoint of the same model"
                )

    @abstractmethod
    def completed(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved groups with the options that only this optimizer has, and without those that only torch's has."""

    @abstractmethod
    def adopt(self, p: Tensor, state: dict[str, Tensor], salient: SalientSet | None) -> dict[str, Tensor]:
        """State of torch's optimizer as this one keeps it: for salient weights that of every channel."""


class _Work(NamedTuple):
    """The parameters of a group that have a gradient."""

    plain: list[Any]
    whole: list[Any]
    sparse: list[tuple[Any, Tensor, SalientSet]]

    @property
    def params(self) -> list[Any]:
        return [*self.plain, *self.whole, *(p for p, *_ in self.sparse)]

    @property
    def grads(self) -> list[Tensor]:
        return [*(p.grad for p in self.plain + self.whole), *(grad for _, grad, _ in self.sparse)]


def _taken(held: Tensor, slots: Tensor, dim: int) -> Tensor:
    """What a tensor has for some slots along a dimension; nothing for those without a channel (-1)."""
    empty = (slots < 0).view([-1 if d == dim else 1 for d in range(held.ndim)])
    return held.index_select(dim, slots.clamp(min=0)).masked_fill_(empty, 0)


def matrix(tensor: Tensor, p: Tensor) -> Tensor:
    """A parameter `p`, or what belongs to its elements, as a matrix.

    A view, unless the tensor's elements lie in another order than the parameter's: then a copy, for reading.
    """
    tensor = local(tensor.detach())
    if tensor.stride() != p.stride():
        tensor = torch.empty_like(p, dtype=tensor.dtype).copy_(tensor)
    if p.is_contiguous():
        return tensor.view(len(p), -1) if p.ndim > 1 else tensor.view(1, -1)
    return tensor.as_strided((1, tensor.numel()), (tensor.numel(), 1))


def _capturing(p: Tensor) -> bool:
    return p.is_cuda and torch.cuda.is_current_stream_capturing()
