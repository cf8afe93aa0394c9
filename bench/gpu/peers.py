"""Other ways to an AdamW step on the salient rows of bf16 weights with fp32 masters, all on the same weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.models import Model
from bench.race import DEVICE

HYPER = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


class Weights:
    """All query and key weights of a model, with masters, gradients, moments and salient sets."""

    def __init__(self, model: Model):
        shapes = [(n, model.K) for n in model.sizes]
        self.weights = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]
        self.grads = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]
        self.masters = [weight.float() for weight in self.weights]
        self.exp_avgs = [torch.zeros(shape, device=DEVICE) for shape in shapes]
        self.exp_avg_sqs = [torch.zeros(shape, device=DEVICE) for shape in shapes]
        self.steps = [torch.zeros(shape[0], dtype=torch.int32, device=DEVICE) for shape in shapes]
        self.rows = [random_rows(model, n) for n in model.sizes]


def random_rows(model: Model, n: int) -> Tensor:
    """As many random channels of every head as are salient."""
    order = torch.rand(n // model.head_dim, model.head_dim, device=DEVICE).argsort(1)[:, : model.salient]
    first = torch.arange(0, n, model.head_dim, device=DEVICE).unsqueeze(1)
    return (order + first).flatten().sort().values


def dense(held: Weights, **how: bool) -> Callable:
    """torch.optim.AdamW on the masters: gradients widened before, masters rounded into the weights after."""
    optimizer, targets = _adamw(held.masters, **how)

    def step():
        torch._foreach_copy_([target.grad for target in targets], held.grads)
        optimizer.step()
        torch._foreach_copy_(held.weights, held.masters)

    return step


def gathered(held: Weights, **how: bool) -> Callable:
    """AdamW on copies of the salient rows, which go back into their places after."""
    full = (held.masters, held.exp_avgs, held.exp_avg_sqs)
    copies = [master[rows] for master, rows in zip(held.masters, held.rows, strict=True)]
    optimizer, targets = _adamw(copies, **how)
    optimizer.step()  # makes its states

    def step():
        for i, target in enumerate(targets):
            state, rows = optimizer.state[target], held.rows[i]
            for whole, copy in zip(full, (target.data, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                torch.index_select(whole[i], 0, rows, out=copy)
            target.grad.copy_(held.grads[i][rows])
        optimizer.step()
        for i, target in enumerate(targets):
            state, rows = optimizer.state[target], held.rows[i]
            for whole, copy in zip(full, (target.data, state["exp_avg"], state["exp_avg_sq"]), strict=True):
                whole[i].index_copy_(0, rows, copy)
            held.weights[i].index_copy_(0, rows, target.data.bfloat16())

    return step


def _adamw(masters: list[Tensor], **how: bool) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    targets = [torch.nn.Parameter(master, requires_grad=False) for master in masters]
    for target in targets:
        target.grad = torch.zeros_like(target)
    return torch.optim.AdamW(targets, **HYPER, **how), targets


def masked(weight, grad, mask, m, v, tau, master, lr: float, beta1: float, beta2: float, eps: float, decay: float):
    """AdamW whose every store is masked, in plain torch."""
    g = grad.float()
    next_tau = tau + mask
    next_m, next_v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    steps = next_tau.float().unsqueeze(1)
    update = next_m / (1 - beta1**steps) / ((next_v / (1 - beta2**steps)).sqrt() + eps)
    next_master = (1 - lr * decay) * master - lr * update
    kept = mask.unsqueeze(1)
    m.copy_(torch.where(kept, next_m, m))
    v.copy_(torch.where(kept, next_v, v))
    master.copy_(torch.where(kept, next_master, master))
    weight.copy_(master)
    tau.copy_(next_tau)


def compiled_masked(held: Weights, backend: str) -> Callable:
    """`masked` through torch.compile, a call for each weight."""
    masks = []
    for weight, rows in zip(held.weights, held.rows, strict=True):
        mask = torch.zeros(len(weight), dtype=torch.bool, device=DEVICE)
        mask[rows] = True
        masks.append(mask)
    one = torch.compile(masked, backend=backend, dynamic=False)
    scalars = (HYPER["lr"], *HYPER["betas"], HYPER["eps"], HYPER["weight_decay"])
    states = (held.exp_avgs, held.exp_avg_sqs, held.steps, held.masters)
    arguments = list(zip(held.weights, held.grads, masks, *states, strict=True))

    def step():
        for tensors in arguments:
            one(*tensors, *scalars)

    return step
