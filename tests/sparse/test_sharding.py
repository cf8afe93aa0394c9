"""Two ranks with weights sharded by FSDP2 against one process on the whole batch."""

import contextlib
import copy

import pytest
import torch
from models import backward, tiny_model, tokens
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.sparse.sharding import LocalSets

HYPER = dict(lr=3e-3, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)


def train(model, options, batches, reload_at=None, form=None):
    longact = LongAct(model, **options)
    hyper = HYPER | (form or {})
    optimizer = SalientAdamW(model.parameters(), **hyper, longact=longact)
    for step, batch in enumerate(batches):
        if step == reload_at:
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
            longact.restore()
            longact = LongAct(model, **options)
            optimizer = SalientAdamW(model.parameters(), **hyper)
            set_optimizer_state_dict(model, optimizer, saved)
        backward(model, batch)
        # FSDP averages over ranks what the whole batch adds up.
        for p in model.parameters():
            p.grad.mul_(dist.get_world_size() if dist.is_initialized() else 1)
        optimizer.step()
        optimizer.zero_grad()
    return longact


def _rank(rank, file, options, reload_at, results, dtype=torch.float32, form=None):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh, model = init_device_mesh("cpu", (2,)), tiny_model("Qwen2").to(dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    longact = train(model, options, [tokens(4, seed=step).chunk(2)[rank] for step in range(4)], reload_at, form)
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    rows = longact.sets
    if rank == 0:
        results["weights"], results["rows"] = weights, rows
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "reload_at"),
    [({}, 2), ({"axis": "columns", "selection": "current", "statistic": "l2"}, None)],
)
def test_sharded_weights_train_as_one_process_does(options, reload_at, tmp_path):
    model = tiny_model("Qwen2")
    longact = train(model, options, [tokens(4, seed=step) for step in range(4)])
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (tmp_path / "rendezvous", options, reload_at, results), nprocs=2)
        weights, rows = results["weights"], results["rows"]
    for name, index in longact.sets.items():
        assert torch.equal(index, rows[name]), name
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"master_weights": False, "stochastic_rounding": True}),
        (torch.float32, {"moments": torch.bfloat16}),
    ],
    ids=["masters", "stochastic rounding", "bf16 moments"],
)
def test_sharded_weights_are_stepped_in_every_form(dtype, form, tmp_path):
    # Steps that are large beside what rounding does; every row, since sets would follow the activations' rounding.
    form = form | {"lr": 0.03}
    model = tiny_model("Qwen2").to(dtype)
    before = copy.deepcopy(model)
    train(model, {"density": 1.0}, [tokens(4, seed=step) for step in range(4)], form=form)
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        arguments = (tmp_path / "rendezvous", {"density": 1.0}, 2, results, dtype, form)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=2)
        weights = results["weights"]
    for (name, p), start in zip(model.named_parameters(), before.parameters(), strict=True):
        assert (p - start).abs().median() > 0.005, name
        assert (p - weights[name]).abs().median() < 0.002, name


@pytest.mark.parametrize("by_layer", [True, False])
def test_compact_gradients_of_sharded_weights_are_refused(by_layer, tmp_path):
    model = tiny_model()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers if by_layer else ():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        longact = LongAct(model, grad="compact")
        message = r"^grad: 'compact' keeps gradients of whole weights"
        with pytest.raises(ValueError, match=message):
            SalientAdamW(model.parameters(), longact=longact)
        # In a forward, the root's own weights are whole.
        with pytest.raises(ValueError, match=message) if by_layer else contextlib.nullcontext():
            backward(model, tokens())
        with pytest.raises(ValueError, match=message):
            SalientAdamW(model.parameters()).step()
    finally:
        dist.destroy_process_group()


class _Dispatched(TorchDispatchMode):
    """Counts the operations that are dispatched."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("layers", [2, 6])
def test_what_lies_here_is_looked_up_once_a_refresh_for_all_layers_together(layers, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = tiny_model("Qwen2", num_hidden_layers=layers)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        longact = LongAct(model, refresh_every=2)
        weights = [(layer.weight, layer.salient) for layer in longact.layers.values()]
        backward(model, tokens())
        longact.mask_gradients()
        here = LocalSets(weights)
        with _Dispatched() as dispatched:
            here.follow()
        assert 0 < dispatched.count < 12
        with _Dispatched() as dispatched:
            here.follow()
        assert dispatched.count == 0
        for weight, salient in weights:
            assert torch.equal(here.of[weight], salient.index)
    finally:
        dist.destroy_process_group()
