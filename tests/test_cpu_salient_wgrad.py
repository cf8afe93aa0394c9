"""The CPU weight gradient of the salient channels against fp64 and the reference."""

import pytest
import torch
from cpu_forms import relaxed
from hypothesis import given
from hypothesis import strategies as st

from longact_kernels import ops
from longact_kernels.cpu.salient_wgrad import salient_wgrad
from longact_kernels.reference.salient_wgrad import salient_wgrad as reference


@relaxed
@given(
    M=st.integers(0, 600),
    N=st.integers(1, 40),
    K=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    axis=st.sampled_from(["rows", "columns"]),
    compact=st.booleans(),
    empty=st.integers(0, 9),
    given_out=st.booleans(),
    accumulate=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_combination(M, N, K, density, dtype, axis, compact, empty, given_out, accumulate, seed):
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(M, N + 3, generator=generator).to(dtype)[:, :N]
    x = torch.randn(M, K, generator=generator).to(dtype)
    channels = N if axis == "rows" else K
    rows = torch.randperm(channels, generator=generator)[: round(density * channels)].sort().values
    rows = torch.cat([torch.full((empty,), -1), rows])
    shape = (N, K) if not compact else (len(rows), K) if axis == "rows" else (N, len(rows))
    out = torch.randn(shape, generator=generator).to(torch.float32 if compact else dtype) if given_out else None
    accumulate = accumulate and given_out

    wanted = reference(dy.double(), x.double(), rows, axis, compact, None if out is None else out.double(), accumulate)
    got = salient_wgrad(dy, x, rows, axis, compact, out, accumulate)
    assert got.shape == wanted.shape and got.dtype == (torch.float32 if compact else dtype) and got.is_contiguous()
    assert out is None or got is out
    # What fp32 sums of M terms may be off by, in whatever order, and one rounding; of a 16-bit product one more before
    # it is added. How near to torch's own sums they are, many elements tell: test_error_is_that_of_torchs_product.
    magnitude = reference(dy.double().abs(), x.double().abs(), rows, axis, compact)
    product = reference(dy.double(), x.double(), rows, axis, compact).abs()
    rounding = 1.01 * (M + 70) * 2**-24 * magnitude + torch.finfo(got.dtype).eps * wanted.abs()
    if compact or accumulate:
        rounding += torch.finfo(dtype).eps / 2 * product
    assert ((got.double() - wanted).abs() <= rounding).all()


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("M", [100, 600, 5000])
def test_error_is_that_of_torchs_product(M, axis):
    """Over thousands of sums the errors of two good orders are alike; one long chain's is several times that."""
    dy, x = torch.randn(M, 96), torch.randn(M, 96)
    rows = torch.arange(0, 96, 2)
    at = (rows,) if axis == "rows" else (slice(None), rows)
    wanted = (dy.double().t() @ x.double())[at]
    ours, theirs = (
        (got.double() - wanted).square().mean().sqrt()
        for got in (salient_wgrad(dy, x, rows, axis, True), (dy.t() @ x)[at])
    )
    assert ours <= 1.25 * theirs


def test_channels_outside_the_set_are_zero():
    dy, x, rows = torch.randn(50, 20), torch.randn(50, 30), torch.tensor([2, 7, 19])
    dw = salient_wgrad(dy, x, rows)
    outside = [i for i in range(20) if i not in rows.tolist()]
    assert dw[outside].count_nonzero() == 0 and dw[rows].count_nonzero() == dw[rows].numel()


@pytest.mark.parametrize(
    ("rows", "got"), [([3, 8], "3 to 8"), ([3, -1], "-1 to 3"), ([-2], "-2 to -2"), ([4, 4], "4 to 4")]
)
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_channel_that_is_not_there_is_an_error(rows, got, tokens, dtype):
    dy, x, out = torch.randn(tokens, 8).to(dtype), torch.randn(tokens, 32).to(dtype), torch.ones(len(rows), 32)
    with pytest.raises(IndexError, match=f"rows: got channels from {got}, needed them within 0 .. 7"):
        ops.salient_wgrad(dy, x, torch.tensor(rows), compact=True, out=out)
    assert (out == 1).all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("M", [1, 63, 65, 2048, 4501])
def test_compact_rows_are_added_up_in_fp32_where_the_processor_multiplies_bf16(M, accumulate):
    """Odd numbers of tokens, blocks of them, tiles with rows left over, empty slots, operands that lie apart."""
    kernels = pytest.importorskip("longact_kernels.cpu.native.salient_wgrad")
    if not kernels.multiplies():
        pytest.skip("no AVX512-BF16, or AMX beside it")
    generator = torch.Generator().manual_seed(M)
    dy = torch.randn(64, M, generator=generator).bfloat16().T
    x = torch.randn(M, 97, generator=generator).bfloat16()[:, 1:]
    for S in (0, 1, 12, 31):
        rows = torch.randperm(64, generator=generator)[:S].sort().values
        rows = torch.cat([torch.full((3,), -1), rows])
        before = torch.randn(S + 3, 128, generator=generator)
        out = before.clone()[:, :96]
        salient_wgrad(dy, x, rows, "rows", True, out, accumulate)
        products = dy[:, rows[3:]].double().T, x.double()
        wanted = (before[:, :96].double() if accumulate else torch.zeros(S + 3, 96)).clone()
        wanted[3:] += products[0] @ products[1]
        error = 2**-24 * (1.01 * (M + 70) * (products[0].abs() @ products[1].abs()) + wanted[3:].abs())
        assert torch.equal(out[:3], wanted[:3].float()) and ((out[3:] - wanted[3:]).abs() <= error).all()
