"""The kernels alone, on plain tensors: one sparse step of one weight. python examples/functional_kernels.py"""

import torch

from longact_kernels.functional import channel_stats, salient_wgrad, select, sparse_adamw_

heads, head_dim, hidden = 8, 64, 256
x, dy = torch.randn(2, 1024, hidden), torch.randn(2, 1024, heads * head_dim)
weight = torch.randn(heads * head_dim, hidden)
exp_avg, exp_avg_sq = torch.zeros_like(weight), torch.zeros_like(weight)
steps = torch.zeros(len(weight), dtype=torch.int32)
before = weight.clone()

y = x @ weight.T
absmax, sumsq = channel_stats(y)  # one read of y; sumsq.sqrt().mean(0) is the paper's statistic
rows = select(absmax, head_dim, round(0.3 * head_dim))  # the largest 30% of every head
grad = salient_wgrad(dy.flatten(0, 1), x.flatten(0, 1), rows)
sparse_adamw_(
    [weight], [grad], [rows], [exp_avg], [exp_avg_sq], [steps], [], torch.tensor(1e-3), 0.9, 0.999, 1e-8, 0.01
)

moved = (weight != before).any(1)
print(f"{moved.sum()} of {len(weight)} rows moved, just the salient ones: {torch.equal(moved.nonzero()[:, 0], rows)}")
