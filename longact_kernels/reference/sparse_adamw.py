"""AdamW on the salient rows (or columns) of a list of weights, with a step count of its own for every channel."""

from typing import NamedTuple

import torch
from torch import Tensor

from longact_kernels.reference.channels import check_channels

_MASK = 0xFFFFFFFF
# Numbers of a whole weight that have one random key.
_CHUNK = 1 << 16


class AdamWCall(NamedTuple):
    """The arguments of :func:`longact_kernels.ops.sparse_adamw_`, which explains them; its schema is made of these."""

    weights: list[Tensor]
    grads: list[Tensor]
    index: list[Tensor]  # type: ignore[assignment]  # of which a tuple has a method
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]
    lr: Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    compact: bool = False
    maximize: bool = False
    axis: str = "rows"
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    seed: int | None = None


def sparse_adamw_(call: AdamWCall) -> None:
    """See :func:`longact_kernels.ops.sparse_adamw_`, whose meaning this defines.

    The order of operations is that of `torch.optim.AdamW`, so that the two agree bit for bit where the sets are whole.
    """
    if call.found_inf is not None and call.found_inf.item():
        return
    lr = call.lr.double()
    whole = not call.index
    along = 0 if call.axis == "rows" else 1
    check_channels("index", call.index, [weight.shape[along] for weight in call.weights] if call.index else [])
    for i in range(len(call.weights)):
        masters = call.masters or call.weights
        tensors = call.weights[i], call.grads[i], call.exp_avgs[i], call.exp_avg_sqs[i], masters[i]
        if whole:  # a row with one step count
            weight, grad, exp_avg, exp_avg_sq, master = (tensor.reshape(1, -1) for tensor in tensors)
            steps, index = call.steps[i].view(1), torch.zeros(1, dtype=torch.int64, device=weight.device)
        else:
            weight, grad, exp_avg, exp_avg_sq, master = tensors if call.axis == "rows" else [t.t() for t in tensors]
            steps, index = call.steps[i], call.index[i]
        places = (index != -1).nonzero()[:, 0]
        index = index[places]
        slots = places if call.compact else index
        g = grad[index if grad.shape == weight.shape else places].float()
        g = g if call.grad_scale is None else g / call.grad_scale
        g = -g if call.maximize else g
        w = master[slots] if call.masters else weight[index].float()
        steps[slots] += 1
        tau = steps[slots].unsqueeze(1)
        step_size = (lr / (1 - call.beta1 ** tau.double())).float()
        bias_correction2_sqrt = (1 - call.beta2 ** tau.double()).sqrt().float()

        w = w * (1 - lr * call.weight_decay).to(w)
        m = exp_avg[slots].float().lerp(g, 1 - call.beta1)
        v = exp_avg_sq[slots].float().mul(call.beta2).addcmul_(g, g, value=1 - call.beta2)
        denom = (v.sqrt() / bias_correction2_sqrt).add_(call.eps)
        w = w.addcdiv(m * step_size, denom, value=-1)

        if call.masters:
            master[slots] = w
        if call.seed is not None:
            offs = torch.arange(weight.shape[1], device=weight.device)
            key = random_key(call.seed, i, offs // _CHUNK if whole else index.unsqueeze(1), tau.int())
            offs = offs % _CHUNK if whole else offs
            if weight.dtype != torch.float32 and not call.masters:
                w = stochastic_round(w, hash32(key ^ offs), weight.dtype)
            if exp_avg.dtype == torch.bfloat16:
                bits = hash32(moment_key(key) ^ offs)  # of which each moment takes half
                m = stochastic_round(m, bits, torch.bfloat16)
                v = stochastic_round(v, bits << 16 & _MASK, torch.bfloat16)
        weight[index] = w.to(weight.dtype)
        exp_avg[slots] = m.to(exp_avg.dtype)
        exp_avg_sq[slots] = v.to(exp_avg.dtype)


def random_key(seed: int, layer: int, channel: Tensor, tau: Tensor) -> Tensor:
    """32 bits (in int64) for each channel; `hash32(key ^ place)` gives those of an element of its weight."""
    key = hash32(torch.tensor(seed & _MASK) ^ hash32(torch.tensor(layer))).to(channel.device)
    return hash32(hash32(key ^ channel) ^ tau)


def moment_key(key: Tensor) -> Tensor:
    """The key of a channel's moments, from that of its weight."""
    return hash32(key ^ 1)


def hash32(x: Tensor) -> Tensor:
    """A bijection of 32 bits with little bias: xor-shifts and multiplications with Wellons's lowbias32 constants."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def stochastic_round(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `x` on the grid of a 16-bit dtype: up or down with odds that make the mean exact. NaN and Inf stay."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    noise = (bits >> (32 - dropped)).int()
    rounded = ((x.view(torch.int32) + noise) >> dropped << dropped).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its numbers lie 2^-24 apart
        scaled = x.abs() * 2.0**24
        up = scaled - scaled.floor() > (bits >> 8).float() * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-14, ((scaled.floor() + up) * 2.0**-24).copysign(x), rounded)
    return torch.where(x.isfinite(), rounded, x)
