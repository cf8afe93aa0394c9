"""What a model's call says about its tokens."""

import torch
from conftest import tiny_model

from longact_kernels.tokens import Tokens, on_tokens

IDS = torch.zeros(2, 3, dtype=torch.long)
MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])


def taken(*args, train=True, **kwargs) -> Tokens | None:
    """What the outer of a model's two calls says."""
    seen = []
    model = tiny_model().train(train)
    list(on_tokens(model, seen.append))
    model(*args, **kwargs)
    assert len(seen) in (0, 2), "the model and the one that it wraps"
    return seen[0] if seen else None


def test_padding_mask_by_position_and_by_name():
    for seen in (taken(IDS, MASK), taken(input_ids=IDS, attention_mask=MASK)):
        assert torch.equal(seen.mask, MASK.bool()) and seen.cu_seqlens is None
    assert taken(IDS) == Tokens()
    assert taken(IDS, attention_mask=torch.zeros(2, 1, 3, 3)) == Tokens()


def test_evaluation_says_nothing():
    assert taken(IDS, MASK, train=False) is None
    with torch.no_grad():
        assert taken(IDS, MASK) is None


def test_packed_sequences_by_their_positions_and_by_their_bounds():
    ids = torch.zeros(1, 6, dtype=torch.long)
    seen = taken(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 0]]))
    assert seen.mask is None and seen.cu_seqlens.tolist() == [0, 3, 5, 6]
    # The rest of a sequence whose beginning lies in a cache.
    assert taken(ids, position_ids=torch.tensor([[4, 5, 6, 0, 1, 2]])).cu_seqlens.tolist() == [0, 3, 6]
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert taken(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]), cu_seq_lens_q=bounds).cu_seqlens is bounds
    assert taken(torch.zeros(2, 3, dtype=torch.long), position_ids=torch.arange(3).expand(2, 3)) == Tokens()


def test_the_part_that_fits_an_activation():
    x = torch.zeros(2, 3, 5)
    cached = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(Tokens(cached).of(x).mask, cached[:, 2:])
    assert Tokens(cached[:1]).of(x) == Tokens() == Tokens(cached).of(x[0])
    bounds = torch.tensor([0, 1, 3])
    assert Tokens(None, bounds).of(x) == Tokens() and Tokens(None, bounds).of(x[:1]).cu_seqlens is bounds
