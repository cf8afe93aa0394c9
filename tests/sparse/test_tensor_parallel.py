"""Ranks that each compute some of a layer's channels, also under FSDP2: against one process on the whole batch."""

import copy

import pytest
import torch
from models import tiny_model, tokens
from ranks import on_ranks
from situations import HYPER, loss_of, saliencies, sets
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from longact_kernels import LongAct, SalientAdamW

PLAN = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
FAMILY = "Qwen2"  # whose queries and keys have biases
FORMS = {
    "absmax": {},
    "l2": {"statistic": "l2", "refresh_every": 2},
    "current": {"selection": "current", "statistic": "l2"},
    "scope layer": {"scope": "layer"},
    "columns": {"axis": "columns", "statistic": "l2"},
}


RELOADED = {"rows": {}, "columns": {"axis": "columns"}, "model": {"scope": "model", "statistic": "l2"}}


def train(model, longact, batches, size=1, state="full", reloads=False):
    optimizer = SalientAdamW(model.parameters(), **{**HYPER, "eps": 1e-2}, state=state)

    def steps(batches):
        for ids in batches:
            (size * loss_of(model(input_ids=ids).logits, ids)).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(batches[:2])
    if reloads:
        weights, saved = copy.deepcopy((get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)))
        steps(batches[:1])  # to be taken back
        set_model_state_dict(model, weights)
        set_optimizer_state_dict(model, optimizer, saved)
    steps(batches[2:])
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {"sets": sets(longact), "saliency": saliencies(longact), "weights": [w.detach() for w in weights]}


def whole(options, **form):
    model = tiny_model(FAMILY)
    return train(model, LongAct(model, **options), [tokens(4, seed=step) for step in range(3)], **form)


def parallel(options, mesh, first, **form):
    """On a mesh of ("data", "model") with FSDP2, or of ("model",) alone."""
    model = tiny_model(FAMILY)
    longact = LongAct(model, **options) if first else None
    for layer in model.model.layers:
        parallelize_module(layer, mesh["model"], PLAN)
    several = "data" in mesh.mesh_dim_names
    if several:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    size, part = (mesh["data"].size(), mesh.get_local_rank("data")) if several else (1, 0)
    batches = [tokens(4, seed=step).chunk(size)[part] for step in range(3)]
    return train(model, longact or LongAct(model, **options), batches, size, **form)


def _square(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    found = {name: parallel(options, mesh, name == "l2") for name, options in FORMS.items()}
    for name, options in RELOADED.items():
        found[name, "reloaded"] = parallel(options, mesh, False, state="compact", reloads=True)
    return found


def _line(rank, folder):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("model",))
    found = {}
    for name, options in FORMS.items():
        for first in (True, False):
            found[name, first] = parallel(options, mesh, first)
    from transformers import AutoModelForCausalLM

    for name, options in FORMS.items():
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="eager").train()
        longact = LongAct(model, **options)
        found[name, "auto"] = train(model, longact, [tokens(4, seed=step) for step in range(3)])
        plain = longact.restore().model.layers[0].self_attn.q_proj
        assert type(plain) is torch.nn.Linear and plain(torch.ones(1, 32)).isfinite().all()
    model = tiny_model(FAMILY)
    LongAct(model)
    parallelize_module(model.model.layers[0], mesh, {"self_attn.q_proj": RowwiseParallel()})
    with pytest.raises(RuntimeError, match=r"q_proj is placed .*needed ColwiseParallel"):
        model(input_ids=tokens())
    return found


def assert_same(found, expected):
    assert found["sets"] == expected["sets"]
    torch.testing.assert_close(found["saliency"], expected["saliency"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def of_line(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(FAMILY).save_pretrained(folder)
    return on_ranks(2, _line, str(folder))


@pytest.mark.parametrize("how", [True, False, "auto"], ids=["LongAct first", "LongAct last", "tp_plan"])
@pytest.mark.parametrize("name", FORMS)
def test_tensor_parallel_ranks_train_as_one_process(of_line, name, how):
    for found in of_line:
        assert_same(found[name, how], whole(FORMS[name]))


@pytest.fixture(scope="module")
def of_square():
    return on_ranks(4, _square)


@pytest.mark.parametrize("name", FORMS)
def test_fsdp2_over_tensor_parallel_ranks_trains_as_one_process(of_square, name):
    for found in of_square:
        assert_same(found[name], whole(FORMS[name]))


@pytest.mark.parametrize("name", RELOADED)
def test_compact_state_is_saved_and_loaded_on_both(of_square, name):
    for found in of_square:
        assert_same(found[name, "reloaded"], whole(RELOADED[name], state="compact"))
