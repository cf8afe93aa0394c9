"""Every op between poisoned neighbours, with right and wrong indices, bounds, strides and numbers.

An input gives the reference's answer, or a documented error after which nothing has changed. In either case no byte
beside a tensor is written, and what the neighbours hold shows nowhere. Kernels on a GPU do not read indices on the
host: there a wrong one is left out, and only the answer's independence of the neighbours is asked.
"""

import os
import random

import exact_interpreter  # noqa: F401
import pytest
import torch
from guarded import POISONS, Guarded, bits

from longact_kernels import ops
from longact_kernels.ops.dispatch import interpreted
from longact_kernels.reference.channel_stats import channel_stats as reference_stats
from longact_kernels.reference.refresh import carry_ as reference_carry
from longact_kernels.reference.refresh import select as reference_select
from longact_kernels.reference.salient_wgrad import salient_wgrad as reference_wgrad
from longact_kernels.reference.sparse_adamw import AdamWCall
from longact_kernels.reference.sparse_adamw import sparse_adamw_ as reference_adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOOKS = DEVICE == "cpu" and not interpreted()  # whether the host looks at indices
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DOCUMENTED = (ValueError, TypeError, IndexError)


class Case:
    """A call.

    Attributes:
        right: whether the reference has an answer to it.
        written: what the call changes.
    """

    def __init__(self, rng: random.Random, place: Guarded | None):
        self.rng = rng
        self.numbers = torch.Generator().manual_seed(rng.randrange(2**31))
        self.place, self.right, self.written = place, True, []

    def tensor(self, values: torch.Tensor, gaps: bool = True, written: bool = False) -> torch.Tensor:
        gap, shift = (self.rng.choice([0, 0, 1, 8]) if gaps else 0), self.rng.choice([0, 0, 1, 3])
        made = values.clone() if self.place is None else self.place(values, gap, shift)
        if written:
            self.written.append(made)
        return made

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self.numbers).to(dtype)

    def size(self, most: int = 40) -> int:
        return self.rng.choice([0, 1, 2, 3, 7, 16, 31, most])

    def wrong(self, odds: float = 0.4) -> bool:
        if self.rng.random() < odds:
            self.right = False
        return not self.right

    def channels(self, size: int, wrong: bool) -> torch.Tensor:
        """A set of some of `size` channels, behind empty slots; or, if `wrong`, what is none."""
        chosen = sorted(self.rng.sample(range(size), self.rng.randint(0, size)))
        index = [-1] * self.rng.choice([0, 0, 1, 3]) + chosen
        if wrong:
            self.right = False
            bad = [size, size + 1, 2**31 - 1, 2**31, 2**40, 2**62, -2, -(2**31), -(2**40)]
            place = self.rng.randint(0, len(index))
            kind = self.rng.choice(["outside", "falls", "twice", "hole"] if chosen else ["outside"])
            if kind == "outside":
                index.insert(place, self.rng.choice(bad))
            elif kind == "twice":
                index.append(index[-1])
            elif kind == "hole":
                index.append(-1)
            else:
                index = [*index, max(index) + 1, max(index)] if max(index) + 1 < size else [*index, 0, 0]
        return torch.tensor(index, dtype=torch.int64)

    def tokens(self, shape: tuple[int, ...]):
        """A mask, and bounds of packed sequences, right or wrong."""
        mask = cu_seqlens = None
        if self.rng.random() < 0.5:
            mask = self.tensor(torch.rand(shape, generator=self.numbers) < 0.7, gaps=False)
        if len(shape) == 1 and self.rng.random() < 0.7:
            T = shape[0]
            bounds = sorted(self.rng.randint(0, T) for _ in range(self.rng.randint(1, 5)))
            if self.wrong():
                bounds[self.rng.randrange(len(bounds))] = self.rng.choice([T + 1, T + 64, 50_000_000, 2**30, -1, -9])
                if self.rng.random() < 0.3:
                    bounds = [*bounds, T, 0]
                self.right = bounds == sorted(bounds) and 0 <= bounds[0] <= bounds[-1] <= T
            dtype = self.rng.choice([torch.int32, torch.int64])
            if dtype == torch.int64 and not self.right and self.rng.random() < 0.5:
                bounds[-1] = 2**40
            cu_seqlens = self.tensor(torch.tensor(bounds, dtype=dtype), gaps=False)
        return mask, cu_seqlens


def channel_stats(case):
    dims = case.rng.choice([1, 2, 2, 2, 3, 4])
    shape = [case.size(9) for _ in range(dims - 2)] + [case.size() for _ in range(min(dims, 2))]
    y = case.tensor(case.randn(*shape, dtype=case.rng.choice(DTYPES)))
    mask, cu_seqlens = case.tokens(tuple(shape[:-1]))
    l2 = case.rng.random() < 0.5
    return (lambda: ops.channel_stats(y, mask, cu_seqlens, l2)), (
        lambda: reference_stats(y, mask, cu_seqlens, l2)
    ), 1e-4  # fmt: skip


def linear_stats(case):
    dims = case.rng.choice([2, 2, 3])
    shape, K, N = [case.size(5) for _ in range(dims - 2)] + [case.size()], case.size(), case.size()
    dtype = case.rng.choice(DTYPES)
    x, weight = case.tensor(case.randn(*shape, K, dtype=dtype)), case.tensor(case.randn(N, K, dtype=dtype))
    bias = case.tensor(case.randn(N, dtype=dtype)) if case.rng.random() < 0.5 else None
    if bias is not None and N and case.rng.random() < 0.5:
        bias = case.tensor(case.randn(1, dtype=dtype)).expand(N)
    mask, cu_seqlens = case.tokens(tuple(shape))
    if mask is not None and mask.ndim == 1 and len(mask) and case.rng.random() < 0.5:
        mask = case.tensor(torch.rand(2 * len(mask), generator=case.numbers) < 0.7, gaps=False)[::2]
    l2, impl = case.rng.random() < 0.5, "auto" if LOOKS else case.rng.choice(["auto", "fused"])

    def expected():
        y = torch.nn.functional.linear(x, weight, bias)
        return y, *reference_stats(y, mask, cu_seqlens, l2)

    # The fused form measures what is not rounded yet.
    return (lambda: ops.linear_stats(x, weight, bias, mask, cu_seqlens, l2, impl)), expected, 3e-2


def salient_wgrad(case):
    M, N, K, dtype = case.size(), case.size(), case.size(), case.rng.choice(DTYPES)
    axis, compact = case.rng.choice(["rows", "columns"]), case.rng.random() < 0.5
    dy, x = case.tensor(case.randn(M, N, dtype=dtype)), case.tensor(case.randn(M, K, dtype=dtype))
    rows = case.tensor(case.channels(N if axis == "rows" else K, case.wrong()), gaps=False)
    out, accumulate = None, False
    if case.rng.random() < 0.5:
        shape = [N, K] if not compact else [len(rows), K] if axis == "rows" else [N, len(rows)]
        out = case.tensor(case.randn(*shape, dtype=torch.float32 if compact else dtype), written=True)
        accumulate = case.rng.random() < 0.5
    options = dict(axis=axis, compact=compact, out=out, accumulate=accumulate)
    return (lambda: ops.salient_wgrad(dy, x, rows, **options)), (
        lambda: reference_wgrad(dy, x, rows, **options)
    ), {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]  # fmt: skip


HYPER = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-3, weight_decay=0.1)


def sparse_adamw_(case):
    axis, compact, master = case.rng.choice(["rows", "columns"]), case.rng.random() < 0.5, case.rng.random() < 0.4
    dtype, grad_dtype = case.rng.choice(DTYPES), case.rng.choice(DTYPES)
    moment = case.rng.choice([torch.float32, torch.float32, torch.bfloat16])
    along = 0 if axis == "rows" else 1
    whole = case.rng.random() < 0.15
    axis, compact = ("rows", False) if whole else (axis, compact)
    weights, grads, index, exp_avgs, exp_avg_sqs, steps, masters = ([] for _ in range(7))
    wrong = not whole and case.wrong(0.3)
    count = case.rng.randint(1, 3)
    for i in range(count):
        shape = [case.size(), case.size(100)]
        channels = case.channels(shape[along], wrong and i == count - 1)
        part = list(shape)
        part[along] = len(channels)
        state = part if compact else shape
        weights.append(case.tensor(case.randn(*shape, dtype=dtype), gaps=not whole, written=True))
        grads.append(case.tensor(case.randn(*(shape if whole else case.rng.choice([shape, part])), dtype=grad_dtype)))
        index.append(case.tensor(channels, gaps=False))
        exp_avgs.append(case.tensor(case.randn(*state, dtype=moment) / 100, gaps=False, written=True))
        exp_avg_sqs.append(case.tensor(case.randn(*state, dtype=moment).abs() / 100, gaps=False, written=True))
        if whole:
            steps.append(case.tensor(torch.tensor(float(case.rng.randint(0, 9))), gaps=False, written=True))
        else:
            counts = torch.randint(0, 3000, (state[along],), generator=case.numbers).int()
            steps.append(case.tensor(counts, gaps=False, written=True))
        if master:
            masters.append(case.tensor(case.randn(*state), gaps=False, written=True))
    numbers = dict(HYPER)
    if case.rng.random() < 0.2:
        name = case.rng.choice(list(numbers))
        numbers[name] = case.rng.choice([-1.0, float("nan"), float("inf"), 1.0 if name.startswith("beta") else -1e-9])
        case.right = False
    numbers_are_right, lr = numbers == dict(HYPER), numbers.pop("lr")
    scalar = {"lr": torch.tensor(lr, device=DEVICE if 0 <= lr < 1 else "cpu")}
    if case.rng.random() < 0.3:
        scalar["grad_scale"] = torch.tensor(128.0, device=DEVICE)
    if case.rng.random() < 0.2:
        skipped = case.rng.random() < 0.5
        scalar["found_inf"] = torch.tensor(float(skipped), device=DEVICE)
        case.right |= skipped and numbers_are_right  # no set is followed then
    call = AdamWCall(
        weights, grads, [] if whole else index, exp_avgs, exp_avg_sqs, steps, masters, **scalar, **numbers,
        compact=compact, axis=axis, maximize=case.rng.random() < 0.3, seed=case.rng.choice([None, 5]),
    )  # fmt: skip

    def run(op):
        op()
        return case.written

    half = torch.bfloat16 in (dtype, moment) or dtype == torch.float16
    return (
        (lambda: run(lambda: ops.sparse_adamw_(*call))),
        (lambda: run(lambda: reference_adamw(call))),
        (2e-2 if half else 1e-3),
    )


def select(case):
    groups = [case.rng.choice([1, 2, 5, 16, 40 if interpreted() else 600]) for _ in range(case.rng.randint(0, 4))]
    counts = [case.rng.randint(1, group) for group in groups]
    one = case.rng.random() < 0.5 and groups
    if one:
        groups = groups[:1] * len(groups)
        counts = counts[:1] * len(groups)
    saliency = case.tensor(case.randn(sum(groups)), gaps=False)
    group, count = (groups[0], counts[0]) if one else (groups, counts)
    if case.wrong(0.3):
        bad = case.rng.choice([0, -1, 10**9, 0.5, None, "4"])
        group, count = (bad, count) if case.rng.random() < 0.5 else (group, bad)
        case.right = not groups and isinstance(bad, int) and group == []
    return (lambda: (ops.select(saliency, group, count),)), (lambda: (reference_select(saliency, groups, counts),)), 0


def carry_(case):
    axis = case.rng.choice(["rows", "columns"])
    states, old, new, flat = [], [], [], []
    wrong = case.wrong()
    layers = case.rng.randint(1, 3)
    for i in range(layers):
        before = case.channels(40, wrong and i == 0 and case.rng.random() < 0.5)
        after = sorted(case.rng.sample(range(-1, 40), min(40, len(before))))
        after = torch.tensor([-1] * (len(before) - len(after)) + after, dtype=torch.int64)
        if wrong and i == layers - 1 and len(after):
            after[case.rng.randrange(len(after))] = case.rng.choice([2**31, 2**40, 2**62, -2, -(2**40), 0])
        own = []
        for _ in range(case.rng.randint(0, 3)):
            K, kind = case.size(70), case.rng.choice(["moment", "moment", "step"])
            shape = [len(before)] if kind == "step" else [len(before), K] if axis == "rows" else [K, len(before)]
            values = (
                case.randn(*shape) if kind == "moment" else torch.randint(0, 99, shape, generator=case.numbers).int()
            )
            own.append(case.tensor(values, written=True))
        states.append(own)
        old.append(case.tensor(before, gaps=False))
        new.append(case.tensor(after, gaps=False))
        flat += [i] * len(own)

    def run(op):
        return [*op(), *case.written]

    case.right = all(is_set(index.tolist(), 2**31) for index in (*old, *new))
    return (lambda: run(lambda: ops.carry_(states, old, new, axis))), (
        lambda: run(
            lambda: reference_carry([s for own in states for s in own], flat, old, new, axis == "columns").split(
                [len(index) for index in old]
            )
        )
    ), 0  # fmt: skip


def is_set(index: list[int], size: int) -> bool:
    channels = [channel for channel in index if channel != -1]
    within = all(0 <= channel < size for channel in channels)
    return within and index == sorted(index) and len(set(channels)) == len(channels)


KINDS = [channel_stats, linear_stats, salient_wgrad, sparse_adamw_, select, carry_]


def attempt(kind, seed: int, poison: int):
    """One call between neighbours of a poison: what came of it, and the case."""
    place = Guarded(poison, DEVICE)
    case = Case(random.Random(seed), place)
    call, _, tolerance = kind(case)
    before = [tensor.clone() for tensor in case.written]
    try:
        outcome = [tensor.clone() for tensor in call()]
    except DOCUMENTED as error:
        outcome = error
        for tensor, old in zip(case.written, before, strict=True):
            assert torch.equal(bits(tensor), bits(old)), f"changed before it raised {error}"
    place.check()
    return outcome, case, tolerance


def examine(kind, seed: int) -> None:
    outcome, case, tolerance = attempt(kind, seed, POISONS[0])
    other, *_ = attempt(kind, seed, POISONS[1])
    if isinstance(outcome, Exception):
        assert str(outcome) == str(other)
        assert not case.right, f"a right call raised {outcome!r}"
        return
    assert not isinstance(other, Exception), other
    if case.right or DEVICE == "cpu":  # sets that do not ascend race on a GPU
        for mine, its in zip(outcome, other, strict=True):
            assert torch.equal(bits(mine), bits(its)), "what lies beside a tensor shows in the result"
    assert case.right or not LOOKS, "a wrong call has an answer"
    if not case.right:
        return
    plain = Case(random.Random(seed), None)
    plain.place = lambda values, gap, shift: values.clone().to(DEVICE)
    expected = kind(plain)[1]()
    for mine, its in zip(outcome, expected, strict=True):
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.fixture(autouse=True)
def new_memory_is_nan(monkeypatch):
    """What an op forgets to write shows; on a GPU, memory is used anew soon enough."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_slice(kind):
    for seed in range(8 if interpreted() else 60):
        examine(kind, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_many(kind):
    for seed in range(100, 100 + int(os.environ.get("LONGACT_FUZZ", "1000"))):
        examine(kind, seed)
