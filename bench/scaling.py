"""LongAct on many GPUs, on paper: bytes and predicted times for docs/scaling.md.

python -m bench.scaling    # writes them into the page
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from longact_kernels.compiled.rooflines import channel_stats_work, salient_wgrad_work, sparse_adamw_work
from longact_kernels.compiled.targets import GPUS

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
DENSITY = 0.3
TOKENS = 32768  # a GPU's in one forward
GPU = GPUS["H100"]
# Bytes/s that a GPU has for a collective, and seconds a hop: guesses for NVLink 4 within 8 GPUs, InfiniBand NDR beyond.
NODE, NODES = (370e9, 3e-6), (45e9, 8e-6)


@dataclass(frozen=True)
class Case:
    """A model on so many GPUs, sharded over all of them by FSDP2."""

    name: str
    gpus: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    parameters: float
    active: float

    @property
    def channels(self) -> int:
        """Of the query and key projections of a layer."""
        return (self.heads + self.kv_heads) * self.head_size

    @property
    def salient(self) -> int:
        return (self.heads + self.kv_heads) * round(DENSITY * self.head_size)


CASES = (
    Case("Qwen3-8B", 8, 36, 4096, 32, 8, 128, 8.19e9, 8.19e9),
    Case("Qwen3-235B-A22B", 256, 94, 4096, 64, 4, 128, 235.1e9, 22.2e9),
)


def rows(case: Case) -> list[tuple[str, str]]:
    """What stands in the page, and the figure of a case."""
    L, M, N, K, S = case.layers, TOKENS, case.channels, case.hidden, case.salient
    weights, channels = L * N * K, L * N
    # Moments and the fp32 master; a step count a row.
    state = 12 * weights + 4 * channels
    everywhere = everywhere_bytes(channels, L * S)
    product = 2.0 * M * N * K / GPU.flops
    apart = channel_stats_work(M, N, 2).seconds(GPU)
    gradient = sum(work.seconds(GPU) for work in salient_wgrad_work(M, N, K, S, 2).values())
    sparse, dense = (
        sparse_adamw_work(math.ceil(L * of_layer / case.gpus), K, 2, master=True).seconds(GPU) for of_layer in (S, N)
    )
    reduced = all_reduce(4 * channels, case.gpus)
    # Magnitudes are read, ranked and marked, and sets written: some twenty passes.
    chosen = 20 * 4 * channels / GPU.bandwidth
    step = 6 * M * case.active / GPU.flops
    return [
        ("query and key weights", f"{weights / 1e9:.2f} billion ({weights / case.parameters:.1%})"),
        ("their moments and masters, all GPUs", size(state)),
        ("a GPU's share of that", size(state / case.gpus)),
        ("sets and statistics, on every GPU", size(everywhere)),
        ("into the all-reduce of a refresh, a GPU", size(4 * channels)),
        ("into the reduce-scatter of all gradients, a GPU", size(2 * case.parameters)),
        ("forward and backward, without attention", time(step)),
        ("statistics, by a kernel of their own", time(L * apart)),
        ("weight gradients of query and key", f"{time(L * gradient)} instead of {time(L * product)}"),
        ("optimizer on query and key", f"{time(sparse)} instead of {time(dense)}"),
        ("a refresh: all-reduce", time(reduced)),
        ("a refresh: choosing", time(chosen)),
        ("a refresh, of forward and backward", f"{(reduced + chosen) / step:.3%}"),
    ]


def everywhere_bytes(channels: int, slots: int) -> int:
    """Running statistics of the batch and of the period, what the sets were chosen from; three sets of int64."""
    return 12 * channels + 3 * 8 * slots


def all_reduce(size: float, gpus: int) -> float:
    """Predicted seconds: every byte passes twice, in hops that double the reach."""
    bandwidth, hop = NODE if gpus <= 8 else NODES
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.log2(gpus) * hop


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def time(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.2f} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.0f} µs"
    )


def table() -> str:
    lines = [["predicted", *(f"{case.name} on {case.gpus} GPUs" for case in CASES)], ["---"] * (1 + len(CASES))]
    lines += [[of_all[0][0], *(figure for _, figure in of_all)] for of_all in zip(*map(rows, CASES), strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    marks = "<!-- table -->\n", "<!-- end of table -->"
    PAGE.write_text(
        re.sub(f"{marks[0]}.*{marks[1]}", f"{marks[0]}{table()}{marks[1]}", PAGE.read_text(), flags=re.DOTALL)
    )
