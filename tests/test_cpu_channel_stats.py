"""The CPU channel statistics against the reference, with numba's kernel and with ATen alone."""

import pytest
import torch
from cpu_forms import form, relaxed  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from longact_kernels.cpu.channel_stats import channel_stats
from longact_kernels.reference.channel_stats import channel_stats as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(got, wanted):
    """Absmax to the bit (any NaN for a NaN), sums to a few roundings."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[1], wanted[1], rtol=2e-6, atol=0, equal_nan=True)


@st.composite
def activations(draw):
    leading = draw(st.lists(st.integers(0, 3), max_size=2))
    tokens, channels = draw(st.integers(0, 300)), draw(st.integers(0, 200))
    step, skip = draw(st.sampled_from([(1, 0), (1, 7), (2, 0)]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(*leading, tokens, channels * step + skip, generator=generator)
    y = y.to(draw(st.sampled_from(DTYPES)))[..., : channels * step : step]
    if y.numel() and draw(st.booleans()):
        flat = torch.randint(0, y.numel(), (3,), generator=generator).tolist()
        for place, value in zip(flat, (float("nan"), float("inf"), -float("inf")), strict=True):
            position = [i.item() for i in torch.unravel_index(torch.tensor(place), y.shape)]
            y[tuple(position)] = value
    mask = torch.rand(y.shape[:-1], generator=generator) < 0.6 if draw(st.booleans()) else None
    return y, mask


@relaxed
@given(activations(), st.booleans())
def test_any_shape_stride_dtype_and_mask(case, l2):
    y, mask = case
    assert_same(channel_stats(y, mask, None, l2), reference(y, mask, None, l2))


@relaxed
@given(st.lists(st.integers(0, 700), min_size=1, max_size=6), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_packed_sequences(bounds, dtype, masked, l2):
    bounds = sorted(bounds)
    y = torch.randn(700, 33, generator=torch.Generator().manual_seed(sum(bounds))).to(dtype)
    mask = y[:, 0] > 0 if masked else None
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert_same(channel_stats(y, mask, cu_seqlens, l2), reference(y, mask, cu_seqlens, l2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_a_channel_counts(dtype):
    """One token of a kind: zeros of both signs, subnormals, the largest number, NaN of either sign and any payload."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    shift = 16 if dtype == torch.float32 else 0
    patterns = (torch.arange(-(2**15), 2**15) << shift).to(integer)
    y = patterns.view(dtype).reshape(4, -1)
    assert_same(channel_stats(y, l2=False), reference(y, l2=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_err_no_more_than_torch(dtype):
    y = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = y.double().square().sum(0)
    ours = (channel_stats(y)[1][0].double() / exact - 1).abs()
    theirs = (y.float().square().sum(0).double() / exact - 1).abs()
    assert ours.max() <= theirs.max() + 2**-24


def test_bits_do_not_depend_on_the_number_of_threads():
    y = torch.randn(3000, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(channel_stats(y))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
