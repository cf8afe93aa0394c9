"""Engines that train weights in another form are refused, each by its name; real ones where they can be installed."""

import os
import re

import pytest
import torch
from models import backward, tiny_model, tokens
from ranks import on_ranks
from torch.distributed.fsdp import FullyShardedDataParallel

from longact_kernels import LongAct, SalientAdamW


def first_error(train) -> str:
    """What training says in its first step, or at its construction."""
    try:
        for _ in train():
            return "one step passed"
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing happened"


def _fsdp1(rank: int) -> dict[str, str]:
    def train(use_orig_params, when, wrap):
        model = tiny_model()
        longact = LongAct(model) if when == "before" else None
        cpu = torch.device("cpu")
        if wrap == "layers":
            for i, layer in enumerate(model.model.layers):
                model.model.layers[i] = FullyShardedDataParallel(layer, device_id=cpu, use_orig_params=use_orig_params)
        sharded = FullyShardedDataParallel(model, device_id=cpu, use_orig_params=use_orig_params)
        longact = longact or LongAct(model)
        optimizer = SalientAdamW(sharded.parameters(), longact=None)
        backward(sharded, tokens(seed=rank))
        optimizer.step()
        yield longact

    return {
        f"{orig}, {when}, {wrap}": first_error(lambda orig=orig, when=when, wrap=wrap: train(orig, when, wrap))
        for orig in (False, True)
        for when in ("before", "after")
        for wrap in ("layers", "whole")
    }


def test_fsdp1_is_refused_in_both_forms_by_all_ranks():
    for said in on_ranks(2, _fsdp1):
        for form, message in said.items():
            assert "FSDP1" in message and "FSDP2" in message, f"{form}: {message}"


def _deepspeed(rank: int) -> dict[str, str]:
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    def train(stage, when, own):
        model = tiny_model()
        longact = LongAct(model) if when == "before" else None
        optimizer = SalientAdamW(model.parameters()) if own else torch.optim.AdamW(model.parameters())
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        longact = longact or LongAct(model)
        loss = engine(input_ids=tokens(seed=rank)).logits.sum()
        engine.backward(loss)
        engine.step()
        yield longact

    forms = [(stage, when, own) for stage in (1, 2, 3) for when in ("before", "after") for own in (True, False)]
    return {str(form): first_error(lambda form=form: train(*form)) for form in forms}


def test_deepspeed_zero_is_refused_in_every_stage():
    pytest.importorskip("deepspeed")
    for said in on_ranks(2, _deepspeed):
        for form, message in said.items():
            assert "DeepSpeed ZeRO" in message and "FSDP2" in message, f"{form}: {message}"


def zero_3(model):
    """As DeepSpeed leaves a parameter between the calls of its layer."""
    for i, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape, p.data = i, p.shape, torch.empty(0)


def zero_1(model):
    for p in model.parameters():
        p._hp_mapping = None


def megatron(model):
    for p in model.parameters():
        p.main_grad = torch.zeros_like(p)


STAND_INS = {"DeepSpeed ZeRO-3": zero_3, "DeepSpeed ZeRO,": zero_1, "Megatron": megatron}


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_marks_of_an_engine_are_known(name, when):
    model = tiny_model()
    said = "use FSDP2"
    if when == "after":
        STAND_INS[name](model)
        with pytest.raises(ValueError, match=f"{re.escape(name)}.*{said}"):
            LongAct(model)
        return
    longact = LongAct(model)
    if when == "between":
        backward(model, tokens())
        SalientAdamW(model.parameters()).step()
    STAND_INS[name](model)
    with pytest.raises(RuntimeError, match=f"{re.escape(name)}.*{said}"):
        backward(model, tokens())
    for make in (
        lambda: SalientAdamW(model.parameters(), longact=longact),
        lambda: longact.attach(torch.optim.AdamW(model.parameters())),
    ):
        with pytest.raises(RuntimeError, match=f"{re.escape(name)}.*{said}"):
            make()


@pytest.mark.parametrize("own", [True, False])
def test_an_optimizer_whose_parameters_are_replaced_by_flat_copies_says_so(own):
    """What the optimizers of ZeRO and of Megatron do to the one that they are given, where nothing else marks them."""
    model = tiny_model()
    longact = LongAct(model)
    optimizer = SalientAdamW(model.parameters()) if own else torch.optim.AdamW(model.parameters())
    if not own:
        longact.attach(optimizer)
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    backward(model, tokens())
    flat.grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    with pytest.raises(RuntimeError, match=r"holds none of them any more: an engine .*DeepSpeed ZeRO.*FSDP2"):
        optimizer.step()


@pytest.mark.parametrize("where", ["nowhere", "on another model", "restored", "freed"])
def test_salient_adamw_alone_is_no_dense_adamw_in_silence(where):
    model, other = tiny_model(), tiny_model()
    longact = {"nowhere": lambda: None, "on another model": lambda: LongAct(other)}.get(where, lambda: LongAct(model))()
    if where in ("restored", "freed"):
        longact.restore()
    if where == "freed":
        del longact
    optimizer = SalientAdamW(model.parameters())
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^SalientAdamW: there is no LongAct .*LongAct\(model\).*longact=False"):
            optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_salient_adamw_may_be_dense_beside_queries_and_keys_and_on_purpose():
    model, plain = tiny_model(), tiny_model()
    longact = LongAct(model)
    salient = [layer.weight for layer in longact.layers.values()]
    rest = [p for p in model.parameters() if not any(p is weight for weight in salient)]
    optimizers = [SalientAdamW(salient), SalientAdamW(rest), SalientAdamW(plain.parameters(), longact=False)]
    reference = torch.optim.AdamW([p.detach().clone() for p in plain.parameters()])
    for _ in range(2):
        for net in (model, plain):
            backward(net, tokens())
        for p, own in zip(reference.param_groups[0]["params"], plain.parameters(), strict=True):
            p.grad = own.grad.clone()
        for optimizer in (*optimizers, reference):
            optimizer.step()
    assert longact.steps == 2
    for p, own in zip(reference.param_groups[0]["params"], plain.parameters(), strict=True):
        assert torch.equal(p, own)


def _joined(rank: int) -> list[str]:
    said = []
    for options in ({}, {"throw_on_early_termination": True}):
        model = tiny_model()
        longact = LongAct(model)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = SalientAdamW(model.parameters(), longact=longact)
        try:
            with ddp.join(**options):
                for step in range(2 + rank):
                    backward(ddp, tokens(seed=step))
                    optimizer.step()
                    optimizer.zero_grad()
        except RuntimeError as error:
            said.append(f"{longact.steps} steps: {error}")
    return said


def test_uneven_batches_within_join_are_refused_and_do_not_hang():
    for joined, thrown in on_ranks(2, _joined):
        assert re.match(r"0 steps: LongAct: inside DistributedDataParallel.join\(\) .*as many batches", joined)
        assert thrown.startswith("2 steps: ")  # torch's own, on all ranks
