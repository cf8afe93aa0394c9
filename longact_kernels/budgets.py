"""What the compiled kernels cost, read from the compiled code on a machine without a GPU; behind `longact kernels`.

A kernel file in `csrc_triton/` lists its launchable specialisations in `variants()`; naming the file in :data:`KERNELS`
makes them part of the compile tests, of the budgets and of the table.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longact_kernels.csrc_triton.variant import Variant

KERNELS = ("channel_stats", "linear_stats", "salient_wgrad", "refresh", "sparse_adamw")


@dataclass(frozen=True)
class Target:
    """What the budgets need to know of a GPU architecture. Sources: CUDA C++ Programming Guide, AMD's ISA guides.

    Args:
        backend, arch, warp_size: as in Triton's `GPUTarget`.
        registers: 32-bit registers of one warp scheduler, counted per lane.
        register_unit: how many registers a lane's allocation is rounded up to.
        max_warps: resident warps a scheduler.
        max_shared: shared memory that one program may take, bytes.
        shared: shared memory of a multiprocessor, bytes.
    """

    backend: str
    arch: int | str
    warp_size: int
    registers: int
    register_unit: int
    max_warps: int
    max_shared: int
    shared: int


KIB = 1024
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 512, 8, 16, 163 * KIB, 164 * KIB),
    "sm_89": Target("cuda", 89, 32, 512, 8, 12, 99 * KIB, 100 * KIB),
    "sm_90": Target("cuda", 90, 32, 512, 8, 16, 227 * KIB, 228 * KIB),
    "sm_100": Target("cuda", 100, 32, 512, 8, 16, 227 * KIB, 228 * KIB),
    "sm_120": Target("cuda", 120, 32, 512, 8, 12, 99 * KIB, 100 * KIB),
    "gfx90a": Target("hip", "gfx90a", 64, 512, 8, 8, 64 * KIB, 64 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 512, 8, 8, 64 * KIB, 64 * KIB),
    "gfx1100": Target("hip", "gfx1100", 32, 1536, 24, 16, 64 * KIB, 128 * KIB),
}
SCHEDULERS = 4  # of every multiprocessor above (a WGP on gfx1100)


@dataclass(frozen=True)
class Gpu:
    """A GPU's speed, for predictions: bytes/s (reads plus writes), bf16 FLOP/s, and warp instructions/s."""

    target: str
    bandwidth: float
    flops: float
    issue: float


GPUS = {
    # H100, H200: copies and bf16 products as measured on them; A100, MI300X: 0.85 of the vendor's peaks, a guess.
    "H100": Gpu("sm_90", 3.0e12, 798e12, 132 * SCHEDULERS * 1.755e9),
    "H200": Gpu("sm_90", 4.3e12, 790e12, 132 * SCHEDULERS * 1.755e9),
    "A100": Gpu("sm_80", 0.85 * 2.04e12, 0.85 * 312e12, 108 * SCHEDULERS * 1.41e9),
    "MI300X": Gpu("gfx942", 0.85 * 5.3e12, 0.85 * 1307e12, 304 * SCHEDULERS * 2.1e9),
}


@dataclass(frozen=True)
class Budget:
    """What one variant compiled for one target takes.

    Args:
        registers: 32-bit registers a thread.
        spills: bytes of registers spilled to memory a thread.
        shared: bytes of shared memory a program.
        occupancy: share of the multiprocessor's warps that registers and shared memory let reside.
        load_bits, store_bits: the widest access to global memory, per thread.
        tensor_core: the tensor-core instruction, or "".
    """

    kernel: str
    label: str
    target: str
    registers: int
    spills: int
    shared: int
    occupancy: float
    load_bits: int
    store_bits: int
    tensor_core: str


def variants() -> Iterator[Variant]:
    """Every launchable specialisation of every kernel in :data:`KERNELS`."""
    for name in KERNELS:
        yield from importlib.import_module(f"longact_kernels.csrc_triton.{name}").variants()


def compile_variant(variant: Variant, target: str) -> Any:
    """Triton's compiled kernel, as a launch on a GPU of `target` (a name in :data:`TARGETS`) would have it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.fn.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible}
    source = ASTSource(variant.fn, signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    to = TARGETS[target]
    return triton.compile(source, target=GPUTarget(to.backend, to.arch, to.warp_size), options=options)


def budget(variant: Variant, target: str) -> Budget:
    """Compiles a variant and reads its costs from the compiled code."""
    compiled = compile_variant(variant, target)
    read = _read_cuda if TARGETS[target].backend == "cuda" else _read_hip
    registers, spills, shared, load_bits, store_bits, tensor_core = read(compiled)
    return Budget(
        kernel=variant.kernel,
        label=variant.label,
        target=target,
        registers=registers,
        spills=spills,
        shared=shared,
        occupancy=_occupancy(TARGETS[target], registers, shared, variant.num_warps),
        load_bits=load_bits,
        store_bits=store_bits,
        tensor_core=tensor_core,
    )


def _occupancy(target: Target, registers: int, shared: int, num_warps: int) -> float:
    per_lane = -(-max(registers, 1) // target.register_unit) * target.register_unit
    warps = SCHEDULERS * min(target.max_warps, target.registers // per_lane)
    programs = warps // num_warps
    if shared:
        programs = min(programs, target.shared // shared)
    return programs * num_warps / (SCHEDULERS * target.max_warps)


def _read_cuda(compiled: Any) -> tuple[int, int, int, int, int, str]:
    usage = _cuobjdump(compiled, "-res-usage")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[union-attr]
    ptx = compiled.asm["ptx"]
    tensor_core = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    return (
        registers,
        stack + local,
        compiled.metadata.shared,
        _widest(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)|cp\.async[\w.]*\.global [^,]*, [^,]*, 0x(\w+)", ptx),
        _widest(r"st\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)", ptx),
        tensor_core.group(0) if tensor_core else "",
    )


def _widest(pattern: str, ptx: str) -> int:
    widths = [0]
    for vector, bits, *hex_bytes in re.findall(pattern, ptx):
        widths.append(int(vector or 1) * int(bits) if bits else 8 * int(hex_bytes[0], 16))
    return max(widths)


def _cuobjdump(compiled: Any, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def _read_hip(compiled: Any) -> tuple[int, int, int, int, int, str]:
    code = compiled.asm["amdgcn"]
    count = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", code)}
    tensor_core = re.search(r"v_(mfma|wmma|smfmac)_\w+", code)
    width = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64, "dword": 32, "b32": 32}
    load, store = (
        max([width.get(size, 16) for size in re.findall(rf"(?:global|buffer)_{kind}_(?:lds_)?(\w+)", code)], default=0)
        for kind in ("load", "store")
    )
    registers = count["vgpr_count"] + count.get("agpr_count", 0)
    spilled = 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"])
    return registers, spilled, compiled.metadata.shared, load, store, tensor_core.group(0) if tensor_core else ""


def main_loop(compiled: Any) -> list[str]:
    """The machine instructions (SASS) of the loop that moves most bytes, or of what lies outside loops if that does."""
    disassembly = _cuobjdump(compiled, "-sass")
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", disassembly)]
    whole = dict(code)
    parts, rest = [], dict(code)
    for address, text in code:
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) < address:
            loop = [at for at, _ in code if int(jump.group(1), 16) <= at <= address]
            parts.append([whole[at] for at in loop])
            for at in loop:
                rest.pop(at, None)
    return max([*parts, list(rest.values())], key=lambda part: sum(_lane_bytes(part)))


def issue_share(loop: list[str], gpu: Gpu) -> float:
    """Time to issue a loop's instructions over the time that its memory traffic takes, all lanes taken to be active."""
    return (len(loop) / gpu.issue) / (32 * sum(_lane_bytes(loop)) / gpu.bandwidth)


def wide_share(loop: list[str], index: bool = False) -> float:
    """Share of a loop's bytes that 128-bit accesses move; with an int64 `index`, 64-bit accesses are left aside."""
    moved = [width for width in _lane_bytes(loop) if not (index and width == 8)]
    return sum(width for width in moved if width == 16) / sum(moved)


def _lane_bytes(code: list[str]) -> list[int]:
    """Bytes that each access to global memory in SASS moves for one thread."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    accesses = (re.search(r"\b(?:LDG|STG|LDGSTS)\.E([.\w]*)", text) for text in code)
    return [next((widths[m] for m in a.group(1).split(".") if m in widths), 4) for a in accesses if a]


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
    # A row's line number, index, step count (read and written), line of the table (15 fields) and learning rate.
    return Work(f"{rows} rows of {K}", rows * K, moved=minimum + rows * (4 + 8 + 8 + 15 * 8 + 4), minimum=minimum)


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
        "refresh carry": carry_work(36 * S, K, tensors=3),
    }
