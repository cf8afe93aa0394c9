"""Which implementation of an op runs on which tensor."""

import functools
import os
import warnings

from torch import Tensor


@functools.cache
def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, and so on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(tensor: Tensor) -> bool:
    """Whether a tensor's device runs the Triton kernels: CUDA and ROCm, or any under the interpreter."""
    return tensor.is_cuda or interpreted()


@functools.cache
def warn_reference(op: str, device: str) -> None:
    """Says, once for an op and device, that the slow reference runs where a user would expect a kernel."""
    warnings.warn(
        f"longact_kernels: no kernel for '{op}' on {device}; the plain PyTorch reference runs instead (right, but slower)",
        stacklevel=3,
    )
