"""What one compiled variant takes of a GPU."""

from dataclasses import dataclass

from longact_kernels.compiled.assembly import read_cuda, read_hip
from longact_kernels.compiled.targets import SCHEDULERS, TARGETS, Target
from longact_kernels.compiled.variants import compile_variant
from longact_kernels.csrc_triton.variant import Variant


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


def budget(variant: Variant, target: str) -> Budget:
    """Compiles a variant and reads its costs from the compiled code."""
    compiled = compile_variant(variant, target)
    costs = (read_cuda if TARGETS[target].backend == "cuda" else read_hip)(compiled)
    share = occupancy(TARGETS[target], costs.registers, costs.shared, variant.num_warps)
    return Budget(variant.kernel, variant.label, target, occupancy=share, **costs._asdict())


def occupancy(target: Target, registers: int, shared: int, num_warps: int) -> float:
    """Share of a multiprocessor's warps that can reside there."""
    per_lane = -(-max(registers, 1) // target.register_unit) * target.register_unit
    warps = SCHEDULERS * min(target.max_warps, target.registers // per_lane)
    programs = warps // num_warps
    if shared:
        programs = min(programs, target.shared // shared)
    return programs * num_warps / (SCHEDULERS * target.max_warps)
