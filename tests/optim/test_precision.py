"""16-bit weights, bf16 moments, stochastic rounding, and GradScaler."""

import warnings

import pytest
import torch
from models import backward, tiny_model, tokens

from longact_kernels import LongAct, LongActWarning, SalientAdamW

HYPER = dict(lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def run(model, optimizer, steps=6, scaler=None, factor=1.0):
    for step in range(steps):
        logits = model(input_ids=tokens(seed=step)).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(seed=step + 1).flatten())
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("grad", ["full", "compact"])
@pytest.mark.parametrize("fused", [None, True])
def test_gradscaler_changes_nothing_but_steps_that_overflow(fused, grad):
    results = []
    for scaled in (False, True):
        model = tiny_model()
        longact = LongAct(model, grad=grad)
        optimizer = SalientAdamW(model.parameters(), **HYPER, fused=fused, longact=longact)
        # A power of two: scaling and unscaling round nothing.
        run(model, optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None)
        results.append((model, optimizer))
    (model, _), (scaled, optimizer) = results
    for (name, p), q in zip(model.named_parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    before = [p.detach().clone() for p in scaled.parameters()]
    states = {id(p): optimizer.state[p]["step"].clone() for p in scaled.parameters()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    run(scaled, optimizer, steps=1, scaler=scaler, factor=1e6)
    assert scaler.get_scale() == 2.0**126, "the step must overflow"
    assert all(torch.equal(p, q) for p, q in zip(scaled.parameters(), before, strict=True))
    assert all(torch.equal(optimizer.state[p]["step"], states[id(p)]) for p in scaled.parameters())


def test_unscaling_before_a_step_of_compact_gradients_is_refused():
    model = tiny_model()
    optimizer = SalientAdamW(model.parameters(), longact=LongAct(model, grad="compact"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run(model, optimizer, steps=1, scaler=scaler)
    scaler.scale(model(input_ids=tokens()).logits.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) cannot see compact gradients; leave unscaling"):
        scaler.step(optimizer)


def test_unscaling_before_clipping_works_with_whole_gradients():
    results = []
    for scaled in (False, True):
        model = tiny_model()
        longact = LongAct(model)
        optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(4):
            scaler.scale(model(input_ids=tokens(seed=step)).logits.square().mean()).backward()
            scaler.unscale_(optimizer)
            longact.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("state", ["full", "compact"])
def test_bf16_moments_follow_fp32_ones_at_half_the_bytes(state):
    models, optimizers = [], []
    for moments in (torch.float32, torch.bfloat16):
        model = tiny_model()
        longact = LongAct(model, freeze_after=1)
        optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact, state=state, moments=moments)
        run(model, optimizer, steps=12)
        models.append(model)
        optimizers.append(optimizer)
    wide, narrow = optimizers
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            kept = narrow.state[q][name]
            assert kept.dtype == torch.bfloat16
            # Each of the steps rounds by at most the last of 8 digits, here and in the sums that they add up to.
            scale = wide.state[p][name].abs().amax()
            assert (kept.float() - wide.state[p][name].view(kept.shape)).abs().amax() <= 12 * 2**-7 * scale
    ours, dense = narrow.salient_state_bytes()
    wide_ours, wide_dense = wide.salient_state_bytes()
    assert dense * 2 == wide_dense and ours < 0.6 * wide_ours


def test_stochastic_rounding_learns_where_rounding_to_nearest_stands_still():
    drifts = {}
    for stochastic in (False, True):
        model = tiny_model().to(torch.bfloat16)
        longact = LongAct(model, density=0.5, freeze_after=1)
        optimizer = SalientAdamW(
            model.parameters(),
            lr=1e-5,
            weight_decay=0.0,
            longact=longact,
            master_weights=False,
            stochastic_rounding=stochastic,
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(30):
            backward(model, tokens())  # the same batch: the updates all have one sign
            optimizer.step()
            optimizer.zero_grad()
        drifts[stochastic] = {
            name: ((p - before[name]).float().abs().mean() / 30e-5).item() for name, p in model.named_parameters()
        }
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        density = 0.5 if "q_proj" in name else 1.0
        assert drifts[False][name] < 0.4 * density
        # Adam's steps on a constant gradient are one learning rate each; the mean is over thousands of elements.
        assert 0.7 * density < drifts[True][name] < 1.3 * density, drifts


def test_stochastic_rounding_is_the_same_at_every_run():
    runs = []
    for _ in range(2):
        model = tiny_model().to(torch.bfloat16)
        optimizer = SalientAdamW(
            model.parameters(), **HYPER, longact=LongAct(model), master_weights=False, stochastic_rounding=True
        )
        run(model, optimizer, steps=3)
        runs.append(list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"moments": torch.float16}, r"^moments: got torch\.float16, needed"),
        ({"stochastic_rounding": True}, r"^stochastic_rounding: .* needed master_weights=False"),
    ],
)
def test_bad_arguments_are_named(argument, message):
    with pytest.raises(ValueError, match=message):
        SalientAdamW(tiny_model().parameters(), **argument)


@pytest.mark.parametrize("state", ["full", "compact"])
def test_what_somebody_else_writes_to_a_weight_stays(state):
    """A checkpoint that is loaded in mid-run, an average that is put back: their masters follow."""
    model = tiny_model().to(torch.bfloat16)
    optimizer = SalientAdamW(model.parameters(), lr=1e-2, longact=LongAct(model), state=state)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, optimizer, steps=3)
    untouched = model.model.layers[1].mlp.up_proj.weight
    kept = untouched.detach().clone(), optimizer.state[untouched]["master"].clone()
    model.load_state_dict(best | {"model.layers.1.mlp.up_proj.weight": kept[0]})
    optimizer.param_groups[0]["lr"] = 0.0
    run(model, optimizer, steps=1)
    for (name, p), start in zip(model.named_parameters(), best.values(), strict=True):
        assert torch.equal(p, kept[0] if p is untouched else start), name
    # Digits below the weight's last one, which was written with the value that it had.
    assert torch.equal(optimizer.state[untouched]["master"], kept[1])


def test_updates_that_round_to_nothing_are_counted():
    """Without a master: the share of a weight's elements with a gradient that an update leaves as they are."""
    from longact_kernels.integrations.common import metrics_of

    shares = {}
    for lr in (1e-9, 3e-2):
        model = tiny_model().bfloat16()
        longact = LongAct(model)
        optimizer = SalientAdamW(model.parameters(), lr=lr, weight_decay=0.0, master_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LongActWarning)
            for seed in range(2):
                backward(model, tokens(seed=seed))
                optimizer.step()
                optimizer.zero_grad()
        shares[lr] = metrics_of(longact, optimizer)["updates_lost"]
    assert shares[1e-9] > 0.95 and shares[3e-2] < 0.2, shares
    model = tiny_model().bfloat16()
    longact = LongAct(model)
    optimizer = SalientAdamW(model.parameters(), lr=1e-9)
    backward(model, tokens(seed=0))
    optimizer.step()
    assert "updates_lost" not in metrics_of(longact, optimizer)
