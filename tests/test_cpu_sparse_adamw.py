"""The CPU AdamW against the reference, with numba's kernel and with ATen alone."""

import copy

import pytest
import torch
from cpu_forms import form, relaxed  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from longact_kernels.cpu.sparse_adamw import sparse_adamw_ as cpu
from longact_kernels.reference.sparse_adamw import AdamWCall
from longact_kernels.reference.sparse_adamw import sparse_adamw_ as reference

NAMES = ("weights", "grads", "index", "exp_avgs", "exp_avg_sqs", "steps", "masters")
HYPER = (torch.tensor(1e-2, dtype=torch.float64), 0.9, 0.99, 1e-8, 0.1)
# Three steps of updates that bias correction raises to 16 lr, each with four roundings of 2^-24.
SLACK = 3 * 16e-2 * 2**-22


def sparse_adamw_(*args, **options):
    cpu(AdamWCall(*args, **options))


def strided(shape, dtype, generator, pitch):
    """Random numbers in a tensor with `pitch` unused elements after each row."""
    whole = torch.randn(shape[0], shape[1] + pitch, generator=generator)
    return whole.to(dtype)[:, : shape[1]]


def problem(
    shapes, density, dtype, grad_dtype, *, master, compact, compact_grad, axis, pitch=0, seed=0, moment=torch.float32,
    empty=0,
):  # fmt: skip
    """The lists of one call: weights with states in mid-training, and `empty` slots before each set's."""
    generator = torch.Generator().manual_seed(seed)
    lists = {name: [] for name in NAMES}
    for N, K in shapes:
        channels = N if axis == "rows" else K
        index = torch.randperm(channels, generator=generator)[: round(density * channels)].sort().values
        index = torch.cat([torch.full((empty,), -1), index])
        S = len(index)
        salient = (S, K) if axis == "rows" else (N, S)
        held = salient if compact else (N, K)
        weight = strided((N, K), dtype, generator, pitch)
        lists["weights"].append(weight)
        lists["grads"].append(strided(salient if compact_grad else (N, K), grad_dtype, generator, pitch))
        lists["index"].append(index)
        lists["exp_avgs"].append((strided(held, torch.float32, generator, 0) * 0.1).to(moment))
        exp_avg_sq = strided(held, torch.float32, generator, 0).square() * 0.01 + 1e-3
        lists["exp_avg_sqs"].append(exp_avg_sq.to(moment))
        steps = torch.randint(0, 5, (S if compact else channels,), dtype=torch.int32, generator=generator)
        lists["steps"].append(steps)
        if master:
            lists["masters"].append(strided(held, torch.float32, generator, 0))
    return [lists[name] for name in NAMES]


def assert_follows_reference(lists, steps=3, **options):
    ours, wanted = copy.deepcopy(lists), copy.deepcopy(lists)
    for _ in range(steps):
        sparse_adamw_(*ours, *HYPER, **options)
        reference(AdamWCall(*wanted, *HYPER, **options))
    for name, mine, theirs in zip(NAMES, ours, wanted, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            if name not in ("weights", "masters"):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
            else:
                # A weight that lands between two 16-bit numbers may round to either.
                ulp = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}[a.dtype]
                torch.testing.assert_close(
                    a, b, rtol=ulp, atol=SLACK, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
                )
    return ours


def assert_untouched_outside(before, after, axis):
    """Whatever the channels outside the set hold keeps its bits."""
    for weight, new, index in zip(before[0], after[0], before[2], strict=True):
        outside = torch.ones(weight.shape[axis != "rows"], dtype=torch.bool)
        outside[index[index >= 0]] = False
        own = (outside, slice(None)) if axis == "rows" else (slice(None), outside)
        integer = torch.int32 if weight.dtype == torch.float32 else torch.int16
        assert torch.equal(weight[own].contiguous().view(integer), new[own].contiguous().view(integer))


floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@relaxed
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90)), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]),
    dtype=floats,
    grad_dtype=floats,
    master=st.booleans(),
    compact=st.booleans(),
    compact_grad=st.booleans(),
    axis=st.sampled_from(["rows", "columns"]),
    pitch=st.sampled_from([0, 3]),
    maximize=st.booleans(),
    grad_scale=st.sampled_from([None, 1024.0, 3.0]),
    seed=st.integers(0, 2**31),
    moment=st.sampled_from([torch.float32, torch.bfloat16]),
    empty=st.integers(0, 3),
    stochastic=st.booleans(),
)
def test_any_combination(maximize, grad_scale, stochastic, **shape):
    lists = problem(**shape)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    seed = shape["seed"] if stochastic else None
    after = assert_follows_reference(
        lists, compact=shape["compact"], maximize=maximize, axis=shape["axis"], grad_scale=scale, seed=seed
    )
    assert_untouched_outside(lists, after, shape["axis"])


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compact, master", [(False, True), (True, True), (True, False)])
def test_weights_longer_than_a_block(axis, dtype, compact, master):
    lists = problem(
        [(70, 2501), (2501, 70)], 0.1, dtype, dtype, master=master, compact=compact, compact_grad=False, axis=axis,
        empty=2,
    )  # fmt: skip
    after = assert_follows_reference(lists, axis=axis, compact=compact)
    assert_untouched_outside(lists, after, axis)


def test_more_slots_than_columns():
    lists = problem(
        [(40, 17)] * 3, 0.3, torch.float32, torch.float32, master=False, compact=True, compact_grad=True,
        axis="columns", empty=60,
    )  # fmt: skip
    assert_untouched_outside(lists, assert_follows_reference(lists, axis="columns", compact=True), "columns")


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_nan_stays_in_its_channel(axis):
    """A NaN or Inf gradient reaches the weights that it belongs to, and outside the set nothing."""
    lists = problem(
        [(40, 48)], 0.3, torch.float32, torch.float32, master=False, compact=False, compact_grad=False, axis=axis
    )
    lists[1][0][:, :3] = float("nan")
    lists[1][0][5:9] = float("inf")
    after = assert_follows_reference(lists, axis=axis)
    assert_untouched_outside(lists, after, axis)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_whole_set_has_the_bits_of_torch(axis):
    lists = problem(
        [(33, 70)], 1.0, torch.float32, torch.float32, master=False, compact=False, compact_grad=False, axis=axis
    )
    for states in (*lists[3:5], lists[5]):
        states[0].zero_()
    weight = torch.nn.Parameter(lists[0][0].clone())
    adamw = torch.optim.AdamW([weight], lr=1e-2, betas=HYPER[1:3], eps=HYPER[3], weight_decay=HYPER[4])
    for _ in range(5):
        weight.grad = lists[1][0].clone()
        adamw.step()
        sparse_adamw_(*lists, *HYPER, axis=axis)
    assert torch.equal(weight, lists[0][0])


def test_found_inf_skips_the_step_wholly():
    lists = problem(
        [(9, 20)], 0.3, torch.bfloat16, torch.bfloat16, master=True, compact=False, compact_grad=False, axis="rows"
    )
    after = copy.deepcopy(lists)
    sparse_adamw_(*after, *HYPER, found_inf=torch.tensor(1.0))
    assert all(
        torch.equal(a, b) for mine, old in zip(after, lists, strict=True) for a, b in zip(mine, old, strict=True)
    )


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_has_the_bits_of_the_reference(axis, dtype):
    lists = problem(
        [(90, 40), (40, 90)], 0.3, dtype, dtype, master=False, compact=False, compact_grad=False, axis=axis,
        moment=torch.bfloat16, empty=1,
    )  # fmt: skip
    ours, wanted = copy.deepcopy(lists), copy.deepcopy(lists)
    sparse_adamw_(*ours, *HYPER, seed=7, axis=axis)
    reference(AdamWCall(*wanted, *HYPER, seed=7, axis=axis))
    for name, mine, theirs in zip(NAMES, ours, wanted, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            # A weight whose fp32 value differs in its last bit may round otherwise, once in thousands.
            assert (a != b).sum() <= (1 if name == "weights" else 0), name


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("place, wrong", [(0, -2), (-1, 20), (2, 2**40), (2, -1), (3, 0)])
def test_a_set_that_is_none_is_an_error_that_changes_nothing(axis, compact, place, wrong):
    lists = problem(
        [(20, 20), (20, 20)], 0.3, torch.float32, torch.float32, master=False, compact=compact, compact_grad=compact,
        axis=axis,
    )  # fmt: skip
    lists[2][1][place] = wrong
    before = copy.deepcopy(lists)
    with pytest.raises(IndexError, match=r"index\[1\]: got channels from"):
        sparse_adamw_(*lists, *HYPER, axis=axis, compact=compact)
    for ours, old in zip(lists, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, old, strict=True))


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_set_of_empty_slots_does_nothing(axis):
    lists = problem(
        [(20, 20)], 0.0, torch.float32, torch.float32, master=False, compact=False, compact_grad=False, axis=axis,
        empty=20,
    )  # fmt: skip
    after = assert_follows_reference(lists, axis=axis)
    assert torch.equal(after[0][0], lists[0][0]) and torch.equal(after[5][0], lists[5][0])


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_bits_do_not_depend_on_the_number_of_threads(axis):
    lists = problem(
        [(300, 1100), (120, 700)], 0.3, torch.bfloat16, torch.bfloat16, master=True, compact=False, compact_grad=False,
        axis=axis,
    )  # fmt: skip
    threads_before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ours = copy.deepcopy(lists)
        sparse_adamw_(*ours, *HYPER, axis=axis)
        results.append(ours)
    torch.set_num_threads(threads_before)
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
