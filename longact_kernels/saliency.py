"""Statistics buffers, and the controller `LongAct` that owns them and the salient sets."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longact_kernels.functional import Axis, RunningStats, observe
from longact_kernels.models import Projection, TargetModules, find_projections, rotary_pairs
from longact_kernels.modules import SalientChannels, SalientLayer, become_salient, controllers
from longact_kernels.selection import Run, Scope, Selection, Strategy
from longact_kernels.shards import local, local_mask
from longact_kernels.sites import Site, tap_norm, tap_rope
from longact_kernels.tokens import Tokens, on_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Statistic = Literal["absmax", "l2"]
When = Literal["lagged", "current"]
Grad = Literal["full", "compact"]
Nonfinite = Literal["error", "skip"]


class LongAct:
    """Saliency-guided sparse updates of a model's query and key projections (LongAct, arXiv 2604.14922).

    Finds the query and key projections, makes each a `SalientLinear` in its place, collects the magnitude of their
    channels while the model trains, and owns the salient sets: for each head, the top `density` of its channels.
    Gradients of the other rows are zero, so any optimizer may follow; `SalientAdamW` also leaves those rows' weights
    and state untouched. Of a fused projection only the query and key rows are sparse; its other rows train as usual.

    Args:
        model: a causal language model; changed in place.
        density: share of the channels that are salient, in (0, 1].
        statistic: "absmax", the largest magnitude over all tokens, or "l2", the mean over sequences of the per-sequence
            L2 norm (the paper's).
        scope: channels compete within their "head" (the paper), within their "layer", or all of the "model" together,
            where no layer gets more than twice its share. By default "head", and "layer" along columns.
        selection: "lagged" fixes the set chosen from the batches before a step through that step, so that backward
            computes the salient rows only (the first step is taken as "current"); "current" (the paper) chooses the set
            from the step's own batch, after a dense backward.
        axis: "rows" of the weights, output channels (the paper), or "columns", input channels.
        site: where magnitudes are taken: at the "projection" (the paper), after the query and key "norm" that follows
            it in some models, or after "rope": of what attention sees.
        pair_rope: keep the two channels of a rotary pair together.
        target_modules: what to train sparsely in a model whose projections are not recognised, or in place of them; see
            `find_projections`.
        refresh_every: optimizer steps between two choices of the set.
        ema: weight of the saliency before in that of a refresh, in [0, 1): a moving average changes the sets less.
        freeze_after: optimizer steps after which the sets stay and statistics are no longer taken; None for never.
        strategy: "top" takes the channels of largest saliency; "bottom" the smallest and "random" any, for comparison;
            "threshold" those above `threshold` times the mean of their layer, `density` being the largest share.
        threshold: of strategy "threshold".
        seed: of strategy "random"; the sets are the same on every rank and at every run.
        grad: "full" gradients have the weight's shape; "compact" ones are kept as fp32 accumulators of the salient
            channels alone, outside `weight.grad`: for `SalientAdamW`, with `clip_grad_norm_` in place of torch's.
        nonfinite: what a NaN or Inf activation does at refresh: "error" raises, naming the layers (one host read a
            refresh); "skip" keeps the set (nothing is read on the host).

    Attributes:
        layers: the layers with a salient set, by module name.

    Raises:
        ValueError: for an argument out of range, or a model without such projections; the model is left alone then.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        density: float = 0.3,
        statistic: Statistic = "absmax",
        scope: Scope | None = None,
        selection: When = "lagged",
        axis: Axis = "rows",
        site: Site = "projection",
        pair_rope: bool = False,
        target_modules: TargetModules | None = None,
        refresh_every: int = 1,
        ema: float = 0.0,
        freeze_after: int | None = None,
        strategy: Strategy = "top",
        threshold: float = 1.0,
        seed: int = 0,
        grad: Grad = "full",
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
        if not threshold >= 0:
            raise ValueError(f"threshold: got {threshold}, needed a multiple of the layer's mean of at least 0")
        self.density = density
        self.statistic = _one_of("statistic", statistic, Statistic)
        self.axis = _one_of("axis", axis, Axis)
        self.scope = _one_of("scope", scope or ("head" if axis == "rows" else "layer"), Scope)
        self.selection = _one_of("selection", selection, When)
        self.site = _one_of("site", site, Site)
        self.nonfinite = _one_of("nonfinite", nonfinite, Nonfinite)
        self.strategy = _one_of("strategy", strategy, Strategy)
        self.grad = _one_of("grad", grad, Grad)
        self.refresh_every = refresh_every
        self.ema = ema
        self.freeze_after = freeze_after
        if axis == "columns" and (self.scope == "head" or site != "projection" or pair_rope):
            raise ValueError(
                "axis: 'columns' takes input channels, which have no heads, norms or rotary pairs; needed scope "
                "'layer' or 'model', site 'projection' and no pair_rope"
            )
        if grad == "compact" and selection == "current":
            raise ValueError(
                "grad: 'compact' needs the set before backward; use selection='lagged', or grad='full' with 'current'"
            )
        if grad == "compact" and isinstance(model, DistributedDataParallel):
            raise ValueError("grad: with 'compact', make LongAct before DistributedDataParallel wraps the model")
        self.steps = 0
        self.model = model
        self.tokens = Tokens()
        self.layers: dict[str, SalientLayer] = {}

        projections = find_projections(model, target_modules)
        runs = [_runs(projection, axis) for projection in projections]
        partners = [_partners(model, projection) for projection in projections] if pair_rope else None
        self._select = Selection(runs, density, self.scope, self.strategy, threshold, seed, partners)
        self._heads = [[size for size, _ in layer] for layer in runs]
        sizes = [sum(heads) for heads in self._heads]
        self._bounds = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
        self._saliency: Tensor | None = None
        self._sets_before: list[Tensor | None] = []
        self._first_sets: list[Tensor] = []
        self.grads: Tensor | None = None
        self.grad_of: dict[str, Tensor] = {}
        self._reduced = False
        self._alike = False  # whether all ranks have the same salient weights
        self._undo: list[Any] = []
        try:
            self._swap(projections, runs)
        except ValueError:
            self.restore()
            raise
        controllers.add(self)

    @classmethod
    def paper(cls, model: nn.Module) -> LongAct:
        """The paper's recipe: L2 statistic, 30% of every head, from the step's own batch, anew at every step.

        The paper masks gradients and leaves the rest to a stock optimizer: `longact.attach(torch.optim.AdamW(...))`.
        """
        return cls(model, density=0.3, statistic="l2", scope="head", selection="current", refresh_every=1)

    def _swap(self, projections: list[Projection], runs: list[list[Run]]) -> None:
        """Gives the projections' modules their salient sets, and the places where statistics are taken their taps."""
        segments: list[int] = []
        source: list[int] = []  # the place in the statistics of every channel
        records: defaultdict[str, dict[str, _Record]] = defaultdict(dict)  # by attention module, then kind
        for i, (projection, layer) in enumerate(zip(projections, runs, strict=True)):
            module = projection.module
            salient = SalientChannels(
                name=projection.name,
                plain=type(module),
                owner=self,
                segment=len(segments),
                size=self._select.sizes[i],
                axis=self.axis,
                transposed=projection.transposed,
            )
            start, end = self._bounds[i]
            if self.site == "projection":
                segments.append(end - start)
            else:
                # One segment a kind, in the order of its heads; those of no kind get one that nothing feeds.
                place, places = start, {}
                for kind in dict.fromkeys(kind for _, kind in layer):
                    places[kind] = place
                    channels = sum(size for size, of in layer if of == kind)
                    if kind is not None:
                        heads = sum(of == kind for _, of in layer)
                        records[projection.attention][kind] = _Record(salient, len(segments), heads, channels)
                    segments.append(channels)
                    place += channels
                for size, kind in layer:
                    source += range(places[kind], places[kind] + size)
                    places[kind] += size
            self.layers[projection.name] = become_salient(module, salient)
        self._sizes = segments
        self._segments = torch.tensor(segments)
        self._source = torch.tensor(source) if self.site != "projection" else None
        self._allocate(next(iter(self.layers.values())).weight.device)
        for path, kinds in records.items():
            tap = tap_norm if self.site == "norm" else tap_rope
            self._undo += tap(self.model.get_submodule(path), path, kinds)
        self._undo += [hook.remove for hook in on_tokens(self.model, self._take)]
        if self.grad == "compact":
            ignored = [f"{name}.weight" for name in self.layers]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, ignored)

    # What the layers ask for in their forward

    def stats_on(self, salient: SalientChannels, segment: int, device: torch.device) -> RunningStats | None:
        """A part of the statistics, on the device of the activations: a model may be moved after its swap.

        None once the sets are frozen.
        """
        if self.frozen:
            return None
        salient.fed = True
        if self._absmax.device != device:
            self._move(device)
        return self._stats[segment]

    def _take(self, tokens: Tokens) -> None:
        self.tokens = tokens
        if self.grad == "compact" and not self._alike and _distributed():
            # DistributedDataParallel leaves out what it was told to ignore.
            for layer in self.layers.values():
                torch.distributed.broadcast(layer.weight.data, 0)
        self._alike = True

    # Statistics: all layers lie in one flat buffer, so that one reset and one all-reduce serve them all

    def _allocate(self, device: torch.device) -> None:
        self._absmax = torch.zeros(self._bounds[-1][1], device=device)
        self._l2_sum = torch.zeros_like(self._absmax)
        self._sequences = torch.zeros(len(self._segments), device=device)
        self._move(device)

    def _move(self, device: torch.device) -> None:
        self._absmax, self._l2_sum, self._sequences, self._segments = (
            tensor.to(device) for tensor in (self._absmax, self._l2_sum, self._sequences, self._segments)
        )
        self._saliency = None if self._saliency is None else self._saliency.to(device)
        self._source = None if self._source is None else self._source.to(device)
        self.grads = None if self.grads is None else self.grads.to(device)
        for salient in self._salient():
            salient.rows = None if salient.rows is None else salient.rows.to(device)
        self._view()

    def _view(self) -> None:
        """Makes the layers' views into the flat buffers; a pickle does not keep them views."""
        parts = zip(self._absmax.split(self._sizes), self._l2_sum.split(self._sizes), self._sequences, strict=True)
        l2 = self.statistic == "l2"
        self._stats = [RunningStats(absmax, *((l2_sum, n) if l2 else ())) for absmax, l2_sum, n in parts]
        if self.grads is not None:
            shapes = {name: part.shape for name, part in self.grad_of.items()}
            flat = self.grads.split([math.prod(shape) for shape in shapes.values()])
            self.grad_of = {name: part.view(shapes[name]) for name, part in zip(shapes, flat, strict=True)}

    def _salient(self) -> Iterator[SalientChannels]:
        return (layer.salient for layer in self.layers.values())

    def _reset(self) -> None:
        for buffer in (self._absmax, self._l2_sum, self._sequences):
            buffer.zero_()
        for salient in self._salient():
            salient.fed = False

    def _measure(self) -> Tensor:
        """The statistic of all layers' channels, fp32 [total channels], the same on every rank."""
        if self.statistic == "absmax":
            if _distributed():
                # As integers the bits of magnitudes keep their order, and NaN is the largest instead of being dropped.
                torch.distributed.all_reduce(self._absmax.view(torch.int32), torch.distributed.ReduceOp.MAX)
            measured = self._absmax.clone()
        else:
            if _distributed():
                torch.distributed.all_reduce(self._l2_sum)
                torch.distributed.all_reduce(self._sequences)
            sequences = self._sequences.clamp(min=1).repeat_interleave(self._segments, output_size=len(self._l2_sum))
            measured = self._l2_sum / sequences
        return measured if self._source is None else measured[self._source]

    # Selection

    @property
    def frozen(self) -> bool:
        """Whether the sets have been chosen for good."""
        return self.freeze_after is not None and self.steps >= self.freeze_after

    @property
    def idle(self) -> bool:
        """Whether there is no set yet, and nothing to choose one from."""
        return any(s.rows is None for s in self._salient()) and not any(s.fed for s in self._salient())

    def refresh(self) -> None:
        """Chooses every layer's salient set from the statistics since the last refresh, and starts them anew.

        Raises:
            RuntimeError: if there is no set yet and nothing to choose it from.
            FloatingPointError: for NaN or Inf activations, if `nonfinite` is "error".
        """
        if self.idle:
            raise RuntimeError(
                "LongAct: a step came before any activation statistics; they are collected while the model is in "
                "training mode (model.train()) and gradients are on"
            )
        if not any(salient.fed for salient in self._salient()):
            return
        first = any(salient.rows is None for salient in self._salient())
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
        for salient, rows in zip(self._salient(), self._select(saliency, self.steps), strict=True):
            salient.rows = rows
        self._first_sets = self._first_sets or [salient.rows for salient in self._salient()]  # type: ignore[misc]
        self._reset()

    # One optimizer step

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zeroes the gradient rows outside the set where backward left them dense: in a first step, or with "current".

        Compact gradients are averaged over the ranks here. Call it after a step's last backward and before gradient
        clipping; `clip_grad_norm_`, `SalientAdamW.step()` and attached optimizers call it if you did not. A second call
        in a step does nothing.
        """
        if self.grad == "compact":
            self._reduce()
        if all(s.fixed for s in self._salient()) or all(layer.weight.grad is None for layer in self.layers.values()):
            return
        self.refresh()
        for layer, s in zip(self.layers.values(), self._salient(), strict=True):
            s.fixed = True
            if layer.weight.grad is not None:
                # One place more, which empty slots (-1) clear.
                outside = torch.ones(layer.weight.shape[s.dim] + 1, dtype=torch.bool, device=layer.weight.device)
                outside[s.rows] = False
                outside = local_mask(layer.weight, outside[:-1], s.dim)
                local(layer.weight.grad).masked_fill_(outside.unsqueeze(1 - s.dim), 0)

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
        if self.grad == "compact":
            if self.grads is None:
                self._allocate_grads()
            self.zero_grad()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes a stock optimizer the paper's literal form: its steps see masked gradients, and refresh the sets.

        A second call does nothing. What resuming needs goes into the optimizer's state dict, as `longact` in its first
        group. A deep copy or a pickle of a stock optimizer leaves its hooks behind: attach the copy's controller to it.

        Raises:
            ValueError: with `grad="compact"`, which a stock optimizer does not see; or for a loaded state dict that was
                saved with sets of other sizes.
        """
        if self.grad == "compact":
            raise ValueError("attach: a stock optimizer does not see compact gradients; needed grad='full'")
        if getattr(optimizer, "_longact", None) is self:
            return
        optimizer._longact = self  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(lambda *_: self.mask_gradients())
        optimizer.register_step_post_hook(lambda *_: self.advance())
        optimizer.register_state_dict_post_hook(self._save_beside)
        optimizer.register_load_state_dict_post_hook(self._load_beside)
        self._load_beside(optimizer)  # what was loaded before

    def _save_beside(self, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
        saved["param_groups"][0]["longact"] = {s.name: self.state_for(s) for s in self._salient()}

    def _load_beside(self, optimizer: torch.optim.Optimizer) -> None:
        saved = optimizer.param_groups[0].pop("longact", None) or {}
        for salient in self._salient() if saved else ():
            self.check_state_for(salient, saved.get(salient.name, {}))
        for salient in self._salient() if saved else ():
            self.load_state_for(salient, saved[salient.name])

    # Compact gradients

    def _allocate_grads(self) -> None:
        for layer in self.layers.values():
            shape = list(layer.weight.shape)
            shape[layer.salient.dim] = layer.salient.size
            self.grad_of[layer.salient.name] = torch.empty(shape, device="meta")
        self.grads = torch.zeros(sum(part.numel() for part in self.grad_of.values()), device=self._absmax.device)
        self._view()

    def _reduce(self) -> None:
        """Averages the gradients of all ranks, once a step."""
        if self._reduced or not _distributed():
            return
        self._reduced = True
        grads = [layer.weight.grad for layer in self.layers.values() if layer.weight.grad is not None]
        for grad in [*grads, *([] if self.grads is None else [self.grads])]:
            torch.distributed.all_reduce(grad)
            grad.div_(torch.distributed.get_world_size())

    def zero_grad(self) -> None:
        """Clears compact gradients. `SalientAdamW.zero_grad()` calls it, and every step ends with it."""
        self._reduced = False
        if self.grads is not None:
            self.grads.zero_()

    @torch.no_grad()
    def clip_grad_norm_(self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` of the masked gradients, compact ones among them; returns their norm."""
        self.mask_gradients()
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        ids = {id(p) for p in parameters}
        compact = [
            layer.salient.grad
            for layer in self.layers.values()
            if id(layer.weight) in ids and layer.salient.grad is not None
        ]
        grads = [p.grad for p in parameters if p.grad is not None] + compact
        norm = torch.nn.utils.get_total_norm(grads, norm_type)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        if compact:
            torch._foreach_mul_(compact, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    # What the user looks at

    def saliency(self, name: str) -> Tensor | None:
        """The statistic [channels] that the set of layer `name` was last chosen from; None before the first refresh."""
        if self._saliency is None:
            return None
        start, end = self._bounds[list(self.layers).index(name)]
        return self._saliency[start:end]

    @property
    def churn(self) -> dict[str, float]:
        """By layer, 1 − Jaccard overlap of the set with the one before; empty until there are two."""
        return {
            salient.name: 1 - _jaccard(salient.rows, before)
            for salient, before in zip(self._salient(), self._sets_before, strict=False)
            if before is not None and salient.rows is not None
        }

    def report(self) -> dict[str, dict[str, Any]]:
        """What there is to know of every layer, as plain numpy arrays and numbers.

        Returns:
            By layer: `saliency`, fp32 [channels], what its set was last chosen from; `salient`, the set, ascending;
            `heads`, how many channels each head has; `churn`, 1 − Jaccard overlap with the set before (NaN until there
            are two); `overlap`, Jaccard overlap with the first set. Empty before the first refresh.
        """
        churn = self.churn
        first_sets: list[Any] = self._first_sets or [salient.rows for salient in self._salient()]  # after a resume
        return {
            s.name: {
                "saliency": self.saliency(s.name).cpu().numpy(),  # type: ignore[union-attr]
                "salient": s.rows[s.rows >= 0].cpu().numpy(),
                "heads": heads,
                "churn": churn.get(s.name, float("nan")),
                "overlap": _jaccard(s.rows, first),
            }
            for s, first, heads in zip(self._salient(), first_sets, self._heads, strict=False)
            if s.rows is not None
        }

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws `report()`: magnitudes by layer, head and channel with the salient ones in colour, churn and overlap.

        Args:
            path: where to save the picture as well: its ending (.png, .svg, .pdf) says as what.

        Raises:
            RuntimeError: before the first refresh.
            ImportError: without matplotlib.
        """
        try:
            from longact_kernels.plots import report_figure
        except ImportError as error:
            raise ImportError("plot: needs matplotlib; run pip install matplotlib") from error
        report = self.report()
        if not report:
            raise RuntimeError("plot: there is no salient set yet; needed a backward pass and a step, or refresh()")
        figure = report_figure(report)
        if path is not None:
            figure.savefig(path)
        return figure

    def restore(self) -> nn.Module:
        """Makes plain layers of the salient ones again, and returns the model."""
        for layer in self.layers.values():
            plain = layer.salient.plain
            del layer.salient
            layer.__class__ = plain  # type: ignore[assignment]
        for undo in self._undo:
            undo()
        if self.grad == "compact" and self.layers:
            del self.model._ddp_params_and_buffers_to_ignore
        self.layers, self._undo = {}, []
        return self.model

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a model has a controller of its own, the copy of this one."""
        self.__dict__.update(state)
        self._view()
        controllers.add(self)

    # Resuming: kept in the optimizer's state, one dict a salient weight, since that is what trainers save and load

    def state_for(self, salient: SalientChannels) -> dict[str, Tensor]:
        """What resuming needs of one layer, as tensors of fixed shapes: distributed checkpoints are read in place."""
        (start, end), parts = self._part(salient)
        saliency = self._saliency if salient.rows is not None else None
        chosen = saliency is not None
        return {
            "salient_steps": torch.tensor(self.steps),
            "salient_flags": torch.tensor([salient.fixed, salient.fed, chosen]),
            "salient_rows": salient.rows if chosen else torch.full((salient.size,), -1, device=self._absmax.device),
            "salient_saliency": (self._absmax if saliency is None else saliency)[start:end].clone(),
            "salient_absmax": self._absmax[start:end].clone(),
            "salient_l2_sum": self._l2_sum[start:end].clone(),
            "salient_sequences": self._sequences[parts].clone(),
        }

    def _part(self, salient: SalientChannels) -> tuple[tuple[int, int], slice]:
        """A layer's channels in the flat buffers, and its segments."""
        i = list(self.layers).index(salient.name)
        ends = [s.segment for s in self._salient()] + [len(self._segments)]
        return self._bounds[i], slice(salient.segment, ends[i + 1])

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
        if (saved := len(state["salient_rows"])) != salient.size:
            raise ValueError(
                f"load_state_dict: {salient.name} was saved with {saved} salient {salient.axis}, this LongAct keeps "
                f"{salient.size}; use the density and scope of the saved run"
            )

    def load_state_for(self, salient: SalientChannels, state: dict[str, Tensor]) -> None:
        """Takes back what `state_for` gave."""
        (start, end), parts = self._part(salient)
        self.steps = int(state["salient_steps"])
        salient.fixed, salient.fed, chosen = map(bool, state["salient_flags"].tolist())
        if chosen:
            salient.rows = state["salient_rows"].to(self._absmax.device)
            if self._saliency is None:
                self._saliency = torch.zeros_like(self._absmax)
            self._saliency[start:end] = state["salient_saliency"]
        self._absmax[start:end] = state["salient_absmax"]
        self._l2_sum[start:end] = state["salient_l2_sum"]
        self._sequences[parts] = state["salient_sequences"]


@dataclass(eq=False)
class _Record:
    """Records queries or keys into a part of the statistics; an object, so that a model's copy has its own."""

    salient: SalientChannels
    segment: int
    heads: int
    channels: int

    def __call__(self, y: Tensor, channels: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and y.requires_grad):
            return y
        owner = self.salient.owner
        if channels.ndim != 3 or channels.shape[-1] != self.channels:
            raise ValueError(
                f"site: {owner.site!r} of {self.salient.name} has {channels.shape[-1]} channels where the projection "
                f"has {self.channels}; use site='projection'"
            )
        stats = owner.stats_on(self.salient, self.segment, y.device)
        if stats is None:
            return y
        mask, cu_seqlens = owner.tokens.of(channels)
        return observe(y, stats, mask, cu_seqlens, channels if cu_seqlens is None else channels[0])


def _one_of(argument: str, value: Any, choices: object) -> Any:
    if value not in get_args(choices):
        raise ValueError(f"{argument}: got {value!r}, needed one of {', '.join(map(repr, get_args(choices)))}")
    return value


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _runs(projection: Projection, axis: Axis) -> list[Run]:
    """The channels of a projection, as runs that compete or train densely."""
    if axis == "rows":
        return [(head.size, head.kind) for head in projection.heads]
    if any(head.kind is None for head in projection.heads):
        raise ValueError(
            f"axis: 'columns' of {projection.name} would also hold rows that are neither query nor key; use axis='rows'"
        )
    weight = projection.module.get_parameter("weight")
    return [(weight.shape[0 if projection.transposed else 1], "x")]


def _partners(model: nn.Module, projection: Projection) -> Tensor:
    """The rotary partner of every channel of a projection."""
    attention = model.get_submodule(projection.attention)
    starts = itertools.accumulate((head.size for head in projection.heads), initial=0)
    return torch.cat(
        [
            start + (torch.arange(head.size) if head.kind is None else rotary_pairs(attention, head.size))
            for start, head in zip(starts, projection.heads, strict=False)
        ]
    )


def _jaccard(one: Tensor, other: Tensor) -> float:
    """The overlap of two sets, empty slots left out; of empty sets 1."""
    one, other = one[one >= 0], other[other >= 0]
    both = torch.isin(one, other).sum().item()
    return both / max(1, len(one) + len(other) - both) if len(one) + len(other) else 1.0
