"""Situations of training on two ranks, each against one process on the same global batch."""

import contextlib

import pytest
import torch
from models import checkpoint_activations, tiny_model, tokens
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
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from longact_kernels import LongAct, SalientAdamW

pytestmark = pytest.mark.slow

STEPS = 5


def several():
    return dist.is_initialized()


def place():
    """How many ranks there are, and which this is."""
    return (dist.get_world_size(), dist.get_rank()) if several() else (1, 0)


def sharded(model, **options):
    for layer in model.model.layers if several() else ():
        fully_shard(layer, **options)
    return fully_shard(model, **options) if several() else model


def copied(model, **options):
    return DistributedDataParallel(model, **options) if several() else model


def adamw(model, **options):
    return SalientAdamW([p for p in model.parameters() if p.requires_grad], **HYPER | {"eps": 1e-2}, **options)


def backward(run, ids, mask=None, scale=1.0):
    """The gradients of the ranks' mean are those of the sum over the batch."""
    (scale * place()[0] * loss_of(run(input_ids=ids, attention_mask=mask).logits, ids, mask)).backward()


def train(run, longact, optimizer, steps=range(STEPS), parts=1, syncs=lambda last: contextlib.nullcontext()):
    size, rank = place()
    for step in steps:
        for i, ids in enumerate(mine := tokens(4, seed=step).chunk(size)[rank].chunk(parts)):
            with syncs(i + 1 == len(mine)):
                backward(run, ids)
        longact.clip_grad_norm_(run.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return longact


def accumulates(grad, **options):
    """DistributedDataParallel's no_sync."""
    model = tiny_model()
    longact, optimizer = LongAct(model, grad=grad, **options), adamw(model)
    run = copied(model)
    syncs = (
        (lambda last: contextlib.nullcontext() if last else run.no_sync())
        if several()
        else lambda last: contextlib.nullcontext()
    )
    return train(run, longact, optimizer, parts=2, syncs=syncs)


def uneven_parts(_):
    """One rank takes three micro batches, the other two and one that counts for nothing; they meet at the last."""
    model = sharded(tiny_model())
    longact, optimizer = LongAct(model, refresh_every=2), adamw(model)
    for step in range(STEPS):
        ids = tokens(6, seed=step)
        own = [(ids[:1], 1.0), (ids[1:2], 1.0), (ids[2:4], 1.0)]
        others = [(ids[4:5], 1.0), (ids[5:], 1.0), (ids[4:5], 0.0)]
        parts = (own, others)[place()[1]] if several() else [*own, *others]
        for i, (part, scale) in enumerate(parts):
            if several():
                model.set_requires_gradient_sync(i + 1 == len(parts))
            backward(model, part, scale=scale)
        optimizer.step()
        optimizer.zero_grad()
    return longact


def shards(options, of_shards=None, before=None, parts=1, **of_optimizer):
    model = tiny_model(**({"tie_word_embeddings": True} if before == "tied" else {}))
    if before == "keys frozen":
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.requires_grad_(False)
    if before == "checkpointed":
        checkpoint_activations(model, use_reentrant=False)
    sharded(model, **(of_shards or {}))
    return train(model, LongAct(model, **options), adamw(model, **of_optimizer), parts=parts)


def some_blocks(_):
    """FSDP2 on one block; the gradients of the rest are averaged by hand."""
    model = tiny_model()
    if several():
        fully_shard(model.model.layers[0])
    longact, optimizer = LongAct(model, statistic="l2"), adamw(model, state="compact")
    size, rank = place()
    for step in range(STEPS):
        backward(model, tokens(4, seed=step).chunk(size)[rank])
        for p in model.parameters() if several() else ():
            if not hasattr(p, "device_mesh"):
                dist.all_reduce(p.grad)
                p.grad /= size
        optimizer.step()
        optimizer.zero_grad()
    return longact


def two_optimizers(_):
    """One for queries and keys, a stock one for all else, in either order."""
    model = sharded(tiny_model())
    longact = LongAct(model)
    salient = [layer.weight for layer in longact.layers.values()]
    rest = [p for p in model.parameters() if not any(p is weight for weight in salient)]
    hyper = HYPER | {"eps": 1e-2}
    optimizers = [SalientAdamW(salient, **hyper, state="compact"), torch.optim.AdamW(rest, **hyper)]
    size, rank = place()
    for step in range(STEPS):
        backward(model, tokens(4, seed=step).chunk(size)[rank])
        for optimizer in optimizers[:: 1 if step % 2 else -1]:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return longact


def one_rank_is_bad(_):
    """NaN in the loss of the last rank: all of them leave the step out."""
    model = sharded(tiny_model())
    longact, optimizer = LongAct(model, nonfinite="skip"), adamw(model, state="compact")
    size, rank = place()
    for step in range(STEPS):
        bad = step == 2 and rank == size - 1
        backward(model, tokens(4, seed=step).chunk(size)[rank], scale=float("nan") if bad else 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert longact.skipped == 1
    return longact


def one_rank_is_padding(_):
    model = sharded(tiny_model())
    longact, optimizer = LongAct(model, statistic="l2"), adamw(model)
    size, rank = place()
    for step in range(STEPS):
        ids = tokens(4, seed=step)
        mask = torch.ones_like(ids)
        if step % 2:
            mask[1, 5:] = 0
        else:
            mask[2:] = 0
        backward(model, ids.chunk(size)[rank], mask.chunk(size)[rank])
        optimizer.step()
        optimizer.zero_grad()
    return longact


def one_rank_skips_a_layer(_):
    model = tiny_model()
    longact, optimizer = LongAct(model, refresh_every=2, statistic="l2"), adamw(model)
    run = copied(model, find_unused_parameters=True)
    for step in range(STEPS):
        for part, ids in enumerate(tokens(4, seed=step).chunk(2)):
            if several() and part != place()[1]:
                continue
            model.config.num_hidden_layers = 1 if part and step in (0, 3) else 2
            backward(run, ids)
        optimizer.step()
        optimizer.zero_grad()
    return longact


def saved_whole_by_the_first(state):
    """`full_state_dict`, held by the first rank alone, which gives it to the others."""
    model = sharded(tiny_model())
    options = {"refresh_every": 3, "statistic": "l2"}
    longact, optimizer = LongAct(model, **options), adamw(model, state=state)
    train(model, longact, optimizer)
    if several():
        how = StateDictOptions(full_state_dict=True, cpu_offload=True)
        saved = get_model_state_dict(model, options=how), get_optimizer_state_dict(model, optimizer, options=how)
        weights, held = saved if place()[1] == 0 else ({}, {})
        model = sharded(tiny_model())
        longact, optimizer = LongAct(model, **options), adamw(model, state=state)
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=how)
        set_optimizer_state_dict(model, optimizer, held, options=how)
    return train(model, longact, optimizer, range(STEPS, 2 * STEPS))


def saved_beside_a_step(folder):
    """`async_save`, begun between backward and step; training goes on meanwhile, and then from the checkpoint."""
    model = sharded(tiny_model())
    longact, optimizer = LongAct(model, refresh_every=3), adamw(model, state="compact")
    train(model, longact, optimizer)
    if several():
        saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        backward(model, tokens(2, seed=STEPS))
        # In a group of its own: its thread and the training's must not meet in one.
        saving = dcp.async_save(saved, checkpoint_id=folder, process_group=dist.new_group())
        optimizer.step()
        optimizer.zero_grad()
        train(model, longact, optimizer, range(3))
        saving.result()
        model = sharded(tiny_model())
        longact, optimizer = LongAct(model, refresh_every=3), adamw(model, state="compact")
        saved = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(saved, checkpoint_id=folder)
        set_model_state_dict(model, saved["model"])
        set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    return train(model, longact, optimizer, range(STEPS, 2 * STEPS))


COMPACT = {"state": "compact"}
SITUATIONS = {
    "no_sync": lambda _: accumulates("full", statistic="l2", refresh_every=2),
    "no_sync, compact gradients": lambda _: accumulates("compact"),
    "micro batches of other numbers": uneven_parts,
    "offloaded": lambda _: shards({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, **COMPACT),
    "not resharded": lambda _: shards({"selection": "current"}, {"reshard_after_forward": False}, parts=2),
    "tied embeddings": lambda _: shards({"scope": "model"}, before="tied", **COMPACT),
    "keys frozen": lambda _: shards({}, before="keys frozen", **COMPACT),
    "checkpointed": lambda _: shards({"statistic": "l2"}, before="checkpointed", parts=2),
    "frozen sets, moving averages": lambda _: shards({"freeze_after": 3, "ema": 0.5}, **COMPACT),
    "some blocks": some_blocks,
    "two optimizers": two_optimizers,
    "NaN on one rank": one_rank_is_bad,
    "padding on one rank": one_rank_is_padding,
    "a layer skipped on one rank": one_rank_skips_a_layer,
    "saved whole": lambda _: saved_whole_by_the_first("full"),
    "saved whole, compact": lambda _: saved_whole_by_the_first("compact"),
    "saved beside a step": saved_beside_a_step,
}


def what_came(name, folder=None):
    longact = SITUATIONS[name](folder)
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in longact.model.parameters()]
    return {"sets": sets(longact), "saliency": saliencies(longact), "weights": [p.detach() for p in weights]}


def _two(rank, folder):
    return {name: what_came(name, folder) for name in SITUATIONS}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return on_ranks(2, _two, str(tmp_path_factory.mktemp("saved")))


@pytest.mark.parametrize("name", SITUATIONS)
def test_two_ranks_train_as_one_process_does(of_two, name):
    expected = what_came(name)
    for found in of_two:
        assert found[name]["sets"] == expected["sets"]
        torch.testing.assert_close(found[name]["saliency"], expected["saliency"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name]["weights"], expected["weights"], rtol=1e-5, atol=1e-6)
