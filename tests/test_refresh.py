"""`select` and `carry_` against plain Python."""

import math
import mmap

import exact_interpreter  # noqa: F401
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traffic import count_bytes

from longact_kernels import ops
from longact_kernels.ops.dispatch import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = 8 if interpreted() else 40
SHARED = torch.zeros(2, 2)


def chosen_of(values: list[float], count: int) -> list[int]:
    """By largest value, NaN above all; of equal values by lower index."""
    order = sorted(
        range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i] if values[i] == values[i] else 0, i)
    )
    return sorted(order[:count])


def few_values():
    """Values that tie often, with everything that compares in its own way."""
    # Exact in fp32: two that differ here and round to one there would tie for `select` alone.
    special = [0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-149), 2.0**127]
    return st.one_of(st.sampled_from(special), st.floats(width=32))


@settings(deadline=None, max_examples=EXAMPLES)
@given(data=st.data(), group=st.integers(1, 40), times=st.integers(0, 4))
def test_selects_the_largest_of_every_group(data, group, times):
    count = data.draw(st.integers(1, group))
    values = data.draw(st.lists(few_values(), min_size=group * times, max_size=group * times))
    expected = [g + i for g in range(0, group * times, group) for i in chosen_of(values[g : g + group], count)]
    index = ops.select(torch.tensor(values, device=DEVICE), group, count)
    assert index.dtype == torch.int64 and index.tolist() == expected


@settings(deadline=None, max_examples=EXAMPLES)
@given(data=st.data(), groups=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_selects_from_groups_of_different_sizes(data, groups):
    counts = [data.draw(st.integers(1, group)) for group in groups]
    values = data.draw(st.lists(few_values(), min_size=sum(groups), max_size=sum(groups)))
    expected, start = [], 0
    for group, count in zip(groups, counts, strict=True):
        expected += [start + i for i in chosen_of(values[start : start + group], count)]
        start += group
    assert ops.select(torch.tensor(values, device=DEVICE), groups, counts).tolist() == expected


@pytest.mark.parametrize("n", [512, 1300])
def test_selects_from_groups_larger_than_a_block(n):
    values = torch.randint(0, 40, (n,), generator=torch.Generator().manual_seed(n)).float()
    assert ops.select(values.to(DEVICE), n, n * 3 // 10).tolist() == chosen_of(values.tolist(), n * 3 // 10)


@pytest.mark.parametrize(("group", "count"), [(4, 1), (5, 6), (5, 0), ([4, 5], 1), ([5, 5], [1]), (5, [1, 1])])
def test_a_choice_that_cannot_be_made_is_an_error(group, count):
    with pytest.raises(ValueError, match="select: cannot choose"):
        ops.select(torch.zeros(10), group, count)


@st.composite
def carries(draw):
    """Layers of different sizes with their states, and the sets before and after."""
    axis = draw(st.sampled_from(["rows", "columns"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    states, old, new = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        S, K = draw(st.integers(1, 80)), draw(st.sampled_from([1, 3, 4, 8, 130]))
        N = S + draw(st.integers(0, 40))
        for sets in (old, new):
            chosen = torch.randperm(N, generator=generator)[:S].sort().values
            chosen[: draw(st.integers(0, min(S, 5)))] = -1
            sets.append(chosen.to(DEVICE))
        moment = torch.randn((S, K) if axis == "rows" else (K, S), generator=generator)
        wide = torch.randn(S, K + 1, generator=generator)[:, :K] if axis == "rows" else moment.clone()
        steps = torch.randint(1, 99, (S,), dtype=torch.int32, generator=generator)
        states.append([state.to(DEVICE) for state in (moment, wide, steps)][: draw(st.integers(0, 3))])
    return states, old, new, axis


@settings(deadline=None, max_examples=EXAMPLES)
@given(problem=carries())
def test_state_follows_its_channels(problem):
    check_carry(*problem)


def check_carry(states, old, new, axis):
    expected = []
    for layer, before, after in zip(states, old, new, strict=True):
        place = {channel: slot for slot, channel in enumerate(before.tolist()) if channel >= 0}
        for state in layer:
            lines = state if axis == "rows" or state.ndim == 1 else state.T
            moved = [lines[place[c]] if c in place else torch.zeros_like(lines[0]) for c in after.tolist()]
            moved = torch.stack(moved)
            expected.append(moved if axis == "rows" or state.ndim == 1 else moved.T)
    kept = ops.carry_(states, old, new, axis)
    for layer, before, after in zip(kept, old, new, strict=True):
        stays = [c >= 0 and c in set(before.tolist()) for c in after.tolist()]
        assert layer.dtype == torch.bool and layer.tolist() == stays
    for state, moved in zip((state for layer in states for state in layer), expected, strict=True):
        assert torch.equal(state, moved)


def test_every_bit_pattern_is_carried():
    """State moves as words: NaN payloads and negative zero come out as they went in."""
    words = torch.tensor([[0x7FC00001, -(2**31)], [0x7F800001, 1], [5, -1]], dtype=torch.int32, device=DEVICE)
    state = words.view(torch.float32).clone()
    ops.carry_([[state]], [torch.tensor([0, 1, 4], device=DEVICE)], [torch.tensor([1, 2, 4], device=DEVICE)])
    assert torch.equal(state.view(torch.int32), torch.stack([words[1], torch.zeros_like(words[0]), words[2]]))


@pytest.mark.skipif(not interpreted(), reason="counts the accesses of interpreted kernels")
def test_carry_moves_what_changes_place_and_nothing_else():
    """Five rows stay where they were, one moves, one is new: two rows written, one read, and the tables."""
    state = torch.randn(7, 512)
    old = torch.tensor([0, 1, 2, 3, 4, 8, 9], device=DEVICE)
    new = torch.tensor([0, 1, 2, 3, 4, 9, 20], device=DEVICE)
    tables = 6 * 8 + 2 * 4
    with count_bytes() as moved:
        ops.carry_([[state]], [old], [new])
    assert moved["read"] == state[0].nbytes + tables + 2 * (4 + 4)
    assert moved["written"] == 2 * state[0].nbytes
    with count_bytes() as moved:
        ops.carry_([[state]], [new], [new])
    assert moved["read"] == tables and moved["written"] == 0


@pytest.mark.parametrize("n", [300, 20_000])
def test_zeros_and_nans_of_either_sign_tie(n):
    """However large the group, and so whatever chooses in it."""
    values = torch.zeros(n)
    values[1::2] = -0.0
    values[n // 2], values[5] = torch.nan, -torch.tensor(torch.nan)
    assert values[5].view(torch.int32) < 0
    assert ops.select(values.to(DEVICE), n, 4).tolist() == [0, 1, 5, n // 2]
    assert ops.select(values.to(DEVICE), [n - 3, 3], [1, 1]).tolist() == [5, n - 3]


@pytest.mark.skipif(not interpreted(), reason="runs a kernel on a sparse address range")
@pytest.mark.parametrize("K", [8, 3])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_carries_across_more_than_2_31_elements(axis, K):
    """Slots (or, along columns, lanes) that lie 2^30 elements apart, aligned and not."""
    far = 2**30 + 64
    values = torch.rand((3, K) if axis == "rows" else (3, 4))
    memory = mmap.mmap(-1, 4 * (2 * far + 16) + 4096)
    state = torch.frombuffer(memory, dtype=torch.float32).as_strided(values.shape, (far, 1)).copy_(values)
    old, new = (torch.tensor([1, 2, 5]), torch.tensor([2, 5, 9])) if axis == "rows" else (
        torch.tensor([1, 2, 5, 9]), torch.tensor([0, 1, 2, 9])
    )  # fmt: skip
    ops.carry_([[state]], [old], [new], axis)
    zero = torch.zeros(K) if axis == "rows" else torch.zeros(3)
    lines = values if axis == "rows" else values.T
    wanted = torch.stack([lines[1], lines[2], zero] if axis == "rows" else [zero, lines[0], lines[1], lines[3]])
    assert torch.equal(state, wanted if axis == "rows" else wanted.T)


def test_nothing_to_carry():
    assert ops.carry_([], [], []) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(states=[]), "carry: got states, old and new of 0, 1 and 1 layers"),
        (dict(new=[torch.arange(3)]), "new\\[0\\]: got \\[3\\], needed the shape of the old set"),
        (dict(states=[[torch.zeros(3, 2)]]), "states\\[0\\]: got torch.float32 \\[3, 2\\]"),
        (dict(states=[[torch.zeros(2, 3)]], axis="columns"), "states\\[0\\]: got .* 2 slots along columns"),
        (dict(states=[[torch.zeros(2, 2).half()]]), "states\\[0\\]: got torch.float16"),
        (dict(axis="row"), "axis: got 'row'"),
        (dict(states=[[SHARED, SHARED]]), "states: two of them share memory"),
        (dict(states=[[SHARED.flatten()[:2], SHARED.flatten()[1:3]]]), "states: two of them share memory"),
        (dict(states=[[torch.zeros(2, 2)._neg_view()]]), "negated"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {"states": [[torch.zeros(2, 2)]], "old": [torch.arange(2)], "new": [torch.arange(2)]}
    with pytest.raises(ValueError, match=message):
        ops.carry_(**{**arguments, **change})


@pytest.mark.skipif(interpreted(), reason="the same without the interpreter")
def test_are_well_formed_operators():
    saliency = torch.rand(20, device=DEVICE)
    torch.library.opcheck(torch.ops.longact.select.default, (saliency, [10], [3]))
    torch.library.opcheck(torch.ops.longact.select.default, (saliency, [8, 12], [3, 1]))
    old, new = torch.tensor([0, 2], device=DEVICE), torch.tensor([2, 3], device=DEVICE)
    states = [torch.rand(2, 4, device=DEVICE), torch.ones(2, dtype=torch.int32, device=DEVICE)]
    torch.library.opcheck(torch.ops.longact.carry_.default, (states, [0, 0], [old], [new], False))


@pytest.mark.skipif(interpreted(), reason="the same without the interpreter")
def test_compiles_into_one_graph():
    def refreshed(saliency, old, state):
        new = ops.select(saliency, 10, 3)
        return ops.carry_([[state]], [old], [new])[0], state

    saliency, old, state = (
        torch.rand(20, device=DEVICE),
        torch.arange(6, device=DEVICE),
        torch.rand(6, 4, device=DEVICE),
    )
    eager = refreshed(saliency, old, state.clone())
    for ours, expected in zip(
        torch.compile(refreshed, fullgraph=True, backend="aot_eager")(saliency, old, state.clone()), eager, strict=True
    ):
        assert torch.equal(ours, expected)
