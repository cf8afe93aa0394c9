"""Stage 2: all kernels compiled, many at a time, into the cache in which later launches find them."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from bench.gpu.stage import Stage
from longact_kernels.compiled.targets import TARGETS
from longact_kernels.compiled.variants import variants

PROCESSES = 14


def run(stage: Stage) -> int:
    target = "sm_90" if stage.dry else this_gpu()
    every = [i for i, variant in enumerate(variants()) if target in (variant.targets or TARGETS)]
    chosen = every[:: len(every) // 3] if stage.dry else every
    began, failed = time.monotonic(), 0
    # A forked process would share this one's state of CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1 if stage.dry else PROCESSES, mp_context=context) as pool:
        for done in as_completed([pool.submit(compile_one, i, target) for i in chosen]):
            label, error = done.result()
            if error:
                failed += 1
                stage.row("variant", label=label, error=error)
    stage.row("variants", target=target, compiled=len(chosen) - failed, failed=failed, seconds=time.monotonic() - began)
    return int(failed > 0)


def this_gpu() -> str:
    import torch

    from longact_kernels.ops.device import target

    return target(torch.device("cuda", 0))


def compile_one(i: int, target: str) -> tuple[str, str]:
    """Compiles a variant, which is named by its place, and returns its label and the error if there was one."""
    variant = list(variants())[i]
    label = f"{variant.kernel} {variant.label}"
    try:
        launch_nowhere(variant, target)
    except Exception as error:
        return label, f"{type(error).__name__}: {error}"[:500]
    return label, ""


class Driver:
    """Stands in for Triton's, so that a launch compiles for a target and needs no GPU."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        to = TARGETS[target]
        self.target = GPUTarget(to.backend, to.arch, to.warp_size)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_nowhere(variant: Any, target: str) -> None:
    """Compiles as a launch does: only then do launches find it, whose key in the cache has all they specialise on."""
    import torch
    import triton

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    types |= {"i64": torch.int64, "i32": torch.int32, "u8": torch.uint8}
    arguments = dict(variant.constants)
    for name, kind in variant.types.items():
        aligned = name in variant.divisible
        if kind.startswith("*"):
            arguments[name] = torch.empty(64, dtype=types[kind[1:]])[0 if aligned else 1 :]
        else:
            arguments[name] = 0.5 if kind == "fp32" else 4096 if aligned else 4097
    triton.runtime.driver.set_active(Driver(target))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    variant.fn.warmup(grid=(1,), **arguments, **options)
