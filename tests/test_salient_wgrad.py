"""`salient_wgrad` against products in fp64."""

import importlib

import exact_interpreter  # noqa: F401
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_memory import SparseMemory, program
from traffic import count_bytes

from longact_kernels import ops
from longact_kernels.ops.dispatch import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 8 if interpreted() else 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# As ATen's products on a CPU are.
ROUNDS_PRODUCT = DEVICE == "cpu"


@pytest.fixture(params=[True, False] if interpreted() or DEVICE == "cuda" else [True], ids="packs-{}".format)
def packs(request, monkeypatch):
    """Whether the kernels' way packs the salient channels or multiplies all of them; the CPU code always packs."""
    if interpreted() or DEVICE == "cuda":
        monkeypatch.setattr("longact_kernels.csrc_triton.salient_wgrad.pays", lambda *sizes: request.param)
        op = importlib.import_module("longact_kernels.ops.salient_wgrad")
        monkeypatch.setattr(op, "_plan", op._plan.__wrapped__)  # it keeps what `pays` has said
    return request.param


pytestmark = pytest.mark.usefixtures("packs")
# The fixture means the same for every example.
examples = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def some(channels: int, count: int, seed: int = 0, empty: int = 0) -> torch.Tensor:
    """An ascending set of `count` channels, after so many empty slots."""
    chosen = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.cat([torch.full((empty,), -1), chosen]).to(DEVICE)


def check(dw, dy, x, rows, axis, compact, before=None, rounds_product=ROUNDS_PRODUCT):
    """Holds one result against its bound: fp32 sums of M terms, one rounding to its dtype, zeros outside the set.

    Where the product is rounded to 16 bits before it is added or widened, that rounding comes on top.
    """
    exact = dy.double().T @ x.double()
    terms = dy.double().abs().T @ x.double().abs()
    outside = torch.ones_like(exact, dtype=torch.bool)
    outside[rows[rows >= 0] if axis == "rows" else (slice(None), rows[rows >= 0])] = False
    if compact:
        along = 0 if axis == "rows" else 1
        exact, terms, outside = (t.index_select(along, rows.clamp(min=0)) for t in (exact, terms, outside))
        outside.index_fill_(along, (rows < 0).nonzero().flatten(), True)
    slack = UNIT[dy.dtype] * exact.abs() if rounds_product and (compact or before is not None) else 0
    if before is not None:
        exact, terms = exact + before.double(), terms + before.double().abs()
    assert dw.shape == exact.shape and dw.dtype == (torch.float32 if compact else dy.dtype)
    unit = UNIT[dw.dtype]
    tiny = torch.finfo(dy.dtype).smallest_normal * UNIT[dy.dtype]
    near = (dw.double() - exact).abs() <= unit * exact.abs() + slack + 1.01 * (len(dy) + 70) * 2**-24 * terms + tiny
    assert (near | outside).all()
    assert torch.equal(dw[outside], torch.zeros_like(dw[outside]) if before is None else before[outside])


def count_of_probes(rows, line):
    """How many slots a binary search for a line's own looks at, which it does in falling powers of two."""
    slot = probes = 0
    for bit in reversed(range(len(rows).bit_length())):
        beyond = slot + 2**bit
        probes += beyond <= len(rows)
        slot = beyond if beyond <= len(rows) and rows[beyond - 1] < line else slot
    return probes


@st.composite
def problems(draw):
    """Arguments of odd shapes; rows of dy and x may lie apart, or be the columns of something else."""
    dtype = draw(st.sampled_from(DTYPES))
    M, N, K = draw(st.integers(0, 90)), draw(st.integers(1, 90)), draw(st.integers(1, 90))
    dy = randn(M, N + draw(st.integers(0, 1)), dtype=dtype, seed=draw(st.integers(0, 99)))[:, :N]
    x = randn(K, M, dtype=dtype, seed=1).T if draw(st.booleans()) else randn(M, K, dtype=dtype, seed=1)
    axis = draw(st.sampled_from(["rows", "columns"]))
    channels = N if axis == "rows" else K
    rows = some(channels, draw(st.integers(0, channels)), empty=draw(st.integers(0, 20)))
    return dy, x, rows, axis, draw(st.booleans())


@examples
@given(problem=problems())
def test_matches_fp64_within_rounding(problem):
    check(ops.salient_wgrad(*problem), *problem)


@examples
@given(problem=problems(), accumulate=st.booleans())
def test_writes_or_adds_to_a_given_gradient(problem, accumulate):
    _, _, rows, axis, compact = problem
    before = torch.randn_like(ops.salient_wgrad(*problem))
    out = before.clone()
    assert ops.salient_wgrad(*problem, out=out, accumulate=accumulate) is out
    if accumulate:
        check(out, *problem, before=before)
    elif compact:
        assert torch.equal(out, ops.salient_wgrad(*problem))
    else:
        kept = torch.ones(out.shape[0 if axis == "rows" else 1], dtype=torch.bool, device=DEVICE)
        kept[rows[rows >= 0]] = False
        inside = (lambda t: t[~kept]) if axis == "rows" else (lambda t: t[:, ~kept])
        outside = (lambda t: t[kept]) if axis == "rows" else (lambda t: t[:, kept])
        assert torch.equal(outside(out), outside(before))
        assert torch.equal(inside(out), inside(ops.salient_wgrad(*problem)))


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_and_the_same_bits_each_time(dtype, axis):
    dy, x = randn(1040, 32, dtype=dtype), randn(1040, 144, dtype=dtype, seed=1)
    rows = some(32 if axis == "rows" else 144, 16)
    first = ops.salient_wgrad(dy, x, rows, axis)
    check(first, dy, x, rows, axis, False)
    assert torch.equal(first, ops.salient_wgrad(dy, x, rows, axis))


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_more_slots_and_tokens_than_a_program_packs(axis):
    near, other, rows = randn(40, 400), randn(40, 5, seed=1), some(400, 290, empty=3)
    problem = (*((near, other) if axis == "rows" else (other, near)), rows, axis, True)
    check(ops.salient_wgrad(*problem), *problem)


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "near", "other"), [(5, 3, 0), (0, 3, 4), (0, 1, 0)])
def test_gradients_without_elements(axis, dtype, tokens, near, other):
    dy, x = randn(tokens, near, dtype=dtype), randn(tokens, other, dtype=dtype)
    problem = (*((dy, x) if axis == "rows" else (x, dy)), some(near, 1), axis)
    rows, columns = (near, other) if axis == "rows" else (other, near)
    out = torch.zeros(rows, 8, dtype=dtype, device=DEVICE)[:, :columns]  # its rows lie as those of wide elements do
    assert torch.equal(ops.salient_wgrad(*problem), torch.zeros_like(out))
    assert torch.equal(ops.salient_wgrad(*problem, out=out), torch.zeros_like(out))


def test_the_bias_gradient_is_whole():
    dy, x, rows = randn(50, 12), randn(50, 8, seed=1), some(12, 4)
    dw, db = ops.salient_wgrad(dy, x, rows, bias=True)
    check(dw, dy, x, rows, "rows", False)
    assert torch.equal(db, dy.sum(0))


def test_nonfinite_gradients_stay_in_their_channels():
    dy, x, rows = randn(50, 12), randn(50, 8, seed=1), torch.tensor([1, 5, 7], device=DEVICE)
    dy[3, 5], dy[4, 6], x[9, 2] = float("nan"), float("nan"), float("inf")
    dw = ops.salient_wgrad(dy, x, rows)
    assert dw[5].isnan().all() and dw[[1, 7]][:, [0, 1, 3, 4, 5, 6, 7]].isfinite().all() and dw[[1, 7], 2].isinf().all()
    assert (dw[[0, 2, 3, 4, 6, 8, 9, 10, 11]] == 0).all()


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_empty_slots_stay_zero_beside_nonfinite_numbers(axis):
    """Alone and among channels, written and added: 0 times Inf would be NaN."""
    dy, x = randn(50, 12), randn(50, 16, seed=1)
    (x if axis == "rows" else dy)[9] = float("inf")
    for count in (0, 5):
        rows = some(12, count, empty=11)
        compact = ops.salient_wgrad(dy, x, rows, axis, compact=True)
        given = torch.full_like(compact, 3.0)
        ops.salient_wgrad(dy, x, rows, axis, compact=True, out=given)
        added = torch.full_like(compact, 3.0)
        ops.salient_wgrad(dy, x, rows, axis, compact=True, out=added, accumulate=True)
        whole = ops.salient_wgrad(dy, x, rows, axis)
        for dw, value in ((compact, 0.0), (given, 0.0), (added, 3.0)):
            slots = dw if axis == "rows" else dw.T
            assert (slots[:11] == value).all() and not slots[11:].isfinite().any()
        lines = whole if axis == "rows" else whole.T
        assert (lines != 0).any(1).nonzero().flatten().tolist() == rows[11:].tolist()


@pytest.mark.skipif(DEVICE == "cuda", reason="the product of such operands is the library's; tests/test_cuda.py")
def test_more_than_two_to_the_31_elements_apart():
    """The third token begins 2³¹ elements after the first; memory in between is never touched."""
    dy, x = (torch.empty_strided((3, 16), (2**30, 1), dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    dy.copy_(randn(3, 16)), x.copy_(randn(3, 16, seed=1))
    for axis in ("rows", "columns"):
        check(ops.salient_wgrad(dy, x, some(16, 5), axis), dy, x, some(16, 5), axis, False)


@pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="an error there: tests/test_cpu_salient_wgrad.py")
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_channel_that_is_not_there_reads_no_neighbour(axis):
    memory = torch.full((50, 64), torch.nan, device=DEVICE)
    near, other = memory[:, :32], randn(50, 32, seed=1)
    near.copy_(randn(50, 32))
    rows = torch.tensor([3, 40], device=DEVICE)
    compact = ops.salient_wgrad(*((near, other) if axis == "rows" else (other, near)), rows, axis, compact=True)
    slots = compact if axis == "rows" else compact.T
    assert (slots[1] == 0).all() and slots[0].isfinite().all()


far = pytest.mark.skipif(not interpreted(), reason="runs single programs on a sparse address range")


@far
def test_packed_tokens_beyond_two_to_the_31_elements():
    from longact_kernels.csrc_triton.salient_wgrad import PACK_CONFIG, pack_kernel

    M, P, x = 2**27 + 32, 16, randn(1, 64, dtype=torch.bfloat16)
    # The last one is none of the 32 channels.
    rows, packed = torch.cat([some(32, 15), torch.tensor([40])]), SparseMemory(M * P, torch.bfloat16)
    with program(M // PACK_CONFIG["BLOCK_M"] - 1, 0):
        pack_kernel[(1,)](x, rows, packed.at(0), M, 32, 16, P, 0, **PACK_CONFIG)
    assert torch.equal(packed.at((M - 1) * P, P), torch.where(rows < 32, x[0, rows], 0))


@far
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_lines_of_a_product_beyond_two_to_the_31_elements(axis, compact, accumulate):
    from longact_kernels.csrc_triton.salient_wgrad import SCATTER_CONFIG, scatter_grid, scatter_kernel

    stride, lines = 2**30 + 64, 4
    product, out = SparseMemory(lines * stride, torch.float32), SparseMemory(lines * stride, torch.float32)
    for line in range(lines):
        product.at(line * stride, lines).copy_(torch.arange(lines) + 10 * line + 1)
        out.at(line * stride, lines).fill_(100 * (line + 1))
    before = torch.stack([out.at(line * stride, lines) for line in range(lines)]).clone()
    config = SCATTER_CONFIG[axis]
    scatter_kernel[scatter_grid(lines, lines, axis == "columns", config["BLOCK_C"])](
        product.at(0), torch.arange(lines), out.at(0), lines, lines, lines, lines, lines.bit_length(), stride, stride,
        COLUMNS=axis == "columns", COMPACT=compact, WHOLE=False, ACCUMULATE=accumulate, FILL=not accumulate,
        **config,
    )  # fmt: skip
    written = torch.stack([product.at(line * stride, lines) for line in range(lines)]) + (before if accumulate else 0)
    assert torch.equal(torch.stack([out.at(line * stride, lines) for line in range(lines)]), written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(4, 8)), "dy, x: got shapes"),
        (dict(x=torch.zeros(5, 8, dtype=torch.float16)), "x: got torch.float16"),
        (dict(rows=torch.tensor([0, 1], dtype=torch.int32)), "rows: got torch.int32"),
        (dict(axis="row"), "axis: got 'row'"),
        (dict(accumulate=True), "accumulate: needs `out`"),
        (dict(out=torch.zeros(6, 9)), "out: got torch.float32 \\[6, 9\\]"),
        (dict(out=torch.zeros(8, 6).T), "out: got .* needed torch.float32 \\[6, 8\\] with rows contiguous"),
        (dict(out=torch.zeros(6, 8), compact=True), "out: got .* needed torch.float32 \\[2, 8\\]"),
        (dict(out=torch.zeros(6, 8).bfloat16()), "out: got torch.bfloat16 .* needed torch.float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {"dy": torch.zeros(5, 6), "x": torch.zeros(5, 8), "rows": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        ops.salient_wgrad(**{**arguments, **change})


@pytest.mark.skipif(interpreted(), reason="the same without the interpreter")
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("compact", [False, True])
def test_is_a_well_formed_operator(axis, compact):
    dy, x, rows = randn(20, 6), randn(20, 8, seed=1), some(6, 3)
    torch.library.opcheck(torch.ops.longact.salient_wgrad.default, (dy, x, rows, axis, compact))
    out = ops.salient_wgrad(dy, x, rows, axis, compact)
    torch.library.opcheck(torch.ops.longact.salient_wgrad_.default, (out, dy, x, rows, axis, compact, True))


@pytest.mark.parametrize("grad", [False, True])
def test_a_gradient_written_to_is_a_newer_version(grad):
    dy, x, rows = randn(20, 6), randn(20, 8, seed=1), some(6, 3)
    out = torch.zeros(6, 8, device=DEVICE)
    before = out._version
    with torch.set_grad_enabled(grad):
        ops.salient_wgrad(dy, x, rows, out=out)
    assert out._version > before


@pytest.mark.skipif(interpreted(), reason="the same without the interpreter")
def test_compiles_into_one_graph():
    dy, x, rows = randn(20, 6), randn(20, 8, seed=1), some(6, 3)

    def both(dy, x, rows):
        out = ops.salient_wgrad(dy, x, rows)
        return ops.salient_wgrad(dy, x, rows, out=out, accumulate=True)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(dy, x, rows), both(dy, x, rows))


@pytest.mark.skipif(not interpreted(), reason="counts the accesses of interpreted kernels")
def test_bytes_moved(packs):
    """Salient channels once and packed; the product's salient lines once, the gradient written once."""
    dy, x, rows = randn(64, 80, dtype=torch.bfloat16), randn(64, 256, dtype=torch.bfloat16, seed=1), some(80, 24)
    with count_bytes() as moved:
        ops.salient_wgrad(dy, x, rows)
    searches = 8 * sum(count_of_probes(rows.tolist(), line) for line in range(80))
    packing = 4 * 8 * 24 + 2 * 64 * 24  # four programs read the index
    assert moved["read"] == packs * packing + searches + 2 * 24 * 256
    assert moved["written"] == packs * 2 * 64 * 32 + 2 * 80 * 256


@pytest.mark.skipif(interpreted(), reason="the same without the interpreter")
def test_packing_is_predicted_to_pay_where_it_saves_long_products():
    pays = pytest.importorskip("longact_kernels.csrc_triton.salient_wgrad").pays
    assert pays(32_768, 4096, 1232, 4096, 2)  # Qwen3-8B's q_proj at density 0.3 ...
    assert pays(32_768, 1024, 320, 4096, 2) and pays(2_048, 4096, 1232, 4096, 2)
    assert not pays(2_048, 576, 176, 576, 2)  # ... and SmolLM2's
    assert not pays(32_768, 4096, 4096, 4096, 2)  # all channels: nothing is saved
    assert pays(2_048, 576, 176, 576, 4)
