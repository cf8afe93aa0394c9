"""The salient sets of all layers, how they are chosen anew, and what choosing them has changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longact_kernels.sparse.flat import any_of
from longact_kernels.sparse.salient_set import SalientSet
from longact_kernels.sparse.selection import Selection
from longact_kernels.sparse.statistics import Measured

# What choosing writes, and what it looks up.
_WRITTEN = ("index", "before", "first", "saliency", "times")
_LOOKED_UP = ("_segments", "_layer_of_channel", "_layer_of_place", "_first")


@dataclass
class _Saved:
    """What there was before sets were chosen."""

    tensors: list[Tensor]
    flags: list[tuple[bool, bool]]


class ChosenSets:
    """The salient sets of all layers, in flat buffers that are written in place: their addresses never change.

    Args:
        select: chooses.
        channels: how many all layers have.
        ema: weight of the saliency before in that of a refresh.
        device: where they lie; see `move`.

    Attributes:
        sets: of each layer; given by whoever makes them.
        index, before, first: the sets of now, those before them, and the first ones, int64, one behind another.
        saliency: fp32 [channels of all layers], what they were chosen from.
        times: int32 [layers], how often each has been chosen.
    """

    def __init__(self, select: Selection, channels: int, ema: float, device: torch.device):
        self.select, self.ema = select, ema
        self.sets: list[SalientSet] = []
        self.index = torch.full((sum(select.sizes),), -1, dtype=torch.int64, device=device)
        self.before, self.first = self.index.clone(), self.index.clone()
        self.saliency = torch.zeros(channels, device=device)
        self.times = torch.zeros(len(select.sizes), dtype=torch.int32, device=device)
        self._saved: _Saved | None = None

    @property
    def device(self) -> torch.device:
        return self.index.device

    def begin(self, sets: list[SalientSet]) -> None:
        """Takes the layers' sets, once all are made."""
        self.sets = sets
        layers = torch.arange(len(sets), dtype=torch.int32)
        self._first = torch.tensor([s.channels.start for s in sets])
        widths = torch.tensor([s.channels.stop - s.channels.start for s in sets])
        self._segments = torch.tensor([s.segments.stop - s.segments.start for s in sets])
        self._layer_of_channel = layers.repeat_interleave(widths)
        self._layer_of_place = layers.repeat_interleave(torch.tensor(self.select.sizes))

    def parts(self, of_sets: Tensor) -> tuple[Tensor, ...]:
        """Each layer's part of a tensor that has something for every slot of every set, as views."""
        return of_sets.split(self.select.sizes)

    def move(self, device: torch.device) -> None:
        """Puts all on a device, and gives the sets their views anew."""
        for name in _WRITTEN:
            held = getattr(self, name)
            if held.is_meta and device.type != "meta":
                held = torch.full_like(held, 0 if name in ("saliency", "times") else -1, device=device)
            setattr(self, name, held.to(device))
        for name in _LOOKED_UP if device.type != "meta" else ():  # whose values must stay
            setattr(self, name, getattr(self, name).to(device))
        for salient, index in zip(self.sets, self.parts(self.index), strict=True):
            salient.index, salient.token = index, torch.zeros(1, device=device)

    def by_layer(self, of_segments: Tensor) -> Tensor:
        """Bool [layers], whether any of a layer's segments is true."""
        return any_of(of_segments, self._segments)

    def outside(self) -> Tensor:
        """Bool [channels of all layers], whether a channel is in no set."""
        channels = len(self.saliency)
        outside = torch.ones(channels + 1, dtype=torch.bool, device=self.device)  # empty slots clear the last
        places = torch.where(self.index < 0, channels, self.index + self._first[self._layer_of_place])
        return outside.index_fill_(0, places, False)[:-1]

    def choose(self, measured: Measured, step: int, among: list[bool] | None = None, bad: Tensor | None = None) -> None:
        """Chooses sets anew; those of layers that no activation reached stay.

        Args:
            measured: what they are chosen from.
            step: how many optimizer steps there have been.
            among: for each layer whether its set is to be chosen; all if not given.
            bad: a flag that none is to be chosen.
        """
        fed = self.by_layer(measured.fed)
        if among is not None:
            fed &= torch.tensor(among, device=fed.device)
        if bad is not None:
            fed &= bad == 0
        saliency, known = measured.value, self.times > 0
        if self.ema:
            averaged = self.saliency.lerp(saliency, 1 - self.ema)
            saliency = torch.where(known[self._layer_of_channel], averaged, saliency)
        self.saliency.copy_(torch.where(fed[self._layer_of_channel], saliency, self.saliency))
        index = self.select(self.saliency, step)
        here, new = fed[self._layer_of_place], (fed & ~known)[self._layer_of_place]
        self.before.copy_(torch.where(here, self.index, self.before))
        self.index.copy_(torch.where(here, index, self.index))
        self.first.copy_(torch.where(new, index, self.first))
        self.times += fed
        for salient in self.sets:
            salient.version += 1
        if not all(salient.chosen for salient in self.sets):  # a first set asks the host to wait
            for salient, reached in zip(self.sets, fed.tolist(), strict=True):
                salient.chosen |= reached

    def save(self) -> None:
        """Keeps what there is, for `take_back`, but for what has been kept and not forgotten since."""
        if self._saved is not None:
            return
        tensors = [getattr(self, name).clone() for name in _WRITTEN]
        self._saved = _Saved(tensors, [(salient.chosen, salient.active) for salient in self.sets])

    def forget(self) -> None:
        """What was chosen last stays."""
        self._saved = None

    def take_back(self, bad: Tensor | None = None) -> None:
        """Undoes what was chosen since `save`: from a batch that is dropped, or whose step has changed nothing.

        Args:
            bad: a flag on the device; without it, undo in any case.
        """
        if (saved := self._saved) is None:
            return
        for name, old in zip(_WRITTEN, saved.tensors, strict=True):
            held = getattr(self, name)
            held.copy_(old if bad is None else torch.where(bad != 0, old, held))
        if bad is not None and [chosen for chosen, _ in saved.flags] == [salient.chosen for salient in self.sets]:
            return  # nothing to know on the host
        if bad is None or bad:
            for salient, (chosen, active) in zip(self.sets, saved.flags, strict=True):
                salient.chosen, salient.active = chosen, active
        self._saved = None

    def state(self, salient: SalientSet) -> dict[str, Tensor]:
        """A layer's set with its history, for `load`."""
        place = self.sets.index(salient)
        return {
            "salient_rows": salient.index.clone(),
            "salient_before": self.parts(self.before)[place].clone(),
            "salient_first": self.parts(self.first)[place].clone(),
            "salient_times": self.times[place].clone(),
            "salient_saliency": self.saliency[salient.channels].clone(),
        }

    def load(self, salient: SalientSet, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave; one that was saved before it had a history begins one."""
        place = self.sets.index(salient)
        salient.index.copy_(state["salient_rows"])
        salient.version += 1
        self.parts(self.before)[place].copy_(state.get("salient_before", salient.index))
        self.parts(self.first)[place].copy_(state.get("salient_first", salient.index))
        self.times[place] = int(state.get("salient_times", salient.chosen))
        self.saliency[salient.channels] = state["salient_saliency"].to(self.saliency)

    def history(self) -> Iterator[tuple[SalientSet, Tensor, Tensor | None, Tensor]]:
        """Every layer that has a set: the set, the one before it, if there was one, and its first, on the host."""
        held = torch.cat((self.index, self.before, self.first, self.times.long())).cpu()  # in one transfer
        *sets, times = held.split([len(self.index)] * 3 + [len(self.times)])
        for salient, index, before, first, often in zip(self.sets, *map(self.parts, sets), times.tolist(), strict=True):
            if salient.chosen:
                yield salient, index, before if often > 1 else None, first
