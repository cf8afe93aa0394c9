"""numba's kernels where threads and compilers go wrong: forks, concurrent callers, no place to keep machine code."""

import os
import subprocess
import sys
import textwrap

import pytest

from longact_kernels.cpu import native

pytestmark = pytest.mark.skipif(not native.available(), reason="numba is not installed")

PROBLEM = """
    import os, threading, torch
    from longact_kernels.cpu import native
    from longact_kernels.cpu.channel_stats import channel_stats
    from longact_kernels.reference.channel_stats import channel_stats as reference
    torch.set_num_threads(2)
    y = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = reference(y)

    def right():
        absmax, sumsq = channel_stats(y)
        return torch.equal(absmax, wanted[0]) and torch.allclose(sumsq, wanted[1])
"""


def run(code, **environment):
    script = textwrap.dedent(PROBLEM) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_a_forked_child_works_after_its_parent_used_threads():
    # AdamW, since it takes no parallel operation of PyTorch's: in the child those themselves wait for ever.
    done = run("""
        from longact_kernels.cpu.sparse_adamw import sparse_adamw_
        from longact_kernels.reference.sparse_adamw import AdamWCall
        lr, weight, grad = torch.tensor(1e-2, dtype=torch.float64), torch.ones(100, 2000), torch.ones(100, 2000)
        states = [torch.zeros(100, 2000)], [torch.zeros(100, 2000)], [torch.zeros(100, dtype=torch.int32)]

        def step():
            rows = [torch.arange(90)]
            sparse_adamw_(AdamWCall([weight], [grad], rows, *states, [], lr, 0.9, 0.99, 0.0, 0.0))
            return weight[89, 1999].item()

        assert right() and native._gomp_parallel() is not None and abs(step() - 0.99) < 1e-6
        child = os.fork()
        if child == 0:
            os._exit(0 if abs(step() - 0.98) < 1e-6 else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and right()
    """)
    assert done.returncode == 0, done.stderr


def test_callers_in_many_threads_at_once():
    done = run("""
        results = []
        def caller():
            for _ in range(20):
                results.append(right())
        callers = [threading.Thread(target=caller) for _ in range(4)]
        for thread in callers: thread.start()
        for thread in callers: thread.join()
        assert len(results) == 80 and all(results)
    """)
    assert done.returncode == 0, done.stderr


def test_without_libgomp_it_runs_on_one_thread():
    done = run("""
        native._gomp_parallel = lambda: None
        assert right()
    """)
    assert done.returncode == 0, done.stderr


def test_without_a_place_for_machine_code_it_compiles_each_time():
    done = run(
        """
        import numba.core.caching as caching
        for locator in caching.CacheImpl._locator_classes:
            locator.from_function = classmethod(lambda cls, function, path: None)
        assert right()
        """
    )
    assert done.returncode == 0, done.stderr


def test_where_numba_is_missing_it_says_once_what_to_install():
    done = run("""
        import sys, warnings
        sys.modules["numba"] = None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert right() and right()
        assert ["pip install numba" in str(one.message) for one in said] == [True]
    """)
    assert done.returncode == 0, done.stderr


def test_numba_switched_off_leaves_aten():
    done = run("assert not native.available() and right()", NUMBA_DISABLE_JIT="1")
    assert done.returncode == 0, done.stderr
