"""`sparse_adamw_` against an independent fp64 computation, on whatever implementation the device runs."""

import itertools
import math
import mmap
import os

import exact_interpreter  # noqa: F401
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic import count_bytes

from longact_kernels import ops
from longact_kernels.reference.sparse_adamw import AdamWCall
from longact_kernels.reference.sparse_adamw import sparse_adamw_ as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
examples = settings(max_examples=25 if INTERPRETED else 80, deadline=None)
BETA1, BETA2, EPS, DECAY, LR = 0.9, 0.999, 1e-8, 0.1, 1e-2


class Case:
    """Weights, gradients and states of a call, with the channels along `axis` and `empty` slots before each set's."""

    def __init__(
        self, shapes, dtype, grad_dtype=None, axis="rows", compact=False, master=False, grad_compact=False,
        moment=torch.float32, empty=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(len(shapes) + 7 * sum(map(sum, shapes)))
        self.axis, self.compact, dim = axis, compact, 0 if axis == "rows" else 1
        held = {name: [] for name in ("weights", "grads", "index", "exp_avgs", "exp_avg_sqs", "steps", "masters")}
        for *shape, count in shapes:
            index = torch.randperm(shape[dim], generator=generator)[:count].sort().values
            index = torch.cat([torch.full((empty,), -1), index])
            whole, part = shape, [len(index), shape[1]] if dim == 0 else [shape[0], len(index)]
            state = part if compact else whole
            values = {
                "weights": torch.randn(whole, generator=generator).to(dtype),
                "grads": (torch.randn(part if grad_compact else whole, generator=generator) / 8).to(
                    grad_dtype or dtype
                ),
                "index": index,
                "exp_avgs": (torch.randn(state, generator=generator) / 100).to(moment),
                "exp_avg_sqs": (torch.rand(state, generator=generator) / 100).to(moment),
                "steps": torch.randint(0, 3000, (state[dim],), generator=generator).int(),
            }
            values["masters"] = torch.randn(state, generator=generator)
            for name, value in values.items():
                held[name].append(value.to(DEVICE))
        if not master:
            held["masters"] = []
        self.held = held

    def run(self, op=None, maximize=False, grad_scale=None, found_inf=None, seed=None, decay=DECAY):
        """Runs the public op, or one of its implementations."""
        lr = torch.tensor(LR, device=DEVICE)
        scalars = (None if s is None else torch.tensor(s, device=DEVICE) for s in (grad_scale, found_inf))
        settled = (lr, BETA1, BETA2, EPS, decay, self.compact, maximize, self.axis)
        call = AdamWCall(*self.held.values(), *settled, *scalars, seed)
        ops.sparse_adamw_(*call) if op is None else op(call)

    def copy(self):
        other = object.__new__(Case)
        other.axis, other.compact = self.axis, self.compact
        other.held = {name: [t.clone() for t in tensors] for name, tensors in self.held.items()}
        return other

    def channels(self, name, i):
        """One of the tensors as fp64 on the CPU, its channels along the first dimension."""
        tensor = self.held[name][i].cpu().double()
        return tensor.t() if self.axis == "columns" and tensor.ndim == 2 else tensor


def bits(tensor):
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def check(before, after, maximize=False, grad_scale=1.0, decay=DECAY):
    """Every salient channel against the formula in fp64, and all else bit for bit."""
    for i, index in enumerate(before.held["index"]):
        index = index.cpu()
        places = (index >= 0).nonzero()[:, 0]
        index = index[places]
        slots = places if before.compact else index
        grad, weight = before.channels("grads", i), before.channels("weights", i)
        g = grad[places if len(grad) != len(weight) else index] / grad_scale * (-1 if maximize else 1)
        m = BETA1 * before.channels("exp_avgs", i)[slots] + (1 - BETA1) * g
        v = BETA2 * before.channels("exp_avg_sqs", i)[slots] + (1 - BETA2) * g * g
        tau = before.channels("steps", i)[slots].unsqueeze(1) + 1
        has_master = bool(before.held["masters"])
        w = before.channels("masters", i)[slots] if has_master else weight[index]
        update = LR * (m / (1 - BETA1**tau)) / ((v / (1 - BETA2**tau)).sqrt() + EPS)
        w = (1 - LR * decay) * w - update
        wanted = {"exp_avgs": m, "exp_avg_sqs": v, "steps": tau[:, 0]} | ({"masters": w} if has_master else {})
        for name, want in wanted.items():
            # A few roundings of fp32, of sums whose terms may cancel, and one of the 16-bit moments.
            size = {"exp_avgs": g.abs() + m.abs(), "masters": w.abs() + 2 * update.abs()}.get(name, want.abs())
            last = 2.0**-8 if after.held[name][i].dtype == torch.bfloat16 else 0
            slack = 2.0**-21 * size + last * want.abs() + 1e-37
            assert ((after.channels(name, i)[slots] - want).abs() <= slack).all(), name
        dtype = after.held["weights"][i].dtype
        if has_master:  # the weight is the master, rounded
            rounded = after.channels("masters", i)[slots].to(dtype).double()
            assert torch.equal(after.channels("weights", i)[index], rounded)
        else:
            ulp = torch.finfo(dtype).eps
            error = (after.channels("weights", i)[index] - w).abs()
            assert (error <= (ulp / 2 + 2.0**-21) * (w.abs() + 2 * update.abs()) + 2.0**-25).all()
        states = [name for name in ("exp_avgs", "exp_avg_sqs", "steps", "masters") if before.held[name]]
        for name, kept in {"weights": index, **dict.fromkeys(states, slots)}.items():
            outside = torch.ones(len(before.channels(name, i)), dtype=torch.bool)
            outside[kept] = False
            dim = 1 if before.axis == "columns" and before.held[name][i].ndim == 2 else 0
            at = outside.nonzero()[:, 0].to(DEVICE)
            old, new = (c.held[name][i].index_select(dim, at) for c in (before, after))
            assert torch.equal(bits(old), bits(new)), name


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]


@st.composite
def cases(draw):
    shapes = []
    for _ in range(draw(st.integers(1, 3))):
        N, K = draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 8, 16, 37, 64, 1100]))
        axis_size = N if draw(st.booleans()) else min(N, K)
        shapes.append((N, K, draw(st.integers(0, min(5, axis_size, K)))))
    dtype, grad_dtype = draw(st.sampled_from(DTYPES))
    return Case(
        shapes,
        dtype,
        grad_dtype,
        axis=draw(st.sampled_from(["rows", "columns"])),
        compact=draw(st.booleans()),
        master=draw(st.booleans()),
        grad_compact=draw(st.booleans()),
        moment=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        empty=draw(st.integers(0, 3)),
    )


@given(cases(), st.booleans(), st.sampled_from([None, 1.0, 1024.0, 3.0]))
@examples
def test_matches_fp64(case, maximize, grad_scale):
    before = case.copy()
    case.run(maximize=maximize, grad_scale=grad_scale, found_inf=0.0 if grad_scale else None)
    check(before, case, maximize, grad_scale or 1.0)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_strided_weights_and_gradients(axis):
    case = Case([(24, 32, 5)], torch.bfloat16, axis=axis)
    wide = torch.zeros(24, 50, dtype=torch.bfloat16, device=DEVICE)
    wide[:, :32] = case.held["weights"][0]
    case.held["weights"][0] = wide[:, :32]
    case.held["grads"][0] = case.held["grads"][0].t().contiguous().t()
    before = case.copy()
    case.run()
    check(before, case)
    assert (wide[:, 32:] == 0).all()


def test_whole_sets_are_torchs_adamw():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 40, device=DEVICE))
    case = Case([(12, 40, 12)], torch.float32)
    case.held["weights"][0].copy_(weight.detach())
    for name in ("exp_avgs", "exp_avg_sqs", "steps"):
        case.held[name][0].zero_()
    optimizer = torch.optim.AdamW([weight], LR, (BETA1, BETA2), EPS, DECAY)
    for _ in range(6):
        weight.grad = torch.randn_like(weight)
        case.held["grads"][0] = weight.grad
        optimizer.step()
        case.run()
        torch.testing.assert_close(case.held["weights"][0], weight.detach(), rtol=2e-6, atol=1e-7)
    assert (case.held["steps"][0] == 6).all()


@pytest.mark.parametrize("beta1, beta2", [(0.9, 0.999), (0.95, 0.9999), (0.0, 0.5), (0.99, 0.999999)])
def test_bias_correction_does_not_cancel(beta1, beta2):
    taus = torch.tensor([1, 2, 3, 7, 10, 50, 100, 1000, 10_000, 100_000, 10_000_000], dtype=torch.int32, device=DEVICE)
    n, ones = len(taus), torch.ones(len(taus), 8, device=DEVICE)
    weight, rows, steps = torch.zeros_like(ones), torch.arange(n, device=DEVICE), taus - 1
    lr = torch.tensor(1.0, device=DEVICE)
    # Moments that stay at 1 leave the two corrections alone in the update.
    ops.sparse_adamw_([weight], [ones], [rows], [ones.clone()], [ones.clone()], [steps], [], lr, beta1, beta2, 0.0, 0.0)
    tau = taus.cpu().double()
    want = -(1 - beta2**tau).sqrt() / (1 - beta1**tau)
    error = (weight[:, 0].cpu().double() - want).abs() / want.abs()
    # GPUs' approximate exponential, square root and division, one on the other; 1 - beta2**tau in fp32 would be 6% off.
    assert error.max() <= 2.0**-20
    assert torch.equal(steps, taus)


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_found_inf_changes_nothing(axis):
    case = Case([(20, 24, 6)], torch.float16, axis=axis, master=True)
    before = case.copy()
    case.run(grad_scale=8.0, found_inf=1.0)
    for name, tensors in before.held.items():
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors, case.held[name], strict=True)), name


def test_non_finite_gradients_show():
    case = Case([(4, 16, 4)], torch.bfloat16, master=True)
    case.held["grads"][0][1, 3] = torch.nan
    case.held["grads"][0][2, 5] = torch.inf
    case.run()
    for name in ("weights", "masters"):
        assert case.held[name][0][1, 3].isnan() and not case.held[name][0][2, 5].isfinite()
        assert case.held[name][0].isfinite().sum() == 4 * 16 - 2


@pytest.mark.parametrize("dtype, start", [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 2.0**-16)])
def test_stochastic_rounding_keeps_the_mean(dtype, start):
    """With an update of a quarter of the distance between neighbours, a quarter of the weights moves by all of it."""
    gap = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype] if start == 1.0 else 2.0**-24
    case = Case([(8, 1024, 8)], dtype, torch.float32)
    case.held["weights"][0].fill_(start)
    case.held["exp_avgs"][0].fill_(1.0)
    case.held["exp_avg_sqs"][0].fill_(1.0)
    case.held["grads"][0].fill_(1.0)
    case.held["steps"][0].fill_(10_000_000)
    first, again, other = case.copy(), case.copy(), case.copy()
    held = list(first.held.values())
    lr = torch.tensor(gap / 4, device=DEVICE)
    for chosen, seed in ((first, 3), (again, 3), (other, 4)):
        ops.sparse_adamw_(*chosen.held.values(), lr, BETA1, BETA2, 0.0, 0.0, seed=seed)
    moved = held[0][0].float() < start
    assert ((held[0][0].float() == start - gap) | ~moved).all()
    n = moved.numel()
    assert abs(moved.float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    # In no direction do neighbours move together.
    for a, b in ((moved[1:], moved[:-1]), (moved[:, 1:], moved[:, :-1])):
        assert abs((a & b).float().mean().item() - 0.0625) < 5 * math.sqrt(0.0625 / n)
    assert torch.equal(held[0][0], again.held["weights"][0])
    assert (held[0][0] != other.held["weights"][0]).any()


def test_stochastic_rounding_keeps_the_mean_of_moments():
    case = Case([(8, 1024, 8)], torch.bfloat16, moment=torch.bfloat16)
    for name in ("weights", "exp_avgs", "exp_avg_sqs"):
        case.held[name][0].fill_(1.0)
    case.held["grads"][0].zero_()
    case.held["steps"][0].fill_(10_000_000)
    # What lies below 1 is 2^-8 apart; all three move by a quarter of it.
    lr, beta = torch.tensor(2.0**-10, device=DEVICE), 1 - 2.0**-10
    ops.sparse_adamw_(*case.held.values(), lr, beta, beta, 0.0, 0.0, seed=11)
    moved = {name: case.held[name][0] < 1 for name in ("weights", "exp_avgs", "exp_avg_sqs")}
    n = 8 * 1024
    for name, low in moved.items():
        assert (case.held[name][0][low] == 1 - 2.0**-8).all(), name
        assert abs(low.float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n), name
    for one, other in itertools.combinations(moved, 2):
        together = (moved[one] & moved[other]).float().mean().item()
        assert abs(together - 0.0625) < 5 * math.sqrt(0.0625 / n), (one, other)


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize(
    "dtype, moment",
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_stochastic_rounding_draws_the_references_bits(axis, dtype, moment):
    case = Case([(20, 48, 9), (16, 40, 7)], dtype, axis=axis, moment=moment, empty=2)
    case.held["weights"][0][:, ::3] *= 1e-6
    other = case.copy()
    case.run(seed=-5)
    other.run(reference, seed=-5)
    for name in ("weights", "exp_avgs", "exp_avg_sqs"):
        for ours, theirs in zip(case.held[name], other.held[name], strict=True):
            # Where the fp32 values differ in their last bit, so may a rounding, once in thousands.
            assert ours.dtype == torch.float32 or (ours != theirs).sum() <= 2, name


def test_same_bits_every_time():
    first = Case([(32, 64, 10), (16, 72, 4)], torch.bfloat16, master=True)
    second = first.copy()
    first.run()
    second.run()
    for name, tensors in first.held.items():
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors, second.held[name], strict=True)), name


def test_nothing_to_do():
    ops.sparse_adamw_([], [], [], [], [], [], [], torch.tensor(LR), BETA1, BETA2, EPS, DECAY)
    case = Case([(8, 16, 0)], torch.float32)
    before = case.copy()
    case.run()
    assert torch.equal(before.held["weights"][0], case.held["weights"][0])


@pytest.mark.parametrize("master", [False, True])
def test_opcheck(master):
    held = Case([(6, 16, 3)], torch.bfloat16, master=master).held
    lr = torch.tensor(LR, device=DEVICE)
    args = (*held.values(), lr, BETA1, BETA2, EPS, DECAY, False, False, "rows", None, None, None)
    torch.library.opcheck(torch.ops.longact.sparse_adamw_.default, args)


@pytest.mark.skipif(INTERPRETED, reason="traces no kernel code, so that once is enough")
def test_compiles_into_one_graph():
    eager = Case([(6, 16, 3)], torch.float32)
    compiled = eager.copy()

    def step(weights, *rest):
        ops.sparse_adamw_(weights, *rest, torch.tensor(LR, device=DEVICE), BETA1, BETA2, EPS, DECAY)
        return weights[0] * 2

    wanted = step(*eager.held.values())
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled.held.values())
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(compiled.held["exp_avgs"], eager.held["exp_avgs"])


def test_bad_arguments_are_named():
    def refuse(message, **changes):
        case = Case([(6, 16, 3)], torch.float32)
        case.axis = changes.pop("axis", "rows")
        case.held.update({name: [tensor.to(DEVICE) for tensor in given] for name, given in changes.items()})
        with pytest.raises(ValueError, match=message):
            case.run()

    refuse("axis: got 'diagonal'", axis="diagonal")
    refuse(r"lists of one length", steps=[])
    refuse(r"grads\[0\].*\[6, 16\] or \[3, 16\]", grads=[torch.zeros(5, 16)])
    refuse(r"index\[0\]: got torch.int32", index=[torch.arange(3, dtype=torch.int32)])
    refuse(r"weights\[0\]: got torch.float64", weights=[torch.zeros(6, 16, dtype=torch.float64)])
    refuse(r"weights\[0\]: got .* with strides \[1, 6\]", weights=[torch.zeros(16, 6).t()])
    refuse(r"exp_avgs\[0\]: got \[3, 16\].*needed \[6, 16\]", exp_avgs=[torch.zeros(3, 16)])
    refuse(r"exp_avgs, exp_avg_sqs: one dtype", exp_avgs=[torch.zeros(6, 16, dtype=torch.bfloat16)])
    refuse(r"masters\[0\]: got torch.bfloat16, needed torch.float32", masters=[torch.zeros(6, 16).bfloat16()])
    refuse(r"exp_avg_sqs\[0\]: got torch.float16", exp_avg_sqs=[torch.zeros(6, 16).half()])
    refuse(r"steps\[0\]: got torch.int64", steps=[torch.zeros(6, dtype=torch.int64)])
    shared = torch.zeros(9, 16, device=DEVICE)
    refuse("share memory; needed a place for each", exp_avgs=[shared[:6]], exp_avg_sqs=[shared[:6]])
    refuse("share memory; needed a place for each", exp_avgs=[shared[3:]], exp_avg_sqs=[shared[:6]])
    refuse(r"exp_avgs\[0\]: got a view that is negated", exp_avgs=[torch.zeros(6, 16)._neg_view()])

    case = Case([(6, 16, 3)], torch.float32)
    case.held["grads"] = [torch.zeros(6, 16, device="meta")]
    with pytest.raises(ValueError, match=r"grads\[0\]: got one on meta, needed"):
        case.run()


@pytest.mark.skipif(not INTERPRETED, reason="counts the accesses of interpreted kernels")
@pytest.mark.parametrize("dtype, master", [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)])
def test_bytes_moved_are_the_least(dtype, master):
    from longact_kernels.compiled.rooflines import sparse_adamw_work

    case = Case([(64, 2048, 6), (32, 2048, 4)], dtype, master=master)
    with count_bytes() as moved:
        case.run()
    work = sparse_adamw_work(10, 2048, dtype.itemsize, master)
    assert moved["read"] + moved["written"] == work.moved
    assert work.moved <= 1.005 * work.minimum
    if dtype == torch.bfloat16 and master:
        # Gradient 2, weight 2, moments 16, master 8: what a dense fused AdamW moves for every element.
        assert work.minimum == 10 * 2048 * 28
        # 30% of the rows: 0.31 of the bytes, with what finding them costs.
        assert 0.3 * work.moved / work.minimum <= 0.31


def sparse(shape, dtype, stride=None):
    """Zeros in memory that exists only where it is touched."""
    stride = stride or (shape[1] if len(shape) == 2 else 1)
    memory = mmap.mmap(-1, shape[0] * stride * dtype.itemsize + 4096)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, (stride, 1)[: len(shape)])


@pytest.mark.skipif(not INTERPRETED, reason="runs a kernel on a sparse address range")
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("name", ["weights", "grads"])
def test_strides_beyond_2_31_elements(axis, name):
    case = Case([(2, 16, 2)], torch.bfloat16, axis=axis)
    before = case.copy()
    far = sparse((2, 16), torch.bfloat16, 2**31 + 64).copy_(case.held[name][0])
    case.held[name][0] = far
    case.run()
    check(before, case)


@pytest.mark.skipif(not INTERPRETED, reason="runs a kernel on a sparse address range")
@pytest.mark.parametrize("axis, shape", [("rows", (2**27 + 8, 16)), ("columns", (4, 2**30 + 8))])
def test_states_of_more_than_2_31_elements(axis, shape):
    """The first and the last channels of large weights, beside the same channels alone."""
    dim = 0 if axis == "rows" else 1
    index = torch.tensor([1, shape[dim] - 2])
    generator = torch.Generator().manual_seed(0)
    dtypes = dict(weights=torch.bfloat16, grads=torch.bfloat16, exp_avgs=torch.float32, exp_avg_sqs=torch.float32)
    small, large = {}, {}
    for name, dtype in {**dtypes, "masters": torch.float32}.items():
        part = (2, 16) if dim == 0 else (4, 2)
        values = torch.rand(part, generator=generator).to(dtype)
        small[name], large[name] = [values], [sparse(shape, dtype).index_copy_(dim, index, values)]
    small |= {"index": [torch.arange(2)], "steps": [torch.tensor([4, 9], dtype=torch.int32)]}
    large |= {"index": [index], "steps": [sparse(shape[dim : dim + 1], torch.int32)]}
    large["steps"][0][index] = small["steps"][0]
    numbers = dict(lr=torch.tensor(LR), beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, axis=axis)
    ops.sparse_adamw_(**large, **numbers)
    reference(AdamWCall(**small, **numbers))
    assert torch.equal(large["steps"][0][index], small["steps"][0])
    for name in ("exp_avgs", "exp_avg_sqs", "masters", "weights"):
        got = large[name][0].index_select(dim, index)
        torch.testing.assert_close(got, small[name][0], rtol=2**-7 if name == "weights" else 1e-5, atol=1e-6)


def plan_of(case):
    held = {name: tensors for name, tensors in case.held.items() if name != "grads"}
    return ops.AdamWPlan(**held, compact=case.compact, axis=case.axis)


@pytest.mark.parametrize("axis, compact, master", [("rows", False, True), ("columns", True, False)])
def test_a_plan_takes_the_steps_of_the_functional_form(axis, compact, master):
    case = Case([(24, 32, 5), (8, 64, 3)], torch.bfloat16, axis=axis, compact=compact, master=master)
    other, lr = case.copy(), torch.tensor(LR, device=DEVICE)
    plan, grads = plan_of(case), []
    for step in range(4):
        # New gradients at new addresses; compact ones of another dtype; the old addresses again, and the sets changed.
        if step == 1:
            dim = 0 if axis == "rows" else 1
            salient = zip(other.held["grads"], other.held["index"], strict=True)
            other.held["grads"] = [grad.index_select(dim, index).float() for grad, index in salient]
        if step < 3:
            grads = [grad.clone() for grad in other.held["grads"]]
        else:
            for ours, theirs in zip(case.held["index"], other.held["index"], strict=True):
                theirs.copy_(torch.arange(len(theirs), device=DEVICE))
                ours.copy_(theirs)
        plan.step(grads, lr, BETA1, BETA2, EPS, DECAY)
        other.run()
    for name in ("weights", "exp_avgs", "exp_avg_sqs", "steps", "masters"):
        for ours, theirs in zip(case.held[name], other.held[name], strict=True):
            assert torch.equal(bits(ours), bits(theirs)), name


def test_a_plan_tells_whether_it_fits():
    case = Case([(6, 16, 3), (6, 16, 2)], torch.float32, master=True)
    plan = plan_of(case)
    lists = [case.held[name] for name in ("weights", "index", "exp_avgs", "exp_avg_sqs", "steps", "masters")]
    assert plan.fits(*lists)
    assert not plan.fits(*(tensors[:1] for tensors in lists))
    for i, tensors in enumerate(lists):
        moved = [[*tensors[:1], tensors[1].clone()] if i == j else own for j, own in enumerate(lists)]
        assert not plan.fits(*moved)
    lists[0][0].data = lists[0][0].clone()  # as FSDP and `module.to` do it
    assert not plan.fits(*lists)


def test_a_plan_checks_its_gradients():
    case = Case([(6, 16, 3)], torch.float32)
    plan, lr = plan_of(case), torch.tensor(LR, device=DEVICE)
    before = case.copy()
    for grads, message in (
        ([], "grads: got 0, needed one for each of 1"),
        ([torch.zeros(5, 16, device=DEVICE)], r"grads\[0\].*\[6, 16\] or \[3, 16\]"),
        ([torch.zeros(6, 16, device=DEVICE).double()], r"grads\[0\]: got torch.float64"),
        ([torch.zeros(6, 16, device="meta")], r"grads\[0\]: got one on meta"),
        ([torch.zeros(6, 16, device=DEVICE)._neg_view()], r"grads\[0\]: got a view that is negated"),
    ):
        for _ in range(2):  # what was refused once is refused again
            with pytest.raises(ValueError, match=message):
                plan.step(grads, lr, BETA1, BETA2, EPS, DECAY)
    with pytest.raises(ValueError, match="eps: got -1"):
        plan.step(case.held["grads"], lr, BETA1, BETA2, -1.0, DECAY)
    with pytest.raises(ValueError, match=r"beta2: got 1\.0"):
        plan.step(case.held["grads"], lr, BETA1, 1.0, EPS, DECAY)
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"seed: got .*, needed a whole number of 64 bits"):
            plan.step(case.held["grads"], lr, BETA1, BETA2, EPS, DECAY, seed=seed)
    assert torch.equal(before.held["weights"][0], case.held["weights"][0])
    version = case.held["weights"][0]._version
    plan.step(case.held["grads"], lr, BETA1, BETA2, EPS, DECAY)
    assert case.held["weights"][0]._version > version  # autograd notices that a saved weight has changed
    check(before, case)


def whole_lists(shapes, dtype, master, moment=torch.float32, seed=0):
    """Whole weights, with the step counts that torch's AdamW keeps."""
    generator = torch.Generator().manual_seed(seed)
    lists = {name: [] for name in ("weights", "grads", "index", "exp_avgs", "exp_avg_sqs", "steps", "masters")}
    for i, shape in enumerate(shapes):
        numbers = torch.randn(4, *shape, generator=generator)
        lists["weights"].append(numbers[0].to(dtype))
        lists["grads"].append((numbers[1] / 8).to(dtype))
        lists["exp_avgs"].append((numbers[2] / 100).to(moment))
        lists["exp_avg_sqs"].append((numbers[3].square() / 100).to(moment))
        lists["steps"].append(torch.tensor(float(3 * i)))
        if master:
            lists["masters"].append(lists["weights"][i].float())
    return {name: [tensor.to(DEVICE) for tensor in tensors] for name, tensors in lists.items()}


@pytest.mark.parametrize("dtype, master", [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
@pytest.mark.parametrize("shapes", [[(16, 40), (8,), (2, 3, 24), ()], [(70_000,), (3, 5)], [(3, 5, 7)]])
def test_whole_weights_are_torchs_adamw(dtype, master, shapes):
    lists = whole_lists(shapes, dtype, master)
    targets = [t.detach().clone().requires_grad_() for t in lists["masters"] or lists["weights"]]
    optimizer = torch.optim.AdamW(targets, LR, (BETA1, BETA2), EPS, DECAY)
    for i, target in enumerate(targets):
        held = {"step": lists["steps"][i], "exp_avg": lists["exp_avgs"][i], "exp_avg_sq": lists["exp_avg_sqs"][i]}
        optimizer.state[target] = {name: value.clone() for name, value in held.items()}
    plan = ops.AdamWPlan(**{name: tensors for name, tensors in lists.items() if name != "grads"})
    lr, scale = torch.tensor(LR, device=DEVICE), torch.tensor(4.0, device=DEVICE)
    for step in range(3):
        for target, grad in zip(targets, lists["grads"], strict=True):
            target.grad = grad.float() / 4
        overflow = torch.tensor(float(step == 1), device=DEVICE)
        plan.step(lists["grads"], lr, BETA1, BETA2, EPS, DECAY, grad_scale=scale, found_inf=overflow)
        if step != 1:
            optimizer.step()
    for i, target in enumerate(targets):
        state = optimizer.state[target]
        assert lists["steps"][i] == state["step"] == 3 * i + 2
        ours = (lists["masters"] or lists["weights"])[i]
        torch.testing.assert_close(ours, target.detach(), rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(lists["exp_avgs"][i], state["exp_avg"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(lists["exp_avg_sqs"][i], state["exp_avg_sq"], rtol=1e-5, atol=1e-8)
        assert torch.equal(lists["weights"][i], ours.to(dtype))


def test_whole_weights_are_rounded_with_the_references_bits():
    shapes = [(70_000,), (5, 24)]
    ours, theirs = (whole_lists(shapes, torch.bfloat16, False, torch.bfloat16) for _ in range(2))
    lr = torch.tensor(LR, device=DEVICE)
    ops.sparse_adamw_(**ours, lr=lr, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, seed=3)
    reference(AdamWCall(**theirs, lr=lr, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, seed=3))
    for name in ("weights", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert (a != b).sum() <= 2e-4 * a.numel() + 1, name


def test_arguments_of_whole_weights_are_checked():
    def refuse(message, **changes):
        lists = whole_lists([(6, 16)], torch.bfloat16, True) | changes
        with pytest.raises(ValueError, match=message):
            ops.AdamWPlan(**{name: tensors for name, tensors in lists.items() if name != "grads"})

    refuse("index: got no sets, needed some with compact=True", compact=True)
    refuse(r"steps\[0\]: got torch.int32", steps=[torch.zeros((), dtype=torch.int32, device=DEVICE)])
    refuse(r"steps\[0\]: got \[6\]", steps=[torch.zeros(6, device=DEVICE)])
    refuse(r"weights\[0\]: .*contiguous", weights=[torch.zeros(16, 6, dtype=torch.bfloat16, device=DEVICE).t()])
    refuse(r"masters\[0\]: got \[3, 16\]", masters=[torch.zeros(3, 16, device=DEVICE)])
