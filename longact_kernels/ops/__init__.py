"""One `torch.library` op a kernel: checks, allocation, and dispatch to Triton, the CPU code or the reference."""

from longact_kernels.ops.channel_stats import channel_stats
from longact_kernels.ops.linear_stats import linear_stats
from longact_kernels.ops.refresh import carry_, select
from longact_kernels.ops.salient_wgrad import salient_wgrad
from longact_kernels.ops.sparse_adamw import AdamWPlan, sparse_adamw_

__all__ = ["AdamWPlan", "carry_", "channel_stats", "linear_stats", "salient_wgrad", "select", "sparse_adamw_"]
