"""CPUs as a platform of verl's, by its own plug-in point: `VERL_USE_EXTERNAL_MODULES=verl_cpus`."""

import sys

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import set_platform

for name in ("empty_cache", "max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
    setattr(torch.cpu, name, lambda *_: 0)  # what verl takes for granted: there is no cache, memory is not counted
torch.cpu.set_rng_state = torch.set_rng_state


class CPUs(PlatformBase):
    device_name = "cpu"
    vendor_name = "none"
    device_module = torch.cpu

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "VISIBLE_CPUS"

    def ray_noset_envvars(self):
        return []


CPUs.__abstractmethods__ = frozenset()  # the others are not asked here, or have nothing to do
set_platform(CPUs())
sys.modules["trl"] = None  # verl 0.9 goes with an older one, and does without
