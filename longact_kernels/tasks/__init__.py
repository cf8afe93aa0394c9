"""Synthetic long-context tasks: seeded, of any length, with the answer known.

In the form of RULER's configurations (https://arxiv.org/abs/2404.06654), and a key-chain task after LoongRL's
(https://arxiv.org/abs/2510.19363). `TASKS` lists them; `build_dataset` makes prompts of one.
"""

from longact_kernels.tasks.build import build_dataset
from longact_kernels.tasks.catalogue import TASKS
from longact_kernels.tasks.sample import Sample, Setting

__all__ = ["TASKS", "Sample", "Setting", "build_dataset"]
