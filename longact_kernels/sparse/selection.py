"""Which channels compete with one another, and which of them a saliency makes salient, in sets of fixed sizes."""

from __future__ import annotations

import itertools
from collections import defaultdict

import torch
from torch import Tensor, nn

from longact_kernels import ops
from longact_kernels.functional import Axis
from longact_kernels.sparse.config import Scope, Strategy
from longact_kernels.sparse.projections import Projection
from longact_kernels.sparse.rotary import rotary_pairs

ChannelGroup = tuple[int, str | None]
"""Neighbouring channels of one head: how many, and what they compete with (None: always in the set).

Those of the kind "other" compete within their layer, whatever the scope says of heads.
"""

Limit = tuple[list[tuple[int, int]], int]
"""Ranges of channels that compete with one another, and how many of them a set has at most."""


def share(density: float, channels: float) -> int:
    """How many of so many channels are salient: at least one."""
    return max(1, int(density * channels + 0.5))


def groups_of(projection: Projection, axis: Axis) -> list[ChannelGroup]:
    """The channels of a projection, as groups that compete or train densely."""
    if axis == "rows":
        return [(head.size, head.kind) for head in projection.heads]
    if any(head.kind is None for head in projection.heads):
        raise ValueError(
            f"axis: 'columns' of {projection.name} would also hold rows that are neither query nor key; use axis='rows'"
        )
    weight = projection.module.get_parameter("weight")
    return [(weight.shape[0 if projection.transposed else 1], "x")]


def partners_of(projection: Projection, model: nn.Module) -> Tensor:
    """The rotary partner of every channel of a projection."""
    attention = model.get_submodule(projection.attention)
    starts = itertools.accumulate((head.size for head in projection.heads), initial=0)
    return torch.cat(
        [
            start + (torch.arange(head.size) if head.kind is None else rotary_pairs(attention, head.size))
            for start, head in zip(starts, projection.heads, strict=False)
        ]
    )


class Selection:
    """Chooses the salient sets of all layers from their saliency, in one go.

    Sets have fixed sizes, so that nothing is read on the host. Where a layer takes fewer channels than its size (scope
    "model", strategy "threshold"), the places left over hold -1, before the others.

    Args:
        layers: for each layer its channels in their order, as groups: the heads.
        densities: for each layer the share of its channels that are salient.
        scope: what channels compete with: those of their "head", all of their kind in the "layer", or those of the
            whole "model"; of the latter, a layer takes up to twice its share.
        strategy: "top" takes the largest saliency, "bottom" the smallest, "random" any; "threshold" those of "top"
            above `threshold` times the mean of their kind in the layer.
        threshold: see there.
        seed: of strategy "random", on the CPU: the same numbers everywhere.
        partners: for each layer, each channel's partner (the two channels of a rotary pair enter and leave the set
            together, by the larger of their saliencies), or None. Sets then hold half as many pairs.

    Attributes:
        sizes: of every layer's set.
        limits: for each layer what competes in it: ranges of its channels, and how many of those a set has at most.
    """

    def __init__(
        self,
        layers: list[list[ChannelGroup]],
        densities: list[float],
        scope: Scope,
        strategy: Strategy,
        threshold: float,
        seed: int,
        partners: list[Tensor] | None = None,
    ):
        self.strategy, self.threshold, self.seed = strategy, threshold, seed
        self.width = 1 if partners is None else 2
        channels: list[int] = []  # that compete, in an order that puts competitors side by side
        dense: list[int] = []
        bottom: list[int] = []  # what an empty slot holds, one for each channel
        self.groups: list[int] = []
        self.counts: list[int] = []
        kinds: list[int] = []  # how many units each kind of each layer has
        self.sizes: list[int] = []
        self.limits: list[list[Limit]] = []
        first: list[int] = []  # of every place in the sets, its layer's first channel
        units: defaultdict[float, int] = defaultdict(int)  # how many there are of each density
        start = 0
        for layer, (own, density) in enumerate(zip(layers, densities, strict=True)):
            within = min(1.0, 2 * density) if scope == "model" else density
            bounds = list(itertools.pairwise(itertools.accumulate((size for size, _ in own), initial=start)))
            before = len(dense), sum(self.counts)
            ranges = [((a - start, b - start), kind) for (a, b), (_, kind) in zip(bounds, own, strict=True)]
            limits = [([bound], bound[1] - bound[0]) for bound, kind in ranges if kind is None]
            for kind in sorted({kind for _, kind in own if kind is not None}):
                heads = [list(range(*bound)) for bound, (_, of) in zip(bounds, own, strict=True) if of == kind]
                if partners is not None:
                    heads = [_paired(head, partners[layer], start) for head in heads]
                apart = scope == "head" and kind != "other"
                if not apart:
                    heads = [[channel for head in heads for channel in head]]
                of_kind = [bound for bound, of in ranges if of == kind]
                for head, competing in zip(heads, [[one] for one in of_kind] if apart else [of_kind], strict=True):
                    channels += head
                    self.groups.append(len(head) // self.width)
                    self.counts.append(share(within, len(head) // self.width))
                    limits.append((competing, self.width * self.counts[-1]))
                kinds.append(sum(map(len, heads)) // self.width)
                units[density] += kinds[-1]
            dense += [
                channel
                for bound, (_, kind) in zip(bounds, own, strict=True)
                if kind is None
                for channel in range(*bound)
            ]
            end = bounds[-1][1]
            self.sizes.append(len(dense) - before[0] + self.width * (sum(self.counts) - before[1]))
            self.limits.append(limits)
            bottom += [start - 1] * (end - start)
            first += [start] * self.sizes[-1]
            start = end
        # Sets leave `select` in order where the channels do.
        self.ordered = channels == sorted(channels) and not dense
        self.whole = channels == list(range(start))
        wanted = sum(density * count for density, count in units.items())
        self.keep = share(1.0, wanted) if scope == "model" else None
        if self.keep is None and strategy != "threshold":  # sets are full: nobody looks there
            bottom = []
            channels = [] if self.whole else channels
        self._tables = tuple(
            torch.tensor(table, dtype=torch.int64) for table in (channels, dense, bottom, kinds, first)
        )

    def __call__(self, saliency: Tensor, step: int) -> Tensor:
        """The sets of all layers, int64, one after the other, from the saliency of all layers' channels.

        Args:
            saliency: fp32 [channels of all layers].
            step: of the optimizer; strategy "random" draws anew at each.
        """
        device = saliency.device
        if self._tables[0].device != device:
            self._tables = tuple(table.to(device) for table in self._tables)
        channels, dense, bottom, _, first = self._tables
        units = saliency if self.whole else saliency[channels]
        if self.width == 2:
            units = units.view(-1, 2).amax(1)
        rank = self._rank(units, step)
        chosen = ops.select(rank, self.groups, self.counts)
        kept = self._kept(units, rank, chosen)
        if self.width == 2:
            chosen = torch.stack((2 * chosen, 2 * chosen + 1), 1).flatten()
            kept = None if kept is None else kept.repeat_interleave(2, output_size=len(chosen))
        index = chosen if self.whole else channels[chosen]
        if kept is not None:
            index = torch.where(kept, index, bottom[index])
        if not self.ordered or kept is not None:
            index = torch.cat((index, dense)).sort().values
        return index - first

    def _rank(self, units: Tensor, step: int) -> Tensor:
        """What the strategy chooses the largest of."""
        if self.strategy == "random":
            return torch.rand(len(units), generator=torch.Generator().manual_seed(self.seed + step)).to(units.device)
        return -units if self.strategy == "bottom" else units

    def _kept(self, units: Tensor, rank: Tensor, chosen: Tensor) -> Tensor | None:
        """Which of the chosen are salient after all; None for all of them."""
        kept = None
        if self.keep is not None and self.keep < len(chosen):
            kept = torch.zeros_like(chosen, dtype=torch.bool)
            # Of equals the lower channel wins, also among kinds, which lie one behind another here.
            order = self._tables[0][self.width * chosen].argsort()
            kept.index_fill_(0, order[ops.select(rank[chosen][order], len(chosen), self.keep)], True)
        if self.strategy == "threshold":
            kinds = self._tables[3]
            means = torch.segment_reduce(units, "mean", lengths=kinds, unsafe=True)
            above = units > self.threshold * means.repeat_interleave(kinds, output_size=len(units))
            kept = above[chosen] if kept is None else kept & above[chosen]
        return kept


def _paired(head: list[int], partners: Tensor, start: int) -> list[int]:
    """The channels of a head, those of a pair side by side."""
    ordered = []
    for channel in head:
        partner = start + int(partners[channel - start])
        if channel < partner:
            ordered += [channel, partner]
    return ordered
