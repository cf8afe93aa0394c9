"""`channel_stats` against an independent fp64 computation, on whatever implementation the device runs."""

import mmap
import os

import exact_interpreter  # noqa: F401
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic import count_bytes

from longact_kernels import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter takes milliseconds for what compiled code does in microseconds.
examples = settings(max_examples=25 if INTERPRETED else 60, deadline=None, derandomize=True)


def expected(y, mask, bounds):
    """absmax and sums of squares in fp64, one sequence after the other."""
    tokens = y.detach().cpu().double().abs().reshape(y.shape[:-1].numel(), y.shape[-1])
    kept = torch.ones(len(tokens), dtype=torch.bool) if mask is None else mask.cpu().reshape(-1)
    sequences = [tokens[start:end][kept[start:end]] for start, end in bounds]
    zero = torch.zeros(1, y.shape[-1], dtype=torch.float64)
    absmax = torch.cat([zero, *sequences]).amax(0)
    return absmax, torch.stack([zero[0], *((s * s).sum(0) for s in sequences)])[1:]


def check(y, mask=None, cu_seqlens=None):
    N = y.shape[-1]
    if cu_seqlens is not None:
        bounds = list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
    else:
        T = y.shape[-2]
        bounds = [(T * b, T * (b + 1)) for b in range(y.shape[:-2].numel() if y.ndim > 2 else 1)]
    absmax, sumsq = ops.channel_stats(y, mask, cu_seqlens)
    want_absmax, want_sumsq = expected(y, mask, bounds)
    assert absmax.dtype == sumsq.dtype == torch.float32
    assert absmax.shape == (N,) and sumsq.shape == (len(bounds), N)
    # Exact, NaN and Inf included.
    assert torch.equal(absmax.cpu().double().nan_to_num(nan=-1.0), want_absmax.nan_to_num(nan=-1.0))
    # fp32 sums of T squares: a rounding for each of at most CHUNK / BLOCK_M + log2 additions, far below 2^-17.
    torch.testing.assert_close(sumsq.cpu().double(), want_sumsq, rtol=2.0**-17, atol=1e-37, equal_nan=True)
    only_absmax, none = ops.channel_stats(y, mask, cu_seqlens, l2=False)
    assert torch.equal(only_absmax.nan_to_num(nan=-1.0), absmax.nan_to_num(nan=-1.0)) and none.shape == (0, N)


@st.composite
def activations(draw):
    shape = draw(
        st.sampled_from([(7, 5), (1, 1), (33, 130), (2, 9, 16), (3, 1, 40), (2, 2, 5, 8), (4, 0, 6), (0, 3, 6)])
    )
    if draw(st.booleans()):
        shape = (draw(st.integers(0, 70)), draw(st.integers(0, 300)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    y = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    layout = draw(st.sampled_from(["contiguous", "row stride", "channel stride"]))
    if layout == "row stride":
        y = torch.cat([y, y], -1)[..., : shape[-1]]
    elif layout == "channel stride":
        y = torch.stack([y, y], -1)[..., 0]
    y = y.to(DEVICE, draw(st.sampled_from(DTYPES)))
    if y.numel() and draw(st.booleans()):
        at = tuple(draw(st.integers(0, n - 1)) for n in shape)
        y[at] = draw(st.sampled_from([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0]))
    mask = torch.rand(shape[:-1], generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return y, mask.to(DEVICE) if draw(st.booleans()) else None


@given(activations())
@examples
def test_matches_fp64(case):
    check(*case)


@given(activations(), st.data())
@examples
def test_packed_sequences_match_fp64(case, data):
    y, mask = case
    y = y.reshape(y.shape[:-1].numel(), y.shape[-1])
    bounds = sorted(data.draw(st.lists(st.integers(0, len(y)), min_size=1, max_size=6)))
    check(y, mask if mask is None else mask.reshape(-1), torch.tensor(bounds, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("bounds", [None, [0, 1024, 2050], [3, 1000, 1000, 1030, 2048, 2049], [1024, 1025]])
def test_sequences_longer_than_a_piece(bounds):
    y = torch.randn(2050, 24, device=DEVICE)
    check(y, None, None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE))


def test_same_bits_every_time():
    y = torch.randn(3, 1500, 40, device=DEVICE)
    first, second = ops.channel_stats(y), ops.channel_stats(y)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_error_is_no_worse_than_torchs():
    y = torch.randn(1, 4096, 16, device=DEVICE)
    exact = y.double().square().sum(1)
    ours = (ops.channel_stats(y)[1] - exact).abs().max()
    theirs = (y.square().sum(1) - exact).abs().max()
    assert ours <= theirs + exact.max() * 2.0**-24


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(masked, packed):
    y = torch.randn(12, 10, device=DEVICE)
    mask = torch.rand(12, device=DEVICE) < 0.5 if masked else None
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE) if packed else None
    torch.library.opcheck(torch.ops.longact.channel_stats.default, (y, mask, cu_seqlens, True))


@pytest.mark.skipif(INTERPRETED, reason="traces no kernel code, so that once is enough")
def test_compiles_into_one_graph():
    def f(y):
        absmax, sumsq = ops.channel_stats(y * 2)
        return absmax + 1, sumsq.sqrt().mean(0)

    y = torch.randn(2, 6, 8, device=DEVICE)
    for ours, eager in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(y), f(y), strict=True):
        torch.testing.assert_close(ours, eager)


def test_bad_arguments_are_named():
    y = torch.randn(2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"mask: .*\[2, 3\]"):
        ops.channel_stats(y, torch.ones(3, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match=r"y: got torch.int64"):
        ops.channel_stats(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="cu_seqlens"):
        ops.channel_stats(y[0], None, torch.tensor([0.0, 3.0], device=DEVICE))
    with pytest.raises(ValueError, match="cu_seqlens"):
        ops.channel_stats(y, None, torch.tensor([0, 3], device=DEVICE))


@pytest.mark.skipif(not INTERPRETED, reason="counts the accesses of interpreted kernels")
@pytest.mark.parametrize("masked", [False, True])
def test_bytes_moved_are_the_tensor_and_one_percent(masked):
    from longact_kernels.budgets import channel_stats_work

    y = torch.randn(1, 2048, 256).bfloat16()
    mask = torch.ones(1, 2048, dtype=torch.bool) if masked else None
    with count_bytes() as moved:
        ops.channel_stats(y, mask)
    work = channel_stats_work(2048, 256, 2, masked)
    assert moved["read"] + moved["written"] == work.moved
    assert work.minimum == y.nbytes + (mask.nbytes if masked else 0)
    # Blocks of channels after the first find the mask in the cache.
    cached = mask.nbytes if masked else 0
    assert work.moved - cached <= 1.01 * work.minimum


@pytest.mark.skipif(not INTERPRETED, reason="runs a kernel on a sparse address range")
def test_offsets_beyond_2_31_elements():
    from longact_kernels.csrc_triton.channel_stats import CHUNK, PARTIAL, channel_stats_partial

    # Tokens 2^21 elements from one another, in memory that exists only where a token is kept: the last one of the first
    # piece and those of the second lie beyond 2^31.
    T, stride = 1100, 2**21 + 2**12
    memory = mmap.mmap(-1, 2 * (T * stride + 16))
    mask = torch.zeros(T, dtype=torch.bool)
    for token, value in ((0, 1.0), (CHUNK - 1, -3.0), (CHUNK + 7, 2.0)):
        mask[token] = True
        torch.frombuffer(memory, dtype=torch.bfloat16, count=16, offset=2 * token * stride).fill_(value)
    y = torch.frombuffer(memory, dtype=torch.bfloat16, count=16)
    absmax, sumsq = torch.empty(2, 16, dtype=torch.int32), torch.empty(2, 16)
    sizes = (1, T, 16, 2, 0, stride)
    channel_stats_partial[(2, 1)](y, mask.view(torch.uint8), None, absmax, sumsq, *sizes, **PARTIAL["aligned"])
    assert absmax.view(torch.float32)[:, 0].tolist() == [3.0, 2.0] and sumsq[:, 0].tolist() == [10.0, 4.0]
