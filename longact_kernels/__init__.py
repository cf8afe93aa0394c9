"""Saliency-guided sparse updates (LongAct, arXiv 2604.14922): kernels, autograd, optimizer and a thin RL driver."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longact_kernels.optim import SalientAdamW
    from longact_kernels.sparse.config import LongActConfig
    from longact_kernels.sparse.controller import LongAct
    from longact_kernels.sparse.layer import SalientLinear
    from longact_kernels.warning import LongActWarning

__all__ = ["LongAct", "LongActConfig", "LongActWarning", "SalientAdamW", "SalientLinear"]
__version__ = "0.1.0"

_MODULES = {
    "LongAct": "sparse.controller",
    "LongActConfig": "sparse.config",
    "LongActWarning": "warning",
    "SalientAdamW": "optim",
    "SalientLinear": "sparse.layer",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: `longact --help` does without the seconds of torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
