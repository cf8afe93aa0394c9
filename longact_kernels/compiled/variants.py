"""Every launchable specialisation of the kernels, and its compiled code.

A kernel file in `csrc_triton/` lists its launchable specialisations in `variants()`; naming the file in :data:`KERNELS`
makes them part of the compile tests, of the budgets and of the table of `longact kernels`.
"""

import importlib
from collections.abc import Iterator
from typing import Any

from longact_kernels.compiled.targets import TARGETS
from longact_kernels.csrc_triton.variant import Variant

KERNELS = ("channel_stats", "linear_stats", "salient_wgrad", "refresh", "sparse_adamw")


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
