"""Stage 2: all kernels compiled, many at a time, into the cache in which later launches find them."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

from bench.gpu.stage import Stage
from longact_kernels.compiled.targets import TARGETS
from longact_kernels.compiled.variants import compile_variant, variants

PROCESSES = 14


def run(stage: Stage) -> int:
    target = "sm_90" if stage.dry else this_gpu()
    every = [i for i, variant in enumerate(variants()) if target in (variant.targets or TARGETS)]
    chosen = every[:: len(every) // 3] if stage.dry else every
    began, failed = time.monotonic(), 0
    # A forked process would share this one's state of CUDA.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2 if stage.dry else PROCESSES, mp_context=context) as pool:
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
        compile_variant(variant, target)
    except Exception as error:
        return label, f"{type(error).__name__}: {error}"[:500]
    return label, ""
