"""Which implementation of an op runs on a tensor: Triton on a GPU, `longact_kernels.cpu` on a CPU, or the reference."""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter

from longact_kernels.warning import LongActWarning


@functools.cache
def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, and so on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# Ops are defined here and not by `torch.library.custom_op`, which adds tens of microseconds to a call.
library = torch.library.Library("longact", "FRAGMENT")


def runs_at_once(tensor: Tensor) -> bool:
    """Whether a call may pass over PyTorch's dispatcher, which takes as long as all else that the host does for it.

    It may not where somebody traces, or would record a graph of the call.
    """
    kind = type(tensor)
    return (kind is Tensor or kind is Parameter) and not torch.is_grad_enabled() and not is_compiling()


def runs_triton(tensor: Tensor) -> bool:
    """Whether a tensor's device runs the Triton kernels: CUDA and ROCm, or any under the interpreter."""
    return (tensor.is_cuda or interpreted()) and _has_triton()


@functools.cache
def device_code(kernel: str) -> Any:
    """The module of a kernel; an import statement takes a microsecond at every call."""
    return importlib.import_module(f"longact_kernels.csrc_triton.{kernel}")


@functools.cache
def _cpu(op: str, reference: str) -> Callable | None:
    module = reference.replace(".reference.", ".cpu.")  # files of one kernel have one name
    return getattr(importlib.import_module(module), op, None) if importlib.util.find_spec(module) else None


def implementation(op: str, tensor: Tensor, kernel: Callable, reference: Callable) -> Callable:
    """The function that runs `op` on `tensor`'s device; all of them take the same arguments.

    Args:
        op: the op's name, such as "carry_"; its CPU code, if there is any, is `longact_kernels.cpu.refresh.carry_`.
        tensor: the argument that decides.
        kernel: the launcher of the Triton kernel.
        reference: the definition in plain PyTorch.
    """
    if runs_triton(tensor):
        return kernel if is_current(tensor) else functools.partial(launch, tensor, kernel)
    if tensor.is_cpu:
        return _cpu(op, reference.__module__) or reference
    warn_reference(op, tensor.device.type)
    return reference


def launch(tensor: Tensor, kernel: Callable, *args) -> Any:
    """Calls a launcher with a tensor's device as the current one: Triton launches there, wherever its arguments lie."""
    if is_current(tensor):
        return kernel(*args)
    with torch.cuda.device_of(tensor):
        return kernel(*args)


def is_current(tensor: Tensor) -> bool:
    """Whether a tensor's device is the current one, as nearly always: to see that is quicker than to switch."""
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()


@functools.cache
def warn_reference(op: str, device: str) -> None:
    """Says, once for an op and device, that the slow reference runs where a user would expect a kernel."""
    warnings.warn(
        f"no kernel for '{op}' on {device}; the plain PyTorch reference runs instead (slower)",
        LongActWarning,
        stacklevel=3,
    )
