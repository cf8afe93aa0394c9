"""Optimizers that read and write only the salient channels of salient weights."""

from longact_kernels.optim.adamw import SalientAdamW

__all__ = ["SalientAdamW"]
