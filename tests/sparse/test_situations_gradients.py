"""Gradients that come by other paths, are clipped before the last of them has come, are asked for, copied or left."""

import copy
import pickle

import pytest
import torch
from models import checkpoint_activations
from situations import (
    WrittenOut,
    assert_close_weights,
    assert_same_weights,
    assert_unchanged,
    backward,
    loss_of,
    moved_rows,
    projections,
    salient_run,
    sets,
    stock_run,
    tiny_model,
    tokens,
    top,
    train,
    weights,
)

from longact_kernels import LongAct

CHANGES = {"GPT2": dict(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0), "Phi3": dict(pad_token_id=0)}
GRAD = pytest.mark.parametrize("grad", ["full", "compact"])


def salient_weights(longact) -> dict[str, torch.nn.Parameter]:
    return {name: layer.weight for name, layer in longact.layers.items()}


def masked_in_plain_torch(plain, longact, dim=0) -> torch.Tensor:
    """Zeroes a plain model's gradients outside the sets; returns the norm of all."""
    for name, channels in longact.sets.items():
        grad = plain.get_submodule(name).weight.grad
        outside = torch.ones(grad.shape[dim], dtype=torch.bool)
        outside[channels] = False
        grad.index_fill_(dim, outside.nonzero().flatten(), 0)
    return torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])


# By other paths than the layer's own


def penalty(model):
    return 3 * sum(p.square().sum() for name, p in model.named_parameters() if "proj" in name)


def in_the_loss(model, ids):
    (loss_of(model(input_ids=ids).logits, ids) + penalty(model)).backward()


def in_the_loss_first(model, ids):
    (penalty(model) + loss_of(model(input_ids=ids).logits, ids)).backward()


def before(model, ids):
    penalty(model).backward()
    backward(model, ids)


def after(model, ids):
    backward(model, ids)
    penalty(model).backward()


def in_parts(model, ids):
    for part in ids.chunk(2):
        in_the_loss(model, part)


def by_hand(model, ids):
    backward(model, ids)
    for name, p in model.named_parameters():
        if "proj" in name:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad += 3 * p.detach()


def by_data(model, ids):
    """Which changes no version of the gradient."""
    backward(model, ids)
    for name, p in model.named_parameters():
        if "proj" in name:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.data.add_(p.detach(), alpha=3)


def in_evaluation_mode(model, ids):
    backward(model, ids)
    backward(model.eval(), ids.flip(1))
    model.train()


def by_a_second_use(model, ids):
    """As of a tied weight."""
    attention = model.model.layers[0].self_attn
    x = model.get_input_embeddings()(ids)
    again = torch.nn.functional.linear(x, getattr(attention, "q_proj", attention).weight[:, : x.shape[-1]])
    (loss_of(model(input_ids=ids).logits, ids) + again.square().sum()).backward()


def autocast(model, ids):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model(input_ids=ids).logits, ids) + penalty(model)
    loss.backward()


PATHS = [
    in_the_loss,
    in_the_loss_first,
    before,
    after,
    in_parts,
    by_hand,
    by_data,
    in_evaluation_mode,
    by_a_second_use,
    autocast,
]


@pytest.mark.parametrize("options", [{}, {"grad": "compact"}, {"selection": "current"}, {"freeze_after": 1}], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_norm_is_that_of_masked_gradients_whatever_path_they_came_by(path, options):
    model, longact, optimizer = salient_run(**options)
    plain = tiny_model()
    for step in range(3):
        plain.load_state_dict(model.state_dict())
        for one in (model, plain):
            one.zero_grad()
            path(one, tokens(4, seed=step))
        norm = longact.clip_grad_norm_(model.parameters(), 0.5)
        # The sets of a step that is under way; asking for them ends none.
        torch.testing.assert_close(norm, masked_in_plain_torch(plain, longact), rtol=2e-3, atol=0)
        optimizer.step()


@pytest.mark.parametrize(
    ("family", "options", "dim"),
    [
        ("GPT2", {}, 1),
        ("Phi3", {}, 0),
        ("Llama", {"axis": "columns"}, 1),
        ("Llama", {"target_modules": "all-linear"}, 0),
    ],
    ids=str,
)
def test_the_norm_of_other_layouts(family, options, dim):
    model = tiny_model(family, **CHANGES.get(family, {}))
    plain = copy.deepcopy(model)
    model, longact, optimizer = salient_run(model, **options)
    for step in range(3):
        plain.load_state_dict(model.state_dict())
        for one in (model, plain):
            one.zero_grad()
            loss = loss_of(one(input_ids=tokens(seed=step)).logits, tokens(seed=step))
            (loss + sum(p.square().sum() for p in one.parameters())).backward()
        norm = longact.clip_grad_norm_(model.parameters(), 0.5)
        torch.testing.assert_close(norm, masked_in_plain_torch(plain, longact, dim), rtol=1e-4, atol=0)
        optimizer.step()


def test_an_own_clip_after_mask_gradients_sees_masked_gradients():
    model, longact, optimizer = salient_run()
    plain = tiny_model()
    for step in range(3):
        plain.load_state_dict(model.state_dict())
        for one in (model, plain):
            one.zero_grad()
            in_the_loss(one, tokens(seed=step))
        longact.mask_gradients()
        norm = masked_in_plain_torch(plain, longact)
        torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5), norm)
        optimizer.step()


def test_a_stock_optimizer_sees_masked_gradients_whatever_was_written_to_them():
    model, longact, optimizer = stock_run(kind=torch.optim.SGD)
    train(model, optimizer, range(1))
    for step in range(1, 3):
        before, used = copy.deepcopy(model), sets(longact)
        by_data(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()
        assert moved_rows(model, before) == used


# Clipped before a step's last micro-batch


@GRAD
@pytest.mark.parametrize(("statistic", "refresh_every"), [("absmax", 1), ("l2", 2)])
@pytest.mark.parametrize("early", ["mask_gradients", "clip_grad_norm_"])
def test_micro_batches_after_an_early_call_count_in_their_own_step(early, refresh_every, statistic, grad):
    model, longact, optimizer = salient_run(grad=grad, statistic=statistic, refresh_every=refresh_every)
    written = WrittenOut(tiny_model(), statistic, refresh_every=refresh_every)
    for step in range(5):
        for micro, ids in enumerate(tokens(6, seed=step).chunk(3)):
            backward(model, ids)
            written.backward(ids)
            if step and early == "mask_gradients" and micro < 2:
                longact.mask_gradients()
            elif step and micro < 2:
                longact.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        written.step()
        assert sets(longact) == written.sets, step
    assert_close_weights(model, written.model)


@GRAD
def test_every_micro_batch_is_clipped(grad):
    model, longact, optimizer = salient_run(grad=grad)
    written = WrittenOut(tiny_model())
    for step in range(4):
        for ids in tokens(6, seed=step).chunk(3):
            backward(model, ids)
            written.backward(ids)
            if step:
                norm = longact.clip_grad_norm_(model.parameters(), 5.0)
                masked_in_plain_torch(written.model, longact)
                expected = torch.nn.utils.clip_grad_norm_(written.model.parameters(), 5.0)
                torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)
        optimizer.step()
        optimizer.zero_grad()
        written.step()
        assert sets(longact) == written.sets, step
    assert_close_weights(model, written.model, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "stock"),
    [({}, False), ({"grad": "compact"}, False), ({"selection": "current"}, False), ({"selection": "current"}, True)],
    ids=str,
)
def test_a_set_that_is_chosen_early_stays_for_its_step(options, stock):
    """Its step's later micro-batches train its rows; where a set is for the steps to come, they count for that."""
    model, longact, optimizer = (stock_run if stock else salient_run)(**options)
    written, later = WrittenOut(tiny_model()), WrittenOut(tiny_model())
    first, second = tokens(4, seed=7).chunk(2)
    for one in (written, later):
        one.backward(first)
    chosen = {name: top(values) for name, values in written.witness.saliency("absmax").items()}
    backward(model, first)
    norm = longact.clip_grad_norm_(model.parameters(), float("inf"))
    assert sets(longact) == chosen
    torch.testing.assert_close(norm, masked_in_plain_torch(written.model, longact), rtol=1e-4, atol=0)
    later.drop()
    for one in (written, later):
        one.backward(second)
    backward(model, second)
    norm = longact.clip_grad_norm_(model.parameters(), float("inf"))
    torch.testing.assert_close(norm, masked_in_plain_torch(written.model, longact), rtol=1e-4, atol=0)
    start = tiny_model()
    optimizer.step()
    if not stock:  # AdamW decays all rows
        assert moved_rows(model, start) == chosen
    if "selection" not in options:
        assert sets(longact) == {name: top(values) for name, values in later.witness.saliency("absmax").items()}
    else:
        optimizer.zero_grad()
        backward(model, tokens(seed=8))
        longact.mask_gradients()
        written.model.load_state_dict(model.state_dict())
        written.drop()
        written.backward(tokens(seed=8))
        assert sets(longact) == {name: top(values) for name, values in written.witness.saliency("absmax").items()}


@GRAD
def test_a_layer_that_only_a_later_micro_batch_reaches_is_trained_by_a_set_of_that(grad):
    model, longact, optimizer = salient_run(grad=grad)
    start = tiny_model()
    model(input_ids=tokens(), output_hidden_states=True).hidden_states[1].square().sum().backward()
    longact.clip_grad_norm_(model.parameters(), 1.0)
    assert all("layers.0" in name for name in sets(longact))
    witness = WrittenOut(model)
    witness.backward(tokens(seed=1))
    backward(model, tokens(seed=1))
    longact.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    moved = moved_rows(model, start)
    for name, values in witness.witness.saliency("absmax").items():
        assert len(moved[name]) == len(top(values)) and ("layers.0" in name or moved[name] == top(values))


@GRAD
def test_a_first_batch_that_is_dropped_after_two_early_calls_leaves_no_set(grad):
    model, longact, optimizer = salient_run(grad=grad)
    model(input_ids=tokens(), output_hidden_states=True).hidden_states[1].square().sum().backward()
    longact.mask_gradients()
    backward(model, tokens(seed=1))
    longact.mask_gradients()
    assert len(sets(longact)) == 4
    model.zero_grad()
    assert sets(longact) == {}
    train(model, optimizer, range(2))
    plain, expected, theirs = salient_run(grad=grad)
    train(plain, theirs, range(2))
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


def test_other_gradients_that_were_clipped_alone_before_the_last_micro_batch_are_an_error():
    model, _, optimizer = salient_run(grad="compact")
    train(model, optimizer, range(2))
    backward(model, tokens(seed=2))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match=r"^grad: gradients were clipped .* longact.clip_grad_norm_"):
        backward(model, tokens(seed=3))
    model.zero_grad()
    train(model, optimizer, [2])


def scale(model):
    torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.125)


def clip_values(model):
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-5)


def decay(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.add_(p.detach(), alpha=0.1)


@pytest.mark.parametrize("looks_first", [False, True])
@pytest.mark.parametrize("change", [scale, clip_values, decay])
def test_other_gradients_that_were_changed_alone_are_an_error_of_whatever_reads_them(change, looks_first):
    model, longact, optimizer = salient_run(grad="compact")
    train(model, optimizer, range(2))
    backward(model, tokens(seed=2))
    if looks_first:
        longact.clip_grad_norm_(model.parameters(), float("inf"))
    change(model)
    with pytest.raises(RuntimeError, match=r"^grad: gradients were clipped .* longact.clip_grad_norm_"):
        longact.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match=r"^grad: gradients were clipped .* longact.clip_grad_norm_"):
        optimizer.step()


def test_own_clipping_and_what_comes_after_it_is_no_change():
    model, longact, optimizer = salient_run(grad="compact")
    expected, theirs, others = salient_run(grad="full")
    for run, controller, steps in ((model, longact, optimizer), (expected, theirs, others)):
        for step in range(3):
            for part in tokens(4, seed=step).chunk(2):
                backward(run, part)
                controller.clip_grad_norm_(run.parameters(), 0.1)
                controller.clip_grad_norm_(list(run.parameters())[:3], 0.05)
            steps.step()
            steps.zero_grad()
    assert_close_weights(model, expected)


# Sets that are chosen outside the schedule


@GRAD
@pytest.mark.parametrize("again", [False, True])
def test_gradients_of_the_sets_before_refresh_are_not_stepped(again, grad):
    model, longact, optimizer = salient_run(grad=grad)
    train(model, optimizer, range(2))
    before = weights(model)
    backward(model, tokens(seed=2))
    longact.refresh()
    if again:
        backward(model, tokens(seed=3))
    for reads in (longact.mask_gradients, optimizer.step):
        with pytest.raises(RuntimeError, match=r"^LongAct: refresh\(\) was called between backward and step"):
            reads()
    assert_unchanged(model, before)
    model.zero_grad()
    chosen = sets(longact)
    before = copy.deepcopy(model)
    train(model, optimizer, [4])
    assert moved_rows(model, before) == chosen


@GRAD
def test_refresh_before_there_are_sets_leaves_gradients_of_use(grad):
    model, longact, optimizer = salient_run(grad=grad)
    before = copy.deepcopy(model)
    backward(model, tokens(seed=0))
    longact.refresh()
    chosen = sets(longact)
    optimizer.step()
    assert moved_rows(model, before) == chosen


# torch.autograd.grad


def plain_call(model, ids):
    return loss_of(model(input_ids=ids).logits, ids)


def autocast_call(model, ids):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plain_call(model, ids)


def checkpointed_call(model, ids):
    checkpoint_activations(model, use_reentrant=False)
    return plain_call(model, ids)


@pytest.mark.parametrize(
    ("family", "options", "call"),
    [
        ("Llama", {}, plain_call),
        ("GPT2", {}, autocast_call),
        ("Phi3", {}, checkpointed_call),
        ("Llama", {"axis": "columns"}, autocast_call),
        ("Llama", {"site": "rope"}, checkpointed_call),
    ],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_gradients_that_are_asked_for_are_given_to_who_asks_alone(family, options, call):
    """Between two micro-batches of a step; they are those of grad="full", which torch keeps apart by itself."""
    results = []
    for grad in ("full", "compact"):
        model, longact, optimizer = salient_run(tiny_model(family, **CHANGES.get(family, {})), grad=grad, **options)
        train(model, optimizer, range(2))
        asked = []
        for step in range(2, 4):
            for ids in tokens(4, seed=step).chunk(2):
                backward(model, ids)
                asked += torch.autograd.grad(call(model, ids.flip(1)), [*salient_weights(longact).values()])
            norm = longact.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        results.append((model, sets(longact), asked, norm))
    (full, of_full, theirs, their_norm), (compact, of_compact, ours, our_norm) = results
    assert of_full == of_compact
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(our_norm, their_norm, rtol=1e-4, atol=0)
    assert_close_weights(compact, full, rtol=1e-3, atol=1e-5)


def test_some_weights_gradients_are_asked_for_beside_other_inputs():
    results = []
    for grad in ("full", "compact"):
        model, longact, optimizer = salient_run(grad=grad)
        train(model, optimizer, range(2))
        weight = projections(model)["model.layers.1.self_attn.k_proj"].weight
        asked = torch.autograd.grad(plain_call(model, tokens(seed=5)), [weight, model.lm_head.weight])
        train(model, optimizer, range(2, 4))
        results.append((model, sets(longact), asked))
    assert results[0][1] == results[1][1]
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-4, atol=1e-5)
    assert_close_weights(results[1][0], results[0][0])


def test_gradients_that_were_asked_for_may_be_stepped():
    """By loops that write `p.grad` themselves."""
    results = []
    for grad in ("full", "compact"):
        model, longact, optimizer = salient_run(grad=grad)
        for step in range(4):
            params = list(model.parameters())
            for p, own in zip(params, torch.autograd.grad(plain_call(model, tokens(seed=step)), params), strict=True):
                p.grad = own
            longact.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        results.append((model, sets(longact)))
    model, longact, optimizer = salient_run()
    for step in range(4):
        backward(model, tokens(seed=step))
        longact.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for run, chosen in results:
        assert chosen == sets(longact)
        assert_close_weights(run, model)


@pytest.mark.slow
@pytest.mark.parametrize("asks", [torch.autograd.grad, lambda loss, inputs: loss.backward(inputs=inputs)])
@pytest.mark.parametrize("asked", ["own", "own and others", "what lies behind it"])
def test_compiled_code_cannot_give_compact_gradients_to_who_asks(asked, asks):
    torch.compiler.reset()  # else no more code may be made for one function
    model, longact, optimizer = salient_run(grad="compact")
    module, other, *_ = projections(model).values()
    module.compile(backend="aot_eager")
    train(model, optimizer, range(2))
    inputs = {"own": [module.weight], "own and others": [other.weight, module.weight]}
    inputs = inputs.get(asked, [model.get_input_embeddings().weight])
    loss = loss_of(model(input_ids=tokens(seed=2)).logits, tokens(seed=2))
    if asks is torch.autograd.grad or "own" not in asked:
        with pytest.raises(RuntimeError, match=r"torch\.autograd\.grad: of a compiled model .*grad='full'"):
            asks(loss, inputs)
    else:
        asks(loss, inputs)
    model.zero_grad()
    train(model, optimizer, [2])
    assert longact.steps == 3


# Copies between backward and step

COPY = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@GRAD
@pytest.mark.parametrize(("how", "statistic"), [("deepcopy", "absmax"), ("pickle", "l2")])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("clipped", [False, True])
def test_a_copy_in_the_midst_of_a_step_has_no_part_of_it(clipped, steps, how, statistic, grad):
    """Copies of parameters have no gradients, so that the batch counts for nothing in them."""
    model, longact, optimizer = salient_run(grad=grad, statistic=statistic)
    train(model, optimizer, range(steps))
    backward(model, torch.full((2, 12), 63))
    if clipped:
        longact.clip_grad_norm_(model.parameters(), 1.0)
    other, theirs = COPY[how]((model, optimizer))
    before = weights(other)
    if steps:
        theirs.step()
        theirs.zero_grad()
        assert_unchanged(other, before)
        other, theirs = COPY[how]((model, optimizer))
    train(other, theirs, range(steps, steps + 3))
    plain, expected, its = salient_run(grad=grad, statistic=statistic)
    train(plain, its, range(steps + 3))
    assert sets(LongAct.of(other)) == sets(expected)
    assert_same_weights(other, plain)
    # The one that was copied goes on with its batch.
    backward(model, tokens(seed=9))
    optimizer.step()
    plain, expected, its = salient_run(grad=grad, statistic=statistic)
    train(plain, its, range(steps))
    backward(plain, torch.full((2, 12), 63))
    if clipped:
        expected.clip_grad_norm_(plain.parameters(), 1.0)
    backward(plain, tokens(seed=9))
    its.step()
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


# restore() between backward and step


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("path", [backward, in_the_loss, in_parts])
@pytest.mark.parametrize(
    ("family", "options", "dim"),
    [("Llama", {}, 0), ("GPT2", {}, 1), ("Phi3", {}, 0), ("Llama", {"axis": "columns"}, 1)],
    ids=str,
)
def test_gradients_outlast_restore(family, options, dim, path, clipped):
    grads = []
    for grad in ("full", "compact"):
        model, longact, optimizer = salient_run(tiny_model(family, **CHANGES.get(family, {})), grad=grad, **options)
        train(model, optimizer, range(2))
        path(model, tokens(4, seed=2))
        if clipped:
            longact.clip_grad_norm_(model.parameters(), 0.5)
        longact.restore()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        before = weights(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        for (name, p), old in zip(model.named_parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old - 0.1 * grads[-1][name])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_restore_without_gradients_makes_none():
    model, longact, optimizer = salient_run(grad="compact")
    train(model, optimizer, range(2))
    backward(model, tokens(seed=2))
    optimizer.step()
    optimizer.zero_grad()
    longact.restore()
    assert all(p.grad is None for p in model.parameters())
