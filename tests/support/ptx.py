"""Runs compiled PTX in the place of a launch, on the runner whose folder LONGACT_PTXRUN names."""

import os
import sys

import numpy as np
import pytest
import torch

if not os.environ.get("LONGACT_PTXRUN"):
    pytest.skip("LONGACT_PTXRUN names no PTX runner's folder", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("the GPU runs the kernels themselves", allow_module_level=True)
sys.path.insert(0, os.environ["LONGACT_PTXRUN"])

import ptxemu
import ptxrun


class PtxLauncher:
    """Stands for a `triton.jit` function: `launcher[grid](...)` compiles it and executes the PTX on CPU tensors.

    Args:
        fn: the `triton.jit` function.
        target: "sm_80" or "sm_90".
        tables: the tensors whose addresses the kernel finds in int64 tables.
        edit: changes the PTX before it runs, for mutations.
        seed: of the order in which warps run.
    """

    def __init__(self, fn, target, tables=(), edit=lambda ptx: ptx, seed=0):
        self.fn, self.target, self.tables, self.edit, self.seed = fn, target, list(tables), edit, seed

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self._run(grid, args, kwargs)

    def _run(self, grid, args, kwargs):
        values = dict(zip(self.fn.arg_names, args, strict=False)) | kwargs
        options = {name: values.pop(name) for name in ("num_warps", "num_stages") if name in values}
        compiled = ptxrun.compile(self.fn, values, self.target, **options)
        passed = []
        for i, name in enumerate(self.fn.arg_names):
            value = values[name]
            if isinstance(value, torch.Tensor):
                passed.append(ptxrun._as_numpy(value))
            elif value is not None and not self.fn.params[i].is_constexpr:
                passed.append(("i64", int(value)) if isinstance(value, (bool, int)) else ("fp32", float(value)))
        arrays = [a for a in passed if isinstance(a, np.ndarray)] + [ptxrun._as_numpy(t) for t in self.tables]
        place = self._places(arrays)
        moved = {t.data_ptr(): at for t, at in zip(self.tables, place[len(place) - len(self.tables) :], strict=True)}
        if self.tables:  # addresses on the machine that runs the PTX
            for i, array in enumerate(passed):
                if isinstance(array, np.ndarray) and array.dtype == np.int64:
                    passed[i] = np.array([moved.get(int(v), int(v)) for v in array])
        # What follows the parameters is placed in memory, and that is all.
        missing = [("i64", 0)] * (len(self._parameters(compiled)) - len(passed))
        machine = ptxemu.PtxKernel(self.edit(compiled.asm["ptx"]), smem=compiled.metadata.shared)
        machine.launch(
            tuple(grid), passed + missing + arrays[len(arrays) - len(self.tables) :], sched="warp", seed=self.seed
        )

    @staticmethod
    def _parameters(compiled):
        return ptxemu.PtxKernel(compiled.asm["ptx"], smem=compiled.metadata.shared).params

    @staticmethod
    def _places(arrays):
        """Where the runner places arrays in its memory: one after the other, with gaps that no access may touch."""
        places, end = [], 1 << 16
        for array in arrays:
            start = (end + 255) & ~255
            places.append(start)
            end = start + array.nbytes + 4096
        return places


def without_barrier(number):
    """An edit that removes one of the program's barriers."""

    def edit(ptx):
        parts = ptx.split("bar.sync")
        assert len(parts) > number + 1, "fewer barriers than that"
        head, tail = "bar.sync".join(parts[: number + 1]), parts[number + 1 :]
        return head + "// " + "bar.sync".join(tail)

    return edit
