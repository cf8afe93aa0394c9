"""`channel_stats` against an independent fp64 computation, on whatever implementation the device runs."""

import os

import exact_interpreter  # noqa: F401
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_memory import SparseMemory, program
from traffic import count_bytes

from longact_kernels import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter takes milliseconds for what compiled code does in microseconds.
examples = settings(max_examples=25 if INTERPRETED else 60, deadline=None)


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
    """Over many channels: of a single one the last bit alone decides. A sum rounded once is as good as can be."""
    y = torch.randn(4, 1024, 64, device=DEVICE)
    exact = y.double().square().sum(1)

    def error(sums):
        return (sums.double() / exact - 1).square().mean().sqrt()

    ours, theirs, once = (error(sums) for sums in (ops.channel_stats(y)[1], y.square().sum(1), exact.float()))
    assert ours <= theirs + once


def test_more_packed_sequences_than_a_block_holds():
    bounds = torch.randint(0, 400, (140,), device=DEVICE).sort().values.int()
    check(torch.randn(400, 20, device=DEVICE), torch.rand(400, device=DEVICE) < 0.9, bounds)


@pytest.mark.parametrize("bounds", [[0, 50_000_000], [2, 5, 2**40], [-(2**40), 3], [-1, 8], [-5000, 3], [9, 12]])
def test_bounds_beyond_the_tokens(bounds):
    """An error on a CPU; where the host does not look, they are held within the tokens: no neighbour is read."""
    memory = torch.full((24, 16), torch.nan, device=DEVICE)
    y, cu_seqlens = memory[8:16], torch.tensor(bounds, device=DEVICE)
    y.copy_(torch.randn(8, 16))
    if DEVICE == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match=r"^cu_seqlens: got \[.*needed bounds that ascend within 0 .. 8"):
            ops.channel_stats(y, None, cu_seqlens)
    else:
        for ours, held in zip(
            ops.channel_stats(y, None, cu_seqlens), ops.channel_stats(y, None, cu_seqlens.clamp(0, 8)), strict=True
        ):
            assert torch.equal(ours, held) and ours.isfinite().all()


def test_bounds_that_do_not_ascend():
    """An error on a CPU; elsewhere the result means nothing, and neither does it read a neighbour."""
    memory = torch.full((24, 16), torch.nan, device=DEVICE)
    y, cu_seqlens = memory[8:16], torch.tensor([7, 1, 9, -5, 8, 0], device=DEVICE)
    y.copy_(torch.randn(8, 16))
    if DEVICE == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match=r"^cu_seqlens: got \[7, 1"):
            ops.channel_stats(y, None, cu_seqlens)
    else:
        assert ops.channel_stats(y, None, cu_seqlens)[0].isfinite().all()


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
def test_bytes_moved_are_those_of_the_roofline(masked):
    from longact_kernels.compiled.rooflines import channel_stats_work

    y = torch.randn(1, 512, 128).bfloat16()
    mask = torch.ones(1, 512, dtype=torch.bool) if masked else None
    with count_bytes() as moved:
        ops.channel_stats(y, mask)
    work = channel_stats_work(512, 128, 2, masked)
    assert moved["read"] + moved["written"] == work.moved
    assert work.minimum == y.nbytes + (mask.nbytes if masked else 0)
    # Qwen3-8B's q_proj; blocks of channels after the first find the mask in the cache.
    work = channel_stats_work(32768, 4096, 2)
    assert work.moved <= 1.01 * work.minimum


@pytest.mark.skipif(INTERPRETED, reason="the same without the interpreter")
@pytest.mark.parametrize("M, N", [(2048, 576), (2048, 4096), (32768, 1024), (32768, 4096)])
def test_enough_programs_run(M, N):
    kernels = pytest.importorskip("longact_kernels.csrc_triton.channel_stats")
    assert -(-M // kernels.chunk_of(M, N)) * -(-N // kernels.BLOCK_N) >= 1000


# Addresses beyond 2^31 elements, on the interpreter: one program each, in memory that exists only where it is touched

far = pytest.mark.skipif(not INTERPRETED, reason="runs single programs on a sparse address range")
FAR = 2**31 + 2**10


def partial(index, y, mask, bounds, B, T, chunk, chunks, strides):
    """absmax and sum of squares that one program finds in the first of 16 channels."""
    from longact_kernels.csrc_triton.channel_stats import channel_stats_partial, partial_config

    found = torch.empty(2, 6, 16)
    with program(index, 0):
        channel_stats_partial[(1, 1)](
            y, mask, bounds, found, B, T, 16, 6, chunk, chunks, *strides, **partial_config("sm_90", 2, True)
        )
    return tuple(found[:, index, 0].tolist())


@far
@pytest.mark.parametrize("packed", [False, True])
def test_tokens_far_apart(packed):
    y, stride, T = SparseMemory(3 * FAR, torch.bfloat16), FAR // 32, 80
    for token in range(T):
        y.at(token * stride, 16).fill_(token)
    bounds = torch.tensor([0, T]) if packed else None
    # All tokens in one piece, which is longer than a tile; and 40 in each of two, the second beyond 2^31.
    for piece, chunk, tokens in ((0, T, range(T)), (1, 40, range(40, T))):
        wanted = T - 1, sum(t * t for t in tokens)
        assert partial(piece, y.at(0), None, bounds, 1, T, chunk, T // chunk, (0, stride)) == wanted


@far
def test_sequences_far_apart():
    y, stride = SparseMemory(3 * 2**30, torch.bfloat16), 2**30 + 16
    y.at(2 * stride, 16).fill_(3.0)
    assert partial(2, y.at(0), None, None, 3, 1, 16, 1, (stride, 16)) == (3.0, 9.0)


@far
def test_a_mask_of_many_tokens():
    mask, T, y = SparseMemory(FAR + 2**30, torch.uint8), 2**30 + 8, torch.full((16,), 2.0)
    mask.at(3 * T - 3).fill_(1)
    # The last tokens of the third sequence; all tokens are one and the same in memory.
    assert partial(5, y, mask.at(0), None, 3, T, T - 8, 2, (0, 0)) == (2.0, 4.0)


@far
def test_partial_results_far_apart():
    from longact_kernels.csrc_triton.channel_stats import (
        MERGE,
        channel_stats_merge,
        channel_stats_partial,
        partial_config,
    )

    # The last of so many pieces, each of them one sequence of one token.
    N, pieces, y = 2**20, 2**11 + 2, torch.arange(64.0)
    found, sums, absmax = *(SparseMemory(n * pieces * N, torch.float32) for n in (2, 1)), torch.empty(64)
    last = pieces - 1
    with program(last, 0):
        channel_stats_partial[(1, 1)](
            y, None, None, found.at(0), pieces, 1, N, pieces, 16, 1, 0, 0, **partial_config("sm_90", 2, True)
        )
    assert torch.equal(found.at(last * N, 64), y)
    assert torch.equal(found.at((pieces + last) * N, 64), y.square())
    for row in (0, pieces):
        with program(row, 0):
            channel_stats_merge[(1, 1)](found.at(0), None, absmax, sums.at(0), 1, N, pieces, 16, 1, **MERGE)
    assert torch.equal(absmax, y) and torch.equal(sums.at(last * N, 64), y.square())
