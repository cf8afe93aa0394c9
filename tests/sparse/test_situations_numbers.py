"""NaN and Inf in activations, gradients and losses: none reaches a weight, and training goes on without the batch."""

import re
from functools import partial

import pytest
import torch
from situations import (
    HYPER,
    assert_close_weights,
    assert_same_weights,
    assert_unchanged,
    backward,
    loss_of,
    projections,
    salient_run,
    sets,
    stock_run,
    tiny_model,
    tokens,
    train,
    weights,
)

from longact_kernels import LongAct, SalientAdamW

BAD = 3  # the step that goes wrong
NAN, INF = float("nan"), float("inf")


def poisoned(where: str, value: float):
    """Makes one batch's backward, with a bad number at a place."""

    def activation(model, ids, layer=1):
        handle = model.model.layers[layer].input_layernorm.register_forward_hook(
            lambda m, args, out: out.masked_fill(torch.arange(out.shape[1])[None, :, None] == 5, value)
        )
        backward(model, ids)
        handle.remove()

    def gradient(model, ids, name):
        handle = model.get_parameter(name).register_hook(
            lambda grad: grad.clone().index_fill_(0, torch.tensor(2), value)
        )
        backward(model, ids)
        handle.remove()

    def loss(model, ids):
        (loss_of(model(input_ids=ids).logits, ids) * value).backward()

    def after(model, ids, name):
        """Written into a gradient after backward, as a bad all-reduce or a user's own scaling would."""
        backward(model, ids)
        grad = model.get_parameter(name).grad
        (projections(model)["model.layers.0.self_attn.q_proj"].weight.grad if grad is None else grad).view(-1)[7] = (
            value
        )

    return {
        "activation": activation,
        "first activation": lambda model, ids: activation(model, ids, layer=0),
        "loss": loss,
        "gradient of a query": lambda model, ids: gradient(model, ids, "model.layers.0.self_attn.q_proj.weight"),
        "gradient of an MLP": lambda model, ids: gradient(model, ids, "model.layers.1.mlp.up_proj.weight"),
        "gradient of a norm": lambda model, ids: gradient(model, ids, "model.norm.weight"),
        "gradient, after backward": lambda model, ids: after(model, ids, "lm_head.weight"),
    }[where]


PLACES = [
    "activation",
    "first activation",
    "loss",
    "gradient of a query",
    "gradient of an MLP",
    "gradient of a norm",
    "gradient, after backward",
]
KINDS = {
    "lagged": {},
    "current": {"selection": "current", "statistic": "l2"},
    "compact": {"grad": "compact"},
    "stock": {"stock": True},
    "stock, fused": {"stock": True, "fused": True},
}
VALUES = pytest.mark.parametrize(
    ("kind", "where", "value"),
    [
        *(("lagged", where, NAN) for where in PLACES),
        *(("lagged", where, INF) for where in ("activation", "gradient of an MLP")),
        *(
            (kind, where, NAN)
            for kind in ("current", "compact", "stock", "stock, fused")
            for where in ("activation", "loss", "gradient of a query", "gradient of an MLP")
        ),
    ],
)


def make(kind: dict, **options):
    kind = dict(kind)
    if kind.pop("fused", False):
        kind["kind"] = partial(torch.optim.AdamW, **HYPER, fused=True)
    return (stock_run if kind.pop("stock", False) else salient_run)(**kind, **options)


def compact_query(kind, where) -> bool:
    """Compact gradients do not pass by the weight: a hook on it sees none once there is a set."""
    return kind == "compact" and where == "gradient of a query"


@VALUES
def test_an_error_names_layer_and_step_and_the_weights_are_untouched(kind, where, value):
    """It may come a step late, since the host does not wait; the batch of that step is then taken again."""
    if compact_query(kind, where):
        pytest.skip("no such gradient")
    model, longact, optimizer = make(KINDS[kind])
    errors = []
    step, poison = 0, True
    while step < 7:
        try:
            if step == BAD and poison:
                poison = False
                before = weights(model)
                poisoned(where, value)(model, tokens(seed=99))
                try:
                    optimizer.step()
                finally:
                    assert_unchanged(model, before)
                    optimizer.zero_grad()
                continue
            train(model, optimizer, [step])
            step += 1
        except FloatingPointError as error:
            errors.append(str(error))
            assert_unchanged(model, before)
            optimizer.zero_grad()
            assert len(errors) == 1, "every later step raises"
    assert errors, "nobody is told"
    assert re.search(rf"step ({BAD}|{BAD + 1})\b", errors[0]), errors[0]
    if where == "gradient of an MLP":
        assert "model.layers.1.mlp.up_proj" in errors[0]
    else:
        assert re.search(r"(layers\.\d\.|norm|lm_head|embed_tokens)", errors[0]), errors[0]
    plain, expected, theirs = make(KINDS[kind])
    train(plain, theirs, range(7))
    assert sets(longact) == sets(expected)
    assert_close_weights(model, plain, rtol=1e-6, atol=1e-7)


@VALUES
def test_with_skip_the_step_does_nothing(kind, where, value):
    if compact_query(kind, where):
        pytest.skip("no such gradient")
    model, longact, optimizer = make(KINDS[kind], nonfinite="skip")
    train(model, optimizer, range(BAD))
    before, chosen = weights(model), sets(longact)
    poisoned(where, value)(model, tokens(seed=99))
    optimizer.step()
    optimizer.zero_grad()
    assert_unchanged(model, before)
    # "current" has chosen a set from the batch, to mask its gradient by; the next batch chooses anew.
    assert kind == "current" or sets(longact) == chosen
    train(model, optimizer, range(BAD, 7))
    plain, expected, theirs = make(KINDS[kind], nonfinite="skip")
    train(plain, theirs, range(7))
    assert sets(longact) == sets(expected)
    assert_close_weights(model, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("where", ["activation", "loss", "gradient of an MLP"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_a_bad_first_batch(nonfinite, kind, where):
    """There is no set yet, and none is chosen from it."""
    model, longact, optimizer = make(KINDS[kind], nonfinite=nonfinite)
    before = weights(model)
    errors = 0
    poisoned(where, NAN)(model, tokens(seed=99))
    try:
        optimizer.step()
    except FloatingPointError:
        errors += 1
    optimizer.zero_grad()
    assert_unchanged(model, before)
    for step in range(3):
        try:
            train(model, optimizer, [step])
        except FloatingPointError:
            errors += 1
            optimizer.zero_grad()
            train(model, optimizer, [step])
    assert errors == (nonfinite == "error")
    plain, expected, theirs = make(KINDS[kind], nonfinite=nonfinite)
    train(plain, theirs, range(3))
    assert sets(longact) == sets(expected)
    assert_close_weights(model, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("zero", "nonfinite"), [("optimizer", "error"), ("model", "error"), ("optimizer", "skip")])
@pytest.mark.parametrize("where", ["activation", "loss", "gradient of an MLP"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_batch_that_the_user_drops_before_the_step(zero, kind, where, nonfinite):
    """Found by its loss or its norm after backward; nobody is told about it afterwards."""
    model, longact, optimizer = make(KINDS[kind], nonfinite=nonfinite)
    for step in range(6):
        if step == BAD:
            poisoned(where, NAN)(model, tokens(seed=99))
            (optimizer if zero == "optimizer" else model).zero_grad()
        train(model, optimizer, [step])
    plain, expected, theirs = make(KINDS[kind], nonfinite=nonfinite)
    train(plain, theirs, range(6))
    assert sets(longact) == sets(expected) and longact.steps == 6
    assert_same_weights(model, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_whose_loss_is_looked_at_before_backward(kind):
    model, longact, optimizer = make(KINDS[kind])
    for step in range(5):
        handle = model.model.layers[0].input_layernorm.register_forward_hook(lambda m, args, out: out * NAN)
        assert not loss_of(model(input_ids=tokens(seed=99)).logits, tokens(seed=99)).isfinite()
        handle.remove()
        train(model, optimizer, [step])
    plain, expected, theirs = make(KINDS[kind])
    train(plain, theirs, range(5))
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["activation", "loss", "gradient of an MLP"])
def test_one_bad_micro_batch_spoils_its_step_alone(where, kind):
    model, longact, optimizer = make(KINDS[kind], nonfinite="skip")
    plain, expected, theirs = make(KINDS[kind], nonfinite="skip")
    for step in range(5):
        if step == BAD:
            before = weights(model)
            backward(model, tokens(seed=97))
            poisoned(where, NAN)(model, tokens(seed=98))
            backward(model, tokens(seed=99))
            optimizer.step()
            optimizer.zero_grad()
            assert_unchanged(model, before)
        train(model, optimizer, [step])
        train(plain, theirs, [step])
    assert sets(longact) == sets(expected)
    assert_close_weights(model, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_spreads_no_bad_number(kind, nonfinite):
    """The norm is NaN, and so is every gradient after it."""
    model, longact, optimizer = make(KINDS[kind], nonfinite=nonfinite)
    plain, expected, theirs = make(KINDS[kind], nonfinite=nonfinite)

    def step_of(run, controller, each, seed, bad=False):
        (poisoned("gradient of an MLP", NAN) if bad else backward)(run, tokens(seed=seed))
        norm = controller.clip_grad_norm_(run.parameters(), 1.0)
        assert bad or norm.isfinite()
        try:
            each.step()
        finally:
            each.zero_grad()

    errors = 0
    for step in range(5):
        for bad in (True, False) if step == BAD else (False,):
            before = weights(model)
            try:
                step_of(model, longact, optimizer, step, bad)
            except FloatingPointError:
                errors += 1
                assert_unchanged(model, before)
                if not bad:  # told a step late
                    step_of(model, longact, optimizer, step)
            if bad:
                assert_unchanged(model, before)
        step_of(plain, expected, theirs, step)
    assert errors == (nonfinite == "error")
    assert sets(longact) == sets(expected)
    assert_close_weights(model, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "form", [{"fused": True}, {"foreach": True}, {"foreach": False}, {"state": "compact"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_the_update_obeys(dtype, form):
    form = dict(form)
    state = form.pop("state", "full")
    results = []
    for bad in (True, False):
        model = tiny_model().to(dtype)
        longact = LongAct(model, nonfinite="skip")
        optimizer = SalientAdamW(model.parameters(), **HYPER, state=state, **form)
        train(model, optimizer, range(BAD))
        if bad:
            before = weights(model)
            poisoned("loss", NAN)(model, tokens(seed=99))
            optimizer.step()
            optimizer.zero_grad()
            assert_unchanged(model, before)
        train(model, optimizer, range(BAD, 6))
        results.append((model, sets(longact), optimizer.state_dict()["state"]))
    assert results[0][1] == results[1][1]
    assert_same_weights(results[0][0], results[1][0])
    for i, state in results[0][2].items():
        for name, value in state.items():
            if not name.startswith("salient_"):
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(results[1][2][i][name])), (i, name)


@pytest.mark.parametrize("nonfinite", ["error", "skip"])
def test_weights_never_become_nan_in_a_run_that_goes_wrong_for_good(nonfinite):
    """A model that has blown up gives bad batches only: weights stay what they were, and "error" says so."""
    model, _, optimizer = salient_run(nonfinite=nonfinite)
    train(model, optimizer, range(2))
    before = weights(model)
    errors = 0
    for step in range(2, 6):
        poisoned("activation", NAN)(model, tokens(seed=step))
        try:
            optimizer.step()
        except FloatingPointError:
            errors += 1
        optimizer.zero_grad()
        assert_unchanged(model, before)
    assert errors >= 2 if nonfinite == "error" else not errors


def test_a_nan_in_a_frozen_or_unused_place_is_nobodys_business():
    """A parameter whose gradient is no longer asked for, and one that the optimizer does not hold."""
    model = tiny_model()
    longact = LongAct(model)
    optimizer = SalientAdamW([p for name, p in model.named_parameters() if "lm_head" not in name], **HYPER)
    plain = tiny_model()
    expected = LongAct(plain)
    theirs = SalientAdamW([p for name, p in plain.named_parameters() if "lm_head" not in name], **HYPER)
    for step in range(3):
        backward(model, tokens(seed=step))
        backward(plain, tokens(seed=step))
        model.lm_head.weight.grad.fill_(NAN)
        for run, each in ((model, optimizer), (plain, theirs)):
            each.step()
            run.zero_grad()
    assert sets(longact) == sets(expected)
    assert_same_weights(model, plain)


def test_the_trainer_is_told(tmp_path):
    from transformers import Trainer, TrainingArguments

    from longact_kernels.integrations.trainer import LongActTrainerMixin

    class SparseTrainer(LongActTrainerMixin, Trainer):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            if self.state.global_step == 2:
                model.lm_head.weight.grad.fill_(NAN)
                self.before = weights(model)
            return loss

    model = tiny_model()
    data = [{"input_ids": row, "labels": row} for row in tokens(32)]
    args = dict(output_dir=str(tmp_path), max_steps=5, save_strategy="no", report_to="none", use_cpu=True)
    trainer = SparseTrainer(
        model=model,
        longact=LongAct(model),
        args=TrainingArguments(**args, disable_tqdm=True, logging_steps=10),
        train_dataset=data,
    )
    with pytest.raises(FloatingPointError, match=r"step \d"):
        trainer.train()
    assert_unchanged(model, trainer.before)


def test_a_loss_that_is_nan_where_its_gradients_are_not():
    """As a constant in it may be: a loop tells of its loss, and the step does nothing."""
    for nonfinite in ("error", "skip", "off"):
        model, longact, optimizer = salient_run(nonfinite=nonfinite)
        train(model, optimizer, range(2))
        before = weights(model)
        loss = loss_of(model(input_ids=tokens(seed=9)).logits, tokens(seed=9)) + NAN
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        longact.look_at(loss)
        if nonfinite == "error":
            with pytest.raises(FloatingPointError, match="in the loss at step 3"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        if nonfinite != "off":
            assert_unchanged(model, before)
            assert longact.skipped == 1
        train(model, optimizer, range(2, 4))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_bad_itself_is_named(name):
    model, _, optimizer = salient_run()
    train(model, optimizer, range(2))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = NAN
    backward(model, tokens(seed=5))
    with pytest.raises(FloatingPointError, match=rf"the weight {name} itself, which a checkpoint"):
        optimizer.step()


def test_every_bad_layer_is_known_on_the_device():
    """What a GPU posts, and reads a step later: a flag a layer, not one for all of them."""
    model, longact, optimizer = salient_run(nonfinite="skip")
    posted = []
    longact.numbers.watch.post = lambda flags, names, step: posted.append(
        [names(int(i)) for i in flags.nonzero().flatten()]
    )
    train(model, optimizer, range(2))
    poisoned("activation", NAN)(model, tokens(seed=99))
    optimizer.step()
    layers = [name for name in posted[-1] if name.startswith("the activations of ")]
    assert "the activations of model.layers.1.self_attn.q_proj" in layers
    assert "the activations of model.layers.0.self_attn.q_proj" not in layers


@pytest.mark.parametrize("selection", ["lagged", "current"])
def test_a_gradient_is_looked_at_once_in_a_step(monkeypatch, selection):
    from longact_kernels.sparse import finite

    looked = []
    real = finite.nonfinite
    monkeypatch.setattr(finite, "nonfinite", lambda grads: looked.extend(map(id, grads := list(grads))) or real(grads))
    model, _, optimizer = salient_run(selection=selection)
    train(model, optimizer, range(1))
    assert len(looked) == len(set(looked)) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", value) for value in (NAN, INF, -1.0, "1", None, torch.tensor(NAN), torch.ones(2))),
        *(("betas", value) for value in (None, 0.9, (0.9,), (0.9, 1.0), (NAN, 0.9), "ab", (0.9, 0.9, 0.9))),
        *((name, value) for name in ("eps", "weight_decay") for value in (NAN, INF, -1.0, "x", None)),
    ],
)
@pytest.mark.parametrize("group", [0, 1])
def test_a_hyperparameter_gone_wrong_between_steps_changes_nothing(name, value, group):
    """Neither the ordinary weights, which are stepped first, nor those of an earlier group."""
    model = tiny_model()
    longact = LongAct(model)
    params = list(model.parameters())
    optimizer = SalientAdamW([{"params": params[:5]}, {"params": params[5:]}], **HYPER)
    train(model, optimizer, range(2))
    before, steps = weights(model), longact.steps
    right, optimizer.param_groups[group][name] = optimizer.param_groups[group][name], value
    with pytest.raises(ValueError, match=rf"^param_groups\[{group}\]: {'beta' if name == 'betas' else name}") as caught:
        train(model, optimizer, [2])
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
    optimizer.param_groups[group][name] = right
    optimizer.step()
    assert longact.steps == steps + 1
    plain, _, theirs = salient_run()
    train(plain, theirs, range(3))
    assert_same_weights(model, plain)


def optimizer_in_groups(model):
    params = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": params[:5]}, {"params": params[5:]}], **HYPER)
    LongAct(model).attach(optimizer)
    return optimizer


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay"])
@pytest.mark.parametrize("value", [NAN, INF, -1.0])
def test_a_hyperparameter_of_a_stock_optimizer_gone_wrong_changes_nothing(name, value, closure):
    (model, optimizer), (plain, other) = ((model, optimizer_in_groups(model)) for model in (tiny_model(), tiny_model()))
    train(model, optimizer, range(2))
    train(plain, other, range(3))
    before = weights(model)
    right, optimizer.param_groups[1][name] = optimizer.param_groups[1][name], value
    backward(model, tokens(seed=2))
    with pytest.raises(ValueError, match=rf"^param_groups\[1\]: {name}: got"):
        optimizer.step(*[lambda: None] * closure)
    assert_unchanged(model, before)
    optimizer.param_groups[1][name] = right
    optimizer.step()
    assert_same_weights(model, plain)


@pytest.mark.parametrize("options", [{}, {"grad": "compact"}, {"axis": "columns"}])
@pytest.mark.parametrize("state", ["full", "compact"])
def test_gradients_that_are_negated_views_are_read_with_their_sign(state, options):
    model, _, optimizer = salient_run(state=state, **options)
    plain, _, theirs = salient_run(state=state, **options)
    for step in range(3):
        for one, of in ((model, optimizer), (plain, theirs)):
            backward(one, tokens(seed=step))
            for p in one.parameters():
                if one is model and p.grad is not None:
                    p.grad = (-p.grad)._neg_view()
            of.step()
            of.zero_grad()
    assert_same_weights(model, plain)
