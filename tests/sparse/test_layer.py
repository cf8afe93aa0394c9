"""SalientLinear and salient_linear against torch's own linear layer."""

import copy

import pytest
import torch
from models import backward, tiny_model, tokens

from longact_kernels import LongAct, SalientLinear
from longact_kernels.functional import RunningStats, salient_linear


def test_swap_changes_no_bit_of_forward_and_input_gradient(model):
    plain = copy.deepcopy(model)
    longact = LongAct(model, density=0.3)
    results = []
    for net in (plain, model):
        for _ in range(2):  # the second pass has a fixed set
            embeds = net.get_input_embeddings()(tokens()).detach().requires_grad_()
            logits = net(inputs_embeds=embeds).logits
            logits.square().sum().backward()
            results.append((logits.detach(), embeds.grad))
            if net is model:
                longact.mask_gradients()
                longact.advance()
    for (logits, grad), (logits_ours, grad_ours) in zip(results[:2], results[2:], strict=True):
        assert torch.equal(logits, logits_ours)
        assert torch.equal(grad, grad_ours)


def test_restore_gives_back_the_same_parameters(model):
    keys = list(model.state_dict())
    before = dict(model.named_parameters())
    longact = LongAct(model)
    assert list(model.state_dict()) == keys
    assert sum(isinstance(m, SalientLinear) for m in model.modules()) == 4
    backward(model, tokens())
    longact.restore()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert not any(isinstance(m, SalientLinear) for m in model.modules())
    assert not any(hasattr(p, "salient") for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def linear_case(dtype=torch.float32, batch=3, length=7, K=10, N=12):
    torch.manual_seed(1)
    x = torch.randn(batch, length, K, dtype=dtype, requires_grad=True)
    weight = torch.randn(N, K, dtype=dtype, requires_grad=True)
    bias = torch.randn(N, dtype=dtype, requires_grad=True)
    return x, weight, bias, torch.randn(batch, length, N, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_gradient_is_the_dense_one_on_the_set_and_zero_elsewhere(dtype):
    x, weight, bias, dy = linear_case(dtype)
    rows = torch.tensor([0, 3, 4, 11])
    torch.nn.functional.linear(x, weight, bias).backward(dy)
    dense = [x.grad, weight.grad, bias.grad]
    x.grad = weight.grad = bias.grad = None
    salient_linear(x, weight, bias, rows).backward(dy)
    assert torch.equal(x.grad, dense[0]) and torch.equal(bias.grad, dense[2])
    torch.testing.assert_close(weight.grad[rows], dense[1][rows])
    outside = torch.ones(12, dtype=torch.bool)
    outside[rows] = False
    assert not weight.grad[outside].any() and weight.grad.shape == weight.shape


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_that_comes_as_a_negated_view(axis, transposed):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(5, 8), torch.randn(8, 8, requires_grad=True), torch.randn(5, 8)
    rows = torch.tensor([1, 4, 6])
    y = salient_linear(x, weight, rows=rows, axis=axis, transposed=transposed)
    y.backward((-dy)._neg_view())
    whole = x.T @ dy if transposed else dy.T @ x
    wanted = torch.zeros_like(whole)
    place = rows if (axis == "rows") != transposed else (slice(None), rows)
    wanted[place] = whole[place]
    torch.testing.assert_close(weight.grad, wanted)


def test_gradcheck():
    x, weight, bias, _ = linear_case(torch.float64)
    assert torch.autograd.gradcheck(lambda *args: salient_linear(*args), (x, weight, bias))


def test_running_statistics_take_in_what_gradients_came_from():
    x, weight, bias, dy = linear_case()
    stats = RunningStats(torch.zeros(12), torch.zeros(12), torch.zeros(()))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0] = False  # a sequence of padding only
    mask[1, :4] = False
    y = salient_linear(x, weight, bias, None, stats, mask)
    assert not stats.absmax.any(), "a forward alone counts nothing"
    y.backward(dy)
    y = y.detach()
    assert torch.equal(stats.absmax, y[mask].abs().amax(0))
    torch.testing.assert_close(stats.l2_sum, (y[1, 4:].norm(dim=0) + y[2].norm(dim=0)))
    assert stats.sequences == 2


def test_autocast_matches_linear_under_autocast():
    model, plain = tiny_model(), tiny_model()
    LongAct(model)
    for net in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(input_ids=tokens(), labels=tokens()).loss
        loss.backward()  # outside, as PyTorch recommends: backward must find the forward's dtypes
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad), name


def test_compiles_in_one_graph():
    layer = SalientLinear(10, 12)
    x, weight, bias, dy = linear_case()
    stats = RunningStats(torch.zeros(12), torch.zeros(12), torch.zeros(()))
    rows = torch.tensor([1, 5])
    compiled = torch.compile(salient_linear, fullgraph=True, backend="aot_eager")
    compiled(x, weight, bias, rows, stats).backward(dy)
    grad = weight.grad
    weight.grad = None
    expected = RunningStats(torch.zeros(12), torch.zeros(12), torch.zeros(()))
    salient_linear(x, weight, bias, rows, expected).backward(dy)
    torch.testing.assert_close(grad, weight.grad)
    assert torch.equal(stats.absmax, expected.absmax) and stats.sequences == expected.sequences
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
