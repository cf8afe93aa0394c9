"""Tensors of all layers in one buffer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[Any, Sequence[int]]


def any_of(flags: Tensor, lengths: Tensor) -> Tensor:
    """Bool [parts], whether any flag is true in each part of a flat tensor of flags."""
    # Unsafe: else the host would wait, to see whether the lengths fit.
    return torch.segment_reduce(flags.float(), "max", lengths=lengths, unsafe=True) > 0


class Flat:
    """fp32 tensors that lie in one buffer, so that one reset and one all-reduce serve them all.

    Args:
        shapes: of each of them, by its key.
        device: where they lie; see `move`.

    Attributes:
        buffer: all of them, one after the other.
        parts: each of them, a view into the buffer, by its key.
    """

    def __init__(self, shapes: Shapes, device: torch.device):
        self._split(shapes, torch.zeros(sum(map(math.prod, shapes.values())), device=device))

    def move(self, device: torch.device) -> None:
        if self.buffer.device == device:
            return
        meta = self.buffer.is_meta
        self._split(self.shapes, torch.zeros_like(self.buffer, device=device) if meta else self.buffer.to(device))

    def _split(self, shapes: Shapes, buffer: Tensor) -> None:
        self.shapes, self.buffer = shapes, buffer
        parts = buffer.split([math.prod(shape) for shape in shapes.values()])
        self.parts = {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}

    # A pickle does not keep views views.

    def __getstate__(self) -> tuple[Shapes, Tensor]:
        return self.shapes, self.buffer

    def __setstate__(self, state: tuple[Shapes, Tensor]) -> None:
        self._split(*state)
