"""AdamW on the salient rows of a list of weights, with a step count of its own for every row."""

from torch import Tensor


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
) -> None:
    """See :func:`longact_kernels.ops.sparse_adamw_`, whose meaning this defines.

    The order of operations is that of `torch.optim.AdamW`, so that the two agree bit for bit where the sets are whole.
    """
    lr = lr.double()
    for i, (weight, grad, index) in enumerate(zip(weights, grads, rows, strict=True)):
        slots = slice(None) if compact else index
        g = grad[index].float()
        g = -g if maximize else g
        w = masters[i][slots] if masters else weight[index].float()
        steps[i][slots] += 1
        tau = steps[i][slots].double().unsqueeze(1)
        step_size = (lr / (1 - beta1**tau)).float()
        bias_correction2_sqrt = (1 - beta2**tau).sqrt().float()

        w = w * (1 - lr * weight_decay).to(w)
        m = exp_avgs[i][slots].lerp(g, 1 - beta1)
        v = exp_avg_sqs[i][slots].mul(beta2).addcmul_(g, g, value=1 - beta2)
        denom = (v.sqrt() / bias_correction2_sqrt).add_(eps)
        w = w.addcdiv(m * step_size, denom, value=-1)

        exp_avgs[i][slots] = m
        exp_avg_sqs[i][slots] = v
        if masters:
            masters[i][slots] = w
        weight[index] = w.to(weight.dtype)
