"""The CPU's form of `carry_`, with numba and without it, against plain Python."""

import pytest
import torch
from cpu_forms import form, relaxed  # noqa: F401
from hypothesis import given
from test_refresh import carries, check_carry

from longact_kernels import ops
from longact_kernels.reference import refresh as reference


@relaxed
@given(problem=carries())
def test_state_follows_its_channels(problem):
    check_carry(*problem)


def test_lanes_apart_and_sets_apart():
    """States and sets that are views with strides, as slices of what somebody else holds are."""
    state, sets = torch.randn(6, 10), torch.tensor([[0, 3], [0, 0], [4, 4], [0, 0], [7, 9]])
    before = state.clone()
    (kept,) = ops.carry_([[state[:3, ::2]]], [sets[::2, 0]], [sets[::2, 1]])
    assert kept.tolist() == [False, True, False]
    before[[0, 2], ::2] = 0
    assert torch.equal(state, before)


@pytest.mark.parametrize("seed", range(20))
def test_chooses_as_a_stable_sort_does(seed):
    """Among ties, both signs of zero, of NaN and of Inf, and the smallest numbers."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(1, 300, (7,), generator=generator).tolist()
    counts = [int(torch.randint(1, size + 1, (1,), generator=generator)) for size in groups]
    values = torch.randn(sum(groups), generator=generator)
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 0.5])
    places = torch.randint(0, len(values), (len(values) // 2,), generator=generator)
    values[places] = special[torch.randint(0, 9, (len(places),), generator=generator)]
    assert torch.equal(ops.select(values, groups, counts), reference.select(values, groups, counts))
    size = len(values) // 5
    values = values[: 5 * size]
    assert torch.equal(ops.select(values, size, size // 3), reference.select(values, [size], [size // 3]))


@pytest.mark.parametrize("place", ["old", "new"])
@pytest.mark.parametrize("wrong", [[3, 1], [1, 1], [-2, 1], [1, 2**31], [1, -1]])
def test_a_set_that_does_not_ascend_is_named_and_nothing_changes(place, wrong):
    states = [[torch.randn(2, 3)] for _ in range(2)]
    before = [own[0].clone() for own in states]
    sets = {"old": [torch.tensor([0, 1]), torch.tensor([0, 1])], "new": [torch.tensor([1, 2]), torch.tensor([1, 2])]}
    sets[place][1] = torch.tensor(wrong)
    with pytest.raises(IndexError, match=rf"{place}\[1\]: got channels from"):
        ops.carry_(states, **sets)
    assert all(torch.equal(own[0], old) for own, old in zip(states, before, strict=True))
