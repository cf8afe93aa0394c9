"""The controller `LongAct`: it owns the statistics and the salient sets of a model, and their schedule."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longact_kernels.sparse import checks, engines, gradients, stock
from longact_kernels.sparse.batch import Batch, Pass, TellingZeroGrad
from longact_kernels.sparse.chosen import ChosenSets
from longact_kernels.sparse.compact import CompactGradients
from longact_kernels.sparse.config import LongActConfig, field_names, make_config, numbers_of
from longact_kernels.sparse.finite import Numbers
from longact_kernels.sparse.layer import SalientLayer, become_plain, become_salient
from longact_kernels.sparse.projections import EXPERT, Projection, find_projections
from longact_kernels.sparse.registry import controllers, ids_of, register
from longact_kernels.sparse.report import jaccard, layer_report
from longact_kernels.sparse.salient_set import SalientSet
from longact_kernels.sparse.selection import ChannelGroup, Selection, groups_of, partners_of
from longact_kernels.sparse.sharding import Ranks, is_sharded
from longact_kernels.sparse.sites import Tap, tap_norm, tap_rope
from longact_kernels.sparse.statistics import STATISTICS, Statistics
from longact_kernels.sparse.tokens import Call, tell_masks, tell_tokens
from longact_kernels.warning import LongActWarning


class LongAct:
    """Saliency-guided sparse updates of a model's query and key projections (LongAct, arXiv 2604.14922), or of others.

    Finds the query and key projections (with `target_modules="all-linear"` all linear layers of the blocks), turns each
    into a `SalientLinear`, measures the magnitude of their channels while the model trains, and chooses the salient
    sets: the top `density` of the channels of each head, or of a layer without heads. Gradients of all other rows are
    zero, so any optimizer works. `SalientAdamW` also leaves the weights and the state of those rows untouched. Of a
    fused projection the query and key rows are sparse, the others too with "all-linear", and else train as usual.

    Args:
        model: a causal language model; changed in place.
        config: the options as one object, instead of `options`.
        process_group: the ranks that train these layers together, and choose one set: a `ProcessGroup`, or a
            `DeviceMesh`; all ranks if not given. Pipeline stages, and ranks with models of their own, need one each.
        sequence_group: the ranks that each have a part of the tokens of the same sequences (Ulysses, ring attention and
            other context parallelism); none if not given.
        options: fields of `LongActConfig`, such as `density=0.3`.

    Attributes:
        layers: the layers with a salient set, by module name.
        config: the options. They are fixed: to change one, call `restore()` and make another `LongAct`.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for an option out of range, a model without such projections, or one that has them on several
            devices. The model is unchanged then.
    """

    config: LongActConfig

    def __init__(
        self,
        model: nn.Module,
        config: LongActConfig | None = None,
        *,
        process_group: Any = None,
        sequence_group: Any = None,
        **options: Any,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got a {type(model).__name__}, needed a torch.nn.Module")
        if config is not None and not isinstance(config, LongActConfig):
            raise TypeError(f"config: got {config!r}, needed a LongActConfig; options go by name, such as density=0.3")
        if config is not None and options:
            raise ValueError(f"config: got it beside {', '.join(options)}; needed one of them")
        config = make_config(options) if config is None else config
        if config.grad == "compact" and isinstance(model, DistributedDataParallel):
            raise ValueError("grad: with 'compact', make LongAct before DistributedDataParallel wraps the model")
        self.config = config
        self.model = model
        self._steps = 0
        self.layers: dict[str, SalientLayer] = {}
        self.ranks = Ranks(process_group)
        self.sequence_ranks = None if sequence_group is None else Ranks(sequence_group, "sequence_group")
        self.call = Call(self._call_begins, self.check_trains, self.sequence_ranks)
        self.batch = Batch(self._backward_begins, self._drop_zeroed, self._backward_ended)
        self.numbers = Numbers(config.nonfinite, model, self.ranks)
        self.compact: CompactGradients | None = None

        projections = find_projections(model, config.target_modules)
        checks.projections(projections, config)
        groups = [groups_of(projection, config.axis) for projection in projections]
        densities = config.densities([projection.name for projection in projections])
        self._densities = dict(zip((projection.name for projection in projections), densities, strict=True))
        partners = [partners_of(projection, model) for projection in projections] if config.pair_rope else None
        assert config.scope is not None
        self._select = Selection(
            groups, densities, config.scope, config.strategy, config.threshold, config.seed, partners
        )
        self._stepped: list[weakref.ref] = []  # optimizers that have taken the step under way
        self._over = False  # whether they have all, since gradients have been zeroed
        self._masked = False  # whether its sets have been chosen, and its gradients masked
        self._early = False  # whether that was so when another backward came
        self._stale = False  # whether its gradients are those of other sets
        self._checked = False
        self._undo: list[Callable[[], Any]] = []
        try:
            self._swap(projections, groups)
        except ValueError:
            self.restore()
            raise
        same = dataclasses.replace(config, target_modules=None)
        self.ranks.common = [repr(same), *(f"{s.name} with heads of {s.heads} channels" for s in self._sets())]
        register(self)

    @classmethod
    def paper(cls, model: nn.Module, **options: Any) -> LongAct:
        """The paper's settings: L2 statistic, 30% of each head, chosen in every step from the step's own batch.

        The paper masks gradients and uses a stock optimizer: `longact.attach(torch.optim.AdamW(...))`.

        Args:
            model: as in `LongAct`.
            options: options to add or to override.
        """
        return cls(model, **{"density": 0.3, "statistic": "l2", "scope": "head", "selection": "current", **options})

    @staticmethod
    def of(model: nn.Module) -> LongAct:
        """The controller of a model. A copy of a model has a controller of its own.

        Raises:
            TypeError: if it is no model.
            ValueError: if it has none.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got a {type(model).__name__}, needed a torch.nn.Module")
        ids = {id(module) for module in model.modules()}
        for longact in controllers():
            if any(id(layer) in ids for layer in longact.layers.values()):
                return longact
        raise ValueError("model: it has no LongAct; needed one that LongAct(model) was made for, or a copy of it")

    def __repr__(self) -> str:
        return f"LongAct({len(self.layers)} layers, {self.steps} steps, {self.config})"

    def __getattr__(self, name: str) -> Any:
        # Options may be read as attributes of the controller.
        if name in field_names() and "config" in self.__dict__:
            return getattr(self.config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in field_names():
            raise AttributeError(
                f"{name}: the options of a LongAct are fixed; call restore() and make another with {name}={value!r}"
            )
        super().__setattr__(name, value)

    def _swap(self, projections: list[Projection], groups: list[list[ChannelGroup]]) -> None:
        """Gives the projections' modules their salient sets, and the places where statistics are taken their taps."""
        config = self.config
        sizes: list[int] = []  # of the statistics' segments
        source: list[int] = []  # the place in them of every channel
        taps: defaultdict[str, dict[str, Tap]] = defaultdict(dict)  # by attention module, then kind
        device = projections[0].module.get_parameter("weight").device
        total = sum(channels for layer in groups for channels, _ in layer)
        self._chosen = ChosenSets(self._select, total, config.ema, device)
        self._of_tap: list[tuple[Tap, int]] = []
        parts_of_index = self._chosen.parts(self._chosen.index)
        for projection, layer, own, limits in zip(
            projections, groups, parts_of_index, self._select.limits, strict=True
        ):
            module, start = projection.module, len(source)
            heads = [channels for channels, _ in layer]
            # One segment a kind, in the order of its heads; away from the projection, nothing feeds those of no kind.
            parts: list[ChannelGroup] = [(sum(heads), None)] if config.site == "projection" else layer
            by_kind: defaultdict[str | None, list[int]] = defaultdict(list)
            for channels, kind in parts:
                by_kind[kind].append(channels)
            salient = SalientSet(
                name=projection.name,
                plain=type(module),
                channels=slice(start, start + sum(heads)),
                segments=slice(len(sizes), len(sizes) + len(by_kind)),
                heads=heads,
                size=len(own),
                limits=limits,
                axis=config.axis,
                transposed=projection.transposed,
                routed=EXPERT.search(projection.name) is not None,
                call=self.call,
                batch=self.batch,
                index=own,
            )
            offsets = {}
            for kind, of_kind in by_kind.items():
                if kind is not None:
                    tap = taps[projection.attention][kind] = Tap(
                        salient, module, config.site, sum(of_kind), len(of_kind)
                    )
                    self._of_tap.append((tap, len(sizes)))
                offsets[kind] = start
                start += sum(of_kind)
                sizes.append(sum(of_kind))
            for channels, kind in parts:
                source += range(offsets[kind], offsets[kind] + channels)
                offsets[kind] += channels
            self.layers[projection.name] = become_salient(module, salient)
        order = None if config.site == "projection" else torch.tensor(source)
        self._statistics = Statistics(STATISTICS[config.statistic], sizes, order, device, self.sequence_ranks)
        self._chosen.begin(list(self._sets()))
        if config.grad == "compact":
            self.compact = CompactGradients(self.model, self.layers, self.ranks)
            self._undo += self.compact.undo()
        self._place(device)
        for path, of_attention in taps.items():
            tap_at = tap_norm if config.site == "norm" else tap_rope
            self._undo += tap_at(self.model.get_submodule(path), path, of_attention)
        self._undo += tell_tokens(self.model, self.call)
        attentions = dict.fromkeys(projection.attention for projection in projections)
        self._undo += tell_masks(map(self.model.get_submodule, attentions), self.call)
        self._undo.append(TellingZeroGrad(self.model, self.zero_grad).undo)

    def _sets(self) -> Iterator[SalientSet]:
        return (layer.salient for layer in self.layers.values())

    # Where things lie

    def _place(self, device: torch.device) -> None:
        """Puts all that a step needs on the device of the weights, and views of it where they are used."""
        self._placed = True
        self._statistics.move(device)
        self._chosen.move(device)
        if self.compact is not None:
            self.compact.place(device)
            self.batch.beside = self.compact.beside()
        self.batch.passes = [salient.passes for salient in self._sets()]
        for layer in self.layers.values():
            # Of a sharded parameter, gradients come and go with every backward that is accumulated.
            whole = self.config.grad == "full" and not is_sharded(layer.weight)
            layer.salient.passes.weight = layer.weight
            layer.salient.passes.own = layer.weight if whole else None
        self._connect()

    def _connect(self) -> None:
        """Tells layers, or taps, what to merge their statistics into."""
        if self.config.site == "projection":
            for salient in self._sets():
                salient.stats = None if self.frozen else self._statistics.running(salient.segments.start)
        for tap, segment in self._of_tap:
            tap.stats = None if self.frozen else self._statistics.running(segment)

    def check(self) -> None:
        """Whether the layers are where they were, and can train.

        Raises:
            ValueError: for compact gradients of sharded weights.
            RuntimeError: if something has been put in the place of one, nothing is left to train, or an engine trains
                them in another form.
        """
        checks.in_place(self.model, self.layers)
        for name, layer in self.layers.items():
            engines.refuse(name, layer, RuntimeError)
        checks.apart(self.layers)
        if self.compact is not None:
            self.compact.check()

    def check_trains(self) -> None:
        """Raises RuntimeError if no salient weight can train: after `restore()`, or before the first step."""
        if not self.layers:
            raise RuntimeError("LongAct: it was restored, and has no layers any more; make another with LongAct(model)")
        if not self.steps and not any(layer.weight.requires_grad for layer in self.layers.values()):
            raise RuntimeError(
                f"LongAct: none of the {len(self.layers)} salient weights requires a gradient any more; unfreeze "
                "them with requires_grad_(True), or train without LongAct (adapters freeze what they stand beside)"
            )

    def _call_begins(self) -> None:
        engines.refuse_join()
        if not self._checked:
            self.check()
            self._checked = True
        self.call.idle = not self.steps and not any(layer.weight.requires_grad for layer in self.layers.values())

    # The batch

    def drop(self, layers: Iterable[SalientLayer] | None = None) -> None:
        """Forgets backward passes since the last step: their gradients have been zeroed.

        Args:
            layers: those whose gradients have been zeroed; all of them if not given.
        """
        dropped = [layer.salient for layer in (self.layers.values() if layers is None else layers)]
        came = self._masked or any(salient.passes.came for salient in dropped)
        for salient in dropped:
            salient.has_grad = False
            salient.passes.clear()
        everything = len(dropped) == len(self.layers)
        self._stale &= not everything
        self._over = everything and bool(self._stepped)
        if self._stepped or not came:
            return  # they are in the statistics, as their gradients are in the weights
        for part in [None] if everything else [salient.segments for salient in dropped]:
            self._statistics.drop(part)
        if everything or not self.batch.present:
            self._chosen.take_back()
            self.batch.task = -1
            self._masked = self._early = False
            self.numbers.begin()

    def _backward_begins(self) -> None:
        self.settle()
        if self.compact is not None:
            self.compact.check_untouched()
        self._early |= self._masked
        self._masked = False

    def _backward_ended(self) -> None:
        self._statistics.merge_waiting()

    def _drop_zeroed(self, zeroed: list[Pass]) -> None:
        ids = set(map(id, zeroed))
        every = len(ids) == len(self.layers)
        self.drop(None if every else [layer for layer in self.layers.values() if id(layer.salient.passes) in ids])

    def zero_grad(self, ids: set[int] | None = None) -> None:
        """Clears compact gradients, and drops the batch that the gradients came from out of the statistics.

        `zero_grad` of the model, of `SalientAdamW` and of attached optimizers calls it.

        Args:
            ids: the ids of the parameters whose gradients were zeroed; by default all.
        """
        self.drop(None if ids is None else [layer for layer in self.layers.values() if id(layer.weight) in ids])

    # Selection

    @property
    def steps(self) -> int:
        """The number of optimizer steps so far."""
        return self._steps + bool(self._stepped)

    @property
    def frozen(self) -> bool:
        """Whether the sets are final (`freeze_after`)."""
        freeze_after = self.config.freeze_after
        return freeze_after is not None and self.steps >= freeze_after

    @property
    def idle(self) -> bool:
        """Whether there is no set yet, and nothing to choose one from."""
        return not any(s.chosen for s in self._sets()) and not self.batch.present

    @property
    def _trains(self) -> bool:
        """Whether a layer is in training mode."""
        return any(layer.training for layer in self.layers.values())

    # One optimizer step

    def begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Says that an optimizer begins a step. `SalientAdamW` and attached optimizers do.

        Raises:
            RuntimeError: inside a backward pass, if layers have been replaced, or the optimizer's parameters.
            FloatingPointError: for bad numbers in an earlier step.
        """
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "LongAct: an optimizer of salient weights stepped inside backward, where the statistics of the "
                "batch are not complete; step it after backward"
            )
        self.batch.unseen = None
        if any(stepped() is optimizer for stepped in self._stepped):
            self.settle()
        self.numbers.watch.look()
        if not self.held_by(optimizer):
            raise RuntimeError(
                f"LongAct: this {type(optimizer).__name__} was given the salient weights, and holds none of them "
                "any more: an engine (DeepSpeed ZeRO, Megatron's distributed optimizer, FSDP1) has put flat copies in "
                f"their place, which would train densely, or weights were replaced after it was made; {engines.REMEDY}"
            )
        checks.trained(self.layers, optimizer)
        if not self._checked:
            self.check()
            self._checked = True
        elif self.compact is not None:
            self.compact.check()
        self.check_trains()

    def mask_gradients(self) -> None:
        """Zeroes gradient rows outside the set: those of a first step, or with "current", which backward left dense,
        and what has come to a weight's gradient by other paths than its layer.

        It also averages compact gradients over the ranks. Call it after a step's backward passes and before gradient
        clipping; `clip_grad_norm_` does. It may be called after every backward: in a first step, or with "current", the
        sets are chosen at the first call. With several ranks it must be called on all, also after the last backward.

        Raises:
            RuntimeError: if there is no set yet and nothing to choose it from.
            FloatingPointError: on a CPU, for NaN or Inf activations, if `nonfinite` is "error". The batch is dropped
                from the statistics then.
        """
        if not self.ranks.alone:  # another rank may have had a backward since
            self._masked = self._early = False
        self.prepare_step()
        self.mask_again()

    def _refuse_early(self) -> None:
        if self._early and not self._masked and not self.ranks.alone:
            raise RuntimeError(
                "LongAct: a backward came after clip_grad_norm_() or mask_gradients(); with several processes call it "
                "once more after the last backward of a step, where all of them meet"
            )

    @torch.no_grad()
    def prepare_step(self) -> None:
        """Chooses sets that are to be chosen from this batch, masks those layers' gradients, and meets other ranks.

        Optimizers call it. A second call does nothing, unless another backward has come. Raises as `mask_gradients`.
        """
        self._settle_device()
        if self.compact is not None:
            self.compact.check_untouched()
        if self._over:  # as a rank that was fed nothing has to know, which has had no backward to tell
            self.settle()
        self.batch.drop_zeroed()
        if self._stale:
            raise RuntimeError(
                "LongAct: refresh() was called between backward and step, whose gradients are those of the sets "
                "before; call it after the step, or zero_grad() after it"
            )
        if self._masked or self._stepped:
            return
        self._refuse_early()
        layers = list(self.layers.values())
        alone = self.ranks.alone  # else all of them meet here, whatever each was fed
        if alone and not self.batch.present and all(layer.weight.grad is None for layer in layers):
            return
        if alone and self.idle:
            self._raise_idle()
        if not (self.batch.present or self.frozen or self._trains):
            warnings.warn(
                "LongAct: this step's gradients come from evaluation mode, where nothing is measured, so the "
                "salient sets stay as they are; call model.train() before the forward pass",
                LongActWarning,
                stacklevel=2,
            )
        self._masked = True
        if self.compact is not None:
            self.compact.reduce()
        if not self.frozen:
            self._join()
        if self.config.nonfinite != "off":
            flags = self._bad_layers()
            if not flags.is_cuda:
                self._refuse(flags)
            weights = ((layer.salient, layer.weight) for layer in layers)
            grads = {f"{s.name}.weight": p.grad for s, p in weights if not s.active and p.grad is not None}
            self.numbers.look(flags, grads)
        among = [not layer.salient.active for layer in layers]
        if not any(among):
            return
        self._chosen.save()
        measured = self._statistics.measure("batch")
        bad = self.numbers.bad
        self._chosen.choose(measured, self._steps, None if all(among) else among, bad)
        outside = self._chosen.outside()
        for layer, dense in zip(layers, among, strict=True):
            if not dense:
                continue
            salient = layer.salient
            if salient.chosen:
                salient.active = True
                gradients.mask_(layer, outside)
                self.numbers.masked(layer.weight.grad)
            elif layer.weight.grad is not None and (bad is None or not bad):
                raise RuntimeError(
                    f"LongAct: {salient.name} has a gradient, but no activation statistics to choose its salient set "
                    "from; they are collected while the layer is in training mode (model.train())"
                )
            if self.config.selection == "lagged":
                self._statistics.drop(salient.segments)  # what has chosen a set once does not count again

    def _join(self) -> None:
        """Takes the batch over all ranks; of those that have parts of a layer, each has counted its sequences."""
        shares = [s.share for s in self._sets() for _ in range(s.segments.start, s.segments.stop)]
        self._statistics.join(self.ranks.all_reduce, shares)

    @torch.no_grad()
    def mask_again(self, ids: set[int] | None = None) -> None:
        """Zeroes what lies outside the sets: what others than the layers' own backward have put there.

        Nothing tells of all that may have come (`.grad.data`, a tensor at the address of another), so all are masked.

        Args:
            ids: those of the weights; all if not given.
        """
        layers = [layer for layer in self.layers.values() if ids is None or id(layer.weight) in ids]
        if dense := [own for own in layers if own.salient.chosen and own.weight.grad is not None]:
            outside = self._chosen.outside()
            for layer in dense:
                gradients.mask_(layer, outside)

    def _raise_idle(self, what: str = "a step") -> None:
        if not self._trains:
            raise RuntimeError(
                f"LongAct: {what} came, but the model is in evaluation mode, as from_pretrained() returns it, and has "
                "measured nothing; call model.train() before the forward pass"
            )
        raise RuntimeError(
            f"LongAct: {what} came before any activation statistics; they are collected while the model is in training "
            "mode (model.train()) and gradients are on, and are dropped when gradients are zeroed before a step"
        )

    def _bad_layers(self) -> Tensor:
        """Bool [layers]: whether the joined batch has NaN or Inf activations."""
        return self._chosen.by_layer(self._statistics.bad())

    def _refuse(self, bad_layers: Tensor) -> None:
        """Drops the batch and raises FloatingPointError, if `nonfinite` is "error" and a layer is bad."""
        if self.config.nonfinite == "error" and bad_layers.any():
            self.drop()
            self.numbers.watch.post(bad_layers, self.numbers.of_layer(self.layers), self._steps + 1)

    def look_at(self, loss: Tensor) -> None:
        """Has a loss looked at with the other numbers of its step: it may be NaN or Inf where its gradients are not.

        `LongActTrainerMixin` calls it.

        Args:
            loss: of one element, of a batch that goes through backward.
        """
        self.numbers.look_at(loss, self._chosen.device)

    def name_of(self, p: Tensor) -> str:
        """The name of a parameter of the model, for a message."""
        names = {id(own): name for name, own in self.model.named_parameters()}
        return names.get(id(p), f"a parameter of shape {list(p.shape)}")

    def verdict(self, grads: list[Tensor], name_of: Callable[[int], str]) -> Tensor | None:
        """Whether a step's numbers are bad, on the device: it must change nothing then.

        Args:
            grads: the gradients that the step will use; none where a GradScaler has looked at them.
            name_of: the name of the parameter that the i-th belongs to, for the error.

        Returns:
            A flag of one element, or None if nobody looks.

        Raises:
            FloatingPointError: on a CPU, if `nonfinite` is "error"; the batch is out of the statistics then.
        """
        try:
            return self.numbers.verdict(grads, name_of, self.layers, self._steps + 1)
        except FloatingPointError:
            self.drop()
            raise

    @torch.no_grad()
    def end_step(self, optimizer: torch.optim.Optimizer | None, bad: Tensor | None = None) -> None:
        """Says that an optimizer has stepped (None: something else). `SalientAdamW` and attached optimizers do.

        The step ends when the next batch's backward begins, or when somebody asks for what follows from it: any number
        of optimizers may take it together.

        Args:
            bad: a flag that the step has changed nothing, if it may be so.
        """
        first = not self._stepped
        if first and not (self._masked or self.frozen):
            self._join()
        if first and bad is not None:
            self._chosen.take_back(bad)
        ids = None if optimizer is None else ids_of(optimizer)
        for layer in self.layers.values():
            if ids is None or id(layer.weight) in ids:
                layer.salient.has_grad = False  # a step uses a compact gradient up
                layer.salient.passes.weight = layer.weight  # another one may have been put in, with an optimizer
        if first and self.frozen:
            self._statistics.drop()
        elif first and self.config.selection == "lagged":
            self._statistics.commit(bad)
        elif first:
            self._statistics.drop()
        due = self._due
        self._stepped.append(weakref.ref(self if optimizer is None else optimizer))
        if first:
            self._checked = False
            self.batch.clear()
            self._chosen.forget()
            for salient in self._sets():
                salient.active = salient.chosen and (self.config.selection == "lagged" or not due)
            if self.frozen:
                self._connect()

    def advance(self) -> None:
        """Ends a step that you took without an optimizer, and refreshes the sets on schedule.

        Call `mask_gradients()` first, and then update the weights.

        Raises:
            RuntimeError: there are compact gradients, which such a step does not see.
        """
        if self.compact is not None and not self._stepped and self.compact.present():
            raise RuntimeError(
                "grad: 'compact' keeps the gradients of salient weights out of `.grad`, so a step by hand leaves them "
                "out; step with SalientAdamW, or use grad='full'"
            )
        self.batch.unseen = None
        self._refuse_early()
        self.end_step(None, self.numbers.bad)
        self.settle()

    @property
    def _due(self) -> bool:
        """Whether the sets are to be chosen anew after the step under way."""
        return (self._steps + 1) % self.config.refresh_every == 0 and not self.frozen

    def settle(self) -> None:
        """Ends the step that optimizers have taken, if any has, and refreshes the sets when their time has come."""
        self._settle_device()
        if self._stepped:
            self._next_step()

    @torch.no_grad()
    def _next_step(self) -> None:
        self._stepped, self._over = [], False
        due = self._due
        self._steps += 1
        self._masked = self._early = False
        self.numbers.begin()
        if self.config.selection == "lagged" and due:
            self._choose_by_period()
        if self.compact is not None:
            self.compact.begin_step()

    def _choose_by_period(self, bad: Tensor | None = None) -> None:
        """Chooses the sets from the refresh period, unless a flag says that it is bad, and begins another."""
        self._chosen.choose(self._statistics.measure("period"), self._steps, bad=bad)
        self._statistics.period.buffer.zero_()

    def refresh(self) -> None:
        """Chooses the salient set of each layer now, from the statistics since the last refresh, and resets them.

        Between backward and step, gradients are those of the sets before: the step is refused until they are zeroed.

        Raises:
            RuntimeError: if there is no set yet and nothing to choose it from.
            FloatingPointError: for NaN or Inf activations, if `nonfinite` is "error".
        """
        self.settle()
        self.batch.drop_zeroed()
        self._stale |= self.batch.present and any(salient.active for salient in self._sets())
        if self.ranks.alone and self.idle:
            self._raise_idle("refresh()")
        self._join()
        flags = self._bad_layers()
        self._refuse(flags)
        bad = None if self.config.nonfinite == "off" else flags.any()
        self._statistics.commit(bad)
        self._choose_by_period(bad)
        for salient in self._sets():
            salient.active = salient.chosen and self.config.selection == "lagged"

    def _settle_device(self) -> None:
        """A model may have been moved, or copied, since."""
        if not self.layers:
            return
        device, copied = next(iter(self.layers.values())).weight.device, not self._placed
        if self._chosen.device != device or copied:
            self._place(device)
        if copied:
            self.drop()  # copies of parameters have no gradients

    def held_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer holds any of the salient weights."""
        ids = ids_of(optimizer)
        return any(id(layer.weight) in ids for layer in self.layers.values())

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Connects a stock optimizer, as in the paper: its steps see masked gradients, and refresh the sets.

        A second call does nothing. The optimizer's state dict then has what resuming needs, as `longact` in its first
        group. A deep copy or a pickle of a stock optimizer loses its hooks: attach the copy to its own controller.

        Raises:
            TypeError: for what is no optimizer.
            ValueError: with `grad="compact"`, which a stock optimizer does not see; for an optimizer that steps by
                another one; for an optimizer without any of the salient weights; or for a loaded state dict that was
                saved with sets of other sizes.
        """
        stock.attach(self, optimizer)

    @torch.no_grad()
    def clip_grad_norm_(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` of the masked gradients, with compact ones; returns their norm.

        Raises:
            TypeError: for parameters that are no tensors, or a norm that is no number.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else parameters
        parameters = list(parameters) if isinstance(parameters, Iterable) else [parameters]
        if strange := [type(p).__name__ for p in parameters if not isinstance(p, Tensor)]:
            raise TypeError(f"parameters: got a {strange[0]}, needed tensors, such as model.parameters()")
        if not isinstance(max_norm, Real) and not (isinstance(max_norm, Tensor) and max_norm.numel() == 1):
            kind = f"a tensor {list(max_norm.shape)}" if isinstance(max_norm, Tensor) else repr(max_norm)
            raise TypeError(f"max_norm: got {kind}, needed a number")
        self.mask_gradients()
        ids = {id(p) for p in parameters}
        own = [layer for layer in self.layers.values() if id(layer.weight) in ids]
        compact = [grad for layer in own if (grad := gradients.compact_grad(layer)) is not None]
        grads = [p.grad for p in parameters if p.grad is not None] + compact
        norm = torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach)
        gradients.clip_(compact, max_norm, norm)
        self.batch.note()
        return norm

    # What the user looks at

    @property
    def sets(self) -> dict[str, Tensor]:
        """The salient channels of each layer that has a set, int64 in ascending order."""
        self.settle()
        return {s.name: s.index[s.index >= 0] for s in self._sets() if s.chosen}

    @property
    def skipped(self) -> int:
        """The number of steps that changed nothing because of NaN or Inf."""
        self.numbers.watch.look(wait=True)
        return self.numbers.watch.skipped

    def saliency(self, name: str) -> Tensor | None:
        """The statistic [channels] that the set of a layer was chosen from; None before the first set."""
        self.settle()
        if name not in self.layers:
            raise KeyError(f"saliency: there is no layer {name!r}; needed one of {', '.join([*self.layers][:2])}, …")
        salient = self.layers[name].salient
        return self._chosen.saliency[salient.channels] if salient.chosen else None

    @property
    def churn(self) -> dict[str, float]:
        """1 − Jaccard overlap of each layer's set with its previous set; empty until there are two."""
        self.settle()
        sets = self._chosen.history()
        return {s.name: 1 - jaccard(index, before) for s, index, before, _ in sets if before is not None}

    def report(self) -> dict[str, dict[str, Any]]:
        """The state of each layer, as numpy arrays and numbers.

        Returns:
            A dict for each layer, none before the first refresh. `saliency`, fp32 [channels], is what the set was
            chosen from; `salient` the set, ascending; `heads` the number of channels of each head; `churn` 1 − Jaccard
            overlap with the previous set (NaN until there are two); `overlap` the Jaccard overlap with the first set.
        """
        self.settle()
        saliency = self._chosen.saliency.clone().cpu()
        return {
            s.name: layer_report(s, saliency[s.channels], index, before, first)
            for s, index, before, first in self._chosen.history()
        }

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws `report()`: magnitudes by layer, head and channel, salient channels in colour; churn and overlap.

        Returns a matplotlib figure.

        Args:
            path: a file to save the picture to; its suffix (.png, .svg, .pdf) gives the format.

        Raises:
            RuntimeError: before the first refresh.
            ImportError: without matplotlib.
        """
        try:
            from longact_kernels.sparse.figures import report_figure
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
        """Turns the salient layers into plain ones again, with the same parameters, and returns the model.

        Compact gradients are added to `.grad`, which they are no part of before.

        Raises:
            RuntimeError: if there are such, and other ranks' have not been averaged with them.
        """
        if self.compact is not None and self.compact.present() and not (self._masked or self.ranks.alone):
            raise RuntimeError(
                "restore: compact gradients are there, which have not been averaged over the processes; call "
                "mask_gradients() on all of them before, or zero_grad() to drop the gradients"
            )
        for layer in self.layers.values():
            gradients.spill(layer)
            become_plain(layer)
        for undo in self._undo:
            undo()
        self.layers, self._undo = {}, []
        # Nothing goes round in a circle any more: the model is freed with its last name.
        model, self.model = self.model, nn.Module()
        self.numbers.model = self.model
        self.call, self.batch = Call(_nothing, _nothing), Batch(_nothing, _nothing, _nothing)
        return model

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        # A pickle does not keep views views.
        return {**self.__dict__, "_stepped": [], "_placed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a model has a controller of its own, the copy of this one."""
        self.__dict__.update(state)
        register(self)

    # Resuming: kept in the optimizer's state, one dict a salient weight, since that is what trainers save and load

    def _config_of(self, salient: SalientSet) -> LongActConfig:
        """The options, with the density of one layer."""
        return dataclasses.replace(self.config, density=self._densities[salient.name])

    def state_for(self, salient: SalientSet) -> dict[str, Tensor]:
        """What resuming needs of one layer, as tensors of fixed shapes: distributed checkpoints are read in place."""
        self.settle()
        return self.kept_for(salient)

    def kept_for(self, salient: SalientSet) -> dict[str, Tensor]:
        """`state_for` in the midst of a step."""
        period = self._statistics.state(salient.channels, salient.segments)
        return {
            "salient_steps": torch.tensor(self.steps),
            "salient_options": torch.tensor(numbers_of(self._config_of(salient)), dtype=torch.float64),
            "salient_flags": torch.tensor([salient.active, False, salient.chosen]),
            **self._chosen.state(salient),
            **{name: part.clone() for name, part in period.items()},
        }

    def check_state_for(self, salient: SalientSet, state: dict[str, Tensor]) -> None:
        """Whether `load_state_for` can take a state.

        Raises:
            ValueError: if the state has no salient set, one of another size or kind, or one that is none.
        """
        checks.saved_set(salient, self._config_of(salient), self.state_for(salient), state)

    @torch.no_grad()
    def load_state_for(self, salient: SalientSet, state: dict[str, Tensor]) -> None:
        """Takes back what `state_for` gave."""
        self._settle_device()
        self._stepped = []
        self.batch.clear()
        self._statistics.drop(salient.segments)
        self._chosen.forget()
        self._masked = self._early = self._stale = False
        self._steps = int(state["salient_steps"])
        active, _, chosen = map(bool, state["salient_flags"].tolist())
        salient.active, salient.chosen, salient.has_grad = active, chosen, False
        self._chosen.load(salient, state)
        for name, part in self._statistics.state(salient.channels, salient.segments).items():
            part.copy_(state[name])
        if self.compact is not None:
            self.compact.begin_step()
        self._connect()


def _nothing(*_: Any) -> None:
    pass
