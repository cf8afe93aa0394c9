"""Statistics buffers, selection of the salient sets, and the controller `LongAct` that owns both."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from longact_kernels import ops
from longact_kernels.functional import RunningStats
from longact_kernels.models import find_projections, replace_linear, token_mask, token_models
from longact_kernels.modules import SalientChannels, SalientLinear

Statistic = Literal["absmax", "l2"]
Scope = Literal["head", "layer"]
Selection = Literal["lagged", "current"]
Strategy = Literal["top", "random", "bottom"]
Nonfinite = Literal["error", "skip"]


def _one_of(argument: str, value: str, choices: object) -> str:
    if value not in get_args(choices):
        raise ValueError(f"{argument}: got {value!r}, needed one of {', '.join(map(repr, get_args(choices)))}")
    return value


class LongAct:
    """Saliency-guided sparse updates of a model's query and key projections (LongAct, arXiv 2604.14922).

    Swaps every `q_proj` and `k_proj` for a `SalientLinear` with the same parameters, collects the magnitude of their
    output channels while the model trains, and owns the salient sets: for each head, the top `density` of its channels.
    Gradients of the other rows are zero, so any optimizer may follow; `SalientAdamW` also leaves those rows' weights
    and state untouched.

    Args:
        model: a causal language model with separate `q_proj` and `k_proj`; changed in place.
        density: share of the channels that are salient, in (0, 1].
        statistic: "absmax", the largest magnitude over all tokens, or "l2", the mean over sequences of the per-sequence
            L2 norm (the paper's).
        scope: channels compete within their "head" (the paper) or within their "layer".
        selection: "lagged" fixes the set chosen from the batches before a step through that step, so that backward
            computes the salient rows only (the first step is taken as "current"); "current" (the paper) chooses the set
            from the step's own batch, after a dense backward.
        refresh_every: optimizer steps between two choices of the set.
        ema: weight of the saliency before in that of a refresh, in [0, 1): a moving average changes the sets less.
        freeze_after: optimizer steps after which the sets stay and statistics are no longer taken; None for never.
        strategy: "top" takes the channels of largest saliency; "bottom" the smallest and "random" any, for comparison.
        seed: of strategy "random"; the sets are the same on every rank and at every run.
        nonfinite: what a NaN or Inf activation does at refresh: "error" raises, naming the layers (one host read a
            refresh); "skip" keeps the set (nothing is read on the host).

    Attributes:
        layers: the `SalientLinear` modules by module name.

    Raises:
        ValueError: for an argument out of range, or a model without such projections.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        density: float = 0.3,
        statistic: Statistic = "absmax",
        scope: Scope = "head",
        selection: Selection = "lagged",
        refresh_every: int = 1,
        ema: float = 0.0,
        freeze_after: int | None = None,
        strategy: Strategy = "top",
        seed: int = 0,
        nonfinite: Nonfinite = "error",
    ):
        if not 0 < density <= 1:
            raise ValueError(f"density: got {density}, needed a share of the channels above 0 and up to 1, such as 0.3")
        if refresh_every < 1:
            raise ValueError(f"refresh_every: got {refresh_every}, needed a number of steps of at least 1")
        if not 0 <= ema < 1:
            raise ValueError(f"ema: got {ema}, needed a weight of at least 0 and below 1")
        if freeze_after is not None and freeze_after < 1:
            raise ValueError(f"freeze_after: got {freeze_after}, needed a number of steps of at least 1, or None")
        self.density = density
        self.statistic = _one_of("statistic", statistic, Statistic)
        self.scope = _one_of("scope", scope, Scope)
        self.selection = _one_of("selection", selection, Selection)
        self.nonfinite = _one_of("nonfinite", nonfinite, Nonfinite)
        self.strategy = _one_of("strategy", strategy, Strategy)
        self.refresh_every = refresh_every
        self.ema = ema
        self.freeze_after = freeze_after
        self.seed = seed
        self.steps = 0
        self.model = model
        self._absmax: Tensor
        self._l2_sum: Tensor
        self._sequences: Tensor
        self._mask: Tensor | None = None
        self._saliency: Tensor | None = None
        self._sets_before: list[Tensor | None] = []

        projections = find_projections(model)
        sizes = [projection.linear.out_features for projection in projections]
        self._bounds = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
        self._allocate(projections[0].linear.weight.device)
        self.layers: dict[str, SalientLinear] = {}
        for projection, stats in zip(projections, self._views(), strict=True):
            layer = replace_linear(model, projection.name, SalientLinear)
            group = projection.head_dim if scope == "head" else layer.out_features
            count = max(1, int(density * group + 0.5))
            layer.bind(SalientChannels(projection.name, self, stats, group, count))
            self.layers[projection.name] = layer
        self._hooks = [
            module.register_forward_pre_hook(self._take_mask, with_kwargs=True) for module in token_models(model)
        ]

    @classmethod
    def paper(cls, model: nn.Module) -> LongAct:
        """The paper's recipe: L2 statistic, 30% of every head, from the step's own batch, anew at every step.

        The paper masks gradients and leaves the rest to a stock optimizer: `longact.attach(torch.optim.AdamW(...))`.
        """
        return cls(model, density=0.3, statistic="l2", scope="head", selection="current", refresh_every=1)

    # What the layers ask for in their forward

    def mask_for(self, x: Tensor) -> Tensor | None:
        """The token mask of the forward under way, if it fits a layer's input [B, T, K]."""
        if self._mask is None or x.ndim != 3:
            return None
        # With cached keys and values, the attention mask also covers the tokens that came before.
        mask = self._mask[:, -x.shape[1] :]
        return mask if mask.shape == x.shape[:-1] else None

    def stats_on(self, salient: SalientChannels, device: torch.device) -> RunningStats | None:
        """A layer's statistics, on the device of its activations: a model may be moved after its swap.

        None once the sets are frozen.
        """
        if self.frozen:
            return None
        if salient.stats.absmax.device != device:
            self._absmax, self._l2_sum, self._sequences = (
                buffer.to(device) for buffer in (self._absmax, self._l2_sum, self._sequences)
            )
            self._saliency = None if self._saliency is None else self._saliency.to(device)
            for other, stats in zip(self._salient(), self._views(), strict=True):
                other.stats = stats
                other.rows = other.rows if other.rows is None else other.rows.to(device)
        return salient.stats

    def _take_mask(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._mask = token_mask(module, args, kwargs)

    # Statistics: all layers lie in one flat buffer, so that one reset and one all-reduce serve them all

    def _allocate(self, device: torch.device) -> None:
        self._absmax = torch.zeros(self._bounds[-1][1], device=device)
        self._l2_sum = torch.zeros_like(self._absmax)
        self._sequences = torch.zeros(len(self._bounds), device=device)

    def _views(self) -> Iterator[RunningStats]:
        for i, (start, end) in enumerate(self._bounds):
            if self.statistic == "l2":
                yield RunningStats(self._absmax[start:end], self._l2_sum[start:end], self._sequences[i])
            else:
                yield RunningStats(self._absmax[start:end])

    def _salient(self) -> Iterator[SalientChannels]:
        for layer in self.layers.values():
            assert layer.salient is not None
            yield layer.salient

    def _reset(self) -> None:
        for buffer in (self._absmax, self._l2_sum, self._sequences):
            buffer.zero_()
        for salient in self._salient():
            salient.fed = False

    def _measure(self) -> Tensor:
        """The statistic of all layers, fp32 [total channels], the same on every rank."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.statistic == "absmax":
            if distributed:
                # As integers the bits of magnitudes keep their order, and NaN is the largest instead of being dropped.
                torch.distributed.all_reduce(self._absmax.view(torch.int32), torch.distributed.ReduceOp.MAX)
            return self._absmax.clone()
        if distributed:
            torch.distributed.all_reduce(self._l2_sum)
            torch.distributed.all_reduce(self._sequences)
        sizes = torch.tensor([end - start for start, end in self._bounds], device=self._l2_sum.device)
        return self._l2_sum / self._sequences.clamp(min=1).repeat_interleave(sizes, output_size=len(self._l2_sum))

    # Selection

    @property
    def frozen(self) -> bool:
        """Whether the sets have been chosen for good."""
        return self.freeze_after is not None and self.steps >= self.freeze_after

    def refresh(self) -> None:
        """Chooses every layer's salient set from the statistics since the last refresh, and starts them anew.

        Raises:
            RuntimeError: if there is no set yet and nothing to choose it from.
            FloatingPointError: for NaN or Inf activations, if `nonfinite` is "error".
        """
        first = any(salient.rows is None for salient in self._salient())
        if not any(salient.fed for salient in self._salient()):
            if first:
                raise RuntimeError(
                    "LongAct: a step came before any activation statistics; they are collected while the model is in "
                    "training mode (model.train()) and gradients are on"
                )
            return
        saliency = self._measure()
        finite = saliency.isfinite()
        if (self.nonfinite == "error" or first) and not finite.all():
            bad = [name for name, (a, b) in zip(self.layers, self._bounds, strict=True) if not finite[a:b].all()]
            raise FloatingPointError(
                f"LongAct: NaN or Inf activations in {len(bad)} of {len(self.layers)} projections, first {bad[0]}; "
                "the salient sets are unchanged. Look at the loss and the learning rate, or pass nonfinite='skip'"
            )
        if self.ema and self._saliency is not None:
            saliency = self._saliency.lerp(saliency, 1 - self.ema)
        if self.nonfinite == "skip" and self._saliency is not None:
            # The saliency before chooses the set before.
            saliency = torch.where(finite.all(), saliency, self._saliency)
        self._sets_before = [salient.rows for salient in self._salient()]
        self._saliency = saliency
        for salient, rows in zip(self._salient(), self._choose(saliency), strict=True):
            salient.rows = rows
        self._reset()

    def _choose(self, saliency: Tensor) -> Iterator[Tensor]:
        """The set of every layer, all chosen in one go."""
        groups: list[int] = []
        counts: list[int] = []
        sizes: list[int] = []
        for salient, (start, end) in zip(self._salient(), self._bounds, strict=True):
            times = (end - start) // salient.group
            groups += [salient.group] * times
            counts += [salient.count] * times
            sizes.append(times * salient.count)
        chosen = ops.select(self._rank(saliency), groups, counts).split(sizes)
        return (rows - start for rows, (start, _) in zip(chosen, self._bounds, strict=True))

    def _rank(self, saliency: Tensor) -> Tensor:
        """What the strategy chooses the largest of."""
        if self.strategy == "random":
            # Drawn on the CPU, whose generator gives the same numbers everywhere.
            draw = torch.rand(len(saliency), generator=torch.Generator().manual_seed(self.seed + self.steps))
            return draw.to(saliency.device)
        return -saliency if self.strategy == "bottom" else saliency

    # One optimizer step

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zeroes the gradient rows outside the set where backward left them dense: in a first step, or with "current".

        Call it after a step's last backward and before gradient clipping; `SalientAdamW.step()` and attached optimizers
        call it if you did not. A second call in a step does nothing.
        """
        salient = list(self._salient())
        if all(s.fixed for s in salient) or all(layer.weight.grad is None for layer in self.layers.values()):
            return
        self.refresh()
        for layer, s in zip(self.layers.values(), salient, strict=True):
            s.fixed = True
            if layer.weight.grad is not None:
                outside = torch.ones(layer.out_features, dtype=torch.bool, device=layer.weight.device)
                outside[s.rows] = False
                layer.weight.grad.masked_fill_(outside.unsqueeze(1), 0)

    @torch.no_grad()
    def advance(self) -> None:
        """Ends an optimizer step: refreshes the sets when their time has come. `SalientAdamW.step()` calls it."""
        if any(salient.rows is None for salient in self._salient()):
            return
        due = (self.steps + 1) % self.refresh_every == 0 and not self.frozen
        self.steps += 1
        if self.selection == "current":
            self._reset()
            for salient in self._salient():
                salient.fixed = not due or self.frozen
        elif due:
            self.refresh()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes a stock optimizer the paper's literal form: its steps see masked gradients, and refresh the sets."""
        optimizer.register_step_pre_hook(lambda *_: self.mask_gradients())
        optimizer.register_step_post_hook(lambda *_: self.advance())

    # What the user looks at

    def saliency(self, name: str) -> Tensor | None:
        """The statistic [N] that the set of layer `name` was last chosen from; None before the first refresh."""
        if self._saliency is None:
            return None
        start, end = self._bounds[list(self.layers).index(name)]
        return self._saliency[start:end]

    @property
    def churn(self) -> dict[str, float]:
        """By layer, 1 − Jaccard overlap of the set with the one before; empty until there are two."""
        churn = {}
        for salient, before in zip(self._salient(), self._sets_before, strict=False):
            if before is not None and salient.rows is not None:
                kept = torch.isin(salient.rows, before).sum().item()
                churn[salient.name] = 1 - kept / (2 * len(before) - kept)
        return churn

    def restore(self) -> nn.Module:
        """Puts plain `nn.Linear` modules with the same parameters back, and returns the model."""
        for name, layer in self.layers.items():
            layer.bind(None)
            replace_linear(self.model, name, nn.Linear)
        for hook in self._hooks:
            hook.remove()
        self.layers, self._hooks = {}, []
        return self.model

    # Resuming: kept in the optimizer's state, one dict a salient weight, since that is what trainers save and load

    def state_for(self, salient: SalientChannels) -> dict[str, Tensor]:
        """What resuming needs of one layer, as tensors."""
        i = list(self.layers).index(salient.name)
        start, end = self._bounds[i]
        state = {
            "salient_steps": torch.tensor(self.steps),
            "salient_flags": torch.tensor([salient.fixed, salient.fed]),
            "salient_absmax": self._absmax[start:end].clone(),
            "salient_l2_sum": self._l2_sum[start:end].clone(),
            "salient_sequences": self._sequences[i].clone(),
        }
        if self._saliency is not None and salient.rows is not None:
            state |= {"salient_rows": salient.rows, "salient_saliency": self._saliency[start:end].clone()}
        return state

    def check_state_for(self, salient: SalientChannels, state: dict[str, Tensor]) -> None:
        """Whether `load_state_for` can take a state.

        Raises:
            ValueError: if the state has no salient set, or one of another size.
        """
        if "salient_steps" not in state:
            raise ValueError(
                f"load_state_dict: no salient set for {salient.name}; needed a state dict that SalientAdamW saved "
                "while LongAct was on the model"
            )
        start, end = self._bounds[list(self.layers).index(salient.name)]
        needed = (end - start) // salient.group * salient.count
        if (saved := len(state.get("salient_rows", range(needed)))) != needed:
            raise ValueError(
                f"load_state_dict: {salient.name} was saved with {saved} salient rows, this LongAct keeps {needed}; "
                "use the density and scope of the saved run"
            )

    def load_state_for(self, salient: SalientChannels, state: dict[str, Tensor]) -> None:
        """Takes back what `state_for` gave."""
        i = list(self.layers).index(salient.name)
        start, end = self._bounds[i]
        self.steps = int(state["salient_steps"])
        salient.fixed, salient.fed = map(bool, state["salient_flags"].tolist())
        rows = state.get("salient_rows")
        if rows is not None:
            salient.rows = rows.to(self._absmax.device)
            if self._saliency is None:
                self._saliency = torch.zeros_like(self._absmax)
            self._saliency[start:end] = state["salient_saliency"]
        self._absmax[start:end] = state["salient_absmax"]
        self._l2_sum[start:end] = state["salient_l2_sum"]
        self._sequences[i] = state["salient_sequences"]
