"""`linear_stats` against products in fp64 and the statistics of its own output."""

import exact_interpreter  # noqa: F401
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_memory import SparseMemory, program
from traffic import count_bytes

from longact_kernels import ops
from longact_kernels.ops.dispatch import interpreted
from longact_kernels.reference.channel_stats import channel_stats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 8 if interpreted() else 40
IMPLS = ["fused"] if interpreted() else ["separate", "fused"] if DEVICE == "cuda" else ["auto"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(impl, x, weight, bias=None, mask=None, cu_seqlens=None):
    """Holds one result against its bounds: rounding of y, fp32 rounding of the sums, nothing for the maximum."""
    y, absmax, sumsq = ops.linear_stats(x, weight, bias, mask, cu_seqlens, impl=impl)
    exact = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    unit, K = UNIT[y.dtype], x.shape[-1]
    tiny = torch.finfo(y.dtype).smallest_normal * unit
    assert y.dtype == x.dtype and y.shape == exact.shape
    # One rounding to y's dtype, and fp32 sums of K + 1 terms; torch itself may round a bias in separately.
    once = (y.double() - exact).abs() <= unit * exact.abs() + 1.01 * (K + 2) * 2**-24 * terms + tiny
    assert once.all() or (impl != "fused" and torch.equal(y, torch.nn.functional.linear(x, weight, bias)))

    seen_max, _ = channel_stats(y, mask, cu_seqlens)
    _, seen_sums = channel_stats(y.double().float(), mask, cu_seqlens)
    assert absmax.dtype == sumsq.dtype == torch.float32
    assert torch.equal(absmax.to(y.dtype).float(), seen_max)
    assert sumsq.shape == seen_sums.shape
    rounding = 2.1 * unit + (x.shape[:-1].numel() + 4) * 2**-23
    assert ((sumsq - seen_sums).abs() <= rounding * seen_sums + x.shape[:-1].numel() * tiny).all()


@st.composite
def problems(draw):
    """Arguments of odd shapes; rows of x and weight may lie apart."""
    dtype = draw(st.sampled_from(DTYPES))
    K, N = draw(st.integers(1, 70)), draw(st.integers(1, 140))
    packed = draw(st.booleans())
    lead = () if packed else draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    T = draw(st.integers(0, 140))
    x = randn(*lead, T, K + draw(st.integers(0, 1)), dtype=dtype, seed=draw(st.integers(0, 99)))[..., :K]
    weight = randn(N, K + draw(st.integers(0, 1)), dtype=dtype, seed=1)[:, :K]
    bias = randn(N, dtype=dtype, seed=2) if draw(st.booleans()) else None
    mask = randn(*lead, T, seed=3) > 0 if draw(st.booleans()) else None
    cu_seqlens = None
    if packed:
        bounds = sorted(draw(st.lists(st.one_of(st.integers(0, T), st.sampled_from([0, T])), min_size=1, max_size=6)))
        cu_seqlens = torch.tensor(bounds, dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=DEVICE)
    return x, weight, bias, mask, cu_seqlens


@pytest.mark.parametrize("impl", IMPLS)
@settings(deadline=None, max_examples=EXAMPLES)
@given(problem=problems())
def test_matches_fp64_within_rounding(impl, problem):
    check(impl, *problem)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_in_every_direction(impl, dtype):
    x, weight, bias = (
        randn(2, 200, 96, dtype=dtype),
        randn(300, 96, dtype=dtype, seed=1),
        randn(300, dtype=dtype, seed=2),
    )
    check(impl, x, weight, bias, randn(2, 200, seed=3) > 0)
    check(impl, x[0], weight, None, None, torch.tensor([3, 64, 64, 128, 199], device=DEVICE))


@pytest.mark.parametrize("impl", IMPLS)
def test_more_tiles_than_a_group_and_more_sequences_than_a_block(impl):
    """Eleven rows of tiles and three columns; 140 packed sequences, the search among which takes eight steps."""
    x, weight = randn(700, 24), randn(150, 24, seed=1)
    check(impl, x, weight)
    bounds = torch.randint(0, 700, (141,), generator=torch.Generator().manual_seed(0)).sort().values
    check(impl, x, weight, None, None, bounds.to(DEVICE))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bounds", [[0, 50_000_000], [2, 5, 2**40], [-(2**40), 3], [7, 1, 9, -5, 8, 0]])
def test_bounds_beyond_the_tokens(impl, bounds):
    """An error on a CPU; where the host does not look, they are held within the tokens: no neighbour is read."""
    memory = torch.full((24, 16), torch.nan, device=DEVICE)
    x, weight, cu_seqlens = memory[8:16], randn(32, 16), torch.tensor(bounds, device=DEVICE)
    x.copy_(randn(8, 16, seed=1))
    if impl == "auto":
        with pytest.raises(ValueError, match=r"^cu_seqlens: got \[.*needed bounds that ascend within 0 .. 8"):
            ops.linear_stats(x, weight, cu_seqlens=cu_seqlens)
    else:
        y, absmax, _ = ops.linear_stats(x, weight, cu_seqlens=cu_seqlens, impl=impl)
        assert absmax.isfinite().all()
        if bounds == sorted(bounds):
            torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))
            held = ops.linear_stats(x, weight, cu_seqlens=cu_seqlens.clamp(0, 8), impl=impl)
            assert torch.equal(absmax, held[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_nonfinite_values_survive_unless_masked_out(impl):
    x, weight = randn(2, 5, 8), randn(6, 8, seed=1)
    x[1, 2, 0], x[1, 4, 0] = float("nan"), float("inf")
    weight[3:, 0] = 0
    mask = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    _, absmax, sumsq = ops.linear_stats(x, weight, None, mask, impl=impl)
    assert absmax.isnan().all() and sumsq[1].isnan().all() and sumsq[0].isfinite().all()
    mask[1, 2] = False
    _, absmax, sumsq = ops.linear_stats(x, weight, None, mask, impl=impl)
    assert absmax[:3].isinf().all() and absmax[3:].isnan().all()  # 0 · Inf is NaN
    mask[1, 4] = False
    _, absmax, sumsq = ops.linear_stats(x, weight, None, mask, impl=impl)
    assert absmax.isfinite().all() and sumsq.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_output_that_overflows_is_infinite_in_the_statistics(impl):
    """65,520 rounds to infinity in fp16, the fp32 number below it to the largest finite one."""
    x = torch.tensor([[2.0, 1.0]], dtype=torch.float16, device=DEVICE)
    weight = torch.tensor([[32752.0, 16.0], [32752.0, 15.9921875]], dtype=torch.float16, device=DEVICE)
    y, absmax, sumsq = ops.linear_stats(x, torch.cat([weight, -weight]), impl=impl)
    assert y.isinf().tolist() == [[True, False] * 2]
    assert torch.equal(absmax.isinf(), y[0].isinf()) and torch.equal(sumsq.isinf(), y.isinf())


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_inputs_give_the_same_bits(impl):
    args = randn(3, 70, 33, dtype=torch.bfloat16), randn(65, 33, dtype=torch.bfloat16, seed=1)
    for first, second in zip(ops.linear_stats(*args, impl=impl), ops.linear_stats(*args, impl=impl), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_of_squares_can_be_left_out(impl):
    x, weight = randn(2, 9, 8), randn(6, 8, seed=1)
    y, absmax, sumsq = ops.linear_stats(x, weight, l2=False, impl=impl)
    assert torch.equal(absmax, y.abs().amax((0, 1))) and sumsq.shape == (0, 6)


@pytest.mark.parametrize("impl", IMPLS)
def test_more_than_two_to_the_31_elements_apart(impl):
    """The third row begins 2³¹ elements after the first; memory in between is never touched."""
    x, weight = (torch.empty_strided((3, 16), (2**30, 1), dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    x.copy_(randn(3, 16)), weight.copy_(randn(3, 16, seed=1))
    check(impl, x, randn(20, 16, dtype=torch.bfloat16, seed=1))
    check(impl, x[:2].clone(), weight)


@pytest.mark.skipif(not interpreted(), reason="runs single programs on a sparse address range")
def test_outputs_beyond_two_to_the_31_elements():
    """The last of so many sequences of one token each: its row of y and its sums of squares lie that far away."""
    from longact_kernels.csrc_triton.linear_stats import launch_config, linear_stats_kernel

    N, M, K = 2**20, 2**11 + 8, 16
    x, weight, absmax = randn(1, K), randn(1, K, seed=1), torch.zeros(64, dtype=torch.int32)
    y, sums = (SparseMemory(M * N, torch.float32) for _ in range(2))
    config = launch_config("sm_90", 4, True)
    last_group = (M - 8) * -(-N // config["BLOCK_N"])
    with program(last_group + 7):
        linear_stats_kernel[(1,)](
            x, weight, None, y.at(0), None, None, absmax, sums.at(0), M, N, K, 1, M, M, 0, 0,
            OVERFLOW=float("inf"), EVEN_K=False, PRECISION="ieee", **config,
        )  # fmt: skip
    value = (x.double() @ weight.double().T).float().expand(1, 64)
    for seen, wanted in ((y, value), (sums, value.square())):
        torch.testing.assert_close(seen.at((M - 1) * N, 64), wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(absmax.view(torch.float32), value[0].abs(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(6, 7)), "x, weight: got"),
        (dict(weight=torch.zeros(6, 8, dtype=torch.float16)), "x, weight: got"),
        (dict(bias=torch.zeros(5)), "bias: got"),
        (dict(mask=torch.ones(2, 5)), "mask: got torch.float32"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens: goes with packed x"),
        (dict(x=torch.zeros(5, 8), cu_seqlens=torch.tensor([0.0, 5.0])), "cu_seqlens: got torch.float32"),
        (dict(impl="fast"), "impl: got 'fast'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_stats(**{"x": torch.zeros(2, 5, 8), "weight": torch.zeros(6, 8), **change})


@pytest.mark.skipif("fused" in IMPLS, reason="the kernel can run here")
def test_the_kernel_asked_for_where_it_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="impl: 'fused' needs tensors on a CUDA or ROCm GPU"):
        ops.linear_stats(torch.zeros(5, 8), torch.zeros(6, 8), impl="fused")


@pytest.mark.parametrize("impl", IMPLS)
def test_is_a_well_formed_operator(impl):
    x, weight, bias = randn(2, 9, 8), randn(6, 8, seed=1), randn(6, seed=2)
    mask = randn(2, 9, seed=3) > 0
    op = torch.ops.longact.linear_stats.default
    torch.library.opcheck(op, (x, weight, bias, mask, None, True, impl))
    torch.library.opcheck(op, (x[0], weight, None, None, torch.tensor([0, 4, 9], device=DEVICE), False, impl))


@pytest.mark.skipif(not interpreted(), reason="counts the accesses of interpreted kernels")
def test_the_statistics_add_a_few_bytes_to_the_traffic_of_the_product():
    """Tiles of 64, two by three: an operand once for every tile that needs it, y once, a sum a tile and channel."""
    x, weight = randn(128, 96), randn(192, 96, seed=1)
    with count_bytes() as moved:
        ops.linear_stats(x, weight, impl="fused")
    assert moved["read"] == 3 * x.nbytes + 2 * weight.nbytes
    assert moved["written"] == 4 * 128 * 192 + 4 * 2 * 192


@pytest.mark.skipif(interpreted(), reason="the same without the interpreter")
def test_compiles_into_one_graph():
    x, weight = randn(2, 9, 8), randn(6, 8, seed=1)
    compiled = torch.compile(ops.linear_stats, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x, weight), ops.linear_stats(x, weight), strict=True):
        assert torch.equal(ours, eager)
