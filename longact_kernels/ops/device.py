"""What a launch needs to know of a tensor's device."""

import functools

import torch
from torch import Tensor


@functools.cache
def target(device: torch.device) -> str:
    """What Triton compiles for, such as "sm_90" or "gfx942"; the interpreter takes a small target's tiles."""
    if device.type != "cuda":
        return "sm_120"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def matmul_precision(tensor: Tensor) -> str:
    """The `input_precision` that multiplies as torch does: IEEE fp32 unless the user allows TF32 on an NVIDIA GPU."""
    allowed = torch.backends.cuda.matmul.allow_tf32 and not torch.version.hip
    return "tf32" if tensor.dtype == torch.float32 and allowed else "ieee"
