"""GPU architectures that the kernels are compiled for, and the speed of GPUs that times are predicted for."""

from dataclasses import dataclass


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
