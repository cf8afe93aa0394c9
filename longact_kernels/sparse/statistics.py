"""How the magnitude of a channel is measured, and the running statistics of the channels of all layers.

A new statistic is a subclass of `Statistic` here, with an entry in `STATISTICS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from longact_kernels.sparse.flat import Flat, any_of
from longact_kernels.sparse.sharding import Ranks

Waiting = tuple[Mapping[str, Tensor], Tensor, Tensor]
"""The arguments of `Statistic.merge_`."""


class Statistic(ABC):
    """A magnitude made of absmax and sums of squares.

    Attributes:
        fields: what it keeps: for each of its tensors, whether it has a value for every "channel" or "segment" (the
            channels that one activation feeds). The first has one for every channel, zero as long as nothing was fed.
        join: how two of a field become one, over batches and over ranks: "max" of numbers of at least 0, or "sum".
        l2: whether it needs sums of squares.
    """

    fields: ClassVar[dict[str, Literal["channel", "segment"]]]
    join: ClassVar[Literal["max", "sum"]]
    l2: ClassVar[bool]

    @abstractmethod
    def merge_(self, kept: Mapping[str, Tensor], absmax: Tensor, sumsq: Tensor) -> None:
        """Takes one more activation into a segment's tensors: absmax [N], sums of squares [sequences, N]."""

    def merge_all_(self, waiting: list[Waiting]) -> None:
        """Takes in the activations of several segments, of some perhaps more than one."""
        for kept, absmax, sumsq in waiting:
            self.merge_(kept, absmax, sumsq)

    @abstractmethod
    def value(self, kept: Mapping[str, Tensor], spread: Callable[[Tensor], Tensor]) -> Tensor:
        """The magnitude of every channel; `spread` makes of a value for every segment one for every channel."""


class Absmax(Statistic):
    """The largest magnitude over all tokens."""

    fields: ClassVar = {"absmax": "channel"}
    join = "max"
    l2 = False

    def merge_(self, kept, absmax, sumsq):
        torch.maximum(kept["absmax"], absmax, out=kept["absmax"])

    def merge_all_(self, waiting):
        kept, measured, _ = zip(*waiting, strict=True)
        # In one operation no segment may come twice, as those of a layer do that a pass goes through twice.
        if len(set(map(id, kept))) < len(waiting):
            super().merge_all_(waiting)
        else:
            torch._foreach_maximum_([one["absmax"] for one in kept], measured)

    def value(self, kept, spread):
        return kept["absmax"]


class L2(Statistic):
    """The mean over sequences of the L2 norm over a sequence's tokens (LongAct, arXiv 2604.14922)."""

    fields: ClassVar = {"l2_sum": "channel", "sequences": "segment"}
    join = "sum"
    l2 = True

    def merge_(self, kept, absmax, sumsq):
        kept["l2_sum"].add_(sumsq.sqrt().sum(0))
        # A sequence of nothing but padding is no sequence.
        kept["sequences"].add_((sumsq != 0).any(1).sum())

    def value(self, kept, spread):
        return kept["l2_sum"] / spread(kept["sequences"].clamp(min=1))


STATISTICS: dict[str, Statistic] = {"absmax": Absmax(), "l2": L2()}


class Running:
    """What the activation of one segment is merged into.

    Args:
        statistics: of all segments.
        kept: as of `Statistic.merge_`.
    """

    def __init__(self, statistics: Statistics, kept: Mapping[str, Tensor]):
        self.statistics, self.kept = statistics, kept
        self.l2, self.waiting = statistics.statistic.l2, statistics.waiting

    def merge_(self, absmax: Tensor, sumsq: Tensor) -> None:
        self.merge_at_end(absmax, sumsq)
        self.statistics.merge_waiting()

    def merge_at_end(self, absmax: Tensor, sumsq: Tensor) -> None:
        """`merge_`, with what other segments measure in the same backward pass: a few operations serve all layers."""
        self.waiting.append((self.kept, absmax, sumsq))


class Measured:
    """What was measured, the same on every rank.

    Attributes:
        value: fp32 [channels of all layers].
        fed: bool [segments], which ones an activation reached on any rank.
    """

    def __init__(self, value: Tensor, fed: Tensor):
        self.value, self.fed = value, fed


class Statistics:
    """Running statistics of all layers: of this rank's batch, of that of all ranks, and of the refresh period before.

    Each has one flat buffer: one all-reduce and one reset serve all layers. The period is the same on every rank, so
    that any of them can save it.

    Args:
        statistic: what is measured.
        sizes: how many channels each segment has.
        source: int64 [channels of all layers], for each the place in the segments where it is measured; None where the
            two have one order.
        device: where they lie; see `move`.
        sequence_ranks: which each have a part of the tokens of the same sequences; None where each has whole ones.

    Attributes:
        waiting: what is merged at the end of the backward pass under way.
    """

    def __init__(
        self,
        statistic: Statistic,
        sizes: list[int],
        source: Tensor | None,
        device: torch.device,
        sequence_ranks: Ranks | None,
    ):
        self.statistic, self.segments, self.sequence_ranks = statistic, len(sizes), sequence_ranks
        shapes = {
            (field, segment): (size,) if per == "channel" else ()
            for field, per in statistic.fields.items()
            for segment, size in enumerate(sizes)
        }
        self.batch, self.joined, self.period = (Flat(shapes, device) for _ in range(3))
        self.sizes = torch.tensor(sizes)
        self.source = source
        self.waiting: list[Waiting] = []
        self.move(device)
        self.channels = sum(sizes)

    @property
    def device(self) -> torch.device:
        return self.batch.buffer.device

    def move(self, device: torch.device) -> None:
        self.merge_waiting()
        for flat in (self.batch, self.joined, self.period):
            flat.move(device)
        self.sizes = self.sizes.to(device) if device.type != "meta" else self.sizes
        self.source = self.source if self.source is None or device.type == "meta" else self.source.to(device)

    def running(self, segment: int) -> Running:
        """What the activation of a segment is merged into."""
        kept = {field: self.batch.parts[field, segment] for field in self.statistic.fields}
        return Running(self, kept)

    def merge_waiting(self) -> None:
        """Merges what the backward pass that has ended, or failed, has measured."""
        if not self.waiting:
            return
        for _, *measured in self.waiting if self.device.type == "cuda" else ():
            for tensor in measured:  # made on the stream of its forward
                tensor.record_stream(torch.cuda.current_stream())
        waiting = self.waiting.copy()
        self.waiting.clear()
        if self.statistic.l2 and self.sequence_ranks is not None:
            sizes = [sumsq.numel() for *_, sumsq in waiting]
            whole = torch.cat([sumsq.flatten() for *_, sumsq in waiting])
            self.sequence_ranks.all_reduce(whole, "sum")
            parts = zip(waiting, whole.split(sizes), strict=True)
            waiting = [(kept, absmax, part.view_as(sumsq)) for (kept, absmax, sumsq), part in parts]
        self.statistic.merge_all_(waiting)

    def join(self, all_reduce: Callable[[Tensor, str], None], shares: list[float]) -> None:
        """Takes what has come to the batch, over all ranks, into what was joined before.

        Args:
            all_reduce: joins a tensor over the ranks, "max" or "sum", in place.
            shares: which part of each segment's channels is measured on this rank.
        """
        self.merge_waiting()
        batch = self.batch.buffer
        if self.statistic.join == "sum" and min(shares) < 1:
            batch[self.channels :] *= torch.tensor(shares, device=batch.device)  # how many sequences there were
        # As integers the bits of magnitudes keep their order, and NaN is the largest instead of being dropped.
        all_reduce(batch.view(torch.int32) if self.statistic.join == "max" else batch, self.statistic.join)
        self._take_in(self.joined.buffer, batch)

    def commit(self, bad: Tensor | None) -> None:
        """Makes the joined batch part of the period, unless the flag says that its numbers are bad."""
        joined = self.joined.buffer
        if bad is not None:
            joined.masked_fill_(bad != 0, 0)
        self._take_in(self.period.buffer, joined)

    def _take_in(self, kept: Tensor, more: Tensor) -> None:
        if self.statistic.join == "max":
            torch.maximum(kept, more, out=kept)
        else:
            kept.add_(more)
        more.zero_()

    def drop(self, segments: slice | None = None) -> None:
        """Forgets the batch: all of it, or that of some segments."""
        self.merge_waiting()
        for flat in (self.batch, self.joined):
            if segments is None:
                flat.buffer.zero_()
                continue
            for field in self.statistic.fields:
                for segment in range(segments.start, segments.stop):
                    flat.parts[field, segment].zero_()

    def measure(self, of: Literal["batch", "period"]) -> Measured:
        """The magnitude of all layers' channels over all ranks, in the joined batch or the period; a view of them."""
        buffer = (self.joined if of == "batch" else self.period).buffer
        widths = [self.channels if per == "channel" else self.segments for per in self.statistic.fields.values()]
        kept = dict(zip(self.statistic.fields, buffer.split(widths), strict=True))
        value = self.statistic.value(kept, self._spread)
        first = kept[next(iter(self.statistic.fields))]
        fed = any_of(first != 0, self.sizes)
        return Measured(value if self.source is None else value[self.source], fed)

    def bad(self) -> Tensor:
        """Bool [segments]: whether the joined batch has a NaN or Inf."""
        return any_of(~self.joined.buffer[: self.channels].isfinite(), self.sizes)

    def _spread(self, of_segments: Tensor) -> Tensor:
        return of_segments.repeat_interleave(self.sizes, output_size=self.channels)

    def state(self, channels: slice, segments: slice) -> dict[str, Tensor]:
        """A layer's part of the period, as views, by the names that they are saved under."""
        widths = [self.channels if per == "channel" else self.segments for per in self.statistic.fields.values()]
        return {
            f"salient_{field}": part[channels if per == "channel" else segments]
            for (field, per), part in zip(self.statistic.fields.items(), self.period.buffer.split(widths), strict=True)
        }
