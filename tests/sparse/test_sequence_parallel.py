"""Ranks that each have a part of the tokens of the same sequences, and padding at the end of packed rows."""

import pytest
import torch
from models import tiny_model, tokens
from ranks import on_ranks
from situations import HYPER, saliencies, sets
from torch import distributed as dist
from torch.distributed.nn.functional import all_gather
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longact_kernels import LongAct, SalientAdamW


def whole(part: torch.Tensor, dim: int) -> torch.Tensor:
    """What all ranks have, one behind another along `dim`; gradients go back to where the parts came from."""
    return torch.cat(all_gather(part.contiguous()), dim) if dist.is_initialized() else part


def own(tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()] if dist.is_initialized() else tensor


def attend(module, query, key, value, attention_mask, scaling, position_ids=None, **kwargs):
    """Attention within packed sequences whose tokens lie on several ranks: as plain as it can be written."""
    query, key, value = whole(query, 2), whole(key, 2), whole(value, 2)
    positions = whole(position_ids, 1)
    numbers = (positions == 0).cumsum(1)
    apart = (numbers.unsqueeze(1) != numbers.unsqueeze(2)) | (positions.unsqueeze(1) > positions.unsqueeze(2))
    key, value = (states.repeat_interleave(module.num_key_value_groups, 1) for states in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(apart.unsqueeze(1), float("-inf"))
    return own((scores.softmax(-1) @ value).transpose(1, 2), 1), None


ROWS = [[32]] * 2  # sequences that fill rows, of which a rank has the half
PACKED = [[5, 9, 1, 8, 6]]  # some of which lie on both ranks


def batch(lengths, padding=0, seed=0):
    """Packed rows of sequences of these lengths: ids, positions, targets (-100 on padding)."""
    ids = torch.cat([tokens(len(lengths), length, seed=seed + i) for i, length in enumerate(lengths[0])], 1)
    ids = ids.clamp(min=1)
    positions = torch.cat([torch.arange(length) for length in lengths[0]]).expand(len(lengths), -1)
    targets = ids.roll(-1, 1)
    end = torch.zeros(len(lengths), padding, dtype=torch.int64)
    ends = torch.arange(padding).expand(len(lengths), -1)
    return torch.cat((ids, end), 1), torch.cat((positions, ends), 1), torch.cat((targets, end - 100), 1)


def run(options, lengths, padding=0):
    ALL_ATTENTION_FUNCTIONS["parts"] = attend
    model = tiny_model(attn_implementation="parts")
    several = dist.is_initialized()
    longact = LongAct(model, sequence_group=dist.group.WORLD if several else None, **options)
    optimizer = SalientAdamW(model.parameters(), **{**HYPER, "eps": 1e-2})
    for step in range(3):
        ids, positions, targets = map(own, batch(lengths, padding, seed=10 * step))
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        for p in model.parameters() if several else ():
            dist.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
    return {"sets": sets(longact), "saliency": saliencies(longact), "weights": [p.detach() for p in model.parameters()]}


CASES = {
    (statistic, name, padding): ({"statistic": statistic, **more}, lengths, padding)
    for statistic in ("absmax", "l2")
    for name, lengths, padding, more in (
        ("rows", ROWS, 0, {}),
        ("packed", PACKED, 3, {}),
        ("padding of a rank", PACKED, 35, {"refresh_every": 2}),
    )
}


def _parts(rank):
    found = {name: run(*case) for name, case in CASES.items()}
    # Each rank has a part of the beginning and one of the end.
    model = tiny_model()
    LongAct(model, statistic="l2", sequence_group=dist.group.WORLD)
    ids, positions, _ = batch([[8, 8]])
    balanced = torch.cat((positions.chunk(4, 1)[rank], positions.chunk(4, 1)[3 - rank]), 1)
    with pytest.raises(ValueError, match=r"position_ids: .*parts in the order of the ranks"):
        model(input_ids=own(ids), position_ids=balanced)
    return found


@pytest.fixture(scope="module")
def of_parts():
    return on_ranks(2, _parts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_sequences_choose_what_the_whole_ones_do(of_parts, case):
    options, lengths, _ = CASES[case]
    expected = run(options, lengths)
    for found in of_parts:
        torch.testing.assert_close(found[case]["saliency"], expected["saliency"], rtol=1e-5, atol=1e-6)
        assert found[case]["sets"] == expected["sets"]
        torch.testing.assert_close(found[case]["weights"], expected["weights"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("statistic", ["absmax", "l2"])
def test_padding_at_the_end_of_a_packed_row_does_not_count(statistic):
    expected, found = (run({"statistic": statistic}, PACKED, padding) for padding in (0, 7))
    torch.testing.assert_close(found["saliency"], expected["saliency"], rtol=1e-5, atol=1e-6)
    assert found["sets"] == expected["sets"]
