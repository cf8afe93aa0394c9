"""Contenders that do the same work, timed in turns, so that whatever else the machine does hits all of them alike."""

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from longact_kernels.cpu import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FALLBACK = "ours, no numba"


clock = time.perf_counter


def use_cpu_time() -> None:
    """Counts the time that one thread has the processor, which other programs on a busy machine hardly change."""
    global clock
    torch.set_num_threads(1)
    clock = time.process_time


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable) -> float:
    """One call, with all work of a GPU done before and after."""
    synchronize()
    start = clock()
    run()
    synchronize()
    return clock() - start


def allocated(run: Callable) -> tuple[int, int]:
    """Bytes that a call leaves allocated, and the most that it holds on the way, both beyond what was there before."""
    if DEVICE == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return held, peak


@contextmanager
def numba_switched_off():
    available = native.available
    native.available = lambda: False
    try:
        yield
    finally:
        native.available = available


def ours(run: Callable) -> dict[str, Callable]:
    """Our contender; on a CPU with numba also the form that runs without it."""
    if DEVICE == "cuda" or not native.available():
        return {"ours": run}

    def fallback():
        with numba_switched_off():
            run()

    return {"ours": run, FALLBACK: fallback}


class Turns:
    """Times contenders in turns: every round calls each of them once, and each round begins with another one."""

    def __init__(self, contenders: dict[str, Callable]):
        self.contenders = contenders
        self.times: dict[str, list[float]] = {name: [] for name in contenders}

    def rounds_in(self, budget: float, fewest: int, most: int) -> int:
        """Runs everything once to warm up and, if that was quick, once for the clock; the rounds that fit a budget."""
        for _ in range(2):
            once = sum(seconds(run) for run in self.contenders.values())
            if once * fewest > budget:
                return fewest
        return min(most, max(fewest, int(budget / once)))

    def __call__(self) -> None:
        names = list(self.contenders)
        first = len(self.times[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            self.times[name].append(seconds(self.contenders[name]))

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def ratio(self, name: str, peer: str) -> float:
        """The median over the rounds of one contender's time over another's."""
        return statistics.median(a / b for a, b in zip(self.times[name], self.times[peer], strict=True))


def read(total_bytes):
    """A roof: a function that reads so many bytes."""
    numbers = torch.zeros(int(total_bytes) // 4, device=DEVICE)
    return lambda: numbers.sum()


def update(total_bytes):
    """A roof: a function that reads and writes so many bytes in all, in place."""
    numbers = torch.zeros(int(total_bytes) // 8, device=DEVICE)
    return lambda: numbers.neg_()
