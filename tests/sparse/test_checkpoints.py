"""Distributed checkpoints: saved by two ranks of FSDP2 within a refresh period, gone on with by others."""

import pytest
import torch
from models import tiny_model, tokens
from ranks import on_ranks
from situations import HYPER, loss_of, saliencies, sets
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from longact_kernels import LongAct, SalientAdamW

BATCH = 12  # sequences, of all ranks together
ROUNDED = "bf16 moments"
FORMS = {
    ROUNDED: ({"scope": "layer"}, {"state": "compact", "moments": torch.bfloat16}, False),
    "full": ({}, {}, False),
    "full, flat": ({"statistic": "l2"}, {}, True),
    "compact": ({}, {"state": "compact"}, False),
    "compact, flat": ({"scope": "model", "statistic": "l2"}, {"state": "compact"}, True),
    "compact columns": ({"axis": "columns"}, {"state": "compact"}, False),
}


def make(form):
    options, of_optimizer, _ = FORMS[form]
    model = tiny_model()
    if dist.is_initialized():
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    longact = LongAct(model, refresh_every=4, **options)
    return model, longact, SalientAdamW(model.parameters(), **{**HYPER, "eps": 1e-2}, **of_optimizer)


def train(model, optimizer, steps):
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for step in steps:
        ids = tokens(BATCH, seed=step).chunk(size)[rank]
        (size * loss_of(model(input_ids=ids).logits, ids)).backward()
        optimizer.step()
        optimizer.zero_grad()


def what_came(model, longact):
    return {"sets": sets(longact), "saliency": saliencies(longact), "weights": [whole(p) for p in model.parameters()]}


def state_dicts(model, optimizer, form):
    options = StateDictOptions(flatten_optimizer_state_dict=FORMS[form][2])
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def load(model, optimizer, form, folder):
    """In place: into what a new optimizer has."""
    saved = state_dicts(model, optimizer, form)
    dcp.load(saved, checkpoint_id=f"{folder}/{form}")
    set_model_state_dict(model, saved["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=FORMS[form][2])
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def moments(optimizer):
    """Of all parameters, by rows: those of the set alone where state is compact."""
    state = sorted(optimizer.state_dict()["state"].items())
    return [whole(of[name]) for _, of in state for name in ("exp_avg", "exp_avg_sq")]


def go_on(model, longact, optimizer):
    """What comes of four more steps, and what there is before them and after the first."""
    before = moments(optimizer)
    train(model, optimizer, range(6, 7))
    after = moments(optimizer), [whole(p) for p in model.parameters()]
    train(model, optimizer, range(7, 10))
    return what_came(model, longact) | {"before": before, "after": after}


def _resume(rank, folder):
    found = {}
    for form in FORMS:
        model, longact, optimizer = make(form)
        load(model, optimizer, form, folder)
        found[form] = go_on(model, longact, optimizer)
    return found


def _save(rank, folder):
    bytes_of, found = {}, {}
    for form in FORMS:
        model, longact, optimizer = make(form)
        train(model, optimizer, range(6))
        dcp.save(state_dicts(model, optimizer, form), checkpoint_id=f"{folder}/{form}")
        bytes_of[form] = optimizer.salient_state_bytes()
        found[form] = go_on(model, longact, optimizer)  # saving has changed nothing
        load(model, optimizer, form, folder)  # into an optimizer that has a state
        found[form, "again"] = go_on(model, longact, optimizer)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        longact.restore().save_pretrained(f"{folder}/export", state_dict=weights)
    return bytes_of, found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return folder, on_ranks(2, _save, folder)


@pytest.fixture(scope="module")
def expected():
    found = {}
    for form in FORMS:
        model, longact, optimizer = make(form)
        train(model, optimizer, range(10))
        found[form] = what_came(model, longact)
    return found


def assert_same(found, expected, form):
    assert found["sets"] == expected["sets"]
    torch.testing.assert_close(
        found["weights"], expected["weights"], rtol=1e-4, atol=1e-5, msg=lambda m: f"{form}: {m}"
    )


def assert_same_but_for_rounding(found, expected):
    """Moments are rounded at random, by the place of an element among those of its rank.

    A step uses them before it rounds them. So one step leaves the same weights, and moments that are one place of
    bfloat16 apart (2^-7). The three that follow add up three such places, of 1, 1.9 and 2.7 roundings of a moment of
    beta 0.9, and half of 1, 2 and 3 of the square's, of which an update takes the root: 8.6 places of its size, the lr.
    """
    assert found["sets"] == expected["sets"]
    torch.testing.assert_close(found["before"], expected["before"], rtol=0, atol=0)
    torch.testing.assert_close(found["after"][0], expected["after"][0], rtol=2**-7, atol=1e-7)
    torch.testing.assert_close(found["after"][1], expected["after"][1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=8.6 * 2**-7 * HYPER["lr"])


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_two_ranks_save_and_others_go_on(saved, expected, ranks):
    folder, of_two = saved
    for of_rank in on_ranks(ranks, _resume, folder) if ranks > 1 else [_resume(0, folder)]:
        for form in FORMS:
            if form == ROUNDED:
                assert_same_but_for_rounding(of_rank[form], of_two[0][1][form])
            else:
                assert_same(of_rank[form], expected[form], form)


def test_the_same_ranks_go_on_from_a_step_before_bit_for_bit(saved, expected):
    for _, of_rank in saved[1]:
        for form in FORMS:
            torch.testing.assert_close(of_rank[form, "again"], of_rank[form], rtol=0, atol=0, msg=form)
            if form != ROUNDED:
                assert_same(of_rank[form], expected[form], form)


def test_compact_state_of_whole_heads_is_a_third_on_each_rank(saved):
    for of_rank, _ in saved[1]:
        ours, dense = of_rank["compact"]
        assert 0.3 * dense < ours < 0.35 * dense
        assert of_rank["full"][0] > dense


def test_an_export_is_one_folder_of_plain_weights(saved, expected):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{saved[0]}/export")
    last = expected[list(FORMS)[-1]]["weights"]
    for p, weight in zip(model.parameters(), last, strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-4, atol=1e-5)
