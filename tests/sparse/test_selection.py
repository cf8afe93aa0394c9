"""Selection against a plain transcription of what competes with what."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longact_kernels.sparse.selection import Selection, share


def best(saliency: dict[int, float], count: int) -> set[int]:
    """The channels of largest saliency; of equals the lower."""
    return set(sorted(saliency, key=lambda channel: (-saliency[channel], channel))[:count])


def expected(layers, saliency, densities, scope, strategy, threshold=1.0) -> list[set[int]]:
    """The sets, by layer, channels counted from the layer's first."""
    sets, candidates, total, start = [], {}, Fraction(0), 0
    for i, (runs, density) in enumerate(zip(layers, densities, strict=True)):
        chosen, heads, at = set(), {}, 0
        for head, (size, kind) in enumerate(runs):
            channels = range(at, at + size)
            at += size
            if kind is None:
                chosen |= set(channels)
            else:
                alone = scope == "head" and kind != "other"
                heads.setdefault((kind, head) if alone else kind, []).extend(channels)
        means = {}
        for kind in {kind for _, kind in runs if kind}:
            members = [c for group, cs in heads.items() if group in (kind, *((kind, h) for h in range(99))) for c in cs]
            means |= dict.fromkeys(members, sum(saliency[start + c] for c in members) / len(members))
        for members in heads.values():
            values = {c: saliency[start + c] * (-1 if strategy == "bottom" else 1) for c in members}
            bound = share(min(1, 2 * density) if scope == "model" else density, len(members))
            taken = best(values, bound)
            if scope == "model":
                total += Fraction(density) * len(members)
                candidates |= {(i, c): values[c] for c in taken}
            if strategy == "threshold":
                taken = {c for c in taken if values[c] > threshold * means[c]}
            chosen |= taken
        sets.append(chosen)
        start += at
    if scope == "model":
        winners = best(candidates, share(1.0, float(total)))
        sets = [{c for c in chosen if (i, c) not in candidates or (i, c) in winners} for i, chosen in enumerate(sets)]
    return sets


LAYERS = st.lists(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["q", "k", "other", None])), min_size=1, max_size=6).filter(
        lambda runs: any(kind for _, kind in runs)
    ),
    min_size=1,
    max_size=4,
)


@given(
    layers=LAYERS,
    shares=st.lists(st.sampled_from([0.0625, 0.25, 0.3125, 0.5, 1.0]), min_size=4, max_size=4),
    scope=st.sampled_from(["head", "layer", "model"]),
    strategy=st.sampled_from(["top", "bottom", "threshold"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sets_are_those_of_the_plain_transcription(layers, shares, scope, strategy, seed):
    densities = shares[: len(layers)]
    n = sum(size for runs in layers for size, _ in runs)
    # Quarters: many ties, and means without rounding.
    saliency = torch.randint(0, 16, (n,), generator=torch.Generator().manual_seed(seed)) / 4
    selection = Selection(layers, densities, scope, strategy, 1.0, 0)
    sets = selection(saliency, 0).split(selection.sizes)
    assert [len(rows) for rows in sets] == selection.sizes
    wanted = expected(layers, saliency.tolist(), densities, scope, strategy)
    for rows, chosen in zip(sets, wanted, strict=True):
        empty = int((rows < 0).sum())
        assert rows.tolist() == [-1] * empty + sorted(chosen)


def test_random_takes_any_channels_the_same_ones_at_every_run():
    layers = [[(8, "q"), (8, "q"), (4, None)], [(8, "k")]]
    draws = []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        selection = Selection(layers, [0.25] * 2, "head", "random", 1.0, seed)
        draws.append(selection(torch.zeros(28), step).tolist())
        q, k = selection(torch.zeros(28), step).split(selection.sizes)
        assert [int(((q >= a) & (q < b)).sum()) for a, b in ((0, 8), (8, 16), (16, 20))] == [2, 2, 4] and len(k) == 2
    assert draws[0] == draws[1] and draws[0] != draws[2] and draws[0] != draws[3]


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
def test_rotary_pairs_enter_together_by_the_larger_of_their_saliencies(scope):
    # Two heads of eight, half-split pairs: i with i + 4.
    partners = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11])
    saliency = torch.zeros(32)
    saliency[[5, 2, 8, 9]] = torch.tensor([4.0, 3.0, 2.0, 2.0])
    saliency[16:] = saliency[:16] / 8
    layers = [[(8, "q"), (8, "q")], [(8, "k"), (8, "k")]]
    selection = Selection(layers, [0.25] * 2, scope, "top", 1.0, 0, [partners, partners])
    first, second = (rows[rows >= 0].tolist() for rows in selection(saliency, 0).split(selection.sizes))
    assert first == {"head": [1, 5, 8, 12], "layer": [1, 2, 5, 6], "model": [1, 2, 5, 6, 8, 9, 12, 13]}[scope]
    assert second == {"head": [1, 5, 8, 12], "layer": [1, 2, 5, 6], "model": []}[scope]


def test_a_tie_splits_no_pair():
    partners = torch.tensor([2, 3, 0, 1])
    rows = Selection([[(4, "q")]], [0.5], "head", "top", 1.0, 0, [partners])(torch.ones(4), 0)
    assert rows.tolist() == [0, 2]


def test_a_threshold_that_nothing_reaches_leaves_empty_slots():
    selection = Selection([[(4, "q"), (2, None)], [(4, "k")]], [0.5] * 2, "head", "threshold", 1.0, 0)
    sets = selection(torch.tensor([1.0, 1, 1, 1, 9, 9, 0, 0, 4, 0]), 0).split(selection.sizes)
    assert [rows.tolist() for rows in sets] == [[-1, -1, 4, 5], [-1, 2]]
