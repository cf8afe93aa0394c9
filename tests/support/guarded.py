"""Tensors between zones of poison: what is written beside one shows in them, what is read beside one in the result."""

import torch
from torch import Tensor

ZONE = 1 << 12  # bytes on either side
POISONS = (0xFF, 0x7B)  # of bytes: NaN and -1, and large numbers


class Guarded:
    """Makes tensors whose memory is poison all around, between their rows too.

    Args:
        poison: of every byte that is none of theirs.
        device: where they lie.
    """

    def __init__(self, poison: int, device: str):
        self.poison, self.device = poison, device
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # memory, the tensor in it, which bytes are no tensor's

    def __call__(self, values: Tensor, gap: int = 0, shift: int = 0) -> Tensor:
        """A copy of a tensor.

        Args:
            gap: elements between two rows of it.
            shift: elements by which it begins later than at an aligned address.
        """
        rows, width = (1, values.numel()) if values.ndim < 2 else (values.shape[:-1].numel(), values.shape[-1])
        pitch, size = width + gap, values.element_size()
        memory = torch.full((2 * ZONE + (rows * pitch + shift) * size,), self.poison, dtype=torch.uint8)
        start = ZONE // size + shift
        strides = [1] * values.ndim
        for d in range(values.ndim - 2, -1, -1):
            strides[d] = pitch if d == values.ndim - 2 else strides[d + 1] * values.shape[d + 1]

        def inside(of: Tensor) -> Tensor:
            return of.as_strided(values.shape, strides, start)

        # A bool's byte may be anything as long as nobody looks at it.
        words = memory.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
        inside(words).copy_(values.cpu().contiguous().view(words.dtype))
        outside = torch.ones(len(words), dtype=torch.bool)
        inside(outside).fill_(False)
        outside = outside.repeat_interleave(size)
        memory = memory.to(self.device)
        tensor = inside(memory.view(values.dtype))
        self._held.append((memory, tensor, outside.to(self.device)))
        return tensor

    def check(self) -> None:
        for i, (memory, tensor, outside) in enumerate(self._held):
            assert bool((memory[outside] == self.poison).all()), f"written beside tensor {i}, {list(tensor.shape)}"


def bits(tensor: Tensor) -> Tensor:
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(width[tensor.element_size()])
