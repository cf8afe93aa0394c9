"""Tables that the host makes and a kernel reads, right on any stream and under CUDA graphs."""

import torch
from torch import Tensor

# Pinned memory can run out only outside a capture, in which the driver may refuse to give any.
_RESERVE = 1 << 22
_reserve = torch.empty(0, dtype=torch.uint8)
_captured: list[list[Tensor]] = []
"""What CUDA graphs copy from. Nobody can tell when the last replay was, so that it is kept."""


def upload(device: torch.device, *tables: Tensor) -> tuple[Tensor, ...]:
    """Copies of host tensors on `device`, made in the order of the current stream, without waiting.

    Whoever keeps a copy uses it on that stream only: nothing orders another stream after it. Under capture the graph
    copies the tables anew at every replay, from pinned memory that is never written again; such a copy holds nothing
    before the first replay, and is not to be kept.
    """
    if device.type != "cuda":
        return tables
    if torch.cuda.is_current_stream_capturing():
        pinned = [_from_reserve(table) for table in tables]
        _captured.append(pinned)
    else:
        _fill_reserve()
        # Memory that a copy still reads is not given out again: PyTorch's allocator sees to it.
        pinned = [table.pin_memory() for table in tables]
    return tuple(table.to(device, non_blocking=True) for table in pinned)


def _fill_reserve() -> None:
    global _reserve
    if len(_reserve) < _RESERVE // 2:
        _reserve = torch.empty(_RESERVE, dtype=torch.uint8, pin_memory=True)


def _from_reserve(table: Tensor) -> Tensor:
    global _reserve
    if table.nbytes > len(_reserve):
        return table.pin_memory()
    taken, _reserve = _reserve[: table.nbytes], _reserve[-(-table.nbytes // 16) * 16 :]
    return taken.view(table.dtype).view(table.shape).copy_(table)
