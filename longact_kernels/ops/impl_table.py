"""Whether `linear_stats` runs fused or separate on a GPU: as `longact tune` measured it, else as predicted."""

import functools
import json
import math
import os
import warnings
from pathlib import Path
from typing import Literal, TypedDict

from longact_kernels.warning import LongActWarning

Impl = Literal["fused", "separate"]

# Below this many input features the fused kernel is predicted to be the faster one. On paper the separate statistics
# cost a share R / K of the product, with R the GPU's bf16 FLOP/s over its bytes/s (H100: 798e12 / 3.0e12), and the
# fused kernel what a plain Triton product lacks against cuBLAS: 10% on H100 and 5% on A100 at n = 3072 and 2432, as
# others report (github.com/triton-lang/triton, issues 3672 and 6523). Nothing of this is measured; GPUs not listed
# stay separate.
PREDICTED_FUSED_BELOW_K = {"sm_80": 2900, "sm_90": 2400}


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
            f"{path} cannot be read ({error}); the predicted choices are used. Delete it, or run `longact tune` again",
            LongActWarning,
            stacklevel=2,
        )
        return {}


def choose(table: Table, gpu: str, target: str, dtype: str, M: int, N: int, K: int) -> Impl:
    """The faster one: of the measured shape nearest to this one, if the GPU was measured, else as predicted."""
    timings = [timing for timing in table.get(gpu, []) if timing["dtype"] == dtype]
    if timings:
        nearest = min(timings, key=lambda t: sum(map(_octaves, (t["M"], t["N"], t["K"]), (M, N, K))))
        return "fused" if nearest["fused_ms"] < nearest["separate_ms"] else "separate"
    # IEEE fp32 products have no tensor cores to win with.
    fused_below = 0 if dtype == "float32" else PREDICTED_FUSED_BELOW_K.get(target, 0)
    return "separate" if fused_below <= K else "fused"


def _octaves(a: int, b: int) -> float:
    return abs(math.log2(a / b))
