"""The `race` fixture of all benchmarks, and their options."""

import os

# PyTorch's profiler, which counts memory here, announces each start on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import pytest
import torch

from bench.race import DEVICE, FALLBACK, Turns, allocated, numba_switched_off, use_cpu_time


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="more rounds, and all points of the growth curves")
    parser.addoption("--cpu-time", action="store_true", help="CPU time of one thread: for a machine that is busy")


def pytest_configure(config):
    if config.getoption("cpu_time"):
        use_cpu_time()


@pytest.fixture
def full(request) -> bool:
    return request.config.getoption("full")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def race(benchmark, full):
    """Checks a result, then times the contenders in turns and stores the figures with the benchmark.

    Args of the fixture:
        work: what is done, a line of the table.
        variant: dtype and shape.
        contenders: functions by name; "ours" is ours.
        peer: the contender that ratios are taken to.
        check: raises AssertionError if our result is not the reference's; nothing is timed then. Where our form without
            numba takes part, it is checked as well.
        roof: a function that moves the fewest bytes, or does the fewest operations, that the work needs.
        bars: by contender, the ratio that it is held to.
        curve: (picture, name of the x axis, x) where the race is a point of a picture.
    """

    def run(work, variant, contenders, *, peer, check, roof=None, bars=None, curve=None, rounds=(5, 40), budget=5.0):
        check()
        if any(name.startswith(FALLBACK) for name in contenders):
            with numba_switched_off():
                check()
        runners = contenders if roof is None else {**contenders, "limit": roof}
        turns = Turns(runners)
        count = turns.rounds_in(budget * (5 if full else 1), *rounds)
        benchmark.pedantic(turns, rounds=count, iterations=1)
        medians = {name: turns.median(name) for name in runners}
        benchmark.extra_info.update(
            work=work,
            variant=variant,
            device=DEVICE,
            peer=peer,
            medians=medians,
            ratios={name: turns.ratio(name, peer) for name in runners},
            of_limit={name: turns.ratio("limit", name) for name in contenders} if roof else {},
            bars=bars or {},
            peak_bytes={name: allocated(contender)[1] for name, contender in contenders.items()},
            rounds=count,
            curve=curve,
        )

    return run
