"""Whether `linear_stats` runs fused or separate on a GPU: separate, unless `longact tune` measured fused as faster."""

import functools
import json
import math
import os
import warnings
from pathlib import Path
from typing import Literal, TypedDict

from longact_kernels.warning import LongActWarning

Impl = Literal["fused", "separate"]


class Timing(TypedDict):
    """Milliseconds of the product alone and of both implementations: M tokens, N out_features, K in_features."""

    dtype: str
    M: int
    N: int
    K: int
    linear_ms: float
    fused_ms: float
    separate_ms: float


Table = dict[str, list[Timing]]
"""Timings by the GPU's name."""


def table_path() -> Path:
    """The file that `longact tune` writes: `$LONGACT_TUNE`, or `longact_kernels/tune.json` in the cache folder."""
    if chosen := os.environ.get("LONGACT_TUNE"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "longact_kernels" / "tune.json"


@functools.cache
def measured() -> Table:
    """The user's table, read once a process; empty if there is none."""
    path = table_path()
    try:
        table = json.loads(path.read_text())
        for timing in (timing for timings in table.values() for timing in timings):
            if timing.keys() != Timing.__annotations__.keys():
                raise ValueError("not the timings of this version")
        return table
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        warnings.warn(
            f"{path} cannot be read ({error}); 'separate' is used throughout. Delete it, or run `longact tune` again",
            LongActWarning,
            stacklevel=2,
        )
        return {}


def choose(table: Table, gpu: str, dtype: str, M: int, N: int, K: int) -> Impl:
    """The one that was faster at the measured shape nearest to this one; "separate" if the GPU was not measured."""
    timings = [timing for timing in table.get(gpu, []) if timing["dtype"] == dtype]
    if not timings:
        return "separate"
    nearest = min(timings, key=lambda t: sum(map(_octaves, (t["M"], t["N"], t["K"]), (M, N, K))))
    return "fused" if nearest["fused_ms"] < nearest["separate_ms"] else "separate"


def _octaves(a: int, b: int) -> float:
    return abs(math.log2(a / b))
