"""Several real processes, in groups, fed unevenly, stopped and gone on with in another number: against one process."""

import copy
import io

import pytest
import torch
from models import tiny_model, tokens
from ranks import on_ranks
from situations import HYPER, loss_of, saliencies, sets
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from longact_kernels import LongAct, SalientAdamW

BATCH = 12  # sequences, of all ranks together


def make(options, layers=2, group=None):
    model = tiny_model(num_hidden_layers=layers)
    longact = LongAct(model, process_group=group, **options)
    return model, longact, SalientAdamW(model.parameters(), **{**HYPER, "eps": 1e-2})


def train(run, longact, optimizer, steps, group=None):
    """Steps on this rank's part of the batches; the gradients are those of the sum over all of it."""
    size, rank = (dist.get_world_size(group), dist.get_rank(group)) if dist.is_initialized() else (1, 0)
    for step in steps:
        ids = tokens(BATCH, seed=step).chunk(size)[rank]
        (size * loss_of(run(input_ids=ids).logits, ids)).backward()
        longact.clip_grad_norm_(run.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def what_came(model, longact):
    return {"sets": sets(longact), "saliency": saliencies(longact), "weights": [p.detach() for p in model.parameters()]}


def assert_same(found, expected):
    assert found["sets"] == expected["sets"]
    torch.testing.assert_close(found["saliency"], expected["saliency"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-6)


# Pipeline stages, each on two ranks

STAGES = (1, 3)  # layers of each
STAGE_OPTIONS = {"absmax": {}, "l2": {"statistic": "l2", "refresh_every": 2}, "compact": {"grad": "compact"}}


def _stages(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "stage"))
    layers, group = STAGES[mesh.get_local_rank("stage")], mesh.get_group("data")
    found = {}
    for name, options in STAGE_OPTIONS.items():
        model, longact, optimizer = make(options, layers, mesh["data"] if name == "l2" else group)
        train(DistributedDataParallel(model, process_group=group), longact, optimizer, range(3), group)
        found[name] = what_came(model, longact)
    model, longact, optimizer = make({}, layers)
    with pytest.raises(RuntimeError, match=r"do not train the same layers.*rank 0 has .* rank 1 has .*process_group="):
        train(DistributedDataParallel(model, process_group=group), longact, optimizer, range(1), group)
    model, longact, optimizer = make({"density": 0.2 if rank else 0.3})
    with pytest.raises(RuntimeError, match=r"rank 0 has .*density=0\.3.*rank 1 has .*density=0\.2"):
        train(DistributedDataParallel(model), longact, optimizer, range(1))
    return found


@pytest.fixture(scope="module")
def of_stages():
    return on_ranks(4, _stages)


@pytest.mark.parametrize("name", STAGE_OPTIONS)
@pytest.mark.parametrize("stage", [0, 1])
def test_pipeline_stages_have_a_group_each(of_stages, name, stage):
    model, longact, optimizer = make(STAGE_OPTIONS[name], STAGES[stage])
    train(model, longact, optimizer, range(3))
    for rank in (stage, stage + 2):
        assert_same(of_stages[rank][name], what_came(model, longact))


# Ranks that are fed nothing in some steps, and what they say to one another

FED = [(0, 1), (0,), (1,), (), (0, 1), (1,)]  # by step
UNEVEN = {
    "absmax": {},
    "l2, every two": {"statistic": "l2", "refresh_every": 2},
    "current": {"selection": "current", "statistic": "l2"},
    "compact": {"grad": "compact"},
}
# Compact gradients give all ranks the first one's weights in the first forward, which all of them have to run.
UNEVEN_CASES = [(name, begin) for name in UNEVEN for begin in (0, 1) if (name, begin) != ("compact", 1)]


def uneven(options, rank=None, begin=0):
    """A loop by hand: in each step some ranks are fed, and gradients are added up; the learning rate begins at 0."""
    model, longact, optimizer = make(options)
    whole = longact.config.grad == "full"
    salient = {id(layer.weight) for layer in longact.layers.values()}
    for step, fed in enumerate(FED[begin:]):
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if step == 0 else HYPER["lr"]
        for part in range(2):
            if part in fed and rank in (None, part):
                ids = tokens(2, seed=2 * step + part)
                loss_of(model(input_ids=ids).logits, ids).backward()
        for p in model.parameters() if rank is not None and fed else ():
            if whole or id(p) not in salient:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        if not whole and rank is not None:
            longact.mask_gradients()
            for grad in [*longact.compact.present(), *(p.grad for p in model.parameters() if id(p) in salient)]:
                if grad is not None:
                    grad.mul_(2)
        optimizer.step()
        optimizer.zero_grad()
    return what_came(model, longact)


# Clipped after every micro-batch

EARLY = {
    "absmax": {},
    "l2, every two": UNEVEN["l2, every two"],
    "current": UNEVEN["current"],
    "compact": {"grad": "compact"},
}


def early(options, rank=None):
    model, longact, optimizer = make(options)
    run = model if rank is None else DistributedDataParallel(model)
    size = 1 if rank is None else 2
    norms = []
    for step in range(4):
        for micro in tokens(8, seed=step).chunk(2):
            ids = micro.chunk(size)[rank or 0]
            (size * loss_of(run(input_ids=ids).logits, ids)).backward()
            norms.append(longact.clip_grad_norm_(run.parameters(), 5.0))
        optimizer.step()
        optimizer.zero_grad()
    if rank is not None:
        ends_without_a_call(run, longact, optimizer, rank)
    return {**what_came(model, longact), "norms": norms}


def ends_without_a_call(run, longact, optimizer, rank):
    """One rank has one micro-batch more than the other, before a call of both and after it."""
    for called in (True, False):
        before = [p.detach().clone() for p in run.parameters()]
        with run.no_sync():
            loss_of(run(input_ids=tokens()).logits, tokens()).backward()
            longact.mask_gradients()
            if rank == 0 or not called:
                loss_of(run(input_ids=tokens()).logits, tokens()).backward()
        if called:
            longact.mask_gradients()
            optimizer.zero_grad()
            continue
        with pytest.raises(RuntimeError, match="with several processes call it once more after the last backward"):
            optimizer.step()
        assert all(map(torch.equal, run.parameters(), before))
        if longact.compact is not None:
            with pytest.raises(RuntimeError, match=r"restore: .* not been averaged over the processes"):
                longact.restore()
        longact.zero_grad()


class Counted:
    """Counts collectives."""

    def __init__(self, monkeypatch):
        self.counts = []
        for name in ("all_reduce", "broadcast", "all_gather_object", "all_gather"):
            own = getattr(dist, name)
            monkeypatch.setattr(dist, name, lambda *args, own=own, **kw: (self.counts.append(1), own(*args, **kw))[1])


def _two(rank):
    found = {case: uneven(UNEVEN[case[0]], rank, case[1]) for case in UNEVEN_CASES}
    found["early"] = {name: early(options, rank) for name, options in EARLY.items()}
    found["counts"], found["saved"] = {}, {}
    for name, options in COUNTED.items():
        model, longact, optimizer = make(options)
        run = DistributedDataParallel(model)
        train(run, longact, optimizer, range(2))
        with pytest.MonkeyPatch.context() as monkeypatch:
            counted = Counted(monkeypatch)
            train(run, longact, optimizer, range(2, 8))
        found["counts"][name] = len(counted.counts) / 6
    for name, options in RESUMED.items():
        model, longact, optimizer = make(options)
        train(DistributedDataParallel(model), longact, optimizer, range(6))
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        found["saved"][name] = file.getvalue()
    return found


COUNTED = {"full": {}, "l2": {"statistic": "l2", "refresh_every": 3}, "compact": {"grad": "compact"}}

# Within a refresh period
RESUMED = {
    "absmax": {"refresh_every": 4},
    "l2": {"statistic": "l2", "refresh_every": 4},
    "compact": {"grad": "compact", "refresh_every": 4},
}


@pytest.fixture(scope="module")
def of_two():
    return on_ranks(2, _two)


@pytest.mark.parametrize(("name", "begin"), UNEVEN_CASES)
def test_all_ranks_take_part_in_a_refresh_whatever_they_were_fed(of_two, name, begin):
    expected = uneven(UNEVEN[name], begin=begin)
    for rank in (0, 1):
        assert_same(of_two[rank][name, begin], expected)


@pytest.mark.parametrize("name", EARLY)
def test_every_micro_batch_may_be_clipped_on_all_ranks(of_two, name):
    expected = early(EARLY[name])
    for rank in (0, 1):
        assert_same(of_two[rank]["early"][name], expected)
        torch.testing.assert_close(of_two[rank]["early"][name]["norms"], expected["norms"], rtol=1e-4, atol=0)


def test_a_step_has_one_collective_and_compact_gradients_one_more(of_two):
    for rank in (0, 1):
        assert of_two[rank]["counts"] == {"full": 1, "l2": 1, "compact": 2}


@pytest.mark.parametrize("name", RESUMED)
def test_state_is_the_same_whatever_rank_saves_it(of_two, name):
    (weights, state), (others, other) = (torch.load(io.BytesIO(of_two[rank]["saved"][name])) for rank in (0, 1))
    torch.testing.assert_close(weights, others, rtol=0, atol=0)
    torch.testing.assert_close(state, other, rtol=0, atol=0)


def resume(saved, options):
    model, longact, optimizer = make(options)
    run = DistributedDataParallel(model) if dist.is_initialized() else model
    weights, state = torch.load(io.BytesIO(saved))
    model.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(state))
    train(run, longact, optimizer, range(6, 10))
    return what_came(model, longact)


def _resumed(rank, saved):
    return {name: resume(saved[name], options) for name, options in RESUMED.items()}


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_a_run_of_two_ranks_goes_on_with_others_in_the_midst_of_a_refresh_period(of_two, ranks):
    saved = of_two[1]["saved"]  # of one rank alone, and not the first
    found = on_ranks(ranks, _resumed, saved) if ranks > 1 else [_resumed(0, saved)]
    for name, options in RESUMED.items():
        model, longact, optimizer = make(options)
        train(model, longact, optimizer, range(10))
        for of_rank in found:
            assert_same(of_rank[name], what_came(model, longact))


def test_a_group_of_another_kind_is_an_error():
    with pytest.raises(TypeError, match=r"process_group: got 2, needed a torch.distributed.ProcessGroup"):
        LongAct(tiny_model(), process_group=2)
