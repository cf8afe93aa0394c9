"""The controller `LongAct`: it owns the activation statistics and the salient sets of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longact_kernels.flat import Flat
from longact_kernels.functional import Axis, RunningStats
from longact_kernels.models import Projection, TargetModules, find_projections
from longact_kernels.modules import SalientChannels, SalientLayer, become_salient, controllers
from longact_kernels.selection import Run, Scope, Selection, Strategy, partners_of, runs_of
from longact_kernels.shards import is_distributed, is_sharded, local, local_mask
from longact_kernels.sites import Record, Site, tap_norm, tap_rope
from longact_kernels.statistics import Statistic, Statistics
from longact_kernels.tokens import Tokens, on_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        ValueError: for an argument out of range, or a model without such projections or with them on several devices;
            the model is left alone then.
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
        _check_devices(projections)
        runs = [runs_of(projection, axis) for projection in projections]
        partners = [partners_of(projection, model) for projection in projections] if pair_rope else None
        self._select = Selection(runs, density, self.scope, self.strategy, threshold, seed, partners)
        self._saliency: Tensor | None = None
        self.accumulators: Flat | None = None  # compact gradients, by layer
        self._reduced = False
        self._shared = False
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
        sizes: list[int] = []  # of the statistics' segments
        source: list[int] = []  # the place in them of every channel
        records: defaultdict[str, dict[str, Record]] = defaultdict(dict)  # by attention module, then kind
        for projection, layer, size in zip(projections, runs, self._select.sizes, strict=True):
            module, start = projection.module, len(source)
            heads = [channels for channels, _ in layer]
            # One segment a kind, in the order of its heads; away from the projection, nothing feeds those of no kind.
            parts: list[Run] = [(sum(heads), None)] if self.site == "projection" else layer
            by_kind: defaultdict[str | None, list[int]] = defaultdict(list)
            for channels, kind in parts:
                by_kind[kind].append(channels)
            salient = SalientChannels(
                name=projection.name,
                plain=type(module),
                owner=self,
                channels=slice(start, start + sum(heads)),
                segments=slice(len(sizes), len(sizes) + len(by_kind)),
                heads=heads,
                size=size,
                axis=self.axis,
                transposed=projection.transposed,
            )
            places = {}
            for kind, of_kind in by_kind.items():
                if kind is not None:
                    records[projection.attention][kind] = Record(salient, len(sizes), len(of_kind), sum(of_kind))
                places[kind] = start
                start += sum(of_kind)
                sizes.append(sum(of_kind))
            for channels, kind in parts:
                source += range(places[kind], places[kind] + channels)
                places[kind] += channels
            self.layers[projection.name] = become_salient(module, salient)
        order = None if self.site == "projection" else torch.tensor(source)
        device = next(iter(self.layers.values())).weight.device
        self._statistics = Statistics(self.statistic, sizes, order, device)
        for path, taken in records.items():
            tap = tap_norm if self.site == "norm" else tap_rope
            self._undo += tap(self.model.get_submodule(path), path, taken)
        self._undo += [hook.remove for hook in on_tokens(self.model, self._take)]
        if self.grad == "compact":
            ignored = [f"{name}.weight" for name in self.layers]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, ignored)
            self._undo.append(partial(delattr, self.model, "_ddp_params_and_buffers_to_ignore"))

    # What the layers ask for in their forward

    def share_weights(self) -> None:
        """Gives all ranks the first one's weights, once, where DistributedDataParallel was told to ignore them."""
        if self.grad == "full" or self._shared or not is_distributed():
            return
        self._shared = True
        for layer in self.layers.values():
            if not is_sharded(layer.weight):
                torch.distributed.broadcast(layer.weight.data, 0)

    def stats_on(self, salient: SalientChannels, segment: int, device: torch.device) -> RunningStats | None:
        """A part of the statistics, on the device of the activations: a model may be moved after its swap.

        None once the sets are frozen.
        """
        if self.frozen:
            return None
        salient.fed = True
        if self._statistics.device != device:
            self._move(device)
        return self._statistics.running(segment)

    def _move(self, device: torch.device) -> None:
        self._statistics.move(device)
        if self.accumulators is not None:
            self.accumulators.move(device)
        self._saliency = None if self._saliency is None else self._saliency.to(device)
        for salient in self._salient():
            salient.rows, salient.before, salient.first = (
                None if rows is None else rows.to(device) for rows in (salient.rows, salient.before, salient.first)
            )

    def _take(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def _salient(self) -> Iterator[SalientChannels]:
        return (layer.salient for layer in self.layers.values())

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
        saliency = self._statistics.measure()
        finite = saliency.isfinite()
        if (self.nonfinite == "error" or first) and not finite.all():
            bad = [salient.name for salient in self._salient() if not finite[salient.channels].all()]
            raise FloatingPointError(
                f"LongAct: NaN or Inf activations in {len(bad)} of {len(self.layers)} projections, first {bad[0]}; "
                "the salient sets are unchanged. Look at the loss and the learning rate, or pass nonfinite='skip'"
            )
        if self.ema and self._saliency is not None:
            saliency = self._saliency.lerp(saliency, 1 - self.ema)
        if self.nonfinite == "skip" and self._saliency is not None:
            # The saliency before chooses the set before.
            saliency = torch.where(finite.all(), saliency, self._saliency)
        self._saliency = saliency
        for salient, rows in zip(self._salient(), self._select(saliency, self.steps), strict=True):
            salient.before, salient.rows = salient.rows, rows
            salient.first = rows if salient.first is None else salient.first
        self._reset()

    def _reset(self) -> None:
        self._statistics.reset()
        for salient in self._salient():
            salient.fed = False

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
        self._accumulate()
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

    @property
    def grads(self) -> Tensor | None:
        """Compact gradients of all layers, flat; None before the first set, and with grad="full"."""
        return None if self.accumulators is None else self.accumulators.buffer

    def _accumulate(self) -> None:
        """Has backward add to accumulators from now on, where gradients are compact."""
        if self.grad == "full" or self.accumulators is not None:
            return
        shapes = {}
        for name, layer in self.layers.items():
            shapes[name] = list(layer.weight.shape)
            shapes[name][layer.salient.dim] = layer.salient.size
        self.accumulators = Flat(shapes, self._statistics.device)

    def _reduce(self) -> None:
        """Averages the gradients of all ranks, once a step."""
        if any(is_sharded(layer.weight) for layer in self.layers.values()):
            raise ValueError("grad: 'compact' keeps gradients of whole weights, got sharded ones; use grad='full'")
        if self._reduced or not is_distributed():
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
        return self._saliency[self.layers[name].salient.channels]

    @property
    def churn(self) -> dict[str, float]:
        """By layer, 1 − Jaccard overlap of the set with the one before; empty until there are two."""
        return {
            salient.name: 1 - _jaccard(salient.rows, salient.before)
            for salient in self._salient()
            if salient.before is not None
        }

    def report(self) -> dict[str, dict[str, Any]]:
        """What there is to know of every layer, as plain numpy arrays and numbers.

        Returns:
            By layer: `saliency`, fp32 [channels], what its set was last chosen from; `salient`, the set, ascending;
            `heads`, how many channels each head has; `churn`, 1 − Jaccard overlap with the set before (NaN until there
            are two); `overlap`, Jaccard overlap with the first set. Empty before the first refresh.
        """
        churn = self.churn
        return {
            s.name: {
                "saliency": self.saliency(s.name).cpu().numpy(),  # type: ignore[union-attr]
                "salient": s.rows[s.rows >= 0].cpu().numpy(),
                "heads": s.heads,
                "churn": churn.get(s.name, float("nan")),
                "overlap": _jaccard(s.rows, s.rows if s.first is None else s.first),  # None after a resume
            }
            for s in self._salient()
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
        self.layers, self._undo = {}, []
        return self.model

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a model has a controller of its own, the copy of this one."""
        self.__dict__.update(state)
        controllers.add(self)

    # Resuming: kept in the optimizer's state, one dict a salient weight, since that is what trainers save and load

    def state_for(self, salient: SalientChannels) -> dict[str, Tensor]:
        """What resuming needs of one layer, as tensors of fixed shapes: distributed checkpoints are read in place."""
        absmax = self._statistics.absmax.buffer
        saliency = self._saliency if salient.rows is not None else None
        chosen = saliency is not None
        return {
            "salient_steps": torch.tensor(self.steps),
            "salient_flags": torch.tensor([salient.fixed, salient.fed, chosen]),
            "salient_rows": salient.rows if chosen else torch.full((salient.size,), -1, device=absmax.device),
            "salient_saliency": (absmax if saliency is None else saliency)[salient.channels].clone(),
            **{name: part.clone() for name, part in self._statistics.of(salient).items()},
        }

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
        self.steps = int(state["salient_steps"])
        salient.fixed, salient.fed, chosen = map(bool, state["salient_flags"].tolist())
        if chosen:
            absmax = self._statistics.absmax.buffer
            salient.rows = state["salient_rows"].to(absmax.device)
            self._saliency = torch.zeros_like(absmax) if self._saliency is None else self._saliency
            self._saliency[salient.channels] = state["salient_saliency"]
        for name, part in self._statistics.of(salient).items():
            part.copy_(state[name])
        if salient.fixed:
            self._accumulate()


def _one_of(argument: str, value: Any, choices: object) -> Any:
    if value not in get_args(choices):
        raise ValueError(f"{argument}: got {value!r}, needed one of {', '.join(map(repr, get_args(choices)))}")
    return value


def _check_devices(projections: list[Projection]) -> None:
    """One device has the statistics of all layers; what accelerate moves about would not even reach our forward."""
    remedy = "load the model on one device, without device_map or offloading, and use FSDP2 where a GPU is too small"
    if len(devices := {str(one.module.get_parameter("weight").device) for one in projections}) > 1:
        raise ValueError(f"model: its query and key projections lie on {' and '.join(sorted(devices))}; {remedy}")
    for one in projections:
        if "forward" in vars(one.module):
            raise ValueError(f"model: {one.name} has a forward of its own in place of its class's; {remedy}")


def _jaccard(one: Tensor, other: Tensor) -> float:
    """The overlap of two sets, empty slots left out; of empty sets 1."""
    one, other = one[one >= 0], other[other >= 0]
    both = torch.isin(one, other).sum().item()
    return both / max(1, len(one) + len(other) - both) if len(one) + len(other) else 1.0
