"""What each kernel must move and compute, and so the time that it is predicted to take."""

from dataclasses import dataclass

from longact_kernels.compiled.targets import Gpu


@dataclass(frozen=True)
class Work:
    """What a call of a kernel must do at least, and what it moves."""

    shape: str
    elements: int  # that the kernel goes through
    moved: float  # bytes
    minimum: float  # bytes
    flops: float = 0.0

    def seconds(self, gpu: Gpu) -> float:
        """Predicted time: that of the memory traffic or of the arithmetic, whichever is longer."""
        return max(self.moved / gpu.bandwidth, self.flops / gpu.flops)

    def roofline(self, gpu: Gpu) -> float:
        """Predicted share of the speed that the least traffic and the arithmetic allow."""
        return max(self.minimum / gpu.bandwidth, self.flops / gpu.flops) / self.seconds(gpu)


def channel_stats_work(M: int, N: int, itemsize: int, masked: bool = False) -> Work:
    """`channel_stats` on one sequence [M, N]; counted by running it, in tests/test_channel_stats.py."""
    from longact_kernels.csrc_triton.channel_stats import BLOCK_N, chunk_of

    minimum = M * N * itemsize + (M if masked else 0)
    # Every block of channels reads the mask anew; partial results are written, then read.
    mask_again = M * (-(-N // BLOCK_N) - 1) if masked else 0
    partial = 16 * -(-M // chunk_of(M, N)) * N
    return Work(f"[{M}, {N}]", M * N, moved=minimum + mask_again + partial + 8 * N, minimum=minimum)


def sparse_adamw_work(rows: int, K: int, itemsize: int, master: bool) -> Work:
    """`sparse_adamw_` on salient rows of K elements; counted by running it, in tests/test_sparse_adamw.py."""
    # Gradient; weight, written and, without a master, read; moments and master, read and written.
    per_element = itemsize + itemsize * (1 if master else 2) + 16 + (8 if master else 0)
    minimum = rows * K * per_element
    # A row's line number, index, step count (read and written), line of the table (16 fields) and learning rate.
    return Work(f"{rows} rows of {K}", rows * K, moved=minimum + rows * (4 + 8 + 8 + 16 * 8 + 4), minimum=minimum)


def sparse_adamw_columns_work(N: int, K: int, S: int, itemsize: int, compact: bool) -> Work:
    """`sparse_adamw_` on S columns of [N, K], chosen at random, with fp32 masters.

    A load fills a half-line of 64 bytes, a store goes out in sectors of 32: of whole tensors, whatever columns lie in
    them travel. `compact` is the form in which only the weight is whole.
    """

    def touched(size: int, width: int) -> float:
        """Bytes of whole rows that accesses to the columns move, in units of so many bytes."""
        return N * K * size * (1 - (1 - S / K) ** (width // size))

    minimum = N * S * (2 * itemsize + 24)
    states = N * S * (itemsize + 24) if compact else touched(itemsize, 64) + 3 * (touched(4, 64) + touched(4, 32))
    kind = "compact states" if compact else "whole states"
    return Work(f"{S} of {K} columns, {kind}", N * S, states + touched(itemsize, 32), minimum)


def linear_stats_work(M: int, N: int, K: int, itemsize: int) -> Work:
    """`linear_stats`, fused; its accesses are counted by running it, in tests/test_linear_stats.py.

    What several tiles read of x and the weight is taken to come from L2 after the first time.
    """
    from longact_kernels.csrc_triton.linear_stats import launch_config

    tiles = -(-M // launch_config("sm_90", itemsize, aligned=True)["BLOCK_M"])
    minimum = itemsize * (M * K + N * K + M * N)
    # Every row of tiles writes its sums of squares, which are read again, and raises the maxima.
    moved = minimum + (8 + 4) * tiles * N
    return Work(f"[{M}, {K}] x [{N}, {K}]", M * N, moved, minimum, flops=2.0 * M * N * K)


def salient_wgrad_work(M: int, N: int, K: int, S: int, itemsize: int) -> dict[str, Work]:
    """The launches of `salient_wgrad` along rows; counted by running them, in tests/test_salient_wgrad.py."""
    P = -(-S // 16) * 16
    shape = f"{S} of {N} rows, [{M}, {K}]"
    # Nearly every line of the whole gradient holds a salient channel.
    packing = Work(shape, M * S, itemsize * M * (N + P), minimum=2 * itemsize * M * S)
    product = Work(
        f"{shape}, the library's",
        S * K,
        moved=itemsize * (M * (P + K) + P * K),
        minimum=itemsize * (M * (S + K) + S * K),
        flops=2.0 * M * P * K,
    )
    scattering = itemsize * (S + N) * K
    return {
        "salient_wgrad pack": packing,
        "salient_wgrad product": product,
        "salient_wgrad scatter": Work(shape, N * K, moved=scattering, minimum=scattering),
    }


def carry_work(rows: int, K: int, tensors: int) -> Work:
    """`carry_` of fp32 state [rows, K], where every row moves: read once, written once."""
    moved = 2 * 4 * tensors * rows * K
    return Work(f"{tensors} x {rows} rows of {K}", tensors * rows * K, moved + 8 * rows * tensors, minimum=moved)


def qwen3_8b() -> dict[str, Work]:
    """Each kernel's work on Qwen3-8B's q and k projections: 36 layers, K 4096, N 4096 and 1024, 30% of the rows.

    Activations are those of one layer and 32,768 tokens in bf16; the optimizer step is that of all layers.
    """
    M, K, N, S = 32768, 4096, 4096 + 1024, 1229 + 307
    return {
        "channel_stats": channel_stats_work(M, N, 2),
        "linear_stats": linear_stats_work(M, N, K, 2),
        **salient_wgrad_work(M, N, K, S, 2),
        "sparse_adamw": sparse_adamw_work(36 * S, K, 2, master=True),
        **{
            f"sparse_adamw columns{' compact' * compact}": sparse_adamw_columns_work(36 * N, K, 1229, 2, compact)
            for compact in (False, True)
        },
        "refresh carry": carry_work(36 * S, K, tensors=3),
    }
