"""Whether salient sets are sets of a weight's channels; where the host holds their numbers, it looks first."""

from collections.abc import Sequence

from torch import Tensor


def check_channels(name: str, sets: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Whether sets ascend, behind their empty slots (-1), within the channels that there are.

    Args:
        name: of the argument.
        sets: int64 [S] each.
        sizes: how many channels there are for each.

    Raises:
        IndexError: one does not.
    """
    for i, (index, size) in enumerate(zip(sets, sizes, strict=True)):
        if not len(index):
            continue
        before, after = index[:-1], index[1:]
        falls = (after < before) | ((after == before) & (after != -1))
        first, last = int(index[0]), int(index[-1])
        if first < -1 or last >= size or bool(falls.any()):
            place = name if len(sets) == 1 else f"{name}[{i}]"
            least, most = int(index.min()), int(index.max())
            raise IndexError(
                f"{place}: got channels from {least} to {most}, needed them within 0 .. {size - 1}, each once and "
                "ascending, behind empty slots of -1; nothing was changed"
            )
