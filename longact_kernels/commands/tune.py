"""`longact tune`: measures both implementations of `linear_stats` on this GPU, for the table that "auto" follows."""

import itertools
import statistics
from collections.abc import Callable

import torch

from longact_kernels import ops
from longact_kernels.commands.console import Parser, Refusal
from longact_kernels.commands.files import write_json
from longact_kernels.ops.impl_table import Table, Timing, measured, table_path

# N and K of query and key projections: of Qwen3 0.6B, 1.7B, 4B and 8B, and Llama 3 70B. Others follow the nearest.
SHAPES = [
    *[(2048, 1024), (1024, 1024)],
    *[(2048, 2048), (1024, 2048)],
    *[(4096, 2560), (1024, 2560)],
    *[(4096, 4096), (1024, 4096)],
    *[(8192, 8192), (1024, 8192)],
]
TOKENS = (4096, 32768)
DTYPES = (torch.bfloat16, torch.float16)
ROUNDS = 20
# Clock cycles, some milliseconds, for which the GPU waits while Python launches what is timed.
WAIT = 5_000_000


def parser() -> Parser:
    return Parser(
        "longact tune",
        description="Measures both implementations of linear_stats on this GPU, and keeps the times: from then on "
        "the faster one is used.",
    )


def main(argv: list[str]) -> int:
    """Runs `longact tune`: measures, writes the table, and prints it; the next process follows it. Returns 0.

    Raises:
        Refusal: there is no GPU to measure.
    """
    parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise Refusal("needs a CUDA or ROCm GPU, but torch finds none here")
    from rich.console import Console
    from rich.progress import track

    gpu = torch.cuda.get_device_name()
    work = list(itertools.product(DTYPES, SHAPES, TOKENS))
    timings = [time_shape(dtype, M, N, K) for dtype, (N, K), M in track(work, f"Measuring {gpu}", transient=True)]
    save({**measured(), gpu: timings})
    Console().print(report(gpu, timings))
    print(f"written to {table_path()}")
    return 0


def time_shape(dtype: torch.dtype, M: int, N: int, K: int) -> Timing:
    """Medians of interleaved runs on random data, in milliseconds; `linear_ms` is the product without statistics.

    The GPU's own time: what the host takes for a launch is over before the first event is reached.
    """
    x, weight = (torch.randn(rows, K, device="cuda", dtype=dtype) for rows in (M, N))
    runs: dict[str, Callable[[], object]] = {
        "linear_ms": lambda: torch.nn.functional.linear(x, weight),
        "fused_ms": lambda: ops.linear_stats(x, weight, impl="fused"),
        "separate_ms": lambda: ops.linear_stats(x, weight, impl="separate"),
    }
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(WAIT)
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Timing(dtype=str(dtype).removeprefix("torch."), M=M, N=N, K=K, **medians)  # type: ignore[typeddict-item]


def save(table: Table) -> None:
    write_json(table_path(), table)
    measured.cache_clear()


def report(gpu: str, timings: list[Timing]):
    """The timings as a table, both implementations as ratios to the product alone."""
    from rich.table import Table as RichTable

    shown = RichTable(title=f"linear_stats, measured on {gpu}: time over that of the product alone")
    for heading in ("dtype", "M", "N", "K", "product", "fused", "separate", "chosen"):
        shown.add_column(heading, justify="left" if heading in ("dtype", "chosen") else "right")
    for t in timings:
        alone = t["linear_ms"]
        shown.add_row(
            t["dtype"],
            *(str(t[axis]) for axis in ("M", "N", "K")),
            f"{alone:.3f} ms",
            f"{t['fused_ms'] / alone:.3f}",
            f"{t['separate_ms'] / alone:.3f}",
            "fused" if t["fused_ms"] < t["separate_ms"] else "separate",
        )
    return shown
