"""`LongActGRPOTrainer`: TRL's GRPO trainer with LongAct."""

from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from longact_kernels.integrations.rewards import checked, none_at_all
from longact_kernels.integrations.trainer import LongActTrainerMixin


class LongActGRPOTrainer(LongActTrainerMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` with `SalientAdamW`, sparse or (with `longact=None`) dense.

    All else is as in TRL: the algorithms and options of `GRPOConfig` work, except `optim`. Rewards that are none are
    errors that name their function; the metric `completions/empty_ratio` is the share of completions without text.

    Args:
        args, kwargs: arguments of `GRPOTrainer` and of `LongActTrainerMixin`.
    """

    accelerator: Any
    reward_funcs: list[Any]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reward_funcs = [one if isinstance(one, nn.Module) else checked(one) for one in self.reward_funcs]

    def _calculate_rewards(self, inputs, prompts, completions, *args, **kwargs) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)
        if rewards.isnan().all():
            raise none_at_all(self.reward_func_names, len(rewards))
        empty = torch.tensor([float(not _text(one).strip()) for one in completions], device=rewards.device)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["completions/empty_ratio"].append(self.accelerator.gather(empty).mean().item())
        return rewards


def _text(completion: Any) -> str:
    """What a completion says, a string or chat messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or message.get("tool_calls") or "") for message in completion)
