"""Gradients kept as accumulators of the salient channels alone, against whole gradients."""

import copy

import pytest
import torch
from models import backward, tiny_model, tokens

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.functional import salient_linear
from longact_kernels.sparse.finite import nonfinite

# A large eps: the gradient of a key's bias is 0 but for rounding, which would otherwise be scaled up to full steps.
HYPER = dict(lr=3e-3, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_accumulator_holds_the_salient_part_of_the_gradient(axis, transposed):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 7, 10), torch.randn(2, 7, 12)
    weight = torch.randn(10, 12) if transposed else torch.randn(12, 10)
    channels = torch.tensor([0, 3, 9])
    dim = int((axis == "columns") != transposed)
    results = []
    for rows, compact in ((None, False), (channels, False), (channels, True)):
        leaf, inputs = weight.clone().requires_grad_(), x.clone().requires_grad_()
        shape = list(weight.shape)
        shape[dim] = 3
        grad = torch.ones(shape) if compact else None
        y = salient_linear(inputs, leaf, None, rows, axis=axis, transposed=transposed, grad=grad)
        y.backward(dy)
        results.append((y.detach(), inputs.grad, leaf.grad, grad))
    (y, dx, dense, _), (y1, dx1, sparse, _), (y2, dx2, none, accumulated) = results
    assert torch.equal(y, y1) and torch.equal(y, y2) and torch.equal(dx, dx1) and torch.equal(dx, dx2)
    assert torch.equal(y, x @ (weight if transposed else weight.t()))
    torch.testing.assert_close(sparse.index_select(dim, channels), dense.index_select(dim, channels))
    assert sparse.count_nonzero() == sparse.index_select(dim, channels).count_nonzero()
    assert none is None
    torch.testing.assert_close(accumulated, 1 + dense.index_select(dim, channels))


def trained(grad: str, state: str, axis: str = "rows", steps: int = 5, clip: bool = True, pieces: int = 2):
    model = tiny_model("GPT2", n_head=4, n_embd=32, n_layer=2) if axis == "conv" else tiny_model()
    longact = LongAct(model, grad=grad, axis="rows" if axis == "conv" else axis)
    optimizer = SalientAdamW(model.parameters(), **HYPER, longact=longact, state=state)
    norms = []
    for step in range(steps):
        for piece in tokens(4, seed=step).chunk(pieces):
            backward(model, piece)
        if clip:
            norms.append(longact.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
    return model, longact, norms


@pytest.mark.parametrize("axis", ["rows", "columns", "conv"])
@pytest.mark.parametrize("state", ["full", "compact"])
def test_training_is_that_of_whole_gradients(state, axis):
    (full, sets, norms), (compact, sets_too, norms_too) = (trained(grad, state, axis) for grad in ("full", "compact"))
    torch.testing.assert_close(norms, norms_too)
    for (name, p), q in zip(full.named_parameters(), compact.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    for name, layer in sets.layers.items():
        assert torch.equal(layer.salient.index, sets_too.layers[name].salient.index)


def test_weights_get_no_gradient_of_their_own_after_the_first_step():
    model, longact, _ = trained("compact", "compact", steps=1)
    backward(model, tokens())
    for layer in longact.layers.values():
        assert layer.weight.grad is None
        assert layer.salient.grad.shape == (len(layer.salient.index), layer.in_features)
        assert layer.salient.grad.any(1).all()


def test_clipping_is_that_of_torch_over_the_same_gradients():
    model, longact, _ = trained("compact", "full", steps=1)
    twin = copy.deepcopy(model)
    backward(model, tokens())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    gradients += [layer.salient.grad.clone() for layer in longact.layers.values()]
    leaves = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in gradients]
    for leaf, grad in zip(leaves, gradients, strict=True):
        leaf.grad = grad
    expected = torch.nn.utils.clip_grad_norm_(leaves, 0.5)
    torch.testing.assert_close(longact.clip_grad_norm_(model.parameters(), 0.5), expected)
    clipped = [p.grad for p in model.parameters() if p.grad is not None]
    clipped += [layer.salient.grad for layer in longact.layers.values()]
    torch.testing.assert_close(clipped, [leaf.grad for leaf in leaves])
    # With whole gradients it is torch's own, after masking.
    other = LongAct.of(twin)
    other.restore()
    whole = LongAct(twin, selection="current")
    backward(twin, tokens())
    norm = whole.clip_grad_norm_(twin.parameters(), 1e9)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(twin.parameters(), 1e9))


def test_zero_grad_clears_the_accumulators():
    model, longact, _ = trained("compact", "full", steps=1)
    optimizer = SalientAdamW(model.parameters(), longact=longact)
    backward(model, tokens())
    optimizer.zero_grad()
    assert longact.compact.present() == []


def test_what_it_does_not_go_with_is_said():
    with pytest.raises(ValueError, match=r"^grad: 'compact' needs the set before backward; use selection='lagged'"):
        LongAct(tiny_model(), grad="compact", selection="current")
    longact = LongAct(tiny_model(), grad="compact")
    with pytest.raises(ValueError, match=r"^attach: a stock optimizer does not see compact gradients"):
        longact.attach(torch.optim.AdamW(longact.model.parameters()))


@pytest.mark.parametrize("options", [{}, {"grad": "compact"}, {"selection": "current"}, {"site": "norm"}])
@pytest.mark.parametrize("form", ["autograd.grad", "backward(inputs=)"])
def test_a_backward_that_stops_before_the_weights_counts_for_nothing(options, form):
    """As of gradient penalties, adversarial embeddings and saliency maps."""
    weights, chosen = [], []
    for probed in (False, True):
        model = tiny_model("Qwen3")
        longact = LongAct(model, **options)
        optimizer = SalientAdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            if probed:
                embedded = model.get_input_embeddings()(tokens(seed=9 + step)).detach().mul(7).requires_grad_()
                loss = model(inputs_embeds=embedded).logits.square().sum()
                if form == "autograd.grad":
                    torch.autograd.grad(loss, embedded)
                else:
                    loss.backward(inputs=[embedded])
            backward(model, tokens(seed=step))
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
        chosen.append({name: index.tolist() for name, index in longact.sets.items()})
    assert chosen[0] == chosen[1]
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1),
        lambda model: torch.nn.utils.clip_grad_value_(model.parameters(), 0.1),
        lambda model: [p.grad.div_(4) for p in model.parameters() if p.grad is not None],
    ],
    ids=["clip_grad_norm_", "clip_grad_value_", "divided"],
)
def test_what_changes_other_gradients_alone_is_an_error(change):
    model = tiny_model()
    longact = LongAct(model, grad="compact")
    optimizer = SalientAdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        backward(model, tokens(seed=step))
        longact.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, tokens(seed=3))
    longact.mask_gradients()
    change(model)
    with pytest.raises(RuntimeError, match=r"^grad: gradients were clipped .* longact.clip_grad_norm_"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_gradient_hooks_of_a_weight_do_not_go_with_compact_gradients():
    model = tiny_model()
    LongAct(model, grad="compact")
    model.model.layers[0].self_attn.q_proj.weight.register_hook(lambda grad: grad)
    with pytest.raises(
        ValueError, match=r"^grad: the weight of model\.layers\.0\.self_attn\.q_proj has a gradient hook"
    ):
        backward(model, tokens())


def test_nonfinite_takes_any_mixture_of_tensors():
    tensors = [
        torch.tensor([1.0, torch.nan], dtype=torch.bfloat16),
        torch.zeros(0),
        torch.tensor([65504.0], dtype=torch.float16),
        torch.tensor([[-torch.inf, 0.0]]),
        torch.tensor(1e300, dtype=torch.float64),
        torch.full((3,), 3e38),
    ]
    assert nonfinite(tensors).tolist() == [not tensor.isfinite().all() for tensor in tensors]
    assert nonfinite(tensors[1:2]).tolist() == [False]
