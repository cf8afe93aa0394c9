"""Compact gradients are in an update exactly if a backward made them since the last zeroing, whoever zeroed."""

import pytest
import torch
from accelerate.utils import find_executable_batch_size
from situations import (
    HYPER,
    assert_close_weights,
    assert_same_weights,
    assert_unchanged,
    backward,
    moved_rows,
    projections,
    salient_run,
    sets,
    tiny_model,
    tokens,
    train,
    weights,
)
from transformers import Trainer, TrainingArguments

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.integrations.trainer import LongActCallback, LongActTrainerMixin

STATE = pytest.mark.parametrize("state", ["full", "compact"])
AXIS = pytest.mark.parametrize("axis", ["rows", "columns"])


def run(**options):
    return salient_run(grad="compact", **options)


@STATE
@AXIS
@pytest.mark.parametrize("how", ["all", "one layer", "one weight"])
def test_frozen_weights_stay(how, axis, state):
    model, _, optimizer = run(state=state, axis=axis)
    train(model, optimizer, range(2))
    part = {"all": "_proj", "one layer": "layers.0", "one weight": "layers.1.self_attn.k_proj"}[how]
    frozen = [module.weight for name, module in projections(model).items() if part in name]
    others = [module.weight for name, module in projections(model).items() if part not in name]
    for p in frozen:
        p.requires_grad_(False)
    before = [[p.detach().clone() for p in some] for some in (frozen, others)]
    train(model, optimizer, range(2, 5))
    assert all(torch.equal(p, old) for p, old in zip(frozen, before[0], strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(others, before[1], strict=True))


@STATE
def test_weights_frozen_between_backward_and_step_are_stepped_as_torch_steps_them(state):
    """The gradient is there: what torch looks at."""
    results = []
    for grad in ("full", "compact"):
        model, longact, optimizer = salient_run(grad=grad, state=state)
        train(model, optimizer, range(2))
        backward(model, tokens(seed=2))
        for module in projections(model).values():
            module.weight.requires_grad_(False)
        optimizer.step()
        optimizer.zero_grad()
        results.append((model, sets(longact)))
    assert_close_weights(results[1][0], results[0][0])


@STATE
@AXIS
def test_steps_without_a_backward_move_nothing(axis, state):
    model, _, optimizer = run(state=state, axis=axis)
    train(model, optimizer, range(2))
    before = weights(model)
    for _ in range(3):
        optimizer.step()
        assert_unchanged(model, before)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step()
    assert_unchanged(model, before)


@STATE
def test_a_backward_that_reaches_no_projection_moves_none(state):
    """As with a loss of embeddings alone."""
    model, _, optimizer = run(state=state)
    train(model, optimizer, range(2))
    before = {name: module.weight.detach().clone() for name, module in projections(model).items()}
    embedded = model.get_input_embeddings()(tokens(seed=3))
    model.lm_head(embedded).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(module.weight, before[name]) for name, module in projections(model).items())


@STATE
def test_a_backward_that_reaches_some_layers_moves_those(state):
    """As with a loss on an early layer: what lies behind it has no gradient."""
    results = []
    for grad in ("full", "compact"):
        model, longact, optimizer = salient_run(grad=grad, state=state)
        train(model, optimizer, range(2))
        before = tiny_model()
        before.load_state_dict(model.state_dict())
        hidden = model(input_ids=tokens(seed=3), output_hidden_states=True).hidden_states[1]
        hidden.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert [bool(rows) for rows in moved_rows(model, before).values()] == [True, True, False, False]
        train(model, optimizer, range(4, 6))
        results.append((model, sets(longact)))
    assert results[0][1] == results[1][1]
    assert_close_weights(results[1][0], results[0][0])


# Batches that are dropped

DROPS = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, to zero": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "the model inside": lambda model, optimizer: (model.model.zero_grad(), model.lm_head.zero_grad()),
    "by hand": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
    "del": lambda model, optimizer: [p.__delattr__("grad") for p in model.parameters() if p.grad is not None],
    "another optimizer": lambda model, optimizer: torch.optim.SGD(model.parameters()).zero_grad(),
    "foreach": lambda model, optimizer: torch._foreach_zero_(
        [p.grad for p in model.parameters() if p.grad is not None]
    ),
}


@STATE
@pytest.mark.parametrize("drop", DROPS)
def test_a_dropped_batch_is_gone(drop, state):
    model, longact, optimizer = run(state=state)
    plain, expected, theirs = run(state=state)
    for step in range(4):
        if step % 2:
            backward(model, torch.full((2, 12), 63))
            DROPS[drop](model, optimizer)
        train(model, optimizer, [step])
        train(plain, theirs, [step])
        assert sets(longact) == sets(expected), step
    assert_close_weights(model, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("drop", DROPS)
def test_nothing_moves_after_a_batch_was_dropped(drop):
    model, _, optimizer = run(state="compact")
    train(model, optimizer, range(2))
    backward(model, tokens(seed=9))
    DROPS[drop](model, optimizer)
    before = {name: module.weight.detach().clone() for name, module in projections(model).items()}
    optimizer.step()
    still = drop not in ("optimizer, to zero", "model, to zero", "foreach")  # zeros are gradients: momentum goes on
    for name, module in projections(model).items():
        assert not still or torch.equal(module.weight, before[name]), name


@STATE
def test_of_two_batches_the_dropped_one_is_gone(state):
    """The first of a step's micro-batches is dropped, the second counts; and the other way round is nothing."""
    model, longact, optimizer = run(state=state)
    plain, expected, theirs = run(state=state)
    for step in range(3):
        backward(model, tokens(seed=50 + step))
        model.zero_grad()
        for piece in tokens(4, seed=step).chunk(2):
            backward(model, piece)
            backward(plain, piece)
        for one in (optimizer, theirs):
            one.step()
            one.zero_grad()
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


@STATE
def test_a_layers_own_zero_grad_drops_that_layers_gradient(state):
    results = []
    for grad in ("full", "compact"):
        model, _, optimizer = salient_run(grad=grad, state=state)
        train(model, optimizer, range(2))
        before = tiny_model()
        before.load_state_dict(model.state_dict())
        backward(model, tokens(seed=2))
        model.model.layers[0].zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        assert [bool(rows) for rows in moved_rows(model, before).values()] == [False, False, True, True]
        results.append(model)
    assert_close_weights(results[1], results[0])


# Backwards that break off


class OutOfMemory:
    """Raises once, at a chosen place: in a forward, or within a backward when the gradient of a layer comes by."""

    def __init__(self, model, where: str, call: int = 0):
        self.where, self.call, self.calls = where, call, 0
        model.model.layers[1].register_forward_hook(self)

    def __call__(self, module, args, output):
        if not module.training or not torch.is_grad_enabled():
            return output
        self.calls += 1
        if self.calls - 1 != self.call:
            return output
        if self.where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.where == "backward":
            args[0].register_hook(self.fail)  # the gradient behind layer 1: its own q and k are done
        return output

    def fail(self, grad):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@STATE
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("call", [0, 2])
def test_a_batch_that_ran_out_of_memory_counts_for_nothing(call, where, state):
    model, longact, optimizer = run(state=state)
    plain, expected, theirs = run(state=state)
    OutOfMemory(model, where, call)
    for step in range(4):
        try:
            backward(model, tokens(4, seed=step))
        except torch.OutOfMemoryError:
            model.zero_grad()
            for piece in tokens(4, seed=step).chunk(2):
                backward(model, piece)
            for piece in tokens(4, seed=step).chunk(2):
                backward(plain, piece)
        else:
            backward(plain, tokens(4, seed=step))
        for one in (optimizer, theirs):
            one.step()
            one.zero_grad()
        assert sets(longact) == sets(expected), step
    assert_same_weights(model, plain)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_size_that_accelerate_finds(where):
    model, longact, optimizer = run()
    train(model, optimizer, range(2))
    OutOfMemory(model, where)

    found = []

    @find_executable_batch_size(starting_batch_size=4)
    def loop(batch_size):
        found.append(batch_size)
        model.zero_grad()
        for step in range(2, 5):
            backward(model, tokens(batch_size, seed=step))
            optimizer.step()
            model.zero_grad()

    loop()
    assert found[1:] == [found[1]] and found[1] < 4
    plain, expected, theirs = run()
    train(plain, theirs, range(2))
    for step in range(2, 5):
        backward(plain, tokens(found[1], seed=step))
        theirs.step()
        theirs.zero_grad()
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


class SparseTrainer(LongActTrainerMixin, Trainer):
    pass


def trainer_of(kind, batch, folder):
    data = [{"input_ids": row, "labels": row} for row in tokens(32)]
    model = tiny_model()
    longact = LongAct(model, grad="compact" if "compact" in kind else "full")
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=batch,
        auto_find_batch_size=True,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    common = dict(model=model, args=args, train_dataset=data)
    if kind == "callback":
        trainer = Trainer(**common, callbacks=[LongActCallback(longact)])
    else:
        trainer = SparseTrainer(**common, longact=longact)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    return trainer, model, longact


@pytest.mark.parametrize("kind", ["mixin, compact", "callback"])
def test_auto_find_batch_size_of_the_trainer(kind, tmp_path):
    """The second try trains as if there had been no first."""
    trainer, model, longact = trainer_of(kind, 8, tmp_path)
    OutOfMemory(model, "backward")
    trainer.train()
    found = trainer._train_batch_size
    assert found < 8
    trainer, plain, expected = trainer_of(kind, found, tmp_path)
    trainer.train()
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


def test_auto_find_batch_size_in_the_middle_of_a_run(tmp_path):
    """Compact gradients of the batch that broke off are dropped as whole ones are."""
    results = []
    for kind in ("mixin", "mixin, compact"):
        trainer, model, longact = trainer_of(kind, 8, tmp_path)
        OutOfMemory(model, "backward", call=2)
        trainer.train()
        assert trainer._train_batch_size < 8
        results.append((model, sets(longact)))
    assert results[0][1] == results[1][1]
    assert_close_weights(results[1][0], results[0][0], atol=1e-5)


# Beside whole gradients


@STATE
@AXIS
def test_compact_is_full_through_all_of_it(axis, state):
    """A run with dropped batches, accumulation, evaluation mode, freezing and a step on nothing."""
    results = []
    for grad in ("full", "compact"):
        model, longact, optimizer = salient_run(grad=grad, state=state, axis=axis)
        train(model, optimizer, range(2))
        backward(model, tokens(seed=90))
        model.zero_grad()
        optimizer.step()
        for piece in tokens(4, seed=2).chunk(2):
            backward(model, piece)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        train(model, optimizer, [3])
        model.train()
        weight = projections(model)["model.layers.0.self_attn.q_proj"].weight.requires_grad_(False)
        train(model, optimizer, [4, 5])
        weight.requires_grad_(True)
        train(model, optimizer, [6, 7])
        results.append((model, sets(longact)))
    assert results[0][1] == results[1][1]
    assert_close_weights(results[1][0], results[0][0])


def test_gradients_of_one_model_are_none_of_anothers():
    one, first, optimizer = run()
    other, second, theirs = run()
    for step in range(3):
        backward(one, tokens(seed=step))
        backward(other, tokens(seed=step + 10))
        optimizer.step()
        optimizer.zero_grad()
        theirs.step()
        theirs.zero_grad()
    alone, expected, its = run()
    for step in range(3):
        train(alone, its, [step + 10])
    assert_same_weights(other, alone)
    assert sets(second) == sets(expected) != sets(first)


def test_two_models_in_one_optimizer():
    """A policy and another model that train together."""
    pair = [tiny_model(), tiny_model()]
    controllers = [LongAct(model, grad="compact") for model in pair]
    optimizer = SalientAdamW([p for model in pair for p in model.parameters()], **HYPER)
    for step in range(3):
        for i, model in enumerate(pair):
            backward(model, tokens(seed=step + 10 * i))
        optimizer.step()
        optimizer.zero_grad()
    for i, model in enumerate(pair):
        alone, expected, its = run()
        train(alone, its, range(10 * i, 10 * i + 3))
        assert_same_weights(model, alone)
        assert sets(controllers[i]) == sets(expected) and controllers[i].steps == 3
