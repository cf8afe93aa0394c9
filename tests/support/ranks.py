"""Real processes with gloo between them: a function on every rank, and what each returned."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

# What takes seconds to import is imported once for all ranks.
PRELOAD = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "longact_kernels",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
]
# What hangs is an error soon, also on a busy machine.
TIMEOUT = timedelta(seconds=60)


def _rank(rank: int, nprocs: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=nprocs, timeout=TIMEOUT)
    try:
        result = function(rank, *args)
    except Exception:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise
    torch.save(result, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(nprocs: int, function: Callable, *args: Any) -> list[Any]:
    """Runs `function(rank, *args)` in as many processes; returns what each gave back.

    A rank that fails, or waits for the others for ever, fails the test.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        given = nprocs, folder, function, args
        try:
            torch.multiprocessing.start_processes(_rank, given, nprocs=nprocs, start_method="forkserver")
        except Exception as error:
            said = "\n".join(f"rank {path.stem}: {path.read_text()}" for path in sorted(Path(folder).glob("*.txt")))
            raise AssertionError(f"{error}\n{said}") from None
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(nprocs)]
