"""What a refresh asks of one rank of 256, simulated: the collectives of ranks that are not there do nothing."""

from collections import Counter

import pytest
import torch
from models import backward, tiny_model, tokens
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import scaling
from longact_kernels import LongAct, SalientAdamW


class Counted(TorchDispatchMode):
    """Operations by name, and the bytes of what they read and give."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.calls[str(func)] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.bytes[str(func)] += sum(tensor.nbytes for tensor in tensors)
        return out


def of_a_rank(ranks, sharded, options):
    """What the end of a step with a refresh takes on rank 0, after two steps that make all there is to make."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        model = tiny_model("Qwen2")
        if sharded:
            mesh = init_device_mesh("cpu", (ranks,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        longact = LongAct(model, **options)
        optimizer = SalientAdamW(model.parameters(), lr=1e-3)
        for step in range(2):
            backward(model, tokens(seed=step))
            optimizer.step()
            optimizer.zero_grad()
        backward(model, tokens(seed=2))
        with Counted() as counted:  # all but the update itself, of the rows that this rank has
            longact.mask_gradients()
            longact.advance()
            longact.settle()
        return counted, sum(salient.channels.stop - salient.channels.start for salient in longact._sets())
    finally:
        dist.destroy_process_group()


# Numbers of ranks that do not talk to one another are not finite.
@pytest.mark.parametrize("options", [{}, {"statistic": "l2", "selection": "current"}], ids=["lagged", "paper"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_refresh_costs_a_rank_the_same_among_any_number(sharded, options):
    (few, channels), (many, _) = (of_a_rank(ranks, sharded, options | {"nonfinite": "off"}) for ranks in (2, 256))
    assert few.calls == many.calls
    assert sum(many.bytes.values()) <= sum(few.bytes.values())
    reduced = {name: number for name, number in many.calls.items() if "c10d" in name}
    assert reduced == {"c10d.allreduce_.default": 1}
    assert many.bytes["c10d.allreduce_.default"] == few.bytes["c10d.allreduce_.default"]
    assert many.bytes["c10d.allreduce_.default"] <= 2 * (4 * channels + 64)  # given, and given back


def test_the_page_has_what_the_shapes_say():
    assert scaling.table() in scaling.PAGE.read_text()


def test_every_rank_holds_what_the_page_says():
    longact = LongAct(tiny_model("Qwen2"))
    chosen, statistics = longact._chosen, longact._statistics
    held = [
        chosen.index,
        chosen.before,
        chosen.first,
        chosen.saliency,
        statistics.batch.buffer,
        statistics.period.buffer,
    ]
    predicted = scaling.everywhere_bytes(statistics.channels, len(chosen.index))
    assert sum(tensor.nbytes for tensor in held) == predicted
