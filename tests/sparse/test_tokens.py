"""What a model's call says about its tokens."""

import inspect

import pytest
import torch
from models import tiny_model

from longact_kernels.sparse.tokens import Call, Tokens, tell_tokens

IDS = torch.zeros(2, 3, dtype=torch.long)
MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])


def taken(*args, l2=True, pad=None, **kwargs) -> tuple:
    """Mask and bounds of an activation inside a model's call."""
    seen = []
    model = tiny_model(pad_token_id=pad)
    call = Call(lambda: None, lambda: None)
    tell_tokens(model, call)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, inputs, y: seen.append(call.tokens_now().of(y, l2))
    )
    model(*args, **kwargs)
    assert call.tokens.mask is None, "what a call says ends with it"
    return seen[0]


def test_padding_mask_by_position_and_by_name():
    for mask, bounds in (taken(IDS, MASK), taken(input_ids=IDS, attention_mask=MASK.float())):
        assert torch.equal(mask, MASK.bool()) and bounds is None
    assert taken(IDS) == (None, None)


def test_a_call_without_gradients_says_nothing():
    with torch.no_grad():
        assert taken(IDS, MASK) == (None, None)


def test_packed_sequences_by_their_positions_and_by_their_bounds():
    ids = torch.ones(1, 6, dtype=torch.long)
    assert taken(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 0]]))[1].tolist() == [0, 3, 5, 6]
    # The rest of a sequence whose beginning lies in a cache.
    assert taken(ids, position_ids=torch.tensor([[4, 5, 6, 0, 1, 2]]))[1].tolist() == [0, 3, 6]
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert taken(ids, position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]), cu_seq_lens_q=bounds)[1] is bounds
    # Every row begins a sequence, and the largest magnitude asks for none.
    two = torch.ones(2, 3, dtype=torch.long)
    assert taken(two, position_ids=torch.tensor([[0, 1, 0], [0, 1, 2]]))[1].tolist() == [0, 2, 3, 6]
    assert taken(two, position_ids=torch.tensor([[0, 1, 0], [0, 1, 2]]), l2=False)[1] is None


def test_the_layers_of_a_call_share_the_bounds_of_its_sequences():
    tokens = Tokens(positions=torch.tensor([[0, 1, 0, 1, 2, 0]]))
    wide, flat = torch.ones(1, 6, 4), torch.ones(6, 4)
    first, second = tokens.of(wide, True)[1], tokens.of(wide + 1, True)[1]
    assert second is first and first.tolist() == [0, 2, 5, 6], "on a GPU, each layer would wait for the device"
    assert tokens.of(flat, True)[1].tolist() == [0, 2, 5, 6] and tokens.of(wide, False)[1] is None
    # Another number of tokens has bounds of its own: what comes behind cached keys.
    assert tokens.of(wide[:, :4], True)[1].tolist() == [0, 3, 4]
    assert Tokens(positions=torch.tensor([[0, 1, 2, 0, 1, 2]])).of(wide, True)[1].tolist() == [0, 3, 6]


@pytest.mark.parametrize(
    ("ids", "positions", "counted"),
    [
        ([5, 6, 0, 0, 0], [0, 1, 0, 1, 2], [1, 1, 0, 0, 0]),
        ([5, 9, 9, 0, 9], [0, 1, 2, 0, 0], [1, 1, 1, 0, 0]),  # 9 is the model's; a sequence may end with it
        ([5, 6, 0, 7, 0], [0, 1, 0, 1, 2], [1, 1, 1, 1, 1]),
        ([0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [1, 1, 1, 1, 1]),
    ],
)
def test_padding_that_ends_a_packed_row_does_not_count(ids, positions, counted):
    mask, _ = taken(torch.tensor([ids]), pad=9, position_ids=torch.tensor([positions]), l2=False)
    assert mask.int().tolist() == [counted]


def queries(mask: torch.Tensor, unmasked: bool) -> torch.Tensor:
    """The causal mask of queries, as transformers makes it of a padding mask."""
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    allowed = (causal & mask.bool()[:, None, :]).unsqueeze(1)
    return allowed | (~allowed.any(-1, keepdim=True) if unmasked else False)


@pytest.mark.parametrize("unmasked", [False, True])
@pytest.mark.parametrize("mask", [[[0, 0, 1], [1, 1, 1]], [[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]]])
def test_a_mask_of_queries_is_read(mask, unmasked):
    mask = torch.tensor(mask)
    allowed = queries(mask, unmasked)
    added = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    for form in (allowed, added, added.clamp(min=-1e4), added.expand(-1, 4, -1, -1)):
        assert torch.equal(taken(IDS, form, l2=False)[0], mask.bool())
    with pytest.raises(ValueError, match=r"attention_mask: its form .* position_ids"):
        taken(IDS, allowed)


def test_a_mask_of_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="attention_mask: got a str"):
        taken(IDS, "padding")


def test_the_part_that_fits_an_activation():
    x = torch.zeros(2, 3, 5)
    cached = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(Tokens(cached).of(x, False)[0], cached[:, 2:])
    assert torch.equal(Tokens(MASK.bool()).of(x.flatten(0, 1), True)[0], MASK.bool().flatten())
    for y in (x[:, :, None], x[:1], x[0]):
        with pytest.raises(ValueError, match="attention_mask: tells of"):
            Tokens(MASK.bool()).of(y, False)
    bounds = torch.tensor([0, 1, 3])
    assert Tokens(None, None, bounds).of(x[:1], True)[1] is bounds


def test_a_forward_keeps_its_signature_and_its_place():
    model = tiny_model()
    before = inspect.signature(model.forward)
    undo = tell_tokens(model, Call(lambda: None, lambda: None))
    assert inspect.signature(model.forward) == before
    for one in undo:
        one()
    assert "forward" not in vars(model) and "forward" not in vars(model.model)
