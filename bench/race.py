"""Contenders that do the same work, timed in turns, so that whatever else the machine does hits all of them alike."""

import functools
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

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


class Timing(NamedTuple):
    """Seconds of one call: those that the device works on it, and those that the host takes to ask for it."""

    device: float
    host: float


def timed(run: Callable, asleep: float = 1e-3) -> Timing:
    """Times one call; on a CPU, device and host are the same.

    On a GPU the device sleeps until the host has asked for everything: its time has no gaps in which it waits for
    Python, and the host's time no waiting for the device. L2 holds nothing of the call's tensors when it begins.

    Args:
        run: the call. On a GPU it is made again where the host took longer than the device slept.
        asleep: seconds to sleep at first.
    """
    if DEVICE == "cpu":
        start = clock()
        run()
        return Timing(*2 * [clock() - start])
    for _ in range(3):  # a call that waits for the device itself always outlasts its sleep
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _beyond_l2().zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(asleep * _cycles_per_second()))
        begin.record()
        start = clock()
        run()
        host = clock() - start
        end.record()
        end.synchronize()
        if host < asleep:
            break
        asleep = 2 * host
    return Timing(begin.elapsed_time(end) / 1e3, host)


@functools.cache
def _beyond_l2() -> torch.Tensor:
    """Twice what L2 holds."""
    return torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")


@functools.cache
def _cycles_per_second() -> float:
    cycles = 20_000_000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (begin.elapsed_time(end) / 1e3)


def seconds(run: Callable) -> float:
    """The device's time for one call."""
    return timed(run).device


def allocated(run: Callable) -> tuple[int, int]:
    """Bytes that a call leaves allocated, and the most that it holds on the way, both beyond what was there before."""
    if DEVICE == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    gc.collect()  # what is freed meanwhile would count
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        gc.enable()
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
        self.timings: dict[str, list[Timing]] = {name: [] for name in contenders}

    def rounds_in(self, budget: float, fewest: int, most: int) -> int:
        """Runs everything once to warm up and, if that was quick, once for the clock; the rounds that fit a budget."""
        for _ in range(2):
            once = sum(max(timed(run)) for run in self.contenders.values())
            if once * fewest > budget:
                return fewest
        return min(most, max(fewest, int(budget / once)))

    def __call__(self) -> None:
        names = list(self.contenders)
        first = len(self.timings[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            before = self.timings[name]
            asleep = 2 * before[-1].host if before else 0.0
            before.append(timed(self.contenders[name], max(1e-3, asleep)))

    def median(self, name: str) -> float:
        return statistics.median(timing.device for timing in self.timings[name])

    def host_median(self, name: str) -> float:
        return statistics.median(timing.host for timing in self.timings[name])

    def ratio(self, name: str, peer: str) -> float:
        """The median over the rounds of one contender's time over another's."""
        pairs = zip(self.timings[name], self.timings[peer], strict=True)
        return statistics.median(a.device / b.device for a, b in pairs)


def read(total_bytes):
    """A roof: a function that reads so many bytes."""
    numbers = torch.zeros(int(total_bytes) // 4, device=DEVICE)
    return lambda: numbers.sum()


def update(total_bytes):
    """A roof: a function that reads and writes so many bytes in all, in place."""
    numbers = torch.zeros(int(total_bytes) // 8, device=DEVICE)
    return lambda: numbers.neg_()
