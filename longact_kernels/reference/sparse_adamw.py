"""AdamW on the salient rows (or columns) of a list of weights, with a step count of its own for every channel."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def sparse_adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    rows: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    compact: bool = False,
    maximize: bool = False,
    axis: str = "rows",
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | None = None,
) -> None:
    """See :func:`longact_kernels.ops.sparse_adamw_`, whose meaning this defines.

    The order of operations is that of `torch.optim.AdamW`, so that the two agree bit for bit where the sets are whole.
    """
    if found_inf is not None and found_inf.item():
        return
    lr = lr.double()
    for i, index in enumerate(rows):
        tensors = [weights[i], grads[i], exp_avgs[i], exp_avg_sqs[i], masters[i] if masters else weights[i]]
        weight, grad, exp_avg, exp_avg_sq, master = tensors if axis == "rows" else [t.t() for t in tensors]
        slots = slice(None) if compact else index
        g = (grad[index] if grad.shape == weight.shape else grad).float()
        g = g if grad_scale is None else g / grad_scale
        g = -g if maximize else g
        w = master[slots] if masters else weight[index].float()
        steps[i][slots] += 1
        tau = steps[i][slots].unsqueeze(1)
        step_size = (lr / (1 - beta1 ** tau.double())).float()
        bias_correction2_sqrt = (1 - beta2 ** tau.double()).sqrt().float()

        w = w * (1 - lr * weight_decay).to(w)
        m = exp_avg[slots].lerp(g, 1 - beta1)
        v = exp_avg_sq[slots].mul(beta2).addcmul_(g, g, value=1 - beta2)
        denom = (v.sqrt() / bias_correction2_sqrt).add_(eps)
        w = w.addcdiv(m * step_size, denom, value=-1)

        exp_avg[slots] = m
        exp_avg_sq[slots] = v
        if masters:
            master[slots] = w
        elif seed is not None and weight.dtype != torch.float32:
            w = stochastic_round(w, random_bits(seed, i, index.unsqueeze(1), tau, w.shape[1]), weight.dtype)
        weight[index] = w.to(weight.dtype)


def random_bits(seed: int, layer: int, channel: Tensor, tau: Tensor, count: int) -> Tensor:
    """32 random bits (in int64) for each of a channel's `count` elements: a hash of where it is and of its step."""
    key = _hash(torch.tensor(seed & _MASK) ^ _hash(torch.tensor(layer))).to(channel.device)
    return _hash(_hash(_hash(key ^ channel) ^ tau) ^ torch.arange(count, device=channel.device))


def _hash(x: Tensor) -> Tensor:
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
