"""Statistics of queries and keys behind the norm, or as attention sees them, against hooks on an unpatched copy."""

import copy
import sys

import pytest
import torch
from models import backward, tiny_model, tokens

from longact_kernels import LongAct


def by_channel(y: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, channels] of a query or key in any layout, found by the size of its heads (10)."""
    if y.ndim == 4:
        y = (y.transpose(1, 2) if y.shape[1] == heads else y).flatten(2)
    return y.detach().float()


def watched_norms(model, run) -> dict[str, torch.Tensor]:
    """What the norms of an unpatched copy put out, by the projection's name."""
    seen, plain = {}, copy.deepcopy(model)
    for name, module in plain.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            projection = name.replace("_norm", "_proj")
            module.register_forward_hook(lambda m, i, out, projection=projection: seen.__setitem__(projection, out))
    run(plain)
    return {name: by_channel(y, 4 if "q_proj" in name else 2) for name, y in seen.items()}


def watched_rope(model, run, monkeypatch) -> dict[str, torch.Tensor]:
    """What the rotary embedding of the model's own code gives, layer by layer."""
    modelling, calls = sys.modules[type(model).__module__], []
    original = modelling.apply_rotary_pos_emb

    def recorded(*args, **kwargs):
        calls.append(original(*args, **kwargs))
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(modelling, "apply_rotary_pos_emb", recorded)
        run(copy.deepcopy(model))
    names = [name for name, module in model.named_modules() if name.endswith(("self_attn", ".attention"))]
    seen = {}
    for name, (q, k) in zip(names, calls, strict=True):
        seen |= {f"{name}.q": by_channel(q, q.shape[1]), f"{name}.k": by_channel(k, k.shape[1])}
    return seen


def statistic(y: torch.Tensor, which: str, mask: torch.Tensor) -> torch.Tensor:
    y = y * mask.unsqueeze(-1)
    return y.abs().amax((0, 1)) if which == "absmax" else y.square().sum(1).sqrt().mean(0)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    return tokens(3), mask


@pytest.mark.parametrize("which", ["absmax", "l2"])
@pytest.mark.parametrize("family", ["Qwen3", "Olmo2", "Gemma3Text"])
def test_norm(family, which):
    model = tiny(family)
    ids, mask = padded()
    seen = watched_norms(model, lambda plain: plain(ids, attention_mask=mask))
    longact = LongAct(model, site="norm", statistic=which)
    backward(model, ids, attention_mask=mask)
    longact.mask_gradients()
    assert seen.keys() == longact.layers.keys()
    for name, y in seen.items():
        torch.testing.assert_close(longact.saliency(name), statistic(y, which, mask), rtol=1e-6, atol=1e-6)


def tiny(family: str) -> torch.nn.Module:
    if family == "Gemma3Text":
        return tiny_model(family, layer_types=["full_attention"] * 2)
    if family == "GPTNeoX":
        return tiny_model(family, num_key_value_heads=4, hidden_size=40)
    return tiny_model(family)


@pytest.mark.parametrize("length", [2, 4])
def test_norm_with_as_many_tokens_as_heads(length):
    for family in ("Qwen3", "Gemma3Text"):
        model, ids = tiny(family), tokens(2, length)
        longact = LongAct(model, site="norm")
        backward(model, ids)
        longact.mask_gradients()
        # More tokens behind these change nothing about them, and leave no doubt about the layout.
        plain = tiny(family)
        seen = watched_norms(plain, lambda net, ids=ids: net(torch.cat([ids, ids[:, :1], ids[:, 1:2], ids[:, :1]], 1)))
        for name, y in seen.items():
            torch.testing.assert_close(longact.saliency(name), y[:, :length].abs().amax((0, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["absmax", "l2"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPTNeoX"])
def test_rope(family, which, monkeypatch):
    model = tiny(family)
    ids, mask = padded()
    seen = watched_rope(model, lambda plain: plain(ids, attention_mask=mask), monkeypatch)
    longact = LongAct(model, site="rope", statistic=which)
    backward(model, ids, attention_mask=mask)
    longact.mask_gradients()
    for name, layer in longact.layers.items():
        attention = name.rpartition(".")[0]
        values = {kind: statistic(seen[f"{attention}.{kind}"], which, mask) for kind in "qk"}
        if family == "GPTNeoX":  # for each head its query, key, value
            parts = torch.stack([values["q"].view(4, 10), values["k"].view(4, 10), torch.zeros(4, 10)], 1)
            expected = parts.flatten()
        else:
            expected = values[name.rpartition(".")[2][0]]
        torch.testing.assert_close(longact.saliency(name), expected, rtol=1e-6, atol=1e-6)
        assert len(layer.salient.index) == longact._select.sizes[list(longact.layers).index(name)]


@pytest.mark.parametrize("site", ["norm", "rope"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_taps_change_no_bit_and_are_gone_after_restore(site, attention):
    model = tiny_model("Qwen3", attn_implementation=attention)
    plain = copy.deepcopy(model)
    config = model.model.layers[0].self_attn.config
    longact = LongAct(model, site=site)
    losses = [backward(net, tokens(3)) for net in (model, plain)]
    assert torch.equal(*losses)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    longact.restore()
    assert model.model.layers[0].self_attn.config is config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(backward(model, tokens(3)), losses[0])


@pytest.mark.parametrize("site", ["projection", "norm", "rope"])
def test_gradients_that_autograd_grad_is_asked_for(site):
    model = tiny_model("Qwen3")
    weight = model.model.layers[0].self_attn.q_proj.weight
    (dense,) = torch.autograd.grad(model(tokens()).logits.square().sum(), weight)
    longact = LongAct(model, site=site)
    (first,) = torch.autograd.grad(model(tokens()).logits.square().sum(), weight)
    assert torch.equal(first, dense)
    longact.refresh()
    rows = longact.sets["model.layers.0.self_attn.q_proj"]
    (grad,) = torch.autograd.grad(model(tokens()).logits.square().sum(), weight)
    torch.testing.assert_close(grad[rows], dense[rows])
    grad[rows] = 0
    assert not grad.any()


@pytest.mark.parametrize("site", ["projection", "norm", "rope"])
def test_a_copy_of_a_model_has_its_own_controller(site):
    model = tiny_model("Qwen3")
    longact = LongAct(model, site=site)
    backward(model, tokens())
    longact.mask_gradients()
    before = torch.cat([longact.saliency(name) for name in longact.layers])
    twin = copy.deepcopy(model)
    other = LongAct.of(twin)
    assert other is not longact and other.model is twin
    other.advance()
    backward(twin, 63 - tokens(seed=1))
    other.refresh()
    assert not torch.equal(torch.cat([other.saliency(name) for name in other.layers]), before)
    assert not longact._statistics.batch.buffer.any() and not longact._statistics.period.buffer.any()
    longact.advance()
    assert torch.equal(torch.cat([longact.saliency(name) for name in longact.layers]), before)


@pytest.mark.parametrize("grad", ["full", "compact"])
def test_models_without_such_a_place_are_refused_and_left_alone(grad):
    model = tiny_model("Llama")
    with pytest.raises(ValueError, match=r"^site: 'norm' needs a q_norm or q_layernorm in model\.layers\.0\.self_attn"):
        LongAct(model, site="norm", grad=grad)
    assert all(type(m) is torch.nn.Linear for n, m in model.named_modules() if n.endswith("q_proj"))
    attention = torch.nn.Module()
    attention.q_proj, attention.k_proj, attention.head_dim = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), 4
    model = torch.nn.Sequential()
    model.add_module("attention", attention)
    with pytest.raises(ValueError, match=r"^site: 'rope' needs attention that takes its function .*; attention, a Mod"):
        LongAct(model, site="rope", grad=grad)
