"""Saliency-guided sparse updates (LongAct, arXiv 2604.14922): kernels, autograd, optimizer and a thin RL driver."""

from longact_kernels.modules import SalientLinear
from longact_kernels.optim import SalientAdamW
from longact_kernels.saliency import LongAct
from longact_kernels.warning import LongActWarning

__all__ = ["LongAct", "LongActWarning", "SalientAdamW", "SalientLinear"]
__version__ = "0.1.0"
