"""Running statistics of the channels of all layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from longact_kernels.flat import Flat
from longact_kernels.functional import RunningStats
from longact_kernels.modules import SalientChannels
from longact_kernels.shards import is_distributed

Statistic = Literal["absmax", "l2"]


class Statistics:
    """Running statistics in segments: each holds the channels that one activation feeds.

    Args:
        statistic: what `measure` returns, "absmax" or "l2".
        sizes: how many channels each segment has.
        source: int64 [channels of all layers], for each the place in the segments where it is measured; None where the
            two have one order.
        device: where they lie; see `move`.
    """

    def __init__(self, statistic: Statistic, sizes: list[int], source: Tensor | None, device: torch.device):
        self.statistic = statistic
        self.absmax = Flat({segment: (size,) for segment, size in enumerate(sizes)}, device)
        self.l2_sum = Flat(self.absmax.shapes, device)
        self.sequences = Flat({segment: () for segment in self.absmax.shapes}, device)
        self.sizes = torch.tensor(sizes, device=device)
        self.source = None if source is None else source.to(device)

    @property
    def device(self) -> torch.device:
        return self.absmax.buffer.device

    def move(self, device: torch.device) -> None:
        for flat in (self.absmax, self.l2_sum, self.sequences):
            flat.move(device)
        self.sizes = self.sizes.to(device)
        self.source = None if self.source is None else self.source.to(device)

    def running(self, segment: int) -> RunningStats:
        """What the activation of a segment is merged into."""
        absmax = self.absmax.parts[segment]
        if self.statistic == "absmax":
            return RunningStats(absmax)
        return RunningStats(absmax, self.l2_sum.parts[segment], self.sequences.parts[segment])

    def reset(self) -> None:
        for flat in (self.absmax, self.l2_sum, self.sequences):
            flat.buffer.zero_()

    def measure(self) -> Tensor:
        """The statistic of all layers' channels, fp32 [channels], the same on every rank."""
        absmax, l2_sum, sequences = self.absmax.buffer, self.l2_sum.buffer, self.sequences.buffer
        if self.statistic == "absmax":
            if is_distributed():
                # As integers the bits of magnitudes keep their order, and NaN is the largest instead of being dropped.
                torch.distributed.all_reduce(absmax.view(torch.int32), torch.distributed.ReduceOp.MAX)
            measured = absmax.clone()
        else:
            if is_distributed():
                torch.distributed.all_reduce(l2_sum)
                torch.distributed.all_reduce(sequences)
            counts = sequences.clamp(min=1).repeat_interleave(self.sizes, output_size=len(l2_sum))
            measured = l2_sum / counts
        return measured if self.source is None else measured[self.source]

    def of(self, salient: SalientChannels) -> dict[str, Tensor]:
        """A layer's part of every buffer, as views, by the names that they are saved under."""
        return {
            "salient_absmax": self.absmax.buffer[salient.channels],
            "salient_l2_sum": self.l2_sum.buffer[salient.channels],
            "salient_sequences": self.sequences.buffer[salient.segments],
        }
