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
FORMS = {
    "bf16 moments": ({"scope": "layer"}, {"state": "compact", "moments": torch.bfloat16}, False),
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
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {"sets": sets(longact), "saliency": saliencies(longact), "weights": [w.detach() for w in weights]}


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


def _resume(rank, folder):
    found = {}
    for form in FORMS:
        model, longact, optimizer = make(form)
        load(model, optimizer, form, folder)
        train(model, optimizer, range(6, 10))
        found[form] = what_came(model, longact)
    return found


def _save(rank, folder):
    bytes_of = {}
    for form in FORMS:
        model, longact, optimizer = make(form)
        train(model, optimizer, range(6))
        dcp.save(state_dicts(model, optimizer, form), checkpoint_id=f"{folder}/{form}")
        bytes_of[form] = optimizer.salient_state_bytes()
        train(model, optimizer, range(6, 7))  # saving has changed nothing
        load(model, optimizer, form, folder)  # into an optimizer that has a state
        train(model, optimizer, range(6, 10))
        bytes_of[form, "weights"] = what_came(model, longact)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        longact.restore().save_pretrained(f"{folder}/export", state_dict=weights)
    return bytes_of


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
    loose = FORMS[form][1].get("moments") == torch.bfloat16  # whose rounding follows the place of an element
    assert found["sets"] == expected["sets"]
    torch.testing.assert_close(
        found["weights"], expected["weights"], rtol=1e-4, atol=1e-3 if loose else 1e-5, msg=lambda m: f"{form}: {m}"
    )


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_two_ranks_save_and_others_go_on(saved, expected, ranks):
    folder, _ = saved
    for of_rank in on_ranks(ranks, _resume, folder) if ranks > 1 else [_resume(0, folder)]:
        for form in FORMS:
            assert_same(of_rank[form], expected[form], form)


def test_the_same_ranks_go_on_from_a_step_before(saved, expected):
    for of_rank in saved[1]:
        for form in FORMS:
            assert_same(of_rank[form, "weights"], expected[form], form)


def test_compact_state_of_whole_heads_is_a_third_on_each_rank(saved):
    for of_rank in saved[1]:
        ours, dense = of_rank["compact"]
        assert 0.3 * dense < ours < 0.35 * dense
        assert of_rank["full"][0] > dense


def test_an_export_is_one_folder_of_plain_weights(saved, expected):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{saved[0]}/export")
    last = expected[list(FORMS)[-1]]["weights"]
    for p, weight in zip(model.parameters(), last, strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-4, atol=1e-5)
